"""Losses that draw, as dropout does: each part draws the same wherever it is computed."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ranks import Rank, as_ranks
from torch import Tensor, nn

from cs324dist.data.streams import MicroBatch, generators, seed_everything, seeded
from cs324dist.distributed.exact import ExactGradients

COUNT, SIZE, STEPS = 4, 8, 3


def drawn(step: int) -> Tensor:
    return torch.rand(2, SIZE)


def drawn_by_numpy(step: int) -> Tensor:
    return torch.from_numpy(np.random.random((2, SIZE))).float()


def drawn_by_python(step: int) -> Tensor:
    return torch.tensor([[random.random() for _ in range(SIZE)] for _ in range(2)])


def drawn_in_some_steps(step: int) -> Tensor:
    return torch.rand(2, SIZE) if step == 1 else torch.ones(2, SIZE)


def gradients(rank: Rank, draw: Callable[[int], Tensor], middle: nn.Module) -> list[Tensor]:
    """Of all steps; the loss draws before and after `middle`."""
    with seeded(0, "weights"):
        layers = nn.Sequential(nn.Linear(SIZE, SIZE), middle, nn.Linear(SIZE, 1))
    exact = ExactGradients(COUNT, 0, rank)
    exact.prepare(layers)

    def loss_of(batch: MicroBatch) -> Tensor:
        hidden = layers[:2](batch.samples[:, None] + draw(batch.step))
        return layers[2](hidden * draw(batch.step)).square().mean()

    def of_step(step: int) -> list[Tensor]:
        layers.zero_grad()
        exact.backward(loss_of, step, 2 * COUNT)
        return [parameter.grad.clone() for parameter in layers.parameters() if parameter.requires_grad]

    return [gradient for step in range(STEPS) for gradient in of_step(step)]


@pytest.mark.parametrize("draw", [drawn, drawn_by_numpy, drawn_by_python, drawn_in_some_steps])
@pytest.mark.parametrize("middle", [nn.Identity, nn.Dropout, lambda: nn.BatchNorm1d(SIZE)])
def test_gradients_are_the_same_on_one_process_and_on_three(draw, middle):
    one = gradients(Rank(0, 1), draw, middle())
    for three in as_ranks(3, lambda rank: gradients(rank, draw, middle())):
        assert all(map(torch.equal, one, three))
    assert not torch.equal(one[0], one[len(one) // STEPS])


def test_a_part_draws_as_after_seeding_and_the_process_goes_on_as_if_nothing_had_drawn():
    weight, exact, expected = nn.Linear(SIZE, 1, bias=False), ExactGradients(COUNT, 7, Rank(0, 1)), []
    exact.prepare(weight)
    cpu = torch.device("cpu")
    for index in range(COUNT):
        seed_everything(7, f"step 5/loss/{index}", cpu)
        expected.append(torch.rand(SIZE))
    before = generators(cpu)
    exact.backward(lambda batch: weight(torch.rand(SIZE)).sum(), 5, COUNT)
    torch.testing.assert_close(weight.weight.grad[0], torch.stack(expected).mean(0))
    after = generators(cpu)
    assert torch.equal(before[0], after[0])
    assert (before[2][1] == after[2][1]).all()
