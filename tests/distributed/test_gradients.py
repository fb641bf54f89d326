"""Gradients of what a loss may be: means, sums with weights, constants, of some parts of the batch alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import Rank, as_ranks
from torch import Tensor, nn

from cs324dist.data.streams import MicroBatch, seeded
from cs324dist.distributed.exact import ExactGradients

COUNT, SIZE = 4, 3
Loss = Callable[[nn.ModuleDict, MicroBatch], Any]


def inputs(batch: MicroBatch) -> Tensor:
    return (batch.samples[:, None] + torch.arange(SIZE)).float().sin()


def mean(net: nn.ModuleDict, batch: MicroBatch) -> Tensor:
    return net["used"](inputs(batch)).square().mean()


def weighted(net: nn.ModuleDict, batch: MicroBatch) -> tuple[Tensor, float]:
    """Of some of the samples: another number in each part, of one part none."""
    some = inputs(batch)[: batch.index]
    return net["used"](some).square().sum(), float(len(some))


def by_one_part(net: nn.ModuleDict, batch: MicroBatch) -> Tensor:
    return net["some"](inputs(batch)).sum() if batch.index == 2 else torch.zeros(())


def constant(net: nn.ModuleDict, batch: MicroBatch) -> Tensor:
    return torch.tensor(1.5)


def constant_pair(net: nn.ModuleDict, batch: MicroBatch) -> tuple[Tensor, float]:
    return torch.tensor(3.0), 2.0


def doubles(net: nn.ModuleDict, batch: MicroBatch) -> Tensor:
    return net["precise"](inputs(batch).double()).square().mean() + net["used"](inputs(batch)).mean()


def network() -> nn.ModuleDict:
    with seeded(0, "weights"):
        layers = {name: nn.Linear(SIZE, 1) for name in ("used", "some", "precise")}
    layers["precise"].double()
    return nn.ModuleDict(layers)


def exact(rank: Rank, loss: Loss) -> tuple[Tensor, dict[str, Tensor | None]]:
    gradients = ExactGradients(COUNT, 0, rank)
    gradients.prepare(net := network())
    value = gradients.backward(lambda batch: loss(net, batch), 0, 2 * COUNT)
    return value, {name: parameter.grad for name, parameter in net.named_parameters()}


def plain(loss: Loss) -> tuple[float, dict[str, Tensor | None]]:
    """The sum of sums over the sum of weights."""
    net, total, weights = network(), torch.zeros((), dtype=torch.float64), 0.0
    for index in range(COUNT):
        found = loss(net, MicroBatch(0, 2 * COUNT, index, COUNT))
        value, weight = found if isinstance(found, tuple) else (found, 1.0)
        total, weights = total + value, weights + weight
    if total.requires_grad:
        (total / weights).backward()
    return total.item() / weights, {name: parameter.grad for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("loss", [mean, weighted, by_one_part, constant, constant_pair, doubles])
def test_it_is_the_gradient_of_a_plain_loop(loss, processes):
    expected_value, expected = plain(loss)
    first = None
    for value, found in as_ranks(processes, lambda rank: exact(rank, loss)):
        assert value.item() == pytest.approx(expected_value)
        for name, gradient in expected.items():
            assert (found[name] is None) == (gradient is None), name
            if gradient is not None:
                torch.testing.assert_close(found[name], gradient)
        first = first or found
        assert all(f is None or torch.equal(f, found[name]) for name, f in first.items())


def test_a_gradient_that_was_used_may_be_left_or_filled_with_zeros():
    gradients, steps = ExactGradients(COUNT, 0, Rank(0, 1)), []
    gradients.prepare(net := network())
    used = torch.optim.SGD(net.parameters(), 0.0).step
    for step, change in enumerate((used, lambda: net.zero_grad(set_to_none=False), net.zero_grad)):
        gradients.backward(lambda batch: mean(net, batch), step, 2 * COUNT)
        steps.append(net["used"].weight.grad.clone())
        change()
    expected = ExactGradients(COUNT, 0, Rank(0, 1))
    expected.prepare(net := network())
    for step, found in enumerate(steps):
        expected.backward(lambda batch: mean(net, batch), step, 2 * COUNT)
        assert torch.equal(net["used"].weight.grad, found)
        net.zero_grad()
