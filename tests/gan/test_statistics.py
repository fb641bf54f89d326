"""What the GAN is measured by: a classifier of digits, what it says of many, and distances."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from ranks import Rank, on_ranks
from safetensors.torch import load_file
from torch import Tensor

from cs324dist.distributed.sum_over import SumOver
from cs324dist.tasks.gan.images import LabelledImages, load_images, to_unit_range
from cs324dist.tasks.gan.networks import DigitClassifier
from cs324dist.tasks.gan.statistics import (
    WEIGHTS,
    DigitStatistics,
    Moments,
    digit_classifier,
    frechet_distance,
)


def test_the_committed_weights_read_992_of_1000_test_digits(mnist_root: Path) -> None:
    test = load_images("mnist", "test", mnist_root)
    classifier, right = digit_classifier(torch.device("cpu")), 0
    assert not classifier.training
    with torch.no_grad():
        for images, labels in zip(test.images.split(500), test.labels.split(500), strict=True):
            logits = classifier(images[:, None].float() / 255 * 2 - 1)
            right += int((logits.argmax(1) == labels).sum())
    assert right >= 9920


def test_the_committed_file_is_small_and_holds_just_the_classifier() -> None:
    assert WEIGHTS.stat().st_size < 2_000_000
    DigitClassifier().load_state_dict(load_file(WEIGHTS), strict=True)


COUNT = 600  # two pieces


@pytest.fixture(scope="module")
def digits(mnist_root: Path) -> LabelledImages:
    test = load_images("mnist", "test", mnist_root)
    return LabelledImages(test.images[:COUNT], test.labels[:COUNT])


def sums(statistics: DigitStatistics) -> dict[str, Tensor]:
    return {"sure": statistics.sure, "counts": statistics.counts, **vars(statistics.moments)}


def of(images: Tensor) -> Callable[[SumOver], dict[str, Tensor]]:
    return lambda sum_over: sums(
        DigitStatistics.of(lambda indices: to_unit_range(images[indices]), len(images), sum_over)
    )


@pytest.fixture(scope="module")
def whole(digits: LabelledImages) -> dict[str, Tensor]:
    return on_ranks(1, of(digits.images))[0]  # in a thread of as many cores as the others


def test_they_count_what_the_classifier_says(digits: LabelledImages, whole: dict[str, Tensor]) -> None:
    classifier = digit_classifier(torch.device("cpu"))
    expected, sure, features = [0] * 10, 0, []
    with torch.no_grad():
        for image in digits.images:
            x = image[None, None].float() / 127.5 - 1
            logits = classifier(x)[0].double().tolist()
            expected[logits.index(max(logits))] += 1
            sure += 1 / sum(2.718281828459045 ** (y - max(logits)) for y in logits) > 0.95
            features.append(classifier.features(x)[0].double())
    assert whole["counts"].tolist() == expected
    assert whole["sure"] == sure
    assert 0 < sure < COUNT  # the threshold tells some apart
    assert whole["count"] == COUNT
    stacked = torch.stack(features)
    torch.testing.assert_close(whole["total"], stacked.sum(0), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(whole["outer"], stacked.T @ stacked, rtol=1e-5, atol=1e-2)


def test_they_are_compared_as_shares(digits: LabelledImages, whole: dict[str, Tensor]) -> None:
    sum_over = SumOver(Rank(0, 1))
    statistics, half = (
        DigitStatistics.of(lambda indices: to_unit_range(digits.images[indices]), count, sum_over)
        for count in (COUNT, COUNT // 2)
    )
    found = statistics.compared_with(statistics)
    assert found["frechet_distance"] == pytest.approx(0, abs=1e-4)
    assert found["sure"] == whole["sure"].item() / COUNT
    assert [found[f"share_of_{digit}"] for digit in range(10)] == (whole["counts"] / COUNT).tolist()
    assert half.compared_with(statistics)["frechet_distance"] > 1


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
