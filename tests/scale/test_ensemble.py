"""vmap over an ensemble: each member judges, clips and skips on its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _scale.collectives import collectives
from helpers.scenario import (
    HUGE,
    LOUD,
    MODES,
    NAN,
    OPTIMIZERS,
    SPIKE,
    Run,
    assert_same,
    drive,
    gradients,
    parameters,
    step_of,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import stablegrad as sg

pytestmark = [pytest.mark.slow, pytest.mark.devices(4)]

# For each member, the faults of the scenario that it gets; the rest is healthy.
FAULTS = [{}, {NAN}, {SPIKE, HUGE}, {LOUD, NAN, SPIKE}]
SKIPS = [[], [NAN], [SPIKE, HUGE], [NAN, SPIKE]]


def member_gradients(member, step):
    """The scenario's where the member has a fault, else those of an earlier step."""
    faulty = step in {LOUD, NAN, SPIKE, HUGE}
    healthy = step - 20 if faulty and step not in FAULTS[member] else step
    return gradients("small", healthy)


def stacked(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def one_of(run, member):
    """The run of one member."""
    own = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf)[member], tree)
    history = {name: rows[:, member] for name, rows in run.history.items()}
    return Run(own(run.params), history, own(run.state))


def interventions(state):
    return [(event.step, event.reason, event.leaf) for event in sg.events(state)]


def start(member):
    return {name: leaf + 0.1 * member for name, leaf in parameters("small").items()}


@pytest.mark.parametrize(
    "optimizer, mode", list(zip(OPTIMIZERS, MODES, strict=True)), ids=str
)
def test_each_member_of_an_ensemble_skips_on_its_own(optimizer, mode):
    tx, members = OPTIMIZERS[optimizer](), range(len(FAULTS))
    step = step_of(tx, mode)
    alone = jax.jit(step)

    # One member a device, where nothing at all has to be exchanged.
    mesh = jax.make_mesh((len(FAULTS),), ("member",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, P("member"))
    place = lambda trees: jax.device_put(stacked(trees), spread)
    params = place([start(i) for i in members])
    state = jax.device_put(jax.vmap(tx.init)(params), spread)
    together = jax.jit(jax.vmap(step, (0, 0, 0, None)), out_shardings=spread)
    program = together.lower(params, state, params, jnp.float32(1)).compile()
    assert collectives(program) == []
    run = drive(
        program,
        params,
        state,
        lambda t: place([member_gradients(i, t) for i in members]),
    )

    for i in members:
        own = one_of(run, i)
        assert np.flatnonzero(own.history["skipped"]).tolist() == SKIPS[i]
        expected = drive(
            alone, start(i), tx.init(start(i)), functools.partial(member_gradients, i)
        )
        assert_same(own, expected)
        assert interventions(own.state) == interventions(expected.state)
