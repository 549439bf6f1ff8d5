"""From facts about the inputs of a program to facts about its results."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.extend import core as jex

from ._range import Fact, Known, Range, given, join, largest, span
from ._rules import RULES

# Programs within a program, and where each keeps its own.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


class Walk:
    """Facts about every result of a program, each distinct one derived only once.

    Leaves that enter with the same fact share all that follows from it, so an optimizer
    costs as many numbers as it has kinds of state, however many leaves.
    """

    def __init__(self):
        self._seen: dict[tuple, Any] = {}
        self._kept: list[Any] = []  # What `_seen` knows by its address.
        self._within: list[jax.Array] = []

    def holds(self) -> jax.Array:
        """Whether no number on the way can have left the range of its dtype."""
        return jnp.all(jnp.stack([jnp.ones((), bool), *self._within]))

    def results(self, closed, facts: list[Fact]) -> list[Fact]:
        """The facts about what `closed`, a closed jaxpr, returns."""
        jaxpr = closed.jaxpr
        known: dict[Any, Fact] = {}
        constants = [self._constant(value) for value in closed.consts]
        known.update(zip(jaxpr.constvars, constants, strict=True))
        known.update(zip(jaxpr.invars, facts, strict=True))

        def read(atom) -> Fact:
            if isinstance(atom, jex.Literal):
                return self._constant(atom.val)
            return known.get(atom)

        for eqn in jaxpr.eqns:
            derived = self._derive(eqn, [read(atom) for atom in eqn.invars])
            known.update(zip(eqn.outvars, derived, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _constant(self, value) -> Fact:
        return self.once(("constant", *_identity(value)), value, lambda: given(value))

    def _derive(self, eqn, facts: list[Fact]) -> list[Fact]:
        name = eqn.primitive.name
        if name in _CALLS:
            inside = eqn.params[_CALLS[name]]
            if not hasattr(inside, "consts"):
                inside = jex.ClosedJaxpr(inside, ())
            return self.results(inside, facts)
        if name == "cond":
            return self._cond(eqn, facts)
        if not eqn.primitive.multiple_results and all(
            isinstance(fact, Known) for fact in facts
        ):
            value = self._value(eqn, facts)
            if value is not None:
                return [value]
        if name not in RULES or any(fact is None for fact in facts):
            return [None] * len(eqn.outvars)
        key = (name, _shape_of(eqn), *(id(fact) for fact in facts))
        return [self.once(key, (eqn, facts), lambda: self._ruled(eqn, facts))]

    def _value(self, eqn, facts) -> Fact:
        """The value of one element that follows from other such values."""
        (out,) = eqn.outvars
        if out.aval.size != 1 or jnp.issubdtype(out.aval.dtype, jax.dtypes.extended):
            return None
        key = (eqn.primitive.name, str(eqn.params), *(id(fact) for fact in facts))

        def bound() -> Known:
            return Known(
                eqn.primitive.bind(*(fact.value for fact in facts), **eqn.params)
            )

        return self.once(key, (eqn, facts), bound)

    def _ruled(self, eqn, facts) -> Fact:
        ranges = [span(fact) for fact in facts]
        if any(x is None for x in ranges):
            return None
        found = RULES[eqn.primitive.name](eqn, *ranges)
        if found is not None:
            self._require(found, eqn.outvars[0].aval.dtype)
        return found

    def _require(self, found: Range, dtype) -> None:
        if dtype != jnp.bool_:
            most = largest(dtype)
            self._within.append((found.lo >= -most) & (found.hi <= most))

    def _cond(self, eqn, facts: list[Fact]) -> list[Fact]:
        which, *operands = facts
        outcomes = [self.results(one, operands) for one in eqn.params["branches"]]
        joined: list[Fact] = []
        for cases in zip(*outcomes, strict=True):
            if all(isinstance(case, Known) for case in cases) and isinstance(
                which, Known
            ):
                index = which.value.reshape(()).astype(jnp.int32)
                index = jnp.clip(index, 0, len(cases) - 1)
                values = [case.value for case in cases]
                joined.append(Known(lax.select_n(index, *values)))
                continue
            ranges = [x for x in map(span, cases) if x is not None]
            joined.append(join(*ranges) if len(ranges) == len(cases) else None)
        return joined

    def once(self, key: tuple, alive, function) -> Any:
        """What `function` returned at the first call with `key`.

        `alive` is held for as long, where a key has an address in it.
        """
        if key not in self._seen:
            self._kept.append(alive)
            self._seen[key] = function()
        return self._seen[key]


def _identity(value) -> tuple:
    """What tells a constant: its number, or the array itself."""
    if isinstance(value, (bool, int, float)):
        return (type(value), value)
    if not isinstance(value, Tracer) and jnp.size(value) == 1:
        dtype = jax.dtypes.result_type(value)
        if not jnp.issubdtype(dtype, jax.dtypes.extended):
            return (str(dtype), jnp.shape(value), str(value))
    return (id(value),)


def _shape_of(eqn) -> tuple:
    """What a rule may read from an equation, besides its facts."""
    out = eqn.outvars[0].aval
    terms = ()
    if eqn.primitive.name == "reduce_sum":
        terms = (eqn.invars[0].aval.size, out.size)
    same = len(eqn.invars) == 2 and eqn.invars[0] is eqn.invars[1]
    return (str(out.dtype), terms, eqn.params.get("y"), same)
