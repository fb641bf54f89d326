"""One model in a folder: `config.json` (class and arguments) and `model.safetensors`, the Hub's file names.

Reading is strict: every tensor must be there and no other, each of the right shape and dtype. What a file
claims to hold is compared with what is expected before any of it is read.
"""

import inspect
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cs324dist.errors import UserError, printable
from cs324dist.runs.files import LARGEST_FILE, check_file, patiently, read_json, write_json

LARGEST_SIZE = 1 << 20  # of an argument of a model
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
Model = TypeVar("Model", bound=nn.Module)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The live tensors of a model by name, parameters as `nn.Parameter`; of tied ones only the first."""
    named: dict[str, Tensor] = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(named.items())}
    return {name: tensor for name, tensor in named.items() if first[id(tensor)] == name}


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, from whatever device, as safetensors.

    Raises:
        UserError: safetensors has no name for the dtype of one.
        OSError: the file cannot be written.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise UserError(f"{name} is of {tensor.dtype}, which no checkpoint can hold")
    path.touch()  # the mode that the umask gives, which safetensors replaces by 0600
    mode, stored, memory = path.stat().st_mode, {}, set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        pointer = plain.untyped_storage().data_ptr()
        stored[name] = plain.clone() if pointer in memory else plain  # safetensors refuses shared memory
        memory.add(pointer)
    try:
        save_file(stored, path)
    except SafetensorError as error:  # which says "… (os error 28)" for a full disk
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else 0
        raise OSError(code, os.strerror(code) if number else str(error), str(path)) from None
    path.chmod(mode)


def read_tensors(path: Path, expected: Mapping[str, Tensor], *, all_needed: bool = True) -> dict[str, Tensor]:
    """The tensors of a file that holds exactly the names, shapes and dtypes of `expected`.

    Unless `all_needed`, some of them may be absent.

    Raises:
        UserError: it does not, is missing or damaged, or holds NaN, or a parameter that is infinite.
        Unreadable: it cannot be read now.
    """
    tensors = patiently(lambda: _read_tensors(path, expected, all_needed), path)
    for name, tensor in tensors.items():
        if not is_sound(tensor, expected[name]):
            raise UserError(f"{path}: {name!r} holds values that are not finite: it is damaged")
    return tensors


def _read_tensors(path: Path, expected: Mapping[str, Tensor], all_needed: bool) -> dict[str, Tensor]:
    check_file(path, LARGEST_FILE)
    with path.open("rb") as file:  # the header, a list of the tensors, is read as a whole
        if int.from_bytes(file.read(8), "little") > (1 << 20) + 1000 * len(expected):
            raise UserError(f"{path} cannot be read as safetensors: its header is too large, or damaged")
    try:
        with safe_open(path, framework="pt") as stored:
            present = set(stored.keys())
            if all_needed and (absent := sorted(expected.keys() - present)):
                raise UserError(f"{path} lacks {len(absent)} tensors, the first of them {absent[0]!r:.99}")
            if foreign := sorted(present - expected.keys()):
                raise UserError(
                    f"{path} holds {len(foreign)} tensors too many, the first of them {foreign[0]!r:.99}"
                )
            _compare(path, stored, {name: expected[name] for name in present})
            return {name: stored.get_tensor(name) for name in expected if name in present}
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read as safetensors: {printable(error)}") from None
    except (FileNotFoundError, RuntimeError) as error:  # it could not be opened once more, by either
        raise OSError(0, printable(error)) from None


def is_sound(tensor: Tensor, like: Tensor) -> bool:
    """Whether no value is NaN and, if `like` is a parameter, none infinite: a mask may hold -inf."""
    if not tensor.is_floating_point():
        return True
    return bool((tensor.isfinite() if isinstance(like, nn.Parameter) else ~tensor.isnan()).all())


def _compare(path: Path, stored: safe_open, expected: Mapping[str, Tensor]) -> None:
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
    """Write a model; `model.config`, if there is one, holds the arguments of its constructor.

    Raises:
        UserError: an argument is no number, word or truth value.
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"class": type(model).__name__, **model_arguments(model)})
    save_tensors(folder / "model.safetensors", model_tensors(model))


def model_arguments(model: nn.Module) -> dict[str, Any]:
    """The arguments of a model's constructor, as far as it says them in `config`.

    Raises:
        UserError: `load_model` would not take one of them.
    """
    arguments = getattr(model, "config", {})
    if not isinstance(arguments, Mapping):
        raise UserError(f"{type(model).__name__}.config is no dictionary of the arguments of its constructor")
    arguments = dict(arguments)
    if wrong := [name for name, value in arguments.items() if not _is_argument(value)]:
        raise UserError(
            f"{type(model).__name__}.config[{wrong[0]!r}] is {printable(arguments[wrong[0]])}: "
            f"give a string, a boolean, a finite number, or an integer of at most {LARGEST_SIZE}"
        )
    return arguments


def _is_argument(value: object) -> bool:
    if type(value) is int:
        return abs(value) <= LARGEST_SIZE
    return (
        type(value) is bool
        or (type(value) is str and len(value) < 1000)
        or (type(value) is float and json.dumps(value) not in ("NaN", "Infinity", "-Infinity"))
    )


def load_model(folder: str | Path, expected: type[Model]) -> Model:
    """Read a model of the class `expected`, in eval mode, on the CPU.

    Args:
        folder: a network's folder in a checkpoint, or a copy of it.
        expected: its class, whose arguments are in `config.json`.

    Raises:
        UserError: the folder holds no such model, or a damaged one.
    """
    folder = Path(folder)
    arguments = read_json(folder / "config.json")
    name = arguments.pop("class", None)
    if name != expected.__name__:
        raise UserError(
            f"{folder} holds a model of class {printable(repr(name))}, expected {expected.__name__!r}"
        )
    if not all(map(_is_argument, arguments.values())):
        raise UserError(f"{folder / 'config.json'} has values that no model takes: {printable(arguments)}")
    weights = folder / "model.safetensors"
    try:
        # Shapes without memory, whatever sizes the file claims; torch warns of zero.
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            tensors = read_tensors(weights, model_tensors(expected(**arguments)))
    except UserError as error:
        if arguments or not inspect.signature(expected).parameters:
            raise
        raise UserError(
            *error.lines,
            f"{folder} does not say how to build a {name}: "
            f"give the network `config`, a dict of its constructor's arguments",
        ) from None
    except Exception:  # whatever its constructor raises
        raise UserError(
            f"{folder / 'config.json'} has arguments that {name} does not take: "
            f"{printable(sorted(arguments))}"
        ) from None
    with torch.random.fork_rng(devices=[]):  # for initial weights, which are replaced
        model = expected(**arguments)
    copy_into(model_tensors(model), tensors)
    return model.eval()
