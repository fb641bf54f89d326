"""Training: the one place that knows backward passes, reduction, clipping, schedules, saving and stopping."""

import dataclasses
import inspect
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from jaxtyping import Float64
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from cs324dist.command_line import from_command_line
from cs324dist.config import Config, as_json, conflicts
from cs324dist.data.streams import MicroBatch, seed_everything
from cs324dist.distributed.checks import checksums, differences, gather_objects
from cs324dist.distributed.failures import ProcessLost, translate_errors
from cs324dist.distributed.gradients import LOOK_FOR, DDPGradients, ExactGradients, buffers_kept
from cs324dist.distributed.launcher import asked_precision
from cs324dist.distributed.parts import add_in_order, gather_rows
from cs324dist.distributed.process import (
    check_batch,
    compare_environments,
    is_faster_in_bf16,
    on_main_process,
    start_accelerator,
)
from cs324dist.distributed.stop import StopRequest
from cs324dist.distributed.sum_over import SumOver
from cs324dist.errors import (
    EXIT_STOPPED,
    WORLD_SIZE,
    ReportedError,
    RunFailed,
    UserError,
    exit_process,
    printable,
    say,
    warn,
)
from cs324dist.runs.checkpoints import (
    TrainerState,
    check_names,
    layout,
    plain_state,
    read_checkpoint,
    tensors_by_file,
    write_checkpoint,
)
from cs324dist.runs.environment import Precision, environment
from cs324dist.runs.files import clear
from cs324dist.runs.hidden_state import HiddenState
from cs324dist.runs.lease import Superseded
from cs324dist.runs.optimizers import each, optimizers_of, with_full_state
from cs324dist.runs.run_dir import RunDir, RunRecord
from cs324dist.tasks import check_task, find_task
from cs324dist.tasks.base import Evaluation, Loss, Mean, Metrics, Task
from cs324dist.trackers import Trackers

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
                anywhere=True,
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
        for name, optimizer in each(task.optimizers):
            self._check_schedule(name, optimizer)
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        self.hidden = HiddenState(task)
        self._rates: dict[int, float] = {}  # that groups of parameters were given last
        self._step, self._is_logged = 0, False
        self._metrics: Recorded = {}

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

    @staticmethod
    def _check_schedule(name: str, optimizer: Optimizer) -> None:
        if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
            raise UserError(
                f"optimizer {name!r} has a scheduler of torch, which no checkpoint would hold: "
                f"use --schedule, or override Config.learning_rate_factor"
            )

    def step(self, step: int, *, is_logged: bool) -> None:
        """Take step `step`, counted from 0; see `read_metrics` for what it logs."""
        self._step, self._is_logged, self._metrics = step, is_logged, {}
        seed_everything(self.config.seed, f"step {step}", self.accelerator.device)
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
        for group in optimizer.param_groups:
            if group["lr"] != self._rates.get(id(group), group["lr"]):
                raise UserError(
                    f"the task has set a learning rate of optimizer {name!r} to {group['lr']}, which the "
                    f"schedule replaces: set group['initial_lr'], or override Config.learning_rate_factor"
                )
            group["lr"] = self._rates[id(group)] = group.setdefault("initial_lr", group["lr"]) * factor

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

    def compare(self, found: Mapping[str, Any]) -> None:
        """Check that all processes have found the same.

        Raises:
            RunFailed: naming what differs, and the ranks.
        """
        if lines := differences(gather_objects(found), with_values=False):
            raise RunFailed(
                f"after step {self._step + 1}, {lines[0]} ({len(lines)} of {len(found)} differ): {LOOK_FOR}"
            )

    def compare_processes(self) -> None:
        """Check that all processes hold the same; without micro-batches, buffers come from the first one.

        Raises:
            RunFailed: naming the tensor and the ranks.
        """
        if self.parts.processes == 1:
            return
        if not self._gradients.is_exact:
            for network in self.task.networks.values():
                for buffer in network.buffers():
                    dist.broadcast(buffer, 0)
        tensors = {
            f"{file.partition('/')[0].removesuffix('.safetensors')}: {name}": tensor
            for file, some in tensors_by_file(self.task).items()
            for name, tensor in some.items()
        }
        self.compare({**checksums(tensors), "the task's own state": plain_state(self.task)})

    def _record(self, batch: MicroBatch, metrics: Metrics) -> None:
        for name, value in metrics.items():
            total, weight = value if isinstance(value, tuple) else (value, 1.0)
            pair = self._number(total), self._number(weight)
            self._metrics.setdefault(f"train/{name}", {})[batch.index] = pair

    def _number(self, value: Tensor | float) -> Float64[Tensor, ""]:
        device = self.accelerator.device
        if isinstance(value, Tensor):
            return value.detach().to(device, torch.float64)
        return torch.full((), value, dtype=torch.float64, device=device)  # a copy would wait for the device

    def read_metrics(self) -> dict[str, float]:
        """The metrics of the last step, averaged over its micro-batches; waits for the device."""
        names = sorted(self._metrics)
        self._check_that_all_have(names)
        if not names:
            return {}
        rows = {
            i: torch.stack([part for name in names for part in self._metrics[name][i]])
            for i in self.parts.of()
        }
        sums = dict(zip(names, self.sum(rows).view(-1, 2).tolist(), strict=True))
        # One that no sample has counted in is left out.
        return {name: sums[name][0] / sums[name][1] for name in self._metrics if sums[name][1]}

    def _check_that_all_have(self, names: Sequence[str]) -> None:
        """Check that the losses of all parts have given metrics of these names.

        Raises:
            UserError: they have not.
        """
        own = set(self.parts.of())
        alike = all(self._metrics[name].keys() >= own for name in names)
        if self.accelerator.num_processes > 1:
            digest = zlib.crc32("\0".join(names).encode()) & 0xFFFF if alike else -1
            rows = dict.fromkeys(own, self._number(float(digest)).view(1))
            alike = self.sum(rows).item() == digest * self.parts.count >= 0
        if not alike:
            raise UserError(
                "the losses of some micro-batches give other metrics than those of others: always give all; "
                "one without samples is a pair of zeros, (sum, weight)"
            )

    def sum_over(self, until_stopped: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter) -> SumOver:
        """For evaluations; see `SumOver`."""
        return SumOver(self.accelerator, until_stopped, self.config.seed)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, networks are in eval mode and compute in full precision, uncompiled, without gradients."""
        networks = self.task.networks.values()
        modules = {module: module.training for network in networks for module in network.modules()}
        # Instances hold Accelerate's forward, with autocast, and a compiled call.
        replaced = ("forward", "_compiled_call_impl")
        held = [{name: vars(n).pop(name) for name in replaced if name in vars(n)} for n in networks]
        try:
            for network in networks:
                network.eval()
            with torch.no_grad():
                yield
        finally:
            for module, was_training in modules.items():  # a frozen part may stay in eval mode
                if module.training != was_training:
                    module.train(was_training)
            for network, own in zip(networks, held, strict=True):
                vars(network).update(own)

    def restore(self, checkpoint: Path) -> TrainerState:
        """Read a checkpoint into the task.

        Raises:
            UserError: it is damaged, or another task's.
        """
        state = read_checkpoint(checkpoint, self.task, self.hidden)
        if state.loss_scale and (scaler := self.accelerator.scaler) is not None:
            interval = scaler.get_growth_interval()  # torch takes no float, as numbers in a checkpoint are
            scaler.load_state_dict({**state.loss_scale, "growth_interval": interval})
        return state


def compiled_by(accelerator: Accelerator) -> str | None:
    """The backend of torch.compile that the launcher was asked for."""
    backend: str = accelerator.state.dynamo_plugin.backend.value
    return None if backend == "NO" else backend.lower()


def checked(found: tuple[Mean, Metrics]) -> tuple[Mean, Metrics]:
    """What a task's loss has returned.

    Raises:
        UserError: it is not a loss and metrics.
    """
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)):
        raise UserError("a loss has to return two things, the loss and a dict of metrics: return loss, {}")
    return found


def as_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What a task's evaluation has measured, as plain numbers.

    Raises:
        UserError: something is no number.
    """
    found = {}
    for name, value in metrics.items():
        try:
            found[name] = float(value)
        except (TypeError, ValueError, RuntimeError):
            text = printable(repr(value)).partition("\n")[0]
            raise UserError(f"the evaluation gives {name} = {text:.99}: give a number") from None
    return found


