"""The largest curvature of the loss, and the learning rate that it allows."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from .. import _checks
from . import _hessian, _loss, _moments, _vectors
from ._decays import decays
from ._lanczos import lanczos
from ._limits import stable_limit

_LOCAL = 1e-2  # Of all coordinates: a top eigenvector on fewer is an artefact.


@dataclasses.dataclass(frozen=True)
class Sharpness:
    """The ends of the Hessian's spectrum; `str()` is a sentence."""

    largest: float  # The largest eigenvalue: of H, or of P^-1/2 H P^-1/2.
    smallest: float
    residual: float  # Of the largest: an eigenvalue lies within it.
    iterations: int
    participation: float  # Share of coordinates in the top eigenvector, in (0, 1].
    stable_rate: float  # The largest stable rate on this quadratic; inf if none.
    unfloored: float  # The largest without a floor under P; nan without `tx`.
    unfloored_participation: float  # nan without `tx`.

    def __str__(self) -> str:
        """What the numbers mean, and what to do."""
        if not math.isfinite(self.largest):
            return (
                "The curvature is not finite, though the loss and its gradient are: "
                "second derivatives overflow or are nan at these parameters."
            )
        preconditioned = not math.isnan(self.unfloored)
        what = "preconditioned loss" if preconditioned else "loss"
        stable = (
            f"the optimizer is stable below a learning rate of {self.stable_rate:.3g}."
            if math.isfinite(self.stable_rate)
            else "nothing limits the learning rate: it turns upwards nowhere."
        )
        parts = [
            f"The {what} curves by {self.largest:.4g} at most and {self.smallest:.4g} "
            f"at least (residual {self.residual:.1g} after {self.iterations} "
            f"iterations). On this quadratic {stable}"
        ]
        if self.residual > 1e-2 * abs(self.largest):
            parts.append("Not converged: pass more `iterations`.")
        if preconditioned:
            parts.append(
                f"Without a floor under the second moments the largest is "
                f"{self.unfloored:.4g}"
                + (
                    f", an artefact of vanishing gradients: "
                    f"{100 * self.unfloored_participation:.2g} % of the coordinates "
                    "carry it."
                    if self.unfloored_participation < _LOCAL
                    else "."
                )
                + " Before training, the limit is often 10 to 100 times too low: "
                "trust `critical_learning_rate`."
            )
        return " ".join(parts)


