"""Fréchet distance between two sets of features, each seen as a normal distribution.

Heusel et al. 2017, "GANs trained by a two time-scale update rule": |m - m'|² + tr(C + C' - 2 (C C')^½).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor


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
    """Squared distance; 0 for equal moments."""
    (mean_a, covariance_a), (mean_b, covariance_b) = a.mean_and_covariance(), b.mean_and_covariance()
    root_a = _root(covariance_a)
    # tr (AB)^½ = tr (A^½ B A^½)^½, and that matrix is symmetric
    trace_of_root = _without_rounding(torch.linalg.eigvalsh(root_a @ covariance_b @ root_a)).sqrt().sum()
    return (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * trace_of_root


def _root(matrix: Float64[Tensor, "features features"]) -> Float64[Tensor, "features features"]:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * _without_rounding(values).sqrt()) @ vectors.T


def _without_rounding(values: Float64[Tensor, " features"]) -> Float64[Tensor, " features"]:
    """Eigenvalues that are zero but for rounding as zero: a square root makes 1e-8 of 1e-16."""
    smallest = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    return values.where(values > smallest, 0.0)
