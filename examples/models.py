"""The networks of the examples, in Flax NNX: an MLP, a ResNet, a transformer."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

he_normal = nnx.initializers.he_normal()


class MLP(nnx.Module):
    """Dense layers of the given widths; the last one gives the logits.

        hidden:  x <- dropout(activation(norm(W x + b)))  [+ x, where residual]

    The names of its leaves are `layers.0.kernel`, `layers.0.bias`, and so on.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        activation: Callable = nnx.relu,
        kernel_init: Callable = he_normal,
        norm: str | None = None,
        dropout: float = 0.0,
        residual: bool = False,
        rngs: nnx.Rngs,
    ):
        """Args: widths from inputs to classes; norm is None, "batch" or "layer"."""
        self.activation, self.residual = activation, residual
        self.layers = nnx.List(
            [
                nnx.Linear(n_in, n_out, kernel_init=kernel_init, rngs=rngs)
                for n_in, n_out in itertools.pairwise(widths)
            ]
        )
        norms = {"batch": nnx.BatchNorm, "layer": nnx.LayerNorm}
        self.norms = nnx.List(
            [norms[norm](width, rngs=rngs) for width in widths[1:-1]] if norm else []
        )
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None

    def hidden(self, x: jax.Array) -> list[jax.Array]:
        """What every hidden layer hands on, shapes (batch, width)."""
        outputs = []
        for i, layer in enumerate(self.layers[:-1]):
            before, x = x, layer(x)
            if self.norms:
                x = self.norms[i](x)
            x = self.activation(x)
            if self.dropout:
                x = self.dropout(x)
            if self.residual and x.shape == before.shape:
                x = x + before
            outputs.append(x)
        return outputs

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, shape (batch, classes), of rows of shape (batch, inputs)."""
        return self.layers[-1]([x, *self.hidden(x)][-1])


class Block(nnx.Module):
    """Two 3x3 convolutions with batch normalisation, beside the identity."""

    def __init__(self, n_in: int, n_out: int, stride: int, *, rngs: nnx.Rngs):
        """The identity is a 1x1 convolution where the shape changes."""
        conv = lambda a, b, size, step: nnx.Conv(
            a, b, (size, size), step, use_bias=False, kernel_init=he_normal, rngs=rngs
        )
        self.conv1, self.norm1 = conv(n_in, n_out, 3, stride), _norm(n_out, rngs)
        self.conv2, self.norm2 = conv(n_out, n_out, 3, 1), _norm(n_out, rngs)
        changes = stride != 1 or n_in != n_out
        self.shortcut = conv(n_in, n_out, 1, stride) if changes else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images of shape (batch, height, width, channels), and so the result."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + (self.shortcut(x) if self.shortcut else x))


def _norm(width: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(width, momentum=0.9, rngs=rngs)


class ResNet(nnx.Module):
    """ResNet of He et al. (2015) for small images: 6 `blocks` + 2 layers.

    A stem, three stages of 1, 2 and 4 times `width` channels, a mean over the image,
    then Dense layers of `hidden` units, with whatever `limit` makes of their inputs.
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        classes: int = 10,
        blocks: int = 1,
        width: int = 16,
        hidden: Sequence[int] = (64,),
        limit: Callable[[jax.Array], jax.Array] | None = None,
        rngs: nnx.Rngs,
    ):
        """`blocks` is the number in each stage; 1 is ResNet-8, 3 is ResNet-20."""
        self.limit = limit
        self.stem = nnx.Conv(
            channels,
            width,
            (3, 3),
            use_bias=False,
            kernel_init=he_normal,
            rngs=rngs,
        )
        self.norm = _norm(width, rngs)
        stages, n_in = [], width
        for stage in range(3):
            for block in range(blocks):
                n_out, stride = width * 2**stage, 2 if stage and not block else 1
                stages.append(Block(n_in, n_out, stride, rngs=rngs))
                n_in = n_out
        self.blocks = nnx.List(stages)
        self.head = MLP((n_in, *hidden, classes), rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits, shape (batch, classes), of (batch, height, width, channels)."""
        x = nnx.relu(self.norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        x = jnp.mean(x, axis=(1, 2))
        return self.head(self.limit(x) if self.limit else x)


class Layer(nnx.Module):
    """Causal self-attention and a GELU MLP, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int, *, dtype=None, rngs: nnx.Rngs):
        """`heads` must divide `width`; `dtype` is the one that it computes in."""
        given = {"dtype": dtype, "rngs": rngs}
        self.norm1 = nnx.LayerNorm(width, **given)
        self.attention = nnx.MultiHeadAttention(
            heads, width, decode=False, use_bias=False, **given
        )
        self.norm2 = nnx.LayerNorm(width, **given)
        self.up = nnx.Linear(width, 4 * width, **given)
        self.down = nnx.Linear(4 * width, width, **given)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Shape (batch, length, width), and so the result."""
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """A character transformer: pre-norm, learned positions, no dropout."""

    def __init__(
        self,
        characters: int,
        *,
        layers: int = 2,
        width: int = 64,
        heads: int = 4,
        context: int = 64,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        """`context` is the longest text, in characters; it computes in `dtype`."""
        given = {"dtype": dtype, "rngs": rngs}
        self.characters = nnx.Embed(characters, width, **given)
        self.positions = nnx.Embed(context, width, **given)
        self.layers = nnx.List([Layer(width, heads, **given) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, **given)
        self.head = nnx.Linear(width, characters, use_bias=False, **given)

    def __call__(self, text: jax.Array) -> jax.Array:
        """Logits of the next character, (batch, length, characters)."""
        positions = self.positions(jnp.arange(text.shape[1]))
        x = self.characters(text) + positions[None]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))
