"""Palindromes of decimal digits: the model reads all digits but the last and predicts the last.

The last digit equals the first, so the model has to remember one digit over the whole length.
"""

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from cs324dist.data.streams import Stream

DIGITS = 10
DRAWN_AT_ONCE = 1 << 20
Samples = tuple[UInt8[Tensor, "time batch"], Int64[Tensor, " batch"]]  # inputs and targets


def palindromes(stream: Stream, indices: Int64[Tensor, " batch"], length: int) -> Samples:
    """Draw palindromes of `length + 1` digits, split into the first `length` and the last, the target."""
    free = free_digits(length)
    parts = indices.split(max(1, DRAWN_AT_ONCE // free))  # a number is drawn in eight bytes, and kept in one
    half = [stream.integers(part, components=free, below=DIGITS).to(torch.uint8) for part in parts]
    return complete(torch.cat(half), length)


def all_palindromes(length: int, indices: Int64[Tensor, " batch"]) -> Samples:
    """Palindromes by their place, in [0, 10^free_digits), in the sorted list of all; split likewise."""
    powers = DIGITS ** torch.arange(free_digits(length) - 1, -1, -1, device=indices.device)
    return complete((indices[:, None] // powers % DIGITS).to(torch.uint8), length)


def free_digits(length: int) -> int:
    """Number of digits that determine a palindrome of `length + 1` digits: ceil((length + 1) / 2)."""
    return length // 2 + 1


def complete(half: UInt8[Tensor, "batch free"], length: int) -> Samples:
    """Mirror the free digits, and split off the last digit as the target."""
    mirrored = half.flip(1)[:, (length + 1) % 2 :]
    whole = torch.cat([half, mirrored], dim=1)
    return whole[:, :-1].T, whole[:, -1].long()