class Run:
    """Trains a task in a run folder: step, log, evaluate, checkpoint, stop."""

    def __init__(self, trainer: Trainer, run: RunDir, stop: StopRequest) -> None:
        self.trainer, self.run, self.stop = trainer, run, stop
        self.task, self.config, self.accelerator = trainer.task, trainer.config, trainer.accelerator
        self.on_main = partial(on_main_process, self.accelerator)
        self._task_is_done = False
        self.owes_evaluation = False
        """Whether a signal has cut off the evaluation after the step that it resumes at."""
        self._layout: dict[str, str] = {}  # of the tensors, at the start

    def is_over(self, completed: int) -> bool:
        """Whether no step is left to take."""
        return self._task_is_done or completed >= self.config.steps

    def resume(self) -> TrainerState:
        """Read the newest valid checkpoint, if there is one; returns where it stands.

        Raises:
            UserError: no checkpoint is valid, or it is another task's, or metrics before it are damaged.
        """
        self._layout = layout(self.task)
        newest = self.on_main(self.run.newest_checkpoint)
        if newest is None:
            self.on_main(self._check_that_it_can_be_saved)
            self.on_main(lambda: self._check_keep_best(0))
            return TrainerState(0)
        state = self.trainer.restore(newest)
        found = self.on_main(lambda: self.run.has_evaluation(state.step, state.metrics_lines))
        self.owes_evaluation = self.config.is_due(state.step, self.config.evaluate_every) and not found
        self.on_main(lambda: self._check_keep_best(state.step))
        self._task_is_done = self._ask_whether_done(state.step)
        return state

    def _ask_whether_done(self, completed: int) -> bool:
        return self.on_main(lambda: self.task.is_done(self.run.read_evaluations(completed)))

    def _check_that_it_can_be_saved(self) -> None:
        scratch = self.run.scratch
        clear(scratch)
        try:
            with with_full_state(self.task.optimizers):
                write_checkpoint(scratch / "0", self.task, TrainerState(0))
                read_checkpoint(scratch / "0", self.task)
        except ReportedError:
            raise
        except OSError as error:
            raise self.run.unwritable(error) from None
        except Exception as error:
            raise UserError(f"it cannot be saved: {type(error).__name__}: {printable(error)}") from error
        finally:
            clear(scratch)
            with suppress(OSError):  # it holds more
                scratch.parent.rmdir()

    def train(self, start: TrainerState) -> int | None:
        """Take the steps after `start`; returns the step that a signal stopped it after, None if none did.

        Raises:
            RunFailed: a metric or a weight is not finite, or the last checkpoint could not be written.
        """
        config, trainer = self.config, self.trainer
        with Trackers(self.run, self.accelerator, config, start.step) as trackers:
            if self.owes_evaluation:
                if not self._evaluate(trackers, start.step):
                    return start.step
                self.save(start.step)
                self.on_main(lambda: self._check_keep_best(start.step, evaluated=True))
            completed = start.step
            while not self.is_over(completed):
                completed += 1
                is_logged = config.is_due(completed, config.log_every)
                trainer.step(completed - 1, is_logged=is_logged)
                if completed == start.step + 1:
                    trainer.compare_processes()
                if is_logged:
                    values = trainer.read_metrics()
                    trackers.log_step(completed, values)
                    for name, value in values.items():
                        if not math.isfinite(value):
                            raise self._diverged(f"{name} is {value} after step {completed}")
                evaluated = config.is_due(completed, config.evaluate_every)
                cut_off = evaluated and not self._evaluate(trackers, completed)
                stopping = self.stop.agreed() or cut_off
                due = config.is_due(completed, config.checkpoint_every) or self._task_is_done
                due |= bool(config.keep_best) and evaluated
                if stopping or due:
                    with trackers.paused():
                        self.save(completed)
                if config.keep_best and evaluated and not cut_off:  # saved by now: nothing is lost
                    self.on_main(partial(self._check_keep_best, completed, evaluated=True))
                if stopping and (cut_off or not self.is_over(completed)):
                    return completed
        return None

    def _evaluate(self, trackers: Trackers, completed: int) -> bool:
        """Evaluate and log; False if a signal interrupted it."""
        seed_everything(self.config.seed, f"evaluation {completed}", self.accelerator.device)
        with trackers.paused(), self.trainer.evaluating():
            evaluation = self.task.evaluate(self.trainer.sum_over(self.stop.until_stopped))
            if not isinstance(evaluation, Evaluation):
                raise UserError("evaluate has to return an Evaluation, such as Evaluation({'accuracy': 0.5})")
            evaluation = dataclasses.replace(evaluation, metrics=as_numbers(evaluation.metrics))
            if is_complete := not self.stop.interrupted():
                self.trainer.compare({f"eval/{name}": value for name, value in evaluation.metrics.items()})
                trackers.log_evaluation(completed, evaluation)
                self._task_is_done = self._ask_whether_done(completed)
        return is_complete

    def _check_keep_best(self, completed: int, *, evaluated: bool = False) -> None:
        """Check that it is a metric of the last evaluation; before the first one, that it can be one."""
        if not (wanted := self.config.keep_best.removesuffix(":min")):
            return
        measured = [f"eval/{name}" for row in self.run.read_evaluations(completed)[-1:] for name in row]
        if wanted in measured:
            return
        if measured:
            todo = f"give one of {', '.join(measured)}"
        elif evaluated:
            todo = "the task measures nothing, leave it out"
        elif not wanted.startswith("eval/"):
            todo = f"give a name that begins with eval/, such as eval/{wanted}"
        else:
            return
        text = f"--keep-best {wanted} is no metric of an evaluation: {todo}"
        raise RunFailed(f"{text}; {self._last_good()}") if evaluated else UserError(text)

    def save(self, completed: int) -> None:
        """Write a checkpoint: every process enters, the main process writes, all wait.

        Raises:
            RunFailed: something is not finite, or it is the last checkpoint and cannot be written.
        """
        self.trainer.compare_processes()
        self.on_main(lambda: self._save(completed))

    def _save(self, completed: int) -> None:
        run, scaler = self.run, self.accelerator.scaler
        self._check_state(completed)
        try:
            state = TrainerState(
                step=completed,
                processes=self.accelerator.num_processes,
                loss_scale=scaler.state_dict() if scaler is not None and scaler.is_enabled() else {},
                metrics_lines=run.write_metrics(sync=True),
                hidden=self.trainer.hidden.changed(),
            )
            write_checkpoint(run.checkpoint(completed), self.task, state, run)
        except OSError as error:
            text = f"no checkpoint of step {completed}: {error.strerror}; {self._last_good()}"
            if self.is_over(completed):
                raise RunFailed(f"{text}; make room, then run the same command again") from None
            warn(text)
        except RunFailed as failure:
            raise self._diverged(str(failure)) from None
        else:
            run.write_status("running", completed)
            run.keep_newest(self.config.keep_last, self.config.keep_best)

    def _check_state(self, completed: int) -> None:
        """Check that a new start can read the tensors."""
        first, now = self._layout, layout(self.task)
        for name in sorted(first.keys() | now.keys()):
            if (was := first.get(name, "no tensor")) != (is_now := now.get(name, "no tensor")):
                raise RunFailed(
                    f"after step {completed}, {name} is {is_now}, and was {was} at the start, as a resume "
                    f"expects it: create it in the task's __init__, or keep numbers; {self._last_good()}"
                )

    def _diverged(self, what: str) -> RunFailed:
        return RunFailed(
            f"{what}; {self._last_good()}",
            "for another outcome, lower the learning rate in a new --run-dir",
        )

    def _last_good(self) -> str:
        newest = self.run.newest()
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"

    def train_and_record(self, start: TrainerState) -> bool:
        """Train, and write to `status.json` how it ended; returns False if a signal stopped it early."""
        run = self.run
        try:
            with translate_errors(self.config):
                stopped_at = self.train(start)
        except Superseded:
            raise
        except BaseException as error:
            # A signal to stop all, which others obeyed sooner; not the launcher's, that follows a failure.
            stopped = self.stop.received_before_the_last_vote and isinstance(error, ProcessLost)
            if self.accelerator.is_main_process:
                why = str(error) if isinstance(error, ReportedError) else f"{type(error).__name__}: {error}"
                run.write_status("stopped" if stopped else "failed", run.newest_step(), why)
            if stopped:
                return False
            raise
        if stopped_at is None:
            self.say(f"{run}: finished after {self.on_main(self._finish)} steps")
            return True
        self.on_main(lambda: run.write_status("stopped", run.newest_step(), "a signal asked for it"))
        self.say(f"{run}: stopped after {stopped_at} steps; run the same command to go on")
        return False

    def _finish(self) -> int:
        self.run.write_status("finished", steps := self.run.newest_step())
        return steps

    def say(self, text: str) -> None:
        """Print a line, on the main process."""
        if self.accelerator.is_main_process:
            say(text)


