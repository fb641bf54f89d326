"""Gradients of what a loss may be: means, sums with weights, constants, of some parts of the batch alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from launched import refusal
from ranks import Rank, as_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cs324dist.data.streams import MicroBatch, seeded
from cs324dist.distributed.exact import ExactGradients
from cs324dist.distributed.gradients import DDPGradients

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


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ((0.5, 2), "a loss returned 3 values"),
        (({"accuracy": 0.5},), "and is a dict: return the loss alone"),
        ((torch.zeros(3, 2),), "and is of shape (3, 2): return the loss alone"),
        ((torch.ones((), requires_grad=True),), "and is a tensor with a gradient: return the loss alone"),
    ],
)
def test_a_second_value_that_is_no_weight_is_refused(second, said):
    assert said in refusal(exact, Rank(0, 1), lambda net, batch: (mean(net, batch), *second))


def test_a_weight_that_may_be_a_metric_is_warned_of_once(capsys):
    gradients = ExactGradients(COUNT, 0, Rank(0, 1))
    gradients.prepare(net := network())
    for step, weight in enumerate((1.0, 0.75, 0.5)):
        gradients.backward(lambda batch: (mean(net, batch), weight), step, 2 * COUNT)  # noqa: B023
        net.zero_grad()
        assert ("is taken as the weight of a sum" in capsys.readouterr().err) == (step == 1)


class TestWhatAutogradGradLeavesOut:
    """Where a node leads to no parameter, autograd.grad passes over it, and over the error that it has."""

    class Squared(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * gradient * ctx.saved_tensors[0]

    def net(self, norm: nn.Module) -> nn.Sequential:
        with seeded(0, "weights"):
            layers = nn.Linear(SIZE, 8, bias=False), norm, nn.Tanh(), nn.Linear(8, 1)
        return nn.Sequential(*layers)

    def penalty(self, net: nn.Module, batch: MicroBatch) -> Tensor:
        x = inputs(batch).requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return (slope.norm(dim=1) - 1).square().mean()

    def squared_penalty(self, net: nn.Module, batch: MicroBatch) -> Tensor:
        x = inputs(batch).requires_grad_()
        (slope,) = torch.autograd.grad(self.Squared.apply(net(x)).sum().square(), x, create_graph=True)
        return slope.square().mean()

    def reentrant(self, net: nn.Sequential, batch: MicroBatch) -> Tensor:
        return net[2:](checkpoint(net[:2], inputs(batch).requires_grad_(), use_reentrant=True)).mean()

    def not_reentrant(self, net: nn.Sequential, batch: MicroBatch) -> Tensor:
        return net[2:](checkpoint(net[:2], inputs(batch).requires_grad_(), use_reentrant=False)).mean()

    @pytest.mark.parametrize("processes", [1, 3])
    @pytest.mark.parametrize("loss", ["penalty", "not_reentrant"])
    def test_what_can_be_computed_is_that_of_a_plain_loop(self, loss, processes):
        def found(rank: Rank) -> dict[str, Tensor]:
            exact = ExactGradients(COUNT, 0, rank)
            net = exact.prepare(self.net(nn.LayerNorm(8)))
            exact.backward(lambda batch: getattr(self, loss)(net, batch), 0, 2 * COUNT)
            return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

        plain = self.net(nn.LayerNorm(8))
        getattr(self, loss)(plain, MicroBatch(0, 2 * COUNT)).backward()
        expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
        for of_rank in as_ranks(processes, found):
            torch.testing.assert_close(of_rank, expected)

    @pytest.mark.parametrize("processes", [1, 3])
    @pytest.mark.parametrize(
        ("loss", "norm", "said"),
        [
            ("penalty", nn.BatchNorm1d(8), "(create_graph=True) that passed BatchNorm over the batch"),
            ("squared_penalty", nn.Identity(), "of a function that is once_differentiable"),
            ("reentrant", nn.Identity(), "give it use_reentrant=False"),
        ],
    )
    def test_what_cannot_is_refused(self, loss, norm, said, processes):
        def refused(rank: Rank) -> str:
            exact = ExactGradients(COUNT, 0, rank)
            net = exact.prepare(self.net(norm))
            return refusal(exact.backward, lambda batch: getattr(self, loss)(net, batch), 0, 2 * COUNT)

        for line in as_ranks(processes, refused):
            assert said in line

    def test_without_micro_batches_a_penalty_through_batch_norm_is_torch_s_own(self):
        plain, net = self.net(nn.BatchNorm1d(8)), self.net(nn.BatchNorm1d(8))
        self.penalty(plain, MicroBatch(0, 8)).backward()
        gradients = DDPGradients(0, Rank(0, 1))
        networks = (gradients.prepare(net),)
        gradients.wrap([networks])
        gradients.backward(lambda batch: self.penalty(net, batch), 0, 8, networks, "loss")
        for one, other in zip(plain.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)

    def test_and_on_several_processes_it_is_refused(self):
        gradients = DDPGradients(0, Rank(0, 1))
        gradients.parts.count = 2  # as if there were another
        net = gradients.prepare(self.net(nn.BatchNorm1d(8)))
        gradients.parts.count = 1
        gradients.wrap([(net,)])
        line = refusal(gradients.backward, lambda batch: self.penalty(net, batch), 0, 8, (net,), "loss")
        assert "(create_graph=True) that passed BatchNorm over the batch" in line
