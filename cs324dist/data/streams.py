"""Infinite streams of samples, addressed by sample index, and the slice of them that a step trains on.

The data of step `s` are the samples [s·B, (s+1)·B) of one global stream, B being the global batch. Each rank
computes its own slice of that range, so 1, 2 or 64 processes see the same data in the same order.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cs324dist.data.counter_rng import random_bits, random_integers, random_normals, random_signs, stream_keys

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shard:
    """One process's place among all: `rank` in [0, world_size), and the device its samples live on."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU

    def samples(self, start: int, count: int) -> Int64[Tensor, " samples"]:
        """This rank's sample indices of the global range [start, start + count).

        Ranks take contiguous pieces in order, equal or, where `count` does not divide, one apart in size.
        Training never asks for such a count, evaluation may.
        """
        first = start + -(-count * self.rank // self.world_size)
        end = start + -(-count * (self.rank + 1) // self.world_size)
        return torch.arange(first, end, device=self.device)

    def batch(self, step: int, batch_size: int) -> Int64[Tensor, " samples"]:
        """This rank's sample indices of step `step`; `batch_size` is the global batch."""
        return self.samples(step * batch_size, batch_size)


@dataclass(frozen=True)
class Stream:
    """Random numbers for the samples of one named purpose: a pure function of (seed, name, sample index)."""

    seed: int
    name: str

    def integers(
        self, indices: Int64[Tensor, " samples"], components: int, below: int
    ) -> Int64[Tensor, "samples components"]:
        """Integers uniform in [0, below)."""
        return random_integers(stream_keys(self.seed, self.name), indices, components, below)

    def normals(
        self, indices: Int64[Tensor, " samples"], components: int, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "samples components"]:
        """Standard normals."""
        return random_normals(stream_keys(self.seed, self.name), indices, components).to(dtype)

    def signs(
        self, indices: Int64[Tensor, " samples"], components: int, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "samples components"]:
        """-1 or 1, each with probability 1/2."""
        return random_signs(stream_keys(self.seed, self.name), indices, components).to(dtype)


@dataclass(frozen=True)
class ShuffledEpochs:
    """Endless passes over `size` items, each a permutation drawn from (seed, name, epoch)."""

    seed: int
    name: str
    size: int

    def items(self, indices: Int64[Tensor, " samples"]) -> Int64[Tensor, " samples"]:
        """The items, in [0, size), that stand at these sample indices; on a GPU, it is waited for."""
        return self._items(indices, (indices // self.size).unique().tolist())

    def batch(self, shard: Shard, step: int, batch_size: int) -> Int64[Tensor, " samples"]:
        """This rank's items of step `step`; `batch_size` is the global batch. No device is waited for."""
        first, last = step * batch_size, (step + 1) * batch_size - 1
        epochs = range(first // self.size, last // self.size + 1)
        return self._items(shard.batch(step, batch_size), epochs)

    def _items(self, indices: Int64[Tensor, " samples"], epochs: Iterable[int]) -> Int64[Tensor, " samples"]:
        epoch_of, positions = indices // self.size, indices % self.size
        items = torch.empty_like(indices)
        for epoch in epochs:
            permutation = _permutation(self, epoch, indices.device)
            items = torch.where(epoch_of == epoch, permutation[positions], items)
        return items


@lru_cache(maxsize=4)
def _permutation(shuffle: ShuffledEpochs, epoch: int, device: torch.device) -> Int64[Tensor, " size"]:
    keys = stream_keys(shuffle.seed, shuffle.name)
    bits = random_bits(keys, torch.full((1,), epoch, device=device), shuffle.size)[0]
    return bits.argsort(stable=True)
