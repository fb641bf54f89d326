"""Samples of a torch data set, loaded by worker processes, and yet a pure function of (seed, sample)."""

import atexit
import ctypes
import os
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.utils import send_to_device
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate

from cs324dist.data.streams import (
    CPU,
    MicroBatch,
    ShuffledEpochs,
    drawn_so_far,
    generators_kept,
    seed_everything,
)
from cs324dist.errors import ReportedError, UserError

Collate = Callable[[list[Any]], Any]
TO_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
Address = tuple[str, int]  # what its random numbers are named by, and the item


def loader(
    dataset: Any, seed: int, name: str, *, workers: int = 0, collate: Collate = default_collate
) -> "Loader":
    """Loads the samples of parts of the batch: `self.data.batch(batch)`.

    The order is that of `ShuffledEpochs(seed, name, len(dataset))`. While `dataset[item]` runs, the
    generators of torch, numpy and random are seeded from (seed, name, sample): augmentation does not depend
    on who loads what.

    Args:
        dataset: with `len(dataset)` and `dataset[item]`, such as torch's; it computes on the CPU. Or a
            `DataLoader` of one, which shuffles: its workers and `collate_fn` are taken over.
        seed: of the run.
        name: of the stream; give each purpose a name of its own.
        workers: processes that load ahead, for each process that trains; 0: it loads by itself.
        collate: makes a batch of a list of samples.

    Raises:
        UserError: the data set is empty, or can only be iterated over, or its samples come in another order.
    """
    if isinstance(dataset, DataLoader):
        if isinstance(dataset, DataLoaderStateMixin):
            raise UserError(
                f"the DataLoader of {name!r} went through accelerator.prepare, which gives each process a "
                f"share of it: give it as it was before"
            )
        if not isinstance(dataset.sampler, RandomSampler) or dataset.sampler.replacement:
            raise UserError(
                f"the DataLoader of {name!r} has the order of a {type(dataset.sampler).__name__}, and would "
                f"be shuffled: give it shuffle=True, or the data set itself to evaluate by loader.items"
            )
        if dataset.worker_init_fn:
            raise UserError(
                f"the DataLoader of {name!r} has a worker_init_fn, which would not be called: leave it "
                f"out if it seeds, as samples are seeded here; open files in the data set, when first needed"
            )
        workers, collate, dataset = dataset.num_workers, dataset.collate_fn, dataset.dataset
    has_both = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not has_both or isinstance(dataset, torch.utils.data.IterableDataset):
        raise UserError(f"the data set of {name!r} needs len(dataset) and dataset[item]; it has not both")
    if not len(dataset):
        raise UserError(f"the data set of {name!r} is empty")
    return Loader(_Samples(dataset, seed, name, collate), ShuffledEpochs(seed, name, len(dataset)), workers)


class Loader:
    """See `loader`."""

    seconds_waited: ClassVar[float] = 0.0
    """Seconds in which steps of this process waited for samples, of whatever loader."""

    def __init__(self, samples: "_Samples", order: ShuffledEpochs, workers: int) -> None:
        self._samples, self._plan = samples, _Plan(order)
        self._parts: dict[int, Any] = {}  # of a step
        self._loader = DataLoader(
            samples,
            batch_sampler=self._plan,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_initialized(),  # by the Accelerator, unless it is to use the CPU
            persistent_workers=workers > 0,
            worker_init_fn=_prepare_worker,
            generator=torch.Generator(),  # in place of torch's own, which a step may draw from
        )
        # Workers start here, in the main thread, and not in that of some micro-batch.
        self._iterator: Iterator[Any] = iter(self._loader)
        self._step: MicroBatch | None = None
        atexit.register(_end_workers, weakref.ref(self))

    def batch(self, batch: MicroBatch) -> Any:
        """The samples of a micro-batch, collated, on its device.

        Raises:
            ReportedError: one that the data set raised.
        """
        if batch.is_check:
            addresses = self._plan.of(replace(batch, device=CPU))
            self._samples.refuse_kept_draws(addresses[0])
            return _on(batch.device, self._samples.__getitems__(addresses))
        step = replace(batch, index=0, device=CPU)
        began = time.perf_counter()
        if step != self._step:
            if self._step is None or step != replace(self._step, step=self._step.step + 1):
                self._plan.first = step
                self._iterator = iter(self._loader)
            self._step, self._parts = step, {index: next(self._iterator) for index in _own(batch)}
        Loader.seconds_waited += time.perf_counter() - began
        return _on(batch.device, self._parts[batch.index])

    def items(self, items: Int64[Tensor, " items"]) -> Any:
        """These items of the data set, collated, on the device of `items`, as for an evaluation.

        This process loads them itself. Augmentation depends on (seed, name, item).
        """
        return _on(items.device, self._samples.__getitems__([(f"item {i}", i) for i in items.tolist()]))


