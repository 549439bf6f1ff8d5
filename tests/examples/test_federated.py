"""The federated example at a tiny size, and the sum that hides its summands."""

import json

import federated
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from masked_sum import decode, encode, masked

pytestmark = pytest.mark.slow

ROUNDS = 12
SIZES = ["--rounds", str(ROUNDS), "--server-rate", "1.0"]


def rows_of(folder, run):
    rows = map(json.loads, (folder / "telemetry.jsonl").read_text().splitlines())
    return [row for row in rows if row["run"] == run]


def accuracies(folder, run):
    own = [row["test_accuracy"] for row in rows_of(folder, run)[:ROUNDS]]
    assert len(own) == ROUNDS
    return own


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federated")
    faulty = {name: run for name, run in federated.RUNS.items() if run[0]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(federated, "RUNS", faulty)
        assert federated.main([*SIZES, "--out", str(folder)]) == 0
    return folder


def test_broken_clients_are_stopped_at_the_door(ran):
    assert accuracies(ran, "faults, bare")[-1] < 0.2
    assert accuracies(ran, "faults, guarded")[-1] > 0.6
    doors = rows_of(ran, "faults, guarded")[ROUNDS:]
    assert len(doors) == federated.CLIENTS
    for k, seen in enumerate(doors):
        assert seen["skipped_steps"] == (ROUNDS if k == federated.NAN else 0)
        if k == federated.LOUD:
            assert seen["clipped_steps"] == ROUNDS
        if k == federated.ABSENT:
            assert 0 < seen["guarded_steps"] < ROUNDS
        else:
            assert seen["guarded_steps"] == ROUNDS
    assert (ran / "federated.png").read_bytes().startswith(b"\x89PNG")


def test_a_masked_sum_over_devices_trains_as_well(ran, tmp_path):
    more = ["--map", "shard_map", "--masked-sum", "--out", str(tmp_path)]
    options = federated.parse_args([*SIZES, *more])
    assert options.devices == 5
    with federated.Telemetry(tmp_path) as log:
        out = federated.train("faults, guarded", options, log, lambda: None)
    expected = accuracies(ran, "faults, guarded")
    np.testing.assert_allclose(out.accuracies, expected, atol=0.02)


def test_every_client_has_two_digits_and_every_image_at_most_one_client():
    train, _ = federated.digits.load(None)
    images, labels = federated.shares_of(train)
    assert len({len(own) for own in labels}) == 1
    for k, own in enumerate(labels):
        assert set(own.tolist()) == {k, (k + 1) % federated.CLIENTS}
    assert len(np.unique(images.reshape(-1, images.shape[-1]), axis=0)) >= 1000


def test_masks_hide_every_message_and_cancel_in_the_sum():
    rng = np.random.default_rng(0)
    numbers = rng.uniform(-1, 1, (10, 2000)).astype(np.float32)
    present = jnp.arange(10) != 4
    numbers[4] = 0  # An absent client sends nothing.
    message = jax.jit(lambda x, k, key: masked({"a": x}, k, present, key))
    key = jax.random.key(1)
    sent = np.stack([message(x, k, key)["a"] for k, x in enumerate(numbers)])
    found = decode(jnp.asarray(sent.sum(0, dtype=np.uint32)))
    np.testing.assert_allclose(found, numbers.sum(0), atol=10 * 2.0**-24)
    np.testing.assert_array_equal(sent[4], 0)
    for k in np.flatnonzero(present):
        # All of 32 bits, each set half of the time, whatever the numbers are.
        bits = np.unpackbits(sent[k].view(np.uint8).reshape(-1, 4), axis=1)
        np.testing.assert_allclose(bits.mean(0), 0.5, atol=0.06)
        plain = np.asarray(encode(jnp.asarray(numbers[k])))
        assert np.mean(sent[k] == plain) < 0.01
    other = np.asarray(message(numbers[0], 0, jax.random.key(2))["a"])
    assert np.mean(other == sent[0]) < 0.01


def test_ctrl_c_keeps_the_runs_that_are_finished(tmp_path, monkeypatch, capsys):
    def interrupted(name, options, *args):
        if name != "no fault":
            raise KeyboardInterrupt
        ones = np.ones((1, federated.CLIENTS))
        return federated.Outcome([0.5], ones, np.ones(1), ones > 0, [], {})

    monkeypatch.setattr(federated, "train", interrupted)
    assert federated.main(["--rounds", "1", "--out", str(tmp_path)]) == 130
    printed = capsys.readouterr().out
    assert "interrupted after 1 of 3 runs" in printed and "50.00 %" in printed
    assert (tmp_path / "federated.png").exists()
