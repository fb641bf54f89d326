"""Who says why a run of several processes ends."""

import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
REFUSES = """
import os, time
from cs324dist.errors import UserError, errors_as_exit_codes
with errors_as_exit_codes():
    while os.environ["RANK"] == "0" and not os.path.exists("the other rank has refused"):
        time.sleep(0.01)
    raise UserError("no")
"""


def test_the_first_rank_says_it_even_if_another_refuses_earlier(tmp_path):
    """A launcher ends all ranks when one has left: the second must not leave before the first has spoken."""

    def start(rank: int) -> "subprocess.Popen[str]":
        environment = {"RANK": str(rank), "WORLD_SIZE": "2"}
        command = [sys.executable, "-c", REFUSES]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)

    first, second = start(0), start(1)
    try:
        second.wait(3)
    except subprocess.TimeoutExpired:
        (tmp_path / "the other rank has refused").touch()
    assert first.communicate(timeout=60)[1] == "error: no\n"
    assert first.returncode == 2
    second.send_signal(signal.SIGTERM)  # as the launcher does
    assert second.communicate(timeout=60)[1] == ""
    assert second.returncode == -signal.SIGTERM


def test_a_reader_that_has_enough_ends_it_quietly():
    command = [sys.executable, "launch/gan.py", "--dry-run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_one_process_alone_has_no_rank_to_name():
    code = """
from cs324dist.errors import errors_as_exit_codes
from cs324dist.distributed.failures import OneProcessFailed
with errors_as_exit_codes():
    raise OneProcessFailed("no")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: no\n")
