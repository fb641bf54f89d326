"""Infinite streams of samples, addressed by sample index, and the part of them that a step trains on.

Step `s` trains on the samples [s·B, (s+1)·B), where B is the size of the global batch. The batch is cut into
equal micro-batches, shared by all processes: 1, 2 or 64 of them see the same data in the same order.

Every random number is an integer hash of its own address (seed, stream name, sample index, component). There
is no state, so any slice of a stream can be computed anywhere, in any order, by any number of processes. The
hash uses torch's int64 arithmetic, which wraps around in the same way on CPU and GPU, so both give the same
integers. The mixing function is that of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
number generators", with Stafford's "Mix13" constants).
"""

import hashlib
import math
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

CPU = torch.device("cpu")
Indices = Int64[Tensor, " samples"]


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's `>>` copies the sign bit."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _stream_keys(seed: int, name: str) -> tuple[int, int]:
    """Two 64-bit keys for one stream, by SHA-256: neighbouring seeds and similar names are unrelated."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return _signed(int.from_bytes(digest[:8], "little")), _signed(int.from_bytes(digest[8:16], "little"))


def random_bits(seed: int, name: str, indices: Indices, components: int) -> Int64[Tensor, "samples words"]:
    """64 random bits for each component of each sample."""
    first, second = _stream_keys(seed, name)
    sample = _mix(indices * _GOLDEN + first) ^ second
    component = torch.arange(1, components + 1, device=indices.device) * _GOLDEN
    return _mix(sample[:, None] + component)


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
        return _shift_right(random_bits(self.seed, self.name, indices, components), 1) % below

    def normals(self, indices: Indices, components: int) -> Float[Tensor, "samples components"]:
        """Standard normals (Box and Muller 1958), in torch's default dtype."""
        bits = random_bits(self.seed, self.name, indices, components)
        # In (0, 1), so that the logarithm is finite.
        uniform = (_shift_right(bits, 32).double() + 0.5) / 2**32
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
    key = _stream_keys(seed, name)[0]
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


def drawn_so_far() -> float:
    """A number that tells apart what this process has drawn from the generators of torch (CPU) and numpy."""
    of_numpy: Any = np.random.get_state(legacy=False)
    states = (torch.get_rng_state().numpy().tobytes(), str(of_numpy["state"]["pos"]).encode())
    return float(zlib.crc32(of_numpy["state"]["key"].tobytes() + b"".join(states)))


def set_generators(device: torch.device, states: tuple[Any, ...]) -> None:
    """Have the generators as they were when `generators` gave `states`."""
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.get_device_module(device).set_rng_state(states[1], device)
    np.random.set_state(states[2])
    random.setstate(states[3])


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Put back, at the end, the generators of torch, numpy and random."""
    states = generators(device)
    try:
        yield
    finally:
        set_generators(device, states)


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Seed torch's CPU generator from (seed, name), as for initial weights, and restore it at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_stream_keys(seed, name)[0])
        yield
