"""Tests for `scalars`, and for the loggers that write them a step late."""

import csv
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stablegrad as sg
from stablegrad.integrations import loggers

PARAMS = {"w": jnp.zeros(2)}
GRADS = {"w": jnp.array([3.0, 4.0])}
DEFAULT = {
    "loss_value",
    "grad_norm",
    "clipped_grad_norm",
    "clip_scale",
    "lr_scale",
    "clipped_steps",
    "skipped_steps",
    "backed_off_steps",
    "kept_out_steps",
    "consecutive_skips",
}
TX = sg.guard(
    optax.sgd(0.1),
    sg.clip(sg.fixed(2.0)),
    sg.clip(sg.zscore(3.0, warmup_steps=5)),
    sg.skip(),
    sg.back_off(sg.fixed(9.0, of="value")),
)


def update(state, scale, value):
    grads = jax.tree.map(lambda x: x * scale, GRADS)
    return TX.update(grads, state, PARAMS, value=value)[1]


step = jax.jit(update, donate_argnums=0)


def state_after(*scales):
    state = jax.jit(TX.init)(PARAMS)
    for scale in scales:
        state = step(state, jnp.float32(scale), jnp.float32(1.0))
    return state


class Memory:
    """A writer that keeps what it is told."""

    def __init__(self):
        self.rows = []

    def write(self, step, numbers):
        self.rows.append((step, dict(numbers)))


@pytest.mark.slow
def test_ten_scalars_are_told_unasked_and_all_on_request():
    state = state_after(1.0)
    told = sg.scalars(state)
    assert set(told) == DEFAULT
    assert {type(number) for number in told.values()} == {int, float}
    assert told["grad_norm"] == 5 and told["clipped_steps"] == 1
    assert all(name in sg.scalars.__doc__ for name in DEFAULT)
    everything = sg.scalars(state, every=True)
    absent = {"clip_zscore_grad_norm_limit", "skip_nonfinite_grad_norm_limit"}  # inf
    # No response for them.
    absent |= {"shortened_steps", "halted", "halted_steps", "warned_steps"}
    assert set(sg.metrics(state)) - set(everything) == absent
    assert everything["clip_fixed_grad_norm_limit"] == 2


@pytest.mark.slow
def test_numbers_of_responses_that_a_guard_does_not_have_are_left_out():
    tx = sg.guard(optax.sgd(0.1), sg.skip())
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    names = {"grad_norm", "lr_scale", "skipped_steps", "kept_out_steps"}
    assert set(sg.scalars(state)) == names | {"consecutive_skips"}
    tx = sg.stabilize(optax.sgd(0.1))
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, value=jnp.nan)
    assert set(sg.scalars(state)) == DEFAULT  # The loss was nan, which is told.
    assert math.isnan(sg.scalars(state)["loss_value"])
    everything = sg.scalars(state, every=True)
    assert {"halted", "shortened_steps", "trust_ratio"} < set(everything)
    assert "trust_radius" not in everything  # inf: it does not bind.
    tx = sg.guard(optax.sgd(0.1), sg.skip(), sg.roll_back())  # It halts, too.
    assert {"halted", "halted_steps"} < set(sg.scalars(tx.init(PARAMS), every=True))
    # Two guards, and a clip of a chain, whose names begin like a response's.
    tx = optax.chain(sg.clip_by_norm(1.0), sg.guard(sg.guard(optax.sgd(0.1))))
    told = sg.scalars(tx.update(GRADS, tx.init(PARAMS), PARAMS)[1])
    assert "guard_0_grad_norm" in told and "guard_1_skipped_steps" in told
    assert "guard_0_clipped_steps" not in told and "guard_0_guarded_steps" not in told
    assert told["clip_by_norm_clipped_steps"] == 1


@pytest.mark.slow
def test_scalars_of_an_ensemble_say_to_take_one_member():
    state = jax.vmap(TX.init)({"w": jnp.zeros((3, 2))})
    with pytest.raises(ValueError, match="stacked over an ensemble"):
        sg.scalars(state)


