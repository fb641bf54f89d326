"""One model in a folder: `config.json` (class and arguments) and `model.safetensors`, the Hub's file names.

Read strictly: every tensor must be there, no other, each of the right shape and dtype, all of it finite. What
a file claims to hold is compared with what is expected before any of it is read.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cs324dist.errors import UserError, printable
from cs324dist.runs.files import read_json, write_json

LARGEST_SIZE = 65_536  # of any argument of a model
LARGEST_HEADER = 1 << 20  # bytes of a safetensors file's list of tensors; ours are a few thousand
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Model = TypeVar("Model", bound=nn.Module)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, from whatever device, as safetensors.

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # which says "… (os error 28)" for a full disk
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else 0
        raise OSError(code, os.strerror(code) if number else str(error), str(path)) from None


def read_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file that holds exactly the names, shapes and dtypes of `expected`, all finite.

    Raises:
        UserError: it does not, or is missing or damaged.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file")  # a pipe would never end
    try:
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > LARGEST_HEADER:
                raise UserError(f"{path} cannot be read as safetensors: its header is too large, or damaged")
        with safe_open(path, framework="pt") as stored:
            _compare(path, stored, expected)
            tensors = {name: stored.get_tensor(name) for name in expected}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {printable(error)}") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name!r} holds values that are not finite: it is damaged")
    return tensors


def _compare(path: Path, stored: safe_open, expected: Mapping[str, Tensor]) -> None:
    names = set(stored.keys())
    if absent := sorted(expected.keys() - names):
        raise UserError(f"{path} lacks {len(absent)} tensors, the first of them {absent[0]!r:.99}")
    if foreign := sorted(names - expected.keys()):
        raise UserError(f"{path} holds {len(foreign)} tensors too many, the first of them {foreign[0]!r:.99}")
    for name, tensor in expected.items():
        header = stored.get_slice(name)
        found = (header.get_dtype(), tuple(header.get_shape()))
        if found != (wanted := (DTYPES[tensor.dtype], tuple(tensor.shape))):
            raise UserError(
                f"{path}: {name!r} is {found[0]} {printable(found[1])}, expected {wanted[0]} {wanted[1]}"
            )


@torch.no_grad()
def copy_into(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy each tensor to its target, in place."""
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
        UserError: the folder holds no such model, or a damaged one.
    """
    arguments = read_json(folder / "config.json")
    name = arguments.pop("class", None)
    if name != expected.__name__:
        raise UserError(
            f"{folder} holds a model of class {printable(repr(name))}, expected {expected.__name__!r}"
        )
    if any(type(value) is not int or not 1 <= value <= LARGEST_SIZE for value in arguments.values()):
        raise UserError(f"{folder / 'config.json'} has values that are no sizes: {printable(arguments)}")
    try:
        with torch.device("meta"):  # shapes without memory, whatever sizes the file claims
            model = expected(**arguments)
    except TypeError:
        raise UserError(
            f"{folder / 'config.json'} has arguments that {name} does not take: {printable(sorted(arguments))}"
        ) from None
    tensors = read_tensors(folder / "model.safetensors", model.state_dict())
    # clones, as what safetensors gives is the file itself, mapped into memory
    model.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    return model.eval()