def main(task: str | type[Task[Any]], description: str | None) -> None:
    """Train a task as the command line says; exits with 0 when done, 1 failed, 2 refused, 75 stopped early.

    Args:
        task: a `Task`, or the name of one; see `find_task`.
        description: shown by `--help`.
    """
    task_type = find_task(task) if isinstance(task, str) else task
    check_task(task_type)
    given = task if isinstance(task, str) and sys.argv[1:2] == [task] else ""  # to launch/train.py
    config = from_command_line(
        task_type.presets,
        description or _doc_of(task_type),
        task_type.run_name,
        sys.argv[2:] if given else sys.argv[1:],
    )
    if config.dry_run:
        asked_precision()
        check_batch(config.batch_size, config.micro_batches, WORLD_SIZE)
        with suppress(OSError):  # a run would try again
            RunDir(config.folder).check_fits(task_type.name, config)
        print(json.dumps(as_json(config), indent=2))
        return
    made_in = RunDir(config.folder).latest_environment()
    precision: Precision = config.default_precision if is_faster_in_bf16() else "no"
    if made_in:  # on other machines, or on fewer, a run goes on in its own precision
        precision = made_in.precision
    accelerator = start_accelerator(config.batch_size, config.micro_batches, config.peer_timeout, precision)
    with StopRequest(accelerator.num_processes, config.peer_timeout) as stop:
        try:
            with translate_errors(config):
                done = run_task(task_type, config, accelerator, stop, given)
        except BaseException:
            # The process group stays: to leave it while others wait in a collective hangs (torchtitan #1342).
            Trackers.close(accelerator, leave_group=False)
            raise
        Trackers.close(accelerator)
    exit_process(0 if done else EXIT_STOPPED)


