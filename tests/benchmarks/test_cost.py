"""The benchmark on cost: its arithmetic, every row, and a run in small."""

import time

import cost
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _cost import pytorch
from _cost.measuring import WARM_UP, floor, in_turn, ratios
from _cost.problems import optimizer_alone, training_step
from _cost.report import size
from _cost.steps import BARE, steps

pytestmark = pytest.mark.slow

SMALL = ["--sizes", "256", "--leaves", "2", "--width", "8", "--layers", "1"]


@pytest.fixture(autouse=True)
def as_users():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("step", steps(), ids=lambda step: step.name)
def test_every_step_can_be_taken_and_keeps_its_shapes(step):
    problem = optimizer_alone(60, 3)
    assert len(jax.tree.leaves(problem.params)) == 3

    def take(params, state):
        extra = {"value": jnp.ones(())}
        if step.looks:
            extra["value_fn"] = problem.loss_of(problem.params, problem.data)
        return step.take(step.tx, problem.data, state, params, **extra)

    before = jax.eval_shape(lambda p: (p, step.tx.init(p)), problem.params)
    after = jax.eval_shape(take, *before)
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert describe(after) == describe(before)


def test_a_run_writes_every_row_with_what_xla_says_of_it(tmp_path, capsys):
    out = tmp_path / "cost.md"
    chosen = ["--only", "clip_by_norm", "guard, apply", "--rounds", "2"]
    assert cost.main([*SMALL, *chosen, "--out", str(out)]) == 0
    assert "guard, apply" in capsys.readouterr().out
    tables = out.read_text().split("\n## ")[1:]
    assert [table.split(",")[0] for table in tables] == [
        "256 parameters",
        "training step",
    ]
    for table in tables:
        rows = [
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in table.splitlines()
            if line.startswith("| ")
        ][1:]
        ours = {row[0]: row for row in rows if not row[0].startswith("torch")}
        assert list(ours) == [BARE, "clip_by_norm", "guard, apply"]
        for row in ours.values():
            assert float(row[1]) > 0 and float(row[3]) >= 1.0
            assert row[-2:] == ["1", "0"]  # One trace, nothing told to the host.
        assert ours[BARE][5] == "0 B" and ours["guard, apply"][5].endswith("KiB")


def test_the_floor_counts_what_adamw_reads_and_writes():
    assert floor(optimizer_alone(1000, 2)) == 7 * 4 * 2 * 22 * 22


def test_ratios_are_taken_round_by_round():
    middle, (low, high) = ratios([[1.0, 2.0, 4.0], [3.0, 2.0, 2.0]])
    assert middle == 1.0 and (low, high) == (0.75, 2.0)


def test_steps_are_timed_in_turn():
    seen = []
    runs = [lambda: seen.append(0), lambda: (seen.append(1), time.sleep(0.01))]
    quick, slow = in_turn(runs, rounds=3)
    assert seen == [0, 1] * (3 + WARM_UP) and len(quick) == len(slow) == 3
    assert min(slow) >= 0.01


def test_the_transformer_has_ten_million_parameters_and_learns():
    shapes = jax.eval_shape(lambda: training_step().params)
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(shapes)) == pytest.approx(
        1e7, rel=0.02
    )
    problem = training_step(1, 8, 16, 2)
    loss, grads = jax.jit(problem.gradients)(problem.params, problem.data)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, problem.params, grads)
    assert problem.loss_of(problem.params, problem.data)(moved) < loss


def test_the_loss_of_the_optimizer_alone_has_the_gradients_that_are_given():
    problem = optimizer_alone(60, 3)
    loss_fn = problem.loss_of(problem.params, problem.data)
    loss, grads = jax.value_and_grad(loss_fn)(problem.params)
    assert loss == problem.gradients(problem.params, problem.data)[0]
    jax.tree.map(np.testing.assert_array_equal, grads, problem.data)


@pytest.mark.skipif(not pytorch.available(), reason="no PyTorch, or no CPU")
def test_pytorch_steps_the_same_parameters():
    for step in pytorch.steppers(optimizer_alone(64, 2)).values():
        step()


def test_sizes_are_readable():
    assert [size(x) for x in (7, 2048, 80e6, 3e9)] == [
        "7 B",
        "2.0 KiB",
        "76.3 MiB",
        "2.8 GiB",
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sizes", "12"], "must be a number from 64 to 1e12"),
        (["--only", "nothing"], "invalid choice: 'nothing'"),
        (["--width", "10"], "--width must be a multiple of 4"),
    ],
)
def test_a_bad_option_is_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cost.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
