"""A model folder is read exactly or refused: a tensor that does not fit changes nothing."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

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


def contents(path: Path) -> dict[str, Tensor]:
    return load(path.read_bytes())  # load_file would map the file that is about to be written over


def lacking(path: Path) -> None:
    tensors = contents(path)
    del tensors["W_h"]
    save_file(tensors, path)


def with_one_more(path: Path) -> None:
    save_file({**contents(path), "W_c": torch.zeros(2)}, path)


def of_a_shape_that_broadcasts(path: Path) -> None:
    save_file({**contents(path), "b": torch.zeros(1)}, path)


def of_another_dtype(path: Path) -> None:
    tensors = contents(path)
    save_file({**tensors, "output.bias": tensors["output.bias"].double()}, path)


def interrupted(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


class MakesAFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def a_renamed_pickle(path: Path) -> None:
    torch.save({**contents(path), "W_x": MakesAFolder(path.with_name("executed"))}, path)


def absent(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lacking, "lacks 1 tensors, the first of them 'W_h'"),
        (with_one_more, "holds 1 tensors too many, the first of them 'W_c'"),
        (of_a_shape_that_broadcasts, "'b' is torch.float32 of shape (1,), expected torch."),
        (of_another_dtype, "'output.bias' is torch.float64 of shape (5,), expected torch.float32"),
        (interrupted, "cannot be read as safetensors"),
        (a_renamed_pickle, "cannot be read as safetensors"),
        (absent, "cannot be read: No such file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_tensors_that_do_not_fit_are_named_and_change_nothing(tmp_path, damage, named):
    path = tmp_path / "model.safetensors"
    save_tensors(path, LSTM(3, 4, 5).state_dict())
    damage(path)
    model = LSTM(3, 4, 5)
    before = bits(model)
    with pytest.raises(UserError) as caught:
        read_tensors(path, model.state_dict())
    (line,) = caught.value.lines
    assert str(path) in line
    assert named in line
    assert bits(model) == before
    assert not (tmp_path / "executed").exists()


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
    assert_refused(written(tmp_path, config), named)


def test_of_a_model_that_does_not_say_how_it_is_built_it_is_said(tmp_path):
    save_model(tmp_path, torch.nn.Sequential(torch.nn.Linear(2, 3)))
    with pytest.raises(UserError) as caught:
        load_model(tmp_path, torch.nn.Sequential)
    assert "holds 2 tensors too many" in caught.value.lines[0]
    assert "give the network `config`, a dict of its constructor's arguments" in caught.value.lines[1]


def written(folder: Path, changes: dict[str, object]) -> Path:
    """An LSTM's folder with another config."""
    save_model(folder, LSTM(3, 4, 5))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def assert_refused(folder: Path, named: str) -> None:
    with pytest.raises(UserError) as caught:
        load_model(folder, LSTM)
    (line,) = caught.value.lines
    assert str(folder) in line
    assert named in line
    assert line.isprintable()
    assert len(line) < 500
