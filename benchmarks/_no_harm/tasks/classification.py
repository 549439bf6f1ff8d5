"""Classification and regression: clean, noisy, by two examples or by all at once."""

import jax
import jax.numpy as jnp
import optax

from ..networks import accuracy, cross_entropy, digits, draw_digits, forward, mlp
from ..task import Start, Task, single, supervised

SIZES = (64, 64, 10)
DEEP = (64, 64, 64, 64, 10)
PARITY_INPUTS = 16
RARE_SHARE, RARE_WEIGHT = 0.02, 25.0


def begin(key) -> Start:
    """A network with one hidden layer."""
    data_key, init_key = jax.random.split(key)
    return Start({"model": mlp(init_key, SIZES)}, digits(data_key))


def begin_noisy(key) -> Start:
    """The same; three labels in ten of the training data are drawn at random."""
    start = begin(key)
    which, what = jax.random.split(jax.random.fold_in(key, 1))
    labels = start.data["y"]
    noisy = jax.random.bernoulli(which, 0.3, labels.shape)
    drawn = jax.random.randint(what, labels.shape, 0, 10)
    return start._replace(data={**start.data, "y": jnp.where(noisy, drawn, labels)})


def loss(params, batch):
    """Cross-entropy of a batch."""
    x, y = batch
    return cross_entropy(forward(params, x), y)


def test_accuracy(world, data):
    """Of the digits that were kept back."""
    return accuracy(forward(world.params["model"], data["test_x"]), data["test_y"])


def log_training_loss(world, data):
    """Decimal logarithm of the loss on all training data."""
    return jnp.log10(loss(world.params["model"], (data["x"], data["y"])))


def everything(data, key, t):
    """The whole training data."""
    return data["x"], data["y"]


def draw_imbalanced(data, key, t):
    """Eight digits; zeros are one in fifty."""
    rare_key, pick_key = jax.random.split(key)
    rare = jax.random.bernoulli(rare_key, RARE_SHARE, (8, 1))
    weights = jnp.where(rare, data["y"][None] == 0, data["y"][None] != 0)
    chosen = jax.random.categorical(pick_key, jnp.log(weights.astype(jnp.float32)))
    return data["x"][chosen], data["y"][chosen]


def weighted_loss(params, batch):
    """The rare class counts as often as it is rare."""
    x, y = batch
    losses = optax.softmax_cross_entropy_with_integer_labels(forward(params, x), y)
    return jnp.mean(jnp.where(y == 0, RARE_WEIGHT, 1.0) * losses)


def balanced_accuracy(world, data):
    """The mean of the accuracies on zeros and on the other digits."""
    right = jnp.argmax(forward(world.params["model"], data["test_x"]), -1)
    right = (right == data["test_y"]).astype(jnp.float32)
    zeros = data["test_y"] == 0
    return (jnp.mean(right, where=zeros) + jnp.mean(right, where=~zeros)) / 2


def begin_heavy(key) -> Start:
    """A linear model of 20 inputs."""
    truth = jax.random.normal(key, (20,))
    return Start({"model": {"w": jnp.zeros(20)}}, {"truth": truth})


def draw_heavy(data, key, t):
    """Inputs and noise of Student's distribution with three degrees of freedom."""
    x_key, noise_key = jax.random.split(key)
    x = jax.random.t(x_key, 3.0, (32, 20))
    return x, x @ data["truth"] + jax.random.t(noise_key, 3.0, (32,))


def absolute_error(params, batch):
    """The mean absolute error, as befits such noise."""
    x, y = batch
    return jnp.mean(jnp.abs(x @ params["w"] - y))


def log_distance(world, data):
    """Decimal logarithm of the distance from the truth."""
    return jnp.log10(jnp.linalg.norm(world.params["model"]["w"] - data["truth"]))


def begin_sigmoid(key) -> Start:
    """Three hidden layers of sigmoids: at first the loss rests at that of a guess."""
    data_key, init_key = jax.random.split(key)
    return Start({"model": mlp(init_key, DEEP, gain=1.0)}, digits(data_key))


