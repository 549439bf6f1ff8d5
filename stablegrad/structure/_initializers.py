"""Initialisers by the activation, by the depth, and by the scheme of a paper.

All are functions `(key, shape, dtype) -> array`, as those of `jax.nn.initializers`,
from which they are made.
"""

import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer

from .._checks import require, require_count
from ._expectations import Activation
from ._mean_field import gain

Distribution = Literal["normal", "truncated_normal", "uniform", "orthogonal"]
DISTRIBUTIONS = get_args(Distribution)


class DeepNorm(NamedTuple):
    """The two constants of DeepNorm."""

    residual_scale: float  # alpha: x is multiplied by it before the branch is added.
    init_scale: float  # beta: gain of the kernels of the MLP, values and outputs.


def activation_init(
    activation: Activation,
    *,
    distribution: Distribution = "truncated_normal",
    backward: bool = False,
) -> Initializer:
    """Return an initialiser for the kernel before (or after) an activation.

        std(W) = gain(activation) / sqrt(fan_in)

    keeps the mean square of pre-activations from layer to layer: `lecun_normal` with
    the gain of any activation, `he_normal` for ReLU.

    Args:
        activation: An elementwise function of an array, such as `jax.nn.gelu`.
        distribution: "normal", "truncated_normal", "uniform" or "orthogonal". An
            orthogonal kernel keeps the norm of every input, and not only their mean,
            unless there are fewer outputs than inputs. Of a convolution, every window
            is an input.
        backward: Whether gradients keep their scale, by fan_out and their own gain.

    Returns:
        An initialiser `(key, shape, dtype) -> array`. "orthogonal" takes the last axis
        as the outputs and all others as the inputs.

    Raises:
        TypeError: If `activation` cannot be called.
        ValueError: If `distribution` is another one, or the activation has no gain.

    Example:
        >>> import jax
        >>> import stablegrad as sg
        >>> init = sg.structure.activation_init(jax.nn.gelu)
        >>> kernel = init(jax.random.key(0), (512, 512))
        >>> round(float(kernel.std() * 512**0.5), 2)
        1.53

    Reference:
        He et al. (2015), https://arxiv.org/abs/1502.01852; Saxe et al. (2014),
        https://arxiv.org/abs/1312.6120, for orthogonal kernels.
    """
    known = lambda x: x in DISTRIBUTIONS
    require("distribution", distribution, f"one of {DISTRIBUTIONS}", known)
    scale = gain(activation, backward=backward)
    if distribution == "orthogonal":
        return _orthogonal(scale, backward)
    fan = "fan_out" if backward else "fan_in"
    return jax.nn.initializers.variance_scaling(scale**2, fan, distribution)


def _orthogonal(scale: float, backward: bool) -> Initializer:
    """Return an initialiser of orthogonal kernels, std(W) = scale / sqrt(fan)."""
    orthonormal = jax.nn.initializers.orthogonal()

    def init(key, shape, dtype=None, *args, **kwargs) -> jax.Array:
        outputs, inputs = shape[-1], math.prod(shape[:-1])
        window = math.prod(shape[:-2])
        fan = outputs * window if backward else inputs
        # Orthonormal rows or columns have elements of variance 1 / the longer side.
        factor = scale * math.sqrt(max(outputs, inputs) / max(fan, 1))
        # The QR decomposition has no 16-bit floats.
        dtype = jnp.result_type(float) if dtype is None else dtype
        wide = np.promote_types(dtype, np.float32)
        return (factor * orthonormal(key, shape, wide, *args, **kwargs)).astype(dtype)

    return init


def depth_scaled_init(init: Initializer, branches: int) -> Initializer:
    """Scale the last kernel of a residual branch by the number of branches.

        W = W_init / sqrt(L)

    The variance of the residual stream then grows by (1 + 1 / L)^L < e over all
    branches, whatever the depth, and by 2^L without the scale.

    Args:
        init: The initialiser of the kernel.
        branches: Residual branches L of the network, >= 1: two a transformer layer, so
            that N layers have 1 / sqrt(2 N).

    Returns:
        An initialiser, for the last kernel of every branch.

    Raises:
        TypeError: When it is called, if `init` returns no array but, as with
            `with_partitioning`, a box: that goes around the scaled initialiser.
        ValueError: If `branches` is no integer >= 1.

    Example:
        >>> import jax
        >>> import stablegrad as sg
        >>> he = jax.nn.initializers.he_normal()
        >>> init = sg.structure.depth_scaled_init(he, branches=24)

    Reference:
        GPT-2, Radford et al. (2019).
    """
    require_count("branches", branches)
    return _scaled(init, int(branches) ** -0.5)


