"""Published clipping and step-skipping methods, restated in float64 NumPy.

One slow loop over the steps, each rule in its source's order, nan and inf included.
Factors multiply gradients, updates add to parameters, statistics are those after it.
"""

import math

import numpy as np


@np.errstate(all="ignore")
def autoclip(norms, q):
    """AutoClip, Seetharaman et al. 2020, arXiv 2007.14469: percentile `q` so far."""
    norms = np.asarray(norms, np.float64)
    factors = np.ones(len(norms))
    for t, n in enumerate(norms):
        factors[t] = np.minimum(1.0, np.percentile(norms[: t + 1], q) / (n + 1e-6))
    return factors


@np.errstate(all="ignore")
def zclip(
    norms,
    *,
    alpha=0.97,
    z=2.5,
    max_norm=1.0,
    eps=1e-6,
    warmup=25,
    mode="zscore",
    option="adaptive_scaling",
    clip_factor=1.0,
    skip_update_on_spike=False,
    mean=None,
    var=None,
):
    """ZClip, Kumar et al. 2025, arXiv 2504.02507: (factors, means, variances)."""
    norms = np.asarray(norms, np.float64)
    factors = np.ones(len(norms))
    means, variances = np.full((2, len(norms)), np.nan)
    for t, n in enumerate(norms):
        limit, warming = None, mean is None
        if warming and t + 1 == warmup:
            mean, var = np.mean(norms[:warmup]), np.var(norms[:warmup])
        elif not warming:
            std = np.sqrt(var)
            score = (n - mean) / (std + eps)
            if mode == "percentile":
                limit = mean + z * std if n > mean + z * std else None
            elif score > z:
                adaptive = clip_factor * (mean + z * std / (score / z))
                limit = mean if option == "mean" else adaptive
        adjusted = n if limit is None else limit
        target = adjusted if max_norm is None else min(adjusted, max_norm)
        if n > target:
            factors[t] = target / (n + 1e-6)
        if not warming and not (limit is not None and skip_update_on_spike):
            mean = alpha * mean + (1 - alpha) * adjusted
            var = alpha * var + (1 - alpha) * (adjusted - mean) ** 2  # The new mean.
        if mean is not None:
            means[t], variances[t] = mean, var
    return factors, means, variances


@np.errstate(all="ignore")
def adagc(leaf_norms, *, lambda_abs=1.0, lambda_rel=1.05, beta=0.98, warmup=100):
    """AdaGC, Wang et al. 2025, arXiv 2502.11034, kozistr's port: (factors, gammas)."""
    leaf_norms = np.asarray(leaf_norms, np.float64)
    factors, gammas = np.ones((2, *leaf_norms.shape))
    gamma = leaf_norms[0]
    for t, n in enumerate(leaf_norms):
        if t + 1 < warmup:  # Steps count from 1.
            total = np.sqrt(np.sum(n**2)) + 1e-8
            factors[t] = np.minimum(lambda_abs / total, 1.0)
            clipped = factors[t] * n
            # Python's min: a later nan loses, a first nan stays.
            gamma = np.where((t == 0) | (clipped < gamma), clipped, gamma)
        else:
            factors[t] = np.minimum(lambda_rel * gamma / n, 1.0)
            gamma = beta * gamma + (1 - beta) * factors[t] * n
        gammas[t] = gamma
    return factors, gammas


@np.errstate(all="ignore")
def agc(grad, param, axes, *, clipping=0.01, eps=1e-3):
    """AGC, Brock et al. 2021, arXiv 2102.06171; one unit spans `axes`."""
    grad, param = np.asarray(grad, np.float64), np.asarray(param, np.float64)
    norm = lambda x: np.sqrt(np.sum(x**2, axis=axes, keepdims=True))
    limit = clipping * np.maximum(norm(param), eps)
    factor = limit / np.maximum(norm(grad), 1e-6)
    return np.where(norm(grad) > limit, grad * factor, grad)


@np.errstate(all="ignore")
def spam(
    grads,
    *,
    b1=0.9,
    b2=0.999,
    eps=1e-6,
    threshold=5000.0,
    reset_every=500,
    warmup=150,
    protect=20,
    lr=1.0,
):
    """SPAM, Huang et al. 2025, arXiv 2501.06842: (updates, clipped gradients)."""
    grads = np.asarray(grads, np.float64)
    updates, clipped = np.zeros_like(grads), np.zeros_like(grads)
    m = v = np.zeros(grads.shape[1:])
    ramp = warmup + 1  # Past the ramp: training starts at full size.
    for step, g in enumerate(grads, 1):
        since = step % reset_every if reset_every else step
        if since == 0:
            m, v, ramp = np.zeros_like(g), np.zeros_like(g), 0
        cosine = 0.99 * (1 + math.cos(math.pi * ramp / (warmup + 1))) / 2
        scale = 1 - cosine if ramp < warmup else 1.0
        if threshold != 0 and step >= protect and since >= protect:
            # Against v of the past, without bias correction.
            spike = g**2 > threshold * v
            g = np.where(spike, np.sign(g) * np.sqrt(threshold * v), g)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        # A reset does not restart the bias correction.
        size = lr * math.sqrt(1 - b2**step) / (1 - b1**step)
        updates[step - 1] = -size * scale * m / (np.sqrt(v) + eps)
        clipped[step - 1] = g
        ramp += 1
    return updates, clipped


