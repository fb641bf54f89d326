"""What a run compares while it goes on: checksums of tensors, and who has another."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from ranks import Rank, as_ranks
from torch import Tensor

from cs324dist.distributed import checks
from cs324dist.distributed.checks import checksum, differences
from cs324dist.distributed.process import compare_environments
from cs324dist.errors import UserError
from cs324dist.runs.environment import environment

BYTES = {torch.int8: 1, torch.float16: 2, torch.bfloat16: 2, torch.int16: 2, torch.float32: 4, torch.int32: 4,
         torch.float64: 8, torch.int64: 8, torch.complex64: 8, torch.complex128: 16}  # fmt: skip
SMALL = 4  # values that are summed together, in these tests


@pytest.fixture(autouse=True, scope="module")
def few_at_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "AT_ONCE", SMALL)
        yield


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Of any type, with any bits."""
    dtype, count = draw(st.sampled_from(sorted(BYTES, key=str))), draw(st.integers(1, 3 * SMALL))
    size = BYTES[dtype]
    zero_or_highest_bits = st.sampled_from([0, 64, 128]).map(lambda last: bytes(size - 1) + bytes([last]))
    value = st.binary(min_size=size, max_size=size) | zero_or_highest_bits
    values = draw(st.lists(value, min_size=count, max_size=count))
    return torch.frombuffer(bytearray(b"".join(values)), dtype=dtype)


@given(tensors(), st.data())
def test_it_changes_with_any_single_bit(tensor, data):
    before = checksum(tensor).item()
    as_bytes = tensor.view(torch.uint8)
    as_bytes[data.draw(st.integers(0, len(as_bytes) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(tensor).item() != before


@given(tensors(), st.data())
def test_it_changes_where_two_values_change_places(tensor, data):
    places = st.integers(0, len(tensor) - 1)
    one, other = data.draw(places), data.draw(places)
    width = BYTES[tensor.dtype]
    in_bytes = tensor.view(torch.uint8).view(-1, width)
    assume(not torch.equal(in_bytes[one], in_bytes[other]))
    before = checksum(tensor).item()
    in_bytes[[one, other]] = in_bytes[[other, one]]
    assert checksum(tensor).item() != before


@given(tensors(), st.integers(1, 9))
def test_it_is_the_same_in_any_memory_format_and_however_many_are_summed_at_once(tensor, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "AT_ONCE", at_once)
        found = checksum(tensor)
    assert found == checksum(tensor) == checksum(tensor.view(-1, 1)) == checksum(tensor.repeat(2, 1).T[:, 0])


class TestDifferences:
    @pytest.mark.parametrize(
        ("found", "line"),
        [
            ([1, 1, 2], "a on rank 2 is not as on ranks 0, 1 (2, and 1)"),
            ([2, 1], "a on rank 1 is not as on rank 0 (1, and 2)"),
            ([1, 1, 2, 1, 3, 1], "a on ranks 2, 4 is not as on ranks 0, 1, 3, 5 (2, and 1)"),
            (
                [1] * 8 + [2] * 7,
                "a on ranks 8, 9, 10, 11, 12, … is not as on ranks 0, 1, 2, 3, 4, … (2, and 1)",
            ),
        ],
    )
    def test_those_that_differ_from_most_are_named(self, found, line):
        assert differences([{"a": value, "b": 0} for value in found]) == [line]

    def test_a_name_that_one_does_not_have_is_named(self):
        (line,) = differences([{"a": 1}, {"a": 1, "b": 2}, {"a": 1}])
        assert line == "b on rank 1 is not as on ranks 0, 2 (2, and None)"

    def test_state_that_is_no_number_but_the_same_is_the_same(self):
        nan = float("nan")
        assert differences([{"a": {"x": nan}}, {"a": {"x": float("nan")}}]) == []
        assert len(differences([{"a": {"x": nan}}, {"a": {"x": 0.0}}])) == 1


class TestEnvironmentsAreCompared:
    def compare(self, rank: Rank, *, exact: bool, threads: int = 1) -> None:
        made_in = replace(environment(commit=False), threads=1 if rank.process_index != 1 else threads)
        compare_environments(made_in, exact=exact)

    def test_with_micro_batches_a_difference_is_refused(self):
        as_ranks(3, lambda rank: self.compare(rank, exact=True))
        with pytest.raises(UserError, match=r"^threads on rank 1 is not as on ranks 0, 2 \(9, and 1\): with"):
            as_ranks(3, lambda rank: self.compare(rank, exact=True, threads=9))

    def test_without_them_it_is_a_warning(self, capsys):
        as_ranks(3, lambda rank: self.compare(rank, exact=False, threads=9))
        line = "warning: threads on rank 1 is not as on ranks 0, 2 (9, and 1): a step then depends"
        assert line in capsys.readouterr().err
