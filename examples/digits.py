"""Handwritten digits for the examples: scikit-learn's own, or MNIST from a folder."""

import argparse
import gzip
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from options import whole
from sklearn.datasets import load_digits

TEST_SHARE = 0.4  # Of scikit-learn's 1,797 digits: 1,078 to train on, 719 to test on.


class Split(NamedTuple):
    """Images as rows of float32 in [0, 1], and their labels 0 to 9 as int32."""

    images: np.ndarray
    labels: np.ndarray


def parse_args(
    parser: argparse.ArgumentParser, argv, name: str, log: str = "telemetry"
) -> argparse.Namespace:
    """A command line that ends in --seed, --data-dir and --out, and its digits.

    `options.train` and `options.test` are loaded, the folder of `options.out` is there.
    """
    parser.add_argument(
        "--seed", type=whole(0), default=0, help="of the weights and of the batches"
    )
    parser.add_argument(
        "--data-dir",
        help="folder with the four MNIST files (IDX, gzipped or not); "
        "scikit-learn's 8x8 digits without it",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs") / name,
        help=f"folder for {name}.png and {log}.jsonl (null stands for nan and inf)",
    )
    options = parser.parse_args(argv)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        options.train, options.test = load(options.data_dir)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    images = len(options.train.labels)
    if options.batch_size > images:
        parser.error(
            f"argument --batch-size: must be at most the {images} training images, "
            f"got {options.batch_size}"
        )
    return options


def load(data_dir: str | None) -> tuple[Split, Split]:
    """Training and test digits: 8x8 from scikit-learn, or 28x28 MNIST in `data_dir`."""
    if data_dir is None:
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        images = (digits.data[order] / 16).astype(np.float32)
        labels = digits.target[order].astype(np.int32)
        cut = int(len(labels) * (1 - TEST_SHARE))
        return Split(images[:cut], labels[:cut]), Split(images[cut:], labels[cut:])
    train, test = (
        Split(
            _read_idx(Path(data_dir), f"{part}-images-idx3-ubyte", 3) / np.float32(255),
            _read_idx(Path(data_dir), f"{part}-labels-idx1-ubyte", 1).astype(np.int32),
        )
        for part in ("train", "t10k")
    )
    for name, split in (("train", train), ("t10k", test)):
        if len(split.images) != len(split.labels):
            raise ValueError(
                f"{data_dir}: {name} has {len(split.images)} images but "
                f"{len(split.labels)} labels."
            )
        if len(split.labels) == 0 or split.labels.max() > 9:
            raise ValueError(f"{data_dir}: {name} labels must be digits 0 to 9.")
    return train, test


def _read_idx(folder: Path, name: str, rank: int) -> np.ndarray:
    """An array of bytes from an IDX file, gzipped or not; images become rows."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise ValueError(f"{folder} has neither {name} nor {name}.gz.")
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            raw = file.read()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    header = 4 * (1 + rank)
    if len(raw) < header or struct.unpack(">I", raw[:4])[0] != 0x0800 + rank:
        raise ValueError(f"{path} is not an IDX file of bytes with {rank} dimensions.")
    shape = struct.unpack(f">{rank}I", raw[4:header])
    if len(raw) - header != int(np.prod(shape)):
        raise ValueError(
            f"{path} holds {len(raw) - header} bytes of data, its header says {shape}."
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(
        shape[0], *([-1] if rank > 1 else [])
    )