def test_each_step_is_written_when_the_next_one_is_logged():
    memory, state = Memory(), state_after(1.0)
    expected = []
    with loggers.Late(memory) as log:
        for i in range(4):
            scale = (1.0, np.nan, np.inf, 0.1)[i]
            state = step(state, jnp.float32(scale), jnp.float32(i))  # Donates the last.
            expected.append((i, {"own": i / 4, "id": i, **sg.scalars(state)}))
            log(i, state, {"own": jnp.float32(i / 4), "id": i})
            np.testing.assert_equal(memory.rows, expected[:i])
    np.testing.assert_equal(memory.rows, expected)
    assert {type(x) for _, row in memory.rows for x in row.values()} == {int, float}
    assert math.isinf(memory.rows[2][1]["grad_norm"])


class Failing:
    """A writer whose service is down."""

    def write(self, step, numbers):
        raise OSError(f"no connection at step {step}")


def test_a_writer_that_fails_takes_no_step_from_the_others():
    memory, state = Memory(), state_after(1.0)
    log = loggers.Late(Failing(), memory)
    log(0, state)
    for i in (1, 2):
        with pytest.raises(OSError, match=f"at step {i - 1}"):
            log(i, state)
    with pytest.raises(OSError, match="at step 2"):
        log.flush()
    assert [step for step, _ in memory.rows] == [0, 1, 2]


OWN = {  # Numbers of a user, and what is written of them.
    "beyond int32": (2**40, 2**40),
    "beyond int64": (2**70, 2**70),
    "bool": (True, 1),
    "double": (1 / 3, 1 / 3),
    "beyond float32": (np.float64(1e300), 1e300),
    "subnormal": (1e-42, 1e-42),
    "minus inf": (-math.inf, -math.inf),
    "nan": (math.nan, math.nan),
    "uint32": (np.uint32(4_000_000_000), 4_000_000_000),
    "rank 0": (np.array(0.1), 0.1),
    "device uint32": (jnp.uint32(4_000_000_000), 4_000_000_000),
    "device minus inf": (jnp.float32(-jnp.inf), -math.inf),
    "device bfloat16": (jnp.bfloat16(0.5), 0.5),
    "device int8": (jnp.int8(-3), -3),
    "device bool": (jnp.bool_(True), 1),
    "lr_scale": (7.0, 7.0),  # As the guard calls one of its own.
}


def test_a_user_s_numbers_are_written_as_they_are():
    memory = Memory()
    with loggers.Late(memory) as log:
        log(0, state_after(1.0), {name: given for name, (given, _) in OWN.items()})
    ((_, row),) = memory.rows
    expected = {name: want for name, (_, want) in OWN.items()}
    np.testing.assert_equal({name: row[name] for name in OWN}, expected)
    assert {type(row[name]) for name in OWN} == {int, float}
    assert list(row)[: len(OWN)] == list(OWN) and set(row) == DEFAULT | set(OWN)


def test_a_number_that_is_donated_or_overwritten_afterwards_was_set_aside():
    memory, state = Memory(), state_after(1.0)
    on_device, on_host = jnp.float32(0.25), np.array(0.5)
    with loggers.Late(memory) as log:
        log(0, state, {"device": on_device, "host": on_host})
        jax.jit(jnp.negative, donate_argnums=0)(on_device)
        assert on_device.is_deleted()
        on_host[...] = 9
    row = memory.rows[0][1]
    assert (row["device"], row["host"]) == (0.25, 0.5)


WRONG = (1j, jnp.ones(1), jnp.ones(2), [1.0, 2.0], "x", None, jax.random.key(0))


@pytest.mark.parametrize("wrong", WRONG, ids=lambda x: f"{x!r:.20}")
def test_what_is_no_real_scalar_is_an_error_when_it_is_logged(wrong):
    memory, state = Memory(), state_after(1.0)
    with loggers.Late(memory) as log:
        log(0, state)
        with pytest.raises(ValueError, match=r"numbers\['a'\]` must be a real scalar"):
            log(1, state, {"a": wrong})
    assert [step for step, _ in memory.rows] == [0]


@pytest.mark.slow
def test_an_ensemble_is_an_error_when_it_is_logged():
    state = jax.vmap(TX.init)({"w": jnp.zeros((3, 2))})
    with pytest.raises(ValueError, match="stacked over an ensemble"):
        loggers.Late(Memory())(0, state)


def test_the_last_step_is_written_if_training_fails():
    memory = Memory()
    with pytest.raises(KeyError), loggers.Late(memory, interval=2) as log:
        log(1, None)  # Not one of every second step.
        log(2, state_after(1.0))
        raise KeyError
    assert [step for step, _ in memory.rows] == [2]
    with pytest.raises(ValueError, match="no guard in this optimizer state"):
        log(4, optax.adam(0.1).init(PARAMS))


