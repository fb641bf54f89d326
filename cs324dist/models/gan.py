"""Generator and discriminator of the report's Part II, with its parameter names.

State dicts saved by the report's own classes load strictly. The one change: the discriminator returns logits,
and the report's final sigmoid lives in the loss (binary cross-entropy with logits, the same mathematics).
"""

from jaxtyping import Float
from torch import Tensor, nn


class Generator(nn.Module):
    """Latent vectors to images in [-1, 1].

    Args:
        input_dim: width of the latent vector.
    """

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
        """Images for standard normal latents."""
        return self.upconv(self.fc(z).reshape(-1, 128, 7, 7))


class Discriminator(nn.Module):
    """Images in [-1, 1] to logits: positive for real.

    Pooling stands before the LeakyReLU, not behind it as in the report: LeakyReLU rises everywhere, so that
    the values and gradients are the same to the last bit, for a quarter of its work.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, int] = {}
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
            nn.Linear(1024, 1),
        )

    def forward(self, images: Float[Tensor, "batch 1 28 28"]) -> Float[Tensor, "batch 1"]:
        """Logits of being real."""
        return self.net(images)
