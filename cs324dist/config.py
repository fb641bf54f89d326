"""Options and records: frozen dataclasses whose annotations say what is allowed.

They are read from command lines and from JSON. A docstring under a field is the help text of its option.
"""

import argparse
import ast
import dataclasses
import difflib
import enum
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import Interval
from pydantic import ConfigDict, TypeAdapter, ValidationError

from cs324dist.errors import UserError, printable
from cs324dist.schedules import learning_rate_factor

Options = TypeVar("Options")
Record = TypeVar("Record")


class Marker(enum.Enum):
    """What an annotation can say of an option beside its type and range."""

    MUTABLE = "may have another value when a run is continued: the steps already taken do not depend on it"
    POSITIONAL = "stands on the command line without a name"


@dataclass(frozen=True)
class ForOlderRuns:
    """The value of an option in runs that were made before there was this option."""

    value: Any


MUTABLE, POSITIONAL = Marker.MUTABLE, Marker.POSITIONAL
Count = Annotated[int, Interval(ge=1, le=10**9)]
Positive = Annotated[float, Interval(gt=0, le=1e9)]
Fraction = Annotated[float, Interval(ge=0, lt=1)]
Seed = Annotated[int, Interval(ge=0, lt=2**63)]
BatchSize = Annotated[int, Interval(ge=1, le=1_000_000)]


@dataclass(frozen=True)
class Config:
    """The options that every task has."""

    preset: Annotated[str, MUTABLE] = ""
    """Named recipe that the other defaults come from."""

    run_dir: Annotated[Path | None, MUTABLE] = None
    """Run folder. To continue a run, give the same command again."""

    steps: Annotated[Count, MUTABLE] = 1000
    """Optimization steps in total."""

    log_every: Annotated[Count, MUTABLE] = 50
    """Steps between lines of metrics."""

    evaluate_every: Annotated[Count, MUTABLE] = 1000
    """Steps between evaluations; the last step is always evaluated."""

    checkpoint_every: Annotated[Count, MUTABLE] = 500
    """Steps between checkpoints; the last step is always saved."""

    keep_last: Annotated[Count, MUTABLE] = 3
    """Number of newest checkpoints that are kept."""

    peer_timeout: Annotated[Count, MUTABLE] = 600
    """Seconds without an answer from another process after which the run ends."""

    wandb: Annotated[Literal["online", "offline", "disabled"], MUTABLE] = "online"
    """Weights & Biases: online (offline if there is no login or network), offline or disabled."""

    dry_run: Annotated[bool, MUTABLE] = False
    """Print the settings that would be used, and stop."""

    seed: Seed = 0
    """Seed of everything random."""

    batch_size: BatchSize = 64
    """Samples in the global batch; each process takes an equal share."""

    micro_batches: Count | None = None
    """Equal parts that the global batch is cut into. The result is then equal to the last bit on any number
    of processes up to this one. Without it: one part per process, averaged by DDP, equal up to rounding."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate over the steps: constant, or falling to zero in a line or along half a cosine."""

    warmup_steps: Annotated[int, Interval(ge=0, le=10**9)] = 0
    """Steps over which the learning rate first rises in a line."""

    max_grad_norm: Positive | None = None
    """Largest norm of a network's gradient; larger ones are scaled down. none: no limit."""

    groups: ClassVar[Mapping[str, Sequence[str]]] = {
        "run": ("preset", "run_dir", "steps", "log_every", "evaluate_every", "checkpoint_every", "keep_last",
                "peer_timeout", "wandb", "dry_run"),
        "data": ("seed", "batch_size", "micro_batches", "dataset", "data_root", "data", "length", "encoding"),
        "model": ("model", "kernel", "hidden_size", "latent_dim", "initialisation", "batch_norm"),
    }  # fmt: skip
    """Headings of the help page and the options below them; all others are below `recipe`."""

    memory_options: ClassVar[tuple[str, ...]] = ("batch_size",)
    """Options that are suggested when memory runs out."""

    def learning_rate_factor(self, step: int) -> float:
        """The factor on every learning rate at `step`, counted from 0."""
        return learning_rate_factor(self.schedule, step, self.steps, self.warmup_steps)

    def is_due(self, completed: int, every: int) -> bool:
        """Whether something done every `every` steps is due now; after the last step it always is."""
        return completed % every == 0 or completed == self.steps

    @property
    def folder(self) -> Path:
        """The run folder."""
        assert self.run_dir is not None, "set by `from_command_line`"
        return self.run_dir


