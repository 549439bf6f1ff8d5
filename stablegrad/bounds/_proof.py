"""Whether one step of an optimizer stays finite, told from ranges alone.

    g in [-b, b],  b = 2 max_i s_i ||g_i||;   state and parameters in their ranges

The optimizer's program is walked once with ranges in place of arrays (`Walk`). It holds
if no number on the way can leave the range of its dtype and no operation can give a
nan: no division by a range that holds 0, no root of a negative number. That costs a few
hundred scalar operations, however many parameters there are, in place of a pass over
everything that the step writes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _trees
from ._kinds import Layout, collect
from ._range import Fact, Known, Range, fact_of, join, largest, span
from ._ranges import Ranges, by_kind, stacked
from ._walk import Walk

# The largest element is at most the norm, which float32 sums to within a few percent.
SLACK = 2.0
# Beyond it nothing is shown: XLA may square first what a program scales down first.
LARGEST_GRADIENT = 1e18


class Proof(NamedTuple):
    """What is shown of a step before it is taken."""

    holds: jax.Array  # bool, (): every number that it writes is finite.
    ranges: Ranges  # After it, if it holds.


def prove(
    program, layout: Layout, ranges: Ranges, size, updates, inner_state, params
) -> Proof | None:
    """The proof for `program`, the closed jaxpr of (updates, state, params) -> both.

    `size` bounds the gradient's elements. None if the program does something that no
    rule covers, or works in a dtype whose range is too narrow for any proof.
    """
    known = by_kind(ranges, layout.kinds)
    bound = (SLACK * size).astype(jnp.float32)
    gradient = Range(-bound, bound)
    state_leaves, param_leaves = jax.tree.leaves(inner_state), jax.tree.leaves(params)
    facts: list[Fact] = [fact_of(leaf, gradient) for leaf in jax.tree.leaves(updates)]
    for kinds, leaves in (
        (layout.of_state, state_leaves),
        (layout.of_params, param_leaves),
    ):
        for kind, leaf in zip(kinds, leaves, strict=False):
            facts.append(fact_of(leaf, None if kind is None else known[kind]))
    walk = Walk()
    results = walk.results(program, facts)
    for fact, shape in zip(results, program.out_avals, strict=True):
        narrow = shape.dtype == jnp.float16
        if narrow or (fact is None and jnp.issubdtype(shape.dtype, jnp.inexact)):
            return None
    count = len(results) - len(state_leaves)
    holds: dict[Any, jax.Array] = {
        "walk": walk.holds(),
        "gradient": bound <= LARGEST_GRADIENT,
    }
    found: dict[Any, tuple[int, Range]] = {}
    for step, leaf in zip(results[:count], param_leaves, strict=False):
        before, by = span(fact_of(leaf, known[0])), span(step)
        if not _trees.is_inexact(leaf) or before is None or by is None:
            continue
        key = (id(before), id(by), str(leaf.dtype))
        if key not in found:
            found[key] = (0, _added(before, by))
            holds[key] = _within(found[key][1], leaf.dtype)
    for fact, leaf, kind in zip(
        results[count:], state_leaves, layout.of_state, strict=True
    ):
        if kind is not None and (own := span(fact)) is not None:
            found[kind, id(fact)] = (kind, own)
        elif isinstance(fact, Known) and _trees.is_inexact(leaf):
            # A state may hold an inf on purpose, as a best loss not yet seen.
            holds[id(leaf)] = jnp.all(jnp.isfinite(fact.value) | ~jnp.isfinite(leaf))
    return Proof(
        jnp.all(jnp.stack(list(holds.values()))),
        stacked(collect(list(found.values()), known)),
    )


def _added(before: Range, by: Range) -> Range:
    """Parameters after a step that may be scaled by any factor in [0, 1]."""
    return join(before, Range(before.lo + by.lo, before.hi + by.hi))


def _within(x: Range, dtype) -> jax.Array:
    most = largest(dtype)
    return (x.lo >= -most) & (x.hi <= most)
