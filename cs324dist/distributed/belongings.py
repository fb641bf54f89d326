"""What belongs to one part of the batch while parts take turns: generators, and attributes that a loss sets.

A loss that says `self.y = y` means the `y` of its part. So attributes of the task and of modules are put away
when another part goes on, and brought back when this part does. After the update they have the values of
before: nothing depends on which part came last.
"""

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cs324dist.data.streams import generators, set_generators
from cs324dist.distributed.batch_norm import tensors_over_batch
from cs324dist.errors import RANK, UserError, warn

CONTAINERS = (dict, list, set, deque)
Attributes = dict[str, tuple[Any, Any]]
"""By name: the value, and the content of a container."""


@dataclass(frozen=True)
class Kept:
    """What `PartBelongings.put_away` gives."""

    generators: tuple[Any, ...]
    attributes: Sequence[Attributes]


class PartBelongings:
    """The generators, and the attributes of a task and of modules."""

    def __init__(self, owners: Mapping[str, object], device: torch.device, parts: int) -> None:
        """`owners` of attributes by name; containers with a place for each of `parts` are shared by all."""
        self.owners, self._device, self._parts = owners, device, parts
        self._by_part: set[int] = set()  # lists that have a place for each part
        self.said: dict[str, str] = {}
        """Lines about attributes that were put away, by the attribute's name."""

    @contextmanager
    def restored(self) -> Iterator[Kept]:
        """At the end, bring back the state of the beginning."""
        values = (value for owner in self.owners.values() for value in vars(owner).values())
        self._by_part = {
            id(value) for value in values if isinstance(value, list) and len(value) == self._parts
        }
        unchanged, kept = Unchanged(self.owners), self.put_away()
        try:
            yield kept
            unchanged.check()  # before what the loss has set is gone
        finally:
            self.take_out(kept)

    def put_away(self) -> Kept:
        """Their present state."""
        attributes = [
            {name: (value, self._content(value)) for name, value in vars(owner).items()}
            for owner in self.owners.values()
        ]
        return Kept(generators(self._device), attributes)

    def take_out(self, kept: Kept) -> None:
        """Bring back the state `kept` of `put_away`."""
        set_generators(self._device, kept.generators)
        for (owner_name, owner), attributes in zip(self.owners.items(), kept.attributes, strict=True):
            now = vars(owner)
            for name in [name for name in now if name not in attributes]:
                self._say(owner_name, name)
                del now[name]
            for name, (value, content) in attributes.items():
                if now.get(name) is not value or name not in now:
                    self._say(owner_name, name)
                    now[name] = value
                if content is not None and not _same(content, _copy(value)):
                    self._say(owner_name, name)
                    self._refill(value, content)

    def _content(self, value: Any) -> Any:
        """A shallow copy of a container; entries of a dict under a number belong to a part of this number."""
        if not isinstance(value, CONTAINERS) or id(value) in self._by_part:
            return None
        return _copy(value)

    def _refill(self, value: Any, content: Any) -> None:
        numbered = {k: v for k, v in value.items() if type(k) is int} if isinstance(value, dict) else {}
        value.clear()
        value.update(content) if isinstance(value, dict | set) else value.extend(content)
        if numbered:
            value.update(numbered)

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


def _copy(value: Any) -> Any:
    if not isinstance(value, dict):
        return copy.copy(value)
    return {key: entry for key, entry in value.items() if type(key) is not int} if value else {}


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
    """The tensors that these objects hold: parameters, buffers, and attributes."""
    for owner_name, owner in owners.items():
        places = [vars(owner)]
        if isinstance(owner, nn.Module):
            places += [owner._parameters, owner._buffers]
        for place in places:
            for name, value in place.items():
                if isinstance(value, Tensor):
                    yield f"{owner_name}.{name}", value


def _identity(tensor: Tensor) -> tuple[int, int, int]:
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), version, 0 if tensor.is_sparse else tensor.data_ptr()


def owners_in(networks: Mapping[str, nn.Module], task: object = None) -> dict[str, object]:
    """By name: a task, and all modules of it and of the networks."""
    others: Iterable[tuple[str, Any]] = () if task is None else vars(task).items()
    modules = {
        module: f"{name}.{inner}" if inner else name
        for name, network in reversed((*networks.items(), *others))
        if isinstance(network, nn.Module)
        for inner, module in network.named_modules()
    }
    of_task = {} if task is None else {type(task).__name__: task}
    return {**of_task, **{name: module for module, name in modules.items()}}


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
