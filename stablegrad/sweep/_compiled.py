"""The compiled functions of a candidate, for as many runs at a time as memory holds."""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from ._experiment import make_key
from ._trainer import Run, Trainer

SHARE = 0.5  # Share of the memory that the runs of one candidate may take.
STEP_AXES = (0, 0, None, 0, None)  # For `jax.vmap` of `Trainer.step` over runs.

Members = list[tuple[float, int]]  # Learning rates and seeds of runs.


class Programs:
    """The compiled functions of a trainer for `size` runs at a time.

    Arguments and results have the runs along the first axis.
    """

    def __init__(self, trainer: Trainer, members: Members):
        """Compile for all members at a time, or for as many as memory holds."""
        started = time.perf_counter()
        self._trainer, self._experiment = trainer, trainer.experiment
        self.size = 1
        step, arguments = self._map(trainer.step, STEP_AXES), self._arguments(members)
        self._in_loop = not _slow_in_loop(step, arguments)
        # On a CPU, convolutions are also slow with several sets of weights.
        limit = self._experiment.at_once or (len(members) if self._in_loop else 1)
        self.size = min(len(members), limit)
        self._compile(members)
        available = _bytes_available()
        while self.size > 1 and (needed := _bytes_needed(self._advance)) > available:
            self.size = max(1, int(self.size * available / needed))
            self._compile(members)
        self.compile_seconds = time.perf_counter() - started

    def init(self, members: Members) -> Run:
        return self._init(*self._rates_and_keys(members))

    def advance(self, runs: Run, members: Members, first: int, number: int):
        """Take `number` steps from step `first`; return the runs and their losses."""
        rates, _ = self._rates_and_keys(members)
        batches = (self._experiment.data, self._draws(members, first))
        if self._in_loop:
            runs, losses = self._advance(rates, runs, *batches, jnp.int32(number))
            return runs, np.asarray(losses)[:, :number]
        losses = []
        for i in range(number):
            runs, loss = self._advance(rates, runs, *batches, jnp.int32(i))
            losses.append(loss)
        return runs, np.asarray(jnp.stack(losses, axis=-1))

    def evaluate(self, runs: Run, train_loss: np.ndarray):
        """Return the runs and their measurements by name; nan if not measured.

        Without a validation set, the loss is `train_loss`.
        """
        found = {"loss": train_loss, "accuracy": np.nan, "dead": np.nan}
        if slices := self._experiment.slices:
            sizes = [size for size, _ in slices]
            parts = [self._evaluate[size](runs, batch) for size, batch in slices]
            parts = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(parts))
            for name in ("loss", "accuracy"):
                found[name] = np.average(parts[name], axis=0, weights=sizes)
            if parts["active"].size:
                found["dead"] = 1 - parts["active"].any(axis=0).mean(axis=-1)
        runs, skipped = self._observe(runs, jnp.asarray(found["loss"], jnp.float32))
        return runs, {**found, "skipped": np.asarray(skipped)}

    def _compile(self, members: Members) -> None:
        def compiled(function, axes, arguments, donate=()):
            function = jax.jit(self._map(function, axes), donate_argnums=donate)
            return function.lower(*arguments).compile()

        trainer, arguments = self._trainer, self._arguments(members)
        rates, runs, *_ = arguments
        advance = trainer.steps if self._in_loop else trainer.step
        self._advance = compiled(advance, STEP_AXES, arguments, donate=1)
        start = self._rates_and_keys(members[: self.size])
        self._init = compiled(trainer.init, (0, 0), start)
        self._observe = compiled(trainer.observe, (0, 0), (runs, rates), donate=0)
        self._evaluate = {
            size: compiled(trainer.evaluate, (0, None), (runs, batch))
            for size, batch in dict(self._experiment.slices).items()
        }

    def _map(self, function, axes):
        """Vectorize over runs, without `vmap` for one run.

        Under `vmap`, `lax.cond` computes both branches.
        """
        if self.size > 1:
            return jax.vmap(function, axes)

        def single(*arguments):
            squeezed = [
                x if axis is None else jax.tree.map(lambda x: jnp.squeeze(x, 0), x)
                for x, axis in zip(arguments, axes, strict=True)
            ]
            return jax.tree.map(lambda x: jnp.expand_dims(x, 0), function(*squeezed))

        return single

    def _arguments(self, members: Members):
        """Return the arguments of a step, with abstract values for the runs."""
        members = members[: self.size]
        rates, keys = self._rates_and_keys(members)
        runs = jax.eval_shape(self._map(self._trainer.init, (0, 0)), rates, keys)
        # The data are an argument because constants are copied into each program.
        return rates, runs, self._experiment.data, self._draws(members, 0), jnp.int32(0)

    def _rates_and_keys(self, members: Members):
        rates, seeds = zip(*members, strict=True)
        keys = jax.vmap(make_key)(jnp.asarray(seeds, jnp.uint32))
        return jnp.asarray(rates, jnp.float32), keys

    def _draws(self, members: Members, first: int):
        """Draw for a whole interval, even if the runs end within it."""
        draw, number = self._experiment.draw, self._experiment.interval
        seeds = {seed for _, seed in members}
        by_seed = {seed: draw(seed, first, number) for seed in seeds}
        return jnp.stack([by_seed[seed] for _, seed in members])


def _slow_in_loop(step, arguments) -> bool:
    """Return whether a step has convolutions, which are slow in a loop on a CPU."""
    if jax.default_backend() != "cpu":
        return False
    return "conv_general_dilated" in str(jax.make_jaxpr(step)(*arguments))


def _bytes_needed(compiled) -> int:
    """Return the memory that a compiled program takes; 0 if unknown."""
    found = compiled.memory_analysis()
    if found is None:
        return 0
    total = found.argument_size_in_bytes + found.output_size_in_bytes
    return total + found.temp_size_in_bytes - found.alias_size_in_bytes


def _bytes_available() -> float:
    total = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if total is None:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return SHARE * total
