"""Every rule holds what the primitive really makes of elements within the ranges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from stablegrad.bounds._range import Range
from stablegrad.bounds._rules import RULES
from stablegrad.bounds._walk import Walk

ANY, POSITIVE, UNIT = (-7.0, 9.0), (0.25, 30.0), (0.0, 1.0)
# For each primitive: a function that is traced to it, and ranges of its operands.
CASES = {
    "neg": (lambda x: -x, [ANY]),
    "add": (lambda x, y: x + y, [ANY, (-1e6, 3.0)]),
    "add_any": (lambda x, y: jax.vjp(lambda z: (z, z), x)[1]((x, y))[0], [ANY, ANY]),
    "sub": (lambda x, y: x - y, [ANY, POSITIVE]),
    "mul": (lambda x, y: x * y, [ANY, (-3.0, 0.5)]),
    "div": (lambda x, y: x / y, [ANY, POSITIVE]),
    "square": (jnp.square, [ANY]),
    "integer_pow": (lambda x: lax.integer_pow(x, 3), [ANY]),
    "pow": (lambda x, y: x**y, [POSITIVE, (-2.0, 2.0)]),
    "abs": (jnp.abs, [ANY]),
    "sign": (jnp.sign, [ANY]),
    "sqrt": (jnp.sqrt, [(0.0, 50.0)]),
    "rsqrt": (lax.rsqrt, [POSITIVE]),
    "exp": (jnp.exp, [ANY]),
    "log": (jnp.log, [POSITIVE]),
    "tanh": (jnp.tanh, [ANY]),
    "logistic": (jax.nn.sigmoid, [ANY]),
    "max": (jnp.maximum, [ANY, POSITIVE]),
    "min": (jnp.minimum, [ANY, POSITIVE]),
    "clamp": (lambda x, lo: lax.clamp(lo, x, jnp.full_like(x, 2.0)), [ANY, UNIT]),
    "select_n": (
        lambda p, x, y: lax.select_n(p > 0.5, x, y),
        [UNIT, ANY, (20.0, 30.0)],
    ),
    "reduce_sum": (lambda x: jnp.sum(x, axis=0), [ANY]),
    "reduce_max": (lambda x: jnp.max(x, axis=0), [ANY]),
    "reduce_min": (lambda x: jnp.min(x, axis=0), [ANY]),
    "convert_element_type": (lambda x: x.astype(jnp.bfloat16), [(1.0, 1.003)]),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 8, 7), [(1.0, 1.003)]),
    "concatenate": (lambda x, y: jnp.concatenate([x, y]), [ANY, (20.0, 30.0)]),
    "pad": (lambda x: jnp.pad(x, ((1, 1), (0, 0)), constant_values=-50.0), [ANY]),
    "broadcast_in_dim": (lambda x: x[None] + jnp.zeros((3, 1, 1)), [ANY]),
    "copy": (jnp.copy, [ANY]),
    "expand_dims": (lambda x: x[:, None], [ANY]),
    "reshape": (lambda x: x.reshape(-1), [ANY]),
    "rev": (lambda x: x[::-1], [ANY]),
    "slice": (lambda x: x[2:5], [ANY]),
    "squeeze": (lambda x: x[:, None].squeeze(1), [ANY]),
    "stop_gradient": (lax.stop_gradient, [ANY]),
    "transpose": (lambda x: x.T, [ANY]),
    "eq": (lambda x, y: x == y, [ANY, ANY]),
    "ne": (lambda x, y: x != y, [ANY, ANY]),
    "lt": (lambda x, y: x < y, [ANY, ANY]),
    "le": (lambda x, y: x <= y, [ANY, ANY]),
    "gt": (lambda x, y: x > y, [ANY, ANY]),
    "ge": (lambda x, y: x >= y, [ANY, ANY]),
    "is_finite": (jnp.isfinite, [ANY]),
    "and": (lambda x, y: (x > 0) & (y > 0), [ANY, ANY]),
    "or": (lambda x, y: (x > 0) | (y > 0), [ANY, ANY]),
    "not": (lambda x: ~(x > 0), [ANY]),
    "xor": (lambda x, y: (x > 0) ^ (y > 0), [ANY, ANY]),
    "reduce_and": (lambda x: jnp.all(x > 0, axis=0), [ANY]),
    "reduce_or": (lambda x: jnp.any(x > 0, axis=0), [ANY]),
}


def derive(function, arrays, ranges):
    """The range that a walk derives, as numbers, and whether it holds."""
    walk = Walk()
    program = jax.make_jaxpr(function)(*arrays)
    facts = [Range(jnp.float32(lo), jnp.float32(hi)) for lo, hi in ranges]
    (found,) = walk.results(program, facts)
    return found, walk.holds()


def within(lo, hi, seed):
    """Elements of a range, its ends among them."""
    x = np.random.default_rng(seed).uniform(lo, hi, (16, 8)).astype(np.float32)
    x.flat[0], x.flat[-1] = lo, hi
    return jnp.asarray(np.random.default_rng(seed + 9).permutation(x.ravel())).reshape(
        16, 8
    )


def test_every_rule_has_a_case():
    assert set(CASES) == set(RULES)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_holds_every_result_and_is_not_much_wider(name):
    function, ranges = CASES[name]
    results = []
    for seed in range(3):
        arrays = [within(lo, hi, 10 * seed + i) for i, (lo, hi) in enumerate(ranges)]
        results.append(np.asarray(function(*arrays), np.float64).ravel())
    found, holds = derive(function, arrays, ranges)
    results = np.concatenate(results)
    assert holds and found.lo <= results.min() and results.max() <= found.hi
    # No rule may hide behind a range of everything.
    reach = max(abs(results.min()), abs(results.max()), 1.0)
    assert found.hi - found.lo <= 300 * reach


def test_a_number_times_itself_is_not_negative():
    found, _ = derive(lambda x: x * x, [jnp.ones(4)], [(-3.0, 2.0)])
    assert found.lo == 0 and 9 <= found.hi < 9.001


@pytest.mark.parametrize(
    ("function", "ranges"),
    [
        (lambda x, y: x / y, [ANY, (0.0, 1.0)]),
        (lambda x, y: x / y, [ANY, (-1.0, 1.0)]),
        (jnp.sqrt, [(-1e-30, 1.0)]),
        (lax.rsqrt, [(0.0, 1.0)]),
        (jnp.log, [(0.0, 1.0)]),
        (lambda x, y: x**y, [(-1.0, 1.0), (0.5, 0.5)]),
        (jnp.square, [(0.0, 2e19)]),
        (lambda x: (x * x) * 1e-30, [(0.0, 2e19)]),
        (lambda x: x + 2e38, [(0.0, 1e38)]),
        (jnp.exp, [(0.0, 90.0)]),
        (lambda x: x.astype(jnp.float16), [(0.0, 4e4)]),
        (lambda x: jnp.sum(x), [(0.0, 1e38)]),
    ],
)
def test_what_may_overflow_or_become_nan_on_the_way_does_not_hold(function, ranges):
    _, holds = derive(function, [jnp.ones(64) for _ in ranges], ranges)
    assert not holds


@pytest.mark.parametrize("function", [jnp.sin, jnp.cumsum, lambda x: x @ x, jnp.sort])
def test_what_has_no_rule_is_unknown(function):
    found, _ = derive(function, [jnp.ones(8)], [ANY])
    assert found is None


def test_a_branch_that_is_not_known_gives_either_result():
    def function(x):
        return lax.cond(x[0] > 0, lambda: x + 10, lambda: x - 10)

    found, holds = derive(function, [jnp.ones(8)], [ANY])
    assert holds and found.lo <= -17 and found.hi >= 19


def test_scalars_are_followed_by_their_values():
    def function(count, x):
        return x / (1 - 0.9 ** (count + 1))

    walk = Walk()
    from stablegrad.bounds._range import Known

    program = jax.make_jaxpr(function)(jnp.float32(0), jnp.ones(8))
    facts = [Known(jnp.float32(0)), Range(jnp.float32(-1), jnp.float32(1))]
    (found,) = walk.results(program, facts)
    assert walk.holds()
    np.testing.assert_allclose([found.lo, found.hi], [-10, 10], rtol=1e-5)
