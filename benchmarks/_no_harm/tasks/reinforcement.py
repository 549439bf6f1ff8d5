"""Reinforcement learning: Q-learning with hard syncs, a rare reward, PPO.

The world is a grid of 5 by 5 with a goal in one corner. What a policy is worth is
solved for exactly, so scores have no noise but the training's own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..grid import ACTIONS, CELLS, DISCOUNT, GOAL, moved, worth
from ..networks import forward, mlp
from ..task import Start, Task, single

ACTORS, REPLAY, SYNC = 8, 2048, 100
HORIZON, EPOCHS = 16, 3
LOCK, SYMBOLS, TRIES = 3, 4, 4


class Replay(NamedTuple):
    """Transitions, where the actors are, and the target network."""

    cells: jax.Array
    actions: jax.Array
    after: jax.Array
    rewards: jax.Array
    actors: jax.Array
    target: list


def q_values(params, cells):
    """Of all actions in the given cells."""
    return forward(params, jax.nn.one_hot(cells, CELLS))


def begin_dqn(key) -> Start:
    """A replay filled by chance, and a target network of its own."""
    keys = jax.random.split(key, 5)
    cells = jax.random.randint(keys[0], (REPLAY,), 0, GOAL)
    actions = jax.random.randint(keys[1], (REPLAY,), 0, ACTIONS)
    after, rewards, _, _ = moved(keys[2], cells, actions)
    actors = jax.random.randint(keys[3], (ACTORS,), 0, GOAL)
    params = mlp(keys[4], (CELLS, 32, ACTIONS))
    memory = Replay(cells, actions, after, rewards, actors, params)
    return Start({"model": params}, None, memory)


def dqn_step(world, data, key, t, learn):
    """The actors move, a batch is learned, every hundredth step the target follows."""
    memory = world.memory
    explore_key, random_key, move_key, batch_key = jax.random.split(key, 4)
    greedy = jnp.argmax(q_values(world.params["model"], memory.actors), -1)
    explore = jax.random.bernoulli(explore_key, 0.2, (ACTORS,))
    chance = jax.random.randint(random_key, (ACTORS,), 0, ACTIONS)
    actions = jnp.where(explore, chance, greedy)
    after, rewards, _, actors = moved(move_key, memory.actors, actions)
    slots = (t * ACTORS + jnp.arange(ACTORS)) % REPLAY
    memory = memory._replace(
        cells=memory.cells.at[slots].set(memory.actors),
        actions=memory.actions.at[slots].set(actions),
        after=memory.after.at[slots].set(after),
        rewards=memory.rewards.at[slots].set(rewards),
        actors=actors,
    )
    chosen = jax.random.randint(batch_key, (32,), 0, REPLAY)
    ahead = jnp.max(q_values(memory.target, memory.after[chosen]), -1)
    won = memory.rewards[chosen]
    wanted = won + DISCOUNT * (1 - won) * ahead

    def loss(params):
        values = q_values(params, memory.cells[chosen])
        taken = jnp.take_along_axis(values, memory.actions[chosen][:, None], 1)[:, 0]
        return jnp.mean(jnp.square(taken - wanted))

    world = learn(world, loss)
    sync = t % SYNC == SYNC - 1
    target = jax.tree.map(
        lambda new, old: jnp.where(sync, new, old),
        world.params["model"],
        memory.target,
    )
    return world._replace(memory=memory._replace(target=target))


def dqn_score(world, data):
    """What the greedy policy is worth."""
    values = q_values(world.params["model"], jnp.arange(CELLS))
    return worth(jax.nn.one_hot(jnp.argmax(values, -1), ACTIONS))


def begin_lock(key) -> Start:
    """A lock of three symbols, of which one combination in 64 opens."""
    code = jax.random.randint(key, (LOCK,), 0, SYMBOLS)
    return Start({"model": jnp.zeros((LOCK, SYMBOLS))}, code)


def lock_step(world, data, key, t, learn):
    """REINFORCE with four tries; the gradient is zero unless one opens."""
    tried = jax.random.categorical(key, world.params["model"], shape=(TRIES, LOCK))
    won = jnp.all(tried == data[None], -1).astype(jnp.float32)

    def loss(params):
        logs = jax.nn.log_softmax(params)
        chosen = jnp.sum(logs[None] * jax.nn.one_hot(tried, SYMBOLS), (1, 2))
        return -jnp.mean(won * chosen)

    return learn(world, loss)


def lock_score(world, data):
    """The chance to open it."""
    chances = jax.nn.softmax(world.params["model"])
    return jnp.prod(jnp.take_along_axis(chances, data[:, None], 1))


def begin_ppo(key) -> Start:
    """A policy, a value function, and actors on the grid."""
    policy_key, value_key, cell_key = jax.random.split(key, 3)
    params = {
        "policy": mlp(policy_key, (CELLS, 32, ACTIONS), 0.5),
        "value": mlp(value_key, (CELLS, 32, 1)),
    }
    actors = jax.random.randint(cell_key, (ACTORS,), 0, GOAL)
    return Start({"model": params}, None, actors)


def ppo_step(world, data, key, t, learn):
    """A rollout, and three steps on it; advantages have mean zero."""
    params = world.params["model"]
    seen = lambda cells: jax.nn.one_hot(cells, CELLS)

    def act(cells, key):
        choice_key, move_key = jax.random.split(key)
        actions = jax.random.categorical(
            choice_key, forward(params["policy"], seen(cells))
        )
        after, rewards, done, following = moved(move_key, cells, actions)
        return following, (cells, actions, after, rewards, done)

    actors, rollout = jax.lax.scan(act, world.memory, jax.random.split(key, HORIZON))
    cells, actions, after, rewards, done = rollout
    value_of = lambda at: forward(params["value"], seen(at))[..., 0]
    values, ahead = value_of(cells), value_of(after)
    errors = rewards + DISCOUNT * jnp.where(done, 0.0, ahead) - values

    def back(advantage, xs):
        error, done = xs
        kept = jnp.where(done, 0.0, advantage)
        return (advantage := error + 0.9 * DISCOUNT * kept), advantage

    _, advantages = jax.lax.scan(back, jnp.zeros(ACTORS), (errors, done), reverse=True)
    returns = advantages + values
    spread = jnp.std(advantages) + 1e-3
    advantages = (advantages - jnp.mean(advantages)) / spread
    log_of = lambda p: jnp.take_along_axis(
        jax.nn.log_softmax(forward(p["policy"], seen(cells))), actions[..., None], -1
    )[..., 0]
    old = log_of(params)

    def loss(p):
        ratio = jnp.exp(log_of(p) - old)
        clipped = jnp.clip(ratio, 0.8, 1.2)
        gained = jnp.minimum(ratio * advantages, clipped * advantages)
        logs = jax.nn.log_softmax(forward(p["policy"], seen(cells)))
        entropy = -jnp.sum(jnp.exp(logs) * logs, -1)
        wrong = jnp.square(forward(p["value"], seen(cells))[..., 0] - returns)
        return jnp.mean(-gained + 0.5 * wrong - 0.003 * entropy)

    for _ in range(EPOCHS):
        world = learn(world, loss)
    return world._replace(memory=actors)


def ppo_score(world, data):
    """What the policy is worth."""
    logits = forward(world.params["model"]["policy"], jnp.eye(CELLS))
    return worth(jax.nn.softmax(logits))


def tasks() -> list[Task]:
    """This family."""
    dqn = Task(
        "dqn",
        "DQN with hard target syncs",
        "mean return of the greedy policy",
        higher=True,
        goal=0.7,
        steps=2000,
        optimizers=single(lambda: optax.adam(2e-3)),
        begin=begin_dqn,
        step=dqn_step,
        score=dqn_score,
        result=lambda scores: jnp.mean(scores[-10:]),
    )
    lock = Task(
        "rare-reward",
        "policy gradient with rare reward",
        "chance of the reward",
        higher=True,
        goal=0.9,
        steps=2000,
        optimizers=single(lambda: optax.adam(1e-2)),
        begin=begin_lock,
        step=lock_step,
        score=lock_score,
        looks=False,  # The loss is a stand-in: only its gradient means something.
    )
    ppo = Task(
        "ppo",
        "PPO, advantages around zero",
        "mean return of the policy",
        higher=True,
        goal=0.65,
        steps=400,
        optimizers=single(lambda: optax.adam(3e-3)),
        begin=begin_ppo,
        step=ppo_step,
        score=ppo_score,
        looks=False,
        updates=EPOCHS,
    )
    return [dqn, lock, ppo]
