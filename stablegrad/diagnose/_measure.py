"""One forward and one backward pass with statistics of every site."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import _taps
from ._program import Op, Program, Value, split
from ._site import Site

Statistics = dict[str, dict[str, jax.Array]]


def key_of(site: Site, what: str) -> str:
    """Name what is measured at a site: "out", "in", "weight" and others.

    Two sites of different kinds may share a value: a layer, and a scale behind it.
    """
    return "/".join([*(f"{place:06d}" for place in site.path), site.kind, what])


class Instrument:
    """A program whose sites are measured while it runs."""

    def __init__(self, program: Program, sites: list[Site]):
        """Prepare what to measure at which value."""
        self.program = program
        self._taps: dict[Value, str] = {}
        self._plans: dict[Value, list[tuple[str, Any]]] = {}
        self.scans: dict[str, tuple[Op, ...]] = {}  # Those around what is measured.
        self._measured: set[Program] = set()  # Those with anything to measure inside.
        self.aliases: dict[str, str] = {}
        for site in sites:
            self._plan(site)
        self._locate(program, ())

    def _plan(self, site: Site) -> None:
        by_example = site.kind == "conv"
        if site.kind not in ("attention", "router"):  # Masked logits are infinite.
            self._watch(site, "out", site.value, by_example)
        if site.source is not None:
            self._watch(site, "in", site.source, by_example)
        if site.activation is not None:
            act, axis = site.activation, site.unit_axis
            if act.root.aval.ndim != site.value.aval.ndim:
                axis = -1
            self._watch(site, "pre", act.root, by_example)
            self._watch(site, "post", act.out, by_example)
            self._add(
                act.root,
                key_of(site, "units"),
                lambda read, x: _taps.of_activation(act, x, axis),
            )
        if site.weight is not None:
            measured = lambda read, x: {"rms": _taps.rms(read(site.weight))}
            self._add(site.value, key_of(site, "weight"), measured)
        if site.kind == "sum":
            branch = site.extra["branch"]
            measured = lambda read, x: {"rms": _taps.rms(read(branch))}
            self._add(site.value, key_of(site, "branch"), measured)
        if site.kind in ("attention", "router"):
            weights = site.extra["weights"]

            def attended(read, x):
                if site.kind == "router":
                    return _taps.of_router(x)
                unmasked = read(site.extra["unmasked"])
                return _taps.of_attention(unmasked, read(site.value), x)

            self._add(weights, key_of(site, site.kind), attended)

    def _watch(self, site: Site, what: str, value: Value, by_example: bool) -> None:
        """Measure a value and its gradient, once for all sites that share it."""
        if value in self._taps:
            self.aliases[key_of(site, what)] = self._taps[value]
            return
        key = key_of(site, what)
        self._taps[value] = key

        def measured(read, x):
            alike = _taps.mean_cosine(x, by_example)
            return {**_taps.of_values(x), "alike": alike}

        self._add(value, key, measured)

    def _add(self, value: Value, key: str, measured) -> None:
        self._plans.setdefault(value, []).append((key, measured))

    def _locate(self, program: Program, around: tuple[Op, ...]) -> None:
        for value in program.values():
            for key, _ in self._plans.get(value, ()):
                self.scans[key] = around
                self._measured |= {program, *(op.body for op in around if op.body)}
        for op in program.ops:
            if op.body is not None:
                self._locate(op.body, (*around, op))

    def probes(self) -> dict[str, jax.Array]:
        """Return zeros to differentiate by, for every watched value."""
        found = {}
        for key in self._taps.values():
            lengths = tuple(op.eqn.params["length"] for op in self.scans[key])
            found[key] = _taps.probes(lengths)
        return found

    def __call__(self, arguments, probes) -> tuple[list[Any], Statistics]:
        """Return the results of the program, and the statistics of its sites."""
        return self._run(self.program, arguments, probes)

    def _run(self, program: Program, arguments, probes):
        env: dict[Value, Any] = {}
        stats: Statistics = {}

        def read(value: Value):
            return value.literal if value.literal is not None else env[value]

        def write(value: Value, array) -> None:
            if value in self._taps:
                array = _taps.tap(jnp.asarray(array), probes[self._taps[value]])
            env[value] = array
            for key, measured in self._plans.get(value, ()):
                still = lambda v: lax.stop_gradient(read(v))
                stats[key] = measured(still, lax.stop_gradient(array))

        for value, const in program.constants:
            env[value] = const
        for value, array in zip(program.ins, arguments, strict=True):
            write(value, array)
        for op in program.ops:
            if op.body is not None and op.body in self._measured:
                outs, inner = self._scan(op, list(map(read, op.ins)), probes)
                stats |= inner
            else:
                outs = op.run(read)
            for value, array in zip(op.outs, outs, strict=True):
                write(value, array)
        return list(map(read, program.outs)), stats

    def _scan(self, op: Op, arguments, probes):
        params, body = op.eqn.params, op.body
        assert body is not None
        fixed, carried = split(op.eqn)
        depth = {key for key, around in self.scans.items() if op in around}
        inner = {key: probes[key] for key in depth if key in probes}

        def step(carry, row):
            xs, now = row
            given = [*arguments[:fixed], *carry, *xs]
            outs, stats = self._run(body, given, now)
            return outs[:carried], (outs[carried:], stats)

        carry = arguments[fixed : fixed + carried]
        xs = arguments[fixed + carried :]
        settings = dict(length=params["length"], reverse=params["reverse"])
        carry, (ys, stats) = lax.scan(step, carry, (xs, inner), **settings)
        return [*carry, *ys], stats


def measure(instrument: Instrument, params, data):
    """Return loss, gradient, and statistics: of parameters, of values, of gradients.

    To be compiled: one forward and one backward pass.
    """
    leaves, structure = jax.tree.flatten(params)
    rest = jax.tree.leaves(data)

    def loss(leaves, probes):
        outs, stats = instrument([*leaves, *rest], probes)
        return outs[0], stats

    both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, stats), (grads, back) = both(leaves, instrument.probes())
    of_leaves = [
        {
            "rms": _taps.rms(leaf),
            "gradient": _taps.rms(grad),
            "nonfinite": jnp.sum(~jnp.isfinite(leaf)),
        }
        for leaf, grad in zip(leaves, grads, strict=True)
    ]
    return value, structure.unflatten(grads), (of_leaves, stats, back)
