"""How far each published variant is from its method, restated in float64.

    python benchmarks/parity.py

Every `published=True` variant runs in float32 beside the independent restatement of
`tests/helpers/oracles.py`, over 1,000 steps of gradients with outliers and a level that
rises and falls, warm-up included. The table gives the largest relative error of a
gradient (of an update, where the method is an optimizer), in units of the step's
largest element. Half a minute on two CPU cores.
"""

import sys
from pathlib import Path

import numpy as np
import optax

import stablegrad as sg

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from helpers import oracles
from helpers.clipping import gradients, leaf_norms, run
from options import Parser

STEPS = 1000
FLAT = gradients(STEPS)
SPIKY = FLAT.copy()
SPIKY[::97, 3] *= 1e4  # Single broken elements, which SPAM is made for.
NORMS = np.linalg.norm(np.asarray(FLAT, np.float64), axis=1)


def scaled(factors):
    """The gradients times one factor a step, or one a leaf."""
    factors = np.asarray(factors)
    if factors.ndim == 1:
        return factors[:, None] * FLAT
    return np.repeat(factors, (6, 4, 1), axis=1) * FLAT


def by_leaf(oracle, *args, **kwargs):
    """An oracle of one tensor, for each of the three leaves."""
    parts = np.split(FLAT, [6, 10], axis=1)
    return np.concatenate([oracle(x, *args, **kwargs) for x in parts], axis=1)


def agc():
    """AGC for parameters of ones: each column of the first leaf is a unit."""
    rows = []
    for row in FLAT:
        matrix = oracles.agc(row[:6].reshape(2, 3), np.ones((2, 3)), 0).ravel()
        vector = oracles.agc(row[6:10], np.ones(4), None)
        rows.append([*matrix, *vector, oracles.agc(row[10], np.ones(()), None)])
    return np.array(rows, np.float64)


def cases():
    """Yields the method, our variant of it, and what it must give."""
    zclip = lambda **k: (sg.clip_by_zscore(published=True, **k), oracles.zclip, k)
    yield (
        "AutoClip, 10 %",
        sg.clip_by_percentile(window=STEPS, published=True),
        scaled(oracles.autoclip(NORMS, 10)),
    )
    for name, (tx, oracle, settings) in {
        "ZClip, adaptive scaling": zclip(),
        "ZClip, mean": zclip(option="mean", max_norm=None),
        "ZClip, percentile": zclip(mode="percentile", max_norm=None),
    }.items():
        yield name, tx, scaled(oracle(NORMS, **settings)[0])
    yield (
        "AdaGC",
        sg.clip_by_ema(published=True),
        scaled(oracles.adagc(leaf_norms(FLAT))[0]),
    )
    yield "AGC", sg.clip_by_param_norm(published=True), agc()
    yield (
        "SPAM, clipped gradient",
        sg.clip_by_second_moment(published=True),
        oracles.spam(SPIKY)[1],
    )
    yield (
        "SPAM, update",
        sg.clip_by_second_moment(inner=optax.adam(1.0, eps=1e-20), published=True),
        oracles.spam(SPIKY, eps=1e-20)[0],
    )
    yield (
        "Stable-SPAM, AdaClip",
        sg.clip_by_max(published=True),
        by_leaf(oracles.stable_spam_adaclip),
    )
    yield (
        "StableAdamW, update",
        sg.clip_update_rms(inner=optax.adam(1.0, b2=0.99, eps=1e-6), published=True),
        by_leaf(lambda x: oracles.stable_adamw(x)[0]),
    )
    yield (
        "optax.clip_by_global_norm, as clip_by_norm",
        sg.clip_by_norm(1.0),
        scaled(oracles.global_norm_clip(NORMS, 1.0)),
    )


def main() -> None:
    """Prints the table."""
    Parser(description=__doc__.splitlines()[0]).parse_args()
    print("| method | steps changed | largest relative error |")
    print("|---|---|---|")
    for name, tx, expected in cases():
        given = SPIKY if name.startswith("SPAM") else FLAT
        found, _ = run(tx, given)
        size = np.abs(expected).max(axis=1, keepdims=True)
        error = (np.abs(found - expected) / size).max()
        changed = np.mean(np.any(np.abs(expected - given) > 1e-6 * size, axis=1))
        print(f"| {name} | {100 * changed:.1f} % | {error:.1e} |", flush=True)


if __name__ == "__main__":
    main()
