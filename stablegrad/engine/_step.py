"""One guarded step, from the measurement to the record."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from .. import _checks, _trees
from .._mapped_axes import MappedAxes, warn_of_replicas
from .._norms import Measurement, measure
from .._packing import Packed, Packing
from .._placing import placed_like, replicated
from ..responses._base import Response
from ..responses._layers import NO_WARNING, LayerNumbers
from ..responses._reasons import first_reason, gradient_reason
from ..responses.roll_back._snapshots import Written
from . import _decide, _history, _record
from ._commit import checked_now, commit
from ._decide import StepContext
from ._families import Statistics
from ._inner import Inner
from ._layout import describe
from ._line_search import forget_value
from ._look_ahead import (
    Decision,
    decide_on_update,
    layer_inputs,
    only_layers,
    update_scales,
)
from ._outcome import outcome_of
from ._roll_back import RollBack, trouble_of


class GuardState(NamedTuple):
    """State of `guard`."""

    guarded_inner: Any  # State of the inner transformation.
    numbers: Packed  # Record, responses, statistics: float32 and int32 (columns,).
    columns: dict[str, None]  # Names of the record's further columns; no arrays.
    names: jax.Array  # uint8: names of the leaves given to `init`.
    # Absent from states of the first version; see `migrate`.
    layout: dict[str, None] = {}  # noqa: RUF012  Of `numbers`.
    snapshots: tuple = ()  # Of `roll_back`, newest first.
    layers: LayerNumbers | tuple[()] = ()  # Of `layer_health`; () without one.
    history: Any = ()  # float32 (steps, columns): the last steps; () unless asked for.


def is_guard(node: Any) -> bool:
    """Return whether a node of a state is that of a guard."""
    return isinstance(node, GuardState)


class GuardedStep:
    """The steps of an inner optimizer, guarded by responses."""

    def __init__(
        self,
        inner: optax.GradientTransformation,
        responses: tuple[Response, ...],
        axes: MappedAxes,
        record_norms: int = 0,
    ):
        """Lay out the guard's numbers."""
        self._inner = Inner(inner)
        self._responses = responses
        self._axes = axes
        self._record_norms = record_norms
        self._warned = False
        self._statistics = Statistics(responses)
        self._roll_back = RollBack(responses)
        self._limit_names = _decide.limit_names(responses)
        self._layers = only_layers(responses)

    def init(self, params) -> Any:
        """Return the state before the first step."""
        # Some optimizers start with one buffer in two places, which cannot be donated.
        inner_state = _trees.distinct(_trees.strongly_typed(self._inner.init(params)))
        numbers = self._init_numbers(params)
        names, limits = _trees.leaf_names(params), self._limit_names
        state = GuardState(
            inner_state,
            Packing(numbers).pack(numbers),
            _record.column_names(self._extras(None, numbers[1])),
            _trees.encode_names(names),
            describe(self._responses, self._statistics, params),
            (),
            self._layers.init(params) if self._layers else (),
            _history.init_history(self._record_norms, len(names), len(limits)),
        )
        state = placed_like(state, params)
        statistics = placed_like(numbers[2], params)
        kept = self._roll_back.init(params, state.guarded_inner, statistics)
        state = state._replace(snapshots=kept)
        if type(params).__name__ == "_ParamsPlaceholder":
            # `optax.tree.map_params` compares this state with one of real parameters.
            # One array stands for subtrees whose keys depend on the number of leaves.
            one = state.names
            state = state._replace(layout=one, layers=one if self._layers else ())
        return state

    def check_leaves(self, state: GuardState, like) -> None:
        """Raise ValueError unless a state was made for a tree like this one."""
        _checks.require_same_leaves(state.names, _trees.leaf_names(like))

    def update(self, updates, state, params=None, **extra) -> tuple[Any, GuardState]:
        """Return the updates to add to the parameters, and the next state."""
        return self._step(updates, state, params, extra, writes_params=False)

    def apply(self, updates, state, params=None, **extra) -> tuple[Any, GuardState]:
        """Return the parameters after the step, and the next state."""
        return self._step(updates, state, params, extra, writes_params=True)

    def _init_numbers(self, params) -> tuple[_record.Record, tuple, tuple]:
        """Return record, responses' states and statistics before the first step."""
        states = tuple(response.init_state() for response in self._responses)
        record = _record.init_record(self._extras(None, states))
        return record, states, self._statistics.init(params)

    def _extras(self, decision: Decision | None, states) -> dict[str, jax.Array]:
        """Return the record's further columns: limits, and readings of responses."""
        limits, norms = [*self._limit_names], []
        if _decide.watches_update(self._responses):
            norms = ["raw_update_norm", "update_norm"]
        numbers: list[Any] = [_record.NO_LIMIT] * len(limits)
        numbers += [_record.NO_LOSS] * len(norms)
        if decision is not None:
            flat = [judged.limit for own in decision.judgements for judged in own]
            numbers = [jnp.min(limit, initial=jnp.inf) for limit in flat]
            numbers += decision.update_norms or ()
        named = dict(zip([*limits, *norms], numbers, strict=True))
        for response, state in zip(self._responses, states, strict=True):
            named |= response.readings(state)
        return named

    def _step(
        self, updates, state: GuardState, params, extra, writes_params: bool
    ) -> tuple[Any, GuardState]:
        if not self._axes.names:
            warn_of_replicas("`value=`", extra.get("value"), updates)
        self._warn_once(extra)
        like = updates if params is None else params
        updates = _trees.floating_like(updates, like)
        own_layout = describe(self._responses, self._statistics, like)
        _checks.require_same_layout(state.layout, own_layout)
        step = StepContext(
            updates,
            params,
            like,
            extra,
            self._axes,
            inner_update=self._inner.given(extra),
            inner_state=state.guarded_inner,
        )
        packing = Packing(jax.eval_shape(lambda: self._init_numbers(like)))
        record, states, statistics = packing.unpack(state.numbers)
        before, last = _record.totals_of(record), _record.last_step_of(record)
        gradient = measure(updates, like, self._axes)
        decision = self._decide(step, states, statistics, gradient)
        verdict = decision.verdict
        layers, warning = state.layers, NO_WARNING
        if self._layers and layers:
            inputs = layer_inputs(step, gradient, decision)
            # In step with an inner `MultiSteps`, which a skipped step does not advance.
            taken = before.guarded_steps - before.skipped_steps
            layers, warning = self._layers.after_step(layers, taken, inputs)
        scale = update_scales(decision)
        done = commit(
            step,
            (verdict.gradient_scales, scale),
            verdict.reason,
            checked_now(gradient, before.guarded_steps, last.kept_out_elements),
            writes_params,
        )
        trouble = trouble_of(step, done.reason, done.kept_out)
        changed = (scale.smallest() < 1) | (trouble.kept_out > 0)
        changed &= trouble.reason == 0
        cut = verdict.lr_scale < last.back_off_scale
        rolled = self._roll_back.after_commit(
            Written(
                done.result,
                forget_value(done.inner_state, changed),
                self._statistics.learn(statistics, decision.judgements),
            ),
            state.snapshots,
            step,
            trouble,
            cut,
            decision.ahead.state,
            decision.judgements,
            writes_params,
        )
        trouble = rolled.trouble
        settled = tuple(
            response.settle(own, judged, trouble.reason)
            for response, own, judged in zip(
                self._responses, rolled.states, decision.judgements, strict=True
            )
        )
        decision = decision._replace(verdict=verdict._replace(reason=trouble.reason))
        outcome = outcome_of(
            self._responses,
            step,
            gradient,
            decision,
            (states, settled),
            trouble,
            warning,
            self._extras(decision, settled),
            backed_off=cut,
            rolled_back=rolled.rolled_back,
        )
        written = rolled.written
        numbers = _record.after_step(record, outcome), settled, written.statistics
        numbers = replicated(packing.pack(numbers))
        return written.result, GuardState(
            written.guarded_inner,
            # A derivative of later steps goes through the optimizer's state alone.
            lax.stop_gradient(numbers),
            state.columns,
            state.names,
            state.layout,
            rolled.snapshots,
            layers,
            _history.after_step(
                state.history,
                before.guarded_steps,
                gradient.leaf_norms,
                [getattr(outcome.step, name) for name in _history.SERIES]
                + [outcome.extras[name] for name in self._limit_names],
            ),
        )

    def _decide(
        self, step: StepContext, states, statistics, gradient: Measurement
    ) -> Decision:
        """Return the decision of all responses; a bad gradient is always rejected."""
        scopes, limits = _decide.limits_of(
            self._responses, self._statistics, statistics, step
        )
        judgements = _decide.judge_incoming(
            self._responses, scopes, limits, gradient, step
        )
        verdict = _decide.verdict_on(self._responses, states, judgements)
        bad = gradient_reason(gradient.norm)
        verdict = verdict._replace(reason=first_reason((bad, verdict.reason)))
        return decide_on_update(self._responses, step, states, judgements, verdict)

    def _warn_once(self, extra: dict[str, Any]) -> None:
        """Warn once if a step brings no loss that could be judged, or a wrong name."""
        said = None if self._warned else _decide.overlooked(self._responses, extra)
        if said:
            self._warned = True
            warnings.warn(said, stacklevel=2)
