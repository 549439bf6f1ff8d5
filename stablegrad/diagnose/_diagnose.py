"""The diagnosis: measure, judge, report."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from .. import _checks, _trees
from ..curvature import _loss
from ..engine._line_search import has_line_search
from . import _batch, _layers, _measure, _origin, _program, _sites, _training
from ._report import Report
from .rules import RULES, Facts, Rule, judge


def diagnose(
    loss_fn: Callable,
    params: Any,
    batch: Any,
    tx: optax.GradientTransformation | None = None,
    opt_state: Any = None,
    *,
    steps: int = 0,
    more_batches: Iterable[Any] = (),
    events: Sequence[Any] = (),
    rules: Sequence[Rule] = RULES,
) -> Report:
    """Find the layers that explode, vanish, die or saturate, why, and what to do.

    The loss is traced once for each function object, so anything it reads besides its
    arguments is constant. It is traced once more on parts of the batch; the report
    leaves these results out if the loss takes only whole batches. Compilation takes
    about ten times as long as that of the gradient. Layers are the
    operations that combine data with a parameter, in forward order, named after the
    parameter. Therefore models of Flax NNX, Linen, Equinox and plain functions need no
    change, even under `jax.jit`, `jax.vmap`, `jax.checkpoint` or `jax.lax.scan`.
    With z the result of a layer, f its activation and W the weights of the layer that
    takes f(z),

        chi = rms(dL/dz)^2 / rms(dL/dz')^2,  in theory  fan_out rms(W)^2 E[f'(z)^2]

    for z' = W f(z) + b, the expectation by quadrature for a normal z. Chi costs one
    forward and one backward pass. The gradients of parts of the batch cost another
    pass of each kind, and `steps` cost five times as many steps: four rates and a rate
    of 0 are tried. No argument is modified.

    Args:
        loss_fn: `loss_fn(params, batch)`, a deterministic scalar: freeze dropout keys,
            and keep batch normalisation in training mode.
        params: A pytree, an Equinox module, or a Flax NNX module. Those of a halted run
            serve as well as those of a new one.
        batch: Pytree of arrays for `loss_fn`, with examples along the first axis.
        tx: The optimizer, at its own rate, whose updates are then judged too.
        opt_state: Its state in the run, or the `nnx.Optimizer` or `TrainState` that
            holds it. None: `tx.init(params)`.
        steps: Optimizer steps to try from here, at the given and lower rates, >= 0. 20
            show a rate that is too high, and labels that do not belong to the inputs.
        more_batches: Further batches of the same shape for these steps, in turn.
        events: What happened in a run, from `sg.events(state)`. The report ends
            with them.
        rules: The questions to ask: `stablegrad.diagnose.RULES`, and your own.

    Returns:
        A `Report`: `print` it, `report.verdicts`, `report.layers`, `report.to_html`,
        `report.figure`, `report.to_json`. A nan or infinite loss is a finding.

    Raises:
        TypeError: If `loss_fn` does not return a real scalar, or `tx` is no
            transformation.
        ValueError: If `steps` is out of range or given without `tx`, if `params` has no
            floating-point leaf, if `batch` has no examples, if one of `more_batches` is
            shaped unlike `batch`, if `opt_state` is not of `tx` and `params`, or if
            `tx` has a line search.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import stablegrad as sg
        >>> x = jax.random.normal(jax.random.key(0), (64, 8))
        >>> params = {"first": 3.0 * jnp.eye(8), "last": 0.4 * jnp.ones((8, 1))}
        >>> def loss_fn(params, x):
        ...     return jnp.mean((jnp.tanh(x @ params["first"]) @ params["last"]) ** 2)
        >>> report = sg.diagnose(loss_fn, params, x)
        >>> report.verdicts[0].rule, report.verdicts[0].layer
        ('saturated', 'first')

    Reference:
        Chi: Schoenholz et al. (2017), https://arxiv.org/abs/1611.01232. Every verdict
        names the source of its threshold.
    """
    _checks.require_count("steps", steps, 0)
    if steps and tx is None:
        raise ValueError(f"`steps` must be 0 without `tx`, got {steps}.")
    if not isinstance(more_batches, Iterable):
        raise ValueError(f"`more_batches` must be a list, got {more_batches!r}.")
    more_batches = list(more_batches)
    _require_batches(batch, more_batches)
    with jax.debug_nans(False), jax.debug_infs(False):  # A nan is a finding.
        asked = (tx, opt_state, steps, more_batches)
        facts = _facts(loss_fn, params, batch, *asked)
    facts.events = tuple(events)
    return Report(facts, judge(facts, rules), tuple(rules))


def _require_batches(batch: Any, more_batches: Sequence[Any]) -> None:
    """Raise ValueError unless all batches have examples, and are shaped alike."""
    described = lambda tree: jax.tree.map(np.shape, tree)
    shapes = lambda tree: list(map(np.shape, jax.tree.leaves(tree)))
    structure = jax.tree.structure(batch)
    for other in more_batches:
        alike = jax.tree.structure(other) == structure
        if not (alike and shapes(other) == shapes(batch)):
            raise ValueError(
                "each of `more_batches` must be shaped as `batch`, which is "
                f"{described(batch)}, got {described(other)}."
            )
    if any(0 in shape for shape in shapes(batch)):
        raise ValueError(
            f"`batch` must have examples, its shapes are {described(batch)}."
        )


def _facts(loss_fn, params, batch, tx, opt_state, steps, more_batches) -> Facts:
    """Measure a loss, and the updates of an optimizer if there is one."""
    loss, trained, frozen = _loss.problem("diagnose", loss_fn, params, widen=False)
    data = (frozen, batch)
    names = _trees.leaf_names(trained)
    described, structure = jax.tree.flatten(
        jax.eval_shape(lambda x: x, (trained, data))
    )
    avals = tuple((x.shape, x.dtype) for x in described)
    program, sites, instrument, run = _prepared(loss, _short(names), avals, structure)
    value, grads, found = run(trained, data)
    of_leaves, stats, back = jax.device_get(found)
    layers = _layers.assemble(instrument, sites, stats, back, names)
    facts = Facts(
        loss=float(value),
        layers=layers,
        parameters=_parameters(names, trained, of_leaves),
        batch=_batch.facts(loss, trained, frozen, batch),
        unseen=_unseen(program, sites, names),
    )
    if not math.isfinite(facts.loss):
        bad = _origin.first_bad(program, jax.tree.leaves((trained, data)))
        beside = len(jax.tree.leaves(frozen))
        facts.origin = _described(bad, program, len(names), beside)
    if tx is not None:
        tx = _loss.optimizer(tx, "diagnose")
        if has_line_search(jax.eval_shape(tx.init, trained)):
            raise ValueError(
                "`tx` searches along a line, so `diagnose` cannot judge its updates: "
                "leave it out."
            )
        finite = [x for x in facts.batch.losses if math.isfinite(x)]
        facts.training = _training.facts(
            loss,
            tx,
            trained,
            opt_state,
            grads,
            value,
            data,
            labels=_labels_in(program, sites, batch),
            steps=steps,
            more=more_batches,
            spread=float(np.std(finite)) if finite else 0.0,
        )
        _per_layer(layers, names, facts.training)
    return facts


@functools.lru_cache(maxsize=16)
def _prepared(loss, names, avals, structure):
    """Trace and instrument a loss; compiled once for arguments of the same shapes."""
    arguments = [jax.ShapeDtypeStruct(*aval) for aval in avals]
    program = _program.trace(loss, *jax.tree.unflatten(structure, arguments))
    sites = _sites.find(program, names)
    instrument = _measure.Instrument(program, sites)
    run = jax.jit(functools.partial(_measure.measure, instrument))
    return program, sites, instrument, run


def _unseen(program, sites, names) -> tuple[str, ...]:
    """Return the parameters of layers that are inside an operation that stays whole."""
    weights = [site.weight.leaves for site in sites if site.weight is not None]
    hidden = _sites.leaves_in_whole_operations(program) - frozenset().union(*weights)
    return tuple(names[i] for i in sorted(hidden))


def _labels_in(program, sites, batch) -> int | None:
    """Return which of a batch's two arrays enters the loss alone, and no layer."""
    arrays = program.ins[len(program.ins) - len(jax.tree.leaves(batch)) :]
    scans = {site.path[0] for site in sites if len(site.path) > 1}
    taken = [site.value for site in sites if len(site.path) == 1 and site.weight]
    for op in program.ops:
        taken += op.ins if op.outs[0].order in scans else []
    enters = [any(value.comes_from(array) for value in taken) for array in arrays]
    return enters.index(False) if sorted(enters) == [False, True] else None


