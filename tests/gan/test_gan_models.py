import pytest
import torch
from torch import Tensor, nn

from cs324dist.tasks.gan import networks as gan


# The two classes of the course report, unchanged.
# fmt: off
class Generator(nn.Module):
    def __init__(self, input_dim):
        super(Generator, self).__init__()  # noqa: UP008
        self.fc = nn.Sequential(
            nn.Linear(input_dim, 1024),
            nn.BatchNorm1d(1024),
            nn.ReLU(),
            nn.Linear(1024, 128*7*7),
            nn.BatchNorm1d(128*7*7),
            nn.ReLU(),
        )
        self.upconv = nn.Sequential(
            nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 1, 4, stride=2, padding=1),
            nn.Tanh()
        )

    def forward(self, z):
        x = self.fc(z)
        x = x.reshape(-1, 128, 7, 7)
        return self.upconv(x)


class Discriminator(nn.Module):
    def __init__(self):
        super(Discriminator, self).__init__()  # noqa: UP008
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 5, stride=1),
            nn.LeakyReLU(0.2),
            nn.MaxPool2d(2, stride=2),
            nn.Conv2d(32, 64, 5, stride=1),
            nn.LeakyReLU(0.2),
            nn.MaxPool2d(2, stride=2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 1024),
            nn.LeakyReLU(0.2),
            nn.Linear(1024, 1),
            nn.Sigmoid(),
        )

    def forward(self, img):
        return self.net(img)
# fmt: on


def normals(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def with_history(generator: nn.Module, latent: int) -> nn.Module:
    """The generator after a training step's forward pass: its running statistics are not the initial ones."""
    generator.train()(2 * normals(8, latent) + 1)
    return generator


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("latent", [100, 7])
def test_the_course_report_s_generator_and_ours_read_each_other_s_weights(latent, training):
    torch.manual_seed(0)
    for source, target in (
        (Generator(latent), gan.Generator(latent)),
        (gan.Generator(latent), Generator(latent)),
    ):
        target.load_state_dict(with_history(source, latent).state_dict(), strict=True)
        z = normals(4, latent)
        with torch.no_grad():
            found, expected = target.train(training)(z), source.train(training)(z)
        assert found.shape == (4, 1, 28, 28)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(target.state_dict(), source.state_dict())


def test_the_course_report_s_discriminator_and_ours_read_each_other_s_weights() -> None:
    torch.manual_seed(0)
    images = normals(4, 1, 28, 28).tanh()
    ours, theirs = gan.Discriminator(), Discriminator()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(ours(images).sigmoid(), theirs(images))
    trained = Discriminator()
    ours.load_state_dict(trained.state_dict(), strict=True)
    torch.testing.assert_close(ours(images).sigmoid(), trained(images))


def test_pooling_before_the_leaky_relu_changes_no_bit_of_logits_and_gradients() -> None:
    torch.manual_seed(0)
    ours = gan.Discriminator()
    in_the_course_report_s_order = Discriminator().net[:-1]
    in_the_course_report_s_order.load_state_dict(ours.net.state_dict(), strict=True)
    found = []
    for network in (ours.net, in_the_course_report_s_order):
        images = normals(4, 1, 28, 28).tanh().requires_grad_()
        logits = network(images)
        logits.square().sum().backward()
        found.append([logits, images.grad, *(p.grad for p in network.parameters())])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)
