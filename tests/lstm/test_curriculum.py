"""When a curriculum goes on, and how far."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cs324dist.data.streams import MicroBatch
from cs324dist.tasks.base import Loss
from cs324dist.tasks.lstm import task as lstm
from cs324dist.tasks.lstm.task import FAST, LSTMTask

BATCH = 8


class OneOfTwo:
    """A trainer on rank 0 of two, which trains nothing; what is right on the other rank is given."""

    def __init__(self, right_elsewhere: int) -> None:
        self.right_elsewhere, self.asked, self.steps = right_elsewhere, 0, 0

    def update(self, name: str, loss: Loss) -> None:
        loss(MicroBatch(self.steps, BATCH, index=0, count=2))
        self.steps += 1

    def measure(self, loss: Loss) -> None: ...

    def sum(self, values: Mapping[int, Tensor]) -> Tensor:
        self.asked += 1
        assert values.keys() == {0}
        return values[0] + self.right_elsewhere


def task(**changes) -> LSTMTask:
    return LSTMTask(replace(FAST, batch_size=BATCH, hidden_size=4, **changes), torch.device("cpu"))


def lengths(monkeypatch: pytest.MonkeyPatch, enough: float, right_elsewhere: int, **changes) -> list[int]:
    monkeypatch.setattr(lstm, "ENOUGH", enough)
    trainer, trained, found = OneOfTwo(right_elsewhere), task(**changes), []
    for step in range(8):
        found.append(trained.length)
        trained.step(step, trainer)
    return found


def test_it_grows_by_its_factor_to_the_length_at_every_second_step(monkeypatch):
    assert lengths(monkeypatch, 0.0, 0, length=20) == [4, 4, 9, 9, 19, 19, 20, 20]
    assert lengths(monkeypatch, 0.0, 0, length=20, curriculum=4.0) == [4, 4, 17, 17, 20, 20, 20, 20]


def test_what_is_enough_is_counted_over_all_ranks(monkeypatch):
    assert lengths(monkeypatch, 0.97, 100, length=20)[-1] == 20
    assert lengths(monkeypatch, 2.0, 11, length=20) == [4] * 8  # at most 4 are here, 15 are not 16


def test_without_one_the_length_is_there_from_the_start(monkeypatch):
    assert lengths(monkeypatch, 0.0, 0, length=20, curriculum=1.0) == [20] * 8
    assert lengths(monkeypatch, 0.0, 0, length=3) == [3] * 8
