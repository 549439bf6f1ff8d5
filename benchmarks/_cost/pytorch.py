"""PyTorch's own step on the same sizes, on a CPU, where it is installed."""

from collections.abc import Callable

import numpy as np

from .problems import Problem

try:
    import torch
except ImportError:
    torch = None

import jax


def available() -> bool:
    """Whether PyTorch can be imported, and JAX runs on a CPU as it does here."""
    return torch is not None and jax.default_backend() == "cpu"


def steppers(problem: Problem) -> dict[str, Callable[[], None]]:
    """AdamW(foreach=True) alone, and behind `clip_grad_norm_(1.0)`."""
    assert torch is not None

    def stepper(clips: bool) -> Callable[[], None]:
        params = [
            torch.nn.Parameter(torch.from_numpy(np.array(x)))
            for x in jax.tree.leaves(problem.params)
        ]
        for param, grad in zip(params, jax.tree.leaves(problem.data), strict=True):
            param.grad = torch.from_numpy(np.array(grad))
        optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=1e-4, foreach=True)

        def step() -> None:
            if clips:
                torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
            optimizer.step()

        return step

    return {"torch AdamW": stepper(False), "torch clip_grad_norm_": stepper(True)}
