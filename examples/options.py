"""Command lines for the examples: numbers with a range, errors of one line."""

import argparse
import math


class Parser(argparse.ArgumentParser):
    """Reports a bad option in one line."""

    def error(self, message):
        """Exits with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, holds, expected: str):
    """An option's type: a number for which `holds`, or a message that says so."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
        return value

    return parse


def whole(least: int):
    """An option's type: an integer of at least `least`."""
    return number(int, lambda x: x >= least, f"an integer >= {least}")


def above(low: float):
    """An option's type: a finite number above `low`."""
    return number(float, lambda x: low < x < math.inf, f"a finite number > {low:g}")
