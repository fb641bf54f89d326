"""The first mistakes of who writes or names a task: one line each, that says what to do."""

import pytest
from launched import metrics, refusal

from cs324dist.errors import UserError
from cs324dist.tasks import find_task

TASK = """
from dataclasses import dataclass

import torch
from torch import nn

from beside import DATA
from cs324dist import Config, Evaluation, Positive, Task, main


@dataclass(frozen=True)
class OwnConfig(Config):
    learning_rate: Positive = 1e-2


class Own(Task[OwnConfig]):
    name = "own"
    presets = {"fast": OwnConfig(steps=2, evaluate_every=2, wandb="disabled")}

    def __init__(self, config, device):
        super().__init__(config, device)
        self.networks = {"net": nn.Linear(2, 1).to(device)}
        self.optimizers = {"net": torch.optim.SGD(self.networks["net"].parameters(), config.learning_rate)}

    def loss(self, batch):
        loss = self.networks["net"](DATA[batch.samples % 8]).mean()
        return loss, {"loss": loss}

    def evaluate(self, sum_over):
        return Evaluation({"accuracy": 0.5})


if __name__ == "__main__":
    main(Own, __doc__)
"""
MADE = 'self.networks = {"net": nn.Linear(2, 1).to(device)}'
MISTAKES = {
    "no name": ('name = "own"', "", 'Own has no name: write name = \'own\' in the class'),
    "no presets": (
        'presets = {"fast": OwnConfig(', 'others = {"fast": OwnConfig(',
        'Own has no presets: write presets = {"fast": YourConfig()} in the class'),
    "a preset that is a dict": (
        'OwnConfig(steps=2, evaluate_every=2, wandb="disabled")', '{"steps": 2}',
        "Own.presets['fast'] is a dict: give a cs324dist.Config"),
    "a default that is not allowed": ("Positive = 1e-2", "Positive = -1.0", "learning_rate is -1.0"),
    "no call of super": (
        "super().__init__(config, device)", "pass", "Own has to call super().__init__(config, device) first"),
    "data that is not there": (
        "super().__init__(config, device)", "super().__init__(config, device); open('/no/data')",
        "error: Own cannot be made: /no/data: No such file or directory"),
    "no metrics": (
        'return loss, {"loss": loss}', "return loss",
        "a loss has to return two things, the loss and a dict of metrics: return loss, {}"),
    "a loss for each sample": (
        ".mean()", "[:, 0]", "a loss has to be one number, and has shape (64,): return its mean"),
    "a dict of an evaluation": (
        'Evaluation({"accuracy": 0.5})', '{"accuracy": 0.5}',
        "evaluate has to return an Evaluation, such as Evaluation({'accuracy': 0.5})"),
    "a word for a metric": (
        '{"accuracy": 0.5}', '{"a": "high"}', "the metric a = 'high' is no number: give one"),
    "two numbers for a metric": (
        '{"accuracy": 0.5}', '{"a": torch.ones(2)}', "the metric a = tensor([1., 1.]) is no number: give"),
    "a state that becomes a tensor": (
        '        return loss, {"loss": loss}\n',
        '        self.best = loss.detach()\n        return loss, {}\n\n    best = None\n\n'
        '    def state_dict(self):\n        return {"best": self.best}\n',
        "after step 2, best of the task's state is torch.float32 of shape (), and was no tensor"),
    "a buffer that grows": (
        MADE, f'{MADE}; self.networks["net"].register_buffer("history", torch.zeros(0)); '
        'self.networks["net"].register_forward_hook('
        'lambda net, *_: setattr(net, "history", torch.zeros(1 + len(net.history))))',
        "after step 2, net.history is torch.float32 of shape ("),
}  # fmt: skip


@pytest.fixture
def train(launch, tmp_path):
    (tmp_path / "beside.py").write_text("import torch\nDATA = torch.ones(8, 2)\n")

    def train(old: str = "", new: str = "", *words: object, **how: int):
        assert old in TASK
        (tmp_path / "own_task.py").write_text(TASK.replace(old, new))
        return launch(tmp_path / "own_task.py", "--run-dir", tmp_path / "run", *words, check=False, **how)

    return train


@pytest.mark.parametrize(("old", "new", "said"), MISTAKES.values(), ids=MISTAKES)
def test_it_is_one_line(train, old, new, said):
    done = train(old, new)
    assert "Traceback" not in done.stderr
    assert done.returncode == (1 if said.startswith("after step") else 2), done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert said in line


