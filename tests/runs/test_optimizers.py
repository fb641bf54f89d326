"""The state of any optimizer comes back to the last bit, and a run's first steps are those of plain torch."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from launched import refusal
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from cs324dist.config import Config
from cs324dist.data.streams import MicroBatch
from cs324dist.loop import TaskRun
from cs324dist.runs.checkpoints import TrainerState, read_checkpoint, write_checkpoint
from cs324dist.runs.hidden_state import HiddenState
from cs324dist.tasks.base import Metrics, Task, Updater
from cs324dist.tasks.lstm.networks import RNN
from cs324dist.trainer import Trainer

Networks = dict[str, nn.Module]
Optimizers = dict[str, Optimizer | list[Optimizer]]
Build = Callable[[Networks], Optimizers]

optim = torch.optim


class Slowing(optim.SGD):
    """Keeps a number in its groups, as schedule-free optimizers and Prodigy do."""

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"] / group["steps"])


KINDS: dict[str, Callable[..., Optimizer]] = {
    "fused Adam": lambda parameters: optim.Adam(parameters, 1e-2, (0.0, 0.99), fused=True),
    "Adam with AMSGrad": lambda parameters: optim.Adam(parameters, 1e-2, amsgrad=True),
    "AdamW": lambda parameters: optim.AdamW(parameters, 1e-2, weight_decay=0.1),
    "Adamax": lambda parameters: optim.Adamax(parameters, 1e-2),
    "NAdam": lambda parameters: optim.NAdam(parameters, 1e-2),
    "RAdam": lambda parameters: optim.RAdam(parameters, 1e-2),
    "RMSprop": lambda parameters: optim.RMSprop(parameters, 1e-3, foreach=True),
    "centred RMSprop": lambda parameters: optim.RMSprop(parameters, 1e-3, centered=True, momentum=0.9),
    "Rprop": lambda parameters: optim.Rprop(parameters, 1e-2),
    "ASGD": lambda parameters: optim.ASGD(parameters, 1e-1, t0=2),
    "SGD": lambda parameters: optim.SGD(parameters, 1e-1),
    "SGD with dampening": lambda parameters: optim.SGD(parameters, 1e-1, momentum=0.9, dampening=0.5),
    "Adagrad": lambda parameters: optim.Adagrad(parameters, 1e-1, initial_accumulator_value=0.1),
    "Adadelta": lambda parameters: optim.Adadelta(parameters, 1.0),
    "a number of steps in a group": lambda parameters: Slowing(parameters, 1e-1),
    "Adafactor": lambda parameters: optim.Adafactor(parameters, 1e-2),
}


def one(kind: str) -> Build:
    return lambda networks: {"rnn": KINDS[kind](networks["rnn"].parameters())}


def several_under_one_name(networks: Networks) -> Optimizers:
    matrices = [p for p in networks["rnn"].parameters() if p.dim() > 1]
    biases = [p for p in networks["rnn"].parameters() if p.dim() == 1]
    return {"rnn": [KINDS["NAdam"](matrices), KINDS["SGD with dampening"](biases), KINDS["Rprop"](biases)]}


def one_over_two_networks(networks: Networks) -> Optimizers:
    return {"both": KINDS["NAdam"]([p for network in networks.values() for p in network.parameters()])}


def two_names_for_one_network(networks: Networks) -> Optimizers:
    return {name: KINDS[kind](networks["rnn"].parameters()) for name, kind in (("a", "ASGD"), ("b", "Rprop"))}


BUILDS: dict[str, Build] = {
    **{kind: one(kind) for kind in KINDS},
    "several under one name": several_under_one_name,
    "one over two networks": one_over_two_networks,
    "two names for one network": two_names_for_one_network,
}


def networks() -> Networks:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: Networks = {"rnn": RNN(2, 3, 4), "head": nn.Linear(4, 4)}
        made["rnn"].unused = nn.Linear(2, 2)  # never has a gradient
    with torch.no_grad():  # a step could disturb these without anyone seeing it in a sum
        made["rnn"].output.bias.copy_(torch.tensor([0.0, -0.0, 1e-30, 1.0]))
    return made


def loss_at(step: int, networks: Mapping[str, nn.Module]) -> Tensor:
    x = torch.randn(5, 8, 2, generator=torch.Generator().manual_seed(step))
    return F.cross_entropy(networks["head"](networks["rnn"](x).clamp(-9, 9)), torch.arange(8) % 4)


def bits(networks: Mapping[str, nn.Module]) -> dict[str, bytes]:
    return {
        f"{name}.{key}": tensor.numpy().tobytes()
        for name, network in networks.items()
        for key, tensor in network.state_dict().items()
    }


class Learner(Task[Config]):
    name = "learner"
    presets: ClassVar = {"default": Config(batch_size=8)}
    build: Build

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        self.networks = networks()
        self.optimizers = type(self).build(self.networks)

    def step(self, step: int, trainer: Updater) -> None:
        for name in self.optimizers:
            trainer.update(name, self.loss)

    def loss(self, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        loss = loss_at(batch.step, self.networks)
        return loss, {"loss": loss}


def start(build: Build, folder: Path | None = None) -> tuple[Learner, Trainer]:
    task_type = type("Learner", (Learner,), {"build": staticmethod(build)})
    task = task_type(replace(Learner.presets["default"], run_dir=folder), torch.device("cpu"))
    return task, Trainer(task, Accelerator(cpu=True))


def plain_torch(build: Build, steps: int) -> dict[str, bytes]:
    """The weights after some steps that nobody interrupts."""
    trained = networks()
    optimizers = build(trained)
    for step in range(steps):
        for some in optimizers.values():
            loss_at(step, trained).backward()
            for optimizer in some if isinstance(some, list) else [some]:
                optimizer.step()  # all of them with this gradient
            for network in trained.values():
                network.zero_grad()
    return bits(trained)


@pytest.fixture(params=BUILDS)
def build(request) -> Build:
    return BUILDS[request.param]


def test_a_run_is_plain_torch_from_its_first_step_and_across_a_restart(build, tmp_path):
    task, trainer = start(build, tmp_path / "run")
    hidden = HiddenState(task)
    with TaskRun(trainer):
        for step in range(3):
            trainer.step(step, is_logged=False)
        assert bits(task.networks) == plain_torch(build, 3)
        write_checkpoint(tmp_path / "3", task, TrainerState(3, hidden=hidden.changed()))

    task, trainer = start(build)
    read_checkpoint(tmp_path / "3", task, HiddenState(task), trainer.accelerator.scaler)
    for step in range(3, 7):
        trainer.step(step, is_logged=False)
    assert bits(task.networks) == plain_torch(build, 7)
    assert bits(task.networks) != plain_torch(build, 3)


def test_the_state_of_another_optimizer_is_refused_and_nothing_changes(tmp_path):
    task, trainer = start(one("NAdam"))
    trainer.step(0, is_logged=False)
    write_checkpoint(tmp_path / "1", task, TrainerState(1))
    other, _ = start(one("fused Adam"))
    line = refusal(read_checkpoint, tmp_path / "1", other)
    assert line.startswith(f"{tmp_path / '1' / 'optimizers.safetensors'} holds ")
    assert "tensors too many, the first of them 'rnn/rnn." in line
    assert bits(other.networks) == bits(networks())
    assert not other.optimizers["rnn"].state


class Remembers(optim.SGD):
    """Has something of its own in its state."""

    def __init__(self, parameters, remembered: object) -> None:
        super().__init__(parameters, 1e-1)
        self.remembered = remembered

    @torch.no_grad()
    def step(self, closure=None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["remembered"] = self.remembered


@pytest.mark.parametrize("value", ["warm", [torch.zeros(2)]], ids=["a word", "a list"])
def test_what_else_is_in_a_state_is_refused_before_the_first_step(tmp_path, value):
    task, trainer = start(lambda n: {"rnn": Remembers(n["rnn"].parameters(), value)}, tmp_path / "run")
    line = refusal(TaskRun(trainer).__enter__)
    assert line.startswith("the state of an optimizer holds rnn/rnn.input.weight/remembered = ")
    assert bits(task.networks) == bits(networks())
