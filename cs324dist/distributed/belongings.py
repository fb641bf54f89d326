"""What belongs to one part of the batch while parts take turns: generators, and attributes that a loss sets.

A loss that says `self.y = y` means the `y` of its part. So attributes of the task, of modules and of objects
of users' classes are put away when another part goes on, and brought back when this part does. After the
update they have the values of before: nothing depends on which part came last.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from cs324dist.data.streams import generators, set_generators
from cs324dist.distributed.batch_norm import tensors_over_batch
from cs324dist.errors import RANK, UserError, is_of_a_library, warn
from cs324dist.runs.contents import OF_MODULES, has_numbers, has_values

CONTAINERS = (dict, list, set, deque)
HOLDERS = (dict, list, tuple, deque, np.ndarray)
MOST = 10_000  # entries of a container that is looked at in every step; a longer one is data


class Attributes:
    """The attributes of an object at one time, and the content of its containers."""

    def __init__(self, owner: object) -> None:
        self.values = dict(vars(owner))
        containers = {n: v for n, v in self.values.items() if isinstance(v, CONTAINERS) and len(v) <= MOST}
        self.contents = {name: _content_of(value) for name, value in containers.items()}
        # Most containers of a module are empty, and stay so.
        self._empty = [value for value in containers.values() if not value]
        filled = [value for value in containers.values() if value]
        self._views = [view for v in filled for view in ((v, v.values()) if isinstance(v, dict) else (v,))]
        self._seen = list(self._all(owner))

    def _all(self, owner: object) -> Iterator[object]:
        """All names, values and entries, and a mark at the end."""
        return chain(vars(owner), vars(owner).values(), *self._views, (Attributes,))

    def are_those_of(self, owner: object) -> bool:
        """Whether nothing has changed; a quick look, which may say no for another order."""
        return not any(self._empty) and all(map(is_, self._all(owner), self._seen))


@dataclass(frozen=True)
class Kept:
    """What `PartBelongings.put_away` gives."""

    generators: tuple[Any, ...]
    attributes: dict[str, Attributes]


class PartBelongings:
    """The generators, and the attributes of the owners."""

    def __init__(self, owners: Mapping[str, object], device: torch.device, parts: int) -> None:
        """`owners` of attributes by name; what one of `parts` puts under its own number stays."""
        self.owners, self._device, self._parts = owners, device, parts
        self._mixed: set[tuple[str, str]] = set()  # containers in which a part used other numbers too
        self._last: dict[str, Attributes] = {}  # that were put away or taken out
        self.noted: Callable[[int], Mapping[str, Tensor]] = lambda _: {}
        """What else the loss of a part gave, such as metrics, which a check compares as well."""
        self.said: dict[str, str] = {}
        """Lines about attributes that were put away, by the attribute's name."""

    @contextmanager
    def restored(self, index: int | None = None) -> Iterator[Kept]:
        """At the end, bring back the state of the beginning; inside is part `index`, or several."""
        unchanged, kept = Unchanged(self.owners), self.put_away()
        try:
            yield kept
            unchanged.check()  # before what the loss has set is gone
        finally:
            self.put_away(index)
            self.take_out(kept, none_changed=True)

    def put_away(self, index: int | None = None) -> Kept:
        """Their present state; `index`: of the part that has changed it since the last `take_out`."""
        now = {}
        for name, owner in self.owners.items():
            last = self._last.get(name)
            now[name] = last if last and last.are_those_of(owner) else Attributes(owner)
            if last and index is not None and now[name] is not last:
                self._mixed |= {(name, attribute) for attribute in self._mixed_in(last, now[name], index)}
        self._last = now
        return Kept(generators(self._device), now)

    def _mixed_in(self, before: Attributes, now: Attributes, index: int) -> Iterator[str]:
        """The containers in which there is a change under another number than `index`."""
        for name, content in now.contents.items():
            if before.values.get(name) is now.values[name]:
                old, new = self._numbered(before.contents[name]), self._numbered(content)
                if any(k not in new or k not in old or new[k] is not old[k] for k in {*old, *new} - {index}):
                    yield name

    def _numbered(self, content: Any) -> dict[int, Any]:
        """What may be by part: entries of a dict under a number, and of a list with a place for each part."""
        if isinstance(content, dict):
            return {key: value for key, value in content.items() if type(key) is int}
        is_by_part = isinstance(content, list) and len(content) == self._parts
        return dict(enumerate(content)) if is_by_part else {}

    def take_out(self, kept: Kept, *, none_changed: bool = False) -> None:
        """Bring back the state `kept`; `none_changed`: attributes have not, since the last were put away."""
        set_generators(self._device, kept.generators)
        now = {}
        for name, owner in self.owners.items():
            now[name] = attributes = kept.attributes[name]
            is_last = attributes is self._last.get(name)
            if not (is_last and (none_changed or attributes.are_those_of(owner))):
                self._restore(name, vars(owner), attributes)
                if not attributes.are_those_of(owner):  # but for what other parts have under their numbers
                    now[name] = Attributes(owner)
        self._last = now

    def _restore(self, owner: str, now: dict[str, Any], attributes: Attributes) -> None:
        for name in [name for name in now if name not in attributes.values]:
            self._say(owner, name)
            del now[name]
        for name, value in attributes.values.items():
            if now.get(name) is not value or name not in now:
                self._say(owner, name)
                now[name] = value
            if name in attributes.contents:
                content = attributes.contents[name]
                if (owner, name) not in self._mixed:
                    content = self._with_numbered(content, value)
                if not _same(content, value):
                    self._say(owner, name)
                    value.clear()
                    value.update(content) if isinstance(value, dict | set) else value.extend(content)

    def _with_numbered(self, content: Any, now: Any) -> Any:
        """The content, with the entries by part that there are now."""
        if isinstance(content, dict):
            return {key: v for key, v in content.items() if type(key) is not int} | self._numbered(now)
        return _content_of(now) if self._numbered(content) and self._numbered(now) else content

    def _say(self, owner: str, name: str) -> None:
        """Warn once about an attribute."""
        if name not in self.said:
            of = f"{owner}.{name}"
            self.said[name] = (
                f"{of}, which the loss sets, belongs to its part of the batch, and is as before after the "
                f"update: to use it there, keep it by part, {of}[batch.index] = …"
            )
            if RANK == "0":
                warn(self.said[name])


