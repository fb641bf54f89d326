from pathlib import Path

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