def sigmoid_loss(params, batch):
    """Cross-entropy of a batch."""
    x, y = batch
    return cross_entropy(forward(params, x, jax.nn.sigmoid), y)


def log_sigmoid_loss(world, data):
    """Decimal logarithm of the loss on all training data."""
    full = data["x"], data["y"]
    return jnp.log10(sigmoid_loss(world.params["model"], full))


def begin_parity(key) -> Start:
    """A network with one hidden layer; the task has no data of its own."""
    return Start({"model": mlp(key, (PARITY_INPUTS, 64, 1), gain=1.0)})


def draw_parity(data, key, t):
    """Signs, and the product of the first three: nothing is learned from two."""
    x = jax.random.rademacher(key, (32, PARITY_INPUTS), jnp.float32)
    return x, jnp.prod(x[:, :3], -1)


def parity_loss(params, batch):
    """Logistic loss of a batch."""
    x, y = batch
    return jnp.mean(jax.nn.softplus(-y * forward(params, x)[:, 0]))


def parity_accuracy(world, data):
    """On 1,024 fresh inputs."""
    keys = jax.random.split(jax.random.key(7), 32)
    x, y = jax.vmap(lambda key: draw_parity(None, key, 0))(keys)
    right = forward(world.params["model"], x)[..., 0] * y > 0
    return jnp.mean(right.astype(jnp.float32))


def tasks() -> list[Task]:
    """This family."""

    def digit_task(name, kind, goal, steps, inner, draw, begin=begin):
        return Task(
            name,
            kind,
            "test accuracy",
            higher=True,
            goal=goal,
            steps=steps,
            optimizers=single(inner),
            begin=begin,
            step=supervised(draw, loss),
            score=test_accuracy,
        )

    adam = lambda: optax.adam(1e-3)
    clean = digit_task(
        "digits", "classification", 0.95, 1000, adam, draw_digits(64), begin
    )
    noisy = digit_task(
        "digits-noisy-labels", "label noise", 0.9, 1000, adam, draw_digits(64),
        begin_noisy,
    )  # fmt: skip
    tiny = digit_task(
        "digits-batch-2", "tiny batches", 0.93, 2000,
        lambda: optax.sgd(0.01, momentum=0.9), draw_digits(2),
    )  # fmt: skip
    whole = digit_task(
        "digits-whole", "large batches", -2.5, 500, lambda: optax.adam(1e-2), everything
    )._replace(
        metric="log10 training loss", higher=False, score=log_training_loss
    )  # fmt: skip
    edge = whole._replace(
        name="edge-of-stability",
        kind="edge of stability",
        goal=-1.8,
        # At 2.0 the loss no longer falls.
        optimizers=single(lambda: optax.sgd(1.4)),
    )
    rare = digit_task(
        "rare-class", "rare class of large weight", 0.95, 1500, adam, draw_imbalanced
    )._replace(
        metric="balanced test accuracy",
        step=supervised(draw_imbalanced, weighted_loss),
        score=balanced_accuracy,
    )
    heavy = Task(
        "heavy-tails",
        "heavy-tailed data",
        "log10 distance from the truth",
        higher=False,
        goal=-0.5,
        steps=1000,
        optimizers=single(lambda: optax.sgd(optax.linear_schedule(0.1, 0.0, 1000))),
        begin=begin_heavy,
        step=supervised(draw_heavy, absolute_error),
        score=log_distance,
    )
    sigmoid = whole._replace(
        name="sigmoid-plateau",
        kind="plateau at the start",
        goal=-1.5,
        steps=6000,
        optimizers=single(lambda: optax.sgd(0.3)),
        begin=begin_sigmoid,
        step=supervised(draw_digits(32), sigmoid_loss),
        score=log_sigmoid_loss,
    )
    parity = Task(
        "parity-plateau",
        "plateau at the start",
        "accuracy on fresh inputs",
        higher=True,
        goal=0.98,
        steps=6000,
        optimizers=single(lambda: optax.sgd(0.1)),
        begin=begin_parity,
        step=supervised(draw_parity, parity_loss),
        score=parity_accuracy,
    )
    return [clean, noisy, tiny, whole, edge, rare, heavy, sigmoid, parity]
