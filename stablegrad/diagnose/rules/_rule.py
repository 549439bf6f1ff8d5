"""What a rule is, what it is given, and what it says."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .._batch import BatchFacts
from .._layers import Layer
from .._training import TrainingFacts

SEVERITIES = ("note", "warning", "critical")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One finding.

    `change` is the remedy for a program: {"multiply": {leaf name: factor}} for
    parameters, {"rate": factor} and the like for what is not.
    """

    rule: str
    severity: str  # "note", "warning" or "critical"
    layer: str  # "" where no layer is to blame.
    finding: str  # One sentence.
    evidence: dict[str, float]
    threshold: str  # What was crossed, with its number.
    source: str
    remedy: str  # One sentence.
    formula: str  # The remedy as an equation, with the numbers put in.
    code: str  # The line that applies it.
    change: dict[str, Any] = dataclasses.field(default_factory=dict)
    follows: str = ""  # The rule whose verdict explains this one; "" for a root cause.


@dataclasses.dataclass
class Facts:
    """Everything that was measured."""

    loss: float
    layers: list[Layer]
    parameters: dict[str, dict[str, float]]  # By leaf: rms, gradient, nonfinite, ...
    batch: BatchFacts
    training: TrainingFacts | None = None
    origin: str = ""  # The first operation that is not finite, and its line of code.
    events: Sequence[Any] = ()
    unseen: tuple[str, ...] = ()  # Parameters inside operations that stay whole.

    def layer(self, name: str) -> Layer:
        """Return a layer by name."""
        return next(layer for layer in self.layers if layer.name == name)

    def depth(self, name: str) -> int:
        """Return the index of this layer or weight; the number of layers if none."""
        places = (i for i, x in enumerate(self.layers) if name in (x.name, x.leaf))
        return next(places, len(self.layers)) if name else len(self.layers)

    @property
    def path(self) -> list[Layer]:
        """The layers and residual sums on the way to the main head.

        The main head has the largest gradient. Layers beside a residual stream are left
        out, and so are branches that start with weights of zeros, and layers that no
        gradient reaches, as behind `stop_gradient`.
        """
        kinds = ("linear", "conv", "sum")
        off = {x.name for x in self.weighted if x.gain == 0 and x.joined}
        heads = [x for x in self.weighted if x.name in x.heads]
        main = max(heads, key=lambda x: x.gradient_norm, default=None)
        reached = any(x.gradient_norm > 0 for x in self.layers)
        return [
            x
            for x in self.layers
            if x.kind in kinds
            and not x.beside_stream
            and x.name not in off
            and not (reached and x.gradient_norm == 0)
            and not (x.feeds and off.issuperset(x.feeds))
            and (main is None or not x.heads or main.name in x.heads)
        ]

    @property
    def weighted(self) -> list[Layer]:
        """The layers that are linear."""
        return [x for x in self.layers if x.kind in ("linear", "conv")]

    def is_head(self, layer: Layer) -> bool:
        """Whether nothing follows it but the loss."""
        is_last = bool(self.weighted) and layer is self.weighted[-1]
        return layer.name in layer.heads or (is_last and not layer.activation)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A question that is asked of the facts.

    `explains` names the rules whose verdicts are symptoms of this one's. A verdict of a
    `forward` rule, such as a saturated layer, has its cause in that layer or before it.
    `applies` tells whether the facts hold what is judged, such as an optimizer's.
    """

    name: str
    question: str
    judge: Callable[[Facts], Iterable[Verdict]]
    explains: tuple[str, ...] = ()
    forward: bool = False
    applies: Callable[[Facts], bool] = lambda facts: True


def graded(value: float, limits: dict[str, float]) -> str:
    """Return the gravest severity whose limit is reached, or ""; limits rise."""
    reached = [name for name, limit in limits.items() if value >= limit]
    return reached[-1] if reached else ""


def judge(facts: Facts, rules: Sequence[Rule]) -> tuple[Verdict, ...]:
    """Ask all rules, causes before symptoms; the gravest root cause comes first."""
    roots: list[Verdict] = []
    symptoms: list[Verdict] = []
    causes: list[tuple[Rule, int]] = []
    for rule in rules:
        for verdict in rule.judge(facts):
            if verdict.severity not in SEVERITIES:
                raise ValueError(
                    f"a verdict's severity must be one of {SEVERITIES}, got "
                    f"{verdict.severity!r} from the rule {rule.name!r}."
                )
            depth = facts.depth(verdict.layer)
            before = [
                cause.name
                for cause, place in causes
                if rule.name in cause.explains
                and cause is not rule
                and not (rule.forward and place > depth)
            ]
            if before:
                follows = before[0]
                symptoms.append(dataclasses.replace(verdict, follows=follows))
                continue
            roots.append(verdict)
            if verdict.severity != "note":
                causes.append((rule, -1 if depth == len(facts.layers) else depth))
    gravity = lambda verdict: -SEVERITIES.index(verdict.severity)
    return (*sorted(roots, key=gravity), *sorted(symptoms, key=gravity))
