"""Command lines of the scripts: numbers with a range, errors of one line."""

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

MOST = 2**31 - 1  # Of a seed, and of steps, which are counted in int32.


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
    integer = number(int, lambda x: x >= least, f"an integer >= {least}")

    def parse(text: str) -> int:
        value = integer(text)
        if value > MOST:
            raise argparse.ArgumentTypeError(f"must be at most {MOST}, got {text!r}")
        return value

    return parse


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


def command(script: str, argv: Sequence[str] | None = None) -> str:
    """The command line of a run, to be written beside its figures."""
    given = sys.argv[1:] if argv is None else argv
    return shlex.join(["python", script, *map(str, given)])


def finish(main: Callable[[], int]) -> None:
    """Runs a script, and exits: with 130 and one line if Ctrl-C stops it."""
    try:
        status = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