def _end_workers(ended: "weakref.ref[Loader]") -> None:
    """Before torch waits five seconds for each that is still there when Python ends."""
    if (loader := ended()) is not None:
        vars(loader).clear()


class _Plan:
    """What to load for one micro-batch of this process after the other."""

    def __init__(self, order: ShuffledEpochs) -> None:
        self._order = order
        self.first: MicroBatch | None = None

    def __iter__(self) -> Iterator[list[Address]]:
        step = self.first
        while step is not None:
            for index in _own(step):
                yield self.of(replace(step, index=index))
            step = replace(step, step=step.step + 1)

    def of(self, part: MicroBatch) -> list[Address]:
        """What to load for a part of the batch."""
        items = self._order.items(part).tolist()
        return [(str(sample), item) for sample, item in zip(part.samples.tolist(), items, strict=True)]


def _own(batch: MicroBatch) -> range:
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return range(rank, batch.count, processes)


def _on(device: torch.device, collated: Any) -> Any:
    if isinstance(collated, ReportedError):
        raise collated
    return send_to_device(collated, device, non_blocking=True)


class _Samples(Dataset[Any]):
    """Collated samples by address; an error for the user is returned: torch would make a traceback of it."""

    def __init__(self, dataset: Any, seed: int, name: str, collate: Collate) -> None:
        self._dataset, self._seed, self._name, self._collate = dataset, seed, name, collate

    def __getitems__(self, addresses: list[Address]) -> Any:
        """What torch's loader asks for: here a whole part."""
        try:
            samples = [self._sample(random_name, item) for random_name, item in addresses]
            with _everything_seeded(self._seed, f"{self._name}/collate/{addresses[0][0]}"):
                return self._collate(samples)
        except ReportedError as error:
            return error

    def refuse_kept_draws(self, address: Address) -> None:
        """Refuse a data set that keeps a sample with what it drew, and draws no second time.

        Raises:
            UserError: it does.
        """
        drawn: list[Any] = []
        for _ in range(2):
            self._sample(*address, drawn)
        if drawn[0] != drawn[1]:
            raise UserError(
                f"the data set of {self._name!r} draws random numbers for item {address[1]} once, and others "
                f"or none the second time: if it keeps what it drew, each process has another, and a kill "
                f"loses it; keep the item as it was before"
            )

    def _sample(self, random_name: str, item: int, drawn: list[Any] | None = None) -> Any:
        try:
            with _everything_seeded(self._seed, f"{self._name}/{random_name}"):
                sample = self._dataset[item]
                if drawn is not None:
                    drawn.append((drawn_so_far(), random.getstate()))
                return sample
        except Exception as error:
            error.add_note(f"at item {item} of the data set of {self._name!r}")
            raise


def _as_it_is(part: Any) -> Any:
    return part


@contextmanager
def _everything_seeded(seed: int, name: str) -> Iterator[None]:
    """Inside, torch, numpy and random are seeded; torch uses one core, as it does in a worker."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with generators_kept(CPU):
            seed_everything(seed, name, CPU)
            yield
    finally:
        torch.set_num_threads(cores)


def _prepare_worker(_: int) -> None:
    if sys.platform != "linux":
        return
    # A worker that outlived its process would hold the lock of the run.
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    # Slurm signals every process, and the one that trains decides when to stop.
    signal.pthread_sigmask(signal.SIG_BLOCK, TO_STOP)

    def end_when_the_parent_asks() -> None:
        while signal.sigwaitinfo(TO_STOP).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=end_when_the_parent_asks, daemon=True).start()
