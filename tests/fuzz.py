"""Damage and forge real run folders in thousands of ways, and read them with everything that reads a run.

    python tests/fuzz.py --mutations 10000 --seed 0

Every reader of a task reads every mutated folder. What may come of it:

refused     an error in lines that a terminal can show; the folder stays as it was
set aside   the damaged checkpoint is named and moved, and the valid one before it is used
harmless    what was read is what was there before the mutation
forged      well-formed content whose digests were corrected: no reader can tell
unsigned    well-formed content of a file without a digest: no reader can tell

All else is bad: another exception, other content, code that ran, a file outside the folder that was read or
written, memory or time without bound. Prints a table, writes it as JSON, and exits with 1 if anything was bad.
`--only N` repeats mutation N of a seed.
"""

import argparse
import functools
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ |= {"CS324DIST_THREADS": "1", "OMP_NUM_THREADS": "1"}

import torch
from safetensors.torch import load_file
from torch import Tensor

from cs324dist.audit import audit
from cs324dist.config import as_json
from cs324dist.data import fetch
from cs324dist.distributed.process import start_accelerator
from cs324dist.distributed.stop import StopRequest
from cs324dist.errors import ReportedError, RunFailed
from cs324dist.metrics import generators
from cs324dist.models.gan import Generator
from cs324dist.report.page import write_report
from cs324dist.runs import environment, lease
from cs324dist.runs.checkpoints import plain_state, tensors_by_file, verify_checkpoint
from cs324dist.runs.models import load_model
from cs324dist.runs.run_dir import RunDir
from cs324dist.runs.trained import load_generator
from cs324dist.sampling import generators as sampling
from cs324dist.tasks import find_task
from cs324dist.trainer import run_task

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "fuzz.json"
TensorFile = runpy.run_path(str(REPOSITORY / "launch" / "sample.py"), run_name="sample")["TensorFile"]

LENGTHS = (4, 5, 6)  # of the LSTM's curriculum
COMMON = "--steps 6 --batch-size 8 --checkpoint-every 2 --log-every 1 --evaluate-every 6 --wandb disabled"
OPTIONS = {
    "lstm": f"--length {LENGTHS[-1]} --hidden-size 8",
    "gan": "--dataset fake --latent-dim 8 --schedule constant",
}
STEPS = (2, 4, 6)  # of the three checkpoints
GAN_EVERY = 8  # of so many mutations, one is of the GAN's run: its files are ten thousand times as large
SMALL = 1 << 16  # bytes; larger files of a run are linked, not copied, until they are mutated
PATIENCE = 20  # seconds for one reader
LONGEST_LINE = 1000  # characters
ADDRESS_SPACE = 2 << 30  # bytes that a reader may reserve
MEMORY = 600 << 20  # bytes by which a reader may grow: a GAN's checkpoint has 119 MB, and is held twice


# Runs, and copies of them


@dataclass
class Original:
    """A real run, and what every reader must find in it."""

    name: str
    path: Path
    config: Any
    rows: list[dict[str, Any]]
    checkpoints: dict[int, dict[str, Any]]


def train(name: str, folder: Path) -> Original:
    path = folder / name
    command = [sys.executable, f"launch/{name}.py", *COMMON.split(), *OPTIONS[name].split()]
    subprocess.run([*command, "--run-dir", path], cwd=REPOSITORY, check=True, stderr=subprocess.DEVNULL)
    run, presets = RunDir(path), find_task(name).presets
    config = run.read_config(type(presets["fast"]))
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return Original(name, path, config, rows, {step: content(run.checkpoint(step)) for step in STEPS})


def content(checkpoint: Path) -> dict[str, Any]:
    """The tensors of a checkpoint by file, what its averaged generator draws, and trainer.json."""
    found: dict[str, Any] = {
        str(path.relative_to(checkpoint)): load_file(own(path)) for path in checkpoint.rglob("*.safetensors")
    }
    if weights := found.get("generator_ema/model.safetensors"):
        (generator := Generator(8).eval()).load_state_dict(weights)
        with torch.no_grad():
            found["images"] = {"images": generator(sampling.latents(generator, 0, 0, 2))}
    return {**found, "trainer.json": json.loads(own(checkpoint / "trainer.json").read_bytes())}


def own(path: Path) -> Path:
    """A path that may be read or replaced: an earlier mutation may have put a pipe or a link there."""
    if os.path.realpath(path) != str(path) or not path.is_file():
        raise OSError(f"{path} is no file any more")
    return path


