"""Command lines: the options of a dataclass, and one line for each word that cannot be used.

The annotation of a field says what is allowed, the docstring under it is the help text of its option.
"""

import argparse
import ast
import dataclasses
import difflib
import enum
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cs324dist.config import POSITIONAL, ConfigT, hints_of, option
from cs324dist.errors import UserError

Options = TypeVar("Options")
Schema = Mapping[str, Any]
NAMES = {"integer": ("INT", "a whole number"), "number": ("FLOAT", "a number")}
ENDS = {
    "exclusiveMinimum": "more than",
    "minimum": "at least",
    "exclusiveMaximum": "less than",
    "maximum": "at most",
}


def from_command_line(
    presets: Mapping[str, ConfigT],
    description: str,
    run_name: Callable[[ConfigT], str],
    arguments: Sequence[str],
) -> ConfigT:
    """The options that `arguments` ask for; `--preset` supplies the defaults, and the first is its default.

    Where `--run-dir` is not given, `run_name` says which folder of `runs/` it is.
    """
    for word in (sys.argv[0], *arguments):
        if re.search(r"[\ud800-\udfff]", word):
            raise UserError(f"{word} is not UTF-8, which the files of a run are: give another name")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", nargs="?", const="", default=next(iter(presets)))
    chosen = first.parse_known_args(arguments)[0].preset
    defaults = dataclasses.replace(presets.get(chosen, next(iter(presets.values()))), preset=chosen)
    defaults = dataclasses.replace(defaults, run_dir=Path("runs") / run_name(defaults))
    hints = {**hints_of(type(defaults)), "preset": Literal[tuple(presets)]}
    given = _parsed(hints, defaults, description, arguments)
    config = dataclasses.replace(defaults, **given)
    return dataclasses.replace(config, run_dir=given.get("run_dir") or Path("runs") / run_name(config))


def parse(options_type: type[Options], description: str, arguments: Sequence[str] | None = None) -> Options:
    """The options, a dataclass, that `arguments` (default: the process's) ask for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return options_type(**_parsed(hints_of(options_type), options_type, description, arguments))


def parse_command(commands: Mapping[str, type[Options]], description: str) -> Options:
    """The options of the command that the first of the process's arguments names; see `parse`."""
    command, *rest = sys.argv[1:] or ("",)
    if command in commands:
        chosen = commands[command]
        return chosen(**_parsed(hints_of(chosen), chosen, chosen.__doc__ or "", rest, command))
    if command in ("-h", "--help"):
        print(f"usage: {Path(sys.argv[0]).name} COMMAND RUN [options]\n\n{description}\ncommands:")
        for name, options_type in commands.items():
            print(f"  {name:<13}{options_type.__doc__}")
        sys.exit()
    wrong = f"{command} is not a command" if command else "a command is missing"
    raise UserError(f"{wrong}: give {', '.join(commands)}, and then the run")


def _parsed(
    hints: Mapping[str, Any], source: Any, description: str, arguments: Sequence[str], command: str = ""
) -> dict[str, Any]:
    """The values that were given, by field of `source`: a dataclass, or one that holds the defaults.

    Raises:
        UserError: a line for everything that is not allowed.
    """
    parser = _Parser(hints, source, description, command)
    given, rest = parser.parse_known_args(arguments)
    values, problems = {}, list(parser.unknown(rest))
    for name, words in vars(given).items():
        adapter: TypeAdapter[Any] = TypeAdapter(hints[name], config=ConfigDict(allow_inf_nan=False))
        choices = _choices(_schema_of(hints[name]))
        try:
            values[name] = adapter.validate_python(choices.get(words, words) if choices else words)
        except ValidationError as invalid:
            if words == "none" and {"type": "null"} in adapter.json_schema().get("anyOf", ()):
                values[name] = None
                continue
            shown = words if isinstance(words, str) else " ".join(words)
            is_of_another_kind = invalid.errors()[0]["type"].endswith(("_parsing", "_type", "_from_float"))
            allowed = _allowed(_schema_of(hints[name]), with_kind=is_of_another_kind)
            problems.append(f"{parser.names[name]} {shown} is not allowed: give {allowed}")
    if problems:
        raise UserError(*problems)
    return values


