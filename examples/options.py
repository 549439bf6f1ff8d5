"""Command lines of the scripts: numbers with a range, errors of one line."""

import argparse
import math
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """Shows the defaults, and reports a bad option in one line."""

    def __init__(self, description: str):
        """Prints the description above the options."""
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, formatter_class=formatter)

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


def folder(text: str) -> Path:
    """An option's type: a folder, which is made before anything is computed."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot be written: {error}") from error
    return Path(text)


def file(text: str) -> Path:
    """An option's type: a file to write, whose folder is made."""
    folder(str(Path(text).parent))
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"is a folder, not a file: {text!r}")
    return Path(text)
