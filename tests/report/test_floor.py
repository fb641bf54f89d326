from pathlib import Path

import pytest

from cs324dist.report.floor import FRECHET_FLOOR, SURE_OF_REAL, measure


@pytest.mark.slow
def test_the_numbers_are_those_of_the_classifier_that_is_shipped(mnist_root: Path) -> None:
    distance, sure = measure(mnist_root)
    assert distance == pytest.approx(FRECHET_FLOOR, abs=0.02)
    assert sure == pytest.approx(SURE_OF_REAL, abs=0.002)
