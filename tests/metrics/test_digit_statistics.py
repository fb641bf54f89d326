from pathlib import Path

import pytest
import torch
from torch import Tensor

from cs324dist.data.images import LabelledImages, load_images, to_unit_range
from cs324dist.data.streams import Shard
from cs324dist.metrics.digits import DigitStatistics, digit_classifier, read_digits

COUNT = 500


@pytest.fixture(scope="module")
def digits(mnist_root: Path) -> LabelledImages:
    test = load_images("mnist", "test", mnist_root)
    return LabelledImages(test.images[:COUNT], test.labels[:COUNT])


def own_share(tensor: Tensor) -> Tensor:
    """What `reduce` is in a world of one process."""
    return tensor


def sums(statistics: DigitStatistics) -> dict[str, Tensor]:
    moments = statistics.moments
    return {
        "sure": statistics.sure,
        "counts": statistics.counts,
        "count": moments.count,
        "total": moments.total,
        "outer": moments.outer,
    }


def of_shard(images: Tensor, shard: Shard, batch: int) -> DigitStatistics:
    indices = shard.samples(0, len(images)).split(batch)
    return DigitStatistics.of((to_unit_range(images[part]) for part in indices), own_share)


@pytest.fixture(scope="module")
def whole(digits: LabelledImages) -> dict[str, Tensor]:
    return sums(DigitStatistics.of([to_unit_range(digits.images)], own_share))


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


def test_three_shards_in_small_batches_add_up_to_the_whole(digits, whole) -> None:
    shares = [sums(of_shard(digits.images, Shard(rank, 3), batch=64)) for rank in range(3)]
    assert [share["count"].item() for share in shares] == [167, 167, 166]
    added = {name: sum(share[name] for share in shares) for name in whole}
    torch.testing.assert_close(added, whole, rtol=1e-5, atol=1e-3)


def test_every_sum_is_reduced_once(digits: LabelledImages) -> None:
    batches = [to_unit_range(digits.images[:20])]
    alone = sums(DigitStatistics.of(batches, own_share))
    twins = sums(DigitStatistics.of(batches, lambda tensor: 2 * tensor))  # two ranks with the same share
    torch.testing.assert_close(twins, {name: 2 * tensor for name, tensor in alone.items()})


def test_a_rank_left_without_images_adds_nothing(digits: LabelledImages) -> None:
    nothing = sums(of_shard(digits.images[:2], Shard(2, 3), batch=500))
    assert not any(tensor.any() for tensor in nothing.values())


def test_test_digits_are_read_right_and_surely(digits: LabelledImages) -> None:
    found, confidence, features = read_digits(to_unit_range(digits.images, torch.bfloat16))
    assert (found == digits.labels).float().mean() > 0.97
    assert ((confidence >= 0.1) & (confidence <= 1)).all()
    assert confidence.median() > 0.99
    assert (features.shape, features.dtype) == ((COUNT, 128), torch.float32)
