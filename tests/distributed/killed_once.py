"""Started by a launcher: train the LSTM for 40 steps; rank 1 is killed once, in step 31."""

import os
import signal
import sys
from pathlib import Path

from cs324dist.tasks.lstm import PRESETS, LSTMTask
from cs324dist.training_run import main

if __name__ == "__main__":
    run = Path(sys.argv[1])
    marker = run.with_suffix(".killed")
    honest = LSTMTask.step

    def step(task, step):
        if step == 30 and task.shard.rank == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(task, step)

    LSTMTask.step = step
    options = "--length 10 --steps 40 --checkpoint-every 20 --log-every 1 --wandb disabled"
    sys.argv[1:] = [*options.split(), "--run-dir", str(run)]
    main("lstm", LSTMTask, PRESETS, "")
