"""Sums over pieces: those of a plain loop to the last bit, however many processes share the pieces."""

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import Rank, as_ranks, on_ranks
from torch import Tensor

from cs324dist.data.streams import CPU
from cs324dist.distributed.parts import Parts, add_in_order, gather_rows
from cs324dist.distributed.stop import StopRequest
from cs324dist.distributed.sum_over import CutOff, SumOver

COUNT, PIECE = 1234, 100


def measure(indices: Tensor) -> dict[str, Tensor]:
    """Of different shapes and types, and such that sums depend on their order."""
    values = (indices.double() / 7).cos()
    return {
        "even": (indices % 2 == 0).sum(),
        "total": values.sum(),
        "by_rest": values.new_zeros(3).index_add(0, indices % 3, values),
        "float32": values.float().square().sum().expand(2, 1),
    }


def plain_loop(pieces: Iterable[range]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for piece in pieces:
        for name, value in measure(torch.tensor(piece)).items():
            total[name] = total.get(name, 0) + value.double()
    return total


def pieces_of(count: int, piece: int) -> list[range]:
    return [range(start, min(start + piece, count)) for start in range(0, count, piece)]


def assert_equal_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float64
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 13, 16, 64])
def test_any_number_of_processes_finds_what_a_plain_loop_finds(processes):
    expected, backwards = plain_loop(pieces_of(COUNT, PIECE)), plain_loop(reversed(pieces_of(COUNT, PIECE)))
    assert any(not torch.equal(expected[name], backwards[name]) for name in expected)  # the order matters
    for found in on_ranks(processes, lambda sum_over: sum_over(measure, COUNT, PIECE)):
        assert_equal_bits(found, expected)


def test_each_process_measures_its_share_without_gradients():
    weight = torch.nn.Parameter(torch.ones(1))

    def work(sum_over: SumOver) -> list[list[int]]:
        asked: list[list[int]] = []

        def remember(indices: Tensor) -> dict[str, Tensor]:
            asked.append(indices.tolist())
            return {"total": (weight * indices).sum()}

        found = sum_over(remember, 13, 2)
        assert found == {"total": sum(range(13))}
        assert not found["total"].requires_grad
        return asked

    # Seven pieces in three rounds; those who have none in the last round measure the last piece in vain.
    assert on_ranks(3, work) == [[[0, 1], [6, 7], [12]], [[2, 3], [8, 9], [12]], [[4, 5], [10, 11], [12]]]


def test_a_process_that_is_stopped_measures_no_more_and_keeps_the_others_waiting_for_nothing():
    measured = []

    class Stopped(StopRequest):
        received = True

        def interrupted(self) -> bool:  # the ranks share this one
            return True

    def remember(indices: Tensor) -> dict[str, Tensor]:
        measured.append(len(indices))
        return measure(indices)

    def work(sum_over: SumOver) -> None:
        with pytest.raises(CutOff):  # the sum is worth nothing
            sum_over(remember, COUNT, PIECE)

    on_ranks(2, work, Stopped(2))
    assert measured == [PIECE, PIECE]


@given(count=st.integers(1, 9), processes=st.integers(1, 4), shift=st.integers(0, 1))
def test_every_process_gets_the_rows_of_all_in_order(count, processes, shift):
    count = max(count, processes)  # each has a part

    def gathered(rank: Rank) -> list[list[float]]:
        rows = {index: torch.tensor([index, 0.1 * index]) for index in Parts(count, CPU).of(shift)}
        return gather_rows(rows, count, shift).tolist()

    expected = torch.tensor([[index, 0.1 * index] for index in range(count)]).tolist()
    assert as_ranks(processes, gathered) == [expected] * processes


@given(st.lists(st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=2), min_size=1, max_size=9))
def test_rows_are_added_one_after_the_other(rows):
    expected = [0.0, 0.0]
    for row in rows:
        expected = [total + value for total, value in zip(expected, row, strict=True)]  # Python's are float64
    assert add_in_order(torch.tensor(rows, dtype=torch.float64)).tolist() == expected
