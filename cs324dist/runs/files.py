"""Files that are complete or absent: written under a temporary name, synced, renamed."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from cs324dist.config import as_json, from_json
from cs324dist.errors import UserError

LARGEST_JSON = 1 << 20  # bytes; ours have a few hundred
Record = TypeVar("Record")


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


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A name to write to; what was written takes the place of `path` at the end, and not before."""
    temporary = path.with_name(f".{path.name}.tmp")
    clear(temporary)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` by `content`.

    Raises:
        UserError: `read_json` would refuse it for its size.
        OSError: it cannot be written.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    if len(text) > LARGEST_JSON:
        raise UserError(f"{path.name} would be larger than {LARGEST_JSON} bytes: give it less to hold")
    with replaced(path) as temporary:
        temporary.write_text(text)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: no such file, or not a JSON object of a reasonable size.
    """
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UserError(f"{path} is not a file")  # a pipe would never end, a link lead anywhere
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(f"{path} is larger than {LARGEST_JSON} bytes: it is not a file of this project")
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
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


def write_record(path: Path, record: Any) -> None:
    """Replace `path` by a record."""
    write_json(path, as_json(record))


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


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
