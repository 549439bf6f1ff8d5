"""The extreme eigenvalues of a Hessian, by the Lanczos method."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from . import _hessian

_CONVERGED = 1e-2  # Largest residual that is accepted, relative to the eigenvalue.
_BREAKDOWN = 1e-6  # Relative to the largest coefficient: the Krylov space is exhausted.
_ROUNDING = float(np.finfo(np.float32).eps)  # Relative: the smallest residual.


class Spectrum(NamedTuple):
    """Estimates of both ends of a spectrum."""

    largest: float
    smallest: float
    residual: float  # ||A v - largest v||: an eigenvalue lies within it.
    iterations: int
    participation: float  # 1 / (size sum v^4): share of coordinates in v.


def lanczos(loss, method, root, params, data, iterations: int, seed) -> Spectrum:
    """Run Lanczos with full reorthogonalisation on A = R H R in float32.

        w = A q_j;  a_j = w.q_j;  w -= Q^T Q w, twice;  b_j = ||w||;  q_{j+1} = w / b_j

    H is the Hessian of `loss(params, data)`, and `root` the diagonal of R, float32
    (size,). Half as many more iterations follow if the residual exceeds 1 % of the
    largest eigenvalue. A product that is not finite makes the result nan.
    """
    size = root.size
    most = min(iterations + iterations // 2, size)
    start = jax.random.normal(jax.random.key(seed), (size,), jnp.float32)
    vectors = jnp.zeros((most + 1, size), jnp.float32)
    vectors = vectors.at[0].set(start / jnp.linalg.norm(start))
    basis = vectors, jnp.zeros(most, jnp.float32), jnp.zeros(most, jnp.float32)
    done = 0
    for end in (min(iterations, size), most):
        basis = _extend(loss, method, basis, done, end, root, params, data)
        spectrum, done = _read(basis, end), end
        if spectrum.residual <= _CONVERGED * abs(spectrum.largest):
            break
    return spectrum


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _extend(loss, method, basis, begin, end, root, params, data):
    """Extend a basis from `begin` to `end` orthonormal rows, with both diagonals."""
    flat, unravel = ravel_pytree(params)

    def step(j, basis):
        vectors, diagonal, off_diagonal = basis
        scaled = unravel((root * vectors[j]).astype(flat.dtype))
        product = _hessian.product(loss, method, params, data, scaled)
        image = root * ravel_pytree(product)[0].astype(jnp.float32)
        along = image @ vectors[j]
        for _ in range(2):  # Two passes are enough, also in float32.
            image = image - (vectors @ image) @ vectors
        length = jnp.linalg.norm(image)
        following = image / jnp.where(length > 0, length, 1)
        return (
            vectors.at[j + 1].set(following),
            diagonal.at[j].set(along),
            off_diagonal.at[j].set(length),
        )

    return lax.fori_loop(begin, end, step, basis)


def _read(basis, done: int) -> Spectrum:
    """Return the Ritz values after `done` iterations, in float64 on the host."""
    vectors, diagonal, off_diagonal = basis
    diagonal, off_diagonal = (
        np.asarray(x[:done], np.float64) for x in (diagonal, off_diagonal)
    )
    if not (np.isfinite(diagonal).all() and np.isfinite(off_diagonal).all()):
        return Spectrum(np.nan, np.nan, np.nan, done, np.nan)
    scale = max(np.abs(diagonal).max(), off_diagonal.max())
    exhausted = np.flatnonzero(off_diagonal <= _BREAKDOWN * scale)
    if len(exhausted):
        done = int(exhausted[0]) + 1
    below = off_diagonal[: done - 1]
    tridiagonal = np.diag(diagonal[:done]) + np.diag(below, 1) + np.diag(below, -1)
    values, ritz = np.linalg.eigh(tridiagonal)
    top = jnp.asarray(ritz[:, -1], jnp.float32)
    vector = np.asarray(top @ vectors[:done], np.float64)
    vector = vector / np.linalg.norm(vector)
    return Spectrum(
        float(values[-1]),
        float(values[0]),
        float(max(abs(off_diagonal[done - 1] * ritz[-1, -1]), _ROUNDING * scale)),
        done,
        float(1 / np.sum(vector**4) / len(vector)),
    )
