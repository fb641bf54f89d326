import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from cs324dist.tasks.gan.frechet import Moments, frechet_distance


def features(count: int, width: int, seed: int) -> Tensor:
    """Correlated, skewed, rectified like a classifier's."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return (
        torch.randn(count, width, generator=generator) @ mixing + torch.randn(width, generator=generator)
    ).relu()


def by_definition(a: np.ndarray, b: np.ndarray) -> float:
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b).real
    return float(
        np.sum((a.mean(0) - b.mean(0)) ** 2)
        + np.trace(covariance_a)
        + np.trace(covariance_b)
        - 2 * np.trace(root)
    )


def distance(a: Tensor, b: Tensor) -> float:
    return frechet_distance(Moments.of(a), Moments.of(b)).item()


@pytest.mark.parametrize("width", [2, 16])
def test_the_distance_is_the_definition_s_with_scipy_s_square_root(width: int) -> None:
    a, b = features(300, width, seed=0), features(500, width, seed=1)
    assert distance(a, b) == pytest.approx(by_definition(a.double().numpy(), b.double().numpy()), rel=1e-8)


def test_equal_moments_are_at_no_distance_even_with_fewer_samples_than_features() -> None:
    for count in (300, 10):
        a = features(count, 16, seed=0)
        scale = a.double().var(0).sum().item()
        assert distance(a, a) == pytest.approx(0, abs=1e-6 * scale)
        assert distance(a, a.flip(0)) == pytest.approx(0, abs=1e-6 * scale)


def test_the_sums_of_parts_add_up_to_the_whole_s() -> None:
    x = features(100, 5, seed=0)
    parts = [Moments.of(part) for part in x.split([1, 0, 60, 39])]
    whole = Moments.of(x)
    for sums in ("count", "total", "outer"):
        torch.testing.assert_close(sum(getattr(part, sums) for part in parts), getattr(whole, sums))
    assert whole.count == 100
    assert whole.outer.dtype == torch.float64
