"""Palindromes of decimal digits: the model sees all but the last digit and must say it.

The last digit equals the first, so the task is to remember one digit for the whole length.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cs324dist.data.streams import Stream

DIGITS = 10


def palindromes(
    stream: Stream, indices: Int64[Tensor, " batch"], length: int
) -> tuple[Int64[Tensor, "batch time"], Int64[Tensor, " batch"]]:
    """Inputs of `length` digits and the digit that completes each to a palindrome of `length + 1`."""
    half = stream.integers(indices, components=free_digits(length), below=DIGITS)
    return complete(half, length)


def all_palindromes(
    length: int, indices: Int64[Tensor, " batch"]
) -> tuple[Int64[Tensor, "batch time"], Int64[Tensor, " batch"]]:
    """Those of all 10^free_digits palindromes that stand at `indices` when they are counted through."""
    powers = DIGITS ** torch.arange(free_digits(length) - 1, -1, -1, device=indices.device)
    return complete(indices[:, None] // powers % DIGITS, length)


def free_digits(length: int) -> int:
    """How many digits of a palindrome of `length + 1` digits can be chosen: ceil((length + 1) / 2)."""
    return length // 2 + 1


def complete(
    half: Int64[Tensor, "batch free"], length: int
) -> tuple[Int64[Tensor, "batch time"], Int64[Tensor, " batch"]]:
    """Mirror the free digits, and split off the last digit as the target."""
    mirrored = half.flip(1)[:, (length + 1) % 2 :]
    whole = torch.cat([half, mirrored], dim=1)
    return whole[:, :-1], whole[:, -1]


def encode(
    digits: Int64[Tensor, "batch time"], encoding: str, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "time batch features"]:
    """Digits as the network's input: `scalar`, the digit itself (the report's), or `onehot`."""
    if encoding == "scalar":
        return digits.T.unsqueeze(-1).to(dtype)
    # torch's one_hot makes integers, twelve bytes a feature where four do
    coded = torch.zeros(*digits.T.shape, DIGITS, dtype=dtype, device=digits.device)
    return coded.scatter_(-1, digits.T[..., None], 1.0)
