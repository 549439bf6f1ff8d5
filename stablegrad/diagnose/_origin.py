"""The first operation of a program that gives a nan or an infinity."""

import jax
import jax.numpy as jnp

from ._program import Op, Program

# A mask is infinite on purpose.
_MASKS = ("select_n", "broadcast_in_dim", "reduce_max", "max", "sub", "add", "mul")


def first_bad(program: Program, arguments) -> Op | None:
    """Return the first operation whose inputs are finite and whose result is not.

    Minus infinity counts where a logarithm or a division makes it.
    """

    @jax.jit
    def flags(arguments):
        env = dict(zip(program.ins, arguments, strict=True))
        env.update(program.constants)
        read = lambda v: v.literal if v.literal is not None else env[v]
        found = []
        for op in program.ops:
            outs = op.run(read)
            env.update(zip(op.outs, outs, strict=True))
            found.append(_any_bad(op, outs))
        return jnp.stack(found)

    bad = [bool(flag) for flag in flags(arguments)]
    of = dict(zip(program.ops, bad, strict=True))
    for op in program.ops:
        clean = not any(of.get(value.maker) for value in op.ins if value.maker)
        if of[op] and clean and program.outs[0].comes_from(op.outs[0]):
            return op
    return None


def _any_bad(op: Op, outs) -> jax.Array:
    found = jnp.zeros((), bool)
    for out in outs:
        if not jnp.issubdtype(out.dtype, jnp.inexact):
            continue
        minus = jnp.zeros((), bool) if op.name in _MASKS else jnp.any(jnp.isneginf(out))
        found |= jnp.any(jnp.isnan(out)) | jnp.any(jnp.isposinf(out)) | minus
    return found
