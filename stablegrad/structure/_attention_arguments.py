"""What Flax hands to the `attention_fn` of its attention layers."""

from typing import Any

import jax
import jax.numpy as jnp


def mask_of(
    query: jax.Array,
    key: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    is_causal: bool = False,
    module: Any = None,
    **others,
) -> jax.Array | None:
    """Return the mask of an attention, or raise ValueError for what is not supported.

    Other arguments, such as `precision`, change no result of `attend`.
    """
    del others
    if module is not None:
        raise ValueError(
            "`Attention` does not sow attention weights: leave out `sow_weights=True`."
        )
    if bias is not None or (dropout_rate and not deterministic):
        raise ValueError(
            "`Attention` supports neither a bias nor dropout of attention weights: "
            "leave them out, or apply dropout to the output."
        )
    if not is_causal:
        return mask
    queries, keys = query.shape[-3], key.shape[-3]
    seen = jnp.tril(jnp.ones((queries, keys), bool))
    return seen if mask is None else mask.astype(bool) & seen
