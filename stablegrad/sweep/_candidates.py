"""What is compared: optimizers by name, a policy for the rate, clips and guards.

    "adamw"    "momentum + stairs_down"    "adam + clip_by_zscore + cosine + stabilize"

The first word is the optimizer; the others may come in any order, at most one policy
and one guard among them. A clip acts on the gradient, in front of the optimizer.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optax

from .. import _checks
from ..clipping._ema import clip_by_ema
from ..clipping._max import clip_by_max
from ..clipping._norm import clip_by_norm
from ..clipping._param_norm import clip_by_param_norm
from ..clipping._percentile import clip_by_percentile
from ..clipping._second_moment import clip_by_second_moment
from ..clipping._zscore import clip_by_zscore
from ..engine._guard import guard
from ..learning_rate._plateau import reduce_on_plateau
from ..learning_rate._stateful_schedule import explosion_aware_schedule
from ..presets._skip_bad_steps import skip_bad_steps
from ..presets._stabilize import stabilize
from ..responses.trust_region._response import trust_region
from ..thresholds._zscore import zscore
from ._lookahead import lookahead
from ._policies import POLICIES

Transformation = optax.GradientTransformation

# Optax's defaults, where nothing else is said.
OPTIMIZERS: dict[str, Callable[[Any], Transformation]] = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "nesterov": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adagrad": optax.adagrad,
    "adadelta": optax.adadelta,
    "rmsprop": optax.rmsprop,
    "adam": optax.adam,
    "adamw": optax.adamw,
    "nadam": optax.nadam,
    "amsgrad": optax.amsgrad,
    "lion": optax.lion,
    "lamb": optax.lamb,
    # Zhang et al. (2019): five fast steps of Adam, then half the way.
    "lookahead": lambda rate: lookahead(optax.adam(rate), 5, 0.5),
    "muon": optax.contrib.muon,
    "prodigy": optax.contrib.prodigy,
    "schedule_free": lambda rate: optax.contrib.schedule_free_adamw(rate),
}

CLIPS: dict[str, Callable[[], Transformation]] = {
    "clip_by_norm": lambda: clip_by_norm(1.0),
    "clip_by_zscore": clip_by_zscore,
    "clip_by_percentile": clip_by_percentile,
    "clip_by_ema": clip_by_ema,
    "clip_by_param_norm": clip_by_param_norm,
    "clip_by_second_moment": clip_by_second_moment,
    "clip_by_max": clip_by_max,
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.01),
}

GUARDS: dict[str, Callable[[Transformation], Transformation]] = {
    "stabilize": stabilize,
    "skip_bad_steps": skip_bad_steps,
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "trust_region": lambda tx: guard(tx, trust_region()),
    # The trust region among the rest: `stabilize` uses it where it gets `value_fn=`.
    "stabilize_trust_region": stabilize,
}
LOOKS = ("trust_region", "stabilize_trust_region")
PLATEAU, EXPLOSION_AWARE = "plateau", "explosion_aware"
WORDS = {
    "optimizer": tuple(OPTIMIZERS),
    "policy": (*POLICIES, PLATEAU, EXPLOSION_AWARE),
    "clip": tuple(CLIPS),
    "guard": tuple(GUARDS),
}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One line of the comparison; `compare` makes it from a name or a transformation.

    Attributes:
        name: As the table will call it.
        build: `build(learning_rate, steps)` gives the transformation. The rate may be a
            traced scalar, `steps` is a Python number.
        own_rate: Whether `build` ignores the rate: it then runs once a seed.
        extra: What `update` is passed by name: "value", "grad", "value_fn".
        observes: Whether `reduce_on_plateau(metric=None)` in it is to hear of the loss
            at every evaluation.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> held = sg.sweep.Candidate(
        ...     "held",
        ...     lambda rate, steps: sg.guard(optax.sgd(rate), sg.trust_region(every=8)),
        ...     extra=("value", "value_fn"),
        ... )
    """

    name: str
    build: Callable[[Any, int], Transformation]
    own_rate: bool = False
    extra: tuple[str, ...] = ("value",)
    observes: bool = False


