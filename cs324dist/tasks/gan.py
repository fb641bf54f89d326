"""The GAN on MNIST: the report's Part II."""

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from cs324dist.command_line import FRACTION, POSITIVE, Count, OneOf, Within
from cs324dist.data.images import DATASETS, load_images, to_unit_range
from cs324dist.data.streams import ShuffledEpochs, Stream
from cs324dist.distributed.batch_norm import convert_sync_batchnorm, freeze_cancelled_biases
from cs324dist.distributed.process import in_full_precision, seeded, shard
from cs324dist.metrics.digits import DigitStatistics
from cs324dist.models.gan import Discriminator, Generator
from cs324dist.runs.models import LARGEST_SIZE
from cs324dist.sampling.generators import AT_ONCE
from cs324dist.sampling.grids import grid
from cs324dist.sampling.interpolation import STRIP_IMAGES, strip, walk_ends
from cs324dist.settings import MUTABLE, RunSettings
from cs324dist.tasks.base import Evaluation, UntilStopped

GRID = 5  # rows and columns of the picture, as in the report
FINITE_DIFFERENCE = 0.05  # how far the penalty looks, in units of the images' range [-1, 1]


@dataclass(frozen=True)
class GANSettings(RunSettings):
    """Train a GAN on small grey images."""

    preset: Annotated[str, OneOf("fast", "course", "smoke"), MUTABLE] = "fast"
    """Recipe that the other defaults come from: fast (best digits per minute), report (the report's, 200
    epochs), smoke (seconds, to see that it runs)."""

    steps: Annotated[Count, MUTABLE] = 2500

    dataset: Annotated[str, OneOf(*DATASETS)] = "mnist"
    """Images: mnist, fashion-mnist, or fake (noise, needs no files)."""

    data_root: Annotated[Path, MUTABLE] = Path("data")
    """Folder of the data sets, laid out as torchvision's; what is absent is fetched into it."""

    latent_dim: Annotated[int, Within(1, LARGEST_SIZE)] = 100
    """Width of the latent vector."""

    generator_lr: Annotated[float, POSITIVE] = 1e-2
    """Adam's step size for the generator."""

    discriminator_lr: Annotated[float, POSITIVE] = 1e-3
    """Adam's step size for the discriminator."""

    beta1: Annotated[float, FRACTION] = 0.0
    """Adam's decay of the mean gradient, both networks."""

    beta2: Annotated[float, FRACTION] = 0.99
    """Adam's decay of the mean squared gradient, both networks."""

    lr_decay: Annotated[str, OneOf("linear", "none")] = "linear"
    """linear: both step sizes fall to zero over --steps; none: they stay."""

    gradient_penalty: Annotated[float, Within(0.0, 1e9)] = 0.1
    """Weight of the squared slope of the discriminator at real and generated images; 0: none."""

    ema_decay: Annotated[float, FRACTION] = 0.998
    """Decay per step of the averaged generator that samples are drawn from (smaller in the first steps);
    0: no average is kept."""

    discriminator_every: Count = 1
    """The discriminator trains in every so many steps or epochs, beginning with the first."""

    discriminator_unit: Annotated[str, OneOf("step", "epoch")] = "step"
    """What --discriminator-every counts: step, or epoch (passes over the images)."""

    batch_norm: Annotated[str, OneOf("synced", "local")] = "synced"
    """synced: BatchNorm's statistics span the global batch. local: each process has its own, which saves six
    collectives a step and gives up that any number of processes trains alike."""

    @property
    def schedule_depends_on_steps(self) -> bool:  # type: ignore[override]
        """Whether another `steps` would change the steps already taken."""
        return self.lr_decay == "linear"

    def run_name(self) -> str:
        """The default run folder's name."""
        prefix = "gan" if self.dataset == "mnist" else f"gan-{self.dataset}"
        return f"{prefix}-{self.preset}-{self.seed}"


PRESETS = {
    "fast": GANSettings(),
    "course": GANSettings(
        preset="course",
        steps=187_500,
        generator_lr=2e-4,
        discriminator_lr=2e-4,
        beta1=0.9,
        beta2=0.999,
        lr_decay="none",
        gradient_penalty=0.0,
        ema_decay=0.0,
        discriminator_every=2,
    ),
    "smoke": GANSettings(
        preset="smoke", steps=20, batch_size=16, log_every=5, evaluate_every=20, checkpoint_every=10
    ),
}


