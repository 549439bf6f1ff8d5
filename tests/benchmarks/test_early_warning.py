"""The early-warning benchmark: what counts as a spike, as foretold, as false."""

import early_warning
import numpy as np
import pytest
from _early_warning.scores import score, spikes

pytestmark = pytest.mark.slow

STEPS = 1000


def losses():
    """Noise of 1 %, a spike of three steps at 500, one step alone at 700."""
    loss = 1 + 0.01 * np.random.default_rng(0).normal(size=STEPS)
    loss[500:503] += 1
    loss[700] += 1
    return loss


def alarms(*steps):
    raised = np.zeros(STEPS, bool)
    raised[list(steps)] = True
    return raised


def test_a_spike_lasts_two_steps_at_least_and_starts_once():
    assert spikes(losses()) == [500]
    bad = losses()
    bad[400:402] = np.nan
    assert spikes(bad)[0] == 400


def test_only_alarms_in_the_32_steps_before_a_spike_foretell_it():
    for step, foretold in ((467, 0), (468, 1), (499, 1), (500, 0)):
        assert score(losses(), alarms(step)).foretold == foretold
    assert score(losses(), alarms(480, 490)).leads == (20,)


def test_alarms_without_a_spike_are_false_once_an_episode():
    assert score(losses(), alarms(300, 310, 320)).false_alarms == 1
    assert score(losses(), alarms(300, 340)).false_alarms == 2
    # An alarm that is never silent is a false one every 20 steps.
    assert score(losses(), np.ones(STEPS, bool)).false_alarms == 32
    # At the start, before a spike, and in its aftermath nothing is counted.
    assert score(losses(), alarms(100, 480, 500, 600)).false_alarms == 0
    assert score(losses(), alarms(601)).false_alarms == 1


def test_it_trains_chooses_a_margin_and_writes_the_table(tmp_path, capsys):
    out = tmp_path / "report.md"
    assert early_warning.main(["--quick", "--steps", "600", "--out", str(out)]) == 0
    text = out.read_text()
    assert text == capsys.readouterr().out.removesuffix("\n")
    assert "| regression, tanh; judged | 3200 |" in text
    assert "Margin chosen: " in text
