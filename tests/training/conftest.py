"""Processes that tests of this folder start, and end whatever happens."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start_python(launch_environment) -> Iterator[Start]:
    """Start Python with these arguments in the repository; what is left of it is ended with the test."""
    started = []

    def start(*command: object, **options: object) -> "subprocess.Popen[str]":
        started.append(
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=REPOSITORY,
                stderr=subprocess.PIPE,
                text=True,
                **{"env": launch_environment, **options},
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
