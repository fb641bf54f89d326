"""What the page says that real digits score."""

from pathlib import Path
from typing import Literal

import pytest

from cs324dist.data.images import load_images, to_unit_range
from cs324dist.metrics.digits import DigitStatistics
from cs324dist.report.page import FRECHET_FLOOR, SURE_OF_REAL


@pytest.mark.slow
def test_the_numbers_are_those_of_the_classifier_that_is_shipped(mnist_root: Path) -> None:
    def statistics(split: Literal["train", "test"]) -> DigitStatistics:
        images = load_images("mnist", split, mnist_root).images[:10_000]
        return DigitStatistics.of((to_unit_range(part) for part in images.split(500)), lambda local: local)

    test = statistics("test")
    distance = statistics("train").compared_with(test)["frechet_distance"]
    assert distance == pytest.approx(FRECHET_FLOOR, abs=0.02)
    assert test.compared_with(test)["sure"] == pytest.approx(SURE_OF_REAL, abs=0.002)
