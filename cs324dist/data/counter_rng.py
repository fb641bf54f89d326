"""A counter-based random generator: every number is an integer hash of its own address.

The address is (seed, stream name, sample index, component). Nothing is carried from one number to the next,
so any slice of a stream can be computed anywhere, in any order, by any number of processes. The hash is
computed in torch's int64 arithmetic, which wraps alike on CPU and GPU: the integers are the same on both.

The mixing function is SplitMix64's (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators", with Stafford's constants "Mix13").
"""

import hashlib
import math

import torch
from jaxtyping import Float64, Int64
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own `>>` copies the sign bit."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def stream_keys(seed: int, stream: str) -> tuple[int, int]:
    """Two 64-bit keys for one stream; SHA-256 keeps neighbouring seeds and similar names apart."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return _signed(int.from_bytes(digest[:8], "little")), _signed(int.from_bytes(digest[8:16], "little"))


def random_bits(
    keys: tuple[int, int], indices: Int64[Tensor, " samples"], components: int
) -> Int64[Tensor, "samples components"]:
    """64 random bits for each component of each sample."""
    sample = _mix(indices * _GOLDEN + keys[0]) ^ keys[1]
    component = torch.arange(1, components + 1, device=indices.device) * _GOLDEN
    return _mix(sample[:, None] + component)


def random_integers(
    keys: tuple[int, int], indices: Int64[Tensor, " samples"], components: int, below: int
) -> Int64[Tensor, "samples components"]:
    """Integers uniform in [0, below); the bias of the remainder is at most below / 2^63."""
    return _shift_right(random_bits(keys, indices, components), 1) % below


def random_normals(
    keys: tuple[int, int], indices: Int64[Tensor, " samples"], components: int
) -> Float64[Tensor, "samples components"]:
    """Standard normals (Box and Muller 1958): radius from the upper 32 bits, angle from the lower 32."""
    bits = random_bits(keys, indices, components)
    uniform = (_shift_right(bits, 32).double() + 0.5) / 2**32  # in (0, 1): the logarithm is finite
    angle = (bits & 0xFFFFFFFF).double() * (2 * math.pi / 2**32)
    return (-2 * uniform.log()).sqrt() * angle.cos()


def random_signs(
    keys: tuple[int, int], indices: Int64[Tensor, " samples"], components: int
) -> Int64[Tensor, "samples components"]:
    """-1 or 1, one bit each: 64 for the price of one hash."""
    words = random_bits(keys, indices, -(-components // 64))
    bits = (words[:, :, None] >> torch.arange(64, device=indices.device)) & 1
    return bits.flatten(1)[:, :components] * 2 - 1
