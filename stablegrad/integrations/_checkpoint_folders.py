"""Rules of checkpoints: whose a folder is, what may be saved, and what fits."""

import json
import operator
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _reading, _trees
from ..engine._record import totals_of
from ..engine._step import GuardState

FORMAT = 1
GUARD_KEYS = {"numbers", "names"}  # Of a guard's arrays in a dict.
MARK = "stablegrad.json"  # The file that marks a folder as one of checkpoints.


def claim(place: str | os.PathLike) -> None:
    """Mark a new folder as one of checkpoints, or raise ValueError at a foreign one."""
    if "://" in os.fspath(place):
        raise ValueError(f"`folder` must be on a file system, got {place}.")
    folder = Path(place)
    mark = folder / MARK
    if not mark.exists():
        foreign = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        # Another process may be marking it at this moment.
        if foreign and not _marked(folder):
            raise ValueError(f"{folder} holds something else than checkpoints.")
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f"{MARK}.{os.getpid()}.{threading.get_ident()}"
        draft.write_text(json.dumps({"format": FORMAT}))
        os.replace(draft, mark)
        return
    try:
        version = json.loads(mark.read_text())["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{mark} is damaged: {error!r}.") from error
    if version != FORMAT:
        raise ValueError(
            f"{folder} is of format {version!r}; this version of stablegrad reads "
            f"{FORMAT}. A newer one wrote it: update stablegrad."
        )


def _marked(folder: Path) -> bool:
    """Return whether a folder holds the mark, or the draft of one, at most."""
    return folder.is_dir() and all(x.name.startswith(MARK) for x in folder.iterdir())


def step_number(step: Any) -> int:
    """Return a step as an int, which may be a number on the device."""
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0 or isinstance(step, bool):
        raise ValueError(f"`step` must be an integer >= 0, got {step!r:.60}.")
    return number


def as_json(metadata: Any) -> Any:
    """Return a deep copy of `metadata`: the caller may change the original later.

    Raise TypeError if JSON cannot hold it.
    """
    try:
        return json.loads(json.dumps(metadata))
    except (TypeError, ValueError) as error:
        raise TypeError(f"`metadata` must be something for JSON: {error}.") from error


def as_arrays(trees: Any, opt_state: Any) -> dict[str, Any]:
    """Return what is saved, with numbers as arrays, as a compiled step returns them.

    Raise TypeError at a leaf that is neither a number nor an array, and at an integer
    that no array holds.
    """

    def convert(path, leaf):
        if isinstance(leaf, np.generic):
            return np.asarray(leaf)
        if isinstance(leaf, bool | int | float | complex):
            try:
                return jnp.asarray(leaf)
            except OverflowError as error:
                raise TypeError(
                    f"The integer {leaf} at {_trees.path_name(path)} needs more than "
                    "32 bits: save it in `metadata`."
                ) from error
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            return leaf
        raise TypeError(
            f"A checkpoint holds arrays and numbers, got {leaf!r:.60} at "
            f"{_trees.path_name(path)}. Of an Equinox model, save "
            "`eqx.filter(model, eqx.is_array)`."
        )

    saved = {"trees": trees, "opt_state": opt_state}
    return jax.tree_util.tree_map_with_path(convert, saved)


def guards_in(trees: Any, opt_state: Any) -> list[GuardState]:
    """Return the states of all guards; raise ValueError if one cannot be read."""
    is_dict = lambda node: isinstance(node, Mapping) and node.keys() >= GUARD_KEYS
    if _trees.nodes(opt_state, is_dict):
        raise ValueError(
            "`opt_state` comes from `nnx.state(optimizer)`, which has no names for a "
            "guard's numbers: save and restore `optimizer.opt_state` instead."
        )
    return _reading.search(_trees.without_variables((trees, opt_state)))


def may_be_saved(trees: Any, guards: Iterable[GuardState]) -> bool:
    """Return whether all of `trees` is finite and no guard has halted."""
    finite = [jnp.all(jnp.isfinite(x)) for x in _trees.inexact_leaves(trees)]
    halted = any(np.any(_reading.last_step(own).halted) for own in guards)
    return not halted and all(jax.device_get(finite))


def is_calm(guard_state: GuardState, steps: int) -> bool:
    """Return whether a guard has not intervened in the last `steps` steps."""
    record, _ = _reading.record_of(guard_state)
    kind, _, last = np.moveaxis(np.asarray(record.log.latest), -1, 0)
    ago = np.asarray(totals_of(record).guarded_steps) - 1 - last
    return bool(np.all((kind == 0) | (ago >= steps)))


def shapes_by_name(tree: Any) -> dict[str, tuple]:
    """Return shape and dtype of each leaf by name, of arrays or of Orbax's metadata.

    Raise FileNotFoundError for the metadata of a checkpoint without any, which is None.
    """
    if tree is None:
        raise FileNotFoundError("its list of arrays is missing")
    tree = getattr(tree, "tree", tree)
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    found = {}
    for path, leaf in leaves:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        ):
            leaf = jax.eval_shape(jax.random.key_data, leaf)  # Which Orbax writes.
        found[_trees.path_name(path)] = (tuple(leaf.shape), str(leaf.dtype))
    return found


def differences(stored: dict[str, tuple], wanted: dict[str, tuple]) -> str:
    """Return what differs, one line per leaf; "" if nothing does."""
    names = [*stored, *(name for name in wanted if name not in stored)]
    lines = [
        f"  {name}: saved {stored.get(name, 'not')}, wanted {wanted.get(name, 'not')}"
        for name in names
        if stored.get(name) != wanted.get(name)
    ]
    return "\n".join([f"{len(lines)} leaves differ", *lines[:5]]) if lines else ""
