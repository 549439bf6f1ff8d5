"""The critical learning rate, from parameters and error, before training."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import optax

from .. import _checks
from . import _hessian, _loss
from ._estimates import Estimates, elsewhere, estimate
from ._rate import built_rate
from ._report import CriticalLearningRate, report

METHODS = ("auto", *_hessian.METHODS, "forward")
_MEANS = ("loss", "slope", "curvature", "gradient_norm")  # All else are rates.


def critical_learning_rate(
    loss_fn: Callable,
    params,
    batch,
    tx: optax.GradientTransformation,
    *,
    learning_rate: float | None = None,
    more_batches: Iterable[Any] = (),
    steps: int = 10,
    curvature: str = "auto",
    tolerance: float = 1e-3,
    spike: float = 0.05,
    best_loss: float = 0.0,
) -> CriticalLearningRate:
    """Finds the learning rate at which training would spike, before training.

    With L the loss on the batch, g its gradient, H its Hessian and u the optimizer's
    first update per unit of learning rate, four limits and two guides:

        directional = -2 g.u / u.Hu               twice the minimum along the update
        forward     = min {eta: L(x + eta u) > L(x) + tolerance |L(x)|}
        probe       = min {eta: max_{t <= steps} L_t > L_0 + spike |L_0|}
        cross_batch = `forward` on another batch than the update's
        polyak      = (L - best_loss) / -g.u
        parameter   = 1e-3 min_leaf rms(x) / rms(u)

    `directional` looks at one point, and is right on a quadratic; `forward` sees how
    the loss really bends, but not that a loss which saturates hides a spike of the next
    step; `probe` takes real optimizer steps, and is the one to believe: `critical` is
    the probe, or the smaller of the other two without it. `safe_start` is half of the
    smallest of the three. On the 36 small networks of `benchmarks/critical_lr.py` the
    probe is within a factor 1.4 of the observed first spike in 94 %, `forward` is off
    by up to 13, and `directional` finds no limit in two. All are the end of the stable
    range on these batches, not the best rate, and see nothing that builds up over
    thousands of steps.

    It costs about 20 forward passes, one Hessian product, and 15 times `steps`
    gradients, all in one compiled program, in which nothing of the user's changes.

    Args:
        loss_fn: `loss_fn(params, batch)`, a scalar. It must give the same value every
            time: freeze dropout keys, keep batch normalisation in training mode.
        params: Any pytree, or a Flax NNX module: then `loss_fn(model, batch)`, whose
            `nnx.Param` move. Leaves that are not floating point are held; the optimizer
            sees None there. Half precision is measured as float32.
        batch: What `loss_fn` takes, pytrees of arrays, as large as in training: the
            critical rate depends on it.
        tx: Any chain whose update is proportional to its rate, built with learning rate
            1 (`optax.adamw(1.0)`), or with `learning_rate`. No schedule: a warm-up's
            first rate is zero. No trust region or line search, which choose the step
            themselves. It gets `value=`.
        learning_rate: The rate that `tx` was built with, > 0. None: the one that
            `optax.inject_hyperparams` keeps in its state, without that 1.
        more_batches: A list or iterable of further batches of the same shape. The
            estimates become geometric means over all of them, and each update is also
            tried on the next batch.
        steps: Optimizer steps of the probe, >= 0: about as many as the momentum lasts,
            1 / (1 - b). 0: no probe, for models too large.
        curvature: Where u.Hu comes from. `"jvp"`, `"vjp"` or `"difference"` of
            gradients, `"auto"` for the first of these that the loss allows; `"forward"`
            for three losses and no second derivative, at a distance at which the slope
            changes by a tenth or so.
        tolerance: The relative rise that counts for `forward`, > 0.
        spike: The relative rise that counts for `probe`, > 0.
        best_loss: The loss of a perfect model, for `polyak`.

    Returns:
        `CriticalLearningRate`: plain floats, and sentences under `str()`. A rate at
        which the loss is nan or infinite counts as a spike. An update that does not
        descend gives 0, and no rise at any rate inf; `flags` say so.

    Raises:
        TypeError: If `loss_fn` does not return a real scalar.
        ValueError: If an argument is out of range, `params` has no floating-point leaf,
            `more_batches` are no batches like `batch`, the state of `tx` keeps another
            rate than is told, `loss_fn` lacks the derivative that `curvature` asks for;
            if the loss, its gradient or the update is not finite at `params`, or the
            first update is zero though the gradient is not, as in a warm-up.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> def loss_fn(params, batch):
        ...     return 0.5 * jnp.sum(batch * params**2)
        >>> batch = jnp.array([1.0, 10.0])
        >>> found = sg.critical_learning_rate(
        ...     loss_fn, jnp.ones(2), batch, optax.sgd(1.0)
        ... )
        >>> round(found.directional, 4)
        0.2018
        >>> found.safe_start < 0.2 < found.forward
        True

    Reference:
        Kalra et al., A scalable measure of loss landscape curvature for analyzing the
        training dynamics of LLMs (2026), https://arxiv.org/abs/2601.16979, for
        `forward`. The probe and the safe start are ours.
    """
    positive = ("finite and > 0", lambda x: 0 < x < math.inf)
    _checks.require("tolerance", tolerance, *positive)
    _checks.require("spike", spike, *positive)
    _checks.require("best_loss", best_loss, "finite", math.isfinite)
    _checks.require_count("steps", steps, 0)
    _checks.require("curvature", curvature, f"one of {METHODS}", lambda x: x in METHODS)
    loss, point, held = _loss.problem(loss_fn, params)
    optimizer = _loss.optimizer(tx, "critical_learning_rate")
    built = built_rate(optimizer, point, learning_rate)
    all_data = [(held, one) for one in (batch, *_others(more_batches, batch))]
    with jax.default_matmul_precision("highest"):
        method = curvature
        if method == "auto":
            method = _hessian.cheapest(loss, point, all_data[0])
        elif method in ("jvp", "vjp"):
            _hessian.require_allowed(method, loss, point, all_data[0])
        measure = functools.partial(
            estimate,
            loss,
            optimizer,
            point,
            method=method,
            probed=steps > 0,
            steps=steps,
            built=built,
            tolerance=tolerance,
            spike=spike,
        )
        found = [_checked(measure(data)) for data in all_data]
        following = all_data[1:] + all_data[:1] if len(all_data) > 1 else []
        crossed = [
            elsewhere(loss, point, data, one.direction, tolerance, one.forward)
            for one, data in zip(found, following, strict=False)
        ]
    told = [_told(one, best_loss) for one in found]
    rates = [
        _per_rate(one, length) for one, length in zip(found, crossed, strict=False)
    ]
    return report(
        **{
            name: (_mean if name in _MEANS else _geometric)([one[name] for one in told])
            for name in told[0]
        },
        cross_batch=_geometric(rates) if rates else math.nan,
        method=method,
    )


def _others(more_batches, batch) -> list[Any]:
    """The further batches; ValueError if they are not built as the first is."""
    others = [] if hasattr(more_batches, "dtype") else list(more_batches)
    expected = jax.tree.structure(batch)
    if hasattr(more_batches, "dtype") or any(
        jax.tree.structure(one) != expected for one in others
    ):
        raise ValueError(
            "`more_batches` must be a list of batches, each built as `batch` is, also "
            f"if it is only one, got {_loss.outline(others or more_batches)}."
        )
    return others


def _checked(found: Estimates) -> Estimates:
    """Raises ValueError if the estimates mean nothing."""
    _loss.require_finite(found.loss, found.gradient_norm)
    update = float(found.update_norm)
    if not math.isfinite(update):
        raise ValueError(f"`tx` must give a finite update, got a norm of {update:g}.")
    if update == 0 and found.gradient_norm > 0:
        raise ValueError(
            "`tx` must move the parameters at its first step, got an update of zero. "
            "A schedule with a warm-up starts at rate 0: build it without one, as "
            "`optax.adamw(1.0)`, and without `optax.MultiSteps`."
        )
    return found


def _told(found: Estimates, best_loss: float) -> dict[str, float]:
    """The estimates per unit of learning rate, in float64, where nothing overflows."""
    size, slope = float(found.update_norm), float(found.slope)
    gain = np.float64(found.loss) - best_loss
    with np.errstate(divide="ignore", invalid="ignore"):
        polyak = float(gain / np.float64(-slope * size))
    return {
        "loss": float(found.loss),
        "slope": slope * size,
        "curvature": float(found.curvature) * size**2,
        "gradient_norm": float(found.gradient_norm),
        "directional": _per_rate(found, found.directional),
        "forward": _per_rate(found, found.forward),
        "probe": float(found.probe),
        "polyak": polyak,
        "parameter": float(found.parameter),
    }


def _per_rate(found: Estimates, length) -> float:
    """The rate at which a step has a length; inf where no step has any."""
    size = float(found.update_norm)
    return float(length) / size if size else math.inf


def _mean(values) -> float:
    return float(np.mean([float(value) for value in values]))


def _geometric(values) -> float:
    """The geometric mean; one 0 makes it 0, else one inf inf."""
    numbers = [float(value) for value in values]
    if min(numbers) <= 0:
        return 0.0
    return math.exp(_mean(math.log(number) for number in numbers))
