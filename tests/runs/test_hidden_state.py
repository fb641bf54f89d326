"""What a task changes after its start comes back from a checkpoint, or one line says that it cannot."""

from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from launched import refusal
from torch import nn

from cs324dist.runs.checkpoints import TrainerState, read_checkpoint, write_checkpoint
from cs324dist.runs.contents import value_of
from cs324dist.runs.hidden_state import HiddenState
from cs324dist.tasks.gan.task import GANTask
from cs324dist.tasks.lstm.task import LSTMTask
from cs324dist.trainer import Trainer

CPU = torch.device("cpu")
Phase = Enum("Phase", "FIRST SECOND")


class Noted:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(2))
        self.rate = 1.0


class Bare:
    """A task, as far as a checkpoint knows it."""

    def __init__(self, **values: Any) -> None:
        self.net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        self.networks = {"net": self.net}
        self.optimizers = {"net": torch.optim.SGD(self.net.parameters(), 0.1)}
        vars(self).update(values)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def come_back(make: Callable[[], Bare], change: Callable[[Any], Any], folder: Path) -> Any:
    """A new task, with what a checkpoint has of one that has changed."""
    hidden = HiddenState(task := make())
    change(task)
    write_checkpoint(folder / "1", task, TrainerState(1, hidden=hidden.changed()))
    read_checkpoint(folder / "1", task := make(), HiddenState(task))
    return task


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, "word", float("inf"), (1, (2.5, "x")), [1, [2]], {"a": {"b": 1}}, {(0, 1): 2, 3: 4}),
        *({1, 2}, frozenset("ab"), deque([1, 2], 5), OrderedDict(b=1, a=2), Counter("aab")),
        *(np.float32(0.1), np.int64(3), np.bool_(True), np.float64("inf")),
    ],
    ids=repr,
)
def test_a_value_comes_back_as_what_it_is(value, tmp_path, capsys):
    came = come_back(lambda: Bare(kept=0), lambda task: setattr(task, "kept", value), tmp_path).kept
    assert (type(came), came) == (type(value), value)
    assert getattr(came, "maxlen", None) == getattr(value, "maxlen", None)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.cfloat])
def test_tensors_come_back(dtype, tmp_path):
    value = [torch.tensor([[0, 1], [1, 1]]).to(dtype).T, {"one": torch.tensor(1.5)}]
    (first, rest) = come_back(lambda: Bare(kept=0), lambda t: setattr(t, "kept", value), tmp_path).kept
    assert first.dtype == dtype
    assert torch.equal(first, value[0])
    assert torch.equal(rest["one"], torch.tensor(1.5))


@pytest.mark.parametrize("dtype", ["?", "u1", "i2", "u4", "f4", "f8"])
def test_arrays_come_back(dtype, tmp_path):
    for number, value in enumerate((np.ones((2, 3), dtype)[:, ::-1], np.array(1, dtype))):
        came = come_back(
            lambda: Bare(kept=0), lambda task, v=value: setattr(task, "kept", v), tmp_path / str(number)
        ).kept
        assert (came.dtype, came.shape) == (value.dtype, value.shape)
        assert (came == value).all()


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: torch.Generator().manual_seed(0), lambda own: torch.rand(3, generator=own).tolist()),
        (lambda: np.random.default_rng(0), lambda own: own.random(3).tolist()),
        (lambda: np.random.Generator(np.random.MT19937(0)), lambda own: own.random(3).tolist()),
        (lambda: np.random.RandomState(0), lambda own: own.rand(3).tolist()),
        (lambda: Random(0), lambda own: [own.gauss(0, 1) for _ in range(3)]),
    ],
    ids=["torch", "numpy", "Mersenne twister", "RandomState", "random"],
)
def test_generators_go_on(make, draw, tmp_path, capsys):
    came = come_back(lambda: Bare(own=make()), lambda task: draw(task.own), tmp_path)
    draw(own := make())
    assert draw(came.own) == draw(own)
    assert "warning" not in capsys.readouterr().err


def grow(task):
    task.held.rate, task.noted.inner[0].seen, task.space.x, task.arguments.y = 2.0, 5, 6, 7
    task.held.centre.data.add_(1)
    task.array[1] = 3
    task.net[1]._heat = 0.5
    task.table.append(2)
    del task.flag


