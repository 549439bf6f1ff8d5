"""Functions mapped over the shards of eight devices."""

import jax
from jax.sharding import AxisType

AXIS, DEVICES = "shard", 8


def mesh():
    return jax.make_mesh((DEVICES,), (AXIS,), axis_types=(AxisType.Auto,))


def mapped(function, in_specs, out_specs, check_vma=True):
    return jax.jit(
        jax.shard_map(
            function,
            mesh=mesh(),
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=check_vma,
        )
    )
