"""Meshes of both kinds of axes: where states lie, what compiles, what is decided."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.marking import core
from helpers.meshing import (
    DEVICES,
    LAYOUTS,
    NAN_STEP,
    OPTIMIZERS,
    Model,
    on_one_device,
    places,
    take_three_steps,
    tree,
    under,
)
from jax.sharding import AxisType, NamedSharding

import stablegrad as sg

pytestmark = pytest.mark.devices(DEVICES)

EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
SETS_MESH, PUTS_ALONE = True, False
# Every pair of settings occurs, apart from a few of optimizer and size.
CASES = [
    (EXPLICIT, SETS_MESH, "fsdp", "update", "guard", "small"),
    (EXPLICIT, SETS_MESH, "tensor", "apply", "stabilize", "large"),
    (EXPLICIT, PUTS_ALONE, "replicated", "nnx", "per leaf", "small"),
    (EXPLICIT, PUTS_ALONE, "fsdp", "apply", "olmo", "small"),
    (EXPLICIT, PUTS_ALONE, "tensor", "update", "per leaf", "small"),
    (AUTO, SETS_MESH, "replicated", "apply", "guard", "small"),
    (AUTO, SETS_MESH, "tensor", "nnx", "olmo", "small"),
    (AUTO, PUTS_ALONE, "fsdp", "nnx", "stabilize", "large"),
    (AUTO, SETS_MESH, "replicated", "update", "stabilize", "large"),
]


def assert_as_on_one_device(history, reference):
    """Norms to 1e-3, counts and decisions to the bit."""
    assert history.keys() == reference.keys()
    for name, expected in reference.items():
        if np.issubdtype(expected.dtype, np.floating):
            np.testing.assert_allclose(history[name], expected, rtol=1e-3, err_msg=name)
        else:
            np.testing.assert_array_equal(history[name], expected, err_msg=name)


@pytest.mark.parametrize(
    "kind, sets_mesh, layout, through, optimizer, size", core(CASES, CASES[0])
)
def test_three_steps_compile_once_keep_the_sharding_and_are_those_of_one_device(
    kind, sets_mesh, layout, through, optimizer, size
):
    where = places(layout, kind)
    with under(where, sets_mesh):
        trial = take_three_steps(OPTIMIZERS[optimizer](), through, size, where=where)
    assert trial.programs == 1
    for name, leaf in trial.params.items():
        assert leaf.sharding == where[name]
    reference = on_one_device(optimizer, size)
    assert np.flatnonzero(reference.history["skipped"]).tolist() == [NAN_STEP]
    assert_as_on_one_device(trial.history, reference.history)
    for name, expected in reference.params.items():
        np.testing.assert_allclose(trial.params[name], expected, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, kind, sets_mesh, layout, through",
    [
        (jnp.float16, EXPLICIT, SETS_MESH, "tensor", "apply"),
        (jnp.bfloat16, AUTO, PUTS_ALONE, "fsdp", "update"),
    ],
)
def test_half_precision_is_judged_as_float32_on_one_device(
    dtype, kind, sets_mesh, layout, through
):
    where = places(layout, kind)
    tx = OPTIMIZERS["guard"]()
    with under(where, sets_mesh):
        trial = take_three_steps(tx, through, "small", dtype, where)
    assert trial.programs == 1
    reference = on_one_device("guard", "small", dtype).history
    assert (reference["clip_scale"] < 0.1).any()
    assert_as_on_one_device(trial.history, reference)
    assert {leaf.dtype for leaf in trial.params.values()} == {jnp.dtype(dtype)}


STATES = list(itertools.product((EXPLICIT, AUTO), (SETS_MESH, PUTS_ALONE), LAYOUTS))


@pytest.mark.slow
@pytest.mark.parametrize("kind, sets_mesh, layout", STATES)
@pytest.mark.parametrize("optimizer", core(OPTIMIZERS, "guard"))
def test_every_array_of_a_fresh_state_lies_where_the_parameters_are(
    optimizer, kind, sets_mesh, layout
):
    where, tx = places(layout, kind), OPTIMIZERS[optimizer]()
    with under(where, sets_mesh):
        params = jax.device_put(tree("small", 0), where)
        state = tx.init(params)
    mesh, moments = where["w"].mesh, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert isinstance(leaf.sharding, NamedSharding), path
        assert leaf.sharding.mesh == mesh, path
        if leaf.shape == params["w"].shape:
            moments += 1
            assert leaf.sharding.is_equivalent_to(where["w"], leaf.ndim), path
        elif leaf.shape != params["b"].shape:
            assert leaf.sharding.is_fully_replicated, path
    assert moments == (0 if optimizer == "olmo" else 2)


def test_an_optimizer_of_flax_starts_where_the_parameters_are():
    where = places("fsdp", EXPLICIT)
    params = jax.device_put(tree("small", 0), where)
    optimizer = nnx.Optimizer(Model(params), OPTIMIZERS["guard"](), wrt=nnx.Param)
    leaves = jax.tree.leaves(nnx.state(optimizer)["opt_state"])
    assert len(leaves) == 3 + 5  # Three of the guard, five of Adam.
    assert {leaf.sharding.mesh for leaf in leaves} == {where["w"].mesh}


@pytest.mark.slow
def test_a_state_of_a_compiled_init_is_that_of_a_step_on_explicit_axes():
    where, tx = places("fsdp", EXPLICIT), OPTIMIZERS["guard"]()
    with under(where, SETS_MESH):
        params = jax.device_put(tree("small", 0), where)
        step = jax.jit(tx.update)
        state = jax.jit(tx.init)(params)
        for _ in range(2):
            _, state = step(params, state, params)
        assert step._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "tensor"])
def test_statistics_of_units_stay_whole_on_automatic_axes(layout):
    where, tx = places(layout, AUTO), sg.stabilize(optax.adamw(1e-3), per="unit")
    with under(where, SETS_MESH):
        params = jax.device_put(tree("small", 0), where)
        step = jax.jit(lambda state: tx.update(params, state, params, value=1.0)[1])
        state = tx.init(params)
        for _ in range(2):
            state = step(state)
            assert all(numbers.is_fully_replicated for numbers in state.numbers)
        assert step._cache_size() == 1


def test_a_state_of_one_device_stays_uncommitted():
    state = OPTIMIZERS["guard"]().init(tree("small", 0))
    assert not any(leaf.committed for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("kind", [EXPLICIT, AUTO])
def test_nothing_is_placed_under_tracing_or_abstract_init(kind):
    where, tx = places("fsdp", kind), OPTIMIZERS["guard"]()
    params = jax.device_put(tree("small", 0), where)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    plain = optax.adam(0.1)  # What its own state does is not the guard's to change.
    program = lambda tx: str(jax.make_jaxpr(tx.init)(params))
    # Older JAX puts constants on a device, without a sharding.
    placed = lambda tx: len(re.findall(r"device_put\[[^\]]*Sharding", program(tx)))
    assert placed(tx) == placed(plain)
    abstract = jax.eval_shape(tx.init, shapes)
    for leaf in jax.tree.leaves(abstract):
        assert isinstance(leaf, jax.ShapeDtypeStruct)
    concrete = tx.init(params)
    as_shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert as_shapes(abstract) == as_shapes(concrete)


@pytest.mark.slow
@pytest.mark.parametrize("sets_mesh", [SETS_MESH, PUTS_ALONE])
def test_a_run_on_explicit_axes_is_adopted_and_migrated_where_it_is(sets_mesh):
    where = places("fsdp", EXPLICIT)
    tx = sg.stabilize(optax.adam(0.1), sg.roll_back())
    with under(where, sets_mesh):
        params = jax.device_put(tree("small", 0), where)
        fresh = tx.init(params)
        adopted = sg.adopt(tx, params, optax.adam(0.1).init(params), step=7)
        moved = sg.migrate(tx, params, OPTIMIZERS["guard"]().init(params))
    assert sg.metrics(adopted)["guarded_steps"] == 7
    for state in (adopted, moved):
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(fresh), strict=True)
        assert all(one.sharding == other.sharding for one, other in pairs)
