import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

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


class Pixels(nn.Module):
    """An extractor for torchmetrics: what it is given, flattened."""

    num_features = 16

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def torchmetrics_distance(a: Tensor, b: Tensor) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(Pixels().eval(), input_img_size=(1, 4, 4)).set_dtype(torch.float64)
        metric.update(a.double().view(-1, 1, 4, 4), real=True)
        metric.update(b.double().view(-1, 1, 4, 4), real=False)
        return metric.compute().item()


def distance(a: Tensor, b: Tensor) -> float:
    return frechet_distance(Moments.of(a), Moments.of(b)).item()


@pytest.mark.parametrize("width", [2, 16])
def test_the_distance_is_the_definition_s_with_scipy_s_square_root(width: int) -> None:
    a, b = features(300, width, seed=0), features(500, width, seed=1)
    assert distance(a, b) == pytest.approx(by_definition(a.double().numpy(), b.double().numpy()), rel=1e-8)


def test_the_distance_is_torchmetrics_s() -> None:
    a, b = features(300, 16, seed=2), features(500, 16, seed=3)
    assert distance(a, b) == pytest.approx(torchmetrics_distance(a, b), rel=1e-6)


def test_equal_moments_are_at_no_distance_even_with_fewer_samples_than_features() -> None:
    for count in (300, 10):
        a = features(count, 16, seed=0)
        scale = a.double().var(0).sum().item()
        assert distance(a, a) == pytest.approx(0, abs=1e-6 * scale)
        assert distance(a, a.flip(0)) == pytest.approx(0, abs=1e-6 * scale)


def test_the_distance_is_the_same_both_ways() -> None:
    a, b = features(300, 16, seed=0), features(500, 16, seed=1)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-9)


NUMBERS = st.lists(st.floats(-10, 10), min_size=4, max_size=4)
DEVIATIONS = st.lists(st.floats(0, 10), min_size=4, max_size=4)


@settings(deadline=None)
@given(NUMBERS, NUMBERS, DEVIATIONS, DEVIATIONS, st.integers(2, 10**6))
def test_of_independent_features_it_is_the_sum_of_squared_differences(m, n, s, t, count) -> None:
    def moments(mean: list[float], deviation: list[float]) -> Moments:
        mu, sigma = (torch.tensor(x, dtype=torch.float64) for x in (mean, deviation))
        outer = (count - 1) * sigma.square().diag() + count * mu[:, None] * mu
        return Moments(torch.tensor(float(count), dtype=torch.float64), count * mu, outer)

    expected = sum((a - b) ** 2 for a, b in zip(m, n, strict=True))
    expected += sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
    # A deviation of zero comes back as the root of a rounding error.
    assert frechet_distance(moments(m, s), moments(n, t)).item() == pytest.approx(
        expected, rel=1e-6, abs=2e-4
    )


def test_mean_and_covariance_are_numpy_s() -> None:
    x = features(50, 3, seed=0)
    mean, covariance = Moments.of(x).mean_and_covariance()
    np.testing.assert_allclose(mean.numpy(), x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance.numpy(), np.cov(x.double().numpy(), rowvar=False), rtol=1e-10)


def test_the_sums_of_parts_add_up_to_the_whole_s() -> None:
    x = features(100, 5, seed=0)
    parts = [Moments.of(part) for part in x.split([1, 0, 60, 39])]
    whole = Moments.of(x)
    for sums in ("count", "total", "outer"):
        torch.testing.assert_close(sum(getattr(part, sums) for part in parts), getattr(whole, sums))
    assert whole.count == 100
    assert whole.outer.dtype == torch.float64
