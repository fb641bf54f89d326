"""Steps of tasks that the toolkit does not bring: what the trainer leaves as it was, beside plain loops."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from cs324dist import Config, MicroBatch, Stream, Task, seeded
from cs324dist.errors import UserError
from cs324dist.trainer import Trainer

RATE, BATCH, STEPS = 0.1, 8, 5


@dataclass(frozen=True)
class OwnConfig(Config):
    """Options of these tasks."""


class Own(Task[OwnConfig]):
    name = "own"
    presets: ClassVar = {"fast": OwnConfig(batch_size=BATCH)}

    def __init__(self, config: OwnConfig, device: torch.device, **networks: nn.Module) -> None:
        super().__init__(config, device)
        self.networks = networks
        self.optimizers = {name: torch.optim.SGD(n.parameters(), RATE) for name, n in networks.items()}
        self.noise = Stream(config.seed, "noise")

    def inputs(self, batch: MicroBatch) -> Tensor:
        return self.noise.normals(batch.samples, 2)


def trainer_of(task_type: type[Own], micro_batches: int | None, **networks: nn.Module) -> Trainer:
    config = OwnConfig(batch_size=BATCH, micro_batches=micro_batches)
    return Trainer(task_type(config, torch.device("cpu"), **networks), Accelerator(cpu=True))


def linear(inputs: int, outputs: int) -> nn.Linear:
    with seeded(0, f"{inputs} {outputs}"):
        return nn.Linear(inputs, outputs)


def generator_loss(g: nn.Module, d: nn.Module, z: Tensor) -> Tensor:
    return F.softplus(-d(g(z))).mean()


def discriminator_loss(g: nn.Module, d: nn.Module, z: Tensor) -> Tensor:
    return (F.softplus(d(g(z).detach())) + F.softplus(-d(z + 3))).mean()


class TwoUpdates(Own):
    """A GAN that does not freeze its discriminator while the generator is trained."""

    def step(self, step: int, trainer: Any) -> None:
        for name, loss in (("g", generator_loss), ("d", discriminator_loss)):
            trainer.update(name, partial(self.loss_of, loss))

    def loss_of(self, loss: Callable[..., Tensor], batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return loss(*self.networks.values(), self.inputs(batch)), {}


@pytest.mark.parametrize("micro_batches", [None, 1])
def test_a_loss_trains_the_networks_of_its_own_update_alone(micro_batches: int | None) -> None:
    trainer = trainer_of(TwoUpdates, micro_batches, g=linear(2, 2), d=linear(2, 1))
    for step in range(STEPS):
        trainer.step(step, is_logged=False)

    g, d = linear(2, 2), linear(2, 1)
    for step in range(STEPS):
        z = trainer.task.inputs(MicroBatch(step, BATCH, 0, 1, torch.device("cpu")))
        for network, loss in ((g, generator_loss), (d, discriminator_loss)):
            parameters = list(network.parameters())
            gradients = torch.autograd.grad(loss(g, d, z), parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= RATE * gradient
    for name, plain in (("g", g), ("d", d)):
        for found, expected in zip(trainer.task.networks[name].parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


class Partly(Own):
    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.networks["net"](self.inputs(batch)).square().mean()
        return loss, {"loss": loss}


class Merging(nn.Linear):
    """As an adapter that is merged into its layer for an evaluation."""

    merged = False

    def train(self, mode: bool = True) -> "Merging":
        self.merged = not mode
        return super().train(mode)


def test_after_an_evaluation_each_part_is_in_the_mode_it_had_and_was_told_of_it() -> None:
    backbone = nn.Sequential(Merging(2, 2), nn.Dropout()).requires_grad_(False).eval()
    net = nn.Sequential(backbone, nn.Dropout(), Merging(2, 1))
    before = {module: module.training for module in net.modules()}
    assert set(before.values()) == {True, False}
    with trainer_of(Partly, None, net=net).evaluating():
        assert not any(module.training for module in net.modules())
        assert [net[0][0].merged, net[2].merged] == [True, True]
    assert {module: module.training for module in net.modules()} == before
    assert [net[0][0].merged, net[2].merged] == [True, False]


class Measures(Partly):
    def step(self, step: int, trainer: Any) -> None:
        trainer.update("net", self.loss) if step % 2 == 0 else trainer.measure(self.loss)


@pytest.mark.parametrize("micro_batches", [None, 2])
def test_what_is_only_measured_changes_nothing(micro_batches: int | None) -> None:
    """Otherwise a run would depend on which steps it logs."""
    ends = []
    for log_every in (1, 4):
        net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 1))
        with seeded(0, "weights"):
            for parameter in net.parameters():
                nn.init.normal_(parameter)
        trainer = trainer_of(Measures, micro_batches, net=net)
        for step in range(8):
            trainer.step(step, is_logged=step % log_every == 0)
        ends.append(net.state_dict())
    assert ends[0]["1.num_batches_tracked"] == 4
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


class Shared(Partly):
    """A network and a part of it, such as the part that is to be loaded by itself."""

    def loss(self, batch: MicroBatch) -> tuple[Any, dict[str, Tensor]]:
        x = self.inputs(batch)
        return (1e3 * self.networks["net"](x).square().sum(), float(len(x))), {}


@pytest.mark.parametrize("micro_batches", [None, 2])
def test_a_network_may_be_part_of_another(micro_batches: int | None) -> None:
    ends = []
    for is_named in (False, True):
        net = nn.Sequential(linear(2, 3), linear(3, 1))
        trainer = trainer_of(Shared, micro_batches, net=net, **({"first": net[0]} if is_named else {}))
        trainer.config = replace(trainer.config, max_grad_norm=0.5)
        trainer.task.optimizers = {"net": torch.optim.SGD(net.parameters(), RATE)}
        trainer = Trainer(trainer.task, trainer.accelerator)
        before = [parameter.detach().clone() for parameter in net.parameters()]
        trainer.step(0, is_logged=False)
        ends.append([parameter - old for parameter, old in zip(net.parameters(), before, strict=True)])
    for moved, expected in zip(*ends, strict=True):
        torch.testing.assert_close(moved, expected)


class Counting(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 1)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        self.count = self.count + 1
        return super().forward(input)


def test_a_buffer_that_measuring_replaces_is_put_back() -> None:
    trainer = trainer_of(Measures, None, net=Counting())
    for step in range(4):
        trainer.step(step, is_logged=True)
    assert trainer.task.networks["net"].count == 2


def test_an_evaluation_is_in_float32_where_training_takes_tf32(monkeypatch) -> None:
    """ "high" has cuBLAS take TF32, and cuDNN does by itself (torch 2.13, backends/cudnn/__init__.py:195)."""

    def settings() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = settings()
    torch.set_float32_matmul_precision("high")
    with trainer_of(Partly, None).evaluating():
        assert settings() == ("highest", False)
    assert settings() == ("high", True)
    torch.set_float32_matmul_precision(before[0])


class SomeMetrics(Partly):
    of: ClassVar[dict[int, dict[str, Any]]]

    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Any]]:
        return super().loss(batch)[0], self.of[batch.index]


def metrics(of: dict[int, dict[str, Any]]) -> dict[str, float]:
    trainer = trainer_of(type("SomeMetrics", (SomeMetrics,), {"of": of}), len(of), net=linear(2, 1))
    trainer.step(0, is_logged=True)
    return trainer.read_metrics()


def test_metrics_are_put_together_by_their_names() -> None:
    assert metrics({0: {"a": 1.0, "b": 5.0}, 1: {"b": 7.0, "a": 3.0}}) == {"train/a": 2, "train/b": 6}
    assert metrics({0: {"a": 1.0, "b": (0.0, 0.0)}, 1: {"a": 3.0, "b": (0.0, 0.0)}}) == {"train/a": 2}
    with pytest.raises(UserError, match="some micro-batches give other metrics than those of others"):
        metrics({0: {"a": 1.0, "b": 5.0}, 1: {"a": 3.0}})
