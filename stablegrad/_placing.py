"""Placing a fresh state where the parameters are, so that a step compiles once."""

import jax
from jax.core import Tracer
from jax.sharding import (
    AxisType,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)


def placed_like(tree, params):
    """Place arrays where the parameters are, replicated over the mesh of these.

    A step compiles twice for a state on one device beside parameters on a mesh, and for
    a state that is not committed to the device of committed parameters. Nothing is
    placed if the parameters are not arrays; under tracing, replicated arrays get a spec
    of full rank on explicit axes, and nothing else is placed.
    """
    axes = jax.sharding.get_abstract_mesh().axis_types
    explicit = AxisType.Explicit in axes and AxisType.Manual not in axes
    if explicit and any(isinstance(x, Tracer) for x in jax.tree.leaves(params)):
        return jax.tree.map(_of_full_rank, tree)
    arrays = [x for x in jax.tree.leaves(params) if _is_concrete(x)]
    meshes = [x.sharding.mesh for x in arrays if isinstance(x.sharding, NamedSharding)]
    if meshes:
        return jax.tree.map(lambda leaf: _on_mesh(leaf, meshes[0]), tree)
    devices = {x.sharding for x in arrays if x.committed}
    single = all(isinstance(device, SingleDeviceSharding) for device in devices)
    if len(devices) != 1 or not single:
        return tree
    (device,) = devices
    return jax.tree.map(lambda leaf: _committed(leaf, device), tree)


def replicated(tree):
    """Keep a step's arrays on every device of a mesh, if all its axes are automatic.

    The compiler would divide what it computes of parts. Nothing is done without
    `jax.set_mesh`.
    """
    axes = jax.sharding.get_abstract_mesh().axis_types
    if not axes or set(axes) != {AxisType.Auto}:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())


def _of_full_rank(leaf):
    """Give a replicated array the spec that it comes back with from a step."""
    if any(axis is not None for axis in jax.typeof(leaf).sharding.spec):
        return leaf
    return jax.sharding.reshard(leaf, PartitionSpec(*(None,) * leaf.ndim))


def _is_concrete(leaf) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)


def _on_mesh(leaf, mesh):
    if not _is_concrete(leaf):
        return leaf
    spec, wanted = (), PartitionSpec()
    if isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh:
        spec = wanted = leaf.sharding.spec
    # A compiled step returns replicated arrays with a spec of full rank if the mesh has
    # explicit axes, and the state must have the same.
    if AxisType.Explicit in mesh.axis_types:
        wanted = PartitionSpec(*spec, *(None,) * (leaf.ndim - len(spec)))
    return jax.device_put(leaf, NamedSharding(mesh, wanted))


def _committed(leaf, device: Sharding):
    free = _is_concrete(leaf) and not leaf.committed
    return jax.device_put(leaf, device) if free else leaf
