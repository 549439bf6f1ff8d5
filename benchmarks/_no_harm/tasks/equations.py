"""Long sequences, and equations: a recurrent network, and a PINN."""

import jax
import jax.numpy as jnp
import optax

from ..networks import affine, dense, forward, mlp
from ..task import Start, Task, single, supervised

LENGTH, HIDDEN = 60, 24


def begin_adding(key) -> Start:
    """A gated recurrent network; sequences to score on."""
    gate_key, new_key, out_key, check_key = jax.random.split(key, 4)
    params = {
        "gates": dense(gate_key, 2 + HIDDEN, 2 * HIDDEN, 1.0),
        "new": dense(new_key, 2 + HIDDEN, HIDDEN, 1.0),
        "out": dense(out_key, HIDDEN, 1, 1.0),
    }
    return Start({"model": params}, sequences(check_key, 256))


def sequences(key, size: int):
    """Numbers, two of them marked; what is wanted is the sum of those."""
    number_key, first_key, second_key = jax.random.split(key, 3)
    numbers = jax.random.uniform(number_key, (size, LENGTH))
    half = LENGTH // 2
    first = jax.random.randint(first_key, (size,), 0, half)
    second = jax.random.randint(second_key, (size,), half, LENGTH)
    marks = jax.nn.one_hot(first, LENGTH) + jax.nn.one_hot(second, LENGTH)
    return jnp.stack([numbers, marks], -1), jnp.sum(numbers * marks, -1)


def adding_loss(params, batch):
    """Mean squared error of the sum; 0.17 if always 1 is said."""
    x, wanted = batch

    def step(h, x):
        both = jnp.concatenate([x, h], -1)
        keep, use = jnp.split(jax.nn.sigmoid(affine(params["gates"], both) + 1), 2, -1)
        both = jnp.concatenate([x, use * h], -1)
        h = keep * h + (1 - keep) * jnp.tanh(affine(params["new"], both))
        return h, None

    h, _ = jax.lax.scan(step, jnp.zeros((x.shape[0], HIDDEN)), jnp.swapaxes(x, 0, 1))
    said = affine(params["out"], h)[:, 0]
    return jnp.mean(jnp.square(said - wanted))


def log_adding_error(world, data):
    """Decimal logarithm of the error on the fixed sequences."""
    return jnp.log10(adding_loss(world.params["model"], data))


def begin_pinn(key) -> Start:
    """A tanh network of one input, and points to score on."""
    return Start({"model": mlp(key, (1, 24, 24, 1), 1.0)}, jnp.linspace(0.0, 1.0, 101))


def solution(x):
    """The exact one."""
    return jnp.sin(2 * jnp.pi * x) + 0.5 * jnp.sin(4 * jnp.pi * x)


def source(x):
    """Its second derivative, with the sign reversed."""
    slow = jnp.sin(2 * jnp.pi * x) + 2 * jnp.sin(4 * jnp.pi * x)
    return (2 * jnp.pi) ** 2 * slow


def pinn_loss(params, x):
    """Poisson's equation inside, zero at both ends with a weight of 100."""
    u = lambda at: forward(params, at[None], jnp.tanh)[0]
    curvature = jax.vmap(jax.grad(jax.grad(u)))(x)
    ends = jnp.square(u(jnp.zeros(()))) + jnp.square(u(jnp.ones(())))
    return jnp.mean(jnp.square(curvature + source(x))) + 100 * ends


def log_pinn_error(world, data):
    """Decimal logarithm of the relative error of the solution."""
    found = jax.vmap(lambda at: forward(world.params["model"], at[None], jnp.tanh)[0])
    wrong = jnp.linalg.norm(found(data) - solution(data))
    return jnp.log10(wrong / jnp.linalg.norm(solution(data)))


def tasks() -> list[Task]:
    """This family."""
    adding = Task(
        "long-sequences",
        "RNN on long sequences",
        "log10 squared error",
        higher=False,
        goal=-2.0,
        steps=1000,
        optimizers=single(lambda: optax.adam(1e-2)),
        begin=begin_adding,
        step=supervised(lambda data, key, t: sequences(key, 32), adding_loss),
        score=log_adding_error,
    )
    pinn = Task(
        "pinn",
        "physics-informed network",
        "log10 relative error",
        higher=False,
        goal=-1.5,
        steps=3000,
        optimizers=single(
            lambda: optax.adam(optax.exponential_decay(5e-3, 3000, 0.02))
        ),
        begin=begin_pinn,
        step=supervised(lambda data, key, t: jax.random.uniform(key, (64,)), pinn_loss),
        score=log_pinn_error,
    )
    return [adding, pinn]
