"""Steps of tasks that the toolkit does not bring: what the trainer leaves as it was, beside plain loops."""

import json
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


TASK = """
import os
from dataclasses import dataclass
import torch
from torch import nn
from cs324dist import Config, Evaluation, Task, main


@dataclass(frozen=True)
class OwnConfig(Config):
    pass


class Own(Task[OwnConfig]):
    name = "own"
    presets = {"fast": OwnConfig(steps=4, batch_size=8, log_every=1, evaluate_every=2, wandb="disabled",
                                 checkpoint_every=2)}

    def __init__(self, config, device):
        super().__init__(config, device)
        self.net = nn.Linear(2, 1).to(device)
        self.net.register_buffer("history", torch.zeros(0))
        self.unused = nn.Linear(2, 1).to(device)
        self.networks = {"net": nn.ModuleList([self.net, self.unused] if CASE == "unused" else [self.net])}
        self.optimizers = {"net": torch.optim.SGD(self.networks["net"].parameters(), 0.1)}
        self.best = None

    def loss(self, batch):
        loss = self.net(torch.ones(len(batch.samples), 2)).mean()
        self.best = loss.detach()
        if CASE == "a buffer that grows":
            self.net.history = torch.zeros(batch.step)
        values = {"a": 1.0, "b": 100.0} if batch.index != 1 else {"b": 100.0, "a": 1.0}
        return loss, values if not (CASE == "missing" and batch.index == 1) else {}

    def state_dict(self):
        return {"best": self.best} if CASE == "a tensor that appears" else {}

    def evaluate(self, sum_over):
        return Evaluation(EVALUATION)


if __name__ == "__main__":
    main(Own, __doc__)
"""


@pytest.fixture
def train(launch, tmp_path):
    def train(*words: str, case: str = "", evaluation: str = "{'a': 1.0}", **options: Any):
        script = tmp_path / "own_task.py"
        script.write_text(TASK.replace("CASE", repr(case)).replace("EVALUATION", evaluation))
        return launch(script, "--run-dir", tmp_path / "run", *words, check=False, **options)

    return train


def error(done) -> str:
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error"))
    return line


@pytest.mark.parametrize(
    "evaluation", ["{'a': True, 'b': torch.tensor(0.5), 'c': torch.ones(1)}", "{'a': 3}"]
)
def test_what_an_evaluation_gives_can_be_read_again(train, evaluation):
    assert train(evaluation=evaluation).returncode == 0
    assert train("--steps", "6", evaluation=evaluation).returncode == 0


@pytest.mark.parametrize(
    ("broken", "code", "said"),
    [
        ({"evaluation": "{'a': 'high'}"}, 2, "the metric a = 'high' is no number: give one"),
        ({"evaluation": "{'a': torch.ones(2)}"}, 2, "the metric a = tensor([1., 1.]) is no number: give one"),
        (
            {"case": "a tensor that appears"},
            1,
            "after step 2, best of the task's state is torch.float32 of shape (), and was no tensor",
        ),
        (
            {"case": "a buffer that grows"},
            1,
            "after step 2, net.0.history is torch.float32 of shape (1,), and was",
        ),
    ],
)
def test_what_could_not_be_read_again_ends_the_run_before_it_is_saved(train, broken, code, said):
    done = train(**broken)
    assert (done.returncode, said in error(done)) == (code, True), done.stderr


@pytest.mark.parametrize("processes", ["2", "3"])
def test_a_parameter_without_a_gradient_on_several_processes_is_one_line(train, tmp_path, processes):
    several = {"launcher": "torchrun", "options": ("--nproc_per_node", processes)}
    assert train("--batch-size", "12", case="unused").returncode == 0
    done = train("--batch-size", "12", "--steps", "8", case="unused", **several)
    assert done.returncode == 1
    assert "a loss has to use every parameter of its networks" in done.stderr
    parts = ("--batch-size", "12", "--micro-batches", processes, "--run-dir", tmp_path / "parts")
    assert train(*parts, case="unused", **several).returncode == 0


def test_on_three_processes_metrics_are_put_together_by_their_names(train, tmp_path):
    three = {"launcher": "torchrun", "options": ("--nproc_per_node", "3")}
    done = train("--batch-size", "9", **three)
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert {(row["train/a"], row["train/b"]) for row in rows if "train/a" in row} == {(1.0, 100.0)}
    done = train("--batch-size", "9", "--run-dir", tmp_path / "other", case="missing", **three)
    assert [line for line in done.stderr.splitlines() if "give other metrics than those of others" in line]
    assert "SIGABRT" not in done.stderr