def candidate(thing: Any, name: str | None = None) -> Candidate:
    """A candidate from whatever describes one; raises TypeError or ValueError."""
    if isinstance(thing, Candidate):
        return thing if name is None else dataclasses.replace(thing, name=name)
    if isinstance(thing, str):
        return _named(thing, thing if name is None else name)
    if _is_transformation(thing):
        own: Any = thing
        called = "given" if name is None else name
        return Candidate(called, lambda rate, steps: own, own_rate=True)
    if callable(thing):
        make: Callable[[Any], Any] = thing
        called = getattr(thing, "__name__", "given").replace("<lambda>", "given")
        called = called if name is None else name
        return Candidate(called, lambda rate, steps: make(rate))
    raise TypeError(
        "a candidate must be a name such as 'adamw + cosine', a transformation, or a "
        "function of the learning rate that returns one, got "
        f"{_checks.described(thing)}."
    )


def candidates(given: Any) -> list[Candidate]:
    """All of them, from a list, or a dict of names; raises on two of one name."""
    single = isinstance(given, str | Candidate) or _is_transformation(given)
    if single or not isinstance(given, Iterable):
        given = [given]
    pairs = (
        ((str(name), item) for name, item in given.items())
        if isinstance(given, Mapping)
        else ((None, item) for item in given)
    )
    found = [candidate(item, name) for name, item in pairs]
    names = [one.name for one in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"`candidates` must have different names, got {', '.join(twice)} twice: "
            "pass a dict of names."
        )
    if not found:
        raise ValueError("`candidates` must hold at least one, got none.")
    return found


def _is_transformation(thing) -> bool:
    return callable(getattr(thing, "init", None)) and hasattr(thing, "update")


def _named(text: str, name: str) -> Candidate:
    optimizer, *others = (word.strip() for word in text.split("+"))
    _require_word(optimizer, "optimizer", text)
    kinds: dict[str, list[str]] = {"policy": [], "clip": [], "guard": []}
    for word in others:
        kind = next((kind for kind in kinds if word in WORDS[kind]), None)
        if kind is None:
            _require_word(word, "policy", text, *(set(kinds) - {"policy"}))
        else:
            kinds[kind].append(word)
    for kind in ("policy", "guard"):
        if len(kinds[kind]) > 1:
            raise ValueError(
                f"{text!r} must name at most one {kind}, got {', '.join(kinds[kind])}."
            )
    policy, wrap = (next(iter(kinds[kind]), None) for kind in ("policy", "guard"))
    clips = [CLIPS[word] for word in kinds["clip"]]

    def build(rate, steps: int) -> Transformation:
        tx = _optimizer(OPTIMIZERS[optimizer], policy or "static", rate, steps)
        if clips:
            tx = optax.chain(*(clip() for clip in clips), tx)
        return GUARDS[wrap](tx) if wrap else tx

    looks = ("value_fn",) if wrap in LOOKS else ()
    return Candidate(name, build, extra=("value", *looks), observes=policy == PLATEAU)


def _optimizer(make, policy: str, rate, steps: int) -> Transformation:
    """The optimizer under its policy."""
    if policy == PLATEAU:
        return optax.chain(make(rate), reduce_on_plateau(0.5, patience=3, metric=None))
    if policy == EXPLOSION_AWARE:
        aware = explosion_aware_schedule(rate, zscore(4.0, of="value"), confirm_steps=2)
        return optax.inject_hyperparams(lambda learning_rate: make(learning_rate))(
            learning_rate=aware
        )
    return make(POLICIES[policy](rate, steps))


def _require_word(word: str, kind: str, text: str, *others: str) -> None:
    kinds = (kind, *sorted(others))
    if not any(word in WORDS[each] for each in kinds):
        known = "; ".join(f"{each}: {', '.join(WORDS[each])}" for each in kinds)
        raise ValueError(f"{text!r} has the unknown word {word!r}. Known are: {known}.")
