"""Tests for granularity: global, leaf, unit and label, for every response."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marking import core
from helpers.training import scan

import stablegrad as sg
from stablegrad._norms import measure
from stablegrad._scales import scale_leaves
from stablegrad._trees import inexact_leaves
from stablegrad.engine._families import Statistics
from stablegrad.granularity._group_norms import (
    group_norms,
    group_scales,
    measure_groups,
    scaled_groups_norm,
)
from stablegrad.granularity._groups import group

RNG = np.random.default_rng(0)
PARAMS = {
    "body": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
    "head": {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(4)},
    "step": jnp.arange(3),
}


def by_kind(path, leaf):
    del leaf
    return str(path[-1].key)


def body_only(path, leaf):
    del leaf
    return "body" if path[0].key == "body" else None


GRANULARITIES = {
    "global": ("global", 1),
    "leaf": ("leaf", 4),
    "unit": ("unit", 1 + 2 + 1 + 4),
    "units without head": (sg.units(exclude="head"), 1 + 2),
    "kind": (by_kind, 2),
    "body only": (body_only, 1),
}
every = pytest.mark.parametrize("name", GRANULARITIES)


def random_like(params):
    def draw(x):
        x = jnp.asarray(x)
        noise = jnp.asarray(RNG.normal(size=x.shape), jnp.float32)
        return noise if x.dtype == jnp.float32 else x

    return jax.tree.map(draw, params)


def norms_by_hand(name, grads):
    """The norm of each group in float64, written out."""
    body, head = grads["body"], grads["head"]
    whole = [body["bias"], body["kernel"], head["bias"], head["kernel"]]
    flat = [np.float64(x).ravel() for x in whole]
    norm = lambda *parts: np.linalg.norm(np.concatenate(parts))
    columns = lambda kernel: list(np.linalg.norm(np.float64(kernel), axis=0))
    return {
        "global": [norm(*flat)],
        "leaf": [norm(x) for x in flat],
        "unit": [
            *[norm(flat[0]), *columns(body["kernel"])],
            *[norm(flat[2]), *columns(head["kernel"])],
        ],
        "units without head": [norm(flat[0]), *columns(body["kernel"])],
        "kind": [norm(flat[0], flat[2]), norm(flat[1], flat[3])],
        "body only": [norm(flat[0], flat[1])],
    }[name]


@pytest.mark.slow
@every
@pytest.mark.parametrize("scale", core([1e-15, 1.0, 1e15], 1e15))
def test_norms_of_groups_are_those_written_out(name, scale):
    per, count = GRANULARITIES[name]
    grads = jax.tree.map(
        lambda x: scale * x if x.dtype == jnp.float32 else x, random_like(PARAMS)
    )
    grouping = group(per, grads)
    found = group_norms(grouping, measure(grads), inexact_leaves(grads))
    assert grouping.count == count
    np.testing.assert_allclose(found, norms_by_hand(name, grads), rtol=1e-5)


@pytest.mark.slow
@every
def test_factors_reach_the_elements_of_their_group(name):
    per, count = GRANULARITIES[name]
    grads = random_like(PARAMS)
    grouping = group(per, grads)
    factors = jnp.asarray(RNG.uniform(0.1, 0.9, size=count), jnp.float32)
    scales = group_scales(grouping, factors)
    assert (scales.within is not None) == (grouping.axes is not None)
    done = scale_leaves(grads, scales, grads)
    expected = factors * np.array(norms_by_hand(name, grads))
    np.testing.assert_allclose(norms_by_hand(name, done), expected, rtol=1e-5)
    np.testing.assert_allclose(scales.smallest(), factors.min(), rtol=1e-6)
    if name in ("body only", "units without head"):
        chex.assert_trees_all_equal(done["head"], grads["head"])


@pytest.mark.slow
@every
@pytest.mark.parametrize("scale", core([1e-15, 1.0, 1e15], 1e15))
def test_one_pass_tells_what_the_two_measurements_tell(name, scale):
    per, count = GRANULARITIES[name]
    grads = jax.tree.map(
        lambda x: scale * x if x.dtype == jnp.float32 else x, random_like(PARAMS)
    )
    grouping = group(per, grads)
    measured, norms = jax.jit(measure_groups, static_argnums=0)(grouping, grads)
    chex.assert_trees_all_close(measured, measure(grads), rtol=1e-6)
    expected = np.array(norms_by_hand(name, grads))
    np.testing.assert_allclose(norms / scale, expected / scale, rtol=1e-5)
    factors = jnp.asarray(RNG.uniform(0.1, 0.9, size=count), jnp.float32)
    scaled = scale_leaves(grads, group_scales(grouping, factors), grads)
    found = scaled_groups_norm(grouping, measured, norms, factors)
    np.testing.assert_allclose(found, measure(scaled).norm, rtol=1e-5)


def test_one_pass_names_the_bad_leaf_and_spares_the_other_units():
    grads = random_like(PARAMS)
    grads["body"]["kernel"] = grads["body"]["kernel"].at[0, 1].set(jnp.nan)
    measured, norms = measure_groups(group("unit", grads), grads)
    assert measured.largest_leaf == 1 and jnp.isnan(measured.norm)
    assert jnp.isnan(norms).sum() == 1


@every
def test_a_nan_is_the_affair_of_its_own_group(name):
    per, count = GRANULARITIES[name]
    grads = random_like(PARAMS)
    grads["body"]["kernel"] = grads["body"]["kernel"].at[0, 1].set(jnp.nan)
    found = group_norms(group(per, grads), measure(grads), inexact_leaves(grads))
    assert np.isnan(found).sum() == 1
    assert np.isfinite(found).sum() == count - 1


def fault_run(response, leaf="kernel", times=1e3, at=60, steps=70):
    """60 healthy steps, then ten with one leaf of the body grown."""
    params = {k: PARAMS[k] for k in ("body", "head")}
    grads = jax.tree.map(
        lambda x: jnp.asarray(RNG.normal(size=(steps, *x.shape)), jnp.float32), params
    )
    grown = grads["body"][leaf].at[at:].multiply(times)
    grads["body"] = {**grads["body"], leaf: grown}
    tx = sg.guard(optax.sgd(1.0), response)
    _, state, (trail, seen, _) = scan(tx, grads, params, np.zeros(steps))
    moved = jax.tree.map(lambda x: np.diff(np.asarray(x), axis=0), trail)
    return grads, moved, seen, state


PER = {"leaf": "leaf", "unit": "unit", "kind": by_kind}


@pytest.mark.slow
@pytest.mark.parametrize("per", core(PER, "unit"))
def test_clip_leaves_the_groups_that_are_fine_alone(per):
    grads, moved, seen, _ = fault_run(sg.clip(sg.zscore(4.0, per=PER[per])))
    assert seen["clip_scale"][60] < 0.05 and not seen["skipped"].any()
    for part in ("body", "head"):
        np.testing.assert_allclose(
            moved[part]["bias"][59], -grads[part]["bias"][60], rtol=1e-4, atol=1e-6
        )
    assert np.abs(moved["body"]["kernel"][59]).max() < 30  # Of 1000.


@pytest.mark.slow
@pytest.mark.parametrize("per", core(PER, "leaf"))
def test_skip_sees_one_bad_group_among_many(per):
    rule = sg.zscore(8.0, per=PER[per])
    _, _, seen, _ = fault_run(sg.skip(rule), times=1e5)
    assert seen["skipped"][60:].all() and not seen["skipped"][30:60].any()


@pytest.mark.slow
@pytest.mark.parametrize("per", PER)
def test_back_off_sees_one_bad_group_among_many(per):
    rule = sg.zscore(8.0, per=PER[per])
    _, _, seen, _ = fault_run(sg.back_off(rule, factor=0.5), times=1e5)
    assert seen["lr_scale"][59] == 1 and seen["lr_scale"][60] == 0.5


@pytest.mark.slow
def test_update_norms_are_judged_by_group_too():
    rule = sg.clip(sg.fixed(0.5, of="update_norm", per=body_only))
    tx = sg.guard(optax.sgd(1.0), rule)
    params = {k: PARAMS[k] for k in ("body", "head")}
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    size = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(updates["body"])))
    np.testing.assert_allclose(size, 0.5, rtol=1e-5)
    np.testing.assert_allclose(updates["head"]["bias"], -1.0)


@pytest.mark.slow
@pytest.mark.parametrize("per", core(["leaf", "unit"], "leaf"))
def test_statistics_of_a_thousand_groups_are_one_vector(per):
    params = {f"layer_{i:04d}": jnp.ones((2, 2)) for i in range(1000)}
    response = sg.clip(sg.zscore(2.5, per=per))
    states = jax.eval_shape(Statistics((response,)).init, params)
    count = 1000 if per == "leaf" else 2000
    assert len(jax.tree.leaves(states)) == 6
    assert all(x.shape[0] == count for x in jax.tree.leaves(states))
    inner = optax.adam(0.1)
    state = jax.eval_shape(sg.guard(inner, response).init, params)
    own = len(jax.tree.leaves(state)) - len(jax.tree.leaves(inner.init(params)))
    assert own == 3  # One array of each dtype, and the leaves' names.


def test_a_label_that_cannot_be_hashed_is_an_error_that_names_the_leaf():
    tx = sg.guard(optax.sgd(0.1), sg.clip(sg.fixed(1.0, per=lambda path, leaf: [1])))
    with pytest.raises(ValueError, match=r"label that can be hashed.*body.bias"):
        tx.init(PARAMS)


@pytest.mark.parametrize("per", ["leaves", None, 3])
def test_an_unknown_granularity_is_an_error(per):
    with pytest.raises(ValueError, match="`per` must be one of"):
        sg.fixed(1.0, per=per)


def test_only_norms_have_groups():
    with pytest.raises(ValueError, match="`per` must be 'global'"):
        sg.fixed(1.0, of="value", per="unit")


@pytest.mark.slow
def test_a_function_may_leave_out_every_leaf():
    tx = sg.guard(optax.sgd(1.0), sg.clip(sg.zscore(2.5, per=lambda path, leaf: None)))
    params = {"w": jnp.ones(3)}
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], -1.0)
