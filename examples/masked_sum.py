"""A sum of which nobody sees a summand: a demonstration, and no security product.

After Bonawitz et al. (2017), https://eprint.iacr.org/2017/281, without its keys: every
two clients share random words, which one of them adds to its message and the other
subtracts. Each message is uniformly distributed, and in the sum the words cancel. Here
all of it runs in one process, from one seed that the server could read as well; who is
absent is known before anyone masks; and a client that lies is not found out.
"""

import jax
import jax.numpy as jnp

BITS = 24  # Of the fraction; 127 summands in [-1, 1] fit into 32 bits.


def encode(numbers):
    """Numbers in [-1, 1] as whole ones modulo 2**32."""
    whole = jnp.round(numbers * 2.0**BITS).astype(jnp.int32)
    return jax.lax.bitcast_convert_type(whole, jnp.uint32)


def decode(words):
    """The numbers of a sum of encoded ones."""
    whole = jax.lax.bitcast_convert_type(words, jnp.int32)
    return whole.astype(jnp.float32) * 2.0**-BITS


def masked(tree, client, present, key):
    """One client's message: its encoded numbers, and a mask for each other client.

    Args:
        tree: float32 arrays in [-1, 1].
        client: Its number, int32 ().
        present: Who takes part, bool (clients,). An absent one gets no mask.
        key: The random key of this round.
    """

    def mask(words, other):
        pair = jnp.minimum(client, other) * present.size + jnp.maximum(client, other)
        keys = jax.random.split(jax.random.fold_in(key, pair), len(words))
        takes = present[other] & present[client] & (other != client)

        def add(leaf, key):
            shared = jax.random.bits(key, leaf.shape, jnp.uint32)
            signed = jnp.where(client < other, shared, -shared)
            return leaf + jnp.where(takes, signed, jnp.uint32(0))

        return [add(*pair) for pair in zip(words, keys, strict=True)], None

    leaves, structure = jax.tree.flatten(jax.tree.map(encode, tree))
    leaves, _ = jax.lax.scan(mask, leaves, jnp.arange(present.size))
    return structure.unflatten(leaves)
