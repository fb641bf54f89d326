"""The digit classifier that labels samples and measures distances: a third task for the same loop."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from cs324dist.command_line import POSITIVE, Count, OneOf
from cs324dist.data.images import DATASETS, load_images, to_unit_range
from cs324dist.data.streams import ShuffledEpochs, Stream
from cs324dist.distributed.batch_norm import convert_sync_batchnorm, freeze_cancelled_biases
from cs324dist.distributed.process import in_full_precision, seeded, shard
from cs324dist.metrics.accuracy import count_right_images, share_right
from cs324dist.models.digit_classifier import DigitClassifier
from cs324dist.settings import MUTABLE, BatchSize, RunSettings
from cs324dist.tasks.base import Evaluation, UntilStopped

LARGEST_SHIFT = 2  # pixels


@dataclass(frozen=True)
class ClassifierSettings(RunSettings):
    """Train the digit classifier."""

    preset: Annotated[str, OneOf("fast", "smoke"), MUTABLE] = "fast"
    """Recipe that the other defaults come from: fast (the committed weights'), smoke (seconds)."""

    steps: Annotated[Count, MUTABLE] = 3000
    batch_size: BatchSize = 128
    checkpoint_every: Annotated[Count, MUTABLE] = 1000

    dataset: Annotated[str, OneOf(*DATASETS)] = "mnist"
    """Images: mnist, fashion-mnist, or fake (noise, needs no files)."""

    data_root: Annotated[Path, MUTABLE] = Path("data")
    """Folder of the data sets, laid out as torchvision's; what is absent is fetched into it."""

    learning_rate: Annotated[float, POSITIVE] = 3e-3
    """Adam's step size at the start; it falls to zero over the run as half a cosine."""

    schedule_depends_on_steps = True

    def run_name(self) -> str:
        """The default run folder's name."""
        return f"classifier-{self.dataset}-{self.preset}-{self.seed}"


PRESETS = {
    "fast": ClassifierSettings(),
    "smoke": ClassifierSettings(
        preset="smoke", steps=20, evaluate_every=10, checkpoint_every=10, log_every=5
    ),
}


class ClassifierTask:
    """One step: a batch of images shifted by up to two pixels, cross-entropy, one Adam step."""

    def __init__(
        self, settings: ClassifierSettings, accelerator: Accelerator, dtype: torch.dtype = torch.float32
    ) -> None:
        self.settings, self.accelerator, self.dtype = settings, accelerator, dtype
        self.shard = shard(accelerator)
        self.train_set = load_images(settings.dataset, "train", settings.data_root).to(self.shard.device)
        self.test_set = load_images(settings.dataset, "test", settings.data_root).to(self.shard.device)
        self.order = ShuffledEpochs(settings.seed, "images/train", len(self.train_set.labels))
        self.shifts = Stream(settings.seed, "shifts/train")
        with seeded(settings.seed, "weights"):
            classifier = DigitClassifier().to(dtype)
        freeze_cancelled_biases(classifier)
        convert_sync_batchnorm(classifier, accelerator)
        optimizer = torch.optim.Adam(classifier.parameters(), settings.learning_rate, fused=True)
        self.model, self.optimizer = accelerator.prepare(classifier, optimizer)
        self.models = {"classifier": classifier}
        self.optimizers = {"classifier": optimizer}
        self.counters: dict[str, int] = {}
        self.counter_limits: dict[str, range] = {}

    def step(self, step: int) -> dict[str, Tensor]:
        """See `Task.step`."""
        indices = self.shard.batch(step, self.settings.batch_size)
        items = self.order.batch(self.shard, step, self.settings.batch_size)
        images = shifted(
            self.train_set.images[items], self.shifts.integers(indices, 2, 2 * LARGEST_SHIFT + 1)
        )
        labels = self.train_set.labels[items]
        logits = self.model(to_unit_range(images, self.dtype))
        loss = F.cross_entropy(logits, labels)
        self.accelerator.backward(loss)
        remaining = 0.5 * (1 + math.cos(math.pi * step / self.settings.steps))
        self.optimizer.param_groups[0]["lr"] = self.settings.learning_rate * remaining
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"train/loss": loss, "train/accuracy": share_right(logits, labels)}

    def evaluate(self, until_stopped: UntilStopped = iter) -> Evaluation:
        """Accuracy on the test set."""
        classifier = self.models["classifier"].eval()
        right = count_right_images(
            partial(in_full_precision, classifier),
            self.test_set,
            self.shard,
            self.dtype,
            until_stopped=until_stopped,
        )
        classifier.train()
        accuracy = self.accelerator.reduce(right, "sum").item() / len(self.test_set.labels)
        return Evaluation({"eval/accuracy": accuracy})


def shifted(images: Tensor, shifts: Tensor) -> Tensor:
    """Each image moved by its own (down, right) shift in [0, 2·LARGEST_SHIFT], less LARGEST_SHIFT."""
    size = images.shape[-1]
    padded = F.pad(images, [LARGEST_SHIFT] * 4)
    ahead = torch.arange(size, device=images.device)
    rows = (shifts[:, :1] + ahead)[:, :, None]
    columns = (shifts[:, 1:] + ahead)[:, None, :]
    return padded[torch.arange(len(images), device=images.device)[:, None, None], rows, columns]
