"""The gradient of a wide linear layer over the global batch, as one product.

The gradient of a weight is the product of two factors: the gradients by the layer's outputs, and its inputs.
Where the batch is smaller than the layer is wide, the factors are smaller than the product. Instead of adding
up gradients, all processes gather the factors and compute the same product.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from cs324dist.distributed.micro_batches import Threads, gather_rows

PIECE = 512  # outputs at a time: fixed, as the bits of a product depend on its shape
Factors = dict[Tensor, list[Float[Tensor, "rows inputs_and_outputs"]]]  # of a weight: one for each use

_here = threading.local()


def factor_linear_layers(network: nn.Module, micro_batches: int) -> list[Tensor]:
    """Let the linear layers inside `network` record factors; returns their weights."""
    layers = [layer for layer in network.modules() if type(layer) is nn.Linear]
    for layer in layers:
        vars(layer).setdefault("forward", partial(_forward, layer, micro_batches))
    return [layer.weight for layer in layers]


@contextmanager
def recorded_factors() -> Iterator[Factors]:
    """Inside, a backward pass of this thread records factors in place of the gradients of wide layers."""
    factors: Factors = {}
    _here.factors = factors
    try:
        yield factors
    finally:
        _here.factors = None


def mean_products(
    weights: Sequence[Tensor], found: Mapping[int, Factors], micro_batches: int, threads: Threads
) -> dict[Tensor, Float[Tensor, "outputs inputs"]]:
    """The mean gradient of each weight that has factors, over the micro-batches of all processes.

    Args:
        weights: those whose factors there may be, the same on all processes.
        found: the factors of each micro-batch of this process.
        micro_batches: how many there are on all processes.
        threads: multiply pieces.
    """
    own = {
        weight: {index: torch.cat(factors[weight]) for index, factors in found.items() if weight in factors}
        for weight in weights
    }
    rows = torch.tensor([max(map(len, parts.values()), default=0) for parts in own.values()])
    if dist.is_initialized() and weights:
        rows = rows.to(weights[0].device)
        dist.all_reduce(rows, dist.ReduceOp.MAX)
    return {
        weight: _mean_product(weight, parts, most, found, micro_batches, threads)
        for (weight, parts), most in zip(own.items(), rows.tolist(), strict=True)
        if most
    }


def _mean_product(
    weight: Tensor, parts: Mapping[int, Tensor], rows: int, own: Iterable[int], count: int, threads: Threads
) -> Tensor:
    outputs, inputs = weight.shape
    padded = {index: weight.new_zeros(rows, inputs + outputs) for index in own}
    for index, part in parts.items():
        padded[index][: len(part)] = part
    x, deltas = gather_rows(padded, count).flatten(0, 1).split([inputs, outputs], dim=1)
    mean, x, deltas = weight.new_empty(outputs, inputs), x.contiguous(), deltas / count
    pieces = zip(deltas.split(PIECE, dim=1), mean.split(PIECE), strict=True)
    for _ in threads.map_ahead(lambda piece: torch.mm(piece[0].T, x, out=piece[1]), pieces):
        pass
    return mean


def _forward(
    layer: nn.Linear, micro_batches: int, x: Float[Tensor, "*batch inputs"]
) -> Float[Tensor, "*batch outputs"]:
    weight: Tensor = layer.weight
    bias: Tensor | None = layer.bias
    inputs, outputs = layer.in_features, layer.out_features
    if (
        not isinstance(weight, nn.Parameter)  # `weight_norm` computes it
        or x.dim() < 2
        or micro_batches * (x.numel() // inputs) * (inputs + outputs) >= inputs * outputs
    ):
        return F.linear(x, weight, bias)
    parameter = weight
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    return _Linear.apply(x, weight, bias, [parameter])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parameter: list[nn.Parameter]
    ) -> Tensor:
        """`parameter` holds what `weight` is, or is cast from: in a list, it is no input of the graph."""
        ctx.save_for_backward(x, weight)
        ctx.parameter = parameter[0]
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows, row_deltas = x.flatten(0, -2), delta.flatten(0, -2)
        factors: Factors | None = getattr(_here, "factors", None)
        grad_weight = None
        if needs_weight and factors is not None:
            both = torch.cat([rows, row_deltas], dim=1).to(ctx.parameter.dtype)
            factors.setdefault(ctx.parameter, []).append(both)
        elif needs_weight:
            grad_weight = row_deltas.T @ rows
        return (
            delta @ weight if needs_x else None,
            grad_weight,
            row_deltas.sum(0) if needs_bias else None,
            None,
        )
