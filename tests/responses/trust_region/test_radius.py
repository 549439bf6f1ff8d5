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


def loss_at(x, case, xp):
    """A line of the loss: slope g, curvature h, cubic c, and nothing beyond a wall."""
    loss, g, h, c, wall = (case[name] for name in ("loss", "g", "h", "c", "wall"))
    value = loss + g * x + 0.5 * h * x**2 + c * xp.abs(x) ** 3
    return xp.where(xp.abs(x) > wall, xp.nan, value)


class Oracle:
    """What the docstrings say, in float64."""

    def __init__(self, every, high, low, grow):
        self.every, self.high, self.low, self.grow = every, high, low, grow
        self.radius, self.excess, self.slope = np.inf, 0.0, 0.0
        self.far, self.near, self.spread, self.steps = 0.0, 0.0, 0.0, 0
        self.known, self.bound, self.free, self.cut_length = 0, 0.0, 0, np.inf
        self.branches = set()
        self.r, self.looks, self.cuts = 0.0, 0, 0

    def care(self, binds):
        if not binds:
            return 0.7 + (1.6 - 0.7) * min(self.free / 50, 1)
        return max(0.7 / (1 + max(self.bound - 30, 0) / 50), 0.3)

    def window(self):
        return min(max(self.steps / 8, 50), 400)

    def gain(self):
        """In standard errors of the mean of the last steps."""
        error = 1.25 * self.spread * np.sqrt(5 / (2 * self.window()))
        return (self.far - self.near) / error if error else 0.0

    def step(self, case):
        """The part of the step that is taken, and whether there was an alarm."""
        own, loss = abs(case["d"]), case["loss"]
        held, alarm = min(1.0, self.radius / own), False
        scale = held
        if self.known < 5 or self.steps % self.every == 0:
            usual = max(abs(self.far), 4 * self.spread) if self.steps else 0.0
            found = self.look(case, held, max(abs(loss), usual))
            alarm = found["looks"] > 1 or not found["accepted"]
            self.learn(found, alarm, held * own, own)
            scale = held * found["part"] if found["accepted"] else 0.0
        if self.steps == 0:
            self.far = self.near = loss
        else:
            new = 1 / self.window()
            self.spread += new * (abs(loss - self.far) - self.spread)
            self.far += new * (loss - self.far)
            self.near += 5 * new * (loss - self.near)
        self.steps += 1
        return scale, alarm

    def look(self, case, held, rise):
        """Nearer, eight times at most, until the loss bears it."""
        accept = 0.7 * self.high
        limit = accept if self.known == 0 else np.inf
        part, looks = 1.0, 0
        while True:
            x = part * held * case["d"]
            slope = case["g"] * x
            change = loss_at(x, case, np) - case["loss"]
            excess = change - slope
            looks += 1
            descends = slope < 0 and np.isfinite(excess)
            r = excess / abs(slope) if descends else np.inf
            accepted = change <= rise and (slope >= 0 or r <= limit)
            if accepted or looks == 8:
                break
            nearer = 0.7 * accept / max(r, 1e-9) if np.isfinite(r) else 0.1
            part *= np.clip(nearer, 0.01, 0.5)
        return {
            "part": part,
            "looks": looks,
            "accepted": accepted,
            "excess": excess,
            "slope": slope,
        }

    def learn(self, found, alarm, length, own):
        part = found["part"] if alarm else 1.0
        told, before = np.isfinite(found["excess"]), self.slope
        if told:
            old = 0.0 if self.known == 0 else 0.85
            # Of steps as long as this one: the excess goes with its square.
            self.excess = old * self.excess * part**2 + (1 - old) * found["excess"]
            self.slope = old * self.slope * part + (1 - old) * found["slope"]
        climbs, climbed = self.slope >= 0, before >= 0 and self.known > 0
        self.r = 2.0 if climbs else self.excess / -self.slope
        binds = self.radius < 4 * own
        care, settled = self.care(binds), self.known >= 30
        improves = settled and self.gain() > 1
        worsens = settled and self.gain() < -1
        descends = told and found["slope"] < 0
        too_long = told and not alarm and self.r > care * self.high
        if alarm and found["accepted"]:
            self.radius, self.cuts = length * found["part"], self.cuts + 1
        elif too_long and (improves or (climbs and climbed)):
            self.branches.add("spared while it improves" if improves else "spared")
        elif too_long:
            if binds:
                self.cut_length = length
            cut = np.clip(0.7 * care * self.high / self.r, 0.5, 1)
            self.radius, self.cuts = length * cut, self.cuts + 1
            self.excess, self.slope = self.excess * cut**2, self.slope * cut
        elif descends and not alarm and self.r < care * self.low and not worsens:
            far = self.r < 0.1 * care * self.low
            usual = max(self.grow, 2.0) if far else self.grow
            near = self.radius > 0.5 * self.cut_length
            self.branches.add("slow growth" if near else "growth")
            self.radius *= 1.1 if near else usual
        elif descends and not alarm and self.r < care * self.high and improves:
            self.branches.add("tries")
            self.radius *= 1.1 if binds else 1
        if not self.radius < 4 * own:
            self.cut_length = np.inf
        self.looks += found["looks"]
        self.known += int(descends)
        if binds:
            relieved = self.bound + 1 - 3 * self.window() / 400
            relieved = max(relieved, min(self.bound, 30))
            self.bound = relieved if improves else self.bound + 1
        self.free = 0 if binds else self.free + int(told)


