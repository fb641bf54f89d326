"""The generator and the discriminator of Part II of the course report, and a classifier of digits.

State dicts of the course report's classes load strictly. One difference: the discriminator returns logits,
and its final sigmoid is part of the loss (binary cross-entropy with logits), which computes the same.
"""

from jaxtyping import Float
from torch import Tensor, nn


class Generator(nn.Module):
    """Maps latent vectors with `input_dim` components to images in [-1, 1]."""

    def __init__(self, input_dim: int = 100) -> None:
        super().__init__()
        self.config = {"input_dim": input_dim}
        self.fc = nn.Sequential(
            nn.Linear(input_dim, 1024),
            nn.BatchNorm1d(1024),
            nn.ReLU(),
            nn.Linear(1024, 128 * 7 * 7),
            nn.BatchNorm1d(128 * 7 * 7),
            nn.ReLU(),
        )
        self.upconv = nn.Sequential(
            nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 1, 4, stride=2, padding=1),
            nn.Tanh(),
        )

    def forward(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch 1 28 28"]:
        """Images for latents, standard normal in training."""
        return self.upconv(self.fc(z).reshape(-1, 128, 7, 7))


class Discriminator(nn.Module):
    """Maps images in [-1, 1] to the logits of `classes` of real images, where "generated" has the logit zero.

    With one class, the default and the course report's, this is the logit of an image being real.

    Pooling comes before LeakyReLU, not after it as in the course report. LeakyReLU is strictly increasing, so
    values and gradients are the same to the last bit, at a quarter of its cost.
    """

    def __init__(self, classes: int = 1) -> None:
        super().__init__()
        self.config = {"classes": classes}
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 5, stride=1),
            nn.MaxPool2d(2, stride=2),
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, 5, stride=1),
            nn.MaxPool2d(2, stride=2),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 1024),
            nn.LeakyReLU(0.2),
            nn.Linear(1024, classes),
        )

    def forward(self, images: Float[Tensor, "batch 1 28 28"]) -> Float[Tensor, "batch classes"]:
        """Logits of the classes of real images."""
        return self.net(images)


class DigitClassifier(nn.Module):
    """Labels samples, and measures them: two convolutions and a hidden layer of 128 units, the features."""

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