def fixup_init(init: Initializer, branches: int, branch_layers: int) -> Initializer:
    """Scale the kernels of residual branches so that no norm is needed: Fixup.

        W = W_init L^(-1 / (2 m - 2))

    The last kernel of every branch, and that of the classifier, start at 0
    (`jax.nn.initializers.zeros`); every branch has a scalar factor that starts at 1
    (`ScaledResidual(branch, scale_init=1)`), and biases before its layers. One step of
    SGD then changes the outputs by the same amount at any depth.

    Args:
        init: The initialiser of the kernel, He's for ReLU.
        branches: Residual branches L of the network, >= 1.
        branch_layers: Layers m with a kernel in each of them, >= 2.

    Returns:
        An initialiser, for every kernel of a branch but the last.

    Raises:
        TypeError: When it is called, if `init` returns no array but a box.
        ValueError: If a count is no integer in range.

    Example:
        >>> import jax
        >>> import stablegrad as sg
        >>> he = jax.nn.initializers.he_normal()
        >>> first = sg.structure.fixup_init(he, branches=27, branch_layers=2)
        >>> last = jax.nn.initializers.zeros

    Reference:
        Zhang et al. (2019), https://arxiv.org/abs/1901.09321.
    """
    require_count("branches", branches)
    require_count("branch_layers", branch_layers, 2)
    return _scaled(init, int(branches) ** (-1 / (2 * int(branch_layers) - 2)))


def deepnorm(layers: int) -> DeepNorm:
    """Return the constants of DeepNorm for an encoder or a decoder alone.

        x <- LayerNorm(alpha x + f(x)),    alpha = (2 N)^(1/4), beta = (8 N)^(-1/4)

    Args:
        layers: Transformer layers N, of two branches f each, >= 1.

    Returns:
        alpha and beta. `deepnorm_init` takes beta, `DeepNormBlock` alpha.

    Raises:
        ValueError: If `layers` is no integer >= 1.

    Example:
        >>> import stablegrad as sg
        >>> alpha, beta = sg.structure.deepnorm(12)
        >>> round(alpha, 4), round(beta, 4)
        (2.2134, 0.3195)

    Reference:
        Wang et al. (2022), https://arxiv.org/abs/2203.00555.
    """
    require_count("layers", layers)
    return DeepNorm((2 * int(layers)) ** 0.25, (8 * int(layers)) ** -0.25)


def deepnorm_init(layers: int) -> Initializer:
    """Return the initialiser of DeepNorm for the MLP, the values and the outputs.

        std(W) = (8 N)^(-1/4) sqrt(2 / (fan_in + fan_out))

    Queries and keys have `jax.nn.initializers.glorot_normal()`.

    Args:
        layers: Transformer layers N, of two branches each, >= 1.

    Returns:
        An initialiser `(key, shape, dtype) -> array`.

    Raises:
        ValueError: If `layers` is no integer >= 1.

    Example:
        >>> import jax
        >>> import stablegrad as sg
        >>> init = sg.structure.deepnorm_init(12)
        >>> kernel = init(jax.random.key(0), (512, 512))

    Reference:
        Wang et al. (2022), https://arxiv.org/abs/2203.00555.
    """
    _, beta = deepnorm(layers)
    return jax.nn.initializers.variance_scaling(beta**2, "fan_avg", "normal")


def _scaled(init: Initializer, factor: float) -> Initializer:
    require("init", init, "a function (key, shape, dtype) -> array", callable)

    def scaled(*args, **kwargs) -> jax.Array:
        kernel = init(*args, **kwargs)
        if not isinstance(kernel, jax.Array):
            raise TypeError(
                f"`init` must return an array, got {type(kernel).__name__}. Put "
                "`with_partitioning` around the scaled initialiser, not inside it."
            )
        return factor * kernel

    return scaled
