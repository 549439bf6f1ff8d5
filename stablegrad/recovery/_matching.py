"""Filling a state with the arrays of another container, matched by their names.

Orbax gives lists and dicts back for tuples, and leaves empty nodes out. Flax NNX has a
variable around each array. The names of the leaves stay.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .._trees import without_variables
from ..engine._layout import State

_SHOWN = 5  # Names in an error.


def filled(like: Any, given: Any, asker: str) -> Any:
    """Return a tree like `like`, with the arrays of `given` that have its names.

    Raise ValueError if a name is missing or too many, or a shape or dtype differs.
    """
    wanted, found = by_path(without_variables(like)), by_path(without_variables(given))
    if found.keys() != wanted.keys():  # What is restored has dicts for variables.
        wanted, found = _without_value(wanted), _without_value(found)
    if found.keys() != wanted.keys():
        raise ValueError(
            f"`{asker}` got a state of another optimizer, or of other parameters: "
            + _differing(wanted.keys(), found.keys())
            + ". Build the inner optimizer as it was, and pass the parameters that it "
            "was made for."
        )
    for name, leaf in wanted.items():
        if _kind(leaf) != _kind(found[name]):
            raise ValueError(
                f"`{asker}` needs {'.'.join(name)} as {_kind(leaf)}, got "
                f"{_kind(found[name])}. Where only the dtypes differ, build the inner "
                "optimizer for them, for example with `mu_dtype=`."
            )
    leaves = [jnp.asarray(found[name]) for name in wanted]
    return jax.tree.structure(like).unflatten(leaves)


def by_path(tree: Any) -> dict[tuple[str, ...], Any]:
    """Return the leaves by their paths in words, in the order of the tree."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        found[tuple(jax.tree_util.keystr((key,), simple=True) for key in path)] = leaf
    return found


def _without_value(found: dict[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
    """Leave out the last word of the array of a variable of Flax NNX."""
    return {
        words[:-1] if words[-1:] == ("value",) else words: leaf
        for words, leaf in found.items()
    }


def _kind(leaf) -> str:
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"


def _differing(wanted, found) -> str:
    def listed(names) -> str:
        more = ", ..." if len(names) > _SHOWN else ""
        return ", ".join(map(".".join, names[:_SHOWN])) + more

    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    parts = [("missing", missing), ("unexpected", extra)]
    return "; ".join(f"{what}: {listed(names)}" for what, names in parts if names)


def require_on_host(asker: str, *trees: Any) -> None:
    """Raise ValueError if something is traced."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees)):
        raise ValueError(
            f"`{asker}` reads its arguments on the host, so call it outside of "
            "`jax.jit` and `jax.vmap`. Of an ensemble, take one member after the "
            "other, and stack the states."
        )


def require_same_names(old: Sequence[str], new: Sequence[str]) -> None:
    """Raise ValueError unless two guards watch parameters of the same names."""
    if {*old} != {*new}:
        raise ValueError(
            "`migrate` got the state of other parameters: it has "
            f"{sorted({*old} - {*new})[:_SHOWN]} in place of "
            f"{sorted({*new} - {*old})[:_SHOWN]}."
        )


def warn_of_dropped(old: Sequence[Any], new: Sequence[Any]) -> None:
    """Warn if some but not all `back_off`s of a guard are dropped."""
    cuts = lambda parts: sum(
        isinstance(part, State) and part.name == "back_off" for part in parts
    )
    if cuts(old) > cuts(new) > 0:
        warnings.warn(
            f"the old guard has {cuts(old)} `back_off`s and the new one {cuts(new)}. "
            "Their states are carried over in order, so a cut in force may be lost: "
            "check `lr_scale` in the next step.",
            stacklevel=4,
        )
