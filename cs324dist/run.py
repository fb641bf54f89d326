"""A run of a training loop: one owner, checkpoints, metrics, signals, and how it ended."""

import json
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from cs324dist.data.streams import seed_everything
from cs324dist.distributed.checks import checksums, differences, gather_objects
from cs324dist.distributed.failures import ProcessLost, translate_errors
from cs324dist.distributed.gradients import LOOK_FOR, exact_of
from cs324dist.distributed.process import (
    accelerator_of_script,
    compare_environments,
    compiled_by,
    on_main_process,
)
from cs324dist.distributed.stop import StopRequest
from cs324dist.errors import EXIT_STOPPED, ReportedError, RunFailed, UserError, printable, say, warn
from cs324dist.runs.checkpoints import (
    Trained,
    TrainerState,
    check_names,
    layout,
    plain_state,
    read_checkpoint,
    tensors_by_file,
    write_checkpoint,
)
from cs324dist.runs.environment import environment
from cs324dist.runs.files import clear
from cs324dist.runs.hidden_state import HiddenState
from cs324dist.runs.lease import Superseded
from cs324dist.runs.optimizers import Optimizers, each, with_full_state
from cs324dist.runs.run_dir import LOOP, RunDir, RunRecord
from cs324dist.trackers import Trackers