class Copy:
    """A copy of a run that is mutated, and a place beside it that nothing may read or write."""

    def __init__(self, originals: Mapping[str, Original], folder: Path, seed: int, number: int) -> None:
        self.rng = random.Random(f"{seed}/{number}")
        names = ("gan", "lstm") if number % GAN_EVERY == 0 else ("lstm", "gan")
        self.original, self.other = (originals[name] for name in names)
        self.folder, self.run, self.outside = folder, folder / "run", folder / "outside"
        self.marker = self.outside / "code ran"
        self.forged = False  # digests were corrected
        self.unsigned = False  # a file without a digest was changed
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.original.path, self.run, copy_function=copy_or_link)
        shutil.copytree(self.original.path, self.outside / "run", copy_function=copy_if_small)
        (self.outside / "folder").mkdir()
        (self.outside / "victim").write_text("mine")
        (self.outside / "victim.json").write_text('{"state": "finished", "step": 6, "why": ""}')
        self.done: list[str] = []
        wanted = self.rng.choice((1, 1, 1, 2))
        while len(self.done) < wanted:  # a mutation before may have made the next impossible
            with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
                mutate = self.rng.choices(list(MUTATIONS), list(MUTATIONS.values()))[0]
                self.done.append(f"{mutate.__name__}: {mutate(self)}".replace(f"{self.run}/", ""))

    def checkpoint(self) -> Path:
        return self.run / "checkpoints" / f"{self.rng.choice((STEPS[-1],) * 4 + STEPS):09d}"

    def file(self, *kinds: str) -> Path:
        """Some file, of one kind as likely as of another; `@` stands for a checkpoint."""
        pattern = self.rng.choice(kinds or FILES).replace("@", f"checkpoints/{self.checkpoint().name}")
        path = own(self.rng.choice(sorted(self.run.glob(pattern))))
        self.unsigned |= not self.is_signed(path)
        return path

    def is_signed(self, path: Path) -> bool:
        return path.relative_to(self.run).parts[0] == "checkpoints"

    def write(self, path: Path, data: bytes, mend: float = 0.0) -> None:
        """Replace a file, and with probability `mend` correct the digests, as a forger would."""
        path.unlink()  # it may be a link to the original
        path.write_bytes(data)
        if self.is_signed(path) and path.name != "trainer.json" and self.rng.random() < mend:
            self.mend(self.run.joinpath(*path.relative_to(self.run).parts[:2]))

    def mend(self, checkpoint: Path, **changes: Any) -> None:
        trainer = {**json.loads(own(checkpoint / "trainer.json").read_bytes()), **changes}
        for name in trainer["sha256"]:
            with suppress(OSError, ValueError):
                trainer["sha256"][name] = sha256(own(checkpoint / name).read_bytes())
        self.write(checkpoint / "trainer.json", self.signed(json.dumps(trainer)))

    def signed(self, text: str) -> bytes:
        """The text of a trainer.json with its own digest corrected."""
        trainer = json.loads(text)
        before = trainer.pop("own_sha256")
        self.forged = True
        return text.replace(before, sha256(json.dumps(trainer, sort_keys=True).encode())).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def copy_or_link(source: str, target: str) -> None:
    (shutil.copy2 if Path(source).stat().st_size < SMALL else os.link)(source, target)


def copy_if_small(source: str, target: str) -> None:
    if Path(source).stat().st_size < SMALL:
        shutil.copy2(source, target)


# Mutations. Each changes a copy, and says what it did.

FILES = ("config.json", "status.json", "metrics.jsonl", "owners/1.json", "samples/*.png", "@/trainer.json",
         "@/optimizers.safetensors", "@/*/model.safetensors", "@/*/config.json")  # fmt: skip
BYTES: dict[str, Callable[[bytes, int, int, random.Random], bytes]] = {
    "bit": lambda b, at, n, rng: b[:at] + bytes([b[at] ^ 1 << rng.randrange(8)]) + b[at + 1 :],
    "byte": lambda b, at, n, rng: b[:at] + rng.randbytes(1) + b[at + 1 :],
    "noise": lambda b, at, n, rng: b[:at] + rng.randbytes(n) + b[at + n :],
    "cut": lambda b, at, n, rng: b[: rng.choice((0, 1, 7, 8, at, len(b) - 1))],
    "insert": lambda b, at, n, rng: b[:at] + rng.randbytes(n) + b[at:],
    "delete": lambda b, at, n, rng: b[:at] + b[at + n :],
    "zero": lambda b, at, n, rng: b[:at] + bytes(len(b[at : at + n])) + b[at + n :],
    "repeat": lambda b, at, n, rng: b[: at + n] + b[at:],
    "append": lambda b, at, n, rng: b + rng.randbytes(n),
    "all noise": lambda b, at, n, rng: rng.randbytes(rng.choice((0, 1, 100, 5000))),
}


def change_bytes(w: Copy) -> str:
    path, rng, how = w.file(), w.rng, w.rng.choice(list(BYTES))
    before = path.read_bytes()
    at = rng.randrange(rng.choice((len(before), min(len(before), 400))))
    count = rng.choice((1, 2, 8, 64, 4096))
    w.write(path, BYTES[how](before, at, count, rng), mend=0.3)
    return f"{path}: {how} at {at}, {count} bytes"


