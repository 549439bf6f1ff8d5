"""The small network on digits: what it reaches, prints and writes."""

import json
import os
from pathlib import Path

import classifiers
import digits
import jax
import mnist_mlp
import numpy as np
import pytest

pytestmark = pytest.mark.slow

DATA = os.environ.get("STABLEGRAD_DATA")
LEAVES = {f"layers.{i}.{part}" for i in range(3) for part in ("kernel", "bias")}


def rows_of(folder):
    lines = (folder / "telemetry.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module", autouse=True)
def quick_random_numbers():
    """Threefry takes seconds to compile, for every shape."""
    before = jax.config.jax_default_prng_impl
    jax.config.update("jax_default_prng_impl", "rbg")
    yield
    jax.config.update("jax_default_prng_impl", before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on the small digits: where it wrote, and its status."""
    folder = tmp_path_factory.mktemp("mnist_mlp")
    arguments = ["--epochs", "12", "--batch-size", "32", "--plain", "--update-sizes"]
    return folder, mnist_mlp.main([*arguments, "--out", str(folder)])


def test_guarded_and_plain_both_learn_and_nothing_healthy_is_skipped(trained):
    folder, status = trained
    assert status == 0
    assert (folder / "mnist_mlp.png").read_bytes().startswith(b"\x89PNG")
    rows = rows_of(folder)
    for run in ("guarded", "plain"):
        epochs = [row for row in rows if row["run"] == run and "test_accuracy" in row]
        assert len(epochs) == 12
        assert epochs[-1]["test_accuracy"] > 0.94
        assert epochs[-1]["train_loss"] < 0.5 * epochs[0]["train_loss"]
    steps = [row for row in rows if row["run"] == "guarded" and "grad_norm" in row]
    assert len(steps) == 12 * (1078 // 32)
    assert [row["step"] for row in steps] == [*range(len(steps))]
    assert steps[-1]["guarded_steps"] == len(steps)
    assert steps[-1]["skipped_steps"] == 0


def test_update_sizes_name_every_leaf_once_an_epoch(trained):
    rows = [row for row in rows_of(trained[0]) if "ratio" in row]
    assert len(rows) == 2 * 12 * len(LEAVES)
    assert {row["leaf"] for row in rows} == LEAVES
    for row in rows:
        # Adam's step is of the size of the rate for every element.
        assert 0 < row["update"] < 1e-2 * 28
        if row["param"]:
            assert row["ratio"] == pytest.approx(row["update"] / row["param"])


def test_sizes_are_norms_of_what_a_step_did():
    before = {"b": np.zeros(2), "w": np.array([3.0, 4.0])}
    after = {"b": np.array([0.0, 0.1]), "w": np.array([3.0, 4.5])}
    bias, kernel = mnist_mlp.sizes(before, after)
    assert bias[:3] == ("b", 0.0, pytest.approx(0.1)) and np.isnan(bias.ratio)
    assert kernel == ("w", 5.0, pytest.approx(0.5), pytest.approx(0.1))


def test_an_interrupted_run_keeps_what_was_done(tmp_path, monkeypatch, capsys):
    whole, epochs = classifiers.epoch, []

    def until_the_second_epoch(*arguments):
        epochs.append(1)
        for i, batch in enumerate(whole(*arguments)):
            if len(epochs) == 2 and i == 60:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(classifiers, "epoch", until_the_second_epoch)
    arguments = ["--batch-size", "16", "--out", str(tmp_path)]
    assert mnist_mlp.main(arguments) == 130
    printed = capsys.readouterr().out
    assert "interrupted; what was measured so far is in" in printed
    assert printed.index("accuracy on 719 test digits") < printed.rindex("interrupted")
    assert (tmp_path / "mnist_mlp.png").exists()
    steps = [row for row in rows_of(tmp_path) if "grad_norm" in row]
    assert len(steps) >= 1078 // 16 + mnist_mlp.CHUNK


@pytest.mark.skipif(DATA is None, reason="STABLEGRAD_DATA names no folder")
def test_the_real_files_hold_seventy_thousand_digits():
    train, test = digits.load(str(Path(DATA) / "mnist"))
    assert train.images.shape == (60_000, 784) and test.images.shape == (10_000, 784)
    assert np.bincount(test.labels, minlength=10).min() > 850
    assert train.images.mean() == pytest.approx(0.1307, abs=1e-4)  # Known.
