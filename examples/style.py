"""The look of the library's own figures, for those of the examples and benchmarks."""

from stablegrad._figure import (
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SHADE,
    SKY,
    YELLOW,
    new_figure,
)

__all__ = [
    "BLUE",
    "CYCLE",
    "GREEN",
    "GREY",
    "ORANGE",
    "PURPLE",
    "RED",
    "SHADE",
    "SKY",
    "YELLOW",
    "new_figure",
]
