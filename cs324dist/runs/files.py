"""Files that are complete or absent: written under a temporary name, synced, renamed."""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from cs324dist.config import as_json, from_json
from cs324dist.errors import UserError

Record = TypeVar("Record")


def content_of(path: Path) -> bytes:
    """What a file holds.

    Raises:
        UserError: there is no such file.
        OSError: it cannot be read now, and may be whole.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except OSError as error:
        error.filename = str(path)  # a read does not know it
        raise


def matches(folder: Path, pattern: str) -> list[re.Match[str]]:
    """The names in a folder that are of this form; none without a folder."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return [match for path in folder.iterdir() if (match := re.fullmatch(pattern, path.name))]
    return []


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
    """One of several processes that may write here: only the latest may go on."""

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
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def clear_temporaries(folder: Path, name: str, generation: int) -> None:
    """Remove temporary files of writers before `generation`, so that a paused one cannot rename them."""
    for match in matches(folder, rf"\.{re.escape(name)}.*\.tmp"):
        by = re.search(r"\.([0-9]+)-[0-9a-f]{8}\.tmp", match[0])
        if not by or int(by[1]) < generation:
            clear(folder / match[0])


def write_json(path: Path, content: Mapping[str, Any], writer: Writer | None = None) -> None:
    """Replace `path` by `content`; see `replaced`."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with replaced(path, writer) as temporary:
        temporary.write_text(text)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: no such file, or not a JSON object.
        OSError: it cannot be read now.
    """
    try:
        content = json.loads(content_of(path))
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


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file; raises as `content_of` does."""
    return hashlib.sha256(content_of(path)).hexdigest()
