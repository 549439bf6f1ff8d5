"""The experiment that all candidates share: problem, data and training budget."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .._trees import is_inexact
from ..curvature._loss import holds_nnx_module, outline

SLICE = 1000  # Validation examples that are evaluated in one call.
ARRAYS = (jax.Array, np.ndarray, np.generic)


class Experiment(NamedTuple):
    init: Callable[[jax.Array], Any]  # key -> parameters
    loss: Any  # (params, batch) -> scalar; None with a training step.
    step: Callable | None  # The user's training step, if any.
    draw: Callable[[int, int, int], Any]  # See `sampler`.
    batch: Callable[[Any, Any], Any]  # (data, draw of the step) -> batch
    data: Any  # Arrays, or None if batches are made from keys.
    evaluate: Callable  # (params, batch) -> loss, or dict of scalars
    hidden: Callable | None  # (params, batch) -> activations
    slices: list[tuple[int, Any]]  # Validation set: sizes and arrays of its slices.
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    interval: int  # Steps between two evaluations.
    patience: int | None
    at_once: int | None

    @property
    def evaluations(self) -> np.ndarray:
        """Numbers of steps before each evaluation, from 0 to `steps`."""
        return np.unique([*range(0, self.steps, self.interval), self.steps])


def make_experiment(
    function, params, data, batch_size, validation, evaluate, hidden, **budget
) -> Experiment:
    """Combine the parts of a problem, and check that they fit together."""
    is_loss = _accepts(function, 2)
    if not is_loss and not _accepts(function, 4):
        raise TypeError(
            "`loss_fn` must be a loss of (params, batch) or a training step of "
            f"(tx, params, opt_state, batch), got {_checks.short_repr(function)}."
        )
    if validation is not None and evaluate is None and not is_loss:
        raise ValueError(
            "`validation` with a training step needs `evaluate=`, a function of "
            "(params, batch)."
        )
    for name, given in ("hidden", hidden), ("evaluate", evaluate):
        if validation is None and given is not None:
            raise ValueError(f"`{name}` needs `validation=`, the examples to evaluate.")
    if holds_nnx_module(params):
        raise TypeError(
            "`params` must be a pytree or a function of a key, got a Flax NNX module. "
            "Split it:\n"
            "  graphdef, params, rest = nnx.split(model, nnx.Param, ...)\n"
            "  loss_fn = lambda p, batch: loss(nnx.merge(graphdef, p, rest, copy=True),"
            " batch)"
        )
    leaves = [] if _is_function(params) else jax.tree.leaves(params)
    has_array = any(isinstance(x, ARRAYS) for x in leaves)
    # Beside arrays, a number is a setting of a module.
    kinds = ARRAYS if has_array else (float, complex)
    is_trained = lambda x: isinstance(x, kinds) and is_inexact(x)
    if others := [x for x in leaves if not is_trained(x)]:
        raise TypeError(
            "`params` must have floating-point arrays for leaves, got "
            f"{_checks.short_repr(others[0])}. Split an Equinox module:\n"
            "  params, rest = eqx.partition(model, eqx.is_inexact_array)\n"
            "  loss_fn = lambda p, batch: loss(eqx.combine(p, rest), batch)"
        )
    if _is_function(data):
        arrays, batch = None, lambda _, key: data(key)
    else:
        arrays = _arrays("data", data)
        batch = lambda data, rows: jax.tree.map(lambda x: x[rows], data)
    experiment = Experiment(
        init=params if _is_function(params) else lambda key: params,
        loss=function if is_loss else None,
        step=None if is_loss else function,
        draw=sampler(arrays, batch_size),
        batch=batch,
        data=arrays,
        evaluate=evaluate or function,
        hidden=hidden,
        slices=[] if validation is None else _slices(_arrays("validation", validation)),
        **budget,
    )
    if experiment.slices:
        _check_evaluate(experiment)
    if is_loss:
        _check_loss(experiment)
    return experiment


def make_key(seed) -> jax.Array:
    """Make a key whose random numbers do not change under `jax.vmap`."""
    return jax.random.key(seed, impl="threefry2x32")


def sampler(data, batch_size: int | None) -> Callable[[int, int, int], Any]:
    """Return a function (seed, first step, number of steps) -> draws of the steps.

    A draw is an array of row indices of `data`, or a key if `data` is None.
    """
    if data is None:
        if batch_size is not None:
            raise ValueError("`batch_size` goes with arrays of `data`, not a function.")

        def draw_keys(seed: int, first: int, number: int):
            key = jax.random.fold_in(make_key(seed), 1)
            steps = first + jnp.arange(number, dtype=jnp.uint32)
            return jax.vmap(lambda step: jax.random.fold_in(key, step))(steps)

        return draw_keys
    size = jax.tree.leaves(data)[0].shape[0]
    _checks.require_count("batch_size", batch_size)
    assert batch_size is not None
    if batch_size > size:
        raise ValueError(f"`batch_size` must be <= {size} examples, got {batch_size}.")
    per_epoch = size // batch_size

    @functools.lru_cache(maxsize=64)
    def shuffled(seed: int, epoch: int) -> np.ndarray:
        order = np.random.default_rng((seed, epoch)).permutation(size)
        return order[: per_epoch * batch_size].reshape(per_epoch, batch_size)

    def draw_rows(seed: int, first: int, number: int):
        epochs = range(first // per_epoch, (first + number - 1) // per_epoch + 1)
        rows = np.concatenate([shuffled(seed, epoch) for epoch in epochs])
        return jnp.asarray(rows[first % per_epoch :][:number], jnp.int32)

    return draw_rows


def _is_function(given) -> bool:
    """Return whether this is a function; models that are callable pytrees are not."""
    return callable(given) and jax.tree.structure(given) == jax.tree.structure(0)


def _accepts(function, number: int) -> bool:
    try:
        inspect.signature(function).bind(*range(number))
    except (TypeError, ValueError):
        return False
    return True


def _arrays(name: str, tree: Any) -> Any:
    """Move arrays to the device, and check their numbers of examples."""
    tree = jax.tree.map(_on_one_device, tree)
    lengths = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(tree)}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(
            f"`{name}` must hold arrays with the same number of examples along the "
            f"first axis, got {outline(tree)}."
        )
    return tree


def _on_one_device(x) -> jax.Array:
    """Return an array where JAX puts new ones, though it may be sharded."""
    elsewhere = isinstance(x, jax.Array) and x.committed
    return jnp.asarray(jax.device_get(x) if elsewhere else x)


def _slices(tree) -> list[tuple[int, Any]]:
    size = jax.tree.leaves(tree)[0].shape[0]
    cut = lambda first: jax.tree.map(lambda x: x[first : first + SLICE], tree)
    return [(min(SLICE, size - first), cut(first)) for first in range(0, size, SLICE)]


def _check_loss(experiment: Experiment) -> None:
    """Raise TypeError unless the loss of a batch is one real number."""

    def first_loss(key):
        draw = jax.tree.map(lambda x: x[0], experiment.draw(0, 0, 1))
        return experiment.loss(experiment.init(key), experiment.batch(data, draw))

    data = experiment.data
    found = jax.eval_shape(first_loss, make_key(0))
    is_scalar = getattr(found, "shape", None) == ()
    if not (is_scalar and jnp.issubdtype(found.dtype, jnp.floating)):
        raise TypeError(
            "`loss_fn` must return the loss alone, a real scalar, got "
            f"{outline(found)}."
        )


def _check_evaluate(experiment: Experiment) -> None:
    """Raise ValueError unless the evaluation returns a scalar loss."""
    params = jax.eval_shape(experiment.init, make_key(0))
    found = jax.eval_shape(experiment.evaluate, params, experiment.slices[0][1])
    found = found if isinstance(found, dict) else {"loss": found}
    shapes = {name: getattr(x, "shape", None) for name, x in found.items()}
    if "loss" not in shapes or set(shapes.values()) != {()}:
        raise ValueError(
            '`evaluate` must return a scalar loss, or a dict of scalars with "loss", '
            f"got {outline(found)}."
        )
