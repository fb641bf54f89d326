"""Train the same on one process or many: a loop, two tasks, and tasks of your own."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

PARENT = os.getppid()  # at the start, before the seconds that importing torch takes

if TYPE_CHECKING:
    from cs324dist.config import MUTABLE, BatchSize, Config, Count, Fraction, Positive
    from cs324dist.data.loader import loader
    from cs324dist.data.streams import MicroBatch, ShuffledEpochs, Stream, seeded
    from cs324dist.distributed.exact import ExactGradients
    from cs324dist.distributed.sum_over import SumOver
    from cs324dist.errors import UserError
    from cs324dist.metrics import accuracy, count_correct
    from cs324dist.run import Run
    from cs324dist.runs.models import load_model
    from cs324dist.runs.trained import load_network
    from cs324dist.tasks.base import Evaluation, Task
    from cs324dist.tasks.gan.sampling import load_generator

_PLACES = {
    "config": ("MUTABLE", "BatchSize", "Config", "Count", "Fraction", "Positive"),
    "data.loader": ("loader",),
    "data.streams": ("MicroBatch", "ShuffledEpochs", "Stream", "seeded"),
    "distributed.exact": ("ExactGradients",),
    "distributed.sum_over": ("SumOver",),
    "errors": ("UserError",),
    "metrics": ("accuracy", "count_correct"),
    "run": ("Run",),
    "runs.models": ("load_model",),
    "runs.trained": ("load_network",),
    "tasks.base": ("Evaluation", "Task"),
    "tasks.gan.sampling": ("load_generator",),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}
__all__ = [
    "MUTABLE", "BatchSize", "Config", "Count", "Evaluation", "ExactGradients", "Fraction", "MicroBatch",
    "Positive", "Run", "ShuffledEpochs", "Stream", "SumOver", "Task", "UserError", "accuracy",
    "count_correct", "load_generator", "load_model", "load_network", "loader", "main", "seeded",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a script that only reads JSON need not wait for torch."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def fix_hash_seed() -> None:
    """Start the script again with PYTHONHASHSEED=0, unless it is set: a set of words is in its order."""
    if "PYTHONHASHSEED" not in os.environ:
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main(task: "str | type[Task[Any]]", description: str | None) -> None:
    """Train a task as the command line says: what a training script calls.

    Exits with 0 when done, 1 when the run failed, 2 when the input was refused, 75 when it was stopped early.

    Args:
        task: a `Task`, or the name of one: lstm, gan, path/file.py:Class, package.module:Class.
        description: shown by `--help`, such as the script's `__doc__`.
    """
    from cs324dist.errors import errors_as_exit_codes

    with errors_as_exit_codes():
        from cs324dist.loop import main

        main(task, description)
