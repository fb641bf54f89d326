"""The GAN on MNIST: the course report's Part II."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from cs324dist.config import MUTABLE, Config, Count, Fraction, Positive, ScheduleName
from cs324dist.data.streams import MicroBatch, ShuffledEpochs, Stream, seeded
from cs324dist.distributed.sum_over import SumOver
from cs324dist.pictures import grid
from cs324dist.tasks.base import Evaluation, Metrics, Task, Updater
from cs324dist.tasks.gan.images import load_images, to_unit_range
from cs324dist.tasks.gan.networks import Discriminator, Generator
from cs324dist.tasks.gan.sampling import STRIP_IMAGES, interpolate, strip, walk_ends
from cs324dist.tasks.gan.statistics import DigitStatistics

GRID = 5  # rows and columns of the picture, as in the course report
FINITE_DIFFERENCE = 0.05  # of the gradient penalty, in units of the images' range [-1, 1]
CLASSES = 10


@dataclass(frozen=True)
class GANConfig(Config):
    """Train a GAN on small grey images."""

    preset: Annotated[str, MUTABLE] = "fast"
    """Recipe that the other defaults come from: fast (good digits in minutes), best (better ones in five
    times as long), course (that of the course report, 200 epochs), smoke (seconds, to see that it runs)."""

    steps: Annotated[Count, MUTABLE] = 2750
    schedule: ScheduleName = "linear"

    dataset: Literal["mnist", "fake"] = "mnist"
    """Images: mnist, or fake (noise, needs no files)."""

    data_root: Annotated[Path, MUTABLE] = Path("data")
    """Folder of the data sets, in torchvision's layout; missing files are fetched into it."""

    latent_dim: Annotated[int, Interval(ge=1, le=65_536)] = 100
    """Width of the latent vector."""

    generator_lr: Positive = 1e-2
    """Adam's learning rate for the generator, at the start."""

    discriminator_lr: Positive = 1e-3
    """Adam's learning rate for the discriminator, at the start."""

    betas: tuple[Fraction, Fraction] = (0.0, 0.99)
    """Adam's decays of the mean gradient and of the mean squared gradient, for both networks."""

    gradient_penalty: Annotated[float, Interval(ge=0, le=1e9)] = 0.1
    """Weight of the discriminator's squared gradient at real and generated images; 0: no penalty."""

    ema_decay: Fraction = 0.998
    """Decay per step of the averaged generator that samples are drawn from (smaller in the first steps);
    0: no average is kept."""

    label_weight: Annotated[float, Interval(ge=0, le=1e9)] = 0.05
    """Weight of the images' labels: the discriminator learns them, and the generator learns to make
    images of a clear class. 0: labels are not used."""

    discriminator_every: Count = 1
    """The discriminator is trained in every n-th step or epoch, beginning with the first."""

    discriminator_unit: Literal["step", "epoch"] = "step"
    """What --discriminator-every counts: step, or epoch (passes over the images)."""

    default_precision: ClassVar[Literal["no", "bf16"]] = "bf16"  # the same digits, in two thirds of the time


FAST = GANConfig()


