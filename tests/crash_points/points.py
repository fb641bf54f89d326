"""Every file operation of a short run as a crash point: kill there, fail, freeze, and see how it ends.

    python tests/crash_points                                  # all
    python tests/crash_points --case "lstm fresh" --fault killed --only 154
    python tests/crash_points --without "fsync of files"       # a control: it must find something

A run of six steps is recorded: its folder before each operation that changes it. What a kill or a power cut
leaves there is then continued by the same command; other faults strike at each operation of a start of its
own. In the end the newest checkpoint and the metrics must be, byte for byte, those of the run that nothing
disturbed. The processes say nothing that is not expected, and leave no temporary file.
"""

import argparse
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import launches
from disk import Disk, Tree, half_written, read_tree, write_tree
from guards import GUARDS
from launches import Launch
from starts import STOPPED, Action, Command, Operation, Start, prepare_to_fork

from cs324dist.distributed.stop import StopRequest
from cs324dist.errors import UserError
from cs324dist.runs.checkpoints import verify_checkpoint
from cs324dist.runs.environment import environment
from cs324dist.runs.history import checkpoints_in
from cs324dist.runs.run_dir import RunDir

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results" / "crash_points.json"
COMMON = (
    "--steps 6 --checkpoint-every 2 --evaluate-every 3 --keep-last 2 --log-every 1 --batch-size 4 "
    "--wandb disabled"
)
EXAMPLES = REPOSITORY / "examples"
COMMANDS = {
    "lstm": Command("lstm", f"{COMMON} --length 4 --hidden-size 4".split()),
    "lstm launched": Command("lstm", f"{COMMON} --length 4 --hidden-size 4 --micro-batches 4".split()),
    "classifier": Command(f"{EXAMPLES}/classifier.py:ClassifierTask", f"{COMMON} --dataset fake".split()),
    "mlp": Command(f"{EXAMPLES}/mlp.py:MLPTask", f"{COMMON} --data {EXAMPLES}/spirals.csv".split()),
    "gan": Command("gan", f"{COMMON} --dataset fake --latent-dim 8 --keep-last 1 --steps 4".split()),
}
# What is wrong and known, by what it looks like; delete an entry when nothing shows it any more.
KNOWN: dict[str, str] = {}
SPREAD = 11  # controls look at one of so many points first: most show late in a run
LEFT_BEHIND = b"left behind"
NORMAL = (
    r"step \d+/\d+  .*|evaluation after \d+ steps  .*"
    r"|\S+: (starting at|continuing from) step \d+ of .*|\S+: finished after \d+ steps|\S+ is finished, .*"
    r"|with micro-batches, a process uses one core: .*"
)
STOPPED_BY_A_SIGNAL = r"|\S+: stopped after \d+ steps; run the same command to go on"
CUT_OFF = (  # what an owner may say that wakes up and finds its temporary files cleared, or another at work
    r"|error: \S+ was (taken over by process \d+ on .*|moved or replaced): this process writes nothing more"
    r"|error: \S+ was just taken by another process: .*|(error: )?\S+ is in use by process \d+ on .*"
    r"|error: --seed 0 differs from the run's 1: .*"
    r"|(error|warning): .*(No such file or directory|Directory not empty).*"
)


@dataclass(frozen=True)
class Snapshot:
    """The run folder before an operation: as it is, and as a power cut or half of a write would leave it."""

    saved: int
    """The step that `status.json` says is saved."""
    trees: dict[str, Tree | Callable[[], Tree]]


@dataclass(frozen=True)
class Case:
    """A kind of start, and what one does that nothing disturbs."""

    name: str
    command: Command
    template: Tree
    """What the run folder holds before."""
    operations: list[Operation]
    snapshots: dict[int, Snapshot]
    whole: dict[str, bytes]
    """How it ends; see `essential`."""


