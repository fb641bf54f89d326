"""How the gradient of a loss over the global batch is made: by DDP, or exactly by parts added in order."""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cs324dist.data.streams import MicroBatch, seed_everything
from cs324dist.distributed.batch_norm import freeze_cancelled_biases, span_the_batch
from cs324dist.distributed.belongings import (
    PartBelongings,
    Unchanged,
    changed_in_the_loss,
    owners_in,
)
from cs324dist.distributed.checks import checksums, differences, gather_objects
from cs324dist.distributed.ordered_sum import OrderedSum
from cs324dist.distributed.parts import Parts, add_in_order, gather_rows
from cs324dist.distributed.process import accelerator_of_script, check_batch, make_deterministic
from cs324dist.distributed.sum_over import SumOver
from cs324dist.errors import RunFailed, UserError, warn

Mean = Float[Tensor, ""] | tuple[Float[Tensor, ""], Tensor | float]
"""The mean over the samples of a part; or a sum and its weight, such as the number of tokens."""

LossOf = Callable[[MicroBatch], Mean]
Networks = tuple[nn.Module, ...]
LOOK_FOR = (
    "look for random numbers that nothing seeds, for state that one part of the batch leaves to the next, "
    "for data that is not the same on every process, and for broken hardware"
)


_exact: "weakref.WeakKeyDictionary[nn.Module, ExactGradients]" = weakref.WeakKeyDictionary()


def exact_of(networks: Iterable[nn.Module]) -> "ExactGradients | None":
    """Which `ExactGradients` has prepared any of these."""
    return next((_exact[network] for network in networks if network in _exact), None)


class Gradients:
    """What both ways share: the parts of this process, in which layers may span the batch."""

    is_exact = False

    def __init__(self, count: int, seed: int, accelerator: Accelerator, peer_timeout: int) -> None:
        self.parts = Parts(count, accelerator.device, peer_timeout)
        self.networks: dict[str, nn.Module] = {}
        self._seed, self._accelerator, self._device = seed, accelerator, accelerator.device

    def prepare(self, network: nn.Module, name: str = "") -> nn.Module:
        """Place a network, and let its BatchNorm layers span the batch; not DDP's wrapper.

        Raises:
            UserError: it is wrapped already, or its parameters have no shapes yet.
        """
        name = name or f"{type(network).__name__}{len(self.networks) or ''}"
        if isinstance(network, DistributedDataParallel):
            raise UserError(f"{name} is wrapped by DDP (accelerator.prepare): give the network itself")
        if lazy := [n for n, p in network.named_parameters() if nn.parameter.is_lazy(p)]:
            raise UserError(
                f"{name}.{lazy[0]} is lazy, without a shape before the first forward pass: give its layer "
                f"its sizes, or pass a batch through the network first"
            )
        freeze_cancelled_biases(network)
        if self.parts.count > 1 or self.is_exact:
            span_the_batch(network, name, self.parts)
        self.networks[name] = network
        prepared: nn.Module = self._accelerator.prepare_model(network, evaluation_mode=True)  # not yet DDP
        return prepared

    def explanation(self, attribute: str | None) -> str:
        """Why a task lacks an attribute that its loss has set; empty if it has not."""
        return ""

    def batch(self, index: int, step: int, batch_size: int, *, is_check: bool = False) -> MicroBatch:
        """Part `index` of the batch of a step."""
        return MicroBatch(step, batch_size, index, self.parts.count, self._device, is_check)

    def seed(self, step: int, name: str, index: int) -> None:
        """Seed what a part's loss draws, such as dropout."""
        seed_everything(self._seed, f"step {step}/{name}/{index}", self._device)

    def names(self, parameters: Iterable[Tensor]) -> list[str]:
        """The parameters' names."""
        known = {
            p: f"{name}.{inner}" for name, n in self.networks.items() for inner, p in n.named_parameters()
        }
        return [known.get(parameter, "a parameter of no network") for parameter in parameters]  # type: ignore[call-overload]