THINGS: dict[str, Callable[[Copy, Path], Any]] = {
    "nothing": lambda w, path: None,
    "an empty file": lambda w, path: path.touch(),
    "a file": lambda w, path: path.write_text("x"),
    "an empty folder": lambda w, path: path.mkdir(),
    "a folder": lambda w, path: (path / "inside").mkdir(parents=True),
    "a pipe": lambda w, path: os.mkfifo(path),
    "a link to itself": lambda w, path: path.symlink_to(path),
    "a link to status.json": lambda w, path: path.symlink_to(path.with_name("status.json")),
    "a link to its like outside": lambda w, path: path.symlink_to(w.outside / path.relative_to(w.folder)),
    **{
        f"a link to {target}": lambda w, path, target=target: path.symlink_to(w.outside / target)
        for target in ("victim", "victim.json", "folder", "absent", "/dev/zero", "/dev/full")
    },
}


def put(w: Copy, path: Path) -> str:
    """Put something in the place of `path`."""
    what = w.rng.choice(list(THINGS))
    if os.path.realpath(path.parent) != str(path.parent):
        raise OSError("it is in a linked folder")
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    THINGS[what](w, path)
    w.unsigned = True
    return f"{path}: {what}"


def replace_file(w: Copy) -> str:
    return put(w, w.file() if w.rng.random() < 0.7 else w.rng.choice(sorted(w.run.rglob("*"))))


WRITTEN = (
    ".config.json.tmp", ".status.json.tmp", ".metrics.jsonl.tmp", ".scratch", "owners/.2.json.tmp",
    "owners/2.json", "owners/2.lock", "owners/1.lock", "owners/999999999.json", "owners/1000000000.json",
    "owners/999999998.json", "checkpoints/.000000007.2.tmp", "checkpoints/000000007",
    "checkpoints/.000000007.99.tmp", "checkpoints/damaged-000000006", "samples/000000007.png",
    "samples/.000000007.png.tmp", "wandb", "evaluation.json", ".evaluation.json.tmp",
    "checkpoints/.000000007.2.tmp/.trainer.json.tmp",
)  # fmt: skip


def plant(w: Copy) -> str:
    """Something where the project is about to write."""
    path = w.run / w.rng.choice(WRITTEN)
    path.parent.mkdir(exist_ok=True)
    said = put(w, path)
    if w.rng.random() < 0.5:  # so that the newest is set aside
        w.write(own(w.run / "checkpoints" / "000000006" / "trainer.json"), b"{")
        said += ", and the newest trainer.json is damaged"
    return said


def swap_files(w: Copy) -> str:
    path, rng = w.file(), w.rng
    how = rng.choice(("swapped", "of another checkpoint", "of the other run", "renamed", "copied"))
    if how == "swapped":
        other = own(rng.choice(sorted(p for p in path.parent.rglob("*") if p.is_file())))
        path.rename(temporary := w.folder / "temporary")
        other.rename(path) if other.exists() else None
        temporary.rename(other)
    elif how == "of another checkpoint":
        step, *rest = path.relative_to(w.run / "checkpoints").parts
        source = w.original.path.joinpath("checkpoints", f"{rng.choice(STEPS):09d}", *rest)
        w.write(path, source.read_bytes(), mend=0.4)
    elif how == "of the other run":
        source = rng.choice(sorted(p for p in w.other.path.rglob(path.name) if p.is_file()))
        w.write(path, source.read_bytes(), mend=0.4)
    elif how == "renamed":
        names = ("x.json", "MODEL.SAFETENSORS", ".hidden", "trainer.json", "pytorch_model.bin")
        path.rename(path.with_name(rng.choice(names)))
    else:
        names = ("copy.json", "extra.safetensors", ".config.json.tmp", "2.json")
        shutil.copy(path, path.with_name(rng.choice(names)))
    return f"{path}: {how}"


def move_checkpoint(w: Copy) -> str:
    rng, path = w.rng, w.checkpoint()
    name = rng.choice(("000000008", "000000004", "999999999", "0999999999", "000000000", "damaged-000000006",
                       ".000000006.1.tmp", "٠٠٠٠٠٠٠٠٩", "latest"))  # fmt: skip
    target = path.with_name(name if name != path.name else "000000010")
    own(path / "trainer.json")
    shutil.rmtree(target, ignore_errors=True)
    how = rng.choice(("renamed", "copied", "linked", "of the other run"))
    if how == "renamed":
        path.rename(target)
    elif how == "copied":
        shutil.copytree(path, target, copy_function=copy_or_link)
        if rng.random() < 0.5 and name.isdecimal():
            w.mend(target, step=int(name))
    elif how == "linked":
        twin = w.outside / "run" / "checkpoints" / path.name
        target.symlink_to(rng.choice((path, w.outside / "folder", twin)))
    else:
        shutil.copytree(w.other.path / "checkpoints" / "000000006", target, copy_function=copy_or_link)
    return f"{path}: {how}, now {name}"


