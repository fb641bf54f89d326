"""What a task changes after its start, and no `state_dict` holds.

An event at one step (`if step == 500: self.net[1].p = 0.1`) lives in an attribute of the task, of a module or
of an object that the task holds, in a parameter's `requires_grad`, in an optimizer or a group of one. A
checkpoint has those that differ from a new task's.
"""

import random
import re
import zlib
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Collection, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.optim import Optimizer
from torch.utils.data import Dataset

from cs324dist.errors import RANK, UserError, printable, warn
from cs324dist.runs.contents import (
    CONTAINER,
    OF_MODULES,
    SHOWN,
    Contents,
    has_values,
    is_own,
    refilled,
    text_of,
    value_of,
)
from cs324dist.runs.optimizers import each
from cs324dist.runs.state_tree import split

Texts = dict[tuple[str, str], int]
"""By owner and name: the checksum of a content."""
Hidden = dict[str, dict[str, Any]]
"""By owner (a module, a task, a group of an optimizer) and name: the content."""

MOST = 1000  # parts of a container that is searched for objects
EMPTY = ("", "null", "{}", '{"$lost": ["defaultdict", {}]}')
GENERATORS: dict[type, tuple[Any, Any]] = {
    torch.Generator: (torch.Generator.get_state, torch.Generator.set_state),
    random.Random: (random.Random.getstate, random.Random.setstate),
    np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
    np.random.Generator: (
        lambda own: own.bit_generator.state,
        lambda own, state: setattr(own.bit_generator, "state", state),
    ),
}
SHUT = (*SHOWN, *CONTAINER, Tensor, type)
OPEN = (nn.Module, nn.Parameter, Optimizer, Dataset, Namespace, SimpleNamespace, *GENERATORS)
HOOKS = {n for n in OF_MODULES if n.endswith("_hooks")} | {"_post_accumulate_grad_hooks"}
LOST, TENSOR = '"$lost"', r'"\$(on|array)"'  # in the text of a content


NOT_HELD = (
    "no checkpoint can hold it: a run that is continued has it as a new task has; make it in __init__, or "
    "keep it as tensors or numbers"
)
NOT_ALIKE = (
    "is not the same on all processes: a checkpoint holds that of the first; keep it by part, under "
    "batch.index, or add it up, by trainer.sum"
)


class HiddenState:
    """Compares a task with what it was at its start."""

    def __init__(self, task: Any, parts: Collection[int] = (), count: int = 0) -> None:
        """At its start; `parts`: the numbers of this process's parts of the batch, of `count`."""
        self._task, self._parts, self._count = task, {*parts}, count
        self._first = {
            owner: {name: (text_of(content), id(value)) for name, (content, value) in contents.items()}
            for owner, contents in _Walk(task).contents()
        }
        self._later: dict[Any, str] = {}  # what was made after the start, as first seen
        self._said: set[tuple[str, str]] = set()

    def changed(self, gather: Callable[[Texts], list[Texts]] = lambda own: [own]) -> Hidden:
        """What differs from the start; the first process warns of what no checkpoint can hold.

        `gather` gives what each process has, of what this one has.
        """
        found: Hidden = {}
        texts: Texts = {}
        for owner, contents in _Walk(self._task).contents():
            first = self._first.get(owner, {})
            different: dict[str, Any] = {name: {"$deleted": []} for name in first.keys() - contents.keys()}
            for name, (content, value) in contents.items():
                text, (was, identity) = text_of(content), first.get(name, ("", 0))
                by_part = self._is_by_part(value, was)
                if text == was or (by_part and re.search(TENSOR, text)):
                    continue
                if LOST not in text and owner in self._first:
                    if not by_part:
                        texts[owner[0], name] = zlib.crc32(text.encode())
                    is_same = id(value) == identity and isinstance(value, (Tensor, np.ndarray, *CONTAINER))
                    different[name] = {"$same": content} if is_same else content
                # What is made once and then stays is a cache.
                elif was not in ("", "null") or self._later.setdefault((owner, name), text) != text:
                    self._say(owner[0], name, NOT_HELD)
            if different:
                found[owner[0]] = different
        for other in gather(texts):
            for place in {**texts, **other}:
                if other.get(place) != texts.get(place):
                    self._say(*place, NOT_ALIKE)
        return found

    def _is_by_part(self, value: Any, was: str) -> bool:
        """Whether each part of the batch has put something under its number."""
        if isinstance(value, list):
            return bool(value) and was == text_of([None] * self._count)
        if not (isinstance(value, dict) and value and was in EMPTY):
            return False
        # A check of another process's part leaves its number too.
        return self._parts <= value.keys() <= {*range(self._count)}

    def _say(self, owner: str, name: str, why: str) -> None:
        if RANK == "0" and (owner, name) not in self._said:
            self._said.add((owner, name))
            warn(f"{owner}.{name} has changed since the start, and {why}")

    def restore(self, hidden: Hidden) -> None:
        """Set what `changed` found.

        Raises:
            UserError: it is of another task.
        """
        owners = _Walk(self._task).owners
        for owner, values in hidden.items():
            if owner not in owners:
                raise UserError(
                    f"the checkpoint has {printable(owner)}, and this task has not: it is another task's"
                )
            for name, content in values.items():
                try:
                    _set(owners[owner], name, content)
                except Exception:  # such as a generator of another kind
                    raise UserError(
                        f"the checkpoint's {printable(f'{owner}.{name}')} does not fit: it is another task's"
                    ) from None


