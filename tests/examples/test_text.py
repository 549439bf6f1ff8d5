"""The examples' plain texts: what is read, and what is said of a broken one."""

import numpy as np
import pytest
import text

pytestmark = pytest.mark.slow


def test_the_default_is_english_that_python_ships_cut_nine_to_one():
    whole = text.load(None)
    assert len(whole.train) > 8 * len(whole.held_out) > 200_000
    assert whole.train.dtype == whole.held_out.dtype == np.int32
    assert whole.alphabet == "".join(sorted(set(whole.alphabet)))
    numbers = np.concatenate([whole.train, whole.held_out])
    assert set(numbers) == set(range(len(whole.alphabet)))
    assert " the " in whole.decode(whole.held_out)


def test_the_files_of_a_folder_are_joined_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"ende\r\n")
    (tmp_path / "a.txt").write_bytes("Anfang ß".encode())
    (tmp_path / "c.md").write_bytes(b"\xff not read")
    whole = text.load(str(tmp_path), context=1)
    assert len(whole.train) == 12
    joined = whole.decode(np.concatenate([whole.train, whole.held_out]))
    assert joined == "Anfang ßende\r\n"


@pytest.mark.parametrize(
    "files, message",
    [
        (None, r"folder is not a folder\."),
        ({"a.md": b"text"}, r"folder has no \*\.txt file\."),
        (
            {"a.txt": b"good", "b.txt": b"bad \xff"},
            r"b\.txt is not UTF-8: invalid start byte at byte 4\.",
        ),
        (
            {"a.txt": b"a" * 640},
            r"folder: the text has 640 characters; a context of 64 takes at least 641",
        ),
        ({"a.txt": b""}, "has 0 characters"),
    ],
)
def test_a_broken_text_is_named_with_what_is_wrong(files, message, tmp_path):
    folder = tmp_path / "folder"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text.load(str(folder))


def test_the_shortest_text_that_is_accepted_gives_a_window(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab" * 320 + b"c")
    whole = text.load(str(tmp_path))
    windows = text.spread(whole.held_out, 10, 64)
    assert windows.images.shape == windows.labels.shape == (1, 64)


def test_at_every_character_the_next_one_is_the_label():
    encoded = np.arange(100, dtype=np.int32)
    windows = text.batch(encoded, 50, 8, np.random.default_rng(0))
    np.testing.assert_array_equal(windows.labels, windows.images + 1)
    np.testing.assert_array_equal(np.diff(windows.images), 1)
    assert windows.labels.max() <= 99


@pytest.mark.parametrize("most, expected", [(3, 3), (100, 12)])
def test_held_out_windows_do_not_overlap_and_reach_both_ends(most, expected):
    windows = text.spread(np.arange(97, dtype=np.int32), most, 8)
    assert windows.images.shape == (expected, 8)
    assert windows.images[0, 0] == 0 and windows.labels[-1, -1] == 96
    assert np.diff(windows.images[:, 0]).min() >= 8


def test_the_trivial_loss_is_the_cross_entropy_of_the_shares():
    fair = text.Text(np.array([0, 1] * 500), np.array([0, 0, 1, 1]), "ab")
    assert fair.trivial_loss() == pytest.approx(np.log(2))
    skewed = text.Text(np.array([0] * 899 + [1] * 99), np.array([0] * 9 + [1]), "ab")
    assert skewed.trivial_loss() == pytest.approx(
        -0.9 * np.log(0.9) - 0.1 * np.log(0.1)
    )
    unseen = text.Text(np.array([0] * 98), np.array([1]), "ab")
    assert unseen.trivial_loss() == pytest.approx(np.log(100))
