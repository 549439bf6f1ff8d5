"""LSUV: kernels rescaled on data, layer by layer."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .. import _trees
from .._checks import require, require_count


def lsuv(
    outputs: Callable[[Any], Mapping[str, jax.Array]],
    params: Any,
    *,
    tolerance: float = 0.1,
    max_iterations: int = 10,
) -> Any:
    """Rescale kernels until the output of every layer has unit variance on a batch.

        W_l <- W_l / std(output_l)    until |std - 1| < tolerance, layer after layer

    Layer-sequential unit variance holds for any activation, normalisation and
    connection: it measures what `gain` computes. Start from orthogonal kernels.

    Args:
        outputs: A function of the parameters that runs the network on one batch and
            returns the output of each layer before its activation, in forward order,
            under the dotted name of its kernel in `params`. It is compiled once.
        params: A pytree of parameters.
        tolerance: Largest distance of a standard deviation from 1, > 0.
        max_iterations: Divisions of a kernel at most, >= 1.

    Returns:
        Parameters of the same structure, shapes and dtypes. A kernel is left as it is
        if its layer's output is zero or not finite, if the bias alone spreads by 1 or
        more, or if no division helps, as with a norm before the output. If the
        tolerance is not reached, the kernel is the one that came nearest.

    Raises:
        ValueError: If a concrete argument is out of range, or a name is no leaf.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import stablegrad as sg
        >>> x = jax.random.normal(jax.random.key(0), (64, 16))
        >>> params = {"a": 9 * jnp.eye(16), "b": 0.1 * jnp.eye(16)}
        >>> def outputs(params):
        ...     first = x @ params["a"]
        ...     return {"a": first, "b": jnp.tanh(first) @ params["b"]}
        >>> params = sg.structure.lsuv(outputs, params, tolerance=0.01)
        >>> [round(float(y.std()), 1) for y in outputs(params).values()]
        [1.0, 1.0]

    Reference:
        Mishkin and Matas (2016), https://arxiv.org/abs/1511.06422.
    """
    require("tolerance", tolerance, "> 0", lambda x: x > 0)
    require_count("max_iterations", max_iterations)
    _trees.require_host("lsuv", params)
    order: list[str] = []

    @jax.jit
    def deviations(params) -> list[jax.Array]:
        found = outputs(params)
        order[:] = list(found)  # A jitted function would return a dict sorted by name.
        return [jnp.std(output.astype(jnp.float32)) for output in found.values()]

    measured = deviations(params)
    leaves, structure = jax.tree.flatten(params)
    paths = jax.tree_util.tree_flatten_with_path(_trees.without_variables(params))[0]
    places = {_trees.path_name(path): i for i, (path, _) in enumerate(paths)}
    if unknown := [name for name in order if name not in places]:
        raise ValueError(
            f"`outputs` names {unknown}, which are not leaves of `params`. These are: "
            f"{', '.join(places)}."
        )
    for layer, name in enumerate(order):
        place = places[name]
        tried = [(abs(float(measured[layer]) - 1), leaves[place])]
        for _ in range(max_iterations):
            deviation = float(measured[layer])
            if not 0 < deviation < float("inf") or abs(deviation - 1) < tolerance:
                break
            leaves[place] = _divided(leaves[place], deviation)
            measured = deviations(structure.unflatten(leaves))
            tried.append((abs(float(measured[layer]) - 1), leaves[place]))
        nearest = min(tried, key=lambda row: row[0])
        if nearest[0] < tolerance:
            continue
        leaves[place] = _divided(leaves[place], float("inf"))
        bias = float(deviations(structure.unflatten(leaves))[layer])
        helped = bias < 1 and nearest[0] < 0.9 * tried[0][0]
        leaves[place] = (nearest if helped else tried[0])[1]
        measured = deviations(structure.unflatten(leaves))
    return structure.unflatten(leaves)


def _divided(kernel, divisor: float):
    return jax.tree.map(lambda x: (x / divisor).astype(x.dtype), kernel)
