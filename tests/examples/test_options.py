"""What the examples say of a bad option."""

import argparse
import sys

import cifar_resnet
import federated
import mnist_mlp
import optimizers
import options
import pytest
import rescue
import schedules
import structure
import transformer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        (
            rescue,
            ["--steps", "many"],
            "argument --steps: must be an integer >= 40, got 'many'",
        ),
        (rescue, ["--learning-rate", "nan"], "must be a finite number > 0, got 'nan'"),
        (
            rescue,
            ["--data-dir", "nowhere"],
            "nowhere has neither train-images-idx3-ubyte nor",
        ),
        (
            mnist_mlp,
            ["--epochs", "0"],
            "argument --epochs: must be an integer >= 1, got '0'",
        ),
        (
            mnist_mlp,
            ["--learning-rate", "inf"],
            "must be a finite number > 0, got 'inf'",
        ),
        (
            mnist_mlp,
            ["--batch-size", "2000"],
            "must be at most the 1078 training images, got 2000",
        ),
        (
            mnist_mlp,
            ["--data-dir", "nowhere"],
            "nowhere has neither train-images-idx3-ubyte nor",
        ),
        (
            schedules,
            ["--steps", "1"],
            "argument --steps: must be an integer >= 10, got '1'",
        ),
        (
            schedules,
            ["--batch-size", "2000"],
            "must be at most the 1078 training images, got 2000",
        ),
        (
            schedules,
            ["--data-dir", "nowhere"],
            "nowhere has neither train-images-idx3-ubyte nor",
        ),
        (
            structure,
            ["--depths", "4", "0"],
            "argument --depths: must be an integer >= 2, got '0'",
        ),
        (
            structure,
            ["--batch-size", "2000"],
            "must be at most the 1078 training images, got 2000",
        ),
        (
            structure,
            ["--data-dir", "nowhere"],
            "nowhere has neither train-images-idx3-ubyte nor",
        ),
        (
            cifar_resnet,
            ["--gradient-limit", "0"],
            "must be a finite number > 0, got '0'",
        ),
        (cifar_resnet, ["--devices", "99"], "argument --devices: there are only 8"),
        (
            cifar_resnet,
            ["--batch-size", "12"],
            "must be a multiple of the 8 devices, got 12",
        ),
        (
            cifar_resnet,
            ["--batch-size", "4000"],
            "must be at most the 970 training images, got 4000",
        ),
        (
            cifar_resnet,
            ["--data-dir", "nowhere"],
            "nowhere has none of data_batch_1.bin",
        ),
        (cifar_resnet, ["--resume"], "checkpoints has nothing to resume"),
        (transformer, ["--heads", "3"], "--heads must divide --width, got 3 and 64"),
        (transformer, ["--temperature", "0"], "must be a finite number > 0, got '0'"),
        (transformer, ["--data-dir", "nowhere"], "nowhere is not a folder."),
        (
            transformer,
            ["--context", "1000000"],
            "a context of 1000000 takes at least 10000001.",
        ),
        (
            federated,
            ["--rounds", "0"],
            "argument --rounds: must be an integer >= 1, got '0'",
        ),
        (federated, ["--limit", "nan"], "must be a finite number > 0, got 'nan'"),
        (
            federated,
            ["--batch-size", "500"],
            "argument --batch-size: must be at most the 10",
        ),
        (
            federated,
            ["--data-dir", "nowhere"],
            "nowhere has neither train-images-idx3-ubyte nor",
        ),
        (optimizers, ["--steps", "0"], "must be an integer >= 1, got '0'"),
        (optimizers, ["--data-dir", "nowhere"], "nowhere has neither train-images"),
        (optimizers, ["--candidates", "adamm"], "'adamm' has the unknown word 'adamm'"),
        (optimizers, ["--batch-size", "9999"], "must be <= 971 examples, got 9999"),
    ],
)
def test_a_bad_option_is_one_line_and_status_2(
    script, arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])
    try:
        status = script.main([*arguments, "--out", str(tmp_path)])
    except SystemExit as stopped:
        status = stopped.code
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert status == 2 and printed.out == ""
    assert line.startswith(f"{script.__name__}.py: error: ") and message in line


def test_numbers_are_bounded_where_steps_and_seeds_are_counted():
    assert options.whole(0)("2147483647") == 2147483647
    with pytest.raises(argparse.ArgumentTypeError, match="at most 2147483647, got"):
        options.whole(0)("2147483648")


def test_ctrl_c_ends_a_script_in_one_line(capsys):
    def stopped():
        raise KeyboardInterrupt

    for main, status in ((stopped, 130), (lambda: 0, 0), (lambda: 2, 2)):
        with pytest.raises(SystemExit) as ended:
            options.finish(main)
        assert ended.value.code == status
    assert capsys.readouterr().err == "interrupted\n"


def test_a_report_tells_its_own_command_line():
    told = options.command("benchmarks/gpt.py", ["--out", "a b.md", "--layers", 1])
    assert told == "python benchmarks/gpt.py --out 'a b.md' --layers 1"
