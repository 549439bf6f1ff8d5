"""The report of a diagnosis."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from .._text_files import write_whole
from . import _figure, _html, _table
from ._layers import Layer
from .rules import SEVERITIES, Facts, Rule, Verdict


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What `diagnose` found; `print` it."""

    facts: Facts
    verdicts: tuple[Verdict, ...]  # Root causes first, the gravest of them first.
    rules: tuple[Rule, ...]  # All that were given.

    @property
    def layers(self) -> list[Layer]:
        """The layers in order of depth."""
        return self.facts.layers

    @property
    def loss(self) -> float:
        """The loss of the batch."""
        return self.facts.loss

    @property
    def asked(self) -> tuple[Rule, ...]:
        """The rules that had something to judge."""
        return tuple(rule for rule in self.rules if rule.applies(self.facts))

    @property
    def causes(self) -> tuple[Verdict, ...]:
        """The verdicts that no other explains, notes aside."""
        return tuple(v for v in self.verdicts if not v.follows and v.severity != "note")

    @property
    def severity(self) -> str:
        """The gravest severity: "", "note", "warning" or "critical"."""
        found = [SEVERITIES.index(verdict.severity) for verdict in self.verdicts]
        return SEVERITIES[max(found)] if found else ""

    def __str__(self) -> str:
        return _table.text(self)

    __repr__ = __str__

    def records(self) -> list[dict[str, Any]]:
        """Return one dict a layer, for a data frame."""
        return [dataclasses.asdict(layer) for layer in self.layers]

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers and verdicts; nan and infinities are None."""
        facts = self.facts
        return _plain(
            {
                "loss": facts.loss,
                "severity": self.severity,
                "verdicts": [dataclasses.asdict(v) for v in self.verdicts],
                "layers": self.records(),
                "parameters": facts.parameters,
                "batch": dataclasses.asdict(facts.batch),
                "training": facts.training and dataclasses.asdict(facts.training),
                "origin": facts.origin,
                "unseen": facts.unseen,
                "events": [str(event) for event in facts.events],
                "rules": {rule.name: rule.question for rule in self.rules},
            }
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the same as JSON, and write it to `path` if one is given."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        if path is not None:
            write_whole(Path(path), text)
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """Return a page without outside references, and write it to `path`."""
        page = _html.page(self)
        if path is not None:
            write_whole(Path(path), page)
        return page

    def figure(self) -> Any:
        """Draw signal and gradient by depth, with the verdicts; needs Matplotlib.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ImportError: If Matplotlib is not installed.
        """
        return _figure.profile(self)


def _plain(thing: Any) -> Any:
    if isinstance(thing, dict):
        return {str(key): _plain(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [_plain(value) for value in thing]
    if hasattr(thing, "item"):  # A scalar of NumPy or JAX, from a rule of one's own.
        thing = thing.item()
    if isinstance(thing, float) and not math.isfinite(thing):
        return None
    return thing
