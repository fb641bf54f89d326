"""What a classifier says of images; for digits, the project ships one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from cs324dist.distributed.sum_over import SumOver
from cs324dist.runs.models import read_tensors
from cs324dist.tasks.gan.classifier import DigitClassifier
from cs324dist.tasks.gan.frechet import Moments, frechet_distance

WEIGHTS = Path(__file__).with_name("classifier.safetensors")
SURE = 0.95  # confidence above which a digit counts as readable


@cache
def digit_classifier(device: torch.device) -> DigitClassifier:
    """The classifier that the project ships, made by `examples/classifier.py`."""
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
    """What the classifier says of many images, as float64 sums on the device."""

    sure: Float64[Tensor, ""]
    counts: Float64[Tensor, " 10"]
    moments: Moments

    @classmethod
    def of(
        cls,
        draw: Callable[[Int64[Tensor, " indices"]], Float[Tensor, "indices 1 28 28"]],
        count: int,
        sum_over: SumOver,
        classifier: DigitClassifier | None = None,
    ) -> "DigitStatistics":
        """Of the images in [-1, 1] that `draw` makes for the indices [0, count), over all processes."""

        def measure(indices: Int64[Tensor, " indices"]) -> dict[str, Tensor]:
            digits, confidence, features = read_digits(draw(indices), classifier)
            return {
                "sure": (confidence > SURE).sum(),
                "counts": digits.bincount(minlength=10),
                **vars(Moments.of(features)),
            }

        sums = sum_over(measure, count)
        return cls(sums.pop("sure"), sums.pop("counts"), Moments(**sums))

    def compared_with(self, reference: "DigitStatistics") -> dict[str, float]:
        """The Fréchet distance to `reference`, the share that can be read, and the share of each digit."""
        count = self.moments.count.item()
        return {
            "frechet_distance": frechet_distance(self.moments, reference.moments).item(),
            "sure": self.sure.item() / count,
            **{f"share_of_{digit}": n / count for digit, n in enumerate(self.counts.tolist())},
        }