@pytest.mark.slow
def test_logging_does_not_wait_for_the_step():
    @jax.jit
    def slow(state, matrix):
        matrix = jax.lax.fori_loop(0, 60, lambda _, m: jnp.tanh(m @ m), matrix)
        return update(state, 1 + 0 * matrix[0, 0], 1.0)

    matrix, memory = jnp.ones((700, 700)), Memory()
    state = state_after(1.0)
    slow(state, matrix)  # Compiles.
    log = loggers.Late(memory)
    log(0, state)
    late = slow(state, matrix)
    log(1, late)
    assert [step for step, _ in memory.rows] == [0]
    assert not late.numbers[0].is_ready()  # The step still runs.
    log.flush()
    assert memory.rows[1][1] == sg.scalars(late)


def test_a_table_gets_new_columns_and_goes_on_after_a_restart(tmp_path):
    path = tmp_path / "run.csv"
    loggers.CSV(path).write(0, {"a": 1, "b": 0.5})
    table = loggers.CSV(path)
    table.write(1, {"b": math.nan, "c": math.inf})
    table.write(2, {"a": 3})
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "a", "b", "c"]
    assert rows[1:] == [
        ["0", "1", "0.5", ""],
        ["1", "", "nan", "inf"],
        ["2", "3", "", ""],
    ]


def test_two_writers_of_one_table_see_each_other_s_columns(tmp_path):
    path = tmp_path / "run.csv"
    one, other = loggers.CSV(path), loggers.CSV(path)
    one.write(0, {"a": 1})
    other.write(1, {"b": 2})
    one.write(2, {"a": 3})
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["a"] for row in rows] == ["1", "", "3"]
    assert [row["b"] for row in rows] == ["", "2", ""]


@pytest.mark.parametrize("text", ["x,y\n1,2\n", "\n\n", "\nstep,x\n"])
def test_another_table_is_left_as_it_is(text, tmp_path):
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="another table"):
        loggers.CSV(path)
    assert path.read_text() == text


@pytest.mark.parametrize("torn", ["2,", "2,5", "2,5\r"])
def test_a_table_goes_on_below_a_row_that_was_cut_off(torn, tmp_path):
    path = tmp_path / "run.csv"
    path.write_text(f"step,x\n1,2\n{torn}")
    for _ in range(2):
        loggers.CSV(path).write(3, {"x": 5})
    assert path.read_text().split() == ["step,x", "1,2", torn.strip(), "3,5", "3,5"]


def test_cells_beyond_the_header_are_dropped_with_the_next_new_column(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("step,x\n1,2,3,4\n")
    path.with_name("run.csv.tmp").write_text("of a killed process")
    loggers.CSV(path).write(5, {"y": 6})
    assert path.read_text().split() == ["step,x,y", "1,2,", "5,,6"]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_lines_go_on_below_one_that_was_cut_off(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "a"')
    for step in (2, 3):
        loggers.JSONLines(path).write(step, {})
    lines = path.read_text().splitlines()
    assert lines[1:] == ['{"step": 2, "a"', '{"step": 2}', '{"step": 3}']


def test_lines_are_json_with_null_for_what_json_has_not(tmp_path):
    path = tmp_path / "run.jsonl"
    for step in (0, 1):
        loggers.JSONLines(path).write(step, {"a": step, "b": (math.nan, 0.5)[step]})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"step": 0, "a": 0, "b": None}, {"step": 1, "a": 1, "b": 0.5}]


