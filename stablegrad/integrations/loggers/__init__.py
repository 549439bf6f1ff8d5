"""Loggers: they write what a guard did to a file or a tracking library."""

from ._csv import CSV as CSV
from ._json_lines import JSONLines as JSONLines
from ._late import Late as Late
from ._libraries import (
    CLU as CLU,
    MLflow as MLflow,
    TensorBoard as TensorBoard,
    WeightsAndBiases as WeightsAndBiases,
)
from ._writer import Writer as Writer
