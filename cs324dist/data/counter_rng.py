"""A counter-based random generator: every number is an integer hash of its own address.

The address is (seed, stream name, sample index, component). There is no state, so any slice of a stream can
be computed anywhere, in any order, by any number of processes. The hash uses torch's int64 arithmetic, which
wraps around in the same way on CPU and GPU, so both give the same integers.

The mixing function is that of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators", with Stafford's "Mix13" constants).
"""

import hashlib

import torch
from jaxtyping import Int64
from torch import Tensor

Indices = Int64[Tensor, " samples"]


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's `>>` copies the sign bit."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ shift_right(x, 30)) * _MIX_1
    x = (x ^ shift_right(x, 27)) * _MIX_2
    return x ^ shift_right(x, 31)


def stream_keys(seed: int, stream: str) -> tuple[int, int]:
    """Two 64-bit keys for one stream, by SHA-256: neighbouring seeds and similar names are unrelated."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return _signed(int.from_bytes(digest[:8], "little")), _signed(int.from_bytes(digest[8:16], "little"))


def random_bits(
    seed: int, stream: str, indices: Indices, components: int
) -> Int64[Tensor, "samples components"]:
    """64 random bits for each component of each sample."""
    first, second = stream_keys(seed, stream)
    sample = _mix(indices * _GOLDEN + first) ^ second
    component = torch.arange(1, components + 1, device=indices.device) * _GOLDEN
    return _mix(sample[:, None] + component)
