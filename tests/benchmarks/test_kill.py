"""Exact resume: a real process, killed five times; and what the judges see."""

import importlib.util
import re
from pathlib import Path

import pytest
from _kill.trial import Start, Trial, lost, unequal

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill.py"


def start(restored, whole, is_killed=True):
    return Start(restored, 9, whole, is_killed, amid_write=False)


def test_a_start_from_before_a_whole_checkpoint_is_a_loss():
    def found(*starts):
        return lost(Trial(list(starts), {}))

    assert found(start(-1, 5), start(8, None), start(8, 11, is_killed=False)) == []
    assert found(start(-1, 5), start(None, None), start(2, None)) == [
        "went on from 2, 5 was whole"
    ]
    assert len(found(start(-1, 5), start(5, 8), start(5, None))) == 1


def test_a_part_that_differs_or_is_missing_is_told():
    reference = {"losses": ["00"], "events": "x"}
    assert unequal(reference, reference) == []
    assert unequal({"losses": ["01"], "events": "x"}, reference) == ["losses"]
    assert unequal({"losses": ["00"]}, reference) == ["events"]


@pytest.mark.slow
def test_a_run_that_is_killed_five_times_ends_as_one_that_was_left_alone(
    tmp_path, capsys
):
    spec = importlib.util.spec_from_file_location("kill_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    arguments = ["--quick", "--steps", "66", "--out", str(tmp_path)]
    assert script.main(arguments) == 0, capsys.readouterr().out
    text = (tmp_path / "kill.md").read_text()
    (runs,) = re.findall(r"5 kills in (\d+) runs", text)
    assert f"{runs} of {runs} runs ended as the one" in text
    rows = [row.split(" | ") for row in text.splitlines() if re.match(r"\| \d", row)]
    assert any(row[1] != "-" for row in rows)  # Some went on from a checkpoint.
    assert sum(row[3] == "yes" for row in rows) == 5
    assert sum(row[3] == "no" for row in rows) == int(runs)
