"""`roll_back` on eight devices: under `shard_map`, and on meshes of either kind."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.mapping import AXIS as SHARD, DEVICES, mapped, mesh
from helpers.meshing import AXIS, under
from helpers.scenario import parameter_of, step_of
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import stablegrad as sg

pytestmark = pytest.mark.devices(DEVICES)

STEPS = 34
HIGH = (14, 15, 16)  # Steps of a high loss; the last of them is undone.
NAN = 29  # Before it, one element of one shard of the parameters becomes nan.
COUNTS = ("rolled_back", "roll_backs", "snapshots", "snapshot_age", "halted", "skipped")
RULE = {"after": 3, "every": 6, "hold_steps": 2, "cooldown_steps": 4}


class Left(NamedTuple):
    """What a step left behind, on the host."""

    params: Any
    inner: Any
    seen: dict[str, np.ndarray]


def guarded(**options):
    memory = options.pop("memory", "device")
    rule = sg.roll_back(sg.fixed(10.0, of="value"), memory=memory, **RULE)
    return sg.guard(optax.adam(0.05), sg.skip(), rule, **options)


def start():
    rng = np.random.default_rng(0)
    shapes = {"b": (16,), "w": (16, 8)}
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def step_with(tx, apply=True):
    step = step_of(tx, "apply" if apply else "update")
    grads = lambda params: jax.tree.map(lambda p: p - 0.5, params)
    return lambda params, state, value: step(params, state, grads(params), value)


def drive(step, params, state, steps=STEPS):
    """Takes steps; returns what each left behind, and the last state."""
    rows = []
    for t in range(steps):
        if t == NAN:  # In the last shard, however it is cut.
            where = params["w"].sharding
            poisoned = np.array(params["w"])
            poisoned[-1, -1] = np.nan
            params = {**params, "w": jax.device_put(poisoned, where)}
        value = np.float32(100.0 if t in HIGH else 1.0)
        params, state, seen = step(params, state, value)
        rows.append(Left(*jax.device_get((params, state.guarded_inner, seen))))
    return rows, state


@functools.cache
def alone():
    tx = guarded()
    params = jax.tree.map(jnp.array, start())
    rows, _ = drive(jax.jit(step_with(tx)), params, tx.init(params))
    rolled = [t for t, row in enumerate(rows) if row.seen["rolled_back"]]
    assert rolled == [HIGH[2], NAN]
    return rows


def assert_as_alone(rows, is_exact=True):
    """The decisions of one device; what is restored, bit for bit."""
    for row, expected in zip(rows, alone(), strict=False):
        for name in COUNTS:
            np.testing.assert_array_equal(row.seen[name], expected.seen[name], name)
        chex.assert_trees_all_close(row.params, expected.params, rtol=1e-5, atol=1e-6)
    for t in (t for t, row in enumerate(rows) if row.seen["rolled_back"]):
        taken = rows[t - int(rows[t].seen["snapshot_age"])]
        chex.assert_trees_all_equal(rows[t].inner, taken.inner)
        if is_exact:
            chex.assert_trees_all_equal(rows[t].params, taken.params)


def specs_of(state, split):
    places = {name: P(SHARD) if name in split else P() for name in ("b", "w")}
    pick = lambda path, _: places.get(parameter_of(path), P())
    return jax.tree_util.tree_map_with_path(pick, state)


# Whether JAX tracks what varies; then `b` may be whole beside the shards of `w`.
@pytest.mark.slow
@pytest.mark.parametrize("tracked, split", [(True, ("w",)), (False, ("b", "w"))])
def test_under_shard_map_all_shards_go_back_together(tracked, split):
    tx, params = guarded(axis_name=SHARD), start()
    where = specs_of(params, split)
    state_where = specs_of(jax.eval_shape(tx.init, params), split)
    step = step_with(tx)

    def local(params, state, value):
        # A loss of each shard's own, of the right mean.
        off = lax.axis_index(SHARD) - (DEVICES - 1) / 2
        params, state, seen = step(params, state, value + 0.1 * off)
        return params, state, {name: seen[name] for name in COUNTS}

    every = mapped(
        local,
        in_specs=(where, state_where, P()),
        out_specs=(where, state_where, P()),
        check_vma=tracked,
    )
    init = mapped(tx.init, (where,), state_where, check_vma=tracked)
    places = jax.tree.map(lambda spec: NamedSharding(mesh(), spec), where)
    params = jax.device_put(params, places)
    rows, state = drive(every, params, init(params))
    assert_as_alone(rows)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if parameter_of(path) not in split:
            shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
            for other in shards[1:]:
                np.testing.assert_array_equal(other, shards[0], err_msg=str(path))


@pytest.mark.slow
def test_a_state_of_each_device_goes_back_where_jax_tracks_what_varies():
    """Every device has a row of the state, as replicas do that are stacked."""
    tx, params = guarded(axis_name=SHARD, averaged_gradients=True), start()
    rows = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * DEVICES), tree)
    step = step_with(tx)

    def local(params, state, value):
        own = jax.tree.map(lambda x: x[0], (params, state))
        params, state, seen = step(*own, value)
        seen = {name: seen[name] for name in COUNTS}
        return jax.tree.map(lambda x: x[None], (params, state, seen))

    each = mapped(local, in_specs=(P(SHARD), P(SHARD), P()), out_specs=P(SHARD))
    carry = rows((params, tx.init(params)))
    for t in range(NAN):
        *carry, seen = each(*carry, np.float32(100.0 if t in HIGH else 1.0))
        for name in COUNTS:
            expected = [alone()[t].seen[name]] * DEVICES
            np.testing.assert_array_equal(seen[name], expected, name)
    for shard in range(DEVICES):
        own = jax.tree.map(lambda x, shard=shard: x[shard], carry[0])
        chex.assert_trees_all_close(own, alone()[NAN - 1].params, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, sets_mesh, through, memory",
    [
        (AxisType.Explicit, True, "apply", "device"),
        (AxisType.Explicit, False, "update", "device"),
        (AxisType.Auto, False, "apply", "device"),
        (AxisType.Auto, True, "apply", "pinned_host"),
    ],
)
def test_on_a_mesh_everything_goes_back_to_where_it_was(
    kind, sets_mesh, through, memory
):
    grid = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(kind,))
    is_explicit = kind == AxisType.Explicit
    where = {
        "b": NamedSharding(grid, P(AXIS)),
        "w": NamedSharding(grid, P(AXIS, None) if is_explicit else P(AXIS)),
    }
    tx = guarded(memory=memory)
    with under(where, sets_mesh):
        params = jax.device_put(start(), where)
        state = tx.init(params)
        step = jax.jit(step_with(tx, apply=through == "apply"), donate_argnums=(0, 1))
        before = jax.tree.map(lambda x: x.sharding, state)
        # A nan cannot come back through `update`.
        steps = STEPS if through == "apply" else NAN
        rows, state = drive(step, params, state, steps)
    assert_as_alone(rows, is_exact=through == "apply")
    assert step._cache_size() == 1
    after = jax.tree.map(lambda x: x.sharding, state)
    if memory == "device" or jax.__version_info__ >= (0, 8):
        assert after == before
    kinds = {x.memory_kind for x in jax.tree.leaves(after.snapshots)}
    if jax.__version_info__ >= (0, 8):  # Before, a CPU's programs forget it.
        assert kinds == {memory}


@pytest.mark.parametrize(
    "kind, memory",
    [
        (AxisType.Auto, "device"),
        (AxisType.Auto, "pinned_host"),
        (AxisType.Explicit, "device"),  # JAX 0.7 copies none of these to the host.
    ],
)
def test_statistics_in_a_fresh_snapshot_lie_on_the_mesh(kind, memory):
    grid = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(kind,))
    params = jax.device_put(start(), NamedSharding(grid, P()))
    tx = sg.guard(optax.sgd(0.1), sg.roll_back(memory=memory))
    (statistics, *_) = [own.statistics for own in tx.init(params).snapshots]
    assert len(statistics) == 2
    assert {len(array.devices()) for array in statistics} == {DEVICES}