def cases(seed):
    """Lines of all sorts; what a step promises, and what it does, by chance."""
    rng = np.random.default_rng(seed)
    shape = (CASES, STEPS)
    length = rng.lognormal(-1, 0.7, shape)
    g = -rng.lognormal(0, 0.5, shape)
    curved = rng.lognormal(0, 0.8, (CASES, 1)) * rng.lognormal(0, 0.6, shape)
    ascends = rng.random(shape) < np.where(np.arange(CASES) < 18, 0.1, 0.5)[:, None]
    falls = np.where(np.arange(CASES) % 2, 2.0, 0.0)[:, None]
    return {
        "d": np.where(ascends, -length, length),
        "g": g,
        "h": np.where(rng.random(shape) < 0.1, -0.1, curved),
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


@pytest.mark.parametrize(
    "every, high, low, grow",
    core([(4, 0.5, 0.3, 1.3), (3, 0.8, 0.5, 2.5)], (4, 0.5, 0.3, 1.3)),
)
def test_the_state_machine_is_the_one_of_the_docstrings(every, high, low, grow):
    table = rounded(cases(seed=every))
    response = sg.trust_region(every, high, low, grow=grow)
    scale, alarm, state = walk(response, table)
    expected = {k: np.zeros((CASES, STEPS)) for k in ("scale", "alarm", "R", "r")}
    counts, branches = np.zeros((CASES, STEPS, 3)), set()
    for i in range(CASES):
        oracle = Oracle(every, high, low, grow)
        for t in range(STEPS):
            case = {name: rows[i, t] for name, rows in table.items()}
            expected["scale"][i, t], expected["alarm"][i, t] = oracle.step(case)
            expected["R"][i, t], expected["r"][i, t] = oracle.radius, oracle.r
            counts[i, t] = oracle.looks, oracle.cuts, oracle.known
        branches |= oracle.branches
    radius = np.where(state.trust_radius < _radius.NEVER, state.trust_radius, np.inf)
    # Every branch was taken: free, bound, cut, alarmed.
    assert np.isinf(radius).any() and np.isfinite(radius).any()
    assert len(branches) == 5, branches
    assert alarm.any() and (state.trust_cuts[:, -1] > alarm.sum(axis=1)).any()
    np.testing.assert_array_equal(alarm, expected["alarm"])
    np.testing.assert_allclose(scale, expected["scale"], rtol=1e-2)
    np.testing.assert_allclose(radius, expected["R"], rtol=1e-2)
    np.testing.assert_allclose(state.trust_ratio, expected["r"], rtol=5e-3, atol=2e-3)
    told = (state.trust_probes, state.trust_cuts, state.probes_known)
    np.testing.assert_array_equal(np.stack(told, axis=-1), counts)


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
        cut_length=jnp.where(rng.random(count) < 0.3, _radius.NEVER, wide()),
        progress=Progress(
            *(wide(rng.choice([-1, 1], count)) for _ in range(2)), wide()
        ),
        steps_tried=few(1000),
        probes_known=few(60),
        probes_bound=jnp.float32(few(300)),
        probes_free=few(300),
    )


