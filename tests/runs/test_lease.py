"""One owner a run: a live one is waited for and named, a dead one is known at once, the later one wins."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from cs324dist.config import Config, as_json
from cs324dist.errors import UserError
from cs324dist.runs import files, lease
from cs324dist.runs.environment import environment
from cs324dist.runs.lease import Lease, Superseded, newest_generation, owner_of
from cs324dist.runs.run_dir import RunDir, RunRecord, Status

FOREVER = 3600  # seconds: whoever waits for it, waits longer than a test may take
OWNER = """
import sys
from pathlib import Path
from cs324dist.errors import UserError
from cs324dist.runs import files, lease
lease.PATIENCE = float(sys.argv[2])
try:
    mine = lease.Lease(Path(sys.argv[1]))
except UserError as refusal:
    print("refused:", refusal, flush=True)
    sys.exit(2)
print("owns", mine.generation, flush=True)
sys.stdin.readline()
mine.release()
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path


@pytest.fixture
def start(run) -> Iterator[Start]:
    """Start a real process that claims the run, and ends when it is told to."""
    started = []

    def owner(patience: float = 0, **environment: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(run), str(patience)],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield owner
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def other(start) -> "subprocess.Popen[str]":
    """A live process that owns the run."""
    process = start()
    assert process.stdout.readline() == "owns 1\n"
    return process


def two_starts_of_a_job(run: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunDir, RunDir, RunRecord]:
    """The second may take over from the first, as soon as it is a restart."""
    waits(monkeypatch)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    return RunDir(run), RunDir(run), RunRecord("lstm", "launch/lstm.py", as_json(Config()), {})


def waits(monkeypatch, **seconds: float) -> None:
    """How long a new owner waits; for what is not named, longer than a test may take."""
    for name in ("PATIENCE", "SILENCE"):
        monkeypatch.setattr(lease, name, seconds.get(name, FOREVER))
    monkeypatch.setattr(lease, "HEARTBEAT", 0.05)


def left_by(run: Path, **about: object) -> Path:
    """What the first owner has left, changed."""
    Lease(run).release()
    path = run / "owners" / "1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **about}))
    return path


def on_another_machine(run: Path, **about: object) -> Path:
    return left_by(run, **{"machine": "another", "host": "node17", "pid": 4711, "ended": False, **about})


def test_a_live_process_is_waited_for_and_then_named(run, other, monkeypatch, capsys):
    waits(monkeypatch, PATIENCE=0.3)
    with pytest.raises(UserError) as caught:
        Lease(run)
    (line,) = caught.value.lines
    assert line.startswith(f"{run} is in use by process {other.pid} on ")
    assert "give another folder" in line
    assert f"in use by process {other.pid}" in capsys.readouterr().err
    assert newest_generation(run / "owners") == 1


def test_a_process_on_its_way_out_is_waited_for(start, other):
    second = start(patience=FOREVER)
    assert f"in use by process {other.pid}" in second.stderr.readline()
    other.communicate("end\n")
    assert second.stdout.readline() == "owns 2\n"


def test_a_killed_owner_is_recognised_at_once(run, other, monkeypatch, capsys):
    waits(monkeypatch)
    other.kill()
    other.wait()
    assert Lease(run).generation == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", [".1-7566a3b9b04034ae.tmp", "..1-7566a3b9b04034ae.tmp.0-0a1b2c3d.tmp"])
def test_the_draft_of_one_that_was_killed_before_it_had_claimed_the_run_is_cleared(run, name):
    (run / "owners").mkdir()
    (run / "owners" / name).write_text("{")
    Lease(run).release()
    assert not list((run / "owners").glob(".*"))


def test_a_stopped_owner_is_alive(run, other, monkeypatch):
    waits(monkeypatch, PATIENCE=0.3)
    other.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="in use"):
        Lease(run)


def test_a_silent_owner_on_another_machine_is_watched_and_then_taken_over(run, monkeypatch, capsys):
    waits(monkeypatch, SILENCE=0.3)
    on_another_machine(run)
    assert Lease(run).generation == 2
    assert f"{run} was left by process 4711 on node17" in capsys.readouterr().err


def test_an_owner_on_another_machine_that_gives_signs_of_life_is_refused(run, monkeypatch):
    waits(monkeypatch)
    path = on_another_machine(run)
    done = threading.Event()

    def live() -> None:
        while not done.wait(0.02):
            os.utime(path)

    with ThreadPoolExecutor() as pool:
        pool.submit(live)
        try:
            with pytest.raises(UserError, match="in use by process 4711 on node17"):
                Lease(run)
        finally:
            done.set()
    assert newest_generation(run / "owners") == 1


