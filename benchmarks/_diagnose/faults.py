"""The planted faults, and healthy networks: each one a case."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from .models import BUILDERS, Options

TUNED_ON = ("mlp_tanh", "conv_net", "gpt", "rnn")  # The other four only judge.


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, what is wrong with it, and what a report should say."""

    network: str
    kind: str  # The kind of fault; "healthy" without one.
    rule: str = ""  # The rule that should be the first cause.
    layers: tuple[str, ...] = ()  # Any of these; empty where no layer is to blame.
    edits: tuple[tuple[str, Callable[[np.ndarray], Any]], ...] = ()
    options: Options | None = None
    batch: Callable[[tuple], tuple] | None = None
    adam: tuple[tuple[str, float], ...] = ()  # rate, b2 and eps, where not the usual.
    warm: int = 0  # Steps of training before the fault sets in.
    loss_scale: float = 1.0  # From then on.
    seed: int = 0

    @property
    def built(self) -> Options:
        """The options of the network."""
        return self.options or BUILDERS[self.network][1]


def times(factor: float):
    return lambda leaf: factor * leaf


def plus(shift: float):
    return lambda leaf: leaf + shift


def scattered(size: float):
    """Biases of that size and random signs."""
    signs = lambda shape: np.random.default_rng(0).choice([-1.0, 1.0], shape)
    return lambda leaf: leaf + size * signs(leaf.shape)


def first(values):
    """One unit preferred by far."""

    def change(leaf):
        leaf = np.array(leaf)
        leaf[0] += values
        return leaf

    return change


def _large_inputs(batch):
    return 100.0 * batch[0], batch[1]


def _bad_shard(batch):
    x = np.array(batch[0])
    x[8:16] *= 200.0
    return x, batch[1]


def _nan_rows(batch):
    x = np.array(batch[0])
    x[5:7, 3] = np.nan
    return x, batch[1]


def _shuffled_labels(batch):
    return batch[0], np.random.default_rng(1).permutation(batch[1])


def _layer(network, kind, rule, name, leaf, change, **more) -> Case:
    return Case(network, kind, rule, (name,), ((leaf, change),), **more)


def _with(network: str, **changes) -> Options:
    return dataclasses.replace(BUILDERS[network][1], **changes)


