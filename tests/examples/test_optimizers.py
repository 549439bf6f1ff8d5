"""A smoke test of the optimizer comparison, on scikit-learn's digits."""

import json

import jax
import optimizers
import pytest

import stablegrad as sg

pytestmark = pytest.mark.slow

SMALL = ["--steps", "60", "--seeds", "1", "--batch-size", "32"]


@pytest.fixture(autouse=True)
def as_users():
    with jax.numpy_rank_promotion("allow"):
        yield


def test_candidates_are_ranked_drawn_and_saved(tmp_path, capsys):
    chosen = ["--candidates", "adam", "momentum + warmup_cosine"]
    assert optimizers.main([*SMALL, *chosen, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "momentum + warmup_cosine" in printed and "60 steps a run" in printed
    assert (tmp_path / "candidates.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "candidates.json").read_text())["rows"]
    assert len(rows) == 2
    for row in rows:
        assert row["accuracy"] > 0.8 and row["learning_rate"] < 1
        assert len(row["learning_rates"]) == 9
    assert printed.splitlines()[0] == "candidates"
    assert "%" in (tmp_path / "candidates.txt").read_text()


def test_every_word_is_in_one_of_the_comparisons():
    lists = optimizers.comparisons("adam").values()
    named = {word for names in lists for name in names for word in name.split(" + ")}
    assert {word for words in sg.sweep.WORDS.values() for word in words} == named
