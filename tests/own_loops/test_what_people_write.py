"""Loops as people write them: what stands behind a loop, epochs around it, states of their own."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from launched import metrics, newest_checkpoint, refusal
from safetensors.torch import load_file
from torch import nn
from torch.optim import lr_scheduler

from cs324dist import ExactGradients, Run
from cs324dist.errors import UserError

EPOCH = 4  # steps


class Killed(Exception):
    """Stands for a kill: nothing is saved after it."""


@pytest.fixture
def exact() -> Iterator[ExactGradients]:
    threads = torch.get_num_threads()
    yield ExactGradients(2, accelerator=Accelerator(cpu=True))
    torch.set_num_threads(threads)


def parts_of(folder: Path, net: nn.Module | None = None, **options: Any) -> tuple[Run, nn.Module, Any]:
    net = nn.Linear(2, 1) if net is None else net
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    options = {"networks": {"net": net}, "optimizers": {"net": optimizer}, **options}
    return Run(folder, accelerator=Accelerator(cpu=True), **options), net, optimizer


def take(net: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    net(torch.rand(8, 2)).square().mean().backward()
    optimizer.step()


def end_of(folder: Path) -> tuple[dict[str, list[Any]], list[dict[str, Any]]]:
    """Weights and metrics."""
    weights = load_file(newest_checkpoint(folder) / "net" / "model.safetensors")
    rows = [{k: v for k, v in row.items() if "throughput" not in k} for row in metrics(folder)]
    return {name: tensor.tolist() for name, tensor in weights.items()}, rows


def assert_same_when_killed(train: Callable[[Path, int | None], object], tmp_path: Path, at: int) -> None:
    """`train(folder, at)` raises `Killed` in step `at`."""
    train(tmp_path / "whole", None)
    with pytest.raises(Killed):
        train(tmp_path / "killed", at)
    train(tmp_path / "killed", None)
    assert end_of(tmp_path / "killed") == end_of(tmp_path / "whole")


def by_epochs(folder: Path, at: int | None, *, rate_behind: bool = False) -> None:
    torch.manual_seed(0)
    run, net, optimizer = parts_of(folder)
    with run:
        for epoch in range(3):
            for step in run.steps((epoch + 1) * EPOCH, save_every=1):
                if step == at:
                    raise Killed
                take(net, optimizer)
            if rate_behind:
                optimizer.param_groups[0]["lr"] *= 0.5
            run.log(epoch=float(epoch))


def test_what_is_logged_behind_an_epoch_is_logged_once(tmp_path):
    assert_same_when_killed(by_epochs, tmp_path, at=9)
    assert [row["step"] for row in metrics(tmp_path / "killed")] == [4, 8, 12]


def test_a_change_behind_an_epoch_that_would_come_twice_is_refused(tmp_path):
    by_epochs(tmp_path / "whole", None, rate_behind=True)
    with pytest.raises(Killed):
        by_epochs(tmp_path / "run", 9, rate_behind=True)
    said = refusal(by_epochs, tmp_path / "run", None, rate_behind=True)
    assert (
        "is changed behind the loop over steps(8), which would be repeated whenever the run goes on" in said
    )


def test_what_a_forward_pass_and_eval_change_behind_an_epoch_is_no_matter(tmp_path):
    def train(folder: Path, at: int | None) -> None:
        torch.manual_seed(0)
        run, net, optimizer = parts_of(folder)
        net.seen = torch.zeros(1)
        with run:
            for epoch in range(3):
                for step in run.steps((epoch + 1) * EPOCH, save_every=1):
                    net.train()
                    if step == at:
                        raise Killed
                    take(net, optimizer)
                net.eval()
                net.seen = net.seen + 1
                run.log(epoch=float(epoch))

    assert_same_when_killed(train, tmp_path, at=9)


def test_between_the_end_of_an_epoch_and_the_next_it_may_change(tmp_path):
    """It was killed before what stands behind the epoch was done."""
    assert_same_when_killed(lambda *arguments: by_epochs(*arguments, rate_behind=True), tmp_path, at=4)


def test_steps_of_an_epoch_are_refused_where_those_of_the_run_are_meant(tmp_path):
    run, net, optimizer = parts_of(tmp_path / "run")

    def train() -> None:
        with run:
            for _ in range(3):
                for _ in run.steps(EPOCH, save_every=1):
                    take(net, optimizer)

    assert refusal(train).startswith("steps(4) after steps(4): it counts from the start of the run")


def test_steps_outside_of_the_run_are_refused(tmp_path):
    assert "steps belongs inside `with run`" in refusal(
        next, parts_of(tmp_path / "run")[0].steps(4, save_every=1)
    )


def test_a_loop_behind_a_break_is_refused(tmp_path):
    run, *_ = parts_of(tmp_path / "run")

    def train() -> None:
        with run:
            for _ in run.steps(EPOCH, save_every=1):
                break
            run.steps(2 * EPOCH, save_every=1)

    assert refusal(train) == "steps(8) after a `break`, which ends the run: put what follows into another run"


def test_what_is_logged_behind_the_loop_is_there_once(tmp_path):
    def train(folder: Path, at: int | None) -> None:
        torch.manual_seed(0)
        run, net, optimizer = parts_of(folder)
        with run:
            for _ in run.steps(EPOCH, save_every=1):
                take(net, optimizer)
            if at is not None:
                raise Killed
            run.log(test=0.5)

    assert_same_when_killed(train, tmp_path, at=EPOCH)
    train(tmp_path / "killed", None)  # it is finished
    assert end_of(tmp_path / "killed")[1] == [{"step": 4, "test": 0.5}]


class WarmUp:
    """A scheduler of one's own, with the optimizer in an attribute of the usual name."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.scheduler = lr_scheduler.StepLR(optimizer, 3)
        self.count = 0

    def step(self) -> None:
        self.count += 1
        self.optimizer.param_groups[0]["lr"] = 0.1 * min(1.0, self.count / 6)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def sequential(optimizer: Any) -> Any:
    warm_up = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    return lr_scheduler.SequentialLR(optimizer, [warm_up, lr_scheduler.MultiStepLR(optimizer, [2, 4])], [2])


