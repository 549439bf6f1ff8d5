"""The norm of an update, from some of its rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training

from stablegrad._mapped_axes import HERE
from stablegrad.stepping._sample import LEAST, STRIDE, _rows, norms_of, rows_of

SHAPES = {
    "dense": (512, 300),
    "layers": (12, 96, 64),
    "filters": (3, 3, 64, 128),
    "table": (50_000, 8),
    "vector": (1 << 17,),
    "odd vector": (100_003,),
    "wide": (2, 200_000),
    "small": (64, 64),
    "scalar": (),
}


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_t(5, shape) * 10.0 ** rng.uniform(-2, 2))
        for name, shape in SHAPES.items()
    }


def test_the_sampled_norm_is_within_a_few_percent_of_every_leaf_and_of_all():
    update = {k: x.astype(jnp.float32) for k, x in tree().items()}
    found = jax.jit(lambda u: norms_of(rows_of(u, u), u, HERE))(update)
    exact = [np.linalg.norm(np.asarray(x, np.float64)) for x in jax.tree.leaves(update)]
    np.testing.assert_allclose(found.leaf_norms, exact, rtol=0.08)
    np.testing.assert_allclose(found.norm, np.linalg.norm(exact), rtol=0.05)


def test_small_leaves_are_measured_exactly():
    update = {"a": jnp.array([3e30, 4e30]), "b": jnp.full((64, 64), 1e-25)}
    found = norms_of(rows_of(update, update), update, HERE)
    np.testing.assert_allclose(found.leaf_norms, [5e30, 64e-25], rtol=1e-5)
    np.testing.assert_allclose(found.norm, 5e30, rtol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_the_rows_are_few_but_enough_and_from_all_over_the_leaf(name):
    size = int(np.prod(SHAPES[name]))
    leaf = jnp.arange(size, dtype=jnp.float32).reshape(SHAPES[name])
    rows = np.asarray(_rows(leaf)).ravel()
    if size <= 4096:
        assert len(rows) == size
        return
    assert min(LEAST, size) <= len(rows) <= max(size / STRIDE * 1.2, 2 * LEAST * 1.2)
    counts, _ = np.histogram(rows, bins=8, range=(0, size))
    assert counts.min() > 0


@pytest.mark.parametrize("whole", [False, True])
def test_only_the_rows_are_computed(whole):
    def norm(x):
        update = {"w": jnp.sqrt(x) / (1 + x)}
        rest = jnp.sum(update["w"], axis=0) if whole else 0.0
        return norms_of(rows_of(update, update), update, HERE).norm, rest

    lowered = jax.jit(norm, compiler_options=training.AS_USERS).lower(
        jnp.ones((2048, 512))
    )
    written = [
        line
        for line in lowered.compile().as_text().splitlines()
        if "= f32[2048,512]" in line and " fusion(" in line
    ]
    assert bool(written) == whole
