"""A counter-based random generator: every number is an integer hash of its own address.

The address is (seed, stream name, sample index, component). There is no state, so any slice of a stream can
be computed anywhere, in any order, by any number of processes. The hash uses torch's int64 arithmetic, which
wraps around in the same way on CPU and GPU, so both give the same integers.

The mixing function is that of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators", with Stafford's "Mix13" constants).
"""

import hashlib
import math

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

Keys = tuple[int, int]
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


def stream_keys(seed: int, stream: str) -> Keys:
    """Two 64-bit keys for one stream, by SHA-256: neighbouring seeds and similar names are unrelated."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return _signed(int.from_bytes(digest[:8], "little")), _signed(int.from_bytes(digest[8:16], "little"))


def random_bits(keys: Keys, indices: Indices, components: int) -> Int64[Tensor, "samples components"]:
    """64 random bits for each component of each sample."""
    sample = _mix(indices * _GOLDEN + keys[0]) ^ keys[1]
    component = torch.arange(1, components + 1, device=indices.device) * _GOLDEN
    return _mix(sample[:, None] + component)


def random_integers(
    keys: Keys, indices: Indices, components: int, below: int
) -> Int64[Tensor, "samples components"]:
    """Uniform integers in [0, below), as remainders; their bias is at most below / 2^63."""
    return _shift_right(random_bits(keys, indices, components), 1) % below


def random_normals(keys: Keys, indices: Indices, components: int) -> Float64[Tensor, "samples components"]:
    """Standard normals (Box and Muller 1958): radius from the upper 32 bits, angle from the lower 32."""
    bits = random_bits(keys, indices, components)
    uniform = (_shift_right(bits, 32).double() + 0.5) / 2**32  # in (0, 1), so that the logarithm is finite
    angle = (bits & 0xFFFFFFFF).double() * (2 * math.pi / 2**32)
    return (-2 * uniform.log()).sqrt() * angle.cos()


def random_signs(keys: Keys, indices: Indices, components: int) -> Int64[Tensor, "samples components"]:
    """-1 or 1; each hash gives 64 of them, one per bit."""
    words = random_bits(keys, indices, -(-components // 64))
    bits = (words[:, :, None] >> torch.arange(64, device=indices.device)) & 1
    return bits.flatten(1)[:, :components] * 2 - 1
