"""Taking a step again: bad data, bad hardware, and what is not deterministic."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import stablegrad as sg
from stablegrad.integrations.nnx import update as nnx_update

TX = sg.guard(optax.adam(0.1), sg.skip(), record_norms=4)
PARAMS = {"b": jnp.zeros(2), "w": jnp.ones((3, 2))}
BATCH = {"x": np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)}
BATCH["y"] = BATCH["x"][:, :2]
BAD = {**BATCH, "x": np.where(np.arange(6)[:, None] == 4, np.nan, BATCH["x"])}


def loss_fn(params, batch):
    found = batch["x"] @ params["w"] + params["b"][None]
    return jnp.mean((found - batch["y"]) ** 2)


def plain(state, batch, fault=0.0):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    grads["w"] = grads["w"].at[1, 1].add(fault)
    return sg.apply(TX, grads, opt_state, params, value=loss)


STEP = jax.jit(plain, donate_argnums=0)


def start(steps=3):
    state = jax.tree.map(jnp.array, PARAMS), TX.init(PARAMS)
    for _ in range(steps):
        state = STEP(state, BATCH)
    return state


class Machine:
    """A step on hardware that is told when to add what to an element."""

    def __init__(self, *faults):
        self.faults = list(faults)

    def __call__(self, state, batch):
        return STEP_WITH(state, batch, self.faults.pop(0) if self.faults else 0.0)


STEP_WITH = jax.jit(plain)


def copy_of(tree):
    return jax.tree.map(jnp.array, tree)


@pytest.mark.slow
@pytest.mark.parametrize("move", ["migrate", "adopt"])
def test_a_state_that_was_carried_over_blames_no_hardware(move):
    params, state = STEP(start(), BAD)
    if move == "migrate":
        state = sg.migrate(TX, params, state)
        assert sg.replay(STEP, (params, state), BAD).verdict == "same"
        return
    begun = sg.adopt(TX, params, sg.unwrap(state), step=3)
    after = STEP(copy_of((params, begun)), BATCH)
    assert sg.replay(STEP, (params, begun), BATCH, after=after).verdict == "same"


@pytest.mark.slow
def test_bad_data_is_the_same_again_and_the_example_is_found():
    state = STEP(start(), BAD)
    kept = jax.device_get(state)
    found = sg.replay(STEP, state, BAD, by_example=True)
    assert (found.step, found.verdict, found.reproducible) == (3, "same", True)
    assert found.differing == ()
    assert found.recorded.reason == sg.Reason.NONFINITE_GRADIENT
    for run in (found.recorded, *found.runs):
        assert run.skipped and run.leaf == "b"
        assert np.isnan(run.loss) and np.isnan(run.leaf_norms["w"])
    assert sorted(one.place for one in found.examples) == list(range(6))
    assert found.examples[0].place == 4 and not found.examples[0].finite
    assert all(one.finite for one in found.examples[1:])
    norms = [one.grad_norm for one in found.examples[1:]]
    assert norms == sorted(norms, reverse=True)
    text = str(found)
    assert "step 3 was replayed 2 times: the same numbers" in text
    assert "example 4: loss nan" in text and "look at the batches" in text
    # The step donates, and got copies.
    assert jax.tree.all(
        jax.tree.map(lambda x, y: np.array_equal(x, y, equal_nan=True), kept, state)
    )


@pytest.mark.slow
def test_an_example_counts_with_its_own_gradient():
    state = STEP(start(), BAD)
    found = sg.replay(STEP, state, BATCH, by_example=True)
    params = state[0]
    for one in found.examples:
        row = {name: leaf[one.place, None] for name, leaf in BATCH.items()}
        loss, grads = jax.value_and_grad(loss_fn)(params, row)
        np.testing.assert_allclose(one.loss, loss, rtol=1e-5)
        np.testing.assert_allclose(one.grad_norm, optax.tree.norm(grads), rtol=1e-5)


@pytest.mark.slow
def test_a_fault_of_the_hardware_that_has_passed_gives_other_numbers():
    state = Machine(np.nan)(start(), BATCH)
    assert sg.metrics(state[1])["skipped"]
    found = sg.replay(Machine(), state, BATCH)
    assert found.verdict == "other numbers" and not found.reproducible
    # The loss is as it was; the leaf that was hit is named.
    assert found.differing == ("gradient norm", "norm of w")
    assert found.recorded.leaf == "w" and not any(run.skipped for run in found.runs)
    assert "a fault of the hardware that has passed" in str(found)


def test_what_comes_out_otherwise_each_time_is_not_deterministic():
    state = Machine(np.nan)(start(), BATCH)
    found = sg.replay(Machine(0.0, 0.0, 1e-3), state, BATCH, times=3)
    assert found.verdict == "not deterministic"
    assert "norm of w" in found.differing and "0.w" in found.differing
    assert "norm of b" not in found.differing and "loss" not in found.differing
    assert "xla_gpu_deterministic_ops" in str(found)


@pytest.mark.slow
def test_the_last_bit_of_one_parameter_counts():
    before = start()
    after = STEP_WITH(copy_of(before), BATCH, 0.0)
    assert sg.replay(Machine(), before, BATCH, after=after).verdict == "same"
    params, opt_state = after
    w = np.array(params["w"])
    w[2, 0] = np.nextafter(w[2, 0], np.float32(9))
    found = sg.replay(Machine(), before, BATCH, after=({**params, "w": w}, opt_state))
    assert (found.verdict, found.differing) == ("other numbers", ("0.w",))


def test_a_step_that_was_taken_needs_the_state_from_before_it():
    with pytest.raises(ValueError, match=r"was not skipped.*Pass it, and .*`after=`"):
        sg.replay(STEP, start(), BATCH)
    with pytest.raises(ValueError, match="was not skipped"):
        sg.replay(STEP, start(0), BATCH)
    with pytest.raises(ValueError, match="has seen 3 steps; it has seen 3"):
        sg.replay(STEP, start(), BATCH, after=start())


@pytest.mark.slow
def test_a_step_that_rolled_back_is_replayed_from_before_it():
    tx = sg.guard(optax.sgd(0.1), sg.roll_back(sg.fixed(10.0, of="value"), after=1))

    @jax.jit
    def step(state, value):
        params, opt_state = state
        return sg.apply(tx, params, opt_state, params, value=value)

    before = step((PARAMS, tx.init(PARAMS)), 1.0)
    after = step(before, 20.0)
    assert sg.metrics(after[1])["rolled_back"]
    with pytest.raises(ValueError, match="rolled back"):
        sg.replay(step, after, 20.0)
    assert sg.replay(step, before, 20.0, after=after).reproducible


@pytest.mark.slow
def test_another_device_that_disagrees_is_told():
    here, there = jax.devices()[:2]
    state = STEP_WITH(start(), BAD)

    def faulty(state, batch):
        return STEP_WITH(state, batch, 1.0 if state[0]["w"].device == there else 0.0)

    batch = jax.device_put(BATCH, here)
    bad = jax.device_put(BAD, here)
    assert sg.replay(STEP_WITH, state, bad, device=there).verdict == "same"
    before = start()
    after = STEP_WITH(copy_of(before), batch)
    found = sg.replay(faulty, before, batch, after=after, device=there)
    assert found.verdict == "differs by device" and not found.reproducible
    assert "norm of w" in found.differing and found.elsewhere is not None
    assert found.elsewhere.grad_norm != found.runs[0].grad_norm
    assert "elsewhere: loss" in str(found)


class Model(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize("helped", [True, False])
def test_objects_of_nnx_that_a_step_changes_are_left_alone(helped):
    model = Model()
    optimizer = nnx.Optimizer(model, sg.stabilize(optax.adam(0.1)), wrt=nnx.Param)

    @nnx.jit
    def inner(model, optimizer, batch):
        def loss_fn(model):
            return jnp.mean((model.layer(batch["x"]) - batch["y"]) ** 2)

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        if helped:
            nnx_update(optimizer, model, grads, value=loss)
        else:
            optimizer.update(model, grads, value=loss)

    step = lambda state, batch: inner(*state, batch)
    for batch in (BATCH, BAD):
        inner(model, optimizer, batch)
    kept = jax.device_get(jax.tree.leaves(nnx.state((model, optimizer))))
    found = sg.replay(step, (model, optimizer), BAD)
    assert found.verdict == "same" and found.step == 1
    assert found.recorded.leaf == "layer.bias"
    after = jax.device_get(jax.tree.leaves(nnx.state((model, optimizer))))
    for one, other in zip(kept, after, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_what_cannot_be_replayed_is_said():
    state = STEP(start(), BAD)
    bare = lambda state, batch: (state[0], optax.adam(0.1).init(state[0]))
    idle = lambda state, batch: state
    with pytest.raises(ValueError, match="`times` must be an integer >= 2, got 1"):
        sg.replay(STEP, state, BAD, times=1)
    for step in (bare, idle):
        with pytest.raises(ValueError, match="must take one step .*; it took 0"):
            sg.replay(step, state, BAD)
    twice = lambda state, batch: STEP_WITH(STEP_WITH(state, batch), batch)
    with pytest.raises(ValueError, match="it took 2"):
        sg.replay(twice, state, BAD)
    with pytest.raises(ValueError, match="one guard in the state, got 2"):
        sg.replay(STEP, (state[0], (state[1], state[1])), BAD)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    with pytest.raises(ValueError, match="stacked over an ensemble"):
        sg.replay(STEP, stacked, BAD)
    with pytest.raises(ValueError, match="there is no guard"):
        sg.replay(STEP, state[0], BAD)
    before = start()
    with pytest.raises(ValueError, match="`after` must be what `step` returns"):
        sg.replay(STEP, before, BAD, after=state[1])
    with pytest.raises(ValueError, match="`by_example=` needs a batch with an array"):
        sg.replay(lambda state, _: STEP(state, BAD), state, 0.5, by_example=True)


@pytest.mark.slow
@pytest.mark.devices(2)
def test_a_batch_that_lies_nowhere_in_particular_is_replayed_on_a_mesh():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    batch = jax.tree.map(jnp.array, BAD)  # On the default device, uncommitted.
    state = STEP(jax.device_put(start(), everywhere), batch)
    found = sg.replay(STEP, state, batch, by_example=True)
    assert found.examples[0].place == 4
