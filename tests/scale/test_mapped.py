"""`axis_name=`: whole runs a shard at a time, under `shard_map` and `pmap`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _scale.collectives import collectives, payload
from helpers.mapping import AXIS, DEVICES, mapped, mesh
from helpers.marking import core
from helpers.scenario import (
    BYTES_PER_LEAF,
    OPTIMIZERS,
    Run,
    alone,
    assert_same,
    drive,
    gradients,
    parameter_of,
    parameters,
    step_of,
)
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

import stablegrad as sg

pytestmark = pytest.mark.devices(DEVICES)

# Which axis of each parameter is split; `gain` can be whole where that can be told.
SPLIT = {"bias": 0, "embed": 0, "gain": 0, "kernel": 1}
WHOLE = {**SPLIT, "gain": None}
CASES = [
    ("stabilize", "update", "small"),
    ("stabilize", "apply", "large"),
    ("per leaf", "update", "large"),
    ("per leaf", "apply", "small"),
]


def specs(split):
    as_spec = lambda axis: P() if axis is None else P(*[None] * axis, AXIS)
    return {name: as_spec(axis) for name, axis in split.items()}


def specs_of(state, split):
    """Leaves of the state that are named for a parameter lie as it does."""
    places = specs(split)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: places.get(parameter_of(path), P()), state
    )


def init_inside(tx, params, split, check_vma):
    """A state made a shard at a time, and its specs."""
    where = (specs(split),)
    shapes = jax.eval_shape(mapped(tx.init, where, P(), check_vma=False), params)
    state_specs = specs_of(shapes, split)
    return mapped(tx.init, where, state_specs, check_vma)(params), state_specs


def local_step(tx, mode):
    """`step_of`, where each shard has a loss of its own, of the right mean."""
    step = step_of(tx, mode)

    def local(params, state, grads, value):
        offset = lax.axis_index(AXIS) - (DEVICES - 1) / 2
        return step(params, state, grads, value + 0.1 * offset)

    return local


def assert_agreed(state):
    """Whatever is not a shard of something is the same on all devices."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if parameter_of(path) not in SPLIT:
            first, *others = [
                np.asarray(shard.data) for shard in leaf.addressable_shards
            ]
            assert len(others) == DEVICES - 1
            for other in others:
                np.testing.assert_array_equal(other, first, err_msg=str(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer, mode, size, tracked",
    core(
        [*[(*case, True) for case in CASES], *[(*case, False) for case in CASES[1:3]]],
        (*CASES[0], True),
    ),
)
def test_shards_under_shard_map_step_as_one_device_does(optimizer, mode, size, tracked):
    tx = OPTIMIZERS[optimizer](axis_name=AXIS)
    split = WHOLE if tracked else SPLIT
    where, params = specs(split), parameters(size)
    if mode == "update":
        state, state_specs = init_inside(tx, params, split, tracked)
    else:
        state = tx.init(params)
        state_specs = specs_of(state, split)
    step = mapped(
        local_step(tx, mode),
        in_specs=(where, state_specs, where, P()),
        out_specs=(where, state_specs, P()),
        check_vma=tracked,
    )
    places = jax.tree.map(
        lambda spec: NamedSharding(mesh(), spec), (where, state_specs)
    )
    params, state = jax.device_put((params, state), places)
    place = lambda t: jax.device_put(gradients(size, t), places[0])
    program = step.lower(params, state, params, jnp.float32(1)).compile()
    found = collectives(program)
    assert {one.kind for one in found} == {"all-reduce"}
    assert payload(found) <= BYTES_PER_LEAF * len(SPLIT)
    run = drive(program, params, state, place)
    assert_same(run, alone(optimizer, size))
    assert_agreed(run.state)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer, mode, size", [CASES[0], CASES[3]])
def test_shards_under_pmap_step_as_one_device_does(optimizer, mode, size):
    tx = OPTIMIZERS[optimizer](axis_name=AXIS)
    split = lambda tree: {
        name: np.stack(np.split(leaf, DEVICES, SPLIT[name]))
        for name, leaf in tree.items()
    }
    step = jax.pmap(local_step(tx, mode), axis_name=AXIS, in_axes=(0, 0, 0, None))
    params = split(parameters(size))
    state = jax.pmap(tx.init, AXIS)(params)
    run = drive(step, params, state, lambda t: split(gradients(size, t)))
    assert_agreed(run.state)
    whole = {
        name: np.concatenate(list(np.asarray(leaf)), SPLIT[name])
        for name, leaf in run.params.items()
    }
    history = {name: rows[:, 0] for name, rows in run.history.items()}
    assert_same(Run(whole, history, run.state), alone(optimizer, size))


@pytest.mark.slow
def test_the_model_of_each_device_is_probed_on_its_own():
    rates = jnp.array([0.1, 50.0] * (DEVICES // 2))  # Every second one is too high.
    guarded = lambda rate: sg.guard(optax.sgd(rate), sg.trust_region())
    loss_fn = lambda params: jnp.sum(params**2)

    def one(state, params, rate):
        state = jax.tree.map(lambda x: x[0], state)  # Its own, of the stack.
        extra = {"value": loss_fn(params), "value_fn": loss_fn}
        grads = jax.grad(loss_fn)(params)
        return sg.apply(guarded(rate[0]), grads, state, params, **extra)[0]

    params = jnp.ones(DEVICES)
    states = jax.vmap(guarded(0.1).init)(params[:, None])
    every = mapped(one, (P(AXIS), P(AXIS), P(AXIS)), P(AXIS))
    # On this loss r is the rate; a step that is too long goes to r = 1/2, the minimum.
    expected = np.where(rates > 1, 0.0, 0.8)
    np.testing.assert_allclose(every(states, params, rates), expected, atol=1e-4)
