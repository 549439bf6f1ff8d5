"""The steps that are compared: bare AdamW, Optax's pieces, and ours."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import stablegrad as sg

BARE = "adamw"


class Step(NamedTuple):
    """A name, an optimizer, and how it takes a step."""

    name: str
    tx: Any
    # tx, gradients, state, parameters, what `update` is passed -> parameters, state
    take: Callable[..., tuple[Any, Any]]
    looks: bool = False  # Whether `value_fn=` is passed.


def by_update(tx, grads, state, params, **extra):
    """The step as optax users write it."""
    extended = optax.with_extra_args_support(tx)
    updates, state = extended.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


def by_apply(tx, grads, state, params, **extra):
    """The step through `stablegrad.apply`."""
    return sg.apply(tx, grads, state, params, **extra)


def steps() -> list[Step]:
    """Bare AdamW first. Peers have their authors' settings."""
    bare = optax.adamw(1e-3)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), bare)

    def before(piece):
        return optax.chain(piece, bare)

    through_update = {
        BARE: bare,
        "optax.clip_by_global_norm": clipped,
        "optax.adaptive_grad_clip": before(optax.adaptive_grad_clip(0.01)),
        "optax.apply_if_finite": optax.apply_if_finite(bare, 5),
        "optax, clip + apply_if_finite": optax.apply_if_finite(clipped, 5),
        "optax, reduce_on_plateau": optax.chain(
            bare, optax.contrib.reduce_on_plateau()
        ),
        "clip_by_norm": before(sg.clip_by_norm(1.0)),
        "clip_by_percentile": before(sg.clip_by_percentile()),
        "clip_by_zscore": before(sg.clip_by_zscore()),
        "clip_by_ema": before(sg.clip_by_ema()),
        "clip_by_param_norm": before(sg.clip_by_param_norm()),
        "clip_by_second_moment": before(sg.clip_by_second_moment()),
        "clip_update_rms": optax.chain(
            optax.scale_by_adam(), sg.clip_update_rms(), optax.scale(-1e-3)
        ),
        "clip_by_max": before(sg.clip_by_max()),
        "limit_direction": before(sg.limit_direction()),
        "reduce_on_plateau": optax.chain(bare, sg.reduce_on_plateau()),
        "skip_bad_steps, update": sg.skip_bad_steps(bare),
        "guard, update": sg.guard(bare),
        "stabilize, update": sg.stabilize(bare),
    }
    through_apply = {
        "skip_bad_steps, apply": sg.skip_bad_steps(bare),
        "guard, apply": sg.guard(bare),
        "stabilize, apply": sg.stabilize(bare),
        "stabilize per leaf, apply": sg.stabilize(bare, per="leaf"),
    }
    return [
        *(Step(name, tx, by_update) for name, tx in through_update.items()),
        *(Step(name, tx, by_apply) for name, tx in through_apply.items()),
        Step("stabilize, trust region, apply", sg.stabilize(bare), by_apply, True),
    ]
