"""What a task changes after its start, and no `state_dict` holds.

An event at one step (`if step == 500: self.net[1].p = 0.1`) lives in an attribute of a module, in a
parameter's `requires_grad`, in a group of an optimizer. A checkpoint has those that differ from a new task's.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from cs324dist.errors import UserError, printable, warn
from cs324dist.runs.optimizers import each

Hidden = dict[str, dict[str, Any]]
"""By owner (a module, a task, a group of an optimizer) and name: the value."""


class HiddenState:
    """Compares a task with what it was at its start."""

    def __init__(self, task: Any) -> None:
        """At its start."""
        self._task = task
        self._first = {place: _as_text(value) for place, value in self._values()}
        self._said: set[tuple[str, str]] = set()

    def changed(self) -> Hidden:
        """What differs from the start; a warning for what no checkpoint can hold."""
        found: Hidden = {}
        for (owner, name), value in self._values():
            if (text := _as_text(value)) != self._first.get((owner, name)):
                if isinstance(text, str):
                    found.setdefault(owner, {})[name] = json.loads(text)
                else:
                    self._say(owner, name, value)
        return found

    def _values(self) -> Iterator[tuple[tuple[str, str], Any]]:
        for owner_name, owner in _owners(self._task):
            if isinstance(owner, Tensor):
                yield (owner_name, "requires_grad"), owner.requires_grad
                continue
            values = owner if isinstance(owner, dict) else vars(owner)
            for name, value in values.items():
                if not (isinstance(owner, nn.Module) and name.startswith("_")) and name != "params":
                    yield (owner_name, name), value

    def _say(self, owner: str, name: str, value: object) -> None:
        """Warn once about a value that looks like state, not like a cache."""
        if (owner, name) not in self._said and isinstance(value, Tensor | list | dict | set):
            self._said.add((owner, name))
            warn(
                f"{owner}.{name} has changed since the start, and is in no checkpoint: a run that is "
                f"continued begins with another; return it in state_dict, or register it as a buffer"
            )

    def restore(self, hidden: Hidden) -> None:
        """Set what `changed` found.

        Raises:
            UserError: it is of another task.
        """
        owners = dict(_owners(self._task))
        for owner_name, values in hidden.items():
            if owner_name not in owners:
                raise UserError(
                    f"the checkpoint has {printable(owner_name)}, and this task has not: it is another task's"
                )
            owner = owners[owner_name]
            for name, value in values.items():
                if isinstance(owner, dict):
                    owner[name] = tuple(value) if isinstance(owner.get(name), tuple) else value
                elif isinstance(owner, Tensor):
                    owner.requires_grad_(bool(value))
                else:
                    setattr(owner, name, value)


def _owners(task: Any) -> Iterator[tuple[str, Any]]:
    yield "task", task
    for network_name, network in task.networks.items():
        for name, module in network.named_modules():
            yield (f"{network_name}.{name}" if name else network_name), module
        for name, parameter in network.named_parameters():
            yield f"{network_name}.{name}", parameter
    for name, optimizer in each(task.optimizers):
        for number, group in enumerate(optimizer.param_groups):
            yield f"optimizer {name}, group {number}", group


def _as_text(value: Any) -> Any:
    """A plain value as JSON; anything else by its identity, a tensor's with its version."""
    try:
        return json.dumps(_plain(value))
    except TypeError:
        is_counted = isinstance(value, Tensor) and not value.is_inference()
        return (id(value), value._version) if is_counted else id(value)


def _plain(value: Any) -> Any:
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if type(value) in (list, tuple):
        return [_plain(part) for part in value]
    if type(value) is dict and all(type(key) is int for key in value):
        return {}  # what each part of the batch has put under its number
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _plain(part) for key, part in value.items()}
    raise TypeError
