import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from test_counter_rng import word

from cs324dist.data.streams import Shard, ShuffledEpochs, Stream

SEEDS = st.integers(0, 2**32)
FEW = st.integers(0, 99)


def draws(stream: Stream, indices: torch.Tensor) -> list[torch.Tensor]:
    return [
        stream.integers(indices, 3, below=10),
        stream.normals(indices, 5),
        stream.normals(indices, 2, torch.float64),
        stream.signs(indices, 70),
    ]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class TestShard:
    @settings(deadline=None, max_examples=25)
    @given(st.integers(1, 4096), st.integers(0, 10**6), st.integers(0, 10_000))
    @example(4096, 10**6, 4097)
    @example(7, 0, 3)
    def test_the_ranks_pieces_in_order_are_the_whole_and_as_good_as_equal(self, world, start, count) -> None:
        pieces = [Shard(rank, world).samples(start, count) for rank in range(world)]
        assert torch.cat(pieces).tolist() == list(range(start, start + count))
        sizes = {len(piece) for piece in pieces}
        assert sizes <= {count // world, -(-count // world)}

    @settings(deadline=None, max_examples=25)
    @given(st.integers(1, 4096), st.integers(0, 10**9), st.integers(1, 4))
    @example(4096, 123_456, 1)
    def test_a_step_s_batch_follows_the_one_before(self, world: int, step: int, each: int) -> None:
        batch = world * each
        pieces = [Shard(rank, world).batch(step, batch) for rank in range(world)]
        assert torch.cat(pieces).tolist() == list(range(step * batch, (step + 1) * batch))
        assert {len(piece) for piece in pieces} == {each}

    def test_two_nodes_of_two_processes_share_a_batch_by_global_rank(self) -> None:
        pieces = [
            Shard(rank=node * 2 + local, world_size=4).batch(3, 8) for node in (0, 1) for local in (0, 1)
        ]
        assert [piece.tolist() for piece in pieces] == [[24, 25], [26, 27], [28, 29], [30, 31]]


class TestStream:
    @settings(deadline=None)
    @given(SEEDS, st.lists(FEW, max_size=40))
    def test_a_sample_has_the_same_numbers_in_whatever_company_and_order(self, seed, indices) -> None:
        stream, chosen = Stream(seed, "x"), torch.tensor(indices, dtype=torch.int64)
        whole = draws(stream, torch.arange(100))
        assert equal(draws(stream, chosen), [numbers[chosen] for numbers in whole])

    @settings(deadline=None, max_examples=25)
    @given(SEEDS, st.integers(1, 64), st.integers(0, 10**9), st.integers(1, 70))
    def test_all_world_sizes_draw_the_same_bits(self, seed: int, world: int, step: int, batch: int) -> None:
        stream = Stream(seed, "x")
        shares = [draws(stream, Shard(rank, world).batch(step, batch)) for rank in range(world)]
        together = [torch.cat(parts) for parts in zip(*shares, strict=True)]
        assert equal(together, draws(stream, Shard().batch(step, batch)))

    def test_a_sample_asked_for_directly_is_the_sample_reached(self) -> None:
        stream, step, batch = Stream(0, "x"), 123_456, 64
        reached = draws(stream, torch.arange((step - 1) * batch, (step + 1) * batch))
        assert equal(draws(stream, Shard().batch(step, batch)), [numbers[batch:] for numbers in reached])

    @given(st.integers(1, 99), st.integers(1, 99))
    @settings(deadline=None, max_examples=25)
    def test_more_components_leave_the_first_ones_alone(self, few: int, more: int) -> None:
        stream, indices = Stream(0, "x"), torch.arange(5)
        assert torch.equal(stream.normals(indices, few), stream.normals(indices, few + more)[:, :few])
        assert torch.equal(stream.signs(indices, few), stream.signs(indices, few + more)[:, :few])

    def test_another_seed_or_name_is_another_stream(self) -> None:
        streams = [Stream(seed, name) for seed in (0, 1, 10) for name in ("", "0", "0/", "a", "b")]
        first = torch.tensor([0])
        for drawn in (
            [stream.normals(first, 2) for stream in streams],
            [stream.integers(first, 20, below=10) for stream in streams],
            [stream.signs(first, 64) for stream in streams],
        ):
            assert len({tuple(numbers[0].tolist()) for numbers in drawn}) == len(streams)

    def test_numbers_come_in_the_precision_asked_for(self) -> None:
        stream, indices = Stream(0, "x"), torch.arange(10)
        exact = stream.normals(indices, 3, torch.float64)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert torch.equal(stream.normals(indices, 3, dtype), exact.to(dtype))
            assert stream.signs(indices, 3, dtype).dtype == dtype


def one_by_one(shuffle: ShuffledEpochs, index: int) -> int:
    """The item at a sample index: the epoch's items sorted by random signed integers."""
    epoch, position = divmod(index, shuffle.size)
    random = [word(shuffle.seed, shuffle.name, epoch, item) for item in range(shuffle.size)]
    signed = [bits - (bits >> 63 << 64) for bits in random]
    return sorted(range(shuffle.size), key=signed.__getitem__)[position]


class TestShuffledEpochs:
    @settings(deadline=None)
    @given(SEEDS, st.integers(1, 500), st.integers(0, 10**6))
    def test_every_epoch_is_a_permutation(self, seed: int, size: int, epoch: int) -> None:
        items = ShuffledEpochs(seed, "x", size).items(torch.arange(epoch * size, (epoch + 1) * size))
        assert sorted(items.tolist()) == list(range(size))

    @settings(deadline=None)
    @given(SEEDS, st.integers(1, 12), st.integers(0, 1000), st.integers(0, 50))
    @example(0, 10, 25, 0)
    @example(0, 10, 5, 37)
    def test_a_batch_may_cross_the_borders_of_any_number_of_epochs(self, seed, size, start, count) -> None:
        shuffle = ShuffledEpochs(seed, "x", size)
        items = shuffle.items(torch.arange(start, start + count))
        assert items.tolist() == [one_by_one(shuffle, index) for index in range(start, start + count)]

    @settings(deadline=None)
    @given(st.integers(1, 64), st.integers(1, 50), st.integers(0, 100), st.integers(1, 100))
    def test_all_world_sizes_see_the_same_items(self, world: int, size: int, step: int, batch: int) -> None:
        shuffle = ShuffledEpochs(0, "x", size)
        shares = [shuffle.batch(Shard(rank, world), step, batch) for rank in range(world)]
        assert torch.equal(torch.cat(shares), shuffle.items(Shard().batch(step, batch)))

    def test_an_item_asked_for_directly_is_the_item_reached(self) -> None:
        shuffle = ShuffledEpochs(0, "x", 50)
        reached = shuffle.items(torch.arange(1001))
        assert shuffle.items(torch.tensor([1000])).item() == reached[1000]

    def test_epochs_seeds_and_names_differ(self) -> None:
        orders = [
            ShuffledEpochs(seed, name, 20).items(torch.arange(epoch * 20, (epoch + 1) * 20))
            for seed in (0, 1)
            for name in ("a", "b")
            for epoch in (0, 1, 2)
        ]
        assert len({tuple(order.tolist()) for order in orders}) == len(orders)

    def test_all_24_orders_of_four_items_are_equally_frequent(self) -> None:
        epochs = ShuffledEpochs(0, "x", 4).items(torch.arange(4 * 2400)).view(-1, 4)
        _, counts = (epochs * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)
        assert len(counts) == 24
        assert stats.chisquare(counts.numpy()).pvalue > 0.001

    def test_what_a_caller_does_to_its_items_does_not_reach_the_next_caller(self) -> None:
        shuffle, indices = ShuffledEpochs(0, "x", 10), torch.arange(10)
        kept = shuffle.items(indices)
        shuffle.items(indices).zero_()
        assert torch.equal(shuffle.items(indices), kept)
