"""Gradients of wide linear layers from their factors are those that autograd gives for the whole batch."""

import copy
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from cs324dist.data.streams import MicroBatch
from cs324dist.distributed import gradients
from cs324dist.distributed.factored_linear import factor_linear_layers, mean_products
from cs324dist.distributed.gradients import ExactGradients

PARTS, SIZE, WIDTH = 3, 2, 700  # 700: two pieces, one of them small


class Network(nn.Module):
    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.wide, self.read = nn.Linear(WIDTH, WIDTH, bias=bias), nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(torch.tanh(self.wide(x)))


def plain(network, x):
    return network(x).square().mean()


def used_twice(network, x):
    return network(network.wide(x)).square().mean()


def used_without_the_layer_as_well(network, x):
    return network(x).mean() + F.linear(x, network.wide.weight).square().mean() + network.wide.weight.sum()


def gradient_penalty(network, x):
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    return network(x).mean() + slope.square().mean()


def input_gradient(network, x):
    """A gradient taken inside a loss is none of the loss's own."""
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(network(x).sum(), x)
    return (network(x) * slope.mean()).square().mean()


def some_parts_only(network, x):
    wide = network.wide(x) if x[0, 0] > 0 else x
    return network.read(wide).square().mean()


def other_numbers_of_rows(network, x):
    return network(x[:1] if x[0, 0] > 0 else x).square().mean()


def sequences(network, x):
    return network(x.view(2, -1, WIDTH)).square().mean()


def gradients_of(network, loss, parts, precision="no"):
    """Of the mean over parts; and whether the wide layer's was made of factors."""
    weight, recorded, cores = network.wide.weight, [], torch.get_num_threads()
    accelerator = Mock(spec=Accelerator, device=torch.device("cpu"))
    exact = ExactGradients([network], len(parts), len(parts), accelerator, meet=False)

    def loss_of(batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return loss(network, parts[batch.index])

    def spied(weights, found, *rest):
        recorded.extend(factors for factors in found.values() if weight in factors)
        return mean_products(weights, found, *rest)

    batches = {index: MicroBatch(0, 1, index, len(parts)) for index in range(len(parts))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "mean_products", spied)
        exact.compute((network,), loss_of, lambda _: 0, batches)
    torch.set_num_threads(cores)
    return [parameter.grad for parameter in network.parameters()], bool(recorded)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    "loss",
    [plain, used_twice, used_without_the_layer_as_well, gradient_penalty, input_gradient, some_parts_only,
     other_numbers_of_rows, sequences],
    ids=lambda loss: loss.__name__,
)  # fmt: skip
def test_they_are_autograds(loss, bias):
    torch.manual_seed(0)
    network, x = Network(bias=bias), torch.randn(PARTS, SIZE, WIDTH)
    x[:, 0, 0] = torch.tensor([1.0, -1.0, 1.0])
    reference = copy.deepcopy(network).double()
    torch.stack([loss(reference, part) for part in x.double()]).mean().backward()
    found, is_factored = gradients_of(network, loss, x)
    assert is_factored
    for gradient, parameter in zip(found, reference.parameters(), strict=True):
        difference = (gradient - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-30)
        assert difference < 1e-4


def test_they_are_autograds_in_bf16():
    torch.manual_seed(0)
    network, x = Network(), torch.randn(PARTS, SIZE, WIDTH)
    reference = copy.deepcopy(network)
    with torch.autocast("cpu", torch.bfloat16):
        loss = torch.stack([plain(reference, part) for part in x]).mean()
    loss.backward()
    found, is_factored = gradients_of(network, plain, x, "bf16")
    assert is_factored
    assert all(gradient.dtype == torch.float32 for gradient in found)
    for gradient, parameter in zip(found, reference.parameters(), strict=True):
        difference = (gradient - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 2**-6  # bf16 has 8 bits


def test_a_batch_that_is_wider_than_the_layer_has_none():
    network = Network()
    _, is_factored = gradients_of(network, plain, torch.randn(PARTS, WIDTH, WIDTH))
    assert not is_factored


def test_copies_and_state_dicts_are_those_of_plain_layers():
    network = Network()
    factor_linear_layers(network, PARTS)
    copied = copy.deepcopy(network)
    assert network.state_dict().keys() == Network().state_dict().keys()
    with torch.no_grad():
        copied.wide.weight.zero_()
        copied.wide.bias.zero_()
    assert torch.equal(copied.wide(torch.ones(1, WIDTH)), torch.zeros(1, WIDTH))
    assert network.wide(torch.ones(1, WIDTH)).any()