def _content_of(container: Any) -> Any:
    """A plain copy: subclasses may have constructors of their own."""
    if isinstance(container, dict):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def _same(content: Any, other: Any) -> bool:
    if len(content) != len(other):
        return False
    if isinstance(content, dict):
        return all(key in other and other[key] is value for key, value in content.items())
    if isinstance(content, set):
        return bool(content == other)
    return all(one is two for one, two in zip(content, other, strict=True))


class Unchanged:
    """Tensors that a loss may not change: their next values would depend on who computes which part."""

    def __init__(self, owners: Mapping[str, object]) -> None:
        modules = [owner for owner in owners.values() if isinstance(owner, nn.Module)]
        over_batch = {id(tensor) for tensor in tensors_over_batch(modules)}
        self.tensors = {name: tensor for name, tensor in tensors_of(owners) if id(tensor) not in over_batch}
        self._before = {name: _identity(tensor) for name, tensor in self.tensors.items()}
        self._registered = {
            f"{name}.{inner}"
            for name, owner in owners.items()
            if isinstance(owner, nn.Module)
            for inner in (*owner._parameters, *owner._buffers)
        }
        self.owners = owners

    def check(self) -> None:
        """Check that nothing has changed since the start.

        Raises:
            UserError: naming the tensor.
        """
        now = dict(tensors_of(self.owners))
        for name, before in self._before.items():
            is_other = name not in now or now[name] is not self.tensors[name]
            # An attribute with another tensor is put away; a parameter or a buffer has to stay the same one.
            if is_other and name not in self._registered:
                continue
            if is_other or _identity(now[name]) != before:
                raise UserError(changed_in_the_loss(name))


