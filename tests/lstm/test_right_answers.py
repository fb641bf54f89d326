from collections.abc import Callable

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

from cs324dist.data.streams import Stream
from cs324dist.metrics import accuracy, count_correct
from cs324dist.tasks.lstm.palindromes import palindrome_accuracy, palindromes

STREAM = Stream(0, "palindromes/test")


class Stub(nn.Module):
    """A model of digits: `says` gives its answer to a sample. It remembers what it was asked."""

    def __init__(self, says: Callable[[tuple[int, ...]], int]) -> None:
        super().__init__()
        self.says = says
        self.asked: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        samples = [tuple(sample) for sample in x.T.tolist()]
        self.asked += samples
        answers = torch.tensor([self.says(sample) for sample in samples], dtype=torch.int64)
        return nn.functional.one_hot(answers, 10).float()


def measure(model: nn.Module, length: int, ranks: int = 1) -> float:
    """The accuracy that each of the ranks finds, which is the same."""
    found = on_ranks(ranks, lambda sum_over: palindrome_accuracy(model, length, STREAM, sum_over))
    assert len(set(found)) == 1
    return found[0]


def first(sample: tuple[int, ...]) -> int:
    return sample[0]


class TestPalindromes:
    @pytest.mark.parametrize(("length", "all_there_are"), [(1, 10), (4, 1000), (5, 1000), (7, 10_000)])
    def test_short_ones_are_all_tried_once(self, length: int, all_there_are: int) -> None:
        model = Stub(first)
        assert measure(model, length) == 1
        assert len(model.asked) == len(set(model.asked)) == all_there_are

    def test_longer_ones_are_ten_thousand_of_the_stream(self) -> None:
        model = Stub(first)
        assert measure(model, 8) == 1
        digits, _ = palindromes(STREAM, torch.arange(10_000), 8)
        assert model.asked == [tuple(sample) for sample in digits.T.tolist()]

    def test_beyond_2000_digits_a_thousand_are_enough(self) -> None:
        class First(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                passes.append(x.numel())
                return nn.functional.one_hot(x[0].long(), 10).float()

        passes: list[int] = []
        assert measure(First(), 2001) == 1
        assert sum(passes) == 1000 * 2001
        assert max(passes) <= 250_000  # what a forward pass may hold
        passes.clear()
        assert measure(First(), 20_000) == 1
        assert len(passes) == 10  # of 100 palindromes: 50 take three fifths of the time

    @pytest.mark.parametrize("ranks", [1, 4])
    def test_one_mistake_is_one_missed(self, ranks: int) -> None:
        model = Stub(lambda sample: 9 if sample == (4, 7, 1, 1, 7) else sample[0])
        assert measure(model, 5, ranks) == 999 / 1000
        model = Stub(lambda sample: 9 if sample[:2] == (4, 7) else sample[0])
        assert measure(model, 2000, ranks) < 1  # in pieces, which the ranks share

    @pytest.mark.parametrize("length", [5, 9, 700])
    @pytest.mark.parametrize("ranks", [2, 3, 7])
    def test_any_number_of_ranks_finds_the_same(self, length: int, ranks: int) -> None:
        class OftenRight(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                digits = x.long()
                answers = torch.where(digits.sum(0) % 3 != 0, digits[0], digits[1])
                return nn.functional.one_hot(answers, 10).float()

        whole = measure(OftenRight(), length)
        assert 0 < whole < 1
        assert measure(OftenRight(), length, ranks) == whole


def test_the_share_of_right_answers_in_a_batch() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0], [-3.0, -2.0, -1.0], [0.0, 0.0, 1.0]])
    labels = torch.tensor([1, 0, 2, 0])
    assert accuracy(logits, labels).item() == 0.75
    assert count_correct(logits, labels).item() == 3
