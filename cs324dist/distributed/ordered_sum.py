"""The mean of gradients over the parts of the batch, added in the order of the parts.

Sums of floating-point numbers depend on their order. So slice `r` of every part's gradient goes to process
`r`, which adds what it gets in the order of the parts; at the end all get the means. The bits do not depend
on the number of processes, and one accumulator is enough, however many parts there are.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cs324dist.distributed.parts import rank_and_processes


class OrderedSum:
    """Adds up the gradients of some parameters; its memory is kept from step to step."""

    def __init__(self, parameters: Sequence[Tensor], count: int) -> None:
        """Of `count` parts."""
        dtypes = dict.fromkeys(parameter.dtype for parameter in parameters)
        of_dtype = [[i for i, p in enumerate(parameters) if p.dtype == dtype] for dtype in dtypes]
        self._sums = [(of, _SumOfOneDtype([parameters[i] for i in of], count)) for of in of_dtype]
        self._parameters = len(parameters)

    def start(self) -> None:
        """Begin with zero."""
        for _, of_dtype in self._sums:
            of_dtype.total.zero_()

    def add(self, first: int, gradients: Sequence[Tensor | None]) -> None:
        """Add the parts from `first` on, one of each process; on one that has none, `gradients` is empty.

        None stands for a gradient of zero. The memory of `gradients` may be used again.
        """
        for places, of_dtype in self._sums:
            of_dtype.add(first, [gradients[i] for i in places] if gradients else [])

    def means(self) -> list[Tensor]:
        """The mean gradient of each parameter, in its memory format."""
        found: list[Tensor] = [torch.empty(0)] * self._parameters
        for places, of_dtype in self._sums:
            for place, mean in zip(places, of_dtype.means(), strict=True):
                found[place] = mean
        return found


class _SumOfOneDtype:
    def __init__(self, parameters: Sequence[Tensor], count: int) -> None:
        self._rank, self._processes = rank_and_processes()
        self._count, size = count, sum(parameter.numel() for parameter in parameters)
        width = -(-size // self._processes)
        self.total = parameters[0].new_zeros(width)
        self._sent = self._received = self.total
        if self._processes > 1:
            self._sent, self._received = parameters[0].new_zeros(2, self._processes * width)
        self._to_send, self._to_receive = (_views(flat, parameters) for flat in (self._sent, self._received))

    @torch.no_grad()
    def add(self, first: int, gradients: Sequence[Tensor | None]) -> None:
        if self._processes == 1:
            pairs = [(s, g) for s, g in zip(self._to_send, gradients, strict=True) if g is not None]
            if pairs:
                torch._foreach_add_([total for total, _ in pairs], [gradient for _, gradient in pairs])
            return
        for view, gradient in zip(self._to_send, gradients or (), strict=bool(gradients)):
            view.zero_() if gradient is None else view.copy_(gradient)
        dist.all_to_all_single(self._received, self._sent)
        for row in self._received.view(self._processes, -1)[: self._count - first]:
            self.total += row

    @torch.no_grad()
    def means(self) -> list[Tensor]:
        self.total /= self._count
        if self._processes > 1:
            rows = self._received.view(self._processes, -1)
            rows[self._rank] = self.total
            # Not all_gather, which takes twice as long on gloo: it copies all rows once more.
            sent = [dist.broadcast(row, rank, async_op=True) for rank, row in enumerate(rows)]
            for broadcast in sent:
                broadcast.wait()
        return self._to_receive


def _views(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """A place in `flat` for each parameter, with its strides where it has no gaps."""
    found, start = [], 0
    for parameter in parameters:
        place = flat[start : start + parameter.numel()]
        like = torch.empty_like(parameter, device="meta")  # of other strides, if there are gaps
        found.append(place.as_strided(parameter.shape, like.stride(), place.storage_offset()))
        start += parameter.numel()
    return found
