"""A GPU takes the path of a CPU, as two processes on it do; a step waits for nothing. `pytest -m gpu`."""

from dataclasses import replace

import pytest
import torch
from launched import newest_checkpoint
from paths import assert_same_path, command, weights_in

from cs324dist.data.streams import MicroBatch, ShuffledEpochs, Stream
from cs324dist.distributed.process import start_accelerator
from cs324dist.tasks import find_task
from cs324dist.trainer import Trainer

pytestmark = pytest.mark.gpu
CASES = {
    "lstm course": {"batch_size": 16, "length": 12, "steps": 20},
    "gan course": {"batch_size": 8, "dataset": "fake", "steps": 20},
}


def test_a_gpu_draws_the_numbers_of_a_cpu():
    indices = torch.tensor([0, 1, 12_345_678_901])
    stream, shuffle = Stream(3, "tests"), ShuffledEpochs(3, "tests", 1000)
    assert stream.integers(indices.cuda(), 7, 10).tolist() == stream.integers(indices, 7, 10).tolist()
    assert stream.signs(indices.cuda(), 100).tolist() == stream.signs(indices, 100).tolist()
    on_cpu, on_gpu = (shuffle.items(MicroBatch(7, 300, device=torch.device(d))) for d in ("cpu", "cuda"))
    assert on_gpu.tolist() == on_cpu.tolist()
    torch.testing.assert_close(stream.normals(indices.cuda(), 7).cpu(), stream.normals(indices, 7))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_gpu_takes_the_path_of_a_cpu(launch, tmp_path, case, processes):
    def weights(name: str, processes: int, environment: dict[str, str]):
        run = tmp_path / name
        launch(*command(case, CASES[case], run), processes=processes, environment=environment)
        return weights_in(newest_checkpoint(run))

    expected = weights("cpu", 1, {"CUDA_VISIBLE_DEVICES": ""})
    assert_same_path(weights("gpu", processes, {"BACKEND": "gloo"}), expected, tolerance=1e-6)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(("name", "preset"), [("lstm", "smoke"), ("gan", "smoke"), ("gan", "course")])
def test_a_step_waits_for_nothing(name, preset):
    """tests/gpu/ looks for waits without a GPU."""
    changes = {"curriculum": 1.0} if name == "lstm" else {"dataset": "fake"}
    task_type, accelerator = find_task(name), start_accelerator()
    config = replace(task_type.presets[preset], **changes)
    trainer = Trainer(task_type(config, accelerator.device), accelerator)
    for step in range(3):
        trainer.step(step, is_logged=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(3, is_logged=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
