"""Counting right answers; each rank counts its share."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cs324dist.data.images import LabelledImages, to_unit_range
from cs324dist.data.palindromes import DIGITS, all_palindromes, encode, free_digits, palindromes
from cs324dist.data.streams import Shard, Stream

Predict = Callable[[Tensor], Tensor]  # inputs to logits
UntilStopped = Callable[[Iterable[Tensor]], Iterable[Tensor]]  # may end early; see `training.task`
TRIALS = 10_000
TRIALS_WHEN_LONG = 1_000
LONG = 2_000  # digits; beyond, 10 000 palindromes take minutes
DIGITS_AT_ONCE = 250_000  # of a forward pass, in which an RNN keeps about 1 KiB a digit
LEAST_AT_ONCE = 50  # palindromes of a forward pass: fewer take as long, however long they are


@torch.no_grad()
def count_right_palindromes(
    predict: Predict,
    encoding: str,
    length: int,
    stream: Stream,
    shard: Shard,
    dtype: torch.dtype,
    until_stopped: UntilStopped = iter,
) -> tuple[Int64[Tensor, ""], int]:
    """How many palindromes this rank's share of the trials gets right, and how many trials there are in all.

    All palindromes there are, if they are at most 10 000; else 10 000 of `stream`, 1 000 beyond length 2 000.
    """
    exhaustive = DIGITS ** free_digits(length) <= TRIALS
    trials = DIGITS ** free_digits(length) if exhaustive else TRIALS if length <= LONG else TRIALS_WHEN_LONG
    right = torch.zeros((), dtype=torch.int64, device=shard.device)
    for indices in until_stopped(
        shard.samples(0, trials).split(max(LEAST_AT_ONCE, DIGITS_AT_ONCE // length))
    ):
        digits, last = (
            all_palindromes(length, indices) if exhaustive else palindromes(stream, indices, length)
        )
        right += (predict(encode(digits, encoding, dtype)).argmax(dim=1) == last).sum()
    return right, trials


@torch.no_grad()
def count_right_images(
    predict: Predict,
    images: LabelledImages,
    shard: Shard,
    dtype: torch.dtype,
    batch: int = 500,
    until_stopped: UntilStopped = iter,
) -> Int64[Tensor, ""]:
    """How many images of this rank's share are classified right."""
    right = torch.zeros((), dtype=torch.int64, device=shard.device)
    for indices in until_stopped(shard.samples(0, len(images.labels)).split(batch)):
        inputs = to_unit_range(images.images[indices], dtype)
        right += (predict(inputs).argmax(dim=1) == images.labels[indices]).sum()
    return right


def share_right(logits: Float[Tensor, "batch classes"], labels: Int64[Tensor, " batch"]) -> Float[Tensor, ""]:
    """The share of right answers in a batch."""
    return (logits.argmax(dim=1) == labels).float().mean()
