"""One model in a folder: `config.json` (class and arguments) and `model.safetensors`, the Hub's file names.

Read strictly: every tensor must be there, no other, each of the right shape and dtype.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cs324dist.errors import Refused
from cs324dist.runs.files import read_json, write_json

LARGEST_SIZE = 65_536  # of any argument of a model
Model = TypeVar("Model", bound=nn.Module)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, from whatever device, as safetensors."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def load_tensors_into(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Copy a safetensors file into `targets`, in place.

    Raises:
        Refused: the file is missing, damaged, or does not hold exactly the targets' names, shapes and dtypes;
            the targets are then as they were.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise Refused(f"{path} cannot be read as safetensors: {error}") from None
    if absent := sorted(targets.keys() - tensors.keys()):
        raise Refused(f"{path} lacks {len(absent)} tensors, the first of them {absent[0]!r}")
    if foreign := sorted(tensors.keys() - targets.keys()):
        raise Refused(f"{path} holds {len(foreign)} tensors too many, the first of them {foreign[0]!r}")
    for name, target in targets.items():
        found = tensors[name]
        if found.shape != target.shape or found.dtype != target.dtype:
            raise Refused(
                f"{path}: {name!r} is {found.dtype} {tuple(found.shape)}, "
                f"expected {target.dtype} {tuple(target.shape)}"
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def save_model(folder: Path, model: nn.Module) -> None:
    """Write a model that has its constructor's arguments in `model.config`, positive integers all."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = cast(dict[str, int], model.config)
    write_json(folder / "config.json", {"class": type(model).__name__, **arguments})
    save_tensors(folder / "model.safetensors", model.state_dict())


def load_model(folder: Path, expected: type[Model]) -> Model:
    """Read a model of the class `expected`, in eval mode, on the CPU.

    Raises:
        Refused: the folder holds no such model, or a damaged one.
    """
    arguments = read_json(folder / "config.json")
    name = arguments.pop("class", None)
    if name != expected.__name__:
        raise Refused(f"{folder} holds a model of class {name!r}, expected {expected.__name__!r}")
    if any(type(value) is not int or not 1 <= value <= LARGEST_SIZE for value in arguments.values()):
        raise Refused(f"{folder / 'config.json'} has values that are no sizes: {arguments}")
    try:
        model = expected(**arguments)
    except TypeError:
        raise Refused(
            f"{folder / 'config.json'} has arguments that {name} does not take: {sorted(arguments)}"
        ) from None
    load_tensors_into(folder / "model.safetensors", model.state_dict())
    return model.eval()
