"""Generative models: a GAN with lazy R1, a VAE, a flow, a diffusion model."""

import jax
import jax.numpy as jnp
import optax

from ..networks import digits, draw_digits, forward, mlp
from ..task import Start, Task, single, supervised

LAZY, R1 = 16, 1.0
AVERAGED = 0.01  # Weight of a step in the averaged generator.
CODE = 8
COUPLINGS = 4


def ring(key, size: int):
    """Points of eight small clouds on a circle."""
    which_key, noise_key = jax.random.split(key)
    angle = jax.random.randint(which_key, (size,), 0, 8) * (jnp.pi / 4)
    centre = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    return centre + 0.1 * jax.random.normal(noise_key, (size, 2))


def moons(key, size: int):
    """Points of two half-circles that reach into each other, a third in size."""
    half_key, angle_key, noise_key = jax.random.split(key, 3)
    angle = jnp.pi * jax.random.uniform(angle_key, (size,))
    upper = jax.random.bernoulli(half_key, 0.5, (size, 1))
    x = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    x = jnp.where(upper, x, jnp.array([[1.0, 0.5]]) - x)
    return (x + 0.05 * jax.random.normal(noise_key, (size, 2))) / 3


def begin_gan(key) -> Start:
    """Two networks, and the average of one; points and noise to score on."""
    keys = jax.random.split(key, 4)
    params = {
        "generator": mlp(keys[0], (4, 48, 48, 2)),
        "critic": mlp(keys[1], (2, 48, 48, 1)),
    }
    check = ring(keys[2], 512), jax.random.normal(keys[3], (512, 4))
    return Start(params, check, params["generator"])


def gan_step(world, data, key, t, learn):
    """One step of each; on every 16th one more of the critic, for R1 alone."""
    real_key, noise_key, other_key = jax.random.split(key, 3)
    real = ring(real_key, 64)
    noise, other = (jax.random.normal(k, (64, 4)) for k in (noise_key, other_key))
    fake = forward(world.params["generator"], noise)

    def critic_loss(p):
        on_fake = jnp.mean(jax.nn.softplus(forward(p, fake)))
        return on_fake + jnp.mean(jax.nn.softplus(-forward(p, real)))

    def penalty(p):
        slopes = jax.grad(lambda x: jnp.sum(forward(p, x)))(real)
        return LAZY * R1 / 2 * jnp.mean(jnp.sum(jnp.square(slopes), -1))

    world = learn(world, critic_loss, "critic")
    world = jax.lax.cond(
        t % LAZY == 0, lambda w: learn(w, penalty, "critic"), lambda w: w, world
    )
    critic = world.params["critic"]

    def generator_loss(p):
        return jnp.mean(jax.nn.softplus(-forward(critic, forward(p, other))))

    world = learn(world, generator_loss, "generator")
    return world._replace(
        memory=optax.incremental_update(
            world.params["generator"], world.memory, AVERAGED
        )
    )


def distances(a, b):
    """The mean distance between points of two sets."""
    apart = jnp.sum(jnp.square(a[:, None] - b[None]), -1)
    return jnp.mean(jnp.sqrt(apart + 1e-12))


def log_energy_distance(world, data):
    """Decimal logarithm of the energy distance of the averaged generator's points."""
    real, noise = data
    fake = forward(world.memory, noise)
    apart = 2 * distances(real, fake) - distances(real, real) - distances(fake, fake)
    return jnp.log10(jnp.maximum(apart, 1e-4))


def gan_optimizers(wrap):
    """As in the literature: little momentum."""
    adam = lambda: wrap(optax.adam(1e-3, b1=0.5, b2=0.99))
    return {"generator": adam(), "critic": adam()}


def begin_vae(key) -> Start:
    """Encoder, decoder, and one spread for each pixel."""
    data_key, encoder_key, decoder_key = jax.random.split(key, 3)
    params = {
        "encoder": mlp(encoder_key, (64, 64, 2 * CODE), 1.0),
        "decoder": mlp(decoder_key, (CODE, 64, 64), 1.0),
        "log_spread": jnp.zeros(64),
    }
    return Start({"model": params}, digits(data_key))


def negative_elbo(params, x, key):
    """In nats an image; pixels are no integers: noise of their width is added."""
    width_key, code_key = jax.random.split(key)
    x = x * 16 / 17 + jax.random.uniform(width_key, x.shape) / 17
    mean, log_spread = jnp.split(forward(params["encoder"], x), 2, -1)
    log_spread = jnp.clip(log_spread, -6.0, 3.0)
    noise = jax.random.normal(code_key, mean.shape)
    drawn = forward(params["decoder"], mean + jnp.exp(log_spread) * noise)
    off = (x - drawn) * jnp.exp(-params["log_spread"])[None]
    log2pi = jnp.log(2 * jnp.pi)
    image = 0.5 * (jnp.square(off) + log2pi) + params["log_spread"][None]
    squares = jnp.exp(2 * log_spread) + jnp.square(mean)
    divergence = 0.5 * squares - 0.5 - log_spread
    return jnp.mean(jnp.sum(image, -1) + jnp.sum(divergence, -1))


