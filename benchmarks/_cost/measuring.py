"""One step after the other, each in turn with the bare one, and what XLA says of it."""

import re
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .problems import Problem
from .steps import Step

WARM_UP = 10  # Rounds that do not count: a guard looks closer at the first steps.
IN_A_ROW = 50  # Steps in a round on an accelerator, which the host runs ahead of.
TRANSFERS = re.compile(r"\b(infeed|outfeed|send|recv)\(|callback|MoveToHost")


class Program(NamedTuple):
    """A compiled step."""

    run: Callable[..., tuple[Any, Any]]  # parameters, state, data -> parameters, state
    carry: tuple[Any, Any]  # Parameters and state, to donate.
    compile_s: float
    bytes_moved: float  # By XLA's own count.
    temporary: int  # Bytes.
    state: int  # Bytes.
    transfers: int  # Instructions by which the host is asked or told.
    traces: Callable[[Any], int]  # How often Python ran, given what a step returned.


class Cost(NamedTuple):
    """One row of the table."""

    name: str
    ratio: float  # Median of the time over the bare step's of the same round.
    spread: tuple[float, float]  # Its quartiles.
    bytes_ratio: float  # Bytes moved over the floor.
    temporary: int
    extra_state: int
    compile_ratio: float
    traces: int
    transfers: int


def size_of(tree) -> int:
    """Bytes of all arrays."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def floor(problem: Problem) -> int:
    """What AdamW alone must move: four arrays to read, and three of them to write."""
    return 7 * size_of(problem.params)


def compiled(step: Step, problem: Problem) -> Program:
    """Compiles a step that donates what it replaces."""
    calls = []

    def whole(params, state, data):
        calls.append(None)
        loss, grads = problem.gradients(params, data)
        extra = {"value": loss}
        if step.looks:
            extra["value_fn"] = problem.loss_of(params, data)
        return step.take(step.tx, grads, state, params, **extra)

    params = jax.tree.map(jnp.copy, problem.params)
    state = step.tx.init(params)
    jitted = jax.jit(whole, donate_argnums=(0, 1))
    started = time.perf_counter()
    program = jitted.lower(params, state, problem.data).compile()
    seconds = time.perf_counter() - started

    def traces(carry) -> int:
        jitted.lower(*carry, problem.data)
        return len(calls)

    return Program(
        program,
        (params, state),
        seconds,
        program.cost_analysis()["bytes accessed"],
        program.memory_analysis().temp_size_in_bytes,
        size_of(state),
        len(TRANSFERS.findall(program.as_text())),
        traces,
    )


def in_turn(
    run: list[Callable[[], None]], rounds: int, warm_up: int = WARM_UP
) -> list[list[float]]:
    """Seconds of each, one after the other in every round."""
    times: list[list[float]] = [[] for _ in run]
    for _ in range(rounds + warm_up):
        for own, one in zip(times, run, strict=True):
            started = time.perf_counter()
            one()
            own.append(time.perf_counter() - started)
    return [own[warm_up:] for own in times]


class Stepper:
    """Takes a compiled step again and again, each from what the last one gave."""

    def __init__(self, program: Program, data):
        self.program, self.data, self.carry = program, data, program.carry
        self.steps = 1 if jax.default_backend() == "cpu" else IN_A_ROW

    def __call__(self) -> None:
        for _ in range(self.steps):
            self.carry = self.program.run(*self.carry, self.data)
        jax.block_until_ready(self.carry)


def compare(step: Step, bare: Stepper, problem: Problem, rounds: int) -> Cost:
    """One row: `step` in turn with the bare one."""
    own = Stepper(compiled(step, problem), problem.data)
    times = in_turn([bare, own], rounds)
    return Cost(
        step.name,
        *ratios(times),
        own.program.bytes_moved / floor(problem),
        own.program.temporary,
        own.program.state - bare.program.state,
        own.program.compile_s / bare.program.compile_s,
        own.program.traces(own.carry),
        own.program.transfers,
    )


def ratios(times: list[list[float]]) -> tuple[float, tuple[float, float]]:
    """Median and quartiles of the second over the first, round by round."""
    found = sorted(mine / bare for bare, mine in zip(*times, strict=True))
    if len(found) == 1:
        return found[0], (found[0], found[0])
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return middle, (low, high)