def _schema_of(hint: Any) -> Schema:
    """The JSON schema of a type, without None."""
    schema = TypeAdapter(hint).json_schema()
    found = next(part for part in schema.get("anyOf", [schema]) if part.get("type") != "null")
    return schema["$defs"][found["$ref"].rpartition("/")[2]] if "$ref" in found else found


def _choices(schema: Schema) -> Mapping[str, Any]:
    """The values that are allowed, by word; empty if they are not listed."""
    listed = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return {str(choice): choice for choice in listed}


def _allowed(schema: Schema, with_kind: bool) -> str:
    """The values that a type allows, in words: their choices or range, and `with_kind` also what they are."""
    if items := _items(schema):
        number = len(items) if "prefixItems" in schema else "one or more"
        return f"{number} values, each {_allowed(items[0], with_kind)}"
    if choices := _choices(schema):
        return "one of " + ", ".join(choices)
    _, kind = NAMES.get(schema.get("type", ""), ("", "a value of its type"))
    range_ = " and ".join(f"{words} {_number(schema[end])}" for end, words in ENDS.items() if end in schema)
    return f"{kind}, {range_}" if range_ and with_kind else range_ or kind


def _items(schema: Schema) -> Sequence[Schema]:
    """The types of a list's values; empty for another type."""
    return schema.get("prefixItems") or ([schema["items"]] if "items" in schema else [])


def _number(value: int | float) -> str:
    """A number, if it is whole with all its digits."""
    return f"{int(value):,}".replace(",", " ") if value == int(value) else f"{value:g}"


class _Parser(argparse.ArgumentParser):
    """Collects the words given for each field; what does not parse is a line of a `UserError`."""

    def __init__(self, hints: Mapping[str, Any], source: Any, description: str, command: str) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            add_help=False,
        )
        self.names: dict[str, str] = {}
        usage = ["%(prog)s", *command.split()]
        headings = getattr(source, "groups", {})
        titles = ("recipe", *headings) if headings else ("options",)
        groups = {title: self.add_argument_group(title) for title in titles}
        docs = _docstrings(source if isinstance(source, type) else type(source))
        for name, hint in hints.items():
            schema, default = _schema_of(hint), getattr(source, name, None)
            if schema.get("type") == "object":  # a nested record has no words
                continue
            words: dict[str, Any] = {"help": _help(docs.get(name, ""), default).replace("%", "%%")}
            is_flag = schema.get("type") == "boolean"
            if is_flag:
                words |= {"action": "store_const", "const": str(not default)}
            else:
                of_one = [*_items(schema), schema][0]
                kind, _ = NAMES.get(of_one.get("type", ""), ("TEXT", ""))
                choices = "{" + ",".join(_choices(schema)) + "}" if _choices(schema) else ""
                words["metavar"] = choices or ("PATH" if of_one.get("format") == "path" else kind)
                words["nargs"] = "+" if _items(schema) else None
            group = groups[next((title for title, names in headings.items() if name in names), titles[0])]
            if POSITIONAL in get_args(hint):
                self.names[name] = name
                usage.append(name.upper())
                group.add_argument(name, **words | {"metavar": name.upper()})
            else:
                self.names[name] = option(f"no_{name}" if is_flag and default else name)
                group.add_argument(self.names[name], dest=name, **words)
        groups[titles[-1]].add_argument("-h", "--help", action="help", help="Show this help, and stop.")
        self.usage = " ".join([*usage, "[options]"])

    def unknown(self, words: Sequence[str]) -> Iterator[str]:
        """A line for each word that is no option, with the nearest that is."""
        after_option = False
        for word in words:
            from accelerate.commands.launch import launch_command_parser  # takes long

            name, _, value = word.partition("=")
            if not word.startswith("-"):
                if not after_option:
                    yield f"{word} is not an option: see --help"
            elif name in launch_command_parser()._option_string_actions:
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


def _help(doc: str, default: Any) -> str:
    default = default.value if isinstance(default, enum.Enum) else default
    if default is None or isinstance(default, bool) or default in ("", ()):
        return doc
    values = default if isinstance(default, tuple) else (default,)
    shown = " ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)
    return f"{doc} (default: {shown})"


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
