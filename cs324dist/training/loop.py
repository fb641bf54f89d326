"""The one loop: step, log, evaluate, checkpoint, stop."""

from accelerate import Accelerator

from cs324dist.runs.checkpoints import TrainerState, keep_newest, read_checkpoint, write_checkpoint
from cs324dist.runs.folder import RunFolder
from cs324dist.training.loss_scale import SkippedSteps
from cs324dist.training.preemption import StopRequest
from cs324dist.training.process import on_main_process
from cs324dist.training.progress import Progress
from cs324dist.training.task import Task, optimizer_tensors
from cs324dist.training.tracking import Logbook


def train(task: Task, run: RunFolder, accelerator: Accelerator, logbook: Logbook, start: int) -> int:
    """Take the steps after the first `start`; returns how many are completed: not all, after a signal."""
    settings = task.settings
    skipped = SkippedSteps(accelerator.scaler, accelerator.device)

    with Progress(start, settings, accelerator) as progress, StopRequest(accelerator.num_processes) as stop:
        for completed in range(start + 1, settings.steps + 1):
            metrics = {**task.step(completed - 1), **skipped.observe()}
            if settings.is_due(completed, settings.log_every):
                logbook.log(completed, progress.read(completed, metrics))
            if settings.is_due(completed, settings.evaluate_every):
                with progress.paused():
                    logbook.log_evaluation(completed, task.evaluate())
            stopping = stop.agreed()
            if stopping or settings.is_due(completed, settings.checkpoint_every):
                with progress.paused():
                    save(task, run, accelerator, completed)
            if stopping:
                return completed
    return settings.steps


def save(task: Task, run: RunFolder, accelerator: Accelerator, completed: int) -> None:
    """Write a checkpoint: every rank enters, the main process writes, all wait."""
    scaler = accelerator.scaler
    state = TrainerState(
        step=completed,
        world_size=accelerator.num_processes,
        counters=task.counters,
        loss_scale=scaler.state_dict() if scaler is not None and scaler.is_enabled() else {},
    )

    def write() -> None:
        write_checkpoint(run.checkpoint(completed), task.models, optimizer_tensors(task), state)
        keep_newest(run.checkpoints, task.settings.keep_last)
        run.write_status("running", completed)

    on_main_process(accelerator, write)


def resume(task: Task, run: RunFolder, accelerator: Accelerator) -> int:
    """Read the newest valid checkpoint, if there is one, into `task`; returns the completed steps."""
    newest = on_main_process(accelerator, run.newest_checkpoint)
    if newest is None:
        return 0
    state = read_checkpoint(newest, task.models, optimizer_tensors(task))
    task.counters.update(state.counters)
    if state.loss_scale and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(dict(state.loss_scale))
    return state.step
