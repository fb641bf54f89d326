"""Palindromes of decimal digits: the model reads all digits but the last and predicts the last.

The last digit equals the first, so the model has to remember one digit over the whole length.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cs324dist.data.streams import Stream

DIGITS = 10
Samples = tuple[Int64[Tensor, "batch time"], Int64[Tensor, " batch"]]  # inputs and targets


def palindromes(stream: Stream, indices: Int64[Tensor, " batch"], length: int) -> Samples:
    """Draw palindromes of `length + 1` digits, split into the first `length` and the last, the target."""
    half = stream.integers(indices, components=free_digits(length), below=DIGITS)
    return complete(half, length)


def all_palindromes(length: int, indices: Int64[Tensor, " batch"]) -> Samples:
    """Palindromes by their place, in [0, 10^free_digits), in the sorted list of all; split likewise."""
    powers = DIGITS ** torch.arange(free_digits(length) - 1, -1, -1, device=indices.device)
    return complete(indices[:, None] // powers % DIGITS, length)


def free_digits(length: int) -> int:
    """Number of digits that determine a palindrome of `length + 1` digits: ceil((length + 1) / 2)."""
    return length // 2 + 1


def complete(half: Int64[Tensor, "batch free"], length: int) -> Samples:
    """Mirror the free digits, and split off the last digit as the target."""
    mirrored = half.flip(1)[:, (length + 1) % 2 :]
    whole = torch.cat([half, mirrored], dim=1)
    return whole[:, :-1], whole[:, -1]


def encode(digits: Int64[Tensor, "batch time"], encoding: str) -> Float[Tensor, "time batch features"]:
    """Encode digits as network input, in torch's default dtype.

    Args:
        digits: values in [0, 10).
        encoding: `scalar`, the digit itself, as in the course report; or `onehot`, ten features.
    """
    dtype = torch.get_default_dtype()
    if encoding == "scalar":
        return digits.T.unsqueeze(-1).to(dtype)
    # torch's one_hot returns int64, which would have to be converted: 12 bytes per feature, not 4
    onehot = torch.zeros(*digits.T.shape, DIGITS, dtype=dtype, device=digits.device)
    return onehot.scatter_(-1, digits.T[..., None], 1.0)
