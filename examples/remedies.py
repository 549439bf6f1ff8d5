"""The deep networks of `structure.py`, and what each remedy changes in them."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import stablegrad as sg
from stablegrad.structure.nnx import PreNormBlock, ScaledResidual

lecun = nnx.initializers.lecun_normal()
three_times_lecun = nnx.initializers.variance_scaling(9.0, "fan_in", "normal")
nesterov = partial(optax.sgd, momentum=0.9, nesterov=True)
leaky_relu = partial(nnx.leaky_relu, negative_slope=0.1)
# The patients: activation, initialiser of the kernels, and variance of these.
PATIENTS = {
    "vanishing": (nnx.sigmoid, lecun, 1.0),
    "exploding": (jnp.tanh, three_times_lecun, 9.0),
}


class Recipe(NamedTuple):
    """A network and its optimizer; None: what the patient has."""

    activation: Callable | None = None
    norm: str | None = None  # "batch" or "layer".
    dropout: float = 0.0
    initialised: bool = False  # Whether by the gain of the activation.
    residual: bool = False
    # rate -> optimizer
    optimizer: Callable[[float], optax.GradientTransformation] = optax.sgd
    rate: float = 0.05


REMEDIES = {
    "none": Recipe(),
    "ReLU": Recipe(activation=nnx.relu),
    "leaky ReLU": Recipe(activation=leaky_relu),
    "batch norm": Recipe(norm="batch"),
    "layer norm": Recipe(norm="layer"),
    "dropout 0.2": Recipe(dropout=0.2),
    "initialisation": Recipe(initialised=True),
    "residual": Recipe(residual=True),
    "residual, layer norm": Recipe(residual=True, norm="layer"),
    "NAG": Recipe(optimizer=nesterov),
    "Adam": Recipe(optimizer=optax.adam, rate=1e-3),
    "gradient clip": Recipe(
        optimizer=lambda rate: optax.chain(sg.clip_by_norm(1.0), optax.sgd(rate))
    ),
    "all of it": Recipe(nnx.relu, "layer", 0.0, True, True, optax.adam, 1e-3),
}
QUICK = ("none", "initialisation", "residual, layer norm", "gradient clip")


class Layer(nnx.Module):
    """A dense layer of a network: dropout(activation(norm(W x + b)))."""

    def __init__(self, width: int, recipe: Recipe, kernel_init, *, rngs: nnx.Rngs):
        """`recipe.activation` must be given."""
        self.dense = nnx.Linear(width, width, kernel_init=kernel_init, rngs=rngs)
        norms = {"batch": nnx.BatchNorm, "layer": nnx.LayerNorm}
        # A residual branch has its norm in front of it.
        own = recipe.norm and not recipe.residual
        self.norm = norms[recipe.norm](width, rngs=rngs) if own else None
        self.activation = recipe.activation
        self.dropout = nnx.Dropout(recipe.dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Shape (batch, width), and so the result."""
        x = self.dense(x)
        return self.dropout(self.activation(self.norm(x) if self.norm else x))


class Deep(nnx.Module):
    """A dense layer, `depth` - 1 hidden ones of equal width, and the logits.

    The hidden ones are stacked and scanned, which compiles as fast at any depth.
    """

    def __init__(self, sizes, recipe: Recipe, kernel_init, *, rngs: nnx.Rngs):
        """`sizes` are inputs, width, depth and classes."""
        inputs, width, depth, classes = sizes
        self.first = nnx.Linear(inputs, width, kernel_init=kernel_init, rngs=rngs)
        self.activation = recipe.activation

        @nnx.split_rngs(splits=depth - 1)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs: nnx.Rngs) -> nnx.Module:
            layer = Layer(width, recipe, kernel_init, rngs=rngs)
            if recipe.residual and recipe.norm:
                return PreNormBlock(layer, nnx.LayerNorm(width, rngs=rngs))
            return ScaledResidual(layer) if recipe.residual else layer

        self.hidden = stacked(rngs)
        self.head = nnx.Linear(width, classes, kernel_init=lecun, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, shape (batch, classes), of rows of shape (batch, inputs)."""
        scan = nnx.scan(
            lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        return self.head(scan(self.activation(self.first(x)), self.hidden))
