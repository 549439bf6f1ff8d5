"""Critical learning rates against closed forms."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.marking import core

import stablegrad as sg

EXACT = 2e-4  # Relative: float32, and Adam's bias correction in it.
SEARCHED = 6e-3  # Relative: the forward search, and its tolerance of 0.1 %.
PROBED = 0.03  # Relative: the probe's search.
SGD = optax.sgd(1.0)
DIAGONAL = jnp.array([1.0, 10.0])


def quadratic(params, batch):
    return 0.5 * jnp.sum(batch * params**2)


def anything(params, batch):
    """The loss given as the batch: one compiled program for many shapes of it."""
    return jnp.interp(params, batch[0], batch[1])


def critical(loss_fn=quadratic, params=(1.0, 1.0), batch=DIAGONAL, tx=SGD, **settings):
    settings = {"learning_rate": 1.0, **settings} if tx is SGD else settings
    params = jnp.array(params) if isinstance(params, tuple) else params
    return sg.critical_learning_rate(loss_fn, params, batch, tx, **settings)


@pytest.fixture(scope="module")
def plain():
    return critical()


def test_gradient_descent_on_a_quadratic_has_the_known_answer(plain):
    expected = 2 * 101 / 1001
    assert plain.directional == pytest.approx(expected, rel=EXACT)
    assert plain.forward == pytest.approx(expected, rel=SEARCHED)
    # Over 10 steps the steep direction decides: 2 / 10.
    assert plain.probe == plain.critical == pytest.approx(0.2, rel=PROBED)
    assert plain.safe_start == pytest.approx(0.5 * plain.probe, rel=SEARCHED)
    assert plain.polyak == pytest.approx(5.5 / 101, rel=EXACT)
    assert plain.parameter == pytest.approx(1e-3 / math.sqrt(50.5), rel=EXACT)
    found = (plain.loss, plain.slope, plain.curvature)
    assert found == pytest.approx((5.5, -101.0, 1001.0), rel=1e-6)
    assert plain.method == "jvp" and plain.flags == ()


def test_adam_at_its_first_step_has_the_known_answer():
    found = critical(tx=lambda rate: optax.adam(rate, eps=0.0), steps=0)
    assert found.directional == pytest.approx(2.0, rel=EXACT)
    assert found.forward == pytest.approx(2.0, rel=SEARCHED)


def test_the_result_reads_as_sentences(plain):
    said = str(plain)
    assert said.startswith("Training spikes at a learning rate of about 0.20")
    assert "start at 0.1 or below. For comparison: Polyak's step is 0.054" in said
    assert plain.margin(0.1) == pytest.approx(0.5, rel=PROBED)
    for name, value in vars(plain).items():
        assert type(value) is float or name in ("method", "flags"), name


def test_the_rate_that_the_optimizer_was_built_with_does_not_matter(plain):
    built = critical(tx=optax.sgd(0.1), learning_rate=0.1)
    for field in ("directional", "forward", "probe", "parameter"):
        assert getattr(built, field) == pytest.approx(getattr(plain, field), rel=1e-5)


@pytest.mark.parametrize(
    "curvature", core(["vjp", "difference", "forward"], "difference")
)
def test_every_way_to_the_curvature_agrees(curvature):
    found = critical(curvature=curvature, steps=0)
    assert found.directional == pytest.approx(2 * 101 / 1001, rel=1e-3)
    assert math.isnan(found.probe) and found.method == curvature
    assert found.critical == min(found.directional, found.forward)


@pytest.mark.parametrize("scale", core([1e14, 1e-14], 1e14))
def test_a_curvature_beyond_float32_still_gives_the_rate(scale, plain):
    found = critical(batch=DIAGONAL * scale)
    assert found.directional == pytest.approx(plain.directional / scale, rel=EXACT)
    assert found.forward == pytest.approx(plain.forward / scale, rel=SEARCHED)
    assert found.probe == pytest.approx(plain.probe / scale, rel=PROBED)
    assert found.curvature == pytest.approx(1001 * scale**3, rel=EXACT)


@pytest.mark.slow
def test_losses_alone_give_the_curvature_where_the_loss_is_zero(plain):
    found = critical(lambda p, b: quadratic(p, b) - 5.5, curvature="forward", steps=0)
    assert found.loss == 0.0 and found.flags == ()
    assert found.directional == pytest.approx(plain.directional, rel=1e-3)


def square_without(derivative):
    """x^2, of which the second derivative goes some ways only."""

    @jax.custom_vjp
    def square(x):
        return x**2

    @jax.custom_vjp
    def double(x):
        return 2 * x

    def backward(_, g):
        if derivative == "second":
            raise TypeError("no second derivative")
        return (2 * g,)

    double.defvjp(lambda x: (2 * x, None), backward)
    square.defvjp(lambda x: (x**2, x), lambda x, g: (g * double(x),))
    return lambda params, batch: 0.5 * jnp.sum(batch * square(params))


LACKING = pytest.mark.parametrize(
    "derivative, method",
    core([("forward", "vjp"), ("second", "difference")], ("forward", "vjp")),
)


@LACKING
def test_a_loss_without_a_forward_derivative_falls_back(derivative, method):
    found = critical(square_without(derivative), steps=0)
    assert found.method == method
    assert found.directional == pytest.approx(2 * 101 / 1001, rel=1e-3)


@LACKING
def test_a_derivative_that_the_loss_lacks_is_named_with_the_ways_around(
    derivative, method
):
    asked = "jvp" if method == "vjp" else "vjp"
    with pytest.raises(
        ValueError, match=f"`curvature` must .* got '{asked}' .* or 'forward'"
    ) as caught:
        critical(square_without(derivative), curvature=asked, steps=0)
    assert "\n" not in str(caught.value)


def test_an_update_that_ascends_gives_zero_and_says_so():
    found = critical(tx=lambda rate: optax.sgd(-rate), steps=2)
    assert found.critical == found.directional == found.safe_start == 0.0
    assert found.flags == ("no descent",) and found.margin(0.1) == math.inf
    assert "No learning rate can be recommended" in str(found)


def test_a_stationary_point_says_so():
    found = critical(params=(0.0, 0.0))
    assert found.critical == math.inf and found.flags == ("no gradient",)


def test_negative_curvature_is_flagged_and_unlimited():
    found = critical(batch=-DIAGONAL)
    assert found.directional == found.forward == found.critical == math.inf
    assert found.flags == ("negative curvature", "no rise")
    assert "No critical learning rate was found" in str(found)


@pytest.mark.slow
@pytest.mark.parametrize("curvature", ["auto", "forward"])
def test_a_straight_loss_has_no_curvature_and_no_limit(curvature):
    table = jnp.array([[-1e9, -9.0, 9.0, 1e9]] * 2)
    found = critical(anything, jnp.array(3.0), table, steps=2, curvature=curvature)
    assert found.critical == found.directional == math.inf and found.curvature == 0
    assert found.flags == ("no curvature", "no rise")
    assert "its curvature is 0, which limits no rate" in str(found)


def test_a_loss_that_becomes_nan_counts_as_a_rise():
    places, heights = jnp.array([-9.0, 0.99, 1.0, 9.0]), [jnp.nan, jnp.nan, 1.0, 9.0]
    found = critical(anything, jnp.array(3.0), jnp.array([places, heights]), steps=2)
    assert found.directional == math.inf
    assert found.forward == pytest.approx(2.0, rel=SEARCHED)  # Each step moves by 1.
    assert found.probe == pytest.approx(1.0, rel=PROBED)


@pytest.mark.slow
def test_a_saturating_loss_gives_the_first_of_several_crossings():
    # From 3 it falls to 0, rises to 5 at -3, and is 1 from -9 on.
    table = jnp.array([[-1e9, -9.0, -3.0, 0.0, 9.0], [1.0, 1.0, 5.0, 0.0, 9.0]])
    found = critical(anything, jnp.array(3.0), table, steps=2)
    assert found.forward == pytest.approx(3 + 9 / 5, rel=SEARCHED)


@pytest.mark.slow
def test_a_two_layer_linear_net_spikes_at_two_over_its_curvature():
    width = 256
    draw = np.random.default_rng(0).normal(size=(2, width)).astype(np.float32)
    found = critical(catapult, jnp.asarray(draw), jnp.float32(width))
    curvature = np.sum(draw.astype(np.float64) ** 2) / width
    # The product may grow by sqrt(1.05) within 10 steps.
    assert found.probe * curvature == pytest.approx(2.0, rel=0.05)
    # Beyond the spike it converges up to 4 over the curvature: the catapult.
    assert linear_net_after(3.0 / curvature, draw) < 1e-6
    assert linear_net_after(4.2 / curvature, draw) > 1e6


def catapult(params, width):
    return 0.5 * jnp.dot(params[0], params[1]) ** 2 / width


def linear_net_after(rate, draw, steps=300):
    u, v = draw.astype(np.float64)
    for _ in range(steps):
        f = u @ v / np.sqrt(len(u))
        if not abs(f) < 1e8:
            return np.inf
        u, v = (x - rate * f * y / np.sqrt(len(u)) for x, y in ((u, v), (v, u)))
    return 0.5 * f**2


def test_a_warm_up_in_the_optimizer_is_an_error():
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    with pytest.raises(ValueError, match="`tx` must move .* build it without one"):
        critical(tx=lambda rate: optax.sgd(schedule), steps=0)


def test_a_function_of_the_rate_is_taken(plain):
    found = critical(tx=optax.sgd)
    for field in ("directional", "forward", "probe", "parameter"):
        assert getattr(found, field) == getattr(plain, field)


@pytest.mark.parametrize("rate", [1.0, 1e-3])
def test_an_optimizer_that_does_not_tell_its_rate_is_an_error(rate):
    with pytest.raises(ValueError, match="`tx` of `critical_learning_rate` must tell"):
        critical(tx=optax.adamw(rate))


@pytest.mark.parametrize(
    "tx", [lambda rate: optax.adamw(1e-3), lambda rate: optax.sgd(0.1, momentum=0.9)]
)
def test_a_function_that_ignores_the_rate_is_an_error(tx):
    with pytest.raises(ValueError, match="must be a function of the learning rate"):
        critical(tx=tx)


def test_a_function_of_the_rate_leaves_no_rate_to_tell():
    with pytest.raises(ValueError, match="`learning_rate` must be left out .* got 0.1"):
        critical(tx=optax.sgd, learning_rate=0.1)


INJECTED = optax.inject_hyperparams(optax.sgd)(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("told", [{}, {"learning_rate": 0.1}])
def test_a_rate_in_the_optimizers_state_is_read(told, plain):
    found = critical(tx=INJECTED, steps=0, **told)
    assert found.directional == pytest.approx(plain.directional, rel=1e-5)


def test_another_rate_than_the_one_in_the_optimizers_state_is_an_error():
    with pytest.raises(ValueError, match="built with, which is 0.1 by .* got 1. Leave"):
        critical(tx=INJECTED, learning_rate=1.0)
    parts = {0: INJECTED, 1: optax.inject_hyperparams(optax.sgd)(0.2)}
    params = {"first": jnp.ones(2), "second": jnp.ones(2)}
    several = optax.partition(parts, {"first": 0, "second": 1})
    with pytest.raises(ValueError, match="one learning rate > 0, got 0.1, 0.2 in"):
        critical(lambda p, b: quadratic(p["first"], b), params, tx=several)
    warm_up = optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.0, 1.0, 10))
    with pytest.raises(ValueError, match="> 0, got 0 in its state. A schedule with"):
        critical(tx=warm_up)


@pytest.mark.parametrize(
    "batch, more, got",
    [
        (DIAGONAL, jnp.stack([DIAGONAL] * 3), r"an array of shape \(3, 2\)"),
        (DIAGONAL, np.ones(2), r"an array of shape \(2,\)"),
        ((DIAGONAL, DIAGONAL), (DIAGONAL, DIAGONAL), r"\[\(2,\), \(2,\)\]"),
        ({"x": DIAGONAL}, {"x": DIAGONAL}, r"\[\(\)\]"),
        (DIAGONAL, None, "None"),
        (DIAGONAL, 3, "3"),
    ],
)
def test_one_batch_in_place_of_a_list_of_more_is_an_error(batch, more, got):
    with pytest.raises(ValueError, match=f"`more_batches` must be a list .* got {got}"):
        critical(batch=batch, more_batches=more)


@pytest.mark.slow
def test_batches_that_disagree_are_flagged_as_noise():
    batches = [(jnp.array([3.0, 4.0]), jnp.array(y)) for y in (1.0, -1.0)]
    found = critical(residual, (0.0, 0.0), batches[0], more_batches=iter(batches[1:]))
    assert found.cross_batch == 0.0 and found.flags == ("noise",)
    assert found.forward == pytest.approx(2 / 25, rel=SEARCHED)
    agree = critical(residual, (0.0, 0.0), batches[0], more_batches=batches[:1])
    assert agree.cross_batch == pytest.approx(agree.forward) and agree.flags == ()


def residual(params, batch):
    inputs, target = batch
    return 0.5 * (jnp.dot(inputs, params) - target) ** 2


@pytest.mark.slow
def test_any_pytree_and_bfloat16_work_and_stay_as_they_were(plain):
    params = {
        "half": jnp.ones(2, jnp.bfloat16),
        "integers": jnp.arange(3),
        "function": jnp.negative,
        "setting": 2,
        "none": None,
    }

    def loss_fn(params, batch):
        zero = params["function"](0.0) * params["integers"].sum()
        return quadratic(params["half"], batch) + zero * len(range(params["setting"]))

    found = critical(loss_fn, params, steps=0)
    assert found.directional == pytest.approx(plain.directional)
    assert params["half"].dtype == jnp.bfloat16 and (params["half"] == 1).all()


class Unhashable:
    __hash__ = None

    def __call__(self, params, batch):
        return quadratic(params, batch)


def test_a_loss_that_cannot_be_hashed_works(plain):
    assert critical(Unhashable(), steps=0).forward == plain.forward


@pytest.mark.slow
def test_flax_nnx_and_linen_models_give_the_closed_form():
    inputs = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    batch = jnp.asarray(inputs), jnp.ones((8, 1))
    linear = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.state(linear))
    of_nnx = critical(
        lambda m, b: jnp.mean((m(b[0]) - b[1]) ** 2), linear, batch, steps=0
    )
    dense = nn.Dense(1)
    params = {"params": {"kernel": linear.kernel[...], "bias": linear.bias[...]}}
    of_linen = critical(
        lambda p, b: jnp.mean((dense.apply(p, b[0]) - b[1]) ** 2),
        params,
        batch,
        steps=0,
    )
    design = np.hstack([inputs, np.ones((8, 1))]).astype(np.float64)
    weights = np.append(np.float64(linear.kernel[...])[:, 0], 0.0)
    gradient = 2 * design.T @ (design @ weights - 1) / 8
    bend = 2 * np.sum((design @ gradient) ** 2) / 8
    for found in (of_nnx, of_linen):
        assert found.directional == pytest.approx(
            2 * gradient @ gradient / bend, rel=1e-3
        )
    assert jax.tree.all(
        jax.tree.map(np.array_equal, before, jax.tree.map(np.array, nnx.state(linear)))
    )


@pytest.mark.slow
def test_nnx_batch_statistics_and_dropout_streams_stay_as_they_were():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
    batch = jnp.arange(12.0).reshape(4, 3)
    found = critical(lambda m, b: jnp.mean((m(b) - 1) ** 2), model, batch, steps=0)
    assert 0 < found.critical < math.inf
    assert (model.layers[0].mean[...] == 0).all()
    assert model.layers[1].rngs.count[...] == 0


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(learning_rate=0.0), "`learning_rate` must be finite and > 0, got 0.0"),
        (dict(tolerance=math.nan), "`tolerance` must be finite and > 0, got nan"),
        (dict(spike=-1.0), "`spike` must be finite and > 0"),
        (dict(best_loss=math.inf), "`best_loss` must be finite"),
        (dict(steps=-1), "`steps` must be an integer >= 0, got -1"),
        (dict(curvature="exact"), "`curvature` must be one of"),
        (dict(params={"i": jnp.arange(2)}), "`params` must have a floating-point leaf"),
        (dict(params=(jnp.nan, 1.0)), "`params` must give a finite loss and gradient"),
    ],
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        critical(**{"steps": 0, **settings})


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            dict(loss_fn=lambda p, b: (p.sum(), b)),
            "must return the loss alone, .* got tup",
        ),
        (dict(loss_fn=lambda p, b: p), r"a real scalar, got an array of shape \(2,\)"),
        (dict(loss_fn=3), "`loss_fn` must be a function of"),
        (dict(tx=3), "must be given an optax transformation"),
        (dict(params=(1j, 1.0)), "`params` must be real"),
    ],
)
def test_what_is_no_loss_is_named(settings, message):
    with pytest.raises(TypeError, match=message):
        critical(**{"steps": 0, **settings})


@pytest.mark.slow
def test_a_function_of_the_rate_is_called_anew_each_time():
    # A notebook may change what it refers to, such as b2, from one call to the next.
    built = []
    make = lambda rate: built.append(rate) or optax.adam(rate)
    loss = lambda params, batch: jnp.sum(batch * params**2)
    for _ in range(2):
        sg.critical_learning_rate(loss, jnp.ones(2), jnp.ones(2), make)
    assert built == [1.0, 2.0] * 2


@pytest.mark.slow
def test_a_loss_below_the_best_one_has_no_polyak_step():
    loss = lambda params, batch: jnp.sum(batch * params**2) - 100.0
    found = sg.critical_learning_rate(loss, jnp.ones(2), jnp.ones(2), optax.sgd)
    assert math.isnan(found.polyak) and "Polyak" not in str(found)
    told = sg.critical_learning_rate(
        loss, jnp.ones(2), jnp.ones(2), optax.sgd, best_loss=-100.0
    )
    assert told.polyak == pytest.approx(0.25, rel=1e-5)
