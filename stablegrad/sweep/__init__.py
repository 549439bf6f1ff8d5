"""Optimizers, learning rates, policies, clips and guards side by side."""

from ._candidates import WORDS as WORDS, Candidate as Candidate
from ._compare import RATES as RATES, compare as compare, label_entropy as label_entropy
from ._result import Comparison as Comparison, Row as Row
