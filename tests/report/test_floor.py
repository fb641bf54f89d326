"""What the page says that real digits score."""

from pathlib import Path
from typing import Literal

import pytest
from accelerate import Accelerator

from cs324dist.distributed.sum_over import SumOver
from cs324dist.report.page import FRECHET_FLOOR, SURE_OF_REAL
from cs324dist.tasks.gan.images import load_images, to_unit_range
from cs324dist.tasks.gan.statistics import DigitStatistics


@pytest.mark.slow
def test_the_numbers_are_those_of_the_classifier_that_is_shipped(mnist_root: Path) -> None:
    sum_over = SumOver(Accelerator(cpu=True))

    def statistics(split: Literal["train", "test"]) -> DigitStatistics:
        images = load_images("mnist", split, mnist_root).images[:10_000]
        return DigitStatistics.of(lambda indices: to_unit_range(images[indices]), len(images), sum_over)

    test = statistics("test")
    distance = statistics("train").compared_with(test)["frechet_distance"]
    assert distance == pytest.approx(FRECHET_FLOOR, abs=0.02)
    assert test.compared_with(test)["sure"] == pytest.approx(SURE_OF_REAL, abs=0.002)
