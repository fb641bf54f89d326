"""Infinite streams of samples, addressed by sample index, and the part of them that a step trains on.

Step `s` trains on the samples [s·B, (s+1)·B), where B is the size of the global batch. The batch is cut into
equal micro-batches, shared by all processes: 1, 2 or 64 of them see the same data in the same order.
"""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cs324dist.data.counter_rng import Indices, random_bits, shift_right, stream_keys

CPU = torch.device("cpu")


@dataclass(frozen=True)
class MicroBatch:
    """Part `index` of the `count` equal parts of the global batch of a step.

    `batch_size` is the size of the global batch, a multiple of `count`; `index` is in [0, count).
    """

    step: int
    batch_size: int
    index: int = 0
    count: int = 1
    device: torch.device = CPU
    is_check: bool = False
    """Whether it is computed a second time, for a comparison, perhaps by another process."""

    @cached_property
    def samples(self) -> Indices:
        """Indices of this part's samples in the stream."""
        first = self.step * self.batch_size
        return torch.arange(first + self.rows.start, first + self.rows.stop, device=self.device)

    @property
    def rows(self) -> slice:
        """This part's rows of the global batch."""
        size = self.batch_size // self.count
        return slice(self.index * size, (self.index + 1) * size)


@dataclass(frozen=True)
class Stream:
    """Random numbers for one purpose: a pure function of (seed, name, sample index)."""

    seed: int
    name: str

    def integers(self, indices: Indices, components: int, below: int) -> Int64[Tensor, "samples components"]:
        """Uniform integers in [0, below), as remainders: their bias is at most below / 2^63."""
        return shift_right(random_bits(self.seed, self.name, indices, components), 1) % below

    def normals(self, indices: Indices, components: int) -> Float[Tensor, "samples components"]:
        """Standard normals (Box and Muller 1958), in torch's default dtype."""
        bits = random_bits(self.seed, self.name, indices, components)
        uniform = (shift_right(bits, 32).double() + 0.5) / 2**32  # in (0, 1), so that the logarithm is finite
        angle = (bits & 0xFFFFFFFF).double() * (2 * math.pi / 2**32)
        return ((-2 * uniform.log()).sqrt() * angle.cos()).to(torch.get_default_dtype())

    def signs(self, indices: Indices, components: int) -> Float[Tensor, "samples components"]:
        """-1 or 1, each with probability 1/2, in torch's default dtype; a hash gives 64 of them."""
        words = random_bits(self.seed, self.name, indices, -(-components // 64))
        bits = (words[:, :, None] >> torch.arange(64, device=indices.device)) & 1
        return (bits.flatten(1)[:, :components] * 2 - 1).to(torch.get_default_dtype())


@dataclass(frozen=True)
class ShuffledEpochs:
    """Endless passes over `size` items, each in an order that depends on (seed, name, epoch) only."""

    seed: int
    name: str
    size: int

    def items(self, batch: MicroBatch) -> Int64[Tensor, " samples"]:
        """The items, in [0, size), of a micro-batch. Does not wait for the device."""
        first = batch.step * batch.batch_size
        last = first + batch.batch_size - 1
        epoch_of, positions = batch.samples // self.size, batch.samples % self.size
        items = torch.empty_like(positions)
        for epoch in range(first // self.size, last // self.size + 1):
            order = _permutation(self, epoch, batch.device)
            items = torch.where(epoch_of == epoch, order[positions], items)
        return items


@lru_cache(maxsize=4)
def _permutation(shuffle: ShuffledEpochs, epoch: int, device: torch.device) -> Int64[Tensor, " size"]:
    address = torch.full((1,), epoch, device=device)
    return random_bits(shuffle.seed, shuffle.name, address, shuffle.size)[0].argsort(stable=True)


def seed_everything(seed: int, name: str, device: torch.device) -> None:
    """Seed the generators of torch (of the CPU and of `device`), numpy and random from (seed, name)."""
    key = stream_keys(seed, name)[0]
    # Not torch.manual_seed, which notes its caller for each kind of device that is not there: 130 us for 1.
    torch.default_generator.manual_seed(key)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(key)
    np.random.seed(key % 2**32)
    random.seed(key)


def generators(device: torch.device) -> tuple[Any, ...]:
    """The states of the generators of torch (CPU and device), numpy and random."""
    on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), on_device, np.random.get_state(), random.getstate()


def set_generators(device: torch.device, states: tuple[Any, ...]) -> None:
    """Have the generators as they were when `generators` gave `states`."""
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.get_device_module(device).set_rng_state(states[1], device)
    np.random.set_state(states[2])
    random.setstate(states[3])


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Seed torch's CPU generator from (seed, name), as for initial weights, and restore it at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_keys(seed, name)[0])
        yield
