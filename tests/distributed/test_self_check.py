"""A run checks itself: planted faults are found and named, on one process and on three."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import MagicMock, Mock

import exact_steps
import numpy as np
import pytest
import torch
from launched import refusal
from ranks import Rank, as_ranks
from torch import Tensor, nn

from cs324dist import Config, MicroBatch, Stream, Task
from cs324dist.data.streams import CPU, seed_everything
from cs324dist.distributed import gradients
from cs324dist.distributed.parts import rank_and_processes
from cs324dist.errors import ReportedError, RunFailed
from cs324dist.loop import TaskRun
from cs324dist.run import Run
from cs324dist.trainer import Trainer

COUNT, STEPS = 4, 3
REPEATED = 3  # the last part, on any number of processes


class Own(Task[Config]):
    name = "own"
    presets: ClassVar = {"fast": Config(batch_size=2 * COUNT, micro_batches=COUNT)}
    middle: ClassVar[type[nn.Module]] = nn.Identity

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        self.net = nn.Sequential(nn.Linear(3, 3), self.middle(3), nn.Linear(3, 1))
        self.networks = {"net": self.net}
        self.optimizers = {"net": torch.optim.Adam(self.net.parameters(), 0.1)}

    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.net(self.inputs(batch)).square().mean()
        return loss, {"loss": loss}

    def inputs(self, batch: MicroBatch) -> Tensor:
        return Stream(0, "inputs").normals(batch.samples, 3)


class OneBit(Own):
    """Broken hardware: in step `self.wrong`, one bit of the gradient of one part."""

    wrong = 0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.net[2].weight.register_hook(self.flipped)

    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        self.batch = batch
        return super().loss(batch)

    def flipped(self, gradient: Tensor) -> Tensor:
        batch, gradient = self.batch, gradient.clone()
        if batch.index == REPEATED and not batch.is_check and batch.step == self.wrong:
            gradient.view(torch.int32)[0, 0] ^= 1
        return gradient


class OneBitLater(OneBit):
    wrong = 2


class OtherData(Own):
    """On one rank."""

    def inputs(self, batch: MicroBatch) -> Tensor:
        return super().inputs(batch) + 1e-6 * (rank_and_processes()[0] == 1)


class OwnGenerator(Own):
    """That nothing seeds or keeps."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.generator = np.random.default_rng(0)

    def inputs(self, batch: MicroBatch) -> Tensor:
        return super().inputs(batch) + self.generator.normal()


class HiddenCounter(Own):
    """In an object of which nobody looks at the attributes."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.net.state = SimpleNamespace(calls=0)

    def inputs(self, batch: MicroBatch) -> Tensor:
        self.net.state.calls += 1
        return super().inputs(batch) * self.net.state.calls


class ChangesData(Own):
    """Past `_version`, which counts changes."""

    def inputs(self, batch: MicroBatch) -> Tensor:
        self.net[0].weight.data.mul_(0.5)
        return super().inputs(batch)


def take_steps(task_type: type[Own], rank: Rank, middle: type[nn.Module], **options: int) -> list[Tensor]:
    config = replace(Own.presets["fast"], **options)
    seed_everything(0, "task", CPU)
    with_middle = type(task_type.__name__, (task_type,), {"middle": middle})
    trainer = Trainer(with_middle(config, CPU), rank)
    for step in range(STEPS):
        trainer.step(step, is_logged=True)
    return [tensor.clone() for tensor in trainer.task.net.state_dict().values()]


MIDDLES = (nn.Identity, nn.BatchNorm1d)


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize(
    ("fault", "said", "every"),
    [
        (OneBit, "in step 1, the gradient of net.2.weight of part 3 of the batch was not the same", 100),
        (OneBitLater, "in step 3, the gradient of net.2.weight of part 3 of the batch was not the same", 2),
        (
            OtherData,
            "in step 1, the loss of part 1 of the batch was not the same when rank 0 computed it",
            100,
        ),
        (OwnGenerator, "in step 1, the loss of part", 100),
        (HiddenCounter, "in step 1, the loss of part", 100),
        (ChangesData, "the loss changes net.0.weight in its forward pass", 100),
    ],
)
def test_a_fault_is_found_and_named(fault, said, every, middle, processes):
    def found(rank: Rank) -> str:
        return refusal(take_steps, fault, rank, middle, check_every=every, kind=ReportedError)

    if fault is OtherData and processes == 1:
        return
    for line in as_ranks(processes, found):
        assert said in line
        assert "look for random numbers that nothing seeds" in line or fault is ChangesData
    as_ranks(processes, lambda rank: take_steps(fault, rank, middle, check_every=0))  # nothing else finds it


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("case", ["mixed", "lstm"])
def test_a_check_changes_nothing(case, processes):
    def found(rank: Rank) -> list[dict[str, Any]]:
        return [exact_steps.digests(case, rank, check_every=every) for every in (0, 1)]

    for without, checked in as_ranks(processes, found):
        assert without == checked


def first_moment(task: Own) -> Tensor:
    return task.optimizers["net"].state[task.net[2].bias]["exp_avg"]


class TestRanksAreCompared:
    def run_of(self, rank: Rank, micro_batches: int | None = COUNT) -> TaskRun:
        seed_everything(0, "task", CPU)
        config = replace(Own.presets["fast"], micro_batches=micro_batches, run_dir=Path("runs/own"))
        task_type = type("Normed", (Own,), {"middle": nn.BatchNorm1d})
        trainer = Trainer(task_type(config, CPU), rank)
        trainer.task.extra = [1]
        trainer.task.state_dict = lambda: {"extra": trainer.task.extra, "tensor": torch.tensor([1.5])}
        trainer.step(0, is_logged=False)
        run = TaskRun(trainer)
        run.step = 1
        return run

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda task: task.net[0].weight, "net: 0.weight"),
            (lambda task: task.net[1].running_var, "net: 1.running_var"),
            (first_moment, "optimizers: net/net.2.bias/exp_avg"),
            (lambda task: task.extra.append(2), "the task's own state"),
        ],
    )
    def test_one_bit_on_one_rank_is_found_and_named(self, change, said):
        def found(rank: Rank) -> str:
            run = self.run_of(rank)
            run.compare()
            if rank.process_index == 1 and (changed := change(run.task)) is not None:
                changed.data.view(torch.int32).view(-1)[0] ^= 1
            return refusal(run.compare, kind=RunFailed)

        for line in as_ranks(3, found):
            assert line.startswith(f"after step 1, {said}")
            assert " on rank 1 is not as on ranks 0, 2" in line
            assert "(1 of " in line

    def test_without_micro_batches_buffers_come_from_the_first(self, monkeypatch):
        monkeypatch.setattr(gradients, "_wrapped", lambda losses, place: losses)  # all have the same loss

        def found(rank: Rank) -> float:
            run = self.run_of(rank, None)
            for parameter in run.task.net.parameters():
                parameter.detach().fill_(1)
            run.task.optimizers["net"].state.clear()
            run.task.net[1].running_mean.fill_(rank.process_index + 2)
            run.compare()
            return run.task.net[1].running_mean[0].item()

        assert as_ranks(3, found) == [2, 2, 2]

    def test_nothing_is_saved_where_they_differ(self):
        run = MagicMock(compare=Mock(side_effect=RunFailed("they differ")))
        with pytest.raises(RunFailed, match="they differ"):
            Run._write(run)
        run._on_main.assert_not_called()
