"""Steps of tasks that the toolkit does not bring: what the trainer leaves as it was, beside plain loops."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from cs324dist import Config, MicroBatch, Stream, Task, seeded
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


def test_after_an_evaluation_each_part_is_in_the_mode_it_had() -> None:
    backbone = nn.Sequential(linear(2, 2), nn.Dropout()).requires_grad_(False).eval()
    net = nn.Sequential(backbone, nn.Dropout(), linear(2, 1))
    trainer = trainer_of(Partly, None, net=net)
    before = {module: module.training for module in net.modules()}
    assert set(before.values()) == {True, False}
    with trainer.evaluating():
        assert not any(module.training for module in net.modules())
    assert {module: module.training for module in net.modules()} == before


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
        self.unused = nn.Linear(2, 1).to(device)
        self.networks = {"net": nn.ModuleList([self.net, self.unused])}
        trained = self.networks["net"] if CASE == "unused" else self.net
        self.optimizers = {"net": torch.optim.SGD(trained.parameters(), 0.1)}
        self.best = None

    def loss(self, batch):
        loss = self.net(torch.ones(len(batch.samples), 2)).mean()
        self.best = loss.detach()
        return loss, {"loss": loss}

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
    ("evaluation", "said"),
    [
        ("{'a': 'high'}", "the evaluation gives a = 'high': give a number"),
        ("{'a': torch.ones(2)}", "the evaluation gives a = tensor([1., 1.]): give a number"),
        ("{f'class {i}': 1.0 for i in range(70_000)}", "70001 metrics of one step take more than 1048576"),
    ],
)
def test_what_could_not_be_read_again_is_refused(train, evaluation, said):
    done = train(evaluation=evaluation)
    assert (done.returncode, said in error(done)) == (2, True), done.stderr


def test_a_tensor_that_appears_in_the_state_ends_the_run_before_it_is_saved(train):
    done = train(case="a tensor that appears")
    assert done.returncode == 1
    was, is_now = "no tensor at the start", "torch.float32 of shape ()"
    assert f"after step 2, best of the task's state is {is_now}, and was {was}" in error(done)


def test_a_parameter_without_a_gradient_on_two_processes_is_one_line(train, tmp_path):
    assert train(case="unused").returncode == 0
    done = train("--steps", "8", case="unused", launcher="torchrun", options=("--nproc_per_node", "2"))
    assert done.returncode == 1
    assert any("a loss has to use every parameter" in line for line in done.stderr.splitlines())
    parts = ("--micro-batches", "2", "--run-dir", tmp_path / "parts")
    assert (
        train(*parts, case="unused", launcher="torchrun", options=("--nproc_per_node", "2")).returncode == 0
    )
