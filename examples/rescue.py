"""Four runs, one set of faults: what guards a training run, and what does not.

    command:   pip install -e ".[examples]" && python examples/rescue.py
    hardware:  two CPU cores; the same script runs unchanged on a GPU or TPU
    time:      under one minute, compilation included
    expected:  the plain run ends at chance (about 10 % accuracy), the guarded run within
               one percentage point of the reference, which saw no fault

A ReLU network (784 or 64 inputs - 128 - 64 - 10) learns handwritten digits four times,
from the same weights and the same batches:

    plain      optax.adamw
    usual      clip_by_global_norm(1.0) and adamw under apply_if_finite, the usual remedy
    guarded    optax.adamw under stablegrad.stabilize
    reference  optax.adamw, without any of the faults

The faults, in order: a batch of nan pixels; a batch whose inputs are 1e20 too large; a
stretch of mislabelled batches; three nan batches in a row; and a learning rate far above
the stable one, until the end.
"""

import argparse
import gzip
import json
import math
import struct
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import stablegrad as sg

CHUNK = 50  # Steps between two reads of the device, for the progress bar.


class Digits(nnx.Module):
    """Inputs - 128 - 64 - 10, ReLU."""

    def __init__(self, inputs: int, rngs: nnx.Rngs):
        he = nnx.initializers.he_normal()
        self.layers = nnx.List(
            [
                nnx.Linear(n_in, n_out, kernel_init=he, rngs=rngs)
                for n_in, n_out in ((inputs, 128), (128, 64), (64, 10))
            ]
        )

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)
