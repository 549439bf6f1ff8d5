"""The learning-rate range test: one step at each of many rising rates."""

import dataclasses
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks
from . import _loss, _vectors
from ._rate import built_rate

_FIRST, _LAST = 10, 5  # Steps at either end in which no slope is looked for.


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """The losses over the rates that were tried; `str()` is a sentence."""

    rates: tuple[float, ...]  # Log-spaced, rising.
    losses: tuple[float, ...]  # Before the step at each rate; finite.
    smoothed: tuple[float, ...]
    suggestion: float  # The rate of the steepest smoothed slope; nan if it never fell.
    minimum_tenth: float  # A tenth of the rate of the smallest smoothed loss.
    divergence: float  # The rate at which it blew up, inf if it did not.
    steps: int  # How many rates were asked for.

    def __str__(self) -> str:
        """What to do with it."""
        tried, cut_short = len(self.rates), math.isinf(self.divergence)
        cut_short = cut_short and tried < self.steps
        if math.isnan(self.suggestion) and cut_short:
            advice = "There were too few steps to suggest a rate."
        elif math.isnan(self.suggestion):
            advice = "The loss never fell: there is no rate to suggest."
        else:
            advice = (
                f"The loss fell fastest at {self.suggestion:.2g}; a tenth of the rate "
                f"of its minimum is {self.minimum_tenth:.2g}. Start no higher than "
                "the smaller."
            )
        end = (
            f"It blew up at {self.divergence:.2g}."
            if math.isfinite(self.divergence)
            else f"It had not blown up at {self.rates[-1]:.2g}."
        )
        if cut_short:
            end += (
                f" The batches ran out there, after {tried} of {self.steps} rates: "
                f"pass {self.steps} of them to see the rest."
            )
        return f"{advice} {end}"

    def figure(self) -> Any:
        """Draws the losses over the rates.

        Returns:
            A `matplotlib.figure.Figure`, for `savefig` or a notebook.

        Raises:
            ImportError: Without Matplotlib.
        """
        try:
            Figure = importlib.import_module("matplotlib.figure").Figure
        except ImportError as error:
            raise ImportError(
                "`figure` needs Matplotlib: pip install 'stablegrad[report]'"
            ) from error
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.rates, self.losses, ".", color="0.75", label="loss")
        axes.plot(self.rates, self.smoothed, label="smoothed")
        for rate, style, label in (
            (self.suggestion, "-", "steepest"),
            (self.minimum_tenth, "--", "minimum / 10"),
            (self.divergence, ":", "blew up"),
        ):
            if math.isfinite(rate):
                axes.axvline(rate, color="0.4", linestyle=style, label=label)
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss before the step")
        lowest, first = min(self.losses), self.losses[0]
        room = 0.5 * max(first - lowest, 1e-3 * abs(first))
        axes.set_ylim(lowest - room, first + 2 * room)
        axes.legend()
        return figure


