"""What the promises rest on, each to be taken away: then some point must show it."""

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import FileIO
from pathlib import Path

from cs324dist.runs import checkpoints, files, lease, metrics_file, saving
from cs324dist.runs.run_dir import RunDir


def fsync_only(matters: Callable[[int], bool]) -> Callable[[], None]:
    def without() -> None:
        honest = os.fsync
        os.fsync = lambda descriptor: honest(descriptor) if matters(descriptor) else None

    return without


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def is_metrics(descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").readlink().name == "metrics.jsonl"


def files_written_in_place() -> None:
    @contextmanager
    def replaced(path: Path, *_: object) -> Iterator[Path]:
        yield path

    files.replaced = replaced


def checkpoints_written_in_place() -> None:
    def write(folder: Path, trained, state, *_: object) -> None:
        files.clear(folder)
        checkpoints._write_files(folder, trained, state)

    saving.write_checkpoint = write


def checkpoints_deleted_in_place() -> None:
    honest = Path.rename
    Path.rename = lambda path, to: shutil.rmtree(path) if "deleted" in to.name else honest(path, to)


def metrics_cut_in_place() -> None:
    honest = RunDir._rewind

    def rewind(run: RunDir, step: int, lines: int) -> int:
        path, same = run.path / "metrics.jsonl", run.path / "same file"
        if path.exists():
            os.link(path, same)
        lost = honest(run, step, lines)
        if same.exists():
            same.write_bytes(path.read_bytes())
            same.replace(path)
            run._metrics = FileIO(path, "a")
        return lost

    RunDir._rewind = rewind


def metrics_not_cut() -> None:
    honest = RunDir._rewind
    RunDir._rewind = lambda run, *_: honest(run, 1 << 53, len(list(run._lines_of_metrics())))


def half_lines_stay() -> None:
    metrics_file.FileIO = type("FileIO", (FileIO,), {"truncate": lambda *_: None})


def no_check_of_owners() -> None:
    lease.Lease.check_owned = lambda _: None


def no_check_of_generations() -> None:
    honest, claiming = lease.Lease.check_owned, lease.newest_generation

    def check(own: lease.Lease) -> None:
        lease.newest_generation = lambda _: own.generation
        honest(own)
        lease.newest_generation = claiming

    lease.Lease.check_owned = check


def one_nonce_for_all() -> None:
    honest = lease.this_process
    lease.this_process = lambda: replace(honest(), nonce="0" * 16)


GUARDS: dict[str, tuple[str, str, Callable[[], None]]] = {  # the case and the fault that show it
    "fsync of files": ("lstm fresh", "bytes lost", fsync_only(is_folder)),
    "fsync of metrics": ("lstm fresh", "bytes lost", fsync_only(lambda d: not is_metrics(d))),
    "fsync of folders": ("lstm fresh", "names lost", fsync_only(lambda d: not is_folder(d))),
    "temporary names of files": ("lstm fresh", "half written", files_written_in_place),
    "temporary names of checkpoints": ("lstm fresh", "killed", checkpoints_written_in_place),
    "renaming what is deleted": ("lstm fresh", "killed", checkpoints_deleted_in_place),
    "metrics cut back": ("lstm fresh", "killed", metrics_not_cut),
    "a new file of metrics": ("lstm fresh", "frozen", metrics_cut_in_place),
    "half a line taken back": ("lstm fresh", "no space once", half_lines_stay),
    "the check before a write": ("lstm fresh", "frozen", no_check_of_owners),
    "generations": ("lstm fresh", "frozen", no_check_of_generations),
    "nonces": ("lstm fresh", "replaced", one_nonce_for_all),
}
