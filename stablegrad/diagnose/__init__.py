"""Which layer, why, and what to do: a report on a model, a batch and an optimizer."""

from ._diagnose import diagnose as diagnose
from ._layers import Layer as Layer
from ._report import Report as Report
from .rules import RULES as RULES, Facts as Facts, Rule as Rule, Verdict as Verdict
