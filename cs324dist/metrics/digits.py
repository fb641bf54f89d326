"""What a classifier says of images: of digits the one that the project ships."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from cs324dist.metrics.frechet import Moments, frechet_distance
from cs324dist.models.digit_classifier import DigitClassifier
from cs324dist.runs.models import read_tensors

WEIGHTS = Path(str(files("cs324dist.models"))) / "digit_classifier.safetensors"
SURE = 0.95  # confidence above which a digit counts as readable


@cache
def digit_classifier(device: torch.device) -> DigitClassifier:
    """The classifier that the project ships, made by `launch/classifier.py`."""
    classifier = DigitClassifier()
    classifier.load_state_dict(read_tensors(WEIGHTS, classifier.state_dict()))
    return classifier.eval().requires_grad_(False).to(device)


@torch.no_grad()
def read_digits(
    images: Float[Tensor, "batch 1 28 28"], classifier: DigitClassifier | None = None
) -> tuple[Int64[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, "batch 128"]]:
    """The digit of each image, the classifier's confidence in [0.1, 1], and its features.

    `classifier`, in eval mode, stands in for the one that the project ships.
    """
    classifier = classifier or digit_classifier(images.device)
    features = classifier.features(images.float())
    confidence, digits = classifier.output(features).softmax(dim=1).max(dim=1)
    return digits, confidence, features


@dataclass(frozen=True)
class DigitStatistics:
    """Sums over images, in float64 on the device; `reduce` adds up those of all ranks."""

    sure: Float64[Tensor, ""]
    counts: Float64[Tensor, " 10"]
    moments: Moments

    @classmethod
    def of(
        cls,
        batches: Iterable[Float[Tensor, "batch 1 28 28"]],
        reduce: Callable[[Tensor], Tensor],
        classifier: DigitClassifier | None = None,
    ) -> "DigitStatistics":
        """Of this rank's batches of images in [-1, 1], put together by `reduce`, a sum over ranks."""
        read = [read_digits(images, classifier) for images in batches]
        digits, confidence, features = (torch.cat(parts) for parts in zip(*read, strict=True))
        moments = Moments.of(features)
        return cls(
            reduce((confidence > SURE).sum(dtype=torch.float64)),
            reduce(digits.bincount(minlength=10).double()),
            Moments(reduce(moments.count), reduce(moments.total), reduce(moments.outer)),
        )

    def compared_with(self, reference: "DigitStatistics") -> dict[str, float]:
        """The Fréchet distance to `reference`, the share that can be read, and the share of each digit."""
        count = self.moments.count.item()
        return {
            "frechet_distance": frechet_distance(self.moments, reference.moments).item(),
            "sure": self.sure.item() / count,
            **{f"share_of_{digit}": n / count for digit, n in enumerate(self.counts.tolist())},
        }
