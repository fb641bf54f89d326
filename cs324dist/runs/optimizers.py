"""The state of any torch optimizer as named tensors."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cs324dist.errors import UserError, printable
from cs324dist.runs.models import read_tensors

Optimizers = Mapping[str, Optimizer | Sequence[Optimizer]]

_EXPECTED: "WeakKeyDictionary[Optimizer, set[str]]" = WeakKeyDictionary()
"""What the state of each optimizer has after its first step."""


def optimizers_of(optimizers: Optimizers, name: str) -> list[Optimizer]:
    """The optimizer, or the optimizers, called `name`."""
    one = optimizers[name]
    return [one] if isinstance(one, Optimizer) else list(one)


def each(optimizers: Optimizers) -> Iterator[tuple[str, Optimizer]]:
    """Every optimizer and its name; of several under one name the second is `NAME.1`."""
    for name in optimizers:
        for number, optimizer in enumerate(optimizers_of(optimizers, name)):
            yield (f"{name}.{number}" if number else name), optimizer


def optimizer_tensors(optimizers: Optimizers, networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every optimizer's state by name, such as `generator/generator.fc.0.weight/exp_avg`.

    Raises:
        UserError: something in it is neither a tensor nor a number, or came after the first step.
    """
    for name, optimizer in each(optimizers):
        late = _keys(optimizer) - _EXPECTED.get(optimizer, _keys(optimizer))
        if late and (late := _keys(optimizer) - _keys(_after_a_step(optimizer, anew=True))):
            raise UserError(
                f"optimizer {name!r} has put {min(late)!r} into its state after its first step, and a "
                f"run that is continued would not expect it: put it there in the first step"
            )
    names = _parameter_names(networks)
    values = {
        f"{optimizer_name}/{names[parameter]}/{key}": value
        for optimizer_name, optimizer in each(optimizers)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }
    return {name: _as_tensor(name, value) for name, value in values.items()}


def read_optimizers(
    path: Path, optimizers: Optimizers, networks: Mapping[str, nn.Module]
) -> Callable[[], None]:
    """Check the state in a file of what `optimizer_tensors` gave; returns what sets the optimizers to it.

    Raises:
        UserError: it is the state of other optimizers, or damaged.
    """
    names = _parameter_names(networks)
    expected: dict[str, Tensor] = {}
    states: list[tuple[Optimizer, Tensor, dict[str, Any], dict[str, str]]] = []
    for name, optimizer in each(optimizers):
        later = _after_a_step(optimizer)
        for parameter, state in zip(_parameters(optimizer), _states(later), strict=True):
            known = (key for key, value in state.items() if value is not None)
            places = {key: f"{name}/{names[parameter]}/{key}" for key in known}
            expected |= {place: _as_tensor(place, state[key]) for key, place in places.items()}
            states.append((optimizer, parameter, state, places))
    # A parameter that has had no gradient yet has no state.
    tensors = read_tensors(path, expected, all_needed=False)
    for *_, places in states:
        absent = [place for place in places.values() if place not in tensors]
        if 0 < len(absent) < len(places):
            raise UserError(f"{path} lacks {absent[0]!r:.99}: it is damaged")

    def load() -> None:
        for optimizer, parameter, state, places in states:
            if tensors.keys().isdisjoint(places.values()):
                optimizer.state.pop(parameter, None)
                continue
            for key, place in places.items():
                value, like = tensors[place], state[key]  # a tensor keeps its device and memory format
                state[key] = like.copy_(value) if isinstance(like, Tensor) else value.item()
            optimizer.state[parameter] = state

    return load


@contextmanager
def with_full_state(optimizers: Optimizers) -> Iterator[None]:
    """Inside, new optimizers have all the state that they will have after a step."""
    before = [(optimizer, dict(optimizer.state)) for _, optimizer in each(optimizers)]
    for optimizer, _ in before:
        states = zip(_parameters(optimizer), _states(_after_a_step(optimizer)), strict=True)
        optimizer.state.update({parameter: state for parameter, state in states if state})
    try:
        yield
    finally:
        for optimizer, state in before:
            optimizer.state.clear()
            optimizer.state.update(state)


def _after_a_step(optimizer: Optimizer, *, anew: bool = False) -> Optimizer:
    """A copy that has taken a step with gradients of zero; `anew`: from no state, with the settings of now.

    It has everything that the state of this optimizer can have, in the right shapes and places.
    """
    taken: Any = object.__new__(type(optimizer))  # a plain deep copy lacks a subclass's own attributes
    own = {n: type(value)() if n.endswith("_hooks") else value for n, value in vars(optimizer).items()}
    vars(taken).update(copy.deepcopy(own, {id(optimizer): taken}))
    if anew:
        taken.state.clear()
    for parameter in _parameters(taken):
        parameter.grad = torch.zeros_like(parameter)  # a frozen one may be trained later
    type(taken).step(taken)  # not what a scheduler has put in its place, which steps the original
    _EXPECTED[optimizer] = _keys(taken)
    return taken


def _keys(optimizer: Optimizer) -> set[str]:
    for name in optimizer.state:
        if not isinstance(name, Tensor):
            raise UserError(
                f"{type(optimizer).__name__} has state of no parameter, {printable(str(name))}, which no "
                f"checkpoint would hold: keep it in the state of a parameter, or in a group"
            )
    return {key for state in optimizer.state.values() for key, value in state.items() if value is not None}


def _states(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [optimizer.state.get(parameter, {}) for parameter in _parameters(optimizer)]


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _parameter_names(networks: Mapping[str, nn.Module]) -> dict[Tensor, str]:
    return {
        parameter: f"{network_name}.{name}"
        for network_name, network in networks.items()
        for name, parameter in network.named_parameters()
    }


def _as_tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, int | float):
        shown = printable(repr(value))[:99]
        raise UserError(f"the state of an optimizer holds {name} = {shown}: give tensors and numbers")
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
