"""Argument checks, done once: when a piece is built, or when a step is traced."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._trees import decode_names, leaf_names, names_as_bytes, names_in

_MOST = 2**31 - 1  # Steps are counted in int32.


def require(name: str, value, expected: str, holds: Callable[..., bool]) -> None:
    """Raise ValueError unless `holds(value)`; traced values cannot be checked.

    State the condition that must hold, not the one that must not: nan fails both.
    """
    if isinstance(value, Tracer):
        return
    try:
        fine = bool(holds(value))
    except (TypeError, ValueError, OverflowError):
        fine = False
    if not fine:
        raise ValueError(f"`{name}` must be {expected}, got {value!r}.")


def require_count(name: str, value, least: int = 1) -> None:
    """Raise ValueError unless `value` is an integer >= `least` within int32.

    It may be NumPy's, but not an array.
    """
    if isinstance(value, jax.Array):
        raise ValueError(
            f"`{name}` sets the size of a state, so it must be a Python integer, got "
            f"{value!r}. Under `optax.inject_hyperparams` list it in `static_args`."
        )
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    _require_within(name, value, least, whole)


def require_steps(name: str, value, least: int = 1) -> None:
    """Raise ValueError unless `value` is a whole number >= `least` within int32.

    It may be NumPy's or an array; of a traced one only the dtype can be checked.
    """
    if isinstance(value, Tracer):
        whole = jnp.issubdtype(value.dtype, jnp.integer)
        if whole:
            return
    else:
        try:
            whole = bool(value == int(value))
        except (TypeError, ValueError, OverflowError):
            whole = False
    _require_within(name, value, least, whole)


def _require_within(name: str, value, least: int, whole: bool) -> None:
    if not (whole and value >= least):
        raise ValueError(f"`{name}` must be an integer >= {least}, got {value!r}.")
    if value > _MOST:
        raise ValueError(f"`{name}` must be an integer <= {_MOST}, got {value!r}.")


def short_repr(thing) -> str:
    """Return a short word for a wrong argument."""
    name = getattr(thing, "name", None)
    return f"`{name}(...)`" if isinstance(name, str) else repr(thing)[:60]


def require_optimizer(asker: str, thing) -> None:
    """Raise TypeError unless `thing` looks like an optax transformation."""
    # A response has methods of these names, which explain where it belongs.
    is_response = hasattr(thing, "propose")
    looks_like_one = callable(getattr(thing, "init", None)) and hasattr(thing, "update")
    if is_response or not looks_like_one:
        raise TypeError(
            f"`{asker}` must be given an optax transformation first, such as "
            f"`optax.adamw(1e-3)`, got {short_repr(thing)}."
        )


def require_state(asker: str, kind: type, state) -> None:
    """Raise ValueError unless an update was given a state from its own `init`."""
    if not isinstance(state, kind):
        raise ValueError(
            f"`{asker}` needs the state from its own `init`, or from its last step, "
            f"got {type(state).__name__}. Call `state = tx.init(params)` first. "
            "The order of arguments:\n"
            "  optax: updates, state = tx.update(grads, state, params)\n"
            "  apply: params, state = sg.apply(tx, grads, state, params)"
        )


def require_same_leaves(at_init: jax.Array, now: tuple[str, ...]) -> None:
    """Raise ValueError if the leaves of a step are not those given to `init`.

    `at_init` holds the names at `init`. Under a trace only its length is known.
    """
    expected = now = tuple(name.replace("\n", " ") for name in now)
    if isinstance(at_init, Tracer):
        if at_init.shape[-1] == len(names_as_bytes(now)):
            return
    else:
        expected = decode_names(at_init)
        if expected == now:
            return
    raise _other_leaves(expected, now)


def require_same_layout(given: dict[str, None], own: dict[str, None]) -> None:
    """Raise ValueError if a guard's state was made by one with other responses."""
    if given.keys() == own.keys():
        return
    listed = lambda layout: "; ".join(names_in(layout)[1:]) or "an older version's"
    raise ValueError(
        "this state was made by a guard with other responses or thresholds, or by "
        "another version. Call `stablegrad.migrate(tx, params, state)` first.\n"
        f"  of the state: {listed(given)}\n  of the guard: {listed(own)}"
    )


def matching_params(params, updates) -> Any:
    """Return the parameters with None wherever the updates have None.

    A whole Equinox model has functions and numbers where its gradient has None.
    """
    if params is None:
        return None
    try:
        return jax.tree.map(
            lambda update, param: None if update is None else param,
            updates,
            params,
            is_leaf=lambda node: node is None,
        )
    except ValueError as error:
        if isinstance(params, float | jax.Array):
            text = "`params` must be like the gradients; the loss is `value=loss`"
            raise ValueError(text) from error
        names, now = leaf_names(params), leaf_names(updates)
        if names == now:
            raise ValueError(
                "gradients and parameters must be in the same containers, got\n"
                f"  gradients: {jax.tree.structure(updates)}\n"
                f"  params:    {jax.tree.structure(params)}"
            ) from error
        raise _other_leaves(names, now) from error


def completed(params, whole) -> Any:
    """Return parameters with what they lack of a whole model, where they have None."""
    return jax.tree.map(
        lambda leaf, other: other if leaf is None else leaf,
        params,
        whole,
        is_leaf=lambda node: node is None,
    )


def _other_leaves(expected: tuple[str, ...], now: tuple[str, ...]) -> ValueError:
    absent = [name for name in expected if name not in set(now)]
    extra = [name for name in now if name not in set(expected)]
    differs = "; ".join(
        f"{what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for what, names in (("missing", absent), ("unexpected", extra))
        if names
    )
    return ValueError(
        "the pytree of this step differs in structure from the one given to `init`: "
        f"{differs or 'other names, or another order'}. This step has {len(now)} "
        f"floating-point leaves: {', '.join(now[:5])}{', ...' if len(now) > 5 else ''}"
        ". Call `init` again with the parameters that are trained."
    )


def require_same_state(before, after) -> None:
    """Raise ValueError if an inner state changed its structure from one step on."""
    old, new = jax.tree.structure(before), jax.tree.structure(after)
    if old != new:
        raise ValueError(
            "the inner transformation changed the structure of its state, so the step "
            "cannot be undone and cannot run under `lax.scan`:\n"
            f"  before: {old}\n  after:  {new}"
        )
