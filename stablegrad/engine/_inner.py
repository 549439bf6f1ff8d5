"""The inner optimizer, as a step calls it."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from .. import _missing, _trees
from .._extra_args import takes_all, with_extra_args


class Inner:
    """An optimizer that is given the extra arguments that it takes, and no others."""

    def __init__(self, inner: optax.GradientTransformation):
        """Find the arguments of its `update`."""
        inner = with_extra_args(inner)
        self._init, self._update = inner.init, inner.update
        parameters = inspect.signature(inner.update).parameters
        self._names = None if takes_all(inner.update) else parameters.keys()

    def init(self, params) -> Any:
        """Return the state before the first step."""
        if not all(map(_trees.is_array, jax.tree.leaves(params))):
            raise TypeError(
                "`init` got parameters with leaves that are not arrays. Of an Equinox "
                "model, pass `eqx.filter(model, eqx.is_inexact_array)`."
            )
        return self._init(params)

    def given(self, extra: dict[str, Any]) -> Callable[[Any, Any, Any], tuple]:
        """Return `update` of gradient, inner state and parameters in one step.

        A guard takes `value=`, which an optimizer without `**extra_args` would refuse.
        """
        names = self._names
        known = {k: v for k, v in extra.items() if names is None or k in names}

        def update(updates, inner_state, params):
            try:
                return self._update(updates, inner_state, params, **known)
            except ValueError as error:
                if params is None and "params" in str(error):
                    raise _missing.missing_params("the guarded optimizer") from error
                raise

        return update
