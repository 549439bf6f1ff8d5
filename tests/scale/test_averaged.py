"""Replicas that average their gradients by hand, and ensembles, which do not."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.mapping import AXIS, DEVICES, mapped
from helpers.marking import core
from jax import lax
from jax.sharding import PartitionSpec as P

import stablegrad as sg

pytestmark = pytest.mark.devices(DEVICES)

SHARES = np.arange(4.0 * DEVICES, dtype=np.float32).reshape(DEVICES, 4)
MEAN_NORM = np.linalg.norm(SHARES.mean(0))
MAPPINGS = core(["tracked", "untracked", "pmap"], "tracked")


def averaging(tx):
    """One step from zero, on the mean of all shares, with a loss of its own."""

    def step(share, loss):
        params = jnp.zeros(4)
        grads = lax.pmean(share.reshape(4), AXIS)
        updates, state = tx.update(
            grads, tx.init(params), params, value=loss.reshape(())
        )
        return updates[None], jax.tree.map(lambda x: x[None], sg.metrics(state))

    return step


def over_devices(step, mapping):
    """Map a step over all devices, each with its own row of every argument."""
    if mapping == "pmap":
        split = jax.pmap(step, axis_name=AXIS)
        return lambda *rows: jax.tree.map(lambda x: x[:, 0], split(*rows))
    return mapped(step, P(AXIS), P(AXIS), check_vma=mapping == "tracked")


def guard_of(**options):
    return sg.guard(
        optax.sgd(1.0),
        sg.clip(sg.fixed(10.0)),
        sg.skip(sg.nonfinite(of="value")),
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_averaged_gradients_have_the_norm_of_the_mean(mapping):
    tx = guard_of(axis_name=AXIS, averaged_gradients=True)
    losses = np.arange(DEVICES, dtype=np.float32)
    updates, seen = over_devices(averaging(tx), mapping)(SHARES, losses)
    np.testing.assert_allclose(seen["grad_norm"], [MEAN_NORM] * DEVICES, rtol=1e-6)
    np.testing.assert_allclose(seen["clip_scale"], 10 / MEAN_NORM, rtol=1e-6)
    np.testing.assert_allclose(seen["loss_value"], losses.mean(), rtol=1e-6)
    expected = -SHARES.mean(0) * 10 / MEAN_NORM
    np.testing.assert_allclose(updates, [expected] * DEVICES, rtol=1e-5)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_without_it_each_copy_counts_where_jax_cannot_tell_copies_from_shards(mapping):
    step = averaging(guard_of(axis_name=AXIS))
    _, seen = over_devices(step, mapping)(SHARES, np.ones(DEVICES, np.float32))
    copies = 1 if mapping == "tracked" else DEVICES
    norm = MEAN_NORM * copies**0.5
    np.testing.assert_allclose(seen["grad_norm"], norm, rtol=1e-6)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_loss_that_is_nan_on_one_device_rejects_the_step_on_all(mapping):
    tx = guard_of(axis_name=AXIS, averaged_gradients=True)
    losses = np.ones(DEVICES, np.float32)
    losses[3] = np.nan
    updates, seen = over_devices(averaging(tx), mapping)(SHARES, losses)
    np.testing.assert_array_equal(updates, np.zeros((DEVICES, 4)))
    np.testing.assert_array_equal(
        seen["skip_reason"], [sg.Reason.NONFINITE_VALUE] * DEVICES
    )


def pmap_is_a_mesh():
    """Whether `pmap` shows its axis to a trace, which older JAX does not."""
    found = []

    def look(x):
        mesh = jax.sharding.get_abstract_mesh()
        found.append(bool(getattr(mesh, "manual_axes", ())))
        return x

    jax.pmap(look, axis_name=AXIS)(jnp.ones((1, 1)))
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_elements_that_are_kept_out_of_averaged_updates_count_once(mapping):
    broken = lambda leaf: -leaf.at[0].set(jnp.nan)
    inner = optax.stateless_with_tree_map(lambda g, p: broken(g))
    tx = sg.guard(inner, axis_name=AXIS, averaged_gradients=True)
    losses = np.ones(DEVICES, np.float32)
    updates, seen = over_devices(averaging(tx), mapping)(SHARES, losses)
    expected = [0.0, *-SHARES.mean(0)[1:]]
    np.testing.assert_allclose(updates, [expected] * DEVICES, rtol=1e-5)
    np.testing.assert_array_equal(seen["kept_out_elements"], [1] * DEVICES)
    assert not seen["skipped"].any()


@pytest.mark.slow
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_loss_of_each_device_without_axis_name_is_warned_of_once(mapping):
    if mapping == "pmap" and not pmap_is_a_mesh():
        pytest.skip("this JAX does not tell that a trace is under `pmap`")
    step = over_devices(averaging(guard_of()), mapping)
    losses = np.ones(DEVICES, np.float32)
    with pytest.warns(UserWarning, match="axis_name") as said:
        first, _ = step(SHARES, losses)
    assert len(said) == 1
    for words in (AXIS, "averaged_gradients=True", "jax.lax.pmean", "different"):
        assert words in str(said[0].message)
    second, _ = step(SHARES, losses)  # Warnings are errors in these tests.
    np.testing.assert_array_equal(second, first)


LOCAL_READERS = {  # What reads a number of the device's own, and how it is called.
    "`value_fn=`": (
        sg.stabilize(optax.sgd(1.0)),
        lambda loss: {
            "value": lax.pmean(loss, AXIS),
            "value_fn": lambda params: loss + params.sum(),
        },
    ),
    "the signal ": (
        sg.guard(optax.sgd(1.0), sg.skip(sg.fixed(2.0, of=lambda g, p, x: x["own"]))),
        lambda loss: {"own": loss},
    ),
    "`value=`": (
        optax.chain(optax.sgd(1.0), sg.reduce_on_plateau()),
        lambda loss: {"value": loss},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("name", LOCAL_READERS)
def test_whatever_reads_a_number_of_each_device_is_warned_of(name, mapping):
    if mapping == "pmap" and not pmap_is_a_mesh():
        pytest.skip("this JAX does not tell that a trace is under `pmap`")
    tx, extra = LOCAL_READERS[name]

    def step(share, loss):
        params, grads = 0 * share.reshape(4), lax.pmean(share.reshape(4), AXIS)
        # Of each device's own, as is a state that is stacked.
        state = jax.tree.map(lambda x: x + params[0].astype(x.dtype), tx.init(params))
        given = extra(loss.reshape(()))
        return tx.update(grads, state, params, **given)[0][None]

    blind = mapping != "tracked" and name == "`value_fn=`"  # Warned of by its value.
    expected = "`value=`" if blind else name
    with pytest.warns(UserWarning, match=f"{expected}.* may differ.*axis_name"):
        over_devices(step, mapping)(SHARES, np.ones(DEVICES, np.float32))


def test_an_averaged_loss_needs_no_warning_where_jax_tells_that_it_is_averaged():
    step = averaging(guard_of())
    tracked = over_devices(
        lambda share, loss: step(share, lax.pmean(loss, AXIS)), "tracked"
    )
    losses = np.ones(DEVICES, np.float32)
    losses[3] = np.nan
    updates, _ = tracked(SHARES, losses)
    np.testing.assert_array_equal(updates, np.zeros((DEVICES, 4)))


@pytest.mark.parametrize("axis", [None, AXIS])
def test_members_of_an_ensemble_decide_alone_and_nothing_is_said(axis):
    tx = guard_of()

    def step(grads, loss):
        params = jnp.zeros(4)
        updates, state = tx.update(grads, tx.init(params), params, value=loss)
        return updates, sg.metrics(state)["skipped"]

    losses = np.ones(DEVICES, np.float32)
    losses[3] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        updates, skipped = jax.jit(jax.vmap(step, axis_name=axis))(SHARES, losses)
    assert np.flatnonzero(skipped).tolist() == [3]
    norms = np.linalg.norm(SHARES, axis=1)
    kept = np.where(np.arange(DEVICES) == 3, 0, np.minimum(norms, 10))
    np.testing.assert_allclose(np.linalg.norm(updates, axis=1), kept, rtol=1e-5)


# Data-parallel training by `pmap`, where the loss of one device is nan now and then.

REPLICAS, STEPS, BAD_STEPS = 4, 60, [19, 39, 59]
TARGET = np.arange(8, dtype=np.float32) / 4


def train_replicas(tx):
    """The replicas' parameters after all steps, and the last state."""

    def loss_fn(params, batch):
        errors = batch[:, :8] @ (params - TARGET) - batch[:, 8]
        return jnp.mean(errors**2)

    def step(params, state, batch, is_bad):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        loss = jnp.where(is_bad & (lax.axis_index(AXIS) == 0), jnp.nan, loss)
        return sg.apply(tx, lax.pmean(grads, AXIS), state, params, value=loss)

    devices = jax.devices()[:REPLICAS]
    step = jax.pmap(step, axis_name=AXIS, devices=devices, in_axes=(0, 0, 0, None))
    repeated = lambda x: jnp.stack([x] * REPLICAS)
    start = jnp.zeros(8)
    params, state = jax.tree.map(repeated, (start, tx.init(start)))
    rng = np.random.default_rng(0)
    for t in range(STEPS):
        batch = rng.normal(size=(REPLICAS, 8, 9)).astype(np.float32)
        params, state = step(params, state, batch, t in BAD_STEPS)
    return np.asarray(params), state


