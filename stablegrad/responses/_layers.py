"""Measuring the layers in a step: what `layer_health` keeps and checks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _trees
from .._leaf_sums import leaf_dots
from .._mapped_axes import MappedAxes
from .._norms import Measurement, measure
from .._packing import Packing, on_host
from ..granularity._group_norms import group_norms, sums_by_group
from ..granularity._groups import Granularity, Grouping, group, group_names
from ..thresholds._rarity import RarityState, rarity
from ..thresholds._statistics import where_groups

SIGNALS = ("update_ratio", "grad_norm", "cosine")
MOST_OCTAVES = 1e3  # A signal of zero is no further below its limit.


class LayerNumbers(NamedTuple):
    """State of `layer_health`. One array: a condition copies what it hands on."""

    check_bits: jax.Array  # int32 (columns,): a `LayerHealthState`, floats bit by bit.
    signal_columns: dict[str, None]  # Names of the signals; no arrays.
    # Leaves of the gradient of the step before a check; none without the cosine.
    previous_gradient: list[jax.Array]


class LayerHealthState(NamedTuple):
    """Readings of the last check, and statistics of the update ratios."""

    signals: jax.Array  # float32 (rows,): a row is a signal of a group.
    excess: jax.Array  # float32, (): octaves above what is a warning.
    checks: jax.Array  # int32, (): since `init`.
    worst_leaf: jax.Array  # int32, (): the first leaf of the worst group.
    statistics: RarityState


class LayerWarning(NamedTuple):
    """What a check says; rank 0."""

    warned: Any  # bool
    leaf: Any  # int32: the first leaf of the worst group, -1 if there is no group.


NO_WARNING = LayerWarning(warned=False, leaf=-1)


class LayerInputs(NamedTuple):
    """What can be seen of a step before it is taken."""

    gradient: Any
    measured: Measurement  # Of the gradient.
    update: Callable[[], Any]  # Evaluates the step; called within a condition alone.
    params: Any
    like: Any
    taken: jax.Array  # bool, ()
    axes: MappedAxes


class LayerHealth(NamedTuple):
    """The settings of `layer_health`, and how a step is checked."""

    per: Granularity
    every: int
    share: float | jax.Array
    window: int | jax.Array
    margin: float | jax.Array
    cosine: bool

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the signals."""
        return SIGNALS if self.cosine else SIGNALS[:2]

    def init(self, params) -> LayerNumbers:
        """Return the state before the first step."""
        names = group_names(self.per, params)
        rows = [f"{signal}/{name}" for signal in self.signals for name in names]
        leaves = _trees.inexact_leaves(params) if self.cosine else []
        return LayerNumbers(
            _to_bits(_init_state(len(names), len(self.signals))),
            _trees.layout(tuple(rows)),
            [jnp.zeros_like(leaf) for leaf in leaves],
        )

    def after_step(
        self, layers: LayerNumbers, steps, inputs: LayerInputs
    ) -> tuple[LayerNumbers, LayerWarning]:
        """Return the next state, and whether there is a warning.

        `steps` is the number of steps that were taken before this one.
        """
        groups = group(self.per, inputs.like).count
        if not groups:
            return layers, NO_WARNING
        place = steps % self.every  # The last of `every` steps is checked.
        due = (place == self.every - 1) & inputs.taken
        bits = lax.cond(
            due, lambda: self._checked(layers, inputs), lambda: layers.check_bits
        )
        now = _from_bits(bits, groups, len(self.signals))
        previous = layers.previous_gradient
        if previous:
            leaves = _trees.inexact_leaves(inputs.gradient, inputs.like)
            new = [x.astype(o.dtype) for x, o in zip(leaves, previous, strict=True)]
            kept = inputs.measured.finite & ((steps + 2) % self.every == 0)
            previous = lax.cond(kept, lambda: new, lambda: previous)
        layers = layers._replace(check_bits=bits, previous_gradient=previous)
        return layers, LayerWarning(due & (now.excess > 0), now.worst_leaf)

    def _checked(self, layers: LayerNumbers, inputs: LayerInputs) -> jax.Array:
        """Return the bits after a check."""
        grouping = group(self.per, inputs.like)
        state = _from_bits(layers.check_bits, grouping.count, len(self.signals))
        _, limit, learn = self._rule(grouping.count)
        signals = self._measured(grouping, layers.previous_gradient, inputs)
        ratios = signals[: grouping.count]
        known = jnp.isfinite(ratios) & (ratios > 0)
        limits = limit(state.statistics, None)
        octaves = jnp.log2(jnp.where(known, ratios, 0.0)) - jnp.log2(limits)
        learned = learn(state.statistics, jnp.where(known, ratios, 1.0), None)
        first = [grouping.first.index(i) for i in range(grouping.count)]
        after = LayerHealthState(
            signals=jnp.where(jnp.isfinite(signals), signals, 0.0),
            excess=jnp.maximum(_excess(octaves), -MOST_OCTAVES),
            checks=_trees.increment(state.checks),
            worst_leaf=jnp.asarray(first, jnp.int32)[jnp.argmax(octaves)],
            statistics=where_groups(known, learned, state.statistics),
        )
        return _to_bits(after)

    def _measured(self, grouping: Grouping, previous, inputs: LayerInputs) -> jax.Array:
        """Return all signals, (rows,)."""

        def norms(tree):
            leaves = _trees.inexact_leaves(tree, inputs.like)
            return group_norms(
                grouping, measure(tree, inputs.like, inputs.axes), leaves
            )

        leaves = _trees.inexact_leaves(inputs.gradient, inputs.like)
        grads = group_norms(grouping, inputs.measured, leaves)
        rows = [norms(inputs.update()) / norms(inputs.params), grads]
        if self.cosine:
            dots = inputs.axes.totals(leaf_dots(leaves, previous), leaves)
            earlier = inputs.axes.totals(leaf_dots(previous, previous), leaves)
            lengths = grads * jnp.sqrt(sums_by_group(grouping, earlier))
            rows.append(sums_by_group(grouping, dots) / lengths)
        return jnp.concatenate(rows)

    def _rule(self, groups: int) -> tuple[Callable, Callable, Callable]:
        """Return init, limit and update of `rarity` for all update ratios."""
        family = rarity(self.share, window=self.window, margin=self.margin).family
        assert family is not None
        return family.build(
            tuple(
                jnp.broadcast_to(jnp.asarray(x, jnp.float32), (groups,))
                for x in family.settings
            )
        )


