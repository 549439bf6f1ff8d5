"""One run that is killed some times, and judged by one that was left alone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

SCRIPT = Path(__file__).with_name("training.py")
SECONDS = 300  # A start that takes longer has hung.
JITTER = 0.05  # Seconds, at most, from a line to the kill.


class Start(NamedTuple):
    """One process of a run, by the lines that it printed; None: no such line."""

    restored: int | None  # The checkpoint that it went on from; -1: there was none.
    step: int | None  # The last step that it took.
    whole: int | None  # The last checkpoint that it knew to be on the disk.
    is_killed: bool
    amid_write: bool  # Whether half a checkpoint was left behind.


class Trial(NamedTuple):
    """A run that was killed, and started again until it ended."""

    starts: list[Start]
    result: dict  # As `training.py` writes it.


def uninterrupted(folder: Path, steps: int, cache: Path) -> dict:
    """The result of a run that nobody kills; fills the cache of programs."""
    watched(begin(folder, steps, cache), folder)
    return result_in(folder)


def killed(number: int, folder: Path, steps: int, kills: int, cache: Path) -> Trial:
    """A run that is killed at random moments, and then left alone.

    It is killed a few milliseconds after a random line of its standard output.
    """
    rng, starts = np.random.default_rng([number, kills]), []
    while True:
        wanted = None
        if sum(start.is_killed for start in starts) < kills:
            # From the start-up on, and far enough on the average to reach the end.
            wanted = int(rng.integers(0, max(2, 2 * lines_of(steps) // kills)))
        starts.append(watched(begin(folder, steps, cache), folder, wanted, rng))
        if not starts[-1].is_killed:
            return Trial(starts, result_in(folder))


def lines_of(steps: int) -> int:
    """About how many lines a run tells."""
    return 2 + steps + 2 * steps // 3


def begin(folder: Path, steps: int, cache: Path) -> subprocess.Popen:
    """Starts a training process."""
    folder.mkdir(parents=True, exist_ok=True)
    roots = [str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, roots)),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with (folder / "errors.txt").open("a") as errors:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(steps)],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
        )


def watched(process, folder: Path, wanted: int | None = None, rng=None) -> Start:
    """Reads what a process tells; kills it after as many lines as are `wanted`."""
    seen = dict.fromkeys(("restored", "step", "whole"))
    ended, signalled = False, False
    patience = threading.Timer(SECONDS, process.kill)
    patience.start()
    try:
        for count, line in enumerate(process.stdout):
            what, *number = line.split()
            if what in seen and number:
                seen[what] = int(number[0])
            ended |= what == "ends"
            if count == wanted:
                time.sleep(rng.uniform(0, JITTER))
                process.kill()  # SIGKILL: nothing can be caught, nothing flushed.
                signalled = True
    finally:
        patience.cancel()
        process.kill()
        process.stdout.close()
        process.wait()
    # It may have ended before the signal came.
    is_killed = signalled and process.returncode == -signal.SIGKILL
    require(process, is_killed or ended)
    halves = list((folder / "checkpoints").glob("*tmp*"))
    return Start(**seen, is_killed=is_killed, amid_write=is_killed and bool(halves))


def require(process, fine: bool) -> None:
    """RuntimeError, with what the process said, unless it did what it should."""
    if not fine:
        folder = Path(process.args[2])
        said = (folder / "errors.txt").read_text()[-3000:]
        raise RuntimeError(f"training ended with {process.returncode}:\n{said}")


def result_in(folder: Path) -> dict:
    """What a finished run has written."""
    return json.loads((folder / "result.json").read_text())


def unequal(result: dict, reference: dict) -> list[str]:
    """The parts of a result that differ from those of the run that was left alone."""
    return [name for name in reference if result.get(name) != reference[name]]


def lost(trial: Trial) -> list[str]:
    """Starts that went on from before a checkpoint that was known to be whole."""
    whole, found = -1, []
    for start in trial.starts:
        if start.restored is not None and start.restored < whole:
            found.append(f"went on from {start.restored}, {whole} was whole")
        whole = max(whole, -1 if start.whole is None else start.whole)
    return found
