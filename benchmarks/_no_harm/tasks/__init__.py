"""The healthy runs, one family a file."""

from ..task import Task
from . import (
    changing,
    classification,
    equations,
    generative,
    language,
    machinery,
    metric_learning,
    rare,
    reinforcement,
)

FAMILIES = (
    classification,
    language,
    changing,
    reinforcement,
    generative,
    metric_learning,
    equations,
    machinery,
    rare,
)
QUICK = (
    "digits-noisy-labels",
    "cosine-to-the-end",
    "successive-tasks",
    "every-16th-x50",
    "dqn",
    "rare-reward",
    "gan-lazy-r1",
    "triplet",
)


def every_task() -> list[Task]:
    """All of them, in the order of the table."""
    return [task for family in FAMILIES for task in family.tasks()]