def test_an_owner_on_another_machine_that_has_ended_is_not_watched(run, monkeypatch):
    waits(monkeypatch)
    Lease(run).release()
    ended = json.loads((run / "owners" / "1.json").read_text())["ended"]
    on_another_machine(run, ended=ended)
    assert Lease(run).generation == 3


def test_what_the_run_said_before_its_owner_came_does_not_end_that(run, monkeypatch, capsys):
    """Until an owner has opened the run, its status is that of the one before."""
    waits(monkeypatch, SILENCE=0.3)
    RunDir(run).write_status("stopped", 7)
    on_another_machine(run)
    Lease(run)
    assert f"{run} was left by process 4711 on node17" in capsys.readouterr().err


def test_an_owner_gives_signs_of_life_until_it_releases(run, monkeypatch):
    waits(monkeypatch)
    others = set(threading.enumerate())
    mine = Lease(run)
    path = run / "owners" / "1.json"
    seen = path.stat().st_mtime_ns
    while path.stat().st_mtime_ns == seen:  # or the test's time limit strikes
        pass
    mine.release()
    for thread in set(threading.enumerate()) - others:
        thread.join()
    os.utime(path, ns=(1, 1))
    assert not threading.Event().wait(5 * lease.HEARTBEAT)
    assert path.stat().st_mtime_ns == 1


class TestSlurm:
    """A job that was put back into the queue: Slurm has ended its earlier start, or cut it off."""

    def test_the_next_start_of_the_job_takes_over_though_the_old_one_lives(self, run, start, monkeypatch):
        old = start(SLURM_JOB_ID="42", SLURM_RESTART_COUNT="1")
        assert old.stdout.readline() == "owns 1\n"
        waits(monkeypatch)
        monkeypatch.setenv("SLURM_JOB_ID", "42")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        assert Lease(run).generation == 2
        assert old.poll() is None

    @pytest.mark.parametrize(("job", "restarts"), [("42", "1"), ("42", "0"), ("43", "2"), (None, "2")])
    def test_any_other_start_is_refused(self, run, start, monkeypatch, job, restarts):
        old = start(SLURM_JOB_ID="42", SLURM_RESTART_COUNT="1")
        assert old.stdout.readline() == "owns 1\n"
        waits(monkeypatch, PATIENCE=0.1)
        if job:
            monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        with pytest.raises(UserError, match="Slurm job 42"):
            Lease(run)


class TestTheSameMoment:
    def test_of_many_threads_one_wins(self, run, monkeypatch):
        waits(monkeypatch, PATIENCE=0)
        claimants, rounds = 6, 25
        barrier = threading.Barrier(claimants)

        def generations(_: int) -> list[int]:
            won = []
            for _ in range(rounds):
                barrier.wait()
                try:
                    owner = Lease(run)
                except UserError:
                    owner = None
                barrier.wait()
                if owner is not None:
                    won.append(owner.generation)
                    owner.release()
            return won

        with ThreadPoolExecutor(claimants) as pool:
            won = [generation for each in pool.map(generations, range(claimants)) for generation in each]
        assert sorted(won) == list(range(1, rounds + 1))

    def test_where_locks_do_not_reach_the_other_machine_one_wins(self, tmp_path, monkeypatch):
        monkeypatch.setattr(lease, "_try_to_lock", lambda descriptor: True)
        newest = lease.newest_generation
        claimants = 4
        barrier = threading.Barrier(claimants)

        def seen_by_all_at_once(owners: Path) -> int:
            found = newest(owners)
            barrier.wait()
            return found

        monkeypatch.setattr(lease, "newest_generation", seen_by_all_at_once)

        def wins(_: int) -> bool:
            try:
                Lease(tmp_path)
            except UserError:
                return False
            return True

        with ThreadPoolExecutor(claimants) as pool:
            assert sum(pool.map(wins, range(claimants))) == 1

    def test_of_four_processes_one_wins(self, run, start):
        processes = [start() for _ in range(4)]
        said = sorted(process.stdout.readline() for process in processes)
        assert [line.split()[0] for line in said] == ["owns", "refused:", "refused:", "refused:"]
        assert newest_generation(run / "owners") == 1


