"""One process of several, for `test_processes.py`: the scenario on its devices.

    python -m helpers.worker PORT PROCESSES PROCESS OUT

Writes parameters, metrics, and how many gradients of its own were nan, to OUT.
"""

import os
import sys
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from helpers.scenario import (
    NAN,
    OPTIMIZERS,
    drive,
    gradients,
    loss,
    parameters,
    place,
    shardings,
    spread,
    step_of,
)

DEVICES = 4  # Of all processes together.
CASES = [("stabilize", "apply", "large"), ("per leaf", "update", "small")]


def end_with_parent() -> None:
    """Ends this process when the test that holds its standard input is gone."""
    sys.stdin.read()
    os._exit(1)


def main(port: str, processes: int, process: int, out: str) -> None:
    """Runs all cases."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    jax.config.update("jax_num_cpu_devices", DEVICES // processes)
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    assert jax.device_count() == DEVICES and jax.process_count() == processes
    written = {}
    for optimizer, mode, size in CASES:
        tx, places = OPTIMIZERS[optimizer](), shardings("fsdp")
        grads_at = lambda t, size=size, places=places: place(gradients(size, t), places)
        params, state = spread(tx, parameters(size), places)
        step = jax.jit(step_of(tx, mode))
        program = step.lower(params, state, params, loss(0)).compile()
        run = drive(program, params, state, grads_at)
        params = multihost_utils.process_allgather(run.params, tiled=True)
        parts = {"params": params, "history": run.history}
        for part, arrays in parts.items():
            for name, array in arrays.items():
                written[f"{optimizer}/{part}/{name}"] = np.asarray(array)
        shards = [
            shard.data
            for leaf in jax.tree.leaves(grads_at(NAN))
            for shard in leaf.addressable_shards
        ]
        nans = sum(int(np.isnan(shard).sum()) for shard in shards)
        written[f"{optimizer}/nans/own"] = np.array(nans)
    np.savez(out, **written)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
