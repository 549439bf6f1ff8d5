"""The faults benchmark: a few schedules, and what its pieces promise."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from _faults import schedules

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"


def script():
    """The benchmark by its path: an example has the same name."""
    spec = importlib.util.spec_from_file_location("faults_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_fault_hits_one_leaf_in_its_steps_alone():
    zeros, ones = np.zeros(3, np.int32), np.ones(3, np.float32)
    place = np.array([0, -1, -1], np.int32)
    schedule = schedules.Schedule(
        place, zeros, zeros + 5, zeros + 2, zeros + 1, zeros - 1, ones
    )
    tree = {"a": jnp.zeros(2), "b": jnp.zeros(3), "n": jnp.arange(2)}
    for step, hit in ((4, False), (5, True), (6, True), (7, False)):
        found = schedules.spoilt(tree, schedules.hits(schedule, "gradient", step))
        assert bool(jnp.isnan(found["b"]).all()) is hit
        assert not jnp.isnan(found["a"]).any() and found["n"].dtype == tree["n"].dtype
        other = schedules.spoilt(tree, schedules.hits(schedule, "loss", step))
        assert not jnp.isnan(other["b"]).any()


@pytest.mark.slow
def test_a_few_schedules_make_both_tables(tmp_path, capsys):
    folder = ["--out", str(tmp_path)]
    assert script().main(["--quick", "--seeds", "4", "--alone", "1", *folder]) == 0
    text = (tmp_path / "faults.md").read_text()
    rows = [row for row in text.splitlines() if row.startswith("| stabilize")]
    # The preset, and with `roll_back`; each without vmap, too; and one more limit.
    assert len(rows) == 5
    for row in rows:
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[3:6] == ["100.0 %"] * 3, row
    assert text in capsys.readouterr().out
