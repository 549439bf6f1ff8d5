"""Language models: from scratch, from a checkpoint, with adapters, sparse rows."""

import jax
import jax.numpy as jnp
import optax

from .. import language
from ..networks import normalized
from ..task import Start, Task, single, supervised

CHECK = 64  # Windows of text that was kept back.
RANK = 2
ADAPTED = ("qkv", "out", "up", "down")
ROWS, FACTORS = 2000, 8


def with_text(key, table):
    """Training text, and fixed windows to score on."""
    train_key, test_key, window_key = jax.random.split(key, 3)
    kept = language.text(test_key, table)
    return {
        "text": language.text(train_key, table),
        "check": language.windows(kept, window_key, CHECK),
    }


def begin(key) -> Start:
    """A chain, and an untrained network."""
    chain_key, text_key, init_key = jax.random.split(key, 3)
    data = with_text(text_key, language.chain(chain_key))
    return Start({"model": language.network(init_key)}, data)


def begin_tuning(key) -> Start:
    """A trained network; a third of its chain is replaced."""
    trained_key, chain_key, which_key, text_key = jax.random.split(key, 4)
    params, table = language.checkpoint(trained_key)
    replaced = jax.random.bernoulli(which_key, 0.33, (*table.shape[:2], 1))
    table = jnp.where(replaced, language.chain(chain_key), table)
    return Start({"model": params}, with_text(text_key, table))


def begin_lora(key) -> Start:
    """The same, with adapters that start as zero."""
    start = begin_tuning(key)
    base, adapters = start.params["model"], {}
    for i, name in enumerate(ADAPTED):
        inputs, outputs = base[name]["w"].shape
        down = jax.random.normal(jax.random.fold_in(key, i), (inputs, RANK))
        adapters[name] = {
            "down": down / inputs**0.5,
            "up": jnp.zeros((RANK, outputs)),
        }
    return start._replace(params={"model": {"base": base, "adapters": adapters}})


def adapted(params):
    """The network's weights with the adapters added."""
    base = dict(params["base"])
    for name, pair in params["adapters"].items():
        change = pair["down"] @ pair["up"]
        base[name] = {**base[name], "w": base[name]["w"] + change}
    return base


def lora_loss(params, batch):
    """Of the adapted network."""
    return language.loss(adapted(params), batch)


def lora_optimizer() -> optax.GradientTransformation:
    """Adam for the adapters; the base is frozen."""
    labels = {"base": "frozen", "adapters": "trained"}
    parts = {"frozen": optax.set_to_zero(), "trained": optax.adam(1e-2)}
    return optax.partition(parts, labels)


def score(world, data):
    """The loss on text that was kept back."""
    return language.loss(world.params["model"], data["check"])


def lora_score(world, data):
    """The same of the adapted network."""
    return lora_loss(world.params["model"], data["check"])


def cosine(steps: int, peak: float) -> optax.GradientTransformation:
    """AdamW, warmed up over a tenth, and down to zero along a cosine."""
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)
    return optax.adamw(rate, b2=0.95, weight_decay=0.1)


def begin_rows(key) -> Start:
    """Two tables of embeddings, and the true ones."""
    keys = jax.random.split(key, 5)
    shape = (2, ROWS, FACTORS)
    truth = jax.random.normal(keys[0], shape)
    data = {"truth": truth}
    data["check"] = draw_pairs(data, keys[1], 0, 2048)
    return Start({"model": 0.1 * jax.random.normal(keys[2], shape)}, data)


def draw_pairs(data, key, t, size: int = 64):
    """Pairs of rows, the r-th as often as 1 / r, and whether they go together."""
    row_key, label_key = jax.random.split(key)
    uniform = jax.random.uniform(row_key, (size, 2))
    rows = (jnp.exp(uniform * jnp.log(float(ROWS))) - 1).astype(jnp.int32)
    chance = jax.nn.sigmoid(2 * agreement(data["truth"], rows))
    return rows, jax.random.bernoulli(label_key, chance)


def agreement(tables, rows):
    """The product of the two rows of each pair."""
    return jnp.sum(tables[0][rows[:, 0]] * tables[1][rows[:, 1]], -1)


def row_loss(params, batch):
    """Logistic loss of a batch of pairs."""
    rows, labels = batch
    products = agreement(params, rows)
    return jnp.mean(jax.nn.softplus(products) - labels * products)


def row_score(world, data):
    """The logistic loss on pairs that were kept back."""
    return row_loss(world.params["model"], data["check"])


def scale_free(params, batch):
    """A network whose weights' lengths do not matter: they are normalised."""
    free = jax.tree.map(lambda w: normalized(w, 0) / w.shape[0] ** 0.5, params)
    kept = {name: params[name] for name in ("embedding", "position")}
    for name in ("qkv", "up", "out", "down", "head"):
        kept[name] = {"w": free[name]["w"], "b": params[name]["b"]}
    kept["head"] = params["head"]
    return language.loss(kept, batch)


def tasks() -> list[Task]:
    """This family."""
    text = Task(
        "language-model",
        "language model",
        "validation loss",
        higher=False,
        goal=1.9,
        steps=1000,
        optimizers=single(lambda: optax.adam(3e-3)),
        begin=begin,
        step=supervised(language.draw_text, language.loss),
        score=score,
    )
    to_the_end = text._replace(
        name="cosine-to-the-end",
        kind="warm-up and cosine to the end",
        optimizers=single(lambda: cosine(1000, 1e-2)),
    )
    free = to_the_end._replace(
        name="scale-free-weights",
        kind="gradient norms rise to the end",
        step=supervised(language.draw_text, scale_free),
        score=lambda world, data: scale_free(world.params["model"], data["check"]),
    )
    tuning = text._replace(
        name="fine-tuning",
        kind="fine-tuning from a checkpoint",
        goal=2.05,
        steps=400,
        optimizers=single(lambda: optax.adam(1e-3)),
        begin=begin_tuning,
    )
    lora = tuning._replace(
        name="lora",
        kind="LoRA, frozen leaves",
        goal=2.35,
        optimizers=single(lora_optimizer),
        begin=begin_lora,
        step=supervised(language.draw_text, lora_loss),
        score=lora_score,
    )
    rows = Task(
        "sparse-rows",
        "embeddings with sparse rows",
        "validation loss",
        higher=False,
        goal=0.5,
        steps=2000,
        optimizers=single(lambda: optax.adam(1e-2)),
        begin=begin_rows,
        step=supervised(draw_pairs, row_loss),
        score=row_score,
    )
    return [text, to_the_end, free, tuning, lora, rows]
