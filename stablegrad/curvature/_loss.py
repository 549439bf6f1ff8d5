"""A loss as a function of what an optimizer moves, with everything else bound."""

import dataclasses
import math
import sys
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks, _trees


class Problem(NamedTuple):
    """A loss, and where it is looked at; `loss(point, (held, batch))`."""

    loss: "Loss"
    point: Any  # The floating-point leaves, float32 at least; None for the others.
    held: tuple  # What the loss needs besides, and no optimizer moves: pytrees.


@dataclasses.dataclass(frozen=True)
class Loss:
    """`loss(point, data)`: a rank-0 float32, or float64.

    Hashable, so that the programs which measure a loss are compiled once for it.
    """

    function: Callable
    structure: Any  # Of the parameters.
    moves: tuple[bool, ...]  # Leaf by leaf.
    constants: tuple[Hashable, ...]  # Leaves that are no arrays, such as functions.

    def __call__(self, point, data) -> jax.Array:
        """Puts the parameters together again, and calls the user's function."""
        (arrays, rest), batch = data
        moving = iter(jax.tree.leaves(point))
        held = iter(arrays)
        constants = iter(self.constants)
        leaves = []
        for moves in self.moves:
            if moves:
                leaves.append(next(moving))
            else:
                array = next(held)
                leaves.append(next(constants) if array is None else array)
        params = self.structure.unflatten(leaves)
        given = (params, batch) if rest is None else (params, rest, batch)
        value = self.function(*given)
        if not hasattr(value, "dtype") and not isinstance(value, float):
            raise TypeError(
                "`loss_fn` must return the loss alone, a scalar array, got "
                f"{type(value).__name__}. With auxiliary outputs, pass "
                "`lambda params, batch: loss_fn(params, batch)[0]`."
            )
        value = jnp.asarray(value)
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                "`loss_fn` must return a real scalar, got an array of shape "
                f"{value.shape} and dtype {value.dtype}."
            )
        return value.astype(np.promote_types(np.float32, value.dtype))


@dataclasses.dataclass(frozen=True)
class _OfModule:
    """A loss of a Flax NNX module, as a function of its parameters' state.

    Every call works on a copy, so that the user's module stays as it is, and its random
    streams give the same numbers every time.
    """

    function: Callable
    merge: Callable
    graphdef: Hashable

    def __call__(self, state, rest, batch) -> jax.Array:
        return self.function(self.merge(self.graphdef, state, rest), batch)


def problem(loss_fn: Callable, params) -> Problem:
    """Splits parameters, or a Flax NNX module, into what moves and what is held.

    Half precision moves as float32: a step at a small rate would be lost in rounding.
    """
    if not callable(loss_fn):
        raise TypeError(
            "`loss_fn` must be a function of (params, batch), got "
            f"{type(loss_fn).__name__}."
        )
    function, rest = _hashable(loss_fn), None
    nnx: Any = sys.modules.get("flax.nnx")  # Who holds a module has imported it.
    if nnx is not None and isinstance(params, nnx.Module):
        graphdef, *states = nnx.split(params, nnx.Param, ...)
        pure = getattr(nnx, "as_pure", None) or nnx.pure  # The older name.
        params, rest = map(pure, states)
        function = _OfModule(function, nnx.merge, graphdef)
    leaves, structure = jax.tree.flatten(params)
    arrays = [_is_array(leaf) for leaf in leaves]
    pairs = list(zip(leaves, arrays, strict=True))
    moves = tuple(array and _trees.is_inexact(leaf) for leaf, array in pairs)
    if not any(moves):
        raise ValueError("`params` must have a floating-point leaf, got none.")
    point = structure.unflatten(
        _widened(leaf) if moving else None
        for leaf, moving in zip(leaves, moves, strict=True)
    )
    constants = tuple(leaf for leaf, array in pairs if not array)
    held = tuple(
        leaf if array else None
        for (leaf, array), moving in zip(pairs, moves, strict=True)
        if not moving
    )
    return Problem(Loss(function, structure, moves, constants), point, (held, rest))


def require_finite(value, gradient_norm) -> None:
    """Raises ValueError unless the loss and its gradient are finite."""
    loss, gradient = float(value), float(gradient_norm)
    if not (math.isfinite(loss) and math.isfinite(gradient)):
        raise ValueError(
            "`params` must give a finite loss and gradient on every batch, got a loss "
            f"of {loss:g} and a gradient norm of {gradient:g}."
        )


def outline(tree) -> str:
    """A pytree's shapes on one line."""
    if hasattr(tree, "dtype"):
        return f"an array of shape {tuple(tree.shape)}"
    return " ".join(repr(jax.tree.map(np.shape, tree)).split())[:100]


def optimizer(tx, asker: str) -> optax.GradientTransformationExtraArgs:
    """The same transformation, fit to be a static argument of `jax.jit`."""
    _checks.require_optimizer(asker, tx)
    tx = optax.with_extra_args_support(tx)
    return optax.GradientTransformationExtraArgs(
        _hashable(tx.init), _hashable(tx.update)
    )


def _hashable(function: Callable) -> Callable:
    try:
        hash(function)
    except TypeError:
        return lambda *args, **kwargs: function(*args, **kwargs)
    return function


def _is_array(leaf) -> bool:
    """Arrays and floats; Python's integers and flags may be settings of a module."""
    return hasattr(leaf, "dtype") or isinstance(leaf, float | complex)


def _widened(leaf) -> jax.Array:
    leaf = jnp.asarray(leaf)
    if jnp.iscomplexobj(leaf):
        raise TypeError("`params` must be real, got a complex leaf.")
    return leaf.astype(np.promote_types(np.float32, leaf.dtype))
