"""Build a case, diagnose it, apply the remedy, and train with and without it."""

import dataclasses
import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import stablegrad as sg

from . import models
from .faults import Case

EXAMPLES, SEQUENCES, STEPS = 64, 32, 60
STREAMS = 4  # Of batches; one alone moves the last losses by a tenth.
RATE, B2, EPS = 3e-3, 0.999, 1e-8


@dataclasses.dataclass
class Result:
    """What a report said, and what the remedy did."""

    case: Case
    causes: tuple[tuple[str, str], ...]  # Rule and layer of warnings and criticals.
    faulty_loss: float = math.nan
    remedied_loss: float = math.nan
    faulty_rate: float = math.nan  # Critical, of Adam; where the loss is no lower.
    remedied_rate: float = math.nan
    text: str = ""

    @property
    def right_cause(self) -> bool:
        """Whether the first cause is the planted one."""
        return bool(self.causes) and self.causes[0][0] == self.case.rule

    @property
    def right_layer(self) -> bool:
        """Whether its layer is the planted one; trivially where none is to blame."""
        if not self.case.layers:
            return True
        named = self.causes[0][1].partition(" (")[0] if self.causes else ""
        return named in self.case.layers

    @property
    def bears_more(self) -> bool:
        """Whether the remedy raises the critical rate by 10 %."""
        return self.remedied_rate > 1.1 * self.faulty_rate

    @property
    def helps(self) -> bool | None:
        """Whether the remedy lowers the final loss by 1 %; None if not tried."""
        if math.isnan(self.remedied_loss):
            return None
        faulty = self.faulty_loss if math.isfinite(self.faulty_loss) else math.inf
        return self.remedied_loss < 0.99 * faulty


@functools.cache
def optimizer(rate: float, b2: float, eps: float) -> optax.GradientTransformation:
    """One object for one setting, so that programs are shared."""
    return optax.adam(rate, b2=b2, eps=eps)