class Worker:
    """Tries points in a folder of its own, one after the other."""

    def __init__(self, folder: Path, prepare: Callable[[], None] = lambda: None) -> None:
        folder.mkdir(exist_ok=True)
        self.run, self.prepare = folder / "run", prepare
        self._verdicts: dict[bytes, list[str]] = {}

    def start(
        self, command: Command, action: Action = Action.WATCH, at: int = 0, error: int = 0, **more
    ) -> Start:
        return Start(command, self.run, action, at, error, prepare=self.prepare, **more).wait()

    def record(self, name: str, command: Command, template: Tree, whole: Tree | None = None) -> Case:
        """Start it once, and note what is in the folder before each operation that changes it."""
        write_tree(self.run, template)
        disk, snapshots = Disk(self.run), {}
        disk.look(synced=True)
        start, last = self.start(command, Action.STOP_AT_CHANGES), None
        while start.code == STOPPED:
            disk.look()
            now, operation = disk.tree(), start.operations[-1]
            if last:
                self._check_seen(last, before := snapshots[last.number].trees["killed"], now)
                snapshots[last.number].trees[HALF] = partial(half_written, last.path, before, now)
            power_cuts = {
                "bytes lost": disk.tree(bytes_lost=True),
                "names lost": disk.tree(names_lost=True),
                "bytes and names lost": disk.tree(bytes_lost=True, names_lost=True),
            }
            snapshots[operation.number] = Snapshot(self.saved(), {"killed": now, **power_cuts})
            if operation.name == "fsync":
                disk.sync(self.run / operation.path)
            last = operation
            start.go_on()
        disk.close()
        end = essential(self.run)
        problems = [*strange_lines(start), *([f"ended with {start.code}"] if start.code else [])]
        if problems or differences(end, whole or end):
            sys.exit(f"{name}: undisturbed, and yet: {problems or differences(end, whole)}")
        return Case(name, command, template, start.operations, snapshots, whole or end)

    @staticmethod
    def _check_seen(operation: Operation, before: Tree, now: Tree) -> None:
        """Check that an operation is all that has happened in the folder."""
        changed = {path for path in before.keys() | now.keys() if before.get(path, 0) != now.get(path, 0)}
        elsewhere = {path for path in changed if not path.startswith(operation.path)}
        if elsewhere and not operation.name.startswith(("rename", "link")):
            sys.exit(f"inject.c does not see what changed {sorted(elsewhere)} after {operation}")

    def saved(self) -> int:
        """The step that `status.json` says is saved."""
        with suppress(UserError):  # none yet, or half of one where it is written in place
            return RunDir(self.run).read_status().step
        return 0

    def continued(self, case: Case, tree: Tree, saved: int) -> list[str]:
        """What is wrong with how a start ends that finds this folder."""
        digest = hashlib.sha256(f"{case.name} {saved}".encode())
        for path, content in sorted(tree.items()):
            digest.update(f"\0{path}\0".encode() + (content or b""))
        if (key := digest.digest()) not in self._verdicts:
            write_tree(self.run, tree)
            self._verdicts[key] = [*incomplete(self.run), *self.finish(case, saved)]
        return self._verdicts[key]

    def finish(self, case: Case, saved: int = 0, excused: str = "") -> list[str]:
        """Start once more; returns what is wrong with how it goes on from what was saved, and ends."""
        return goes_on_badly(case, self.start(case.command), self.run, saved, excused)


def incomplete(run: Path) -> list[str]:
    """The checkpoints that are neither complete nor absent."""
    problems = []
    for checkpoint in checkpoints_in(run / "checkpoints"):
        try:
            verify_checkpoint(checkpoint)
        except UserError as error:
            problems.append(f"it leaves half a checkpoint: {error}")
    return problems


def essential(run: Path) -> dict[str, bytes]:
    """What must be the same at the end of every run, and what must not be there."""
    found = {str(path.relative_to(run)): LEFT_BEHIND for path in run.rglob(".*")}
    newest = RunDir(run).newest() if run.exists() else None
    for path in sorted(newest.rglob("*.*")) if newest else ():
        content = path.read_bytes()
        if path.name == "trainer.json":
            facts = {k: v for k, v in json.loads(content).items() if k not in ("processes", "own_sha256")}
            content = json.dumps(facts).encode()
        found[f"newest checkpoint/{path.relative_to(newest)}"] = content
    for name in ("metrics.jsonl", "status.json"):
        if (run / name).exists():
            found[name] = re.sub(rb', "throughput/\w+": [^,}]+', b"", (run / name).read_bytes())
    return found


