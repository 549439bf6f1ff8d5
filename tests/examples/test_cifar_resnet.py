"""The ResNet that finds its rate: ranking, checkpoints, several devices."""

import json
import math
from types import SimpleNamespace
from typing import NamedTuple

import chex
import cifar
import cifar_resnet
import classifiers
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import ranking
import resnet_runs
from checkpoints import Checkpoints
from jax.experimental.compilation_cache import compilation_cache
from rich.progress import Progress

import stablegrad as sg

pytestmark = pytest.mark.slow

SMALL = ["--width", "4", "--batch-size", "32", "--gradient-limit", "0.05"]


def rows_of(folder):
    lines = (folder / "telemetry.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def saved(folder, run):
    """The newest state of a run, as a dict of arrays."""
    runs = (folder / "checkpoints" / run).resolve().glob("[0-9]*")
    newest = max(runs, key=lambda path: int(path.name))
    return ocp.StandardCheckpointer().restore(newest / "state")


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Programs that were compiled for one run serve the others, and are small."""
    names = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
        "jax_default_prng_impl": "rbg",  # Threefry takes seconds for every shape.
    }
    before = {name: getattr(jax.config, name) for name in names}
    configure(names)
    yield
    configure(before)


def configure(settings):
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # It looks at its settings only once.


class Found(NamedTuple):
    """In place of the search for the first rate, whose program is a large one."""

    safe_start: float

    def __str__(self):
        return f"Start at {self.safe_start} or below."


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of two epochs: where they wrote, and the status."""
    folder = tmp_path_factory.mktemp("cifar_resnet")
    runs = ["--runs", "adaptive", "adagrad", "--epochs", "2", "--devices", "4"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sg, "critical_learning_rate", lambda *_, **__: Found(5e-3))
        status = cifar_resnet.main([*SMALL, *runs, "--out", str(folder)])
    return folder, status


def test_both_runs_learn_over_four_devices_and_write_every_step(trained):
    folder, status = trained
    assert status == 0
    assert (folder / "cifar_resnet.png").read_bytes().startswith(b"\x89PNG")
    rows = rows_of(folder)
    for run in ("adaptive", "adagrad"):
        first, last = [row for row in rows if row["run"] == run and "epoch" in row]
        assert last["train_loss"] < 0.8 * first["train_loss"]
        assert last["validation_accuracy"] > 0.3
        steps = [row for row in rows if row["run"] == run and "accuracy" in row]
        assert [row["step"] for row in steps] == [*range(2 * 30)]
    # The plateau has seen the validation loss of the first epoch, not the training's.
    steps = [row for row in rows if row["run"] == "adaptive" and "accuracy" in row]
    assert steps[-1]["plateau_evaluations"] == 1
    (first, _) = [row for row in rows if row["run"] == "adaptive" and "epoch" in row]
    assert steps[-1]["plateau_best"] == pytest.approx(first["validation_loss"])


def test_gradients_from_the_dense_layers_are_limited_in_the_adaptive_run_only(trained):
    steps = {}
    for row in rows_of(trained[0]):
        steps.setdefault(row["run"], row)
    # The same weights, the same batch, the same loss; less flows back.
    adaptive, adagrad = steps["adaptive"], steps["adagrad"]
    assert adaptive["loss"] == pytest.approx(adagrad["loss"], rel=1e-5)
    assert adaptive["grad_norm"] < 0.9 * adagrad["grad_norm"]


def test_a_resumed_run_equals_one_that_never_stopped(
    trained, tmp_path, monkeypatch, capsys
):
    epochs = classifiers.epoch

    def until_the_middle_of_the_second_epoch(*arguments):
        begun.append(1)
        for i, batch in enumerate(epochs(*arguments)):
            if len(begun) == 2 and i == 15:
                raise KeyboardInterrupt
            yield batch

    begun = []
    run = [*SMALL, "--runs", "adaptive", "--epochs", "2", "--devices", "4"]
    run += ["--out", str(tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr(sg, "critical_learning_rate", lambda *_, **__: Found(5e-3))
        patched.setattr(classifiers, "epoch", until_the_middle_of_the_second_epoch)
        assert cifar_resnet.main(run) == 130
    assert "interrupted; --resume goes on" in capsys.readouterr().out
    assert (tmp_path / "cifar_resnet.png").exists()
    assert cifar_resnet.main([*run, "--resume"]) == 0
    assert "adaptive: resumed after epoch 1" in capsys.readouterr().out
    chex.assert_trees_all_equal(
        saved(tmp_path, "adaptive"), saved(trained[0], "adaptive")
    )
    whole = [row for row in rows_of(trained[0]) if row["run"] == "adaptive"]
    without_time = lambda rows: [{**row, "seconds": 0} for row in rows]
    assert without_time(rows_of(tmp_path)) == without_time(whole)


def test_resuming_what_has_ended_only_ranks_it_again(trained, capsys):
    folder, _ = trained
    before = rows_of(folder)
    arguments = ["--runs", "adaptive", "adagrad", "--epochs", "2", "--resume"]
    assert cifar_resnet.main([*SMALL, *arguments, "--out", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert rows_of(folder) == before
    assert "adaptive: Start at 0.005 or below." in printed
    lines = printed[printed.index("validation") :].splitlines()
    table = {line.split()[0]: line.split() for line in lines if "%" in line}
    losses = [float(row[1]) for row in table.values()]
    assert losses == sorted(losses) and len(losses) == 2
    epochs, _, skipped, _, scale = table["adaptive"][-5:]
    assert (epochs, skipped, scale) == ("2", "0", "1")
    assert table["adagrad"][-3:] == ["-", "0.01", "-"]


def test_one_device_comes_to_what_four_do(trained, tmp_path):
    arguments = ["--runs", "adagrad", "--epochs", "1", "--devices", "1"]
    assert cifar_resnet.main([*SMALL, *arguments, "--out", str(tmp_path)]) == 0
    (alone,) = [row for row in rows_of(tmp_path) if "epoch" in row]
    together = next(
        row for row in rows_of(trained[0]) if row["run"] == "adagrad" and "epoch" in row
    )
    for name in ("train_loss", "validation_loss"):
        assert alone[name] == pytest.approx(together[name], rel=1e-3)


@pytest.mark.parametrize(
    "recommended, rate", [(0.25, 0.25), (0.0, 1e-3), (math.inf, 1e-3)]
)
def test_the_first_rate_comes_from_the_first_batch_or_else_is_the_usual_one(
    recommended, rate, monkeypatch
):
    train = cifar.load(None)[0]
    options = SimpleNamespace(
        train=train, batch_size=8, blocks=1, width=4, seed=0, probe=3
    )

    def search(loss_fn, model, batch, tx, *, steps):
        assert model.limit is None and steps == 3
        np.testing.assert_array_equal(batch[0], train.images[:8])
        np.testing.assert_array_equal(batch[1], train.labels[:8])
        return Found(recommended)

    monkeypatch.setattr(sg, "critical_learning_rate", search)
    found = resnet_runs.first_rate(options)
    assert found["rate"] == rate and found["seconds"] >= 0
    assert found["why"] == f"Start at {recommended} or below."


def learned_from(epoch, data_dir):
    """The batches of an epoch, as a step sees them."""
    train = cifar.load(None)[0]
    options = SimpleNamespace(train=train, batch_size=64, seed=0, data_dir=data_dir)
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    progress = Progress(disable=True)
    setting = resnet_runs.Setting(options, mesh, None, None, progress)
    batches = []

    def step(trained, images, labels):
        assert images.sharding.shard_shape(images.shape)[0] == 64 // 4
        batches.append((np.asarray(images), np.asarray(labels)))
        return trained, {}

    resnet_runs.learn(step, None, epoch, setting, progress.add_task(""))
    return [np.concatenate(arrays) for arrays in zip(*batches, strict=True)]


@pytest.mark.devices(4)
def test_batches_depend_on_the_epoch_alone_and_only_photographs_are_changed():
    images, labels = learned_from(1, None)
    again, _ = learned_from(1, None)
    np.testing.assert_array_equal(images, again)
    assert np.any(learned_from(2, None)[1] != labels)
    changed, same = learned_from(1, "photographs")
    np.testing.assert_array_equal(same, labels)
    assert np.any(changed != images)
    np.testing.assert_array_equal(changed, learned_from(1, "photographs")[0])


def test_a_diverged_run_is_ranked_last():
    def result(name, loss):
        row = {"validation_loss": loss, "skipped": None, "seconds": 1.0}
        return ranking.Result(name, 1.0, 0.0, [row])

    results = [result("nan", math.nan), result("worse", 2.0), result("better", 1.0)]
    table = ranking.ranked(results)
    assert [*table.columns[0].cells] == ["better", "worse", "nan"]
    assert [*table.columns[2].cells] == ["-", "-", "-"]


def test_checkpoints_keep_the_newest_healthy_state_and_what_was_told(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new", {"width": 4}, resume=False)
    assert checkpoints.metadata("run") is None
    for epoch in (1, 2, 3):
        w = np.full(3, epoch if epoch < 3 else np.nan, np.float32)
        state = classifiers.Trained({"w": w}, {}, ())
        told = {"epochs": epoch, "loss": math.nan}
        assert checkpoints.save("run", epoch, state, told) == (epoch < 3)
    again = Checkpoints(tmp_path / "new", {"width": 4}, resume=True)
    metadata = again.metadata("run")
    assert metadata["epochs"] == 2 and math.isnan(metadata["loss"])
    np.testing.assert_array_equal(again.state("run", state).params["w"], [2, 2, 2])
    with pytest.raises(ValueError, match="was begun with width 4, not 8"):
        Checkpoints(tmp_path / "new", {"width": 8}, resume=True)
    assert Checkpoints(tmp_path / "new", {}, resume=False).metadata("run") is None


def test_a_folder_of_something_else_is_never_emptied(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than checkpoints"):
        Checkpoints(tmp_path, {}, resume=False)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
