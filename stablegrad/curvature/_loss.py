"""A loss as a function of the parameters that an optimizer updates."""

import dataclasses
import math
import sys
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks, _trees


@dataclasses.dataclass(frozen=True)
class Loss:
    """`loss(params, (frozen, batch))`: a rank-0 array, float32 or wider.

    It is hashable, so that `jax.jit` compiles once for each loss.
    """

    function: Callable
    treedef: Any  # The structure of the user's parameters.
    constants: tuple[Hashable, ...]  # Leaves that are not arrays; None for the others.
    graphdef: Any  # The static part of a Flax NNX module; None for other pytrees.

    def __call__(self, params, data) -> jax.Array:
        """Reassembles the user's parameters and calls the user's function."""
        (frozen, other_state), batch = data
        trained = self.treedef.flatten_up_to(params)
        rows = zip(trained, frozen, self.constants, strict=True)
        leaves = [next(x for x in row if x is not None) for row in rows]
        model = self.treedef.unflatten(leaves)
        if self.graphdef is not None:
            # A new module in each call: the user's module and its random streams
            # keep their state.
            model = _nnx().merge(self.graphdef, model, other_state)
        value = self.function(model, batch)
        got = type(value).__name__
        if hasattr(value, "dtype") or isinstance(value, float):
            value = jnp.asarray(value)
            if value.shape == () and jnp.issubdtype(value.dtype, jnp.floating):
                return value.astype(np.promote_types(np.float32, value.dtype))
            got = f"an array of shape {value.shape} and dtype {value.dtype}"
        raise TypeError(
            f"`loss_fn` must return the loss alone, a real scalar, got {got}. If it "
            "also returns auxiliary outputs, pass "
            "`lambda params, batch: loss_fn(params, batch)[0]`."
        )


def problem(loss_fn: Callable, params) -> tuple[Loss, Any, tuple]:
    """Separates the leaves that an optimizer updates from all others.

    Returns:
        The loss; the floating-point parameters, in float32 or wider and with None for
        the other leaves; and the frozen arrays, which `loss` takes beside the batch.
    """
    if not callable(loss_fn):
        raise TypeError(
            "`loss_fn` must be a function of (params, batch), got "
            f"{type(loss_fn).__name__}."
        )
    graphdef, other_state, nnx = None, None, _nnx()
    if nnx is not None and isinstance(params, nnx.Module):
        graphdef, *states = nnx.split(params, nnx.Param, ...)
        pure = getattr(nnx, "as_pure", None) or nnx.pure  # The older name.
        params, other_state = map(pure, states)
    leaves, treedef = jax.tree.flatten(params)
    trained, frozen, constants = [], [], []
    for leaf in leaves:
        # Python integers and flags may be settings of a module: they stay constants.
        is_array = hasattr(leaf, "dtype") or isinstance(leaf, float | complex)
        is_trained = is_array and _trees.is_inexact(leaf)
        trained.append(_widened(leaf) if is_trained else None)
        frozen.append(leaf if is_array and not is_trained else None)
        constants.append(None if is_array else leaf)
    if all(leaf is None for leaf in trained):
        raise ValueError("`params` must have a floating-point leaf, got none.")
    loss = Loss(_hashable(loss_fn), treedef, tuple(constants), graphdef)
    return loss, treedef.unflatten(trained), (tuple(frozen), other_state)


def optimizer(tx, asker: str) -> optax.GradientTransformationExtraArgs:
    """The same transformation, as a static argument of `jax.jit`."""
    _checks.require_optimizer(asker, tx)
    tx = optax.with_extra_args_support(tx)
    return optax.GradientTransformationExtraArgs(
        _hashable(tx.init), _hashable(tx.update)
    )


def step(loss: Loss, tx, params, state, data, scale):
    """The loss before an optimizer step, and the parameters and state after it.

    `scale` multiplies the update. The state keeps its dtypes, as loops need it.
    """
    value, grads = jax.value_and_grad(loss)(params, data)
    updates, new = tx.update(grads, state, params, value=value)
    state = jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), new, state)
    return value, optax.apply_updates(params, optax.tree.scale(scale, updates)), state


def require_finite(value, gradient_norm) -> None:
    """Raises ValueError unless the loss and its gradient are finite."""
    loss, gradient = float(value), float(gradient_norm)
    if not (math.isfinite(loss) and math.isfinite(gradient)):
        raise ValueError(
            "`params` must give a finite loss and gradient on every batch, got a loss "
            f"of {loss:g} and a gradient norm of {gradient:g}."
        )


def outline(tree) -> str:
    """The shapes of a pytree, on one line."""
    if hasattr(tree, "dtype"):
        return f"an array of shape {tuple(tree.shape)}"
    return " ".join(repr(jax.tree.map(np.shape, tree)).split())[:100]


def _nnx() -> Any:
    """Flax NNX if it is loaded, as it is wherever there is an NNX module."""
    return sys.modules.get("flax.nnx")


def _hashable(function: Callable) -> Callable:
    try:
        hash(function)
    except TypeError:
        return lambda *args, **kwargs: function(*args, **kwargs)
    return function


def _widened(leaf) -> jax.Array:
    """A leaf in float32 or wider; half precision would round small steps away."""
    leaf = jnp.asarray(leaf)
    if jnp.iscomplexobj(leaf):
        raise TypeError("`params` must be real, got a complex leaf.")
    return leaf.astype(np.promote_types(np.float32, leaf.dtype))
