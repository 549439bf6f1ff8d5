"""Figures, for which Matplotlib is loaded only when one is drawn."""

import importlib
from typing import Any


def new_figure(width: float, height: float) -> Any:
    """Return an empty `matplotlib.figure.Figure`; raise ImportError without it."""
    try:
        matplotlib = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            "`figure` needs Matplotlib: pip install 'stablegrad[report]'"
        ) from error
    return matplotlib.Figure(figsize=(width, height), layout="constrained")
