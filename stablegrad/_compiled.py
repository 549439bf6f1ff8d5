"""Compilation of updates that are called without `jax.jit`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from ._checks import matching_params

NUMBERS = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


class CompiledUpdate:
    """An update function that compiles once when it is called outside of a trace.

    Called with tracers, it is the plain function. Extra arguments that are no numbers,
    such as `value_fn=`, are constants of the compiled program. A new object compiles a
    new program, and the old one is dropped with all that it refers to.
    """

    def __init__(
        self, update: Callable[..., Any], check: Callable[[Any], None] | None = None
    ):
        """Wrap `update(updates, state, params, **extra)`, and `check(state)`."""
        self._update = update
        self._check = check
        self._constants: dict[str, Any] | None = None
        self._program: Any = None

    def __call__(self, updates, state, params=None, **extra) -> Any:
        """Take one step."""
        if self._check is not None:
            self._check(state)
        params = matching_params(params, updates)
        arguments = (updates, state, params, extra)
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(arguments)):
            return self._update(updates, state, params, **extra)
        traced = {name: x for name, x in extra.items() if _is_numeric(x)}
        constants = {name: x for name, x in extra.items() if name not in traced}
        if self._program is None or not _same(constants, self._constants):
            update = self._update
            self._program = jax.jit(
                lambda updates, state, params, traced: update(
                    updates, state, params, **traced, **constants
                )
            )
            self._constants = constants
        return self._program(updates, state, params, traced)


def _is_numeric(argument) -> bool:
    leaves = jax.tree.leaves(argument)
    return bool(leaves) and all(isinstance(leaf, NUMBERS) for leaf in leaves)


def _same(constants: dict[str, Any], others: dict[str, Any] | None) -> bool:
    return others is not None and (
        constants.keys() == others.keys()
        and all(constants[name] is others[name] for name in constants)
    )