@pytest.mark.parametrize("scheduler", [WarmUp, sequential])
def test_a_scheduler_goes_on(tmp_path, scheduler):
    def train(folder: Path, at: int | None) -> None:
        torch.manual_seed(0)
        net = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        schedule = scheduler(optimizer)
        parts = {"networks": {"net": net}, "optimizers": {"net": optimizer}, "states": {"rate": schedule}}
        with Run(folder, **parts, accelerator=Accelerator(cpu=True)) as run:
            for step in run.steps(10, save_every=1):
                if step == at:
                    raise Killed
                take(net, optimizer)
                schedule.step()
                run.log(rate=optimizer.param_groups[0]["lr"])

    assert_same_when_killed(train, tmp_path, at=5)


@pytest.mark.parametrize("scheduled", [True, False])
def test_a_new_rate_is_taken_unless_a_checkpoint_has_another(tmp_path, capsys, scheduled):
    for rate, until in ((0.1, 2), (0.5, 4)):
        net = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(net.parameters(), rate)
        schedule = lr_scheduler.StepLR(optimizer, 1)
        states = {"rate": schedule}
        parts = {"networks": {"net": net}, "optimizers": {"net": optimizer}, "may_change": ["optimizer net"]}
        with Run(tmp_path / "run", **parts, states=states, accelerator=Accelerator(cpu=True)) as run:
            for _ in run.steps(until, save_every=1):
                take(net, optimizer)
                if scheduled:
                    schedule.step()
    said = "optimizer net goes on with the settings of its checkpoint" in capsys.readouterr().err
    assert (said, optimizer.param_groups[0]["lr"] < 0.01) == (scheduled, scheduled)


def test_a_run_may_be_entered_again_as_in_a_notebook(tmp_path):
    run, net, optimizer = parts_of(tmp_path / "run")
    for until in (3, 6, 6):
        with run:
            for step in run.steps(until, save_every=1):
                take(net, optimizer)
                run.log(at=float(step))
    assert [row["at"] for row in metrics(tmp_path / "run")] == [*range(6)]
    owners = {path.stem for path in (tmp_path / "run" / "owners").glob("*.json")}
    assert owners == {"1", "2"}  # the third did nothing


def test_what_changed_before_it_was_entered_again_is_in_its_checkpoints(tmp_path):
    run, net, optimizer = parts_of(tmp_path / "run")
    net.bias.requires_grad_(False)
    for until in (3, 6):
        with run:
            for _ in run.steps(until, save_every=1):
                net.bias.requires_grad_(True)
                take(net, optimizer)
    (state,) = json.loads((newest_checkpoint(tmp_path / "run") / "trainer.json").read_text())[
        "hidden"
    ].values()
    assert state == {"requires_grad": True}


def test_draws_behind_a_run_do_not_depend_on_its_steps(tmp_path):
    def drawn() -> float:
        torch.manual_seed(0)
        run, net, optimizer = parts_of(tmp_path / "run")
        with run:
            for _ in run.steps(3, save_every=1):
                take(net, optimizer)
        return torch.initial_seed(), torch.rand(1).item()

    assert drawn() == drawn()  # the second time it is finished


def test_what_was_logged_past_the_checkpoint_does_not_count(tmp_path):
    run, net, optimizer = parts_of(tmp_path / "run")

    def train() -> None:
        with run:
            for step in run.steps(9, save_every=4):
                take(net, optimizer)
                run.log(loss=float(step))
                if step == 5:
                    raise Killed

    with pytest.raises(Killed):
        train()
    again, *_ = parts_of(tmp_path / "run")
    with again:
        assert again.logged("loss") == [*range(4)]


def test_the_run_is_that_of_a_compiled_network_too(exact, tmp_path):
    net = exact.prepare(torch.compile(nn.Linear(2, 1), backend="eager"))
    assert parts_of(tmp_path / "run", net)[0].exact is exact


