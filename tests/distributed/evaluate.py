"""Started by a launcher: what each task's untrained networks are found to be worth, as JSON."""

import dataclasses
import json
import sys
from pathlib import Path

from cs324dist.distributed.process import start_accelerator
from cs324dist.errors import exit_process
from cs324dist.tasks import find_task
from cs324dist.trainer import Trainer

CASES = {"gan": {"dataset": "fake"}, "lstm": {"length": 12}}

if __name__ == "__main__":
    found, accelerator = {}, start_accelerator()
    for name, changes in CASES.items():
        task_type = find_task(name)
        config = dataclasses.replace(task_type.presets["fast"], batch_size=9, **changes)
        trainer = Trainer(task_type(config, accelerator.device), accelerator)
        with trainer.evaluating():
            found[name] = dict(trainer.task.evaluate(trainer.sum_over()).metrics)
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(found))
    exit_process(0)
