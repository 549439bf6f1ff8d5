"""The largest curvature of the loss, and the learning rate that it allows."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._norms import measure
from . import _hessian, _loss
from ._decays import Decays, decays, preconditioner
from ._lanczos import lanczos

_FLOOR = 1e-2  # Smallest element of P, relative to their root mean square.
_FEW = 1e-2  # Share of coordinates: a top eigenvector on fewer is an artefact.


@dataclasses.dataclass(frozen=True)
class Sharpness:
    """Both ends of the Hessian's spectrum; `str()` gives advice."""

    largest: float  # The largest eigenvalue: of H, or of P^-1/2 H P^-1/2.
    smallest: float
    residual: float  # An eigenvalue lies within this distance of `largest`.
    iterations: int
    participation: float  # Share of coordinates in the top eigenvector, in (0, 1].
    stable_rate: float  # The largest stable rate on this quadratic; inf if none.
    unfloored: float  # `largest` without a floor under P; nan without `tx`.
    unfloored_participation: float  # nan without `tx`.

    def __str__(self) -> str:
        if not math.isfinite(self.largest):
            return (
                "The curvature is not finite, though the loss and its gradient are: "
                "second derivatives overflow or are nan at these parameters."
            )
        preconditioned = not math.isnan(self.unfloored)
        limit = "nothing limits the learning rate: no eigenvalue is positive"
        if math.isfinite(rate := self.stable_rate):
            limit = f"the optimizer is stable below a learning rate of {rate:.3g}"
        text = (
            f"The {'preconditioned ' if preconditioned else ''}loss curves by "
            f"{self.largest:.4g} at most and {self.smallest:.4g} at least (residual "
            f"{self.residual:.1g} after {self.iterations} iterations). On this "
            f"quadratic {limit}."
        )
        if self.residual > 1e-2 * abs(self.largest):
            text += " Not converged: pass more `iterations`."
        if not preconditioned:
            return text
        artefact, share = "", self.unfloored_participation
        if share < _FEW:
            artefact = ", an artefact of vanishing gradients: "
            artefact += f"{100 * share:.2g} % of the coordinates carry it"
        return (
            f"{text} Without a floor under the second moments the largest is "
            f"{self.unfloored:.4g}{artefact}. Before training, the limit is often 10 "
            "to 100 times too low: trust `critical_learning_rate`."
        )


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
    eps_root: float = 0.0,
    iterations: int = 20,
    seed: int = 0,
) -> Sharpness:
    """Measure the largest and smallest curvature of a loss, raw or preconditioned.

        lambda = eigenvalues of H,  or of  P^-1/2 H P^-1/2,  P = max(P, 0.01 rms(P))
        P = (1 - b1^t) (sqrt(v_t / (1 - b2^t) + eps_root) + eps),  v_t after this g
        stable:  eta (lambda k + w) < 2,    k = (1 + 2b if nesterov else 1) / (1 + b)

    by the Lanczos method in float32, with momentum b and weight decay w. k is (1 - b)
    times that if the momentum is an average, as in Adam. Above the limit training
    spikes, and may still converge. The cost is `iterations` Hessian products and as
    many copies of the parameters; twice that with `tx`.

    Args:
        loss_fn: As for `critical_learning_rate`.
        params: As for `critical_learning_rate`.
        batch: As for `critical_learning_rate`; one batch for all products.
        tx: An optimizer with one second moment `nu` of all parameters, as Adam and
            RMSProp have, for the preconditioner P. None: the plain Hessian. What else
            changes its updates, such as a clip or LAMB's trust ratio, is not seen.
        state: The state of `tx` during training. None: the initial state.
        momentum: b, in [0, 1); b1 of Adam. None: 0 without `tx`, else the value that
            two steps on artificial gradients show.
        nesterov: Whether the momentum is Nesterov's. It is not inferred from `tx`.
        weight_decay: w, decoupled, as in AdamW, >= 0. It is not inferred from `tx`.
        b2: Decay of the second moment of `tx`, in (0, 1). None: as for `momentum`.
        eps: Constant that `tx` adds to the root, >= 0. It is not inferred from `tx`.
        eps_root: Constant that `tx` adds within the root, >= 0, also not inferred.
            `optax.rmsprop(rate)` has `eps=0, eps_root=1e-8`.
        iterations: Lanczos steps, >= 1; half as many more if the residual is above 1 %.
        seed: Seed of the start vector.

    Returns:
        `Sharpness`: plain floats, and advice under `str()`. The numbers are nan if
        the second derivatives are not finite.

    Raises:
        TypeError: If `loss_fn` does not return a real scalar.
        ValueError: If an argument is out of range; if `params` has no floating-point
            leaf; if the loss or its gradient is not finite; if `state` is given without
            `tx`; if `tx` has no second moment of all parameters, or its decays are
            neither given nor shown by its state.

    Example:
        >>> import jax.numpy as jnp
        >>> import stablegrad as sg
        >>> loss_fn = lambda params, batch: 0.5 * jnp.sum(batch * params**2)
        >>> found = sg.sharpness(loss_fn, jnp.ones(3), jnp.array([3.0, 1.0, -5.0]))
        >>> [round(x, 4) for x in (found.largest, found.smallest, found.stable_rate)]
        [3.0, -5.0, 0.6667]

    Reference:
        Cohen et al. (2021), https://arxiv.org/abs/2103.00065; Cohen et al. (2022),
        https://arxiv.org/abs/2207.14484. The floor is original to stablegrad.
    """
    _checks.require_count("iterations", iterations)
    fraction = lambda x: x is None or 0 <= x < 1
    _checks.require("momentum", momentum, "in [0, 1)", fraction)
    _checks.require("b2", b2, "in (0, 1)", lambda x: fraction(x) and x != 0)
    numbers = {"weight_decay": weight_decay, "eps": eps, "eps_root": eps_root}
    for name, value in numbers.items():
        _checks.require(name, value, "finite and >= 0", lambda x: 0 <= x < math.inf)
    if tx is None and state is not None:
        raise ValueError("`state` must come with its `tx`, got `tx=None`.")
    loss, trained, frozen = _loss.problem("sharpness", loss_fn, params)
    data = (frozen, batch)
    optimizer = None
    averages = Decays(float(momentum or 0.0), 0.0, averaged=False)
    if tx is not None:
        optimizer = _loss.optimizer(tx, "sharpness")
        averages = decays(optimizer, trained, momentum, b2)
    with jax.default_matmul_precision("highest"):
        value, gradient_norm, roots = _inverse_roots(
            loss, optimizer, state, trained, data, averages, (eps, eps_root)
        )
        _loss.require_finite(value, gradient_norm)
        method = _hessian.choose("auto", loss, trained, data)
        spectra = [
            lanczos(loss, method, root, trained, data, iterations, seed)
            for root in roots
        ]
    bare = spectra[1] if tx is not None else None
    return Sharpness(
        **spectra[0]._asdict(),
        stable_rate=stable_limit(
            spectra[0].largest,
            averages.momentum,
            nesterov=nesterov,
            averaged=averages.averaged,
            weight_decay=weight_decay,
        ),
        unfloored=bare.largest if bare else math.nan,
        unfloored_participation=bare.participation if bare else math.nan,
    )