def learning_rate_range_test(
    loss_fn: Callable,
    params,
    batches: Any,
    tx: optax.GradientTransformation,
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    learning_rate: float | None = None,
    smoothing: float = 0.98,
    blow_up: float = 4.0,
) -> RangeTest:
    """Trains a copy for a hundred steps while the rate rises, and reads the loss.

        eta_i = low (high / low)^(i / (steps - 1)),    one optimizer step at each
        s_i = (1 - d) sum_j d^(i - j) L_j / (1 - d^(i + 1))
        suggestion = argmin ds / d log(eta), before the minimum of s

    The slope is taken over the logarithm of the rate: over the rate itself it would
    always be steepest at the low end, where rates are dense. The first ten and last
    five steps are left out. The test ends early at the first loss that is not finite,
    or once s_i exceeds `blow_up` times its smallest value so far; the average lags, so
    that is some steps after training has become unstable. Later rates meet parameters
    that earlier ones have trained, so it is a rough guide: `critical_learning_rate` is
    the sharper tool.

    Args:
        loss_fn: As for `critical_learning_rate`.
        params: As for `critical_learning_rate`. They stay as they are.
        batches: A tuple, dict or array is one batch, reused for every step. Any other
            iterable gives one batch a step; if it runs out, the test ends there, and
            says so.
        tx: As for `critical_learning_rate`: any chain whose update is proportional to
            its rate, without a schedule.
        low: The first rate, > 0.
        high: The last rate, > `low`.
        steps: How many rates, >= 20.
        learning_rate: The rate that `tx` was built with, > 0. None: the one that
            `optax.inject_hyperparams` keeps in its state, without that 1.
        smoothing: The decay d of the average, in [0, 1).
        blow_up: What ends the test, as a multiple of the smallest average, > 1. For
            losses below zero the excess is held against its magnitude.

    Returns:
        `RangeTest`: the numbers, a sentence under `str()`, a picture from `figure()`.

    Raises:
        TypeError: If `loss_fn` does not return a real scalar.
        ValueError: If an argument is out of range, `params` has no floating-point leaf,
            the state of `tx` keeps another rate than is told, there is no batch, or the
            first loss is not finite.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> def loss_fn(params, batch):
        ...     return 0.5 * jnp.sum(batch * params**2)
        >>> batch = jnp.array([1.0, 10.0])
        >>> test = sg.learning_rate_range_test(
        ...     loss_fn, jnp.ones(2), batch, optax.sgd(1.0), low=1e-4
        ... )
        >>> test.suggestion < 0.2 < test.divergence
        True

    Reference:
        Smith, Cyclical learning rates for training neural networks (2015),
        https://arxiv.org/abs/1506.01186; defaults as in fastai.
    """
    positive = ("finite and > 0", lambda x: 0 < x < math.inf)
    _checks.require("low", low, *positive)
    _checks.require("high", high, "finite and > `low`", lambda x: low < x < math.inf)
    _checks.require_count("steps", steps, 20)
    _checks.require("smoothing", smoothing, "in [0, 1)", lambda x: 0 <= x < 1)
    _checks.require("blow_up", blow_up, "finite and > 1", lambda x: 1 < x < math.inf)
    loss, point, held = _loss.problem(loss_fn, params)
    optimizer = _loss.optimizer(tx, "learning_rate_range_test")
    built = built_rate(optimizer, point, learning_rate)
    rates = np.geomspace(low, high, steps)
    state, average, best = optimizer.init(point), 0.0, math.inf
    losses: list[float] = []
    smoothed: list[float] = []
    divergence = math.inf
    for rate, batch in zip(rates, _one_a_step(batches), strict=False):
        scale = jnp.float32(rate / built)
        value, point, state = _step(loss, optimizer, point, state, (held, batch), scale)
        value = float(value)
        if not math.isfinite(value):
            divergence = float(rate)
            break
        losses.append(value)
        average = smoothing * average + (1 - smoothing) * value
        smoothed.append(average / (1 - smoothing ** len(losses)))
        best = min(best, smoothed[-1])
        if smoothed[-1] - best > (blow_up - 1) * abs(best):
            divergence = float(rate)
            break
    if not losses:
        raise ValueError(
            "`batches` must hold a batch whose loss is finite, got "
            + ("a first loss that is not." if math.isfinite(divergence) else "none.")
        )
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
    """The rate at which the average falls fastest on the way to its minimum, or nan."""
    last = min(len(rates) - _LAST, int(np.argmin(smoothed)) + 1)
    inner = slice(_FIRST, last)
    if last <= _FIRST:
        return math.nan
    slopes = np.gradient(smoothed, np.log(rates))[inner]
    steepest = int(np.argmin(slopes))
    return float(rates[inner][steepest]) if slopes[steepest] < 0 else math.nan


def _one_a_step(batches: Any) -> Iterator:
    one = isinstance(batches, tuple | dict) or hasattr(batches, "dtype")
    if one or not isinstance(batches, Iterable):
        return itertools.repeat(batches)
    return iter(batches)


@functools.partial(jax.jit, static_argnames=("loss", "tx"))
def _step(loss, tx, point, state, data, scale):
    """The loss before one step of the optimizer, and where that leads."""
    value, grads = jax.value_and_grad(loss)(point, data)
    updates, after = tx.update(grads, state, point, value=value)
    return value, _vectors.moved(point, scale, updates), after
