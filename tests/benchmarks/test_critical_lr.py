"""Smoke test of the benchmark of critical learning rates."""

import importlib.util
import math
import sys
from pathlib import Path

import jax
import pytest

pytestmark = pytest.mark.slow

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "critical_lr.py"


@pytest.fixture(scope="module")
def critical_lr():
    spec = importlib.util.spec_from_file_location("critical_lr", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_configuration_meets_its_goals(critical_lr, tmp_path):
    out = tmp_path / "critical_lr.md"
    asked = ["--quick", "--configurations", "1", "--workers", "1", "--out", str(out)]
    with jax.numpy_rank_promotion("allow"):  # As users run it.
        assert critical_lr.main(asked) == 0
    text = out.read_text()
    assert "| MLP ReLU xent SGD 16 |" in text and "1 configurations, seed 0" in text
    goals = [line.split("|") for line in text.splitlines() if " within " in line]
    met = {goal[1].strip(): goal[3].strip() for goal in goals if len(goal) == 5}
    assert met["probe of 10 within a factor 1.4 for 90%"] == "yes"
    assert met["no spike within 20 steps at the safe start"] == "yes"


def test_the_configurations_cover_what_they_should(critical_lr):
    chosen = critical_lr.tasks()
    assert len(set(chosen)) >= 30 and chosen == critical_lr.tasks()
    for field, values in ("network", 3), ("activation", 3), ("optimizer", 3):
        assert len({getattr(task, field) for task in chosen}) == values
    assert len({task.batch for task in chosen if task.network == "MLP"}) == 3


def test_an_estimate_that_is_no_number_is_off_by_infinity(critical_lr):
    off = sys.modules["_critical_lr.report"].off
    assert off(2.0, 1.0) == off(1.0, 2.0) == 2.0
    assert off(math.nan, 1.0) == off(math.inf, 1.0) == off(0.0, 1.0) == math.inf


def test_a_bad_option_is_one_line_and_status_2(critical_lr, capsys):
    with pytest.raises(SystemExit) as stopped:
        critical_lr.main(["--workers", "0"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "must be an integer >= 1, got '0'" in line
