"""Small colour images: the files, the validation images, the augmentation."""

import os
from pathlib import Path

import cifar
import numpy as np
import pytest

pytestmark = pytest.mark.slow

DATA = os.environ.get("STABLEGRAD_DATA")


def write_batch(path, labels, seed=0):
    """One file; returns its images by rows, columns and channels, in bytes."""
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), 32, 32, 3))
    by_channel = images.transpose(0, 3, 1, 2).reshape(len(labels), -1)
    records = np.concatenate([np.array(labels)[:, None], by_channel], axis=1)
    path.write_bytes(records.astype(np.uint8).tobytes())
    return images


@pytest.fixture
def folder(tmp_path):
    write_batch(tmp_path / "data_batch_1.bin", [3, 0, 9])
    write_batch(tmp_path / "test_batch.bin", [5, 5], seed=1)
    return tmp_path


def test_images_and_labels_are_those_of_the_files(tmp_path):
    second = write_batch(tmp_path / "data_batch_2.bin", [1, 2], seed=2)
    fourth = write_batch(tmp_path / "data_batch_4.bin", [7], seed=4)
    unseen = write_batch(tmp_path / "test_batch.bin", [9, 0, 4], seed=5)
    train, test = cifar.load(str(tmp_path))
    assert train.images.dtype == np.float32 and train.labels.dtype == np.int32
    np.testing.assert_array_equal(train.labels, [1, 2, 7])
    np.testing.assert_array_equal(test.labels, [9, 0, 4])
    np.testing.assert_allclose(train.images[:2], second / 255, rtol=1e-6)
    np.testing.assert_allclose(train.images[2:], fourth / 255, rtol=1e-6)
    np.testing.assert_allclose(test.images, unseen / 255, rtol=1e-6)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("data_batch_1.bin", None, "has none of data_batch_1.bin to data_batch_5.bin"),
        ("test_batch.bin", None, "has no test_batch.bin"),
        ("data_batch_1.bin", b"", "data_batch_1.bin is empty"),
        ("test_batch.bin", bytes(3074), "test_batch.bin holds 3074 bytes, no multiple"),
        (
            "data_batch_2.bin",
            bytes(3073) + b"\x0a" + bytes(3072),
            "label of 10 at .* 1",
        ),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(folder, name, content, message):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        cifar.load(str(folder))


def test_a_folder_in_place_of_a_file_cannot_be_read(folder):
    (folder / "data_batch_5.bin").mkdir()
    with pytest.raises(ValueError, match="data_batch_5.bin cannot be read"):
        cifar.load(str(folder))


def test_without_a_folder_there_are_grey_digits():
    train, test = cifar.load(None)
    assert train.images.shape == (1078, 8, 8, 1) and test.images.shape == (719, 8, 8, 1)
    assert train.images.dtype == np.float32 and train.images.max() == 1


def test_the_images_held_out_are_no_longer_learned_from():
    images = np.arange(50, dtype=np.float32).reshape(50, 1, 1, 1)
    everything = cifar.Split(images, np.arange(50, dtype=np.int32))
    train, validation = cifar.hold_out(everything, 0.1, seed=0)
    assert len(train.labels) == 45 and len(validation.labels) == 5
    assert {*train.labels, *validation.labels} == {*range(50)}
    for split in (train, validation):
        np.testing.assert_array_equal(split.images.ravel(), split.labels)
    again = cifar.hold_out(everything, 0.1, seed=0)[1]
    np.testing.assert_array_equal(again.labels, validation.labels)
    other = cifar.hold_out(everything, 0.1, seed=1)[1]
    assert {*other.labels} != {*validation.labels}


def test_an_image_is_mirrored_and_shifted_into_a_black_frame_and_nothing_else():
    rng = np.random.default_rng(0)
    image = rng.uniform(0.1, 1, (10, 9, 3)).astype(np.float32)
    changed = cifar.augment(np.stack([image] * 600), np.random.default_rng(1))
    assert changed.shape == (600, 10, 9, 3) and changed.dtype == np.float32
    possible = {}
    for mirrored in (False, True):
        shown = image[:, ::-1] if mirrored else image
        framed = np.pad(shown, ((4, 4), (4, 4), (0, 0)))
        for down in range(9):
            for right in range(9):
                part = framed[down : down + 10, right : right + 9]
                possible[part.tobytes()] = (mirrored, down, right)
    assert len(possible) == 2 * 81
    seen = [possible[one.tobytes()] for one in changed]
    assert len({*seen}) > 150
    assert 0.4 < np.mean([mirrored for mirrored, _, _ in seen]) < 0.6


@pytest.mark.skipif(DATA is None, reason="STABLEGRAD_DATA names no folder")
def test_the_real_files_hold_ten_classes():
    train, test = cifar.load(str(Path(DATA) / "cifar10"))
    for split in (train, test):
        assert len(split.labels) % 1000 == 0
        assert split.images.shape == (len(split.labels), 32, 32, 3)
        counts = np.bincount(split.labels, minlength=10)
        assert counts.min() > 0.08 * len(split.labels)
        # The known means of the red, green and blue pixels.
        means = split.images.mean(axis=(0, 1, 2))
        np.testing.assert_allclose(means, [0.491, 0.482, 0.447], atol=0.01)
