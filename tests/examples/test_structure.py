"""The structure example: its networks, table and figure, at a tiny size."""

import json

import numpy as np
import pytest
import structure

pytestmark = pytest.mark.slow

CHOSEN = ("plain", "batch norm")


def lines_of(folder):
    return [
        json.loads(x) for x in (folder / "telemetry.jsonl").read_text().splitlines()
    ]


def test_gradients_vanish_in_a_plain_network_and_not_behind_batch_normalisation(
    tmp_path, monkeypatch, capsys
):
    chosen = {name: structure.STRUCTURES[name] for name in CHOSEN}
    monkeypatch.setattr(structure, "STRUCTURES", chosen)
    sizes = ["--depths", "8", "--width", "16", "--epochs", "2"]
    assert structure.main([*sizes, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.partition("8 hidden layers")[2]
    rows = lines_of(tmp_path)
    last = {row["structure"]: row for row in rows if row.get("epoch") == 2}
    assert set(last) == set(CHOSEN)
    ranked = sorted(CHOSEN, key=lambda name: -last[name]["accuracy"])
    places = [printed.index(f" {name} ") for name in ranked]
    assert places == sorted(places)
    norms = {
        name: np.array(
            [
                row["norm_at_start"]
                for row in rows
                if row["structure"] == name and "layer" in row
            ]
        )
        for name in CHOSEN
    }
    assert all(len(layers) == 9 for layers in norms.values())
    assert norms["plain"].max() < 0.3 * norms["batch norm"].min()
    assert (tmp_path / "structure.png").read_bytes().startswith(b"\x89PNG")


def outcome(accuracy):
    norms = np.ones(5)
    return structure.Outcome(accuracy, 1.0, norms, norms, None, 1.0, 2.0, 0.003)


def test_ctrl_c_keeps_the_networks_that_are_finished(tmp_path, monkeypatch, capsys):
    def train(name, *args):
        if name == "dropout 0.2":
            raise KeyboardInterrupt
        return outcome(0.25 if name == "plain" else 0.5)

    monkeypatch.setattr(structure, "train", train)
    assert structure.main(["--depths", "4", "--out", str(tmp_path)]) == 130
    printed = capsys.readouterr().out
    assert "interrupted after 3 of 9 networks" in printed
    assert "25.00 %" in printed and "50.00 %" in printed and "never" in printed
    assert (tmp_path / "structure.png").read_bytes().startswith(b"\x89PNG")
