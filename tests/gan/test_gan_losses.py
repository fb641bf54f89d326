"""The GAN's losses, against sums over samples and classes that are written out here."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cs324dist.data.streams import MicroBatch
from cs324dist.tasks.gan.images import load_images, to_unit_range
from cs324dist.tasks.gan.task import FAST, GANTask

BATCH, CLASSES, WEIGHT = 6, 10, 0.25


class Linear(nn.Module):
    """A discriminator whose logits, and their slopes, can be computed by hand."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weights = torch.randn(784, classes, generator=torch.Generator().manual_seed(1)) / 28

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weights


def task(**changes) -> GANTask:
    config = replace(FAST, dataset="fake", batch_size=BATCH, **{"label_weight": WEIGHT, **changes})
    made = GANTask(config, torch.device("cpu"))
    made.discriminator = Linear(CLASSES if config.label_weight else 1)
    return made


def step(made: GANTask) -> tuple[float, float, list[list[float]], list[list[float]], list[int]]:
    """Both losses, the logits of the real images and of the fakes, and the real images' labels."""
    batch = MicroBatch(0, BATCH)
    of_generator, of_discriminator = (
        loss(batch)[0] for loss in (made.generator_loss, made.discriminator_loss)
    )
    items = made.order.items(batch)
    images = load_images("fake", "train", made.config.data_root)
    real, fake = (
        made.discriminator(some).tolist() for some in (to_unit_range(images.images[items]), made.fakes[0])
    )
    return of_generator.item(), of_discriminator.item(), real, fake, images.labels[items].tolist()


def chances(logits: list[float]) -> list[float]:
    """The probabilities of each class, and of being generated, whose logit is zero."""
    weights = [*map(math.exp, logits), 1.0]
    return [weight / math.fsum(weights) for weight in weights]


def mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


@pytest.mark.parametrize("weight", [0.0, WEIGHT, 1.0])
def test_the_generator_makes_fakes_real_and_of_their_likeliest_class(weight):
    found, _, _, fake, _ = step(task(label_weight=weight))
    expected = mean(-math.log(1 - chances(logits)[-1]) for logits in fake)
    if weight:
        expected += weight * mean(-math.log(max(chances(one)[:-1]) / sum(chances(one)[:-1])) for one in fake)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, WEIGHT, 1.0])
def test_the_discriminator_tells_real_from_fake_and_the_classes_of_the_real(weight):
    _, found, real, fake, labels = step(task(label_weight=weight, gradient_penalty=0.0))
    expected = mean(-math.log(1 - chances(one)[-1]) for one in real) / 2
    expected += mean(-math.log(chances(one)[-1]) for one in fake) / 2
    if weight:
        named = zip(map(chances, real), labels, strict=True)
        expected += weight * mean(-math.log(all_[label] / sum(all_[:-1])) for all_, label in named) / 2
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, WEIGHT])
def test_the_penalty_is_that_of_all_classes_together(weight):
    made, free = (task(label_weight=weight, gradient_penalty=penalty) for penalty in (0.5, 0.0))
    slope = (step(made)[1] - step(free)[1]) / 0.5
    signs = made.signs.signs(MicroBatch(0, BATCH).samples, 2 * 784).view(2 * BATCH, 784).double()
    along = signs @ made.discriminator.weights.double()  # of a linear network, the difference quotient
    expected = math.fsum(along.square().flatten().tolist()) / (2 * BATCH)
    assert slope == pytest.approx(expected, rel=1e-3)


def test_without_labels_the_discriminator_has_the_course_report_s_one_output():
    for preset, classes in (("course", 1), ("fast", CLASSES), ("best", CLASSES)):
        made = GANTask(replace(GANTask.presets[preset], dataset="fake"), torch.device("cpu"))
        assert made.discriminator.config == {"classes": classes}
