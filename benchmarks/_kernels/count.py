"""What a compiled program launches, read from its optimized HLO."""

import re
from collections import Counter
from typing import NamedTuple

# Instructions of an entry computation that launch nothing.
FREE = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "parameter",
    "partition-id",
    "tuple",
}
# `  %name = f32[8]{0} fusion(...)`, or a tuple of shapes before the opcode.
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][a-z\-]*)\(", re.M)
CALLED = re.compile(
    r"(?:body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
BY_CALL = re.compile(r" call\(.*to_apply=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
NAME = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{", re.M)


class Kernels(NamedTuple):
    """Counts of one program."""

    launched: int  # By the entry computation, copies included.
    inside: int  # Held by its conditions, loops and calls, each counted once.
    conditions: int  # For each, the host waits for the device.
    copies: int


def count(hlo: str) -> Kernels:
    """Counts the kernels of an optimized HLO module, given as text."""
    computations = {}
    for block in hlo.split("\n\n"):
        named = NAME.search(block)
        if named:
            computations[named[1]] = block
    (entry,) = (x for x in computations.values() if re.search("^ENTRY", x, re.M))
    called = set(_called(entry, computations))
    own = _launched(entry)
    return Kernels(
        own.total(),
        sum(_launched(computations[name]).total() for name in called),
        sum(len(re.findall(r" conditional\(", x)) for x in computations.values()),
        own["copy"],
    )


def _launched(block: str) -> Counter:
    found = Counter(INSTRUCTION.findall(block))
    return Counter({name: n for name, n in found.items() if name not in FREE})


def _called(block: str, computations: dict[str, str]):
    """Names of the computations that conditions, loops and calls run, however deep."""
    for line in block.splitlines():
        names = CALLED.findall(line) + BY_CALL.findall(line)
        for listed in BRANCHES.findall(line):
            names += [name.strip().lstrip("%") for name in listed.split(",")]
        for name in names:
            yield name
            yield from _called(computations[name], computations)
