"""Smoke test of the example of the flight recorder."""

import explosion
import pytest

import stablegrad as sg

pytestmark = pytest.mark.slow


def test_it_explodes_and_shows_where(tmp_path, capsys):
    assert explosion.main(["--out", str(tmp_path)]) == 0
    assert (tmp_path / "explosion.png").read_bytes().startswith(b"\x89PNG")
    found = sg.load_events(tmp_path / "events.jsonl")
    assert found[0].batch_ids == (50,) and found[0].reason == "nonfinite_gradient"
    later = [event for event in found if event.reason == "gradient_norm"]
    assert later and all(event.value > event.limit for event in later)
    assert "batches to leave out, from [50, " in capsys.readouterr().out
