"""Updates that are captured and replayed give the bits of those that are not; here as operations on a CPU."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn

from cs324dist import Config, MicroBatch, ShuffledEpochs, Task, UserError, loader, seeded
from cs324dist.runs.checkpoints import TrainerState, tensors_by_file, write_checkpoint
from cs324dist.tasks import find_task
from cs324dist.trainer import Trainer

STEPS = 60
GRAPHED = Config(batch_size=16, cuda_graph=True)
FAKE = {"dataset": "fake", "batch_size": 16}
CASES = {
    "lstm": ("lstm", "fast", {"length": 12, "batch_size": 64, "schedule": "linear"}),
    "gan": ("gan", "fast", {**FAKE, "warmup_steps": 9}),
    "gan course": ("gan", "course", {**FAKE, "max_grad_norm": 0.5}),
    "classifier": ("classifier", "fast", {"dataset": "fake", "batch_size": 64}),
}


def trainer_of(case, **changes) -> Trainer:
    name, preset, more = CASES[case]
    task_type = find_task(name)
    return trainer_for(task_type, replace(task_type.presets[preset], steps=STEPS, **more, **changes))


def trainer_for(task_type, config=GRAPHED, *, scaled=False) -> Trainer:
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu") if scaled else None
    return Trainer(task_type(config, torch.device("cpu")), accelerator)


class Rows(Task[Config]):
    """An epoch has 20 samples, a step 16; half of what is hidden is dropped."""

    name = "rows"

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        self.order = ShuffledEpochs(0, "rows", 20)
        with seeded(0, "weights"):
            self.net = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.networks = {"net": self.net}
        self.optimizers = {"net": torch.optim.SGD(self.net.parameters(), 1e-2, fused=True)}

    def graph_key(self):
        return ()

    def loss(self, batch: MicroBatch):
        loss = (self.net(self.order.items(batch)[:, None] / 20) - 1).square().mean()
        return loss, {"loss": loss}


def take(trainer, steps) -> list:
    rows = []
    for step in steps:
        trainer.step(step, is_logged=step % 5 == 0)
        rows.append(trainer.read_metrics())
    return rows


def tensors(trainer) -> dict[str, torch.Tensor]:
    files = tensors_by_file(trainer.task)
    return {f"{f}/{name}": t.clone() for f, some in files.items() for name, t in dict(some).items()}


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize(
    "case", ["lstm", *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != "lstm")]
)
def test_the_bits_are_those_without(case, tmp_path):
    plain, graphed = trainer_of(case), trainer_of(case, cuda_graph=True)
    middle = STEPS // 2
    assert take(graphed, range(middle)) == take(plain, range(middle))
    write_checkpoint(tmp_path / "1", graphed.task, TrainerState(middle))
    assert take(graphed, range(middle, STEPS)) == take(plain, range(middle, STEPS))
    assert_same(tensors(graphed), tensors(plain))
    assert graphed._graphs._captured
    graphed.restore(tmp_path / "1")  # and once more
    take(graphed, range(middle, STEPS))
    assert_same(tensors(graphed), tensors(plain))


def test_epochs_and_dropout_are_those_without():
    plain, graphed = (trainer_for(Rows, replace(GRAPHED, cuda_graph=on)) for on in (False, True))
    assert take(graphed, range(STEPS)) == take(plain, range(STEPS))
    assert_same(tensors(graphed), tensors(plain))


class Reads(Rows):
    def loss(self, batch: MicroBatch):
        return super().loss(batch)[0] * float(self.net[0].bias.sum() > 9) + 1, {}


class Loads(Rows):
    def loss(self, batch: MicroBatch):
        return self.net(loader(torch.ones(20, 1), 0, "ones").batch(batch)).mean(), {}


class Silent(Rows):
    graph_key = Task.graph_key


@pytest.mark.parametrize(("task", "changes", "said"), [
    (Silent, {}, "--cuda-graph does not work with the task rows, which has no graph_key"),
    (Rows, {"micro_batches": 2}, "--cuda-graph does not work with --micro-batches"),
    (Rows, {"batch_size": 21}, "--cuda-graph needs --batch-size 20 at most"),
    (Reads, {}, "this task cannot be captured: it reads a value from the device: leave --cuda-graph out"),
    (Loads, {}, "a graph cannot load data: leave --cuda-graph out"),
])  # fmt: skip
def test_what_cannot_be_captured_is_refused_in_one_line(task, changes, said):
    with pytest.raises(UserError) as refused:
        take(trainer_for(task, replace(GRAPHED, **changes)), range(9))
    (line,) = refused.value.lines
    assert line.startswith(said)


def test_fp16_compiled_models_and_more_processes_are_refused(monkeypatch):
    with pytest.raises(UserError, match="with --mixed_precision fp16"):
        trainer_for(Rows, scaled=True)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(UserError, match="with more than one process"):
        trainer_for(Rows)
    monkeypatch.setattr(Accelerator, "num_processes", 1)
    monkeypatch.setattr(Accelerator().state.dynamo_plugin, "backend", DynamoBackend.EAGER)
    with pytest.raises(UserError, match=r"with torch\.compile"):
        trainer_for(Rows)