def differences(found: Tree, expected: Tree) -> list[str]:
    return sorted(
        path for path in found.keys() | expected.keys() if found.get(path, 0) != expected.get(path, 0)
    )


def strange_lines(start: Start | Launch, expected: str = "") -> list[str]:
    """What a process said, except for what processes say and what is expected here."""
    lines = [line for line in start.said if not re.fullmatch(NORMAL + expected, line)]
    return [
        f"it says {line!r}"
        for line in (lines[-1:] if "Traceback (most recent call last):" in lines else lines)
    ]


def ends_badly(
    case: Case, start: Start | Launch, run: Path, expected: str = "", excused: str = ""
) -> list[str]:
    """What is wrong with how a start has ended that should have finished the run; some files are excused."""
    problems = strange_lines(start, expected)
    if start.code != 0:
        return [f"it ends with {start.code}", *problems]
    differing = [path for path in differences(essential(run), case.whole) if not re.fullmatch(excused, path)]
    return [*problems, *(f"it ends with another {path}" for path in differing)]


def goes_on_badly(case: Case, start: Start | Launch, run: Path, saved: int, excused: str = "") -> list[str]:
    """What is wrong with how a start went on from what was saved, and has ended."""
    problems = ends_badly(case, start, run, excused=excused)
    begun = re.search(r"continuing from step (\d+)|starting at step (0)", "\n".join(start.said))
    if begun and int(begun[1] or begun[2]) < saved:
        problems.append(f"step {saved} was said to be saved, but it is {begun[0]}")
    return problems


Row = dict[str, Any]
Trial = Callable[[Worker, Case, int], list[str]]


def left_as(name: str) -> Trial:
    def trial(worker: Worker, case: Case, number: int) -> list[str]:
        snapshot = case.snapshots[number]
        tree = snapshot.trees[name]
        return worker.continued(case, tree() if callable(tree) else tree, snapshot.saved)

    return trial


def terminated(worker: Worker, case: Case, number: int) -> list[str]:
    write_tree(worker.run, case.template)
    first = worker.start(case.command, Action.TERMINATE, number)
    problems = strange_lines(first, STOPPED_BY_A_SIGNAL)
    if first.code not in (0, 75, -signal.SIGTERM):
        problems.append(f"TERM ends it with {first.code}")
    return problems + worker.finish(case)


def failing(action: Action, *errors: int) -> Trial:
    """The operation fails; with several errors, they take turns along the operations."""

    def trial(worker: Worker, case: Case, number: int) -> list[str]:
        write_tree(worker.run, case.template)
        error = errors[number % len(errors)]
        first = worker.start(case.command, action, number, error)
        expected = rf"|(warning|error): .*{os.strerror(error)}.*"
        if case.operations[number - 1].path.endswith(".lock"):  # then the owner is watched
            expected += r"|\S+ was left by process \d+ on .*; watching it for .*"
        said = "\n".join(first.said)
        stale = "status.json" if "status.json cannot be written" in said else ""
        left = r"checkpoints/\..*" if "an old checkpoint stays for now" in said else ""
        uncleared = r"(.*/)?\..*" if action == Action.FAIL_FROM else left
        if first.code == 0:
            problems = ends_badly(case, first, worker.run, expected, f"{stale}|{uncleared}")
        else:
            problems = strange_lines(first, expected)
            if first.code not in (1, 2) or "error: " not in said:
                problems.append(f"it ends with {first.code} and {'an' if 'error: ' in said else 'no'} error")
        return [f"at {os.strerror(error)}: {problem}" for problem in problems] + [
            f"after {os.strerror(error)}: {problem}" for problem in worker.finish(case, excused=left)
        ]

    return trial


def frozen(worker: Worker, case: Case, number: int) -> list[str]:
    """Frozen, and thawed when a second owner has finished the run."""
    write_tree(worker.run, case.template)
    old = worker.start(case.command, Action.STOP, number, restart=0)
    new = worker.start(case.command, restart=1)
    problems = [f"the second owner: {problem}" for problem in ends_badly(case, new, worker.run)]
    return problems + thawed(worker, case, old, number)