def _doc_of(task_type: type[Task[Any]]) -> str:
    """The docstring of its options, unless it is the one that dataclasses make up."""
    of_options = type(next(iter(task_type.presets.values())))
    doc = inspect.cleandoc(of_options.__doc__ or "")
    return "" if doc.startswith(f"{of_options.__name__}(") else doc


def run_task(
    task_type: type[Task[Any]],
    config: Config,
    accelerator: Accelerator,
    stop: StopRequest,
    given: str = "",
) -> bool:
    """Start or continue the run in `config.folder`; returns False if a signal stopped it early.

    `given` is the task as the command line names it, if it does.

    Raises:
        UserError: the folder belongs to another task, other options or a live process, or is damaged, or
            cannot be written to.
        RunFailed: the run cannot go on.
    """
    run_dir = RunDir(config.folder)
    on_main = partial(on_main_process, accelerator)
    how = accelerator.num_processes, accelerator.mixed_precision, compiled_by(accelerator)
    compare_environments(environment(*how, commit=False), exact=config.micro_batches is not None)
    with run_dir.claimed(lambda: run_dir.check_fits(task_type.name, config), on_main):
        seed_everything(config.seed, "task", accelerator.device)
        task = task_type(config, accelerator.device)
        if not hasattr(task, "config"):
            raise UserError(f"{task_type.__name__} has to call super().__init__(config, device) first")
        check_names(task.networks)
        trainer = Trainer(task, accelerator)
        run = Run(trainer, run_dir, stop)
        start = run.resume()
        if run.is_over(start.step) and not run.owes_evaluation:
            on_main(lambda: run_dir.finish(start.step, config.keep_last, config.keep_best))
            can_be_more = not conflicts(dataclasses.replace(config, steps=2 * config.steps), config)
            more = f"for more, give {'--steps or ' * can_be_more}another --run-dir"
            if start.step < config.steps:
                more = "its task is done"
            run.say(f"{run_dir} is finished, {start.step} steps: {more}")
            return True
        if accelerator.is_main_process:
            warn_of_untrained(task)
        stop.listen()
        record = run_record(task_type, config, given)
        on_main(lambda: run_dir.start(record, environment(*how), start.step, start.metrics_lines))
        run.say(
            f"{run_dir}: {'continuing from' if start.step else 'starting at'} step {start.step} "
            f"of {config.steps}, processes: {accelerator.num_processes}, device: {accelerator.device.type}, "
            f"precision: {'float32' if accelerator.mixed_precision == 'no' else accelerator.mixed_precision}"
        )
        return run.train_and_record(start)


def warn_of_untrained(task: Task[Any]) -> None:
    """Warn of parameters that nothing trains, although they are not frozen."""
    trained = {p for _, one in each(task.optimizers) for group in one.param_groups for p in group["params"]}
    for name, network in task.networks.items():
        if left := sum(p.requires_grad and p not in trained for p in network.parameters()):
            warn(f"{left} parameters of {name!r} are in no optimizer")


def run_record(task_type: type[Task[Any]], config: Config, given: str = "") -> RunRecord:
    """What `config.json` is to hold."""
    values, usual = as_json(config), as_json(task_type.presets[config.preset])
    differing = (name for name, value in values.items() if usual[name] != value)
    changed = {name: usual[name] for name in differing if name not in ("preset", "run_dir")}
    return RunRecord(task_type.name, sys.argv[0], values, changed, task_given=given)
