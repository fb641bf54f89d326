"""What was run, how long it took, and how to run it again."""

import json
import shlex
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from cs324dist.config import option
from cs324dist.report.reading import Run, plain
from cs324dist.runs.records import LOOP

WITHOUT_EFFECT = {"preset", "run_dir", "dry_run", "wandb", "tensorboard"}  # on the result
MINUTE = 60


def settings(run: Run) -> list[tuple[str, str, str | None]]:
    """Options, their values, and the preset's where that differs; those that differ come first.

    A flag has no value, and is there only if it differs; what is empty too.
    """
    changed, found = run.record.changed, []
    for name, value in run.record.config.items():
        is_flag = isinstance(value, bool)
        if name not in WITHOUT_EFFECT and (name in changed or not (is_flag or value in (None, ""))):
            shown, text = (_words(name, value)[0], "") if is_flag else (option(name), _text(value))
            found.append(
                (plain(shown), plain(text), plain(_text(changed[name])) if name in changed else None)
            )
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
    if run.record.task != LOOP:  # which has options of its own
        given["run_dir"] = f"{run.path}-again"
    several = run.processes is not None and run.processes > 1
    launcher = ["torchrun", "--nproc_per_node", str(run.processes)] if several else ["python"]
    started = [script, run.record.task_given] if run.record.task_given else [script]
    options = [word for name, value in given.items() for word in _words(name, value)]
    words = [*launcher, *started, *options, *run.record.arguments]
    if any(word[:1] in ("", "-") for word in started) or any(plain(word) != word for word in words):
        return None
    variables = f"ACCELERATE_MIXED_PRECISION={made_in.precision} " if made_in else ""
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
    rates = run.series("throughput/steps_per_second")
    found = zip(pairwise([0, *rates]), rates.values(), strict=True)
    seconds = [(step - before) / rate for (before, step), rate in found if rate and rate > 0]
    return sum(seconds) if rates else None


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
