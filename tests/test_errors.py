"""Who says why a run of several processes ends, and what happens when nobody listens."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    "message",
    [
        'say("hello")',
        'print("hello", file=sys.stderr, flush=True)',
        '[None for _ in tqdm(range(3), "hello")]',
        'raise UserError("hello")',
    ],
)
@pytest.mark.parametrize("is_full", [False, True], ids=["its reader is gone", "its disk is full"])
def test_whatever_says_something_does_not_fail_for_that(message, is_full):
    code = f"""
import sys
from tqdm import tqdm
from cs324dist.errors import UserError, errors_as_exit_codes, exit_process, say, warn
with errors_as_exit_codes():
    sys.stdin.readline()
    for _ in range(3):
        {message}
    print(f"still here, {{sys.stderr.fileno()}}")
    exit_process(0)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        Path("/dev/full").open("w") as full,
        subprocess.Popen(
            [sys.executable, "-c", code], text=True, stderr=full if is_full else subprocess.PIPE, **pipes
        ) as process,
    ):
        if not is_full:
            process.stderr.close()
        said, _ = process.communicate("now\n")
    refused = "UserError" in message
    assert (process.returncode, said) == ((2, "") if refused else (0, "still here, 2\n"))


def test_a_reader_that_has_enough_ends_it_quietly():
    command = [sys.executable, "launch/gan.py", "--dry-run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "\033[1;33mwarning\033[0m: a\r\n\033[1;31merror\033[0m on rank 1: b\r\n"),
        ({"NO_COLOR": "1"}, "warning: a\r\nerror on rank 1: b\r\n"),
    ],
)
def test_a_terminal_shows_the_first_word_in_colour(variables, expected):
    script = (
        "from cs324dist.errors import RunFailed, end_with, warn\n"
        "RunFailed.same_on_all_ranks = False\n"
        "warn('a'), end_with(RunFailed('b'))"
    )
    terminal, its_end = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", script],
        stderr=its_end,
        env={"PATH": os.environ["PATH"], "RANK": "1", "WORLD_SIZE": "2", **variables},
        timeout=60,
    )
    os.close(its_end)
    assert os.read(terminal, 1000).decode() == expected