def test_a_measurement_leaves_the_generators_as_they_were(exact):
    torch.manual_seed(1)
    expected = [torch.rand(1).item() for _ in range(2)]
    torch.manual_seed(1)
    found = [torch.rand(1).item()]
    assert exact.sum_over(lambda items: len(items), 700).item() == 700
    exact.sum_over(lambda items: torch.rand(1), 700)
    assert [*found, torch.rand(1).item()] == expected


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


@pytest.mark.parametrize("training", [True, False])
def test_a_teacher_that_changes_in_the_loss_is_refused(exact, tmp_path, training):
    net, teacher = exact.prepare(nn.Linear(2, 2)), Teacher().train(training)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    parts = {"networks": {"net": net, "teacher": teacher}, "optimizers": {"net": optimizer}}

    x = torch.rand(8, 2)

    def train() -> None:
        with Run(tmp_path / "run", **parts, accelerator=Accelerator(cpu=True)) as run:
            for step in run.steps(2, save_every=1):
                exact.backward(
                    lambda part: (net(x[part.rows]) - teacher(x[part.rows])).square().mean(), step, 8
                )
                optimizer.step()

    if training:
        assert refusal(train).startswith(
            "the loss changes teacher.norm.num_batches_tracked in its forward pass"
        )
    else:
        train()


def mistakes(folder: Path, exact: ExactGradients) -> dict[str, tuple[Callable[[], Any], str]]:
    net = exact.prepare(nn.Linear(2, 1))
    weight = nn.Linear(1, 1)
    both = {"networks": {"net": net, "weight": weight}}
    optimizer = torch.optim.SGD([*net.parameters(), *weight.parameters()], 0.1)

    def enter(**options: Any) -> None:
        with parts_of(folder, net, **options)[0] as run:
            for _ in run.steps(1, save_every=1):
                run.log(step=1.0)

    return {
        "a network that was not prepared": (
            lambda: enter(**both, optimizers={"both": optimizer}),
            "2 parameters of optimizer 'both' are of no prepared network, and get no gradient",
        ),
        "a step among the metrics": (enter, "log was given step=…, which each line has anyway: leave it out"),
        "another word behind the metric": (
            lambda: enter(keep_best="loss:smallest"),
            "keep_best loss:smallest is not allowed: give METRIC, or METRIC:min for the smallest",
        ),
    }


@pytest.mark.parametrize("name", mistakes(Path(), ExactGradients(2, accelerator=Accelerator(cpu=True))))
def test_a_mistake_is_one_line(exact, tmp_path, name):
    mistake, said = mistakes(tmp_path / "run", exact)[name]
    assert refusal(mistake).startswith(said)


class Config:
    """As nanoGPT's and those of transformers: no dict."""

    width = 2


def test_a_network_whose_config_is_no_dict_is_saved(tmp_path):
    net = nn.Linear(2, 1)
    net.config = Config()
    run, net, optimizer = parts_of(tmp_path / "run", net)
    with run:
        for _ in run.steps(1, save_every=1):
            take(net, optimizer)
    assert json.loads((newest_checkpoint(tmp_path / "run") / "net" / "config.json").read_text()) == {
        "class": "Linear"
    }


def by_hand(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= 0.1 * parameter.grad


OF_ALL = {  # that use a gradient which stays, without zero_grad
    "of the head alone": (lambda net: torch.optim.SGD(net[1].parameters(), 0.1), lambda _, one: one.step()),
    "fused": (lambda net: torch.optim.AdamW(net.parameters(), fused=True), lambda _, one: one.step()),
    "by hand": (lambda net: torch.optim.SGD(net.parameters(), 0.1), by_hand),
}


def backward_with(exact: ExactGradients, net: nn.Module, step: int) -> None:
    exact.backward(lambda part: net(torch.ones(8, 2)[part.rows]).square().mean(), step, 8)


@pytest.mark.parametrize("kind", OF_ALL)
def test_a_gradient_that_an_optimizer_has_used_may_stay(exact, kind):
    make, take = OF_ALL[kind]
    net = exact.prepare(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
    optimizer = make(net)
    for step in range(3):
        backward_with(exact, net, step)
        take(net, optimizer)


def test_a_gradient_that_no_optimizer_has_used_is_refused(exact):
    net = exact.prepare(nn.Linear(2, 1))
    torch.optim.SGD(net.parameters(), 0.1)
    backward_with(exact, net, 0)
    with pytest.raises(UserError, match="was used by no optimizer"):
        backward_with(exact, net, 1)


def test_a_lazy_network_is_refused_by_name(tmp_path):
    net = nn.Sequential(nn.LazyLinear(1))
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    with pytest.raises(UserError, match=r"net\.0\.weight is lazy"):
        Run(tmp_path, networks={"net": net}, optimizers={"net": optimizer}, accelerator=Accelerator(cpu=True))


def test_what_the_first_step_makes_and_others_change_is_named_at_the_first_checkpoint(tmp_path, capsys):
    run, net, optimizer = parts_of(tmp_path / "run")
    with run:
        for step in run.steps(2, save_every=2):
            take(net, optimizer)
            if step == 0:
                net.kept = SimpleNamespace(scale=1.0)
            net.kept.scale *= 0.9
    assert "warning: net.kept.scale has changed since the start" in capsys.readouterr().err
