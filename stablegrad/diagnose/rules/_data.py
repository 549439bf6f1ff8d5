"""The batch: its size, its rows, its labels."""

import math
from collections.abc import Iterator

import numpy as np

from .._batch import ODD_ROW
from ._rule import Facts, Rule, Verdict

INPUT_RMS = 20.0
ODD_SHARD, ODD_SHARD_GAP = 12.0, 8.0
SEEN, UNSEEN = 8.0, 2.0


def bad_examples(facts: Facts) -> Iterator[Verdict]:
    rows = facts.batch.bad_rows
    if rows:
        yield Verdict(
            rule="bad_examples",
            severity="critical",
            layer="",
            finding=f"{len(rows)} of {facts.batch.longest} examples hold a nan or an "
            f"inf: {_listed(rows)}.",
            evidence={"examples": float(len(rows)), "first": float(rows[0])},
            threshold="0 examples",
            source="definition",
            remedy="Repair or drop them where the data is read; a guard refuses the "
            "steps meanwhile.",
            formula="batch[isfinite(batch).all(axis=1)]",
            code="tx = sg.stabilize(tx)",
            change={"drop_examples": list(rows)},
        )


def odd_rows(facts: Facts) -> Iterator[Verdict]:
    batch, rows = facts.batch, facts.batch.odd_rows
    if rows and len(rows) <= batch.examples / 2:
        where = f"{len(rows)} examples, {_listed(rows)}, are up to "
        where += f"{batch.odd_ratio:.3g} times as large as the median one"
        yield _odd("odd_rows", "warning", where, {"row_ratio": batch.odd_ratio}, rows)


def _has_shards(facts: Facts) -> bool:
    return len(facts.batch.norms) >= 4


def _has_labels(facts: Facts) -> bool:
    found = facts.training
    return bool(found and math.isfinite(found.labels_seen + found.labels_unseen))


def odd_shard(facts: Facts) -> Iterator[Verdict]:
    batch = facts.batch
    norms = np.asarray(batch.norms, float)
    if not _has_shards(facts) or not np.isfinite(norms).all() or np.median(norms) <= 0:
        return
    ratio = float(norms.max() / np.median(norms))
    # Examples that are fitted have no gradient, so others stand out, but not one alone.
    alone = norms.max() > ODD_SHARD_GAP * np.sort(norms)[-2]
    if ratio > ODD_SHARD and alone:
        at, size = int(norms.argmax()), batch.examples // len(norms)
        rows = tuple(range(at * size, (at + 1) * size))
        where = f"the gradient of examples {rows[0]} to {rows[-1]} is {ratio:.3g} "
        where += "times as large as that of the median shard"
        # In a network that fits the others, one hard example looks the same.
        yield _odd("odd_shard", "note", where, {"shard_ratio": ratio}, rows)


def _odd(rule: str, severity: str, where: str, evidence, rows) -> Verdict:
    return Verdict(
        rule=rule,
        severity=severity,
        layer="",
        finding=f"One part of the batch is not like the others: {where}.",
        evidence=evidence,
        threshold=f"{ODD_ROW:g} times the median row, {ODD_SHARD:g} times the median "
        "shard",
        source="stablegrad: benchmarks/diagnose.md",
        remedy="Look at how these examples were read; clip or refuse steps whose "
        "gradient is rare.",
        formula="|g| <= limit of what comes on all but 1 % of the steps",
        code="tx = sg.stabilize(tx)",
        change={"drop_examples": list(rows)},
    )


def input_size(facts: Facts) -> Iterator[Verdict]:
    # Only arrays that enter a layer unchanged count: targets and masks may be large.
    taken = [layer.input_rms for layer in facts.layers]
    enters = lambda rms: any(math.isclose(rms, x, rel_tol=0.02) for x in taken)
    size = max(filter(enters, facts.batch.array_rms), default=0.0)
    if size > INPUT_RMS:
        yield Verdict(
            rule="input_size",
            severity="warning",
            layer="",
            finding=f"The inputs have an RMS of {size:.3g}; initialisations assume 1.",
            evidence={"input_rms": size},
            threshold=f"{INPUT_RMS:g}",
            source="LeCun et al., Efficient BackProp (1998)",
            remedy=f"Divide the inputs by {size:.3g}, or standardise them.",
            formula="x <- (x - mean) / std",
            code=f"batch = batch / {size:.3g}",
            change={"divide_inputs": size},
        )


def labels(facts: Facts) -> Iterator[Verdict]:
    found = facts.training
    if found is None or not _has_labels(facts):
        return
    if found.labels_seen > SEEN and found.labels_unseen < UNSEEN:
        yield Verdict(
            rule="labels",
            severity="warning",
            layer="",
            finding="What is learned does not carry over: after these steps the labels "
            f"beat shuffled ones by {found.labels_seen:.1f} standard deviations on "
            f"the examples trained on, and by {found.labels_unseen:.1f} on others.",
            evidence={"seen": found.labels_seen, "unseen": found.labels_unseen},
            threshold=f"more than {SEEN:g} on seen, less than {UNSEEN:g} on unseen",
            source="Zhang et al. (2017), https://arxiv.org/abs/1611.03530; "
            "permutation test",
            remedy="Check that inputs and labels are shuffled together, and that the "
            "labels are those of these inputs.",
            formula="(mean(L(shuffled)) - L(labels)) / std(L(shuffled))",
            code="order = rng.permutation(n); x, y = x[order], y[order]",
            change={"labels": True},
        )


def noise(facts: Facts) -> Iterator[Verdict]:
    size, scale = facts.batch.examples, facts.batch.noise_scale
    if size and scale > 10 * size:
        shown = (
            "beyond what this batch can tell" if math.isinf(scale) else f"{scale:.0f}"
        )
        yield Verdict(
            rule="noise",
            severity="note",
            layer="",
            finding=f"The gradient is mostly noise at this batch size: the noise scale "
            f"is {shown}, the batch {size}.",
            evidence={"noise_scale": scale, "examples": float(size)},
            threshold="10 times the batch",
            source="McCandlish et al. (2018), https://arxiv.org/abs/1812.06162",
            remedy="Nothing is wrong; steps could be averaged over more examples, or "
            "the rate lowered.",
            formula="rate = rate_max / (1 + noise / batch)",
            code="optax.MultiSteps(tx, every_k_schedule=4)",
        )


def _listed(rows) -> str:
    shown = ", ".join(map(str, rows[:6]))
    return f"{shown}, ..." if len(rows) > 6 else shown


_ALL = (
    "nonfinite_values",
    "nonfinite_gradients",
    "odd_shard",
    "input_size",
    "rate",
    "saturated",
    "dead_units",
    "exploding",
    "vanishing",
    "rank_collapse",
    "overflow16",
    "attention",
    "router",
    "gain",
    "residual",
    "updates",
    "labels",
    "through_time",
    "weights_large",
)
CAUSES = (
    Rule("bad_examples", "Is every example finite?", bad_examples, _ALL),
    Rule("odd_rows", "Is every example as large as the others?", odd_rows, _ALL),
    Rule("input_size", "Are the inputs of order 1?", input_size, _ALL),
)
OTHERS = (
    Rule(
        "odd_shard",
        "Do all parts of the batch pull alike?",
        odd_shard,
        ("rate",),
        applies=_has_shards,
    ),
    Rule("labels", "Do the labels belong to the inputs?", labels, applies=_has_labels),
    Rule(
        "noise",
        "Is the batch large enough?",
        noise,
        applies=lambda facts: bool(facts.batch.norms),
    ),
)
