"""What a process hands to the collectives in a step of each task, in bytes.

python benchmarks/traffic.py
"""

import torch
import torch.distributed as dist
from common import Row, store, trainer_of
from torch import Tensor

MICRO_BATCHES = 2
TASKS = {"lstm": {}, "gan": {"dataset": "fake"}, "classifier": {"dataset": "fake"}}


def bytes_of_a_step(task: str, **changes: object) -> tuple[int, int]:
    """Gradients in float32, which DDP would hand over; and all that is handed over with --micro-batches."""
    trainer = trainer_of(task, "fast", micro_batches=MICRO_BATCHES, **changes)
    handed_over, all_reduce = [], dist.all_reduce

    def counted(tensor: Tensor, *arguments: object, **options: object) -> object:
        handed_over.append(tensor.nbytes)
        return all_reduce(tensor, *arguments, **options)

    dist.all_reduce = counted  # type: ignore[assignment]
    trainer.step(0, is_logged=False)
    dist.all_reduce = all_reduce
    parameters = {
        parameter
        for optimizer in trainer.task.optimizers.values()
        for group in optimizer.param_groups  # type: ignore[union-attr]
        for parameter in group["params"]
        if parameter.requires_grad
    }
    return sum(parameter.nbytes for parameter in parameters), sum(handed_over)


def traffic() -> list[Row]:
    """A row for each task."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    rows = []
    for task, changes in TASKS.items():
        ddp, exact = bytes_of_a_step(task, **changes)
        rows.append({"task": task, "ddp": ddp, "exact": exact})
    torch.distributed.destroy_process_group()
    return rows


if __name__ == "__main__":
    store("traffic", {"rows": traffic(), "micro_batches": MICRO_BATCHES})