def replaced(worker: Worker, case: Case, number: int) -> list[str]:
    """Frozen, and thawed when another run has taken the folder's name."""
    write_tree(worker.run, case.template)
    old = worker.start(case.command, Action.STOP, number)
    shutil.rmtree(worker.run, ignore_errors=True)
    other = Command(case.command.task, [*case.command.options, "--seed", "1"])
    new = worker.start(other)
    problems = [
        f"the other run: {problem}" for problem in [*strange_lines(new), *[new.code] * bool(new.code)]
    ]
    return problems + thawed(worker, case, old, number)


def thawed(worker: Worker, case: Case, old: Start, number: int) -> list[str]:
    """What is wrong with what an owner does that was cut off: it may touch no file of its successor's."""
    before, end = read_tree(worker.run), essential(worker.run)
    old.go_on()
    problems = strange_lines(old, CUT_OFF)
    if old.code not in (0, 1, 2):
        problems.append(f"it ends with {old.code}")
    mine = f'"pid": {old.pid},'.encode()
    own = {path for path in before if path.startswith("owners/") and mine in (before[path] or b"")}
    after = read_tree(worker.run)
    touched = set(differences({path: after.get(path, 0) for path in before}, before)) - own
    touched = {path for path in touched if not path.endswith(".lock")}
    late = [operation for operation in old.operations if operation.number >= number]
    now = essential(worker.run)
    touched |= {path for path in differences(now, end) if end.get(path) != LEFT_BEHIND}
    for path in sorted(touched):
        writes = sum(o.name == "rename" and o.path.startswith(f".{path}.") for o in late)
        problems.append(f"it changes {path}" + (", in one write" if writes == 1 else ""))
    return [f"the old owner: {problem}" for problem in problems]


def both_frozen(worker: Worker, case: Case, number: int) -> list[str]:
    """Frozen, and the second owner too; the first is thawed and ends, then the second."""
    write_tree(worker.run, case.template)
    old = worker.start(case.command, Action.STOP, number, restart=0)
    new = worker.start(case.command, Action.STOP, 1 + 97 * number % len(case.operations), restart=1)
    where = new.operations[-1]
    old.go_on()
    problems = [f"the old owner: {problem}" for problem in strange_lines(old, CUT_OFF)]
    if new.code == STOPPED:
        new.go_on()
    if any("was just taken by another process" in line for line in new.said):  # it had not claimed it yet
        return problems + [f"the only owner: {problem}" for problem in ends_badly(case, old, worker.run)]
    problems += [f"the second owner: {problem}" for problem in ends_badly(case, new, worker.run)]
    return [f"{problem} (the second owner was frozen at {where})" for problem in problems]


def launched(worker: Worker, point: "Point") -> list[str]:
    """A launch of two processes, of which the first meets the fault, and then one of another number."""
    write_tree(worker.run, {})
    action, error = launches.FAULTS[point.fault]
    first = Launch(point.case.command, worker.run, 2, action, point.number, error)
    said = "\n".join(first.said)
    problems = []
    if first.code not in ((1,) if action == Action.KILL else (0, 1)) or len(first.operations) < point.number:
        problems.append(f"it ends with {first.code} after {len(first.operations)} operations")
    if first.code == 1 and action != Action.KILL and "error: " not in said:
        problems.append("it ends with no error")
    if said.count("Traceback (most recent call last):") > (first.code == 1):  # one is the launcher's
        problems.append("it says a traceback")
    saved, processes = worker.saved(), 1 + point.number % 3
    again = Launch(point.case.command, worker.run, processes)
    problems += goes_on_badly(point.case, again, worker.run, saved)
    return [f"{problem} (continued on {processes})" for problem in problems]


