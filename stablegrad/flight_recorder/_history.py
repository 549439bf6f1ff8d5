"""The last steps of a guard: norms of each leaf, and what was decided."""

import dataclasses
from typing import Any

import numpy as np

from .. import _reading, _trees
from .._events import Events, events
from .._packing import decode
from ..engine._history import SERIES
from ._figure import draw


@dataclasses.dataclass(frozen=True)
class History:
    """The last steps, oldest first; arrays of NumPy."""

    steps: np.ndarray  # int (steps,): counted from 0.
    leaves: tuple[str, ...]  # Names of the leaves.
    leaf_norms: np.ndarray  # float32 (steps, leaves): of the raw gradient; nan and inf.
    loss_value: np.ndarray  # float32 (steps,): nan where no `value=` was passed.
    grad_norm: np.ndarray  # float32 (steps,): of the raw gradient.
    clipped_grad_norm: np.ndarray  # float32 (steps,): after clipping.
    lr_scale: np.ndarray  # float32 (steps,), in [0, 1].
    limits: dict[str, np.ndarray]  # float32 (steps,) each, inf: none yet.
    events: Events

    def figure(self) -> Any:
        """Draw the norms as a heat map, with loss, norm, limits and rate under it.

        Colour is the norm of a leaf over its median in these steps. Norms that are not
        finite are black. Bars above, and behind the curves, are the steps of events.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ImportError: Without Matplotlib, the extra `report`.
        """
        return draw(self)


def history(state: Any) -> History:
    """Return the last steps that a guard built with `record_norms=` remembers.

    Args:
        state: A state that holds one such guard, of one model, as for `metrics`.

    Returns:
        A `History`. Its arrays hold the last steps, oldest first: norms of each leaf,
        loss, norms, `lr_scale` and limits. `figure()` draws them with the events.

    Raises:
        ValueError: If no guard, or more than one, records norms, or if the state is
            stacked over an ensemble.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> tx = sg.guard(optax.sgd(0.1), record_norms=100)
        >>> params = {"w": jnp.zeros(2)}
        >>> grads = {"w": jnp.array([3.0, 4.0])}
        >>> _, state = tx.update(grads, tx.init(params), params)
        >>> sg.history(state).leaves, sg.history(state).leaf_norms.tolist()
        (('w',), [[5.0]])
    """
    _trees.require_host("history", state)
    found = [
        own for own in _reading.guards(state) if not isinstance(own.history, tuple)
    ]
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} guards in this state record norms, and `history` reads one. "
            "Build it with `stabilize(..., record_norms=100)` or "
            "`guard(..., record_norms=100)`; a state from before starts recording by "
            "`stablegrad.migrate`."
        )
    (own,) = found
    rows = np.asarray(own.history)
    if rows.ndim > 2:
        raise ValueError(
            "the state is stacked over an ensemble. Take one member: "
            "`sg.history(jax.tree.map(lambda x: x[0], state))`."
        )
    seen = int(_reading.numbers(own)["guarded_steps"])
    steps = np.arange(max(0, seen - rows.shape[0]), seen)
    rows = decode(rows[steps % rows.shape[0]])
    leaves = _trees.decode_names(own.names)
    limits = _reading.limit_names(own)
    # `adopt` starts at a step before which there are no rows.
    written = ~np.isnan(rows[:, len(leaves) + SERIES.index("lr_scale")])
    steps, rows = steps[written], rows[written]
    series = dict(zip((*SERIES, *limits), rows[:, len(leaves) :].T, strict=True))
    return History(
        steps=steps,
        leaves=leaves,
        leaf_norms=rows[:, : len(leaves)],
        limits={name: series.pop(name) for name in limits},
        events=events(own),
        **series,
    )
