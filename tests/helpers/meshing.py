"""Three steps on a mesh of eight devices, and the same on one device."""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import stablegrad as sg

AXIS, DEVICES = "d", 8
SHAPES = {
    "small": {"b": (40,), "w": (40, 24)},
    "large": {"b": (2400,), "w": (600, 496)},
}
LAYOUTS = {
    "fsdp": {"b": P(AXIS), "w": P(AXIS, None)},
    "tensor": {"b": P(None), "w": P(None, AXIS)},
    "replicated": {"b": P(None), "w": P(None, None)},
}
OPTIMIZERS = {
    "stabilize": lambda: sg.stabilize(optax.adamw(1e-3)),
    "per leaf": lambda: sg.stabilize(optax.adamw(1e-3), per="leaf"),
    "guard": lambda: sg.guard(optax.adam(0.1), sg.clip(sg.fixed(1.0)), sg.skip()),
    "olmo": lambda: sg.skip_bad_steps(optax.sgd(0.1), "olmo"),
}
NAN_STEP, STEPS = 1, 3


class Trial(NamedTuple):
    """What three steps leave behind."""

    params: dict[str, Any]
    history: dict[str, np.ndarray]  # Each of the metrics, one row a step.
    programs: int  # Compiled for the three steps.


class Model(nnx.Module):
    """A model of two parameters."""

    def __init__(self, params):
        """Wrap the arrays."""
        self.b, self.w = nnx.Param(params["b"]), nnx.Param(params["w"])


def tree(size, seed, dtype=np.float32):
    """Numbers near 1 with the structure of the parameters."""
    rng = np.random.default_rng(seed)
    return {
        name: (1 + 0.1 * rng.normal(size=shape)).astype(dtype)
        for name, shape in SHAPES[size].items()
    }


def gradients(size, step, dtype=np.float32):
    """Gradients, one of which has a nan in the last device's share.

    Squares of those in half precision overflow float16.
    """
    level = 1 if dtype == np.float32 else 300
    grads = {name: level * leaf for name, leaf in tree(size, 100 + step, dtype).items()}
    if step == NAN_STEP:
        grads["w"][-1, -1] = np.nan
    return grads


def places(layout, kind):
    """Return the place of each parameter, with the spec that a step returns."""
    mesh = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(kind,))

    def spec(wanted):
        if kind == AxisType.Explicit:
            return wanted
        while wanted and wanted[-1] is None:
            wanted = P(*wanted[:-1])
        return wanted

    return {k: NamedSharding(mesh, spec(s)) for k, s in LAYOUTS[layout].items()}


def under(where, sets_mesh):
    """Return the context in which steps run."""
    return jax.set_mesh(where["w"].mesh) if sets_mesh else contextlib.nullcontext()


def take_three_steps(tx, through, size, dtype=np.float32, where=None) -> Trial:
    """Take three steps through `update`, `apply` or `nnx.Optimizer.update`."""
    put = lambda leaves: jax.device_put(leaves, where)
    params = put(tree(size, 0, dtype))
    if through == "nnx":
        start, step = _nnx(tx, params)
    else:
        start, step = (params, tx.init(params)), functools.partial(_step, tx, through)
    jitted, carry, rows = jax.jit(step), start, []
    for t in range(STEPS):
        carry, seen = jitted(carry, put(gradients(size, t, dtype)), np.float32(2))
        rows.append(jax.device_get(seen))
    params = carry[0]
    if through == "nnx":
        params = {name: leaf[...] for name, leaf in params.items()}
    history = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return Trial(params, history, jitted._cache_size())


def _step(tx, through, carry, grads, value):
    params, state = carry
    if through == "apply":
        params, state = sg.apply(tx, grads, state, params, value=value)
    else:
        updates, state = tx.update(grads, state, params, value=value)
        params = optax.apply_updates(params, updates)
    return (params, state), sg.metrics(state)


def _nnx(tx, params):
    model = Model(params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    where = params["w"].sharding
    if isinstance(where, NamedSharding):  # Flax leaves its own counter elsewhere.
        counter = optimizer.step[...]
        optimizer.step[...] = jax.device_put(counter, NamedSharding(where.mesh, P()))
    of_model, weights = nnx.split(model)
    of_optimizer, rest = nnx.split(optimizer)

    def step(carry, grads, value):
        model = nnx.merge(of_model, carry[0])
        optimizer = nnx.merge(of_optimizer, carry[1])
        optimizer.update(model, nnx.state(Model(grads)), value=value)
        carry = nnx.state(model), nnx.state(optimizer)
        return carry, sg.metrics(optimizer.opt_state)

    return (weights, rest), step


@functools.cache
def on_one_device(optimizer, size, dtype=np.float32) -> Trial:
    """The same steps without a mesh, in float32; inputs are rounded to `dtype`."""
    tx = OPTIMIZERS[optimizer]()
    wide = lambda leaves: jax.tree.map(lambda x: x.astype(np.float32), leaves)
    carry, rows = wide(tree(size, 0, dtype)), []
    carry = (carry, tx.init(carry))
    step = jax.jit(functools.partial(_step, tx, "update"))
    for t in range(STEPS):
        carry, seen = step(carry, wide(gradients(size, t, dtype)), np.float32(2))
        rows.append(jax.device_get(seen))
    history = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return Trial(carry[0], history, step._cache_size())
