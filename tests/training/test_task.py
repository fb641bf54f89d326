"""Optimizer state made ahead of the first step: complete, zero, and without a trace in the training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cs324dist.distributed.process import start_accelerator
from cs324dist.models.lstm import LSTM
from cs324dist.runs.run_dir import RunDir
from cs324dist.settings import RunSettings
from cs324dist.tasks.base import Evaluation, create_state, optimizer_tensors
from cs324dist.trainer import resume

MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "fused Adam": lambda parameters: torch.optim.Adam(parameters, 1e-2, (0.0, 0.99), fused=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 1e-2, weight_decay=0.1),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, 1e-3, foreach=True),
}
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
KEYS = {"fused Adam": MOMENTS, "AdamW": MOMENTS, "RMSprop": {"step", "square_avg"}}


@dataclass
class Toy:
    """As much of a task as its optimizer state needs."""

    models: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]
    settings: RunSettings = field(default_factory=RunSettings)
    counters: dict[str, int] = field(default_factory=dict)
    counter_limits: dict[str, range] = field(default_factory=dict)

    def step(self, step: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def evaluate(self) -> Evaluation:
        raise NotImplementedError


def model() -> LSTM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = LSTM(3, 4, 5)
    with torch.no_grad():  # a first step could disturb these without anyone seeing it in a sum
        made.output.bias.copy_(torch.tensor([0.0, -0.0, 1e-30, -1e30, 1.0]))
    return made


def bits(module: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()}


def train(module: LSTM, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(6, 8, 3, generator=generator)
        F.cross_entropy(module(x), torch.arange(8) % 5).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(params=MAKERS)
def kind(request) -> str:
    return request.param


def test_the_state_is_complete_and_zero_and_the_weights_are_untouched(kind):
    module = model()
    optimizer = MAKERS[kind](module.parameters())
    create_state(optimizer)
    for parameter in module.parameters():
        state = optimizer.state[parameter]
        assert set(state) == KEYS[kind]
        assert state["step"].shape == ()
        assert all(value.shape == parameter.shape for key, value in state.items() if key != "step")
        assert not any(value.any() for value in state.values())
        assert parameter.grad is None
    assert bits(module) == bits(model())


def test_training_is_that_of_an_optimizer_that_made_its_state_itself(kind):
    ahead, usual = model(), model()
    for module in (ahead, usual):
        optimizer = MAKERS[kind](module.parameters())
        if module is ahead:
            create_state(optimizer)
        train(module, optimizer, 5)
    assert bits(ahead) == bits(usual)
    assert bits(ahead) != bits(model())


def test_tensors_are_named_by_model_parameter_and_kind(kind):
    module = model()
    optimizer = MAKERS[kind](module.parameters())
    names = {f"lstm/{name}/{key}" for name, _ in module.named_parameters() for key in KEYS[kind]}
    assert optimizer_tensors(Toy({"lstm": module}, {"lstm": optimizer})).keys() == names
    assert {"lstm/W_x/step", "lstm/output.weight/step"} < names


def test_a_model_without_an_optimizer_has_no_state():
    module = model()
    optimizer = MAKERS["fused Adam"](module.parameters())
    create_state(optimizer)
    toy = Toy({"lstm": module, "average": model()}, {"lstm": optimizer})
    assert {name.split("/")[0] for name in optimizer_tensors(toy)} == {"lstm"}


def test_what_is_written_into_the_tensors_is_what_the_optimizer_goes_on_with(kind):
    straight, continued = model(), model()
    optimizer = MAKERS[kind](straight.parameters())
    create_state(optimizer)
    train(straight, optimizer, 3)

    continued.load_state_dict(straight.state_dict())
    other = MAKERS[kind](continued.parameters())
    create_state(other)
    targets = optimizer_tensors(Toy({"lstm": continued}, {"lstm": other}))
    for name, value in optimizer_tensors(Toy({"lstm": straight}, {"lstm": optimizer})).items():
        targets[name].copy_(value)

    train(straight, optimizer, 3)
    train(continued, other, 3)
    assert bits(continued) == bits(straight)


def test_a_run_begins_with_all_of_the_state_though_its_first_steps_use_less(kind, tmp_path):
    module = model()
    optimizer = MAKERS[kind](module.parameters())
    toy = Toy({"lstm": module}, {"lstm": optimizer})
    resume(toy, RunDir(tmp_path / "new"), start_accelerator())
    module.output.weight.square().sum().backward()
    optimizer.step()
    assert all(KEYS[kind] <= optimizer.state[parameter].keys() for parameter in module.parameters())
