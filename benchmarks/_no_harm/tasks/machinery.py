"""Schedules, optimizers and machinery: SGDR, Muon, accumulation, float16, experts.

Muon orthogonalises its input, so a factor on all of the gradient changes nothing of
its update: a clip of the global norm in front of it is inert. What a guard does there
is to refuse steps and to scale the rate; "touched" counts shrunk gradients as
elsewhere.
"""

import jax
import jax.numpy as jnp
import optax

from ..networks import accuracy, cross_entropy, digits, draw_digits, forward, mlp
from ..task import Start, Task, single, supervised
from .classification import begin, loss, test_accuracy

CYCLE, ACCUMULATED = 250, 4
LOSS_SCALE = 1024.0
EXPERTS, WIDTH = 4, 16


def restarts() -> optax.GradientTransformation:
    """Momentum, from the full rate to nothing four times."""
    cycle = {
        "init_value": 0.2,
        "peak_value": 0.2,
        "warmup_steps": 0,
        "decay_steps": CYCLE,
    }
    return optax.sgd(optax.sgdr_schedule([cycle] * 4), momentum=0.9)


def accumulation_inside(wrap):
    """The guard sees every micro-batch."""
    several = optax.MultiSteps(optax.adam(3e-3), ACCUMULATED)
    return {"model": wrap(several.gradient_transformation())}


def accumulation_outside(wrap):
    """The guard sees the mean of four micro-batches."""
    several = optax.MultiSteps(wrap(optax.adam(3e-3)), ACCUMULATED)
    # Its own `gradient_transformation()` does not pass `value=` on.
    passing = optax.GradientTransformationExtraArgs(several.init, several.update)
    return {"model": passing}


def half_loss(params, batch):
    """The network in float16; only the loss itself is float32."""
    x, y = batch
    half = jax.tree.map(lambda p: p.astype(jnp.float16), params)
    return cross_entropy(forward(half, x.astype(jnp.float16)).astype(jnp.float32), y)


def half_step(world, data, key, t, learn):
    """The loss is scaled before the gradient is taken, and the gradient back."""
    batch = draw_digits(64)(data, key, t)
    return learn(world, lambda params: half_loss(params, batch), scale=LOSS_SCALE)


def begin_experts(key) -> Start:
    """Four experts behind a gate."""
    data_key, gate_key, expert_key = jax.random.split(key, 3)
    keys = jax.random.split(expert_key, EXPERTS)
    params = {
        "gate": mlp(gate_key, (64, EXPERTS), 1.0),
        "experts": jax.vmap(lambda k: mlp(k, (64, WIDTH, 10)))(keys),
    }
    return Start({"model": params}, digits(data_key))


def routed(params, x):
    """What the chosen expert says, times its chance; and the load's imbalance."""
    chances = jax.nn.softmax(forward(params["gate"], x))
    chosen = jax.nn.one_hot(jnp.argmax(chances, -1), EXPERTS)
    said = jax.vmap(lambda expert: forward(expert, x))(params["experts"])
    logits = jnp.einsum("ne,ne,eno->no", chosen, chances, said)
    imbalance = EXPERTS * jnp.sum(jnp.mean(chosen, 0) * jnp.mean(chances, 0))
    return logits, imbalance


def expert_loss(params, batch):
    """Cross-entropy and a hundredth of the imbalance."""
    x, y = batch
    logits, imbalance = routed(params, x)
    return cross_entropy(logits, y) + 0.01 * imbalance


def expert_score(world, data):
    """Test accuracy."""
    return accuracy(routed(world.params["model"], data["test_x"])[0], data["test_y"])


def tasks() -> list[Task]:
    """This family."""
    usual = Task(
        "sgdr",
        "SGDR restarts",
        "test accuracy",
        higher=True,
        goal=0.95,
        steps=4 * CYCLE,
        optimizers=single(restarts),
        begin=begin,
        step=supervised(draw_digits(32), loss),
        score=test_accuracy,
    )
    inside = usual._replace(
        name="accumulation-inside",
        kind="gradient accumulation",
        steps=2000,
        optimizers=accumulation_inside,
        step=supervised(draw_digits(16), loss),
        looks=False,  # Most steps change nothing.
    )
    outside = inside._replace(
        name="accumulation-outside", optimizers=accumulation_outside
    )
    half = usual._replace(
        name="float16",
        kind="float16 with loss scaling",
        optimizers=single(lambda: optax.adam(1e-3)),
        step=half_step,
    )
    muon = usual._replace(
        name="muon",
        kind="Muon",
        optimizers=single(lambda: optax.contrib.muon(0.01)),
    )
    experts = usual._replace(
        name="experts",
        kind="mixture of experts",
        goal=0.93,
        optimizers=single(lambda: optax.adam(3e-3)),
        begin=begin_experts,
        step=supervised(draw_digits(64), expert_loss),
        score=expert_score,
    )
    return [usual, inside, outside, half, muon, experts]