TOO_MUCH = 2**63
FIELDS: dict[str, tuple[Any, ...]] = {  # of a tensor in the header of a safetensors file
    "shape": ([], [0], [1], [-1], [TOO_MUCH], [65536, 65536], [2**32, 2**32], [1.5], ["4"], "4", None,
              [1] * 1000, [True], [8, 32, 1], [32, 8]),
    "dtype": ("F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "X", "", None, 7),
    "data_offsets": ([0, 0], [0, TOO_MUCH], [-8, 8], [8, 0], [0, 2**70], [], [1], "x", None, [0, 1 << 27],
                     [4, 8]),
}  # fmt: skip
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
HEADERS: dict[str, Callable[[dict[str, Any], str, random.Random], Any]] = {
    "missing": lambda header, name, rng: header.pop(name),
    "extra": lambda header, name, rng: header.update(
        {rng.choice(("x", "\u202e\x1b[31m\n", "x" * 5000, "\ud800", "")): EMPTY}
    ),
    "overlap": lambda header, name, rng: header[name].update(
        data_offsets=rng.choice([entry["data_offsets"] for entry in header.values()])
    ),
    "metadata": lambda header, name, rng: header.update(
        __metadata__=rng.choice(({"a": "b"}, {"a": 1}, {"a": "x" * 100_000}, [], 7))
    ),
    "renamed": lambda header, name, rng: header.update(
        {name + rng.choice((" ", "\n", "\x00", "." + "x" * 2000, "/../..", "\x1b[2J")): header.pop(name)}
    ),
    "huge": lambda header, name, rng: header.update(dict.fromkeys(map(str, range(30_000)), EMPTY)),
    **{
        field: lambda header, name, rng, field=field: header[name].update({field: rng.choice(FIELDS[field])})
        for field in FIELDS
    },
}
LENGTHS_OF_HEADERS = (0, 1, 2**20, 2**20 + 1, 10**8, 2**31, 2**32, TOO_MUCH, 2**64 - 1)


def rewrite_header(w: Copy) -> str:
    """A safetensors file that claims to hold something else."""
    path, rng = w.file("@/optimizers.safetensors", "@/*/model.safetensors"), w.rng
    before = path.read_bytes()
    length = int.from_bytes(before[:8], "little")
    header, body = json.loads(before[8 : 8 + length]), before[8 + length :]
    name = rng.choice([name for name in header if name != "__metadata__"])
    how = rng.choice((*HEADERS, "value", "length", "text"))
    if how == "value":
        at, dtype = header[name]["data_offsets"][0], header[name]["dtype"]
        value = rng.choice((math.nan, math.inf, -math.inf, 1e30, -1.0, 0.0))
        packed = struct.pack({"F32": "<f", "F64": "<d", "I64": "<d"}[dtype], value)
        body = body[:at] + packed + body[at + len(packed) :]
    elif how in HEADERS:
        HEADERS[how](header, name, rng)
    text = json.dumps(header).encode()
    if how == "text":
        text = rng.choice((rng.randbytes(length), b'{"a":' * rng.choice((100, 125, 130, 1000, 100_000))))
    claimed = len(text) if how != "length" else rng.choice((length - 1, length + 1, *LENGTHS_OF_HEADERS))
    w.write(path, claimed.to_bytes(8, "little") + text + body, mend=0.7)
    return f"{path}: header, {how} of {name}: {json.dumps(header.get(name))[:80]}"


class Code:
    """Makes a folder if it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def plant_pickle(w: Copy) -> str:
    path, saved = w.file(), io.BytesIO()
    w.rng.choice((pickle.dump, torch.save))({"W_x": Code(w.marker)}, saved)
    if w.rng.random() < 0.5:
        w.write(path, saved.getvalue(), mend=0.7)
        return f"{path}: a pickle"
    path.with_name("pytorch_model.bin").write_bytes(saved.getvalue())
    return f"{path}: a pickle beside it"


HOSTILE = (
    "null", "true", "false", "0", "-1", "1", "2", "7", "1.5", "-0.0", "NaN", "Infinity", "-Infinity", "1e999",
    "-1e999", "9007199254740993", "9" * 30, "9" * 4000, "9" * 5000, "65536", "65537", "1000000000",
    "999999999", '""', '"x"', '"lstm"', '"gan"', '"running"', '"../../outside/victim"', '"/etc/passwd"',
    '"a\\u0000b"', '"\\ud800"', '"\\u202e\\u001b[31m\\n\\r"', '"</script><script>alert(1)</script>"',
    '"<img src=x onerror=alert(1)>"', f'"{"x" * 300}"', f'"{"x" * 100_000}"', "[]", "[0]", "{}",
    '{"a": {"b": [1, 2, {}]}}', '{"length": 1000000000000}', '{"length": -4}', '{"length": 0}',
    '{"other": 4}', f'{{"{"x" * 300}": 4}}', '{"../../outside/victim": "0"}', '{"/etc/passwd": "0"}',
    '{"a\\u0000b.json": "0"}', '{"scale": 0.0}', '{"_growth_tracker": -1, "scale": 65536.0}',
    '{"$tensor": "x"}',
)  # fmt: skip
DEPTHS = (100, 500, *range(880, 1000, 7), 2000, 100_000, 400_000)
KEYS = ("new", "class", "__class__", "step ", "\x00", "x" * 300, "../../outside/victim", "/etc/passwd",
        "lstm/../../x.json", "\ud800", "", "$tensor")  # fmt: skip
MARK = "\x01 hostile"
CHANGES: dict[str, Callable[[dict[str, Any], str, random.Random], Any]] = {
    "value": lambda parent, key, rng: parent.update({key: MARK}),
    "absent": lambda parent, key, rng: parent.pop(key),
    "one more": lambda parent, key, rng: parent.update({rng.choice(KEYS): MARK}),
    "key": lambda parent, key, rng: parent.update({rng.choice(KEYS): parent.pop(key)}),
    "whole": lambda parent, key, rng: None,
    "twice": lambda parent, key, rng: None,
}


def change_json(w: Copy) -> str:
    """A value, a key or the whole replaced by something hostile."""
    rng = w.rng
    path = w.file("config.json", "status.json", "owners/1.json", "@/*/config.json", *["@/trainer.json"] * 2)
    value, how = rng.choice((*HOSTILE, "deep")), rng.choice(("value", "value", *CHANGES))
    if value == "deep":
        depth = rng.choice(DEPTHS)
        value = rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth))
    whole = json.loads(path.read_bytes())
    parent, key = whole, rng.choice(sorted(whole))
    while isinstance(parent[key], dict) and parent[key] and rng.random() < 0.6:
        parent = parent[key]
        key = rng.choice(sorted(parent))
    CHANGES[how](parent, key, rng)
    text = json.dumps(MARK if how == "whole" else whole)
    if how == "twice":
        text = text[:-1] + f", {json.dumps(key)}: {json.dumps(MARK)}" + "}"
    data = (text := text.replace(json.dumps(MARK), value)).encode()
    if path.name == "trainer.json" and rng.random() < 0.7:
        with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
            data = w.signed(text)
    w.write(path, data, mend=0.7)
    return f"{path}: {how} of {key}: {value[:60]}"


def forge_numbers(w: Copy) -> str:
    """A trainer.json or options of the right types with extreme values."""
    rng, numbers = w.rng, (0, 1, 3, 2**31, 999_999_999, 2**53, 2**53 + 1, -1)
    if rng.random() < 0.6:
        checkpoint, number = w.checkpoint(), rng.choice(numbers)
        key = rng.choice(("generation", "metrics_lines", "processes", "step", "task", "evaluation_owed"))
        value: Any = {"task": {"length": number}, "evaluation_owed": number > 1}.get(key, number)
        w.mend(checkpoint, **{key: value})
        return f"{checkpoint}: {key} {value}"
    path = w.file("config.json", "owners/1.json")
    record = json.loads(path.read_bytes())
    options = record["environment"] if "environment" in record and rng.random() < 0.3 else record["config"]
    key = rng.choice(sorted(options))
    options[key] = rng.choice((*numbers, 1e9, 65536, str(w.outside / "folder"), "mnist", "course"))
    w.write(path, json.dumps(record).encode())
    return f"{path}: {key} {options[key]}"


LINES: dict[str, Callable[[random.Random], bytes]] = {
    "noise": lambda rng: rng.randbytes(rng.choice((1, 100, 10_000))) + b"\n" * rng.randrange(2),
    "long": lambda rng: b'{"step": 1, "a": "' + b"x" * 200_000 + b'"}\n',
    "deep": lambda rng: b"[" * rng.choice((900, 100_000)) + b"\n",
    "huge": lambda rng: b"x" * (20 << 20),
    "zeros": lambda rng: bytes(5000),
}


def change_metrics(w: Copy) -> str:
    path, rng = w.file("metrics.jsonl"), w.rng
    lines = path.read_bytes().splitlines(keepends=True)
    at, how = rng.randrange(len(lines)), rng.choice((*LINES, "value", "doubled", "removed"))
    if how == "value":
        row = json.loads(lines[at])
        row[rng.choice([*row, "new", "\x1b[31m", "<img src=x>"])] = MARK
        text = json.dumps(row).replace(json.dumps(MARK), rng.choice(HOSTILE))
        lines.insert(at, text.encode() + b"\n")
    elif how == "removed":
        del lines[at]
    else:
        lines.insert(at + rng.randrange(2), lines[at] if how == "doubled" else LINES[how](rng))
    w.write(path, b"".join(lines))
    return f"{path}: {how} at line {at + 1}: {b''.join(lines[at : at + 1])[:60]!r}"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 8, colour: int = 0, more: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    image = chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    return b"\x89PNG\r\n\x1a\n" + header + more + image + chunk(b"IEND", b"")


PICTURES: dict[str, Callable[[], bytes]] = {
    "as large as a decompression bomb": lambda: png(60_000, 60_000, 1),
    "as wide as can be": lambda: png(2**31 - 1, 1),
    "empty": lambda: png(0, 0),
    "of impossible depth": lambda: png(152, 152, 77, 9),
    "in colours": lambda: png(152, 152, 16, 6),
    "with a palette that is absent": lambda: png(152, 152, 8, 3),
    "with a text of 200 MB": lambda: png(
        152, 152, more=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200 << 20)))
    ),
    "of another format": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


def change_picture(w: Copy) -> str:
    path, how = w.file("samples/*.png"), w.rng.choice(list(PICTURES))
    w.write(path, PICTURES[how]())
    return f"{path}: a picture {how}"


def fill_with_100_megabytes(w: Copy) -> str:
    path = w.file()
    part = w.rng.choice((b'{"a":', b"[", b" ", b"\x00", b"x", b'{"a":1},', b"9"))
    w.write(path, part * ((100 << 20) // len(part)), mend=0.5)
    return f"{path}: 100 MB of {part!r}"


MUTATIONS: dict[Callable[[Copy], str], int] = {  # and how often each is drawn
    change_bytes: 10, change_json: 14, rewrite_header: 10, replace_file: 6, swap_files: 4, plant: 4,
    change_metrics: 4, move_checkpoint: 3, forge_numbers: 3, plant_pickle: 2, change_picture: 2,
    fill_with_100_megabytes: 1,
}  # fmt: skip


# Readers. Each reads a copy, and notes what it found in it.


class Enough(RunFailed):
    """All that was to be read has been."""


class Hung(BaseException):
    """A reader took too long."""


class LeftTheFolder(BaseException):
    """A reader was about to fetch data."""


class Notes:
    """What a reader has read, as far as it says."""

    def __init__(self, w: Copy) -> None:
        self._copy = w
        self.rows: list[dict[str, Any]] | None = None
        self.step: int | None = None  # that it went on from
        self.origin: int | None = STEPS[-1]  # the original checkpoint that its tensors are of
        self.problem = ""  # of other tensors

    def note(self, parts: Mapping[str, Mapping[str, Tensor]], **state: Any) -> None:
        """Look up which checkpoint these tensors are of, to the last bit, and this step and task's state."""
        w = self._copy
        for self.origin, found in w.original.checkpoints.items():
            if state.items() <= found["trainer.json"].items() and equal(parts, found):
                return
        self.origin, self.problem = None, "no checkpoint holds what was read"
        for checkpoint in w.run.glob("checkpoints/[0-9]*") if w.forged else ():
            with suppress(Exception):  # not one that can be read
                found = content(checkpoint)
                if state.items() <= found["trainer.json"].items() and equal(parts, found):
                    self.problem = malformed(found, w.original)
                    return


def equal(parts: Mapping[str, Mapping[str, Tensor]], found: Mapping[str, Mapping[str, Tensor]]) -> bool:
    return all(
        tensors.keys() == found[file].keys()
        and all(same(tensor, found[file][name]) for name, tensor in tensors.items())
        for file, tensors in parts.items()
    )


def same(a: Tensor, b: Tensor) -> bool:
    bits = {4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.detach().view(bits), b.view(bits))


def malformed(found: Mapping[str, Any], original: Original) -> str:
    """What a reader could have noticed in a checkpoint whose digests are right."""
    trainer = found["trainer.json"]
    counts = [trainer.get(key) for key in ("step", "processes", "metrics_lines", "generation")]
    if not all(type(n) is int and 0 <= n <= 2**53 for n in counts) or not (counts[1] and counts[3]):
        return f"counts {counts}"
    tasks = {"lstm": [{"length": n} for n in LENGTHS], "gan": [{}]}[original.name]
    if trainer.get("task") not in tasks or type(trainer.get("evaluation_owed")) is not bool:
        return f"state {trainer}"
    for file, expected in original.checkpoints[STEPS[-1]].items():
        for name, wanted in expected.items() if file != "trainer.json" else ():
            tensor = found[file][name]
            if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
                return f"{file}: {name} is {tensor.dtype} {tuple(tensor.shape)}"
            if not tensor.isfinite().all():
                return f"{file}: {name} is not finite"
    return ""


def status(w: Copy, notes: Notes) -> None:
    """What a batch script asks."""
    run = RunDir(w.run)
    run.check_fits(w.original.name, w.original.config)
    run.newest_step()
    lease.newest_generation(w.run / "owners")
    run.read_status()
    notes.rows = list(run.read_metrics())


def reported(w: Copy, notes: Notes) -> None:
    """launch/report.py."""
    write_report((w.run,), out := w.folder / "report.html")
    page = out.read_text()
    assert len(re.findall(r"<script(?! type=\"application/json\")", page)) == 1, "a script of another's"
    assert "<img src=x" not in page, "HTML of another's"


def loaded(w: Copy, notes: Notes, path: str = "") -> None:
    """What a program of one's own loads."""
    name, weights = w.rng.choice((("generator_ema", "averaged"), ("generator", "raw")))
    generator = load_generator(w.run / path, weights)
    notes.note({f"{name}/model.safetensors": generator.state_dict()})


def loaded_checkpoint(w: Copy, notes: Notes) -> None:
    loaded(w, notes, "checkpoints/000000006")


def sampled(w: Copy, notes: Notes) -> None:
    """launch/sample.py tensor."""
    out = w.folder / "out.safetensors"
    try:
        TensorFile(w.run, count=2, out=out).draw()
    except BaseException:
        assert not out.exists(), "a refusal has written a picture"
        raise
    notes.note({"images": load_file(out)})


def evaluated(w: Copy, notes: Notes) -> None:
    """launch/evaluate.py, as far as it reads the run."""

    def load(folder: Path, expected: type[Any]) -> Any:
        generator = load_model(folder, expected)
        notes.note({f"{folder.name}/model.safetensors": generator.state_dict()})
        return generator

    with mock.patch.multiple(generators, load_model=load, load_images=mock.Mock(side_effect=Enough)):
        generators.measure(w.run, 1000, 0, "averaged", None, Path("data"))


def audited(w: Copy, notes: Notes) -> None:
    """launch/audit.py: what it accepts, it has found equal to the last bit."""
    audit(w.run, None, None, from_start=False)


def resumed(w: Copy, notes: Notes) -> None:
    """launch/lstm.py and launch/gan.py without their processes; only the LSTM takes a step."""
    task_type: Any = find_task(w.original.name)

    def step(task: Any, number: int, trainer: Any) -> None:
        notes.rows, notes.step = list(RunDir(w.run).read_metrics()), number
        notes.note(tensors_by_file(task), step=number, task=plain_state(task))
        if w.original.name == "gan":
            raise Enough
        task_type.step(task, number, trainer)

    config = replace(w.original.config, steps=7, run_dir=w.run)
    with StopRequest(1) as stop:
        watched = type("Watched", (task_type,), {"step": step})
        run_task(watched, config, start_accelerator(config.batch_size), stop)
    if notes.step is not None:
        newest = RunDir(w.run).newest()
        assert newest is not None and int(newest.name) == 7, "the step that was taken is lost"  # noqa: PT018
        verify_checkpoint(newest)


Reader = Callable[[Copy, Notes], None]
READERS: dict[str, tuple[Reader, ...]] = {
    "lstm": (status, reported, sampled, audited, resumed),
    "gan": (status, reported, loaded, loaded_checkpoint, sampled, evaluated, resumed),
}


# Judgement

FINE = ("refused", "set aside", "harmless", "forged", "unsigned")
BAD = ("crash", "silent acceptance", "code run", "touched", "memory", "hang", "unreadable line")
COLUMNS = (*FINE, *BAD, "grown_mib")


def snapshot(folder: Path, *, reads: bool = False) -> set[tuple[Any, ...]]:
    """What is in a folder except for locks and temporary files, which hold nothing; and when it was read."""
    found = set()
    for path in folder.rglob("*"):
        if path.suffix not in (".lock", ".tmp"):
            stat, is_folder = path.lstat(), path.is_dir() and not path.is_symlink()
            facts = (
                () if is_folder else (stat.st_ino, stat.st_size, stat.st_mtime_ns, reads and stat.st_atime)
            )
            found.add((str(path.relative_to(folder)), stat.st_mode, *facts))
    return found


def forget_reads(folder: Path) -> None:
    """Set the time of the last access to long ago: the next one is then recorded."""
    for path in folder.rglob("*"):
        os.utime(path, ns=(0, path.lstat().st_mtime_ns))


def judge(reader: Reader, w: Copy) -> tuple[str, str, int]:
    """A verdict, what speaks for it, and by how much memory grew."""
    forget_reads(w.outside)
    inside, beside = snapshot(w.run), snapshot(w.outside, reads=True)
    there = [s for s in STEPS if os.path.isdir(p := RunDir(w.run).checkpoint(s)) and not p.is_symlink()]
    notes, said, raised, trace = Notes(w), io.StringIO(), None, ""
    before = reset_peak()
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()), suppress(Enough):
            reader(w, notes)
    except (Exception, Hung, LeftTheFolder, SystemExit) as error:
        raised, trace = error, traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    grown = peak() - before
    lines = said.getvalue().splitlines() + list(getattr(raised, "lines", ()))

    def verdict() -> tuple[str, str]:
        if w.marker.exists():
            return "code run", ""
        if isinstance(raised, Hung):
            return "hang", trace
        if isinstance(raised, LeftTheFolder) or snapshot(w.outside, reads=True) != beside:
            return "touched", trace or f"{sorted(snapshot(w.outside, reads=True) ^ beside)}"
        if raised is not None and not isinstance(raised, ReportedError):
            return "crash", trace
        if grown > MEMORY or any("out of memory" in line for line in lines):
            return "memory", f"{grown >> 20} MiB; {lines}"
        for line in lines:
            if len(line) > LONGEST_LINE or not line.isprintable():
                return "unreadable line", repr(line[:300])
        if raised is not None and notes.step is None:
            if differing := sorted(snapshot(w.run) ^ inside):
                return "touched", f"by a refusal: {differing} after {lines}"
            return "refused", lines[0]
        return accepted(w, notes, there, lines, raised)

    return *verdict(), grown


