"""The first operation of a program that gives a nan or an infinity."""

import jax
import jax.numpy as jnp

from ._program import Op, Program, Value

# A mask is infinite on purpose.
_MASKS = ("select_n", "broadcast_in_dim", "reduce_max", "max", "sub", "add", "mul")


def first_bad(program: Program, arguments) -> Op | Value | None:
    """Return the first operation whose inputs are finite and whose result is not.

    If such a result comes from an input or a constant that is not finite, return that.
    Minus infinity counts where a logarithm or a division makes it.
    """

    @jax.jit
    def flags(arguments):
        env = dict(zip(program.ins, arguments, strict=True))
        env.update(program.constants)
        given = [_any_bad(env[value], "") for value in (*program.ins, *constants)]
        read = lambda v: v.literal if v.literal is not None else env[v]
        found = []
        for op in program.ops:
            outs = op.run(read)
            env.update(zip(op.outs, outs, strict=True))
            bad = [_any_bad(out, op.name) for out in outs]
            found.append(jnp.any(jnp.stack(bad)))
        return given, found

    constants = [value for value, _ in program.constants]
    given, made = jax.device_get(flags(arguments))
    bad_ins = zip((*program.ins, *constants), given, strict=True)
    bad: set[Value] = {value for value, flag in bad_ins if flag}
    for op, flag in zip(program.ops, made, strict=True):
        before = [value for value in op.ins if value in bad]
        if flag and program.outs[0].comes_from(op.outs[0]):
            if not before:
                return op
            if before[0].maker is None:
                return before[0]
        if flag:
            bad.update(op.outs)
    return None


def _any_bad(array, made_by: str) -> jax.Array:
    if not jnp.issubdtype(jnp.result_type(array), jnp.inexact):
        return jnp.zeros((), bool)
    found = jnp.any(jnp.isnan(array)) | jnp.any(jnp.isposinf(array))
    if not made_by or made_by in _MASKS:
        return found
    return found | jnp.any(jnp.isneginf(array))
