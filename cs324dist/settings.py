"""Settings: frozen dataclasses that are the command line, the config file and the list of what may change.

A field marked `MUTABLE` is one that a run may be continued with another value of.
"""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from cs324dist.command_line import Count, OneOf, Within, markers, option, parse, problems
from cs324dist.errors import UserError, printable


class Mutable:
    """Marks a setting that does not change the steps already taken."""


MUTABLE = Mutable()


BatchSize = Annotated[int, Within(1, 1_000_000)]


@dataclass(frozen=True)
class RunSettings:
    """What every task has."""

    preset: Annotated[str, MUTABLE] = "fast"
    """Named recipe that the other defaults come from."""

    run_dir: Annotated[Path | None, MUTABLE] = None
    """Run folder. To continue a run, give the same command again. Default: runs/TASK-PRESET-SEED."""

    seed: Annotated[int, Within(0)] = 0
    """Everything random is a function of it."""

    steps: Annotated[Count, MUTABLE] = 1000
    """Optimization steps in all."""

    batch_size: BatchSize = 64
    """Global batch in samples: each process takes an equal share."""

    log_every: Annotated[Count, MUTABLE] = 50
    """Steps from one line of metrics to the next."""

    evaluate_every: Annotated[Count, MUTABLE] = 1000
    """Steps from one evaluation to the next; the last step is always evaluated."""

    checkpoint_every: Annotated[Count, MUTABLE] = 500
    """Steps from one checkpoint to the next; the last step is always saved."""

    keep_last: Annotated[Count, MUTABLE] = 3
    """Checkpoints kept, newest first."""

    peer_timeout: Annotated[Count, MUTABLE] = 600
    """Seconds without an answer from another process after which the run ends."""

    wandb: Annotated[str, OneOf("online", "offline", "disabled"), MUTABLE] = "online"
    """Weights & Biases: online (offline where there is no login or network), offline or disabled."""

    dry_run: Annotated[bool, MUTABLE] = False
    """Print the settings that would be used, and stop."""

    memory_options: ClassVar[tuple[str, ...]] = ("batch_size",)  # to lower where memory does not suffice
    schedule_depends_on_steps = False  # whether another `steps` would change the steps already taken

    def run_name(self) -> str:
        """The default run folder's name."""
        return f"{self.preset}-{self.seed}"

    def is_due(self, completed: int, every: int) -> bool:
        """Whether what happens `every` so many steps happens after this one; the last step always counts."""
        return completed % every == 0 or completed == self.steps

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


def conflicts(settings: RunSettings, stored: Mapping[str, Any]) -> list[str]:
    """One line for each setting of a stored run that this command would change in mid-course."""
    given, marked = settings.as_json(), markers(type(settings))
    lines = [
        f"{option(name)} {given[name]} differs from the run's {printable(stored.get(name))}: "
        f"give the run's value, or another --run-dir"
        for name in given
        if MUTABLE not in marked[name] and given[name] != stored.get(name)
    ]
    steps = stored.get("steps")
    if settings.schedule_depends_on_steps and settings.steps != steps:
        lines.append(
            f"--steps {settings.steps} differs from the run's {printable(steps)}, which its learning rate "
            f"depends on: give the run's value, or another --run-dir"
        )
    elif isinstance(steps, int) and settings.steps < steps:
        lines.append(
            f"--steps {settings.steps} is less than the run's {steps}: give at least {steps}, "
            f"or another --run-dir"
        )
    return lines


def from_json(settings_type: type[Settings], stored: Any) -> Settings:
    """The settings that `RunSettings.as_json` wrote.

    Raises:
        UserError: they are none of this type.
    """
    defaults = settings_type()
    try:
        types = {name: type(getattr(defaults, name)) for name in stored}
        given: dict[str, Any] = {
            name: Path(v) if types[name] is type(Path()) else v for name, v in stored.items()
        }
        settings = dataclasses.replace(defaults, **given)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"config.json is damaged, or of another version: {printable(error)}") from None
    mistyped = [
        f"config.json: {name} is {printable(value)}"
        for name, value in given.items()
        if name != "run_dir" and type(value) is not types[name]
    ]
    if lines := mistyped or problems(settings):
        raise UserError(*lines)
    return settings


def from_command_line(
    presets: Mapping[str, Settings], description: str, arguments: list[str] | None = None
) -> Settings:
    """The settings that `arguments` (default: the process's) ask for; `--preset` supplies the defaults.

    Raises:
        UserError: naming every value that is not allowed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = next(iter(presets))
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if word == "--preset":
            chosen = following
        elif word.startswith("--preset="):
            chosen = word.removeprefix("--preset=")
    defaults = presets.get(chosen, next(iter(presets.values())))
    settings = parse(type(defaults), description, defaults, arguments)
    if settings.preset not in presets:
        raise UserError(f"--preset {settings.preset} is not allowed: give {OneOf(*presets).wanted}")
    return settings
