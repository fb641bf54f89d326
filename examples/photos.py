"""A classifier of photos in folders: worker processes, augmentation, BatchNorm, warm-up and cosine.

python examples/shapes.py runs/shapes && python examples/photos.py --data runs/shapes

The first command draws shapes, to have something to try it on. The second reads at least 95 % of those held
out right after its 150 steps, which take less than a minute on two cores. Of your own photos, make a folder
for each class:

torchrun --nproc_per_node 3 examples/photos.py --data my_photos --micro-batches 4
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms import v2

from cs324dist import (
    MUTABLE,
    Config,
    Evaluation,
    MicroBatch,
    Positive,
    Task,
    UserError,
    accuracy,
    count_correct,
    loader,
    main,
    seeded,
)

SIZE = 32  # pixels; larger photos are scaled down
HELD_OUT = 6  # every sixth photo is not trained on
TRAIN = [v2.RandomHorizontalFlip(), v2.RandomCrop(SIZE, padding=3), v2.ColorJitter(0.3, 0.3)]
AS_TENSOR = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]


@dataclass(frozen=True)
class PhotosConfig(Config):
    """Train a classifier of photos."""

    data: Path = Path("photos")
    """Folder of photos, in a folder for each class."""

    workers: Annotated[int, Interval(ge=0, le=99), MUTABLE] = 2
    """Processes that load photos, for each process that trains."""

    learning_rate: Positive = 2e-3
    """AdamW's largest learning rate."""


class Photos(Dataset):
    """Photos and their classes."""

    def __init__(self, files: list[Path], classes: list[str], augmentation: list) -> None:
        self.files, self.classes = files, classes
        self.transform = v2.Compose([v2.Resize((SIZE, SIZE)), *augmentation, *AS_TENSOR])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        try:
            with Image.open(self.files[item]) as photo:
                return self.transform(photo.convert("RGB")), self.classes.index(self.files[item].parent.name)
        except OSError as error:
            raise UserError(f"{self.files[item]} cannot be read: {error}") from None


def block(inputs: int, outputs: int) -> list[nn.Module]:
    """Halves the size of its input."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


class PhotosTask(Task[PhotosConfig]):
    """One step: a batch of augmented photos, cross-entropy with smoothed labels."""

    name = "photos"
    presets: ClassVar = {
        "fast": PhotosConfig(
            steps=150, evaluate_every=50, checkpoint_every=50, schedule="cosine", warmup_steps=15
        )
    }

    def __init__(self, config: PhotosConfig, device: torch.device) -> None:
        super().__init__(config, device)
        files = sorted(file for file in config.data.glob("*/*") if file.is_file())
        if not files:
            problem = "holds no photos" if config.data.is_dir() else "is no folder"
            raise UserError(f"--data {config.data} {problem}: give one that has a folder for each class")
        classes = sorted({file.parent.name for file in files})
        held_out = files[::HELD_OUT]
        train = Photos(sorted({*files} - {*held_out}), classes, TRAIN)
        self.train = loader(train, config.seed, "photos/train", workers=config.workers)
        self.test, self.test_count = loader(Photos(held_out, classes, []), config.seed, "test"), len(held_out)
        with seeded(config.seed, "weights"):
            layers = [*block(3, 16), *block(16, 32), *block(32, 64), nn.Flatten()]
            self.model = nn.Sequential(*layers, nn.Linear(64 * (SIZE // 8) ** 2, len(classes))).to(device)
        self.networks = {"classifier": self.model}
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimizers = {"classifier": torch.optim.AdamW(groups, config.learning_rate)}

    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the classes."""
        photos, labels = self.train.batch(batch)
        logits = self.model(photos)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        return loss, {"loss": loss, "accuracy": accuracy(logits, labels)}

    def evaluate(self, sum_over) -> Evaluation:
        """Accuracy on the photos held out."""

        def count_right(items: Tensor) -> dict[str, Tensor]:
            photos, labels = self.test.items(items)
            return {"right": count_correct(self.model(photos), labels)}

        right = sum_over(count_right, self.test_count)["right"]
        return Evaluation({"accuracy": right.item() / self.test_count})


if __name__ == "__main__":
    main(PhotosTask, __doc__)
