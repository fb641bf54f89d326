import random

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_counter_rng import in_double, word

from cs324dist.data.streams import (
    CPU,
    MicroBatch,
    ShuffledEpochs,
    Stream,
    drawn_so_far,
    generators,
    seed_everything,
    seeded,
    set_generators,
)

SEEDS = st.integers(0, 2**32)
FEW = st.integers(0, 99)


def draws(stream: Stream, indices: torch.Tensor) -> list[torch.Tensor]:
    return [stream.integers(indices, 3, below=10), stream.normals(indices, 5), stream.signs(indices, 70)]


def parts(step: int, batch_size: int, count: int) -> list[MicroBatch]:
    return [MicroBatch(step, batch_size, index, count) for index in range(count)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4096), st.integers(0, 10**9), st.integers(1, 4))
@example(4096, 123_456, 1)
@example(1, 0, 3)
def test_the_parts_in_order_are_the_batch_and_all_of_one_size(count, step, each) -> None:
    batch = count * each
    samples = [part.samples for part in parts(step, batch, count)]
    assert torch.cat(samples).tolist() == list(range(step * batch, (step + 1) * batch))
    assert {len(part) for part in samples} == {each}


class TestStream:
    @settings(deadline=None)
    @given(SEEDS, st.lists(FEW, max_size=40))
    def test_a_sample_has_the_same_numbers_in_whatever_company_and_order(self, seed, indices) -> None:
        stream, chosen = Stream(seed, "x"), torch.tensor(indices, dtype=torch.int64)
        whole = draws(stream, torch.arange(100))
        assert equal(draws(stream, chosen), [numbers[chosen] for numbers in whole])

    def test_numbers_come_in_the_default_dtype(self):
        stream, indices = Stream(0, "x"), torch.arange(10)
        exact = in_double(stream, indices, 3)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert torch.equal(stream.normals(indices, 3), exact.to(dtype))
            assert stream.signs(indices, 3).dtype == dtype


def one_by_one(shuffle: ShuffledEpochs, index: int) -> int:
    """The item at a sample index: the epoch's items sorted by random signed integers."""
    epoch, position = divmod(index, shuffle.size)
    random = [word(shuffle.seed, shuffle.name, epoch, item) for item in range(shuffle.size)]
    signed = [bits - (bits >> 63 << 64) for bits in random]
    return sorted(range(shuffle.size), key=signed.__getitem__)[position]


class TestShuffledEpochs:
    @settings(deadline=None)
    @given(SEEDS, st.integers(1, 12), st.integers(0, 100), st.integers(1, 5), st.integers(1, 10))
    @example(0, 10, 3, 1, 25)
    @example(0, 10, 0, 3, 12)
    def test_a_batch_may_cross_the_borders_of_any_number_of_epochs(self, seed, size, step, count, each):
        shuffle, batch = ShuffledEpochs(seed, "x", size), count * each
        items = torch.cat([shuffle.items(part) for part in parts(step, batch, count)])
        expected = [one_by_one(shuffle, index) for index in range(step * batch, (step + 1) * batch)]
        assert items.tolist() == expected

    def test_what_a_caller_does_to_its_items_does_not_reach_the_next_caller(self) -> None:
        shuffle, batch = ShuffledEpochs(0, "x", 10), MicroBatch(0, 10)
        kept = shuffle.items(batch)
        shuffle.items(batch).zero_()
        assert torch.equal(shuffle.items(batch), kept)


def test_seeded_draws_are_the_same_each_time_and_leave_torch_s_generator_as_it_was() -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    drawn = []
    for seed, name in ((1, "weights"), (1, "weights"), (2, "weights"), (1, "other")):
        with seeded(seed, name):
            drawn.append(torch.rand(4))
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(drawn[0], drawn[1])
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == 3


def drawn() -> tuple[float, ...]:
    return torch.rand(()).item(), np.random.random(), random.random()


def test_everything_is_seeded_from_a_seed_and_a_name() -> None:
    found = []
    for seed, name in ((1, "a"), (1, "a"), (2, "a"), (1, "b")):
        seed_everything(seed, name, CPU)
        found.append(drawn())
    assert found[0] == found[1]
    assert all(len(set(of_one)) == 3 for of_one in zip(*found, strict=True))


def test_generators_go_on_from_where_they_were() -> None:
    seed_everything(0, "a", CPU)
    drawn()
    kept, expected = generators(CPU), drawn()
    seed_everything(0, "b", CPU)
    set_generators(CPU, kept)
    assert drawn() == expected


def test_a_device_s_generator_is_kept_beside_the_cpu_s(monkeypatch) -> None:
    class Device:
        seed = 0

        def manual_seed(self, seed: int) -> None:
            self.seed = seed

        def get_rng_state(self, device: torch.device) -> torch.Tensor:
            assert device == cuda
            return torch.tensor([self.seed], dtype=torch.uint8)

        def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
            assert device == cuda
            (self.seed,) = state.tolist()

    cuda, module = torch.device("cuda", 0), Device()
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    module.seed = 7
    kept = generators(cuda)
    seed_everything(0, "a", cuda)
    assert module.seed != 7
    set_generators(cuda, kept)
    assert module.seed == 7


def test_what_was_drawn_is_told_by_torch_and_by_numpy():
    def after(*draws) -> float:
        seed_everything(0, "a", CPU)
        for draw in draws:
            draw()
        return drawn_so_far()

    found = [
        after(),
        after(np.random.rand),
        after(lambda: torch.rand(1)),
        after(np.random.rand, np.random.rand),
    ]
    assert len(set(found)) == len(found)
    assert after() == found[0]
