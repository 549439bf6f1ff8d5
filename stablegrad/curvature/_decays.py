"""The decay rates and the preconditioner of Adam and RMSProp, read from their state."""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from .._trees import nodes

_TOLERANCE = 1e-4  # Largest difference between two readings of one decay.
_ADAM_FIELDS = {"count", "mu", "nu"}  # Other fields belong to other update rules.


class Decays(NamedTuple):
    momentum: float
    b2: float
    averaged: bool  # Whether m = b m + (1 - b) g, kept as `mu`, and not m = b m + g.


def decays(tx, params, momentum: float | None, b2: float | None) -> Decays:
    """Return the given decays, where None is replaced by what a new state shows.

    A moment that is x after a gradient of ones becomes (1 + b) x after another one, and
    b x after a gradient of zeros. Raise ValueError if the two readings disagree, as
    under another rule: a guess could give a wrong limit.
    """
    adam = _second_moment(jax.eval_shape(tx.init, params), params)
    averaged = hasattr(adam, "mu")
    if momentum is not None and b2 is not None:
        return Decays(float(momentum), float(b2), averaged)
    b2_readings, momentum_readings, first_moves, last_moves = _readings(tx, params)
    if b2 is None:
        b2 = _agreed(b2_readings)
        if not b2 or not set(getattr(adam, "_fields", ())) <= _ADAM_FIELDS:
            raise _not_shown("b2")
    if momentum is None:
        momentum = _agreed(momentum_readings)
        # With momentum a step without a gradient moves, without momentum it does not.
        # A first step that does not move, as in a warm-up, shows nothing.
        consistent = not first_moves or bool(last_moves) == bool(momentum)
        if momentum is None or not consistent:
            raise _not_shown("momentum")
    return Decays(float(momentum), float(b2), averaged)


def preconditioner(
    tx, state, grads, params, decays: Decays, eps, eps_root
) -> jax.Array:
    """Return the diagonal P of the next step, flat and positive, without a floor.

        P = (1 - b1^t) (sqrt(v_t / (1 - b2^t) + eps_root) + eps)

    v_t includes the current gradient. There is no bias correction if the state has no
    step count (as in RMSProp); b1 is 0 if the momentum is not averaged.
    """
    before = tx.init(params) if state is None else state
    value = jnp.zeros((), jnp.float32)
    _, after = tx.update(grads, before, params, value=value)
    adam = _second_moment(after, params)
    moments = ravel_pytree(adam.nu)[0].astype(jnp.float32)
    count = getattr(adam, "count", None)
    if count is None or inspect.isroutine(count):  # Every tuple has such a method.
        return jnp.sqrt(moments + eps_root) + eps
    steps = jnp.asarray(count).astype(jnp.float32)
    root = jnp.sqrt(moments / (1 - decays.b2**steps) + eps_root) + eps
    return root * (1 - decays.momentum**steps) if decays.averaged else root


@functools.partial(jax.jit, static_argnames="tx")
def _readings(tx, params):
    """Read b2 and the momentum, and whether two steps move the parameters.

    The first step is on a gradient of ones, the second one on zeros.
    """
    # All parameters are zero, so that weight decay adds nothing to the gradient.
    zeros = jax.tree.map(jnp.zeros_like, params)
    ones = jax.tree.map(jnp.ones_like, params)

    def step(grads, state):
        return tx.update(grads, state, zeros, value=jnp.zeros((), jnp.float32))

    fresh = tx.init(zeros)
    first, once = step(ones, fresh)
    _, twice = step(ones, once)
    last, rested = step(zeros, once)

    def read(field: str) -> jax.Array:
        start, one, two, rest = (
            ravel_pytree(getattr(_nodes_with(field, state)[0], field))[0]
            for state in (fresh, once, twice, rested)
        )
        shrinkage, growth = rest / one, (two - one) / (one - start)
        ends = [f(x) for x in (shrinkage, growth) for f in (jnp.min, jnp.max)]
        return jnp.stack(ends)

    averages, sums = _nodes_with("mu", fresh), _nodes_with("trace", fresh)
    if len(averages) + len(sums) > 1:
        momentum = jnp.full(1, jnp.nan)
    elif averages:
        momentum = read("mu")
    elif sums:  # The input follows the second moment: its growth shows no decay.
        momentum = read("trace")[:2]
    else:
        momentum = jnp.zeros(1)
    first_moves, last_moves = (jnp.any(ravel_pytree(u)[0] != 0) for u in (first, last))
    return read("nu"), momentum, first_moves, last_moves


def _agreed(readings) -> float | None:
    """Return the decay if all readings give the same one, else None."""
    read = [float(reading) for reading in readings]
    agree = all(0 <= x < 1 for x in read) and max(read) - min(read) <= _TOLERANCE
    return read[0] if agree else None


def _not_shown(name: str) -> ValueError:
    return ValueError(
        f"`{name}` must be given for this `tx`, because its state does not show it as "
        f"in Adam and RMSProp, got `{name}=None`. `sharpness` supports optimizers that "
        "divide by the root of an average of squared gradients."
    )


def _second_moment(state, params) -> Any:
    """Return the one node of a state that holds all second moments."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    found = _nodes_with("nu", state)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(node.nu)) for node in found]
    if sizes != [size]:
        of = f" of {' and '.join(map(str, sizes))}" if sizes else ""
        raise ValueError(
            "`tx` must hold one second moment, a state with `nu` as in Adam and "
            f"RMSProp, of all {size} parameters, got {len(sizes)}{of}. Leave `tx` out "
            "for the plain Hessian, or pass only the parameters of one optimizer."
        )
    return found[0]


def _nodes_with(field: str, state) -> list[Any]:
    """Return the nodes of a state with a field of this name that is not a method."""
    none = lambda: None  # A module that is a moment can be called, too.
    has_field = lambda node: not inspect.isroutine(getattr(node, field, none))
    return nodes(state, has_field)
