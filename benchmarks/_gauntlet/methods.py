"""The columns: every method as a function that puts it around an optimizer."""

from collections.abc import Callable
from typing import NamedTuple

import optax

import stablegrad as sg

from .blend import blending_skip
from .faults import LONG

Make = Callable[[optax.GradientTransformation], optax.GradientTransformation]
GROUPS = {
    "ours": "stablegrad",
    "optax": "Optax, called as it comes",
    "published": "as published",
}


class Method(NamedTuple):
    """One column."""

    name: str
    group: str
    make: Make
    watches_loss: bool = False
    sorts: bool = False  # Whether its steps are slow, and worth compiling well.


def per_leaf(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The preset, each leaf for itself."""
    return sg.stabilize(inner, per="leaf")


def before(*clips: optax.GradientTransformation) -> Make:
    """Members of a chain, before the optimizer."""
    return lambda inner: optax.chain(*clips, inner)


def skips(rule: str) -> Make:
    """A trainer's skip rule as published, inside our guard."""
    return lambda inner: sg.skip_bad_steps(inner, rule, published=True)


def methods() -> list[Method]:
    """All columns, in order."""
    ours = [
        Method("stabilize", "ours", sg.stabilize, True),
        Method("stabilize per leaf", "ours", per_leaf, True),
        Method("skip_bad_steps", "ours", sg.skip_bad_steps, True),
        Method("clip_by_norm(1)", "ours", before(sg.clip_by_norm(1.0))),
        Method(
            "clip_by_percentile", "ours", before(sg.clip_by_percentile()), sorts=True
        ),
        Method("clip_by_zscore", "ours", before(sg.clip_by_zscore())),
        Method("clip_by_ema", "ours", before(sg.clip_by_ema())),
        Method("clip_by_param_norm", "ours", before(sg.clip_by_param_norm())),
        Method("clip_by_second_moment", "ours", before(sg.clip_by_second_moment())),
        Method("clip_update_rms", "ours", before(sg.clip_update_rms())),
        Method("clip_by_max", "ours", before(sg.clip_by_max())),
        Method("limit_direction", "ours", before(sg.limit_direction())),
    ]
    clip_global = optax.clip_by_global_norm(1.0)
    peers = [
        Method("none", "optax", lambda inner: inner),
        Method("clip_by_global_norm(1)", "optax", before(clip_global)),
        Method(
            "adaptive_grad_clip(0.01)", "optax", before(optax.adaptive_grad_clip(0.01))
        ),
        Method("clip_by_block_rms(1)", "optax", before(optax.clip_by_block_rms(1.0))),
        Method("zero_nans", "optax", before(optax.zero_nans())),
        Method(
            "apply_if_finite(5)",
            "optax",
            lambda inner: optax.apply_if_finite(inner, 5),
        ),
        Method(
            "apply_if_finite + clip",
            "optax",
            lambda inner: optax.apply_if_finite(optax.chain(clip_global, inner), 5),
        ),
    ]
    # No run is longer than this window, so it is the whole history, as published.
    autoclip = sg.clip_by_percentile(window=LONG, published=True)
    variants = {
        "ZClip": before(sg.clip_by_zscore(published=True)),
        "AdaGC": before(sg.clip_by_ema(published=True)),
        "AGC": before(sg.clip_by_param_norm(published=True)),
        "SPAM": before(sg.clip_by_second_moment(published=True)),
        "StableAdamW": lambda i: sg.clip_update_rms(inner=i, published=True),
        "AdaClip": before(sg.clip_by_max(published=True)),
        "AXLearn mean": skips("axlearn_mean"),
        "AXLearn deviation": skips("axlearn_deviation"),
    }
    published = [Method("AutoClip", "published", before(autoclip), sorts=True)]
    published += [Method(name, "published", make) for name, make in variants.items()]
    trainers = {
        "OLMo": skips("olmo"),
        "Levanter": skips("levanter"),
        "MaxText": skips("maxtext"),
        "Levanter, blending": blending_skip,
    }
    published += [Method(n, "published", make, True) for n, make in trainers.items()]
    return [*ours, *peers, *published]