ConfigT = TypeVar("ConfigT", bound=Config)


def conflicts(config: Config, stored: Config) -> list[str]:
    """One line for each option of a stored run that this command would change halfway."""
    marked = markers(type(config))
    lines = [
        f"{option(name)} {value} differs from the run's {printable(getattr(stored, name))}: "
        f"give the run's value, or another --run-dir"
        for name, value in vars(config).items()
        if MUTABLE not in marked[name] and value != getattr(stored, name)
    ]
    sampled = range(0, stored.steps, -(-stored.steps // 1000))
    if any(config.learning_rate_factor(step) != stored.learning_rate_factor(step) for step in sampled):
        if config.steps != stored.steps:
            lines.append(
                f"--steps {config.steps} differs from the run's {stored.steps}, which its learning rate "
                f"depends on: give the run's value, or another --run-dir"
            )
    elif config.steps < stored.steps:
        lines.append(
            f"--steps {config.steps} is less than the run's {stored.steps}: give at least {stored.steps}, "
            f"or another --run-dir"
        )
    return lines


def markers(record_type: Any) -> dict[str, tuple[Any, ...]]:
    """What the annotation of each field holds beside its type."""
    return {name: _metadata(hint) for name, hint in _hints(record_type).items()}


def _hints(record_type: Any) -> dict[str, Any]:
    hints = get_type_hints(record_type, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(record_type)}


# JSON


def as_json(record: Any) -> dict[str, Any]:
    """A record as JSON values."""
    return _adapter(type(record)).dump_python(record, mode="json")


def from_json(record_type: type[Record], content: Any, source: str) -> Record:
    """The record in the content of a JSON file, strictly typed; `source` names it in errors.

    Raises:
        UserError: it has another format, or a line for each field that is missing, unknown or not allowed.
    """
    hints, content = _hints(record_type), content if isinstance(content, dict) else {}
    if "format" in hints and content.get("format") != (supported := get_args(hints["format"])[0]):
        raise UserError(
            f"{source} has format {printable(content.get('format'))}, this version reads format {supported}: "
            f"use the version that wrote it, or give another folder"
        )
    older = {
        name: marker.value
        for name, of_field in markers(record_type).items()
        for marker in of_field
        if isinstance(marker, ForOlderRuns)
    }
    if unknown := sorted(content.keys() - hints.keys()):
        raise UserError(f"{source}: {printable(unknown[0])} is unknown: it is damaged, or of a newer version")
    try:
        return _adapter(record_type).validate_json(json.dumps({**older, **content}), strict=True)
    except ValidationError as invalid:
        if invalid.errors()[0]["type"] == "json_invalid":  # nested too deeply, or half of a surrogate pair
            raise UserError(f"{source} is damaged, or not a file of this project") from None
        lines = [
            f"{source}: {'.'.join(printable(part) for part in error['loc'])} is "
            f"{'missing' if error['type'] == 'missing' else printable(error['input'])}"
            for error in invalid.errors(include_url=False)
        ]
        raise UserError(*lines) from None


def _adapter(record_type: Any) -> Any:
    return _adapters(record_type)


@cache
def _adapters(record_type: Hashable) -> Any:
    return TypeAdapter(record_type)  # type: ignore[arg-type]


# Command lines


def option(field: str) -> str:
    """The command line's name of a field."""
    return "--" + field.replace("_", "-")


def from_command_line(
    presets: Mapping[str, ConfigT],
    description: str,
    run_name: Callable[[ConfigT], str],
    arguments: Sequence[str] | None = None,
) -> ConfigT:
    """The options that `arguments` (default: the process's) ask for; `--preset` supplies the defaults.

    Args:
        presets: recipes by name; the first is the default.
        description: shown above the options by `--help`.
        run_name: the name of the run folder below `runs/` where `--run-dir` is not given.
        arguments: words of the command line.

    Raises:
        UserError: a line for every value that is not allowed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?", const="", default=next(iter(presets)))
    chosen = first.parse_known_args(arguments)[0].preset
    defaults = presets.get(chosen, next(iter(presets.values())))
    defaults = dataclasses.replace(defaults, preset=chosen)
    defaults = dataclasses.replace(defaults, run_dir=Path("runs") / run_name(defaults))
    hints = {**_hints(type(defaults)), "preset": Annotated[Literal[tuple(presets)], MUTABLE]}
    values = _parsed(hints, type(defaults), description, defaults, arguments)
    config = dataclasses.replace(defaults, **values)
    return (
        config
        if "run_dir" in values
        else dataclasses.replace(config, run_dir=Path("runs") / run_name(config))
    )


def parse(options_type: type[Options], description: str, arguments: Sequence[str] | None = None) -> Options:
    """The options, a dataclass, that `arguments` (default: the process's) ask for.

    Raises:
        UserError: a line for everything that is not allowed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    return options_type(**_parsed(_hints(options_type), options_type, description, None, arguments))


def parse_command(
    commands: Mapping[str, type[Options]], description: str, arguments: Sequence[str] | None = None
) -> Options:
    """The options of the command that the first of `arguments` names; see `parse`."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ("",)
    if command in commands:
        return parse(commands[command], inspect.cleandoc(commands[command].__doc__ or ""), rest)
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    listed = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, options_type in commands.items():
        listed.add_parser(name, help=(options_type.__doc__ or "").partition("\n")[0])
    if command in ("-h", "--help"):
        parser.parse_args([command])
    wrong = f"{command} is not a command" if command else "a command is missing"
    raise UserError(f"{wrong}: give {', '.join(commands)}, and then the run")


def _parsed(
    hints: Mapping[str, Any], options_type: Any, description: str, defaults: Any, arguments: Sequence[str]
) -> dict[str, Any]:
    """The values that were given, by field."""
    parser = _Parser(hints, options_type, description, defaults)
    given, rest = parser.parse_known_args(arguments)
    values, problems = {}, list(parser.unknown(rest))
    for name, words in vars(given).items():
        try:
            values[name] = _converted(hints[name], words)
        except ValidationError as invalid:
            line = f"{words if isinstance(words, str) else ' '.join(words)} is not allowed"
            parses = not invalid.errors()[0]["type"].endswith(("_parsing", "_type", "_from_float"))
            problems.append(f"{parser.names[name]} {line}: give {allowed(hints[name], with_kind=not parses)}")
    if problems:
        raise UserError(*problems)
    return values


def _converted(hint: Any, words: Any) -> Any:
    adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))
    try:
        return adapter.validate_strings(words) if isinstance(words, str) else adapter.validate_python(words)
    except ValidationError:
        if words == "none" and _allows_none(hint):
            return None
        raise


def _allows_none(hint: Any) -> bool:
    return _allows_none(get_args(hint)[0]) if get_origin(hint) is Annotated else type(None) in get_args(hint)


def _bare(hint: Any) -> Any:
    """A type without what its annotation says, and without None."""
    if get_origin(hint) is Annotated:
        return _bare(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return _bare(next(part for part in get_args(hint) if part is not type(None)))
    return hint


def _choices(hint: Any) -> list[str]:
    bare = _bare(hint)
    if get_origin(bare) is Literal:
        return list(map(str, get_args(bare)))
    return [str(member.value) for member in bare] if isinstance(bare, enum.EnumMeta) else []  # type: ignore[var-annotated]


def allowed(hint: Any, *, with_kind: bool = False) -> str:
    """The values that a type allows, in words: their range or choices, and `with_kind` also what they are."""
    if choices := _choices(hint):
        return "one of " + ", ".join(choices)
    kind = {int: "a whole number", float: "a number"}.get(_bare(hint), "a value of its type")
    parts = [hint, *get_args(hint)]
    interval = next(
        (m for part in parts for m in getattr(part, "__metadata__", ()) if isinstance(m, Interval)), None
    )
    if interval is None:
        return kind
    ends = {
        "more than": interval.gt,
        "at least": interval.ge,
        "less than": interval.lt,
        "at most": interval.le,
    }
    range_ = " and ".join(f"{word} {end:g}" for word, end in ends.items() if end is not None)
    return f"{kind}, {range_}" if with_kind else range_


class _Parser(argparse.ArgumentParser):
    """Collects the words given for each field; what does not parse is a line of a `UserError`."""

    def __init__(self, hints: Mapping[str, Any], options_type: Any, description: str, defaults: Any) -> None:
        super().__init__(
            usage="%(prog)s [options]",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        self.names = {
            name: name if POSITIONAL in _metadata(hint) else option(name)
            for name, hint in hints.items()
            if not dataclasses.is_dataclass(_bare(hint))  # which has no words
        }
        docs, listed = _docstrings(options_type), getattr(options_type, "groups", {})
        groups = {
            title: self.add_argument_group(title) for title in (*listed, "recipe" if listed else "options")
        }
        for field in (field for field in dataclasses.fields(options_type) if field.name in self.names):
            title = next((title for title, names in listed.items() if field.name in names), [*groups][-1])
            default = field.default if defaults is None else getattr(defaults, field.name)
            self._add(groups[title], field.name, hints[field.name], docs.get(field.name, ""), default)

    def _add(self, group: Any, name: str, hint: Any, doc: str, default: Any) -> None:
        bare, default = _bare(hint), default.value if isinstance(default, enum.Enum) else default
        shown = f"{default:.4g}" if isinstance(default, float) else str(default)
        if not any(default is no for no in (None, False, dataclasses.MISSING)) and bare is not bool:
            doc = f"{doc} (default: {shown})"
        doc = doc.replace("%", "%%")
        if bare is bool:
            word = self.names[name] if not default else f"--no-{self.names[name][2:]}"
            group.add_argument(word, dest=name, action="store_const", const=str(not default), help=doc)
            return
        choices = ",".join(_choices(hint))
        several = get_origin(bare) in (tuple, list)
        kind = {int: "INT", float: "FLOAT", Path: "PATH"}.get(
            _bare(get_args(bare)[0]) if several else bare, "TEXT"
        )
        metavar = "{" + choices + "}" if choices else kind
        if self.names[name] == name:  # positional
            group.add_argument(name, metavar=name.upper(), nargs="+" if several else None, help=doc)
        else:
            group.add_argument(
                self.names[name], dest=name, metavar=metavar, nargs="+" if several else None, help=doc
            )

    def unknown(self, words: Sequence[str]) -> Iterator[str]:
        """A line for each word that is no option, with the nearest that is."""
        after_option = False
        for word in words:
            name, _, value = word.partition("=")
            if not word.startswith("-"):
                if not after_option:
                    yield f"{word} is not an option: see --help"
            elif name in _options_of_accelerate_launch():
                yield f"{name} is an option of accelerate launch: give it before the name of the script"
            elif near := difflib.get_close_matches(name.replace("_", "-"), self.names.values(), 1):
                yield f"{name} is unknown: did you mean {near[0]}?"
            else:
                yield f"{name} is unknown: see --help"
            after_option = word.startswith("-") and not value

    def error(self, message: str) -> NoReturn:
        """One line in place of the usage and an exit."""
        message = re.sub(r"argument (\S+): expected .*", r"\1 needs a value", message)
        raise UserError(message.replace("the following arguments are required", "missing"))


def _metadata(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__metadata__", ())


def _options_of_accelerate_launch() -> Collection[str]:
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()._option_string_actions


def _docstrings(options_type: Any) -> dict[str, str]:
    """The docstrings under the fields of a dataclass and of those it inherits from."""
    docs: dict[str, str] = {}
    parts: list[Any] = [part for part in reversed(options_type.__mro__) if dataclasses.is_dataclass(part)]
    for part in parts:
        try:
            body: Any = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]
        except (OSError, TypeError):  # defined where there is no source
            continue
        for field, below in pairwise(body.body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                docs[ast.unparse(field.target)] = " ".join(ast.literal_eval(below.value).split())
    return docs
