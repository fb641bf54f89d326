"""The mean of gradients, beside a plain loop over the parts: the same bits for any number of processes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import Rank, as_ranks
from torch import Tensor

from cs324dist.distributed.ordered_sum import OrderedSum

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FORMATS = {
    "contiguous": lambda tensor: tensor,
    "channels last": lambda tensor: tensor.to(memory_format=torch.channels_last),
    "transposed": lambda tensor: tensor.transpose(0, 1),
    "with gaps": lambda tensor: tensor[::2, :, ::2],
}
Gradients = list[list[Tensor | None]]


@st.composite
def parameters_and_gradients(draw: st.DrawFn) -> tuple[list[Tensor], Gradients]:
    """Of each part a gradient for each parameter, or None; in any memory format, of very different sizes."""
    shape = st.tuples(*[st.integers(0, 4)] * 4)
    kinds = st.tuples(shape, st.sampled_from(DTYPES), st.sampled_from(sorted(FORMATS)))
    parameters = [FORMATS[f](torch.zeros(s, dtype=d)) for s, d, f in draw(st.lists(kinds, min_size=1))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def gradient(parameter: Tensor) -> Tensor | None:
        if draw(st.integers(0, 3)) == 0:
            return None
        values = torch.randn(parameter.shape, generator=generator)
        values *= 2.0 ** torch.randint(-9, 9, values.shape, generator=generator)
        shaped = torch.empty_like(parameter) if draw(st.booleans()) else torch.empty(parameter.shape)
        return shaped.to(parameter.dtype).copy_(values)

    count = draw(st.integers(1, 7))
    return parameters, [[gradient(parameter) for parameter in parameters] for _ in range(count)]


def plain_loop(parameters: list[Tensor], of_parts: Gradients) -> list[Tensor]:
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    for gradients in of_parts:
        for total, gradient in zip(totals, gradients, strict=True):
            total += 0 if gradient is None else gradient
    return [total / len(of_parts) for total in totals]


def means(rank: Rank, total: OrderedSum, of_parts: Gradients) -> list[Tensor]:
    total.start()
    for first in range(0, len(of_parts), rank.num_processes):
        index = first + rank.process_index
        total.add(first, of_parts[index] if index < len(of_parts) else [])
    return total.means()


def assert_equal_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        assert torch.equal(one.signbit(), other.signbit())


@given(parameters_and_gradients(), st.integers(1, 4))
def test_it_is_a_plain_loop_for_any_number_of_processes(made, processes):
    parameters, of_parts = made
    expected = plain_loop(parameters, of_parts)

    def work(rank: Rank) -> None:
        total = OrderedSum(parameters, len(of_parts))
        for in_memory in (of_parts[::-1], of_parts):
            found = means(rank, total, in_memory)
        assert_equal_bits(found, expected)
        for mean, parameter in zip(found, parameters, strict=True):
            assert mean.stride() == torch.empty_like(parameter).stride()

    as_ranks(min(processes, len(of_parts)), work)


def mean_of_one(rows: list[Tensor]) -> Tensor:
    (mean,) = means(Rank(0, 1), OrderedSum(rows[:1], len(rows)), [[row] for row in rows])
    return mean


def test_the_order_matters_here():
    rows = list(torch.randn(6, 100, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(mean_of_one(rows), mean_of_one(rows[::-1]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("processes", [1, 3])
def test_what_is_not_finite_is_seen_and_stays_in_its_place(bad, processes):
    rows = [[torch.tensor([1.0, bad, 2.0]), torch.ones(1)]] + [[torch.ones(3), torch.ones(1)]] * 3
    for first, second in as_ranks(processes, lambda rank: means(rank, OrderedSum(rows[0], 4), rows)):
        assert first.isfinite().tolist() == [True, False, True]
        assert second.tolist() == [1.0]


@pytest.mark.parametrize(("processes", "most"), [(1, 1.0), (3, 2.4)])
def test_one_accumulator_is_enough_and_its_memory_is_kept(processes, most):
    parameters, count = [torch.zeros(50, 20), torch.zeros(7)], 8

    def work(rank: Rank) -> int:
        total = OrderedSum(parameters, count)
        places = [[mean.data_ptr() for mean in means(rank, total, [parameters] * count)] for _ in range(2)]
        assert places[0] == places[1]
        held = [value for value in vars(total._sums[0][1]).values() if isinstance(value, Tensor)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())

    assert max(as_ranks(processes, work)) <= most * 4 * sum(parameter.numel() for parameter in parameters)
