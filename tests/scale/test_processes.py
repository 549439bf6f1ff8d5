"""Several processes through `jax.distributed`: one run, one decision."""

import os
import random
import re
import sys
import time
from pathlib import Path

import data_parallel
import jax
import numpy as np
import pytest
from helpers.launching import free_port, run_together
from helpers.scenario import NAN, SKIPPED, Run, assert_same

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
SLURM_PORTS = range(61440, 65536)  # JAX adds the job's number to the first.
EXAMPLE = ROOT / "examples" / "data_parallel.py"


def run_workers(folder) -> dict[str, dict[str, np.ndarray]]:
    """What one process of four devices wrote, and each of two processes of two."""
    port = str(free_port())
    kinds = {"alone": ("1", "0"), "first": ("2", "0"), "second": ("2", "1")}
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    run_together(
        [
            [sys.executable, "-m", "helpers.worker", port, *kind, str(folder / name)]
            for name, kind in kinds.items()
        ],
        [{"PYTHONPATH": path} for _ in kinds],
    )
    return {name: dict(np.load(folder / f"{name}.npz")) for name in kinds}


def part(written, optimizer, of):
    start = f"{optimizer}/{of}/"
    return {
        name.removeprefix(start): array
        for name, array in written.items()
        if name.startswith(start)
    }


def test_two_processes_are_one_and_both_skip_what_is_nan_in_one(tmp_path):
    written = run_workers(tmp_path)
    for optimizer in ("stabilize", "per leaf"):
        runs = {
            name: Run(
                part(own, optimizer, "params"), part(own, optimizer, "history"), 0
            )
            for name, own in written.items()
        }
        assert_same(runs["first"], runs["alone"])
        nans = {name: own[f"{optimizer}/nans/own"] for name, own in written.items()}
        assert nans == {"alone": 1, "first": 0, "second": 1}
        for run in runs.values():
            assert np.flatnonzero(run.history["skipped"]).tolist() == SKIPPED
            assert np.isnan(run.history["grad_norm"][NAN])
    for name, array in written["first"].items():
        if "/nans/" not in name:
            np.testing.assert_array_equal(written["second"][name], array, err_msg=name)


def test_the_example_runs_alike_on_one_machine_and_in_a_cluster(capfd):
    """Here two tasks of a SLURM step on one host, as far as the variables tell."""
    asked = ["--steps", "60", "--nan-step", "40"]
    assert data_parallel.main(asked) == 0
    alone = capfd.readouterr().out.splitlines()
    devices = f"{jax.device_count()} devices ({jax.default_backend()})"
    assert alone[0].startswith(f"60 steps on {devices} of 1 processes")
    assert alone[1] == "skipped steps, as each process counts: 1"
    assert alone[2].startswith("  step 40: skip (nonfinite gradient)")
    accuracy = float(alone[3].split()[1])
    assert accuracy > 85

    job = free_port(random.sample(SLURM_PORTS, 100)) - SLURM_PORTS.start
    slurm = {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
    }
    command = [sys.executable, str(EXAMPLE), *asked, "--cpu-devices", "2"]
    first, second = run_together(
        [command, command],
        [{**slurm, "SLURM_PROCID": i, "SLURM_LOCALID": i} for i in "01"],
    )
    lines = [line for line in first.splitlines() if not line.startswith("[Gloo]")]
    assert lines[0].startswith("60 steps on 4 devices (cpu) of 2 processes")
    assert lines[1] == "skipped steps, as each process counts: 1 1"
    assert lines[2] == alone[2]
    assert abs(float(lines[3].split()[1]) - accuracy) < 1
    assert "accuracy" not in second and "steps" not in second


def test_one_failure_ends_all_and_shows_what_each_said():
    def python(program):
        return [sys.executable, "-c", f"import os, sys, time; {program}"]

    waits = python("print(os.getpid(), file=sys.stderr, flush=True); time.sleep(600)")
    fails = python("time.sleep(1); sys.exit('no shard')")
    started = time.monotonic()
    with pytest.raises(AssertionError, match="no shard") as failed:
        run_together([waits, fails])
    assert time.monotonic() - started < 60
    assert "exit statuses [None, 1]" in str(failed.value)
    (process,) = re.findall(r"^(\d+)$", str(failed.value), re.MULTILINE)
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)


def test_a_hanging_process_is_not_waited_for():
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(AssertionError, match="None: still running"):
        run_together([command], seconds=0.5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--process", "0"], "--coordinator, --processes and --process go together"),
        (
            ["--coordinator", "a:1", "--processes", "2", "--process", "2"],
            "--process must be below --processes 2, got 2",
        ),
        (
            ["--coordinator", "a", "--processes", "2", "--process", "1"],
            "--coordinator must be HOST:PORT, got 'a'",
        ),
        pytest.param(
            ["--batch-size", "12"],
            "must be a multiple of the 8 devices, got 12",
            marks=pytest.mark.devices(8),
        ),
    ],
)
def test_a_bad_option_of_the_example_is_one_line_and_status_2(
    arguments, message, capsys
):
    with pytest.raises(SystemExit) as stopped:
        data_parallel.main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: " in line and message in line


@pytest.mark.parametrize(
    "variables, several",
    [
        ({}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1", "TPU_WORKER_ID": "0"}, True),
        ({"KUBERNETES_SERVICE_HOST": "a"}, False),
        ({"KUBERNETES_SERVICE_HOST": "a", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_it_connects_where_there_are_several_processes(variables, several, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TPU_", "KUBERNETES_", "JOB_COMPLETION")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert data_parallel.in_cluster() == several
