"""What belongs to one part, such as attributes that a loss sets; and what a loss may not change."""

import copy
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cs324dist.data.streams import CPU
from cs324dist.distributed.batch_norm import span_the_batch
from cs324dist.distributed.belongings import PartBelongings, Unchanged, owners_in
from cs324dist.distributed.parts import Parts
from cs324dist.errors import UserError

COUNT = 9


def belongings_of(**values: Any) -> tuple[SimpleNamespace, PartBelongings]:
    owner = SimpleNamespace(**values)
    return owner, PartBelongings({"task": owner}, CPU, COUNT)


CHANGES = {
    "a new attribute": lambda owner: setattr(owner, "new", 1),
    "another value": lambda owner: setattr(owner, "value", 1),
    "an equal value": lambda owner: setattr(owner, "value", copy.copy(VALUES["value"])),
    "deleted": lambda owner: vars(owner).pop("value", None),
    "None for a value": lambda owner: setattr(owner, "value", None),
    "a list grows": lambda owner: owner.list.append(1),
    "an entry of a list": lambda owner: owner.list.__setitem__(0, 1),
    "a dict grows": lambda owner: owner.dict.update(new=1),
    "an entry of a dict": lambda owner: owner.dict.update(a=1),
    "a dict is emptied": lambda owner: owner.dict.clear(),
    "a set": lambda owner: owner.set.add(1),
    "a deque": lambda owner: owner.deque.append(1),
}
VALUES: dict[str, Any] = {
    "value": [0.5],
    "list": [0, 0],
    "dict": {"a": 0},
    "set": {0},
    "deque": deque([0], 2),
}


def content(owner: SimpleNamespace) -> dict[str, Any]:
    return copy.deepcopy(vars(owner))


@given(st.lists(st.lists(st.sampled_from(sorted(CHANGES)), unique=True), min_size=2, max_size=4))
def test_every_part_has_its_own(of_parts):
    owner, belongings = belongings_of(**copy.deepcopy(VALUES))
    at_first, identities = belongings.put_away(), {name: id(value) for name, value in vars(owner).items()}
    kept, expected = [], []
    for changes in of_parts:
        belongings.take_out(at_first)
        assert content(owner) == VALUES
        assert {name: id(value) for name, value in vars(owner).items()} == identities
        for change in changes:
            CHANGES[change](owner)
        kept.append(belongings.put_away())
        expected.append(content(owner))
    for index in (*range(len(kept)), *reversed(range(len(kept)))):
        belongings.take_out(kept[index])
        assert content(owner) == expected[index]


@pytest.mark.parametrize("change", CHANGES)
def test_one_line_says_which_attribute_it_is(change, capsys):
    owner, belongings = belongings_of(**copy.deepcopy(VALUES))
    kept = belongings.put_away()
    for _ in range(2):
        CHANGES[change](owner)
        belongings.take_out(kept)
    (line,) = capsys.readouterr().err.splitlines()
    name = line.removeprefix("warning: task.").partition(",")[0]
    assert name in (*VALUES, "new")
    assert line.endswith(f"to use it there, keep it by part, task.{name}[batch.index] = …")
    assert belongings.said.keys() == {name}


def test_what_is_kept_by_part_is_shared(capsys):
    owner, belongings = belongings_of(by_index={}, of_parts=[None] * COUNT, named={"a": 0})
    with belongings.restored() as at_first:
        pass
    for index in range(COUNT):
        owner.by_index[index] = owner.of_parts[index] = torch.full((), index)
        belongings.take_out(at_first)
    assert list(owner.by_index) == list(range(COUNT))
    assert [value.item() for value in (*owner.by_index.values(), *owner.of_parts)] == [*range(COUNT)] * 2
    assert capsys.readouterr().err == ""
    owner.by_index["new"] = 1
    belongings.take_out(at_first)
    assert list(owner.by_index) == list(range(COUNT))


