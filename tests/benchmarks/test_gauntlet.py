"""Smoke test of the gauntlet: tables come out, and a criterion can fail."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

pytestmark = pytest.mark.slow

GAUNTLET = Path(__file__).parents[2] / "benchmarks" / "gauntlet.py"
# One factor for all leaves: a leaf that explodes shrinks the others. Not per leaf.
OPEN = {"stabilize": {"one_leaf"}, "stabilize per leaf": set()}
OURS = tuple(OPEN)
PEERS = ("none", "ZClip")


@pytest.fixture(scope="module")
def gauntlet():
    spec = importlib.util.spec_from_file_location("gauntlet", GAUNTLET)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quick(gauntlet, tmp_path_factory):
    """What `--quick` wrote, for four methods."""
    out = tmp_path_factory.mktemp("gauntlet")
    chosen = [word for name in (*OURS, *PEERS) for word in ("--only", name)]
    with jax.numpy_rank_promotion("allow"):  # As users run it.
        status = gauntlet.main(
            ["--quick", "--workers", "1", "--out", str(out), *chosen]
        )
    assert status == 0
    return (out / "gauntlet.md").read_text(), json.loads(
        (out / "gauntlet.json").read_text()
    )


def outcomes(written, method):
    return {key: cell["outcome"] for key, cell in written["cells"][method].items()}


def test_both_tables_have_a_cell_for_every_row_and_method(quick, gauntlet):
    text, written = quick
    rows = [row for row in gauntlet.rows() if row.program == "short"]
    for row in rows:
        assert f"| {row.title} " in text and f"**{row.title}**" in text
    for method in (*OURS, *PEERS):
        assert list(outcomes(written, method)) == [row.key for row in rows]
        assert set(outcomes(written, method).values()) <= {"pass", "FAIL", "n.a."}
    rates = text[text.index("## Rates") :]
    lines = [line.split("|") for line in rates.splitlines() if line.startswith("| ")]
    assert [line[1].strip() for line in lines[2:]] == [*OURS, *PEERS]
    assert len({len(line) for line in lines}) == 1


def test_criteria_fail_where_they_should(quick):
    _, written = quick
    bare, zclip = outcomes(written, "none"), outcomes(written, "ZClip")
    assert bare["nan_element"] == bare["masking"] == bare["overflow_sgd"] == "FAIL"
    assert bare["constant"] == bare["shift_up_10"] == bare["zero_leaf"] == "pass"
    assert bare["nan_loss"] == "n.a."
    assert zclip["shift_up_10"] == zclip["nan_element"] == "FAIL"
    assert zclip["shift_up_2"] == zclip["first"] == "pass"
    assert written["rates"]["ZClip"]["recovery"]["up_10"] is None
    assert written["rates"]["none"]["caught"] == 0


@pytest.mark.parametrize("method", OURS)
def test_stabilize_passes(quick, method):
    _, written = quick
    cells = outcomes(written, method)
    failed = {key for key, outcome in cells.items() if outcome != "pass"}
    assert failed == OPEN[method]
    rates = written["rates"][method]
    assert rates["caught"] >= 0.99 and rates["halved"] >= 0.99
    assert all(steps <= 100 for steps in rates["recovery"].values())
    assert rates["touched"]["0.2"] < 0.02  # 1,800 steps: 1 % give or take 0.25.


def test_nan_never_passes_a_check(gauntlet):
    check = sys.modules["_gauntlet.criteria"].Check
    assert not check("anything", math.nan, least=0).passed
    assert not check("anything", math.nan, most=1).passed
    assert not check("anything", np.inf, most=1).passed
    assert check("anything", 0.5, least=0.5, most=0.5).passed


def test_a_method_that_cannot_run_fails_its_rows(gauntlet, tmp_path, capsys):
    def broken(inner):
        raise TypeError("no such luck")

    rows = [row for row in gauntlet.rows() if row.key in ("scan", "half_large")]
    method = gauntlet.Method("broken", "published", broken)
    seen = gauntlet.column(method, rows, 0, tmp_path, lambda: None)
    cells = [gauntlet.report.Cell(row, seen) for row in rows]
    assert [cell.outcome for cell in cells] == ["FAIL", "FAIL"]
    assert all("TypeError: no such luck" in cell.why() for cell in cells)
    assert "broken, short: TypeError: no such luck" in capsys.readouterr().err


def test_a_state_that_changes_structure_is_a_failure(gauntlet):
    # As `optax.monitor` is, which older Optax lacks.
    watched = optax.GradientTransformation(
        lambda params: {}, lambda updates, state, params=None: (updates, {"seen": 1.0})
    )
    row = next(row for row in gauntlet.rows() if row.key == "scan")
    method = gauntlet.Method("monitor", "optax", lambda i: optax.chain(watched, i))
    seen = gauntlet.column(method, [row], 0, Path(), lambda: None)
    assert gauntlet.report.Cell(row, seen).outcome == "FAIL"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "hope"], "argument --only: must be one of 'stabilize', "),
        (["--row", "rain"], "argument --row: must be one of 'nan_element', "),
        (["--workers", "0"], "must be an integer >= 1, got '0'"),
        (["--quick", "--row", "heavy_tail"], "--quick runs none of the rows given"),
    ],
)
def test_a_bad_option_is_one_line_and_status_2(gauntlet, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        gauntlet.main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_it_is_a_script():
    done = subprocess.run(
        [sys.executable, str(GAUNTLET), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--quick" in done.stdout
