"""Checks while a run goes on: that processes hold the same, and that a second computation gives the same."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int64
from torch import Tensor

from cs324dist.distributed.parts import rank_and_processes
from cs324dist.errors import RunFailed
from cs324dist.runs.checkpoints import Trained, plain_state, tensors_by_file

MIX = -0x61C8864680B583EB  # odd: 2^64 divided by the golden ratio, as an int64
AT_ONCE = 1 << 20  # values that are summed together
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LOOK_FOR = (
    "look for random numbers that nothing seeds, for a clock, for state that one part of the batch leaves to "
    "the next, for data that is not the same on every process, and for broken hardware"
)

Sums = dict[int, dict[str, int]]
"""By the index of a part: checksums of its loss, of each gradient, and of what was noted."""


@torch.no_grad()
def checksum(tensor: Tensor) -> Int64[Tensor, ""]:
    """The sum of the values' bits, mixed and each times an odd number of its own, modulo 2^64.

    It changes with any single bit, and where two values change places.
    """
    values = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten()
    if values.is_complex():
        values = torch.view_as_real(values).flatten()
    bits = values.view(INTEGERS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), AT_ONCE):
        some = bits[start : start + AT_ONCE].long() * MIX
        some = some ^ ((some >> 32) & 0xFFFFFFFF)  # floats differ in the upper bits
        odd = torch.arange(2 * start + 1, 2 * (start + len(some)), 2, device=some.device)
        total += (some * odd).sum()
    return total


def sample(tensor: Tensor) -> Tensor:
    """A view of some of the values, if there are many."""
    return tensor[:: 1 + tensor.numel() // AT_ONCE] if tensor.dim() else tensor


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The checksum of each tensor; waits for the device once."""
    found = [checksum(tensor) for tensor in tensors.values()]
    sums = torch.stack(found).tolist() if found else []
    return dict(zip(tensors, sums, strict=True))


def held(trained: Trained, *, buffers_from_first: bool) -> dict[str, Any]:
    """Checksums of all that a checkpoint would hold; with `buffers_from_first`, buffers are copied before."""
    if buffers_from_first:
        for network in trained.networks.values():
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)
    tensors = {
        f"{file.partition('/')[0].removesuffix('.safetensors')}: {name}": tensor
        for file, some in tensors_by_file(trained).items()
        for name, tensor in some.items()
    }
    return {**checksums(tensors), "the task's own state": plain_state(trained)}


def compare_sums(first: Sums, again: Sums, step: int) -> None:
    """Compare the parts that this process and others have computed `first` with those computed `again`.

    Raises:
        RunFailed: naming what is not the same.
    """
    everywhere = gather_objects((first, again), f"after the gradients of step {step + 1}")
    of_all = {index: sums for found, _ in everywhere for index, sums in found.items()}
    for rank, (_, found) in enumerate(everywhere):
        for index, sums in found.items():
            if wrong := [name for name, value in sums.items() if of_all[index].get(name) != value]:
                raise RunFailed(
                    f"in step {step + 1}, {wrong[0]} of part {index} of the batch was not the same when "
                    f"rank {rank} computed it a second time ({len(wrong)} of {len(sums)} differ): {LOOK_FOR}"
                )


def gather_objects(own: Any, where: str) -> list[Any]:
    """What each process has; `where` in the program it is gathered.

    Raises:
        RunFailed: not all processes are there.
    """
    _, processes = rank_and_processes()
    if processes == 1:
        return [own]
    found: list[Any] = [None] * processes
    dist.all_gather_object(found, (where, own))
    if lines := differences([{"the place in the program": place} for place, _ in found]):
        raise RunFailed(f"{lines[0]}: every process has to take the same steps and to make the same calls")
    return [of_one for _, of_one in found]


def differences(found: Sequence[Mapping[str, Any]], *, with_values: bool = True) -> list[str]:
    """A line for each name under which the processes have different values: who differs from most."""
    lines = []
    for name in dict.fromkeys(name for of_one in found for name in of_one):
        values = [str(of_one.get(name)) for of_one in found]
        most = Counter(values).most_common(1)[0][0]
        if others := [rank for rank, value in enumerate(values) if value != most]:
            same = [rank for rank, value in enumerate(values) if value == most]
            shown = f" ({values[others[0]]}, and {most})" if with_values else ""
            lines.append(f"{name} on {_ranks(others)} is not as on {_ranks(same)}{shown}")
    return lines


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:5])) + ", …" * (len(ranks) > 5)
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
