"""The benchmark of a GPT's training step: a run in small, and bad options."""

import gpt
import jax
import pytest

pytestmark = pytest.mark.slow

SMALL = "--layers 1 --width 8 --heads 2 --context 8 --batch 2 --tokens 16 --steps 1"


def test_a_run_writes_the_chosen_rows(tmp_path, capsys):
    out = tmp_path / "gpt.md"
    chosen = ["--rounds", "2", "--only", "stabilize", gpt.LOOKS, "--out", str(out)]
    with jax.numpy_rank_promotion("allow"):
        assert gpt.main([*SMALL.split(), *chosen]) == 0
    assert "Training step of a GPT with 0 million parameters" in capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in out.read_text().splitlines()[4:]]
    assert [row[0].strip() for row in rows[2:]] == ["stabilize", gpt.LOOKS]
    for row in rows[2:]:
        ratio, milliseconds, compilation = (float(row[i]) for i in (1, 3, 4))
        assert ratio > 0 and milliseconds > 0 and compilation > 0


def test_heads_must_divide_the_width(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpt.main(["--width", "10", "--heads", "4"])
    assert stopped.value.code == 2
    assert "--width must be a multiple of --heads" in capsys.readouterr().err
