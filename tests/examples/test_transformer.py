"""The transformer example: what it learns, writes and says, at a tiny size."""

import json
import math
import sys
import types

import jax
import pytest
import text
import transformer

pytestmark = pytest.mark.slow

TINY = ["--layers", "1", "--width", "16", "--context", "16", "--every", "40"]


@pytest.fixture(autouse=True)
def broadcast():
    """Flax adds positions to a batch."""
    with jax.numpy_rank_promotion("allow"):
        yield


def without_tensorboard(monkeypatch):
    for name in ("tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)


def uncompiled(monkeypatch):
    """A step and an evaluation that change nothing and cost nothing."""
    names = ("clipped", "skipped", "backed_off", "shortened")
    seen = {"loss": 3.0, "grad_norm": 1.0, "lr_scale": 1.0, "skipped": False}
    seen |= {f"{name}_steps": 0 for name in names}
    step = lambda trained, inputs, labels: (trained, seen)
    monkeypatch.setattr(transformer, "make_step", lambda *args, **kwargs: step)
    evaluate = lambda trained, split: (3.0, 0.1)
    monkeypatch.setattr(transformer, "make_evaluate", lambda graphdef: evaluate)


def lines_of(folder):
    return [
        json.loads(x) for x in (folder / "telemetry.jsonl").read_text().splitlines()
    ]


def test_it_beats_the_shares_of_the_characters_and_writes_all_it_measured(
    tmp_path, monkeypatch, capsys
):
    scalars, closed = [], []

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == str(tmp_path)

        def add_scalar(self, name, value, step):
            scalars.append((name, value, step))

        def flush(self):
            pass

        def close(self):
            closed.append(True)

    module = types.ModuleType("tensorboardX")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    options = ["--steps", "120", "--learning-rate", "0.02", "--sample", "40", "--look"]
    assert transformer.main([*TINY, *options, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    unigram = text.load(None, 16).trivial_loss()
    assert f"unigram   {unigram:.3f} nats, {unigram / math.log(2):.3f} bits" in printed
    assert f"tensorboard --logdir {tmp_path}" in printed
    rows = lines_of(tmp_path)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 121))
    held_out = {r["step"]: r["held_out_loss"] for r in rows if "held_out_loss" in r}
    assert list(held_out) == [0, 40, 80, 120]
    assert held_out[120] < unigram - 0.3 < held_out[0]
    assert f"held out  {held_out[120]:.3f} nats" in printed
    assert max(row["trust_probes"] for row in steps) > 0
    assert closed and ("loss", steps[-1]["loss"], 120) in scalars
    assert (tmp_path / "transformer.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_keeps_what_was_measured_and_no_tensorboard_is_no_error(
    tmp_path, monkeypatch, capsys
):
    without_tensorboard(monkeypatch)
    uncompiled(monkeypatch)
    batch, calls = text.batch, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 45:
            raise KeyboardInterrupt
        return batch(*args)

    monkeypatch.setattr(text, "batch", interrupted)
    assert transformer.main([*TINY, "--out", str(tmp_path)]) == 130
    printed = capsys.readouterr().out
    assert "interrupted\n" in printed and "\n40 steps on cpu" in printed
    assert "TensorBoard: no files" in printed
    assert sum("loss" in row for row in lines_of(tmp_path)) == 40
    assert (tmp_path / "transformer.png").read_bytes().startswith(b"\x89PNG")
