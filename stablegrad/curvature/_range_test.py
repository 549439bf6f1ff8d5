"""The learning-rate range test: one step at each of many rising rates."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .._figure import GREY, SKY, new_figure
from . import _loss

_FIRST, _LAST = 10, 5  # Steps at both ends where the slope is not used.


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """The losses at the rates that were tried; `str()` gives advice."""

    rates: tuple[float, ...]  # Log-spaced, rising.
    losses: tuple[float, ...]  # Before the step at each rate; finite.
    smoothed: tuple[float, ...]
    suggestion: float  # The rate of the steepest smoothed slope; nan if it never fell.
    minimum_tenth: float  # A tenth of the rate of the smallest smoothed loss.
    divergence: float  # The rate at which the loss blew up; inf if it did not.
    steps: int  # The number of rates asked for.

    def __str__(self) -> str:
        tried, diverged = len(self.rates), math.isfinite(self.divergence)
        cut_short = not diverged and tried < self.steps
        if math.isfinite(self.suggestion):
            text = (
                f"The loss fell fastest at {self.suggestion:.2g}; a tenth of the rate "
                f"of its minimum is {self.minimum_tenth:.2g}. Start no higher than "
                "the smaller."
            )
        elif cut_short:
            text = "There were too few steps to suggest a rate."
        else:
            text = "The loss never fell: there is no rate to suggest."
        if diverged:
            return f"{text} It blew up at {self.divergence:.2g}."
        text += f" It had not blown up at {self.rates[-1]:.2g}."
        if cut_short:
            text += f" The batches ran out there, after {tried} of {self.steps} rates: "
            text += f"pass {self.steps} of them to see the rest."
        return text

    def figure(self) -> Any:
        """Plot the losses over the rates.

        Returns:
            A `matplotlib.figure.Figure`, for `savefig` or a notebook.

        Raises:
            ImportError: If Matplotlib is not installed.
        """
        title = "Loss while the learning rate rises"
        figure, ((axes,),) = new_figure(6.5, 4.5, title=title)
        axes.plot(self.rates, self.losses, ".", color=SKY, label="loss")
        axes.plot(self.rates, self.smoothed, label="smoothed")
        for rate, style, label in (
            (self.suggestion, "-", "steepest"),
            (self.minimum_tenth, "--", "minimum / 10"),
            (self.divergence, ":", "blew up"),
        ):
            if math.isfinite(rate):
                label = f"{label}: {rate:.2g}"
                axes.axvline(rate, color=GREY, linestyle=style, label=label)
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss before the step")
        lowest, first = min(self.losses), self.losses[0]
        room = 0.5 * max(first - lowest, 1e-3 * abs(first)) or 1.0
        axes.set_ylim(lowest - room, first + 2 * room)
        axes.legend()
        return figure


def learning_rate_range_test(
    loss_fn: Callable,
    params,
    batches: Any,
    tx: _loss.OptimizerOrFunction,
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    learning_rate: float | None = None,
    smoothing: float = 0.98,
    blow_up: float = 4.0,
) -> RangeTest:
    """Train a copy of the parameters for some steps while the learning rate rises.

        eta_i = low (high / low)^(i / (steps - 1)),    one optimizer step at each
        s_i = (1 - d) sum_j d^(i - j) L_j / (1 - d^(i + 1))
        suggestion = argmin ds / d log(eta), before the minimum of s

    without the slopes of the first ten and last five steps. Later rates start from
    parameters that earlier rates have trained, so the result is a rough guide:
    `critical_learning_rate` is more precise.

    Args:
        loss_fn: As for `critical_learning_rate`.
        params: As for `critical_learning_rate`. They are not modified.
        batches: A tuple, dict or array is one batch, used in every step. Any other
            iterable gives one batch a step; the test ends if it runs out.
        tx: As for `critical_learning_rate`.
        low: The first rate, > 0.
        high: The last rate, > `low`.
        steps: The number of rates, >= 20.
        learning_rate: As for `critical_learning_rate`.
        smoothing: Decay d of the average, in [0, 1).
        blow_up: Multiple of the smallest s so far at which the test ends after the
            first ten steps, > 1. The excess is relative to |s|, or to the standard
            deviation of the first ten losses if that is larger.

    Returns:
        `RangeTest`: the losses and rates, advice under `str()`, a plot by `figure()`.
        The test also ends at the first loss that is nan or inf.

    Raises:
        TypeError: If `loss_fn` does not return a real scalar.
        ValueError: If an argument is out of range, `params` has no floating-point leaf,
            the rate that `tx` was built with is not known, or another than
            `learning_rate`, there is no batch, or the first loss is not finite.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> loss_fn = lambda params, batch: 0.5 * jnp.sum(batch * params**2)
        >>> test = sg.learning_rate_range_test(
        ...     loss_fn, jnp.ones(2), jnp.array([1.0, 10.0]), optax.sgd, low=1e-4
        ... )
        >>> test.suggestion < 0.2 < test.divergence
        True

    Reference:
        Smith (2015), https://arxiv.org/abs/1506.01186; the defaults are fastai's.
    """
    _checks.require("low", low, "finite and > 0", lambda x: 0 < x < math.inf)
    _checks.require("high", high, "finite and > `low`", lambda x: low < x < math.inf)
    _checks.require_count("steps", steps, 20)
    _checks.require("smoothing", smoothing, "in [0, 1)", lambda x: 0 <= x < 1)
    _checks.require("blow_up", blow_up, "finite and > 1", lambda x: 1 < x < math.inf)
    asker = "learning_rate_range_test"
    loss, trained, frozen = _loss.problem(asker, loss_fn, params)
    optimizer, built = _loss.optimizer_and_rate(tx, asker, trained, learning_rate)
    is_batch = isinstance(batches, tuple | Mapping) or hasattr(batches, "dtype")
    if is_batch or not isinstance(batches, Iterable):
        batches = itertools.repeat(batches)
    rates = np.geomspace(low, high, steps)
    state, average, divergence = optimizer.init(trained), 0.0, math.inf
    losses: list[float] = []
    smoothed: list[float] = []
    for rate, batch in zip(rates, batches, strict=False):
        scale, data = jnp.float32(rate / built), (frozen, batch)
        with jax.debug_nans(False), jax.debug_infs(False):  # A nan ends the test.
            value, trained, state = _step(loss, optimizer, trained, state, data, scale)
        if math.isfinite(value):
            losses.append(float(value))
            average = smoothing * average + (1 - smoothing) * losses[-1]
            smoothed.append(average / (1 - smoothing ** len(losses)))
            best = min(smoothed)
            # A loss that crosses zero is no measure: then the noise of batches is.
            noise = float(np.std(losses[:_FIRST]))
            most = (blow_up - 1) * max(abs(best), noise)
            if len(losses) <= _FIRST or smoothed[-1] - best <= most:
                continue
        divergence = float(rate)
        break
    if not losses:
        got = "a first loss that is not." if math.isfinite(divergence) else "none."
        raise ValueError(f"`batches` must hold a batch whose loss is finite, got {got}")
    tried = rates[: len(losses)]
    return RangeTest(
        rates=tuple(tried.tolist()),
        losses=tuple(losses),
        smoothed=tuple(smoothed),
        suggestion=_steepest(tried, np.array(smoothed)),
        minimum_tenth=float(tried[np.argmin(smoothed)]) / 10,
        divergence=divergence,
        steps=steps,
    )


def _steepest(rates: np.ndarray, smoothed: np.ndarray) -> float:
    """Return the rate at which the average falls fastest before its minimum, or nan."""
    last = min(len(rates) - _LAST, int(np.argmin(smoothed)) + 1)
    if last <= _FIRST:
        return math.nan
    slopes = np.gradient(smoothed, np.log(rates))[_FIRST:last]
    steepest = int(np.argmin(slopes))
    return float(rates[_FIRST + steepest]) if slopes[steepest] < 0 else math.nan


_step = jax.jit(_loss.step, static_argnames=("loss", "tx"))