class TestTakenOver:
    def test_the_earlier_owner_learns_who_has_the_run(self, run, monkeypatch):
        waits(monkeypatch)
        monkeypatch.setenv("SLURM_JOB_ID", "42")
        mine = Lease(run)
        mine.check_owned()
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        theirs = Lease(run)
        theirs.check_owned()
        with pytest.raises(Superseded) as caught:
            mine.check_owned()
        (line,) = caught.value.lines
        assert line.startswith(f"{run} was taken over by process {os.getpid()} on ")

    def test_it_writes_no_status_and_no_metrics_any_more(self, run, monkeypatch):
        old, new, record = two_starts_of_a_job(run, monkeypatch)
        with old.claimed(lambda: None, lambda work: work()):
            old.start(record, environment(), 0, 0)
            old.append_metrics(1, {"loss": 1.0})
            monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
            with new.claimed(lambda: None, lambda work: work()):
                new.start(record, environment(), 1, 1)
                new.append_metrics(2, {"loss": 2.0})
                new.write_status("running", 2)
                for write in (
                    lambda: old.append_metrics(2, {"loss": 3.0}),
                    lambda: old.write_status("failed", 1),
                    lambda: old.start(record, environment(), 0, 0),
                ):
                    with pytest.raises(Superseded):
                        write()
                assert [row["loss"] for row in new.read_metrics()] == [1.0, 2.0]
                assert new.read_status() == Status("running", 2)

    @pytest.mark.parametrize("moment", ["with_name", "sync", "replace"])
    @pytest.mark.parametrize("name", ["config.json", "status.json", "metrics.jsonl"])
    def test_one_that_was_frozen_before_its_temporary_file_or_its_check_or_its_rename_replaces_nothing(
        self, run, monkeypatch, name, moment
    ):
        """It sleeps while its successor takes over, writes and ends; whatever it meant to write is late."""
        waits(monkeypatch)
        monkeypatch.setenv("SLURM_JOB_ID", "42")
        old, new = RunDir(run), RunDir(run)
        record = RunRecord("lstm", "launch/lstm.py", as_json(Config()), {})
        owner = files if moment == "sync" else Path
        honest = getattr(owner, moment)
        seen = []

        def successor_takes_over() -> None:
            monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
            with new.claimed(lambda: None, lambda work: work()):
                new.start(record, environment(), 0, 0)
                for step in range(1, 9):
                    new.append_metrics(step, {"loss": 2.0})
                new.write_status("finished", 8)
            seen.append({path: path.read_bytes() for path in run.rglob("*.json*")})

        def sleeps(path: Path, *arguments: Any) -> Any:
            temporary = arguments[0] if moment == "with_name" else path.name
            if not seen and temporary.startswith(f".{name}."):
                seen.append({})
                successor_takes_over()
            return honest(path, *arguments)

        monkeypatch.setattr(owner, moment, sleeps)
        with old.claimed(lambda: None, lambda work: work()), suppress(UserError):
            old.start(record, environment(), 0, 0)
            old.append_metrics(1, {"loss": 3.0})
        assert len(seen) == 2
        assert {path: path.read_bytes() for path in run.rglob("*.json*")} == seen[1]
        assert [row["loss"] for row in new.read_metrics()] == [2.0] * 8
        assert list(run.rglob(".*.tmp")) == []

    def test_one_that_wakes_up_while_its_successor_writes_cannot_rename_its_file(self, run, monkeypatch):
        waits(monkeypatch)
        monkeypatch.setenv("SLURM_JOB_ID", "42")
        old, new, honest, renamed = RunDir(run), RunDir(run), Path.replace, []

        def sleeps(path: Path, target: Path) -> None:
            if target.name == "status.json":
                renamed.append(path)
                if len(renamed) == 1:
                    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
                    with new.claimed(lambda: None, lambda work: work()):
                        new.write_status("running", 8)
                else:
                    with pytest.raises(FileNotFoundError):
                        honest(renamed[0], target)
            honest(path, target)

        with old.claimed(lambda: None, lambda work: work()):
            monkeypatch.setattr(Path, "replace", sleeps)
            old.write_status("failed", 1)
        assert len(renamed) == 2
        assert new.read_status() == Status("running", 8)

    def test_one_that_was_frozen_in_its_claim_takes_nothing_away(self, run, monkeypatch):
        """It wakes up where it clears what those before it left; its successor is writing."""
        waits(monkeypatch)
        for folder in ("samples", "checkpoints"):
            (run / folder).mkdir()
        names = [".status.json.{}-01234567.tmp", "samples/.000000001.png.{}-01234567.tmp",
                 "checkpoints/.000000001-{}.tmp"]  # fmt: skip
        for name in names:
            for number in (1, 2, 3):
                (run / name.format(number)).touch()
        left_by(run)
        with RunDir(run).claimed(lambda: None, lambda work: work()):
            left = {str(path.relative_to(run)) for path in run.rglob(".*.tmp")}
        assert left == {name.format(3) for name in names} | {names[0].format(2), names[1].format(2)}

    def test_a_line_of_metrics_never_goes_to_the_file_of_the_successor(self, run, monkeypatch):
        old, new, record = two_starts_of_a_job(run, monkeypatch)
        with old.claimed(lambda: None, lambda work: work()):
            old.start(record, environment(), 0, 0)
            monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
            with new.claimed(lambda: None, lambda work: work()):
                new.start(record, environment(), 0, 0)
                new.append_metrics(1, {"loss": 2.0})
                old.check_owned = lambda: None  # it has checked, and slept since
                old.append_metrics(1, {"loss": 3.0})
        assert [row["loss"] for row in new.read_metrics()] == [2.0]