def accepted(
    w: Copy, notes: Notes, there: list[int], lines: list[str], raised: BaseException | None
) -> tuple[str, str]:
    """The verdict on what a reader took for a run."""
    newest = STEPS[-1]
    before = [row for row in w.original.rows if notes.step is None or row["step"] <= notes.step]
    if not all(map(is_row, notes.rows or ())):
        return "silent acceptance", f"a row that is none among {notes.rows}"[:300]
    if notes.step == 0 and not there:
        return "harmless", "no checkpoint is there"
    if notes.origin is None:
        well_formed = w.forged and not notes.problem
        return ("forged", "") if well_formed else ("silent acceptance", f"{notes.problem}; {lines}")
    if notes.rows not in (None, before):
        return ("unsigned" if w.unsigned or w.forged else "silent acceptance"), f"rows {notes.rows}"[:500]
    if notes.origin != newest and newest in there:
        aside = (w.run / "checkpoints" / f"damaged-{newest:09d}").exists()
        if aside and any("moved to" in line and f"{newest:09d}" in line for line in lines):
            return "set aside", ""
        return ("forged" if w.forged else "silent acceptance"), f"step {notes.origin} without a word: {lines}"
    return ("harmless" if raised is None else "refused"), ""  # refused: it read, but cannot go on


