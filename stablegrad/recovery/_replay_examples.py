"""Which examples of a batch a bad step is due to."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ._replay_report import Example, Run


def one_by_one(take: Callable[[Any], Run], batch: Any) -> tuple[Example, ...]:
    """Take the step with each example alone, and return the worst first.

    An example fills the batch with copies of it. The shapes stay, so nothing compiles.
    """
    leading = [x.shape[0] for x in jax.tree.leaves(batch) if np.ndim(x)]
    if not leading:
        raise ValueError("`by_example=` needs a batch with an array in it.")
    count = leading[0]

    def alone(index: int, leaf):
        if not np.ndim(leaf) or leaf.shape[0] != count:
            return leaf
        repeated = leaf[np.full(count, index)]
        if isinstance(leaf, jax.Array) and leaf.committed:
            repeated = jax.device_put(repeated, leaf.sharding)
        return repeated

    found = []
    for index in range(count):
        run = take(jax.tree.map(lambda leaf, i=index: alone(i, leaf), batch))
        found.append(Example(index, run.loss, run.grad_norm, run.leaf))
    return tuple(sorted(found, key=_goodness))


def _goodness(example: Example) -> float:
    """Return a key that puts what is not finite, then the largest, first."""
    return -example.grad_norm if example.finite else -np.inf
