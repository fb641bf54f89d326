"""Where metrics go: the terminal, `metrics.jsonl`, the same values to other trackers."""

import netrc
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from cs324dist.data.loader import Loader
from cs324dist.errors import printable, say, warn
from cs324dist.pictures import save_png
from cs324dist.runs.run_dir import RunDir
from cs324dist.tasks.base import Evaluation

CONNECT_TIMEOUT = 5  # seconds
LOGIN_TIMEOUT = 10  # seconds


class Trackers:
    """Writes on the main process; every process may call it."""

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
        self._run, self._accelerator, self._until = run, accelerator, until
        self._config, self._mode, self._batch_size = config, wandb, batch_size
        self._wants_tensorboard = tensorboard
        self._last_step, self._last_time = start, time.perf_counter()
        self._last_waited = Loader.seconds_waited
        self._tensorboard: Any = None
        self._in_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=until,
            initial=start,
            unit="step",
            disable=not (accelerator.is_main_process and self._in_terminal),
        )

    def __enter__(self) -> "Trackers":
        open_wandb(self._accelerator, self._run, self._mode, self._config)
        if self._accelerator.is_main_process and self._wants_tensorboard:
            self._open_tensorboard()
        self._last_time = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        """Finish the Weights & Biases run."""
        self._bar.close()
        trackers, self._accelerator.trackers = self._accelerator.trackers, []
        try:
            for tracker in trackers:
                tracker.finish()
        except Exception as error:
            _warn(_without_login(error))

    def _open_tensorboard(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter

            # What an earlier process wrote past this step is hidden.
            folder = self._run.path / "tensorboard"
            self._tensorboard = SummaryWriter(folder, purge_step=self._last_step + 1)
        except Exception as error:
            warn(f"TensorBoard: {printable(error)}; nothing is recorded there: pip install tensorboard")

    def _to_tensorboard(self, add: str, values: Mapping[str, Any], step: int) -> None:
        if self._tensorboard is None:
            return
        try:
            for name, value in values.items():
                getattr(self._tensorboard, add)(name, value, step)
            self._tensorboard.flush()  # or a process that is killed loses two minutes
        except Exception as error:
            warn(f"TensorBoard: {printable(error)}; nothing more is recorded there")
            self._tensorboard = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done inside out of the throughput."""
        before = time.perf_counter()
        yield
        self._last_time += time.perf_counter() - before

    def log_step(self, completed: int, values: Mapping[str, float]) -> None:
        """Log a step's metrics and the throughput since the last call, and show both."""
        if completed == self._last_step:  # logged already: this is more of it
            self._show(completed, values, 0.0)
            self._log(completed, values)
            return
        now = time.perf_counter()
        rate = (completed - self._last_step) / max(now - self._last_time, 1e-9)
        self._last_time = now
        self._show(completed, values, rate)
        self._last_step = completed
        speeds = {
            **({"samples_per_second": rate * self._batch_size} if self._batch_size else {}),
            "steps_per_second": rate,
            "data_seconds": Loader.seconds_waited - self._last_waited,
        }
        self._last_waited = Loader.seconds_waited
        if self._accelerator.device.type == "cuda":
            speeds["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._log(completed, {**values, **{f"throughput/{name}": speed for name, speed in speeds.items()}})

    def _show(self, completed: int, values: Mapping[str, float], rate: float) -> None:
        brief = {name.removeprefix("train/"): f"{value:.4f}" for name, value in values.items()}
        if self._in_terminal:
            self._bar.set_postfix(brief, refresh=False)
            self._bar.update(completed - self._last_step)
        elif self._accelerator.is_main_process:
            words = [f"step {completed}/{self._until}", *(f"{n} {v}" for n, v in brief.items())]
            if rate:
                minutes = (self._until - completed) / rate / 60
                words += [f"{rate:.1f} steps/s", f"{minutes:.1f} min left"]
            say("  ".join(words))

    def log_evaluation(self, completed: int, evaluation: Evaluation) -> None:
        """Log an evaluation's metrics and pictures."""
        metrics = {f"eval/{name}": value for name, value in evaluation.metrics.items()}
        self._log(completed, metrics)
        if not self._accelerator.is_main_process:
            return
        brief = [f"{name} {value:.4f}" for name, value in metrics.items() if "share" not in name]
        tqdm.write("  ".join([f"evaluation after {completed} steps", *brief]), file=sys.stderr)
        if evaluation.picture is not None:
            try:
                save_png(evaluation.picture, self._run.sample(completed), self._run)
            except OSError as error:
                warn(f"no picture of step {completed}: {error.strerror}")
        if self._accelerator.trackers or self._tensorboard is not None:
            drawn = {"samples": evaluation.picture, "strip": evaluation.strip and evaluation.strip()}
            pictures = {name: picture for name, picture in drawn.items() if picture is not None}
            self._to_tensorboard("add_image", pictures, completed)
            images = {name: [p.cpu().permute(1, 2, 0).numpy()] for name, p in pictures.items()}
            for tracker in self._accelerator.trackers:
                self._track(partial(tracker.log_images, images, step=completed))

    def _log(self, completed: int, metrics: Mapping[str, float]) -> None:
        if self._accelerator.is_main_process:
            try:
                self._run.append_metrics(completed, metrics)
            except OSError as error:
                warn(f"{self._run}/metrics.jsonl: {error.strerror}; trying again later")
            self._track(partial(self._accelerator.log, dict(metrics), step=completed))
            self._to_tensorboard("add_scalar", metrics, completed)

    def _track(self, log: Callable[[], object]) -> None:
        try:
            log()
        except Exception as error:  # whatever its client raises, training goes on
            _warn(f"{_without_login(error)}; nothing more is recorded there")
            self._accelerator.trackers = []


def _warn(text: str) -> None:
    warn(f"Weights & Biases: {text}")


def _without_login(said: object) -> str:
    """What its client says, printable and without the user and password of an address."""
    return printable(re.sub(r"//[^/\s]*@", "//", str(said)))


def open_wandb(accelerator: Accelerator, run: RunDir, wanted: str, config: Mapping[str, Any]) -> None:
    """Open the run's own Weights & Biases run through Accelerate, on the main process.

    Without a login or a network, it records offline and says so in one line. Whatever its client raises,
    training goes on.
    """
    if wanted == "disabled" or not accelerator.is_main_process:
        return
    # Its client records all of SLURM_*, of which this one is a token.
    os.environ.pop("SLURM_JWT", None)
    os.environ.setdefault("WANDB_SILENT", "true")
    why: object = ""
    try:
        mode, why = ("offline", "") if wanted == "offline" else _possible_mode()
        if mode == "online":
            _init(accelerator, config, run, mode)
    except Exception as error:
        mode, why = "offline", error
    if mode != "offline":
        return
    if why:
        say(f"Weights & Biases: {_without_login(why)}; recording offline in {run}/wandb")
    try:
        _init(accelerator, config, run, mode)
        _log_again(accelerator, run)
    except Exception as error:
        _warn(f"{_without_login(error)}; nothing is recorded there")
        accelerator.trackers = []


def _set_up() -> Any:
    """The client. It reads `wandb/settings` where this process is: not in a run, which may be a stranger's.

    Such a file could name the server that the API key is sent to.
    """
    import wandb

    here = Path.cwd()
    with chdir("/") if any(RunDir(path).exists for path in (here, *here.parents)) else nullcontext():
        return wandb.setup()


def _init(accelerator: Accelerator, config: Mapping[str, Any], run: RunDir, mode: str) -> None:
    import wandb

    wandb_run = {
        "id": run.read_record().tracker_run_id,
        "name": run.path.name,
        "dir": str(run.path.absolute()),
        "mode": mode,
        "resume": "allow" if mode == "online" else None,
        # No address of a git remote, which may hold a token.
        "settings": wandb.Settings(init_timeout=LOGIN_TIMEOUT, git_remote_url=""),
    }
    if accelerator.trackers:  # of an attempt that failed; its client holds the run's id
        wandb.teardown()
    _set_up()
    accelerator.log_with, accelerator.trackers = ["wandb"], []
    project = os.environ.get("WANDB_PROJECT", "cs324dist")
    accelerator.init_trackers(project, dict(config), {"wandb": wandb_run})


def _log_again(accelerator: Accelerator, run: RunDir) -> None:
    """Log what there is: an offline segment whose process was killed may have lost it."""
    for row in run.read_metrics():
        values = {name: value for name, value in row.items() if name != "step" and value is not None}
        accelerator.log(values, step=row["step"])


def _has_login(host: str) -> bool:
    """Whether `wandb login` has written down a key for this host."""
    try:
        logins = netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser())
    except (OSError, netrc.NetrcParseError):
        return False
    return (urllib.parse.urlsplit(host).hostname or "") in logins.hosts


def _possible_mode() -> tuple[str, str]:
    """What WANDB_MODE says, or else online if that is possible; and why it is not."""
    settings = _set_up().settings
    if settings.mode in ("offline", "disabled"):
        return settings.mode, ""
    host = settings.base_url
    if not (settings.api_key or _has_login(host)):
        return "offline", "no login (`wandb login`)"
    try:
        urllib.request.urlopen(host, timeout=CONNECT_TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError as error:
        return "offline", f"{host} cannot be reached ({getattr(error, 'reason', error)})"
    return "online", ""