class Stopped(SystemExit):
    """A signal has stopped the run, which is saved: run the same command again to go on."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


@runtime_checkable
class Stateful(Protocol):
    """Such as a scheduler."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers, words and tensors, nested in dictionaries and lists."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take over what `state_dict` gave."""


class Run:
    """A folder that owns the state of a training loop.

        with run:
            for step in run.steps(1000, save_every=100):
                ...
                run.log(loss=loss)

    Inside, no other process writes into the folder, and networks, optimizers and states are what the newest
    checkpoint holds. `break` saves and finishes. SIGTERM, SIGINT and SIGUSR1 save after the step, and end the
    process with exit code 75; give the same command again to go on, on any number of processes.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        networks: Mapping[str, nn.Module],
        optimizers: Optimizers,
        states: Mapping[str, Stateful] | None = None,
        config: Mapping[str, Any] | None = None,
        may_change: Iterable[str] = (),
        accelerator: Accelerator | None = None,
        keep_last: int = 3,
        keep_best: str = "",
        wandb: str = "disabled",
        tensorboard: bool = False,
        peer_timeout: int = 600,
    ) -> None:
        """Describe it; nothing is read or written before `with`.

        Args:
            folder: of the run; a new or empty one, or one that holds this run.
            networks: by name; those that DDP or torch.compile has wrapped are saved without it.
            optimizers: by name.
            states: what else has a state, by name, such as a scheduler.
            config: settings, which `config.json` records. A run goes on only with the same ones.
            may_change: names of settings that may differ when it goes on, such as "steps".
            accelerator: of the loop; by default one is made.
            keep_last: number of newest checkpoints that are kept.
            keep_best: a metric, of which the best checkpoint is kept as well; `METRIC:min`: the smallest.
            wandb: Weights & Biases: online (offline if there is no login or network), offline or disabled.
            tensorboard: whether to write the metrics for TensorBoard too.
            peer_timeout: seconds without an answer from another process after which the run ends.

        Raises:
            UserError: a name that no checkpoint can hold, or a setting that JSON cannot.
        """
        self.accelerator = accelerator_of_script(accelerator, peer_timeout=peer_timeout)
        self.dir, self.peer_timeout = RunDir(Path(folder)), peer_timeout
        self.keep_last, self.keep_best = keep_last, keep_best
        self.trained: Any = _Loop(networks, optimizers, states or {})
        exact = exact_of(self.trained.networks.values())
        self.is_exact = exact is not None
        self.step = 0
        """Steps that have been completed."""
        self.is_over = False
        """Whether the loop has ended before its last step."""
        self._config, self._may_change = _plain(config or {}), {*may_change, "keep_best"}
        self._made_of = {"gradients": str(exact) if exact else "of the loop", "keep_best": keep_best}
        self._made_of |= self.trained.kinds()
        self._tracking: dict[str, Any] = {"wandb": wandb, "tensorboard": tensorboard, "config": self._config}
        self._on_main = partial(on_main_process, self.accelerator)
        used = self.accelerator
        self._how = used.num_processes, used.mixed_precision, compiled_by(used)
        self._session: Any = None
        self._is_started = self._in_step = self._save_asked = self._stop_asked = False
        self._until = 0
        self._metrics_lines = 0
        check_names(networks)

    def __enter__(self) -> "Run":
        self._session = self._opened()
        self._session.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        session, self._session = self._session, None
        return session.__exit__(kind, error, trace)

    @contextmanager
    def _opened(self) -> Iterator[None]:
        compare_environments(environment(*self._how, commit=False), exact=self.is_exact)
        with (
            StopRequest(self.accelerator.num_processes, self.peer_timeout) as self._stop,
            ExitStack() as self._stack,
            self.dir.claimed(self._check_fits, self._on_main),
        ):
            self._seed = torch.initial_seed()
            self.hidden = HiddenState(self.trained, with_rates=isinstance(self.trained, _Loop))
            self._restore()
            with self._ending_recorded(), translate_errors(self.peer_timeout):
                yield
                if self._in_step:  # a `break`
                    self._end()
                if self._is_started:
                    self._say_last(self._on_main(self._finish))

    def _check_fits(self) -> None:
        if not self.dir.check_holds(LOOP):
            return
        record = self.dir.read_record()
        stored, now = {**record.config, **record.made_of}, {**self._config, **self._made_of}
        if lines := [
            f"{name} = {printable(now.get(name))} differs from the run's {printable(stored.get(name))}: "
            f"give the run's value, another folder, or may_change"
            for name in {**now, **stored}
            if name not in self._may_change and now.get(name) != stored.get(name)
        ]:
            raise UserError(*lines)

    def _record(self) -> RunRecord:
        """What `config.json` is to hold."""
        return RunRecord(LOOP, sys.argv[0], self._config, {}, made_of=self._made_of)

    def _restore(self) -> None:
        """Read the newest valid checkpoint, if there is one.

        Raises:
            UserError: no checkpoint is valid, or it is of other networks, or metrics before it are damaged.
        """
        self._layout = layout(self.trained)
        newest = self._on_main(self.dir.newest_checkpoint)
        if newest is None:
            self._on_main(self._check_that_it_can_be_saved)
            self.compare()
            return
        state = restore(newest, self.trained, self.hidden, self.accelerator)
        self.step, self._metrics_lines, self.is_over = state.step, state.metrics_lines, state.is_over

    def _check_that_it_can_be_saved(self) -> None:
        scratch = self.dir.scratch
        clear(scratch)
        try:
            with with_full_state(self.trained.optimizers):
                write_checkpoint(scratch / "0", self.trained, TrainerState(0))
                read_checkpoint(scratch / "0", self.trained)
        except ReportedError:
            raise
        except OSError as error:
            raise self.dir.unwritable(error) from None
        except Exception as error:
            raise UserError(f"it cannot be saved: {type(error).__name__}: {printable(error)}") from error
        finally:
            clear(scratch)
            with suppress(OSError):  # it holds more
                scratch.parent.rmdir()

    def steps(self, until: int, save_every: int) -> Iterator[int]:
        """The steps that are left, counted from 0: for each, the loop's body takes it.

        Generators of torch, numpy and random are seeded before each from what they were seeded with, and the
        step. At the end of a step, a checkpoint is written where one is due.

        Args:
            until: steps in total.
            save_every: steps between checkpoints; the last step is always saved.

        Raises:
            UserError: outside of `with`, or `save_every` is not positive.
            RunFailed: processes differ, or a weight is not finite.
        """
        if self._session is None or save_every < 1:
            raise UserError("steps belongs inside `with run`, with a save_every of at least 1")
        if self.step >= until or self.is_over:
            if self._is_started:
                return
            self._on_main(lambda: self.dir.finish(self.step, self.keep_last, self.keep_best))
            self._say(f"{self.dir} is finished, {self.step} steps: {self._for_more(until)}")
            return
        self._start(until)
        first = self.step
        while self.step < until and not self.is_over:
            seed_everything(self._seed, f"step {self.step}", self.accelerator.device)
            self._in_step = True
            yield self.step
            self._in_step = False
            self.step += 1
            self.trackers.advance()
            if self.step == first + 1:
                self.compare()
            stopping = self._stop.agreed() or self._stop_asked
            if stopping or self._save_asked or self.step % save_every == 0 or self.step == until:
                self._write()
            if stopping and (self._stop_asked or self.step < until):
                self._end_stopped()

    def _for_more(self, until: int) -> str:
        return "its loop has ended" if self.step < until else "for more, give more steps or another folder"

    def _start(self, until: int) -> None:
        """Write down what is about to run, and listen to signals; `steps` does it."""
        if self._is_started:
            return
        self._until = until
        self._stop.listen()
        accelerator, (processes, precision, _) = self.accelerator, self._how
        self._on_main(
            lambda: self.dir.start(
                self._record(),
                environment(*self._how),
                self.step,
                self._metrics_lines,
                is_exact=self.is_exact,
            )
        )
        self._is_started = True
        self._say(
            f"{self.dir}: {'continuing from' if self.step else 'starting at'} step {self.step} of {until}, "
            f"processes: {processes}, device: {accelerator.device.type}, "
            f"precision: {'float32' if precision == 'no' else precision}"
        )
        self.trackers = self._stack.enter_context(
            Trackers(self.dir, accelerator, start=self.step, until=until, **self._tracking)
        )

    @property
    def completed(self) -> int:
        """The steps that are completed, with the one that the loop's body takes."""
        return self.step + self._in_step

    def log(self, metrics: Mapping[str, float | Tensor] | None = None, /, **more: float | Tensor) -> None:
        """Log what this step has measured: in the terminal, in `metrics.jsonl`, to other trackers.

        The main process writes what it is given; every process may call it. To read a tensor waits for the
        device.

        Raises:
            UserError: no step is being taken, or something is no number.
        """
        if not self._is_started:
            raise UserError("log was called before the first step: call it in the loop over run.steps(…)")
        if self.accelerator.is_main_process:
            values = as_numbers({**(metrics or {}), **more})
            self.trackers.log_step(self.completed, values)

    def _end(self) -> None:
        """Save, and take no further step, now or when the command is given again; `break` does the same."""
        self.step, self._in_step, self.is_over = self.completed, False, True
        self._write()

    def save(self) -> None:
        """Have a checkpoint written at the end of this step, too."""
        self._save_asked = True

    def _end_stopped(self) -> None:
        why = "a signal asked for it"
        self._on_main(lambda: self.dir.write_status("stopped", self.dir.newest_step(), why))
        self._say_last(f"{self.dir}: stopped after {self.step} steps; run the same command to go on")
        raise Stopped

    def compare(self, found: Mapping[str, Any] | None = None) -> None:
        """Check that all processes have found the same; by default that they hold the same.

        Without `ExactGradients`, buffers come from the first process before, as in torch's DDP.

        Raises:
            RunFailed: naming what differs, and the ranks.
        """
        if self.accelerator.num_processes == 1:
            return
        found = self._held() if found is None else found
        where = f"at the end of step {self.completed}"
        if lines := differences(gather_objects(found, where), with_values=False):
            raise RunFailed(
                f"after step {self.completed}, {lines[0]} ({len(lines)} of {len(found)} differ): {LOOK_FOR}"
            )

    def _held(self) -> dict[str, Any]:
        if not self.is_exact:
            for network in self.trained.networks.values():
                for buffer in network.buffers():
                    dist.broadcast(buffer, 0)
        tensors = {
            f"{file.partition('/')[0].removesuffix('.safetensors')}: {name}": tensor
            for file, some in tensors_by_file(self.trained).items()
            for name, tensor in some.items()
        }
        return {**checksums(tensors), "the task's own state": plain_state(self.trained)}

    def _write(self) -> None:
        """Write a checkpoint: every process enters, the main process writes, all wait.

        Raises:
            RunFailed: something is not finite, or it is the last checkpoint and cannot be written.
        """
        with self.trackers.paused():
            self.compare()
            self._on_main(self._write_on_main)
        self._save_asked = False

    def _write_on_main(self) -> None:
        scaler = self.accelerator.scaler
        self._check_layout()
        try:
            state = TrainerState(
                step=self.completed,
                processes=self.accelerator.num_processes,
                loss_scale=scaler.state_dict() if scaler is not None and scaler.is_enabled() else {},
                metrics_lines=self.dir.write_metrics(sync=True),
                hidden=self.hidden.changed(),
                is_over=self.is_over,
            )
            write_checkpoint(self.dir.checkpoint(self.completed), self.trained, state, self.dir)
        except OSError as error:
            text = f"no checkpoint of step {self.completed}: {error.strerror}; {self._last_good()}"
            if self.is_over or self.completed >= self._until:
                raise RunFailed(f"{text}; make room, then run the same command again") from None
            warn(text)
        except RunFailed as failure:
            raise self._diverged(str(failure)) from None
        else:
            self.dir.write_status("running", self.completed)
            self.dir.keep_newest(self.keep_last, self.keep_best)

    def _check_layout(self) -> None:
        """Check that a new start can read the tensors."""
        first, now = self._layout, layout(self.trained)
        for name in sorted(first.keys() | now.keys()):
            if (was := first.get(name, "no tensor")) != (is_now := now.get(name, "no tensor")):
                raise RunFailed(
                    f"after step {self.completed}, {name} is {is_now}, and was {was} at the start, as a "
                    f"resume expects it: create it before the start, or keep numbers; {self._last_good()}"
                )

    def _diverged(self, what: str) -> RunFailed:
        """The error for values that are not finite."""
        return RunFailed(
            f"{what}; {self._last_good()}",
            "for another outcome, lower the learning rate in a new run folder",
        )

    def _last_good(self) -> str:
        """What to say of the newest checkpoint."""
        newest = self.dir.newest()
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"

    @contextmanager
    def _ending_recorded(self) -> Iterator[None]:
        """Write to `status.json` how the run failed, if it does."""
        try:
            yield
        except (Superseded, Stopped):
            raise
        except BaseException as error:
            with suppress(ValueError):  # not the main thread
                # torch's handler raises once more for a worker that has died, wherever this process is then.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # A signal to stop all, which others obeyed sooner; not the launcher's, that follows a failure.
            stopped = self._stop.received_before_the_last_vote and isinstance(error, ProcessLost)
            if self._is_started and self.accelerator.is_main_process:
                why = str(error) if isinstance(error, ReportedError) else f"{type(error).__name__}: {error}"
                self.dir.write_status("stopped" if stopped else "failed", self.dir.newest_step(), why)
            if stopped:
                raise Stopped from error
            raise

    def _finish(self) -> str:
        self.dir.write_status("finished", steps := self.dir.newest_step())
        best = self.dir.best(self.keep_best)
        metric, _, _ = self.keep_best.partition(":")
        named = f"; the best {metric}, {best[1]:.6g}, is that of {best[0]}" if best else ""
        return f"{self.dir}: finished after {steps} steps{named}"

    def _say_last(self, text: str) -> None:
        """Print a line below the progress bar, and below what trackers say at their end."""
        self._stack.close()
        self._say(text)

    def _say(self, text: str) -> None:
        """Print a line, on the main process."""
        if self.accelerator.is_main_process:
            say(text)


