"""One owner a run: a live one is waited for and named, a dead one is known at once, the later one wins."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launched import refusal

from cs324dist.errors import UserError
from cs324dist.runs import lease
from cs324dist.runs.lease import Lease, Superseded, newest_generation, owner_of
from cs324dist.runs.run_dir import RunDir

FOREVER = 3600  # seconds: whoever waits for it, waits longer than a test may take
OWNER = """
import sys
from pathlib import Path
from cs324dist.runs.lease import Lease
mine = Lease(Path(sys.argv[1]))
print("owns", mine.generation, flush=True)
sys.stdin.readline()
mine.release()
"""


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path


@pytest.fixture
def other(run) -> Iterator["subprocess.Popen[str]"]:
    """A live process that owns the run."""
    command, pipe = [sys.executable, "-c", OWNER, str(run)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "owns 1\n"
        yield process
        process.kill()


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
    other.send_signal(signal.SIGSTOP)  # stopped, it is alive
    line = refusal(Lease, run)
    assert line.startswith(f"{run} is in use by process {other.pid} on ")
    assert "give another folder" in line
    assert f"in use by process {other.pid}" in capsys.readouterr().err
    assert newest_generation(run / "owners") == 1


def test_a_process_on_its_way_out_is_waited_for(run, other, monkeypatch):
    waits(monkeypatch)
    monkeypatch.setattr(lease.time, "sleep", lambda _: other.communicate("end\n"))
    assert Lease(run).generation == 2


def test_a_killed_owner_is_recognised_at_once(run, other, monkeypatch, capsys):
    waits(monkeypatch)
    other.kill()
    other.wait()
    assert Lease(run).generation == 2
    assert capsys.readouterr().err == ""


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


def test_of_a_slurm_job_only_the_next_start_takes_over(run, monkeypatch):
    """A job that was put back into the queue: Slurm has ended its earlier start, or cut it off."""

    def start(job: str, restarts: str) -> Lease:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        return Lease(run)

    waits(monkeypatch, PATIENCE=0.1)
    old = start("42", "1")
    for job, restarts in (("42", "1"), ("42", "0"), ("43", "2"), ("", "2")):
        with pytest.raises(UserError, match="Slurm job 42"):
            start(job, restarts)
    start("42", "2").check_owned()
    with pytest.raises(Superseded, match=f"{run} was taken over by process {os.getpid()} on "):
        old.check_owned()


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


class TestWhereThereAreNoLocks:
    """Some network file systems know no flock: heartbeats decide."""

    @pytest.fixture(autouse=True, params=[errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
    def no_locks(self, request, monkeypatch) -> None:
        def flock(*_: object) -> None:
            raise OSError(request.param, "no locks here")

        monkeypatch.setattr(lease.fcntl, "flock", flock)

    def test_a_silent_owner_is_taken_over_on_its_own_machine_too(self, run, monkeypatch, capsys):
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


class TestLeftovers:
    def test_those_of_earlier_owners_go_and_those_of_later_ones_stay(self, run):
        """A later one may have come while this one slept."""
        left_by(run)
        names = ["{}-0123456789abcdef.lock", ".{}-0123456789abcdef.tmp", ".{}.json.01234567.tmp"]
        (run / "owners" / "..1-7566a3b9b04034ae.tmp.0-0a1b2c3d.tmp").touch()  # a draft of the first claim
        for name in names:
            for number in (1, 2, 3, 12):  # 2: of a process that was killed in its claim
                (run / "owners" / name.format(number)).touch()
        mine = Lease(run)
        left = {path.name for path in (run / "owners").iterdir()}
        assert left == {name.format(number) for name in names for number in (3, 12)} | {
            "1.json", "2.json", f"2-{owner_of(run, 2).nonce}.lock"
        }  # fmt: skip
        mine.release()

    def test_so_it_is_with_those_of_the_whole_run(self, run):
        names = [".status.json.{}-01234567.tmp", "samples/.000000001.png.{}-01234567.tmp",
                 "checkpoints/.000000001-{}.tmp"]  # fmt: skip
        for folder in ("samples", "checkpoints"):
            (run / folder).mkdir()
        for name in names:
            for number in (1, 3):
                (run / name.format(number)).touch()
        left_by(run)
        with RunDir(run).claimed(lambda: None, lambda work: work()):
            left = {str(path.relative_to(run)) for path in run.rglob(".*.tmp")}
        assert left == {name.format(3) for name in names}

    def test_the_lock_of_one_that_failed_to_claim_holds_nobody_up(self, run, monkeypatch, capsys):
        """It was frozen in its claim, and another one got the number."""
        waits(monkeypatch)
        path = left_by(run, ended=False)
        lease._lock_of(path, owner_of(run, 1).nonce).touch()  # free: it was killed
        with (run / "owners" / "1-0123456789abcdef.lock").open("w") as frozen:
            lease._try_to_lock(frozen.fileno())
            assert Lease(run).generation == 2
        assert capsys.readouterr().err == ""


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

    def test_what_another_process_has_begun_to_write_stays(self, run):
        mine = Lease(run)
        (run / "owners" / "2.json").touch()
        mine.withdraw()
        assert [path.name for path in (run / "owners").iterdir()] == ["2.json"]

    @pytest.mark.parametrize("what_is_left", ["the owners before", "an empty folder", "nothing"])
    def test_it_may_be_watched_from_another_machine(self, tmp_path, monkeypatch, what_is_left):
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

    def test_its_process_is_not_named_and_refused_to(self, run, other, monkeypatch):
        waits(monkeypatch, PATIENCE=0.1)
        (run / "owners" / "1.json").write_text("")
        with pytest.raises(UserError, match=r"is in use by another process: wait for it"):
            Lease(run)

    def test_a_silent_one_is_watched_and_then_taken_over(self, run, monkeypatch, capsys):
        waits(monkeypatch, SILENCE=0.1)
        left_by(run).write_text("")
        assert Lease(run).generation == 2
        assert capsys.readouterr().err == f"{run} was left by another process; watching it for 0.1 s\n"

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
