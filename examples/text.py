"""Plain text for the examples, as numbers: Python's own manual, or a folder's files."""

from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
from digits import Split


class Text(NamedTuple):
    """A text cut in two, each character as its place in the alphabet, int32."""

    train: np.ndarray  # The first nine tenths.
    held_out: np.ndarray  # The rest.
    alphabet: str  # Every character of both parts, sorted.

    def decode(self, numbers: np.ndarray) -> str:
        """The characters of those numbers."""
        return "".join(self.alphabet[number] for number in numbers)

    def trivial_loss(self) -> float:
        """What the shares of the characters alone predict: nats a character held out.

        One is added to every count, for characters that only the held-out part has.
        """
        counts = np.bincount(self.train, minlength=len(self.alphabet)) + 1
        return float(-np.log(counts / counts.sum())[self.held_out].mean())


def load(data_dir: str | None, context: int = 64) -> Text:
    """Every *.txt of a folder, joined in the order of their names, or `pydoc`'s topics.

    Raises ValueError, which names the file or folder, if a file is not UTF-8 or the
    text is too short: both parts must hold `context` characters and one to predict.
    """
    if data_dir is None:
        source, text = (
            "pydoc's topics",
            "".join(topics[name] for name in sorted(topics)),
        )
    else:
        source, text = data_dir, _read(Path(data_dir))
    alphabet = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(alphabet)}
    encoded = np.array([number[character] for character in text], np.int32)
    cut = len(encoded) * 9 // 10
    if len(encoded) - cut <= context:
        raise ValueError(
            f"{source}: the text has {len(encoded)} characters; a context of {context} "
            f"takes at least {10 * context + 1}."
        )
    return Text(encoded[:cut], encoded[cut:], alphabet)


def _read(folder: Path) -> str:
    """The text of a folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    paths = sorted(path for path in folder.glob("*.txt") if path.is_file())
    if not paths:
        raise ValueError(f"{folder} has no *.txt file.")
    return "".join(_read_file(path) for path in paths)


def _read_file(path: Path) -> str:
    """The text of a file, line ends as they are."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: {error.reason} at byte {error.start}."
        ) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


def windows(encoded: np.ndarray, starts: np.ndarray, context: int) -> Split:
    """Texts of `context` characters from `starts`, and at each the character after.

    Both have shape (windows, context).
    """
    rows = encoded[starts[:, None] + np.arange(context + 1)]
    return Split(rows[:, :-1], rows[:, 1:])


def batch(
    encoded: np.ndarray, size: int, context: int, order: np.random.Generator
) -> Split:
    """`size` windows from anywhere in the text."""
    return windows(encoded, order.integers(0, len(encoded) - context, size), context)


def spread(encoded: np.ndarray, most: int, context: int) -> Split:
    """At most `most` windows that do not overlap, evenly over the text."""
    count = min(most, (len(encoded) - 1) // context)
    starts = np.linspace(0, len(encoded) - 1 - context, count).astype(int)
    return windows(encoded, starts, context)
