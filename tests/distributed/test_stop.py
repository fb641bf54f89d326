"""A signal sets a flag, and what follows from it, in one process; test_signals.py has the real runs.

Lost processes in real runs of two: the main thread of rank 0 waits in C for what never comes. So it does for
NCCL, whose watchdog ends the process after its timeout (torch 2.13, ProcessGroupNCCL.hpp, ErrorHandlingMode).
"""

import json
import os
import signal
from contextlib import suppress

import psutil
import pytest
from chaos import processes_of
from launched import Launched, status, wait_until

from cs324dist.distributed import stop as module
from cs324dist.distributed.stop import StopRequest


def send(stop: StopRequest, number: int) -> None:
    os.kill(os.getpid(), number)
    wait_until(lambda: stop.received)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_a_signal_is_a_request_and_the_handlers_from_before_come_back(number):
    before = signal.getsignal(number)
    with StopRequest(1) as stop:
        stop.listen()
        assert not stop.agreed()
        send(stop, number)
        assert stop.agreed()
    assert signal.getsignal(number) is before


def test_only_a_signal_before_the_last_vote_can_be_why_others_have_ended():
    with StopRequest(1) as stop:
        stop.listen()
        assert not stop.agreed()
        send(stop, signal.SIGTERM)  # as the launcher does, when it has seen another process die
        assert not stop.received_before_the_last_vote
        assert stop.agreed()
        assert stop.received_before_the_last_vote


def test_signals_within_a_second_count_as_one_and_the_third_ends_the_process(monkeypatch):
    moments, codes = [0.0, 0.5, 1.0, 2.0, 2.5, 3.5], []
    monkeypatch.setattr(module.time, "monotonic", iter(moments).__next__)
    monkeypatch.setattr(module.os, "_exit", codes.append)
    stop = StopRequest(1)
    for moment in moments:
        assert codes == []
        stop._note(signal.SIGINT)
        assert stop.received, moment
    assert codes == [128 + signal.SIGINT]


def test_long_work_ends_after_its_first_part_and_that_is_said_once():
    with StopRequest(1) as stop:
        stop.listen()
        assert list(stop.until_stopped("abc")) == ["a", "b", "c"]
        assert not stop.interrupted()
        parts = stop.until_stopped("abc")
        assert next(parts) == "a"
        send(stop, signal.SIGTERM)
        assert list(parts) == []
        assert list(stop.until_stopped("abc")) == ["a"]
        assert list(stop.until_stopped("a")) == ["a"]
        assert stop.interrupted()
        assert not stop.interrupted()


def test_signals_of_another_meaning_are_no_requests(monkeypatch):
    """A user's DataLoader has a handler for SIGCHLD, and then each end of a worker comes by."""
    monkeypatch.setattr(module, "TOGETHER", 0.0)
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        with StopRequest(1) as stop:
            stop.listen()
            for _ in range(module.SIGNALS_TO_END):
                os.kill(os.getpid(), signal.SIGCHLD)
            send(stop, signal.SIGTERM)  # comes by behind the others
            assert stop._signals == 1
    finally:
        signal.signal(signal.SIGCHLD, before)


FAULTY = ("launch/train.py", "tests/faulty.py:LSTM", "--length", "10", "--checkpoint-every", "1")


@pytest.mark.parametrize(
    ("rank_1", "said"),
    [
        ("SIGKILL", "another process of the run has ended: see what it said"),
        ("SIGSTOP", "another process did not answer within 5 s (--peer-timeout): find out what holds it up"),
        ("waits", "rank 1 kept others waiting for 5 s (--peer-timeout): find out what holds it up"),
    ],
)
def test_a_process_ends_with_a_line_although_it_waits_in_c(launch_environment, tmp_path, rank_1, said):
    command = (*FAULTY, "--peer-timeout", "5", "--wandb", "disabled")
    environment = {**launch_environment, "FAULT": f"waits in C: {rank_1}"}
    with Launched(command, tmp_path / "run", environment, "torchrun with two") as launched:
        launched.wait_for_line("error on rank 0")
        last = launched.said.splitlines()[-1]
        for process in processes_of(launched.run):  # for rank 1, the launcher would wait half a minute
            with suppress(psutil.Error):  # it has ended
                if process.environ().get("RANK") == "1":
                    process.kill()
        assert launched.end() == 1
    assert last.startswith(f"error on rank 0: {said}")
    state = status(launched.run)
    assert (state["state"], state["step"]) == ("failed", 2)
    assert f"error on rank 0: {state['why']}" == last
    collectives = json.loads((launched.run / "collectives-rank-0.json").read_bytes())["entries"]
    assert collectives[-1]["profiling_name"].startswith("gloo:")
