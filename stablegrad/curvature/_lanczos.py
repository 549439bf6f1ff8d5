"""The extreme eigenvalues of a symmetric operator that is known by its products."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_CONVERGED = 1e-2  # Of the largest eigenvalue: above it, half as many iterations more.
_BREAKDOWN = 1e-6  # Of the largest coefficient: below it, the space is exhausted.
_ROUNDING = float(np.finfo(np.float32).eps)  # Relative: no residual is less.


class Spectrum(NamedTuple):
    """The two ends of a spectrum, as far as some products tell."""

    largest: float
    smallest: float
    residual: float  # ||A v - largest v||: an eigenvalue lies within it.
    iterations: int
    participation: float  # 1 / sum v^4: how many coordinates the top vector lives on.


class _Basis(NamedTuple):
    vectors: jax.Array  # float32 (iterations + 1, size): orthonormal rows so far.
    diagonal: jax.Array  # float32 (iterations,).
    beside: jax.Array  # float32 (iterations,): below the diagonal.


def lanczos(multiply: Callable, size: int, iterations: int, key, *args) -> Spectrum:
    """Lanczos with full reorthogonalisation, on flat float32 vectors.

        w = A q_j;  a_j = w.q_j;  w -= Q^T Q w, twice;  b_j = ||w||;  q_{j+1} = w / b_j

    Takes half as many iterations more if the residual exceeds 1 % of the result. A
    non-finite product makes the result nan.

    Args:
        multiply: `multiply(vector, *args)`, hashable, traced once.
        size: The vector's length.
        iterations: Products to take; no more than `size` are.
        key: A PRNG key for the start.
        args: What `multiply` needs: pytrees of arrays.
    """
    most = min(iterations + iterations // 2, size)
    start = jax.random.normal(key, (size,), jnp.float32)
    vectors = jnp.zeros((most + 1, size), jnp.float32)
    basis = _Basis(
        vectors.at[0].set(start / jnp.linalg.norm(start)),
        jnp.zeros(most, jnp.float32),
        jnp.zeros(most, jnp.float32),
    )
    done = min(iterations, size)
    basis = _extend(multiply, basis, 0, done, *args)
    spectrum = _read(basis, done)
    if done < most and not spectrum.residual <= _CONVERGED * abs(spectrum.largest):
        basis = _extend(multiply, basis, done, most, *args)
        spectrum = _read(basis, most)
    return spectrum


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _extend(multiply, basis: _Basis, begin, end, *args) -> _Basis:
    def step(j, basis) -> _Basis:
        vectors, diagonal, beside = basis
        image = multiply(vectors[j], *args).astype(jnp.float32)
        along = _dot(image, vectors[j])
        for _ in range(2):  # Twice is enough, also in float32.
            image = image - _dot(_dot(vectors, image), vectors)
        length = jnp.linalg.norm(image)
        following = image / jnp.where(length > 0, length, 1)
        return _Basis(
            vectors.at[j + 1].set(following),
            diagonal.at[j].set(along),
            beside.at[j].set(length),
        )

    return lax.fori_loop(begin, end, step, basis)


def _dot(left, right) -> jax.Array:
    return jnp.matmul(left, right, precision="highest")


def _read(basis: _Basis, done: int) -> Spectrum:
    """The Ritz values of the steps done, in float64 on the host."""
    diagonal = np.asarray(basis.diagonal[:done], np.float64)
    beside = np.asarray(basis.beside[:done], np.float64)
    if not (np.isfinite(diagonal).all() and np.isfinite(beside).all()):
        return Spectrum(np.nan, np.nan, np.nan, done, np.nan)
    scale = max(np.abs(diagonal).max(), beside.max())
    exhausted = np.flatnonzero(beside <= _BREAKDOWN * scale)
    if len(exhausted):
        done = int(exhausted[0]) + 1
    below = beside[: done - 1]
    tridiagonal = np.diag(diagonal[:done]) + np.diag(below, 1) + np.diag(below, -1)
    values, ritz = np.linalg.eigh(tridiagonal)
    top = jnp.asarray(ritz[:, -1], jnp.float32)
    vector = np.asarray(_dot(top, basis.vectors[:done]), np.float64)
    vector = vector / np.linalg.norm(vector)
    return Spectrum(
        float(values[-1]),
        float(values[0]),
        float(max(abs(beside[done - 1] * ritz[-1, -1]), _ROUNDING * scale)),
        done,
        float(1 / np.sum(vector**4)),
    )
