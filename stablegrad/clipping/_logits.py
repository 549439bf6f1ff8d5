"""Clip the weights of queries and keys whose attention logits are too large."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks, _missing, _trees
from .._checks import require
from .._compiled import compiled
from .._packing import Packing
from .._placing import placed_like
from ._base import ClippingState
from ._readings import init_readings, next_readings

NAME = "clip_logits"
POWERS = {"query": 0.5, "key": 0.5}
NORMS = ("query_ln", "key_ln")  # Of Flax's `normalize_qk=True`.


def clip_logits(
    max_logit: float | jax.Array = 100.0,
    *,
    powers: Mapping[str, float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Shrink queries and keys after a step in which their logits were too large.

        gamma_h = min(1, max_logit / S_h)
        theta + u <- gamma_h^p (theta + u)    for the queries and keys of head h

    with S_h the largest logit of the step's forward pass. It is the last member of a
    chain, as it changes the parameters that the update leads to. Kernels and biases
    shrink alike, so that the logits shrink by gamma.

    Args:
        max_logit: The largest logit that is left as it is, > 0. 100 as published.
        powers: The power p of gamma by the name of a module within an attention, >= 0:
            0.5 each for "query" and "key", as Flax calls them. With a key that several
            heads share, {"query": 1.0}. With Flax's `normalize_qk=True` the gains
            shrink, {"query_ln": 0.5, "key_ln": 0.5}, by one S for all heads.

    Returns:
        A transformation for `optax.chain`, whose update needs `params` and
        `largest_logits=`: a dict from the dotted name of each attention, such as
        "layers.0.attention", to its S, float32 of shape (heads,) or (layers, heads) for
        stacked layers, or () for all heads. The heads are the last axis but one of a
        leaf, as in Flax. S that is not finite shrinks nothing. `metrics` tells the
        largest S as `clip_logits_raw_norm`, and after the clip as
        `clip_logits_clipped_norm`.

    Raises:
        ValueError: If a concrete argument is out of range. When a step is traced, if
            `params` or `largest_logits=` is missing, if a name has no leaves, if their
            shapes do not fit, or if a norm of queries and keys is not in `powers`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> tx = optax.chain(optax.sgd(0.1), sg.structure.clip_logits(100.0))
        >>> kernel = jnp.ones((2, 3, 4))  # inputs, heads, depth
        >>> params = {"query": {"kernel": kernel}, "key": {"kernel": kernel}}
        >>> params = {"attention": params}
        >>> largest = {"attention": jnp.array([50.0, 100.0, 400.0])}
        >>> zeros = optax.tree.zeros_like(params)
        >>> updates, state = tx.update(
        ...     zeros, tx.init(params), params, largest_logits=largest
        ... )
        >>> after = optax.apply_updates(params, updates)
        >>> after["attention"]["query"]["kernel"][0, :, 0].tolist()
        [1.0, 1.0, 0.5]

    Reference:
        Kimi K2 (2025), https://arxiv.org/abs/2507.20534: QK-clip of MuonClip.
    """
    require("max_logit", max_logit, "> 0", lambda x: 0 < x < float("inf"))
    powers = POWERS if powers is None else powers
    is_mapping = lambda x: isinstance(x, Mapping)
    require("powers", powers, "a dict from module to power", is_mapping)
    powers, finite = dict(powers), lambda x: 0 <= x < float("inf")
    for module, power in powers.items():
        require(f"powers[{module!r}]", power, "finite and >= 0", finite)
    packing = Packing(jax.eval_shape(init_readings))

    def init_fn(params):
        state = ClippingState({NAME: packing.pack(init_readings())})
        return placed_like(state, params)

    def update_fn(updates, state, params=None, *, largest_logits=None, **extra):
        del extra
        if params is None:
            raise _missing.missing_params(f"`{NAME}`")
        if not isinstance(largest_logits, Mapping) or not largest_logits:
            raise ValueError(
                f"`{NAME}` needs the largest logits of the step. Pass them:\n"
                "  tx.update(grads, state, params, largest_logits={name: logits})\n"
                "`sg.structure.attend` returns them."
            )
        largest = {
            name: jnp.asarray(each, jnp.float32)
            for name, each in largest_logits.items()
        }
        gammas = {
            # An S that is not finite says nothing about the size of the weights.
            name: jnp.where(
                jnp.isfinite(each) & (each > max_logit),
                jnp.asarray(max_logit, jnp.float32) / each,
                1.0,
            )
            for name, each in largest.items()
        }
        clipped = _clipped(updates, params, gammas, powers)
        flat = [jnp.ravel(each) for each in largest.values()]
        known = [jnp.where(jnp.isfinite(each), each, 0.0) for each in flat]
        top = jnp.max(jnp.concatenate(known), initial=0.0)
        each = jnp.concatenate([*map(jnp.ravel, gammas.values())])
        scale = jnp.min(each, initial=1.0)
        finite = jnp.all(jnp.isfinite(jnp.concatenate(flat)))
        numbers = (top, jnp.minimum(top, max_logit), max_logit, scale)
        before = packing.unpack(state.clip_numbers[NAME])
        readings = next_readings(before, numbers, finite, scale < 1)
        return clipped, ClippingState({NAME: packing.pack(readings)})

    check = lambda state: _checks.require_state(NAME, ClippingState, state)
    return optax.GradientTransformationExtraArgs(init_fn, compiled(update_fn, check))


