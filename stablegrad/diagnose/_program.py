"""A traced loss as a flat list of operations that know where their inputs come from.

Nested calls (`jax.jit`, `jax.checkpoint`) are inlined; the body of a `lax.scan` is a
program of its own. Functions with derivatives of their own, branches and loops without
a fixed length stay single operations.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.core import eval_jaxpr
from jax.extend import core

PACKAGE = Path(__file__).parents[1]
INLINED = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")


@dataclasses.dataclass(eq=False)
class Value:
    """One array of a program.

    `leaves` are the parameters that it is made of, if it depends on nothing else.
    """

    aval: Any
    is_data: bool = False  # Whether it depends on the batch.
    leaves: frozenset[int] = frozenset()
    sliced: bool = False  # A slice of stacked parameters, as a scan over layers has.
    counts: bool = False  # Whether only a scan's iteration number enters it.
    literal: Any = None
    maker: "Op | None" = None
    users: "list[Op]" = dataclasses.field(default_factory=list)
    ancestors: int = 0  # Bit set of the `order` of it and of all that it depends on.
    order: int = 0

    @property
    def is_parameter(self) -> bool:
        """Whether it is made of parameters alone."""
        return not self.is_data and bool(self.leaves)

    @property
    def is_constant(self) -> bool:
        """Whether it depends on neither the batch nor the parameters."""
        return not self.is_data and not self.leaves

    def comes_from(self, other: "Value") -> bool:
        """Whether `other`, of the same program, is this value or one it is made of."""
        return other.is_in(self.ancestors)

    def is_in(self, values: int) -> bool:
        """Whether it is in a bit set of values."""
        return bool(values >> self.order & 1)


@dataclasses.dataclass(eq=False)
class Op:
    """One operation; `body` is the program of a scan."""

    eqn: Any
    parent: Any  # The jaxpr that it is in.
    name: str
    ins: list[Value]
    outs: list[Value]
    body: "Program | None" = None

    @functools.cached_property
    def _alone(self):
        """The operation as a jaxpr of its own, and the inputs it takes in order."""
        places = {}
        for atom, value in zip(self.eqn.invars, self.ins, strict=True):
            if not isinstance(atom, core.Literal):
                places.setdefault(atom, value)
        ins, outs = list(places), list(self.eqn.outvars)
        about = self.parent.debug_info._replace(
            arg_names=("",) * len(ins), result_paths=("",) * len(outs)
        )
        jaxpr = self.parent.replace(
            constvars=[],
            invars=ins,
            outvars=outs,
            eqns=[self.eqn],
            effects=self.eqn.effects,
            debug_info=about,
        )
        return jaxpr, list(places.values())

    def run(self, read) -> list[Any]:
        """Evaluate it on `read(value)` of its inputs."""
        jaxpr, values = self._alone
        return eval_jaxpr(jaxpr, (), *map(read, values))

    @property
    def is_derivative(self) -> bool:
        """Whether it is of a gradient inside the loss, as of a physics-informed one."""
        return "transpose(" in str(self.eqn.source_info.name_stack)

    def where(self) -> str:
        """The user's line of code that made it, as `file.py:12`."""
        trace = self.eqn.source_info.traceback
        for frame in trace.frames if trace is not None else ():
            file = Path(frame.file_name)
            library = "site-packages" in file.parts or str(file).startswith("<frozen")
            if not (library or PACKAGE in file.parents):
                return f"{file.name}:{frame.line_num}"
        return ""


@dataclasses.dataclass(eq=False)
class Program:
    """Operations in the order of the trace."""

    ins: list[Value]
    outs: list[Value]
    ops: list[Op] = dataclasses.field(default_factory=list)
    constants: list[tuple[Value, Any]] = dataclasses.field(default_factory=list)
    size: int = 0

    def values(self) -> Iterable[Value]:
        """All inputs, then all results."""
        yield from self.ins
        for op in self.ops:
            yield from op.outs

    def adopt(self, value: Value, parents: Sequence[Value] = ()) -> Value:
        """Give a value its place in the order."""
        value.order = self.size
        value.ancestors = 1 << self.size
        for parent in parents:
            value.ancestors |= parent.ancestors
        self.size += 1
        return value


