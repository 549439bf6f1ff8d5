"""Folders of checkpoints: whose they are, and whether one fits what is wanted."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from .. import _trees

FORMAT = 1
MARK = "stablegrad.json"  # The file that tells whose folder it is.


def claim(folder: Path) -> None:
    """Mark a new folder as one of checkpoints, or raise ValueError at a foreign one."""
    mark = folder / MARK
    if not mark.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} holds something else than checkpoints.")
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps({"format": FORMAT}))
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


def described(tree: Any) -> dict[str, tuple]:
    """Return shape and dtype of each leaf by name, of arrays or of Orbax's metadata."""
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
    """Return what differs, a line a leaf; "" if nothing does."""
    names = [*stored, *(name for name in wanted if name not in stored)]
    lines = [
        f"  {name}: saved {stored.get(name, 'not')}, wanted {wanted.get(name, 'not')}"
        for name in names
        if stored.get(name) != wanted.get(name)
    ]
    return "\n".join([f"{len(lines)} leaves differ", *lines[:5]]) if lines else ""
