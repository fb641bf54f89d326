"""What cannot be exact is refused by name, wherever its parts are; and each guard is what refuses it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar
from unittest.mock import Mock

import pytest
import torch
from ranks import Rank, as_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm

from cs324dist import Config, MicroBatch, Task
from cs324dist.data.streams import CPU, seed_everything
from cs324dist.distributed import exact
from cs324dist.distributed.belongings import Unchanged
from cs324dist.distributed.exact import ExactGradients
from cs324dist.errors import UserError
from cs324dist.trainer import Trainer

COUNT = 4
Made = Callable[["Own"], Any]


class Own(Task[Config]):
    """Embeds its samples; a habit changes it after it was made, or is its loss."""

    name = "own"
    presets: ClassVar = {"fast": Config(batch_size=2 * COUNT, micro_batches=COUNT)}

    def __init__(self, config: Config, device: torch.device, habit: Made) -> None:
        super().__init__(config, device)
        self.net = nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 3), nn.Identity(), nn.Linear(3, 1))
        self.change = self.before = self.after = lambda *_: None
        habit(self)
        self.networks = {"net": self.net}
        trained = [p for p in self.net.parameters() if not nn.parameter.is_lazy(p)]
        self.optimizers = {"net": torch.optim.SGD(trained, 0.1, momentum=0.9)}

    def step(self, step: int, trainer: Any) -> None:
        self.before(self)
        trainer.update("net", self.loss)
        self.after(self)

    def loss(self, batch: MicroBatch) -> tuple[Any, dict[str, Tensor]]:
        loss = self.net(batch.samples % 9).square().mean()
        return self.change(loss, batch) or loss, {}


def habit(**attributes: Any) -> Made:
    return lambda task: vars(task).update(attributes)


def layer(number: int, made: Callable[[], nn.Module]) -> Made:
    return lambda task: task.net.__setitem__(number, made())


def keeps_backward(loss: Tensor, batch: MicroBatch) -> None:
    loss.backward(retain_graph=True)


def pair_in_one_part(loss: Tensor, batch: MicroBatch) -> Any:
    return (loss * 2, 2.0) if batch.index == 2 else None


def backward_before(task: Own) -> None:
    task.net(torch.arange(3)).sum().backward()


def hooked(task: Own) -> None:
    task.net[3].weight.register_post_accumulate_grad_hook(lambda parameter: None)


def scheduler_made_late(task: Own) -> None:
    task.scheduler = torch.optim.lr_scheduler.StepLR(task.optimizers["net"], 1)


def rate_by_hand(task: Own) -> None:
    task.optimizers["net"].param_groups[0]["lr"] *= 0.5


class MovingAverage(nn.Module):
    """Of what it has seen, as in a BatchNorm of one's own or a codebook."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


class Normalised(nn.Module):
    """InstanceNorm with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(3, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.T[None])[0].T


def no_check(*_: Any) -> None: ...


def only_forget(names: list[str], parameters: list[nn.Parameter], given: object) -> None:
    for parameter in parameters:
        parameter.grad = None


CHANGES = "the loss changes net.{} in its forward pass, once for each part of the batch"
BEFORE = (exact, "refuse_gradients_of_others", only_forget)
AFTER = (exact, "refuse_gradients_of_the_loss", no_check)
RATES, SCHEDULE = (Trainer, "_set_rates", no_check), (Trainer, "_check_schedule", no_check)
HIDDEN = (Unchanged, "check", no_check)  # the result would depend on the number of processes
REFUSED = {
    "max_norm": (layer(0, lambda: nn.Embedding(9, 3, max_norm=0.1)), CHANGES.format("0.weight"), HIDDEN),
    "spectral_norm": (
        layer(1, lambda: spectral_norm(nn.Linear(3, 3))),
        CHANGES.format("1.parametrizations.weight.0._u"),
        HIDDEN,
    ),
    "InstanceNorm's statistics": (layer(2, Normalised), CHANGES.format("2.norm.running_mean"), HIDDEN),
    "a moving average": (layer(2, MovingAverage), CHANGES.format("2.mean"), HIDDEN),
    "backward() in the loss": (habit(change=keeps_backward), "the loss calls backward(), which", AFTER),
    "a gradient before": (habit(before=backward_before), "net.0.weight has a gradient before", BEFORE),
    "a post-accumulate hook": (hooked, "net.3.weight has a post-accumulate hook", BEFORE),
    "sparse": (
        layer(0, lambda: nn.Embedding(9, 3, sparse=True)),
        "the gradient of net.0.weight is sparse: give its embedding sparse=False",
        AFTER,
    ),
    "a pair in one part": (habit(change=pair_in_one_part), "the losses of some parts are pairs", None),
    "a lazy layer": (
        layer(1, lambda: nn.LazyLinear(3)),
        "net.1.weight is lazy, without a shape before the first",
        None,
    ),
    "a rate by hand": (habit(after=rate_by_hand), "the task has set a learning rate of optimizer", RATES),
    "a scheduler made late": (habit(before=scheduler_made_late), "has a scheduler of torch", SCHEDULE),
}


def take_steps(rank: Rank, made: Made, **options: int) -> list[Tensor]:
    seed_everything(0, "task", CPU)
    config = replace(Own.presets["fast"], **options)
    trainer = Trainer(Own(config, CPU, made), rank)
    for step in range(3):
        trainer.step(step, is_logged=False)
    return [tensor.clone() for tensor in trainer.task.net.state_dict().values()]


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("check_every", [0, 100])
@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_by_name(case, check_every, processes):
    made, said, _ = REFUSED[case]

    def refused(rank: Rank) -> str:
        with pytest.raises(UserError) as raised:
            take_steps(rank, made, check_every=check_every)
        return str(raised.value)

    for line in as_ranks(processes, refused):
        assert said in line


@pytest.mark.parametrize("case", [case for case, (*_, guard) in REFUSED.items() if guard])
def test_without_the_guard_nothing_says_so(case, monkeypatch):
    made, _, guard = REFUSED[case]
    monkeypatch.setattr(*guard)
    one = take_steps(Rank(0, 1), made, check_every=0)
    if guard is HIDDEN:
        three = as_ranks(3, lambda rank: take_steps(rank, made, check_every=0))
        assert not all(map(torch.equal, one, three[0]))


def test_a_network_in_ddp_is_refused():
    wrapped = Mock(spec=DistributedDataParallel)
    with pytest.raises(UserError, match="is wrapped by DDP"):
        ExactGradients(COUNT, 0, Rank(0, 1)).prepare(wrapped)
