"""Mixed precision: float16 passes, float32 parameters, a dynamic loss scale.

command:   pip install -e . && python examples/recipes/mixed_precision.py
time:      ten seconds on two CPU cores, most of it compilation
expected:  loss below 0.02 after 400 steps, fewer than 10 of them skipped

The guard gets gradients of the loss itself, divided by the scale in float32, and
rejects those that overflowed float16. Its record of the step then halves the scale.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import stablegrad as sg

BAD_STEP = 60
DOUBLE_AFTER = 100  # Steps; 2,000 in a long run.
LARGEST = 2.0**24  # Where gradients vanish, the scale must not grow for ever.

tx = sg.stabilize(optax.adam(0.01))


class LossScale(NamedTuple):
    """What the loss is multiplied by before the backward pass."""

    factor: jax.Array  # float32, a power of two.
    good_steps: jax.Array  # int32: taken since the factor last changed.


def adjust(scale: LossScale, seen: dict[str, jax.Array]) -> LossScale:
    """Halves the scale at an overflow, doubles it after `DOUBLE_AFTER` good steps."""
    bad = jnp.array([sg.Reason.NONFINITE_GRADIENT, sg.Reason.GRADIENT_OVERFLOW])
    overflow = jnp.any(seen["skip_reason"] == bad)
    overflow &= jnp.isfinite(seen["loss_value"])  # Else it is the data's fault.
    good_steps = scale.good_steps + jnp.where(seen["skipped"], 0, 1)
    due = good_steps >= DOUBLE_AFTER
    change = jnp.where(overflow, 0.5, jnp.where(due, 2.0, 1.0))
    return LossScale(
        jnp.clip(scale.factor * change, 1.0, LARGEST),
        jnp.where(due | overflow, 0, good_steps),
    )


def loss_fn(params, x):
    """A float32 loss of a network that computes in float16."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
    hidden = jnp.tanh(x.astype(jnp.float16) @ half["in"])
    out = (hidden @ half["out"]).astype(jnp.float32)
    return jnp.mean((out - jnp.sin(x[:, :1])) ** 2)


@jax.jit
def train_step(params, state, scale, x):
    """One step: scale, differentiate, unscale, guard, adjust."""
    scaled = lambda params: scale.factor * loss_fn(params, x)
    loss, grads = jax.value_and_grad(scaled)(params)
    loss, grads = jax.tree.map(lambda leaf: leaf / scale.factor, (loss, grads))
    params, state = sg.apply(tx, grads, state, params, value=loss)
    return params, state, adjust(scale, sg.metrics(state)), loss


def main(steps: int = 400) -> tuple[float, optax.OptState, list[float]]:
    """Trains through overflows and a nan batch; gives loss, state, scales."""
    first = 0.5 * jax.random.normal(jax.random.key(0), (4, 32))
    params = {"in": first, "out": jnp.zeros((32, 1))}
    state = tx.init(params)
    scale, factors = LossScale(jnp.float32(2.0**22), jnp.int32(0)), []
    for step in range(steps):
        x = jax.random.normal(jax.random.key(step), (128, 4))
        x = x * jnp.nan if step == BAD_STEP else x
        params, state, scale, loss = train_step(params, state, scale, x)
        factors.append(float(scale.factor))
    sg.raise_if_halted(state)
    skipped = sg.metrics(state)["skipped_steps"]
    print(f"loss {loss:.4f}, {skipped} of {steps} skipped, scale {scale.factor:g}")
    print(*sg.events(state), sep="\n")
    return float(loss), state, factors


if __name__ == "__main__":
    main()
