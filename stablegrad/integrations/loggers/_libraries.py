"""Writers for the loggers of other libraries: each takes the library's own object.

They close nothing: the caller closes the run or the summary writer that it opened.
"""

import importlib
import re
import time
from collections.abc import Mapping
from typing import Any

Numbers = Mapping[str, float | int]
REFUSED = re.compile(r"[^\w\-. :/]")  # By MLflow, in a name.


class TensorBoard:
    """Write scalars by a `SummaryWriter` of tensorboardX or PyTorch.

    Args:
        writer: `tensorboardX.SummaryWriter(folder)`, or the one of
            `torch.utils.tensorboard`.
        prefix: What the tags begin with: tags up to a slash are one group of charts.
    """

    def __init__(self, writer: Any, prefix: str = "stablegrad/"):
        """Take the writer."""
        self._writer, self._prefix = writer, prefix

    def write(self, step: int, numbers: Numbers) -> None:
        """Add one scalar a name."""
        for name, number in numbers.items():
            self._writer.add_scalar(self._prefix + name, number, step)


class WeightsAndBiases:
    """Log to a run of Weights & Biases, offline ones included.

    Args:
        run: What `wandb.init(...)` returned.
        prefix: What the names begin with: names up to a slash are one section.
    """

    def __init__(self, run: Any, prefix: str = "stablegrad/"):
        """Take the run."""
        self._run, self._prefix = run, prefix
        self._step = f"{prefix}step"
        run.define_metric(self._step)
        run.define_metric(f"{prefix}*", step_metric=self._step)

    def write(self, step: int, numbers: Numbers) -> None:
        """Log all numbers at once, against a step of their own, `{prefix}step`.

        They join the row of a later step that is logged already. Count the steps of
        `run.log` alike: W&B drops what is logged for a step before its last.
        """
        named = {self._prefix + name: number for name, number in numbers.items()}
        self._run.log({self._step: step, **named}, step=max(step, self._run.step))


class MLflow:
    """Log metrics to a run of MLflow.

    Characters that MLflow refuses in a name, such as `~`, become underscores.

    Args:
        run_id: The run, such as `mlflow.start_run().info.run_id`.
        prefix: What the names begin with.
        client: An `MlflowClient`; that of the current tracking server by default.

    Raises:
        ImportError: Without MLflow, the extra `mlflow`.
    """

    def __init__(self, run_id: str, prefix: str = "stablegrad/", client: Any = None):
        """Take the run."""
        try:
            self._mlflow = importlib.import_module("mlflow")
        except ImportError as error:
            raise ImportError(
                "`MLflow` needs MLflow: pip install 'stablegrad[mlflow]'"
            ) from error
        self._client = client or self._mlflow.MlflowClient()
        self._run_id, self._prefix = run_id, prefix

    def write(self, step: int, numbers: Numbers) -> None:
        """Log all numbers in one request."""
        now = int(1000 * time.time())
        named = [
            self._mlflow.entities.Metric(
                REFUSED.sub("_", self._prefix + name), float(number), now, step
            )
            for name, number in numbers.items()
        ]
        self._client.log_batch(self._run_id, metrics=named)


class CLU:
    """Write scalars by any `MetricWriter` of CLU.

    Args:
        writer: Such as `clu.metric_writers.create_default_writer(folder)`.
        prefix: What the names begin with.
    """

    def __init__(self, writer: Any, prefix: str = "stablegrad/"):
        """Take the writer."""
        self._writer, self._prefix = writer, prefix

    def write(self, step: int, numbers: Numbers) -> None:
        """Write all numbers at once."""
        named = {self._prefix + name: number for name, number in numbers.items()}
        self._writer.write_scalars(step, named)
