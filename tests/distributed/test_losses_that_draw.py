"""Losses that draw from torch's generators, as dropout does, under --micro-batches."""

import pytest
import torch
from ranks import Rank
from torch import nn

from cs324dist.data.streams import MicroBatch
from cs324dist.distributed import gradients
from cs324dist.distributed.gradients import ExactGradients
from cs324dist.errors import RunFailed

COUNT = 4
BATCHES = {index: MicroBatch(0, 2 * COUNT, index, COUNT) for index in range(COUNT)}


@pytest.fixture(autouse=True)
def threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Step:
    """Computes the gradient of a layer; notes which micro-batches were seeded."""

    def __init__(self, *, meet: bool = False) -> None:
        self.layer, self.seeded = nn.Linear(8, 1), []
        self._gradients = ExactGradients([self.layer], COUNT, COUNT, Rank(0, 1), meet=meet)

    def __call__(self, draw) -> torch.Tensor:
        def seed_of(batch: MicroBatch) -> int:
            self.seeded.append(batch.index)
            return batch.index

        def loss_of(batch: MicroBatch) -> torch.Tensor:
            return self.layer(draw()).sum()

        self._gradients.compute((self.layer,), loss_of, seed_of, BATCHES)
        return self.layer.weight.grad


def drawn() -> torch.Tensor:
    return torch.rand(8)


def constant() -> torch.Tensor:
    return torch.ones(8)


def test_each_micro_batch_draws_what_it_drew_before():
    step, expected = Step(), []
    for index in range(COUNT):
        torch.manual_seed(index)
        expected.append(torch.rand(8))
    for _ in range(3):
        torch.testing.assert_close(step(drawn)[0], torch.stack(expected).mean(dim=0))


def test_drawing_in_some_steps_only_is_refused():
    step = Step()
    step(constant)
    step(constant)
    with pytest.raises(RunFailed, match="draw from a Stream"):
        step(drawn)


def test_drawing_where_micro_batches_meet_is_refused():
    with pytest.raises(RunFailed, match="draw from a Stream"):
        Step(meet=True)(drawn)


def test_a_draw_from_the_device_s_generator_is_noticed(monkeypatch):
    """Dropout on a GPU leaves the CPU's generator as it was."""
    state = torch.zeros(1)
    monkeypatch.setattr(gradients, "torch_states", lambda device: [state.clone()])
    step = Step()
    for _ in range(2):
        step(lambda: state.add_(1).expand(8))
    assert step.seeded == [*BATCHES] * 2
