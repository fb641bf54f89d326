"""With --micro-batches, only the speed depends on processes; each mechanism is needed for it."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import exact_steps
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from ranks import Rank, as_ranks
from torch import Tensor

from cs324dist import trainer as trainer_module
from cs324dist.distributed import belongings, gradients, parts
from cs324dist.distributed.belongings import PartBelongings, Unchanged
from cs324dist.distributed.ordered_sum import OrderedSum, _SumOfOneDtype
from cs324dist.distributed.sum_over import SumOver
from cs324dist.errors import UserError
from cs324dist.tasks.gan.task import GANTask
from cs324dist.trainer import Trainer


@pytest.fixture(scope="module")
def found(launch, tmp_path_factory):
    """Digests of all tasks by processes, threads asked for, and precision; each is computed once."""
    folder, known = tmp_path_factory.mktemp("digests"), {}

    def take(processes: int, threads: int = 1, precision: str = "no") -> dict[str, Any]:
        key = f"{processes}-{threads}-{precision}"
        if key not in known:
            environment = {"CS324DIST_THREADS": str(threads), "ACCELERATE_MIXED_PRECISION": precision}
            several = {"processes": processes} if processes > 1 else {}
            launch(exact_steps.__file__, folder / key, environment=environment, **several)
            known[key] = json.loads((folder / key).read_text())
        return known[key]

    return take


class TestSameBits:
    def test_on_one_process_that_is_given_two_threads_and_on_three(self, found):
        assert found(1, threads=2) == found(3)

    @pytest.mark.slow
    @pytest.mark.parametrize(("processes", "threads"), [(1, 1), (2, 1), (4, 2)])
    def test_on_other_numbers(self, found, processes, threads):
        assert found(processes, threads) == found(3)

    @pytest.mark.slow
    def test_in_bf16(self, found):
        assert found(1, 2, precision="bf16") == found(3, precision="bf16")
        assert found(3, precision="bf16") != found(3)


Patch = pytest.MonkeyPatch


def gradients_added_by_process(patch: Patch) -> None:
    """Each process adds up those of its own parts, and then all processes theirs."""

    def add(self: OrderedSum, first: int, gradients: Any) -> None:
        for total, gradient in zip(self.own, gradients, strict=bool(gradients)):
            total += 0 if gradient is None else gradient

    def means(self: OrderedSum) -> list[Tensor]:
        for total in self.own if dist.is_initialized() else ():
            dist.all_reduce(total)
        return [total / exact_steps.MICRO_BATCHES for total in self.own]

    def start(self: OrderedSum) -> None:
        self.own = [torch.zeros_like(p) for p in self.parameters]

    def init(self: OrderedSum, parameters: Any, count: int) -> None:
        self.parameters = parameters

    for name, of_fault in {"__init__": init, "start": start, "add": add, "means": means}.items():
        patch.setattr(OrderedSum, name, of_fault)


def last_round_not_cut(patch: Patch) -> None:
    """What processes without a part sent in the round before is added again."""
    honest = _SumOfOneDtype.add

    def add(self: _SumOfOneDtype, first: int, gradients: Any) -> None:
        count, self._count = self._count, first + self._processes
        honest(self, first, gradients)
        self._count = count

    patch.setattr(_SumOfOneDtype, "add", add)


def batch_norm_per_process(patch: Patch) -> None:
    def gather(rows: dict[int, Tensor], count: int, shift: int = 0) -> Tensor:
        return torch.stack(list(rows.values()))[torch.arange(count) % len(rows)]

    patch.setattr(parts, "gather_rows", gather)


def generators_stay_at_a_switch(patch: Patch) -> None:
    patch.setattr(belongings, "set_generators", lambda device, states: None)


def attributes_stay_at_a_switch(patch: Patch) -> None:
    def take_out(self: PartBelongings, kept: belongings.Kept, **_: bool) -> None:
        belongings.set_generators(self._device, kept.generators)

    patch.setattr(PartBelongings, "take_out", take_out)
    patch.setattr(Unchanged, "check", lambda self: None)  # which would say so


def metrics_by_process(patch: Patch) -> None:
    """Averaged within a process first, and then over processes."""

    def gather(rows: dict[int, Tensor], count: int) -> Tensor:
        own = torch.stack(list(rows.values())).float().mean(0)
        if dist.is_initialized():
            dist.all_reduce(own)
            own /= dist.get_world_size()
        return own.double().expand(count, -1)

    patch.setattr(trainer_module, "gather_rows", gather)


def evaluation_by_process(patch: Patch) -> None:
    """Cut by process in place of fixed pieces."""
    honest = SumOver.__call__

    def by_process(self: SumOver, measure: Any, count: int, piece: int = 500) -> Any:
        return honest(self, measure, count, -(-count // self._processes))

    patch.setattr(SumOver, "__call__", by_process)


def nothing(patch: Patch) -> None: ...


def one_and_three(fault: Callable[[Patch], None], case: str) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        one = exact_steps.digests(case, Rank(0, 1), check_every=0)
        three = as_ranks(3, lambda rank: exact_steps.digests(case, rank, check_every=0))
    assert three[0] == three[1] == three[2] or fault is not nothing
    return [one, three[0]]


class TestEachMechanismIsNeeded:
    @pytest.mark.parametrize("case", ["lstm", "mixed"])
    def test_with_all_of_them_nothing_differs(self, case):
        one, three = one_and_three(nothing, case)
        assert one == three

    @pytest.mark.parametrize(
        ("fault", "case", "what", "not_what"),
        [
            (gradients_added_by_process, "lstm", "tensors", ""),
            (last_round_not_cut, "lstm", "tensors", ""),
            (batch_norm_per_process, "mixed", "tensors", ""),
            (generators_stay_at_a_switch, "mixed", "tensors", ""),
            (attributes_stay_at_a_switch, "mixed", "tensors", ""),
            (metrics_by_process, "mixed", "metrics", "tensors"),
            (evaluation_by_process, "mixed", "evaluation", "tensors"),
        ],
    )
    def test_without_it_bits_differ(self, fault, case, what, not_what):
        one, three = one_and_three(fault, case)
        assert one[what] != three[what]
        assert not not_what or one[not_what] == three[not_what]

    def test_with_two_threads_bits_differ(self, monkeypatch):
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with monkeypatch.context() as patch:
                patch.setattr(torch, "set_num_threads", lambda threads: None)
                patch.setattr(torch, "get_num_threads", lambda: 1)
                found.append(exact_steps.digests("mixed", Rank(0, 1)))
        assert found[0]["tensors"] != found[1]["tensors"]

    def test_so_they_are_refused(self, monkeypatch):
        monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        with pytest.raises(UserError, match="torch has 2 threads, on which sums depend"):
            exact_steps.digests("mixed", Rank(0, 1))


def test_what_is_only_measured_spans_the_batch_too():
    """BatchNorm in a loss that trains nothing spans all micro-batches, as in one that trains."""
    config = replace(GANTask.presets["smoke"], dataset="fake", batch_size=16, micro_batches=4)
    trainer = Trainer(task := GANTask(config, torch.device("cpu")), Accelerator(cpu=True))
    found = []
    loss = task.generator_loss
    for step in (lambda: trainer.measure(loss), lambda: trainer.update("generator", loss)):
        task.step = lambda *_, step=step: step()
        trainer.step(0, is_logged=True)
        found.append(trainer.read_metrics())
    assert found[0] == found[1]


def test_networks_of_two_updates_are_wrapped_for_ddp_once(monkeypatch):
    wrapped = []
    monkeypatch.setattr(gradients, "_wrapped", lambda losses, place: wrapped.append(losses) or losses)
    monkeypatch.setattr(parts, "rank_and_processes", lambda: (0, 2))
    two = Mock(spec=Accelerator, scaler=None, device=torch.device("cpu"), num_processes=2)
    networks = (torch.nn.Linear(1, 1),)
    gradients.DDPGradients(0, two).wrap([networks, networks])
    assert len(wrapped) == 1
