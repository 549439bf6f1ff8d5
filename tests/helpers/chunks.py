"""A scan of any length by a program for a few steps, which is compiled once."""

import jax
import numpy as np

STEPS = 20  # Of most sequences in the tests, the length is a multiple.


def scan_in_chunks(program, carry, xs):
    """What `jax.lax.scan` returns, where `program` is a compiled scan.

    `program(carry, xs)` returns the next carry and arrays with a leading axis: step.
    It is called with `STEPS` steps at a time, and once with the rest.
    """
    steps = len(jax.tree.leaves(xs)[0])
    found = []
    for start in range(0, steps, STEPS):
        part = jax.tree.map(lambda x, i=start: x[i : i + STEPS], xs)
        carry, ys = program(carry, part)
        found.append(jax.device_get(ys))
    return carry, jax.tree.map(lambda *parts: np.concatenate(parts), *found)
