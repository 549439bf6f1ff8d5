"""Training with Flax NNX's `Optimizer`."""

from typing import Any

from flax import nnx

from ..engine._apply import apply


def update(optimizer: nnx.Optimizer, model: nnx.Module, grads: Any, **extra) -> None:
    """Take one step of an NNX optimizer as `stablegrad.apply` does.

    `optimizer.update(model, grads, ...)` adds updates to the parameters, which brings a
    snapshot of `roll_back` back within a rounding only, and not at all over parameters
    that are not finite. This writes the parameters themselves, bit for bit.

    Args:
        optimizer: An optimizer whose `tx` is guarded; it is changed in place.
        model: The model, changed in place.
        grads: The gradients, as from `nnx.grad`.
        **extra: Passed on to the transformation, such as `value=loss`.

    Raises:
        ValueError: Whatever `tx.update` raises.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> import stablegrad as sg
        >>> from stablegrad.integrations.nnx import update
        >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
        >>> tx = sg.stabilize(optax.sgd(0.5), sg.roll_back())
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> loss_fn = lambda model: jnp.sum((model(jnp.ones((1, 2))) - 1.0) ** 2)
        >>> loss, grads = nnx.value_and_grad(loss_fn)(model)
        >>> update(optimizer, model, grads, value=loss)
        >>> int(sg.metrics(optimizer.opt_state)["guarded_steps"])
        1
    """
    # Older versions of Flax have graphs alone.
    mode = {"graph": optimizer.graph} if hasattr(optimizer, "graph") else {}
    params, opt_state = apply(
        optimizer.tx,
        _arrays(nnx.state(grads, optimizer.wrt, **mode)),
        _arrays(optimizer.opt_state),
        _arrays(nnx.state(model, optimizer.wrt, **mode)),
        **_arrays(extra),
    )
    nnx.update(model, params)
    nnx.update(optimizer.opt_state, nnx.state(opt_state, **mode))
    optimizer.step[...] += 1


def _arrays(tree):
    """Return a tree without variables, as `Optimizer.update` hands it on."""
    if hasattr(nnx, "as_pure"):
        return nnx.as_pure(tree)
    # Older versions of Flax.
    return nnx.to_arrays(nnx.pure(tree))  # pyright: ignore[reportAttributeAccessIssue]
