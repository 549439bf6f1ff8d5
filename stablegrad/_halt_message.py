"""The message of `TrainingHalted`: what happened, where, what was tried, what next."""

import numpy as np

from ._events import Event, events
from ._reading import numbers
from ._trees import decode_names
from .engine._step import GuardState
from .responses._reasons import Reason
from .responses.roll_back._machine import Refusal

EVENTS_SHOWN = 5
NEAR = 100  # Steps without an event that separate one trouble from another.

NEXT = {
    Reason.NONFINITE_GRADIENT: "look at the batches of these steps for values that are "
    "not finite, and in the loss for a division, a log or a root of zero on the way to "
    "this leaf; `jax.config.update('jax_debug_nans', True)` finds the operation, if "
    "the compiled step returns its loss; where `optax.MultiSteps` is around the guard, "
    "one bad batch stays in its mean: put it into the guard",
    Reason.NONFINITE_VALUE: "look at the loss: it is not finite, and the gradient is",
    Reason.NONFINITE_UPDATE: "look at the optimizer's settings and its state: it makes "
    "updates that are not finite out of a finite gradient",
    Reason.NONFINITE_SIGNAL: "look at the function given as `of=`: it is not finite",
    Reason.NONFINITE_PARAMETERS: "no batch can help: restore an earlier checkpoint, "
    "and look for what wrote to the parameters besides the optimizer; with "
    "`roll_back()` in the guard and steps taken by `stablegrad.apply` they are "
    "restored at once",
    Reason.GRADIENT_OVERFLOW: "lower the learning rate, or the loss scale, and bound "
    "what grows in the network before this leaf",
}
BROKEN_AGAIN = (
    "parameters that were restored broke again: look for what writes to "
    "them besides the optimizer"
)
NEXT[Reason.NONFINITE_STATE] = NEXT[Reason.NONFINITE_UPDATE]
REFUSED = {
    Refusal.NO_SNAPSHOT: "there is no healthy snapshot to roll back to: restore an "
    "earlier checkpoint",
    Refusal.LIMIT: "the trouble came back each time: leave out the batches of these "
    "steps, lower the learning rate, or restore a checkpoint from before",
    Refusal.NEEDS_APPLY: "a snapshot is held, but no update can bring these parameters "
    "back to it: use `stablegrad.apply`, or `stablegrad.integrations.nnx.update`, "
    "with the guard as the outermost transformation",
}


def halt_message(guard_state: GuardState) -> str:
    """Return the message of one guard, not of an ensemble, as a few lines."""
    seen = {name: np.asarray(x).item() for name, x in numbers(guard_state).items()}
    names = decode_names(guard_state.names)
    listed = events(guard_state)
    # Without a rejected step, the roll-backs alone tell when trouble began.
    episode = _last_episode(listed, 1 if seen["consecutive_skips"] else NEAR)
    reason, refusal = seen["skip_reason"], seen.get("roll_back_refusal", 0)
    advice = REFUSED.get(refusal) or NEXT.get(reason, "look at the steps below")
    restored = not refusal and seen.get("roll_backs", 0) > 0
    if restored and reason == Reason.NONFINITE_PARAMETERS:
        advice = BROKEN_AGAIN
    if "roll_backs" not in seen and reason != Reason.NONFINITE_PARAMETERS:
        advice = _blow_up(listed) + advice
    lines = [
        f"training halted at step {seen['guarded_steps'] - 1}: {_what(seen, episode)}.",
        f"where: {_where(seen, episode, names)}.",
        f"tried: {_tried(seen)}.",
        f"next: {advice}.",
        *(f"  {event}" for event in listed[-EVENTS_SHOWN:]),
    ]
    return "\n".join(lines)


def _last_episode(listed: list[Event], gap: int) -> list[Event]:
    """Return the last events, back to `gap` steps in which nothing happened."""
    episode = listed[-1:]
    for event in reversed(listed[:-1]):
        if event.until + gap < episode[0].step:
            break
        episode.insert(0, event)
    return episode


def _blow_up(listed: list[Event]) -> str:
    """Return what to do where a signal was above its limit before the run halted."""
    first, start = None, listed[-1].step if listed else 0
    for event in reversed(listed):
        if event.until + NEAR < start:
            break
        if event.limit < event.value < np.inf:
            first = event
        start = event.step
    if first is None:
        return ""
    return (
        f"lower the learning rate, or add `roll_back()`: {first.signal} was above its "
        f"limit from step {first.step} on. If that is not the cause, "
    )


def _what(seen: dict, episode: list[Event]) -> str:
    since = f" since step {episode[0].step}" if episode else ""
    rejected = seen["consecutive_skips"]
    if not rejected:
        return f"there is trouble{since} or earlier, and roll_back cannot help"
    reason = Reason(seen["skip_reason"]).name.lower().replace("_", " ")
    steps = "1 step was" if rejected == 1 else f"{rejected} steps in a row were"
    return f"{steps} rejected{since} ({reason}), and changed nothing"


def _where(seen: dict, episode: list[Event], names: tuple[str, ...]) -> str:
    leaf = names[seen["first_bad_leaf"]] if seen["first_bad_leaf"] >= 0 else ""
    if seen["skip_reason"] == Reason.NONFINITE_PARAMETERS:
        return f"parameter {leaf} is not finite"
    if seen["skip_reason"] == Reason.NONFINITE_GRADIENT:
        return f"the parameters are finite; leaf {leaf} of the gradient is not"
    first = leaf or (episode[0].leaf if episode else "")
    return f"leaf {first}" if first else "no leaf stands out"


def _tried(seen: dict) -> str:
    cuts, backs = seen["backed_off_steps"], seen.get("roll_backs", 0)
    skipped = seen["skipped_steps"]
    parts = [f"{skipped} {'step' if skipped == 1 else 'steps'} skipped since the start"]
    if cuts:
        parts.append(f"the learning rate cut {_times(cuts)}, to {seen['lr_scale']:.3g}")
    if backs:
        parts.append(f"rolled back {_times(backs)}")
    return ", ".join(parts)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
