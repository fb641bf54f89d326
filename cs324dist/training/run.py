"""From a command line to a finished run: what every training script calls."""

import json
import sys
from collections.abc import Callable, Mapping

from accelerate import Accelerator

from cs324dist.errors import EXIT_STOPPED, refusals_as_exit_code
from cs324dist.runs.folder import RunFolder
from cs324dist.training.loop import resume, train
from cs324dist.training.process import leave, on_main_process, start_accelerator
from cs324dist.training.settings import Settings, conflicts, from_command_line
from cs324dist.training.task import Task
from cs324dist.training.tracking import Logbook, start_tracking

Build = Callable[[Settings, Accelerator], Task]


def main(task: str, build: Build[Settings], presets: Mapping[str, Settings], description: str) -> None:
    """Train the task that `build` makes; exits with 0 when done, 2 when refused, 75 when stopped early."""
    with refusals_as_exit_code():
        settings = from_command_line(presets, description)
        if settings.dry_run:
            print(json.dumps({**settings.as_json(), "run_dir": str(settings.folder)}, indent=2))
            return
        accelerator = start_accelerator(settings.batch_size)
        try:
            done = run_to_the_end(task, build, settings, accelerator)
        except BaseException:
            accelerator.end_training()
            raise
        leave(accelerator, 0 if done else EXIT_STOPPED)


def run_to_the_end(name: str, build: Build[Settings], settings: Settings, accelerator: Accelerator) -> bool:
    """Start or continue the run in `settings.folder`; returns False if a signal stopped it early.

    Raises:
        Refused: the folder belongs to another task or other settings, or cannot be written to.
    """
    run = RunFolder(settings.folder)
    on_main_process(accelerator, lambda: run.check_fits(name, lambda stored: conflicts(settings, stored)))
    task = build(settings, accelerator)
    on_main_process(accelerator, lambda: run.open(name, settings.as_json()))
    start = resume(task, run, accelerator)
    if start >= settings.steps:
        _say(accelerator, f"{run} is finished, {start} steps: for more, give --steps or another --run-dir")
        return True
    on_main_process(accelerator, lambda: run.go_back_to(start))
    _say(
        accelerator,
        f"{run}: {'continuing from' if start else 'starting at'} step {start} of {settings.steps}, "
        f"processes: {accelerator.num_processes}, device: {accelerator.device.type}, "
        f"precision: {accelerator.mixed_precision}",
    )
    start_tracking(accelerator, settings, run)
    return _train_and_record(task, run, accelerator, start)


def _train_and_record(task: Task, run: RunFolder, accelerator: Accelerator, start: int) -> bool:
    try:
        reached = train(task, run, accelerator, Logbook(run, accelerator), start)
    except BaseException as error:
        if accelerator.is_main_process:
            run.write_status("failed", run.newest_step(), f"{type(error).__name__}: {error}")
        raise
    done = reached == task.settings.steps
    if done:
        on_main_process(accelerator, lambda: run.write_status("finished", reached))
        _say(accelerator, f"{run}: finished after {reached} steps")
    else:
        on_main_process(accelerator, lambda: run.write_status("stopped", reached, "a signal asked for it"))
        _say(accelerator, f"{run}: stopped after {reached} steps; run the same command to go on")
    return done


def _say(accelerator: Accelerator, text: str) -> None:
    if accelerator.is_main_process:
        print(text, file=sys.stderr, flush=True)
