from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cs324dist.models.convolutions import ConvTranspose2d, OneChannelConv2d

LAYERS = {  # torch's, ours, and the shape of an input
    "one channel": (nn.Conv2d(1, 32, 5), OneChannelConv2d(32, 5), (3, 1, 28, 28)),
    "to one channel": (nn.ConvTranspose2d(64, 1, 4, 2, 1), ConvTranspose2d(64, 1, 4, 2, 1), (3, 64, 14, 14)),
    "transposed": (nn.ConvTranspose2d(128, 64, 4, 2, 1), ConvTranspose2d(128, 64, 4, 2, 1), (3, 128, 7, 7)),
}
layers = pytest.mark.parametrize(("theirs", "ours", "shape"), LAYERS.values(), ids=LAYERS)


def output_and_gradients(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    x = x.clone().requires_grad_()
    output = layer(x)
    yield output
    yield from torch.autograd.grad((output * output.detach().cos()).sum(), [x, *layer.parameters()])


@layers
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_output_and_gradients_are_those_of_torch_s_layer(
    theirs: nn.Module, ours: nn.Module, shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    found, expected = (
        list(output_and_gradients(layer.to(memory_format=layout), x)) for layer in (ours, theirs)
    )
    assert len(found) == 4
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@layers
@pytest.mark.parametrize("context", ["evaluation", "autocast"])
def test_in_evaluation_and_under_autocast_no_bit_differs_from_torch_s(
    theirs: nn.Module, ours: nn.Module, shape: tuple[int, ...], context: str
) -> None:
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours.train(context == "autocast")
    try:
        with torch.autocast("cpu", torch.bfloat16) if context == "autocast" else nullcontext():
            found, expected = (list(output_and_gradients(layer, x)) for layer in (ours, theirs))
    finally:
        ours.train()
    for mine, torch_s in zip(found, expected, strict=True):
        assert torch.equal(mine, torch_s)


sizes = st.integers(1, 4)


@given(rows=sizes, columns=sizes, kernel=sizes, stride=sizes, padding=st.integers(0, 1))
def test_gradients_of_any_order_match_finite_differences(
    rows: int, columns: int, kernel: int, stride: int, padding: int
) -> None:
    torch.manual_seed(0)
    if min((size - 1) * stride + kernel for size in (rows, columns)) <= 2 * padding:
        padding = 0
    transposed = ConvTranspose2d(2, 1, kernel, stride, padding).double()
    x = torch.randn(2, 2, rows, columns, dtype=torch.double, requires_grad=True)
    convolution = OneChannelConv2d(2, kernel).double()
    image = torch.randn(2, 1, rows + kernel, columns + kernel, dtype=torch.double, requires_grad=True)
    for layer, given_ in ((transposed, x), (convolution, image)):
        torch.testing.assert_close(layer(given_), type(layer).__base__.forward(layer, given_))
        inputs = (given_, layer.weight, layer.bias)

        def output(given_: Tensor, *_: Tensor, layer: nn.Module = layer) -> Tensor:
            return layer(given_)

        assert torch.autograd.gradcheck(output, inputs)
        assert torch.autograd.gradgradcheck(output, inputs)
