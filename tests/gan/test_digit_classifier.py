from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cs324dist.tasks.gan.classifier import DigitClassifier
from cs324dist.tasks.gan.images import load_images
from cs324dist.tasks.gan.statistics import WEIGHTS, digit_classifier


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


def test_the_logits_are_a_linear_map_of_the_128_features() -> None:
    classifier = digit_classifier(torch.device("cpu"))
    images = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = classifier.features(images)
    assert features.shape == (3, 128)
    assert features.min() == 0  # rectified
    weights = load_file(WEIGHTS)
    expected = features @ weights["output.weight"].T + weights["output.bias"]
    torch.testing.assert_close(classifier(images), expected)


@pytest.mark.parametrize("classes", [2, 10])
def test_it_tells_as_many_classes_as_asked_for(classes: int) -> None:
    assert DigitClassifier(classes).eval()(torch.zeros(3, 1, 28, 28)).shape == (3, classes)
