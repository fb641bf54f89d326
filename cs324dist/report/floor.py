"""What real images score, to hold generated ones against.

python -m cs324dist.report.floor data

measures it again. The numbers stand here because that takes a while and MNIST; they belong to the digit
classifier that the package ships.
"""

import sys
from pathlib import Path
from typing import Literal

from cs324dist.data.images import load_images, to_unit_range
from cs324dist.evaluation.digits import DigitStatistics

FRECHET_FLOOR = 3.46  # the first 10 000 training images; other tens of thousands: 2.10 to 3.85
SURE_OF_REAL = 0.974  # test images that the classifier is sure of


def measure(data_root: Path) -> tuple[float, float]:
    """The distance from 10 000 training images to the test images; the share of these that are sure."""

    def statistics(split: Literal["train", "test"]) -> DigitStatistics:
        images = load_images("mnist", split, data_root).images[:10_000]
        return DigitStatistics.of((to_unit_range(part) for part in images.split(500)), lambda local: local)

    test = statistics("test")
    found = [part.compared_with(test) for part in (statistics("train"), test)]
    return found[0]["frechet_distance"], found[1]["sure"]


if __name__ == "__main__":
    distance, sure = measure(Path(sys.argv[1]))
    print(f"FRECHET_FLOOR = {distance:.2f}\nSURE_OF_REAL = {sure:.3f}")