class Data:
    """Batches of digits, or of characters, as NumPy arrays."""

    def __init__(self, digits, text):
        """Standardise the pixels."""
        images = digits.data.astype(np.float32)
        self._images = (images - images.mean()) / images.std()
        self._labels = digits.target.astype(np.int32)
        self._text = np.minimum(text.train, models.ALPHABET - 1).astype(np.int32)

    def batch(self, case: Case, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the i-th batch of a case, always the same."""
        network, chance = case.network, np.random.default_rng((case.seed, i))
        if network in models.TEXT:
            starts = chance.integers(0, len(self._text) - models.CONTEXT - 1, SEQUENCES)
            rows = starts[:, None] + np.arange(models.CONTEXT + 1)
            tokens = self._text[rows]
            return tokens[:, :-1], tokens[:, 1:]
        chosen = chance.integers(0, len(self._images), EXAMPLES)
        return self._images[chosen], self._labels[chosen]


def _settings(case: Case) -> dict[str, float]:
    return {"rate": RATE, "b2": B2, "eps": EPS, **dict(case.adam)}


def _pure(model):
    """Split a model into what is trained and a function that puts it together."""
    if isinstance(model, nnx.Module):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        return nnx.as_pure(params), (graphdef, rest)
    return model, None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _train(loss_fn, tx, static, rest, model, state, batches):
    arrays, others = jax.tree.flatten(model)[0], jax.tree.structure(model)
    floats = [jnp.issubdtype(x.dtype, jnp.inexact) for x in arrays]

    def loss(trained, batch):
        whole = others.unflatten(
            [t if f else a for t, f, a in zip(trained, floats, arrays, strict=True)]
        )
        if static is not None:
            whole = nnx.merge(static, whole, rest, copy=True)
        return loss_fn(whole, batch)

    def step(carry, batch):
        trained, state = carry
        value, grads = jax.value_and_grad(loss)(trained, batch)
        updates, state = tx.update(grads, state, trained)
        return (optax.apply_updates(trained, updates), state), value

    (trained, state), losses = jax.lax.scan(step, (arrays, state), batches)
    return others.unflatten(trained), state, losses


def train(
    data: Data,
    case: Case,
    loss_fn,
    model,
    tx,
    steps: int,
    change=None,
    state=None,
    first: int = 0,
):
    """Train; return the model, the moments, and the mean of the last ten losses."""
    given, static = _pure(model)
    graphdef, rest = static if static is not None else (None, None)
    batches = [data.batch(case, first + i) for i in range(steps)]
    batches = [change(b) if change else b for b in batches]
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *batches)
    state = tx.init(jax.tree.leaves(given)) if state is None else state
    trained, state, losses = _train(loss_fn, tx, graphdef, rest, given, state, stacked)
    if static is not None:
        trained = nnx.merge(graphdef, trained, rest, copy=True)
    return trained, state, float(jnp.mean(losses[-10:]))


def run(data: Data, case: Case, remedies: bool = True) -> Result:
    """Plant, diagnose, remedy."""
    loss_fn, model = models.build(case.network, case.seed, case.built)
    settings = _settings(case)
    tx, state = optimizer(**settings), None
    if case.warm:
        model, state, _ = train(data, case, loss_fn, model, tx, case.warm)
    model = models.edited(model, dict(case.edits)) if case.edits else model
    if case.loss_scale != 1:
        loss_fn = models.scaled(loss_fn, case.loss_scale)
    batch = data.batch(case, 0)
    batch = case.batch(batch) if case.batch else batch
    more = [data.batch(case, i) for i in (1, 2, 3)]
    more = [case.batch(one) if case.batch else one for one in more]
    asked = _like_params(state, model) if state is not None else None
    report = sg.diagnose(loss_fn, model, batch, tx, asked, steps=20, more_batches=more)
    causes = tuple((v.rule, v.layer) for v in report.causes)
    result = Result(case, causes, text=str(report))
    if remedies and case.rule and result.right_cause:
        _remedy(result, data, loss_fn, model, settings, state, report.causes[0])
    return result


def _like_params(state, model):
    """Return an optimizer state over a list as one over the model's parameters."""
    given, _ = _pure(model)
    structure = jax.tree.structure(given)
    is_list = lambda node: isinstance(node, list)
    unflatten = lambda node: structure.unflatten(node) if is_list(node) else node
    return jax.tree.map(unflatten, state, is_leaf=is_list)


def _remedy(result: Result, data, loss_fn, model, settings, state, verdict) -> None:
    """Apply what the verdict's `change` says, and train with and without."""
    case, change = result.case, verdict.change
    options, healed, batch_change = case.built, model, case.batch
    after = dict(settings)
    edits = {
        name: (lambda leaf, f=f: f * leaf)
        for name, f in change.get("multiply", {}).items()
    }
    if "zero_bias" in change:
        parent, _, weight = change["zero_bias"].rpartition(".")
        bias = {"w": "b"}.get(weight, "bias")
        edits[f"{parent}.{bias}"] = np.zeros_like
        if case.rule == "saturated":
            edits.pop(change["zero_bias"], None)
    healed = models.edited(model, edits) if edits else model
    if "branch" in change or "multiply_branches" in change:
        ((_, factor),) = change["branch"].items()
        scaled = tuple(b * factor if b > 4 else b for b in options.branches)
        options = dataclasses.replace(options, branches=scaled)
    if "dtype" in change:
        options = dataclasses.replace(options, half=-1)
    if "architecture" in change:
        options = dataclasses.replace(options, norm=True)
    if "activation" in change:
        options = dataclasses.replace(options, activation=change["activation"])
    if "rate" in change:
        after["rate"] *= change["rate"]
    if "epsilon" in change:
        after["eps"] = change["epsilon"]
    if "b2" in change:
        after["b2"] = change["b2"]
    if "divide_inputs" in change:
        size, planted = change["divide_inputs"], case.batch
        batch_change = lambda b: (planted(b)[0] / size, b[1])
    if "drop_examples" in change:
        kept = [i for i in range(EXAMPLES) if i not in change["drop_examples"]]
        planted = case.batch
        batch_change = lambda b: tuple(x[kept] for x in planted(b))
    if not change or "labels" in change or case.rule == "nonfinite_parameters":
        return
    fixed_loss, rebuilt = models.build(case.network, case.seed, options)
    if options != case.built:  # Some models hold their options.
        healed = models.edited(rebuilt, dict(case.edits) | edits) if edits else rebuilt
    if case.loss_scale != 1:
        fixed_loss = models.scaled(fixed_loss, case.loss_scale)
    result.faulty_loss = _final_loss(
        data, case, loss_fn, model, optimizer(**settings), case.batch, state
    )
    result.remedied_loss = _final_loss(
        data, case, fixed_loss, healed, optimizer(**after), batch_change, state
    )
    if case.layers and not result.helps:
        batch = data.batch(case, 0)
        limit = functools.partial(_critical, batch=batch)
        result.faulty_rate = limit(loss_fn, model)
        result.remedied_rate = limit(fixed_loss, healed)


def _final_loss(data, case, loss_fn, model, tx, change, state) -> float:
    """Return the mean of the last ten losses over `STREAMS` streams of batches."""
    losses = [
        train(data, case, loss_fn, model, tx, STEPS, change, state, 1000 * stream)[2]
        for stream in range(STREAMS)
    ]
    return statistics.mean(losses)


def _critical(loss_fn, model, batch) -> float:
    """Return the rate at which Adam spikes, 0 where nothing is finite."""
    try:
        return sg.critical_learning_rate(loss_fn, model, batch, optax.adam).critical
    except ValueError:
        return 0.0
