"""Smoke tests of the examples and benchmarks, on scikit-learn's own digits."""

import gzip
import json
import struct
import subprocess
import sys
from pathlib import Path

import digits
import faults
import numpy as np
import pytest
import rescue

pytestmark = pytest.mark.slow

RUNS = ("plain", "usual", "unprobed", "guarded", "reference")
EXAMPLES = Path(__file__).parents[2] / "examples"


def test_rescue_survives_all_faults_and_writes_what_it_says(tmp_path, capsys):
    status = rescue.main(["--steps", "600", "--out", str(tmp_path)])
    assert status == 0
    table = {
        line.split()[0]: line.split()
        for line in capsys.readouterr().out.splitlines()
        if "%" in line and line.split()[0] in RUNS
    }
    table = {name: row for name, row in table.items() if len(row) > 4}
    accuracy = {name: float(row[2]) for name, row in table.items()}
    assert accuracy["plain"] < 20
    assert accuracy["reference"] > 93
    assert accuracy["guarded"] > accuracy["reference"] - 3
    assert table["guarded"][-1] == "layers.0.kernel"
    assert (tmp_path / "rescue.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "telemetry.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 5 * 600
    guarded = [row for row in rows if row["run"] == "guarded"]
    plan = faults.Plan.over(600)
    for step in (plan.nan_batch, *plan.nan_burst):
        assert guarded[step]["skipped"] and guarded[step]["grad_norm"] is None
    assert guarded[-1]["guarded_steps"] == 600


def test_it_is_a_script(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "rescue.py"), "--steps", "many"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("rescue.py: error: argument --steps: must be an integer")


def write_idx(path, array):
    header = struct.pack(">I", 0x0800 + array.ndim)
    header += struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.astype(np.uint8).tobytes()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    else:
        path.write_bytes(data)


def write_mnist(folder):
    rng = np.random.default_rng(0)
    for part, size in (("train", 30), ("t10k", 10)):
        images = rng.integers(0, 256, (size, 28, 28))
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", rng.integers(0, 10, size))


def test_mnist_files_are_read_gzipped_or_not(tmp_path):
    write_mnist(tmp_path)
    train, test = digits.load(str(tmp_path))
    assert train.images.shape == (30, 784) and test.labels.shape == (10,)
    assert train.images.dtype == np.float32 and train.images.min() >= 0
    assert 0.9 < train.images.max() <= 1


def spoil_magic(folder):
    (folder / "train-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x03" + b"\x00" * 50)


def spoil_length(folder):
    path = folder / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1])


def spoil_gzip(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:100])


def spoil_count(folder):
    write_idx(folder / "train-labels-idx1-ubyte", np.zeros(7))


def spoil_labels(folder):
    write_idx(folder / "train-labels-idx1-ubyte", np.full(30, 11))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_magic, "train-labels-idx1-ubyte is not an IDX file"),
        (spoil_length, "t10k-labels-idx1-ubyte holds 9 bytes"),
        (spoil_gzip, "train-images-idx3-ubyte.gz cannot be read"),
        (spoil_count, "train has 30 images but 7 labels"),
        (spoil_labels, "train labels must be digits 0 to 9"),
    ],
)
def test_broken_data_is_named_with_what_is_wrong(spoil, message, tmp_path):
    write_mnist(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        digits.load(str(tmp_path))
