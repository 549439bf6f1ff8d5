"""The structure example: its networks, tables and figure, at a tiny size."""

import json

import numpy as np
import pytest
import structure

pytestmark = pytest.mark.slow

TRAINED = ("none", "residual, layer norm", "gradient clip")
SIZES = ["--depths", "8", "--width", "16", "--epochs", "2"]


def lines_of(folder):
    return [
        json.loads(x) for x in (folder / "telemetry.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("structure")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(structure, "QUICK", TRAINED)
        assert structure.main([*SIZES, "--quick", "--out", str(folder)]) == 0
    return folder


def profiles(folder, when):
    """Gradient norms by layer, of each network."""
    found = {}
    for row in lines_of(folder):
        if "layer" in row:
            name = row["patient"], row["remedy"]
            found.setdefault(name, []).append(row[f"norm_at_{when}"])
    return {name: np.array(norms) for name, norms in found.items()}


def test_one_patient_vanishes_the_other_explodes_and_pre_norm_cures_both(ran):
    start = profiles(ran, "start")
    assert set(start) == {
        (patient, remedy) for patient in structure.PATIENTS for remedy in TRAINED
    }
    ratio = {name: norms[0] / norms[-1] for name, norms in start.items()}
    assert all(len(norms) == 7 for norms in start.values())
    assert ratio["vanishing", "none"] < 1e-3
    assert ratio["exploding", "none"] > 3
    for patient in structure.PATIENTS:
        assert 0.2 < ratio[patient, "residual, layer norm"] < 5
    causes = {
        (row["patient"], row["remedy"]): row["cause_at_start"]
        for row in lines_of(ran)
        if "cause_at_start" in row
    }
    assert causes.keys() == start.keys()
    assert causes["vanishing", "none"] == "critical: vanishing"
    # Clipping shrinks what the optimizer gets, and cures no profile.
    for patient in structure.PATIENTS:
        clipped = start[patient, "gradient clip"]
        np.testing.assert_allclose(clipped, start[patient, "none"], rtol=1e-5)


def test_every_network_has_a_row_and_the_theory_comes_first(
    tmp_path, monkeypatch, capsys
):
    out = lambda *args: outcome(0.5)
    monkeypatch.setattr(structure, "train", out)
    structure.main([*SIZES, "--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    theory, title, tables = printed.partition("vanishing, 8 hidden layers")
    assert title
    assert "0.056" in theory and "1.860" in theory
    for remedy in structure.QUICK:
        assert tables.count(f" {remedy} ") == 4  # Profiles and causes, two patients.
    assert tables.count("critical: vanishing") == 2 * len(structure.QUICK)
    assert (tmp_path / "structure.png").read_bytes().startswith(b"\x89PNG")


def test_every_remedy_builds_a_network_whose_layers_are_examined():
    for patient, (activation, kernel_init, _) in structure.PATIENTS.items():
        for name, recipe in structure.REMEDIES.items():
            recipe = recipe._replace(activation=recipe.activation or activation)
            model = structure.Deep(
                (64, 8, 4, 10), recipe, kernel_init, rngs=structure.nnx.Rngs(0)
            )
            inputs = np.ones((2, 64), np.float32)
            logits = structure.nnx.eval_shape(
                lambda model, inputs: model(inputs), model, inputs
            )
            assert logits.shape == (2, 10), (patient, name)
            assert structure.remember_layers().init(
                structure.nnx.state(model, structure.nnx.Param)
            ).shape == (3,)


def test_a_profile_shows_what_is_tiny_huge_and_not_finite():
    assert structure.bars(np.array([0.0, 1e-10, 1e5, np.nan])) == ".▁█!"
    assert len(structure.bars(np.ones(49))) == 8


def outcome(accuracy):
    norms = np.ones(5)
    causes = "critical: vanishing", "within usual limits"
    return structure.Outcome(accuracy, 1.0, norms, norms, 2.0, causes)


def test_ctrl_c_keeps_the_networks_that_are_finished(tmp_path, monkeypatch, capsys):
    def train(patient, remedy, *args):
        if remedy == "leaky ReLU":
            raise KeyboardInterrupt
        return outcome(0.25 if remedy == "none" else 0.5)

    monkeypatch.setattr(structure, "train", train)
    assert structure.main(["--depths", "4", "--out", str(tmp_path)]) == 130
    printed = capsys.readouterr().out
    assert "interrupted after 2 of 26 networks" in printed
    assert "25.0 %" in printed and "50.0 %" in printed
    assert (tmp_path / "structure.png").read_bytes().startswith(b"\x89PNG")
