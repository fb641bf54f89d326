"""The mean of gradients over micro-batches, the same to the last bit whoever computed which of them.

Sums of floating-point numbers depend on the order, sums of integers do not. So each gradient is multiplied by
a power of two, which is exact, and added up as int64. The power follows from the tensor's largest value over
all micro-batches. Climate models sum this way (Hallberg and Adcroft 2014, "An order-invariant real-to-integer
conversion sum").
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float32
from torch import Tensor

HEAD = 62  # bits of a sum beside its sign
PIECE = 1 << 16  # values at a time, which stay in the processor's cache
UNUSED = -1.0  # as the largest value of a gradient that there is not

Gradients = Sequence[Float32[Tensor, "..."] | None]


class ExactMean:
    """Averages gradients over micro-batches."""

    def __init__(self, micro_batches: int) -> None:
        self._count = micro_batches

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Gradients], parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """The mean gradient of each parameter over the micro-batches of all processes.

        It is off by at most half a unit in the last place, and by 2^(log2(count) - 61) of the largest value.

        Args:
            gradients: by micro-batch of this process, then by parameter; None where a loss does not use it.
            parameters: all of them, for their shapes.

        Returns:
            For each parameter float32 of its shape; None if no loss uses it, NaN if a gradient is not finite.
        """
        largest = torch.stack([_largest(of_one, parameters) for of_one in gradients]).amax(0)
        if dist.is_initialized():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        found: list[Tensor | None] = [None] * len(parameters)
        tops = largest.tolist()
        used = [number for number, top in enumerate(tops) if top != UNUSED]
        exponents = torch.frexp(largest)[1].tolist()
        bits = HEAD - (self._count - 1).bit_length()
        scales = [2.0 ** (bits - exponents[number]) for number in used]
        by_parameter = [
            [part.reshape(-1) for of_one in gradients if (part := of_one[number]) is not None]
            for number in used
        ]
        means = [torch.empty(parameters[n].numel(), device=parameters[n].device) for n in used]
        if dist.is_initialized() and used:
            sizes = [len(mean) for mean in means]
            buffer = torch.empty(sum(sizes), dtype=torch.int64, device=means[0].device)
            by_sums = buffer.split(sizes)
            for sums, scale, parts in zip(by_sums, scales, by_parameter, strict=True):
                for piece in _pieces(sums):
                    _add(sums[piece], scale, [part[piece] for part in parts])
            dist.all_reduce(buffer)
            for sums, scale, mean in zip(by_sums, scales, means, strict=True):
                for piece in _pieces(sums):
                    self._divide(sums[piece], scale, mean[piece])
        else:  # one pass through the cache
            sums = torch.empty(PIECE, dtype=torch.int64, device=parameters[0].device)
            for scale, parts, mean in zip(scales, by_parameter, means, strict=True):
                for piece in _pieces(mean):
                    of_piece = sums[: len(mean[piece])]
                    _add(of_piece, scale, [part[piece] for part in parts])
                    self._divide(of_piece, scale, mean[piece])
        for number, mean in zip(used, means, strict=True):
            found[number] = self._finished(mean, parameters[number], is_finite=tops[number] < math.inf)
        return found

    def _divide(self, sums: Tensor, scale: float, mean: Tensor) -> None:
        """Write the sums over scale and count to `mean`."""
        if self._count & (self._count - 1):  # no power of two: round once, in float64
            mean.copy_(sums.double() / (scale * self._count))
        else:
            _product(sums, 1 / (scale * self._count), out=mean)

    @staticmethod
    def _finished(mean: Tensor, parameter: Tensor, *, is_finite: bool) -> Tensor:
        shaped = mean.view(parameter.shape) if is_finite else torch.full_like(parameter, torch.nan)
        if shaped.stride() == parameter.stride():
            return shaped
        return torch.empty_like(parameter).copy_(shaped)  # in the parameter's own memory format


def _pieces(values: Tensor) -> Iterator[slice]:
    return (slice(start, start + PIECE) for start in range(0, len(values), PIECE))


def _add(sums: Tensor, scale: float, gradients: Sequence[Tensor]) -> None:
    """Write the sum of the gradients times `scale` to `sums`."""
    if not gradients:
        sums.zero_()
        return
    first, *others = (_product(gradient, scale) for gradient in gradients)
    sums.copy_(first)
    for other in others:
        sums += other.long()


def _product(values: Tensor, power_of_two: float, out: Tensor | None = None) -> Tensor:
    """In float32; a power of two that is too large or small for that is multiplied in two steps."""
    if 2.0**-126 <= power_of_two <= 2.0**127:
        return torch.mul(values, power_of_two, out=out)
    half = 2.0 ** (math.frexp(power_of_two)[1] // 2)
    return torch.mul(values, half, out=out).mul_(power_of_two / half)


def _largest(gradients: Gradients, parameters: Sequence[Tensor]) -> Float32[Tensor, " parameters"]:
    """The largest absolute value of each gradient; infinity if one is not finite."""
    used = [gradient for gradient in gradients if gradient is not None]
    norms = iter(torch._foreach_norm(used, torch.inf) if used else ())
    unused = torch.full((), UNUSED, device=parameters[0].device)  # waits for no copy
    found = torch.stack([unused if gradient is None else next(norms).float() for gradient in gradients])
    return found.where(found.isfinite(), torch.inf)  # the largest of NaN and a number may be either
