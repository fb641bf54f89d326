"""What every run does: own its folder, go on from a checkpoint, log, save, compare, and stop."""

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from cs324dist.data.streams import generators_kept, seed_everything
from cs324dist.distributed.checks import LOOK_FOR, differences, gather_objects, held
from cs324dist.distributed.exact import exact_of
from cs324dist.distributed.failures import ProcessLost, keep_collectives, translate_errors
from cs324dist.distributed.process import compare_environments, compiled_by, on_main_process, say_idle_cores
from cs324dist.distributed.stop import Stopped, StopRequest
from cs324dist.errors import EXIT_STOPPED, ReportedError, RunFailed, UserError, end_with, in_words, say
from cs324dist.metrics import as_numbers
from cs324dist.runs.checkpoints import Trained, check_names
from cs324dist.runs.environment import environment
from cs324dist.runs.hidden_state import HiddenState
from cs324dist.runs.history import metric_of
from cs324dist.runs.lease import Superseded
from cs324dist.runs.records import RunRecord
from cs324dist.runs.run_dir import RunDir
from cs324dist.runs.saving import Saving
from cs324dist.trackers import Trackers

RunT = TypeVar("RunT", bound="BaseRun")


class BaseRun:
    """A folder that owns the state of a training loop; see `Run`, and for a task `TaskRun`."""

    step = 0
    """Steps that have been completed."""
    is_over = False
    """Whether the loop has ended before its last step."""
    _session: Any = None
    _is_started = _in_step = _save_asked = _stop_asked = False
    _until = _metrics_lines = 0

    def __init__(
        self,
        folder: Path,
        trained: Trained,
        accelerator: Accelerator,
        config: Mapping[str, Any],
        *,
        seed: int | None = None,
        batch_size: int | None = None,
        keep_last: int,
        keep_best: str,
        wandb: str,
        tensorboard: bool,
        peer_timeout: int,
    ) -> None:
        check_names(trained.networks)
        self.best_metric = metric_of(keep_best)
        self.dir, self.trained, self.accelerator = RunDir(folder), trained, accelerator
        self.keep_last, self.keep_best, self.peer_timeout = keep_last, keep_best, peer_timeout
        self.exact = exact_of(trained.networks.values())
        self.parts = self.exact.parts if self.exact else None
        self._config, self._seed = dict(config), seed
        self._trackers_of_run = partial(
            Trackers,
            self.dir,
            accelerator,
            config=self._config,
            batch_size=batch_size,
            wandb=wandb,
            tensorboard=tensorboard,
        )
        self._on_main = partial(on_main_process, accelerator)
        self._how = accelerator.num_processes, accelerator.mixed_precision, compiled_by(accelerator)

    def __enter__(self: RunT) -> RunT:
        self.step = self._until = self._metrics_lines = 0
        self.is_over = self._is_started = self._in_step = self._save_asked = self._stop_asked = False
        self._began = time.monotonic()
        self._session = self._opened()
        self._session.__enter__()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        session, self._session = self._session, None
        return session.__exit__(*error)

    @contextmanager
    def _opened(self) -> Iterator[None]:
        compare_environments(environment(*self._how, commit=False), exact=self.exact is not None)
        with (
            StopRequest(self.accelerator.num_processes, self.peer_timeout, self._end_alone) as self._stop,
            ExitStack() as self._stack,
            self.dir.claimed(self._check_fits, self._on_main),
            generators_kept(self.accelerator.device),
        ):
            self._seed = torch.initial_seed() if self._seed is None else self._seed
            if not hasattr(self, "saving"):  # it compares with the first start
                parts = (self.parts.of(), self.parts.count) if self.parts else ()
                hidden, keep = HiddenState(self.trained, *parts), (self.keep_last, self.keep_best)
                self.saving = Saving(self.dir, self.trained, self.accelerator, hidden, *keep)
            self._restore()
            with self._ending_recorded(), translate_errors(self.peer_timeout):
                yield
                if self._in_step:  # a `break`
                    self.step, self._in_step, self.is_over = self.completed, False, True
                    self._write()
                if self._until:  # `steps` was called
                    self._on_main(lambda: self.saving.finish(self.step))
                    self._say_last(self._end_in_words())

    def _check_fits(self) -> None:
        """Check that the folder is new, or holds this run."""
        raise NotImplementedError

    def _record(self) -> RunRecord:
        """What `config.json` is to hold."""
        raise NotImplementedError

    def _for_more(self) -> str:
        """What to say to somebody who starts a finished run again."""
        raise NotImplementedError

    def _restore(self) -> None:
        """Read the newest valid checkpoint, if there is one."""
        newest = self._on_main(self.dir.newest_checkpoint)
        if newest is None:
            self._on_main(self.saving.check)
            self.compare()
            return
        state = self.saving.read(newest)
        self.step, self._metrics_lines, self.is_over = state.step, state.metrics_lines, state.is_over

    def steps(self, until: int, save_every: int) -> Iterator[int]:
        """The steps that are left, counted from 0; the body of the loop takes each.

        Before each step, the generators of torch, numpy and random are seeded from the seed of the run and
        the step. After it, a checkpoint is written if one is due.

        Args:
            until: steps in total.
            save_every: steps between checkpoints; the last step is always saved.

        Raises:
            UserError: outside of `with`, or `save_every` is not positive.
            RunFailed: processes differ, or a weight is not finite.
        """
        if self._session is None or save_every < 1:
            raise UserError("steps belongs inside `with run`, with a save_every of at least 1")
        self._until = until
        is_left = self.step < until and not self.is_over
        # Behind the loop there may be more to log, unless an earlier start has gone past it.
        if is_left or (self.step <= until and not self._on_main(self.dir.is_finished)):
            self._start()
            self.trackers.go_on(until)  # `steps` may have been called before, for fewer
        first = self.step
        while self.step < until and not self.is_over:
            seed_everything(self._seed or 0, f"step {self.step}", self.accelerator.device)
            self._in_step = True
            yield self.step
            self._in_step = False
            self.step += 1
            self.trackers.advance()
            if self.step == first + 1:
                self.compare()
                self.saving.hidden.changed()  # notes what this step has made, which may change later
            stopping = self._stop.agreed() or self._stop_asked
            if stopping or self._is_to_be_saved() or self.step % save_every == 0 or self.step == until:
                self._write()
            if stopping and (self._stop_asked or self.step < until):
                self._end_stopped()

    def _start(self) -> None:
        """Before the first step: record what runs, and listen to signals."""
        if self._is_started:
            return
        self._stop.listen()
        processes, precision, _ = self._how
        self._on_main(
            lambda: self.dir.start(
                self._record(),
                environment(*self._how),
                self.step,
                self._metrics_lines,
                is_exact=self.exact is not None,
            )
        )
        self._is_started = True
        self._say(
            f"{self.dir}: {'continuing from' if self.step else 'starting at'} step {self.step} of "
            f"{self._until}, processes: {processes}, device: {self.accelerator.device.type}, "
            f"precision: {'float32' if precision == 'no' else precision}"
        )
        if self.exact and self.accelerator.is_main_process:
            say_idle_cores(self.exact.parts.count)
        self.trackers = self._stack.enter_context(self._trackers_of_run(start=self.step, until=self._until))

    @property
    def completed(self) -> int:
        """The completed steps, with the one that the loop's body takes now."""
        return self.step + self._in_step

    def log(self, metrics: Mapping[str, float | Tensor] | None = None, /, **more: float | Tensor) -> None:
        """Log metrics of this step: in the terminal, in `metrics.jsonl`, to other trackers.

        Every process may call it; the main process writes its own. Reading a tensor waits for the device.
        Behind a loop whose steps an earlier start has taken, it does nothing.

        Raises:
            UserError: before `steps`, or a value is no number, or is called "step".
        """
        values = {**(metrics or {}), **more}
        if not self._until:
            raise UserError("log was called before the first step: call it in the loop over run.steps(…)")
        if "step" in values:
            raise UserError("log was given step=…, which each line has anyway: leave it out")
        if not self._is_started:
            return
        if self.accelerator.is_main_process:
            self.trackers.log_step(self.completed, as_numbers(values))
        if self.best_metric in values:
            self.save()

    def save(self) -> None:
        """Ask for a checkpoint at the end of this step."""
        self._save_asked = True

    def _is_to_be_saved(self) -> bool:
        return self._save_asked

    def _end_stopped(self) -> None:
        why = "a signal asked for it"
        self._on_main(lambda: self.dir.write_status("stopped", self.dir.newest_step(), why))
        self._say_last(f"{self.dir}: stopped after {self.step} steps; run the same command to go on")
        raise Stopped

    def compare(self, found: Mapping[str, Any] | None = None) -> None:
        """Check that `found` is the same on all processes; by default, all that a checkpoint would hold.

        Without `ExactGradients`, buffers are first copied from rank 0, as in torch's DDP.

        Raises:
            RunFailed: naming what differs, and the ranks.
        """
        if self.accelerator.num_processes == 1:
            return
        found = held(self.trained, buffers_from_first=self.exact is None) if found is None else found
        where = f"after step {self.completed}"
        if lines := differences(gather_objects(found, where), with_values=False):
            raise RunFailed(f"{where}, {lines[0]} ({len(lines)} of {len(found)} differ): {LOOK_FOR}")

    def _write(self) -> None:
        """Write a checkpoint; called on every process, and the main process writes.

        Raises:
            RunFailed: a value is not finite, or the last checkpoint cannot be written.
        """
        began = time.monotonic()
        with self.trackers.paused():
            self.compare()
            hidden = self.saving.hidden.changed(partial(gather_objects, where="where it is saved"))
            ends = {"is_over": self.is_over, "is_last": self.is_over or self.completed >= self._until}
            self._on_main(lambda: self.saving.write(self.completed, hidden, **ends))
        self._save_asked = False
        self.saving.seconds += time.monotonic() - began

    @contextmanager
    def _ending_recorded(self) -> Iterator[None]:
        """Write to `status.json` how the run failed, if it does."""
        try:
            yield
        except (Superseded, Stopped):
            raise
        except BaseException as error:
            with suppress(ValueError):  # not the main thread; torch's handler raises again for a dead worker
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if self._in_step and not isinstance(error, ReportedError):
                error.add_note(f"in step {self.completed}")
            if self._record_end(error):
                raise Stopped from error
            raise

    def _record_end(self, error: BaseException) -> bool:
        """Record how the run has ended; returns whether a signal has stopped it."""
        # Others may have obeyed a signal sooner. The launcher's own signal, after a failure, is no stop.
        stopped = self._stop.received_before_the_last_vote and isinstance(error, ProcessLost)
        if self._is_started and self.accelerator.is_main_process:
            why = str(error) if isinstance(error, ReportedError) else in_words(error)
            self.dir.write_status("stopped" if stopped else "failed", self.dir.newest_step(), why)
        if isinstance(error, ProcessLost) and self._is_started:
            keep_collectives(self.dir.path)
        return stopped

    def _end_alone(self, error: ProcessLost) -> None:
        """End the process from another thread, while the main one waits for a lost process."""
        if self._record_end(error):
            error.exit_code = EXIT_STOPPED
        end_with(error)

    def _end_in_words(self) -> str:
        if not self._is_started:
            return f"{self.dir} is finished, {self.step} steps: {self._for_more()}"
        of = f" of {self._until}" if self.step < self._until else ""
        return f"{self.dir}: finished after {self.step}{of} steps{self._on_main(self.saving.best_in_words)}"

    def _say_last(self, text: str) -> None:
        """Print a line after the progress bar and the trackers have ended."""
        self._stack.close()
        if costs := self.saving.costs(time.monotonic() - self._began):
            self._say(costs)
        self._say(text)

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            say(text)
