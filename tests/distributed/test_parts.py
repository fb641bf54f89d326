"""The parts of a process take turns: one at a time, in order, each with what belongs to it."""

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from ranks import Rank, as_ranks

from cs324dist.data.streams import CPU
from cs324dist.distributed.belongings import PartBelongings
from cs324dist.distributed.parts import FORWARD, Parts, _thread_state, current_place
from cs324dist.errors import RunFailed, UserError

COUNT = 5


def spanned(count: int = COUNT, patience: float = 60) -> Parts:
    parts = Parts(count, CPU, patience)
    parts.layers, parts.widest = ["first", "second"], 2
    return parts


def meet(layer: int, *numbers: float) -> list[list[float]]:
    return current_place().gather(layer, FORWARD, torch.tensor(numbers)).tolist()


def all_of(parts: Parts, work: Callable[[int], Any], belongings: Any = None, **options: Any) -> list[Any]:
    belongings = belongings or PartBelongings({}, CPU, parts.count)
    return list(parts.each(work, parts.of(options.get("shift", 0)), belongings, **options))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    until = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before


class TestTurns:
    def test_a_part_runs_to_its_next_barrier_and_hands_on(self):
        events, running = [], threading.Lock()

        def work(index: int) -> int:
            for layer in (0, 1):
                assert running.acquire(blocking=False)
                events.append((layer, index))
                time.sleep(0.002)  # time in which another could run
                running.release()
                meet(layer)
            assert running.acquire(blocking=False)
            running.release()
            return 10 * index

        assert all_of(spanned(), work) == [0, 10, 20, 30, 40]
        assert events == [(layer, index) for layer in (0, 1) for index in range(COUNT)]

    def test_without_a_spanning_layer_a_part_begins_when_the_one_before_has_been_used(self):
        begun = []
        answers = Parts(COUNT, CPU).each(lambda index: begun.append(index) or index, range(COUNT))
        for index, answer in enumerate(answers):
            assert (answer, begun) == (index, list(range(index + 1)))

    def test_a_thread_has_the_state_of_its_caller(self):
        variable = contextvars.ContextVar("variable", default=0)

        def state(index: int = 0) -> list[Any]:
            product = torch.ones(2, 2) @ torch.ones(2, 2)
            of_torch = torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_cache_enabled()
            return [variable.get(), product.dtype, *of_torch]

        torch.set_num_threads(1)
        assert all_of(spanned(), state) == [state()] * COUNT
        variable.set(1)
        torch.set_autocast_cache_enabled(False)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert state() == [1, torch.bfloat16, 1, False, False]
            assert all_of(spanned(), state) == [state()] * COUNT

    def test_a_thread_has_the_default_device_of_its_caller(self):
        def device() -> str:
            with enter():
                return torch.empty(0).device.type

        with torch.device("meta"):
            enter = _thread_state(CPU)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(device).result() == "meta"


class TestErrors:
    @pytest.mark.parametrize("failing", [0, 2, 4])
    @pytest.mark.parametrize("barriers", [0, 1])
    def test_an_error_in_one_part_ends_all(self, failing, barriers):
        parts, ended = spanned(), []

        def work(index: int) -> None:
            meet(0) if barriers else None
            if index == failing:
                raise ZeroDivisionError("of this part")
            meet(1)
            ended.append(index)

        with pytest.raises(ZeroDivisionError, match="of this part"):
            all_of(parts, work)
        assert not ended
        assert current_place() is None
        assert all_of(parts, lambda index: index) == list(range(COUNT))

    def test_what_a_part_has_changed_before_an_error_is_as_before(self):
        owner = type("Owner", (), {})()
        torch.manual_seed(99)
        before = torch.get_rng_state()

        def work(index: int) -> None:
            owner.value = torch.rand(())
            raise ZeroDivisionError

        for parts in (spanned(), Parts(COUNT, CPU)):
            with pytest.raises(ZeroDivisionError):
                all_of(parts, work, PartBelongings({"owner": owner}, CPU, COUNT))
            assert not vars(owner)
            assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("hanging", [0, 2])
    def test_a_part_that_hangs_is_waited_for_no_longer_than_patience_allows(self, hanging):
        wake, began = threading.Event(), time.monotonic()

        def work(index: int) -> None:
            if index == hanging:
                wake.wait(30)
            meet(0)

        with pytest.raises(RunFailed, match=r"within 0.1 s \(--peer-timeout\)"):
            all_of(spanned(patience=0.1), work)
        assert time.monotonic() - began < 10
        wake.set()

    def test_on_a_gpu_the_end_tells_what_was_different_before(self, monkeypatch):
        """There, headers are looked at when all have ended."""
        seen = []

        def work(index: int) -> None:
            for layer in [1, 0, 0] if index == 3 else [0, 1, 0]:
                meet(layer)
            seen.append(index)

        def refused(rank: Rank) -> None:
            parts = spanned()
            parts.device = torch.device("meta")  # no CPU, as far as it is asked
            with pytest.raises(UserError, match="every part has to pass the same BatchNorm layers"):
                all_of(parts, work)

        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, **how: zeros(*size, **how | {"device": CPU}))
        as_ranks(COUNT, refused)
        assert sorted(seen) == list(range(COUNT))
