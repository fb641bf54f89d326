"""A loss that is no mean of equal parts: the gradient and the metrics are those of the whole batch.

So they are with --micro-batches: see test_gradients.py. As a script, this module takes some steps.
"""

import json
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cs324dist import Config, MicroBatch, Stream, Task, seeded
from cs324dist.distributed.process import start_accelerator
from cs324dist.errors import exit_process
from cs324dist.trainer import Trainer

STEPS, BATCH, LONGEST, RATE = 5, 12, 9, 0.3


def sequences(batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, labels, and which places of each sequence count: the longer, the later the sample."""
    inputs = Stream(0, "inputs").normals(batch.samples, LONGEST * 3).view(-1, LONGEST, 3)
    labels = Stream(0, "labels").integers(batch.samples, LONGEST, 2)
    lengths = 1 + batch.samples % BATCH * LONGEST // BATCH
    return inputs, labels, torch.arange(LONGEST) < lengths[:, None]


def model() -> nn.Module:
    with seeded(0, "weights"):
        return nn.Linear(3, 2)


class Weighted(Task[Config]):
    name = "weighted"
    presets: ClassVar = {"fast": Config(steps=STEPS, batch_size=BATCH, max_grad_norm=1.0)}

    def __init__(self, config, device):
        super().__init__(config, device)
        self.networks = {"model": model()}
        self.optimizers = {"model": torch.optim.SGD(self.networks["model"].parameters(), RATE)}

    def loss(self, batch):
        inputs, labels, mask = sequences(batch)
        logits = self.networks["model"](inputs[mask])
        total = F.cross_entropy(logits, labels[mask], reduction="sum")
        right = (logits.argmax(1) == labels[mask]).sum()
        metrics = {
            "loss": (total, mask.sum()),
            "accuracy": (right, len(logits)),
            "longest": mask.sum(1).max(),
        }
        return (total, mask.sum()), metrics


def plain_loop() -> dict:
    """What the same steps come to without the project: the mean over all places of the batch that count."""
    network, metrics = model(), []
    optimizer = torch.optim.SGD(network.parameters(), RATE)
    for step in range(STEPS):
        inputs, labels, mask = sequences(MicroBatch(step, BATCH))
        logits = network(inputs[mask])
        loss = F.cross_entropy(logits, labels[mask])
        accuracy = (logits.argmax(1) == labels[mask]).double().mean()
        metrics.append({"train/loss": loss.item(), "train/accuracy": accuracy.item()})
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return {"weights": {name: p.tolist() for name, p in network.state_dict().items()}, "metrics": metrics}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_with_ddp_it_is_the_plain_loop(launch, tmp_path, float64, processes):
    several = {"processes": processes} if processes > 1 else {}
    launch(__file__, tmp_path / "out", **several)
    found, expected = json.loads((tmp_path / "out").read_text()), plain_loop()
    for name, weights in expected["weights"].items():
        torch.testing.assert_close(
            *map(torch.tensor, (found["weights"][name], weights)), rtol=1e-12, atol=1e-12
        )
    for row, expected_row in zip(found["metrics"], expected["metrics"], strict=True):
        longest = [1 + sample * LONGEST // BATCH for sample in range(BATCH)]
        share = BATCH // processes
        means = [max(longest[part * share : (part + 1) * share]) for part in range(processes)]
        assert row.pop("train/longest") == pytest.approx(sum(means) / processes)
        assert row == pytest.approx(expected_row)


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    accelerator = start_accelerator()
    trainer = Trainer(task := Weighted(Weighted.presets["fast"], accelerator.device), accelerator)
    metrics = []
    for step in range(STEPS):
        trainer.step(step, is_logged=True)
        metrics.append(trainer.read_metrics())
    if accelerator.is_main_process:
        weights = {name: p.tolist() for name, p in task.networks["model"].state_dict().items()}
        Path(sys.argv[1]).write_text(json.dumps({"weights": weights, "metrics": metrics}))
    exit_process(0)