@pytest.mark.slow
def test_replicas_stay_equal_with_averaged_gradients():
    tx = sg.guard(
        optax.sgd(0.02),
        sg.skip(sg.nonfinite(of="value")),
        axis_name=AXIS,
        averaged_gradients=True,
    )
    params, state = train_replicas(tx)
    np.testing.assert_array_equal(params, params[:1].repeat(REPLICAS, axis=0))
    skipped = sg.metrics(state)["skipped_steps"]
    np.testing.assert_array_equal(skipped, [len(BAD_STEPS)] * REPLICAS)
    assert np.abs(params[0] - TARGET).max() < 0.5


@pytest.mark.slow
def test_replicas_part_without_axis_name_and_it_is_said_what_is_missing():
    if not pmap_is_a_mesh():
        pytest.skip("this JAX does not tell that a trace is under `pmap`")
    tx = sg.stabilize(optax.sgd(0.02))
    with pytest.warns(UserWarning, match="axis_name") as said:
        params, state = train_replicas(tx)
    assert len({str(one.message) for one in said}) == 1
    assert np.abs(params - params[:1]).max() > 0
    expected = [len(BAD_STEPS)] + [0] * (REPLICAS - 1)
    np.testing.assert_array_equal(sg.metrics(state)["skipped_steps"], expected)
