"""The columns: bare, the preset, and its peers at their authors' settings."""

from collections.abc import Callable
from typing import NamedTuple

import optax

import stablegrad as sg

from .task import Wrap

BARE, OURS = "bare", "stabilize"
LOOKING, ROLLING = "stabilize, value_fn", "stabilize, roll_back"
LENIENT = "stabilize, share=0.001"


class Method(NamedTuple):
    """One column."""

    name: str
    wrap: Callable[[int], Wrap]  # Steps of the run -> what to put round an optimizer.
    looks: bool = False  # Whether `value_fn=` is passed.


def before(clip: optax.GradientTransformation) -> Callable[[int], Wrap]:
    """A member of a chain, before the optimizer."""
    return lambda steps: lambda inner: optax.chain(clip, inner)


def rolling_back(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The preset with snapshots."""
    return sg.stabilize(inner, sg.roll_back())


def lenient(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The preset with a tenth of its share, and ten times its window."""
    return sg.stabilize(inner, share=0.001, window=2560)


def autoclip(steps: int) -> Wrap:
    """Its window is the whole history, as published."""
    clip = sg.clip_by_percentile(window=2 * steps, published=True)
    return lambda inner: optax.chain(clip, inner)


def olmo(steps: int) -> Wrap:
    """The trainer's skip rule as published, inside our guard."""
    return lambda inner: sg.skip_bad_steps(inner, "olmo", published=True)


def methods() -> list[Method]:
    """All columns, bare first."""
    return [
        Method(BARE, lambda steps: lambda inner: inner),
        Method(OURS, lambda steps: sg.stabilize),
        Method(LOOKING, lambda steps: sg.stabilize, looks=True),
        Method(ROLLING, lambda steps: rolling_back),
        Method(LENIENT, lambda steps: lenient),
        Method("clip at 1", before(sg.clip_by_norm(1.0))),
        Method("ZClip", before(sg.clip_by_zscore(published=True))),
        Method("AutoClip", autoclip),
        Method("AdaGC", before(sg.clip_by_ema(published=True))),
        Method("OLMo's skip", olmo),
    ]


PEERS = ("clip at 1", "ZClip", "AutoClip", "AdaGC", "OLMo's skip")
