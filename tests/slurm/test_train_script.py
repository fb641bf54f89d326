"""slurm/train.sh with stand-ins for Slurm's programs: what it asks for at the end of a start."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "train.sh"
PROGRAMS = {
    "python": 'case $* in *--dry-run) echo "{hello}"; echo "{\\"run_dir\\": \\"$RUN\\"}" ;; '
    f'*) exec {sys.executable} "$@" ;; esac',
    "srun": 'mkdir -p -- "$RUN"; cp "$STATUS" "./$RUN/status.json"; exit 75',
    "scontrol": 'case $* in *requeue*) echo "$*" >>requeues ;; *hostnames*) echo n1 ;; '
    '*) echo "JobState=RUNNING Reason=None Restarts=$SLURM_RESTART_COUNT BatchFlag=1" ;; esac',
}


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run it as a start of a job whose run ends with this status; `requeues` counts what it asked for."""
    (tmp_path / "bin").mkdir()
    for name, body in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def start(state: str, step: int, restart: int = 0, run: str = "run"):
        (tmp_path / "status").write_text(json.dumps({"state": state, "step": step}, indent=2))
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "RUN": run,
            "STATUS": str(tmp_path / "status"),
            "SLURM_JOB_ID": "42",
            "SLURM_RESTART_COUNT": str(restart),
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "n1",
        }
        return subprocess.run(
            [SCRIPT, "lstm", f"--run-dir={run}"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return start


def test_a_stop_is_requeued_while_there_is_progress(start, tmp_path):
    for restart, step in enumerate(range(1, 8)):
        assert start("stopped", step, restart).returncode == 0
    assert len((tmp_path / "requeues").read_text().splitlines()) == 7


def test_a_stop_without_progress_is_requeued_three_times(start, tmp_path):
    done = [start("stopped", 5, restart) for restart in range(5)]
    assert [one.returncode for one in done] == [0, 0, 0, 0, 1], done[-1]
    assert "requeued 3 times after a crash or without progress, and no more" in done[-1].stdout


@pytest.mark.parametrize("state", ["stopped", "finished"])
def test_a_run_folder_that_looks_like_an_option(start, state):
    done = start(state, 5, run="-x")
    assert done.returncode == 0
    assert done.stderr == ""
    assert ("stopped after step 5" in done.stdout) == (state == "stopped")
