"""Started by a launcher: time the GAN's training step, one thread a process; rank 0 prints JSON."""

import argparse
import dataclasses
import json
import os
import statistics
import time

from accelerate import DistributedDataParallelKwargs

from cs324dist.errors import exit_process
from cs324dist.tasks import process
from cs324dist.tasks.gan import PRESETS, GANTask

WARM_UP = 4

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--bucket-mb", type=int, help="DDP's bucket size, in place of the project's")
    parser.add_argument("--batch-norm", default="synced")
    arguments = parser.parse_args()
    if arguments.bucket_mb:
        process.DistributedDataParallelKwargs = lambda **options: DistributedDataParallelKwargs(
            **{**options, "bucket_cap_mb": arguments.bucket_mb}
        )
    os.environ["CS324DIST_THREADS"] = "1"
    settings = dataclasses.replace(
        PRESETS["course"],
        batch_size=arguments.batch_size,
        dataset="fake",
        discriminator_every=1,
        batch_norm=arguments.batch_norm,
    )
    accelerator = process.start_accelerator(settings.batch_size)
    task = GANTask(settings, accelerator)
    times = []
    for step in range(WARM_UP + arguments.steps):
        accelerator.wait_for_everyone()
        before = time.perf_counter()
        task.step(step)
        times.append(time.perf_counter() - before)
    if accelerator.is_main_process:
        print(json.dumps({"milliseconds": 1000 * statistics.median(times[WARM_UP:])}))
    accelerator.end_training()
    exit_process(0)
