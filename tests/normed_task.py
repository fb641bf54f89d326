"""A task with BatchNorm beside dropout, noise in some steps only, and clipping, for `same_bits.py`.

python tests/normed_task.py --steps 20 --micro-batches 4
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cs324dist import Config, Evaluation, MicroBatch, Stream, Task, accuracy, count_correct, main


class Normed(Task[Config]):
    """One step: which of two halves of a picture is brighter."""

    name = "normed"
    presets: ClassVar = {"fast": Config(batch_size=64, max_grad_norm=1.0)}

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        convolution = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.2)
        hidden = nn.Flatten(), nn.Linear(512, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.2)
        self.net = nn.Sequential(*convolution, *hidden, nn.Linear(16, 2)).to(device)
        self.networks = {"net": self.net}
        self.optimizers = {"net": torch.optim.AdamW(self.net.parameters(), 1e-2)}

    def pictures(self, name: str, samples: Tensor) -> tuple[Tensor, Tensor]:
        pictures = Stream(self.config.seed, name).normals(samples, 64).view(-1, 1, 8, 8)
        return pictures, (pictures[..., :4].sum((1, 2, 3)) > pictures[..., 4:].sum((1, 2, 3))).long()

    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        pictures, labels = self.pictures("train", batch.samples)
        if batch.step % 3 == 0:
            pictures = pictures + 0.1 * torch.randn_like(pictures)
        logits = self.net(pictures)
        loss = F.cross_entropy(logits, labels)
        return loss, {"loss": loss, "accuracy": accuracy(logits, labels)}

    def evaluate(self, sum_over) -> Evaluation:
        def count_right(items: Tensor) -> dict[str, Tensor]:
            pictures, labels = self.pictures("test", items)
            return {"right": count_correct(self.net(pictures), labels)}

        return Evaluation({"accuracy": sum_over(count_right, 1000)["right"].item() / 1000})


if __name__ == "__main__":
    main(Normed, __doc__)