class DDPGradients(Gradients):
    """One part per process; DDP averages over processes, in floating point."""

    def __init__(self, seed: int, accelerator: Accelerator, peer_timeout: int = 600) -> None:
        super().__init__(accelerator.num_processes, seed, accelerator, peer_timeout)
        self._scaler = accelerator.scaler
        self._reducers: dict[Networks, nn.Module] = {}

    def wrap(self, trained: Iterable[Networks]) -> None:
        """Let DDP reduce the gradients of the networks of each update."""
        place = [self._device] if self._device.type == "cuda" else None
        for networks in dict.fromkeys(trained):
            losses = _Losses(networks)
            self._reducers[networks] = _wrapped(losses, place) if self.parts.processes > 1 else losses

    def map(self, work: Callable[[MicroBatch], object], step: int, batch_size: int) -> None:
        """Do something with the part of this process."""
        list(self.parts.each(lambda i: work(self.batch(i, step, batch_size)), self.parts.of()))

    def backward(self, loss_of: LossOf, step: int, batch_size: int, networks: Networks, name: str) -> None:
        """Leave the mean gradient over all processes in `grad` of the networks' parameters."""
        weights: dict[int, Tensor] = {}

        def mean_of(part: MicroBatch) -> Tensor:
            self.seed(step, name, part.index)
            value, weight = _pair(loss_of(part))
            if weight is not None:
                weights[part.index] = torch.as_tensor(weight, dtype=torch.float64, device=self._device)
            return value

        def work(index: int) -> None:
            loss = self._reducers[networks](mean_of, self.batch(index, step, batch_size))
            (self._scaler.scale(loss) if self._scaler else loss).backward()

        list(self.parts.each(work, self.parts.of()))
        if weights:
            _scale(networks, self.parts.count / add_in_order(gather_rows(weights, self.parts.count)))


def _pair(found: Mean) -> tuple[Tensor, Tensor | float | None]:
    """A loss, and its weight if it is a sum.

    Raises:
        UserError: it is not one number.
    """
    value, weight = found if isinstance(found, tuple) else (found, None)
    if not isinstance(value, Tensor):
        raise UserError(
            f"a loss has to be a tensor, and is a {type(value).__name__}: return what torch computed"
        )
    if value.dim():
        raise UserError(f"a loss has to be one number, and has shape {tuple(value.shape)}: return its mean")
    return value, weight


def _scale(networks: Networks, factor: Tensor) -> None:
    """Make the mean of sums the mean over all samples."""
    parameters = dict.fromkeys(p for network in networks for p in network.parameters())
    if gradients := [p.grad for p in parameters if p.grad is not None]:
        torch._foreach_mul_(gradients, factor)


