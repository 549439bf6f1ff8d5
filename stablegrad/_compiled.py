"""Compilation of updates that are called without `jax.jit`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from ._checks import completed, matching_params
from ._extra_args import host_float32

NUMBERS = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


def compiled(
    update: Callable[..., Any],
    check_state: Callable[[Any], None] = lambda state: None,
    check_leaves: Callable[[Any, Any], None] = lambda state, like: None,
    check_extra: Callable[[dict[str, Any]], None] = lambda extra: None,
) -> Callable[..., Any]:
    """Return an update that compiles once when it is called outside of a trace.

    Called with tracers, it is the plain function. Extra arguments that are not numbers,
    such as `value_fn=`, are constants of the compiled program. A new object compiles a
    new program, and the old one is dropped with all that it refers to.

    Args:
        update: A function (updates, state, params, **extra).
        check_state: Raises if the state is a wrong one.
        check_leaves: Raises if a state belongs to another tree than that of the step.
        check_extra: Raises if an extra argument that is concrete is a wrong one.
    """
    # A program and its constants by name, as one tuple: threads may share an update.
    kept: tuple[Any, dict[str, Any]] = (None, {})

    def compiled_update(updates, state, params=None, **extra) -> Any:
        check_state(state)
        check_extra(extra)
        whole, params = params, matching_params(params, updates)
        if "value" in extra:
            extra["value"] = host_float32(extra["value"])  # Before JAX makes it narrow.
        value_fn = extra.get("value_fn")
        if callable(value_fn) and jax.tree.structure(whole) != jax.tree.structure(
            params
        ):
            extra["value_fn"] = lambda params: value_fn(completed(params, whole))
        check_leaves(state, updates if params is None else params)
        arguments = (updates, state, params, extra)
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(arguments)):
            return update(updates, state, params, **extra)
        nonlocal kept
        program, constants = kept
        traced = {name: x for name, x in extra.items() if _is_numeric(x)}
        others = {name: x for name, x in extra.items() if name not in traced}
        if program is None or not _same(others, constants):
            program = jax.jit(
                lambda updates, state, params, traced: update(
                    updates, state, params, **traced, **others
                )
            )
            kept = program, others
        return program(updates, state, params, traced)

    return compiled_update


def _is_numeric(argument) -> bool:
    leaves = jax.tree.leaves(argument)
    return bool(leaves) and all(isinstance(leaf, NUMBERS) for leaf in leaves)


def _same(constants: dict[str, Any], others: dict[str, Any]) -> bool:
    return constants.keys() == others.keys() and all(
        constants[name] is others[name] for name in constants
    )
