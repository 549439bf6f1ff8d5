"""The optimizer: its rate, its epsilon, its memory."""

import math
from collections.abc import Iterator

import numpy as np

from .._training import SCALES
from ._rule import Facts, Rule, Verdict, graded

EPSILON = {"warning": 0.5, "critical": 0.9}
STALE = 2.3
SLOWER, LEAST_GAP = 0.15, 0.05
UPDATE = (1e-6, 0.3)


def _leaves(facts: Facts, numbers) -> list[tuple[str, float]]:
    rows = zip(facts.parameters, numbers, strict=True) if numbers else []
    return [(name, number) for name, number in rows if not math.isnan(number)]


def rate(facts: Facts) -> Iterator[Verdict]:
    found = facts.training
    if found is None or not found.losses or not np.isfinite(found.untrained).all():
        return
    losses = np.asarray(found.losses)
    finite = bool(np.isfinite(losses).all())
    start, steps = found.untrained[0], len(losses) - 1
    evidence = {"start": start, "end": found.ends[0]}
    if found.calm_scale < 1:
        scale, peak = found.calm_scale, float(losses.max()) if finite else math.inf
        evidence |= {"peak": peak, "calm_scale": scale}
        what = f"within {steps} steps the loss goes from {start:.3g} to {peak:.3g}; "
        if scale > 0:
            what += f"the same steps at {scale:g} of the rate do not raise it"
        else:
            scale = SCALES[-1] / 4
            what += f"the same steps at {SCALES[-1]:g} of the rate raise it, too"
        severity = "critical" if peak > 2 * abs(start) else "warning"
        threshold = "10 % and 3 deviations of its parts above the same batch untrained"
    else:
        best = int(np.argmin(found.ends))
        gap, fall = found.ends[0] - found.ends[best], start - found.ends[best]
        # Later in a run a lower rate always gains at first: it averages noise away.
        if not (found.is_new and gap > SLOWER * fall and gap > LEAST_GAP * abs(start)):
            return
        scale, severity = SCALES[best], "warning"
        evidence |= {"better_scale": scale, "better_end": found.ends[best]}
        what = (
            f"{steps} steps end at a loss of {found.ends[0]:.3g}, and the same steps "
        )
        what += f"at {scale:g} of the rate at {found.ends[best]:.3g}"
        threshold = f"{SLOWER:.0%} less progress than at a lower rate"
    yield Verdict(
        rule="rate",
        severity=severity,
        layer="",
        finding=f"The learning rate is too high: {what}.",
        evidence=evidence,
        threshold=threshold,
        source="measured; Kalra et al. (2026), https://arxiv.org/abs/2601.16979",
        remedy=f"Multiply the learning rate by {scale / 2:g}, or measure the limit.",
        formula="rate <= safe_start",
        code="sg.critical_learning_rate(loss_fn, params, batch, optax.adam).safe_start",
        change={"rate": scale / 2},
    )


def epsilon(facts: Facts) -> Iterator[Verdict]:
    found = facts.training
    if found is None or not found.epsilon > 0:
        return
    leaves = _leaves(facts, found.below_epsilon)
    sizes = [facts.parameters[name]["size"] for name, _ in leaves]
    if not leaves:
        return
    share = float(np.average([x for _, x in leaves], weights=sizes))
    severity = graded(share, EPSILON)
    if severity:
        roots = [
            numbers["gradient"]
            for numbers in facts.parameters.values()
            if numbers["gradient"]
        ]
        right = 10.0 ** math.floor(
            math.log10(max(np.median(roots) if roots else 1, 1e-20)) - 3
        )
        yield Verdict(
            rule="epsilon",
            severity=severity,
            layer="",
            finding=f"Adam's epsilon of {found.epsilon:.2g} exceeds the gradient of "
            f"{share:.0%} of the elements: they get a fraction of the rate.",
            evidence={"share": share, "epsilon": found.epsilon},
            threshold=f"{EPSILON[severity]:.0%} of the elements",
            source="Wortsman et al. (2023), https://arxiv.org/abs/2309.14322",
            remedy=f"Lower epsilon to {right:.0e}, or raise the gradients (a loss that "
            "is a mean over fewer things).",
            formula="|update| = rate |g| / (|g| + epsilon), epsilon << |g|",
            code=f"optax.adamw(rate, eps={right:.0e})",
            change={"epsilon": right},
        )


def stale_moment(facts: Facts) -> Iterator[Verdict]:
    found = facts.training
    rows = _leaves(facts, found.staleness) if found is not None else []
    if found is None or not rows:
        return
    name, worst = max(rows, key=_size)
    middle = float(np.median([size for _, size in rows]))
    if middle <= STALE:
        return
    right = min(0.95, found.b2)
    yield Verdict(
        rule="stale_moment",
        severity="warning" if middle < 3 * STALE else "critical",
        layer="",
        finding=f"Adam's second moment is out of date: the gradient is {middle:.3g} "
        f"times what it expects ({worst:.3g} in {name}). With b2 = {found.b2:.5g} it "
        f"remembers {1 / max(1 - found.b2, 1e-9):.0f} steps.",
        evidence={"ratio": middle, "worst": worst, "b2": found.b2},
        threshold=f"sqrt(mean(g^2 / v)) of {STALE:g}",
        source="Wortsman et al., StableAdamW (2023), https://arxiv.org/abs/2304.13013",
        remedy=f"Lower b2 to {right:g}, or shrink such updates.",
        formula="rate / max(1, sqrt(mean(g^2 / v)))",
        code=f"optax.adamw(rate, b2={right:g}), or sg.clip_update_rms()",
        change={"b2": right},
    )


def updates(facts: Facts) -> Iterator[Verdict]:
    found = facts.training
    if found is None:
        return
    rows = [
        (name, size)
        for name, size in _leaves(facts, found.updates)
        if facts.parameters[name]["rms"] > 1e-6 and facts.parameters[name]["size"] > 64
    ]
    if not rows:
        return
    (low_name, low), (high_name, high) = min(rows, key=_size), max(rows, key=_size)
    for name, size, is_high in (high_name, high, True), (low_name, low, False):
        if (size > UPDATE[1]) if is_high else (0 < size < UPDATE[0]):
            word = "large" if is_high else "small"
            yield Verdict(
                rule="updates",
                severity="note",
                layer=name,
                finding=f"The update of {name} is {word}: {size:.2g} of the parameter.",
                evidence={"update": size},
                threshold=f"{UPDATE[0]:g} to {UPDATE[1]:g}; about 1e-3 is usual",
                source="rule of thumb (Karpathy, 2022)",
                remedy="Compare with the other layers; a rate for each group, or a "
                "warm-up.",
                formula="rms(update) / rms(parameter) = 1e-3",
                code="optax.warmup_cosine_decay_schedule(...)",
            )


def _size(row) -> float:
    return row[1]


RULES = (
    Rule(
        "stale_moment",
        "Is Adam's second moment up to date?",
        stale_moment,
        ("rate", "updates"),
        applies=lambda facts: bool(facts.training and facts.training.staleness),
    ),
    Rule(
        "epsilon",
        "Is Adam's epsilon below the gradients?",
        epsilon,
        applies=lambda facts: bool(facts.training and facts.training.below_epsilon),
    ),
    Rule(
        "rate",
        "Is the learning rate low enough?",
        rate,
        ("updates",),
        applies=lambda facts: bool(facts.training and facts.training.losses),
    ),
    Rule(
        "updates",
        "Are updates in proportion to parameters?",
        updates,
        applies=lambda facts: facts.training is not None,
    ),
)