def changed_in_the_loss(name: str) -> str:
    """The line for a tensor that a loss changes."""
    return (
        f"the loss changes {name} in its forward pass, once for each part of the batch: with --micro-batches "
        f"the result would depend on the number of processes. Change it in Task.step, from what all parts "
        f"have (trainer.sum), or take a layer without such state"
    )


def tensors_of(owners: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    """The tensors and arrays of numbers that these objects hold, in attributes or in containers in these."""
    for owner_name, owner in owners.items():
        is_module = isinstance(owner, nn.Module)
        places: list[dict[str, Any]] = [vars(owner)]
        if isinstance(owner, nn.Module):
            places += [owner._parameters, owner._buffers]
        for place in places:
            for name, value in place.items():
                if value is None or (is_module and name in OF_MODULES):
                    continue
                if isinstance(value, Tensor):
                    if has_values(value):
                        yield f"{owner_name}.{name}", value
                elif isinstance(value, HOLDERS):
                    yield from _tensors_in(f"{owner_name}.{name}", value)


def _tensors_in(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    for inner, entry in [(name, value)] if isinstance(value, np.ndarray) else _entries(name, value):
        if isinstance(entry, Tensor) and has_values(entry):
            yield inner, entry
        elif isinstance(entry, np.ndarray) and has_numbers(entry) and entry.flags.carray:
            yield inner, torch.from_numpy(entry)


def _entries(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a container holds; nothing of one that is long, such as a data set."""
    if len(value) <= 100:
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield f"{name}[{key!r}]", entry


def _identity(tensor: Tensor) -> tuple[int, int, int]:
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), version, tensor.data_ptr()


def owners_in(networks: Mapping[str, nn.Module], task: object = None) -> dict[str, object]:
    """By name: a task, the modules of it and of the networks, and the objects of users' classes in these."""
    owners: dict[str, object] = {} if task is None else {type(task).__name__: task}
    known = {id(task)}

    def add(name: str, value: object, depth: int) -> None:
        held: Iterable[tuple[str, object]] = ()
        if id(value) in known or not depth:
            return
        if isinstance(value, dict | list | tuple | deque):
            held = list(_entries(name, value))
        elif (isinstance(value, nn.Module) and not isinstance(value, ScriptModule)) or _is_of_a_user(value):
            known.add(id(value))
            owners[name if name not in owners else f"{name} of {type(task).__name__}"] = value
            held = [(f"{name}.{inner}", v) for inner, v in vars(value).items() if inner != "_modules"]
            if isinstance(value, nn.Module):
                for inner, module in value.named_children():
                    add(f"{name}.{inner}", module, depth)
        for inner, entry in held:
            add(inner, entry, depth - 1)

    for name, value in (*networks.items(), *(() if task is None else vars(task).items())):
        add(name, value, 3)
    return owners


def _is_of_a_user(value: object) -> bool:
    """Whether it is an object with attributes, of a class that extends none of a library."""
    modules = {kind.__module__ for kind in type(value).__mro__} - {"builtins", "abc", "typing", "collections"}
    files = [getattr(sys.modules.get(module), "__file__", None) for module in modules - {"__main__"}]
    return hasattr(value, "__dict__") and bool(modules) and all(f and not is_of_a_library(f) for f in files)


@contextmanager
def buffers_kept(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Put back, at the end, what the networks' buffers hold now."""
    modules = dict.fromkeys(module for network in networks for module in network.modules())
    before: list[tuple[nn.Module, dict[str, tuple[Tensor, Tensor]]]] = [
        (module, {name: (buffer, buffer.clone()) for name, buffer in module.named_buffers(recurse=False)})
        for module in modules
    ]
    yield
    with torch.no_grad():
        for module, buffers in before:
            for name, (buffer, value) in buffers.items():
                setattr(module, name, buffer.copy_(value))
