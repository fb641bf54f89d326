"""A second judge of samples: another network than the project's classifier, trained by a plain loop."""

import torch
from accelerate import Accelerator
from common import REPOSITORY, Row
from torch import Tensor, nn
from torch.nn import functional as F

from cs324dist.data.images import load_images, to_unit_range
from cs324dist.distributed.sum_over import SumOver
from cs324dist.metrics.digits import DigitStatistics
from cs324dist.metrics.generators import FLOOR
from cs324dist.models.digit_classifier import DigitClassifier

BATCH, PASSES, SHIFT = 128, 6, 2


class Judge(DigitClassifier):
    """Three convolutions with strides in place of pooling, GELU, dropout in place of BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 4, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.GELU(),
            nn.Flatten(), nn.Dropout(0.5),
        )  # fmt: skip
        self.hidden = nn.Sequential(nn.Linear(64 * 7 * 7, 128), nn.GELU())


def trained_judge(seed: int = 1) -> Judge:
    """It sees each batch shifted by up to two pixels."""
    torch.manual_seed(seed)
    train, judge = load_images("mnist", "train", REPOSITORY / "data"), Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PASSES * (len(train.labels) // BATCH))
    for _ in range(PASSES):
        for items in torch.randperm(len(train.labels)).split(BATCH)[:-1]:
            top, left = torch.randint(2 * SHIFT + 1, (2,)).tolist()
            padded = F.pad(to_unit_range(train.images[items]), [SHIFT] * 4, value=-1.0)
            images = padded[..., top : top + 28, left : left + 28]
            F.cross_entropy(judge(images), train.labels[items].long()).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return judge.eval().requires_grad_(False)


def opinions(samples: dict[str, Tensor]) -> list[Row]:
    """What it says of test images, training images and samples: distance to the test images, sure share."""
    judge, sum_over = trained_judge(), SumOver(Accelerator(cpu=True))
    train, test = (load_images("mnist", split, REPOSITORY / "data") for split in ("train", "test"))
    real = {"test images": to_unit_range(test.images), "training images": to_unit_range(train.images[:FLOOR])}
    said = {
        name: DigitStatistics.of(lambda indices, some=some: some[indices], len(some), sum_over, judge)
        for name, some in {**real, **samples}.items()
    }
    digits = torch.cat([judge(some).argmax(dim=1) for some in real["test images"].split(500)])
    accuracy = (digits == test.labels).double().mean().item()
    reference = said["test images"]
    return [
        {"images": name, "accuracy": accuracy, **each.compared_with(reference)} for name, each in said.items()
    ]
