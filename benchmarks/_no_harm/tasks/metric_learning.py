"""Embeddings by comparison: triplets, most of them satisfied, and contrast."""

import jax
import jax.numpy as jnp
import optax

from ..networks import cross_entropy, digits, forward, mlp
from ..task import Start, Task, single, supervised

MARGIN, TEMPERATURE = 0.3, 0.1
CHECK = 1024


def begin_triplets(key) -> Start:
    """A network, and triplets to score on."""
    data_key, init_key, check_key = jax.random.split(key, 3)
    data = digits(data_key)
    data["check"] = triplets(data["test_x"], data["test_y"], check_key, CHECK)
    return Start({"model": mlp(init_key, (64, 48, 8))}, data)


def triplets(images, labels, key, size: int):
    """Anchors, others of the same digit, and others of another."""
    anchor_key, same_key, other_key = jax.random.split(key, 3)
    anchors = jax.random.randint(anchor_key, (size,), 0, labels.shape[0])
    same = labels[anchors][:, None] == labels[None]
    like = jax.random.categorical(same_key, jnp.where(same, 0.0, -1e9))
    unlike = jax.random.categorical(other_key, jnp.where(same, -1e9, 0.0))
    return images[anchors], images[like], images[unlike]


def embedded(params, x):
    """On the unit sphere."""
    out = forward(params, x)
    return out * jax.lax.rsqrt(jnp.sum(jnp.square(out), -1, keepdims=True) + 1e-6)


def hinge(params, batch):
    """What is missing in the squared distances to the margin; often nothing at all."""
    anchor, like, unlike = (embedded(params, x) for x in batch)
    near = jnp.sum(jnp.square(anchor - like), -1)
    far = jnp.sum(jnp.square(anchor - unlike), -1)
    return jnp.mean(jax.nn.relu(near - far + MARGIN))


def draw_triplets(data, key, t):
    """Eight triplets."""
    return triplets(data["x"], data["y"], key, 8)


def begin_views(key) -> Start:
    """A network, and two views of images to score on."""
    data_key, init_key, check_key = jax.random.split(key, 3)
    data = digits(data_key)
    data["check"] = views(data["test_x"][:128], check_key)
    return Start({"model": mlp(init_key, (64, 64, 16))}, data)


def views(x, key):
    """Twice the same images, with pixels missing and noise."""
    drop_key, noise_key = jax.random.split(key)
    shape = (2, *x.shape)
    kept = jax.random.bernoulli(drop_key, 0.7, shape)
    noisy = x[None] + 0.1 * jax.random.normal(noise_key, shape)
    return jnp.where(kept, noisy, 0.0)


def info_nce(params, pair):
    """To find each image's other view among all."""
    first, second = embedded(params, pair[0]), embedded(params, pair[1])
    likeness = first @ second.T / TEMPERATURE
    labels = jnp.arange(likeness.shape[0])
    return (cross_entropy(likeness, labels) + cross_entropy(likeness.T, labels)) / 2


def draw_views(data, key, t):
    """Two views of 64 images."""
    pick_key, view_key = jax.random.split(key)
    chosen = jax.random.randint(pick_key, (64,), 0, data["x"].shape[0])
    return views(data["x"][chosen], view_key)


def tasks() -> list[Task]:
    """This family."""
    triplet = Task(
        "triplet",
        "triplet loss",
        "test triplet loss",
        higher=False,
        goal=0.04,
        steps=2000,
        optimizers=single(lambda: optax.adam(1e-3)),
        begin=begin_triplets,
        step=supervised(draw_triplets, hinge),
        score=lambda world, data: hinge(world.params["model"], data["check"]),
    )
    contrastive = Task(
        "contrastive",
        "contrastive loss",
        "test InfoNCE",
        higher=False,
        goal=2.2,
        steps=1000,
        optimizers=single(lambda: optax.adam(2e-3)),
        begin=begin_views,
        step=supervised(draw_views, info_nce),
        score=lambda world, data: info_nce(world.params["model"], data["check"]),
    )
    return [triplet, contrastive]
