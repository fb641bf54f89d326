"""Random numbers: of torch, numpy and random, and of generators of one's own."""

import os
import random
import time

import numpy as np
import torch
from entry import ALSO_PLAIN, ON_SEVERAL, RANKS, REPEATED, refused
from torch import nn
from torch.nn import functional as F

from cs324dist import Stream
from habits.base import Points, enter_all, hidden, rank, step, with_

APART, UNLIKE, AGAIN = refused(RANKS, ON_SEVERAL), refused(REPEATED, ON_SEVERAL), refused(REPEATED)


class Unseeded(Points):
    """A network that __init__ builds outside `seeded`."""

    def prepare(self):
        self.seed()
        self.net = hidden()
        for weight in self.net.parameters():
            weight.data += self.noise(weight.shape)
        self.networks = {"net": self.net}
        self.optimizers = {"net": self.optimizer(self.net.parameters())}

    def seed(self):
        """Whatever is called before."""

    def noise(self, shape):
        return 0


class NoisySGD(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for weight in self.param_groups[0]["params"]:
            weight += 0.1 * self.noise(weight.shape)


class NoisyStep(Points):
    def optimizer(self, weights):
        optimizer = NoisySGD(weights, 0.1)
        optimizer.noise = self.noise
        return optimizer


class NoisyLoss(Points):
    def prepare(self):
        self.of_torch, self.of_numpy = torch.Generator().manual_seed(0), np.random.default_rng(0)

    def value(self, batch):
        x, y = self.samples(batch)
        return F.cross_entropy(self.net(x + 0.1 * self.noise(x.shape, batch)), y)


def of_numpy(task, shape, *_):
    return torch.from_numpy(np.random.randn(*shape)).float()


def of_own_generator(task, shape, *_):
    return torch.from_numpy(np.random.default_rng().normal(size=shape)).float()


def of_stream(task, shape):
    return Stream(0, "noise").normals(torch.tensor([3]), shape.numel()).view(shape)


def in_some_steps(task, shape, batch):
    return torch.randn(shape) if batch.step % 5 == 3 else 0


def in_some_parts(task, shape, batch):
    return torch.randn(shape) if task.samples(batch)[0].sum() > 0 else 0


enter_all("seed", {
    "seed_by_hand": ("torch.manual_seed(0) in __init__", Unseeded, lambda _: torch.manual_seed(0)),
    "seed_of_rank": ("torch.manual_seed(rank)", Unseeded, lambda _: torch.manual_seed(rank()), APART),
    "seed_of_time": ("The time as a seed", Unseeded, lambda *_: torch.manual_seed(time.time_ns()), APART),
})  # fmt: skip
enter_all("noise", {
    "unseeded_network": ("A network that is built without a seed", Unseeded, lambda *_: 0),
    "weights_of_numpy": ("Weights of np.random", Unseeded, of_numpy),
    "weights_of_random": ("Weights of the module random", Unseeded, lambda *_: random.random()),
    "weights_of_own_generator": ("Weights of np.random.default_rng()", Unseeded, of_own_generator, APART),
    "torch_in_optimizer": ("torch.randn in an optimizer", NoisyStep, lambda _, shape: torch.randn(shape)),
    "numpy_in_optimizer": ("np.random in an optimizer", NoisyStep, of_numpy),
    "random_in_optimizer": ("The module random in an optimizer", NoisyStep, lambda *_: random.random()),
    "stream_in_optimizer": ("A Stream in an optimizer", NoisyStep, of_stream),
    "own_generator_in_optimizer": ("np.random.default_rng() in an optimizer", NoisyStep,
        of_own_generator, refused(RANKS, ALSO_PLAIN)),
    "numpy_in_loss": ("np.random in a loss", NoisyLoss, of_numpy),
    "random_in_loss": ("The module random in a loss", NoisyLoss, lambda *_: random.random()),
    "draws_in_some_steps": ("Draws in some steps only", NoisyLoss, in_some_steps),
    "more_draws_in_some_steps": ("Draws in some steps only, with BatchNorm and dropout",
        with_(NoisyLoss, network=lambda _: hidden(nn.BatchNorm1d(8), nn.Dropout(0.3))), in_some_steps),
    "draws_in_some_parts": ("Draws that depend on the data", NoisyLoss, in_some_parts),
    "own_torch_generator": ("A torch.Generator of the task's, in a loss", NoisyLoss,
        lambda task, shape, _: torch.randn(shape, generator=task.of_torch), AGAIN),
    "own_numpy_generator": ("np.random.default_rng(0) of the task's, in a loss", NoisyLoss,
        lambda task, *_: task.of_numpy.normal(), AGAIN),
    "new_numpy_generator": ("np.random.default_rng() in a loss", NoisyLoss, of_own_generator, AGAIN),
    "loss_of_process": ("A loss that depends on the process", NoisyLoss, lambda *_: os.getpid() % 7, UNLIKE),
})  # fmt: skip


@step("Draws in Task.step", value=lambda task, batch: Points.value(task, batch) * task.scale)
def draws_in_step(task, step, trainer):
    task.scale = torch.rand(()) + np.random.rand() + random.random()
    trainer.update("net", task.loss)