def trace(loss, params, data) -> Program:
    """Trace `loss(params, data)`; leaf i of `params` is parameter i."""
    closed = jax.make_jaxpr(loss)(params, data)
    count = len(jax.tree.leaves(params))
    ins = [
        Value(var.aval, is_data=i >= count, leaves=frozenset([i] if i < count else []))
        for i, var in enumerate(closed.jaxpr.invars)
    ]
    return _program(closed, ins)


def _program(closed, ins: list[Value]) -> Program:
    program = Program(ins, [])
    for value in ins:
        program.adopt(value)
    program.outs = _inline(program, closed.jaxpr, closed.consts, ins)
    _drop_unused(program)
    return program


def _drop_unused(program: Program) -> None:
    """Leave out the operations that no result depends on, as of what is printed."""
    needed = 0
    for value in program.outs:
        needed |= value.ancestors
    unused = {op for op in program.ops if not any(x.is_in(needed) for x in op.outs)}
    program.ops = [op for op in program.ops if op not in unused]
    for value in (*program.values(), *(value for value, _ in program.constants)):
        value.users = [op for op in value.users if op not in unused]


def _inline(program: Program, jaxpr, consts, ins: Sequence[Value]) -> list[Value]:
    """Append the operations of a jaxpr to a program, and return its results."""
    env = dict(zip(jaxpr.invars, ins, strict=True))
    for var, const in zip(jaxpr.constvars, consts, strict=True):
        env[var] = program.adopt(Value(var.aval))
        program.constants.append((env[var], const))

    def read(atom) -> Value:
        if isinstance(atom, core.Literal):
            return program.adopt(Value(atom.aval, literal=atom.val))
        return env[atom]

    for eqn in jaxpr.eqns:
        if not eqn.outvars:  # `jax.debug.print` and other callbacks.
            continue
        name, arguments = eqn.primitive.name, [read(atom) for atom in eqn.invars]
        if name in INLINED:
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            open_one = inner.jaxpr if hasattr(inner, "jaxpr") else inner
            inner_consts = getattr(inner, "consts", ())
            outs = _inline(program, open_one, inner_consts, arguments)
        else:
            outs = _append(program, eqn, jaxpr, name, arguments)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _append(program: Program, eqn, parent, name: str, ins: list[Value]) -> list[Value]:
    is_data = any(value.is_data for value in ins)
    leaves = frozenset() if is_data else frozenset().union(*(v.leaves for v in ins))
    counts = any(value.counts for value in ins)
    picks = name in ("dynamic_slice", "gather") and ins[0].is_parameter and counts
    sliced = picks or any(value.sliced for value in ins)
    outs = [
        Value(var.aval, is_data, leaves, sliced, counts and not (is_data or leaves))
        for var in eqn.outvars
    ]
    op = Op(eqn, parent, name, ins, outs)
    for value in ins:
        value.users.append(op)
    for value in outs:
        value.maker = op
        program.adopt(value, ins)
    program.ops.append(op)
    if name == "scan":
        op.body = _body(eqn, ins)
    return outs


def _body(eqn, ins: list[Value]) -> Program:
    """Return the program of one iteration.

    What is carried counts as data, unless it is made of constants alone, as a counter.
    """
    fixed, carried = split(eqn)
    counters = {i for i in range(fixed, fixed + carried) if ins[i].is_constant}
    while True:
        inner = []
        for i, (var, outer) in enumerate(zip(_inner(eqn).invars, ins, strict=True)):
            is_carried = fixed <= i < fixed + carried
            is_data = outer.is_data or (is_carried and i not in counters)
            leaves = frozenset() if is_data else outer.leaves
            sliced = (outer.sliced or i >= fixed + carried) and bool(leaves)
            counts = outer.counts or (i >= fixed and not is_data and not leaves)
            inner.append(Value(var.aval, is_data, leaves, sliced, counts))
        program = _program(eqn.params["jaxpr"], inner)
        still = {i for i in counters if program.outs[i - fixed].is_constant}
        if still == counters:
            return program
        counters = still


def split(eqn) -> tuple[int, int]:
    """Return how many inputs of a scan are fixed, and how many after them carried."""
    if "ft_in" in eqn.params:  # JAX 0.11 and later.
        fixed, carried, _ = map(len, eqn.params["ft_in"].unpack())
        return fixed, carried
    return eqn.params["num_consts"], eqn.params["num_carry"]


def _inner(eqn):
    return eqn.params["jaxpr"].jaxpr
