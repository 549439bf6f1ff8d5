"""One run with faults, the same however it is spread over devices."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import stablegrad as sg

RTOL = 1e-5  # Sums of squares over shards are rounded in another order.
# Up to 2**16 elements, a CPU checks every step before it is written.
ROWS = {"small": 32, "large": 4096}
STEPS = 36
LOUD, NAN, SPIKE, HUGE = 27, 29, 31, 33  # Thresholds have warmed up by 25.
SKIPPED = [NAN, SPIKE, HUGE]

OPTIMIZERS: dict[str, Callable[..., sg.GuardedTransformation]] = {
    "stabilize": lambda **axis: sg.stabilize(optax.adamw(1e-2), **axis),
    "per leaf": lambda **axis: sg.guard(
        optax.adamw(1e-2),
        sg.clip(sg.zscore(2.5, per="leaf")),
        sg.skip(sg.nonfinite(), sg.zscore(30.0)),
        **axis,
    ),
}
MODES = ("update", "apply")
# All collectives of a guarded step together, those of rare branches included.
BYTES_PER_LEAF = 128
SPECS = {
    "fsdp": {
        "bias": P("data"),
        "embed": P("data"),
        "gain": P(),
        "kernel": P(None, "data"),
    },
    "tensor": {
        "bias": P("model"),
        "embed": P("data", "model"),
        "gain": P(),
        "kernel": P("data", "model"),
    },
}


class Run(NamedTuple):
    """What a run leaves behind."""

    params: Any  # NumPy arrays.
    history: dict[str, np.ndarray]  # Each of the metrics, one row a step.
    state: Any  # The optimizer's, where the devices have it.


def parameters(size: str) -> dict[str, np.ndarray]:
    """About 2**10 or 2**17 parameters, all near 1, so that relative errors count."""
    rng = np.random.default_rng(0)
    return {
        name: (1 + 0.1 * rng.normal(size=shape)).astype(np.float32)
        for name, shape in _shapes(size).items()
    }


def gradients(size: str, step: int) -> dict[str, np.ndarray]:
    """Healthy ones, but for a loud step, a spike, a nan and a huge one."""
    rng = np.random.default_rng(100 + step)
    levels = {LOUD: 4.0, SPIKE: 1e4, HUGE: 1e25}
    grads = {
        name: leaf * np.float32(levels.get(step, rng.lognormal(0, 0.1)))
        for name, leaf in _directions(size).items()
    }
    if step == NAN:  # In the last device's share alone.
        grads["embed"][-1, -1] = np.nan
    return grads


def loss(step: int) -> np.float32:
    """Falls slowly, with noise."""
    return np.float32(3 - 0.01 * step + 0.02 * np.random.default_rng(step).normal())


def step_of(tx, mode: str):
    """One step: parameters, state and gradients to parameters, state and metrics."""

    def step(params, state, grads, value):
        if mode == "apply":
            params, state = sg.apply(tx, grads, state, params, value=value)
        else:
            updates, state = tx.update(grads, state, params, value=value)
            params = optax.apply_updates(params, updates)
        return params, state, sg.metrics(state)

    return step


def shardings(layout: str, kind=AxisType.Auto) -> dict[str, NamedSharding]:
    """Where each parameter lies, on all devices."""
    devices = jax.device_count()
    shape = {"fsdp": (devices, 1), "tensor": (devices // 2, 2)}[layout]
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))
    return {name: NamedSharding(mesh, spec) for name, spec in SPECS[layout].items()}


def place(tree, places):
    """The same arrays on all devices, of which each process fills its own."""
    return jax.tree.map(
        lambda leaf, where: jax.make_array_from_callback(
            leaf.shape, where, lambda index: leaf[index]
        ),
        tree,
        places,
    )


def parameter_of(path) -> str | None:
    """The key at the end of a path in a state: a parameter's, for its moments."""
    return getattr(path[-1], "key", None)


def spread(tx, params, places):
    """Parameters and state as a training script has them on a mesh."""
    params = place(params, places)
    everywhere = NamedSharding(places["gain"].mesh, P())
    where = jax.tree_util.tree_map_with_path(
        lambda path, _: places.get(parameter_of(path), everywhere),
        jax.eval_shape(tx.init, params),
    )
    init = jax.jit(tx.init, out_shardings=where)
    return params, init(params)


def drive(step, params, state, gradients_at) -> Run:
    """Takes all steps; `gradients_at(t)` puts gradients where the parameters are."""
    rows = []
    for t in range(STEPS):
        params, state, seen = step(params, state, gradients_at(t), loss(t))
        # Between processes, CPU collectives of two steps in flight may deadlock.
        jax.block_until_ready((params, state))
        rows.append(jax.device_get(seen))
    history = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return Run(params, history, state)


@functools.cache
def alone(optimizer: str, size: str) -> Run:
    """The run on one device, of arrays that are whole."""
    tx, params = OPTIMIZERS[optimizer](), parameters(size)
    step = jax.jit(step_of(tx, "update"))
    run = drive(step, params, tx.init(params), lambda t: gradients(size, t))
    assert np.flatnonzero(run.history["skipped"]).tolist() == SKIPPED
    assert run.history["clip_scale"][LOUD] < 1
    return run


def assert_same(run: Run, reference: Run) -> None:
    """The same parameters and norms; the same counts and decisions to the bit."""
    assert run.history.keys() == reference.history.keys()
    for name, expected in reference.history.items():
        if np.issubdtype(expected.dtype, np.floating):
            np.testing.assert_allclose(
                run.history[name], expected, rtol=RTOL, err_msg=name
            )
        else:
            np.testing.assert_array_equal(run.history[name], expected, err_msg=name)
    for name, expected in reference.params.items():
        np.testing.assert_allclose(run.params[name], expected, rtol=RTOL, err_msg=name)


def _shapes(size: str) -> dict[str, tuple[int, ...]]:
    rows = ROWS[size]
    return {"bias": (rows,), "embed": (rows, 16), "gain": (8,), "kernel": (16, rows)}


@functools.cache
def _directions(size: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in _shapes(size).items()
    }
