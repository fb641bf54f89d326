"""A model folder is read exactly or refused: a tensor that does not fit changes nothing."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launched import refusal
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cs324dist.errors import UserError
from cs324dist.runs.models import load_model, read_tensors, save_model, save_tensors
from cs324dist.tasks.lstm.networks import LSTM


class Small(nn.Module):
    """Weights in channels-last order, running statistics, and a counter of int64."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.config = {"width": width}
        self.layers = nn.Sequential(nn.Conv2d(2, width, 3), nn.BatchNorm2d(width))


def bits(module: nn.Module) -> dict[str, bytes]:
    return {n: t.contiguous().numpy().tobytes() for n, t in module.state_dict().items()}


def test_a_model_comes_back_to_the_last_bit_and_in_eval_mode(tmp_path):
    model = Small(5).to(memory_format=torch.channels_last)
    model.layers(torch.randn(4, 2, 8, 8))
    save_model(tmp_path / "small", model)
    loaded = load_model(tmp_path / "small", Small)
    assert bits(loaded) == bits(model)
    assert loaded.state_dict()["layers.1.num_batches_tracked"] == 1
    assert loaded.config == {"width": 5}
    assert not any(module.training for module in loaded.modules())


def change(path: Path, **tensors: Tensor | None) -> None:
    changed = {**load(path.read_bytes()), **tensors}  # load_file would map what is about to be written over
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)


DAMAGES: dict[str, Callable[[Path], object]] = {  # by what is said of them
    "lacks 1 tensors, the first of them 'W_h'": lambda path: change(path, W_h=None),
    "holds 1 tensors too many, the first of them 'W_c'": lambda path: change(path, W_c=torch.zeros(2)),
    "'b' is torch.float32 of shape (1,), expected torch.": lambda path: change(path, b=torch.zeros(1)),
    "'b' is torch.float64 of shape (16,), expected torch.float32": lambda path: change(
        path, b=torch.zeros(16).double()
    ),
    "cannot be read as safetensors": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cannot be read: No such file": Path.unlink,
}


@pytest.mark.parametrize(("named", "damage"), DAMAGES.items(), ids=range(len(DAMAGES)))
def test_tensors_that_do_not_fit_are_named_and_change_nothing(tmp_path, damage, named):
    path = tmp_path / "model.safetensors"
    save_tensors(path, LSTM(3, 4, 5).state_dict())
    damage(path)
    model = LSTM(3, 4, 5)
    before = bits(model)
    line = refusal(read_tensors, path, model.state_dict())
    assert str(path) in line
    assert named in line
    assert bits(model) == before


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"class": "RNN"}, "class 'RNN', expected 'LSTM'"),
        ({"hidden_size": 0}, "arguments that LSTM does not take"),
        ({"hidden_size": 1e300}, "arguments that LSTM does not take"),
        ({"hidden_size": 8}, "model.safetensors: "),
        ({"hidden_size": [4]}, "arguments that LSTM does not take"),
        ({"layers": 2}, "arguments that LSTM does not take"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_is_not_the_models_is_refused(tmp_path, config, named):
    save_model(tmp_path, LSTM(3, 4, 5))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    line = refusal(load_model, tmp_path, LSTM)
    assert str(tmp_path) in line
    assert named in line
    assert line.isprintable()
    assert len(line) < 500


class WithDefaults(nn.Module):
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1)


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(2, 3)), WithDefaults(), WithDefaults(3)])
def test_a_model_that_does_not_say_how_it_is_built_is_refused(tmp_path, model):
    """With the defaults of its constructor, it might have the same shapes, and compute something else."""
    save_model(tmp_path, model)
    name = type(model).__name__
    with pytest.raises(
        UserError, match=f"does not say how to build a {name}: give the network `config`, a dict"
    ):
        load_model(tmp_path, type(model))


def test_the_average_of_a_model_is_read_as_the_model(tmp_path):
    model = Small(4)
    average = AveragedModel(model)
    average.update_parameters(model)
    save_model(tmp_path, average)
    found = load_model(tmp_path, Small)
    assert type(found) is Small
    assert not found.training
    assert bits(found) == bits(model)