class GANTask:
    """One step: the generator first, then the discriminator on the same fakes."""

    def __init__(
        self, settings: GANSettings, accelerator: Accelerator, dtype: torch.dtype = torch.float32
    ) -> None:
        self.settings, self.accelerator, self.dtype = settings, accelerator, dtype
        self.shard = shard(accelerator)
        self.images, self.test_images = (
            load_images(settings.dataset, split, settings.data_root).images.to(self.shard.device)
            for split in ("train", "test")
        )
        self.order = ShuffledEpochs(settings.seed, "images/train", len(self.images))
        self.latents = Stream(settings.seed, "latents/train")
        self.nudges = Stream(settings.seed, "nudges/train")

        with seeded(settings.seed, "weights"):
            generator = Generator(settings.latent_dim)
            discriminator = Discriminator()
        for network in (generator, discriminator):
            moved = cast(Any, network.to(self.shard.device, dtype))  # torch before 2.15 does not say the next
            moved.to(memory_format=torch.channels_last)
        self.models: dict[str, nn.Module] = {"generator": generator, "discriminator": discriminator}
        if settings.ema_decay:
            self.models["generator_ema"] = copy.deepcopy(generator).eval().requires_grad_(False)
        freeze_cancelled_biases(generator)
        if settings.batch_norm == "synced":
            convert_sync_batchnorm(generator, accelerator)
        betas = (settings.beta1, settings.beta2)
        g_optimizer = torch.optim.Adam(generator.parameters(), settings.generator_lr, betas, fused=True)
        d_optimizer = torch.optim.Adam(
            discriminator.parameters(), settings.discriminator_lr, betas, fused=True
        )
        self.optimizers = {"generator": g_optimizer, "discriminator": d_optimizer}
        # Each network has a reducer of its own: what one's step does not touch, it does not wait for.
        self.generator, self.g_optimizer = accelerator.prepare(generator, g_optimizer)
        self.discriminator, self.d_optimizer = accelerator.prepare(discriminator, d_optimizer)
        self.counters: dict[str, int] = {}
        self.counter_limits: dict[str, range] = {}

    def step(self, step: int) -> dict[str, Tensor]:
        """See `Task.step`."""
        settings = self.settings
        indices = self.shard.batch(step, settings.batch_size)
        items = self.order.batch(self.shard, step, settings.batch_size)
        real = to_unit_range(self.images[items], self.dtype)
        fake = self.generator(self.latents.normals(indices, settings.latent_dim, self.dtype))

        self._set_learning_rates(step)
        metrics = {"train/generator_loss": self._generator_step(fake)}
        if settings.ema_decay:
            # The first weights are random: they are forgotten sooner.
            decay = min(settings.ema_decay, (step + 1) / (step + 10))
            average(self.models["generator_ema"], self.models["generator"], decay)
        if self._discriminator_trains(step):
            metrics["train/discriminator_loss"] = self._discriminator_step(real, fake.detach(), indices)
        elif settings.is_due(step + 1, settings.log_every):
            with torch.no_grad():
                metrics["train/discriminator_loss"] = self._discriminator_loss(real, fake, indices)
        return metrics

    def _generator_step(self, fake: Tensor) -> Tensor:
        # The bare discriminator, frozen: its gradients are neither computed nor reduced.
        discriminator = self.models["discriminator"].requires_grad_(False)
        loss = F.softplus(-discriminator(fake)).mean()
        self.accelerator.backward(loss)
        self.g_optimizer.step()
        self.g_optimizer.zero_grad()
        discriminator.requires_grad_(True)
        return loss

    def _discriminator_step(self, real: Tensor, fake: Tensor, indices: Tensor) -> Tensor:
        loss = self._discriminator_loss(real, fake, indices)
        self.accelerator.backward(loss)
        self.d_optimizer.step()
        self.d_optimizer.zero_grad()
        return loss

    def _discriminator_loss(self, real: Tensor, fake: Tensor, indices: Tensor) -> Tensor:
        """Binary cross-entropy, and the gradient_penalty: the mean of |∇D|² at real and fake, by finite differences.

        With signs ε, the expectation of ((D(x + σε) - D(x)) / σ)² is |∇D(x)|² to first order in σ: one more
        forward pass where the exact R1 and R2 (Mescheder et al. 2018) need a double backward.
        """
        images = torch.cat([real, fake])
        if self.settings.gradient_penalty:
            shape = (len(indices), 2, *images.shape[1:])
            signs = self.nudges.signs(indices, 2 * images[0].numel(), self.dtype).view(shape)
            nudged = images + FINITE_DIFFERENCE * torch.cat(signs.unbind(1))
            logits, nudged_logits = self.discriminator(torch.cat([images, nudged])).chunk(2)
            slope = ((nudged_logits - logits) / FINITE_DIFFERENCE).square().mean()
        else:
            logits, slope = self.discriminator(images), 0.0
        real_logits, fake_logits = logits.chunk(2)
        cross_entropy = (F.softplus(-real_logits) + F.softplus(fake_logits)).mean() / 2
        return cross_entropy + self.settings.gradient_penalty * slope

    def _discriminator_trains(self, step: int) -> bool:
        period = step
        if self.settings.discriminator_unit == "epoch":
            period = step * self.settings.batch_size // self.order.size
        return period % self.settings.discriminator_every == 0

    def _set_learning_rates(self, step: int) -> None:
        left = 1 - step / self.settings.steps if self.settings.lr_decay == "linear" else 1.0
        self.g_optimizer.param_groups[0]["lr"] = self.settings.generator_lr * left
        self.d_optimizer.param_groups[0]["lr"] = self.settings.discriminator_lr * left

    @torch.no_grad()
    def evaluate(self, until_stopped: UntilStopped = iter) -> Evaluation:
        """A grid of samples; for digits also their Fréchet distance to the test set, and what can be read."""
        generator = self.models["generator_ema" if self.settings.ema_decay else "generator"].eval()
        seed, latent_dim, count = self.settings.seed, self.settings.latent_dim, len(self.test_images)

        def draw(stream: str, indices: Tensor) -> Tensor:
            z = Stream(seed, stream).normals(indices, latent_dim, self.dtype)
            return in_full_precision(generator, z)

        picture = grid(draw("latents/grid", torch.arange(GRID * GRID, device=self.shard.device)), GRID)
        metrics = {}
        if self.settings.dataset != "fashion-mnist":  # whose images are no digits
            shares = self.shard.samples(0, count).split(AT_ONCE)
            samples = DigitStatistics.of(
                (draw("latents/evaluation", share) for share in until_stopped(shares)), self._sum_over_ranks
            )
            found = samples.compared_with(self.test_digits)
            metrics = {f"eval/{name}": value for name, value in found.items()}
        self.models["generator"].train()
        return Evaluation(metrics, picture, lambda: self._strip(generator))

    def _strip(self, generator: nn.Module) -> Tensor:
        # As launch/sample.py draws it: on the CPU, in float32, from the weights alone.
        drawn = Generator(self.settings.latent_dim).eval()
        drawn.load_state_dict(generator.state_dict())
        start, end, _ = walk_ends(drawn, self.settings.dataset)
        return strip(drawn, start, end, STRIP_IMAGES, "spherical")

    @cached_property
    def test_digits(self) -> DigitStatistics:
        """What the classifier says of the test set."""
        shares = self.shard.samples(0, len(self.test_images)).split(AT_ONCE)
        return DigitStatistics.of(
            (to_unit_range(self.test_images[share]) for share in shares), self._sum_over_ranks
        )

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "sum")


@torch.no_grad()
def average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """Move `averaged` towards `model`: parameters, and BatchNorm's running statistics with them.

    Averaged statistics are as good as ones recomputed from 10 000 fresh latents, and better than copied ones.
    """
    old = [tensor for tensor in averaged.state_dict().values() if tensor.is_floating_point()]
    new = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    torch._foreach_lerp_(old, new, 1 - decay)
