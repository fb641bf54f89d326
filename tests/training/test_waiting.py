"""A step queues work and never asks for a value: a GPU would be waited for, and these models with it.

On a CPU the operations that would wait are caught as they are called; on a GPU torch itself says so.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cs324dist.distributed.process import start_accelerator
from cs324dist.tasks import find_task
from cs324dist.trainer import Trainer

aten = torch.ops.aten
CASES = {
    "LSTM": ("lstm", "smoke", {"curriculum": 1.0}),
    "GAN": ("gan", "smoke", {"dataset": "fake"}),
    "GAN, course": ("gan", "course", {"dataset": "fake"}),
}


def trainer_of(case: str) -> Trainer:
    name, preset, changes = CASES[case]
    task_type, accelerator = find_task(name), start_accelerator()
    config = replace(task_type.presets[preset], **changes)
    return Trainer(task_type(config, accelerator.device), accelerator)


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


@pytest.mark.parametrize("case", CASES)
def test_a_step_asks_for_no_value(case: str) -> None:
    trainer = trainer_of(case)
    trainer.step(0, is_logged=True)  # the first may: it fills caches
    with Waits() as waits:
        trainer.step(1, is_logged=True)
    assert waits.seen == []


def test_what_waits_is_seen() -> None:
    numbers = torch.arange(3)
    with Waits() as waits:
        numbers.sum().item()
        numbers[numbers > 1]
        numbers.unique()
    assert [name.split(".")[1] for name in waits.seen] == ["_local_scalar_dense", "index", "_unique2"]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("case", CASES)
def test_a_step_on_a_gpu_waits_for_nothing(case: str) -> None:
    trainer = trainer_of(case)
    for step in range(3):
        trainer.step(step, is_logged=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(3, is_logged=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
