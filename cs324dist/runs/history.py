"""Which checkpoints a folder holds: their names, the history that led to the newest, and what is deleted."""

import re
from contextlib import suppress
from pathlib import Path

from cs324dist.errors import UserError
from cs324dist.runs.files import clear, matches

CHECKPOINT = r"([0-9]{9}|1[0-9]{9})-([1-9][0-9]*)"  # step, and the owner that wrote it


def checkpoint_name(step: int, generation: int) -> str:
    """The name of a checkpoint: its step, and the owner that writes it."""
    return f"{step:09d}-{generation}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.partition("-")[0])


def generation_of(checkpoint: Path) -> int:
    """The owner in a checkpoint's name."""
    return int(checkpoint.name.partition("-")[2])


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints below `folder`: those of the latest owner first, and of one owner the newest first."""
    found = (folder / match[0] for match in matches(folder, CHECKPOINT))
    return sorted(found, key=lambda path: (generation_of(path), step_of(path)), reverse=True)


def history_of(folder: Path) -> list[Path]:
    """The newest checkpoint, and those that led to it: each of an earlier step than the one before.

    An owner that was cut off may have written others of the same and of later steps.
    """
    history: list[Path] = []
    for path in checkpoints_in(folder):
        if not history or step_of(path) < step_of(history[-1]):
            history.append(path)
    return history


def keep_newest(folder: Path, count: int, generation: int, *, best: int | None = None) -> None:
    """Delete all but the newest `count` checkpoints and that of step `best`, and what a killed writer left.

    What owners after `generation` wrote stays.
    """
    history = history_of(folder)
    kept = [*history[:count], *(path for path in history if step_of(path) == best)]
    for path in checkpoints_in(folder):
        if path not in kept and generation_of(path) <= generation:
            _delete(path, path.name)
    clear_unfinished(folder, generation)


def clear_unfinished(folder: Path, generation: int) -> None:
    """Remove what killed writers left below `folder`, if they were no later owners than `generation`."""
    for match in matches(folder, r"\..*\.tmp"):
        path, of = folder / match[0], re.fullmatch(rf"\.({CHECKPOINT})(\.deleted)?\.tmp", match[0])
        if of is None:
            clear(path)
        elif int(of[3]) <= generation:
            _delete(path, of[1])


def _delete(path: Path, name: str) -> None:
    """Rename, then delete: a kill leaves no half of it, and an earlier owner cannot write into it."""
    doomed = path.with_name(f".{name}.deleted.tmp")
    if path != doomed:
        clear(doomed)
        with suppress(FileNotFoundError):
            path.rename(doomed)
    clear(doomed)


def metric_of(wanted: str) -> str:
    """The metric whose best checkpoint is kept; `METRIC:min`: the smallest.

    Raises:
        UserError: another word stands behind the colon.
    """
    metric, _, which = wanted.partition(":")
    if which not in ("", "min", "max"):
        raise UserError(f"keep_best {wanted} is not allowed: give METRIC, or METRIC:min for the smallest")
    return metric
