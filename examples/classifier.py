"""The digit classifier whose weights the package ships, which label samples and measure distances.

CS324DIST_THREADS=1 python examples/classifier.py
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cs324dist import (
    MUTABLE,
    BatchSize,
    Config,
    Count,
    Evaluation,
    MicroBatch,
    Positive,
    ShuffledEpochs,
    Stream,
    Task,
    accuracy,
    count_correct,
    main,
    seeded,
)
from cs324dist.config import ScheduleName
from cs324dist.tasks.gan.images import load_images, to_unit_range
from cs324dist.tasks.gan.networks import DigitClassifier

LARGEST_SHIFT = 2  # pixels


@dataclass(frozen=True)
class ClassifierConfig(Config):
    """Train the digit classifier."""

    preset: Annotated[str, MUTABLE] = "fast"
    """Recipe that the other defaults come from: fast (of the weights in the package), smoke (seconds)."""

    steps: Annotated[Count, MUTABLE] = 3000
    batch_size: BatchSize = 128
    checkpoint_every: Annotated[Count, MUTABLE] = 1000
    schedule: ScheduleName = "cosine"

    dataset: Literal["mnist", "fake"] = "mnist"
    """Images: mnist, or fake (noise, needs no files)."""

    data_root: Annotated[Path, MUTABLE] = Path("data")
    """Folder of the data sets, in torchvision's layout; missing files are fetched into it."""

    learning_rate: Positive = 3e-3
    """Adam's learning rate at the start."""


class ClassifierTask(Task[ClassifierConfig]):
    """One step: a batch of images shifted by up to two pixels, cross-entropy."""

    name = "classifier"
    presets: ClassVar = {
        "fast": ClassifierConfig(),
        "smoke": replace(ClassifierConfig(), steps=20, evaluate_every=10, checkpoint_every=10, log_every=5),
    }

    def __init__(self, config: ClassifierConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.train_set, self.test_set = (
            load_images(config.dataset, split, config.data_root).to(device) for split in ("train", "test")
        )
        self.order = ShuffledEpochs(config.seed, "images/train", len(self.train_set.labels))
        self.shifts = Stream(config.seed, "shifts/train")
        with seeded(config.seed, "weights"):
            self.classifier = DigitClassifier().to(device)
        self.networks = {"classifier": self.classifier}
        self.optimizers = {
            "classifier": torch.optim.Adam(self.classifier.parameters(), config.learning_rate, fused=True)
        }

    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the digits."""
        items = self.order.items(batch)
        shifts = self.shifts.integers(batch.samples, 2, 2 * LARGEST_SHIFT + 1)
        images, labels = shifted(self.train_set.images[items], shifts), self.train_set.labels[items]
        logits = self.classifier(to_unit_range(images))
        loss = F.cross_entropy(logits, labels)
        return loss, {"loss": loss, "accuracy": accuracy(logits, labels)}

    def evaluate(self, sum_over) -> Evaluation:
        """Accuracy on the test set."""
        images, labels = self.test_set.images, self.test_set.labels

        def count_right(items: Tensor) -> dict[str, Tensor]:
            return {"right": count_correct(self.classifier(to_unit_range(images[items])), labels[items])}

        right = sum_over(count_right, len(labels))["right"]
        return Evaluation({"accuracy": right.item() / len(labels)})


def shifted(images: Tensor, shifts: Tensor) -> Tensor:
    """Each image moved down and right by its own shift in [0, 2·LARGEST_SHIFT], less LARGEST_SHIFT."""
    size = images.shape[-1]
    padded = F.pad(images, [LARGEST_SHIFT] * 4)
    ahead = torch.arange(size, device=images.device)
    rows = (shifts[:, :1] + ahead)[:, :, None]
    columns = (shifts[:, 1:] + ahead)[:, None, :]
    return padded[torch.arange(len(images), device=images.device)[:, None, None], rows, columns]


if __name__ == "__main__":
    main(ClassifierTask, __doc__)
