"""What every candidate trains: the loss, where it starts, and what it is shown."""

import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from ..curvature._loss import outline

AT_ONCE = 1000  # Examples of the validation set in one call.


class Problem(NamedTuple):
    """What every candidate trains."""

    init: Callable[[jax.Array], Any]  # key -> parameters
    step: Callable | None  # The user's, or None for the one made of `loss`.
    loss: Callable | None  # (params, batch) -> scalar
    batch: Callable[[Any, Any], Any]  # (data, what a step draws) -> batch
    evaluate: Callable  # (params, batch) -> loss, or dict of scalars
    hidden: Callable | None  # (params, batch) -> activations
    data: Any  # Arrays, on the device.
    # Of the validation set: how many examples, and their arrays; none without a set.
    slices: list[tuple[int, Any]]


def key_of(seed) -> jax.Array:
    """A seed's key: with other generators, a key gives other numbers under `vmap`."""
    return jax.random.key(seed, impl="threefry2x32")


def problem_of(function, params, data, validation, evaluate, hidden) -> Problem:
    """What all candidates train; checks that the parts fit together."""
    takes = _arguments(function)
    if takes == 4 and evaluate is None and validation is not None:
        raise ValueError(
            "`validation` with a training step needs `evaluate=`, a function of "
            "(params, batch)."
        )
    if hidden is not None and validation is None:
        raise ValueError("`hidden` needs `validation=`, the examples to look at.")
    nnx: Any = sys.modules.get("flax.nnx")  # Who holds a module has imported it.
    if nnx is not None and isinstance(params, nnx.Module):
        raise TypeError(
            "`params` must be a pytree or a function of a key, got a Flax NNX module. "
            "Split it:\n"
            "  graphdef, params, rest = nnx.split(model, nnx.Param, ...)\n"
            "  loss_fn = lambda p, batch: loss(nnx.merge(graphdef, p, rest, copy=True),"
            " batch)"
        )
    slices = [] if validation is None else _slices(_arrays("validation", validation))
    problem = Problem(
        init=params if _is_function(params) else lambda key: params,
        step=function if takes == 4 else None,
        loss=function if takes == 2 else None,
        batch=(lambda _, key: data(key)) if _is_function(data) else _drawn,
        evaluate=evaluate or function,
        hidden=hidden,
        data=None if _is_function(data) else _arrays("data", data),
        slices=slices,
    )
    _check_scalars(problem)
    return problem


def _check_scalars(problem: Problem) -> None:
    """Raises ValueError unless the evaluation gives a loss, before anything runs."""
    if not problem.slices:
        return
    params = jax.eval_shape(problem.init, key_of(0))
    found = jax.eval_shape(problem.evaluate, params, problem.slices[0][1])
    found = found if isinstance(found, dict) else {"loss": found}
    named = {name: getattr(x, "shape", None) for name, x in found.items()}
    if named.get("loss") != () or any(shape != () for shape in named.values()):
        raise ValueError(
            '`evaluate` must return a scalar loss, or a dict of scalars with "loss", '
            f"got {outline(found)}."
        )


def _is_function(thing) -> bool:
    """Whether it is called for what is needed; a model that is a pytree is not."""
    return callable(thing) and jax.tree.structure(thing) == jax.tree.structure(0)


def _arguments(function) -> int:
    """Two or four: a loss or a training step."""
    try:
        known = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        known = ()
    positional = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    needed = [p for p in known if p.kind in positional and p.default is p.empty]
    if len(needed) not in (2, 4):
        raise TypeError(
            "`loss_fn` must be a loss of (params, batch), or a training step of "
            f"(tx, params, opt_state, batch); this one needs {len(needed)} arguments."
        )
    return len(needed)


def _arrays(name: str, tree: Any) -> Any:
    """The tree on the device, all leaves of one length."""
    tree = jax.tree.map(jnp.asarray, tree)
    lengths = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(tree)}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(
            f"`{name}` must hold arrays with examples along the first axis, as many in "
            f"each, got {outline(tree)}."
        )
    return tree


def _slices(tree) -> list[tuple[int, Any]]:
    size = jax.tree.leaves(tree)[0].shape[0]
    cuts = [(i, min(i + AT_ONCE, size)) for i in range(0, size, AT_ONCE)]
    cut = lambda first, last: jax.tree.map(lambda x: x[first:last], tree)
    return [(last - first, cut(first, last)) for first, last in cuts]


def _drawn(data, rows):
    return jax.tree.map(lambda x: x[rows], data)


def draws_of(data, batch_size: int | None) -> Callable[[int, int, int], Any]:
    """What steps draw: rows of arrays, or keys for a function."""
    if _is_function(data):
        if batch_size is not None:
            raise ValueError("`batch_size` goes with `data` of arrays, not a function.")

        def keys(seed: int, first: int, number: int):
            key = jax.random.fold_in(key_of(seed), 1)
            fold = lambda step: jax.random.fold_in(key, step)
            return jax.vmap(fold)(first + jnp.arange(number, dtype=jnp.uint32))

        return keys
    size = jax.tree.leaves(data)[0].shape[0]
    _checks.require_count("batch_size", batch_size)
    assert batch_size is not None
    if batch_size > size:
        raise ValueError(f"`batch_size` must be <= {size} examples, got {batch_size}.")
    whole = size // batch_size

    def rows(seed: int, first: int, number: int):
        epochs = range(first // whole, (first + number - 1) // whole + 1)
        orders = {
            epoch: np.random.default_rng((seed, epoch)).permutation(size)
            for epoch in epochs
        }
        chosen = []
        for step in range(first, first + number):
            epoch, part = divmod(step, whole)
            chosen.append(orders[epoch][part * batch_size : (part + 1) * batch_size])
        return jnp.asarray(np.stack(chosen), jnp.int32)

    return rows
