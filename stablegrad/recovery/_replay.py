"""Taking a step again, to tell bad data from bad hardware."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _reading, _trees
from .._checks import require_count
from ..engine._step import GuardState
from ..flight_recorder._history import history
from ._replay_examples import one_by_one
from ._replay_report import Replay, Run

Step = Callable[[Any, Any], Any]


def replay(
    step: Step,
    state: Any,
    batch: Any,
    *,
    after: Any = None,
    times: int = 2,
    device: Any = None,
    by_example: bool = False,
) -> Replay:
    """Repeat a step, and report whether its result is the same bit for bit.

    The loss, the gradient norm, the first bad leaf and, of a guard with
    `record_norms=`, the norm of every leaf are compared with what the guard recorded.
    Everything that the runs return is compared between them. The verdict is one of

    | verdict | the runs are | which points to |
    |---|---|---|
    | "same" | as recorded | data, learning rate or optimizer |
    | "other numbers" | alike, not as recorded | hardware, at that time |
    | "differs by device" | alike here, not on `device` | hardware, always |
    | "not deterministic" | not alike | non-determinism, or hardware |

    Host only. A guard leaves parameters and inner state as they were when it skips a
    step, so after a skipped step its state and the batch are all that is needed, as
    long as the step depends on nothing else that has changed since. Random keys and
    batch statistics have changed, unless `keep_if_skipped` restored them.

    Args:
        step: The compiled step of the run, as `step(state, batch)`: another program may
            round otherwise. It returns a pytree with the new optimizer state in it, or
            changes Flax NNX's objects in place. It may donate: it gets copies.
        state: A pytree with the optimizer's state and all else that the step reads: as
            it was after the step if this was skipped, or before it if `after` is given.
        batch: The batch of that step, a pytree.
        after: What the step returned, or of NNX the objects after it. It is needed for
            a step that was taken, or that rolled back, and is compared whole.
        times: Runs, >= 2.
        device: Another `jax.Device` for one more run. The state must lie on one.
        by_example: Whether to take the step once for each example, with copies of it
            alone in the batch. Arrays with the same first axis as the first array of
            the batch are split. It takes as many more steps as there are examples.

    Returns:
        A `Replay`: `verdict`, `reproducible`, `recorded`, `runs`, `differing`, and
        `examples`, the worst first. Its text says what to do next.

    Raises:
        ValueError: If there is not one guard in the state, if the step is not one step
            of it, if the state is stacked over an ensemble, if `after` is needed, or of
            another structure, or not one step later, or if an argument is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import stablegrad as sg
        >>> tx = sg.guard(optax.sgd(0.1), sg.skip())
        >>> @jax.jit
        ... def step(state, batch):
        ...     params, opt_state = state
        ...     loss_fn = lambda w: jnp.mean(jnp.log(batch @ w))
        ...     loss, grads = jax.value_and_grad(loss_fn)(params)
        ...     return sg.apply(tx, grads, opt_state, params, value=loss)
        >>> batch = jnp.ones((4, 2)).at[2].set(0.0)
        >>> state = step((jnp.ones(2), tx.init(jnp.ones(2))), batch)
        >>> found = sg.replay(step, state, batch, by_example=True)
        >>> found.verdict, found.examples[0].place
        ('same', 2)

    Reference:
        The rerun machine of Megatron-LM,
        https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/rerun_state_machine.py,
        which takes a step again on the same device, then on another one.
    """
    require_count("times", times, least=2)
    _require_kept(state, batch)
    recorded, number = _recorded(state, after)
    take = lambda batch, where=None: _taken(step, state, batch, where)
    results = [take(batch) for _ in range(times)]
    if after is not None:
        _require_alike(after, results[0])
    runs = tuple(_run(result) for result in results)
    unlike = [_differing(results[0], other) for other in results[1:]]
    unlike += [_unequal(runs[0], run) for run in runs[1:]]
    verdict, elsewhere = "not deterministic", None
    differing = _first_of_each(unlike)
    if not differing:
        verdict = "other numbers"
        differing = _unequal(recorded, runs[0])
        if after is not None:
            differing += _differing(after, results[0])
    if not differing:
        verdict = "same"
        if device is not None:
            result = take(batch, device)
            elsewhere = _run(result)
            differing = _unequal(runs[0], elsewhere) + _differing(results[0], result)
            verdict = "differs by device" if differing else "same"
    measured = lambda batch: _run(take(batch))
    examples = one_by_one(measured, batch) if by_example else ()
    return Replay(
        number,
        verdict,
        recorded,
        runs,
        elsewhere,
        tuple(differing),
        examples,
    )


def _guard_in(tree: Any) -> GuardState:
    found = _reading.guards(tree)
    if len(found) != 1:
        raise ValueError(f"`replay` needs one guard in the state, got {len(found)}.")
    if np.ndim(found[0].numbers[0]) > 1:
        raise ValueError(
            "`replay` got a state that is stacked over an ensemble. Take one member: "
            "`jax.tree.map(lambda x: x[0], state)`, and its step."
        )
    return found[0]


def _recorded(state: Any, after: Any) -> tuple[Run, int]:
    """Return what was recorded of the step, and its number."""
    own = _guard_in(state)
    seen = _reading.numbers(own)
    steps = int(seen["guarded_steps"])
    if after is not None:
        later = int(_reading.numbers(_guard_in(after))["guarded_steps"])
        if later != steps + 1:
            raise ValueError(
                f"`after` must be one step after `state`, which has seen {steps} "
                f"steps; it has seen {later}."
            )
        return _run(after), steps
    back = bool(seen.get("rolled_back", False))
    held = steps and seen["skipped"] and not back
    if not held:
        raise ValueError(
            f"the last step {'rolled back' if back else 'was not skipped'}, so the "
            "state from before it is gone. Pass it, and what the step returned as "
            "`after=`; or restore a checkpoint, and take the steps from there."
        )
    return _run(state), steps - 1


def _taken(step: Step, state: Any, batch: Any, device) -> Any:
    """Return what a step returns; if it has no guard in it, what it changed."""
    state, batch = _copied(state, device), _copied(batch, device)
    before = int(_reading.numbers(_guard_in(state))["guarded_steps"])
    result = step(state, batch)
    result = jax.block_until_ready(result)
    if not _reading.search(_trees.without_variables(result)):
        result = state
    later = int(_reading.numbers(_guard_in(result))["guarded_steps"])
    if later != before + 1:
        raise ValueError(
            f"`step` must take one step of the guard and return its new state; it "
            f"took {later - before}."
        )
    return result


def _require_kept(*trees: Any) -> None:
    """Raise ValueError if an array was donated to the step that is to be replayed."""
    leaves = [x for x in jax.tree.leaves(trees) if isinstance(x, jax.Array)]
    if any(leaf.is_deleted() for leaf in leaves):
        raise ValueError(
            "`replay` needs state and batch as they were before the step, and they "
            "were donated to it. Keep a copy of what is to be replayed."
        )


def _copied(tree: Any, device: Any) -> Any:
    """Return copies, which a step may donate or change, of all arrays of JAX."""

    def copy(leaf):
        if not isinstance(leaf, jax.Array):
            return leaf
        return jnp.copy(leaf) if device is None else jax.device_put(leaf, device)

    return jax.tree.map(copy, tree)


def _run(tree: Any) -> Run:
    """Return what the guard in a tree recorded of its last step."""
    own = _guard_in(tree)
    seen, names = _reading.numbers(own), _trees.decode_names(own.names)
    bad, largest = int(seen["first_bad_leaf"]), int(seen["largest_leaf"])
    leaf = bad if bad >= 0 else largest
    norms = {}
    if not isinstance(own.history, tuple):
        told = history(own)
        if len(told.steps) and told.steps[-1] == int(seen["guarded_steps"]) - 1:
            norms = dict(zip(told.leaves, told.leaf_norms[-1].tolist(), strict=True))
    return Run(
        loss=float(seen["loss_value"]),
        grad_norm=float(seen["grad_norm"]),
        leaf=names[leaf] if leaf >= 0 else "",
        skipped=bool(seen["skipped"]),
        reason=int(seen["skip_reason"]),
        leaf_norms=norms,
    )


def _unequal(one: Run, other: Run) -> list[str]:
    own, theirs = one.facts(), other.facts()
    # Norms of the leaves are not in a state that `adopt` began.
    return [name for name in own if name in theirs and own[name] != theirs[name]]


def _require_alike(after: Any, result: Any) -> None:
    bare = map(_trees.without_variables, (after, result))
    kinds = list(map(_trees.shapes_and_dtypes, bare))
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"`after` must be what `step` returns:\n  got {kinds[0]}\n"
            f"  step returned {kinds[1]}"
        )


def _differing(one: Any, other: Any) -> list[str]:
    """Return the names of the arrays that are not equal bit for bit."""

    def named(tree):
        leaves = jax.tree_util.tree_flatten_with_path(_trees.without_variables(tree))[0]
        return {_trees.path_name(path): leaf for path, leaf in leaves}

    theirs = named(other)
    return [n for n, leaf in named(one).items() if _bits(leaf) != _bits(theirs[n])]


def _bits(leaf: Any) -> bytes:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def _first_of_each(lists: list[list[str]]) -> list[str]:
    return list(dict.fromkeys(name for found in lists for name in found))
