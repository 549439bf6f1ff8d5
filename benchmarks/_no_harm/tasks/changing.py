"""Runs whose loss rises for good reason: tasks, stages, terms and kinds of batch."""

import jax
import jax.numpy as jnp
import optax

from ..networks import cross_entropy, digits, draw_digits, forward, mlp
from ..task import EVALUATIONS, Start, Task, single, supervised

STAGES, STAGE = 4, 500
TERM_AT, TERM_WEIGHT = 500, 20.0
EVERY, LARGE = 16, 50.0


def teachers(key, number: int, gain: float = 4.0):
    """Random networks to be imitated, stacked."""
    keys = jax.random.split(key, number)
    return jax.vmap(lambda k: mlp(k, (8, 16, 1), gain))(keys)


def tanh_network(params, x):
    """The student's and the teachers' form."""
    return forward(params, x, jnp.tanh)


def squares(params, batch):
    """Mean squared error."""
    x, y = batch
    return jnp.mean(jnp.square(tanh_network(params, x) - y))


def begin_successive(key) -> Start:
    """A student, and four teachers who follow each other."""
    teacher_key, init_key, x_key = jax.random.split(key, 3)
    data = {
        "teachers": teachers(teacher_key, STAGES),
        "x": jax.random.normal(x_key, (512, 8)),
    }
    count = jnp.zeros((), jnp.int32)
    return Start({"model": mlp(init_key, (8, 48, 1), 1.0)}, data, count)


def one_of(stacked, index):
    """One network of several."""
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def successive_step(world, data, key, t, learn):
    """A batch from the teacher of the stage."""
    teacher = one_of(data["teachers"], t // STAGE)
    x = jax.random.normal(key, (32, 8))
    batch = x, tanh_network(teacher, x)
    world = learn(world, lambda params: squares(params, batch))
    return world._replace(memory=t)


def successive_score(world, data):
    """Decimal logarithm of the error against the teacher of the stage."""
    x = data["x"]
    teacher = one_of(data["teachers"], world.memory // STAGE)
    wrong = squares(world.params["model"], (x, tanh_network(teacher, x)))
    return jnp.log10(wrong)


def ends_of_stages(scores):
    """The mean over the stages' last evaluations."""
    return jnp.mean(scores[EVALUATIONS // STAGES - 1 :: EVALUATIONS // STAGES])


def curve(x):
    """What the curriculum teaches: steeper the further out."""
    return x * jnp.sin(3 * x)


def begin_curriculum(key) -> Start:
    """A network of one input."""
    x = jnp.linspace(-3.0, 3.0, 256)[:, None]
    return Start({"model": mlp(key, (1, 48, 48, 1), 2.0)}, (x, curve(x)))


def draw_stage(data, key, t):
    """Inputs from a range that widens in four stages."""
    reach = 3.0 * (1 + t // STAGE) / STAGES
    x = jax.random.uniform(key, (64, 1), minval=-reach, maxval=reach)
    return x, curve(x)


def whole_curve(world, data):
    """Decimal logarithm of the error over the whole range."""
    return jnp.log10(squares(world.params["model"], data))


def begin_term(key) -> Start:
    """A classifier of digits that can be asked to draw what it saw."""
    data_key, encoder_key, label_key, image_key = jax.random.split(key, 4)
    params = {
        "encoder": mlp(encoder_key, (64, 48, 32)),
        "label": mlp(label_key, (32, 10), 1.0),
        "image": mlp(image_key, (32, 64), 1.0),
    }
    return Start({"model": params}, digits(data_key))


def term_loss(params, x, y, weight):
    """Cross-entropy, and a weight times the error of the image."""
    code = jax.nn.relu(forward(params["encoder"], x))
    labels = cross_entropy(forward(params["label"], code), y)
    return labels + weight * jnp.mean(jnp.square(forward(params["image"], code) - x))


def draw_term(data, key, t):
    """Digits, and the weight of the second term."""
    weight = jnp.where(t < TERM_AT, 0.0, TERM_WEIGHT)
    return *draw_digits(64)(data, key, t), weight


def term_score(world, data):
    """Both terms on digits that were kept back."""
    model = world.params["model"]
    return term_loss(model, data["test_x"], data["test_y"], TERM_WEIGHT)


def begin_alternating(key) -> Start:
    """A student with two outputs, and two teachers."""
    teacher_key, init_key, x_key = jax.random.split(key, 3)
    data = {
        "teachers": teachers(teacher_key, 2, 1.0),
        "x": jax.random.normal(x_key, (512, 8)),
    }
    return Start({"model": mlp(init_key, (8, 48, 2), 1.0)}, data)


def alternating_errors(params, data, x):
    """The two outputs' mean squared errors."""
    truth = [tanh_network(one_of(data["teachers"], i), x)[:, 0] for i in (0, 1)]
    wrong = tanh_network(params, x) - jnp.stack(truth, -1)
    return jnp.mean(jnp.square(wrong), 0)


def alternating_step(world, data, key, t, learn):
    """Every 16th batch is of the second output, and weighs 50 times as much."""
    x = jax.random.normal(key, (32, 8))
    weights = jnp.where(t % EVERY == EVERY - 1, jnp.array([0.0, LARGE]), jnp.eye(2)[0])
    return learn(
        world, lambda params: jnp.sum(weights * alternating_errors(params, data, x))
    )


def alternating_score(world, data):
    """The mean of both root mean squared errors."""
    errors = alternating_errors(world.params["model"], data, data["x"])
    return jnp.mean(jnp.sqrt(errors))


def tasks() -> list[Task]:
    """This family."""
    successive = Task(
        "successive-tasks",
        "successive tasks",
        "log10 squared error at the ends of four tasks",
        higher=False,
        goal=-1.2,
        steps=STAGES * STAGE,
        optimizers=single(lambda: optax.adam(1e-2)),
        begin=begin_successive,
        step=successive_step,
        score=successive_score,
        result=ends_of_stages,
    )
    curriculum = Task(
        "curriculum",
        "curriculum",
        "log10 squared error over the whole range",
        higher=False,
        goal=-1.2,
        steps=STAGES * STAGE,
        optimizers=single(lambda: optax.adam(3e-3)),
        begin=begin_curriculum,
        step=supervised(draw_stage, squares),
        score=whole_curve,
    )
    term = Task(
        "term-switched-on",
        "a loss term switched on",
        "test loss with both terms",
        higher=False,
        goal=2.0,
        steps=1000,
        optimizers=single(lambda: optax.adam(1e-3)),
        begin=begin_term,
        step=supervised(draw_term, lambda p, batch: term_loss(p, *batch)),
        score=term_score,
    )
    alternating = Task(
        "every-16th-x50",
        "multi-task alternation",
        "mean root mean squared error of both tasks",
        higher=False,
        goal=0.2,
        steps=2000,
        optimizers=single(lambda: optax.adam(3e-3)),
        begin=begin_alternating,
        step=alternating_step,
        score=alternating_score,
    )
    return [successive, curriculum, term, alternating]
