"""One step of a task: backward passes, reduction, clipping and learning rates."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from jaxtyping import Float64
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cs324dist.data.streams import MicroBatch
from cs324dist.distributed.belongings import buffers_kept
from cs324dist.distributed.checks import gather_objects
from cs324dist.distributed.exact import ExactGradients
from cs324dist.distributed.gradients import DDPGradients
from cs324dist.distributed.parts import add_in_order, gather_rows
from cs324dist.distributed.process import compiled_by
from cs324dist.distributed.stop import StopRequest
from cs324dist.distributed.sum_over import SumOver
from cs324dist.errors import UserError
from cs324dist.runs.optimizers import each, optimizers_of
from cs324dist.tasks.base import Loss, Mean, Metrics, Task

GIVEN_RATE = "given_lr"  # in a group, and so in a checkpoint: the rate that it was given last
Recorded = dict[str, dict[int, tuple[Tensor, Tensor]]]
"""Metrics by name: of each micro-batch of this process a sum and its weight."""


class Trainer:
    """Takes the steps of a task."""

    def __init__(self, task: Task[Any], accelerator: Accelerator) -> None:
        """Prepare the networks that are trained: their place, precision, BatchNorm and reduction.

        Raises:
            UserError: an optimizer holds a parameter of no network, or is driven by a scheduler of torch.
        """
        self.task, self.accelerator, self.config = task, accelerator, task.config
        config = self.config
        self._trained = {name: self._networks_of(name) for name in task.optimizers}
        trained = {network for some in self._trained.values() for network in some}
        self._gradients: DDPGradients | ExactGradients
        if config.micro_batches is None:
            self._gradients = DDPGradients(config.seed, accelerator, config.peer_timeout)
        else:
            self._gradients = ExactGradients(
                config.micro_batches,
                config.seed,
                accelerator,
                check_every=config.check_every,
                peer_timeout=config.peer_timeout,
            )
        self.parts = self._gradients.parts
        for name, network in task.networks.items():
            if network in trained:
                self._gradients.prepare(network, name)
                if compiled_by(accelerator):
                    network.compile(**accelerator.state.dynamo_plugin.to_kwargs())
        if isinstance(self._gradients, DDPGradients):
            self._gradients.wrap(self._trained.values())
        else:
            self._gradients.watch(task.networks, task)
            self._gradients.belongings.noted = self._metrics_of
        for name, optimizer in each(task.optimizers):
            self._check_schedule(name, optimizer)
            for group in _with_a_rate(optimizer):
                group.setdefault("initial_lr", group["lr"])
        self._step, self._is_logged = 0, False
        self._metrics: Recorded = {}
        self._named: dict[int, list[str]] = {}

    def _networks_of(self, name: str) -> tuple[nn.Module, ...]:
        """The networks that the optimizers `name` train."""
        optimizers = optimizers_of(self.task.optimizers, name)
        parameters = {p for one in optimizers for group in one.param_groups for p in group["params"]}
        networks = tuple(
            network for network in self.task.networks.values() if parameters & set(network.parameters())
        )
        if foreign := parameters - {p for network in networks for p in network.parameters()}:
            raise UserError(f"optimizer {name!r} holds {len(foreign)} parameters of no network of the task")
        return networks

    def _check_schedule(self, name: str, optimizer: Optimizer) -> None:
        held = (value for value in vars(self.task).values() if isinstance(value, LRScheduler))
        if hasattr(optimizer.step, "_wrapped_by_lr_sched") or any(s.optimizer is optimizer for s in held):
            raise UserError(
                f"optimizer {name!r} has a scheduler of torch, which no checkpoint would hold: "
                f"use --schedule, or override Config.learning_rate_factor"
            )
        for inner, value in vars(optimizer).items():
            if isinstance(value, Optimizer):
                raise UserError(
                    f"optimizer {name!r} steps another one, {inner}, whose state no checkpoint would hold: "
                    f"give that one to the task, and do the rest in Task.step"
                )

    def step(self, step: int, *, is_logged: bool) -> None:
        """Take step `step`, counted from 0; see `read_metrics` for what it logs."""
        self._step, self._is_logged, self._metrics = step, is_logged, {}
        try:
            self.task.step(step, self)
        except AttributeError as error:
            if why := self._gradients.explanation(error.name):
                raise UserError(why) from error
            raise

    def update(self, name: str, loss: Loss) -> None:
        """See `Updater`."""
        networks, scaler = self._trained[name], self.accelerator.scaler
        optimizers = optimizers_of(self.task.optimizers, name)
        for optimizer in optimizers:
            self._check_schedule(name, optimizer)
            self._set_rates(name, optimizer)

        def loss_of(part: MicroBatch) -> Mean:
            value, metrics = checked(loss(part))
            self._record(part, metrics)
            return value

        self._gradients.backward(loss_of, self._step, self.config.batch_size, networks, name)
        if self.config.max_grad_norm is not None:
            for optimizer in optimizers if scaler else ():
                scaler.unscale_(optimizer)
            self._clip(optimizers, self.config.max_grad_norm)
        for number, optimizer in enumerate(optimizers):
            self._gradients.seed(self._step, f"{name}/optimizer", number)
            scaler.step(optimizer) if scaler else optimizer.step()
        for network in self.task.networks.values():  # the loss may have passed through others
            network.zero_grad()
        if scaler:
            scaler.update()

    def _set_rates(self, name: str, optimizer: Optimizer) -> None:
        """Give each group of parameters the learning rate of this step.

        Raises:
            UserError: somebody else has given it another one.
        """
        factor = self.config.learning_rate_factor(self._step)
        for group in _with_a_rate(optimizer):
            if group["lr"] != group.get(GIVEN_RATE, group["lr"]):
                raise UserError(
                    f"the task has set a learning rate of optimizer {name!r} to {group['lr']}, which the "
                    f"schedule replaces: set group['initial_lr'], or override Config.learning_rate_factor"
                )
            group["lr"] = group[GIVEN_RATE] = group.setdefault("initial_lr", group["lr"]) * factor

    def _clip(self, optimizers: Iterable[Optimizer], most: float) -> None:
        """Scale the gradients that the optimizers use down to a norm of `most`."""
        groups = (group for optimizer in optimizers for group in optimizer.param_groups)
        parameters = list(dict.fromkeys(p for group in groups for p in group["params"]))
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.accelerator.scaler is not None:
            # An overflow is skipped by the optimizer that met it, and may not reach the gradients of others.
            norm = norm.where(norm.isfinite(), 0)
        if not self._gradients.is_exact and self.parts.processes > 1:
            dist.broadcast(norm, 0)  # other numbers of threads may sum in another order
        clip_grads_with_norm_(parameters, most, norm)

    def measure(self, loss: Loss) -> None:
        """See `Updater`."""

        def record(part: MicroBatch) -> None:
            with torch.no_grad():
                self._record(part, checked(loss(part))[1])

        if self._is_logged:
            # What BatchNorm has gathered so far may not depend on which steps are logged.
            with buffers_kept(self.task.networks.values()):
                self._gradients.map(record, self._step, self.config.batch_size)

    def sum(self, values: Mapping[int, Tensor]) -> Tensor:
        """See `Updater`."""
        own = {index: values[index] for index in self.parts.of()}
        return add_in_order(gather_rows(own, self.parts.count))

    def _record(self, batch: MicroBatch, metrics: Metrics) -> None:
        self._named[batch.index] = [f"train/{name}" for name in metrics]
        for name, value in metrics.items():
            total, weight = value if isinstance(value, tuple) else (value, 1.0)
            pair = self._number(total), self._number(weight)
            self._metrics.setdefault(f"train/{name}", {})[batch.index] = pair

    def _metrics_of(self, index: int) -> dict[str, Tensor]:
        """What the last loss of a part has given, and not an earlier update."""
        return {
            f"the metric {name}": torch.stack(self._metrics[name][index])
            for name in self._named.get(index, ())
        }

    def _number(self, value: Tensor | float) -> Float64[Tensor, ""]:
        device = self.accelerator.device
        if isinstance(value, Tensor):
            return value.detach().to(device, torch.float64)
        return torch.full((), value, dtype=torch.float64, device=device)  # a copy would wait for the device

    def read_metrics(self) -> dict[str, float]:
        """The metrics of the last step, averaged over its micro-batches; waits for the device.

        Raises:
            UserError: the losses of some micro-batches give other metrics than those of others.
        """
        names = sorted(self._metrics)
        own = set(self.parts.of())
        alike = all(self._metrics[name].keys() >= own for name in names)
        if any(found != (names, True) for found in gather_objects((names, alike), "where metrics are read")):
            raise UserError(
                "the losses of some micro-batches give other metrics than those of others: always give all; "
                "one without samples is a pair of zeros, (sum, weight)"
            )
        if not names:
            return {}
        rows = {i: torch.stack([part for name in names for part in self._metrics[name][i]]) for i in own}
        sums = dict(zip(names, self.sum(rows).view(-1, 2).tolist(), strict=True))
        # One that no sample has counted in is left out.
        return {name: sums[name][0] / sums[name][1] for name in self._metrics if sums[name][1]}

    def sum_over(self, stop: StopRequest | None = None) -> SumOver:
        """For evaluations; see `SumOver`."""
        return SumOver(self.accelerator, stop, self.config.seed)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, networks are in eval mode and compute in full precision, uncompiled, without gradients."""
        networks = self.task.networks.values()
        modules = {module: module.training for network in networks for module in network.modules()}
        # Instances hold Accelerate's forward, with autocast, and a compiled call.
        replaced = ("forward", "_compiled_call_impl")
        held = [{name: vars(n)[name] for name in replaced if name in vars(n)} for n in networks]
        for network in networks:
            vars(network).pop("_compiled_call_impl", None)
            if original := vars(network).get("_original_forward"):
                network.forward = original
        try:
            for network in networks:
                network.eval()
            with torch.no_grad(), full_float32():
                yield
        finally:
            for module, was_training in modules.items():  # a frozen part may stay in eval mode
                if module.training != was_training:
                    module.train(was_training)
            for network, own in zip(networks, held, strict=True):
                vars(network).update(own)


def _with_a_rate(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The groups that have a learning rate; Adafactor and others may find their own."""
    return [group for group in optimizer.param_groups if group.get("lr") is not None]


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, a GPU computes float32 as such, not as TF32."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def checked(found: tuple[Mean, Metrics]) -> tuple[Mean, Metrics]:
    """What a task's loss has returned.

    Raises:
        UserError: it is not a loss and metrics.
    """
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)):
        raise UserError("a loss has to return two things, the loss and a dict of metrics: return loss, {}")
    return found