def draw_vae(data, key, t):
    """Images, and the key of the noise."""
    image_key, noise_key = jax.random.split(key)
    return draw_digits(64)(data, image_key, t)[0], noise_key


def vae_score(world, data):
    """On images that were kept back, always with the same noise."""
    return negative_elbo(world.params["model"], data["test_x"], jax.random.key(0))


def begin_flow(key) -> Start:
    """Affine couplings, the identity at first but for the last layers' chance."""
    check_key, *keys = jax.random.split(key, COUPLINGS + 1)
    layers = [mlp(k, (1, 32, 2), 1.0) for k in keys]
    return Start({"model": layers}, moons(check_key, 1024))


def negative_log_density(params, x):
    """In nats a point; negative where points lie densely."""
    log_volume = jnp.zeros(x.shape[0])
    for i, layer in enumerate(params):
        kept, changed = x[:, i % 2], x[:, 1 - i % 2]
        out = forward(layer, kept[:, None], jnp.tanh)
        stretch = 2 * jnp.tanh(out[:, 0])
        changed = changed * jnp.exp(stretch) + out[:, 1]
        log_volume = log_volume + stretch
        pair = (kept, changed) if i % 2 == 0 else (changed, kept)
        x = jnp.stack(pair, -1)
    return jnp.mean(0.5 * jnp.sum(jnp.square(x), -1) + jnp.log(2 * jnp.pi) - log_volume)


def flow_score(world, data):
    """On points that were kept back."""
    return negative_log_density(world.params["model"], data)


def noisy(x, key):
    """Points at random times of the diffusion, with what was added."""
    time_key, noise_key = jax.random.split(key)
    time = jax.random.uniform(time_key, (x.shape[0], 1), minval=0.01)
    noise = jax.random.normal(noise_key, x.shape)
    angle = time * (jnp.pi / 2)
    return jnp.cos(angle) * x + jnp.sin(angle) * noise, time, noise


def begin_diffusion(key) -> Start:
    """A network of a point and its time; noisy points to score on."""
    init_key, point_key, noise_key = jax.random.split(key, 3)
    check = noisy(ring(point_key, 2048), noise_key)
    return Start({"model": mlp(init_key, (6, 64, 64, 2))}, check)


def draw_diffusion(data, key, t):
    """Points and noise of one step."""
    point_key, noise_key = jax.random.split(key)
    return noisy(ring(point_key, 64), noise_key)


def denoising(params, batch):
    """The error of the noise, weighted as if the point itself was asked for."""
    x, time, noise = batch
    waves = jnp.concatenate([jnp.sin(3 * time), jnp.cos(3 * time)], -1)
    found = forward(params, jnp.concatenate([x, time, time**2, waves], -1), jax.nn.silu)
    weights = jnp.minimum(1 / jnp.tan(time[:, 0] * (jnp.pi / 2)), 20.0)
    return jnp.mean(weights * jnp.sum(jnp.square(found - noise), -1))


def diffusion_score(world, data):
    """The same on points that were kept back."""
    return denoising(world.params["model"], data)


def tasks() -> list[Task]:
    """This family."""
    gan = Task(
        "gan-lazy-r1",
        "GAN with lazy regularisation",
        "log10 energy distance",
        higher=False,
        goal=-1.3,
        steps=2000,
        optimizers=gan_optimizers,
        begin=begin_gan,
        step=gan_step,
        score=log_energy_distance,
        result=lambda scores: jnp.mean(scores[-8:]),
        looks=False,  # What one network gains the other loses.
    )
    vae = Task(
        "vae",
        "VAE, loss falls below zero",
        "negative ELBO on test images",
        higher=False,
        goal=0.0,
        steps=1000,
        optimizers=single(lambda: optax.adam(2e-3)),
        begin=begin_vae,
        step=supervised(draw_vae, lambda p, batch: negative_elbo(p, *batch)),
        score=vae_score,
    )
    flow = Task(
        "flow",
        "normalizing flow",
        "negative log-density of test points",
        higher=False,
        goal=0.0,
        steps=1500,
        optimizers=single(lambda: optax.adam(3e-3)),
        begin=begin_flow,
        step=supervised(lambda data, key, t: moons(key, 128), negative_log_density),
        score=flow_score,
    )
    diffusion = Task(
        "diffusion",
        "diffusion model",
        "denoising loss on test points",
        higher=False,
        goal=3.4,
        steps=1500,
        optimizers=single(lambda: optax.adam(2e-3)),
        begin=begin_diffusion,
        step=supervised(draw_diffusion, denoising),
        score=diffusion_score,
    )
    return [gan, vae, flow, diffusion]
