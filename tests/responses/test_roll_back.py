"""Rolling back: what is kept, when it is restored, and what comes back."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.marking import core

import stablegrad as sg
from stablegrad.integrations.nnx import update as nnx_update

SETTINGS = {"after": 3, "every": 8, "hold_steps": 2, "cooldown_steps": 6, "limit": 2}
LOSS = sg.fixed(10.0, of="value")
PARAMS = {"w": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "b": jnp.array([0.5, -0.25])}
STEPS = 40


def guarded(inner=None, **settings):
    rule = sg.roll_back(LOSS, **{**SETTINGS, **settings})
    inner = optax.adam(0.05) if inner is None else inner
    return sg.guard(inner, sg.skip(), rule, sg.halt(after=30))


TX = guarded()
OLDER = guarded(keep=3)


def stepper(tx, apply=True):
    """A step that donates what it replaces; grads are those of a quadratic."""

    def step(params, state, value, spoil):
        grads = jax.tree.map(lambda p: p * spoil, params)
        if apply:
            return sg.apply(tx, grads, state, params, value=value)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


APPLY, UPDATE, DEEP = stepper(TX), stepper(TX, apply=False), stepper(OLDER)


def run(step, tx, values=None, spoils=None, poison=None, params=PARAMS):
    """Runs `STEPS` steps, and returns what each left behind, on the host.

    `poison` maps a step to what is done to parameters and state before it.
    """
    values = {} if values is None else values
    spoils = {} if spoils is None else spoils
    params = jax.tree.map(jnp.array, params)
    state, rows = tx.init(params), []
    for t in range(STEPS):
        if poison and t in poison:
            params, state = poison[t](params, state)
        params, state = step(params, state, values.get(t, 1.0), spoils.get(t, 1.0))
        kept = params, state.guarded_inner, sg.metrics(state)
        rows.append(jax.device_get(kept))
    return rows, state


def nan_at(leaf):
    def poison(params, state):
        return {**params, leaf: params[leaf].at[..., 0].set(jnp.nan)}, state

    return poison


def newest_snapshot(rows, t):
    """The step whose parameters were the newest snapshot after step `t`."""
    return t - int(rows[t][2]["snapshot_age"])


def test_a_loss_that_stays_high_restores_the_snapshot_bit_for_bit():
    high = dict.fromkeys(range(20, 23), 100.0)
    rows, state = run(APPLY, TX, values=high)
    assert [bool(row[2]["rolled_back"]) for row in rows].index(True) == 22
    taken = newest_snapshot(rows, 22)
    assert 0 < taken < 20 - SETTINGS["hold_steps"]
    chex.assert_trees_all_equal(rows[22][:2], rows[taken][:2])
    chex.assert_trees_all_equal(  # What follows is what followed then.
        rows[23][:2], rows[taken + 1][:2]
    )
    seen = sg.metrics(state)
    assert (seen["roll_backs"], seen["skipped_steps"]) == (1, 1)
    (event,) = sg.events(state)
    assert (event.step, event.kind, event.reason) == (22, "roll_back", "value")


def test_two_high_losses_are_left_alone():
    rows, state = run(APPLY, TX, values=dict.fromkeys(range(20, 22), 100.0))
    assert sg.metrics(state)["roll_backs"] == 0 and sg.events(state) == []
    clean, _ = run(APPLY, TX)
    chex.assert_trees_all_equal(rows[-1][:2], clean[-1][:2])


def test_snapshots_come_from_steps_far_from_any_event_on_either_side():
    # A nan every tenth step: nothing within two steps of it may be kept.
    bad = {t for t in range(STEPS) if t % 10 == 5}
    rows, _ = run(APPLY, TX, spoils=dict.fromkeys(bad, np.nan))
    for t in range(1, STEPS):
        taken = newest_snapshot(rows, t)
        proven = t - taken > SETTINGS["hold_steps"]
        near = [b for b in bad if abs(b - taken) <= SETTINGS["hold_steps"] and b <= t]
        assert not (taken >= 0 and near), (t, taken, near)
        assert rows[t][2]["snapshots"] >= 1 or not proven
    assert newest_snapshot(rows, STEPS - 1) > 20


@pytest.mark.parametrize("leaf", ["w", "b"])
def test_poisoned_parameters_are_restored_at_once_and_the_leaf_is_named(leaf):
    rows, state = run(APPLY, TX, poison={25: nan_at(leaf)})
    taken = newest_snapshot(rows, 25)
    chex.assert_trees_all_equal(rows[25][:2], rows[taken][:2])
    (event,) = sg.events(state)
    assert (event.step, event.reason) == (25, "nonfinite_parameters")
    assert event.leaf == leaf
    chex.assert_tree_all_finite(rows[-1][:2])


def test_a_poisoned_inner_state_is_restored():
    def poison(params, state):
        adam, *rest = state.guarded_inner
        adam = adam._replace(mu={**adam.mu, "w": adam.mu["w"].at[0, 1].set(jnp.nan)})
        return params, state._replace(guarded_inner=(adam, *rest))

    rows, state = run(APPLY, TX, poison={25: poison})
    assert sg.metrics(state)["roll_backs"] == 1
    chex.assert_tree_all_finite(rows[-1][:2])


def test_restored_nans_do_not_count_towards_the_limit():
    def endless(params, state):
        adam, *rest = state.guarded_inner
        adam = adam._replace(mu={**adam.mu, "w": jnp.full_like(adam.mu["w"], jnp.inf)})
        return params, state._replace(guarded_inner=(adam, *rest))

    nans = dict.fromkeys((25, 26, 27), nan_at("w"))  # More than the limit.
    rows, _ = run(APPLY, TX, poison={**nans, 28: endless})
    rolled = [t for t, row in enumerate(rows) if row[2]["rolled_back"]]
    # The inf lasts, and is undone as soon as the cooldown is over.
    assert rolled == [25, 26, 27, 28 + SETTINGS["cooldown_steps"]]
    assert not any(row[2]["halted"] for row in rows)
    chex.assert_tree_all_finite(rows[-1][:2])


def times(factor):
    """What multiplies the parameters, or the moments, of every step from now on."""
    scaled = lambda tree: jax.tree.map(lambda x: x * factor, tree)

    def params_too_large(params, state):
        return scaled(params), state

    def moments_too_large(params, state):
        adam, *rest = state.guarded_inner
        adam = adam._replace(nu=scaled(adam.nu))
        return params, state._replace(guarded_inner=(adam, *rest))

    return params_too_large, moments_too_large


def rolled_back(rows):
    return [t for t, row in enumerate(rows) if row[2]["rolled_back"]]


@pytest.mark.parametrize(
    "poison", [times(300.0)[0], times(1e7)[1]], ids=["parameters", "moments"]
)
def test_what_has_outgrown_the_snapshot_is_restored_when_the_next_is_due(poison):
    rows, state = run(APPLY, TX, poison={23: poison})
    (restored,) = rolled_back(rows)
    assert restored == 26  # Snapshots of steps 2, 10, 18: the loss tells nothing.
    chex.assert_trees_all_equal(rows[restored][:2], rows[18][:2])
    (event,) = sg.events(state)
    assert (event.kind, event.reason) == ("roll_back", "parameter_norm")
    # Snapshots go on as soon as there is calm.
    assert newest_snapshot(rows, STEPS - 1) > restored


@pytest.mark.parametrize(
    "poison", [times(50.0)[0], times(1e4)[1]], ids=["parameters", "moments"]
)
def test_growth_by_less_is_left_alone(poison):
    assert not rolled_back(run(APPLY, TX, poison={23: poison})[0])


def test_moments_get_no_allowance_for_a_warm_up():
    # From the snapshot of step 2 to step 10, parameters may grow by 100 (11 / 3)^2.
    rows, _ = run(APPLY, TX, poison={7: times(500.0)[0]})
    assert not rolled_back(rows)
    rows, _ = run(APPLY, TX, poison={7: times(1e7)[1]})
    assert rolled_back(rows) == [10]


def test_growth_that_comes_back_is_kept_after_the_limit():
    again = dict.fromkeys(range(19, STEPS), times(110.0)[0])
    grows = {**again, **dict.fromkeys(range(33, STEPS), lambda *both: both)}
    rows, _ = run(APPLY, TX, poison=grows)
    # Each time that a snapshot is due, `limit` times; then it is taken.
    assert rolled_back(rows) == [26, 29]
    assert newest_snapshot(rows, 32) == 32
    assert not any(row[2]["halted"] for row in rows)


@pytest.mark.slow
def test_growth_from_the_first_parameters_is_left_alone():
    tiny = jax.tree.map(lambda p: 1e-6 * p, PARAMS)
    rows, _ = run(APPLY, TX, poison={1: times(1e6)[0]}, params=tiny)
    assert not rolled_back(rows)


@pytest.mark.slow
def test_moments_that_were_zero_in_the_snapshot_may_grow():
    tx = guarded(optax.MultiSteps(optax.sgd(0.01), 3))
    rows, _ = run(stepper(tx), tx)
    assert not rolled_back(rows)
    assert newest_snapshot(rows, STEPS - 1) > 20


@pytest.mark.slow
def test_moments_that_come_back_after_a_quiet_time_may_grow():
    tx = guarded(optax.sgd(0.05, momentum=0.3))
    rows, _ = run(stepper(tx), tx, spoils=dict.fromkeys(range(10, 30), 0.0))
    trace = [abs(row[1][0].trace["w"]).max() for row in rows]
    assert 0 < trace[29] < 1e-7 * trace[31]  # A snapshot of step 26 holds no more.
    assert not rolled_back(rows)


@pytest.mark.slow
def test_a_warm_up_from_zero_is_no_growth():
    # The parameters grow with the square of time: 600-fold from step 21 to step 521.
    tx = sg.guard(optax.adam(lambda t: 1e-6 * t), sg.roll_back(every=500))
    start = jnp.zeros(3)

    def step(carry, _):
        params, state = carry
        params, state = sg.apply(tx, params - 10.0, state, params, value=None)
        return (params, state), jnp.linalg.norm(params)

    scan = lambda: jax.lax.scan(step, (start, tx.init(start)), length=600)
    (_, state), norms = jax.jit(scan)()
    assert norms[520] > 500 * norms[20]
    assert sg.metrics(state)["roll_backs"] == 0
    assert sg.metrics(state)["snapshot_age"] < 100


@pytest.mark.slow
def test_an_inf_of_the_state_is_no_moment_of_one_bare_array():
    plateau = optax.contrib.reduce_on_plateau()
    tx = sg.stabilize(optax.chain(optax.adam(0.1), plateau), sg.roll_back())
    params = jnp.ones(3)
    state = tx.init(params)
    assert any(bool(jnp.isinf(x).any()) for x in jax.tree.leaves(sg.unwrap(state)))
    bad = params.at[0].set(jnp.nan)
    params, state = sg.apply(tx, bad, state, bad, value=1.0)
    np.testing.assert_array_equal(params, jnp.ones(3))
    assert sg.metrics(state)["roll_backs"] == 1


@pytest.mark.slow
def test_what_is_poisoned_in_silence_is_found_when_it_should_be_kept():
    # Its gradient is finite, so nothing else sees it.
    def silent(params, state, value, spoil):
        grads = jax.tree.map(lambda p: jnp.where(jnp.isfinite(p), p, 0), params)
        return sg.apply(TX, grads, state, params, value=value * spoil)

    rows, state = run(jax.jit(silent), TX, poison={21: nan_at("w")})
    (event,) = sg.events(state)
    assert (event.reason, event.leaf) == ("nonfinite_parameters", "w")
    (restored,) = [t for t, row in enumerate(rows) if row[2]["rolled_back"]]
    assert 21 <= restored <= 21 + SETTINGS["every"] + 1
    chex.assert_tree_all_finite(rows[restored][:2])
    taken = newest_snapshot(rows, restored)
    chex.assert_trees_all_equal(rows[restored][:2], rows[taken][:2])


def test_an_event_soon_after_a_snapshot_gives_it_up():
    rows, _ = run(APPLY, TX)
    taken = newest_snapshot(rows, STEPS - 1)
    rows, _ = run(APPLY, TX, spoils={taken + 2: np.nan})
    assert newest_snapshot(rows, taken + 1) == taken
    assert newest_snapshot(rows, taken + 2) == taken - SETTINGS["every"]
    assert rows[taken + 2][2]["snapshots"] == 1
    rows, _ = run(APPLY, TX, spoils={taken + 3: np.nan})
    assert newest_snapshot(rows, taken + 3) == taken


@pytest.mark.slow
def test_trouble_that_comes_back_goes_further_back_and_then_halts():
    rows, state = run(DEEP, OLDER, values=dict.fromkeys(range(18, STEPS), 100.0))
    rolled = [t for t, row in enumerate(rows) if row[2]["rolled_back"]]
    # Three bad steps; then as soon as the cooldown is over; then no more.
    assert rolled == [20, 27]
    newest = newest_snapshot(rows, 20)
    chex.assert_trees_all_equal(rows[20][:2], rows[newest][:2])
    chex.assert_trees_all_equal(rows[27][:2], rows[newest - 8][:2])
    assert [bool(row[2]["halted"]) for row in rows].index(True) == 34
    assert rows[34][2]["roll_back_refusal"] == 2
    with pytest.raises(sg.TrainingHalted, match="rolled back 2 times"):
        sg.raise_if_halted(state)


@pytest.mark.slow
def test_a_halt_for_too_many_roll_backs_ends_with_the_trouble():
    rows, state = run(DEEP, OLDER, values=dict.fromkeys(range(18, 36), 100.0))
    assert rows[35][2]["halted"] and not rows[36][2]["halted"]
    sg.raise_if_halted(state)
    assert newest_snapshot(rows, STEPS - 1) > 35  # And there are new snapshots.


@pytest.mark.slow
def test_through_update_parameters_come_back_within_a_rounding():
    rows, state = run(UPDATE, TX, values=dict.fromkeys(range(20, 23), 100.0))
    taken = newest_snapshot(rows, 22)
    chex.assert_trees_all_close(rows[22][0], rows[taken][0], rtol=3e-7, atol=1e-7)
    chex.assert_trees_all_equal(rows[22][1], rows[taken][1])  # The state, exactly.
    assert sg.metrics(state)["roll_backs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_through_update_what_cannot_come_back_halts_and_names_apply(value):
    def poison(params, state):
        return {**params, "w": params["w"].at[0, 0].set(value)}, state

    high = dict.fromkeys(range(25, STEPS), 100.0)
    rows, state = run(UPDATE, TX, values=high, poison={25: poison})
    assert sg.metrics(state)["roll_backs"] == 0
    assert rows[-1][2]["halted"] and rows[-1][2]["roll_back_refusal"] == 3
    with pytest.raises(sg.TrainingHalted, match=r"use `stablegrad\.apply`"):
        sg.raise_if_halted(state)


@pytest.mark.slow
def test_through_update_a_leaf_without_a_gradient_stays_as_it_is():
    params = {"w": jnp.ones(2), "mask": jnp.array([True, False])}
    tx = sg.guard(optax.sgd(0.1), sg.roll_back(LOSS, after=1))
    grads = {**params, "mask": jnp.zeros(2, bool)}
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(grads, state, params, value=100.0)
    assert sg.metrics(state)["rolled_back"]
    chex.assert_trees_all_equal(
        updates, {"w": jnp.zeros(2), "mask": jnp.zeros(2, bool)}
    )


def test_without_roll_back_poisoned_parameters_halt_and_the_leaf_is_named():
    tx = sg.guard(optax.adam(0.05), sg.skip(), sg.halt(after=3))
    _, state = run(stepper(tx), tx, poison={25: nan_at("w")})
    (first, second) = sg.events(state)
    assert (first.step, first.reason, first.leaf) == (25, "nonfinite_parameters", "w")
    assert (second.step, second.kind) == (27, "halt")
    with pytest.raises(sg.TrainingHalted, match="parameter w is not finite"):
        sg.raise_if_halted(state)


@pytest.mark.slow
def test_parameters_that_are_poisoned_from_the_start_are_no_snapshot():
    params, _ = nan_at("w")(PARAMS, None)
    rows, state = run(APPLY, TX, params=params)
    assert sg.metrics(state)["roll_backs"] == 0
    assert rows[0][2]["halted"] and rows[0][2]["roll_back_refusal"] == 1
    with pytest.raises(sg.TrainingHalted, match="no healthy snapshot"):
        sg.raise_if_halted(state)


@pytest.mark.slow
def test_a_step_by_hand_and_a_scan_do_the_same():
    values = np.ones(STEPS, np.float32)
    values[20:23] = 100.0
    by_hand, _ = run(APPLY, TX, values=dict(enumerate(values.tolist())))

    @jax.jit
    def scanned(params):
        def step(carry, value):
            params, state = carry
            return sg.apply(TX, params, state, params, value=value), None

        return jax.lax.scan(step, (params, TX.init(params)), values)[0]

    params, state = scanned(PARAMS)
    chex.assert_trees_all_close(params, by_hand[-1][0], rtol=1e-6)
    assert sg.metrics(state)["roll_backs"] == 1


@pytest.mark.slow
def test_statistics_go_back_to_those_of_the_snapshot():
    rule = sg.roll_back(LOSS, **SETTINGS)
    tx = sg.guard(optax.sgd(0.01), sg.clip(sg.rarity()), rule)
    high = dict.fromkeys(range(20, 23), 100.0)
    rows, state = run(stepper(tx), tx, values=high, spoils=dict.fromkeys(high, 50.0))
    limit = [row[2]["clip_rarity_grad_norm_limit"] for row in rows]
    taken = newest_snapshot(rows, 22)
    assert limit[23] == limit[taken + 1]
    assert sg.metrics(state)["roll_backs"] == 1


@pytest.mark.parametrize("memory", core(["device", "pinned_host"], "device"))
def test_snapshots_lie_where_they_are_wanted_and_are_restored_from_there(memory):
    tx = guarded(memory=memory)
    rows, state = run(stepper(tx), tx, poison={25: nan_at("w")})
    taken = newest_snapshot(rows, 25)
    chex.assert_trees_all_equal(rows[25][:2], rows[taken][:2])
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state.snapshots)}
    if jax.__version_info__ >= (0, 8):  # Before, a CPU's programs forget it.
        assert kinds == {memory}


@pytest.mark.slow
def test_nothing_but_a_snapshot_is_copied():
    tx = guarded(optax.adamw(1e-3))
    params = {"w": jnp.ones((512, 512))}
    state = jax.eval_shape(tx.init, params)

    def step(params, state, grads):
        return sg.apply(tx, grads, state, params, value=1.0)

    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    program = program.compile()
    entry = program.as_text().split("\nENTRY", 1)[1]
    assert "while(" in entry
    copies = [row for row in entry.splitlines() if " copy(" in row]
    assert not [row for row in copies if "f32[512,512]" in row]
    size = params["w"].nbytes
    # JAX before 0.10.2 stores what it adds up on a CPU.
    most = 4.2 if jax.__version_info__ >= (0, 10, 2) else 6.2
    assert program.memory_analysis().temp_size_in_bytes < most * size


class Model(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(2, 1, rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize("compiled", core([True, False], True))
def test_the_nnx_helper_restores_poisoned_parameters_bit_for_bit(compiled):
    model = Model()
    optimizer = nnx.Optimizer(model, guarded(), wrt=nnx.Param)

    def step(model, optimizer):
        loss_fn = lambda model: jnp.mean((model.layer(jnp.ones((3, 2))) - 1) ** 2)
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        nnx_update(optimizer, model, grads, value=loss)

    step = nnx.jit(step) if compiled else step
    for _ in range(15):
        step(model, optimizer)
    assert sg.metrics(optimizer.opt_state)["snapshot_age"] == 4
    newest = optimizer.opt_state.snapshots[0]
    expected = jax.device_get(jax.tree.leaves(newest.params))
    model.layer.kernel[...] = model.layer.kernel[...].at[0, 0].set(jnp.nan)
    step(model, optimizer)
    found = jax.device_get(jax.tree.leaves(nnx.state(model, nnx.Param)))
    chex.assert_trees_all_equal(found, expected)
    assert sg.metrics(optimizer.opt_state)["roll_backs"] == 1
    assert optimizer.step[...] == 16


@pytest.mark.slow
def test_an_ensemble_rolls_back_member_by_member():
    params = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
    state = jax.vmap(TX.init)(params)
    step = jax.jit(jax.vmap(lambda p, s: sg.apply(TX, p, s, p, value=1.0)))
    for t in range(16):
        if t == 15:
            before = params
            params = {**params, "b": params["b"].at[1, 0].set(jnp.nan)}
        params, state = step(params, state)
    assert sg.metrics(state)["roll_backs"].tolist() == [0, 1]
    chex.assert_tree_all_finite(params)
    assert not np.array_equal(params["w"][0], before["w"][0])


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"after": 0}, "`after` must be an integer >= 1"),
        ({"keep": 1}, "`keep` must be an integer >= 2"),
        ({"every": 20}, "`every` must be > `hold_steps`, which is 20"),
        ({"limit": 0}, "`limit` must be"),
        ({"cooldown_steps": -1}, "`cooldown_steps` must be"),
        ({"memory": "disk"}, "`memory` must be one of"),
    ],
)
def test_a_wrong_setting_is_an_error(settings, said):
    with pytest.raises(ValueError, match=said):
        sg.roll_back(**settings)


def test_a_guard_takes_one_roll_back():
    with pytest.raises(ValueError, match="a guard takes one `roll_back`, got 2"):
        sg.guard(optax.sgd(0.1), sg.roll_back(), sg.roll_back())


def test_the_preset_takes_it_along():
    tx = sg.stabilize(optax.sgd(0.1), sg.roll_back())
    assert len(jax.eval_shape(tx.init, PARAMS).snapshots) == 2


@pytest.mark.slow
def test_a_plateau_within_is_shown_once():
    inner = optax.chain(optax.sgd(0.1), sg.reduce_on_plateau(metric=None))
    state = guarded(inner).init(PARAMS)
    assert "plateau_2_scale" not in sg.metrics(state)
    seen = sg.metrics(sg.observe_metric(state, value=1.0))
    assert seen["plateau_evaluations"] == 1


def default_roll_backs(values):
    """Steps in which the default rolls back, for a run of losses."""
    tx = sg.guard(optax.sgd(0.0), sg.skip(), sg.roll_back())

    def step(state, value):
        _, state = tx.update(jnp.ones(()), state, jnp.ones(()), value=value)
        return state, sg.metrics(state)["rolled_back"]

    start = tx.init(jnp.ones(()))
    return np.flatnonzero(jax.jit(lambda x: jax.lax.scan(step, start, x)[1])(values))


@pytest.mark.slow
def test_by_default_a_loss_that_stays_high_for_ten_steps_is_trouble():
    losses = 1 + 0.05 * np.random.default_rng(0).normal(size=400).astype(np.float32)
    short, lasting = losses.copy(), losses.copy()
    short[300:309] += 1.0
    lasting[300:330] += 1.0
    assert default_roll_backs(short).size == 0
    np.testing.assert_array_equal(default_roll_backs(lasting), [309])


@pytest.mark.slow
def test_by_default_losses_that_have_come_before_are_no_trouble():
    rng = np.random.default_rng(0)
    # A reward that comes ever more often, as in a policy gradient: else zero.
    comes = rng.random(600) < np.linspace(-0.1, 1.2, 600)
    losses = np.where(comes, rng.uniform(0.2, 1.0, 600), 0).astype(np.float32)
    assert default_roll_backs(losses).size == 0


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["device", "pinned_host"])
def test_committed_parameters_compile_a_step_once(memory):
    tx = sg.stabilize(optax.adam(0.1), sg.roll_back(memory=memory))
    params = jax.device_put(jax.tree.map(jnp.array, PARAMS), jax.devices()[0])
    state, step = tx.init(params), stepper(tx)
    for _ in range(3):
        params, state = step(params, state, 1.0, 1.0)
    assert step._cache_size() == 1
