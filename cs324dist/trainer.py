"""The one loop: step, log, evaluate, checkpoint, stop."""

import math
import sys
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from cs324dist.distributed.process import on_main_process
from cs324dist.distributed.stop import StopRequest
from cs324dist.errors import RunFailed, UserError, printable
from cs324dist.loss_scale import SkippedSteps
from cs324dist.progress import Progress
from cs324dist.runs.checkpoints import (
    TrainerState,
    read_checkpoint,
    rewrite_state,
    write_checkpoint,
)
from cs324dist.runs.run_dir import RunDir
from cs324dist.tasks.base import Task, optimizer_tensors
from cs324dist.trackers import Logbook


def train(
    task: Task, run: RunDir, accelerator: Accelerator, stop: StopRequest, start: TrainerState
) -> int | None:
    """Take the steps after `start`; returns the step that a signal stopped it after, None if none did.

    Raises:
        RunFailed: a metric or a weight is not finite, or the last checkpoint could not be written.
    """
    settings, logbook = task.settings, Logbook(run, accelerator)
    skipped = SkippedSteps(accelerator.scaler, accelerator.device)

    with Progress(start.step, settings, accelerator) as progress:

        def evaluated(completed: int) -> bool:
            with progress.paused():
                evaluation = task.evaluate(stop.until_stopped)
                if whole := not stop.interrupted():
                    logbook.log_evaluation(completed, evaluation)
            return whole

        if start.evaluation_owed:
            if not evaluated(start.step):
                return start.step
            on_main_process(accelerator, lambda: _settle(run, start))
        for completed in range(start.step + 1, settings.steps + 1):
            metrics = {**task.step(completed - 1), **skipped.observe()}
            if settings.is_due(completed, settings.log_every):
                values = progress.read(completed, metrics)
                logbook.log(completed, values)
                for name, value in values.items():
                    if not math.isfinite(value):
                        raise _diverged(run, f"{name} is {value} after step {completed}")
            owed = settings.is_due(completed, settings.evaluate_every) and not evaluated(completed)
            stopping = stop.agreed() or owed
            if stopping or settings.is_due(completed, settings.checkpoint_every):
                with progress.paused():
                    save(task, run, accelerator, completed, evaluation_owed=owed)
            if stopping and (owed or completed < settings.steps):
                return completed
    return None


def save(
    task: Task, run: RunDir, accelerator: Accelerator, completed: int, *, evaluation_owed: bool = False
) -> None:
    """Write a checkpoint: every rank enters, the main process writes, all wait.

    Raises:
        RunFailed: something is not finite, or it is the last checkpoint and cannot be written.
    """
    scaler = accelerator.scaler

    def write() -> None:
        try:
            state = TrainerState(
                step=completed,
                world_size=accelerator.num_processes,
                generation=run.generation,
                counters=task.counters,
                loss_scale=scaler.state_dict() if scaler is not None and scaler.is_enabled() else {},
                metrics_lines=run.write_metrics(sync=True),
                evaluation_owed=evaluation_owed,
            )
            write_checkpoint(run.checkpoint(completed), task.models, optimizer_tensors(task), state)
        except OSError as error:
            text = f"no checkpoint of step {completed}: {error.strerror}; {_last_good(run)}"
            if completed == task.settings.steps:
                raise RunFailed(f"{text}; make room, then run the same command again") from None
            print(f"warning: {text}", file=sys.stderr)
        except RunFailed as failure:
            raise _diverged(run, str(failure)) from None
        else:
            run.write_status("running", completed)
            run.keep_newest(task.settings.keep_last)

    on_main_process(accelerator, write)


def _settle(run: RunDir, start: TrainerState) -> None:
    """Write down that the evaluation is no longer owed; if that fails, the next start evaluates once more."""
    try:
        lines, generation = run.write_metrics(sync=True), run.generation
        state = replace(start, evaluation_owed=False, metrics_lines=lines, generation=generation)
        rewrite_state(run.checkpoint(start.step), state)
    except OSError as error:
        print(f"warning: {run.checkpoint(start.step)} stays as it is: {error.strerror}", file=sys.stderr)


def resume(task: Task, run: RunDir, accelerator: Accelerator) -> TrainerState:
    """Read the newest valid checkpoint, if there is one, into `task`; returns where it stands.

    Raises:
        UserError: no checkpoint is valid, or the newest is another model's, or metrics before it are damaged.
    """
    optimizer_tensors(task)  # all of the state, before a first step makes that of the parameters it uses
    newest = on_main_process(accelerator, run.newest_checkpoint)
    if newest is None:
        return TrainerState(0, accelerator.num_processes)
    state = restore(task, newest, accelerator)
    on_main_process(accelerator, lambda: run.check_metrics(state.metrics_lines))
    return state


def restore(task: Task, checkpoint: Path, accelerator: Accelerator) -> TrainerState:
    """Read a checkpoint into `task`.

    Raises:
        UserError: it is damaged, or another model's.
    """
    state = read_checkpoint(checkpoint, task.models, optimizer_tensors(task))
    limits = task.counter_limits
    if state.counters.keys() != limits.keys() or any(n not in limits[k] for k, n in state.counters.items()):
        raise UserError(f"{checkpoint} has counters that this run cannot reach: {printable(state.counters)}")
    task.counters.update(state.counters)
    if state.loss_scale and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(dict(state.loss_scale))
    return state


def _diverged(run: RunDir, what: str) -> RunFailed:
    return RunFailed(
        f"{what}; {_last_good(run)}", "for another outcome, lower the learning rate in a new --run-dir"
    )


def _last_good(run: RunDir) -> str:
    newest = run.newest()
    return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
