"""The rules, causes before their symptoms."""

from . import (
    _activations,
    _attention,
    _data,
    _depth,
    _numerics,
    _optimizer,
    _streams,
    _weights,
)
from ._rule import (
    SEVERITIES as SEVERITIES,
    Facts as Facts,
    Rule as Rule,
    Verdict as Verdict,
    judge as judge,
)

RULES: tuple[Rule, ...] = (
    *_data.CAUSES,
    *_numerics.RULES,
    *_weights.RULES,
    *_attention.RULES,
    *_depth.CAUSES,
    *_streams.CAUSES,
    *_activations.RULES,
    *_depth.SYMPTOMS,
    *_streams.SYMPTOMS,
    *_optimizer.RULES,
    *_data.OTHERS,
)
