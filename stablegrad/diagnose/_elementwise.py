"""Activation functions, found as chains of elementwise operations on one array."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..structure._expectations import normal_nodes
from ._known import GRID, named
from ._program import Op, Program, Value

# Those that move, cast or label elements without changing what they are.
PASSING = (
    "reshape",
    "transpose",
    "convert_element_type",
    "squeeze",
    "expand_dims",
    "copy",
    "name",
    "broadcast_in_dim",
    "sharding_constraint",
    "reduce_precision",
    "optimization_barrier",
)
_ELEMENTWISE = frozenset(
    [
        "abs",
        "add",
        "and",
        "atan2",
        "ceil",
        "clamp",
        "convert_element_type",
        "cos",
        "copy",
        "div",
        "eq",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "integer_pow",
        "is_finite",
        "le",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "not",
        "or",
        "pow",
        "rsqrt",
        "select_n",
        "sign",
        "sin",
        "sqrt",
        "square",
        "sub",
        "tanh",
        "custom_jvp_call",
        "stop_gradient",
    ]
)
_FROM_LITERALS = frozenset(
    [
        "broadcast_in_dim",
        "convert_element_type",
        "neg",
        "mul",
        "add",
        "sub",
        "div",
        "exp",
        "sqrt",
        "copy",
    ]
)
STEEPEST = 50.0  # Largest slope of an activation.


@dataclasses.dataclass(eq=False)
class Activation:
    """A function of one number, applied to every element of `root`."""

    root: Value
    out: Value
    ops: list[Op]
    name: str = "?"
    slope: float = 1.0  # The largest |f'| on [-8, 8].
    bounded: bool = False  # Whether both of its ends are flat.
    call: Any = None  # numpy points -> (f, f')

    def on(self, array: jax.Array) -> jax.Array:
        """Apply it to an array shaped as `root`."""
        env = {self.root: array}

        def read(value: Value):
            return value.literal if value.literal is not None else env[value]

        for op in self.ops:
            env.update(zip(op.outs, op.run(read), strict=True))
        return env[self.out]

    def signature(self) -> str:
        """Equal for two applications of the same function to arrays of one shape."""
        numbers = {self.root: 0}
        parts = [str(self.root.aval)]
        for op in self.ops:
            names = [
                f"{value.literal}"
                if value.literal is not None
                else f"v{numbers[value]}"
                for value in op.ins
            ]
            for out in op.outs:
                numbers[out] = len(numbers)
            parts.append(f"{op.name}({','.join(names)}){op.eqn.params.get('name', '')}")
            parts += [str(op.eqn.params.get(key, "")) for key in ("y", "call_jaxpr")]
        return ";".join(parts)


def find(program: Program, root: Value) -> Activation | None:
    """Return the activation that is applied to `root` and to nothing else, if any."""
    if not (root.users and root.aval.size):
        return None
    if not jnp.issubdtype(root.aval.dtype, jnp.floating):
        return None
    inside, ops, fixed = {root}, [], {}
    first = program.ops.index(root.users[0])
    reached = set(root.users)
    for op in program.ops[first:]:
        if op not in reached or op.name not in _ELEMENTWISE or len(op.outs) != 1:
            continue
        if op.outs[0].aval.shape != root.aval.shape or not op.outs[0].is_data:
            continue
        sources = [_literals(value) for value in op.ins if value not in inside]
        if any(source is None for source in sources):
            continue
        for source in sources:
            fixed.update(dict.fromkeys(source or ()))
        inside.add(op.outs[0])
        ops.append(op)
        reached.update(op.outs[0].users)
    made = set(ops)
    exits = [
        value
        for value in inside
        if any(user not in made for user in value.users) or value in program.outs
    ]
    if not ops or len(exits) != 1 or exits[0] is root:
        return None
    needed = [op for op in ops if exits[0].comes_from(op.outs[0])]
    kinds = {op.name for op in needed}
    if kinds <= {"add", "mul", "sub", "div", "neg", "convert_element_type", "copy"}:
        return None
    return Activation(root, exits[0], [*fixed, *needed])


def _literals(value: Value) -> list[Op] | None:
    """Return the operations that make a value out of literals, or None."""
    if value.literal is not None:
        return []
    if value.maker is None or value.maker.name not in _FROM_LITERALS:
        return None
    before = [_literals(source) for source in value.maker.ins]
    if any(one is None for one in before):
        return None
    return [op for one in before for op in one or ()] + [value.maker]


def describe(activation: Activation, known: dict[str, Activation]) -> bool:
    """Fill in name, slope and bounds; return whether it is an activation at all."""
    key = activation.signature()
    if key not in known:
        _measure(activation)
        known[key] = activation
    twin = known[key]
    activation.name, activation.slope = twin.name, twin.slope
    activation.bounded, activation.call = twin.bounded, twin.call
    return activation.name != ""


def _measure(activation: Activation) -> None:
    aval = activation.root.aval
    size = int(np.prod(aval.shape))

    @jax.jit
    def both(array):
        array = array.astype(aval.dtype)
        f, slope = jax.jvp(activation.on, (array,), (jnp.ones_like(array),))
        return f.astype(jnp.float32), slope.astype(jnp.float32)

    def call(points):
        points = np.asarray(points, np.float32).ravel()
        pieces = []
        for start in range(0, len(points), size):
            piece = points[start : start + size]
            filled = np.resize(piece, aval.shape)
            pieces.append([np.ravel(x)[: len(piece)] for x in both(filled)])
        return tuple(np.concatenate(one) for one in zip(*pieces, strict=True))

    activation.call = call
    f, slope = call(GRID)
    finite = np.isfinite(f).all() and np.isfinite(slope).all()
    # Slopes of hundreds are the exponential of a softmax, not an activation's.
    if not finite or np.ptp(slope) < 1e-3 or np.abs(slope).max() > STEEPEST:
        activation.name = ""
        return
    activation.slope = float(np.abs(slope).max())
    ends = np.abs(slope[[0, -1]])
    activation.bounded = bool((ends < 0.01 * activation.slope).all())
    activation.name = named(f, aval.dtype) or f"{activation.ops[-1].name}(...)"


def is_saturated(slope, steepest: float):
    """Whether the slope is below 6 % of the steepest one, as where |tanh| > 0.97."""
    return abs(slope) < 0.06 * steepest


def saturated_usually(activation: Activation) -> float:
    """The saturated share of normal inputs of mean 0 and RMS 1, by quadrature."""
    nodes, weights = normal_nodes()
    _, slope = activation.call(nodes)
    return float(weights @ is_saturated(slope, activation.slope))


def moments(activation: Activation | None, mean: float, deviation: float):
    """Return E[f^2] and E[f'^2] for normal inputs, by quadrature."""
    if activation is None:
        return mean**2 + deviation**2, 1.0
    nodes, weights = normal_nodes()
    f, slope = activation.call(mean + deviation * nodes)
    f, slope = f.astype(float), slope.astype(float)
    return float(weights @ f**2), float(weights @ slope**2)
