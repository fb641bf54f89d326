"""Exact gradients: parts of the global batch, computed anywhere, and added in their order."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from jaxtyping import Float
from torch import Tensor, nn

from cs324dist.data.streams import MicroBatch, drawn_so_far, seed_everything
from cs324dist.distributed.belongings import (
    PartBelongings,
    Unchanged,
    buffers_kept,
    changed_in_the_loss,
    owners_in,
)
from cs324dist.distributed.checks import Sums, checksums, compare_sums, differences, gather_objects, sample
from cs324dist.distributed.gradients import Gradients, LossOf, Networks, pair, scale
from cs324dist.distributed.ordered_sum import OrderedSum
from cs324dist.distributed.parts import add_in_order, gather_rows
from cs324dist.distributed.process import accelerator_of_script, check_batch, make_deterministic
from cs324dist.distributed.refusals import (
    STEPS,
    known_errors_explained,
    refuse_gradients_of_others,
    refuse_gradients_of_the_loss,
    refuse_incomplete_graphs,
    refuse_other_draws,
    refuse_what_is_prepared,
)
from cs324dist.distributed.sum_over import SumOver
from cs324dist.errors import UserError, warn

unwrapped = partial(extract_model_from_parallel, keep_torch_compile=False)
_exact: "weakref.WeakKeyDictionary[nn.Module, ExactGradients]" = weakref.WeakKeyDictionary()


def exact_of(networks: Iterable[nn.Module]) -> "ExactGradients | None":
    """Which `ExactGradients` has prepared any of these."""
    return next((_exact[network] for network in networks if network in _exact), None)


class ExactGradients(Gradients):
    """Gradients of any number of parts, whose bits do not depend on which process computes which part.

    A process computes its parts one after another, with one core or its GPU. Several processes use several
    cores.
    """

    is_exact = True

    def __init__(
        self,
        micro_batches: int,
        seed: int = 0,
        accelerator: Accelerator | None = None,
        *,
        check_every: int = 100,
        peer_timeout: int = 600,
        anywhere: bool = True,
    ) -> None:
        """Use one core, and seed everything: make it before networks and data.

        Args:
            micro_batches: the equal parts of the global batch.
            seed: of all that is drawn: initial weights, and in a loss.
            accelerator: says which device, and how many processes; by default one is made.
            check_every: steps between two in which gradients are computed a second time, and compared to the
                last bit; the first step is one of them. 0: never.
            peer_timeout: seconds for which a part may keep the others waiting.
            anywhere: whether any process can compute any part. The second time, another process does, which
                finds other data on one of them; otherwise the same process does, in the reverse order.

        Raises:
            UserError: there are fewer parts than processes.
        """
        accelerator = accelerator_of_script(accelerator, micro_batches, peer_timeout)
        check_batch(None, micro_batches, accelerator.num_processes)
        super().__init__(micro_batches, seed, accelerator, peer_timeout)
        if self.device.type == "cuda":
            make_deterministic()
        torch.set_num_threads(1)  # sums depend on the number of threads
        torch.set_flush_denormal(True)
        # Which uses of a weight share a cast, and add their gradients in bf16, would depend on the threads.
        torch.set_autocast_cache_enabled(False)
        seed_everything(seed, "start", self.device)
        self._check_every, self._anywhere = check_every, anywhere
        self._checked: set[str] = set()
        self._sum_of = lru_cache(8)(OrderedSum)  # for as many sets of parameters that are trained in turn
        self._given: dict[Tensor, tuple[Tensor, int, int]] = {}  # see `Given`
        self._said: set[str] = set()
        self.belongings = PartBelongings({}, self.device, micro_batches)

    def prepare(self, network: nn.Module, name: str = "") -> nn.Module:
        """Place a network, and let its BatchNorm layers span the batch: in place of `accelerator.prepare`.

        Raises:
            UserError: it is prepared already, differs between processes, or its parameters have no shapes.
        """
        refuse_what_is_prepared(self._accelerator, network, is_known=network in _exact)
        prepared = super().prepare(network, name)
        _exact[prepared] = _exact[unwrapped(prepared)] = self
        if self.parts.processes == 1:
            return prepared
        held = checksums({name: t for name, t in prepared.state_dict().items() if isinstance(t, Tensor)})
        if lines := differences(gather_objects(held, "where a network is prepared"), with_values=False):
            raise UserError(
                f"{name or type(network).__name__}: {lines[0]}: make ExactGradients, which seeds initial "
                f"weights, before the network"
            )
        return prepared

    def sum_over(self, measure: Callable[[Tensor], Tensor], count: int, piece: int = 500) -> Tensor:
        """The sum of what `measure` says of pieces of the indices [0, count); see `SumOver`."""
        sums = SumOver(self._accelerator, seed=self._seed)(lambda some: {"": measure(some)}, count, piece)
        return sums[""]

    def watch(self, networks: Mapping[str, nn.Module], task: object = None) -> None:
        """Watch what the loss sets on these networks, and on a task."""
        self.belongings.owners = owners_in(networks, task)

    def __str__(self) -> str:
        return f"{self.parts.count} parts, seed {self._seed}"

    def explanation(self, attribute: str | None) -> str:
        """See `Gradients`."""
        return self.belongings.said.get(attribute or "", "")

    def map(self, work: Callable[[MicroBatch], object], step: int, batch_size: int) -> None:
        """Do something with each part of this process; its BatchNorm layers span the batch."""

        def seeded(index: int) -> None:
            self.seed(step, "map", index)
            work(self.batch(index, step, batch_size))

        list(self.parts.each(seeded, self.parts.of(), self.belongings))

    def backward(
        self,
        loss_of: LossOf,
        step: int,
        batch_size: int,
        networks: Iterable[nn.Module] | None = None,
        name: str = "loss",
    ) -> Float[Tensor, ""]:
        """Leave the mean gradient over all parts in `grad` of the parameters; returns the mean loss.

        Args:
            loss_of: computes the loss of a part; see `Mean`.
            step: counted from 0.
            batch_size: samples in the global batch, a multiple of the number of parts.
            networks: those that are trained; by default all that were prepared.
            name: of the update, where a step has several.

        Raises:
            UserError: something that cannot be exact; the line names it.
            RunFailed: the second time, a gradient is not the same.
        """
        networks = tuple(self.networks.values()) if networks is None else tuple(networks)
        refuse_what_is_prepared(self._accelerator)
        if not self.belongings.owners:
            self.watch(self.networks)
        of_networks = dict.fromkeys(p for network in networks for p in network.parameters())
        parameters = [parameter for parameter in of_networks if parameter.requires_grad]
        names = self.names(parameters)
        if self.device.type == "cpu" and (threads := torch.get_num_threads()) != 1:
            raise UserError(
                f"torch has {threads} threads, on which sums depend: leave out set_num_threads, and make "
                f"ExactGradients after the Accelerator"
            )
        refuse_gradients_of_others(names, parameters, self._given)
        rows: dict[int, Tensor] = {}
        drawn = drawn_so_far() if self.parts.processes > 1 else 0.0  # nobody else's to compare with

        def gradients_of(index: int, is_check: bool = False) -> Sequence[Tensor | None]:
            self.seed(step, name, index)
            # Backward passes stay in the thread of their part, where they wait at barriers.
            with torch.autograd.set_multithreading_enabled(not self.parts.layers), known_errors_explained():
                value, weight = pair(loss_of(self.batch(index, step, batch_size, is_check=is_check)))
                unused: Sequence[Tensor | None] = [None] * len(parameters)
                refuse_gradients_of_the_loss(names, parameters, unused)
                if is_check:
                    refuse_incomplete_graphs(value)
                found = (
                    torch.autograd.grad(value, parameters, allow_unused=True)
                    if value.requires_grad
                    else unused
                )
            refuse_gradients_of_the_loss(names, parameters, found)
            rows[index] = self._row(value, weight, drawn, found)
            return found

        if not parameters:
            why = "freeze none in a loss" if of_networks else "give each to ExactGradients.prepare first"
            raise UserError(f"there is nothing to train: no parameter in {name} requires a gradient: {why}")
        if batch_size % self.parts.count:
            raise UserError(f"batch_size={batch_size} is not divisible by micro_batches={self.parts.count}")
        is_checked = self._check_every and (name not in self._checked or step % self._check_every == 0)
        if is_checked:
            refuse_other_draws(gather_objects(drawn, f"in {name} of step {step + 1}"))
        again = self._again(partial(gradients_of, is_check=True), rows, names) if is_checked else {}
        first = self._in_order(gradients_of, rows, names, parameters, {} if is_checked else None)
        if is_checked:
            compare_sums(first, again, step)
            self._checked.add(name)
        return self._finish(rows, parameters, names, networks)

    def _row(
        self, value: Tensor, weight: Tensor | float | None, drawn: float, found: Sequence[Tensor | None]
    ) -> Tensor:
        """What every process has to know of a part: see `numbers`; and which parameters it used."""
        is_pair = weight is not None
        numbers: tuple[Any, ...] = (value, weight if is_pair else 1.0, float(is_pair), drawn)
        row = torch.ones(len(numbers) + len(found), dtype=torch.float64, device=self.device)
        for place, number in enumerate(numbers):  # filled in place: a copy to the device would wait for it
            row[place].fill_(number.detach() if isinstance(number, Tensor) else number)
        for place, gradient in enumerate(found, len(numbers)):
            if gradient is None:
                row[place].fill_(0.0)
        return row

    def _in_order(
        self,
        gradients_of: Callable[[int], Sequence[Tensor | None]],
        rows: Mapping[int, Tensor],
        names: Sequence[str],
        parameters: Sequence[Tensor],
        found: Sums | None,
    ) -> Sums:
        """Add up the gradients of all parts; returns the checksums of this process's, if `found` is given."""
        total = self._sum_of(tuple(parameters), self.parts.count)
        total.start()
        own = self.parts.of()
        answers = iter(self.parts.each(gradients_of, own, self.belongings))
        for first in range(0, self.parts.count, self.parts.processes):
            index = first + self.parts.rank
            gradients = next(answers) if index in own else ()
            if found is not None and index in own:
                found[index] = self._sums_of(names, gradients, index, rows[index])
            total.add(first, gradients)
        for parameter, mean in zip(parameters, total.means(), strict=True):
            parameter.grad = mean
        return found or {}

    def _again(
        self,
        gradients_of: Callable[[int], Sequence[Tensor | None]],
        rows: dict[int, Tensor],
        names: Sequence[str],
    ) -> Sums:
        """Compute parts once more, before the others, on another process if any can; see `__init__`."""
        shift = 1 if self._anywhere else 0
        indices = list(reversed(self.parts.of(shift)))
        if self._anywhere and not self.parts.layers:
            indices = indices[:1]
        tensors = {name: sample(tensor) for name, tensor in Unchanged(self.belongings.owners).tensors.items()}
        found = {}
        before = checksums(tensors)
        with buffers_kept(self.networks.values()):
            answers = self.parts.each(gradients_of, indices, self.belongings, shift=shift)
            for index, gradients in zip(indices, answers, strict=True):
                found[index] = self._sums_of(names, gradients, index, rows.pop(index))
        for name, now in checksums(tensors).items():
            if now != before[name]:
                raise UserError(changed_in_the_loss(name))
        return found

    def _sums_of(
        self, names: Sequence[str], gradients: Sequence[Tensor | None], index: int, row: Tensor
    ) -> dict[str, int]:
        pairs = zip(names, gradients, strict=True)
        of_gradients = {f"the gradient of {name}": grad for name, grad in pairs if grad is not None}
        return checksums({"the loss": row, **of_gradients, **self.belongings.noted(index)})

    def _finish(
        self,
        rows: Mapping[int, Tensor],
        parameters: Sequence[Tensor],
        names: Sequence[str],
        networks: Networks,
    ) -> Tensor:
        """Take away the gradients that no part has; returns the mean loss."""
        own = {index: rows[index] for index in self.parts.of()}
        of_all = gather_rows(own, self.parts.count)
        # Read together: to read waits for a GPU.
        numbers, count = torch.cat([*of_all[:, 1:4].T, of_all[:, 4:].amax(0)]).tolist(), len(of_all)
        weights, kinds, drawn = (numbers[start : start + count] for start in range(0, 3 * count, count))
        used = numbers[3 * count :]
        refuse_other_draws(drawn)
        if len(set(kinds)) > 1:
            raise UserError(
                "the losses of some parts are pairs (sum, weight), those of others are not: give one kind"
            )
        for parameter, is_used in zip(parameters, used, strict=True):
            if not is_used:
                parameter.grad = None
        self._given |= {p: (p.grad, p._version, STEPS["taken"]) for p in parameters if p.grad is not None}
        if not any(used):
            self._warn("the loss of no part depends on a parameter, and nothing is trained: is it detached?")
        if any(0 < weight < 1 for weight in weights):
            self._warn(
                "the second value that a loss returns is taken as the weight of a sum, and is between 0 and "
                "1: if it is a metric, return the loss alone"
            )
        value, weight = add_in_order(of_all[:, :2])
        if kinds[0]:
            scale(networks, self.parts.count / weight)
        return value / weight

    def _warn(self, text: str) -> None:
        if text not in self._said and self.parts.rank == 0:
            warn(text)
        self._said.add(text)