def test_objects_modules_and_what_several_hold(tmp_path, capsys):
    def make():
        table, array = [1], np.zeros(2)
        noted = Noted(inner=[Noted(seen=0)], table=table)
        held, space, arguments = Held(), SimpleNamespace(x=0), Namespace(y=0)
        noted.back = noted  # a ring
        return Bare(
            noted=noted, held=held, table=table, array=array, space=space, arguments=arguments, flag=True
        )

    came = come_back(make, grow, tmp_path)
    found = came.held.rate, came.noted.inner[0].seen, came.space.x, came.arguments.y, came.net[1]._heat
    assert found == (2.0, 5, 6, 7, 0.5)
    assert came.held.centre.tolist() == [1, 1]
    assert came.array.tolist() == [0, 3]
    assert came.table is came.noted.table
    assert came.table == [1, 2]
    assert not hasattr(came, "flag")
    assert "warning" not in capsys.readouterr().err


def test_another_tensor_is_not_copied_into_the_one_of_the_start(tmp_path):
    def make():
        data = torch.zeros(2)
        return Bare(data=data, noise=data)

    came = come_back(make, lambda task: setattr(task, "noise", torch.ones(2)), tmp_path)
    assert came.data.tolist() == [0, 0]
    assert came.noise.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("task.batches", lambda task: next(task.batches)),
        ("task.phase", lambda task: setattr(task, "phase", Phase.SECOND)),
        ("task.found", lambda task: task.found["a"].append(1)),
        ("task.distance", lambda task: setattr(task, "distance", len)),
        ("task.activation", lambda task: setattr(task, "activation", lambda x: -x)),
        ("net.1", lambda task: task.net.__setitem__(1, nn.Identity())),
        ("net.0._hooks", lambda task: task.net[0].register_forward_hook(print)),
        ("net.0.weight._hooks", lambda task: task.net[0].weight.register_hook(print)),
        ("task.names", lambda task: task.names.fill("c")),
        ("task.steps", lambda task: setattr(task, "steps", {next(task.net.parameters()): 2})),
        ("task.noted", lambda task: setattr(task, "noted", SimpleNamespace())),
        ("task.own.state", lambda task: task.own.step()),
    ],
)
def test_what_cannot_be_saved_is_named_once(place, change, capsys):
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    task = Bare(
        batches=iter([1, 2]),
        phase=Phase.FIRST,
        found=defaultdict(list),
        distance=max,
        names=np.array(["a", "b"]),
        steps=None if place != "task.steps" else {},
        activation=lambda x: x,
        noted=Noted(),
        own=torch.optim.Adam([weight]),
    )
    hidden = HiddenState(task)
    change(task)
    hidden.changed()
    hidden.changed()
    said = [line for line in capsys.readouterr().err.splitlines() if place in line]
    assert len(said) == 1
    assert said[0].startswith(f"warning: {place} has changed since the start, and no checkpoint can hold it")


def test_a_cache_and_what_parts_have_put_are_not_named_and_not_saved(capsys):
    task: Any = Bare(found=None, fakes={}, parts=[None, None], known=Noted(by_part={}))
    hidden = HiddenState(task, (0, 1), 2)
    for _ in range(2):
        for of_parts in (task.fakes, task.parts, task.known.by_part):
            of_parts[0], of_parts[1] = torch.rand(2), torch.rand(2)
        task.found = task.found or Noted(sums=torch.ones(2))
        assert not hidden.changed()
    assert "warning" not in capsys.readouterr().err
    task.found.sums += 1  # so it is no cache
    hidden.changed()
    assert "warning: task.found.sums has changed" in capsys.readouterr().err


def test_tensors_under_other_numbers_than_those_of_the_parts_are_saved():
    task: Any = Bare(kept={}, pair=None)
    hidden = HiddenState(task, (0, 3), 4)
    task.kept, task.pair = {0: torch.ones(1), 1: torch.ones(1)}, [torch.ones(1) for _ in range(4)]
    assert hidden.changed()["task"].keys() == {"kept", "pair"}


