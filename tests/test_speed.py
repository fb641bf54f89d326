"""What `make bench` says of the measurement before, and the speedrun's task."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import speedrun
from speed import history, slower
from speedrun_gan import SpeedrunGAN

from cs324dist import MicroBatch
from cs324dist.tasks.base import Updater


@pytest.mark.parametrize(
    ("now", "named"),
    [
        ([1.0, 1.1, 1.2], []),
        ([1.2, 1.3, 1.4], []),  # within the spread
        ([1.3, 1.4, 1.5], ["slower: step takes 1.40 ms, before 1.10"]),
        ([0.1, 0.2, 0.3], []),
    ],
)
def test_only_what_is_slower_by_more_than_the_spread_is_named(now, named):
    assert [*slower({"step": now, "new": [9.0]}, {"step": [1.0, 1.1, 1.25], "old": [1.0]})] == named


def test_a_measurement_is_added_to_the_history_that_it_has():
    made_in = {"commit": "b" * 40, "device": "a processor", "threads": 2}
    older = {"commit": "a" * 40, "device": "a processor", "ratios": {"step": 2.0}}
    now = {"environment": made_in, "rows": [{"what": "step", "ratios": [1.0, 3.0, 1.5]}], "history": [older]}
    assert history(now) == [older, {"commit": "b" * 40, "device": "a processor", "ratios": {"step": 1.5}}]


def test_a_speedrun_is_added_as_means_to_the_records_that_it_has():
    made_in = {"commit": "b" * 40, "device": "a processor", "precision": "no", "threads": 2}
    rows = [
        {"seconds": seconds, "frechet_distance": distance, "environment": made_in}
        for seconds, distance in ((50.0, 28.0), (54.0, 29.0))
    ]
    older = {"commit": "a" * 40}
    record = {
        "commit": "b" * 40,
        "device": "a processor",
        "precision": "no",
        "recipe": "--steps 9",
        "runs": 2,
    }
    means = {"seconds": 52.0, "frechet_distance": 28.5}
    assert speedrun.records({"recipe": "--steps 9", "rows": rows, "history": [older]}) == [
        older,
        record | means,
    ]


class Untrained(Updater):
    """A trainer whose updates only remember the penalty."""

    def __init__(self, task: SpeedrunGAN, images: torch.Tensor) -> None:
        self.task, self.images = task, images
        self.penalties: list[float] = []

    def update(self, name: str, _loss) -> None:
        if name == "discriminator":
            batch = MicroBatch(0, len(self.images) // 2)
            self.penalties.append(float(self.task.logits_and_penalty(self.images, batch)[1]))


def test_the_speedrun_penalises_the_slope_of_the_logit_of_being_real_in_every_other_step():
    config = replace(SpeedrunGAN.presets["fast"], dataset="fake")
    task = SpeedrunGAN(config, torch.device("cpu"))
    random = torch.Generator().manual_seed(0)
    images = torch.rand(6, 1, 28, 28, generator=random)
    weights = torch.randn(784, 10, generator=random) / 28
    task.discriminator.forward = lambda some: some.flatten(1) @ weights

    trainer = Untrained(task, images)
    for number in range(4):
        task.step(number, trainer)

    def logit_of_real(pixels: torch.Tensor) -> float:
        return math.log(math.fsum(map(math.exp, (pixels.double() @ weights.double()).tolist())))

    signs = task.signs.signs(MicroBatch(0, 3).samples, 2 * 784).view(3, 2, 784)
    moves = [*signs[:, 0], *signs[:, 1]]
    slopes = [
        (logit_of_real(image + 0.05 * move) - logit_of_real(image)) / 0.05
        for image, move in zip(images.flatten(1), moves, strict=True)
    ]
    expected = 2 * 0.1 * math.fsum(slope**2 for slope in slopes) / len(slopes)
    assert trainer.penalties == [pytest.approx(expected, rel=1e-3), 0, pytest.approx(expected, rel=1e-3), 0]
