"""The history: norms of the leaves, and what was decided, in the last steps.

One row a step, written in place. It is kept on request alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._packing import encode
from ._record import NO_LOSS

# The last columns of a row, before the limits; the first are the norms of the leaves.
SERIES = ("loss_value", "grad_norm", "clipped_grad_norm", "lr_scale")


def init_history(steps: int, leaves: int, limits: int) -> Any:
    """Return rows for the last `steps` steps, float32; nothing for none.

    Rows that are not yet written hold encoded nan; in the others `lr_scale` is finite.
    """
    columns = leaves + len(SERIES) + limits
    return jnp.full((steps, columns), NO_LOSS) if steps else ()


def after_step(history: Any, step, leaf_norms, numbers: list[jax.Array]) -> Any:
    """Return the history after a step: norms of its leaves, `SERIES`, limits."""
    if isinstance(history, tuple):
        return history
    row = encode(jnp.concatenate([leaf_norms, jnp.stack(numbers)]))
    place = step % history.shape[0]
    return lax.dynamic_update_index_in_dim(history, row, place, 0)
