"""Convolutions that torch computes slowly on a CPU in float32, computed faster in training.

A transposed convolution to one channel is faster as a matrix product and sums of shifted images; so is the
gradient of a convolution by its one-channel input. A transposed convolution with a bias is faster if it is
added afterwards. docs/log.md has the times.

The layers have the parameters of torch's, and compute as torch's do in evaluation, on other devices and under
autocast.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

_gradients = torch.ops.aten.convolution_backward  # torch.nn.grad has it without the weight's memory format


class OneChannelConv2d(nn.Conv2d):
    """`torch.nn.Conv2d(1, ...)` with stride 1 and no padding."""

    def __init__(self, out_channels: int, kernel_size: int) -> None:
        super().__init__(1, out_channels, kernel_size)

    def forward(
        self, x: Float[Tensor, "batch 1 height width"]
    ) -> Float[Tensor, "batch channels rows columns"]:
        """The convolution of one-channel images."""
        if _torch_is_fast(self, x):
            return super().forward(x)
        return _OneChannelConvolution.apply(x, self.weight, self.bias)


class ConvTranspose2d(nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with a bias, without output padding, dilation or groups."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)

    def forward(  # type: ignore[override]  # torch's takes a size of the output as well
        self, x: Float[Tensor, "batch channels rows columns"]
    ) -> Float[Tensor, "batch out_channels height width"]:
        """The transposed convolution."""
        if _torch_is_fast(self, x):
            return super().forward(x)
        stride, padding = self.stride[0], int(self.padding[0])
        if self.out_channels == 1:
            image = _TransposedToOneChannel.apply(x, self.weight, stride, padding)
        else:
            image = F.conv_transpose2d(x, self.weight, None, stride, padding)
        assert self.bias is not None
        return image + self.bias[:, None, None]


def _torch_is_fast(layer: nn.Module, x: Tensor) -> bool:
    return not layer.training or x.device.type != "cpu" or torch.is_autocast_enabled("cpu")


class _OneChannelConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        sizes = [len(weight)], [1, 1], [0, 0], [1, 1], False, [0, 0], 1
        _, by_weight, by_bias = _gradients(delta, x, weight, *sizes, [False, needs_weight, needs_bias])
        return _TransposedToOneChannel.apply(delta, weight, 1, 0) if needs_x else None, by_weight, by_bias


class _TransposedToOneChannel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = None, [stride, stride], [padding, padding], [1, 1], True, [0, 0], 1
        batch, channels, rows, columns = x.shape
        kernel_rows, kernel_columns = weight.shape[2:]
        pixels = x.permute(0, 2, 3, 1).reshape(-1, channels)  # a view where x is channels_last
        products = torch.mm(weight.view(channels, -1).T, pixels.T)
        products = products.view(kernel_rows, kernel_columns, batch, rows, columns)
        high, wide = (rows - 1) * stride + 1, (columns - 1) * stride + 1
        lines = x.new_zeros(kernel_rows, batch, rows, wide + kernel_columns - 1)
        for shift in range(kernel_columns):
            lines[..., shift : shift + wide : stride] += products[:, shift]
        image = x.new_zeros(batch, 1, high + kernel_rows - 1, lines.shape[-1])
        for shift in range(kernel_rows):
            image[:, 0, shift : shift + high : stride] += lines[shift]
        return image[..., padding : image.shape[-2] - padding, padding : image.shape[-1] - padding]

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        by_x, by_weight, _ = _gradients(delta, x, weight, *ctx.sizes, [needs_x, needs_weight, False])
        return by_x, by_weight, None, None
