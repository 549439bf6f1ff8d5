"""Roll back: the response."""

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ..._checks import require, require_count, require_steps
from ...thresholds._base import Threshold, optional
from ...thresholds._limits import nonfinite
from ...thresholds._rarity import rarity
from .._base import Response, check_thresholds
from ._machine import RollBackSettings, RollBackState, init_state

MEMORIES = ("device", "pinned_host")


def roll_back(
    *thresholds: Threshold,
    after: int | jax.Array = 10,
    every: int | jax.Array = 100,
    keep: int = 2,
    hold_steps: int | jax.Array = 20,
    cooldown_steps: int | jax.Array = 100,
    limit: int | jax.Array = 3,
    memory: str = "device",
) -> Response:
    """Return parameters and inner state to a healthy snapshot when trouble lasts.

        bad_t: rejected, above a threshold, or with elements that were kept out
        b_t = b_{t-1} + 1 if bad_t, else 0
        restore if b_t >= after, or if parameters and gradient are not finite,
        or if a snapshot is due and |theta| > 100 k |theta_s| or |m| > 10^5 |m_s|

    What a guard does about trouble, in this order:

    | duration | response | what is lost |
    |---|---|---|
    | one step | `skip` refuses it | the batch |
    | `confirm_steps` risen losses | `back_off` cuts the learning rate | some progress |
    | `after` bad steps | `roll_back` | the steps since the snapshot |
    | again, after `cooldown_steps` | the snapshot before that one | the steps since |
    | `limit` times without a new snapshot | it halts | nothing: a person must look |

    A snapshot is a copy of parameters, inner state and the thresholds' statistics after
    a step. One is taken every `every` steps, if none of the last `hold_steps` steps had
    an event (a bad step, or a cut of the learning rate). It is discarded if an event
    follows within `hold_steps`. The parameters given to `init` are the first one. What
    is not finite is never kept nor restored: if it is time for a snapshot, and
    parameters or moments are not finite, the newest one is restored, so parameters that
    hold an inf on purpose cannot be rolled back. The same is done if parameters are far
    beyond those of the newest snapshot, theta_s, or moments beyond the largest of all
    snapshots, m_s: a finite fault may saturate a network without showing in the loss. k
    = (t / t_s)^2, with the steps t since `init`, allows for a warm-up from parameters
    of zero. Growth that comes back after `limit` roll-backs is kept, as is growth from
    the parameters of `init` or from zero.

    Through `stablegrad.apply`, and through `integrations.nnx.update` for Flax NNX,
    parameters and inner state are restored bit for bit. Through `update` the updates
    are snapshot - parameters, so parameters come back within a rounding of what they
    were; the guard must be the outermost transformation. Where they are not finite, or
    one is so much larger than the snapshot (2,900 times its leaf's largest element in
    float32, 11 times in bfloat16) that this rounding would be felt, the guard halts.
    `raise_if_halted` then says to use `stablegrad.apply`.

    A step that rolls back counts as skipped. Statistics go back to those of the
    snapshot and are learned anew from there, so that an explosion is not usual. The
    schedule goes back with the inner state, a cut of the learning rate stays. Batch
    statistics and what else the caller keeps are not restored.

    Each snapshot takes as much memory as parameters and inner state: with Adam in
    float32, `keep` times 12 bytes a parameter. "pinned_host" keeps them in the host's
    memory, and costs a transfer when one is taken or restored; commit the parameters to
    their device first, by `jax.device_put`, or the second step compiles anew. The
    other steps contain a loop that does not iterate. Like a condition, it makes the
    host of an accelerator wait.

    Args:
        *thresholds: What counts as bad besides rejected steps. None given means a loss
            that is not finite or above `rarity(margin=2.0, patience=after)`, where
            `value=` is passed. A threshold must refuse what lasts for at least `after`
            steps in a row.
        after: Bad steps in a row until a roll-back, >= 1.
        every: Steps from one snapshot to the next, > `hold_steps`.
        keep: Snapshots that are held, >= 2: the newest is on probation for
            `hold_steps`, and each later roll-back goes one further back.
        hold_steps: Steps on either side of a snapshot without an event, >= 1.
        cooldown_steps: Steps after a roll-back before trouble causes another, >= 0.
            Parameters that are not finite are restored at once. A planned rise of the
            loss, such as a new task, looks like trouble: it costs one roll-back and
            is usual when a cooldown of 100 steps ends; with 20 the guard may halt.
        limit: Roll-backs without a new snapshot in between, >= 1. Then the guard halts,
            for as long as the trouble lasts. Restored nan and inf do not count.
        memory: "device" or "pinned_host".

    Returns:
        A response for `guard` or `stabilize`. `metrics` shows `rolled_back`,
        `roll_backs`, `roll_back_refusal`, `snapshots`, and `snapshot_age`, the steps
        since the newest was taken. Under `vmap` every step pays for a roll-back.

    Raises:
        TypeError: If an argument is not a threshold.
        ValueError: If a concrete argument is out of range. When a step is traced, if
            `params` is missing.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> tx = sg.guard(optax.sgd(0.1), sg.skip(), sg.roll_back())
        >>> params = {"w": jnp.ones(2)}
        >>> state = tx.init(params)
        >>> poisoned = {"w": jnp.array([1.0, jnp.nan])}
        >>> params, state = sg.apply(tx, poisoned, state, poisoned, value=1.0)
        >>> params["w"].tolist(), int(sg.metrics(state)["roll_backs"])
        ([1.0, 1.0], 1)

    Reference:
        By hand in Chowdhery et al., PaLM (2022), https://arxiv.org/abs/2204.02311,
        which restarted about 100 steps before a spike.
    """
    check_thresholds("roll_back", thresholds)
    require_steps("after", after)
    if not thresholds:
        rule = rarity(margin=2.0, patience=after, of="value")
        watched = nonfinite(of="value"), rule
        thresholds = tuple(map(optional, watched))
    require_count("keep", keep, least=2)
    require_steps("hold_steps", hold_steps)
    require_steps("every", every)
    concrete = not any(isinstance(x, Tracer) for x in (every, hold_steps))
    if concrete:
        expected = f"> `hold_steps`, which is {hold_steps}"
        require("every", every, expected, lambda x: x > hold_steps)
    require_steps("cooldown_steps", cooldown_steps, least=0)
    require_steps("limit", limit)
    require("memory", memory, f"one of {MEMORIES}", lambda x: x in MEMORIES)
    settings = RollBackSettings(
        after, every, keep, hold_steps, cooldown_steps, limit, memory
    )
    return Response(
        "roll_back",
        thresholds,
        init_state=lambda: init_state(settings),
        halts=lambda state: state.refusal > 0,
        readings=_readings,
        roll_back=settings,
    )


def _readings(state: RollBackState) -> dict[str, jax.Array]:
    held = state.ages >= 0
    newest = jnp.max(jnp.where(held, -state.ages, jnp.iinfo(jnp.int32).min))
    return {
        "rolled_back": state.rolled_back,
        "roll_backs": state.roll_backs,
        "roll_back_refusal": state.refusal,
        "snapshots": jnp.sum(held, dtype=jnp.int32),
        "snapshot_age": jnp.where(jnp.any(held), -newest, -1),
    }