def random_looks(count, seed):
    rng = np.random.default_rng(seed)
    bad = rng.choice([1, 1, 1, np.nan, np.inf, -np.inf], count)
    excess = rng.choice([-1, 1], count) * 10 ** rng.uniform(-30, 38, count) * bad
    slope = rng.choice([-1, 1, -1, 0], count) * 10 ** rng.uniform(-30, 38, count)
    looks = rng.choice([1, 1, 1, 2, 8], count)
    return Look(
        part=jnp.float32(np.where(looks > 1, 10 ** rng.uniform(-7, -0.3, count), 1)),
        excess=jnp.float32(excess),
        slope=jnp.float32(slope),
        known=jnp.isfinite(jnp.float32(excess)),
        blind=jnp.zeros(count, bool),
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
    after = jax.jit(jax.vmap(_radius.after_probe, in_axes=(0, 0, 0, 0, *[None] * 3)))
    return state, found, length, *after(state, found, length, own, 0.5, 0.3, 1.3)


def test_no_probe_of_any_kind_makes_the_state_other_than_finite():
    *_, after, _ = probed()
    for name, field in after._asdict().items():
        assert np.isfinite(field).all(), name
    assert (after.trust_radius > 0).all()


def test_a_probe_that_is_not_finite_or_does_not_descend_never_lengthens():
    state, found, _, after, alarm = probed()
    dumb = np.asarray(~found.known | (found.slope >= 0) | alarm)
    assert dumb.sum() > 1000
    assert (after.trust_radius <= state.trust_radius * (1 + 1e-6))[dumb].all()


def test_the_radius_grows_by_grow_or_doubles_and_a_cut_is_of_the_step_at_hand():
    state, found, length, after, alarm = probed()
    grew = np.asarray(after.trust_radius > state.trust_radius)
    factor = np.asarray(after.trust_radius / state.trust_radius)[grew]
    assert len(factor) > 100
    usual = [1.1, 1.3, 2.0]
    assert np.isclose(factor[:, None], usual).any(axis=1).all()
    assert np.isclose(factor[:, None], usual).any(axis=0).all()
    cut = np.asarray((after.trust_cuts > state.trust_cuts) & ~alarm)
    part = np.asarray(after.trust_radius / length)[cut]
    assert cut.sum() > 100 and (part >= 0.5 - 1e-6).all() and (part <= 1 + 1e-6).all()
    harmful = np.asarray(alarm & found.accepted)
    part = np.asarray(after.trust_radius / length / found.part)[harmful]
    np.testing.assert_allclose(part, 1, rtol=1e-4)


def test_the_care_tightens_while_it_binds_and_loosens_while_it_does_not():
    counts = jnp.arange(500)
    start = _radius.init_radius()
    after_bound = lambda n: _radius.care(
        start._replace(probes_bound=jnp.float32(n)), True
    )
    after_free = lambda n: _radius.care(start._replace(probes_free=n), False)
    both = lambda n: (after_bound(n), after_free(n))
    binding, free = jax.jit(jax.vmap(both))(counts)
    np.testing.assert_allclose(binding[:31], 0.7, rtol=1e-6)
    np.testing.assert_allclose(binding[jnp.array([80, 499])], [0.35, 0.3], rtol=1e-6)
    assert (np.diff(binding) <= 0).all() and (np.diff(free) >= 0).all()
    np.testing.assert_allclose(free[jnp.array([0, 25, 50])], [0.7, 1.15, 1.6])


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
    usual = Progress(jnp.float32(-1), jnp.float32(0), jnp.float32(2))
    later = start._replace(progress=usual, steps_tried=jnp.int32(1))
    assert _radius.longest_rise(later, jnp.float32(0.1)) == 8
    assert _radius.longest_rise(later, jnp.float32(9)) == 9


@pytest.mark.slow
def test_a_mismatch_lets_go_of_the_radius_and_ends_all_probes():
    found = jax.tree.map(lambda x: x[0], random_looks(1, 0))
    found = found._replace(
        mismatch=jnp.array(True), accepted=jnp.array(False), looks=jnp.int32(8)
    )
    state = _radius.init_radius()._replace(trust_radius=jnp.float32(1e-3))
    after, alarm = _radius.after_probe(state, found, 1e-3, 1.0, 0.5, 0.3, 1.3)
    assert not alarm and after.trust_mismatch
    assert after.trust_radius == _radius.NEVER
    assert not _radius.is_due(after, 1)
