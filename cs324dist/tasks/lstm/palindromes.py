"""Palindromes of decimal digits: the model reads all digits but the last and predicts the last.

The last digit equals the first, so the model has to remember one digit over the whole length.
"""

from collections.abc import Callable

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from cs324dist.data.streams import Stream
from cs324dist.distributed.sum_over import SumOver
from cs324dist.metrics import count_correct

DIGITS = 10
DRAWN_AT_ONCE = 1 << 20
Samples = tuple[UInt8[Tensor, "time batch"], Int64[Tensor, " batch"]]  # inputs and targets
Predict = Callable[[Tensor], Tensor]  # inputs to logits
TRIALS = 10_000
TRIALS_WHEN_LONG = 1_000
LONG = 2_000  # digits; beyond, 10 000 palindromes take minutes
DIGITS_AT_ONCE = 250_000  # of a forward pass, in which an RNN keeps about 1 KiB per digit
LEAST_AT_ONCE = 100  # palindromes of a forward pass, however long they are: 50 take three fifths of the time


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


def palindrome_accuracy(predict: Predict, length: int, stream: Stream, sum_over: SumOver) -> float:
    """The share of palindromes whose last digit is predicted.

    Of all there are, if they are at most 10 000; else of 10 000 of `stream`, 1 000 beyond length 2 000.
    """
    all_there_are = DIGITS ** free_digits(length)
    trials = min(all_there_are, TRIALS if length <= LONG else TRIALS_WHEN_LONG)

    def count_right(indices: Int64[Tensor, " batch"]) -> dict[str, Tensor]:
        is_all = trials == all_there_are
        digits, last = all_palindromes(length, indices) if is_all else palindromes(stream, indices, length)
        return {"right": count_correct(predict(digits), last)}

    found = sum_over(count_right, trials, max(LEAST_AT_ONCE, DIGITS_AT_ONCE // length))
    return found["right"].item() / trials
