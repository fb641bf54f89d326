"""One model in a folder: `config.json` (class and arguments) and `model.safetensors`, the Hub's file names.

Read strictly: every tensor must be there, no other, each of the right shape and dtype.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cs324dist.errors import Refused
from cs324dist.models.digit_classifier import DigitClassifier
from cs324dist.models.gan import Discriminator, Generator
from cs324dist.models.lstm import LSTM
from cs324dist.models.rnn import RNN
from cs324dist.runs.files import read_json, write_json

MODEL_CLASSES: dict[str, type[nn.Module]] = {
    model.__name__: model for model in (LSTM, RNN, Generator, Discriminator, DigitClassifier)
}


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
    """Write a model of `MODEL_CLASSES`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"class": type(model).__name__, **model.config})  # type: ignore[dict-item]
    save_tensors(folder / "model.safetensors", model.state_dict())


def load_model(folder: Path, expected: type[nn.Module]) -> nn.Module:
    """Read a model of the class `expected`, in eval mode, on the CPU.

    Raises:
        Refused: the folder holds no such model, or a damaged one.
    """
    config = read_json(folder / "config.json")
    name = config.pop("class", None)
    if MODEL_CLASSES.get(name) is not expected:  # type: ignore[arg-type]
        raise Refused(f"{folder} holds a model of class {name!r}, expected {expected.__name__!r}")
    if any(type(value) is not int or not 1 <= value <= 65536 for value in config.values()):
        raise Refused(f"{folder / 'config.json'} has values that are no sizes: {config}")
    try:
        model = expected(**config)
    except TypeError:
        raise Refused(
            f"{folder / 'config.json'} has arguments that {expected.__name__} does not take: {sorted(config)}"
        ) from None
    load_tensors_into(folder / "model.safetensors", model.state_dict())
    return model.eval()
