"""Halt: mark a run as stuck, so that the host can stop it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._checks import require_steps
from .._trees import count_if
from ._base import Response
from ._reasons import is_nonfinite


class HaltState(NamedTuple):
    nonfinite_run: jax.Array  # int32: non-finite steps since one was last taken.
    patience_over: jax.Array  # bool: whether that is `after` or more.


def halt(after: int | jax.Array = 20) -> Response:
    """Raise the `halted` flag after too many non-finite steps with none taken.

        h_t = 0 if the step was taken, h_{t-1} + 1 if it was not finite, else h_{t-1}
        halted_t = h_t >= after

    Non-finite steps are never applied. `raise_if_halted` turns the flag into an
    exception on the host, and one step that is taken clears it. Finite outliers do not
    halt.

    Args:
        after: Non-finite steps since the last taken one, >= 1.

    Returns:
        A response for `guard`.

    Raises:
        ValueError: If a concrete `after` is below 1.

    Example:
        >>> import optax
        >>> import stablegrad as sg
        >>> tx = sg.guard(optax.sgd(0.1), sg.skip(sg.nonfinite()), sg.halt(after=5))
    """
    require_steps("after", after)

    def init() -> HaltState:
        return HaltState(jnp.zeros((), jnp.int32), jnp.zeros((), bool))

    def settle(state: HaltState, judgements, reason) -> HaltState:
        longer = count_if(is_nonfinite(reason), state.nonfinite_run)
        run = jnp.where(reason == 0, 0, longer)
        return HaltState(run, run >= after)

    halts = lambda state: state.patience_over
    readings = lambda state: {"nonfinite_run": state.nonfinite_run}
    return Response("halt", (), init, settle=settle, halts=halts, readings=readings)