def _excess(octaves: jax.Array) -> jax.Array:
    """Return how far two groups are above their limits, or one above twice its own.

    Octaves; a loss spike to come lengthens the steps of several layers.
    """
    if octaves.size == 1:
        return octaves[0]
    second, worst = jnp.sort(octaves)[-2:]
    return jnp.maximum(second, worst - 1)


def readings(layers: LayerNumbers) -> dict[str, Any]:
    """Return what `metrics` shows of the last check, by name."""
    names = _trees.names_in(layers.signal_columns)
    (bits,) = on_host((layers.check_bits,))
    kinds = len({name.partition("/")[0] for name in names})
    state = _from_bits(bits, len(names) // max(kinds, 1), kinds)
    found = {
        f"layer_health_{name}": state.signals[..., i] for i, name in enumerate(names)
    }
    others = {"excess": state.excess, "checks": state.checks}
    return found | {f"layer_health_{name}": x for name, x in others.items()}


def _init_state(groups: int, kinds: int) -> LayerHealthState:
    return LayerHealthState(
        signals=jnp.zeros((groups * kinds,), jnp.float32),
        excess=jnp.zeros((), jnp.float32),
        checks=jnp.zeros((), jnp.int32),
        worst_leaf=jnp.full((), -1, jnp.int32),
        statistics=rarity().init(groups),
    )


def _to_bits(state: LayerHealthState) -> jax.Array:
    floats, counts = Packing(state).pack(state)
    return jnp.concatenate([lax.bitcast_convert_type(floats, jnp.int32), counts])


def _from_bits(bits: Any, groups: int, kinds: int) -> LayerHealthState:
    packing = Packing(jax.eval_shape(lambda: _init_state(groups, kinds)))
    width = packing.widths[0]
    floats: Any = bits[..., :width]
    if isinstance(bits, np.ndarray):
        floats = np.ascontiguousarray(floats).view(np.float32)
    else:
        floats = lax.bitcast_convert_type(floats, jnp.float32)
    packed: Any = (floats, bits[..., width:])
    return packing.unpack(packed)
