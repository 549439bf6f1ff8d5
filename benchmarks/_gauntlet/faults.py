"""What goes wrong in each simulated run, as one small array a step."""

from typing import NamedTuple

import numpy as np

from .problem import LEAVES, LEVEL

SIGMA = 0.2  # The spread of log-norms, where norms are prescribed.
SHIFTS = (2, 5, 10, 100)
HEALTHY = slice(100, 600)  # The steps that tell what is usual for a method.
ONSET = 600  # AXLearn's published rule is in force from its 500th step only.
STEPS = 900
LONG = 2600
CHUNK = 100  # Steps a compiled program takes at once.
SAVE_AT = 700  # A multiple of CHUNK, in the middle of the lane `spike`.
OUTLIER_EVERY = 200  # More often than one step in 100 is usual by some definitions.
FREQUENT_EVERY = 50
REGULAR_EVERY, REGULAR_FACTOR = 16, 50
STATIONARY = (0.05, SIGMA, 0.5)
SEEDS = (10, 11)
HEAVY_LANES = 3


class Lane(NamedTuple):
    """Faults of one run; the arrays have one row a step."""

    leaf_factors: np.ndarray  # (steps, leaves): multiply the gradient.
    poison: np.ndarray  # (steps,): added to the very first element of the gradient.
    loss_poison: np.ndarray  # (steps,): added to the loss.
    norm: np.ndarray  # (steps,): prescribed gradient norm; 0 for the real gradient.
    # (): the second leaf starts at this multiple of the truth; nan: as it comes.
    start_at: np.ndarray | None


def lane(steps: int, norm=0.0) -> Lane:
    """A run without faults; with prescribed norms the parameters are held."""
    nothing = np.zeros(steps, np.float32)
    norms = np.broadcast_to(np.asarray(norm, np.float32), (steps,)).copy()
    factors = np.ones((steps, len(LEAVES)), np.float32)
    return Lane(factors, nothing, nothing.copy(), norms, np.asarray(np.nan))


def lognormal(steps: int, sigma: float, seed: int, level: float = LEVEL) -> np.ndarray:
    """Stationary norms."""
    return level * np.random.default_rng(seed).lognormal(0.0, sigma, steps)


def short_lanes() -> dict[str, Lane]:
    """The runs that the table of failure modes is read from."""
    lanes = {}

    def new(name, norm=0.0) -> Lane:
        lanes[name] = lane(STEPS, norm)
        return lanes[name]

    new("nan_element").poison[ONSET] = np.nan
    new("inf_element").poison[ONSET] = np.inf
    new("nan_loss").loss_poison[ONSET] = np.nan
    new("overflow").leaf_factors[ONSET] = 2e21
    for factor in SHIFTS:
        new(f"up_{factor}").leaf_factors[ONSET:] = factor
        down = new(f"down_{factor}")
        down.leaf_factors[ONSET:] = 1 / factor
        down.leaf_factors[ONSET + 150] = 8 / factor
    masking = new("masking").leaf_factors
    masking[ONSET], masking[ONSET + 50] = 1e3, 5
    jitter = np.random.default_rng(3).normal(size=STEPS)
    # Not a power of two, whose square is exact and hides cancellation.
    new("constant", 0.47 * (1 + 1e-6 * jitter))
    first = new("first").leaf_factors
    first[0], first[100] = 30, 8
    new("leaf").leaf_factors[ONSET : ONSET + 50, LEAVES.index("second")] = 1e3
    # Equally far from the truth: at zero, and on the other side at twice its size.
    for name, multiple in (("zero_leaf", 0.0), ("full_leaf", 2.0)):
        lanes[name] = lane(STEPS)._replace(start_at=np.asarray(multiple))
    stuck = new("stuck")
    stuck.leaf_factors[ONSET : ONSET + 50] = np.nan
    stuck.loss_poison[ONSET : ONSET + 50] = np.nan
    new("spike").leaf_factors[SAVE_AT - 5 : SAVE_AT + 5] = 100
    new("large", large_norms(STEPS))
    wander = LEVEL * 10 ** (-3 * np.random.default_rng(5).random(STEPS))
    wander[ONSET] = 1e3 * LEVEL
    new("wander", wander)
    fall = lognormal(STEPS, SIGMA, seed=6)
    fall[ONSET:] *= 10 ** (-4 * np.minimum(np.arange(STEPS - ONSET) / 100, 1))
    fall[ONSET + 150] = LEVEL
    new("fall", fall)
    rise = lognormal(STEPS, SIGMA, seed=7)
    rise[ONSET:] *= np.geomspace(1, 10, STEPS - ONSET)
    new("rise", rise)
    new("loss_rise").loss_poison[ONSET:] = 3.0
    return lanes


def large_norms(steps: int) -> np.ndarray:
    """Norms of gradients whose elements are about 300."""
    return lognormal(steps, SIGMA, seed=4, level=300 * 60**0.5)


def long_lanes(steps: int) -> dict[str, Lane]:
    """The runs that rates are measured on, and those with heavy tails."""
    lanes = {}
    for sigma in STATIONARY:
        for seed in SEEDS:
            norms = lognormal(steps, sigma, seed)
            lanes[f"stationary_{sigma}_{seed}"] = lane(steps, norms)
    for seed in range(20, 24):
        norms = lognormal(steps, SIGMA, seed)
        for name, every in (("outliers", OUTLIER_EVERY), ("frequent", FREQUENT_EVERY)):
            planted = norms.copy()
            planted[outliers(steps, every)] = LEVEL * np.exp(6 * SIGMA)
            lanes[f"{name}_{seed}"] = lane(steps, planted)
    regular = lognormal(steps, SIGMA, seed=31)
    regular[::REGULAR_EVERY] *= REGULAR_FACTOR
    lanes["regular"] = lane(steps, regular)
    for factor in SHIFTS:
        for name, by in ((f"up_{factor}", factor), (f"down_{factor}", 1 / factor)):
            norms = lognormal(steps, SIGMA, seed=30)
            norms[ONSET:] *= by
            lanes[f"shift_{name}"] = lane(steps, norms)
    lanes["clean"] = lane(steps)
    for seed in range(HEAVY_LANES):
        rng = np.random.default_rng(40 + seed)
        rare = rng.random(steps) < 1e-3
        rare[: HEALTHY.start] = False
        factors = np.where(rare, 100 * (1 + rng.pareto(1.0, steps)), 1.0)
        lanes[f"heavy_{seed}"] = lane(steps)
        lanes[f"heavy_{seed}"].leaf_factors[:] = factors[:, None]
    return lanes


def outliers(steps: int, every: int) -> np.ndarray:
    """Return the steps at which outliers of six sigma are planted."""
    return np.arange(HEALTHY.start + every, steps, every)
