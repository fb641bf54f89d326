"""When a curriculum goes on, and how far."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from cs324dist.tasks import lstm
from cs324dist.tasks.lstm import FAST, LSTMTask


class OneOfTwo(Accelerator):
    """What a task needs of Accelerate, on rank 0 of two; the other rank's sums are given."""

    process_index, num_processes, device = 0, 2, torch.device("cpu")

    def __init__(self, right_elsewhere: int) -> None:
        self.right_elsewhere, self.asked = right_elsewhere, 0

    def prepare(self, *objects):
        return objects

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters, largest: float) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, largest)

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        self.asked += 1
        return tensor + self.right_elsewhere


def lengths(monkeypatch: pytest.MonkeyPatch, enough: float, right_elsewhere: int, **changes) -> list[int]:
    monkeypatch.setattr(lstm, "ENOUGH", enough)
    accelerator = OneOfTwo(right_elsewhere)
    task = LSTMTask(replace(FAST, batch_size=8, hidden_size=4, **changes), accelerator)
    found = []
    for step in range(8):
        found.append(task.counters["length"])
        task.step(step)
    return found


def test_it_grows_by_its_factor_to_the_length_at_every_second_step(monkeypatch):
    assert lengths(monkeypatch, 0.0, 0, length=20) == [4, 4, 9, 9, 19, 19, 20, 20]
    assert lengths(monkeypatch, 0.0, 0, length=20, curriculum=4.0) == [4, 4, 17, 17, 20, 20, 20, 20]


def test_it_does_not_depend_on_how_many_steps_are_to_come(monkeypatch):
    """A run may be given more steps later."""
    for steps in range(1, 9):
        assert lengths(monkeypatch, 0.0, 0, length=20, steps=steps)[:6] == [4, 4, 9, 9, 19, 19]


def test_what_is_enough_is_counted_over_all_ranks(monkeypatch):
    assert lengths(monkeypatch, 0.97, 100, length=20)[-1] == 20
    assert lengths(monkeypatch, 2.0, 11, length=20) == [4] * 8  # at most 4 are here, 15 are not 16


def test_without_one_the_length_is_there_from_the_start(monkeypatch):
    assert lengths(monkeypatch, 0.0, 0, length=20, curriculum=1.0) == [20] * 8
    assert lengths(monkeypatch, 0.0, 0, length=3) == [3] * 8


def test_ranks_are_asked_at_every_second_step_and_no_more_at_the_full_length():
    accelerator = OneOfTwo(100)
    task = LSTMTask(replace(FAST, batch_size=8, hidden_size=4, length=20), accelerator)
    for step in range(10):
        task.step(step)
    assert accelerator.asked == 3
