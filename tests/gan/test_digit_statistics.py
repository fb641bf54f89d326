from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import Rank, on_ranks
from torch import Tensor

from cs324dist.distributed.sum_over import SumOver
from cs324dist.tasks.gan.images import LabelledImages, load_images, to_unit_range
from cs324dist.tasks.gan.statistics import DigitStatistics, digit_classifier

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


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_any_number_of_ranks_finds_the_same_to_the_last_bit(digits, whole, ranks: int) -> None:
    """Also with ranks that are left without images."""
    for found in on_ranks(ranks, of(digits.images)):
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], whole[name]) for name in whole)


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