def sharpness(
    loss_fn: Callable,
    params,
    batch,
    *,
    tx: optax.GradientTransformation | None = None,
    state: Any = None,
    momentum: float | None = None,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    b2: float | None = None,
    eps: float = 1e-8,
    iterations: int = 20,
    seed: int = 0,
) -> Sharpness:
    """Measures the largest and smallest curvature of a loss, raw or as Adam sees it.

        lambda = eigenvalues of H,  or of  P^-1/2 H P^-1/2,  P = max(P, 0.01 rms(P))
        P = (1 - b1^t) (sqrt(v_t / (1 - b2^t)) + eps),  v_t with this gradient mixed in

    by Lanczos with full reorthogonalisation in float32, at the highest precision of
    matrix products. With b the momentum and w the weight decay, the step is stable for

        eta (lambda k + w) < 2,    k = (1 + 2b if nesterov else 1) / (1 + b)

    with k times (1 - b) where the momentum is an average, as in Adam: 2 / lambda for
    gradient descent, 3.8 / lambda with momentum 0.9, 38 / lambda for Adam. It costs as
    much as `iterations` Hessian products, each about two gradients, and as many copies
    of the parameters; with `tx` twice that. Beyond the limit training spikes, and may
    still converge.

    Args:
        loss_fn: `loss_fn(params, batch)`, a scalar. It must give the same value every
            time: freeze dropout keys, keep batch normalisation in training mode.
        params: Any pytree, or a Flax NNX module, which `loss_fn` then gets as
            `loss_fn(model, batch)`. Leaves that are not floating point are held; half
            precision is measured as float32.
        batch: What `loss_fn` takes, pytrees of arrays. One batch, for all products.
        tx: An optimizer that keeps one second moment `nu` of all parameters, as Adam
            and RMSProp do, to see the loss as it does. None: the plain Hessian.
        state: Of `tx`, later in training, such as `optimizer.opt_state` of Flax NNX.
            None: as at its first step.
        momentum: b, in [0, 1); with `tx` Adam's b1. None: 0, with `tx` what two steps
            of it on made-up gradients show.
        nesterov: Whether the momentum looks ahead. `tx` does not tell.
        weight_decay: w, decoupled, as in AdamW. >= 0. `tx` does not tell.
        b2: Decay of the second moment of `tx`, in (0, 1). None: what `tx` shows.
        eps: What `tx` adds to its root, >= 0. `tx` does not tell.
        iterations: Lanczos steps, >= 1; half as many more follow if the residual is
            above 1 % of the result.
        seed: Of the start vector.

    Returns:
        `Sharpness`: plain floats, and a sentence under `str()`. Where the second
        derivatives are not finite, its numbers are nan, and it says so.

    Raises:
        TypeError: If `loss_fn` does not return a real scalar.
        ValueError: If an argument is out of range, `params` has no floating-point leaf,
            the loss or its gradient is not finite there, `state` comes without `tx`,
            `tx` keeps no second moment of all parameters, or its decays are neither
            given nor to be seen in its state.

    Example:
        >>> import jax.numpy as jnp
        >>> import stablegrad as sg
        >>> def loss_fn(params, batch):
        ...     return 0.5 * jnp.sum(batch * params**2)
        >>> found = sg.sharpness(loss_fn, jnp.ones(3), jnp.array([3.0, 1.0, -5.0]))
        >>> round(found.largest, 4), round(found.smallest, 4)
        (3.0, -5.0)
        >>> round(found.stable_rate, 4)
        0.6667

    Reference:
        Cohen et al., Gradient descent on neural networks typically occurs at the edge
        of stability (2021), https://arxiv.org/abs/2103.00065; Cohen et al., Adaptive
        gradient methods at the edge of stability (2022),
        https://arxiv.org/abs/2207.14484. The floor under P is ours.
    """
    _checks.require_count("iterations", iterations)
    given = lambda holds: lambda x: x is None or holds(x)
    _checks.require("momentum", momentum, "in [0, 1)", given(lambda x: 0 <= x < 1))
    _checks.require(
        "weight_decay", weight_decay, "finite and >= 0", lambda x: 0 <= x < math.inf
    )
    _checks.require("b2", b2, "in (0, 1)", given(lambda x: 0 < x < 1))
    _checks.require("eps", eps, "finite and >= 0", lambda x: 0 <= x < math.inf)
    if tx is None and state is not None:
        raise ValueError("`state` must come with its `tx`, got `tx=None`.")
    loss, point, held = _loss.problem(loss_fn, params)
    data = (held, batch)
    key = jax.random.key(seed)
    optimizer = None
    averages = _moments.Decays(momentum or 0.0, 0.0, averaged=False)
    if tx is not None:
        optimizer = _loss.optimizer(tx, "sharpness")
        averages = decays(optimizer, point, momentum, b2)
    with jax.default_matmul_precision("highest"):
        value, gradient_norm, roots = _inverse_roots(
            loss, optimizer, state, point, data, averages, eps
        )
        _loss.require_finite(value, gradient_norm)
        multiply = _Operator(loss, _hessian.cheapest(loss, point, data))
        size = sum(leaf.size for leaf in jax.tree.leaves(point))
        found = [
            lanczos(multiply, size, iterations, key, root, point, data)
            for root in roots
        ]
    top, bare = found[0], found[1] if tx is not None else None
    return Sharpness(
        largest=top.largest,
        smallest=top.smallest,
        residual=top.residual,
        iterations=top.iterations,
        participation=top.participation / size,
        stable_rate=stable_limit(
            top.largest,
            averages.momentum,
            nesterov=nesterov,
            averaged=averages.averaged,
            weight_decay=weight_decay,
        ),
        unfloored=bare.largest if bare else math.nan,
        unfloored_participation=bare.participation / size if bare else math.nan,
    )


@dataclasses.dataclass(frozen=True)
class _Operator:
    """Flat vector -> R H R vector, with R a diagonal."""

    loss: _loss.Loss
    method: str

    def __call__(self, vector, root, point, data) -> jax.Array:
        flat, unravel = ravel_pytree(point)
        scaled = unravel((root * vector).astype(flat.dtype))
        image = _hessian.product(self.loss, self.method)(point, data, scaled)
        return root * ravel_pytree(image)[0].astype(root.dtype)


@functools.partial(jax.jit, static_argnames=("loss", "tx", "averages"))
def _inverse_roots(loss, tx, state, point, data, averages, eps):
    """The loss, the norm of its gradient, and P^-1/2 with the floor, and without."""
    value, grads = jax.value_and_grad(loss)(point, data)
    size = sum(leaf.size for leaf in jax.tree.leaves(point))
    roots = [jnp.ones(size, jnp.float32)]
    if tx is not None:
        bare = _moments.preconditioner(tx, state, grads, point, averages, eps)
        tiny = jnp.finfo(jnp.float32).tiny  # Elements may be zero if `eps` is.
        roots = [
            jax.lax.rsqrt(jnp.maximum(diagonal, tiny))
            for diagonal in (_moments.floored(bare), bare)
        ]
    return value, _vectors.norm(grads), roots
