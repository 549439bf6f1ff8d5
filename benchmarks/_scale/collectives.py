"""The collectives of a compiled program: those in its text, and those that ran."""

import collections
import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
INSTRUCTION = re.compile(
    rf"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<result>.*?) "
    rf"(?P<kind>{'|'.join(KINDS)})(?:-start)?\(",
    re.MULTILINE,
)
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One instruction by which devices exchange data."""

    name: str
    kind: str  # One of `KINDS`.
    sizes: tuple[int, ...]  # Elements of each array in its result.
    payload: int  # Bytes of all of them, on one device.


def collectives(program) -> list[Collective]:
    """Every collective in a compiled program, in all of its branches."""
    return [
        Collective(found["name"], found["kind"], *_measured(found["result"]))
        for found in INSTRUCTION.finditer(program.as_text())
    ]


def executed(program, run: Callable[[], object], devices: int) -> list[Collective]:
    """The collectives that `run()` goes through in a program, by the profiler's word.

    A branch that is not taken is not in it; what runs twice is in it twice.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
        seen = collections.Counter(
            event.name
            for plane in profile.planes
            for line in plane.lines
            for event in line.events
        )
    found = []
    for one in collectives(program):
        times, rest = divmod(seen[one.name], devices)
        if rest:
            raise RuntimeError(
                f"{one.name} ran {seen[one.name]} times on {devices} devices."
            )
        found += [one] * times
    return found


def payload(found: list[Collective]) -> int:
    """Bytes of several collectives, on one device."""
    return sum(one.payload for one in found)


def _measured(result: str) -> tuple[tuple[int, ...], int]:
    """Elements of each array in an HLO type such as `(f32[], bf16[8,4]{1,0})`."""
    sizes, size_in_bytes = [], 0
    for kind, bits, dimensions in ARRAY.findall(result):
        size = math.prod(int(n) for n in dimensions.split(",") if n)
        sizes.append(size)
        size_in_bytes += size * (1 if kind == "pred" else -(-int(bits) // 8))
    return tuple(sizes), size_in_bytes
