"""Files that are complete or absent: written under a temporary name, synced, renamed."""

import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from cs324dist.config import as_json, from_json
from cs324dist.errors import UserError

LARGEST_JSON = 1 << 20  # bytes; ours have a few hundred
LARGEST_FILE = 1 << 36  # bytes of a file of a checkpoint; ours have 119 MB
PAUSES = (0.1, 0.4)  # seconds before a read that failed is tried again
Answer = TypeVar("Answer")
Record = TypeVar("Record")


class Unreadable(UserError):
    """What cannot be read now: it may be whole, so it is not passed over, replaced or deleted."""


def patiently(read: Callable[[], Answer], path: Path, pauses: Sequence[float] = PAUSES) -> Answer:
    """What `read` finds at `path`, tried again if it fails.

    Raises:
        UserError: nothing is there.
        Unreadable: it failed each time.
    """
    try:
        return read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except OSError as error:
        if not pauses:
            raise Unreadable(
                f"{path} cannot be read now: {error.strerror}; nothing was changed: try again when it can be"
            ) from None
    time.sleep(pauses[0])
    return patiently(read, path, pauses[1:])


def sync(path: Path) -> None:
    """Wait until a file's or a folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear(path: Path) -> None:
    """Remove whatever has this name: a file, a folder, or a link, but never what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        with suppress(FileNotFoundError):  # another process clears it too
            shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Check that a file of this name can be made, before the work that it is to hold.

    Raises:
        UserError: it is a folder, or its folder does not exist.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it first")


@runtime_checkable
class Writer(Protocol):
    """One of several that may write here, of which the latest counts."""

    @property
    def generation(self) -> int:
        """Its number."""

    def check_owned(self) -> None:
        """Raise if a later one has come."""


@contextmanager
def replaced(path: Path, writer: Writer | None = None) -> Iterator[Path]:
    """A name to write to; what was written takes the place of `path` at the end, and not before.

    The name is new, so that nobody has put something there. The writer is checked right before the end.
    """
    by = writer.generation if writer else 0
    temporary = path.with_name(f".{path.name}.{by}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        sync(temporary)
        if writer:
            writer.check_owned()
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def clear_temporaries(folder: Path, name: str, generation: int) -> None:
    """Remove what writers before `generation` left: they were killed, or have nothing to rename any more."""
    for path in folder.glob(f".{name}*.tmp"):
        by = re.search(r"\.([0-9]{1,9})-[0-9a-f]{8}\.tmp", path.name)
        if not by or int(by[1]) < generation:
            clear(path)


def write_json(path: Path, content: Mapping[str, Any], writer: Writer | None = None) -> None:
    """Replace `path` by `content`; see `replaced`.

    Raises:
        UserError: `read_json` would refuse it for its size.
        OSError: it cannot be written.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    if len(text) > LARGEST_JSON:
        raise UserError(f"{path.name} would be larger than {LARGEST_JSON} bytes: give it less to hold")
    with replaced(path, writer) as temporary:
        temporary.write_text(text)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: no such file, or not a JSON object of a reasonable size.
        Unreadable: it cannot be read now.
    """

    def read() -> bytes:
        if path.is_symlink():
            raise UserError(f"{path} is not a file")  # it may lead anywhere
        check_file(path, LARGEST_JSON)
        return path.read_bytes()

    try:
        content = parse_json(patiently(read, path))
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON: it is damaged, or not a file of this project") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: it is damaged, or not a file of this project")
    return content


def read_record(record_type: type[Record], path: Path) -> Record:
    """A record from a JSON file.

    Raises:
        UserError: there is no such file, or not what the record's fields allow.
    """
    return from_json(record_type, read_json(path), str(path))


def write_record(path: Path, record: Any, writer: Writer | None = None) -> None:
    """Replace `path` by a record; see `replaced`."""
    write_json(path, as_json(record), writer)


def parse_json(text: bytes) -> Any:
    """A JSON value.

    Raises:
        ValueError, RecursionError: it is none; NaN and the infinities are not JSON.
    """
    return json.loads(text, parse_constant=_refuse)


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number that every reader can hold."""
    return (
        type(value) in (int, float)
        and abs(value) < math.inf
        and (type(value) is float or abs(value) <= 1 << 53)
    )


def check_file(path: Path, largest: int) -> None:
    """Check that it is a file, of at most so many bytes: a pipe would never end.

    Raises:
        UserError: it is not.
        OSError: it is not there.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise UserError(f"{path} is not a file")
    if about.st_size > largest:
        raise UserError(f"{path} is larger than {largest} bytes: it is not a file of this project")


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    check_file(path, LARGEST_FILE)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
