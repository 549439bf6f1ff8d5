"""The norm of an update from one in 64 of its rows.

    ||u|| ~ sqrt(sum_i n_i / k_i sum_{j in rows of leaf i} u_ij^2)

Only those rows are ever computed, since nothing else reads the rest. Leaves up to 4,096
elements are taken whole, and of any leaf 2,048 elements at least.
"""

import jax
import jax.numpy as jnp
import numpy as np

from .. import _trees
from .._mapped_axes import Across
from .._norms import Measurement, measure, norm_of_norms

STRIDE = 64
WHOLE, LEAST = 4096, 2048  # Elements.
ROW = 256  # Elements of a leaf of rank 1 that count as a row.


def rows_of(tree, like) -> list[jax.Array]:
    """The rows of every floating-point leaf; `like` says which leaves are."""
    return [_rows(leaf) for leaf in _trees.inexact_leaves(tree, like)]


def norms_of(rows: list[jax.Array], like, over: Across) -> Measurement:
    """The norms of a tree as its rows tell; nothing is said of what is finite.

    `like` has the shapes of the tree, and says which leaves count.
    """
    sizes = [leaf.size for leaf in _trees.inexact_leaves(like)]
    pairs = zip(sizes, rows, strict=True)
    shares = [size / max(row.size, 1) for size, row in pairs]
    found = measure(rows, over=over)
    norms = found.leaf_norms * np.sqrt(np.array(shares, np.float32))
    return Measurement(norms, norm_of_norms(norms), jnp.full((), -1, jnp.int32))


def _rows(leaf: jax.Array) -> jax.Array:
    """Some of the rows, along an axis that devices may be split over.

    A strided slice stays on its shard, where a slice of the first rows would not.
    """
    if leaf.size <= WHOLE:
        return leaf
    if leaf.ndim == 1 and leaf.size % (ROW * STRIDE) == 0:
        leaf = leaf.reshape(-1, ROW)
    stride = min(STRIDE, 2 ** int(np.log2(leaf.size / LEAST)))
    sizes = leaf.shape[:-1] or leaf.shape
    axis = len(sizes) - 1 if sizes[-1] >= 2 * stride else int(np.argmax(sizes))
    if sizes[axis] < 2 * stride:
        axis = int(np.argmax(leaf.shape))
    return leaf[(slice(None),) * axis + (slice(None, None, stride),)]
