"""`accelerate launch` as a Slurm task: what `train.sh` starts once on each node.

Slurm signals every process of a job, launchers too. This one leaves SIGTERM to the workers and waits for
them, where torch's would kill a worker that takes more than 30 seconds to save. It ends with an exit code
that tells how the workers ended, where torch's is always 1, and without torch's 30 lines of traceback.
"""

import logging
import os
import signal
import sys
import tempfile
from types import FrameType

import psutil

EXIT_REFUSED, EXIT_STOPPED = 2, 75  # as in cs324dist.errors
# srun ends with the largest of its tasks' exit codes: the graver, the larger.
CRASHED, REFUSED = EXIT_STOPPED + 1, EXIT_STOPPED + 2


def leave_to_workers(number: int, frame: FrameType | None) -> None:
    """The handler of SIGTERM."""
    if not psutil.Process().children():  # none is there yet, none must be started
        os._exit(EXIT_STOPPED)  # an exception might be swallowed by the import that it comes up in


signal.signal(signal.SIGTERM, leave_to_workers)  # before the imports that take seconds

# At the end, launchers complain that the first of them has left; workers keep their own warnings.
quiet = "TORCH_CPP_LOG_LEVEL" not in os.environ
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch  # noqa: E402
from accelerate.commands.launch import main  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402

if quiet:
    del os.environ["TORCH_CPP_LOG_LEVEL"]


def launch() -> int:
    """Start this node's workers and wait for them."""
    node = os.environ["SLURMD_NODENAME"]
    given, seen = int(os.environ.get("SLURM_GPUS_ON_NODE", "0")), torch.cuda.device_count()
    if given > seen:
        print(
            f"error: {node} was given {given} GPUs and torch sees {seen}: is it built for them?",
            file=sys.stderr,
        )
        return REFUSED
    for part in ("multiprocessing", "agent.server"):  # what they report, the lines below tell
        logging.getLogger(f"torch.distributed.elastic.{part}.api").setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="torchelastic-") as folder:
            sys.argv[1:1] = ["--machine_rank", os.environ["SLURM_NODEID"], "--log_dir", folder]
            # Accelerate's command line does not have this; torch's launcher takes it from the environment.
            os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
            main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == EXIT_REFUSED:
            return REFUSED
        if failure.exitcode in (EXIT_STOPPED, -signal.SIGTERM):  # the latter before its first step
            return EXIT_STOPPED
        print(f"{node}: rank {rank} ended with exit code {failure.exitcode}", file=sys.stderr)
        return CRASHED
    return 0


if __name__ == "__main__":
    code = launch()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # or Python's shutdown would put back the default
    sys.exit(code)
