"""A small convolutional classifier of digits, used to label samples and to compute Fréchet distances."""

from jaxtyping import Float
from torch import Tensor, nn


class DigitClassifier(nn.Module):
    """Two convolutions and a hidden layer of 128 units, whose activations are the features."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.config = {"classes": classes}
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.hidden = nn.Sequential(nn.Linear(32 * 7 * 7, 128), nn.ReLU())
        self.output = nn.Linear(128, classes)

    def features(self, images: Float[Tensor, "batch 1 28 28"]) -> Float[Tensor, "batch 128"]:
        """Activations of the hidden layer for images in [-1, 1]."""
        return self.hidden(self.convolutions(images))

    def forward(self, images: Float[Tensor, "batch 1 28 28"]) -> Float[Tensor, "batch classes"]:
        """Logits for images in [-1, 1]."""
        return self.output(self.features(images))