HALF = "half written"
TROUBLE = (errno.EIO, errno.ESTALE)
FAULTS: dict[str, tuple[str, int, Trial]] = {  # the kinds of operations that they strike, and one of how many
    "killed": ("csf", 1, left_as("killed")),
    HALF: ("s", 1, left_as(HALF)),
    "bytes lost": ("csf", 1, left_as("bytes lost")),
    "names lost": ("csf", 1, left_as("names lost")),
    "bytes and names lost": ("csf", 1, left_as("bytes and names lost")),
    "terminated": ("csf", 1, terminated),
    "no space once": ("s", 1, failing(Action.FAIL_ONCE, errno.ENOSPC)),
    "no space from there on": ("s", 1, failing(Action.NO_SPACE_FROM, errno.ENOSPC)),
    "fails once": ("csfr", 1, failing(Action.FAIL_ONCE, *TROUBLE)),
    "fails from there on": ("csfr", 1, failing(Action.FAIL_FROM, *reversed(TROUBLE))),
    "look-up fails once": ("l", 3, failing(Action.FAIL_ONCE, *TROUBLE)),
    "fsync fails and loses": ("f", 1, failing(Action.LOSE_FSYNC, errno.EIO)),
    "frozen": ("csf", 1, frozen),
    "both frozen": ("csf", 1, both_frozen),
    "replaced": ("csf", 1, replaced),
}


@dataclass(frozen=True)
class Point:
    case: Case
    fault: str
    number: int

    def __str__(self) -> str:
        return f"{self.case.name}, {self.fault} at {self.case.operations[self.number - 1]}"


def interrupted_evaluation() -> None:
    """Have the first evaluation of this process ask it to stop."""
    honest = StopRequest.until_stopped

    def until_stopped(stop, parts):
        for part in honest(stop, parts):
            yield part
            os.kill(os.getpid(), signal.SIGTERM)
            while not stop.received:
                time.sleep(0.001)

    StopRequest.until_stopped = until_stopped


ON_TWO = "lstm on 2 processes"
CASES = {  # the command, what it finds, and of how many points one is tried
    "lstm fresh": ("lstm", "nothing", 1),
    "lstm resumed": ("lstm", "a checkpoint half written", 4),
    "lstm owed": ("lstm", "an evaluation owed", 6),
    "mlp fresh": ("mlp", "nothing", 23),
    "classifier fresh": ("classifier", "nothing", 47),
    "gan fresh": ("gan", "nothing", 173),
    ON_TWO: ("lstm launched", "nothing", 41),
}


def build(name: str, worker: Worker) -> Case:
    """Record a case."""
    task, found, _ = CASES[name]
    command, template, whole = COMMANDS[task], {}, None
    if name == ON_TWO:
        write_tree(worker.run, {})
        undisturbed = Launch(command, worker.run, 2)
        if undisturbed.code != 0 or strange_lines(undisturbed):
            sys.exit(f"{name}: undisturbed, and yet: {undisturbed.code}, {undisturbed.said}")
        return Case(name, command, {}, undisturbed.operations, {}, essential(worker.run))
    if found != "nothing":
        fresh = worker.record(name, command, {})
        whole = fresh.whole
        halfway = [s.trees["killed"] for s in fresh.snapshots.values() if s.saved == 2]
        template = max(halfway, key=len)
    if found == "an evaluation owed":
        write_tree(worker.run, {})
        first = Start(command, worker.run, prepare=interrupted_evaluation).wait()
        if first.code != 75:
            sys.exit(f"{name}: not interrupted, but ended with {first.code}: {first.said}")
        template = read_tree(worker.run)
    return worker.record(name, command, template, whole)


def points(case: Case, faults: list[str]) -> Iterator[Point]:
    for fault in faults if case.name != ON_TWO else [f for f in faults if f in launches.FAULTS]:
        kinds, stride, _ = FAULTS[fault]
        struck = [o for o in case.operations if o.kind in kinds and (fault != HALF or o.name == "write")]
        yield from (Point(case, fault, operation.number) for operation in struck[::stride])


def try_all(todo: list[Point], jobs: int, folder: Path) -> Iterator[tuple[Point, list[str]]]:
    """Try points in so many processes; what is wrong with each."""
    readers = []
    for job in range(jobs):
        reader, writer = os.pipe()
        if os.fork() == 0:
            worker = Worker(folder / f"worker{job}")
            with os.fdopen(writer, "w", 1) as out:
                for index in range(job, len(todo), jobs):
                    print(json.dumps([index, try_one(worker, todo[index])]), file=out)
            os._exit(0)
        os.close(writer)
        readers.append(os.fdopen(reader))
    for reader in readers:
        for line in reader:
            index, problems = json.loads(line)
            yield todo[index], problems
        if os.wait()[1]:
            sys.exit("a worker has failed")


