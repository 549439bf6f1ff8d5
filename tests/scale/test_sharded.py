"""Parameters sharded over eight virtual devices: one device's decisions and numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _scale.collectives import collectives, payload
from helpers.marking import core
from helpers.scenario import (
    BYTES_PER_LEAF,
    MODES,
    OPTIMIZERS,
    alone,
    assert_same,
    drive,
    gradients,
    parameter_of,
    parameters,
    place,
    shardings,
    spread,
    step_of,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import stablegrad as sg
from stablegrad import _platform
from stablegrad.engine import _commit

pytestmark = pytest.mark.devices(8)


def assert_sharded_as(places, state):
    """Leaves shaped as a parameter lie as it does, all others on every device."""
    moments = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = parameter_of(path)
        if name in places:
            moments += 1
            assert leaf.sharding.is_equivalent_to(places[name], leaf.ndim), path
        else:
            assert leaf.sharding.is_fully_replicated, path
    assert moments == 2 * len(places)


def largest(found) -> int:
    """Elements of the largest array that any collective gives."""
    return max(max(one.sizes) for one in found)


def biggest(size: str) -> int:
    """Elements of the biggest parameter."""
    return max(leaf.size for leaf in parameters(size).values())


@pytest.mark.slow
@pytest.mark.parametrize("mode", core(MODES, "apply"))
@pytest.mark.parametrize("optimizer", core(OPTIMIZERS, "stabilize"))
@pytest.mark.parametrize(
    "layout, size",
    core([("fsdp", "small"), ("tensor", "large")], ("fsdp", "small")),
)
def test_the_run_is_that_of_one_device_without_any_gather(
    layout, size, optimizer, mode
):
    tx, places = OPTIMIZERS[optimizer](), shardings(layout)
    params, state = spread(tx, parameters(size), places)
    step = jax.jit(step_of(tx, mode))
    program = step.lower(params, state, params, jnp.float32(1)).compile()
    found = collectives(program)
    assert largest(found) <= biggest(size) / 16  # Numbers, never a parameter.
    run = drive(program, params, state, lambda t: place(gradients(size, t), places))
    assert_same(run, alone(optimizer, size))
    assert_sharded_as(places, run.state)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "large"])
def test_on_accelerators_numbers_are_summed_and_nothing_is_gathered(size, monkeypatch):
    elsewhere = lambda: jnp.zeros((), bool)  # Not on a CPU.
    monkeypatch.setattr(_platform, "on_cpu", elsewhere)
    monkeypatch.setattr(_commit, "on_cpu", elsewhere)
    tx, places = OPTIMIZERS["stabilize"](), shardings("tensor")
    params, state = spread(tx, parameters(size), places)
    step = jax.jit(step_of(tx, "apply"))
    program = step.lower(params, state, params, jnp.float32(1)).compile()
    found = collectives(program)
    assert {one.kind for one in found} == {"all-reduce"}
    assert largest(found) <= biggest(size) / 16
    if jax.__version_info__ >= (0, 10, 2):  # Before, sums are exchanged row by row.
        assert payload(found) <= BYTES_PER_LEAF * len(places)
    run = drive(program, params, state, lambda t: place(gradients(size, t), places))
    assert_same(run, alone("stabilize", size))


def test_a_gather_is_seen_where_there_is_one():
    places = shardings("fsdp")
    params = jax.device_put(parameters("small"), places)
    whole = NamedSharding(places["embed"].mesh, P())
    gather = jax.jit(lambda x: x + 1, out_shardings=whole)
    (found,) = collectives(gather.lower(params["embed"]).compile())
    assert found.kind == "all-gather"
    assert found.sizes == (params["embed"].size,) and found.payload == 4 * 32 * 16


PLAIN = {"w": jnp.arange(32.0).reshape(8, 4) / 10, "b": jnp.ones(4)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(sg.clip_by_norm(1.0), marks=pytest.mark.slow),
        pytest.param(sg.clip_by_param_norm(), marks=pytest.mark.slow),
        sg.guard(optax.sgd(1.0), sg.clip(sg.fixed(1.0)), sg.skip()),
    ],
    ids=["clip_by_norm", "clip_by_param_norm", "guard"],
)
def test_axes_may_be_auto_or_explicit(tx, kind):
    params = jax.device_put(PLAIN, explicit_or_auto(kind))
    sharded, single = jax.jit(tx.update), jax.jit(tx.update)
    for scale in (1.0, 1e25):
        grads = jax.tree.map(functools.partial(jnp.multiply, scale), params)
        updates, _ = sharded(grads, tx.init(params), params)
        grads = jax.tree.map(functools.partial(jnp.multiply, scale), PLAIN)
        expected, _ = single(grads, tx.init(PLAIN), PLAIN)
        np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-5)
        assert updates["w"].sharding.spec[0] == "d"


def test_units_that_are_split_over_an_explicit_axis_are_clipped_one_by_one():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    kernel = jnp.arange(1.0, 33.0).reshape(4, 8)  # A unit a column, and a device.
    params = {"kernel": jax.device_put(kernel, NamedSharding(mesh, P(None, "d")))}
    tx = sg.clip_by_norm(40.0, per="unit")
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    norms = np.linalg.norm(kernel, axis=0, keepdims=True)
    expected = kernel * np.minimum(1, 40 / norms)
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-6)
    assert updates["kernel"].sharding.spec == P(None, "d")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_the_trust_region_probes_on_a_mesh(kind):
    params = jax.device_put(PLAIN, explicit_or_auto(kind))
    tx = sg.guard(optax.sgd(50.0), sg.trust_region())
    loss_fn = lambda p: jnp.sum(p["w"] ** 2)
    extra = {"value": loss_fn(params), "value_fn": loss_fn}
    step = jax.jit(lambda p, s: tx.update(jax.grad(loss_fn)(p), s, p, **extra))
    updates, _ = step(params, tx.init(params))
    # On this loss r is the rate; the first step goes to r = 1/2, the minimum.
    np.testing.assert_allclose(updates["w"], -2 * 0.5 * PLAIN["w"], rtol=1e-4)
    assert updates["w"].sharding.spec[0] == "d"


def explicit_or_auto(kind):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    return {"w": NamedSharding(mesh, P("d")), "b": NamedSharding(mesh, P())}
