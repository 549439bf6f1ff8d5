"""Signals: what a threshold can watch, and when in a step it is known."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import _checks, _trees
from .._extra_args import host_float32
from .._norms import LARGEST
from ..granularity._groups import Granularity, check_granularity

# "grad_norm", "value", "update_norm", or a function (updates, params, extra) -> scalar.
Signal = str | Callable[[Any, Any, dict[str, Any]], jax.Array]

NAMES = ("grad_norm", "value", "update_norm")


def check_signal(of: Signal, per: Granularity) -> None:
    """Raise ValueError unless `of` can be measured at the granularity `per`."""
    _checks.require(
        "of",
        of,
        f"one of {NAMES} or a function (updates, params, extra) -> scalar",
        lambda x: callable(x) or x in NAMES,
    )
    check_granularity(per)
    if per != "global" and not is_norm(of):
        raise ValueError(
            f"`per` must be 'global' for of={signal_name(of)!r}, which is one number a "
            f"step; got {per!r}. Only norms are measured leaf by leaf or unit by unit."
        )


def is_norm(of: Signal) -> bool:
    """Return whether a signal is a norm: never negative, and close to lognormal."""
    return of in ("grad_norm", "update_norm")


def is_outgoing(of: Signal) -> bool:
    """Return whether a signal is known only after the inner optimizer has run."""
    return of == "update_norm"


def signal_name(of: Signal) -> str:
    """Return a word for the signal, for the names of metrics and for messages.

    A function whose name would be read as a standard signal is called "signal".
    """
    if isinstance(of, str):
        return of
    name = getattr(of, "__name__", "signal")
    taken = any(f"_{name}".endswith(f"_{standard}") for standard in NAMES)
    return name if name.isidentifier() and not taken else "signal"


def scalar_signal(name: str, value) -> jax.Array:
    """Return a scalar as a float32 signal of one group, or raise ValueError."""
    if not _trees.is_array(value):
        given = _trees.shapes_and_dtypes(value)
        raise ValueError(
            f"`{name}` must be a real scalar, got {given}. Of `(loss, aux)`, pass the "
            "loss alone."
        )
    value = jnp.asarray(host_float32(value))
    if value.ndim != 0 or jnp.iscomplexobj(value):
        raise ValueError(
            f"`{name}` must be a real scalar, got shape {value.shape} and dtype "
            f"{value.dtype}. Reduce it first, for example with `.mean()`."
        )
    # A float64 beyond float32 is finite all the same.
    bounded = jnp.clip(value, -LARGEST, LARGEST) if value.dtype == "float64" else value
    return jnp.where(jnp.isfinite(value), bounded, value).astype(jnp.float32)[None]