def test_a_mistake_in_code_ends_with_the_step_and_the_users_line(train, tmp_path):
    done = train(
        "[batch.samples % 8]", "[batch.samples % 8].to(torch.float64 if batch.step else torch.float32)"
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    line = 1 + (tmp_path / "own_task.py").read_text().split("\n").index("    def loss(self, batch):") + 1
    said = (
        f"RuntimeError in {tmp_path}/own_task.py, line {line} (in step 2): mat1 and mat2 must have the same"
    )
    assert done.stderr.splitlines()[-1].startswith(f"error: {said}")
    assert said in (tmp_path / "run" / "status.json").read_text()


def test_a_metric_may_be_a_number(train, tmp_path):
    assert train('{"loss": loss}', '{"loss": loss, "half": 0.5, "item": loss.item()}').returncode == 0
    assert '"train/half": 0.5' in (tmp_path / "run" / "metrics.jsonl").read_text()
    of_kinds = "{'a': True, 'b': torch.tensor(0.5), 'c': torch.ones(1), 'd': 3}"
    assert train('{"accuracy": 0.5}', of_kinds, "--steps", "4").returncode == 0
    assert train('{"accuracy": 0.5}', of_kinds, "--steps", "6").returncode == 0  # they can be read again


@pytest.mark.parametrize("processes", [2, 3])
def test_a_parameter_without_a_gradient_on_several_processes_is_one_line(train, tmp_path, processes):
    unused = (MADE, f'{MADE}; self.networks["net"].w = nn.Parameter(torch.ones(1))', "--batch-size", "12")
    assert train(*unused).returncode == 0
    done = train(*unused, "--steps", "8", processes=processes)
    assert done.returncode == 1
    assert "a loss has to use every parameter of its networks" in done.stderr
    parts = ("--micro-batches", processes, "--run-dir", tmp_path / "parts")
    assert train(*unused, *parts, processes=processes).returncode == 0


def test_on_three_processes_metrics_are_put_together_by_their_names(train, tmp_path):
    swapped = '{"a": 1.0, "b": 100.0} if batch.index != 1 else {"b": 100.0, "a": 1.0}'
    assert train('{"loss": loss}', swapped, "--batch-size", "9", processes=3).returncode == 0
    rows = [row for row in metrics(tmp_path / "run") if "train/a" in row]
    assert {(row["train/a"], row["train/b"]) for row in rows} == {(1.0, 100.0)}
    missing = ("{'a': 1.0} if batch.index != 1 else {}", "--batch-size", "9", "--run-dir", tmp_path / "other")
    done = train('{"loss": loss}', *missing, processes=3)
    assert "give other metrics than those of others" in done.stderr
    assert "SIGABRT" not in done.stderr


def test_an_audit_by_the_files_name_finds_what_lies_beside_it(train, launch, tmp_path):
    train()
    task = ("--task", f"{tmp_path}/own_task.py:Own")
    done = launch("launch/audit.py", tmp_path / "run", *task, "--from-start")
    assert done.stdout == "steps 0 to 2: equal to the last bit\n"


NAMED = """
from cs324dist import Config, Task
class {name}(Task):
    name = "{name}"
    presets = {{"fast": Config()}}
"""


def test_a_file_with_one_task_needs_no_class(tmp_path):
    file = tmp_path / "with_one.py"
    file.write_text(NAMED.format(name="Mine") + "from cs324dist.tasks.lstm.task import LSTMTask\n")
    assert find_task(str(file)).name == find_task(f"{file}:Mine").name == "Mine"


@pytest.mark.parametrize("count", [0, 2])
def test_otherwise_one_line_says_how_many_there_are(tmp_path, count):
    file = tmp_path / f"with_{count}.py"
    file.write_text("".join(NAMED.format(name=f"Task{number}") for number in range(count)))
    assert refusal(find_task, str(file)) == f"{file} has {count} tasks: name one, {file}:CLASS"


def test_a_misspelt_class_names_those_that_are_there(tmp_path):
    file = tmp_path / "misspelt.py"
    file.write_text(NAMED.format(name="Mine"))
    with pytest.raises(UserError, match=r"misspelt.py has no class 'Mien'; its tasks: Mine$"):
        find_task(f"{file}:Mien")
