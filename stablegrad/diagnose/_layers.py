"""What was measured, layer by layer in order of depth."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _elementwise
from ._elementwise import Activation
from ._measure import Instrument, key_of
from ._site import Site

NAN = math.nan
NO_SLOPE = 1e-3  # Of the largest: a unit below it for all examples is dead.


@dataclasses.dataclass
class Layer:
    """One layer; nan where a number does not apply.

    Of a layer that is applied at several times, numbers are of all times together.
    """

    name: str
    kind: str  # linear, conv, embed, norm, sum (residual), attention or router
    activation: str = ""
    leaf: str = ""  # Its weight, by the name that `events` uses.
    dtype: str = ""
    input_rms: float = NAN
    rms: float = NAN  # Of the result: before the activation, after the bias.
    mean: float = NAN
    largest: float = NAN
    output_rms: float = NAN  # After the activation.
    gradient_rms: float = NAN  # Of the loss with respect to the result.
    gradient_norm: float = NAN  # L2, of the same over the whole batch.
    fan_in: int = 1
    gain: float = NAN  # rms(W) sqrt(fan_in)
    right_gain: float = NAN  # 1 / sqrt(E[f^2]) for the activation f, 1 without one.
    chi: float = NAN  # Squared gradient here over that at the next layer.
    chi_theory: float = NAN  # fan_out rms(W)^2 E[f'^2], W of the next layer.
    times: int = 1
    time_gain: float = NAN  # Per step of time, of the gradient's RMS.
    dead: float = NAN  # Share of units without slope for all examples.
    saturated: float = NAN  # Share of elements on the flat ends.
    alike: float = NAN  # Mean cosine between examples or tokens.
    branch: float = NAN  # RMS of f(x) over that of x, in x + f(x).
    logit: float = NAN  # Largest attention logit.
    entropy: float = NAN  # Of attention or of the router's load; 1: equal weights.
    busiest: float = NAN  # Load of the busiest expert over an equal share.
    weight_rms: float = NAN
    update: float = NAN  # RMS of the update over that of the weight.
    epsilon: float = NAN  # Share of elements smaller than Adam's epsilon.
    nonfinite: float = 0.0
    input_nonfinite: float = 0.0
    output_nonfinite: float = 0.0  # After the activation.
    gradient_nonfinite: float = 0.0
    recurrent: bool = False
    normalised: bool = False
    beside_stream: bool = False
    starts_stream: bool = False
    joined: bool = False
    feeds: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()  # The last layers that it reaches.
    parents: tuple[str, ...] = ()  # Of attention: the layers of queries and keys.
    bounded: bool = False
    saturated_usually: float = 0.0  # The share at normal inputs of mean 0 and RMS 1.
    slope_share: float = NAN


def assemble(instrument: Instrument, sites: Sequence[Site], stats, back, names):
    """List the layers, one for each iteration of a scan over layers."""
    rows: list[tuple[tuple, Site, tuple[int, ...], Layer]] = []
    for site in sites:
        around = instrument.scans[_first_key(instrument, site, stats)]
        lengths = [op.eqn.params["length"] for op in around]
        counts = [n if s else 1 for n, s in zip(lengths, site.sliced, strict=True)]
        for index in np.ndindex(*counts):
            timed = [op for op, s in zip(around, site.sliced, strict=True) if not s]
            backwards = bool(timed) and timed[-1].eqn.params["reverse"]
            picked = _Picked(instrument, stats, back, site, index, backwards)
            order = (
                tuple(x for pair in zip(site.path, index, strict=False) for x in pair)
                + site.path[len(index) :]
            )
            layer = _layer(site, picked, names)
            which = [i for i, s in zip(index, site.sliced, strict=True) if s]
            layer.name += "".join(f"[{i}]" for i in which)
            rows.append((order, site, index, layer))
    rows.sort(key=lambda row: row[0])
    found = {(id(site), index): layer for _, site, index, layer in rows}
    for _, site, index, layer in rows:
        _link(site, index, layer, found)
    return [layer for *_, layer in rows]


def _first_key(instrument: Instrument, site: Site, stats) -> str:
    prefix = key_of(site, "")
    aliases = instrument.aliases
    for key in (*stats, *aliases):
        if key.startswith(prefix):
            found = aliases.get(key, key)
            if len(instrument.scans[found]) == len(site.sliced):
                return found
    raise AssertionError(site.name)


class _Picked:
    """The numbers of one site, of one iteration over layers and all of time."""

    def __init__(self, instrument, stats, back, site: Site, index, is_reversed: bool):
        self._instrument, self._stats, self._back = instrument, stats, back
        self._site, self.index = site, index
        self.is_reversed = is_reversed  # Of the innermost scan over time.

    def _at(self, what: str, table) -> Any:
        key = key_of(self._site, what)
        return table.get(self._instrument.aliases.get(key, key))

    def _take(self, array) -> np.ndarray:
        array = np.asarray(array)
        index = zip(self.index, self._site.sliced, strict=True)
        where = tuple(i if over_layers else slice(None) for i, over_layers in index)
        return array[where] if array.ndim >= len(where) else array

    def value(self, what: str, name: str, over=np.max, default=NAN) -> float:
        found = self._at(what, self._stats)
        return (
            default
            if found is None or name not in found
            else _over(over, self._take(found[name]))
        )

    def gradients(self, what: str) -> np.ndarray | None:
        found = self._at(what, self._back)
        return None if found is None else self._take(found)


def _over(over, array) -> float:
    with np.errstate(all="ignore"):
        return float(over(array.astype(float)))


def root_mean_square(array) -> float:
    """Of numbers that are themselves root mean squares."""
    return float(np.sqrt(np.mean(np.square(array))))


def _layer(site: Site, picked: _Picked, names: Sequence[str]) -> Layer:
    value = picked.value
    layer = Layer(site.name, site.kind, dtype=site.dtype, recurrent=site.recurrent)
    layer.rms = value("out", "rms", root_mean_square)
    layer.mean = value("out", "mean", np.mean)
    layer.largest = value("out", "largest")
    layer.nonfinite = value("out", "nonfinite", np.sum, 0.0)
    layer.alike = value("out", "alike", np.mean)
    layer.input_rms = value("in", "rms", root_mean_square)
    layer.input_nonfinite = value("in", "nonfinite", np.sum, 0.0)
    layer.output_rms = value("post", "rms", root_mean_square, layer.rms)
    layer.output_nonfinite = value("post", "nonfinite", np.sum, layer.nonfinite)
    layer.weight_rms = value("weight", "rms", root_mean_square)
    layer.leaf = names[site.leaf] if site.leaf >= 0 else ""
    layer.normalised = site.normalised
    layer.beside_stream, layer.joined = site.beside_stream, site.joined
    layer.starts_stream = site.starts_stream and not any(picked.index)
    _add_gradients(layer, site, picked)
    if site.kind in ("linear", "conv"):
        layer.fan_in = site.fan_in
        layer.gain = layer.weight_rms * math.sqrt(site.fan_in)
        layer.right_gain = 1.0
    if site.activation is not None:
        _add_activation(layer, site.activation, picked)
    elif math.isfinite(layer.rms):
        layer.slope_share = 1.0
    if site.kind == "sum":
        layer.branch = value("branch", "rms", np.max) / max(layer.input_rms, 1e-30)
    layer.logit = value("attention", "largest")
    layer.entropy = value("attention", "entropy", np.min)
    if site.kind == "router":
        layer.entropy = value("router", "entropy", np.mean)
        layer.busiest = value("router", "busiest", np.mean)
    return layer


def _add_gradients(layer: Layer, site: Site, picked: _Picked) -> None:
    gradients = picked.gradients("out")
    if gradients is None:
        return
    flat = gradients.reshape(-1, gradients.shape[-1]).astype(float)
    layer.gradient_rms = _over(root_mean_square, flat[:, 0])
    layer.gradient_nonfinite = float(flat[:, 1].sum())
    size = np.prod(site.value.aval.shape) * len(flat)
    layer.gradient_norm = layer.gradient_rms * math.sqrt(size)
    layer.times = len(flat)
    layer.time_gain = _time_gain(flat[:, 0], picked.is_reversed)


def _add_activation(layer: Layer, activation: Activation, picked: _Picked) -> None:
    value = picked.value
    layer.activation, layer.bounded = activation.name, activation.bounded
    layer.saturated_usually = _elementwise.saturated_usually(activation)
    layer.dead = value("units", "slopes", _dead)
    layer.saturated = value("units", "saturated", np.mean)
    second, _ = _elementwise.moments(activation, 0.0, 1.0)
    layer.right_gain = 1 / math.sqrt(max(second, 1e-12))
    mean, rms = value("pre", "mean", np.mean), value("pre", "rms", root_mean_square)
    if math.isfinite(rms) and math.isfinite(mean):
        deviation = math.sqrt(max(rms**2 - mean**2, 0.0))
        _, layer.slope_share = _elementwise.moments(activation, mean, deviation)


def _dead(slopes: np.ndarray) -> float:
    """Return the share of units that have no slope in any iteration."""
    return float(np.mean(slopes.reshape(-1, slopes.shape[-1]).max(axis=0) < NO_SLOPE))


def _time_gain(rms: np.ndarray, is_reversed: bool) -> float:
    """Factor on the gradient's RMS per step back in the order of the scan."""
    if len(rms) < 4 or not (np.isfinite(rms).all() and (rms > 0).all()):
        return NAN
    slope = np.polyfit(np.arange(len(rms)), np.log(rms), 1)[0]
    return float(np.exp(slope if is_reversed else -slope))


def _link(site: Site, index, layer: Layer, found) -> None:
    """Fill in what a layer shares with others."""
    suffix = "".join(f"[{i}]" for i, s in zip(index, site.sliced, strict=True) if s)
    layer.parents = tuple(parent.name + suffix for parent in site.parents)
    layer.heads = tuple(head.name for head in site.heads)
    following = [found.get((id(other), index)) for other in site.feeds]
    layer.feeds = tuple(other.name for other in following if other is not None)
    timed = any(not over_layers for over_layers in site.sliced)
    following, weights = [x for x in following if x], site.feeds
    if len(following) != 1 or timed or site.kind not in ("linear", "conv"):
        return
    (after,), (next_site,) = following, weights
    if len(_users(site)) != 1 or not after.gradient_rms:
        return
    layer.chi = (layer.gradient_rms / after.gradient_rms) ** 2
    spread = next_site.fan_out * after.weight_rms**2
    layer.chi_theory = spread * layer.slope_share


def _users(site: Site):
    """The uses of a result after its activation."""
    out = site.activation.out if site.activation else site.value
    return out.users
