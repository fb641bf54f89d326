"""The training loop of a task: step, log, evaluate, and what a training script calls."""

import dataclasses
import inspect
import json
import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel

from cs324dist.base_run import BaseRun
from cs324dist.command_line import from_command_line
from cs324dist.config import Config, as_json, conflicts
from cs324dist.data.streams import seed_everything
from cs324dist.distributed.failures import translate_errors
from cs324dist.distributed.launcher import asked_precision
from cs324dist.distributed.process import (
    check_batch,
    is_faster_in_bf16,
    on_main_process,
    start_accelerator,
)
from cs324dist.distributed.stop import Stopped
from cs324dist.distributed.sum_over import CutOff
from cs324dist.errors import (
    EXIT_STOPPED,
    WORLD_SIZE,
    RunFailed,
    UserError,
    exit_process,
    warn,
)
from cs324dist.metrics import as_numbers
from cs324dist.runs.environment import Precision
from cs324dist.runs.optimizers import each
from cs324dist.runs.records import RunRecord
from cs324dist.runs.run_dir import RunDir
from cs324dist.tasks import check_task, find_task
from cs324dist.tasks.base import Evaluation, Task
from cs324dist.trainer import Trainer


class TaskRun(BaseRun):
    """A run of a task: its loop, with evaluations."""

    def __init__(self, trainer: Trainer, given: str = "") -> None:
        """`given` is the task as the command line names it, if it does."""
        self.trainer, self.task, self.config, self._given = trainer, trainer.task, trainer.config, given
        config = self.config
        super().__init__(
            config.folder,
            self.task,
            trainer.accelerator,
            as_json(config),
            seed=config.seed,
            batch_size=config.batch_size,
            keep_last=config.keep_last,
            keep_best=config.keep_best,
            wandb=config.wandb,
            tensorboard=config.tensorboard,
            peer_timeout=config.peer_timeout,
        )
        self.parts = trainer.parts
        if (best := self.best_metric) and not best.startswith("eval/"):
            raise UserError(
                f"--keep-best {best} is no metric of an evaluation: give a name that begins with eval/, such "
                f"as eval/{best}"
            )
        self.owes_evaluation = False
        """Whether a signal has cut off the evaluation after the step that it resumes at."""

    def _check_fits(self) -> None:
        self.dir.check_fits(self.task.name, self.config)

    def _record(self) -> RunRecord:
        return run_record(type(self.task), self.config, self._given)

    def _for_more(self) -> str:
        can_be_more = not conflicts(dataclasses.replace(self.config, steps=2 * self._until), self.config)
        more = f"for more, give {'--steps or ' * can_be_more}another --run-dir"
        return "its task is done" if self.step < self._until else more

    def _restore(self) -> None:
        super()._restore()
        if self.step:
            found = self._on_main(lambda: self.dir.has_evaluation(self.step, self._metrics_lines))
            self.owes_evaluation = self.config.is_due(self.step, self.config.evaluate_every) and not found
            self._ask_whether_done()

    def _ask_whether_done(self) -> None:
        self.is_over = self._on_main(lambda: self.task.is_done(self.dir.read_evaluations(self.completed)))

    def _start(self) -> None:
        super()._start()
        if self.owes_evaluation:
            self.owes_evaluation = False
            self._evaluate()
            if self._stop_asked:
                self._end_stopped()
            self._write()

    def train(self) -> None:
        """Take the steps that are left.

        Raises:
            RunFailed: a metric or a weight is not finite, or the last checkpoint could not be written.
            Stopped: a signal has asked for it.
        """
        config, trainer = self.config, self.trainer
        for step in self.steps(config.steps, config.checkpoint_every):
            is_logged = config.is_due(step + 1, config.log_every)
            trainer.step(step, is_logged=is_logged)
            if is_logged:
                values = trainer.read_metrics()
                self.log(values)
                self._check_finite(values)
            if config.is_due(step + 1, config.evaluate_every):
                self._evaluate()
            if self.is_over:
                break

    def _check_finite(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise self.saving.diverged(f"{name} is {value} after step {self.completed}")

    def _evaluate(self) -> None:
        """Evaluate and log; a signal that interrupts it stops the run."""
        seed_everything(self.config.seed, f"evaluation {self.completed}", self.accelerator.device)
        with self.trackers.paused(), self.trainer.evaluating():
            try:
                evaluation = self.task.evaluate(self.trainer.sum_over(self._stop))
            except CutOff:
                self._stop_asked = True
                return
            if not isinstance(evaluation, Evaluation):
                raise UserError("evaluate has to return an Evaluation, such as Evaluation({'accuracy': 0.5})")
            evaluation = dataclasses.replace(evaluation, metrics=as_numbers(evaluation.metrics))
            found = {f"eval/{name}": value for name, value in evaluation.metrics.items()}
            self.compare(found)
            self.trackers.log_evaluation(self.completed, evaluation)
            self._ask_whether_done()
        if best := self.best_metric:
            self.save()
            if best not in found:
                self._write()  # what the steps so far have reached is not lost
                todo = (
                    f"give one of {', '.join(found)}" if found else "the task measures nothing, leave it out"
                )
                text = f"--keep-best {best} is no metric of an evaluation: {todo}"
                raise RunFailed(f"{text}; {self.saving.last_good()}")


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
    preferred: Precision = config.default_precision if is_faster_in_bf16() else "no"
    if made_in:  # on other machines, or on fewer, a run goes on in its own precision
        preferred = made_in.precision
    accelerator = start_accelerator(
        config.batch_size, config.micro_batches, config.peer_timeout, config.precision, preferred
    )
    done = run_task(task_type, config, accelerator, given)
    # After an error the group stays: to leave it while others wait in a collective hangs (torchtitan #1342).
    accelerator.end_training()
    exit_process(0 if done else EXIT_STOPPED)


def _doc_of(task_type: type[Task[Any]]) -> str:
    """The docstring of its options, unless it is the one that dataclasses make up."""
    of_options = type(next(iter(task_type.presets.values())))
    doc = inspect.cleandoc(of_options.__doc__ or "")
    return "" if doc.startswith(f"{of_options.__name__}(") else doc


def run_task(task_type: type[Task[Any]], config: Config, accelerator: Accelerator, given: str = "") -> bool:
    """Start or continue the run in `config.folder`; returns False if a signal stopped it early.

    `given` is the task as the command line names it, if it does.

    Raises:
        UserError: the folder belongs to another task, other options or a live process, or is damaged, or
            cannot be written to.
        RunFailed: the run cannot go on.
    """
    with translate_errors(config.peer_timeout):
        # Before what a task builds, which may take long.
        on_main_process(accelerator, lambda: RunDir(config.folder).check_fits(task_type.name, config))
        seed_everything(config.seed, "task", accelerator.device)
        try:
            task = task_type(config, accelerator.device)
        except (FileNotFoundError, NotADirectoryError) as error:
            said = f"{error.filename}: {error.strerror}" if error.strerror else str(error)
            raise UserError(f"{task_type.__name__} cannot be made: {said}") from error
        if not hasattr(task, "config"):
            raise UserError(f"{task_type.__name__} has to call super().__init__(config, device) first")
        run = TaskRun(Trainer(task, accelerator), given)
        if accelerator.is_main_process:
            warn_of_untrained(task)
        try:
            with run:
                run.train()
        except Stopped:
            return False
    return True


def warn_of_untrained(task: Task[Any]) -> None:
    """Warn of parameters that nothing trains, although they are not frozen."""
    trained = {p for _, one in each(task.optimizers) for group in one.param_groups for p in group["params"]}
    for name, network in task.networks.items():
        left = sum(p.requires_grad and p not in trained for p in network.parameters())
        if left and not isinstance(network, AveragedModel):
            warn(f"{left} parameters of {name!r} are in no optimizer")


def run_record(task_type: type[Task[Any]], config: Config, given: str = "") -> RunRecord:
    """What `config.json` is to hold."""
    values, usual = as_json(config), as_json(task_type.presets[config.preset])
    differing = (name for name, value in values.items() if usual[name] != value)
    changed = {name: usual[name] for name in differing if name not in ("preset", "run_dir")}
    return RunRecord(task_type.name, sys.argv[0], values, changed, task_given=given)
