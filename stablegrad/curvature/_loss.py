"""The loss, parameters and optimizer of a measurement, in a form for `jax.jit`."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks, _trees
from .._extra_args import with_extra_args

# Hyperparameters may be kept in bfloat16.
_close = functools.partial(math.isclose, rel_tol=1e-2)

OptimizerOrFunction = (
    optax.GradientTransformation | Callable[[float], optax.GradientTransformation]
)


@dataclasses.dataclass(frozen=True)
class Loss:
    """`loss(params, (frozen, batch))`, a static argument of `jax.jit`."""

    function: Callable
    treedef: Any  # The structure of the user's parameters.
    constants: tuple[Hashable, ...]  # Leaves that are not arrays; None for the others.
    graphdef: Any  # The static part of a Flax NNX module; None for other pytrees.

    def __call__(self, params, data) -> jax.Array:
        """Return the loss, rank-0, float32 or wider."""
        (frozen, other_state), batch = data
        trained = self.treedef.flatten_up_to(params)
        rows = zip(trained, frozen, self.constants, strict=True)
        leaves = [next(x for x in row if x is not None) for row in rows]
        model = self.treedef.unflatten(leaves)
        if self.graphdef is not None:
            # This is a new module, so the user's module keeps its state.
            model = sys.modules["flax.nnx"].merge(self.graphdef, model, other_state)
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


def problem(
    asker: str, loss_fn: Callable, params, *, widen: bool = True
) -> tuple[Loss, Any, tuple]:
    """Separate the leaves that an optimizer updates from all others.

    Return the loss; the floating-point parameters, in float32 or wider if `widen`, with
    None for the other leaves; and the frozen arrays, which the loss takes beside the
    batch.
    """
    _trees.require_host(asker, params)
    as_trained = _widened if widen else jnp.asarray
    if not callable(loss_fn):
        kind = type(loss_fn).__name__
        raise TypeError(f"`loss_fn` must be a function of (params, batch), got {kind}.")
    graphdef, other_state = None, None
    nnx: Any = sys.modules.get("flax.nnx")  # It is loaded if `params` is its module.
    if nnx is not None and isinstance(params, nnx.Module):
        graphdef, *states = nnx.split(params, nnx.Param, ...)
        pure = getattr(nnx, "as_pure", None) or nnx.pure  # The older name.
        params, other_state = map(pure, states)
    elif holds_nnx_module(params):
        raise TypeError(
            "`params` must be one Flax NNX module, got modules in a container. Put "
            "them in one: `nnx.Dict(first=..., second=...)`."
        )
    leaves, treedef = jax.tree.flatten(params)
    has_array = any(hasattr(leaf, "dtype") for leaf in leaves)
    trained, frozen, constants = [], [], []
    for leaf in leaves:
        # Numbers beside arrays, integers and flags are settings: they stay constants.
        is_number = isinstance(leaf, float | complex) and not has_array
        is_array = hasattr(leaf, "dtype") or is_number
        is_trained = is_array and _trees.is_inexact(leaf)
        trained.append(as_trained(leaf) if is_trained else None)
        frozen.append(leaf if is_array and not is_trained else None)
        constants.append(None if is_array else leaf)
    if all(leaf is None for leaf in trained):
        raise ValueError("`params` must have a floating-point leaf, got none.")
    loss = Loss(_hashable(loss_fn), treedef, tuple(constants), graphdef)
    return loss, treedef.unflatten(trained), (tuple(frozen), other_state)


def holds_nnx_module(tree) -> bool:
    """Return whether a tree is a Flax NNX module, or has one anywhere within it."""
    nnx: Any = sys.modules.get("flax.nnx")
    is_module = lambda x: nnx is not None and isinstance(x, nnx.Module)
    return any(map(is_module, jax.tree.leaves(tree, is_leaf=is_module)))


def optimizer(tx, asker: str) -> optax.GradientTransformationExtraArgs:
    """Return the same transformation, as a static argument of `jax.jit`."""
    _checks.require_optimizer(asker, tx)
    tx = with_extra_args(tx)
    init, update = _hashable(tx.init), _hashable(tx.update)
    return optax.GradientTransformationExtraArgs(init, update)


def optimizer_and_rate(tx, asker: str, params, learning_rate: float | None):
    """Return the optimizer as `optimizer` does, and the rate that it was built with.

    A function of the rate is called with 1. The rate of a transformation is the given
    one, else that in the state of `optax.inject_hyperparams`. Raise ValueError if there
    is none, or if the state holds another one.
    """
    positive = lambda rate: 0 < rate < math.inf
    if learning_rate is not None:
        _checks.require("learning_rate", learning_rate, "finite and > 0", positive)
    if callable(tx):
        if learning_rate is not None:
            raise ValueError(
                "`learning_rate` must be left out where `tx` is a function of the rate,"
                f" got {learning_rate:.6g}."
            )
        one, two = (optimizer(tx(rate), asker) for rate in (1.0, 2.0))
        if _first_steps_are_alike(one, two, params):
            raise ValueError(
                "`tx` must be a function of the learning rate, and its update must "
                "depend on it: that of the rates 1 and 2 is the same."
            )
        tx, learning_rate = one, 1.0
    tx = optimizer(tx, asker)
    # Under `jax.jit` nothing else of the state is computed.
    rates = [float(r) for r in jax.jit(lambda x: _rates(tx.init(x)))(params)]
    if not rates:
        if learning_rate is None:
            raise ValueError(
                f"`tx` of `{asker}` must tell its learning rate. Pass a function of "
                "the rate, such as `optax.adamw` or `lambda rate: optax.adamw(rate, "
                "b2=0.95)`; or the rate that `tx` was built with, as `learning_rate=`."
            )
        rates = [learning_rate]
    if not (all(map(positive, rates)) and _close(min(rates), max(rates))):
        raise ValueError(
            "`tx` must have one learning rate > 0, got "
            f"{', '.join(f'{rate:.6g}' for rate in rates)} in its state. A schedule "
            "with a warm-up starts at rate 0: build it without one."
        )
    if learning_rate is not None and not _close(learning_rate, rates[0]):
        raise ValueError(
            "`learning_rate` must be the rate that `tx` was built with, which is "
            f"{rates[0]:.6g} by its state, got {learning_rate:.6g}. Leave it out to "
            "use the rate in the state."
        )
    return tx, rates[0] if learning_rate is None else learning_rate


@functools.partial(jax.jit, static_argnums=(0, 1))
def _first_steps_are_alike(one, two, params) -> jax.Array:
    """Return whether two optimizers move the parameters, and by the same."""
    grads = jax.tree.map(jnp.ones_like, params)
    value = jnp.ones((), jnp.float32)
    steps = [
        tx.update(grads, tx.init(params), params, value=value)[0] for tx in (one, two)
    ]
    pairs = list(zip(*map(jax.tree.leaves, steps), strict=True))
    alike = [jnp.all(first == second) for first, second in pairs]
    moves = [jnp.any(first != 0) for first, _ in pairs]
    return jnp.all(jnp.stack(alike)) & jnp.any(jnp.stack(moves))


def _rates(state) -> list[jax.Array]:
    """Return the learning rates in the states of `optax.inject_hyperparams`."""
    of_node = lambda node: getattr(node, "hyperparams", None) or ()
    has_rate = lambda node: "learning_rate" in of_node(node)
    found = [
        node.hyperparams["learning_rate"] for node in _trees.nodes(state, has_rate)
    ]
    return [jnp.asarray(rate, jnp.float32) for rate in found]


def step(loss: Loss, tx, params, state, data, scale):
    """Return the loss, and parameters and state after a step by the scaled update."""
    value, grads = jax.value_and_grad(loss)(params, data)
    updates, state = tx.update(grads, state, params, value=value)
    return value, optax.apply_updates(params, optax.tree.scale(scale, updates)), state


def require_finite(value, gradient_norm) -> None:
    loss, gradient = float(value), float(gradient_norm)
    if not (math.isfinite(loss) and math.isfinite(gradient)):
        raise ValueError(
            "`params` must give a finite loss and gradient on every batch, got a loss "
            f"of {loss:g} and a gradient norm of {gradient:g}."
        )


def outline(tree) -> str:
    """Return the shapes of a pytree, on one line."""
    if hasattr(tree, "dtype"):
        return f"an array of shape {tuple(tree.shape)}"
    if tree is None or isinstance(tree, int | float):
        return repr(tree)
    return " ".join(repr(jax.tree.map(np.shape, tree)).split())[:100]


def _hashable(function: Callable) -> Callable:
    try:
        hash(function)
    except TypeError:
        return lambda *args, **kwargs: function(*args, **kwargs)
    return function


def _widened(leaf) -> jax.Array:
    """Return a leaf in float32 or wider: half precision rounds small steps away."""
    leaf = jnp.asarray(leaf)
    if jnp.iscomplexobj(leaf):
        raise TypeError("`params` must be real, got a complex leaf.")
    return leaf.astype(np.promote_types(np.float32, leaf.dtype))