class TestWhereThereAreNoLocks:
    """Some network file systems know no flock: signs of life decide."""

    @pytest.fixture(autouse=True, params=[errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
    def no_locks(self, request, monkeypatch) -> None:
        def flock(*_: object) -> None:
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr(lease.fcntl, "flock", flock)

    def test_a_silent_owner_is_watched_and_then_taken_over_on_its_own_machine_too(
        self, run, monkeypatch, capsys
    ):
        waits(monkeypatch, SILENCE=0.3)
        path = left_by(run, ended=False)
        lease._lock_of(path, owner_of(run, 1).nonce).touch()
        assert Lease(run).generation == 2
        assert f"{run} was left by process {os.getpid()}" in capsys.readouterr().err

    def test_a_live_one_is_refused_to(self, run, monkeypatch):
        waits(monkeypatch)
        mine = Lease(run)
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()}"):
            Lease(run)
        mine.release()

    def test_one_that_has_ended_is_not_watched(self, run, monkeypatch, capsys):
        waits(monkeypatch)
        Lease(run).release()
        assert Lease(run).generation == 2
        assert capsys.readouterr().err == ""


class TestLeftovers:
    def test_those_of_earlier_owners_go_and_those_of_later_ones_stay(self, run):
        """A later one may have come while this one slept."""
        left_by(run)
        names = ["{}-0123456789abcdef.lock", ".{}-0123456789abcdef.tmp", ".{}.json.01234567.tmp"]
        for name in names:
            for number in (1, 2, 3, 12):  # 2: of a process that was killed in its claim
                (run / "owners" / name.format(number)).touch()
        mine = Lease(run)
        left = {path.name for path in (run / "owners").iterdir()}
        assert left == {name.format(number) for name in names for number in (3, 12)} | {
            "1.json", "2.json", f"2-{owner_of(run, 2).nonce}.lock"
        }  # fmt: skip
        mine.release()

    def test_one_whose_lock_went_with_a_start_that_withdrew_is_known_to_be_dead(
        self, run, monkeypatch, capsys
    ):
        waits(monkeypatch)
        path = left_by(run, ended=False)
        lease._lock_of(path, owner_of(run, 1).nonce).touch()
        Lease(run).withdraw()
        assert Lease(run).generation == 2
        assert capsys.readouterr().err == ""

    def test_one_that_could_not_write_that_it_ended_is_known_to_be_dead(self, run, monkeypatch, capsys):
        waits(monkeypatch)
        mine = Lease(run)
        with monkeypatch.context() as patch:
            patch.setattr(lease, "write_record", mock.Mock(side_effect=OSError(errno.ENOSPC, "full")))
            mine.release()
        assert not owner_of(run, 1).ended
        assert Lease(run).generation == 2
        assert capsys.readouterr().err == ""

    def test_the_lock_of_one_that_failed_to_claim_holds_nobody_up(self, run, monkeypatch, capsys):
        """It was frozen in its claim, and another one got the number."""
        waits(monkeypatch)
        path = left_by(run, ended=False)
        lease._lock_of(path, owner_of(run, 1).nonce).touch()  # free: it was killed
        with (run / "owners" / "1-0123456789abcdef.lock").open("w") as frozen:
            lease._try_to_lock(frozen.fileno())
            assert Lease(run).generation == 2
        assert capsys.readouterr().err == ""


class TestReplaced:
    def test_the_owner_of_a_folder_that_is_gone_does_not_make_the_new_one_its_own(self, run, monkeypatch):
        waits(monkeypatch)
        mine = Lease(run)
        shutil.rmtree(run / "owners")
        theirs = Lease(run)
        with pytest.raises(Superseded, match="was moved or replaced"):
            mine.note(from_step=0)
        mine.release()
        theirs.check_owned()
        assert not owner_of(run, 1).ended
        theirs.release()


class TestWithdrawal:
    @pytest.mark.parametrize("after", [1, 2])
    def test_one_that_was_frozen_in_it_deletes_nothing_of_another(self, run, monkeypatch, after):
        waits(monkeypatch, PATIENCE=0)
        unlink, unlinked, others = Path.unlink, [], []

        def sleeps(path: Path, missing_ok: bool = False) -> None:
            unlink(path, missing_ok)
            unlinked.append(path.suffix)
            if path.suffix != ".tmp" and len(unlinked) - unlinked.count(".tmp") == after:
                others.append(Lease(run))

        mine = Lease(run)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", sleeps)
            mine.withdraw()
        (other,) = others
        other.check_owned()
        with pytest.raises(UserError, match="is in use by"):
            Lease(run)
        other.release()

    def test_the_only_owner_leaves_no_trace(self, run):
        Lease(run).withdraw()
        assert list(run.iterdir()) == []

    def test_a_later_one_leaves_the_earlier_ones(self, run):
        Lease(run).release()
        Lease(run).withdraw()
        assert newest_generation(run / "owners") == 1

    def test_what_another_process_has_begun_to_write_stays(self, run):
        mine = Lease(run)
        (run / "owners" / "2.json").touch()
        mine.withdraw()
        assert [path.name for path in (run / "owners").iterdir()] == ["2.json"]

    @pytest.mark.parametrize("what_is_left", ["the owners before", "an empty folder", "nothing"])
    def test_it_may_happen_while_it_is_watched_from_another_machine(
        self, tmp_path, monkeypatch, what_is_left
    ):
        waits(monkeypatch)
        run = tmp_path / "run"
        run.mkdir()
        watched = on_another_machine(run)
        if what_is_left == "the owners before":
            watched = Path(shutil.copy(watched, run / "owners" / "2.json"))
        naps = []

        def withdraws(seconds: float) -> None:
            naps.append(seconds)
            if len(naps) == 3:
                watched.unlink()
                watched.with_suffix(".lock").unlink(missing_ok=True)
                if what_is_left != "the owners before":
                    (run / "owners").rmdir()
                if what_is_left == "nothing":
                    run.rmdir()

        monkeypatch.setattr(lease.time, "sleep", withdraws)
        mine = Lease(run)
        mine.check_owned()
        assert len(naps) == 3
        assert newest_generation(run / "owners") == mine.generation
        mine.release()


class TestAClaimThatIsStillEmpty:
    """Where a file system has no hard links, the file of a new owner is empty for a moment."""

    def test_its_process_is_not_named_and_refused_to(self, run, other, monkeypatch, capsys):
        waits(monkeypatch, PATIENCE=0.1)
        (run / "owners" / "1.json").write_text("")
        with pytest.raises(UserError) as caught:
            Lease(run)
        assert caught.value.lines == (
            f"{run} is in use by another process: wait for it, stop it, or give another folder",
        )
        assert capsys.readouterr().err == f"{run} is in use by another process; waiting 0.1 s for its end\n"

    def test_a_silent_one_is_watched_and_then_taken_over(self, run, monkeypatch, capsys):
        waits(monkeypatch, SILENCE=0.1)
        left_by(run).write_text("")
        assert Lease(run).generation == 2
        assert capsys.readouterr().err == f"{run} was left by another process; watching it for 0.1 s\n"

    def test_one_that_is_then_written_is_refused_to(self, run, monkeypatch):
        waits(monkeypatch)
        path = left_by(run)
        owner = path.read_text()
        path.write_text("")
        monkeypatch.setattr(lease.time, "sleep", lambda seconds: path.write_text(owner))
        with pytest.raises(UserError, match="in use by another process"):
            Lease(run)

    def test_the_earlier_owner_learns_that_there_is_another(self, run, monkeypatch):
        mine = Lease(run)
        (run / "owners" / "2.json").touch()
        with pytest.raises(
            Superseded, match=r"was taken over by another process: this process writes nothing"
        ):
            mine.check_owned()

    def test_without_hard_links_a_claim_is_made_all_the_same(self, run, monkeypatch):
        def no_links(*_: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", no_links)
        mine = Lease(run)
        mine.check_owned()
        owner = owner_of(run, 1)
        assert (owner.pid, owner.ended) == (os.getpid(), False)
        mine.release()
        assert owner_of(run, 1).ended
        assert [path.name for path in (run / "owners").glob(".*")] == []


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"pid": "\\u001b[31m\\n"}', '{"machine": [1], "slurm_restarts": {}}'],
)
def test_what_an_earlier_owner_left_may_be_damaged(run, monkeypatch, capsys, content):
    waits(monkeypatch, SILENCE=0.1)
    left_by(run).write_text(content)
    assert Lease(run).generation == 2
    assert all(line.isprintable() for line in capsys.readouterr().err.splitlines())