def restore(
    checkpoint: Path, trained: Trained, hidden: HiddenState, accelerator: Accelerator
) -> TrainerState:
    """Read a checkpoint into networks, optimizers and states.

    Raises:
        UserError: it is damaged, or of others.
    """
    state = read_checkpoint(checkpoint, trained, hidden)
    if state.loss_scale and (scaler := accelerator.scaler) is not None:
        interval = scaler.get_growth_interval()  # torch takes no float, as numbers in a checkpoint are
        scaler.load_state_dict({**state.loss_scale, "growth_interval": interval})
    return state


class _Loop:
    """What a checkpoint of a loop of one's own holds; not wrappers of DDP, torch.compile or Accelerate."""

    def __init__(
        self, networks: Mapping[str, nn.Module], optimizers: Optimizers, states: Mapping[str, Stateful]
    ) -> None:
        self.networks = {
            name: extract_model_from_parallel(network, keep_torch_compile=False)
            for name, network in networks.items()
        }
        self.optimizers: Optimizers = {
            name: getattr(one, "optimizer", one) for name, one in optimizers.items()
        }
        self._states = {name: getattr(state, "scheduler", state) for name, state in states.items()}
        scheduled = [getattr(state, "optimizer", None) for state in self._states.values()]
        for name, optimizer in each(self.optimizers):
            if hasattr(optimizer.step, "_wrapped_by_lr_sched") and optimizer not in scheduled:
                raise UserError(
                    f"optimizer {name!r} has a scheduler that no checkpoint would hold: give it to the run, "
                    f'states={{"scheduler": …}}'
                )

    def kinds(self) -> dict[str, str]:
        """What the optimizers and states are."""
        kinds = {name: kind for name, kind in layout(self).items() if name.startswith("optimizer ")}
        return {**kinds, **{f"state {name}": type(state).__name__ for name, state in self._states.items()}}

    def state_dict(self) -> dict[str, Any]:
        return {name: state.state_dict() for name, state in self._states.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.keys() != self._states.keys():
            raise ValueError
        for name, own in self._states.items():
            kinds = {key: type(v) for key, v in own.state_dict().items() if isinstance(v, tuple | Counter)}
            own.load_state_dict({key: kinds.get(key, _as_it_is)(v) for key, v in state[name].items()})


def as_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as plain numbers.

    Raises:
        UserError: something is no number.
    """
    found = {}
    for name, value in metrics.items():
        try:
            found[name] = float(value.detach() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError, RuntimeError):
            text = printable(repr(value)).partition("\n")[0]
            raise UserError(f"the metric {name} = {text:.99} is no number: give one") from None
    return found


def _as_it_is(value: Any) -> Any:
    return value


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON has them."""
    as_word: Callable[[Any], str] = lambda value: str(value) if isinstance(value, Path) else _refuse(value)  # noqa: E731
    found: dict[str, Any] = json.loads(json.dumps(dict(config), default=as_word))
    return found


def _refuse(value: object) -> Any:
    raise UserError(f"the config holds {printable(repr(value))[:99]}: give numbers, words and paths")
