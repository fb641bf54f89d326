"""What was run, by what, and how to run it again."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cs324dist.command_line import option
from cs324dist.report.charts import number
from cs324dist.report.reading import DOUBTED_AFTER, Run, Start, plain
from cs324dist.settings import RunSettings
from cs324dist.tasks import classifier, gan, lstm

OF_NO_MATTER = {"preset", "run_dir", "dry_run", "wandb"}  # to what comes out
PRESETS: Mapping[str, Mapping[str, RunSettings]] = {
    "lstm": lstm.PRESETS,
    "gan": gan.PRESETS,
    "classifier": classifier.PRESETS,
}
MINUTE = 60


@dataclass(frozen=True)
class Setting:
    """One setting; `usual` is its preset's, if that differs."""

    name: str
    value: str
    usual: str | None


def settings(run: Run) -> list[Setting]:
    """Those that differ from the run's preset first."""
    usual = _preset(run)
    found = [
        Setting(
            option(plain(name)),
            plain(value),
            plain(usual[name]) if name in usual and usual[name] != value else None,
        )
        for name, value in run.settings.items()
        if name not in OF_NO_MATTER
    ]
    return sorted(found, key=lambda setting: setting.usual is None)


def command(run: Run) -> str | None:
    """What repeats the run, in a folder of its own; None where the task has no script here."""
    if run.task not in PRESETS:
        return None
    precision = run.environment.get("precision")
    environment = f"ACCELERATE_MIXED_PRECISION={precision} " if precision in ("bf16", "fp16") else ""
    launcher = f"torchrun --nproc_per_node {run.processes}" if (run.processes or 1) > 1 else "python"
    given = [(option("preset"), run.setting("preset"))] if "preset" in run.settings else []
    given += [(setting.name, setting.value) for setting in settings(run) if setting.usual is not None]
    return environment + " ".join(
        [launcher, f"launch/{run.task}.py", *(f"{name} {shlex.quote(value)}" for name, value in given)]
    )


def _preset(run: Run) -> Mapping[str, Any]:
    preset = PRESETS.get(run.task, {}).get(run.setting("preset"))
    return preset.as_json() if preset else {}


def environment(run: Run) -> list[tuple[str, str]]:
    """Hardware and versions, as pairs of a name and a text."""
    stored = run.environment
    packages = stored.get("packages")
    versions = {"Python": stored.get("python"), **(packages if isinstance(packages, dict) else {})}
    facts = {
        "Processor": stored.get("device"),
        "Threads": stored.get("threads"),
        "Precision": {"no": "float32"}.get(plain(stored.get("precision")), stored.get("precision")),
        "Processes": run.processes,
        "Versions": ", ".join(
            f"{plain(name)} {plain(version)}" for name, version in versions.items() if version
        ),
        "Commit": stored.get("commit"),
    }
    return [(name, plain(value)) for name, value in facts.items() if value]


def training_time(run: Run) -> float | None:
    """Seconds of training, evaluations not counted, as far as the logged rates say."""
    batch, rates = run.settings.get("batch_size"), run.series("throughput/samples_per_second")
    if type(batch) is not int or not rates:
        return None
    seconds, before = 0.0, 0
    for step, rate in rates.items():
        seconds += (step - before) * batch / rate if rate and rate > 0 else 0.0
        before = step
    return seconds


def duration(seconds: float | None) -> str:
    """For people: 40 s, 3 min, 2.5 h."""
    if seconds is None:
        return "\N{EN DASH}"
    if seconds < 1.5 * MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 1.5 * MINUTE**2:
        return f"{seconds / MINUTE:.0f} min"
    return (
        f"{seconds / MINUTE**2:.1f} h" if seconds < 48 * MINUTE**2 else f"{seconds / 24 / MINUTE**2:.0f} days"
    )


def progress(run: Run) -> str:
    """How far it is."""
    return f"step {number(run.reached)}" + (f" of {number(run.steps)}" if run.steps else "")


def resumption(start: Start) -> str:
    """What a start after the first one cost, as far as it was written down."""
    parts = []
    if start.from_step is not None:
        parts.append(f"from step {number(start.from_step)}")
    if start.lost_steps:
        parts.append(f"took at least {number(start.lost_steps)} steps again")
    if start.seconds_away is not None:
        parts.append(f"{duration(start.seconds_away)} after the last sign of life before it")
    return ", ".join(parts)


def notice(run: Run) -> str | None:
    """What one must know of a run that has not finished; None for one that has."""
    why = f": {run.why}" if run.why else ""
    match run.state:
        case "finished":
            return None
        case "running" if run.silent_for is not None and run.silent_for > DOUBTED_AFTER:
            return (
                f"says that it is running, {progress(run)}, but gave no sign of life for "
                f"{duration(run.silent_for)}: it was probably killed. The same command continues it."
            )
        case "running":
            return f"is still running, {progress(run)}"
        case "stopped":
            return f"was stopped at {progress(run)}{why}. The same command continues it."
        case "failed":
            saved = f"It was last saved at {progress(run)}" if run.step else "Nothing was saved"
            return f"failed: {run.why or 'it does not say why'}. {saved}."
        case "unclear":
            return f"does not say how it stands, {progress(run)}"
        case "not started":
            return "has not begun: its folder holds no status yet"
    return f"is {run.state}{why}"
