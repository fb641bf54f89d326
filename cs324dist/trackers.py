"""Where metrics go: the run's `metrics.jsonl`, and the same values to Weights & Biases."""

import netrc
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from cs324dist.errors import printable
from cs324dist.runs.run_dir import RunDir
from cs324dist.sampling.grids import save_png
from cs324dist.settings import RunSettings
from cs324dist.tasks.base import Evaluation

PROJECT = "cs324dist"
CONNECT_TIMEOUT = 5  # seconds
LOGIN_TIMEOUT = 10  # seconds


class Logbook:
    """Writes on the main process; every rank may call it."""

    def __init__(self, run: RunDir, accelerator: Accelerator) -> None:
        self._run, self._accelerator = run, accelerator

    def log(self, completed: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics after `completed` steps."""
        if self._accelerator.is_main_process:
            try:
                self._run.append_metrics(completed, metrics)
            except OSError as error:
                print(
                    f"warning: {self._run}/metrics.jsonl: {error.strerror}; trying again later",
                    file=sys.stderr,
                )
            self._track(partial(self._accelerator.log, dict(metrics), step=completed))

    def log_evaluation(self, completed: int, evaluation: Evaluation) -> None:
        """An evaluation's metrics and pictures."""
        self.log(completed, evaluation.metrics)
        if not self._accelerator.is_main_process:
            return
        brief = [f"{name} {value:.4f}" for name, value in evaluation.metrics.items() if "share" not in name]
        tqdm.write("  ".join([f"evaluation after {completed} steps", *brief]), file=sys.stderr)
        if evaluation.picture is not None:
            try:
                save_png(evaluation.picture, self._run.sample(completed))
            except OSError as error:
                print(f"warning: no picture of step {completed}: {error.strerror}", file=sys.stderr)
        if self._accelerator.trackers:
            drawn = {"samples": evaluation.picture, "strip": evaluation.strip and evaluation.strip()}
            images = {name: [p.permute(1, 2, 0).numpy()] for name, p in drawn.items() if p is not None}
            for tracker in self._accelerator.trackers:
                self._track(partial(tracker.log_images, images, step=completed))

    def _track(self, log: Callable[[], object]) -> None:
        try:
            log()
        except Exception as error:  # whatever its client raises, training goes on
            print(
                f"warning: Weights & Biases: {printable(error)}; nothing more is recorded there",
                file=sys.stderr,
            )
            self._accelerator.trackers = []


def _warn(text: str) -> None:
    print(f"warning: Weights & Biases: {text}", file=sys.stderr)


def end_tracking(accelerator: Accelerator) -> None:
    """Close the Weights & Biases run and the process group; what its client raises is said, no more."""
    try:
        accelerator.end_training()
    except Exception as error:
        _warn(printable(error))


def start_tracking(accelerator: Accelerator, settings: RunSettings, run: RunDir) -> None:
    """Open the run's own Weights & Biases run through Accelerate, on the main process.

    Falls back to an offline run, and says so in one line, where there is no login or no network. Whatever its
    client raises, training goes on.
    """
    if settings.wandb == "disabled" or not accelerator.is_main_process:
        return
    # Its client records all of SLURM_*, of which this one is a token.
    os.environ.pop("SLURM_JWT", None)
    os.environ.setdefault("WANDB_SILENT", "true")
    why: object = ""
    try:
        mode, why = ("offline", "") if settings.wandb == "offline" else _possible_mode()
        if mode == "online":
            _init(accelerator, settings, run, mode)
    except Exception as error:
        mode, why = "offline", error
    if mode != "offline":
        return
    if why:
        print(f"Weights & Biases: {printable(why)}; recording offline in {run}/wandb", file=sys.stderr)
    try:
        _init(accelerator, settings, run, mode)
        _log_again(accelerator, run)
    except Exception as error:
        _warn(f"{printable(error)}; nothing is recorded there")
        accelerator.trackers = []


def _init(accelerator: Accelerator, settings: RunSettings, run: RunDir, mode: str) -> None:
    import wandb

    wandb_run = {
        "id": run.read_config()["tracker_run_id"],
        "name": run.path.name,
        "dir": str(run),
        "mode": mode,
        "resume": "allow" if mode == "online" else None,
        "settings": wandb.Settings(init_timeout=LOGIN_TIMEOUT),
    }
    if accelerator.trackers:  # of an attempt that failed; its client holds the run's id
        wandb.teardown()
    accelerator.log_with, accelerator.trackers = ["wandb"], []
    accelerator.init_trackers(PROJECT, settings.as_json(), {"wandb": wandb_run})


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
    import wandb

    settings = wandb.setup().settings
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
