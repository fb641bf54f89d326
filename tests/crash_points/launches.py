"""Real launches of two processes or another number, of which the first meets a fault; see `inject.c`."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from starts import HANGS, LIMIT, Action, Command, Operation

REPOSITORY = Path(__file__).parents[2]
FAULTS = {
    "killed": (Action.KILL, errno.EIO),
    "no space from there on": (Action.NO_SPACE_FROM, errno.ENOSPC),
    "fails once": (Action.FAIL_ONCE, errno.EIO),
}


class Launch:
    """A command under torchrun until all its processes have ended; it has what a `Start` has."""

    def __init__(
        self, command: Command, run: Path, processes: int, action: int = 0, at: int = 0, error: int = 0
    ) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        training = ["launch/train.py", command.task, *command.options, "--run-dir", str(run)]
        self.code: int | str = HANGS
        with tempfile.NamedTemporaryFile("r") as report, tempfile.TemporaryFile("w+") as said:
            point = {"CRASH_REPORT": report.name, "CRASH_POINT": f"{at} {int(action)} {error} {run}"}
            process = subprocess.Popen(
                [sys.executable, *launcher, *training],
                cwd=REPOSITORY,
                env={**os.environ, **point},
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                self.code = process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
            said.seek(0)
            self.said = said.read().splitlines()
            self.operations = [Operation.read(line) for line in report]