class GANTask(Task[GANConfig]):
    """One step: the generator first, then the discriminator on the same fakes."""

    name = "gan"
    presets: ClassVar = {
        "fast": FAST,
        "best": replace(FAST, steps=16_000, generator_lr=5e-3, label_weight=0.04),
        "course": replace(
            FAST, steps=187_500, generator_lr=2e-4, discriminator_lr=2e-4, betas=(0.9, 0.999),
            schedule="constant", gradient_penalty=0.0, ema_decay=0.0, label_weight=0.0, discriminator_every=2,
        ),
        "smoke": replace(FAST, steps=20, batch_size=16, log_every=5, evaluate_every=20, checkpoint_every=10),
    }  # fmt: skip

    def __init__(self, config: GANConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.train_set, test_set = (
            load_images(config.dataset, split, config.data_root).to(device) for split in ("train", "test")
        )
        self.test_images = test_set.images
        self.order = ShuffledEpochs(config.seed, "images/train", len(self.train_set.labels))
        self.latents = Stream(config.seed, "latents/train")
        self.signs = Stream(config.seed, "nudges/train")
        with seeded(config.seed, "weights"):
            self.generator = Generator(config.latent_dim)
            self.discriminator = Discriminator(CLASSES if config.label_weight else 1)
        for network in (self.generator, self.discriminator):
            # torch before 2.15 does not type the memory format
            cast(Any, network).to(device, memory_format=torch.channels_last)
        self.networks = {"generator": self.generator, "discriminator": self.discriminator}
        if config.ema_decay:
            self.networks["generator_ema"] = copy.deepcopy(self.generator).eval().requires_grad_(False)
        rates = {"generator": config.generator_lr, "discriminator": config.discriminator_lr}
        self.optimizers = {
            name: torch.optim.Adam(self.networks[name].parameters(), rate, config.betas, fused=True)
            for name, rate in rates.items()
        }
        self.fakes: dict[int, Tensor] = {}  # of this step, by micro-batch
        self._of_test_images: DigitStatistics | None = None

    @classmethod
    def run_name(cls, config: GANConfig) -> str:
        """The name of a run's default folder."""
        prefix = cls.name if config.dataset == "mnist" else f"{cls.name}-{config.dataset}"
        return f"{prefix}-{config.preset}-{config.seed}"

    def step(self, step: int, trainer: Updater) -> None:
        """See the class."""
        self.discriminator.requires_grad_(False)  # its gradients are neither computed nor reduced
        trainer.update("generator", self.generator_loss)
        self.discriminator.requires_grad_(True)
        if self.config.ema_decay:
            # The first weights are random: they are forgotten sooner.
            decay = min(self.config.ema_decay, (step + 1) / (step + 10))
            average(self.networks["generator_ema"], self.generator, decay)
        epochs = step * self.config.batch_size // self.order.size
        period = epochs if self.config.discriminator_unit == "epoch" else step
        if period % self.config.discriminator_every == 0:
            trainer.update("discriminator", self.discriminator_loss)
        else:
            trainer.measure(self.discriminator_loss)

    def generator_loss(self, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Binary cross-entropy of the fakes being taken for real (Goodfellow et al. 2014).

        With labels, also the cross-entropy of each fake's likeliest class (Zhou et al. 2018, AM-GAN).
        """
        fake = self.generator(self.latents.normals(batch.samples, self.config.latent_dim))
        self.fakes[batch.index] = fake.detach()
        logits = self.discriminator(fake)
        loss = F.softplus(-real_logits(logits)).mean()
        metrics = {"generator_loss": loss}
        if self.config.label_weight:
            metrics["generator_class_loss"] = F.cross_entropy(logits, logits.argmax(1))
            loss = loss + self.config.label_weight * metrics["generator_class_loss"]
        return loss, metrics

    def discriminator_loss(self, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        """Binary cross-entropy and a penalty; with labels, also the classes' (Salimans et al. 2016)."""
        items = self.order.items(batch)
        real = to_unit_range(self.train_set.images[items])
        logits, penalty = self.logits_and_penalty(torch.cat([real, self.fakes[batch.index]]), batch)
        of_real, of_fake = logits.chunk(2)
        cross_entropy = (F.softplus(-real_logits(of_real)) + F.softplus(real_logits(of_fake))).mean() / 2
        loss = cross_entropy + penalty
        metrics = {"discriminator_loss": loss}
        if self.config.label_weight:
            metrics["discriminator_class_loss"] = F.cross_entropy(of_real, self.train_set.labels[items])
            loss = loss + self.config.label_weight * metrics["discriminator_class_loss"] / 2
        return loss, metrics

    def logits_and_penalty(
        self, images: Float[Tensor, "batch 1 28 28"], batch: MicroBatch
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, ""] | float]:
        """The discriminator's logits, and the weighted mean of |∇D|², which is summed over the classes.

        With random signs ε, the expectation of ((D(x + σε) - D(x)) / σ)² is |∇D(x)|² to first order in σ: one
        more forward pass where the exact R1 and R2 (Mescheder et al. 2018) need a double backward.
        """
        if not self.config.gradient_penalty:
            return self.discriminator(images), 0.0
        shape = (len(images) // 2, 2, *images.shape[1:])
        signs = self.signs.signs(batch.samples, 2 * images[0].numel()).view(shape)
        moved = images + FINITE_DIFFERENCE * torch.cat(signs.unbind(1))
        logits, moved_logits = self.discriminator(torch.cat([images, moved])).chunk(2)
        slopes = (moved_logits - logits) / FINITE_DIFFERENCE
        return logits, self.config.gradient_penalty * slopes.square().sum(1).mean()

    def evaluate(self, sum_over: SumOver) -> Evaluation:
        """A grid of samples, their Fréchet distance to the test set, and what can be read."""
        generator = self.networks["generator_ema" if self.config.ema_decay else "generator"]
        seed, latent_dim, count = self.config.seed, self.config.latent_dim, len(self.test_images)

        def draw(stream: str, indices: Tensor) -> Tensor:
            return generator(Stream(seed, stream).normals(indices, latent_dim))

        picture = grid(draw("latents/grid", torch.arange(GRID * GRID, device=self.device)), GRID)
        samples = DigitStatistics.of(lambda indices: draw("latents/evaluation", indices), count, sum_over)
        if self._of_test_images is None:
            self._of_test_images = DigitStatistics.of(
                lambda indices: to_unit_range(self.test_images[indices]), count, sum_over
            )
        found = samples.compared_with(self._of_test_images)
        return Evaluation(found, picture, lambda: self._strip(generator))

    def _strip(self, generator: nn.Module) -> Tensor:
        # As launch/sample.py draws it: on the CPU, in float32, from the weights alone.
        drawn = Generator(self.config.latent_dim).eval()
        drawn.load_state_dict(generator.state_dict())
        start, end, _ = walk_ends(drawn)
        return strip(drawn, interpolate(start, end, STRIP_IMAGES, "spherical"))


def real_logits(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, " batch"]:
    """The logits of images being real, of any class: with one class, that class's."""
    return logits.logsumexp(1)


@torch.no_grad()
def average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """Move `averaged` towards `model`: parameters, and BatchNorm's running statistics with them.

    Averaged statistics are as good as ones recomputed from 10 000 fresh latents, and better than copied ones.
    """
    old = [tensor for tensor in averaged.state_dict().values() if tensor.is_floating_point()]
    new = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    torch._foreach_lerp_(old, new, 1 - decay)
