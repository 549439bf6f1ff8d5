"""Tests for the radius: its state machine against a float64 restatement, and bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.marking import core

import stablegrad as sg
from stablegrad.responses.trust_region import _radius
from stablegrad.responses.trust_region._probe import Attempt, Look
from stablegrad.responses.trust_region._progress import Progress

CASES, STEPS = 24, 400
SHARES = np.repeat([0.1, 0.3, 0.5], [18, 4, 2])  # Of steps that do not descend.


def loss_at(x, case, xp):
    """A line of the loss: slope g, curvature h, cubic c, and nothing beyond a wall."""
    loss, g, h, c, wall = (case[name] for name in ("loss", "g", "h", "c", "wall"))
    value = loss + g * x + 0.5 * h * x**2 + c * xp.abs(x) ** 3
    return xp.where(xp.abs(x) > wall, xp.nan, value)


class Oracle:
    """What the docstrings say, in float64."""

    def __init__(self, every):
        self.every, self.radius, self.own = every, np.inf, 0.0
        self.excess, self.slope, self.target = 0.0, 0.0, 0.5
        self.far, self.near, self.spread, self.gain = 0.0, 0.0, 0.0, 0.0
        self.steps, self.known, self.r, self.looks, self.cuts = 0, 0, 0.0, 0, 0
        self.blind = 0
        self.branches = set()

    def window(self):
        return max(self.steps / 8, 20)

    def balance(self):
        lag, asked = self.window() / 2, 0.05 * max(self.gain, 0)
        fall = (self.far - self.near) / lag
        error = self.spread / np.sqrt(self.window()) / lag
        below = abs(fall) + asked + error
        return (fall - asked) / below if below else 0.0

    def step(self, case):
        """The part of the step that is taken, and whether there was an alarm."""
        own, loss = abs(case["d"]), case["loss"]
        if own > 4 * self.own:
            self.branches.add("anew")
            self.known, self.blind, self.target = 0, 0, 0.5
        held, alarm = min(1.0, self.radius / own), False
        scale = held
        binds = self.radius < self.own
        interval = self.every if binds else 2 * self.every
        self.branches.add("bound" if binds else "free")
        dense = self.known < 5 and self.blind < 5
        if dense or self.steps % interval == 0:
            usual = max(abs(self.far), 2 * self.spread)
            found = self.look(case, held, max(abs(loss), usual))
            alarm = found["looks"] > 1 or not found["accepted"]
            self.learn(found, alarm, held * own, own)
            scale = held * found["part"] if found["accepted"] else 0.0
        count = self.steps + 1
        far, near = (1 / min(w, count) for w in (self.window(), self.window() / 2))
        jump = 4 * self.spread
        self.spread += far * (abs(loss - self.far) * (count > 1) - self.spread)
        if abs(loss - self.near) > jump:
            self.far, self.near = self.far + loss - self.near, loss
        self.far += far * (loss - self.far)
        self.near += near * (loss - self.near)
        self.steps, self.own = count, own
        return scale, alarm

    def look(self, case, held, rise):
        """Nearer, eight times at most, until the loss bears it."""
        limit = 1 / 2 if self.known == 0 else np.inf
        part, looks = 1.0, 0
        while True:
            x = part * held * case["d"]
            slope = case["g"] * x
            change = loss_at(x, case, np) - case["loss"]
            excess = change - slope
            looks += 1
            blind = abs(slope) <= 16 * 2**-23 * abs(case["loss"])
            descends = slope < 0 and np.isfinite(excess)
            r = excess / abs(slope) if descends else np.inf
            accepted = change <= rise and (slope >= 0 or r <= limit or blind)
            if looks == 1 and not accepted and self.steps < 5:
                looks += 1  # At the parameters themselves, where the loss is the same.
            if accepted or looks == 8:
                break
            nearer = 0.25 / max(r, 1e-9) if np.isfinite(r) else 0.1
            part *= np.clip(nearer, 0.01, 0.5)
        return {
            "part": part,
            "looks": looks,
            "accepted": accepted,
            "excess": excess,
            "slope": slope,
            "blind": blind,
        }

    def learn(self, found, alarm, length, own):
        part, won = found["part"], self.balance()
        known = np.isfinite(found["excess"]) and not found["blind"]
        if known:
            old = min(0.8, self.known / (self.known + 1))
            # Of steps as long as this one: the excess goes with its square.
            self.excess = old * self.excess * part**2 + (1 - old) * found["excess"]
            self.slope = old * self.slope * part + (1 - old) * found["slope"]
        if self.slope < 0:
            self.r = self.excess / -self.slope
        else:
            rises = self.excess + self.slope > 0
            self.branches.add("rises" if rises else "stays")
            self.r = 2.0 if rises else self.target
        if known:
            self.target = min(max(self.target + 0.03 * won, 0.2), 2.0)
        if alarm and found["accepted"]:
            self.branches.add("harmful")
            self.radius, self.cuts = length * part, self.cuts + 1
        elif alarm:
            self.branches.add("no part")
        else:
            move = min(max(self.target - self.r, -1.0), 1.0)
            self.branches.add("grows" if move > 0 else "shrinks")
            move *= (1 + won) / 2 if move > 0 else 1
            move = move if known else float(found["blind"])
            felt = min(self.radius, 2 * own) if move < 0 else self.radius
            self.radius = felt * np.exp(0.3 * move)
        shorter = min(1.0, self.radius / (length * part))
        self.excess, self.slope = self.excess * shorter**2, self.slope * shorter
        if not alarm:
            window = max(self.window() / self.every, 1.0)
            seen = -(found["excess"] + found["slope"])
            self.gain += (seen - self.gain) / min(window, self.known + 1)
        self.looks += found["looks"]
        self.known += int(known and found["slope"] < 0)
        self.blind = self.blind + 1 if found["blind"] and found["accepted"] else 0


def cases(seed):
    """Lines of all sorts; what a step promises, and what it does, by chance."""
    rng = np.random.default_rng(seed)
    shape = (CASES, STEPS)
    length = rng.lognormal(-1, 0.7, shape)
    g = -rng.lognormal(0, 0.5, shape)
    curved = rng.lognormal(0, 0.8, (CASES, 1)) * rng.lognormal(0, 0.6, shape)
    ascends = rng.random(shape) < SHARES[:, None]
    ascends[:, 0] = False  # That would be a mismatch.
    concave = np.where(np.arange(CASES) < 22, -0.1, -6 * curved.T).T
    hollow = rng.random(shape) < np.where(np.arange(CASES) < 22, 0.1, 0.8)[:, None]
    falls = np.where(np.arange(CASES) % 2, 2.0, 0.0)[:, None]
    return {
        "d": np.where(ascends, -length, length),
        "g": g,
        "h": np.where(hollow, concave, curved),
        "c": rng.random(shape) * 0.1,
        "wall": np.where(rng.random(shape) < 0.05, 0.03, 1e9),
        "loss": 0.3 + 0.3 * rng.random(shape) + falls * np.exp(-np.arange(STEPS) / 60),
    }


def rounded(table):
    """The same numbers for float32 and float64."""
    return {k: np.float64(np.float32(v)) for k, v in table.items()}


def attempt_of(case):
    return Attempt(
        gradient=case["g"],
        step=lambda: case["d"],
        params=jnp.zeros(()),
        length=jnp.abs(case["d"]),
        loss=case["loss"],
        loss_fn=lambda x: loss_at(x, case, jnp),
    )


def walk(response, table, state=None):
    """Scales, alarms and states of every step, for every case at once."""

    def step(state, case):
        ahead = response.look_ahead(state, attempt_of(case))
        return ahead.state, (ahead.step_scale, ahead.alarm, ahead.state)

    start = response.init_state() if state is None else state
    run = jax.vmap(lambda rows: jax.lax.scan(step, start, rows)[1])
    return jax.jit(run)(jax.tree.map(jnp.float32, table))


@pytest.mark.parametrize("every", core([4, 3, 1], 4))
def test_the_state_machine_is_the_one_of_the_docstrings(every):
    table = rounded(cases(seed=every + 30))
    scale, alarm, state = walk(sg.trust_region(every), table)
    names = ("scale", "alarm", "R", "r", "target")
    expected = {k: np.zeros((CASES, STEPS)) for k in names}
    counts, branches = np.zeros((CASES, STEPS, 3)), set()
    for i in range(CASES):
        oracle = Oracle(every)
        for t in range(STEPS):
            case = {name: rows[i, t] for name, rows in table.items()}
            expected["scale"][i, t], expected["alarm"][i, t] = oracle.step(case)
            expected["R"][i, t], expected["r"][i, t] = oracle.radius, oracle.r
            expected["target"][i, t] = oracle.target
            counts[i, t] = oracle.looks, oracle.cuts, oracle.known
        branches |= oracle.branches
    radius = np.where(state.trust_radius < _radius.NEVER, state.trust_radius, np.inf)
    # Every branch was taken.
    wanted = {"bound", "free", "harmful", "grows", "shrinks", "rises", "stays"}
    wanted |= {"anew"}
    assert branches - {"no part"} == wanted, branches
    low, high = state.trust_target.min(), state.trust_target.max()
    assert low == np.float32(0.2) and high > 0.6, (low, high)
    # Until a step is so short that float32 cannot tell what it changes.
    seen = np.minimum.accumulate(expected["R"], axis=1) > 1e-3
    assert seen.mean() > 0.75, seen.mean()
    close = lambda own, other, **by: np.testing.assert_allclose(
        np.asarray(own)[seen], other[seen], **by
    )
    close(alarm, expected["alarm"], rtol=0)
    close(scale, expected["scale"], rtol=1e-2)
    close(radius, expected["R"], rtol=1e-2)
    close(state.trust_ratio, expected["r"], rtol=5e-3, atol=2e-3)
    close(state.trust_target, expected["target"], atol=1e-3)
    told = (state.trust_probes, state.trust_cuts, state.probes_known)
    close(np.stack(told, axis=-1), counts, rtol=0)


def line(loss, r, d=1.0, noise=0.0):
    """Steps of length d and slope -1, whose whole length has the given r."""
    loss = np.float64(loss) + noise * np.random.default_rng(0).normal(size=len(loss))
    rows = {"d": d, "g": -1.0, "h": 2 * np.asarray(r) / d, "c": 0.0, "wall": 1e9}
    rows |= {"loss": loss}
    return {k: np.broadcast_to(v, (1, len(loss))) for k, v in rows.items()}


# Steps of r = 3 at first; of a healthy step, or one at the edge of stability, later.
@pytest.mark.slow
@pytest.mark.parametrize("later, probes", [(0.2, 25), (0.5, 30), (1.0, 45)])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_an_early_cut_is_forgotten_within_stated_probes_while_the_loss_falls(
    later, probes, noise
):
    t = np.arange(1000)
    r = np.where(t < 10, 3.0, later)
    fall = 0.5 ** (t / 200)
    scale, _, state = walk(sg.trust_region(), line(fall, r, d=1e-3, noise=noise))
    assert scale[0, 0] < 0.2 and scale[0, 9] < 0.5
    free = np.asarray(scale[0] == 1)
    first = int(free.argmax())
    made = int(state.trust_probes[0, first] - state.trust_probes[0, 9])
    assert free[first:].mean() > 0.99 and made <= probes, (first, made, free.mean())


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_the_target_sinks_where_gains_on_own_batches_are_not_real(noise):
    # Every step gains 0.6 of 0.1 on its own batch, but the next loss is as before.
    table = line(np.ones(1000), 0.4, d=0.1, noise=noise)
    scale, _, state = walk(sg.trust_region(), table)
    assert state.trust_target[0, -1] == np.float32(0.2)
    assert (np.diff(state.trust_target[0, 20:400]) <= 1e-6).mean() > 0.9
    assert scale[0, -1] < 0.55  # Half the length has the r of the target.


@pytest.mark.parametrize("noise", core([0.0, 0.01], 0.01))
def test_on_a_plateau_steps_of_a_small_r_are_left_alone(noise):
    table = line(np.ones(1000), 0.15, d=0.1, noise=noise)
    scale, _, state = walk(sg.trust_region(), table)
    assert state.trust_target[0, -1] == np.float32(0.2)
    assert (scale[0, 20:] == 1).mean() > 0.95


@pytest.mark.slow
def test_steps_that_the_rounding_of_the_loss_hides_are_probed_as_seldom_as_others():
    d = np.where(np.arange(400) < 200, 1e-9, 0.1)
    _, _, state = walk(sg.trust_region(), line(np.ones(400), 0.05, d=d))
    probes = np.asarray(state.trust_probes[0])
    assert 200 / 8 <= probes[199] <= 200 / 8 + 5
    # The first steps that are seen are probed one by one.
    np.testing.assert_array_equal(np.diff(probes)[199:204], 1)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["high", "low", "grow"])
def test_an_option_of_the_old_law_warns_and_has_no_effect(option):
    with pytest.warns(DeprecationWarning, match=f"`{option}` .* has no effect"):
        old = sg.trust_region(**{option: 0.4})
    table = {k: v[:, :40] for k, v in rounded(cases(seed=0)).items()}
    usual = walk(sg.trust_region(), table)
    jax.tree.map(np.testing.assert_array_equal, walk(old, table), usual)


def random_states(count, seed):
    """States as they may be, and some that hardly may."""
    rng = np.random.default_rng(seed)
    few = lambda high: jnp.asarray(rng.integers(0, high, count), jnp.int32)
    wide = lambda sign=1: jnp.float32(sign * 10 ** rng.uniform(-20, 20, count))
    start = jax.tree.map(lambda x: jnp.full((count,), x), _radius.init_radius())
    free = rng.random(count) < 0.3
    return start._replace(
        trust_radius=jnp.where(free, _radius.NEVER, wide()),
        mean_excess=wide(rng.choice([-1, 1], count)),
        mean_slope=wide(rng.choice([-1, 1, -1, -1], count)),
        trust_target=jnp.float32(rng.uniform(0, 2, count)),
        own_length=wide(),
        progress=Progress(
            *(wide(rng.choice([-1, 1], count)) for _ in range(2)),
            wide(),
            wide(rng.choice([-1, 1], count)),
        ),
        steps_tried=few(1000),
        probes_known=few(60),
        probes_blind=few(10),
    )


def random_looks(count, seed):
    rng = np.random.default_rng(seed)
    bad = rng.choice([1, 1, 1, np.nan, np.inf, -np.inf], count)
    excess = rng.choice([-1, 1], count) * 10 ** rng.uniform(-30, 38, count) * bad
    slope = rng.choice([-1, 1, -1, 0], count) * 10 ** rng.uniform(-30, 38, count)
    looks = rng.choice([1, 1, 1, 2, 8], count)
    blind = np.isfinite(excess) & (rng.random(count) < 0.1)
    return Look(
        part=jnp.float32(np.where(looks > 1, 10 ** rng.uniform(-7, -0.3, count), 1)),
        excess=jnp.float32(excess),
        slope=jnp.float32(slope),
        known=jnp.isfinite(jnp.float32(excess)) & ~blind,
        blind=jnp.asarray(blind),
        accepted=jnp.asarray(np.isfinite(excess) & (rng.random(count) < 0.9)),
        mismatch=jnp.zeros(count, bool),
        looks=jnp.asarray(looks, jnp.int32),
    )


@functools.cache
def probed(count=20_000, seed=0):
    """Many states, each after one probe of any kind of a step that the radius holds."""
    state, found = random_states(count, seed), random_looks(count, seed + 1)
    own = jnp.float32(10 ** np.random.default_rng(seed).uniform(-20, 20, count))
    own = jnp.where(state.trust_radius < _radius.NEVER, state.trust_radius, own)
    length = own
    after = jax.jit(jax.vmap(_radius.after_probe, in_axes=(0, 0, 0, 0, None)))
    return state, found, length, *after(state, found, length, own, 4)


@pytest.mark.slow
def test_no_probe_of_any_kind_makes_the_state_other_than_finite():
    *_, after, _ = probed()
    for name, field in after._asdict().items():
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(field)), name
    assert (after.trust_radius > 0).all()
    assert ((after.trust_target >= 0) & (after.trust_target <= 2)).all()


def test_a_probe_that_is_not_finite_or_an_alarm_never_lengthens():
    state, found, _, after, alarm = probed()
    dumb = np.asarray((~found.known & ~found.blind) | alarm)
    assert dumb.sum() > 1000
    assert (after.trust_radius <= state.trust_radius * (1 + 1e-6))[dumb].all()


def test_a_probe_moves_the_radius_by_a_third_unless_it_is_an_alarm():
    state, found, length, after, alarm = probed()
    start = np.float64(state.trust_radius)
    shrinks = np.asarray(after.trust_radius) < start
    start = np.where(shrinks, np.minimum(start, 2 * np.float64(length)), start)
    move = np.log(np.asarray(after.trust_radius) / start)[~np.asarray(alarm)]
    assert np.abs(move).max() < 0.3 + 1e-4
    assert (move > 0.29).any() and (move < -0.29).any()
    harmful = np.asarray(alarm & found.accepted)
    np.testing.assert_array_equal(after.trust_cuts - state.trust_cuts, harmful)
    part = np.asarray(after.trust_radius / length / found.part)[harmful]
    np.testing.assert_allclose(part, 1, rtol=1e-4)
    rejected = np.asarray(alarm & ~found.accepted)
    assert rejected.sum() > 100
    same = np.asarray(after.trust_radius == state.trust_radius)[rejected]
    assert same.all()


def test_probes_are_half_as_frequent_while_the_radius_does_not_bind():
    start = _radius.init_radius()._replace(own_length=jnp.float32(1))
    at = lambda radius, known: [
        t
        for t in range(17)
        if _radius.is_due(
            start._replace(
                trust_radius=jnp.float32(radius),
                probes_known=jnp.int32(known),
                steps_tried=jnp.int32(t),
            ),
            4,
        )
    ]
    assert at(2.0, 5) == [0, 8, 16]
    assert at(0.5, 5) == [0, 4, 8, 12, 16]
    assert at(2.0, 4) == at(0.5, 4) == list(range(17))


def seen(state, loss, sound=True):
    loss = jnp.float32(loss)
    return _radius.after_step(state, loss, jnp.float32(2), jnp.float32(0.5), sound)


def test_a_loss_that_is_not_finite_leaves_no_trace_but_a_step():
    state = seen(_radius.init_radius(), 3)
    for bad in (np.nan, np.inf, -np.inf):
        after = seen(state, bad)
        assert after == state._replace(steps_tried=after.steps_tried)
        assert after.steps_tried == 2
    assert np.isfinite(seen(state, 3e38).progress).all()


def test_a_step_of_no_length_counts_for_the_loss_but_not_for_the_cadence():
    state = seen(seen(_radius.init_radius(), 3), 4)
    after = seen(state, 5, sound=False)
    assert after.steps_tried == state.steps_tried == 2
    assert after.progress.near > state.progress.near
    assert after.own_length == 2


def test_an_alarm_is_a_rise_that_doubles_the_loss_or_leaves_its_usual_range():
    start = _radius.init_radius()
    assert _radius.longest_rise(start, jnp.float32(-2)) == 2
    usual = Progress(*jnp.float32([-1, 0, 4, 0]))
    later = start._replace(progress=usual, steps_tried=jnp.int32(1))
    assert _radius.longest_rise(later, jnp.float32(0.1)) == 8
    assert _radius.longest_rise(later, jnp.float32(9)) == 9


@pytest.mark.slow
def test_a_mismatch_after_the_first_steps_is_rounding_and_nothing_is_let_go():
    found = jax.tree.map(lambda x: x[0], random_looks(1, 0))
    found = found._replace(
        mismatch=jnp.array(True), accepted=jnp.array(False), looks=jnp.int32(8)
    )
    state = _radius.init_radius()._replace(
        trust_radius=jnp.float32(1e-3), steps_tried=jnp.int32(5)
    )
    after, alarm = _radius.after_probe(state, found, 1e-3, 1.0, 4)
    assert not alarm and not after.trust_mismatch
    assert after.trust_radius <= 2e-3


@pytest.mark.slow
def test_a_mismatch_lets_go_of_the_radius_and_ends_all_probes():
    found = jax.tree.map(lambda x: x[0], random_looks(1, 0))
    found = found._replace(
        mismatch=jnp.array(True), accepted=jnp.array(False), looks=jnp.int32(8)
    )
    state = _radius.init_radius()._replace(trust_radius=jnp.float32(1e-3))
    after, alarm = _radius.after_probe(state, found, 1e-3, 1.0, 4)
    assert not alarm and after.trust_mismatch
    assert after.trust_radius == _radius.NEVER
    assert not _radius.is_due(after, 1)
