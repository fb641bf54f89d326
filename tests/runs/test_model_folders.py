"""A model folder is read exactly or refused: a tensor that does not fit changes nothing."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from cs324dist.errors import UserError
from cs324dist.models.lstm import LSTM
from cs324dist.models.rnn import RNN
from cs324dist.runs.models import load_model, read_tensors, save_model, save_tensors


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


def of_length_zero(path: Path) -> None:
    os.truncate(path, 0)


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
        (of_a_shape_that_broadcasts, "'b' is F32 (1,), expected F32 (16,)"),
        (of_another_dtype, "'output.bias' is F64 (5,), expected F32 (5,)"),
        (interrupted, "cannot be read as safetensors"),
        (of_length_zero, "cannot be read as safetensors"),
        (a_renamed_pickle, "cannot be read as safetensors"),
        (absent, "cannot be read as safetensors"),
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
        ({"class": None}, "class None, expected 'LSTM'"),
        ({"hidden_size": 0}, "no sizes"),
        ({"hidden_size": -4}, "no sizes"),
        ({"hidden_size": 65_537}, "no sizes"),
        ({"hidden_size": 4.0}, "no sizes"),
        ({"hidden_size": True}, "no sizes"),
        ({"hidden_size": "4"}, "no sizes"),
        ({"hidden_size": None}, "no sizes"),
        ({"hidden_size": [4]}, "no sizes"),
        ({"layers": 2}, "arguments that LSTM does not take"),
    ],
    ids=str,
)
def test_a_config_that_is_not_the_models_is_refused(tmp_path, config, named):
    assert_refused(written(tmp_path, config), named)


def test_a_config_that_lacks_an_argument_is_refused(tmp_path):
    folder = written(tmp_path, {})
    (folder / "config.json").write_text('{"class": "LSTM"}')
    assert_refused(folder, "config.json")


def test_a_config_of_other_sizes_than_the_tensors_is_refused(tmp_path):
    assert_refused(written(tmp_path, {"hidden_size": 8}), "model.safetensors: ")


def test_a_model_of_another_class_is_refused_even_where_the_arguments_are_alike(tmp_path):
    save_model(tmp_path, RNN(3, 4, 5))
    assert_refused(tmp_path, "class 'RNN', expected 'LSTM'")


def written(folder: Path, changes: dict[str, object]) -> Path:
    """An LSTM's folder with another config."""
    save_model(folder, LSTM(3, 4, 5))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def assert_refused(folder: Path, named: str) -> None:
    with pytest.raises(UserError) as caught:
        load_model(folder, LSTM)
    assert str(folder) in str(caught.value)
    assert named in str(caught.value)
