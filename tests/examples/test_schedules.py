"""The schedules example: what explodes, what does not, and what it says of it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import schedules

pytestmark = pytest.mark.slow


def lines_of(folder):
    return [
        json.loads(x) for x in (folder / "telemetry.jsonl").read_text().splitlines()
    ]


def test_the_static_rate_explodes_and_the_explosion_aware_one_does_not(
    tmp_path, monkeypatch, capsys
):
    every = schedules.runs

    def two(*args):
        return [r for r in every(*args) if r.name in ("static", "explosion-aware")]

    monkeypatch.setattr(schedules, "runs", two)
    assert schedules.main(["--steps", "400", "--out", str(tmp_path)]) == 0
    table = {
        line.split()[0]: line.split()
        for line in capsys.readouterr().out.splitlines()
        if " % " in line
    }
    accuracy = {
        name: float(row[row.index("%") - 1])
        for name, row in table.items()
        if name in ("static", "explosion-aware")
    }
    assert accuracy["static"] < 40 and accuracy["explosion-aware"] > 70
    rows = lines_of(tmp_path)
    aware = [row for row in rows if row["run"] == "explosion-aware"]
    static = [row for row in rows if row["run"] == "static"]
    assert len(aware) == len(static) == 400
    assert aware[-1]["schedule_cuts"] > 0 and aware[-1]["rate"] < static[-1]["rate"]
    assert (tmp_path / "schedules.png").read_bytes().startswith(b"\x89PNG")


def test_no_schedule_exceeds_the_static_rate_and_each_has_its_shape():
    rates = {
        run.name: np.array([jnp.asarray(run.rate(step)) for step in range(0, 101, 5)])
        for run in schedules.runs(0.8, 100)
    }
    for name, values in rates.items():
        assert values.max() == pytest.approx(0.8, rel=1e-6), name
        assert values.min() >= -1e-7, name
    at = lambda name, *steps: rates[name][np.array(steps) // 5].tolist()
    assert at("static", 0, 50, 100) == pytest.approx([0.8] * 3)
    assert at("cosine", 0, 50, 100) == pytest.approx([0.8, 0.4, 0.0], abs=1e-6)
    assert at("exponential", 0, 50, 100) == pytest.approx([0.8, 0.08, 0.008])
    assert at("WSD", 0, 5, 50, 90, 100) == pytest.approx(
        [0.0, 0.4, 0.8, 0.4, 0.0], abs=1e-6
    )
    assert at("rising stairs", 0, 10, 25, 30, 95) == pytest.approx(
        [0.1, 0.2, 0.4, 0.8, 0.8]
    )
    assert at("falling stairs", 0, 15, 20, 40, 60, 80, 95) == pytest.approx(
        [0.8, 0.8, 0.4, 0.2, 0.1, 0.05, 0.05]
    )


def test_explosions_are_steps_above_ten_medians_or_not_finite():
    assert schedules.explosions(np.array([1.0, 1, 1, 10, 10.1, np.inf, 1])) == 2
    assert schedules.explosions(np.ones(9)) == 0


def test_ctrl_c_keeps_the_runs_that_are_finished(tmp_path, monkeypatch, capsys):
    def train(run, *args):
        if run.name == "exponential":
            raise KeyboardInterrupt
        ones = np.ones(10)
        return schedules.Outcome(ones, ones, ones, 1.5, 0.25, "")

    monkeypatch.setattr(schedules, "train", train)
    assert schedules.main(["--out", str(tmp_path)]) == 130
    printed = capsys.readouterr().out
    assert "interrupted after 2 of 9 runs" in printed
    assert printed.count("25.00 %") == 2
    assert (tmp_path / "schedules.png").read_bytes().startswith(b"\x89PNG")
