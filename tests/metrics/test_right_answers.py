from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cs324dist.data.images import LabelledImages
from cs324dist.data.palindromes import palindromes
from cs324dist.data.streams import Shard, Stream
from cs324dist.metrics.accuracy import count_right_images, count_right_palindromes, share_right
from cs324dist.models.lstm import LSTM

STREAM = Stream(0, "palindromes/test")


class Stub(nn.Module):
    """A model of scalar digits: `says` gives its answer to a sample. It remembers what it was asked."""

    def __init__(self, says: Callable[[tuple[int, ...]], int]) -> None:
        super().__init__()
        self.says = says
        self.asked: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        samples = [tuple(sample) for sample in x[:, :, 0].T.long().tolist()]
        self.asked += samples
        answers = torch.tensor([self.says(sample) for sample in samples], dtype=torch.int64)
        return nn.functional.one_hot(answers, 10).to(x.dtype)


def count(
    model: nn.Module, length: int, shard: Shard | None = None, encoding: str = "scalar"
) -> tuple[int, int]:
    right, trials = count_right_palindromes(model, encoding, length, STREAM, shard or Shard(), torch.float32)
    return right.item(), trials


def first(sample: tuple[int, ...]) -> int:
    return sample[0]


class TestPalindromes:
    @pytest.mark.parametrize(("length", "all_there_are"), [(1, 10), (4, 1000), (5, 1000), (7, 10_000)])
    def test_short_ones_are_all_tried_once(self, length: int, all_there_are: int) -> None:
        model = Stub(first)
        assert count(model, length) == (all_there_are, all_there_are)
        assert len(model.asked) == len(set(model.asked)) == all_there_are

    def test_longer_ones_are_ten_thousand_of_the_stream(self) -> None:
        model = Stub(first)
        assert count(model, 8) == (10_000, 10_000)
        digits, _ = palindromes(STREAM, torch.arange(10_000), 8)
        assert model.asked == [tuple(sample) for sample in digits.tolist()]

    def test_beyond_2000_digits_a_thousand_are_enough(self) -> None:
        class First(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                passes.append(x.shape[:2].numel())
                return nn.functional.one_hot(x[0, :, 0].long(), 10).float()

        passes: list[int] = []
        assert count(First(), 2001) == (1000, 1000)
        assert sum(passes) == 1000 * 2001
        assert max(passes) <= 250_000  # what a forward pass may hold
        passes.clear()
        assert count(First(), 20_000) == (1000, 1000)
        assert len(passes) == 20  # of 50 palindromes: fewer at once would take as long

    def test_onehot_digits_count_alike(self) -> None:
        class First(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x[0]

        assert count(First(), 5, encoding="onehot") == (1000, 1000)

    def test_a_model_that_answers_the_second_digit_is_right_where_it_equals_the_first(self) -> None:
        assert count(Stub(lambda sample: sample[1]), 5) == (100, 1000)

    def test_one_mistake_is_one_missed(self) -> None:
        model = Stub(lambda sample: 9 if sample == (4, 7, 1, 1, 7) else sample[0])
        assert count(model, 5) == (999, 1000)
        shares = [count(model, 5, Shard(rank, 4)) for rank in range(4)]
        assert shares == [(250, 1000), (249, 1000), (250, 1000), (250, 1000)]  # 471 is in the second quarter

    @pytest.mark.parametrize("length", [5, 9])
    @pytest.mark.parametrize("world", [2, 3, 7])
    def test_the_shares_of_the_ranks_add_up_to_the_whole(self, length: int, world: int) -> None:
        def often_right(sample: tuple[int, ...]) -> int:
            return sample[0] if sum(sample) % 3 else sample[1]

        whole, trials = count(Stub(often_right), length)
        assert 0 < whole < trials
        shares = [count(Stub(often_right), length, Shard(rank, world)) for rank in range(world)]
        assert sum(right for right, _ in shares) == whole
        assert {of for _, of in shares} == {trials}

    @pytest.mark.parametrize("kernel", ["fused", "equations"])
    def test_a_rank_left_without_trials_counts_none(self, kernel: str) -> None:
        assert count(LSTM(1, 4, kernel=kernel), 1, Shard(15, 16)) == (0, 10)


def test_images_are_counted_over_all_shards() -> None:
    labels = torch.arange(23) % 10
    images = torch.zeros(23, 28, 28, dtype=torch.uint8)
    images[:, 0, 0] = labels
    images[5, 0, 0] = 9  # reads wrong

    class FirstPixel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot(((x[:, 0, 0, 0] + 1) * 127.5).round().long(), 10).float()

    labelled = LabelledImages(images, labels)
    shares = [
        count_right_images(FirstPixel(), labelled, Shard(rank, 3), torch.float32, batch=4).item()
        for rank in range(3)
    ]
    assert shares == [7, 8, 7]
    assert count_right_images(FirstPixel(), labelled, Shard(), torch.float32).item() == 22


def test_the_share_of_right_answers_in_a_batch() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0], [-3.0, -2.0, -1.0], [0.0, 0.0, 1.0]])
    assert share_right(logits, torch.tensor([1, 0, 2, 0])).item() == 0.75
