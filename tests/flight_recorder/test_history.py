"""Tests for `record_norms=`, `history` and its figure."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stablegrad as sg

STEPS, KEPT = 25, 10
PARAMS = {"a": jnp.zeros(3), "b": {"c": jnp.zeros((2, 2))}}
RULES = (sg.clip(sg.fixed(4.0)), sg.skip(sg.nonfinite(), sg.zscore(6.0, of="value")))


def gradients(steps=STEPS):
    """Normal numbers of a growing size, with a nan and an inf among the last steps."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=(steps, *shape)).astype(np.float32)
    grads = {"a": draw(3), "b": {"c": draw(2, 2)}}
    if steps > 20:
        grads["a"][20, 1], grads["b"]["c"][22, 0, 0] = np.nan, np.inf
    return grads


@functools.cache
def guarded(kept):
    tx = sg.guard(optax.sgd(0.1), *RULES, record_norms=kept)
    return tx.init, jax.jit(lambda g, s, v: tx.update(g, s, PARAMS, value=v)[1])


def train(kept, steps=STEPS):
    init, update = guarded(kept)
    state, grads, seen = init(PARAMS), gradients(steps), []
    for t in range(steps):
        now = jax.tree.map(lambda x, t=t: x[t], grads)
        state = update(now, state, jnp.float32(t))
        seen.append(sg.metrics(state))
    return state, grads, seen


@pytest.mark.slow
def test_a_history_holds_the_last_steps_oldest_first():
    state, grads, seen = train(KEPT)
    found = sg.history(state)
    np.testing.assert_array_equal(found.steps, np.arange(STEPS - KEPT, STEPS))
    assert found.leaves == ("a", "b.c")
    squares = [np.sum(grads["a"].astype(np.float64) ** 2, 1)]
    squares += [np.sum(grads["b"]["c"].astype(np.float64) ** 2, (1, 2))]
    expected = np.sqrt(np.stack(squares, 1))[-KEPT:]
    np.testing.assert_allclose(found.leaf_norms, expected, rtol=1e-6)
    last = seen[-KEPT:]
    for name in ("loss_value", "grad_norm", "clipped_grad_norm", "lr_scale"):
        column = [row[name] for row in last]
        np.testing.assert_array_equal(getattr(found, name), column, err_msg=name)
    assert set(found.limits) == {name for name in last[0] if name.endswith("_limit")}
    for name, limit in found.limits.items():
        np.testing.assert_array_equal(limit, [row[name] for row in last])
    assert [event.step for event in found.events] == [20, 22]


@pytest.mark.slow
def test_the_state_stays_finite_and_the_update_the_same():
    state, _, seen = train(KEPT)
    plain, _, plainly = train(0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert plain.history == ()
    for one, other in zip(seen, plainly, strict=True):
        np.testing.assert_equal(one, other)


@pytest.mark.slow
def test_a_short_run_has_a_short_history():
    state, _, _ = train(KEPT, steps=3)
    assert sg.history(state).steps.tolist() == [0, 1, 2]
    assert sg.history(state).leaf_norms.shape == (3, 2)


def test_a_state_without_a_history_says_how_to_get_one():
    state = sg.guard(optax.sgd(0.1)).init(PARAMS)
    with pytest.raises(ValueError, match="record_norms=100"):
        sg.history(state)
    with pytest.raises(ValueError, match="`record_norms` must be an integer >= 0"):
        sg.guard(optax.sgd(0.1), record_norms=-1)


@pytest.mark.slow
def test_an_ensemble_has_a_history_for_each_member():
    tx = sg.guard(optax.sgd(0.1), *RULES, record_norms=4)
    params = {"w": jnp.zeros((3, 2))}
    state = jax.jit(jax.vmap(tx.init))(params)
    grads = {"w": jnp.arange(6.0).reshape(3, 2)}
    step = jax.jit(jax.vmap(lambda g, s, p: tx.update(g, s, p, value=1.0)))
    _, state = step(grads, state, params)
    with pytest.raises(ValueError, match="stacked over an ensemble"):
        sg.history(state)
    one = sg.history(jax.tree.map(lambda x: x[2], state))
    np.testing.assert_allclose(one.leaf_norms, [[41**0.5]], rtol=1e-6)


@pytest.mark.slow
def test_the_figure_draws_names_as_they_are():
    params = {"a$x_{$": jnp.ones(2)}
    tx = sg.guard(optax.sgd(0.1), sg.skip(), record_norms=4)
    _, state = tx.update(params, tx.init(params), params)
    figure = sg.history(state).figure()
    figure.canvas.draw()  # Raises where Matplotlib takes a name for mathematics.
    assert figure.axes[0].get_yticklabels()[0].get_text() == r"a\$x_{\$"


@pytest.mark.slow
def test_the_figure_shows_norms_losses_limits_and_events():
    found = sg.history(train(KEPT)[0])
    figure = found.figure()
    heat, loss, norm, rate = figure.axes[:4]
    (image,) = heat.get_images()
    shown = np.ma.filled(image.get_array(), np.nan)
    assert shown.shape == (2, KEPT)
    np.testing.assert_array_equal(~np.isfinite(shown), ~np.isfinite(found.leaf_norms.T))
    middle = np.log10(found.leaf_norms[1, 0] / np.nanmedian(found.leaf_norms[:, 0]))
    np.testing.assert_allclose(shown[0, 1], middle, rtol=1e-5)
    assert [text.get_text() for text in heat.get_yticklabels()] == ["a", "b.c"]
    assert [text.get_text() for text in heat.get_legend().get_texts()] == ["skip"]
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), found.loss_value)
    labels = [line.get_label() for line in norm.lines]
    assert labels == ["gradient norm", "clip_fixed_grad_norm_limit"]
    assert len(rate.patches) == 2  # Both events.