class _Losses(nn.Module):
    """What DDP wraps: networks, and in place of a forward pass the loss that is computed with them."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, loss_of: Callable[[MicroBatch], Tensor], batch: MicroBatch) -> Tensor:
        return loss_of(batch)


def _wrapped(losses: nn.Module, place: list[torch.device] | None) -> nn.Module:
    with warnings.catch_warnings():
        # torch 2.13 has another name for `broadcast_buffers`; zeros below have other strides than gradients.
        warnings.simplefilter("ignore")
        wrapped = DistributedDataParallel(
            losses,
            place,
            broadcast_buffers=False,  # BatchNorm over the batch keeps them equal
            gradient_as_bucket_view=True,
        )
        # DDP adds up its first step in one bucket and later ones in several, in the order of the first. With
        # this pass as the first, a resumed run of three processes adds in the order of one that ran through.
        trained = [parameter for parameter in losses.parameters() if parameter.requires_grad]
        zero = lambda _: torch.stack([(parameter * 0).sum() for parameter in trained]).sum()  # noqa: E731
        wrapped(zero, None).backward()
    for parameter in trained:
        parameter.grad = None
    return wrapped


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
        if self._device.type == "cuda":
            make_deterministic()
        torch.set_num_threads(1)  # sums depend on the number of threads
        torch.set_flush_denormal(True)
        seed_everything(seed, "start", self._device)
        self._check_every, self._anywhere = check_every, anywhere
        self._checked: set[str] = set()
        self._sums: dict[tuple[int, ...], OrderedSum] = {}
        self._given: dict[Tensor, tuple[Tensor, int]] = {}  # a gradient, and the parameter's version then
        self._has_warned = False
        self.belongings = PartBelongings({}, self._device, micro_batches)

    def prepare(self, network: nn.Module, name: str = "") -> nn.Module:
        """Place a network, and let its BatchNorm layers span the batch: in place of `accelerator.prepare`.

        Raises:
            UserError: it is prepared already, differs between processes, or its parameters have no shapes.
        """
        self._refuse_what_is_prepared(network)
        prepared = super().prepare(network, name)
        _exact[prepared] = self
        if self.parts.processes == 1:
            return prepared
        held = checksums({name: t for name, t in prepared.state_dict().items() if isinstance(t, Tensor)})
        if lines := differences(gather_objects(held, "where a network is prepared"), with_values=False):
            raise UserError(
                f"{name or type(network).__name__}: {lines[0]}: make ExactGradients, which seeds initial "
                f"weights, before the network"
            )
        return prepared

    def _refuse_what_is_prepared(self, network: nn.Module | None = None) -> None:
        models, loaders, schedulers = (
            getattr(self._accelerator, name, ()) for name in ("_models", "_dataloaders", "_schedulers")
        )
        if network is not None and network not in _exact and any(network is model for model in models):
            raise UserError(
                f"{type(network).__name__} went through accelerator.prepare, which would add gradients with "
                f"DDP: give it to ExactGradients.prepare only"
            )
        if schedulers:
            raise UserError(
                "accelerator.prepare was given a scheduler, which it would step once for each process: leave "
                "the scheduler as it is, and call its step() once a step"
            )
        if loaders:
            raise UserError(
                "accelerator.prepare was given a DataLoader, of which each process would see a share: give "
                "it to cs324dist.loader, and take loader.batch(part) in the loss"
            )

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
        """Do something with each part of this process; layers that span the batch meet."""

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
        self._refuse_what_is_prepared()
        if not self.belongings.owners:
            self.watch(self.networks)
        of_networks = dict.fromkeys(p for network in networks for p in network.parameters())
        parameters = [parameter for parameter in of_networks if parameter.requires_grad]
        self._check_before(parameters)
        names = self.names(parameters)
        rows: dict[int, Tensor] = {}

        def gradients_of(index: int, is_check: bool = False) -> Sequence[Tensor | None]:
            self.seed(step, name, index)
            # In this thread, where the parts of this process meet.
            with torch.autograd.set_multithreading_enabled(not self.parts.layers):
                value, weight = _pair(loss_of(self.batch(index, step, batch_size, is_check=is_check)))
                unused: Sequence[Tensor | None] = [None] * len(parameters)
                self._check_after(names, parameters, unused)
                found = (
                    torch.autograd.grad(value, parameters, allow_unused=True)
                    if value.requires_grad
                    else unused
                )
            self._check_after(names, parameters, found)
            rows[index] = self._row(value, weight, found)
            return found

        if not parameters:
            raise UserError("there is nothing to train: give each network to ExactGradients.prepare first")
        if batch_size % self.parts.count:
            raise UserError(f"batch_size={batch_size} is not divisible by micro_batches={self.parts.count}")
        is_checked = self._check_every and (name not in self._checked or step % self._check_every == 0)
        if is_checked:
            gather_objects(None, f"in {name} of step {step + 1}")
        again = self._again(partial(gradients_of, is_check=True), rows, names) if is_checked else {}
        first = self._in_order(gradients_of, rows, names, parameters, {} if is_checked else None)
        if is_checked:
            self._compare(first, again, step)
            self._checked.add(name)
        return self._finish(rows, parameters, names, networks)

    def _row(self, value: Tensor, weight: Tensor | float | None, found: Sequence[Tensor | None]) -> Tensor:
        """Of a part, what all have to know: its loss, the weight, whether it is a pair, what it used."""
        numbers: tuple[Any, ...] = (value, 1.0 if weight is None else weight, float(weight is not None))
        row = torch.ones(len(numbers) + len(found), dtype=torch.float64, device=self._device)
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
        found: "Sums | None",
    ) -> "Sums":
        """Add up the gradients of all parts; returns the checksums of this process's, if `found` is given."""
        if (key := tuple(map(id, parameters))) not in self._sums:
            self._sums[key] = OrderedSum(parameters, self.parts.count)
        total = self._sums[key]
        total.start()
        own = self.parts.of()
        answers = iter(self.parts.each(gradients_of, own, self.belongings))
        for first in range(0, self.parts.count, self.parts.processes):
            index = first + self.parts.rank
            gradients = next(answers) if index in own else ()
            if found is not None and index in own:
                found[index] = _sums_of(names, gradients, rows[index])
            total.add(first, gradients)
        for parameter, mean in zip(parameters, total.means(), strict=True):
            parameter.grad = mean
        return found or {}

    def _again(
        self,
        gradients_of: Callable[[int], Sequence[Tensor | None]],
        rows: dict[int, Tensor],
        names: Sequence[str],
    ) -> "Sums":
        """Compute parts once more, before the others, on another process if any can; see `__init__`."""
        shift = 1 if self._anywhere else 0
        indices = list(reversed(self.parts.of(shift)))
        if self._anywhere and not self.parts.layers:
            indices = indices[:1]
        tensors, found = Unchanged(self.belongings.owners).tensors, {}
        before = checksums(tensors)
        with buffers_kept(self.networks.values()):
            answers = self.parts.each(gradients_of, indices, self.belongings, shift=shift)
            for index, gradients in zip(indices, answers, strict=True):
                found[index] = _sums_of(names, gradients, rows.pop(index))
        for name, now in checksums(tensors).items():
            if now != before[name]:
                raise UserError(changed_in_the_loss(name))
        return found

    def _compare(self, first: "Sums", again: "Sums", step: int) -> None:
        everywhere = gather_objects((first, again), f"after the gradients of step {step + 1}")
        of_all = {index: sums for found, _ in everywhere for index, sums in found.items()}
        for rank, (_, found) in enumerate(everywhere):
            for index, sums in found.items():
                if wrong := [name for name, value in sums.items() if of_all[index].get(name) != value]:
                    raise RunFailed(
                        f"in step {step + 1}, {wrong[0]} of part {index} of the batch was not the same when "
                        f"rank {rank} computed it a second time ({len(wrong)} of {len(sums)} differ): "
                        f"{LOOK_FOR}"
                    )

    def _check_before(self, parameters: Sequence[Tensor]) -> None:
        if self._device.type == "cpu" and (threads := torch.get_num_threads()) != 1:
            raise UserError(
                f"torch has {threads} threads, on which sums depend: leave out set_num_threads, and make "
                f"ExactGradients after the Accelerator"
            )
        given = [self._given.get(parameter, (None, 0)) for parameter in parameters]
        unused = [
            p for p, (gradient, _) in zip(parameters, given, strict=True) if p.grad is gradient is not None
        ]
        left = unused and all(parameter._version == self._given[parameter][1] for parameter in unused)
        if left and any(parameter.grad.any() for parameter in unused):  # type: ignore[union-attr]
            raise UserError(
                f"the last gradient of {self.names(unused)[0]} was used by no optimizer, and would be lost: "
                f"add up losses in one function, or set .grad to None (zero_grad)"
            )
        for name, parameter, (gradient, _) in zip(self.names(parameters), parameters, given, strict=True):
            if parameter.grad is not None and parameter.grad is not gradient:
                raise UserError(
                    f"{name} has a gradient before the update, which would be lost: leave backward() to the "
                    f"update, and set .grad to None after a step of your own"
                )
            if getattr(parameter, "_post_accumulate_grad_hooks", None):
                raise UserError(
                    f"{name} has a post-accumulate hook, which would see the gradient of a part: change the "
                    f"gradient by register_hook, or after the update"
                )
            parameter.grad = None

    @staticmethod
    def _check_after(
        names: Sequence[str], parameters: Sequence[Tensor], found: Sequence[Tensor | None]
    ) -> None:
        for name, parameter, gradient in zip(names, parameters, found, strict=True):
            if parameter.grad is not None:
                raise UserError(
                    f"the loss calls backward(), which leaves a gradient in {name}: return the loss"
                )
            if gradient is not None and gradient.is_sparse:
                raise UserError(f"the gradient of {name} is sparse: give its embedding sparse=False")

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
        kinds, used = of_all[:, 2].tolist(), of_all[:, 3:].any(0).tolist()
        if len(set(kinds)) > 1:
            raise UserError(
                "the losses of some parts are pairs (sum, weight), those of others are not: give one kind"
            )
        for parameter, is_used in zip(parameters, used, strict=True):
            if not is_used:
                parameter.grad = None
        self._given |= {p: (p.grad, p._version) for p in parameters if p.grad is not None}
        if not any(used) and not self._has_warned:
            self._has_warned = True
            if self.parts.rank == 0:
                warn("the loss of no part depends on a parameter, and nothing is trained: is it detached?")
        value, weight = add_in_order(of_all[:, :2])
        if kinds[0]:
            _scale(networks, self.parts.count / weight)
        return value / weight


Sums = dict[int, dict[str, int]]
"""Of some parts, by index: checksums of the loss and of each gradient."""


def _sums_of(names: Sequence[str], gradients: Sequence[Tensor | None], row: Tensor) -> dict[str, int]:
    of_gradients = {
        f"the gradient of {name}": gradient
        for name, gradient in zip(names, gradients, strict=True)
        if gradient is not None
    }
    return checksums({"the loss": row, **of_gradients})


@contextmanager
def buffers_kept(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Put back, at the end, what the networks' buffers hold now."""
    modules = dict.fromkeys(module for network in networks for module in network.modules())
    before: list[tuple[nn.Module, dict[str, tuple[Tensor, Tensor]]]] = [
        (module, {name: (buffer, buffer.clone()) for name, buffer in module.named_buffers(recurse=False)})
        for module in modules
    ]
    yield
    with torch.no_grad():
        for module, buffers in before:
            for name, (buffer, value) in buffers.items():
                setattr(module, name, buffer.copy_(value))
