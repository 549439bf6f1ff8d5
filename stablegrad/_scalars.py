"""Scalars: what a guard measured and did, as numbers of Python for a logger."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import _trees
from ._observe import metrics
from ._reading import LIMIT_NAME
from .responses._reasons import Reason

DEFAULT_NAMES = (
    "loss_value",
    "grad_norm",
    "clipped_grad_norm",
    "clip_scale",
    "lr_scale",
    "clipped_steps",
    "skipped_steps",
    "backed_off_steps",
    "kept_out_steps",
    "consecutive_skips",
)
# Numbers of a response, by what the name of some metric begins with if there is one.
CLIPS = "(clip_(?!by_|update_rms|logits)|back_off_).*_limit"
HALTS = "(nonfinite_run|roll_backs)"
OF_RESPONSES = {
    "clipped_steps": CLIPS,
    "clip_scale": CLIPS,
    "clipped_grad_norm": CLIPS,
    "backed_off_steps": "back_off_.*_limit",
    "back_off_scale": "back_off_.*_limit",
    "shortened_steps": "trust_radius",
    "warned_steps": "layer_health_checks",
    "halted": HALTS,
    "halted_steps": HALTS,
}
GUARD = re.compile(r"guard_\d+_")


def scalars(state: Any, *, every: bool = False) -> dict[str, float | int]:
    """Return what the guards in a state measured and did, as Python's own numbers.

    Host only: it waits for the step. The loggers of `stablegrad.integrations.loggers`
    do not.

    Args:
        state: A state with a guard's state anywhere in it, as for `metrics`.
        every: Whether to return all that `metrics` has. Otherwise these ten of a guard:
            `loss_value`, `grad_norm`, `clipped_grad_norm`, `clip_scale`, `lr_scale`,
            `clipped_steps`, `skipped_steps`, `backed_off_steps`, `kept_out_steps` and
            `consecutive_skips`; `trust_mismatch` if it is set; and all of clips and
            schedules in a chain.

    Returns:
        Floats and ints, named as by `metrics`. Left out are limits that are inf, a loss
        that was not passed, and numbers of responses that the guard does not have.
        Norms and losses may be nan or inf.

    Raises:
        ValueError: If there is nothing to read in the state, or if it is stacked over
            an ensemble.
        TypeError: Inside jit.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> tx = sg.guard(optax.sgd(0.1), sg.clip(sg.fixed(1.0)))
        >>> params = {"w": jnp.zeros(2)}
        >>> grads = {"w": jnp.array([3.0, 4.0])}
        >>> _, state = tx.update(grads, tx.init(params), params)
        >>> sg.scalars(state)["grad_norm"], sg.scalars(state)["clipped_steps"]
        (5.0, 1)
    """
    _trees.require_host("scalars", state)
    return select_scalars(metrics(state), every)


def select_scalars(numbers: Mapping[str, Any], every: bool) -> dict[str, float | int]:
    """Return those numbers of `metrics` that say something, as Python's own."""
    told = {}
    for name, number in numbers.items():
        if np.ndim(number):
            raise ValueError(
                "the state is stacked over an ensemble. Take one member: "
                "`sg.scalars(jax.tree.map(lambda x: x[0], state))`."
            )
        value = np.asarray(number).item()
        value = int(value) if isinstance(value, bool) else value
        prefix = match.group() if (match := GUARD.match(name)) else ""
        own = name.removeprefix(prefix)
        chosen = own in DEFAULT_NAMES or own == "trust_mismatch"
        if f"{prefix}guarded_steps" in numbers and not every and not chosen:
            continue
        if _says_nothing(prefix, own, value, numbers):
            continue
        told[name] = value
    return told


def _says_nothing(prefix: str, name: str, value, numbers: Mapping[str, Any]) -> bool:
    if LIMIT_NAME.search(name) or name == "trust_radius":
        return math.isinf(value)
    if name == "trust_mismatch":
        return not value
    if name == "loss_value" and math.isnan(value):
        reason = np.asarray(numbers[f"{prefix}skip_reason"]).item()
        return reason != Reason.NONFINITE_VALUE  # It may be nan itself.
    if name in OF_RESPONSES:
        wanted = re.compile(prefix + OF_RESPONSES[name])
        return not any(wanted.match(other) for other in numbers)
    return False
