"""Where metrics go: the terminal, `metrics.jsonl`, and Accelerate's trackers."""

import netrc
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from tqdm import tqdm

from cs324dist.data.loader import Loader
from cs324dist.errors import printable, say, warn
from cs324dist.pictures import save_png
from cs324dist.runs.records import LOOP
from cs324dist.runs.run_dir import RunDir
from cs324dist.tasks.base import Evaluation

CONNECT_TIMEOUT = 5  # seconds
LOGIN_TIMEOUT = 10  # seconds
WANDB, TENSORBOARD = "Weights & Biases", "TensorBoard"
IMAGES: Mapping[Any, Any] = {WandBTracker: {}, TensorBoardTracker: {"dataformats": "NHWC"}}


class Trackers:
    """Writes on the main process; the others may call all but `log_step`."""

    def __init__(
        self,
        run: RunDir,
        accelerator: Accelerator,
        *,
        start: int,
        until: int,
        config: Mapping[str, Any],
        wandb: str,
        tensorboard: bool,
        batch_size: int | None = None,
    ) -> None:
        """Of the steps from `start` to `until`; `config` is what Weights & Biases shows of the settings."""
        self._run, self._until, self._batch_size = run, until, batch_size
        self._is_main, self._device = accelerator.is_main_process, accelerator.device
        self._trackers: dict[str, GeneralTracker] = {}
        self._last_step, self._last_waited = start, Loader.seconds_waited
        if self._is_main:
            if opened := open_wandb(run, wandb, config):
                self._trackers[WANDB] = opened
            if tensorboard:
                self._open_tensorboard()
        is_shown = self._is_main and sys.stderr.isatty()  # below what the others have said
        self._bar = tqdm(total=until, initial=start, unit="step", disable=not is_shown)
        self._last_time = time.perf_counter()

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._track(lambda tracker: tracker.finish())
        self._trackers = {}

    def _open_tensorboard(self) -> None:
        # What an earlier process wrote past this step is hidden.
        tracker = TensorBoardTracker("tensorboard", self._run.path, purge_step=self._last_step + 1)
        try:
            tracker.start()
            self._trackers[TENSORBOARD] = tracker
        except Exception as error:
            _warn(TENSORBOARD, f"{error}; nothing is recorded there: pip install tensorboard")

    def go_on(self, until: int) -> None:
        """Show that the steps go on to `until`."""
        self._until = self._bar.total = until

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done inside out of the throughput."""
        before = time.perf_counter()
        yield
        self._last_time += time.perf_counter() - before

    def advance(self) -> None:
        """Show that a step has been completed."""
        self._bar.update()

    def log_step(self, completed: int, values: Mapping[str, float]) -> None:
        """Log a step's metrics and the throughput since the last call, and show both."""
        speeds: dict[str, float] = {}
        if completed > self._last_step:  # else this is more of a step that is logged already
            now, waited = time.perf_counter(), Loader.seconds_waited
            rate = (completed - self._last_step) / max(now - self._last_time, 1e-9)
            if self._batch_size:
                speeds["samples_per_second"] = rate * self._batch_size
            speeds |= {"steps_per_second": rate, "data_seconds": waited - self._last_waited}
            if self._device.type == "cuda":
                speeds["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            self._last_step, self._last_time, self._last_waited = completed, now, waited
        self._show(completed, values, speeds.get("steps_per_second"))
        self._log(completed, {**values, **{f"throughput/{name}": speed for name, speed in speeds.items()}})

    def _show(self, completed: int, values: Mapping[str, float], rate: float | None) -> None:
        brief = {name.removeprefix("train/"): _brief(value) for name, value in values.items()}
        self._bar.set_postfix(brief, refresh=False)
        if self._bar.disable:
            words = [f"step {completed}/{self._until}", *(f"{n} {v}" for n, v in brief.items())]
            if rate:
                minutes = (self._until - completed) / rate / 60
                words += [f"{rate:.1f} steps/s", f"{minutes:.1f} min left"]
            say("  ".join(words))

    def log_evaluation(self, completed: int, evaluation: Evaluation) -> None:
        """Log an evaluation's metrics and pictures."""
        if not self._is_main:
            return
        metrics = {f"eval/{name}": value for name, value in evaluation.metrics.items()}
        is_long = len(metrics) > 8  # such as a share of each digit
        shown = [name for name in metrics if not (is_long and re.search(r"_\d+$", name))]
        brief = (f"{name} {_brief(metrics[name])}" for name in shown)
        say("  ".join([f"evaluation after {completed} steps", *brief]))
        if evaluation.picture is not None:
            try:
                save_png(evaluation.picture, self._run.sample(completed), self._run)
            except OSError as error:
                warn(f"no picture of step {completed}: {error.strerror}")
        if self._trackers:
            drawn = {"samples": evaluation.picture, "strip": evaluation.strip and evaluation.strip()}
            images = {
                name: p.cpu().permute(1, 2, 0)[None].numpy() for name, p in drawn.items() if p is not None
            }
            self._track(lambda tracker: tracker.log_images(images, step=completed, **IMAGES[type(tracker)]))
        self._log(completed, metrics)  # after the pictures: this flushes TensorBoard's file

    def _log(self, completed: int, metrics: Mapping[str, float]) -> None:
        try:
            self._run.append_metrics(completed, metrics)
        except OSError as error:
            warn(f"{self._run}/metrics.jsonl: {error.strerror}; trying again later")
        self._track(lambda tracker: tracker.log(dict(metrics), step=completed))

    def _track(self, act: Callable[[GeneralTracker], object]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(tracker)
            except Exception as error:  # whatever a tracker raises, training goes on
                _warn(name, f"{error}; nothing more is recorded there")
                del self._trackers[name]


def _warn(tracker: str, text: str) -> None:
    warn(f"{tracker}: {_without_login(text)}")


def _without_login(said: str) -> str:
    """What a tracker says, printable and without the user and password of an address."""
    return printable(re.sub(r"//[^/\s]*@", "//", said))


def open_wandb(run: RunDir, wanted: str, config: Mapping[str, Any]) -> WandBTracker | None:
    """Open the run's own Weights & Biases run.

    Without a login or a network, it records offline and says so in one line. Whatever its client raises,
    training goes on.
    """
    if wanted == "disabled":
        return None
    # Its client records all of SLURM_*, of which this one is a token.
    os.environ.pop("SLURM_JWT", None)
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb

        try:
            mode, why = ("offline", "") if wanted == "offline" else _possible_mode()
            if mode == "disabled":
                return None
            if mode == "online":
                tracker = _started(run, config, mode)
                address = _without_login(tracker.run.url)
                say(
                    f"{WANDB}: uploading to {address}; to stop this: --wandb disabled, or WANDB_MODE=disabled"
                )
                return tracker
        except Exception as error:
            why = str(error) or repr(error)
            wandb.teardown()  # the client of the attempt that failed holds the run's id
        if why:
            say(f"{WANDB}: {_without_login(why)}; recording offline in {run}/wandb")
        tracker = _started(run, config, "offline")
        for row in run.read_metrics():  # again: a segment whose process was killed may have lost it
            values = {name: value for name, value in row.items() if name != "step" and value is not None}
            tracker.log(values, step=row["step"])
        return tracker
    except Exception as error:
        _warn(WANDB, f"{error}; nothing is recorded there")
        return None


def _started(run: RunDir, config: Mapping[str, Any], mode: str) -> WandBTracker:
    import wandb

    _set_up()
    record = run.read_record()
    task = "cs324dist" if record.task == LOOP else re.sub(r"[/\\#?%:]", "-", record.task)
    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT", task),
        id=record.tracker_run_id,
        name=os.environ.get("WANDB_NAME", run.path.name),
        dir=str(run.path.absolute()),
        mode=mode,
        resume="allow" if mode == "online" else None,
        # No address of a git remote, which may hold a token.
        settings=wandb.Settings(init_timeout=LOGIN_TIMEOUT, git_remote_url=""),
    )
    tracker.start()
    tracker.store_init_configuration(dict(config))
    return tracker


def _brief(value: float) -> str:
    return f"{value:.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:.3g}"


def _set_up() -> Any:
    """The client. It reads `wandb/settings` where this process is: not in a run, which may be a stranger's.

    Such a file could name the server that the API key is sent to.
    """
    import wandb

    here = Path.cwd()
    with chdir("/") if any(RunDir(path).exists for path in (here, *here.parents)) else nullcontext():
        return wandb.setup()


def _possible_mode() -> tuple[str, str]:
    """What WANDB_MODE says, or else online if that is possible; and why it is not."""
    settings = _set_up().settings
    if settings.mode in ("offline", "disabled"):
        return settings.mode, ""
    host, logins = settings.base_url, {}
    with suppress(OSError, netrc.NetrcParseError):  # where `wandb login` writes a key down
        logins = netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser()).hosts
    if not settings.api_key and urllib.parse.urlsplit(host).hostname not in logins:
        return "offline", "no login (`wandb login`)"
    try:
        urllib.request.urlopen(host, timeout=CONNECT_TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError as error:
        return "offline", f"{host} cannot be reached ({getattr(error, 'reason', error)})"
    return "online", ""
