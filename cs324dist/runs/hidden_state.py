"""What a task changes after its start, and no `state_dict` holds.

An event at one step (`if step == 500: self.net[1].p = 0.1`) lives in an attribute of the task, of a module or
of an object that the task holds, in a parameter's `requires_grad`, in an optimizer or a group of one. A
checkpoint has those that differ from a new task's.
"""

import json
import math
import random
import re
import sys
import sysconfig
import zlib
from argparse import Namespace
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from datetime import date
from enum import Enum
from itertools import count
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from cs324dist.errors import RANK, UserError, printable, warn
from cs324dist.runs.optimizers import each
from cs324dist.runs.state_tree import split

Texts = dict[tuple[str, str], int]
"""By owner and name: the checksum of a content."""
Hidden = dict[str, dict[str, Any]]
"""By owner (a module, a task, a group of an optimizer) and name: the content."""

MOST = 1000  # parts of a container that is searched for objects
SAMPLE = 1 << 20  # values of a tensor that are compared
CONTAINERS = {kind.__name__: kind for kind in (tuple, set, frozenset, deque, OrderedDict, Counter)}
CONTAINER = (list, tuple, dict, set, frozenset, deque)
BY_PART = r'|null|\{\}|\[null(, null)*\]|\{"\$lost": \["defaultdict", \{\}\]\}'
"""What stands at the start where each part of the batch puts something under its number."""
SHOWN = (str, int, float, bytes, complex, Enum, PurePath, range, slice, date, torch.dtype, torch.device)
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
INSTALLED = (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), str(Path(__file__).parents[1]))
OF_MODULES = vars(nn.Module()).keys() - {"training"}
HOOKS = {n for n in OF_MODULES if n.endswith("_hooks")} | {"_post_accumulate_grad_hooks"}
LOST, TENSOR = '"$lost"', r'"\$(on|array)"'  # in the text of a content
NUMBERS = "?bBhHiIlLqQefd"  # of numpy
PLACES = count()  # of iterators, each another
KEPT = {torch.complex64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
KEPT |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}


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

    def __init__(self, task: Any) -> None:
        """At its start."""
        self._task = task
        self._first = {
            owner: {name: (_text(content), id(value)) for name, (content, value) in contents.items()}
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
                text, (was, identity) = _text(content), first.get(name, ("", 0))
                by_part = _is_numbered(value) and bool(re.fullmatch(BY_PART, was))
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
                except (AttributeError, TypeError, ValueError):  # such as a generator of another kind
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
        self._saved = {
            tensor.untyped_storage().data_ptr(): name
            for name, tensor in saved.items()
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.numel()
        }

    def contents(self) -> Iterator[tuple[tuple[str, type], dict[str, tuple[Any, Any]]]]:
        """By owner and its class, and by name: a content, as `Hidden` has it, and of which value it is."""
        for name, owner in self.owners.items():
            members = self._members(name)
            yield (name, type(owner)), {key: (self._content(value), value) for key, value in members.items()}

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
        has_private = _is_own(owner)
        own = {key: value for key, value in vars(owner).items() if has_private or not key.startswith("_")}
        if isinstance(owner, Optimizer):
            own = {key: value for key, value in own.items() if not key.endswith("_hooks")}
            if name.startswith("optimizer "):  # one of the task's
                own = {key: value for key, value in own.items() if key not in ("state", "param_groups")}
        return own

    def _content(self, value: Any) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return {"$float": "nan"} if math.isnan(value) else value
        if isinstance(value, np.generic) and value.dtype.char in NUMBERS:
            return {"$scalar": [value.dtype.str, self._content(value.item())]}
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if type(value) in (list, *CONTAINERS.values(), dict):
            return self._container(value)
        if isinstance(value, CONTAINER):
            return {"$lost": [type(value).__name__, self._container(value)]}
        if isinstance(value, SHOWN):
            return {"$lost": repr(value)}
        if hasattr(value, "__qualname__"):  # a function
            line = getattr(getattr(value, "__code__", None), "co_firstlineno", 0)
            return {"$lost": [value.__qualname__, line]}
        if isinstance(value, Iterator) and not _is_own(value) and not hasattr(value, "readline"):
            return {"$lost": next(PLACES)}  # where it is cannot be seen
        return {"$lost": [self._names.get(id(value), ""), type(value).__qualname__]}

    def _array(self, value: Any) -> Any:
        if type(value) is np.ndarray and value.flags.writeable:
            if value.dtype.char in NUMBERS and value.dtype.isnative:
                return {"$array": torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))}
            return {"$lost": self._content(value.tolist())}
        return {"$lost": id(value)}

    def _tensor(self, value: Tensor) -> Any:
        if value.layout is not torch.strided or value.is_meta or value.dtype not in KEPT:
            return {"$lost": [id(value), value._version]}
        if value.numel() and (name := self._saved.get(value.untyped_storage().data_ptr())):
            return {"$lost": name}
        return {"$on": value.device.type, "of": value.detach()}

    def _container(self, value: Any) -> Any:
        if isinstance(value, dict):
            if all(type(key) is str for key in value):
                inner: Any = {key: self._content(part) for key, part in value.items()}
            else:
                keys = ({"$lost": "tensor"} if isinstance(k, Tensor) else self._content(k) for k in value)
                inner = {
                    "$items": [[key, self._content(value[k])] for key, k in zip(keys, value, strict=True)]
                }
        else:
            inner = [self._content(part) for part in value]
            if isinstance(value, set | frozenset):
                inner.sort(key=_text)
        kind = type(value).__name__
        if isinstance(value, deque):
            return {"$deque": inner, "most": value.maxlen}
        return {f"${kind}": inner} if kind in CONTAINERS else inner


