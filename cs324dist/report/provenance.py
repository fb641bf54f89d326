"""What was run, how long it took, and how to run it again."""

import json
import shlex
from collections.abc import Sequence
from typing import Any

from cs324dist.config import option
from cs324dist.report.reading import Run, plain

WITHOUT_EFFECT = {"preset", "run_dir", "dry_run", "wandb", "tensorboard"}  # on the result
MINUTE = 60


def settings(run: Run) -> list[tuple[str, str, str | None]]:
    """Options, their values, and the preset's where that differs; those that differ come first.

    A flag has no value, and is there only if it differs; what is empty too.
    """
    changed = run.record.changed
    found = []
    for name, value in run.record.config.items():
        is_flag = isinstance(value, bool)
        if name not in WITHOUT_EFFECT and (name in changed or not (is_flag or value in (None, ""))):
            shown, *words = [option(plain(name)), plain(_text(value))] if not is_flag else _words(name, value)
            usual = plain(_text(changed[name])) if name in changed else None
            found.append((plain(shown), plain(" ".join(words)), usual))
    return sorted(found, key=lambda setting: setting[2] is None)


def differing(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """The options that differ between runs: their names, and for each run its name and their values."""
    names = dict.fromkeys(name for run in runs for name in run.record.config if name not in WITHOUT_EFFECT)
    found = [name for name in names if len({run.setting(name) for run in runs}) > 1]
    values = [[run.name, *(run.setting(name) for name in found)] for run in runs]
    return [option(plain(name)) for name in found], values if found else []


def command(run: Run) -> str | None:
    """What repeats the run in a new folder; None if `config.json` has no command that can be shown."""
    config, script, made_in = run.record.config, run.record.script, run.environment
    names = ["preset", *(name for name in run.record.changed if name not in WITHOUT_EFFECT)]
    given = {name: config[name] for name in names if name in config}
    several = run.processes is not None and run.processes > 1
    launcher = ["torchrun", "--nproc_per_node", str(run.processes)] if several else ["python"]
    started = [script, run.record.task_given] if run.record.task_given else [script]
    options = [word for name, value in given.items() for word in _words(name, value)]
    words = [*launcher, *started, *options]
    if (
        not script
        or any(word.startswith("-") for word in started)
        or any(plain(word) != word for word in words)
    ):
        return None
    variables = ""
    if made_in:
        variables += f"ACCELERATE_MIXED_PRECISION={made_in.precision} "
    if made_in and made_in.compiled:
        variables += f"ACCELERATE_DYNAMO_BACKEND={shlex.quote(plain(made_in.compiled))} "
    return variables + shlex.join(words)


def _words(name: str, value: Any) -> list[str]:
    """The words of a command line that give an option this value."""
    if isinstance(value, bool):
        return [option(name if value else f"no-{name}")]
    if isinstance(value, list):
        return [option(name), *map(_text, value)]
    text = _text(value)
    return [f"{option(name)}={text}"] if text.startswith("-") else [option(name), text]


def _text(value: Any) -> str:
    """A value as a command line has it."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def training_time(run: Run) -> float | None:
    """Seconds of training without evaluations, computed from the logged rates."""
    rates = run.series("throughput/samples_per_second")
    if run.options is None or not rates:
        return None
    seconds, before = 0.0, 0
    for step, rate in rates.items():
        seconds += (step - before) * run.options.batch_size / rate if rate and rate > 0 else 0.0
        before = step
    return seconds


def duration(seconds: float | None) -> str:
    """A duration for people: 40 s, 3 min, 2.5 h."""
    if seconds is None:
        return "\N{EN DASH}"
    if seconds < 1.5 * MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 1.5 * MINUTE**2:
        return f"{seconds / MINUTE:.0f} min"
    hours = seconds / MINUTE**2
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.0f} days"
