"""The main program: one method, many runs side by side, compiled once."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stablegrad as sg

from . import faults, problem
from .methods import Method

RATE = 2e-3
# Compiling is most of the work, and the arrays are tiny.
QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
_orbax = threading.Lock()


class Seen(NamedTuple):
    """What one run left behind, one row a step; a column a leaf."""

    came: np.ndarray  # Norm of each leaf's gradient.
    went: np.ndarray  # Norm of each leaf's update, divided by the learning rate.
    distance: np.ndarray  # Of the parameters from the truth.
    halted: np.ndarray  # Whether a flag was up.

    @property
    def factor(self) -> np.ndarray:
        """What the method multiplied each step by; 0 if skipped or not finite."""
        return _ratio(np.hypot.reduce(self.went, -1), np.hypot.reduce(self.came, -1))

    @property
    def leaf_factor(self) -> np.ndarray:
        """The same, leaf by leaf."""
        return _ratio(self.went, self.came)

    @property
    def size(self) -> np.ndarray:
        """Norm of each step, in gradient units."""
        return np.hypot.reduce(self.went, -1)

    @property
    def far(self) -> np.ndarray:
        """The distance from the truth after each step."""
        return np.hypot.reduce(self.distance, -1)


def _ratio(went, came) -> np.ndarray:
    with np.errstate(all="ignore"):
        ratio = went / came
    return np.where(np.isfinite(ratio), ratio, 0.0)


def compiled(function: Callable, *args, well: bool = False) -> Callable:
    """The compiled program; compiled in a hurry, where possible, unless `well`."""
    options = QUICKLY if jax.default_backend() == "cpu" and not well else None
    return jax.jit(function, compiler_options=options).lower(*args).compile()


def has_flag(tx: optax.GradientTransformation, params) -> bool:
    """Whether the state holds a `halted` flag."""
    try:
        return "halted" in jax.eval_shape(lambda p: sg.metrics(tx.init(p)), params)
    except ValueError:
        return False


class Runs:
    """The runs of one method: state, program, and what was seen."""

    def __init__(self, method: Method, lanes: dict[str, faults.Lane], width: int):
        """Compiles one chunk of steps for `width` lanes."""
        self.tx = optax.with_extra_args_support(method.make(optax.sgd(RATE)))
        self.width = width
        self.flagged = has_flag(self.tx, problem.start())
        stacked = self._stacked(lanes)
        args = (self._begin(stacked), *_cut(stacked, 0))
        self.program = compiled(self._chunk, *args, well=method.sorts)

    def _stacked(self, lanes: dict[str, faults.Lane]) -> faults.Lane:
        """All lanes in one, filled up to the width."""
        filled = list(lanes.values())
        filled += filled[:1] * (self.width - len(filled))
        return faults.Lane(*(np.stack(xs) for xs in zip(*filled, strict=True)))

    def _begin(self, stacked: faults.Lane):
        """Parameters and state of every lane before the first step."""

        def one(multiple):
            params = {name: jnp.asarray(x) for name, x in problem.start().items()}
            given = multiple * problem.truth()["second"]
            usual = jnp.isnan(multiple)
            return {**params, "second": jnp.where(usual, params["second"], given)}

        params = jax.vmap(one)(stacked.start_at)
        return params, jax.vmap(self.tx.init)(params)

    def _chunk(self, carry, batches, lanes):
        """One chunk of every lane."""

        def step(carry, xs):
            params, state = carry
            batch, fault = xs
            loss, real = jax.value_and_grad(problem.loss)(params, batch)
            held = fault.norm > 0
            grads = jax.tree.map(
                lambda g, e: jnp.where(held, e, g), real, problem.along(fault.norm)
            )
            grads = {
                name: grads[name] * fault.leaf_factors[i]
                for i, name in enumerate(problem.LEAVES)
            }
            at = jnp.zeros(grads["bias"].shape).at[0].set(fault.poison)
            grads["bias"] = grads["bias"] + at
            updates, state = self.tx.update(
                grads, state, params, value=loss + fault.loss_poison
            )
            params = jax.tree.map(
                lambda p, u: jnp.where(held, p, p + u), params, updates
            )
            flag = sg.metrics(state)["halted"] if self.flagged else jnp.zeros((), bool)
            seen = Seen(
                problem.norms(grads),
                problem.norms(updates) / RATE,
                problem.distances(params),
                flag,
            )
            return (params, state), seen

        def run(carry, lane):
            return jax.lax.scan(step, carry, (batches, lane))

        return jax.vmap(run)(carry, lanes)

    def run(self, lanes: dict[str, faults.Lane], save_to: Path | None = None):
        """Runs all lanes; returns what was seen, and how a restored run compares."""
        stacked, parts, same = self._stacked(lanes), [], None
        carry = self._begin(stacked)
        for start in range(0, stacked.norm.shape[1], faults.CHUNK):
            inputs = _cut(stacked, start)
            new, seen = jax.block_until_ready(self.program(carry, *inputs))
            if save_to is not None and start == faults.SAVE_AT:
                with _orbax:
                    restored = through_orbax(carry, save_to)
                again = self.program(restored, *inputs)
                same = all(map(_bits, *map(jax.tree.leaves, ((new, seen), again))))
            carry = new
            parts.append(jax.tree.map(np.asarray, seen))
        whole = [np.concatenate(xs, axis=1) for xs in zip(*parts, strict=True)]
        seen = {
            name: Seen(*(np.asarray(x[i], np.float64) for x in whole))
            for i, name in enumerate(lanes)
        }
        return seen, same

    def structure_changes(self) -> str:
        """How one step changes structure, shapes or dtypes of the state, if it does."""
        params = problem.start()
        state = jax.eval_shape(self.tx.init, params)
        _, after = jax.eval_shape(
            lambda s: self.tx.update(params, s, params, value=jnp.zeros(())), state
        )
        if jax.tree.structure(state) != jax.tree.structure(after):
            return "structure"
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True)
        kept = all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
        return "" if kept else "shapes or dtypes"


def _cut(stacked: faults.Lane, start: int):
    """Batches and faults of the chunk that begins at a step."""
    steps = slice(start, start + faults.CHUNK)
    batches = problem.batches(stacked.norm.shape[1])
    faulty = faults.Lane(*(x[:, steps] for x in stacked[:-1]), None)
    return {name: x[steps] for name, x in batches.items()}, faulty


def through_orbax(carry: Any, folder: Path) -> Any:
    """Saves, and restores into a fresh structure."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, carry)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder, jax.eval_shape(lambda: carry))


def _bits(a, b) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()
