"""Started by a test: train the LSTM; the third step is one long call, in which no signal handler runs."""

import hashlib
import sys

from cs324dist.tasks.lstm import PRESETS, LSTMTask
from cs324dist.training_run import main

ROUNDS = 50_000_000  # about a minute

if __name__ == "__main__":
    honest = LSTMTask.step

    def step(task, step):
        if step == 2:
            print("in the long step", file=sys.stderr, flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", ROUNDS)
        return honest(task, step)

    LSTMTask.step = step
    main("lstm", LSTMTask, PRESETS, "")
