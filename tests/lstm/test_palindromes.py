import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from cs324dist.data.streams import Stream
from cs324dist.tasks.lstm.palindromes import all_palindromes, free_digits, palindromes


def written_out(digits: torch.Tensor, last: torch.Tensor) -> list[str]:
    """Each palindrome, sample and target, as a string."""
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
