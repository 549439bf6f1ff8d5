"""Comparison of optimizers, learning rates, policies, clips and guards."""

from ._candidates import WORDS as WORDS, Candidate as Candidate
from ._compare import RATES as RATES, compare as compare, label_entropy as label_entropy
from ._result import Comparison as Comparison, Row as Row
