"""A step queues work and never asks for a value: a GPU would be waited for, and these models with it.

On a CPU the operations that would wait are caught as they are called; on a GPU torch itself says so.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cs324dist.distributed.process import start_accelerator
from cs324dist.tasks import classifier, gan, lstm

aten = torch.ops.aten
TASKS = {
    "LSTM": lambda: lstm.LSTMTask(replace(lstm.PRESETS["smoke"], curriculum=1.0), start_accelerator()),
    "GAN": lambda: gan.GANTask(replace(gan.PRESETS["smoke"], dataset="fake"), start_accelerator()),
    "GAN, report": lambda: gan.GANTask(replace(gan.PRESETS["course"], dataset="fake"), start_accelerator()),
    "classifier": lambda: classifier.ClassifierTask(
        replace(classifier.PRESETS["smoke"], dataset="fake"), start_accelerator()
    ),
}


class Waits(TorchDispatchMode):
    """Collects the operations whose outcome the host needs: a value, or how large the result is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        of_unknown_size = torch.Tag.dynamic_output_shape in operation.tags
        by_mask = operation is aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if operation is aten._local_scalar_dense.default or (
            of_unknown_size and (operation is not aten.index.Tensor or by_mask)
        ):
            self.seen.append(str(operation))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", TASKS)
def test_a_step_asks_for_no_value(name: str) -> None:
    task = TASKS[name]()
    task.step(0)  # the first may: it fills caches
    with Waits() as waits:
        task.step(1)
    assert waits.seen == []


def test_what_waits_is_seen() -> None:
    numbers = torch.arange(3)
    with Waits() as waits:
        numbers.sum().item()
        numbers[numbers > 1]
        numbers.unique()
    assert [name.split(".")[1] for name in waits.seen] == ["_local_scalar_dense", "index", "_unique2"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", TASKS)
def test_a_step_on_a_gpu_waits_for_nothing(name: str) -> None:
    task = TASKS[name]()
    for step in range(3):
        task.step(step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        task.step(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
