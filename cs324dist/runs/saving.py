"""What a run saves: its state after a step, and which checkpoints stay."""

from pathlib import Path

from accelerate import Accelerator

from cs324dist.errors import RunFailed, warn
from cs324dist.runs.checkpoints import (
    Trained,
    TrainerState,
    check_that_it_can_be_saved,
    difference,
    layout,
    read_checkpoint,
    write_checkpoint,
)
from cs324dist.runs.hidden_state import Hidden, HiddenState
from cs324dist.runs.history import metric_of
from cs324dist.runs.run_dir import RunDir


class Saving:
    """Reads and writes the checkpoints of a run."""

    def __init__(
        self,
        run: RunDir,
        trained: Trained,
        accelerator: Accelerator,
        hidden: HiddenState,
        keep_last: int,
        keep_best: str,
    ) -> None:
        """Of what is trained, as it is before the first step; for the last two see `RunDir.keep_newest`."""
        self._run, self._trained, self._accelerator = run, trained, accelerator
        self._keep = keep_last, keep_best
        self.seconds = 0.0  # in which the run waited for checkpoints
        self.hidden, self._layout = hidden, layout(trained)

    def check(self) -> None:
        """Check that the state of the run can be saved; raises as `check_that_it_can_be_saved` does."""
        check_that_it_can_be_saved(self._run.scratch, self._trained)

    def read(self, checkpoint: Path) -> TrainerState:
        """Go on from a checkpoint; raises as `read_checkpoint` does."""
        return read_checkpoint(checkpoint, self._trained, self.hidden, self._accelerator.scaler)

    def write(self, step: int, hidden: Hidden, *, is_over: bool, is_last: bool) -> None:
        """Write the checkpoint after `step`, with what is `hidden`, and delete the ones that are not kept.

        Raises:
            RunFailed: a value is not finite, or the last checkpoint cannot be written.
        """
        if line := difference(self._layout, layout(self._trained)):
            raise RunFailed(f"after step {step}, {line}; {self.last_good()}")
        scaler = self._accelerator.scaler
        try:
            state = TrainerState(
                step=step,
                processes=self._accelerator.num_processes,
                loss_scale=scaler.state_dict() if scaler is not None and scaler.is_enabled() else {},
                metrics_lines=self._run.write_metrics(sync=True),
                hidden=hidden,
                is_over=is_over,
            )
            write_checkpoint(self._run.checkpoint(step), self._trained, state, self._run)
        except OSError as error:
            text = f"no checkpoint of step {step}: {error.strerror}; {self.last_good()}"
            if is_last:
                raise RunFailed(f"{text}; make room, then run the same command again") from None
            warn(text)
        except RunFailed as failure:
            raise self.diverged(str(failure)) from None
        else:
            self._run.write_status("running", step)
            self._run.keep_newest(*self._keep)

    def finish(self, step: int) -> None:
        """Mark the run finished; see `RunDir.finish`."""
        self._run.finish(step, *self._keep)

    def best_in_words(self) -> str:
        """Where the best checkpoint is, for the end of a sentence; empty if none is wanted."""
        if not (metric := metric_of(self._keep[1])):
            return ""
        if best := self._run.best(self._keep[1]):
            return f"; the best {metric}, {best[1]:.6g}, is that of {best[0]}"
        return f"; no checkpoint has a value of {metric} (keep_best)"

    def costs(self, took: float) -> str:
        """What to say of the time that checkpoints took, of all seconds; nothing if it does not matter."""
        if self.seconds <= max(10, took / 10):
            return ""
        return (
            f"checkpoints took {self.seconds:.0f} of {took:.0f} s: fewer of them cost less "
            f"(--checkpoint-every, in a loop of your own save_every)"
        )

    def diverged(self, what: str) -> RunFailed:
        """The error for values that are not finite."""
        advice = "for another outcome, lower the learning rate in a new run folder"
        return RunFailed(f"{what}; {self.last_good()}", advice)

    def last_good(self) -> str:
        """What to say of the newest checkpoint."""
        newest = self._run.newest()
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
