"""Measurements over all processes, which do not depend on their number."""

from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from jaxtyping import Float64, Int64
from torch import Tensor

from cs324dist.data.streams import generators_kept, seed_everything
from cs324dist.distributed.checks import gather_objects
from cs324dist.distributed.parts import add_in_order, gather_rows
from cs324dist.distributed.stop import StopRequest
from cs324dist.errors import UserError

OTHER_SHAPES = "an evaluation gives sums of other names or shapes for some pieces: always give the same"
Sums = Mapping[str, Tensor]
Measure = Callable[[Int64[Tensor, " indices"]], Sums]


class CutOff(Exception):
    """A signal has ended a measurement early."""


class SumOver:
    """Sums a measurement over [0, count): each process measures some pieces, and all get the sum.

    The pieces are the same for any number of processes, and are added up in their order.
    """

    def __init__(self, accelerator: Accelerator, stop: StopRequest | None = None, seed: int = 0) -> None:
        """`stop` may cut a measurement off. A piece draws from `seed`."""
        self._rank, self._processes = accelerator.process_index, accelerator.num_processes
        self._device, self._stop = accelerator.device, stop
        self._seed, self._calls = seed, 0

    def __call__(self, measure: Measure, count: int, piece: int = 500) -> dict[str, Float64[Tensor, "..."]]:
        """The sums of what `measure` says of each `piece` of the indices.

        Args:
            measure: the sums over some indices, such as the number of right answers, by name.
            count: how many indices there are.
            piece: how many of them are measured together.

        Returns:
            The total of each, in float64 on the device, the same on every process.

        Raises:
            UserError: not all pieces give the same names and shapes.
            CutOff: on every process, if one of them was asked to stop.
        """
        pieces = torch.arange(count, device=self._device).split(piece)
        shapes: dict[str, torch.Size] = {}

        self._calls += 1
        measurement = f"measurement {self._calls}"

        def row_of(indices: Tensor) -> Float64[Tensor, " width"]:
            with torch.no_grad(), generators_kept(self._device):
                seed_everything(self._seed, f"{measurement}/{int(indices[0])}", self._device)
                sums = {n: torch.as_tensor(v, device=self._device) for n, v in measure(indices).items()}
            found = {name: value.shape for name, value in sums.items()}
            if found != (shapes or found):
                raise UserError(OTHER_SHAPES)
            shapes.update(found)
            return torch.cat([value.double().flatten() for value in sums.values()])

        rounds = range(0, len(pieces), self._processes)
        # All join each collective: in the last round, a process without a piece measures another's, and adds
        # zeros.
        own = [pieces[min(first + self._rank, len(pieces) - 1)] for first in rounds]
        rows = map(row_of, self._stop.until_stopped(own) if self._stop else own)
        row = total = next(rows)
        if any(found != shapes for found in gather_objects(shapes, "in an evaluation")):
            raise UserError(OTHER_SHAPES)
        for number, first in enumerate(rounds):
            row = row if number == 0 else next(rows, torch.zeros_like(row))
            mine = row if first + self._rank < len(pieces) else torch.zeros_like(row)
            of_round = gather_rows({self._rank: mine}, self._processes)
            total = add_in_order(of_round if number == 0 else torch.cat([total[None], of_round]))
        if self._stop and self._stop.interrupted():
            raise CutOff
        parts = total.split([shape.numel() for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