def stable_limit(
    curvature: float,
    momentum: float = 0.0,
    *,
    nesterov: bool = False,
    averaged: bool = False,
    weight_decay: float = 0.0,
) -> float:
    """Return the learning rate eta below which steps contract along an eigenvector.

        eta (curvature k + w) < 2,    k = (1 + 2b if nesterov else 1) / (1 + b)

    `curvature` is the largest eigenvalue, of P^-1 H with a constant preconditioner P; b
    is the momentum, w the decoupled weight decay. `averaged` means m = b m + (1 - b) g,
    as in Adam, which multiplies k by (1 - b). The limit is inf if no rate is unstable.
    """
    ahead = 1 + 2 * momentum if nesterov else 1.0
    gain = ahead / (1 + momentum) * (1 - momentum if averaged else 1.0)
    stiffness = max(curvature, 0.0) * gain + weight_decay
    return 2 / stiffness if stiffness else math.inf


@functools.partial(jax.jit, static_argnames=("loss", "tx", "averages"))
def _inverse_roots(loss, tx, state, params, data, averages, constants):
    """Return the loss, its gradient's norm, and P^-1/2 with and without the floor."""
    value, grads = jax.value_and_grad(loss)(params, data)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    roots = [jnp.ones(size, jnp.float32)]
    if tx is not None:
        diagonal = preconditioner(tx, state, grads, params, averages, *constants)
        # Without a floor, coordinates whose gradient happens to vanish determine the
        # largest eigenvalue. Elements may be zero if `eps` is.
        floor = _FLOOR * jnp.sqrt(jnp.mean(jnp.square(diagonal)))
        tiny = jnp.finfo(jnp.float32).tiny
        roots = [
            jax.lax.rsqrt(jnp.maximum(diagonal, least))
            for least in (jnp.maximum(floor, tiny), tiny)
        ]
    return value, measure(grads).norm, roots
