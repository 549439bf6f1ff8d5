"""Train states, models and transformations that a user may well bring along."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from flax.core import freeze
from flax.training.train_state import TrainState

import stablegrad as sg
from stablegrad.integrations import loggers
from stablegrad.integrations.linen import apply_gradients

PARAMS = {"w": jnp.ones(2)}


class WithStatistics(TrainState):
    batch_stats: Any = None


class WithCritic(TrainState):
    value_fn: Any = struct.field(pytree_node=False, default=None)
    value: Any = None


def created(kind, **fields):
    tx = sg.stabilize(optax.sgd(0.1))
    return kind.create(apply_fn=None, params=PARAMS, tx=tx, **fields)


def test_a_misspelt_field_of_a_train_state_is_an_error():
    state = created(WithStatistics, batch_stats={"m": jnp.zeros(1)})
    new = {"m": jnp.ones(1)}
    with pytest.raises(TypeError, match="`batch_stat=`; the train state has `batch_st"):
        apply_gradients(state, grads=PARAMS, value=1.0, batch_stat=new)
    for name in ("batch_stat", "params", "step"):
        with pytest.raises(TypeError, match=rf"`fields` must be .* got '{name}'"):
            apply_gradients(state, grads=PARAMS, value=1.0, fields={name: new})
    after = apply_gradients(state, grads=PARAMS, value=1.0, batch_stats=new)
    assert after.batch_stats["m"] == 1


def test_fields_named_like_what_the_guard_takes_are_not_mixed_up_with_it():
    critic = lambda params: 0.0
    state = created(WithCritic, value_fn=critic, value=jnp.float32(7.0))
    after = apply_gradients(
        state,
        grads=PARAMS,
        value=jnp.float32(1.0),
        value_fn=lambda params: jnp.sum(params["w"]),
        fields={"value": jnp.float32(8.0)},
    )
    assert after.value_fn is critic and after.value == 8
    seen = sg.metrics(after.opt_state)
    assert seen["trust_probes"] > 0 and seen["loss_value"] == 1


def test_a_multi_steps_object_gets_what_apply_is_given():
    tx = optax.MultiSteps(sg.stabilize(optax.sgd(0.1)), 1)
    _, state = sg.apply(tx, PARAMS, tx.init(PARAMS), PARAMS, value=jnp.float32(3))
    assert sg.metrics(state)["loss_value"] == 3


@pytest.mark.parametrize(
    "value", [1e300, np.float64(1e300), np.array(-1e300), 10**400], ids=range(4)
)
def test_a_loss_of_the_host_beyond_float32_is_finite_with_and_without_jit(value):
    tx = sg.stabilize(optax.sgd(0.1))
    step = lambda state: tx.update(PARAMS, state, PARAMS, value=value)[1]
    for run in (step, jax.jit(step)):
        seen = sg.metrics(run(tx.init(PARAMS)))
        assert not seen["skipped"]
        assert abs(seen["loss_value"]) == np.float32(3.4e38)


def test_a_whole_equinox_model_is_refused_by_init_whatever_the_optimizer():
    class Model(eqx.Module):
        weight: jax.Array
        activation: Any

    model = Model(jnp.ones(2), jax.nn.relu)
    for inner in (optax.sgd(0.1), optax.adam(0.1)):
        tx = sg.stabilize(inner)
        with pytest.raises(TypeError, match=r"eqx\.filter"):
            tx.init(model)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    told = []

    class Writer:
        def write(self, step, numbers):
            told.append((step, numbers))

    late = loggers.Late(Writer())
    late(1, (model, state))
    late.flush()
    assert told[0][0] == 1 and told[0][1]["lr_scale"] == 1
    with pytest.raises(TypeError, match="takes writers"):
        loggers.Late(Writer)


def test_gradients_and_parameters_in_two_kinds_of_containers_are_told_apart():
    tx, params = sg.stabilize(optax.sgd(0.1)), freeze(PARAMS)
    with pytest.raises(ValueError, match=r"(?s)same containers.*params: .*FrozenDict"):
        tx.update(PARAMS, tx.init(params), params, value=1.0)


def test_a_published_rule_checks_what_it_does_not_use():
    with pytest.raises(ValueError, match="`max_consecutive` must be"):
        sg.skip_bad_steps(optax.sgd(0.1), published=True, max_consecutive=-3)
