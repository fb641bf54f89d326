"""A checkpoint comes back to the last bit, or a file of it is named; a writer may die at any moment."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from cs324dist.errors import RunFailed, UserError
from cs324dist.models.rnn import RNN
from cs324dist.runs import checkpoints
from cs324dist.runs.checkpoints import (
    LARGEST_GENERATION,
    TrainerState,
    check_names,
    checkpoints_in,
    keep_newest,
    newest_generation,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from cs324dist.tasks.base import create_state

FILES = ["rnn/config.json", "rnn/model.safetensors", "optimizers.safetensors"]
STATE = TrainerState(3, 2, {"length": 17}, {"scale": 1024.5, "_growth_tracker": 7})


class Learner:
    """A model and its Adam, on data of its own: what a task is to a checkpoint."""

    def __init__(self) -> None:
        self.model = RNN(2, 3, 4)
        self.models = {"rnn": self.model}
        self.adam = torch.optim.Adam(self.model.parameters(), 1e-2, fused=True)
        create_state(self.adam)

    def train(self, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(5, 8, 2, generator=generator)
            F.cross_entropy(self.model(x), torch.arange(8) % 4).backward()
            self.adam.step()
            self.adam.zero_grad()

    @property
    def optimizers(self) -> dict[str, Tensor]:
        return {
            f"rnn/{name}/{key}": tensor
            for name, parameter in self.model.named_parameters()
            for key, tensor in self.adam.state[parameter].items()
        }

    def bits(self) -> dict[str, bytes]:
        return bits(self.model) | {name: t.numpy().tobytes() for name, t in self.optimizers.items()}


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def write(folder: Path, learner: Learner | None = None, state: TrainerState = STATE) -> Path:
    learner = learner or Learner()
    write_checkpoint(folder, learner.models, learner.optimizers, state)
    return folder


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    """One that tests may damage, if they mend it."""
    learner = Learner()
    learner.train(range(3))
    return write(tmp_path_factory.mktemp("checkpoints") / "000000003", learner)


def test_a_checkpoint_comes_back_to_the_last_bit(tmp_path):
    learner, other = Learner(), Learner()
    learner.train(range(3))
    write(tmp_path / "3", learner)
    assert read_checkpoint(tmp_path / "3", other.models, other.optimizers) == STATE
    assert other.bits() == learner.bits()


def test_training_that_goes_on_from_a_checkpoint_takes_the_same_steps(tmp_path):
    learner, other = Learner(), Learner()
    learner.train(range(3))
    write(tmp_path / "3", learner)
    read_checkpoint(tmp_path / "3", other.models, other.optimizers)
    learner.train(range(3, 6))
    other.train(range(3, 6))
    assert other.bits() == learner.bits()


def test_a_checkpoint_holds_these_files_and_their_digests(intact):
    found = {str(p.relative_to(intact)) for p in intact.rglob("*") if p.is_file()}
    assert found == {*FILES, "trainer.json"}
    digests = json.loads((intact / "trainer.json").read_text())["sha256"]
    assert digests == {name: hashlib.sha256((intact / name).read_bytes()).hexdigest() for name in FILES}


@settings(max_examples=60, deadline=None)
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


@pytest.mark.parametrize("outside", ["../secret", "rnn/../../secret", "{}/secret"])
def test_a_digest_of_a_file_outside_is_refused_though_it_is_right(tmp_path, outside):
    folder = write(tmp_path / "3")
    (tmp_path / "secret").write_text("secret")
    name = outside.format(tmp_path)
    edit(folder, lambda content: content["sha256"].update({name: hashlib.sha256(b"secret").hexdigest()}))
    with pytest.raises(UserError) as caught:
        verify_checkpoint(folder)
    assert f"names {name!r}, which is no file of a checkpoint" in str(caught.value)


def test_a_link_that_leads_outside_is_refused(tmp_path):
    folder = write(tmp_path / "3")
    weights = folder / "rnn" / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="outside the checkpoint"):
        verify_checkpoint(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"step": "3"},
        {"step": True},
        {"step": None},
        {"world_size": 1.5},
        {"counters": [17]},
        {"counters": {"length": 17.5}},
        {"counters": {"length": True}},
        {"loss_scale": {"scale": "1024"}},
        {"sha256": {}},
        {"sha256": ["optimizers.safetensors"]},
    ],
    ids=str,
)
def test_a_list_of_digests_with_values_of_another_type_is_refused(tmp_path, change):
    folder = write(tmp_path / "3")
    edit(folder, lambda content: content.update(change))
    with pytest.raises(UserError) as caught:
        verify_checkpoint(folder)
    assert str(folder / "trainer.json") in str(caught.value)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    folder = write(tmp_path / "3")
    other = Learner()
    with pytest.raises(UserError) as caught:
        read_checkpoint(folder, {"lstm": other.model}, other.optimizers)
    assert (
        str(caught.value) == f"{folder} holds no lstm/model.safetensors: it is a checkpoint of another task"
    )


@pytest.mark.parametrize("step", ["save_model", "save_tensors", "sync", "sha256", "write_json"])
def test_a_writer_that_dies_leaves_the_checkpoints_that_were_there(tmp_path, monkeypatch, step):
    older, newer = write(tmp_path / "000000003"), tmp_path / "000000006"

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, step, dies)
        for folder in (older, newer):  # writing it anew must not cost the one that is there either
            with pytest.raises(KeyboardInterrupt):
                write(folder, state=TrainerState(99, 1))
    assert checkpoints_in(tmp_path) == [older]
    assert verify_checkpoint(older) == STATE

    write(newer)
    keep_newest(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000003", "000000006"]


def test_a_damaged_checkpoint_is_written_anew(tmp_path):
    folder = write(tmp_path / "000000003")
    (folder / "optimizers.safetensors").unlink()
    (folder / "stray").touch()
    write(folder)
    assert verify_checkpoint(folder) == STATE
    assert not (folder / "stray").exists()


@settings(max_examples=50, deadline=None)
@given(steps=st.sets(st.integers(1, 999_999_999), max_size=8), count=st.integers(1, 9))
def test_the_newest_are_kept_and_come_first(tmp_path_factory, steps, count):
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in steps:
        (folder / f"{step:09d}").mkdir()
    others = {".000000007.tmp", "damaged-000000005", "notes", "1a"}
    for other in others:
        (folder / other).mkdir()
    newest_first = sorted(steps, reverse=True)
    assert [int(path.name) for path in checkpoints_in(folder)] == newest_first
    keep_newest(folder, count)
    assert [int(path.name) for path in checkpoints_in(folder)] == newest_first[:count]
    assert {path.name for path in folder.iterdir() if not path.name.isdecimal()} == others - {
        ".000000007.tmp"
    }


GENERATIONS = st.dictionaries(
    st.integers(1, 999_999_999), st.integers(0, 4), max_size=8
)  # by step; 0: damaged


def written_by(folder: Path, owners: dict[int, int]) -> None:
    for step, generation in owners.items():
        (folder / f"{step:09d}").mkdir()
        content = json.dumps({"generation": generation}) if generation else "{"
        (folder / f"{step:09d}" / "trainer.json").write_text(content)


@settings(max_examples=60)
@given(owners=GENERATIONS)
def test_those_of_the_latest_owner_come_first_and_before_them_the_damaged(tmp_path_factory, owners):
    folder = tmp_path_factory.mktemp("checkpoints")
    written_by(folder, owners)
    found = [int(path.name) for path in checkpoints_in(folder)]
    damaged = sorted((step for step, owner in owners.items() if not owner), reverse=True)
    rest = sorted(
        (step for step, owner in owners.items() if owner), key=lambda s: (owners[s], s), reverse=True
    )
    assert found == damaged + rest


@settings(max_examples=100)
@given(owners=GENERATIONS, count=st.integers(1, 4), generation=st.integers(1, 4))
def test_an_owner_deletes_nothing_of_a_later_one(tmp_path_factory, owners, count, generation):
    folder = tmp_path_factory.mktemp("checkpoints")
    written_by(folder, owners)
    for writer in range(1, 5):
        (folder / f".000000007.{writer}.tmp").mkdir()
    keep_newest(folder, count, generation)
    newest_first = sorted(owners, key=lambda step: (owners[step], step), reverse=True)
    later = {step for step, owner in owners.items() if owner > generation}
    left = {path.name for path in folder.iterdir()}
    unfinished = {f".000000007.{writer}.tmp" for writer in range(generation + 1, 5)}
    assert left == {f"{step:09d}" for step in {*newest_first[:count], *later}} | unfinished


@pytest.mark.parametrize(
    "delete",
    [
        lambda folder: keep_newest(folder, 1),
        lambda folder: write(folder / "000000002", state=TrainerState(2, 1)),
    ],
    ids=["an old one", "one that is replaced"],
)
def test_a_process_killed_at_a_deletion_leaves_no_half_of_a_checkpoint(tmp_path, monkeypatch, delete):
    for step in (1, 2, 3):
        write(tmp_path / f"{step:09d}", state=TrainerState(step, 1))
    clear = checkpoints.clear

    class Killed(BaseException):
        pass

    def killed_half_way(path: Path) -> None:
        if (path / "trainer.json").exists():
            (path / "trainer.json").unlink()
            raise Killed
        clear(path)

    monkeypatch.setattr(checkpoints, "clear", killed_half_way)
    with pytest.raises(Killed):
        delete(tmp_path)
    monkeypatch.undo()
    left = checkpoints_in(tmp_path)
    assert len(left) == 2
    for checkpoint in left:
        verify_checkpoint(checkpoint)
    keep_newest(tmp_path, 3)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in left}


@pytest.mark.parametrize("generation", [0, -1, LARGEST_GENERATION + 1, True, 1.5, "7", None, [1]])
def test_an_owner_that_cannot_be_counts_as_none(tmp_path, generation):
    (tmp_path / "000000001").mkdir()
    trainer = tmp_path / "000000001" / "trainer.json"
    trainer.write_text(json.dumps({"generation": LARGEST_GENERATION}))
    assert newest_generation(tmp_path) == LARGEST_GENERATION
    trainer.write_text(json.dumps({"generation": generation}))
    assert newest_generation(tmp_path) == 0


@pytest.mark.parametrize("change", [{"world_size": 0}, {"generation": 0}, {"step": -1}], ids=str)
def test_a_state_that_cannot_be_is_refused_though_its_digest_is_right(tmp_path, change):
    learner = Learner()
    write_checkpoint(tmp_path / "c", learner.models, learner.optimizers, replace(STATE, **change))
    with pytest.raises(UserError, match=r"trainer.json has values of the wrong type: it is damaged"):
        verify_checkpoint(tmp_path / "c")


def test_a_checkpoint_that_was_moved_to_another_step_says_so(tmp_path):
    learner = Learner()
    write_checkpoint(tmp_path / "000000004", learner.models, learner.optimizers, STATE)
    with pytest.raises(UserError, match=r"trainer.json is of step 3: it was moved here, or is damaged"):
        verify_checkpoint(tmp_path / "000000004")


def test_a_link_to_a_checkpoint_is_none_of_the_run(tmp_path):
    (tmp_path / "elsewhere" / "000000001").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "000000001").symlink_to(tmp_path / "elsewhere" / "000000001")
    (tmp_path / "run" / "000000002").touch()
    assert checkpoints_in(tmp_path / "run") == []


@pytest.mark.parametrize(("theirs", "stays"), [(1, False), (2, False), (3, True)])
def test_a_checkpoint_is_replaced_by_its_own_and_by_later_owners_only(tmp_path, theirs, stays):
    folder = write(tmp_path / "000000003", state=TrainerState(3, 1, generation=theirs))
    before = (folder / "trainer.json").read_bytes()
    learner = Learner()
    learner.train(range(3))
    try:
        write(folder, learner, TrainerState(3, 1, {"length": 9}, generation=2))
    except OSError:
        assert stays
        assert (folder / "trainer.json").read_bytes() == before
    else:
        assert not stays
        assert verify_checkpoint(folder).generation == 2
    assert verify_checkpoint(folder).step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["000000003"]


def flipped(content: bytes, position: int, bit: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def edit(folder: Path, change) -> None:
    content = json.loads((folder / "trainer.json").read_text())
    change(content)
    content.pop("own_sha256", None)
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()  # a forger mends it too
    (folder / "trainer.json").write_text(json.dumps({**content, "own_sha256": own}))


def assert_refused(folder: Path, name: str, content: bytes | None) -> None:
    """With this content of one file (None: without it), reading names the file and changes nothing."""
    path, learner = folder / name, Learner()
    intact, before = path.read_bytes(), learner.bits()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    try:
        with pytest.raises(UserError) as caught:
            read_checkpoint(folder, learner.models, learner.optimizers)
    finally:
        path.write_bytes(intact)
    assert str(path) in str(caught.value)
    assert learner.bits() == before


@pytest.mark.parametrize("name", ["my-mlp", "a/b", "", "m.lp", "ü", "x" * 100])
def test_a_model_that_no_checkpoint_could_hold_is_refused(name):
    with pytest.raises(UserError, match="give letters, digits and underscores"):
        check_names(["mlp", name])


def test_a_model_may_be_called_optimizer(tmp_path):
    model = nn.Linear(1, 1)
    model.weight.data.fill_(math.nan)
    with pytest.raises(RunFailed, match="the optimizer holds values that are not finite"):
        write_checkpoint(tmp_path / "000000001", {"optimizer": model}, {}, TrainerState(1, 1))
