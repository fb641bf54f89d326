"""Takes some steps of every task with --micro-batches, and writes digests of what must be the same.

torchrun --nproc_per_node 3 tests/exact_steps.py OUT
"""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cs324dist import Config, Evaluation, MicroBatch, Stream, Task
from cs324dist.data.streams import seed_everything
from cs324dist.distributed.process import start_accelerator
from cs324dist.errors import exit_process
from cs324dist.runs.checkpoints import tensors_by_file
from cs324dist.tasks import find_task
from cs324dist.trainer import Trainer

MICRO_BATCHES, STEPS = 4, 6
WIDE = 8192  # threads share sums over so many
EXAMPLES = Path(__file__).parents[1] / "examples"


class Mixed(Task[Config]):
    """BatchNorm beside dropout, with a loss that keeps something on the task and on a module."""

    name = "mixed"
    presets: ClassVar = {"fast": Config(batch_size=16, max_grad_norm=0.05)}

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        layers = nn.Linear(8, WIDE), nn.BatchNorm1d(WIDE), nn.Dropout(), nn.ReLU(), nn.Linear(WIDE, 2)
        self.net = nn.Sequential(*layers).to(device)
        self.net[0].register_forward_hook(keep_features)
        self.networks = {"net": self.net}
        self.optimizers = {"net": torch.optim.Adam(self.net.parameters(), 0.1)}

    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        numbers = Stream(0, "numbers").normals(batch.samples, 8)
        self.labels = (numbers.sum(1) > 0).long()
        logits = self.net(numbers)
        loss = F.cross_entropy(logits, self.labels) * self.net[0].features.square().mean()
        return loss, {"loss": loss}

    def evaluate(self, sum_over: Any) -> Evaluation:
        found = sum_over(lambda indices: {"drawn": torch.rand(len(indices)).sum()}, 1000, 100)
        return Evaluation({"drawn": found["drawn"].item()})


def keep_features(module: nn.Module, inputs: Any, output: Tensor) -> None:
    module.features = output.detach()


CASES: dict[str, tuple[type[Task[Any]] | str, dict[str, Any]]] = {
    "lstm": ("lstm", {"batch_size": 32, "length": 9}),
    "gan": ("gan", {"dataset": "fake", "batch_size": 16, "max_grad_norm": 0.05}),
    "mlp": (f"{EXAMPLES / 'mlp.py'}:MLPTask", {"batch_size": 32, "data": EXAMPLES / "spirals.csv"}),
    "mixed": (Mixed, {}),
}


def digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(
            name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()


def digests(case: str, accelerator: Any, **options: int) -> dict[str, Any]:
    """Of the tensors and metrics after a few steps, and of an evaluation."""
    task_type, changed = CASES[case]
    task_type = find_task(task_type) if isinstance(task_type, str) else task_type
    preset = next(iter(task_type.presets.values()))
    config = replace(preset, micro_batches=MICRO_BATCHES, steps=STEPS, **changed, **options)
    seed_everything(config.seed, "task", accelerator.device)
    trainer = Trainer(task := task_type(config, accelerator.device), accelerator)
    metrics = []
    for step in range(STEPS):
        trainer.step(step, is_logged=True)
        metrics.append(trainer.read_metrics())
    with trainer.evaluating():
        evaluation = task.evaluate(trainer.sum_over()).metrics
    return {
        "tensors": {file: digest(dict(some)) for file, some in tensors_by_file(task).items()},
        "metrics": metrics,
        "evaluation": dict(evaluation),
    }


def main(out: Path) -> None:
    accelerator = start_accelerator(micro_batches=MICRO_BATCHES)
    found = {case: digests(case, accelerator) for case in CASES}
    if accelerator.is_main_process:
        out.write_text(json.dumps(found, indent=1, sort_keys=True))
    exit_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
