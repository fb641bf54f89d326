"""Palindromes: which there are, how they are drawn, and how many a model gets right."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from scipy import stats
from torch import Tensor, nn

from cs324dist.data.streams import Stream
from cs324dist.metrics import accuracy, count_correct
from cs324dist.tasks.lstm.palindromes import all_palindromes, free_digits, palindrome_accuracy, palindromes


def written_out(digits: torch.Tensor, last: torch.Tensor) -> list[str]:
    return ["".join(map(str, [*row, end])) for row, end in zip(digits.T.tolist(), last.tolist(), strict=True)]


def palindromes_of(digits: int) -> list[str]:
    everything = ("".join(choice) for choice in itertools.product("0123456789", repeat=digits))
    return [text for text in everything if text == text[::-1]]


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 200))
@example(0, 1)
@example(0, 2)
def test_sample_and_target_read_the_same_backwards(seed: int, length: int) -> None:
    digits, last = palindromes(Stream(seed, "x"), torch.arange(20), length)
    assert digits.shape == (length, 20)
    for text in written_out(digits, last):
        assert len(text) == length + 1  # every entry is one decimal digit
        assert text == text[::-1]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_counting_through_gives_each_palindrome_once(length: int) -> None:
    expected = palindromes_of(length + 1)
    assert 10 ** free_digits(length) == len(expected)
    assert sorted(written_out(*all_palindromes(length, torch.arange(len(expected))))) == expected


@pytest.mark.parametrize("length", [4, 5])
def test_all_palindromes_are_drawn_equally_often(length: int) -> None:
    texts = written_out(*palindromes(Stream(0, "x"), torch.arange(30_000), length))
    counts = [texts.count(text) for text in palindromes_of(length + 1)]
    assert sum(counts) == 30_000
    assert stats.chisquare(counts).pvalue > 0.001


def test_drawn_in_parts_they_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    digits, last = palindromes(Stream(0, "x"), torch.arange(20), 9)
    for at_once in (1, 7, 5 * 20):
        monkeypatch.setattr("cs324dist.tasks.lstm.palindromes.DRAWN_AT_ONCE", at_once)
        in_parts = palindromes(Stream(0, "x"), torch.arange(20), 9)
        assert torch.equal(in_parts[0], digits)
        assert torch.equal(in_parts[1], last)


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


def test_the_share_of_right_answers_in_a_batch() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0], [-3.0, -2.0, -1.0], [0.0, 0.0, 1.0]])
    labels = torch.tensor([1, 0, 2, 0])
    assert accuracy(logits, labels).item() == 0.75
    assert count_correct(logits, labels).item() == 3
