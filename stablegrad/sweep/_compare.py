"""Trains every candidate at every learning rate from every seed, and ranks them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .. import _checks
from ._candidates import candidates as all_of
from ._plan import Plan
from ._problem import draws_of, problem_of
from ._progress import progress
from ._result import Comparison, Row, row_of
from ._running import Runs

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


def compare(
    loss_fn: Callable,
    params: Any,
    data: Any,
    candidates: Any,
    learning_rates: Sequence[float] = RATES,
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
    """Trains every candidate at every learning rate from every seed, and ranks them.

    All see the same batches in the same order, and start from the same weights, seed by
    seed. The runs of a candidate are compiled into one program, as many side by side
    (`jax.vmap`) as half of the memory holds. A candidate that cannot be built or run is
    reported and does not stop the others; Ctrl-C returns what is done by then.

    Args:
        loss_fn: `loss_fn(params, batch)`, the mean loss of a batch, a scalar; or a
            training step `step(tx, params, opt_state, batch)` that returns
            `(params, opt_state, loss)`. They are told apart by their arguments, two or
            four. A step must pass `value=` to `tx.update`, and `value_fn=` for the
            candidates that look along the step.
        params: The parameters before the first step, a pytree; or a function of a
            `jax.random.key` that gives them, called with each seed's.
        data: Arrays with the examples along their first axes, of which each step draws
            `batch_size` rows, every row once an epoch; or a function of a
            `jax.random.key` that gives a batch.
        candidates: Names such as "adam", "momentum + stairs_down" or
            "adamw + clip_by_zscore + cosine + stabilize" (`stablegrad.sweep.WORDS` has
            them all), functions of the learning rate that return a transformation, or
            transformations, which run at the rate they were built with. A list, or a
            dict from names. `update` is passed `value=`, the loss; what else it needs,
            as `value_fn=` for a trust region, `stablegrad.sweep.Candidate` says.
        learning_rates: Peak rates, > 0; best evenly spaced on a logarithmic scale.
        seeds: How many, or which. >= 1.
        steps: Of each run, >= 1. Policies stretch over all of them.
        batch_size: Rows of `data` a step; only if it is arrays.
        validation: Arrays with a leading axis of examples, for `evaluate`. None: the
            training losses since the last evaluation stand in for it.
        evaluate: `evaluate(params, batch)`: a mean loss, or a dict of means with "loss"
            and, if there is one, "accuracy" in [0, 1]. None: `loss_fn`.
        hidden: `hidden(params, batch)`: a pytree of activations after their ReLU, units
            along the last axis. A unit that is above zero nowhere in `validation` is
            dead.
        trivial_loss: Of the best constant predictor, for classes `label_entropy`. A
            candidate that is not 1 % better is flagged.
        evaluations: How many at most, evenly spaced, besides the one before the first
            step. >= 1.
        patience: Evaluations without a lower loss after which a run is ended; its best
            one counts. None: every run takes all steps, and its last one counts.
        at_once: Runs in one program at most. None: as many as memory allows; one on a
            CPU if there are convolutions, which are slow there for several networks.
        show_progress: Whether to draw a progress bar on standard error.

    Returns:
        `Comparison`: `str()` is the ranked table, `figure()` draws training curves and
        loss against learning rate, `records()` is for data frames, `save()` writes
        JSON. A run whose loss is nan or inf counts as no better than before training.

    Raises:
        TypeError: If `loss_fn` takes neither two nor four arguments, or a candidate is
            none.
        ValueError: If an argument is out of range, a name is not known, or `data`,
            `validation` and what goes with them do not fit together.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import stablegrad as sg
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params - 1.0) ** 2)
        >>> result = sg.sweep.compare(
        ...     loss_fn, jnp.zeros(2), lambda key: jax.random.normal(key, (8, 2)) + 1,
        ...     ["sgd", "adam + cosine"], learning_rates=[1e-3, 1e-1], steps=50,
        ...     show_progress=False,
        ... )
        >>> result.rows[0].scores.best_rate
        0.1

    Reference:
        LR sensitivity: Wortsman et al., Small-scale proxies for large-scale Transformer
        training instabilities (2023), https://arxiv.org/abs/2309.14322.
    """
    rates = tuple(float(rate) for rate in learning_rates)
    finite = lambda x: len(x) > 0 and all(0 < rate < np.inf for rate in x)
    _checks.require("learning_rates", rates, "finite rates > 0", finite)
    rates = tuple(sorted(set(rates)))
    if isinstance(seeds, int):
        _checks.require_count("seeds", seeds)
        seeds = range(seeds)
    seeds = tuple(int(seed) for seed in seeds)
    fits = lambda x: len(x) > 0 and len(set(x)) == len(x) and min(x) >= 0
    _checks.require("seeds", seeds, "different integers >= 0", fits)
    _checks.require_count("steps", steps)
    _checks.require_count("evaluations", evaluations)
    for name, number in (("patience", patience), ("at_once", at_once)):
        if number is not None:
            _checks.require_count(name, number)
    entrants = all_of(candidates)
    problem = problem_of(loss_fn, params, data, validation, evaluate, hidden)
    plan = Plan(
        rates=rates,
        seeds=seeds,
        steps=steps,
        every=-(-steps // evaluations),
        patience=patience,
        at_once=at_once,
        draws=draws_of(data, batch_size),
    )
    rows: list[Row] = []
    failed: dict[str, str] = {}
    interrupted = False
    with progress([one.name for one in entrants], show_progress) as tell:
        for one in entrants:
            done = 0.0
            tell(one.name, done)
            runs = Runs(problem, one, plan)
            try:
                for done in runs.train():
                    tell(one.name, done)
                own = (np.nan,) if one.own_rate else rates
                row = row_of(one.name, runs, own, plan.evaluations, trivial_loss)
            except KeyboardInterrupt:
                interrupted = True
                failed[one.name] = f"interrupted after {done:.0%} of its steps"
                break
            except Exception as error:  # Whatever a candidate raises, others go on.
                failed[one.name] = _one_line(error)
                continue
            rows.append(row)
    return Comparison(
        rows=tuple(sorted(rows, key=lambda row: row.scores.best)),
        failed=failed,
        steps=steps,
        seeds=seeds,
        validated=validation is not None,
        interrupted=interrupted,
    )


def label_entropy(labels: Any) -> float:
    """The cross-entropy of the best constant predictor of class labels, in nats.

        H = -sum_k p_k log p_k,    p_k the share of label k

    Args:
        labels: Integers of any shape, at least one.

    Returns:
        The entropy, >= 0.

    Raises:
        ValueError: If there are no labels, or they are no integers.

    Example:
        >>> import numpy as np, stablegrad as sg
        >>> round(sg.sweep.label_entropy(np.arange(10)), 4)
        2.3026
    """
    labels = np.asarray(labels)
    whole = labels.size > 0 and np.issubdtype(labels.dtype, np.integer)
    _checks.require("labels", labels, "integers, at least one", lambda _: whole)
    _, counts = np.unique(labels, return_counts=True)
    shares = counts / labels.size
    return float(-np.sum(shares * np.log(shares)))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]