@np.errstate(all="ignore")
def stable_spam_adaclip(grads, *, theta=0.999, reset_every=1000):
    """AdaClip of Stable-SPAM, arXiv 2502.17055: the clipped gradients."""
    grads = np.asarray(grads, np.float64)
    clipped = np.zeros_like(grads)
    m_max, step = 0.0, 0
    for t, g in enumerate(grads):
        step += 1
        largest = np.max(np.abs(g))
        m_max = theta * m_max + (1 - theta) * largest
        limit = m_max / (1 - theta**step)
        clipped[t] = np.where(np.abs(g) > limit, g / largest * limit, g)
        if reset_every and (t + 1) % reset_every == 0:
            step = 1  # Shared with Adam, whose moments restart; m_max does not.
    return clipped


@np.errstate(all="ignore")
def stable_adamw(grads, *, b1=0.9, b2=0.99, eps=1e-6, d=1.0, lr=1.0):
    """StableAdamW, Wortsman et al. 2023, arXiv 2304.13013: (updates, rms)."""
    grads = np.asarray(grads, np.float64)
    updates, rms = np.zeros_like(grads), np.zeros(len(grads))
    m = v = np.zeros(grads.shape[1:])
    for t, g in enumerate(grads):
        decay1 = b1 * (1 - b1**t) / (1 - b1 ** (t + 1))
        decay2 = b2 * (1 - b2**t) / (1 - b2 ** (t + 1))
        m = decay1 * m + (1 - decay1) * g
        v = decay2 * v + (1 - decay2) * g**2
        rms[t] = np.sqrt(np.mean(g**2 / np.maximum(v, eps**2)))
        size = lr / max(1.0, rms[t] / d)  # Python's max: nan gives 1.
        updates[t] = -size * m / (np.sqrt(v) + eps)
    return updates, rms


def _mean_std(past, ddof):
    """Mean and deviation; nan, as in torch, when there are too few values."""
    mean = np.sum(past) / np.float64(len(past))
    return mean, np.sqrt(np.sum((past - mean) ** 2) / np.float64(len(past) - ddof))


@np.errstate(all="ignore")
def _skip(values, norms, window, sigma, ddof, floor, needed):
    """Skips what exceeds mean + sigma std of the last `window` values before it."""
    skip = np.zeros(len(norms), bool)
    for series in [norms] if values is None else [values, norms]:
        series = np.asarray(series, np.float64)
        # Every value enters the window, skipped or not, once the next one is judged.
        for t in range(needed, len(series)):
            mean, std = _mean_std(series[max(0, t - window) : t], ddof)
            skip[t] |= not (series[t] - mean <= sigma * np.maximum(std, floor))
    return skip


def olmo_skip(values, norms, *, window=128, sigma=6.0):
    """SkipStepOptimizer of OLMo-core, whose enough counts the current value."""
    return _skip(values, norms, window, sigma, 1, 0.0, max(2, window // 2) - 1)


def levanter_skip(values, norms, *, window=128, sigma=6.0):
    """SkipStep of Levanter: population deviation, floored, enough past values."""
    return _skip(values, norms, window, sigma, 0, 1e-6, max(2, window // 2))


maxtext_skip = olmo_skip  # Both count the current value and use ddof 1, no floor.


@np.errstate(all="ignore")
def axlearn_drop(norms, *, decay=0.99, kind="ema", multiplier=20, min_count=500):
    """`skip_and_clip_by_global_norm` of AXLearn: (skip, mean, square mean)."""
    norms, skip = np.asarray(norms, np.float64), np.zeros(len(norms), bool)
    means, squares = np.ones((2, len(norms)))
    mean, square, accepted = np.float64(1), np.float64(1), 0
    for t, n in enumerate(norms):
        limit = mean * multiplier
        if kind == "stddev":
            limit = mean + multiplier * np.sqrt(square - mean**2)
            limit = 1e10 if accepted < min_count else limit
        skip[t] = not (np.isfinite(n) and n < limit)
        if not skip[t]:  # Only accepted norms are learnt from, unclipped.
            # Adafactor's decay: the first accepted norm replaces the initial 1.
            d = decay * (1 - decay**accepted) / (1 - decay ** (accepted + 1))
            mean = d * mean + (1 - d) * n
            square = d * square + (1 - d) * n**2
            accepted += 1
        means[t], squares[t] = mean, square
    return skip, means, squares


@np.errstate(all="ignore")
def global_norm_clip(n, max_norm):
    """`optax.clip_by_global_norm`: factors for one or many norms."""
    return np.where(np.less(n, max_norm), 1.0, np.divide(max_norm, n))
