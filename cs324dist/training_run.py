"""From a command line to a finished run: what every training script calls."""

import json
import sys
from collections.abc import Callable, Mapping

from accelerate import Accelerator

from cs324dist.distributed.failures import ProcessLost, translate_errors
from cs324dist.distributed.process import on_main_process, start_accelerator
from cs324dist.distributed.stop import StopRequest
from cs324dist.errors import EXIT_STOPPED, UserError, errors_as_exit_codes, exit_process
from cs324dist.runs.checkpoints import TrainerState, check_names
from cs324dist.runs.lease import Superseded
from cs324dist.runs.run_dir import RunDir
from cs324dist.settings import Settings, conflicts, from_command_line
from cs324dist.tasks.base import Task
from cs324dist.trackers import end_tracking, start_tracking
from cs324dist.trainer import resume, train

Build = Callable[[Settings, Accelerator], Task]


def main(task: str, build: Build[Settings], presets: Mapping[str, Settings], description: str) -> None:
    """Train the task that `build` makes; exits with 0 when done, 2 when refused, 75 when stopped early."""
    with errors_as_exit_codes():
        settings = from_command_line(presets, description)
        if settings.dry_run:
            print(json.dumps({**settings.as_json(), "run_dir": str(settings.folder)}, indent=2))
            return
        accelerator = start_accelerator(settings.batch_size, settings.peer_timeout)
        with StopRequest(accelerator.num_processes, settings.peer_timeout) as stop:
            try:
                with translate_errors(settings):
                    done = run_to_the_end(task, build, settings, accelerator, stop)
            finally:
                end_tracking(accelerator)
        exit_process(0 if done else EXIT_STOPPED)


def run_to_the_end(
    name: str, build: Build[Settings], settings: Settings, accelerator: Accelerator, stop: StopRequest
) -> bool:
    """Start or continue the run in `settings.folder`; returns False if a signal stopped it early.

    Raises:
        UserError: the folder belongs to another task, other settings or a live process, or is damaged, or
            cannot be written to.
        RunFailed: the run cannot go on.
    """
    run, started = RunDir(settings.folder), False

    def check_fits() -> None:
        run.check_fits(name, lambda stored: conflicts(settings, stored))

    on_main_process(accelerator, check_fits)
    task = build(settings, accelerator)
    check_names(task.models)
    on_main_process(accelerator, run.claim)
    try:
        # once more: another process may have had the folder in the meantime
        on_main_process(accelerator, check_fits)
        start = resume(task, run, accelerator)
        if start.step >= settings.steps and not start.evaluation_owed:
            on_main_process(accelerator, lambda: run.finish(start.step, settings.keep_last))
            _say(
                accelerator,
                f"{run} is finished, {start.step} steps: for more, give --steps or another --run-dir",
            )
            return True
        stop.listen()
        started = True
        on_main_process(accelerator, lambda: run.open(name, settings.as_json(), accelerator.mixed_precision))
        on_main_process(accelerator, lambda: run.rewind(start.step, start.metrics_lines))
        _say(
            accelerator,
            f"{run}: {'continuing from' if start.step else 'starting at'} step {start.step} "
            f"of {settings.steps}, "
            f"processes: {accelerator.num_processes}, device: {accelerator.device.type}, "
            f"precision: {accelerator.mixed_precision}",
        )
        start_tracking(accelerator, settings, run)
        return _train_and_record(task, run, accelerator, stop, start)
    finally:
        run.release(unused=not started)


def _train_and_record(
    task: Task, run: RunDir, accelerator: Accelerator, stop: StopRequest, start: TrainerState
) -> bool:
    try:
        with translate_errors(task.settings):
            stopped_at = train(task, run, accelerator, stop, start)
    except Superseded:
        raise
    except BaseException as error:
        # A signal to stop all, which others obeyed sooner; not the launcher's, that follows the end of one.
        stopped = stop.received_before_the_last_vote and isinstance(error, ProcessLost)
        if accelerator.is_main_process:
            why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            run.write_status("stopped" if stopped else "failed", run.newest_step(), why)
        if stopped:
            return False
        raise
    if stopped_at is None:
        steps = task.settings.steps
        on_main_process(accelerator, lambda: run.write_status("finished", steps))
        _say(accelerator, f"{run}: finished after {steps} steps")
        return True
    on_main_process(
        accelerator, lambda: run.write_status("stopped", run.newest_step(), "a signal asked for it")
    )
    _say(accelerator, f"{run}: stopped after {stopped_at} steps; run the same command to go on")
    return False


def _say(accelerator: Accelerator, text: str) -> None:
    if accelerator.is_main_process:
        print(text, file=sys.stderr, flush=True)
