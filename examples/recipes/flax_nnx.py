"""Flax NNX: `nnx.Optimizer`, `nnx.jit`, and layers stacked by `nnx.scan`.

command:   pip install -e ".[flax]" && python examples/recipes/flax_nnx.py
time:      a quarter of a minute on two CPU cores, most of it compilation
expected:  loss below 0.02 after 300 steps, 1 of them skipped
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import stablegrad as sg

WIDTH, LAYERS, BAD_STEP = 16, 4, 20


class Block(nnx.Module):
    """One residual layer."""

    def __init__(self, rngs):
        """Weights from `rngs`."""
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        """Keeps the shape of `x`."""
        return x + 0.5 * nnx.tanh(self.linear(x))


class Model(nnx.Module):
    """A stack of blocks: one `Block` whose weights have a leading axis of `LAYERS`."""

    def __init__(self, rngs):
        """Every layer gets weights of its own."""
        self.first = nnx.Linear(4, WIDTH, rngs=rngs)
        self.blocks = nnx.split_rngs(splits=LAYERS)(nnx.vmap(Block))(rngs)
        self.last = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x):
        """One number for each row of `x`, shape (batch, 4)."""
        forward = lambda x, block: block(x)
        scan = nnx.scan(forward, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.last(scan(self.first(x), self.blocks))


@nnx.jit
def train_step(model, optimizer, x):
    """One step; `value=` lets the guard see the loss."""
    loss_fn = lambda model: jnp.mean((model(x) - jnp.sin(x[:, :1])) ** 2)
    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads, value=loss)
    return loss


def main(steps: int = 300) -> tuple[float, nnx.Optimizer]:
    """Trains through one nan batch; returns the last loss and the optimizer."""
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, sg.stabilize(optax.adam(0.01)), wrt=nnx.Param)
    for step in range(steps):
        x = jax.random.normal(jax.random.key(step), (128, 4))
        loss = train_step(model, optimizer, x * jnp.nan if step == BAD_STEP else x)
    sg.raise_if_halted(optimizer)
    skipped = sg.metrics(optimizer)["skipped_steps"]
    print(f"loss {loss:.4f}, {skipped} of {steps} steps skipped")
    print(*sg.events(optimizer), sep="\n")
    return float(loss), optimizer


if __name__ == "__main__":
    main()