def try_one(worker: Worker, point: Point) -> list[str]:
    if point.case.name == ON_TWO:
        return launched(worker, point)
    return FAULTS[point.fault][2](worker, point.case, point.number)


def unknown(point: Point, problems: list[str], seen: Counter[str]) -> list[str]:
    """Those that are not known; counts the others."""
    left = []
    for problem in problems:
        known = next((defect for defect in KNOWN if re.search(defect, f"{point}: {problem}")), None)
        if known:
            seen[known] += 1
        else:
            left.append(problem)
    return left


def control(guard: str, folder: Path) -> Row:
    """Take a guard away, and try points until one shows it."""
    name, fault, without = GUARDS[guard]
    worker = Worker(folder / "control", without)
    every = list(points(build(name, worker), [fault]))
    spread = [point for first in range(SPREAD) for point in every[first::SPREAD]]
    for tried, point in enumerate(spread, 1):
        if problems := unknown(point, try_one(worker, point), Counter()):
            print(f"without {guard}: {point}: {problems[0]}", flush=True)
            return {"guard": guard, "tried": tried, "point": str(point)}
    print(f"without {guard}: nothing", flush=True)
    return {"guard": guard, "tried": len(every), "point": None}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="crash_points"
    )
    parser.add_argument("--folder", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--fault", action="append", choices=FAULTS, help="default: all")
    parser.add_argument("--only", type=int, metavar="K", help="at this operation alone")
    parser.add_argument("--stride", type=int, default=1, help="at one of so many operations")
    parser.add_argument("--without", action="append", choices=GUARDS, default=[], help="only this control")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the results there, as JSON; tries all controls, too")
    arguments = parser.parse_args()
    began = time.monotonic()
    cases = [] if arguments.without else arguments.case or list(CASES)
    guards = list(GUARDS) if arguments.out else arguments.without
    forked = [name for name in cases if name != ON_TWO]
    used = {CASES[name][0] for name in [*forked, *(GUARDS[guard][0] for guard in guards)]}
    prepare_to_fork([COMMANDS[name] for name in sorted(used)], arguments.folder)

    seen: Counter[str] = Counter()
    faults = arguments.fault or list(FAULTS)
    rows = {(case, fault): {"points": 0, "bad": 0} for fault in faults for case in cases}
    worker = Worker(arguments.folder / "whole")
    for name in cases:
        every = list(points(build(name, worker), faults))
        todo = every[:: CASES[name][2] * arguments.stride]
        if arguments.only:
            todo = [point for point in every if point.number == arguments.only]
        for point, problems in try_all(todo, arguments.jobs, arguments.folder):
            row = rows[name, point.fault]
            row["points"] += 1
            if bad := unknown(point, problems, seen):
                row["bad"] += 1
                print(f"{point}:", *bad, sep="\n    ", flush=True)
    controls = [control(guard, arguments.folder) for guard in guards]
    tried, bad = (sum(row[key] for row in rows.values()) for key in ("points", "bad"))
    is_whole = arguments.out and arguments.stride == 1
    fixed = [defect for defect in KNOWN if is_whole and not seen[defect]]
    for defect in fixed:
        print(f"no point shows the known defect any more: {defect}")
    missed = sum(row["point"] is None for row in controls)
    minutes = (time.monotonic() - began) / 60
    print(f"{tried} points, {bad} bad, {len(controls)} controls, {missed} missed; {minutes:.1f} minutes")
    if arguments.out:
        result = {
            "environment": {**asdict(environment()), "threads": 1, "cores": os.cpu_count()},
            "jobs": arguments.jobs,
            "stride": arguments.stride,
            "minutes": round(minutes, 1),
            "rows": [{"case": case, "fault": fault, **row} for (case, fault), row in rows.items()],
            "known": {KNOWN[defect]: count for defect, count in seen.items()},
            "controls": controls,
        }
        arguments.out.write_text(json.dumps(result) + "\n")
    sys.exit(bool(bad or missed or fixed))


if __name__ == "__main__":
    main()