def is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and all(v is None or (type(v) in (int, float) and math.isfinite(v)) for v in row.values())
    )


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Most bytes of memory held since `reset_peak`."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


# The whole


@contextmanager
def limits() -> Iterator[None]:
    """Short waits, no network, and limits to memory and time."""

    def alarm(*_: Any) -> None:
        raise Hung(f"more than {PATIENCE} s")

    def no_fetch(name: str, root: Path) -> None:
        raise LeftTheFolder(f"would fetch {name} into {root}")

    signal.signal(signal.SIGALRM, alarm)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with (
        mock.patch.multiple(lease, PATIENCE=0.01, SILENCE=0.02, HEARTBEAT=0.01),
        mock.patch.object(environment, "_git", functools.cache(environment._git)),  # two processes each time
        mock.patch.object(sampling, "CANDIDATES", 20),  # of digits to walk between: a second for the page
        mock.patch.object(fetch, "fetch", no_fetch),
    ):
        yield


def fuzz(numbers: Iterable[int], seed: int, folder: Path) -> dict[str, Any]:
    originals = {name: train(name, folder / "originals") for name in OPTIONS}
    untouched = digests(folder / "originals")
    found: dict[str, Counter[str]] = {}
    bad: list[dict[str, Any]] = []
    began, tried, largest = time.monotonic(), 0, 0
    with limits():
        for tried, number in enumerate(numbers, 1):
            w = Copy(originals, folder / "work", seed, number)
            for reader in READERS[w.original.name]:
                verdict, detail, grown = judge(reader, w)
                name = f"{w.original.name} {reader.__name__}"
                counts = found.setdefault(name, Counter())
                counts[verdict] += 1
                counts["grown_mib"], largest = max(counts["grown_mib"], grown >> 20), max(largest, peak())
                if verdict in BAD:
                    facts = {"mutation": number, "reader": name, "verdict": verdict, "what": w.done}
                    bad.append({**facts, "detail": detail})
                    print(
                        f"{verdict}: {name}, --seed {seed} --only {number}: {w.done}\n  {detail}", flush=True
                    )
    if digests(folder / "originals") != untouched:
        bad.append({"verdict": "touched", "detail": "the originals, which the mutated folders have links to"})
    return {
        "environment": as_json(environment.environment()),
        "seed": seed,
        "mutations": tried,
        "seconds": round(time.monotonic() - began),
        "peak_rss_mib": largest >> 20,
        "readers": {name: {column: counts[column] for column in COLUMNS} for name, counts in found.items()},
        "bad": bad,
    }


def digests(folder: Path) -> dict[Path, str]:
    return {path: sha256(path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def table(results: dict[str, Any]) -> str:
    rows = [("reader", *COLUMNS), *((name, *row.values()) for name, row in results["readers"].items())]
    lines = [
        f"{row[0]:24}" + "".join(f"{cell:>{len(c) + 2}}" for cell, c in zip(row[1:], COLUMNS)) for row in rows
    ]
    return "\n".join(lines) + (
        f"\n{results['mutations']} mutations in {results['seconds']} s; "
        f"peak memory {results['peak_rss_mib']} MiB; bad: {len(results['bad'])}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat this mutation")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    shm = Path("/dev/shm")
    in_memory = shm.is_dir() and shutil.disk_usage(shm).free > 2 << 30
    with tempfile.TemporaryDirectory(dir=shm if in_memory else None) as temporary:
        numbers = range(options.mutations) if options.only is None else (options.only,)
        results = fuzz(numbers, options.seed, Path(os.path.realpath(temporary)))
    print(table(results))
    if options.only is None:
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(bool(results["bad"]))