def _hooks(owner: Any) -> dict[str, int]:
    """How many hooks there are: none can be saved."""
    return {"$lost": sum(len(getattr(owner, name, None) or ()) for name in HOOKS)}


def _objects(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The objects in a value whose attributes count."""
    if isinstance(value, OPEN) or (
        hasattr(value, "__dict__") and _is_own(value) and not isinstance(value, SHUT)
    ):
        yield name, value
    elif isinstance(value, dict | list | tuple | deque) and len(value) <= MOST:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _objects(f"{name}[{key!r}]", part)


def _is_own(value: Any) -> bool:
    """Whether its class is the user's own, and of no library."""
    module = type(value).__module__
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return module.partition(".")[0] not in sys.stdlib_module_names and not file.startswith(INSTALLED)


def _text(content: Any) -> str:
    return json.dumps(content, default=_checksum)


def _checksum(tensor: Tensor) -> list[Any]:
    flat = tensor.reshape(-1)
    some = flat[:: 1 + len(flat) // SAMPLE].resolve_conj().resolve_neg().contiguous().cpu().view(torch.uint8)
    version = tensor._version if len(flat) > SAMPLE and not tensor.is_inference() else 0
    return [str(tensor.dtype), *tensor.shape, version, zlib.crc32(some.numpy().data)]


def _is_numbered(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, dict) and all(type(key) is int for key in value))


@torch.no_grad()
def _set(owner: Any, name: str, content: Any) -> None:
    if type(owner) in GENERATORS:
        GENERATORS[type(owner)][1](owner, _value(content))
        return
    if isinstance(owner, nn.Parameter):
        owner.requires_grad_(bool(content))
        return
    place = owner if isinstance(owner, dict) else vars(owner)
    if isinstance(content, dict) and "$deleted" in content:
        place.pop(name, None)
        return
    tensors = {**owner._parameters, **owner._buffers} if isinstance(owner, nn.Module) else {}
    was, value = tensors.get(name, place.get(name)), _value(content)
    in_place = name in tensors or (isinstance(content, dict) and "$same" in content)
    if not (in_place and _refilled(was, value)):
        place[name] = value


def _refilled(was: Any, value: Any) -> bool:
    """Whether a value has been put into what was there, which others may hold as well."""
    if type(was) is type(value) and isinstance(was, list | deque | dict | set):
        was.clear()
        was.update(value) if isinstance(was, dict | set) else was.extend(value)
        return True
    fits = isinstance(was, Tensor | np.ndarray) and isinstance(value, Tensor | np.ndarray)
    if fits and (was.shape, was.dtype) == (value.shape, value.dtype):
        was[...] = value
        return True
    return False


def _value(content: Any) -> Any:
    if isinstance(content, list):
        return [_value(part) for part in content]
    if not isinstance(content, dict):
        return content
    match content:
        case {"$same": inner}:
            return _value(inner)
        case {"$on": device, "of": tensor}:
            return tensor.to(device)
        case {"$array": tensor}:
            return tensor.numpy()
        case {"$scalar": [kind, number]}:
            return np.dtype(kind).type(number)
        case {"$items": items}:
            return {_value(key): _value(part) for key, part in items}
        case {"$deque": inner, "most": most}:
            return deque(_value(inner), most)
    for kind, inner in content.items():
        if kind[1:] in CONTAINERS and kind[0] == "$":
            return CONTAINERS[kind[1:]](_value(inner))
    return {key: _value(part) for key, part in content.items()}
