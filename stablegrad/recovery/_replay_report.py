"""What a replay found: the runs of one step beside each other, and what to do next."""

import dataclasses
from typing import NamedTuple

import numpy as np

from .._halt_message import NEXT
from ..responses._reasons import Reason

VERDICTS = {
    "same": "the same numbers, bit for bit: the data, the learning rate or the "
    "optimizer made them",
    "other numbers": "numbers that agree with each other, and not with what was "
    "recorded: a fault of the hardware that has passed, or another state, batch or "
    "program than that of the step",
    "differs by device": "the same numbers here, and other ones elsewhere: a fault of "
    "one of the devices, or devices of two kinds",
    "not deterministic": "other numbers each time",
}
_NEXT = {
    "same": "look at this batch, and at the rate at this step",
    "other numbers": "make sure that the state, the batch and the compiled step are "
    "those of that time; if they are, test this device, and go on: the step is "
    "healthy if the runs above are",
    "differs by device": "take the device that disagrees with a third one out of "
    "service",
    "not deterministic": "on a GPU, set XLA_FLAGS=--xla_gpu_deterministic_ops=true "
    "and replay again; if the numbers still differ, it is the hardware, or something "
    "in the step that is neither in the state nor in the batch",
}
_SHOWN = 5  # Names, or examples, in the text.


class Run(NamedTuple):
    """What a guard measured in one run of a step."""

    loss: float  # nan if no `value=` was passed.
    grad_norm: float
    leaf: str  # The first bad leaf; if all are finite, the one with the largest norm.
    skipped: bool
    reason: Reason | int  # 0: taken.
    leaf_norms: dict[str, float]  # By name, of a guard with `record_norms=`.

    def facts(self) -> dict[str, bytes | str]:
        """Return what must be equal, by name: the raw numbers, bit for bit."""
        bits = lambda number: np.float32(number).tobytes()
        norms = {f"norm of {name}": bits(x) for name, x in self.leaf_norms.items()}
        return {
            "loss": bits(self.loss),
            "gradient norm": bits(self.grad_norm),
            "leaf": self.leaf,
            **norms,
        }

    def __str__(self) -> str:
        done = "taken"
        if self.skipped:
            done = f"skipped ({Reason(self.reason).name.lower().replace('_', ' ')})"
        numbers = f"loss {self.loss:.9g}, gradient norm {self.grad_norm:.9g}"
        return f"{numbers}, leaf {self.leaf or '?'}, {done}"


class Example(NamedTuple):
    """The step with one example of the batch in the place of all."""

    place: int  # Along the first axis of the batch.
    loss: float
    grad_norm: float
    leaf: str

    @property
    def finite(self) -> bool:
        """Return whether its gradient norm is finite."""
        return bool(np.isfinite(self.grad_norm))


@dataclasses.dataclass(frozen=True)
class Replay:
    """A step that was taken again."""

    step: int  # Counted from 0.
    verdict: str  # "same", "other numbers", "differs by device", "not deterministic".
    recorded: Run
    runs: tuple[Run, ...]
    elsewhere: Run | None  # On the other device, if there was one.
    differing: tuple[str, ...]  # What is not equal bit for bit, by name.
    examples: tuple[Example, ...]  # The worst first; () unless asked for.

    @property
    def reproducible(self) -> bool:
        """Return whether all runs did what was recorded, bit for bit."""
        return self.verdict == "same"

    def __str__(self) -> str:
        lines = [
            f"step {self.step} was replayed {len(self.runs)} times: "
            f"{VERDICTS[self.verdict]}.",
            f"  recorded: {self.recorded}",
            *(f"  run {i}:    {run}" for i, run in enumerate(self.runs, 1)),
        ]
        if self.elsewhere:
            lines.append(f"  elsewhere: {self.elsewhere}")
        if self.differing:
            more = ", ..." if len(self.differing) > _SHOWN else ""
            lines.append(f"differing: {', '.join(self.differing[:_SHOWN])}{more}.")
        lines += self._examples()
        advice = _NEXT[self.verdict]
        if self.reproducible:
            advice = NEXT.get(Reason(self.recorded.reason), advice)
        return "\n".join([*lines, f"next: {advice}."])

    def _examples(self) -> list[str]:
        if not self.examples:
            return []
        norms = [x.grad_norm for x in self.examples if not np.isnan(x.grad_norm)]
        middle = np.median(norms) if norms else np.nan
        lines = [f"of {len(self.examples)} examples, median gradient norm {middle:.3g}"]
        for one in self.examples[:_SHOWN]:
            lines.append(
                f"  example {one.place}: loss {one.loss:.3g}, gradient norm "
                f"{one.grad_norm:.3g}, leaf {one.leaf or '?'}"
            )
        return lines
