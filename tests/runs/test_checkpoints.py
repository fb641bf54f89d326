"""A checkpoint comes back to the last bit, or a file of it is named; a writer may die at any moment."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import mend, refusal
from torch import nn
from torch.nn import functional as F

from cs324dist.errors import ReportedError, RunFailed, UserError
from cs324dist.runs.checkpoints import (
    TrainerState,
    check_names,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from cs324dist.runs.history import checkpoints_in, keep_newest
from cs324dist.runs.optimizers import optimizer_tensors, with_full_state
from cs324dist.tasks.lstm.networks import RNN

FILES = ["rnn/config.json", "rnn/model.safetensors", "optimizers.safetensors"]
SCALE = {"scale": 1024.5, "_growth_tracker": 7}
STATE = TrainerState(3, 2, loss_scale=SCALE)


class Learner:
    """A network and its Adam, on data of its own: what a task is to a checkpoint."""

    def __init__(self, model: nn.Module | None = None, **own: object) -> None:
        self.model = RNN(2, 3, 4) if model is None else model
        self.networks = {"rnn": self.model}
        parameters = list(self.model.parameters())
        self.optimizers = {"rnn": torch.optim.Adam(parameters, 1e-2, fused=True)} if parameters else {}
        self.own: dict[str, object] = {"length": 17, **own}

    def state_dict(self) -> dict[str, object]:
        return self.own

    def load_state_dict(self, state: dict[str, object]) -> None:
        if type(state["length"]) is not int:
            raise ValueError("not a length")
        self.own = state

    def train(self, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(5, 8, 2, generator=generator)
            F.cross_entropy(self.model(x), torch.arange(8) % 4).backward()
            self.optimizers["rnn"].step()
            self.optimizers["rnn"].zero_grad()

    def bits(self) -> dict[str, bytes]:
        found = {**self.model.state_dict(), **optimizer_tensors(self.optimizers, self.networks)}
        return {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in found.items()}


def write(folder: Path, learner: Learner | None = None, state: TrainerState = STATE) -> Path:
    write_checkpoint(folder, learner or Learner(), state)
    return folder


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    """One that tests may damage, if they mend it."""
    learner = Learner()
    learner.train(range(3))
    return write(tmp_path_factory.mktemp("checkpoints") / "000000003-1", learner)


def test_a_checkpoint_comes_back_to_the_last_bit(tmp_path):
    own = {"length": 19, "plain": [None, True, -0.1, 1 << 70, "\x00 ü", {"": [{"a": []}]}]}
    learner, other = Learner(**own), Learner()
    learner.train(range(3))
    write(tmp_path / "3", learner)
    state = read_checkpoint(tmp_path / "3", other)
    assert replace(state, sha256={}) == replace(STATE, task=own)
    assert other.own == own
    assert other.bits() == learner.bits()
    assert "rnn/rnn.input.weight/exp_avg" in other.bits()


@settings(max_examples=60)
@given(name=st.sampled_from(FILES), position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_any_file_names_it(intact, name, position, bit):
    content = (intact / name).read_bytes()
    assert_refused(intact, name, flipped(content, int(position * len(content)), bit))


def test_a_flipped_bit_in_the_list_of_digests_is_noticed(intact):
    path = intact / "trainer.json"
    content = path.read_bytes()
    unnoticed = []
    for position in range(len(content)):
        path.write_bytes(flipped(content, position, 0))  # the last bit makes another digit of every digit
        try:
            verify_checkpoint(intact)
        except UserError:
            continue
        unnoticed.append(flipped(content[: position + 1], position, 0)[-20:])
    path.write_bytes(content)
    assert unnoticed == []


@pytest.mark.parametrize("name", [*FILES, "trainer.json"])
@pytest.mark.parametrize("content", [None, b""], ids=["absent", "empty"])
def test_a_file_that_is_absent_or_empty_is_named(intact, name, content):
    assert_refused(intact, name, content)


@pytest.mark.parametrize(
    "change",
    [
        {"step": "3"},
        {"step": -1},
        {"processes": 0},
        {"loss_scale": {"scale": "1024"}},
        {"sha256": {}},
        {"colour": "red"},
        {"format": 3, "colour": "red"},
    ],
    ids=str,
)
def test_a_state_that_cannot_be_is_refused_though_its_digest_is_right(tmp_path, change):
    folder = write(tmp_path / "3")
    mend(folder, **change)
    line = refusal(verify_checkpoint, folder)
    name = next(iter(change))
    assert line.startswith(f"{folder}")
    assert name in line or "holds no optimizers.safetensors" in line


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    folder = write(tmp_path / "3")
    other = Learner()
    other.networks = {"lstm": other.model}
    with pytest.raises(UserError) as caught:
        read_checkpoint(folder, other)
    assert (
        str(caught.value) == f"{folder} holds no lstm/model.safetensors: it is a checkpoint of another task"
    )


STEPS = st.integers(1, 1_999_999_999)
WRITTEN = st.sets(st.tuples(STEPS | st.integers(1, 5), st.integers(1, 4)), max_size=8)  # step and owner


def named(folder: Path, written: set[tuple[int, int]]) -> Path:
    for step, owner in written:
        (folder / f"{step:09d}-{owner}").mkdir()
    return folder


def in_order(folder: Path) -> list[tuple[int, int]]:
    return [(int(name[:-2]), int(name[-1])) for name in (path.name for path in checkpoints_in(folder))]


@settings(max_examples=100)
@given(written=WRITTEN, count=st.integers(1, 4), generation=st.integers(1, 4))
def test_an_owner_keeps_those_that_led_to_the_newest(tmp_path_factory, written, count, generation):
    folder = named(tmp_path_factory.mktemp("checkpoints"), written)
    for writer in range(1, 5):
        (folder / f".000000007-{writer}.tmp").mkdir()
        (folder / f".000000008-{writer}.deleted.tmp").mkdir()
    (folder / ".stray.tmp").touch()
    others = "damaged-000000005-1 notes 1-1 000000005 000000005-0 000000005-01 0000000005-1"
    for other in others.split():
        (folder / other).mkdir()
    assert in_order(folder) == sorted(written, key=lambda one: (-one[1], -one[0]))
    keep_newest(folder, count, generation)
    kept, below = set(), math.inf
    for step, owner in sorted(written, key=lambda one: (-one[1], -one[0])):
        if step < below and len(kept) < count:
            kept.add((step, owner))
            below = step
    kept |= {one for one in written if one[1] > generation}
    assert set(in_order(folder)) == kept
    assert {path.name for path in folder.glob(".*")} == {
        name
        for writer in range(generation + 1, 5)
        for name in (f".000000007-{writer}.tmp", f".000000008-{writer}.deleted.tmp")
    }


def test_a_checkpoint_that_was_moved_to_another_step_says_so(tmp_path):
    write(tmp_path / "000000004-1")
    with pytest.raises(UserError, match=r"trainer.json is of step 3: it was moved here, or is damaged"):
        verify_checkpoint(tmp_path / "000000004-1")


def flipped(content: bytes, position: int, bit: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def assert_refused(folder: Path, name: str, content: bytes | None) -> None:
    """With this content of one file (None: without it), reading names the file and changes nothing."""
    path, learner = folder / name, Learner()
    intact, before = path.read_bytes(), learner.bits()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    try:
        with pytest.raises(UserError) as caught:
            read_checkpoint(folder, learner)
    finally:
        path.write_bytes(intact)
    assert str(path) in str(caught.value)
    assert learner.bits() == before


@pytest.mark.parametrize("name", ["my-mlp", "a/b", "", "m.lp", "ü", "x" * 100])
def test_a_model_that_no_checkpoint_could_hold_is_refused(name):
    with pytest.raises(UserError, match="give letters, digits and underscores"):
        check_names(["mlp", name])


class Odd(nn.Module):
    """A module that stands for whatever can be built."""

    def __init__(self, config: object = None, **buffers: torch.Tensor) -> None:
        super().__init__()
        if config is not None:
            self.config = config
        self.linear = nn.Linear(2, 2)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    return model


def alike() -> nn.Module:
    values = torch.arange(6.0)
    return Odd(whole=values, part=values[:2], same=values, rest=values[3:])


BUILDS = {
    **{str(t): lambda t=t: Odd(counts=torch.arange(3).to(t)) for t in (torch.int8, torch.int16, torch.bool)},
    "uint16": lambda: Odd(counts=torch.arange(3).to(torch.uint16)),
    "bfloat16": lambda: Odd().bfloat16(),
    "no numbers in a buffer": lambda: Odd(none=torch.zeros(0, 3)),
    "a mask of -inf": lambda: Odd(mask=torch.full((3, 3), -math.inf).triu(1)),
    "tied weights": tied,
    "buffers that share memory": alike,
    "transposed": lambda: Odd(turned=torch.arange(6.0).view(2, 3).T),
    "no config": lambda: nn.Linear(2, 2),
    "no parameters": lambda: nn.ReLU(),
    "floats, truth values and words in its config": lambda: Odd({"rate": 0.1, "bias": True, "act": "relu"}),
    "an optimizer that trains a part": lambda: Odd().requires_grad_(False),
}


class TestWhatCanBeBuilt:
    @pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
    def test_it_can_be_saved_and_read(self, tmp_path, build):
        learner, other = Learner(build()), Learner(build())
        for one in (learner, other):
            with torch.no_grad():
                for parameter in one.model.parameters():
                    parameter.copy_(torch.randn_like(parameter))
        with with_full_state(learner.optimizers):
            write(tmp_path / "3", learner)
            before = learner.model.state_dict()
        with with_full_state(other.optimizers):
            read_checkpoint(tmp_path / "3", other)
            after = other.model.state_dict()
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor), name
            assert after[name].dtype == tensor.dtype

    def test_a_mask_may_be_infinite_and_a_weight_may_not(self, tmp_path):
        learner = Learner(model := Odd(mask=torch.tensor([0.0, -math.inf])))
        learner.networks = {"optimizer": model}  # which may be called so
        write(tmp_path / "3", learner)
        for broken in (model.linear.weight, model.mask):
            value = math.inf if broken is model.linear.weight else math.nan
            with torch.no_grad():
                kept = broken.clone()
                broken[0] = value
            with pytest.raises(RunFailed, match=r"^after step 3, the optimizer holds values that are not"):
                write(tmp_path / "4", learner)
            with torch.no_grad():
                broken.copy_(kept)


class TestTheTasksOwnState:
    def test_tensors_come_back_wherever_they_are(self, tmp_path):
        def own(start: float) -> dict[str, object]:
            return {
                "history": [torch.full((2,), start), {"best": torch.tensor(start).to(torch.int16)}],
                "pair": (torch.full((1, 2), -math.inf), 3),
                "nested": {"deep": {"er": torch.tensor([start > 1])}},
            }

        learner, other = Learner(**own(7.0)), Learner(**own(1.0))
        folder = write(tmp_path / "3", learner)
        state = read_checkpoint(folder, other)
        expected = {**learner.own, "pair": list(learner.own["pair"])}  # as JSON has it
        assert str(sorted(other.own.items())) == str(sorted(expected.items()))  # with their dtypes
        assert state.sha256.keys() == {*FILES, "task.safetensors"}
        other = Learner(**{**own(1.0), "history": [torch.zeros(3), own(1.0)["history"][1]]})
        with pytest.raises(
            UserError, match=r"task.safetensors: 'history.0' is torch.float32 of shape \(2,\)"
        ):
            read_checkpoint(folder, other)

    @pytest.mark.parametrize(
        ("own", "line"),
        [
            ({"a": {"b": math.nan}}, "the task's state holds a.b = nan: give tensors, numbers and words"),
            ({"a": [1, {2}]}, "the task's state holds a.1 = {2}: give tensors"),
            ({"a": {1.5: 2}}, "the task's state holds a = {1.5: 2}: give tensors"),
            ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "two tensors of the task's state are both "),
            (
                {"a": torch.tensor([1.0, math.nan])},
                "after step 3, the task's state holds values that",
            ),
            ({"model": Odd({"widths": [1, 2]})}, "Odd.config['widths'] is [1, 2]: give a string, a boolean"),
        ],
        ids=["NaN", "set", "number as key", "same name", "NaN in a tensor", "list"],
    )
    def test_what_no_checkpoint_can_hold_is_refused_and_nothing_is_left(self, tmp_path, own, line):
        said = refusal(write, tmp_path / "000000003", Learner(**own), kind=ReportedError)
        assert said.startswith(line)
        assert list(tmp_path.iterdir()) == []
