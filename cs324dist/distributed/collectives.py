"""Sums over parts that do not depend on which process computed which part."""

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from accelerate import Accelerator
from jaxtyping import Float64, Int64
from torch import Tensor

Sums = Mapping[str, Tensor]
Measure = Callable[[Int64[Tensor, " indices"]], Sums]


def gather_rows(rows: Mapping[int, Tensor], count: int) -> Float64[Tensor, "count width"]:
    """`count` rows in order, of which each process has some; every process gets all.

    Each process adds its rows to zeros of the others, and adding zero is exact.
    """
    width, device = next((row.numel(), row.device) for row in rows.values())
    gathered = torch.zeros(count, width, dtype=torch.float64, device=device)
    for index, row in rows.items():
        gathered[index] = row
    if dist.is_initialized():
        dist.all_reduce(gathered)
    return gathered


def add_in_order(rows: Float64[Tensor, "count width"]) -> Float64[Tensor, " width"]:
    """The sum of rows, one after the other: float64 sums depend on the order."""
    total = torch.zeros_like(rows[0])
    for row in rows:
        total += row
    return total


class SumOver:
    """Sums a measurement over [0, count): each process measures some pieces, and all get the sum.

    The pieces are the same for any number of processes, and are added up in their order.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        until_stopped: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> None:
        """`until_stopped` may end a loop early; the sum is worth nothing then."""
        self._rank, self._processes = accelerator.process_index, accelerator.num_processes
        self._device, self._until_stopped = accelerator.device, until_stopped

    @torch.no_grad()
    def __call__(self, measure: Measure, count: int, piece: int = 500) -> dict[str, Tensor]:
        """The sums of what `measure` says of each `piece` of the indices.

        Args:
            measure: the sums over some indices, such as a number of right answers, by name.
            count: how many indices there are.
            piece: how many of them are measured together.

        Returns:
            The total of each, in float64 on the device, the same on every process.
        """
        pieces = torch.arange(count, device=self._device).split(piece)
        rounds = range(0, len(pieces), self._processes)
        total, shapes, row = None, {}, torch.zeros(0)
        left = iter(self._until_stopped(rounds))
        for first in rounds:
            if next(left, None) is not None:  # else this round's piece is left out, on this process
                sums = measure(pieces[min(first + self._rank, len(pieces) - 1)])
                shapes = {name: value.shape for name, value in sums.items()}
                row = torch.cat([value.detach().double().flatten() for value in sums.values()])
            mine = first + self._rank < len(pieces)
            rows = gather_rows({self._rank: row if mine else torch.zeros_like(row)}, self._processes)
            total = add_in_order(rows if total is None else torch.cat([total[None], rows]))
        assert total is not None, "there is nothing to measure"
        parts = total.split([shape.numel() for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