def _short(names: Sequence[str]) -> tuple[str, ...]:
    """Leave out Linen's collection if all parameters are in one."""
    if len(names) > 1 and all(name.startswith("params.") for name in names):
        return tuple(name.removeprefix("params.") for name in names)
    return tuple(names)


def _parameters(names, params, of_leaves) -> dict[str, dict[str, float]]:
    rows = zip(names, jax.tree.leaves(params), of_leaves, strict=True)
    return {
        name: {
            **{key: float(x) for key, x in numbers.items()},
            "size": float(leaf.size),
        }
        for name, leaf, numbers in rows
    }


def _per_layer(layers, names, training: _training.TrainingFacts) -> None:
    """Give layers the numbers of their weights; stacked ones share theirs."""
    updates = dict(zip(names, training.updates, strict=True))
    below = dict(zip(names, training.below_epsilon, strict=False))
    for layer in layers:
        layer.update = updates.get(layer.leaf, math.nan)
        layer.epsilon = below.get(layer.leaf, math.nan)


def _described(bad, program, parameters: int, frozen: int) -> str:
    """Return in words where values that are not finite come from."""
    if bad is None:
        return ""
    if isinstance(bad, _program.Value):
        if bad not in program.ins:
            return "a constant"
        place = program.ins.index(bad)
        kinds = ("the parameters", "the arrays beside the parameters", "the batch")
        return kinds[(place >= parameters) + (place >= parameters + frozen)]
    name, where = bad.eqn.params.get("name", bad.name), bad.where()
    name = name if isinstance(name, str) else bad.name
    return f"`{name}` at {where}" if where else f"`{name}`"
