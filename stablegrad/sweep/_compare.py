"""The comparison: train every candidate, and rank the results."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from .. import _checks
from ._candidates import candidates as make_candidates
from ._experiment import make_experiment
from ._progress import progress
from ._result import Comparison, Row, make_row
from ._runs import Runs

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


def compare(
    loss_fn: Callable,
    params: Any,
    data: Any,
    candidates: Any,
    learning_rates: float | Sequence[float] = RATES,
    seeds: int | Iterable[int] = 1,
    steps: int = 1000,
    *,
    batch_size: int | None = None,
    validation: Any = None,
    evaluate: Callable | None = None,
    hidden: Callable | None = None,
    trivial_loss: float | None = None,
    evaluations: int = 20,
    patience: int | None = None,
    at_once: int | None = None,
    show_progress: bool = True,
) -> Comparison:
    """Train every candidate at every learning rate from every seed, and rank them.

    For each seed, all runs start from the same parameters and see the same batches in
    the same order. `jax.vmap` trains as many runs of a candidate at a time as fit in
    half of the memory. If a candidate raises an error, it is reported and the others
    run. Ctrl-C returns the results so far.

    Args:
        loss_fn: `loss_fn(params, batch)`, the mean loss of a batch, a scalar; or a
            training step `step(tx, params, opt_state, batch)` that returns
            `(params, opt_state, loss)`, and passes `value=` to `tx.update`, and
            `value_fn=` for candidates that probe the loss along the update.
        params: Initial parameters, a pytree; or a function that makes them from the
            `jax.random.key` of a seed.
        data: Arrays with examples along the first axis, each used once an epoch; or a
            function that makes a batch from a `jax.random.key`.
        candidates: A list, or a dict by name, of names such as "adam" or
            "adamw + clip_by_zscore + cosine + stabilize" (`stablegrad.sweep.WORDS`
            lists all words), of functions that map a learning rate to a transformation,
            of transformations, which run at their own rate, or of `Candidate`s.
        learning_rates: Peak rates, > 0, best evenly spaced on a logarithmic scale.
        seeds: Number of seeds, >= 1, or different seeds, >= 0.
        steps: Steps of each run, >= 1. Policies span all of them.
        batch_size: Examples per step, if `data` is arrays.
        validation: Arrays with examples along the first axis, for `evaluate`. If None,
            an evaluation is the mean of the training losses since the last one.
        evaluate: `evaluate(params, batch)`, a mean loss, or a dict of means with "loss"
            and optionally "accuracy" in [0, 1]. If None, `loss_fn`.
        hidden: `hidden(params, batch)`, a pytree of ReLU activations with units along
            the last axis. A unit is dead if no example of `validation` activates it.
        trivial_loss: Loss of the best constant predictor, for classes `label_entropy`.
            Candidates that are not 1 % better are flagged.
        evaluations: Maximum number of evaluations, evenly spaced, besides the one
            before the first step. >= 1.
        patience: Number of evaluations without a lower loss after which a run ends, and
            its best evaluation counts, >= 1. If None, the last evaluation counts.
        at_once: Maximum number of runs in one program, >= 1. If None, as many as fit in
            memory, but one for convolutions on a CPU, where `jax.vmap` is slow.
        show_progress: Whether to show progress on standard error.

    Returns:
        A `Comparison`: `str()` is the ranked table, `figure()` draws curves,
        `records()` is for data frames, and `save()` writes JSON. A run whose loss is
        nan or inf counts with its loss before training, unless a guard skipped those
        steps and training went on: not if it skipped the last ten.

    Raises:
        TypeError: If `loss_fn` takes neither two nor four arguments, or a candidate has
            another type.
        ValueError: If an argument is out of range, a name is unknown, or `data`,
            `validation` and the arguments for them do not fit together.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import stablegrad as sg
        >>> result = sg.sweep.compare(
        ...     lambda params, batch: jnp.mean((batch @ params - 1.0) ** 2),
        ...     jnp.zeros(2), lambda key: jax.random.normal(key, (8, 2)) + 1,
        ...     ["sgd", "adam + cosine"], [1e-3, 1e-1], steps=50, show_progress=False,
        ... )
        >>> result.rows[0].scores.best_rate
        0.1

    Reference:
        LR sensitivity: Wortsman et al. (2023), https://arxiv.org/abs/2309.14322.
    """
    given: Any = learning_rates
    rates = (given,) if _is_one(given) else tuple(given)
    least, most = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    positive = lambda x: bool(x) and all(least <= 1.0 * rate <= most for rate in x)
    _checks.require("learning_rates", rates, "finite rates > 0 in float32", positive)
    rates = tuple(map(float, rates))
    given = seeds
    if _is_one(given):
        _checks.require("seeds", given, "a number", lambda x: not isinstance(x, bool))
        _checks.require_steps("seeds", given)
        given = range(int(given))
    given = np.asarray(list(given))
    known = lambda x: x.min() >= 0 and x.max() < 2**32 and len(np.unique(x)) == x.size
    whole = lambda x: x.dtype.kind in "iu" and known(x)
    _checks.require("seeds", given, "different integers in [0, 2**32)", whole)
    seeds = tuple(given.tolist())
    told = lambda x: x is None or not np.isnan(x)
    _checks.require("trivial_loss", trivial_loss, "a number or None", told)
    counts = {"steps": steps, "evaluations": evaluations}
    optional = {"patience": patience, "at_once": at_once}
    counts |= {name: count for name, count in optional.items() if count is not None}
    for name, count in counts.items():
        _checks.require_count(name, count)
    entrants = make_candidates(candidates)
    experiment = make_experiment(
        loss_fn,
        params,
        data,
        batch_size,
        validation,
        evaluate,
        hidden,
        rates=tuple(sorted(set(rates))),
        seeds=seeds,
        steps=steps,
        interval=-(-steps // evaluations),
        patience=patience,
        at_once=at_once,
    )
    rows: list[Row] = []
    failed: dict[str, str] = {}
    interrupted = False
    with progress([one.name for one in entrants], show_progress) as report:
        for candidate in entrants:
            name, done = candidate.name, 0.0
            report(name, done)
            try:
                runs = Runs(experiment, candidate)
                # Runs that blow up are expected, and nan stands for what is not there.
                with jax.debug_nans(False), jax.debug_infs(False):
                    for done in runs.train():
                        report(name, done)
                rows.append(make_row(runs, trivial_loss))
            except KeyboardInterrupt:
                interrupted = True
                failed[name] = f"interrupted after {done:.0%} of its steps"
                break
            except Exception as error:  # Candidates may raise anything.
                message = " ".join(str(error).split())
                failed[name] = f"{type(error).__name__}: {message}"[:200]
    return Comparison(
        rows=tuple(sorted(rows, key=lambda row: np.fmin(row.scores.best, np.inf))),
        failed=failed,
        steps=steps,
        seeds=seeds,
        validated=validation is not None,
        interrupted=interrupted,
    )


def _is_one(given: Any) -> bool:
    """Return whether an argument is one number, or text, and not several of them."""
    if isinstance(given, np.ndarray | jax.Array):
        return given.ndim == 0
    return isinstance(given, str) or not isinstance(given, Iterable)


def label_entropy(labels: Any) -> float:
    """Return the cross-entropy of the best constant predictor of class labels, in nats.

        H = -sum_k p_k log p_k,    with p_k the share of label k

    Args:
        labels: Integers of any shape, at least one.

    Returns:
        The entropy, >= 0.

    Raises:
        ValueError: If there are no labels, or if they are not integers.

    Example:
        >>> import numpy as np, stablegrad as sg
        >>> round(sg.sweep.label_entropy(np.arange(10)), 4)
        2.3026
    """
    labels = np.asarray(labels)
    valid = labels.size > 0 and np.issubdtype(labels.dtype, np.integer)
    _checks.require("labels", labels, "integers, at least one", lambda _: valid)
    _, counts = np.unique(labels, return_counts=True)
    shares = counts / labels.size
    return float(-np.sum(shares * np.log(shares)))
