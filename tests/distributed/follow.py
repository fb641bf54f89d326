"""Started by a launcher: take a task's first steps in float64, and write down where its weights are."""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from faults import FAULTS
from safetensors.torch import save_file

from cs324dist.distributed.process import on_main_process, start_accelerator
from cs324dist.errors import exit_process
from cs324dist.runs.run_dir import RunDir
from cs324dist.tasks import classifier, gan, lstm
from cs324dist.trainer import resume, save

TASKS = {
    "gan": (gan.GANTask, gan.PRESETS),
    "lstm": (lstm.LSTMTask, lstm.PRESETS),
    "classifier": (classifier.ClassifierTask, classifier.PRESETS),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("preset")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--fault", choices=FAULTS)
    parser.add_argument("--backend", help="of the process group, where it is not the device's own")
    parser.add_argument("--folder", type=Path, help="run folder to go on from, and to leave a checkpoint in")
    arguments = parser.parse_args()

    if arguments.fault:
        FAULTS[arguments.fault]()
    if arguments.backend:
        torch.distributed.init_process_group(arguments.backend)
    build, presets = TASKS[arguments.task]
    settings = dataclasses.replace(presets[arguments.preset], **arguments.settings)
    accelerator = start_accelerator(settings.batch_size)
    task = build(settings, accelerator, torch.float64)
    start, run = 0, RunDir(arguments.folder or Path())
    if arguments.folder:
        on_main_process(accelerator, run.claim)
        start = resume(task, run, accelerator).step
    for step in range(start, arguments.steps):
        task.step(step)
    if arguments.folder:
        save(task, run, accelerator, arguments.steps)
    if arguments.evaluate:
        metrics = task.evaluate().metrics
        if accelerator.is_main_process:
            arguments.out.with_suffix(".json").write_text(json.dumps(metrics))
    if accelerator.is_main_process:
        tensors = {
            f"{model}/{name}": tensor
            for model, module in task.models.items()
            for name, tensor in module.state_dict().items()
        }
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, arguments.out)
    accelerator.end_training()
    exit_process(0)
