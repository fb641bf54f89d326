"""What the digit classifier that the project ships says of images, and the Fréchet distance between them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from cs324dist.distributed.sum_over import SumOver
from cs324dist.runs.models import read_tensors
from cs324dist.tasks.gan.networks import DigitClassifier

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
    images: Float[Tensor, "batch 1 28 28"],
) -> tuple[Int64[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, "batch 128"]]:
    """The digit of each image, the classifier's confidence in [0.1, 1], and its features."""
    classifier = digit_classifier(images.device)
    features = classifier.features(images.float())
    confidence, digits = classifier.output(features).softmax(dim=1).max(dim=1)
    return digits, confidence, features


@dataclass(frozen=True)
class Moments:
    """Sums from which mean and covariance follow; sums of parts add up, so ranks can share the work."""

    count: Float64[Tensor, ""]
    total: Float64[Tensor, " features"]
    outer: Float64[Tensor, "features features"]

    @classmethod
    def of(cls, features: Float[Tensor, "samples features"]) -> "Moments":
        """The sums over a batch."""
        x = features.double()
        return cls(torch.tensor(len(x), dtype=torch.float64, device=x.device), x.sum(0), x.T @ x)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """The covariance is the unbiased one."""
        mean = self.total / self.count
        return mean, (self.outer - self.count * mean[:, None] * mean) / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> Float64[Tensor, ""]:
    """Squared distance of two normal distributions; 0 for equal moments.

    Heusel et al. 2017, "GANs trained by a two time-scale update rule": |m - m'|² + tr(C + C' - 2 (C C')^½).
    """
    (mean_a, covariance_a), (mean_b, covariance_b) = a.mean_and_covariance(), b.mean_and_covariance()
    values, vectors = torch.linalg.eigh(covariance_a)
    root_a = (vectors * _without_rounding(values).sqrt()) @ vectors.T
    # tr (AB)^½ = tr (A^½ B A^½)^½, and that matrix is symmetric
    trace_of_root = _without_rounding(torch.linalg.eigvalsh(root_a @ covariance_b @ root_a)).sqrt().sum()
    return (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * trace_of_root


def _without_rounding(values: Float64[Tensor, " features"]) -> Float64[Tensor, " features"]:
    """Eigenvalues that are zero but for rounding as zero: a square root makes 1e-8 of 1e-16."""
    smallest = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    return values.where(values > smallest, 0.0)


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
    ) -> "DigitStatistics":
        """Of the images in [-1, 1] that `draw` makes for the indices [0, count), over all processes."""

        def measure(indices: Int64[Tensor, " indices"]) -> dict[str, Tensor]:
            digits, confidence, features = read_digits(draw(indices))
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
