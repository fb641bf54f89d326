"""The share of right answers."""

from collections.abc import Callable

from jaxtyping import Float, Int64
from torch import Tensor

from cs324dist.data.palindromes import DIGITS, all_palindromes, free_digits, palindromes
from cs324dist.data.streams import Stream
from cs324dist.distributed.sum_over import SumOver

Predict = Callable[[Tensor], Tensor]  # inputs to logits
TRIALS = 10_000
TRIALS_WHEN_LONG = 1_000
LONG = 2_000  # digits; beyond, 10 000 palindromes take minutes
DIGITS_AT_ONCE = 250_000  # of a forward pass, in which an RNN keeps about 1 KiB per digit
LEAST_AT_ONCE = 100  # palindromes of a forward pass, however long they are: 50 take three fifths of the time


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


def count_correct(
    logits: Float[Tensor, "batch classes"], labels: Int64[Tensor, " batch"]
) -> Int64[Tensor, ""]:
    """How many answers of a batch are right."""
    return (logits.argmax(dim=1) == labels).sum()


def accuracy(logits: Float[Tensor, "batch classes"], labels: Int64[Tensor, " batch"]) -> Float[Tensor, ""]:
    """The share of right answers in a batch."""
    return (logits.argmax(dim=1) == labels).float().mean()
