"""Command lines from frozen dataclasses: a field's annotation says what is allowed."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any, get_type_hints

import tyro

from cs324dist.errors import UserError


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
        self,
        low: int | float,
        high: int | float = math.inf,
        *,
        open_below: bool = False,
        open_above: bool = False,
    ) -> None:
        self.low, self.high, self.open_below, self.open_above = low, high, open_below, open_above
        self.wanted = f"{'more than' if open_below else 'at least'} {low:g}"
        if high < math.inf:
            self.wanted += f" and {'less than' if open_above else 'at most'} {high:g}"

    def allows(self, value: int | float) -> bool:
        """Whether it lies within; NaN and the infinities never do."""
        above = value > self.low if self.open_below else value >= self.low
        below = value < self.high if self.open_above else value <= self.high
        return abs(value) != math.inf and above and below  # and NaN is neither above nor below


POSITIVE = Within(0.0, 1e9, open_below=True)
FRACTION = Within(0.0, 1.0, open_above=True)
Count = Annotated[int, Within(1, 10**9)]


def option(field: str) -> str:
    """The command line's name of a field."""
    return "--" + field.replace("_", "-")


def markers(options_type: type) -> dict[str, tuple[Any, ...]]:
    """What the annotations of each field hold beside its type."""
    hints = get_type_hints(options_type, include_extras=True)
    return {f.name: getattr(hints[f.name], "__metadata__", ()) for f in dataclasses.fields(options_type)}


def problems(options: Any) -> list[str]:
    """One line for each value that is not allowed."""
    return [
        f"{option(name)} {value} is not allowed: give {rule.wanted}"
        for name, rules in markers(type(options)).items()
        for rule in rules
        if (value := getattr(options, name)) is not None
        and isinstance(rule, OneOf | Within)
        and not rule.allows(value)
    ]


def parse(
    options_type: Any,
    description: str,
    default: Any = None,
    arguments: Sequence[str] | None = None,
) -> Any:
    """The options that `arguments` (default: the process's) ask for; what does not parse exits with 2.

    Raises:
        UserError: naming every value that parses and is not allowed.
    """
    options = tyro.cli(
        options_type,
        default=tyro.MISSING_NONPROP if default is None else default,
        args=arguments,
        description=description,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if lines := problems(options):
        raise UserError(*lines)
    return options