def test_tensors_that_a_dictionary_by_number_has_at_the_start_are_saved(tmp_path):
    def move(task):
        task.centres[1] += 1

    assert come_back(lambda: Bare(centres={1: torch.zeros(1)}), move, tmp_path).centres[1] == 1


def test_a_tensor_in_a_checkpoint_of_before_its_layout_was_kept_is_read():
    assert value_of({"$on": "cpu", "of": torch.ones(2)}).tolist() == [1, 1]


def test_weights_are_not_saved_twice():
    task: Any = Bare()
    task.kept, task.noted = [*task.net.parameters()], Noted(weight=task.net[0].weight.detach().view(4))
    hidden = HiddenState(task)
    with torch.no_grad():
        task.net[0].weight.add_(1)
    assert not hidden.changed()


@pytest.mark.parametrize(
    ("kind", "changes"), [(GANTask, {"dataset": "fake"}), (LSTMTask, {})], ids=["gan", "lstm"]
)
def test_the_tasks_of_the_project_change_nothing_that_is_hidden(kind, changes, capsys):
    task = kind(replace(kind.presets["smoke"], **changes), CPU)
    trainer, hidden = Trainer(task, Accelerator(cpu=True)), HiddenState(task, [0], 1)
    for step in range(2):
        trainer.step(step, is_logged=False)
        with trainer.evaluating():
            task.evaluate(trainer.sum_over())
        places = hidden.changed()
        assert all(" group " in place for place in places), places
    assert "warning" not in capsys.readouterr().err


def test_a_rate_set_by_hand_is_refused_at_the_next_start_too(tmp_path):
    def start():
        task = LSTMTask(LSTMTask.presets["smoke"], CPU)
        return task, Trainer(task, Accelerator(cpu=True)), HiddenState(task)

    task, trainer, hidden = start()
    trainer.step(0, is_logged=False)
    task.optimizers["lstm"].param_groups[0]["lr"] *= 0.1
    write_checkpoint(tmp_path / "1", task, TrainerState(1, hidden=hidden.changed()))
    task, trainer, hidden = start()
    read_checkpoint(tmp_path / "1", task, hidden)
    assert refusal(trainer.step, 1, is_logged=False).startswith("the task has set a learning rate")


def test_what_is_not_alike_on_all_processes_is_named(capsys):
    task: Any = Bare(carried=0, count=0, right={})
    hidden = HiddenState(task)
    task.carried, task.count, task.right = torch.ones(1), 1, {0: 0.5}
    assert hidden.changed(lambda own: [own, {**own, ("task", "carried"): 0}])["task"].keys() == {
        "carried",
        "count",
        "right",
    }
    said = capsys.readouterr().err
    assert "task.carried has changed since the start, and is not the same on all processes" in said
    assert said.count("warning") == 1


class Closed:
    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


def test_attributes_of_rare_kinds_do_not_stop_a_run():
    itself: list[Any] = []
    itself.append(itself)
    rows = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)
    task = Bare(closed=Closed(), itself=itself, rows=rows, files=[("name", 1)] * 100_000)
    assert HiddenState(task).changed() == {}


@pytest.mark.parametrize("name", ["__class__", "load_state_dict"])
def test_a_forged_name_is_refused(name):
    said = refusal(HiddenState(Bare()).restore, {"task": {name: 1}})
    assert said == f"the checkpoint's task.{name} does not fit: it is another task's"


def test_momentum_may_begin_later(tmp_path):
    task = Bare()
    hidden = HiddenState(task)
    write_checkpoint(tmp_path / "1", task, TrainerState(1))
    read_checkpoint(tmp_path / "1", task, hidden)
    task.optimizers["net"].param_groups[0]["momentum"] = 0.9
    for parameter in task.net.parameters():
        parameter.grad = torch.ones_like(parameter)
    task.optimizers["net"].step()
    write_checkpoint(tmp_path / "2", task, TrainerState(2, hidden=hidden.changed()))
    read_checkpoint(tmp_path / "2", again := Bare(), HiddenState(again))
    states = again.optimizers["net"].state.values()
    assert [state["momentum_buffer"].sum().item() for state in states] == [4.0, 2.0]
