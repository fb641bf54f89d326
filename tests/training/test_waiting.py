"""A step queues work and never asks for a value, or a GPU would be waited for: torch itself says so there.

tests/gpu/ looks for it without a GPU.
"""

from dataclasses import replace

import pytest
import torch

from cs324dist.distributed.process import start_accelerator
from cs324dist.tasks import find_task
from cs324dist.trainer import Trainer

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
