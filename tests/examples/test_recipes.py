"""Smoke tests of `examples/recipes`: pages to copy, which must run and train."""

import importlib
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from recipes import (
    equinox_model,
    flax_linen,
    flax_nnx,
    gradient_accumulation,
    mixed_precision,
)

import stablegrad as sg

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
LONGEST = 85


def events_of(state):
    return [(event.step, event.reason) for event in sg.events(state)]


def test_flax_nnx_trains_scanned_layers_with_a_guarded_optimizer(capsys):
    loss, optimizer = flax_nnx.main(steps=100)
    assert loss < 0.05
    assert events_of(optimizer) == [(20, "nonfinite_gradient")]
    assert sg.events(optimizer)[0].leaf == "blocks.linear.bias"
    chex.assert_shape(
        optimizer.opt_state.guarded_inner[0].mu.blocks.linear.kernel[...], (4, 16, 16)
    )
    assert "1 of 100 steps skipped" in capsys.readouterr().out


def test_flax_linen_steps_a_train_state_and_keeps_its_batch_statistics():
    loss, state = flax_linen.main(steps=100)
    assert loss < 0.05
    assert state.step == 100
    assert events_of(state) == [(20, "nonfinite_gradient")]
    chex.assert_tree_all_finite((state.params, state.batch_stats, state.opt_state))


def test_equinox_leaves_that_are_not_trained_stay_as_they_were():
    loss, (model, state) = equinox_model.main(steps=100)
    assert loss < 0.05
    assert events_of(state) == [(20, "nonfinite_gradient")]
    assert model.activation is jnp.asinh
    assert model.columns.dtype == jnp.int32
    np.testing.assert_array_equal(model.columns, [0, 1])


def test_gradient_accumulation_loses_the_bad_micro_batches_alone():
    loss, state = gradient_accumulation.main(steps=402)
    assert loss < 0.05
    bad = [(41, "nonfinite_gradient"), (202, "gradient_norm")]
    assert events_of(state) == bad
    assert state.guarded_inner.gradient_step == 100


def test_mixed_precision_finds_its_scale():
    loss, state, factors = mixed_precision.main(steps=150)
    assert loss < 0.05
    first, *others = sg.events(state)
    assert (first.step, first.reason) == (0, "nonfinite_gradient")
    assert factors[first.until] == 2.0 ** (22 - 1 - first.until)
    assert factors[59] == factors[60]  # The nan batch.
    assert 60 in [event.step for event in others]


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.py")))
def test_a_recipe_is_one_page_with_a_header_that_says_what_to_expect(name):
    text = (RECIPES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= LONGEST
    header = importlib.import_module(f"recipes.{name}").__doc__
    assert f"python examples/recipes/{name}.py" in header
    for word in ("command:", "time:", "expected:"):
        assert word in header