@pytest.mark.slow
def test_mlflow_says_which_extra_it_needs(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(ImportError, match=r"stablegrad\[mlflow\]"):
        loggers.MLflow("0")


def log_three_steps(writer):
    """Logs three steps, of which the second is nan; returns the norms."""
    state = state_after()
    with loggers.Late(writer, every=True) as log:
        for i, scale in enumerate((1.0, np.nan, 0.1)):
            state = step(state, jnp.float32(scale), jnp.float32(1.0))
            log(i, state)
    return [5.0, np.nan, 0.5]


libraries = pytest.mark.filterwarnings("ignore")  # They warn of each other.


@pytest.mark.slow
@libraries
def test_tensorboard_reads_what_was_written(tmp_path):
    board = pytest.importorskip("tensorboardX")
    with board.SummaryWriter(str(tmp_path)) as writer:
        norms = log_three_steps(loggers.TensorBoard(writer))
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    found = events.Scalars("stablegrad/grad_norm")
    assert [event.step for event in found] == [0, 1, 2]
    np.testing.assert_allclose([event.value for event in found], norms, rtol=1e-6)
    assert [e.value for e in events.Scalars("stablegrad/skipped_steps")] == [0, 1, 1]


@pytest.mark.slow
@libraries
def test_weights_and_biases_works_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    run = wandb.init(mode="offline", project="guards", dir=str(tmp_path))
    log_three_steps(loggers.WeightsAndBiases(run))
    run.log({})  # As `finish` does, this ends the last row.
    last = dict(run.summary)
    run.finish()
    assert last["stablegrad/grad_norm"] == pytest.approx(0.5)
    assert last["stablegrad/skipped_steps"] == 1
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"stablegrad/clip_scale" in file.read_bytes()


class StandInRun:
    """Keeps what a run of Weights & Biases keeps: no step before its last."""

    def __init__(self):
        self.step, self.rows, self.metrics = 0, {}, {}

    def define_metric(self, name, step_metric=None):
        self.metrics[name] = step_metric

    def log(self, numbers, step):
        if step >= self.step:
            self.step = step
            self.rows.setdefault(step, {}).update(numbers)


def test_numbers_reach_weights_and_biases_behind_what_is_logged_there():
    run, state = StandInRun(), state_after(1.0)
    with loggers.Late(loggers.WeightsAndBiases(run)) as log:
        for i in range(4):
            run.log({"accuracy": 0.5}, step=i)
            log(i, state)
    assert run.metrics["stablegrad/*"] == "stablegrad/step"
    seen = [row.get("stablegrad/step") for row in run.rows.values()]
    assert seen == [None, 0, 1, 3]  # The last two share a row.


def test_late_takes_writers_alone_and_hides_no_error():
    with pytest.raises(TypeError, match="takes writers, such as `CSV"):
        loggers.Late("run.csv")

    class Broken:
        def write(self, step, numbers):
            raise OSError("disk full")

    with pytest.raises(KeyError) as caught, loggers.Late(Broken()) as log:
        log(0, state_after(1.0))
        raise KeyError("first")
    assert "disk full" in caught.value.__notes__[0]


@pytest.mark.slow
@libraries
def test_mlflow_has_the_whole_history(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # No database to install.
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(tmp_path.as_uri())
    run = client.create_run(client.create_experiment("guards"))
    writer = loggers.MLflow(run.info.run_id, client=client)
    norms = log_three_steps(writer)
    writer.write(3, {"update_ratio/mlp/~/linear_0": 0.5})
    kept = client.get_metric_history(
        run.info.run_id, "stablegrad/update_ratio/mlp/_/linear_0"
    )
    assert [metric.value for metric in kept] == [0.5]
    found = client.get_metric_history(run.info.run_id, "stablegrad/grad_norm")
    assert [metric.step for metric in found] == [0, 1, 2]
    np.testing.assert_allclose([metric.value for metric in found], norms, rtol=1e-6)


@pytest.mark.slow
@libraries
def test_clu_gets_every_scalar(tmp_path):
    metric_writers = pytest.importorskip("clu.metric_writers", exc_type=ImportError)
    writer = metric_writers.create_default_writer(str(tmp_path), asynchronous=False)
    norms = log_three_steps(loggers.CLU(writer))
    writer.flush()
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    found = (
        reader.EventAccumulator(str(tmp_path)).Reload().Tensors("stablegrad/grad_norm")
    )
    values = [np.frombuffer(e.tensor_proto.tensor_content, np.float32) for e in found]
    assert [event.step for event in found] == [0, 1, 2]
    np.testing.assert_allclose(np.ravel(values), norms, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, np.int64(5), jnp.int32(5)])
def test_steps_may_be_arrays_and_no_number_is_written_over_the_step(step, tmp_path):
    lines, table = tmp_path / "run.jsonl", tmp_path / "run.csv"
    with loggers.Late(loggers.JSONLines(lines), loggers.CSV(table)) as log:
        log(step, state_after(1.0), {"step": 99})
    assert json.loads(lines.read_text())["step"] == 5
    assert table.read_text().splitlines()[1].split(",")[0] == "5"
