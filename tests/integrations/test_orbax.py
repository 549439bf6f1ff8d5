"""Tests for `HealthyCheckpoints`: what is saved, what stays, and damaged folders."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import stablegrad as sg
from stablegrad.integrations.orbax import CheckpointError, HealthyCheckpoints

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TX = sg.guard(
    optax.adam(0.1),
    sg.clip(sg.zscore(2.0, warmup_steps=5)),
    sg.skip(),
    sg.back_off(sg.zscore(3.0, of="value", warmup_steps=5)),
    sg.halt(after=3),
    record_norms=4,
)
PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3, jnp.bfloat16)}


@jax.jit
def step(carry, size):
    params, state = carry
    grads = jax.tree.map(lambda x: (x * size).astype(x.dtype), params)
    return sg.apply(TX, grads, state, params, value=size)


def train(carry, sizes):
    for size in sizes:
        carry = step(carry, jnp.float32(size))
    return carry


def start():
    return PARAMS, TX.init(PARAMS)


def same(one, other):
    """Whether two trees are equal, bit for bit."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in pairs
    )


def files_of(folder):
    found = {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    return {str(path.relative_to(folder)): data for path, data in found.items()}


def test_the_state_of_an_nnx_optimizer_is_an_error_and_its_opt_state_is_read(tmp_path):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = sg.guard(optax.sgd(0.1), sg.skip(), sg.halt(after=1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    with HealthyCheckpoints(tmp_path / "new") as checkpoints:
        with pytest.raises(ValueError, match=r"restore `optimizer\.opt_state`"):
            checkpoints.save(0, nnx.state(model), nnx.state(optimizer))
        assert checkpoints.save(0, nnx.state(model), optimizer.opt_state)
        bad = jax.tree.map(lambda p: p * jnp.nan, nnx.state(model, nnx.Param))
        optimizer.update(model, bad, value=1.0)
        assert not checkpoints.save(1, nnx.state(model), optimizer.opt_state)
        found = checkpoints.restore(nnx.state(model), optimizer.opt_state)
    optimizer.opt_state = found.opt_state
    good = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, good, value=1.0)
    assert sg.metrics(optimizer)["guarded_steps"] == 1


def test_a_run_restored_amid_a_spike_goes_on_bit_for_bit(tmp_path):
    spike = [1, 1.1, 0.9, 1, 1.05, 1, 50, np.nan, 70, 60, np.inf, 40, 1, 1, 0.9]
    carry, whole = start(), train(start(), spike)
    with HealthyCheckpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(*start()) is None and checkpoints.metadata() is None
        for i, size in enumerate(spike[:9]):
            carry = train(carry, [size])
            assert checkpoints.save(i, *carry, {"next": i + 1})
    with HealthyCheckpoints(tmp_path / "new") as again:
        found = again.restore(*start())
    assert found.step == 8 and found.metadata == {"next": 9}
    assert same((found.trees, found.opt_state), carry)
    resumed = train((found.trees, found.opt_state), spike[found.metadata["next"] :])
    assert same(resumed, whole)
    assert int(sg.metrics(resumed[1])["skipped_steps"]) > 1


@pytest.mark.parametrize("memory", ["device", "pinned_host"])
def test_a_run_restored_within_a_roll_back_window_goes_on_bit_for_bit(memory, tmp_path):
    rule = sg.roll_back(
        sg.fixed(10.0, of="value"),
        after=4,
        every=8,
        hold_steps=2,
        cooldown_steps=6,
        memory=memory,
    )
    tx = sg.guard(optax.adam(0.05), sg.skip(), rule, record_norms=4)

    @jax.jit
    def step(carry, value):
        params, state = carry
        grads = jax.tree.map(lambda x: (x * value).astype(x.dtype), params)
        return sg.apply(tx, grads, state, params, value=value)

    values = np.ones(40, np.float32)
    values[20:24] = 50.0  # Undone in step 23; the cooldown is over after step 29.
    values[26:34] = 60.0  # Undone as soon as it is, in step 30.
    # On probation after a snapshot, amid either window, after either roll-back.
    places = [18, 20, 22, 23, 24, 27, 29, 30, 33]
    start = lambda: (PARAMS, tx.init(PARAMS))
    with HealthyCheckpoints(tmp_path, keep=len(places)) as checkpoints:
        carry = start()
        for t, value in enumerate(values):
            carry = step(carry, value)
            if t in places:
                assert checkpoints.save(t, *carry)
        checkpoints.wait()
        rolled = [e.step for e in sg.events(carry[1]) if e.kind == "roll_back"]
        assert rolled == [23, 30]
        for place in places:
            found = checkpoints.restore(*start(), step=place)
            resumed = found.trees, found.opt_state
            for value in values[place + 1 :]:
                resumed = step(resumed, value)
            assert same(resumed, carry), place


def test_what_is_told_may_change_while_the_disk_is_written(tmp_path, monkeypatch):
    def slow(*args, **kwargs):
        time.sleep(0.2)
        return dumps(*args, **kwargs)

    carry, metadata, dumps = train(start(), [1]), {"losses": [1.0]}, json.dumps
    with HealthyCheckpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(json, "dumps", slow)
        assert checkpoints.save(1, *carry, metadata)
        metadata["losses"].append(2.0)
        checkpoints.wait()
        assert checkpoints.metadata() == {"losses": [1.0]}


def test_what_is_not_healthy_is_never_saved(tmp_path):
    params, state = train(start(), [1, 1])
    halted = train((params, state), [np.nan] * 3)
    with HealthyCheckpoints(tmp_path, asynchronous=False) as checkpoints:
        assert checkpoints.save(1, params, state)
        poisoned = params | {"b": params["b"].at[1].set(jnp.inf)}
        assert not checkpoints.save(2, poisoned, state)
        assert not checkpoints.save(2, *halted)
        assert checkpoints.save(3, *train(halted, [1]))  # It has recovered.
        keyed = {**params, "key": jax.random.key(3)}
        assert checkpoints.save(4, keyed, optax.adam(0.1).init(params))
        found = checkpoints.restore(keyed, optax.adam(0.1).init(params))
        assert found.trees["key"] == jax.random.key(3)
        assert checkpoints.steps == [1, 3, 4]


def test_numbers_are_saved_as_arrays_and_other_leaves_are_a_clear_error(tmp_path):
    params, state = train(start(), [1])
    trees = {"params": params, "epoch": 3, "best": 0.5, "done": True}
    with HealthyCheckpoints(tmp_path, asynchronous=False) as checkpoints:
        assert checkpoints.save(1, trees, state)
        for like in (trees, trees | {"epoch": jnp.int32(0)}):
            found = checkpoints.restore(like, state).trees
            assert (found["epoch"], found["best"], found["done"]) == (3, 0.5, True)
        for call in (
            lambda: checkpoints.save(2, trees | {"act": jax.nn.relu}, state),
            lambda: checkpoints.restore(trees | {"act": jax.nn.relu}, state),
        ):
            with pytest.raises(TypeError, match=r"at trees\.act\. .*eqx\.filter"):
                call()
        assert checkpoints.steps == [1]


def test_the_last_one_from_before_a_spike_is_never_rotated_out(tmp_path):
    carry = train(start(), [1] * 4)
    with HealthyCheckpoints(tmp_path, keep=2, calm_steps=10) as checkpoints:
        for i in (1, 2):
            assert checkpoints.save(i, *carry)
        for i in range(3, 9):
            carry = train(carry, [1, np.nan])
            assert checkpoints.save(i, *carry)
        checkpoints.wait()
        assert checkpoints.steps == [2, 7, 8]
    carry = train(carry, [1] * 11)
    with HealthyCheckpoints(tmp_path, keep=2, calm_steps=10) as checkpoints:
        assert checkpoints.save(9, *carry)  # Calm again.
        checkpoints.wait()
        assert checkpoints.steps == [8, 9]


def test_a_checkpoint_that_is_not_newer_is_an_error_until_the_newer_are_deleted(
    tmp_path,
):
    carry = train(start(), [1])
    other = train(carry, [1])
    with HealthyCheckpoints(tmp_path) as checkpoints:
        for i in (1, 2, 3):
            assert checkpoints.save(i, *carry)
        for i in (3, 2):
            with pytest.raises(CheckpointError, match="the newest one is 3"):
                checkpoints.save(i, *other)
        with pytest.raises(CheckpointError, match="cannot go back to checkpoint 0"):
            checkpoints.delete_newer(0)
        assert checkpoints.steps == [1, 2, 3]
        assert same(tuple(checkpoints.restore(*start())[1:3]), carry)
        checkpoints.delete_newer(1)
        assert checkpoints.steps == [1]
        assert checkpoints.save(2, *other, "again")
    with HealthyCheckpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(*start())
        assert checkpoints.steps == [1, 2] and found.metadata == "again"
        assert same((found.trees, found.opt_state), other)


def test_a_step_may_be_on_the_device_and_is_an_integer_from_0_on(tmp_path):
    carry = train(start(), [1])
    with HealthyCheckpoints(tmp_path, asynchronous=False) as checkpoints:
        for i in (0, jnp.int32(3), np.int64(4)):
            assert checkpoints.save(i, *carry)
        assert checkpoints.steps == [0, 3, 4]
        for wrong in (5.0, -1, True, "7", jnp.float32(7), jnp.ones(2, jnp.int32)):
            with pytest.raises(ValueError, match="`step` must be an integer >= 0"):
                checkpoints.save(wrong, *carry)


def test_damaged_and_foreign_checkpoints_are_clear_errors_that_touch_nothing(tmp_path):
    carry = train(start(), [1, 1])
    with HealthyCheckpoints(tmp_path) as checkpoints:
        for i in (1, 2):
            checkpoints.save(i, *carry)
    largest = max((tmp_path / "2").rglob("*"), key=lambda p: p.stat().st_size)
    data = max((tmp_path / "2" / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    for file in {largest, data}:
        file.write_bytes(file.read_bytes()[:20])
    before = files_of(tmp_path)
    with HealthyCheckpoints(tmp_path) as checkpoints:
        with pytest.raises(
            CheckpointError, match=r"checkpoint 2 cannot.*[\s\S]*\[1, 2"
        ):
            checkpoints.restore(*start())
        found = checkpoints.restore(*start(), step=1)
        assert same((found.trees, found.opt_state), carry)
        other = {**PARAMS, "w": jnp.zeros((2, 4))}
        wrong = (
            r"of another run: 1 leaves differ\s+trees.w: saved \(\(2, 3\), 'float32'"
        )
        with pytest.raises(CheckpointError, match=wrong):
            checkpoints.restore(other, carry[1], step=1)
        cast = {**PARAMS, "b": jnp.zeros(3)}  # Which Orbax would cast.
        with pytest.raises(CheckpointError, match=r"'bfloat16'\), wanted .*'float32'"):
            checkpoints.restore(cast, carry[1], step=1)
        with pytest.raises(CheckpointError, match="of another run"):
            checkpoints.restore(PARAMS, optax.adam(0.1).init(PARAMS), step=1)
        with pytest.raises(CheckpointError, match="checkpoint 7 cannot be read"):
            checkpoints.restore(*start(), step=7)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format": 2}', "A newer one wrote it"),
        ('{"form', "is damaged"),
        (None, "else"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(text, said, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    if text:
        (tmp_path / "stablegrad.json").write_text(text)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=said):
        HealthyCheckpoints(tmp_path)
    assert files_of(tmp_path) == before


FULL_DISK = """
import resource, sys
import jax, optax
import stablegrad as sg
from stablegrad.integrations.orbax import CheckpointError, HealthyCheckpoints

params = {"w": jax.random.normal(jax.random.key(0), 300_000)}
state = sg.stabilize(optax.sgd(0.1)).init(params)
asynchronous = sys.argv[2] == "async"
checkpoints = HealthyCheckpoints(sys.argv[1], keep=1, asynchronous=asynchronous)
checkpoints.save(1, params, state)
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    checkpoints.save(2, {"w": params["w"] + 1}, state)
    checkpoints.wait()
    sys.exit("saved all the same")
except CheckpointError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
found = checkpoints.restore(params, state)
assert found.step == 1 and (found.trees["w"] == params["w"]).all()
assert checkpoints.save(3, {"w": params["w"] + 2}, state)  # There is room again.
checkpoints.wait()
assert checkpoints.steps == [3], checkpoints.steps
print("whole")
"""


@pytest.mark.parametrize("way", ["async", "sync"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(way, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "new"), way],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "was not written" in done.stdout and done.stdout.endswith("whole\n")


def test_nothing_is_saved_after_close_or_told_that_json_does_not_have(tmp_path):
    carry = train(start(), [1.0])
    with HealthyCheckpoints(tmp_path / "run") as checkpoints:
        with pytest.raises(TypeError, match="`metadata` must be something for JSON"):
            checkpoints.save(0, *carry, metadata={"epoch": np.int64(3)})
        assert checkpoints.save(0, *carry, metadata={"epoch": 3})
    with pytest.raises(CheckpointError, match="checkpoint 1 was not written: it is cl"):
        checkpoints.save(1, *carry)
    assert [path.name for path in (tmp_path / "run").glob("*tmp*")] == []


def test_what_only_reads_deletes_nothing_and_disturbs_no_run(tmp_path):
    carry = train(start(), [1])
    with HealthyCheckpoints(tmp_path, keep=10) as checkpoints:
        for i in range(5):
            assert checkpoints.save(i, *carry)
        checkpoints.wait()
        unfinished = tmp_path / "9.orbax-checkpoint-tmp"
        unfinished.mkdir()  # As while another process writes.
        with HealthyCheckpoints(tmp_path, keep=1) as reader:
            assert reader.restore(*carry, step=1).step == 1
            reader.metadata()
            reader.wait()
        assert unfinished.exists()
        assert checkpoints.steps == reader.steps == [0, 1, 2, 3, 4]
    with HealthyCheckpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.save(5, *carry)
        assert not unfinished.exists()
    with HealthyCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [5]


def test_scalars_of_numpy_are_read_back_and_large_integers_are_refused(tmp_path):
    params, state = train(start(), [1])
    trees = {"n": np.int64(4), "x": np.float32(0.5), "b": np.bool_(True), "p": params}
    with HealthyCheckpoints(tmp_path, asynchronous=False) as checkpoints:
        assert checkpoints.save(1, trees, state)
        found = checkpoints.restore(trees, state).trees
        assert (found["n"], found["x"], found["b"]) == (4, 0.5, True)
        with pytest.raises(TypeError, match=r"5000000000 at trees\.n .*metadata"):
            checkpoints.save(2, trees | {"n": 5_000_000_000}, state)


def test_a_halted_guard_is_found_among_the_trees_as_well(tmp_path):
    with HealthyCheckpoints(tmp_path) as checkpoints:
        assert not checkpoints.save(1, train(start(), [np.nan] * 3), None)


def test_a_checkpoint_that_cannot_be_deleted_stays_with_a_warning(
    tmp_path, monkeypatch
):
    carry = train(start(), [1])

    def refuse(self, step):
        raise PermissionError("in use")

    with HealthyCheckpoints(tmp_path, keep=1, asynchronous=False) as checkpoints:
        assert checkpoints.save(1, *carry) and checkpoints.save(2, *carry)
        with monkeypatch.context() as patched:
            patched.setattr(ocp.CheckpointManager, "delete", refuse)
            with pytest.warns(UserWarning, match="checkpoint 1 stays: in use"):
                assert checkpoints.save(3, *carry)
        checkpoints.wait()
        assert checkpoints.steps == [3]


def test_an_error_within_the_block_is_the_one_that_comes_out(tmp_path, monkeypatch):
    def fail(self):
        raise OSError("disk full")

    with pytest.raises(KeyError) as caught, HealthyCheckpoints(tmp_path):
        monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", fail)
        raise KeyError("first")
    assert "disk full" in "".join(caught.value.__notes__)


def test_a_folder_in_a_bucket_is_refused():
    with pytest.raises(ValueError, match=r"on a file system, got gs://bucket/run"):
        HealthyCheckpoints("gs://bucket/run")
