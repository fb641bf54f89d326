"""One model in a folder: `config.json` (class and arguments) and `model.safetensors`, the Hub's file names.

Reading is strict: every tensor must be there and no other, each of the right shape and dtype.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cs324dist.errors import UserError, printable
from cs324dist.runs.files import content_of, read_json, write_json

Model = TypeVar("Model", bound=nn.Module)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The live tensors of a model by name, parameters as `nn.Parameter`; of tied ones only the first."""
    named: dict[str, Tensor] = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(named.items())}
    return {name: tensor for name, tensor in named.items() if first[id(tensor)] == name}


def transient_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The live buffers of a model that its `state_dict` lacks (`persistent=False`), by name."""
    persistent = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in persistent}


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, from whatever device, as safetensors."""
    copies = {  # safetensors refuses tensors that share their memory
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    path.write_bytes(save(copies))


def read_tensors(
    path: Path, expected: Mapping[str, Tensor] | None, *, all_needed: bool = True
) -> dict[str, Tensor]:
    """The tensors of a file that holds exactly the names, shapes and dtypes of `expected`, if it is given.

    Unless `all_needed`, some of them may be absent.

    Raises:
        UserError: it does not, or is missing or damaged.
        OSError: it cannot be read now.
    """
    content = content_of(path)
    try:
        tensors = load(content)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise UserError(f"{path} cannot be read as safetensors: {printable(error)}") from None
    if expected is None:
        return tensors
    absent, foreign = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if absent and all_needed:
        raise UserError(f"{path} lacks {len(absent)} tensors, the first of them {absent[0]!r:.99}")
    if foreign:
        raise UserError(f"{path} holds {len(foreign)} tensors too many, the first of them {foreign[0]!r:.99}")
    for name, tensor in tensors.items():
        if (found := kind_of(tensor)) != (wanted := kind_of(expected[name])):
            raise UserError(f"{path}: {name!r} is {found}, expected {wanted}")
    return tensors


def kind_of(tensor: Tensor) -> str:
    """A tensor's dtype and shape."""
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


@torch.no_grad()
def copy_into(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy each tensor to its target, in place."""
    for name, target in targets.items():
        target.copy_(tensors[name])


def save_model(folder: Path, model: nn.Module) -> None:
    """Write a model; `model.config`, if it is a dict, holds the arguments of its constructor.

    Raises:
        UserError: an argument is no number, word or truth value.
        OSError: a file cannot be written.
    """
    name = type(model).__name__
    arguments = getattr(model.module if isinstance(model, AveragedModel) else model, "config", {})
    if not isinstance(arguments, Mapping):  # such as nanoGPT's and those of transformers
        arguments = {}
    for argument, value in arguments.items():
        if type(value) not in (bool, int, float, str):
            raise UserError(
                f"{name}.config[{argument!r}] is {printable(value)}: give a string, a boolean or a number"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"class": name, **arguments})
    save_tensors(folder / "model.safetensors", model_tensors(model))


def load_model(folder: str | Path, expected: type[Model]) -> Model:
    """Read a model of the class `expected`, or its average (`AveragedModel`), in eval mode, on the CPU.

    Args:
        folder: a network's folder in a checkpoint, or a copy of it.
        expected: its class, whose arguments are in `config.json`.

    Raises:
        UserError: the folder holds no such model, or a damaged one.
    """
    folder = Path(folder)
    arguments = read_json(folder / "config.json")
    name, wanted = arguments.pop("class", None), expected.__name__
    if name not in (wanted, AveragedModel.__name__):
        raise UserError(f"{folder} holds a model of class {printable(repr(name))}, expected {wanted!r}")
    if not arguments and inspect.signature(expected).parameters:
        raise UserError(
            f"{folder} does not say how to build a {wanted}: give the network `config`, a dict of its "
            f"constructor's arguments, before it is trained; or build it, and use safetensors' load_model"
        )
    try:
        with torch.random.fork_rng(devices=[]):  # for initial weights, which are replaced
            model = expected(**arguments)
    except Exception:  # whatever its constructor raises
        raise UserError(
            f"{folder}/config.json has arguments that {wanted} does not take: {printable(sorted(arguments))}"
        ) from None
    saved: Any = model if name == wanted else AveragedModel(model)
    copy_into(model_tensors(saved), read_tensors(folder / "model.safetensors", model_tensors(saved)))
    found: Model = model if name == wanted else saved.module
    return found.eval()