def test_a_list_that_grows_to_a_place_for_each_part_is_a_part_s_own():
    owner, belongings = belongings_of(features=[])
    at_first = belongings.put_away()
    owner.features += [1] * COUNT
    kept = belongings.put_away()
    belongings.take_out(at_first)
    assert owner.features == []
    belongings.take_out(kept)
    assert owner.features == [1] * COUNT


@pytest.mark.parametrize(("of_parts", "numbers"), [([0] * COUNT, {}), ([0] * COUNT, {0: 0, 1: 0, 2: 0})])
def test_numbers_that_are_not_of_parts_are_put_back(of_parts, numbers, capsys):
    owner, belongings = belongings_of(list=list(of_parts), dict=dict(numbers))
    for index in (1, 2):
        with belongings.restored(index):
            owner.list[2], owner.dict[2] = index, index
    assert owner.list == of_parts  # part 1 has written to the place of part 2
    assert owner.dict == numbers
    said = capsys.readouterr().err
    assert "warning: task.list, which the loss sets, belongs to its part of the batch" in said
    assert "warning: task.dict, which the loss sets" in said


def test_so_they_are_where_parts_take_turns():
    owner, belongings = belongings_of(mine={}, classes={})
    with belongings.restored() as at_first:
        kept = {}
        for turn in range(2):
            for index in range(3):
                belongings.take_out(kept.get(index, at_first))
                owner.mine[index] = turn
                owner.classes[2 - index] = turn
                kept[index] = belongings.put_away(index)
    assert owner.mine == dict.fromkeys(range(3), 1)
    assert owner.classes == {}


class Counter:
    """Of a class that a user has written."""

    def __init__(self, inner: object = None) -> None:
        self.inner, self.itself = inner, self


class Items(torch.utils.data.Dataset):
    pass


def test_owners_are_modules_and_objects_of_users_wherever_they_are():
    net, other = nn.Sequential(nn.Linear(1, 1)), nn.Linear(1, 1)
    task = Counter({"a": [Counter(), other]})
    task.net, task.items, task.space, task.kind = net, Items(), SimpleNamespace(), Counter
    net[0].state = Counter()
    assert owners_in({"net": net}, task) == {
        "Counter": task,
        "net": net,
        "net.0": net[0],
        "net.0.state": net[0].state,
        "inner['a'][0]": task.inner["a"][0],
        "inner['a'][1]": other,
    }


class TestUnchanged:
    @pytest.fixture
    def net(self) -> nn.Module:
        net = nn.Sequential(
            nn.Linear(2, 2), nn.BatchNorm1d(2), nn.InstanceNorm1d(2, track_running_stats=True)
        )
        net.register_buffer("count", torch.zeros(()), persistent=False)
        net.average = torch.zeros(2)
        return net

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("net.0.weight", lambda net: net[0].weight.detach().renorm_(2, 0, 1e-3)),
            ("net.0.weight", lambda net: setattr(net[0], "weight", nn.Parameter(torch.ones(2, 2)))),
            ("net.count", lambda net: net.count.add_(1)),
            ("net.count", lambda net: setattr(net, "count", net.count + 1)),
            ("net.average", lambda net: net.average.mul_(2)),
            ("net.2.running_mean", lambda net: net[2](torch.rand(1, 2, 3))),
            ("net.1.num_batches_tracked", lambda net: net[1](torch.rand(3, 2))),  # it does not span the batch
        ],
    )
    def test_a_tensor_that_a_loss_changes_is_named(self, net, name, change):
        unchanged = Unchanged(owners_in({"net": net}))
        unchanged.check()
        change(net)
        with pytest.raises(UserError, match=f"^the loss changes {name} in its forward pass"):
            unchanged.check()

    def test_a_layer_that_spans_the_batch_may_change_its_statistics(self, net):
        span_the_batch(net, "net", Parts(2, CPU))
        unchanged = Unchanged(owners_in({"net": net}))
        net[1](torch.rand(3, 2))
        unchanged.check()
        net[1].weight.detach().zero_()
        with pytest.raises(UserError, match=r"net\.1\.weight"):
            unchanged.check()