class _Walk:
    """Everything whose attributes count, by name, and what they hold now."""

    def __init__(self, task: Any) -> None:
        self.owners: dict[str, Any] = {}
        self._names: dict[int, str] = {}
        optimizers = {f"optimizer {name}": optimizer for name, optimizer in each(task.optimizers)}
        groups = {f"{n}, group {i}": g for n, o in optimizers.items() for i, g in enumerate(o.param_groups)}
        first = {**task.networks, **optimizers, **groups, "task": task}
        ahead = [*reversed(first.items())]
        while ahead:
            name, owner = ahead.pop()
            if id(owner) not in self._names:
                self._names[id(owner)], self.owners[name] = name, owner
                inner = self._members(name).items()
                parts = [part for member, value in inner for part in _objects(f"{name}.{member}", value)]
                ahead += reversed(parts)
        saved = {f"state_dict()[{name}]": tensor for name, tensor in split(task.state_dict())[1].items()}
        for name, network in task.networks.items():
            tensors = (*network.named_parameters(), *network.named_buffers())
            saved |= {f"{name}.{inner}": tensor for inner, tensor in tensors}
        for name, optimizer in optimizers.items():
            states = enumerate(optimizer.state.values())
            saved |= {f"{name}, {i}.{key}": value for i, state in states for key, value in state.items()}
        places = {
            tensor.untyped_storage().data_ptr(): name
            for name, tensor in saved.items()
            if isinstance(tensor, Tensor) and has_values(tensor) and tensor.numel()
        }
        self._contents = Contents(self._names, places)

    def contents(self) -> Iterator[tuple[tuple[str, type], dict[str, tuple[Any, Any]]]]:
        """By owner and its class, and by name: a content, as `Hidden` has it, and of which value it is."""
        for name, owner in self.owners.items():
            members = self._members(name)
            yield (
                (name, type(owner)),
                {key: (self._contents.of(value), value) for key, value in members.items()},
            )

    def _members(self, name: str) -> dict[str, Any]:
        owner = self.owners[name]
        if isinstance(owner, dict):
            return {key: value for key, value in owner.items() if key != "params"}
        if type(owner) in GENERATORS:
            return {"state": GENERATORS[type(owner)][0](owner)}
        if isinstance(owner, nn.Parameter):
            return {"requires_grad": owner.requires_grad, "_hooks": _hooks(owner)}
        if isinstance(owner, nn.Module):
            own = {key: value for key, value in vars(owner).items() if key not in OF_MODULES}
            own |= {**owner._parameters, **owner._buffers, **owner._modules}
            return {**own, "_hooks": _hooks(owner)}
        has_private = is_own(owner)
        own = {key: value for key, value in vars(owner).items() if has_private or not key.startswith("_")}
        if isinstance(owner, Optimizer):
            own = {key: value for key, value in own.items() if not key.endswith("_hooks")}
            if name.startswith("optimizer "):  # one of the task's
                own = {key: value for key, value in own.items() if key not in ("state", "param_groups")}
        return own


def _hooks(owner: Any) -> dict[str, int]:
    """How many hooks there are: none can be saved."""
    return {"$lost": sum(len(getattr(owner, name, None) or ()) for name in HOOKS)}


def _objects(name: str, value: Any, depth: int = 4) -> Iterator[tuple[str, Any]]:
    """The objects in a value whose attributes count."""
    if isinstance(value, OPEN) or (not isinstance(value, SHUT) and is_own(value) and _has_attributes(value)):
        if not isinstance(value, ScriptModule):
            yield name, value
    elif depth and isinstance(value, dict | list | tuple | deque) and len(value) <= MOST:
        for key, part in dict(value).items() if isinstance(value, dict) else enumerate(tuple(value)):
            yield from _objects(f"{name}[{key!r}]", part, depth - 1)


def _has_attributes(value: Any) -> bool:
    try:
        return isinstance(vars(value), dict)
    except Exception:  # of its own __getattr__, or it has slots
        return False


@torch.no_grad()
def _set(owner: Any, name: str, content: Any) -> None:
    if type(owner) in GENERATORS:
        GENERATORS[type(owner)][1](owner, value_of(content))
        return
    if isinstance(owner, nn.Parameter):
        owner.requires_grad_(bool(content))
        return
    if name.startswith("__") or callable(getattr(type(owner), name, None)):
        raise ValueError  # a forged checkpoint
    place = owner if isinstance(owner, dict) else vars(owner)
    if isinstance(content, dict) and "$deleted" in content:
        place.pop(name, None)
        return
    tensors = {**owner._parameters, **owner._buffers} if isinstance(owner, nn.Module) else {}
    was, value = tensors.get(name, place.get(name)), value_of(content)
    if isinstance(was, Tensor) and isinstance(value, Tensor):
        value = value.to(was.device)
    in_place = name in tensors or (isinstance(content, dict) and "$same" in content)
    if not (in_place and refilled(was, value)):
        place[name] = value
