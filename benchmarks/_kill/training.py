"""The process that is killed: it trains, saves, and goes on from what it finds.

    python benchmarks/_kill/training.py FOLDER [STEPS]

It tells on standard output, a line each, what it does: `starts`, `restored 8` (-1:
nothing), `step 9`, `begun 12` as a checkpoint is handed to Orbax, `whole 12` once it is
on the disk, `ends`. The run has nan batches, a planned spike, and a burst of bad labels
that `roll_back` undoes. In the end `result.json` has digests of all that it made.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stablegrad as sg
from stablegrad.integrations.orbax import HealthyCheckpoints

STEPS = 120
EVERY = 3  # Steps from one checkpoint to the next.
SIZES = (8, 64, 4)
NAN_STEPS, SPIKE, BURST = (17, 18, 71), 40, range(50, 58)
TX = sg.stabilize(
    optax.adamw(optax.cosine_decay_schedule(1e-2, STEPS)),
    sg.roll_back(
        sg.fixed(50.0, of="value"), after=4, every=9, hold_steps=2, cooldown_steps=4
    ),
    record_norms=16,
)


def start() -> tuple[Any, Any]:
    """All that is trained or counted, and the optimizer's state, before a step."""
    keys = jax.random.split(jax.random.key(0), 2)
    inputs, width, outputs = SIZES
    params = {
        "first": jax.random.normal(keys[0], (inputs, width)) / inputs**0.5,
        "last": jax.random.normal(keys[1], (width, outputs)) / width**0.5,
    }
    average = jnp.zeros(width)  # Of the activations, as batch norm keeps one.
    return (params, average), TX.init(params)


def batch_at(t):
    """The batch of a step, faults included; it depends on the step alone."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), t), 2)
    x = jax.random.normal(keys[0], (32, SIZES[0]))
    y = jnp.sin(x[:, : SIZES[2]]) + 0.1 * jax.random.normal(keys[1], (32, SIZES[2]))
    is_nan = (t == jnp.array(NAN_STEPS)).any()
    x = jnp.where(is_nan, x.at[3, 3].set(jnp.nan), x)
    x = jnp.where(t == SPIKE, 1e4 * x, x)
    return x, jnp.where((t >= BURST.start) & (t < BURST.stop), y + 30.0, y)


def loss_fn(params, x, y):
    """The loss, and the activations' mean."""
    hidden = jnp.tanh(x @ params["first"])
    return jnp.mean((hidden @ params["last"] - y) ** 2), jnp.mean(hidden, axis=0)


@jax.jit
def step(trees, state, t):
    """One step; the average moves with it, or stays."""
    params, average = trees
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, mean), grads = value_and_grad(params, *batch_at(t))
    params, state = sg.apply(TX, grads, state, params, value=loss, batch_id=t)
    moved = 0.9 * average + 0.1 * mean
    return (params, sg.keep_if_skipped(state, average, moved)), state, loss


def digest(tree) -> str:
    """One word for all bits of a tree."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def tell(*words) -> None:
    """Prints a line at once."""
    print(*words, flush=True)


def main(folder: Path, steps: int = STEPS) -> None:
    """Trains to the end, from the newest checkpoint if there is one."""
    tell("starts")
    trees, state = start()
    losses: list[str] = []
    with HealthyCheckpoints(folder / "checkpoints", keep=2) as checkpoints:
        found = checkpoints.restore(trees, state)
        first, begun = 0, None
        if found:
            trees, state = found.trees, found.opt_state
            first, losses = found.metadata["next"], found.metadata["losses"]
            assert sg.is_healthy(state, trees)
        tell("restored", found.step if found else -1)
        for t in range(first, steps):
            trees, state, loss = step(trees, state, t)
            losses.append(np.asarray(loss).tobytes().hex())
            tell("step", t)
            if (t + 1) % EVERY:
                continue
            checkpoints.wait()
            if begun is not None:
                tell("whole", begun)
            metadata = {"next": t + 1, "losses": losses}
            if checkpoints.save(t, trees, state, metadata):
                begun = t
                tell("begun", t)
            sg.save_events(state, folder / "events.jsonl")
    result = {
        "parameters and averages": digest(trees),
        "inner state and guard": digest(state),
        "losses": losses,
        "events": (folder / "events.jsonl").read_text(),
        "metrics": repr(sg.scalars(state, every=True)),
    }
    (folder / "result.json").write_text(json.dumps(result))
    tell("ends")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
