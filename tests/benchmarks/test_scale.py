"""Smoke test of the benchmark of what a guard sends between devices."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from _scale.collectives import collectives, executed
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

pytestmark = [pytest.mark.slow, pytest.mark.devices(8)]

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "scale.py"


@pytest.fixture(scope="module")
def scale():
    spec = importlib.util.spec_from_file_location("scale_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_step_sends_some_bytes_a_leaf_on_any_number_of_devices(
    scale, capsys, monkeypatch
):
    chosen, leaves = scale.optimizers(), 3
    for name in ("guard()", "stabilize, per leaf"):
        del chosen[name]
    monkeypatch.setattr(scale, "optimizers", lambda: chosen)
    asked = ["--leaves", str(leaves), "--size", "960", "--steps", "2"]
    assert scale.main([*asked, "--devices", "1", "8"]) == 0
    printed = capsys.readouterr().out
    assert "no extrapolation" not in printed
    for name in chosen:
        lines = [x for x in printed.splitlines() if x.strip().startswith(name + "  ")]
        one, *several = [
            [float(x) for x in line.strip().removeprefix(name).split()]
            for line in lines
        ]
        assert one == [1, 0, 0, 0, 0] and [row[0] for row in several] == [8]
        for _, times, size, all_times, all_size in several:
            assert times <= all_times and size <= all_size
            if name == "adamw":
                assert all_size == 0
            elif name == "clip_by_global_norm":
                assert (times, size) == (1, 4 * leaves)
            else:
                assert 4 * leaves <= size <= 64 * leaves
    assert "clip_by_global_norm: 2 * 999 / 1000 * 12 bytes = 23.98 bytes" in printed
    assert "1 collectives * 20 hops (a tree, up and down) * 10 us = 0.2 ms" in printed
    assert "2 * 999 / 1000 * 4e+09 bytes = 7.992e+09 bytes from each host" in printed


def test_only_the_branch_that_ran_is_counted_as_executed():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    shards = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("data")))
    step = jax.jit(lambda x, p: jax.lax.cond(p, jnp.sum, lambda x: 0.0, x))
    program = step.lower(shards, True).compile()
    (reduction,) = collectives(program)
    assert reduction.kind == "all-reduce" and reduction.payload == 4
    assert executed(program, lambda: program(shards, True), 4) == [reduction]
    assert executed(program, lambda: program(shards, False), 4) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--devices", "0"], "must be an integer >= 1, got '0'"),
        (["--devices", "3", "8"], "--devices must divide the largest, got [3, 8]"),
        (["--devices", "4096"], "--devices must be at most "),
        (["--size", "64"], "--size must hold a number for each leaf and device"),
    ],
)
def test_a_bad_option_is_one_line_and_status_2(scale, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        scale.main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: " in line and message in line
