"""Every task on a GPU that is not there: nothing is on the wrong device, and a step waits for nothing.

fake_cuda.py does it, in a process of its own. It says nothing about numbers; those need `pytest -m gpu`.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import REPOSITORY, python

HERE = Path(__file__).parent
NOT_FUSED = ("lstm course", "lstm equations, rmsprop", "rnn", "mlp", "photos")
BARRIERS = "a value is read: cs324dist/distributed/parts.py, _exchange: headers ="  # at the end of all parts
USED = "a value is read: cs324dist/distributed/exact.py, _finish: numbers, count ="


def waits(case: str, precision: str) -> list[str]:
    """How the lines begin that say what a step waits for: all of them."""
    if case.endswith(("exact", "whole")):
        return [BARRIERS, USED] if case.startswith(("gan", "classifier")) else [USED]
    found = []
    if case in ("lstm curriculum", "proven"):
        found.append("a value is read: cs324dist/tasks/lstm/task.py, step: if decides")
    if precision == "fp16" and case in NOT_FUSED:
        # Whether a gradient overflowed: torch has no other way to leave the step of such an optimizer out.
        found.append("a value is read: grad_scaler.py: cs324dist/trainer.py, update: scaler.step")
    return found


FAULTS = {  # and what is said of them
    "indices without a device": "aten.scatter_.value of tensors on a GPU and a CPU: "
    "cs324dist/tasks/lstm/networks.py",
    "a state without a device": "found input tensor at cuda:0 and hidden tensor at cpu",
    "a constant on the CPU": "aten.div.Tensor of tensors on a GPU and a CPU: cs324dist/tasks/gan/task.py",
    "an index on the CPU": "aten.index.Tensor of tensors on a GPU and a CPU: cs324dist/tasks/gan/task.py",
    "float(loss)": "a value is read: cs324dist/tasks/lstm/task.py, loss:",
    "data left on the CPU": "aten.index.Tensor of tensors on a GPU and a CPU: cs324dist/tasks/gan/task.py",
    "a generator on the CPU": "on cuda draws from a generator on cpu: "
    "cs324dist/tasks/gan/task.py, generator_loss",
    "no deterministic kernel": "nll_loss2d_forward has no deterministic kernel",
}
Found = dict[str, list[str]]


@pytest.fixture(scope="module")
def on_fake_cuda(guard: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Found]:
    shapes = str(tmp_path_factory.mktemp("shapes"))
    assert python(REPOSITORY / "examples" / "shapes.py", shapes, "96").returncode == 0

    def run(*arguments: str, **environment: str) -> Found:
        variables = {**os.environ, "SHAPES": shapes, **environment}
        done = python(HERE / "fake_cuda.py", guard, *arguments, env=variables)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="module")
def faults(on_fake_cuda: Callable[..., Found]) -> Found:
    return on_fake_cuda("faults")


def assert_found(found: Found, precision: str) -> None:
    """That a step waits where it says, and nothing else is found."""
    expected = {case: waits(case, precision) for case in found}
    assert expected == {
        case: [next(filter(line.startswith, expected[case]), line) for line in lines]
        for case, lines in found.items()
    }


@pytest.mark.parametrize(
    "precision",
    [pytest.param("no", marks=pytest.mark.slow), "bf16", pytest.param("fp16", marks=pytest.mark.slow)],
)
def test_nothing_is_on_the_wrong_device_and_a_step_does_not_wait(on_fake_cuda, precision):
    assert_found(on_fake_cuda(precision), precision)


def test_of_several_processes_one_has_nothing_there_either(on_fake_cuda: Callable[..., Found]) -> None:
    """The exchange of slices and of BatchNorm's statistics, over a backend that moves nothing."""
    several = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    assert_found(on_fake_cuda("no", "lstm exact", "gan exact", "gpt exact", **several), "no")


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_on_a_gpu_is_named(faults: Found, fault: str) -> None:
    assert any(FAULTS[fault] in line for line in faults[fault]), faults[fault]
