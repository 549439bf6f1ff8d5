"""Small colour images for the examples: CIFAR-10 from a folder, or digits in grey."""

from pathlib import Path
from typing import NamedTuple

import digits
import numpy as np

SIDE, CHANNELS = 32, 3
RECORD = 1 + CHANNELS * SIDE * SIDE  # Bytes: one label, then the image by channels.
BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
SHIFT = 4  # Pixels at most, as in He et al. (2015).


class Split(NamedTuple):
    """Images (n, height, width, channels) of float32 in [0, 1]; labels as int32."""

    images: np.ndarray
    labels: np.ndarray


def load(data_dir: str | None) -> tuple[Split, Split]:
    """Training and test images: scikit-learn's 8x8 digits, or CIFAR-10 in `data_dir`.

    The folder holds the binary version, https://www.cs.toronto.edu/~kriz/cifar.html:
    `test_batch.bin`, and any of `data_batch_1.bin` to `data_batch_5.bin`.

    Raises:
        ValueError: If a file is missing, or is not what its name says.
    """
    if data_dir is None:
        train, test = digits.load(None)
        return tuple(
            Split(images.reshape(-1, 8, 8, 1), labels)
            for images, labels in (train, test)
        )
    folder = Path(data_dir)
    found = [folder / name for name in BATCHES if (folder / name).exists()]
    if not found:
        raise ValueError(f"{folder} has none of {BATCHES[0]} to {BATCHES[-1]}.")
    if not (folder / "test_batch.bin").exists():
        raise ValueError(f"{folder} has no test_batch.bin.")
    parts = [_read(path) for path in found]
    train = Split(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return train, _read(folder / "test_batch.bin")


def _read(path: Path) -> Split:
    """The images and labels of one file."""
    try:
        raw = np.fromfile(path, np.uint8)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if len(raw) == 0:
        raise ValueError(f"{path} is empty.")
    if len(raw) % RECORD:
        raise ValueError(
            f"{path} holds {len(raw)} bytes, no multiple of the {RECORD} of an image "
            "and its label."
        )
    records = raw.reshape(-1, RECORD)
    labels = records[:, 0].astype(np.int32)
    if labels.max() > 9:
        raise ValueError(
            f"{path} has a label of {labels.max()} at image {labels.argmax()}; labels "
            "must be 0 to 9."
        )
    images = records[:, 1:].reshape(-1, CHANNELS, SIDE, SIDE).transpose(0, 2, 3, 1)
    return Split(images / np.float32(255), labels)


def hold_out(train: Split, share: float, seed: int) -> tuple[Split, Split]:
    """The images to learn from, and a share of all, at least one, to validate on."""
    order = np.random.default_rng(seed).permutation(len(train.labels))
    cut = max(1, round(share * len(order)))
    return tuple(
        Split(train.images[rows], train.labels[rows])
        for rows in (order[cut:], order[:cut])
    )


def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each image mirrored or not, and shifted by up to 4 pixels into a black frame."""
    n, height, width, _ = images.shape
    frame = ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0))
    down, right = rng.integers(0, 2 * SHIFT + 1, (2, n, 1))
    rows, columns = down + np.arange(height), right + np.arange(width)
    mirrored = rng.random((n, 1)) < 0.5
    columns = np.where(mirrored, columns[:, ::-1], columns)
    each = np.arange(n)[:, None, None]
    return np.pad(images, frame)[each, rows[:, :, None], columns[:, None, :]]
