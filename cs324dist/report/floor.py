"""What real images score, to hold generated ones against.

python -m cs324dist.report.floor data

measures it again. The numbers stand here because that takes a minute and MNIST; they belong to the digit
classifier that the package ships.
"""

import sys
from pathlib import Path
from typing import Literal

from cs324dist.data.images import load_images, to_unit_range
from cs324dist.evaluation.digits import DigitStatistics
from cs324dist.evaluation.frechet import frechet_distance

FRECHET_FLOOR = 0.37  # six tens of thousands of training images: 0.29 to 0.47
SURE_OF_REAL = 0.975  # test images that the classifier is sure of


def measure(data_root: Path, parts: int = 6) -> tuple[float, float]:
    """The mean distance from 10 000 training images to the test images; the share of these that are sure."""

    def statistics(split: Literal["train", "test"], start: int) -> DigitStatistics:
        images = load_images("mnist", split, data_root).images[start : start + 10_000]
        return DigitStatistics.of((to_unit_range(part) for part in images.split(500)), lambda local: local)

    test = statistics("test", 0)
    distances = [
        frechet_distance(statistics("train", 10_000 * k).moments, test.moments) for k in range(parts)
    ]
    return sum(d.item() for d in distances) / parts, test.sure.item() / 10_000


if __name__ == "__main__":
    distance, sure = measure(Path(sys.argv[1]))
    print(f"FRECHET_FLOOR = {distance:.2f}\nSURE_OF_REAL = {sure:.3f}")