def faults() -> list[Case]:
    """All of them."""
    large, small = ("weights x10", "weights_large"), ("weights x0.1", "weights_small")
    return [
        # Plain deep tanh network.
        _layer("mlp_tanh", *large, "layers.4", "layers.4.w", times(10)),
        _layer("mlp_tanh", *large, "layers.1", "layers.1.w", times(10), seed=1),
        _layer("mlp_tanh", *small, "layers.6", "layers.6.w", times(0.1)),
        _layer("mlp_tanh", *large, "head", "head.w", times(10)),
        _layer(
            "mlp_tanh", "saturated", "saturated", "layers.3", "layers.3.b", scattered(5)
        ),
        Case(
            "mlp_tanh",
            "all weights x0.3",
            "gain",
            edits=tuple((f"layers.{i}.w", times(0.3)) for i in range(8)),
        ),
        Case(
            "mlp_tanh",
            "sigmoid",
            "vanishing",
            options=_with("mlp_tanh", activation="sigmoid"),
        ),
        Case("mlp_tanh", "inputs x100", "input_size", batch=_large_inputs),
        Case("mlp_tanh", "rate x30", "rate", adam=(("rate", 0.1),)),
        Case("mlp_tanh", "epsilon", "epsilon", adam=(("eps", 0.1),)),
        # Equinox ReLU network.
        _layer("mlp_relu", *large, "layers.3", "layers.3.weight", times(10)),
        _layer("mlp_relu", *small, "layers.2", "layers.2.weight", times(0.1)),
        _layer(
            "mlp_relu",
            "dead units",
            "dead_units",
            "layers.2",
            "layers.2.bias",
            plus(-8),
        ),
        Case(
            "mlp_relu",
            "all weights x4",
            "gain",
            edits=tuple((f"layers.{i}.weight", times(4)) for i in range(6)),
        ),
        Case("mlp_relu", "labels shuffled", "labels", batch=_shuffled_labels),
        Case("mlp_relu", "nan examples", "bad_examples", batch=_nan_rows),
        Case("mlp_relu", "rate x30", "rate", adam=(("rate", 0.1),)),
        Case(
            "mlp_relu",
            "b2 too large",
            "stale_moment",
            adam=(("b2", 0.9999),),
            warm=100,
            loss_scale=30.0,
        ),
        # Linen convolutions.
        _layer("conv_net", *large, "Conv_2", "Conv_2.kernel", times(10)),
        _layer("conv_net", *small, "Conv_1", "Conv_1.kernel", times(0.1)),
        _layer(
            "conv_net", "dead units", "dead_units", "Conv_1", "Conv_1.bias", plus(-8)
        ),
        Case(
            "conv_net",
            "float16 overflow",
            "overflow16",
            ("Conv_2",),
            options=_with("conv_net", half=2, half_scale=3e4),
        ),
        Case("conv_net", "bad shard", "odd_rows", batch=_bad_shard),
        _layer(
            "conv_net",
            "nan weight",
            "nonfinite_parameters",
            "params.Conv_3.kernel",
            "Conv_3.kernel",
            lambda leaf: np.where(
                np.arange(leaf.size).reshape(leaf.shape) == 7, np.nan, leaf
            ),
        ),
        Case("conv_net", "rate x30", "rate", adam=(("rate", 0.1),)),
        Case("conv_net", "labels shuffled", "labels", batch=_shuffled_labels),
        # NNX ResNet with BatchNorm.
        _layer(
            "resnet",
            "norm scale x10",
            "norm_scale",
            "blocks.1.bn1",
            "blocks.1.bn1.scale",
            times(10),
        ),
        _layer(
            "resnet",
            "norm scale x10",
            "norm_scale",
            "blocks.2.bn2",
            "blocks.2.bn2.scale",
            times(10),
        ),
        _layer("resnet", *large, "head", "head.kernel", times(10)),
        Case(
            "resnet",
            "branch x20",
            "residual",
            ("blocks.2.bn2",),
            options=_with("resnet", branches=(1.0, 1.0, 20.0)),
        ),
        Case("resnet", "nan examples", "bad_examples", batch=_nan_rows),
        Case("resnet", "epsilon", "epsilon", adam=(("eps", 0.1),)),
        Case("resnet", "labels shuffled", "labels", batch=_shuffled_labels),
        # NNX pre-norm transformer.
        _layer(
            "gpt",
            "queries x20",
            "attention",
            "blocks.1.attn",
            "blocks.1.attn.query.kernel",
            times(20),
        ),
        _layer(
            "gpt",
            "keys x20",
            "attention",
            "blocks.2.attn",
            "blocks.2.attn.key.kernel",
            times(20),
        ),
        _layer("gpt", *large, "blocks.0.down", "blocks.0.down.kernel", times(10)),
        _layer("gpt", *large, "head", "head.kernel", times(10)),
        _layer(
            "gpt",
            "norm scale x10",
            "norm_scale",
            "blocks.1.norm2",
            "blocks.1.norm2.scale",
            times(10),
        ),
        Case(
            "gpt",
            "branch x20",
            "residual",
            ("blocks.1.down",),
            options=_with("gpt", branches=(1.0, 1.0, 1.0, 20.0)),
        ),
        Case("gpt", "rate x30", "rate", adam=(("rate", 0.1),)),
        Case("gpt", "epsilon", "epsilon", adam=(("eps", 0.01),)),
        # Linen post-norm transformer.
        _layer(
            "post_norm",
            "queries x20",
            "attention",
            "block1.attn",
            "block1.attn.query.kernel",
            times(20),
        ),
        _layer(
            "post_norm",
            "keys x20",
            "attention",
            "block0.attn",
            "block0.attn.key.kernel",
            times(20),
        ),
        Case(
            "post_norm",
            "branch x20",
            "residual",
            ("block1.down",),
            options=_with("post_norm", branches=(1.0, 1.0, 1.0, 20.0)),
        ),
        _layer("post_norm", *large, "head", "head.kernel", times(10)),
        Case(
            "post_norm",
            "float16 overflow",
            "overflow16",
            ("block1.up",),
            options=_with("post_norm", half=1, half_scale=6e4),
        ),
        Case("post_norm", "rate x30", "rate", adam=(("rate", 0.1),)),
        Case(
            "post_norm",
            "b2 too large",
            "stale_moment",
            adam=(("b2", 0.9999),),
            warm=100,
            loss_scale=30.0,
        ),
        # Recurrent network.
        _layer(
            "rnn",
            "recurrent x2",
            "through_time",
            "recurrent",
            "recurrent",
            times(2),
            options=_with("rnn", activation="relu"),
        ),
        _layer("rnn", *large, "inputs", "inputs", times(20)),
        _layer("rnn", *small, "recurrent", "recurrent", times(0.1)),
        Case("rnn", "nan examples", "bad_examples", batch=_nan_rows),
        Case("rnn", "rate x30", "rate", adam=(("rate", 0.3),)),
        # Equinox mixture of experts.
        _layer(
            "mixture",
            "router one-sided",
            "router",
            "routers.1",
            "routers.1.bias",
            first(12.0),
        ),
        _layer("mixture", *large, "experts.1.2.up", "experts.1.2.up.weight", times(10)),
        _layer(
            "mixture",
            "dead units",
            "dead_units",
            "experts.0.1.up",
            "experts.0.1.up.bias",
            plus(-9),
        ),
        Case("mixture", "inputs x100", "input_size", batch=_large_inputs),
        Case("mixture", "bad shard", "odd_rows", batch=_bad_shard),
        Case(
            "mixture",
            "branch x20",
            "residual",
            (
                "experts.1.0.down",
                "experts.1.1.down",
                "experts.1.2.down",
                "experts.1.3.down",
            ),
            options=_with("mixture", branches=(1.0, 20.0)),
        ),
    ]


def healthy() -> list[Case]:
    """Each architecture as it is, and after some training."""
    cases = [Case(name, "healthy") for name in BUILDERS]
    return cases + [Case(name, "healthy, trained", warm=200) for name in BUILDERS]


def cases(seed: int) -> list[Case]:
    """All of them from one seed of weights and batches."""
    every = [*faults(), *healthy()]
    return [dataclasses.replace(case, seed=seed + case.seed) for case in every]
