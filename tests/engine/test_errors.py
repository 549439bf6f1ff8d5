"""What a guard says when it is built or called wrongly, and how to mend it."""

import jax
import jax.numpy as jnp
import optax
import pytest

import stablegrad as sg

PARAMS = {"w": jnp.array([1.0, 2.0])}


def test_a_changing_inner_state_is_named():
    inner = optax.GradientTransformation(
        lambda params: {}, lambda updates, state, params=None: (updates, {"new": 1.0})
    )
    tx = sg.guard(inner)
    with pytest.raises(ValueError, match="changed the structure of its state"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_another_pytree_than_the_one_given_to_init_is_named():
    tx = sg.guard(optax.sgd(0.1))
    state = tx.init({"dense": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}})
    with pytest.raises(
        ValueError,
        match=r"differs in structure .* 2 floating-point leaves: dense.kernel, head\.",
    ):
        other = {"dense": {"kernel": jnp.ones(2)}, "head": jnp.ones(2)}
        tx.update(other, state, other)


def test_a_loss_in_the_place_of_the_parameters_is_told_where_it_goes():
    tx = sg.guard(optax.sgd(0.1))
    for loss in (1.0, jnp.array(1.0)):
        with pytest.raises(ValueError, match="the loss is `value=loss`"):
            tx.update(PARAMS, tx.init(PARAMS), loss)


def test_missing_and_unexpected_leaves_are_named_where_the_state_is_concrete():
    tx = sg.guard(optax.sgd(0.1))
    state = tx.init({"kernel": jnp.ones(2), "bias": jnp.ones(2)})
    other = {"kernel": jnp.ones(2), "head": jnp.ones(2)}
    with (
        jax.disable_jit(),
        pytest.raises(ValueError, match="missing: bias; unexpected: head"),
    ):
        tx.update(other, state, other)


@pytest.mark.parametrize("step", ["update", "apply"])
def test_a_gradient_of_another_shape_than_its_parameter_is_named(step):
    tx = sg.stabilize(optax.adam(0.1))
    given = {"w": jnp.ones(1)}, tx.init(PARAMS), PARAMS
    with pytest.raises(ValueError, match=r"the leaf w has shape \(1,\), .* \(2,\)"):
        if step == "update":
            tx.update(*given, value=1.0)
        else:
            sg.apply(tx, *given, value=1.0)


def test_averaged_gradients_without_the_axis_are_an_error():
    with pytest.raises(ValueError, match="axis_name"):
        sg.stabilize(optax.sgd(0.1), averaged_gradients=True)


def test_a_state_of_another_transformation_is_explained():
    tx = sg.stabilize(optax.adam(0.1))
    foreign = optax.adam(0.1).init(PARAMS)
    own = tx.init(PARAMS)
    for call in (
        lambda: sg.apply(tx, PARAMS, foreign, PARAMS, value=1.0),
        lambda: sg.apply(tx, own, PARAMS, PARAMS, value=1.0),
        lambda: tx.update(PARAMS, None, PARAMS),
        lambda: jax.jit(tx.update)(PARAMS, foreign, PARAMS),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert "tx.init(params)" in str(caught.value)
        assert "sg.apply(tx, grads, state, params)" in str(caught.value)


def test_a_clip_before_init_is_explained():
    with pytest.raises(ValueError, match="init"):
        sg.clip_by_norm(1.0).update(PARAMS, None)


@pytest.mark.parametrize("method", ["init", "update"])
def test_a_response_in_a_chain_is_explained(method):
    response = sg.clip(sg.fixed(1.0))
    with pytest.raises(TypeError, match=r"`clip\(...\)` is a response.*`sg.guard\("):
        getattr(response, method)(PARAMS)
    with pytest.raises(TypeError, match="is a response of a guard"):
        optax.chain(response, optax.adam(1.0)).init(PARAMS)


VALUE_RULE = sg.skip(sg.zscore(6.0, of="value"))


def test_a_missing_value_is_an_error_that_shows_every_fix():
    tx = sg.guard(optax.sgd(0.1), VALUE_RULE)
    with pytest.raises(ValueError) as caught:
        jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    for fix in (
        "tx.update(grads, state, params, value=loss)",
        "sg.apply(tx, grads, state, params, value=loss)",
        "optimizer.update(model, grads, value=loss)",
        "apply_gradients(state, grads=grads, value=loss)",
    ):
        assert fix in str(caught.value)


@pytest.mark.parametrize("rules", [(), (VALUE_RULE,)])
@pytest.mark.parametrize("value", [jnp.ones(4), jnp.ones(1), 1j])
def test_a_value_that_is_not_a_real_scalar_is_an_error(value, rules):
    tx = sg.guard(optax.sgd(0.1), *rules)
    with pytest.raises(ValueError, match="`value` must be a real scalar, got shape"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=value)


@pytest.mark.slow
def test_a_loss_with_auxiliary_output_is_an_error_that_shows_the_fix():
    tx = sg.stabilize(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"pass the loss alone"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=(1.0, {"accuracy": 0.5}))


def test_parameters_that_are_no_arrays_are_an_error_that_shows_the_fix():
    with pytest.raises(TypeError, match=r"eqx.filter\(model, eqx.is_inexact_array\)"):
        sg.stabilize(optax.adam(0.1)).init({"w": jnp.ones(2), "activation": jnp.tanh})


def test_a_float64_loss_beyond_float32_counts_as_finite(x64):
    tx = sg.guard(optax.sgd(0.1), sg.skip(sg.nonfinite(of="value")))
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1e300)
    assert not sg.metrics(state)["skipped"]


def test_missing_parameters_are_an_error_that_shows_every_fix():
    tx = sg.stabilize(optax.adamw(0.1))
    with pytest.raises(ValueError) as caught:
        jax.jit(lambda state: tx.update(PARAMS, state, value=None))(tx.init(PARAMS))
    for fix in (
        "tx.update(grads, state, params)",
        "sg.apply(tx, grads, state, params)",
        "optimizer.update(model, grads)",
        "state.apply_gradients(grads=grads)",
    ):
        assert fix in str(caught.value)


def test_what_is_not_a_response_is_an_error():
    with pytest.raises(
        TypeError, match=r"`guard` takes responses.*got `zscore\(...\)`"
    ):
        sg.guard(optax.sgd(0.1), sg.zscore(2.5))


@pytest.mark.parametrize("wrong", [None, optax.adam, sg.skip()])
def test_what_is_not_an_optimizer_is_an_error(wrong):
    with pytest.raises(TypeError, match="must be given an optax transformation first"):
        sg.guard(wrong)


@pytest.mark.parametrize(
    "build, name, bounds",
    [
        (lambda: sg.halt(after=float("inf")), "after", ">= 1, got inf"),
        (lambda: sg.zscore(6.0, warmup_steps=2**40), "warmup_steps", "<= 2147483647"),
        (lambda: sg.percentile(90, window=2**40), "window", "<= 2147483647"),
        (lambda: sg.zscore(6.0, patience=2.5), "patience", ">= 25, got 2.5"),
    ],
)
def test_a_number_of_steps_beyond_what_can_be_counted_is_an_error(build, name, bounds):
    with pytest.raises(ValueError, match=f"`{name}` must be an integer {bounds}"):
        build()