def _clipped(updates, params, gammas: dict[str, jax.Array], powers) -> Any:
    """Return the updates that lead to the shrunk parameters."""
    rows = jax.tree_util.tree_flatten_with_path(updates)
    matched, leaves = set(), []
    for (path, update), param in zip(rows[0], jax.tree.leaves(params), strict=True):
        name = _trees.path_name(path)
        place = _place(name, gammas, powers)
        if place is None:
            leaves.append(update)
            continue
        attention, power = place
        matched.add(attention)
        wide = np.promote_types(np.float32, param.dtype)
        gamma = _beside(gammas[attention], param, name).astype(wide) ** power
        after = gamma * (param.astype(wide) + update.astype(wide)) - param.astype(wide)
        leaves.append(jnp.where(gamma < 1, after.astype(update.dtype), update))
    if absent := sorted(gammas.keys() - matched):
        raise ValueError(
            f"`largest_logits` names {absent}, below which no leaf belongs to one of "
            f"{sorted(powers)}. The leaves are: "
            f"{', '.join(_trees.path_name(path) for path, _ in rows[0])}."
        )
    return rows[1].unflatten(leaves)


def _place(name: str, gammas, powers) -> tuple[str, float] | None:
    """Return the attention that a leaf belongs to, and its power of gamma."""
    for attention in sorted(gammas, key=len, reverse=True):
        inside = name.removeprefix(f"{attention}.") if attention else name
        if inside == name and attention:
            continue
        for part in inside.split("."):
            if part in powers:
                return attention, powers[part]
            if part in NORMS:
                raise ValueError(
                    f"{name}: behind a norm of queries and keys, their logits do not "
                    "depend on the size of kernels. Shrink the gains instead: "
                    f"powers={dict.fromkeys(NORMS, 0.5)}, with one largest logit, of "
                    "shape (), for all heads."
                )
    return None


def _beside(gamma: jax.Array, leaf: jax.Array, name: str) -> jax.Array:
    """Return gamma in a shape that broadcasts to a leaf (*layers, ..., heads, d)."""
    if not gamma.ndim:
        return gamma.reshape((1,) * leaf.ndim)
    *layers, heads = gamma.shape
    shape = (*layers, *[1] * (leaf.ndim - len(layers) - 2), heads, 1)
    fits = all(n in (1, m) for n, m in zip(shape, leaf.shape, strict=False))
    if len(shape) != leaf.ndim or not fits:
        raise ValueError(
            f"`largest_logits` has shape {gamma.shape}, which does not fit the leaf "
            f"{name} of shape {leaf.shape}: (heads,) must be its last axis but one, "
            "and layers of (layers, heads) its first."
        )
    return gamma.reshape(shape)
