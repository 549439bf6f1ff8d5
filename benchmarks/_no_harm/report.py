"""The tables, as Markdown."""

import math

from markdown_table import table

from .methods import BARE, OURS

RULE = """\
harmed: paired by seed, the mean of what is lost exceeds 1 % of what bare gains from
start to end, and its 95 % t-interval excludes 0. lost: in percent of that gain, with
the half width of the interval; negative: better than bare. touched: share of steps that
were shrunk or refused, refused ones also by themselves. cuts: of the rate, a run.
lr_scale: the lowest of all steps and seeds, and the lowest at the end."""


def percent(share: float) -> str:
    """A share of steps."""
    return f"{100 * share:.1f} %" if share else "0"


def lost(cell: dict) -> str:
    """What a method lost, and how sure that is."""
    if math.isinf(cell["loss"]):
        return "not finite"
    half = (
        "" if math.isinf(cell["half_width"]) else f" ± {100 * cell['half_width']:.1f}"
    )
    return f"{100 * cell['loss']:+.1f}{half}"


def verdict(cell: dict) -> str:
    """In one word, if there is something to say."""
    return "HARMED" if cell["harmed"] else "helped" if cell["helped"] else "no"


def spread(cell: dict) -> str:
    """Mean and standard deviation over seeds."""
    return f"{cell['mean']:.4g} ± {cell['std']:.2g}"


def of_method(records: list[dict], name: str) -> str:
    """Everything about one method."""
    header = [
        "run", "kind", "metric", "start", "bare", name, "lost, %", "harmed", "touched",
        "refused", "cuts", "lr_scale",
    ]  # fmt: skip
    rows = []
    for record in records:
        bare, cell = record["methods"][BARE], record["methods"].get(name)
        about = [record["task"], record["kind"]]
        way = "↑" if record["higher"] else "↓"
        about += [f"{record['metric']} {way}", f"{record['start']:.4g}"]
        about.append(spread(bare) + ("" if record["healthy"] else " NOT HEALTHY"))
        if cell is None:
            rows.append([*about, "n.a.", *([""] * (len(header) - 6))])
            continue
        scales = f"{cell['lowest_lr_scale']:.2g}, {cell['last_lr_scale']:.2g}"
        rows.append(
            [
                *about, spread(cell), lost(cell), verdict(cell),
                percent(cell["touched"]), percent(cell["skipped"]),
                f"{cell['cuts']:.1f}", scales,
            ]
        )  # fmt: skip
    return table(header, rows)


def side_by_side(records: list[dict], names: list[str]) -> str:
    """What every method lost, and its share of touched steps; H: harmed."""

    def shown(record: dict, name: str) -> str:
        cell = record["methods"].get(name)
        if cell is None:
            return "n.a."
        mark = "**H** " if cell["harmed"] else ""
        return f"{mark}{lost(cell)} ({percent(cell['touched'])})"

    rows = [[r["task"], *(shown(r, name) for name in names)] for r in records]
    counts = [counted(records, name) for name in names]
    return table(["lost, % (touched)", *names], [["harmed", *counts], *rows])


def counted(records: list[dict], name: str) -> str:
    """How many runs a method harmed, of how many."""
    cells = [r["methods"][name] for r in records if name in r["methods"]]
    return f"{sum(cell['harmed'] for cell in cells)} of {len(cells)}"


def whole(records: list[dict], about: str) -> str:
    """All tables."""
    present = list(dict.fromkeys(name for r in records for name in r["methods"]))
    others = [name for name in present if name != BARE]
    parts = ["# Healthy runs, and what guards make of them", about, RULE]
    kinds = len({record["kind"] for record in records})
    parts.append(
        f"{len(records)} runs of {kinds} kinds. Harmed: "
        + "; ".join(f"{name} {counted(records, name)}" for name in others)
        + "."
    )
    if OURS in others:
        parts += [f"## {OURS}", of_method(records, OURS)]
    if len(others) > 1:
        parts += ["## Side by side", side_by_side(records, others)]
    return "\n\n".join(parts) + "\n"


def line(record: dict) -> str:
    """One task in a line, for the terminal."""
    cells = [
        f"{name} {cell['mean']:.4g}"
        + (f", lost {lost(cell)} %" if name != BARE else "")
        + (" HARMED" if cell["harmed"] else "")
        for name, cell in record["methods"].items()
    ]
    return f"{record['task']}: " + "; ".join(cells)
