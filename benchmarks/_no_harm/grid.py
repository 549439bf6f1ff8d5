"""A grid of 5 by 5 with a goal in one corner, and what a policy is worth there."""

import jax
import jax.numpy as jnp
import numpy as np

SIDE, GOAL, DISCOUNT = 5, 24, 0.95
CELLS, ACTIONS = SIDE * SIDE, 4
SLIP = 0.1  # Chance of another action than the chosen one.


def _moves() -> np.ndarray:
    """Where each action leads from each cell."""
    to = np.zeros((CELLS, ACTIONS), np.int32)
    for cell in range(CELLS):
        row, column = divmod(cell, SIDE)
        for action, (down, right) in enumerate([(1, 0), (-1, 0), (0, 1), (0, -1)]):
            at = (
                np.clip(row + down, 0, SIDE - 1),
                np.clip(column + right, 0, SIDE - 1),
            )
            to[cell, action] = at[0] * SIDE + at[1]
    return to


MOVES = _moves()


def worth(chances):
    """The mean discounted return over all starts, given each cell's chances."""
    chances = (1 - SLIP) * chances + SLIP / ACTIONS
    to = jax.nn.one_hot(MOVES, CELLS)
    passage = jnp.einsum("ca,cad->cd", chances, to)
    reward = passage[:, GOAL]
    # Nothing comes after the goal.
    on = DISCOUNT * passage * (jnp.arange(CELLS) != GOAL)[None]
    values = jnp.linalg.solve(jnp.eye(CELLS) - on, reward)
    return jnp.sum(values[:GOAL]) / GOAL


def moved(key, cells, actions):
    """The next cells, rewards, and whether the goal was reached; then anew."""
    slip_key, other_key, begin_key = jax.random.split(key, 3)
    slipped = jax.random.bernoulli(slip_key, SLIP, cells.shape)
    other = jax.random.randint(other_key, cells.shape, 0, ACTIONS)
    after = jnp.asarray(MOVES)[cells, jnp.where(slipped, other, actions)]
    done = after == GOAL
    anew = jax.random.randint(begin_key, cells.shape, 0, GOAL)
    return after, done.astype(jnp.float32), done, jnp.where(done, anew, after)
