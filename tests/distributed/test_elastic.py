"""torch's elastic launcher: machines come and go, and the run ends in the same bits as on one process."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from chaos import content_of, processes_of
from launched import REPOSITORY, free_port, status, trainer, wait_until

from cs324dist.runs.lease import newest_generation, owner_of

LSTM = (
    *("launch/train.py", "tests/faulty.py:LSTM", "--preset", "smoke", "--micro-batches", "4"),
    *("--steps", "30", "--log-every", "1", "--checkpoint-every", "5", "--wandb", "disabled", "--run-dir"),
)


@contextmanager
def agent(port: int, run: Path, environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """The launcher of one machine, as docs/distributed.md starts it."""
    options = (
        *("--nnodes", "1:3", "--max-restarts", "9", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"localhost:{port}", "--local-addr", "localhost"),
        *("--rdzv-conf", "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=5"),
    )
    command = [sys.executable, "-m", "torch.distributed.run", *options, *LSTM, str(run)]
    with (run.parent / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def processes(run: Path) -> int:
    """How many processes the newest owner has, once it trains."""
    owner = owner_of(run, newest_generation(run / "owners"))
    return owner.environment.processes if owner and owner.environment else 0


@pytest.mark.slow
def test_machines_come_and_go(launch, launch_environment, tmp_path):
    gates = tmp_path / "gates"
    gates.mkdir()
    whole, run = tmp_path / "whole", tmp_path / "run"
    gate = {"FAULT": f"waits: {gates}"}
    environment = {**launch_environment, **gate, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    port = free_port()
    with ExitStack() as agents:
        first = agents.enter_context(agent(port, run, environment))
        try:
            wait_until(lambda: answers(port))  # it keeps the store in which all meet
            lost = agents.enter_context(agent(port, run, environment))
            wait_until(lambda: processes(run) == 2)
            lost.kill()
            (gates / "10").touch()
            wait_until(lambda: processes(run) == 1)
            late = [agents.enter_context(agent(port, run, environment)) for _ in range(2)]
            wait_until(lambda: processes(run) == 3)
            (gates / "20").touch()
            assert [one.wait(120) for one in (first, *late)] == [0, 0, 0]
        except BaseException:
            print((tmp_path / "log").read_text()[-20_000:])
            raise
        finally:
            for process in processes_of(run):
                process.kill()
    assert status(run)["state"] == "finished"
    launch(*LSTM, whole, environment=gate)
    assert trainer(run)["processes"] == 3
    assert content_of(run) == content_of(whole)
