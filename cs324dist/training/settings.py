"""Settings: frozen dataclasses that are the command line, the config file and the list of what may change.

A field's annotation says what is allowed (`AtLeast`, `OneOf`, …) and whether a run may be continued with
another value (`FREE`). Everything that is wrong is said at once, by `problems`.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, get_type_hints

import tyro

from cs324dist.errors import Refused


class Rule(Protocol):
    """What a value must be: `allows` decides, `wanted` says it in words."""

    wanted: str

    def allows(self, value: Any) -> bool: ...  # noqa: D102


class OneOf:
    """One of a few words."""

    def __init__(self, *options: str) -> None:
        self.options = options
        self.wanted = "one of " + ", ".join(options)

    def allows(self, value: str) -> bool:
        """Whether it is one of them."""
        return value in self.options


class Within:
    """A finite number in [low, high], or (low, high] if `open_below`, and below `high` if `open_above`."""

    def __init__(
        self, low: float, high: float = math.inf, *, open_below: bool = False, open_above: bool = False
    ) -> None:
        self.low, self.high, self.open_below, self.open_above = low, high, open_below, open_above
        self.wanted = f"{'more than' if open_below else 'at least'} {low:g}"
        if high < math.inf:
            self.wanted += f" and {'less than' if open_above else 'at most'} {high:g}"

    def allows(self, value: float) -> bool:
        """Whether it lies within; NaN and infinities never do."""
        above = value > self.low if self.open_below else value >= self.low
        below = value < self.high if self.open_above else value <= self.high
        return math.isfinite(value) and above and below


class Free:
    """Marks a setting that a run can be continued with another value of."""


FREE = Free()
POSITIVE = Within(0, open_below=True)
FRACTION = Within(0, 1, open_above=True)
Count = Annotated[int, Within(1)]


@dataclass(frozen=True)
class RunSettings:
    """What every task has."""

    preset: Annotated[str, FREE] = "fast"
    """Named recipe that the other defaults come from: fast (best quality per minute), report (the
    report's), smoke (seconds, to see that it runs)."""

    run_dir: Annotated[Path | None, FREE] = None
    """Run folder. To continue a run, give the same command again. Default: runs/TASK-PRESET-SEED."""

    seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    """Everything random is a function of it."""

    steps: Annotated[int, Within(1), FREE] = 1000
    """Optimization steps in all."""

    batch_size: Count = 64
    """Global batch in samples: each process takes an equal share."""

    log_every: Annotated[Count, FREE] = 50
    """Steps from one line of metrics to the next."""

    evaluate_every: Annotated[Count, FREE] = 1000
    """Steps from one evaluation to the next; the last step is always evaluated."""

    checkpoint_every: Annotated[Count, FREE] = 500
    """Steps from one checkpoint to the next; the last step is always saved."""

    keep_last: Annotated[Count, FREE] = 3
    """Checkpoints kept, newest first."""

    wandb: Annotated[str, OneOf("online", "offline", "disabled"), FREE] = "online"
    """Weights & Biases: online (offline where there is no login or network), offline or disabled."""

    dry_run: Annotated[bool, FREE] = False
    """Print the settings that would be used, and stop."""

    schedule_depends_on_steps = False  # whether another `steps` would change the steps already taken

    def run_name(self) -> str:
        """The default run folder's name."""
        return f"{self.preset}-{self.seed}"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run_dir or Path("runs") / self.run_name()

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self).items()
        }


Settings = TypeVar("Settings", bound=RunSettings)


def option(field: str) -> str:
    """The command line's name of a field."""
    return "--" + field.replace("_", "-")


def _markers(settings_type: type[RunSettings]) -> dict[str, tuple[Any, ...]]:
    hints = get_type_hints(settings_type, include_extras=True)
    return {f.name: getattr(hints[f.name], "__metadata__", ()) for f in dataclasses.fields(settings_type)}


def problems(settings: RunSettings) -> list[str]:
    """One line for each value that is not allowed."""
    return [
        f"{option(name)} {getattr(settings, name)} is not allowed: give {marker.wanted}"
        for name, markers in _markers(type(settings)).items()
        for marker in markers
        if isinstance(marker, OneOf | Within) and not marker.allows(getattr(settings, name))
    ]


def conflicts(settings: RunSettings, stored: Mapping[str, Any]) -> list[str]:
    """One line for each setting of a stored run that this command would change in mid-course."""
    given, markers = settings.as_json(), _markers(type(settings))
    lines = [
        f"{option(name)} {given[name]} differs from the run's {stored.get(name)}: give the run's value, "
        f"or another --run-dir"
        for name in given
        if FREE not in markers[name] and given[name] != stored.get(name)
    ]
    steps = stored.get("steps")
    if settings.schedule_depends_on_steps and settings.steps != steps:
        lines.append(
            f"--steps {settings.steps} differs from the run's {steps}, which its learning rate depends on: "
            f"give the run's value, or another --run-dir"
        )
    elif isinstance(steps, int) and settings.steps < steps:
        lines.append(
            f"--steps {settings.steps} is less than the run's {steps}: give at least {steps}, "
            f"or another --run-dir"
        )
    return lines


def from_command_line(
    presets: Mapping[str, Settings], description: str, arguments: list[str] | None = None
) -> Settings:
    """The settings that `arguments` (default: the process's) ask for; `--preset` supplies the defaults.

    Raises:
        Refused: naming every value that is not allowed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = next(iter(presets))
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if word == "--preset":
            chosen = following
        elif word.startswith("--preset="):
            chosen = word.removeprefix("--preset=")
    defaults = presets.get(chosen, next(iter(presets.values())))
    settings = tyro.cli(
        type(defaults),
        default=defaults,
        args=arguments,
        description=description,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if lines := problems(settings):
        raise Refused(*lines)
    return settings
