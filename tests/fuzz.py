"""Damage and forge real run folders in thousands of ways, and read them with everything that reads a run.

    python tests/fuzz.py --mutations 10000 --seed 0

Every mutated folder goes through every reader of its task. Allowed is: a refusal in lines that a terminal can
show, which leaves the folder as it was; a checkpoint that is named and set aside for the valid one before it;
the very content that was there (harmless). Two things no reader can notice, and they are counted apart:
well-formed content whose digests a forger has mended (forged), and well-formed content of files that carry
no digest (unsigned). All else is bad: another exception, other content, code that ran,
a file touched outside the
folder, memory or time without bound.

Prints a table and writes it as JSON; exits with 1 if anything was bad. `--only N` repeats mutation N of a
seed.
"""

import argparse
import contextlib
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
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ |= {"CS324DIST_THREADS": "1", "OMP_NUM_THREADS": "1"}

import torch
from safetensors.torch import load_file
from torch import Tensor

from cs324dist import audit as audit_module
from cs324dist.data import images
from cs324dist.distributed.process import start_accelerator
from cs324dist.distributed.stop import StopRequest
from cs324dist.errors import UserError
from cs324dist.report import pictures
from cs324dist.report.page import write_report
from cs324dist.runs import checkpoints as checkpoints_module
from cs324dist.runs import environment as environment_module
from cs324dist.runs import files, lease
from cs324dist.runs import run_dir as run_dir_module
from cs324dist.runs.checkpoints import verify_checkpoint
from cs324dist.runs.models import load_model
from cs324dist.runs.run_dir import RunDir
from cs324dist.sampling.generators import latents, load_generator
from cs324dist.settings import from_json
from cs324dist.tasks import measurement
from cs324dist.tasks import run as run_module
from cs324dist.tasks.base import optimizer_tensors
from cs324dist.tasks.gan import GANSettings, GANTask
from cs324dist.tasks.lstm import LSTMSettings, LSTMTask

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "fuzz.json"
STEPS = (2, 4, 6)  # of the three checkpoints
EVERY = ("--steps", "6", "--batch-size", "8", "--checkpoint-every", "2", "--log-every", "1",
"--evaluate-every", "6",
         "--wandb", "disabled")  # fmt: skip
COMMANDS = {
    "lstm": ("launch/lstm.py", "--length", "4", "--hidden-size", "8"),
    "gan": ("launch/gan.py", "--dataset", "fake", "--latent-dim", "8", "--lr-decay", "none"),
}
PATIENCE = 20  # seconds for one reader
LARGEST_LINE = 1000  # characters of what is said
ADDRESS_SPACE = 2 << 30  # bytes that a reader may reserve
MEMORY = 600 << 20  # bytes by which a reader may grow: a GAN's checkpoint has 119 MB, and is held twice
GAN_EVERY = 8  # of so many mutations, one is of the GAN's run: its files are ten thousand times as large
SMALL = 1 << 16  # bytes; larger files of a run are linked, not copied, until they are mutated


# What is mutated


@dataclass
class Original:
    """A real run, and what every reader must find in it."""

    name: str
    path: Path
    tensors: dict[int, dict[str, dict[str, Tensor]]]
    states: dict[int, Any]
    rows: list[dict[str, Any]]
    settings: Any

    def step_of(self, read: dict[str, dict[str, Tensor]]) -> int | None:
        """The checkpoint that these tensors are of, to the last bit."""
        for step, by_file in self.tensors.items():
            if all(
                same(tensor, by_file[file][name]) for file, t in read.items() for name, tensor in t.items()
            ):
                return step
        return None


def same(a: Tensor, b: Tensor) -> bool:
    integers = {4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(integers), b.view(integers))


def launched(name: str, folder: Path) -> Original:
    path = folder / name
    command = [sys.executable, *COMMANDS[name], *EVERY, "--run-dir", str(path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, stderr=subprocess.DEVNULL)
    run, states, tensors = RunDir(path), {}, {}
    for step in STEPS:
        checkpoint = run.checkpoint(step)
        states[step] = verify_checkpoint(checkpoint)
        tensors[step] = {
            str(file.relative_to(checkpoint)): load_file(file) for file in checkpoint.rglob("*.safetensors")
        }
    settings = from_json({"lstm": LSTMSettings, "gan": GANSettings}[name], run.read_config()["settings"])
    return Original(name, path, tensors, states, run.read_metrics(), settings)


def digests(folder: Path) -> dict[str, str]:
    return {str(path): files.sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


# Mutations


@dataclass
class Workspace:
    """A copy of a run that is mutated, and a place beside it that nothing may touch."""

    original: Original
    other: Original
    folder: Path
    rng: random.Random
    done: list[str] = field(default_factory=list)
    forged: bool = False  # digests were mended
    unsigned: bool = False  # a file without a digest was changed

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def outside(self) -> Path:
        return self.folder / "outside"

    @property
    def marker(self) -> Path:
        return self.folder / "outside" / "code ran"

    def make(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.original.path, self.run, copy_function=copy_or_link)
        (self.outside / "folder").mkdir(parents=True)
        (self.outside / "victim").write_text("mine")
        (self.outside / "victim.json").write_text('{"state": "finished", "step": 6, "why": ""}')

    def checkpoint(self) -> Path:
        step = self.rng.choice((STEPS[-1],) * 4 + STEPS)
        return self.run / "checkpoints" / f"{step:09d}"

    def file(self, pattern: str = "") -> Path:
        """Some file, of one kind as likely as of another."""
        kind = pattern or self.rng.choice(
            ("model.safetensors", "optimizers.safetensors", "trainer.json", "checkpoints/*/*/config.json",
             "config.json", "metrics.jsonl", "status.json", "owners/*.json")
        )  # fmt: skip
        if kind in ("config.json", "metrics.jsonl", "status.json"):
            path = self.run / kind
        elif kind == "owners/*.json":
            path = self.run / "owners" / "1.json"
        else:
            path = self.rng.choice(sorted(self.checkpoint().rglob(kind.rpartition("/")[2])))
        self.unsigned |= "checkpoints" not in path.parts
        return regular(path)

    def rewrite(self, path: Path, content: bytes) -> None:
        path.unlink()  # it may be a link to the original
        path.write_bytes(content)

    def say(self, text: str) -> None:
        self.done.append(text.replace(str(self.run) + "/", ""))

    def mend(self, checkpoint: Path, content: dict[str, Any] | None = None) -> None:
        """Make the digests right, as a forger would."""
        if content is None:
            content = json.loads(regular(checkpoint / "trainer.json").read_bytes())
        content.pop("own_sha256", None)
        for name in content["sha256"] if isinstance(content.get("sha256"), dict) else ():
            with contextlib.suppress(OSError, ValueError):
                content["sha256"][name] = files.sha256(regular(checkpoint / name))
        own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self.rewrite(checkpoint / "trainer.json", json.dumps({**content, "own_sha256": own}).encode())
        self.forged = True
        self.say("digests mended")


def regular(path: Path) -> Path:
    """A path that a mutation may read: an earlier one may have put a pipe there."""
    if path.is_symlink() or not path.is_file():
        raise OSError(f"{path} is no file any more")
    return path


def copy_or_link(source: str, target: str) -> None:
    (shutil.copy2 if Path(source).stat().st_size < SMALL else os.link)(source, target)


Mutator = Callable[[Workspace], None]
MUTATORS: list[Mutator] = []


def mutator(weight: int) -> Callable[[Mutator], Mutator]:
    def register(mutate: Mutator) -> Mutator:
        MUTATORS.extend([mutate] * weight)
        return mutate

    return register


@mutator(10)
def changed_bytes(w: Workspace) -> None:
    rng, path = w.rng, w.file()
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content)) if rng.random() < 0.5 else rng.randrange(min(len(content), 400))
    length = rng.choice((1, 2, 8, 64, 4096))
    noise = rng.randbytes(length)
    how = rng.choice(
        ("bit", "byte", "noise", "cut", "insert", "delete", "zero", "repeat", "append", "all noise")
    )
    if how == "bit":
        content[at] ^= 1 << rng.randrange(8)
    elif how == "byte":
        content[at] = rng.randrange(256)
    elif how == "noise":
        content[at : at + length] = noise
    elif how == "cut":
        del content[rng.choice((0, 1, 7, 8, at, len(content) - 1)) :]
    elif how == "insert":
        content[at:at] = noise
    elif how == "delete":
        del content[at : at + length]
    elif how == "zero":
        content[at : at + length] = bytes(len(content[at : at + length]))
    elif how == "repeat":
        content[at:at] = content[at : at + length]
    elif how == "append":
        content += noise
    else:
        content = bytearray(rng.randbytes(rng.choice((0, 1, 100, 5000))))
    w.rewrite(path, bytes(content))
    w.say(f"{path}: {how} at {at}, {length} bytes")
    if rng.random() < 0.3 and path.parts[-1] != "trainer.json" and "checkpoints" in path.parts:
        w.mend(checkpoint_of(path))


def checkpoint_of(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.parent.name == "checkpoints")


@mutator(6)
def another_kind_of_file(w: Workspace) -> None:
    rng = w.rng
    path = w.file() if rng.random() < 0.7 else rng.choice(sorted(w.run.rglob("*")))
    w.unsigned = True
    remove(path)
    how = rng.choice(("absent", "folder", "link", "fifo", "empty"))
    if how == "folder":
        path.mkdir()
        if rng.random() < 0.5:
            (path / "inside").write_text("x")
    elif how == "link":
        targets = (w.outside / "victim", w.outside / "victim.json", w.outside / "folder",
        w.outside / "absent",
                   Path("/dev/zero"), Path("/dev/full"), path, path.with_name("status.json"))  # fmt: skip
        path.symlink_to(target := rng.choice(targets))
        how += f" to {target}"
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "empty":
        path.touch()
    w.say(f"{path}: {how}")


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


@mutator(4)
def swapped_files(w: Workspace) -> None:
    rng, path = w.rng, w.file()
    how = rng.choice(("within", "between checkpoints", "from the other run", "renamed", "doubled"))
    if how == "within":
        other = rng.choice(sorted(p for p in path.parent.rglob("*") if p.is_file()))
        temporary = w.folder / "temporary"
        path.rename(temporary)
        other.rename(path) if other.exists() else None
        temporary.rename(other)
    elif how == "between checkpoints" and "checkpoints" in path.parts:
        source = (
            w.original.path
            / "checkpoints"
            / f"{rng.choice(STEPS):09d}"
            / path.relative_to(checkpoint_of(path))
        )
        w.rewrite(path, source.read_bytes())
        if rng.random() < 0.4:
            w.mend(checkpoint_of(path))
    elif how == "from the other run":
        source = rng.choice(sorted(p for p in w.other.path.rglob(path.name) if p.is_file()))
        w.rewrite(path, source.read_bytes())
        if rng.random() < 0.4 and "checkpoints" in path.parts and path.name != "trainer.json":
            w.mend(checkpoint_of(path))
    elif how == "renamed":
        path.rename(
            path.with_name(
                rng.choice(("x.json", "MODEL.SAFETENSORS", ".hidden", "trainer.json", "pytorch_model.bin"))
            )
        )
    else:
        shutil.copy(
            path, path.with_name(rng.choice(("copy.json", "extra.safetensors", ".config.json.tmp", "2.json")))
        )
    w.say(f"{path}: {how}")


@mutator(3)
def moved_checkpoints(w: Workspace) -> None:
    rng, path = w.rng, w.checkpoint()
    name = rng.choice(("000000008", "000000004", "999999999", "0999999999", "000000000", "damaged-000000006",
                       ".000000006.1.tmp", "٠٠٠٠٠٠٠٠٩", "latest"))  # fmt: skip
    target = path.with_name(name if name != path.name else "000000010")
    remove(target)
    how = rng.choice(("renamed", "copied", "linked", "of the other run"))
    if how == "renamed":
        path.rename(target)
    elif how == "copied":
        shutil.copytree(path, target, copy_function=copy_or_link)
        if rng.random() < 0.5 and name.isdecimal():
            content = json.loads((target / "trainer.json").read_bytes())
            w.mend(target, {**content, "step": int(name)})
    elif how == "linked":
        target.symlink_to(
            rng.choice((path, w.outside / "folder", w.original.path / "checkpoints" / path.name))
        )
    else:
        shutil.copytree(w.other.path / "checkpoints" / f"{STEPS[-1]:09d}", target, copy_function=copy_or_link)
    w.say(f"{path}: {how} to {name}")


@mutator(4)
def planted(w: Workspace) -> None:
    """Things where the project is about to write."""
    rng, run = w.rng, w.run
    names = (".config.json.tmp", ".status.json.tmp", ".metrics.jsonl.tmp", "owners/.2.json.tmp",
    "owners/2.json",
             "owners/2.lock", "owners/1.lock", "owners/999999999.json", "owners/1000000000.json",
             "owners/999999998.json",
             "checkpoints/.000000007.2.tmp", "checkpoints/000000007", "checkpoints/.000000007.99.tmp",
             "checkpoints/damaged-000000006", "samples/000000007.png", "samples/.000000007.png.tmp", "wandb",
             "evaluation.json", ".evaluation.json.tmp",
             "checkpoints/.000000007.2.tmp/.trainer.json.tmp")  # fmt: skip
    path = run / rng.choice(names)
    path.parent.mkdir(exist_ok=True)
    remove(path)
    how = rng.choice(
        ("link to a file", "link to a folder", "dangling link", "file", "folder", "full folder", "fifo")
    )
    if how.endswith("link") or how.startswith("link"):
        target = {"link to a file": "victim", "link to a folder": "folder", "dangling link": "absent"}[how]
        path.symlink_to(w.outside / target)
    elif how == "file":
        path.write_text("x")
    elif how == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
        if how == "full folder":
            (path / "inside").write_text("x")
    w.unsigned = True
    w.say(f"{path}: planted {how}")
    if rng.random() < 0.5:  # so that the newest is set aside
        trainer = run / "checkpoints" / "000000006" / "trainer.json"
        w.rewrite(trainer, b"{")
        w.say("and the newest trainer.json is damaged")


@mutator(10)
def rewritten_header(w: Workspace) -> None:
    """A safetensors file that claims to hold something else."""
    rng, path = w.rng, w.file("*.safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    entry = header[name]
    text: bytes | None = None
    how = rng.choice(("length", "shape", "dtype", "offsets", "missing", "extra", "overlap", "noise",
                      "metadata",
                      "nested", "value", "renamed", "huge", "same"))  # fmt: skip
    if how == "shape":
        entry["shape"] = rng.choice(([], [0], [1], [-1], [2**63], [65536, 65536], [2**32, 2**32], [1.5],
                                     ["4"], "4", None,
                                     [1] * 1000, [*entry["shape"], 1], entry["shape"][::-1],
                                     [True]))  # fmt: skip
    elif how == "dtype":
        entry["dtype"] = rng.choice(
            ("F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "X", "", None, 7)
        )
    elif how == "offsets":
        entry["data_offsets"] = rng.choice(([0, 0], [0, 2**63], [-8, 8], [8, 0], [0, 2**70], [], [1], "x",
                                            None,
                                            [0, len(body) + 1], [len(body), len(body) * 2]))  # fmt: skip
    elif how == "missing":
        del header[name]
    elif how == "extra":
        header[rng.choice(("x", "\u202e\x1b[31m\n", "x" * 5000, "\ud800", ""))] = {
            **entry,
            "shape": [0],
            "data_offsets": [len(body)] * 2,
        }
    elif how == "overlap":
        entry["data_offsets"] = header[rng.choice(names)]["data_offsets"]
    elif how == "noise":
        text = rng.randbytes(length)
    elif how == "metadata":
        header["__metadata__"] = rng.choice(({"a": "b"}, {"a": 1}, {"a": "x" * 100_000}, [], 7))
    elif how == "nested":
        text = b'{"a":' * rng.choice((100, 120, 130, 1000, 100_000))
    elif how == "value":
        at, size = entry["data_offsets"][0], {"F32": 4, "F64": 8, "I64": 8}[entry["dtype"]]
        value = rng.choice((math.nan, math.inf, -math.inf, 1e30, -1.0, 0.0))
        packed = {4: struct.pack("<f", value), 8: struct.pack("<d", value)}[size]
        body = body[:at] + packed + body[at + size :]
    elif how == "renamed":
        header[name + rng.choice(("", " ", "\n", "\x00", "." + "x" * 2000, "/../..", "\x1b[2J"))] = (
            header.pop(name)
        )
    elif how == "huge":
        header |= {
            f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [len(body)] * 2} for i in range(30_000)
        }
    text = json.dumps(header).encode() if text is None else text
    claimed = len(text)
    if how == "length":
        claimed = rng.choice(
            (0, 1, length - 1, length + 1, 2**20, 2**20 + 1, 10**8, 2**31, 2**32, 2**63, 2**64 - 1)
        )
    w.rewrite(path, claimed.to_bytes(8, "little") + text + body)
    w.say(f"{path}: header {how} of {name}: {json.dumps(header.get(name))[:80]}")
    if rng.random() < 0.7:
        w.mend(checkpoint_of(path))


class Code:
    """Makes a file if it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@mutator(2)
def renamed_pickle(w: Workspace) -> None:
    path = w.file()
    content = io.BytesIO()
    if w.rng.random() < 0.5:
        torch.save({"W_x": Code(w.marker)}, content)
    else:
        pickle.dump(Code(w.marker), content)
    how = w.rng.choice(("replaced", "pytorch_model.bin beside it"))
    if how == "replaced":
        w.rewrite(path, content.getvalue())
        if "checkpoints" in path.parts and path.name != "trainer.json" and w.rng.random() < 0.7:
            w.mend(checkpoint_of(path))
    else:
        path.with_name("pytorch_model.bin").write_bytes(content.getvalue())
    w.say(f"{path}: a pickle, {how}")


HOSTILE = (
    "null", "true", "false", "0", "-1", "1", "2", "7", "1.5", "-0.0", "NaN", "Infinity", "-Infinity",
    "1e999", "-1e999",
    "9007199254740993", "9" * 30, "9" * 4000, "9" * 5000, "65536", "65537", "1000000000", "999999999", '""',
    '"x"', '"lstm"',
    '"gan"', '"running"', '"../../outside/victim"', '"/etc/passwd"', '"a\\u0000b"', '"\\ud800"',
    '"\\u202e\\u001b[31m\\n\\r"',
    f'"{"x" * 300}"', f'"{"x" * 100_000}"', "[]", "[0]", "{}", '{"a": {"b": [1, 2, {}]}}',
    '{"length": 1000000000000}',
    '{"length": -4}', '{"length": 0}', "{\"other\": 4}", f'{{"{"x" * 300}": 4}}',
    '{"../../outside/victim": "0"}', '{"/etc/passwd": "0"}',
    '{"a\\u0000b.json": "0"}', '{"scale": 0.0}', '{"_growth_tracker": -1, "scale": 65536.0}', "DEEP",
)  # fmt: skip
PLACEHOLDER = "\x01 hostile"


@mutator(14)
def mutated_json(w: Workspace) -> None:
    """A value, a key or the whole replaced by something hostile."""
    rng = w.rng
    path = w.file(
        rng.choice(
            (
                "trainer.json",
                "trainer.json",
                "checkpoints/*/*/config.json",
                "config.json",
                "status.json",
                "owners/*.json",
            )
        )
    )
    if path.name == "config.json" and path.parent != w.run:
        path = path  # a model's
    value = rng.choice(HOSTILE)
    if value == "DEEP":
        depth = rng.choice((100, 500, *range(880, 1000, 7), 2000, 100_000, 400_000))
        value = rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth))
    content = json.loads(path.read_bytes())
    where, parent = [], content
    while True:
        key = rng.choice(sorted(parent)) if parent else "new"
        where.append(key)
        if not isinstance(parent.get(key), dict) or rng.random() < 0.4:
            break
        parent = parent[key]
    how = rng.choice(("value", "value", "value", "absent", "one more", "key", "whole", "twice"))
    own = content.get("own_sha256")
    if how == "value":
        parent[key] = PLACEHOLDER
    elif how == "absent":
        del parent[key]
    elif how == "one more":
        parent[rng.choice(("new", "class", "__class__", "step ", "\x00", "x" * 300))] = PLACEHOLDER
    elif how == "key":
        parent[
            rng.choice(("../../outside/victim", "/etc/passwd", "lstm/../../x.json", "new", "\ud800", ""))
        ] = parent.pop(key)
    text = json.dumps(content)
    if how == "whole":
        text = json.dumps(PLACEHOLDER)
    elif how == "twice":
        text = text[:-1] + f", {json.dumps(str(key))}: {json.dumps(PLACEHOLDER)}" + "}"
    text = text.replace(json.dumps(PLACEHOLDER), value)
    w.say(f"{path}: {how} of {'.'.join(map(str, where))}: {value[:60]}")
    mended = "checkpoints" in path.parts and rng.random() < 0.7
    if mended and path.name == "trainer.json":
        with contextlib.suppress(ValueError, RecursionError):
            forged = json.loads(text)
            if isinstance(forged, dict) and own:
                forged.pop("own_sha256", None)
                digest = hashlib.sha256(json.dumps(forged, sort_keys=True).encode()).hexdigest()
                text = text.replace(own, digest)
                w.forged = True
                w.say("own digest mended")
    w.rewrite(path, text.encode())
    if mended and path.name != "trainer.json":
        w.mend(checkpoint_of(path))


@mutator(3)
def plausible_forgery(w: Workspace) -> None:
    """A trainer.json or a setting of the right types with extreme values."""
    rng = w.rng
    numbers = (0, 1, 3, 2**31, 999_999_999, 2**53, 2**53 + 1, -1)
    if rng.random() < 0.6:
        checkpoint = w.checkpoint()
        content = json.loads((checkpoint / "trainer.json").read_bytes())
        key = rng.choice(("generation", "metrics_lines", "world_size", "step", "counters"))
        content[key] = {"length": rng.choice(numbers)} if key == "counters" else rng.choice(numbers)
        w.say(f"{checkpoint}: {key} {content[key]}")
        w.mend(checkpoint, content)
        return
    path = w.file("config.json")
    content = json.loads(path.read_bytes())
    key = rng.choice(sorted(content["settings"]))
    value = rng.choice((*numbers, 1e9, 65536, str(w.outside / "folder"), "mnist", "report", "equations"))
    content["settings"][key] = value
    w.rewrite(path, json.dumps(content).encode())
    w.say(f"config.json: {key} {value}")


@mutator(4)
def noise_in_metrics(w: Workspace) -> None:
    rng, path = w.rng, w.file("metrics.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    row = json.loads(rng.choice(lines))
    at = rng.randrange(len(lines) + 1)
    how = rng.choice(("noise", "long", "value", "doubled", "deep", "removed", "huge", "zeros"))
    if how == "value":
        row[rng.choice([*row, "new", "\x1b[31m"])] = PLACEHOLDER
        value = rng.choice([value for value in HOSTILE if value != "DEEP"])
        new = json.dumps(row).replace(json.dumps(PLACEHOLDER), value).encode() + b"\n"
    elif how == "removed":
        new, lines[at : at + 1] = b"", []
    else:
        new = {
            "noise": rng.randbytes(rng.choice((1, 100, 10_000))) + b"\n" * rng.randrange(2),
            "long": b'{"step": 1, "a": "' + b"x" * 200_000 + b'"}\n',
            "doubled": lines[at % len(lines)],
            "deep": b"[" * rng.choice((900, 100_000)) + b"\n",
            "huge": b"x" * (20 << 20),
            "zeros": bytes(5000),
        }[how]
    w.rewrite(path, b"".join([*lines[:at], new, *lines[at:]]))
    w.say(f"{path}: {how} at line {at + 1}: {new[:60]!r}")


@mutator(1)
def a_hundred_megabytes(w: Workspace) -> None:
    path, rng = w.file(), w.rng
    path.unlink()
    part = rng.choice((b'{"a":', b"[", b" ", b"\x00", b"x", b'{"a":1},', b"9"))
    with path.open("wb") as file:
        for _ in range(100):
            file.write(part * ((1 << 20) // len(part)))
    w.say(f"{path}: 100 MB of {part!r}")
    if "checkpoints" in path.parts and path.name != "trainer.json" and rng.random() < 0.5:
        w.mend(checkpoint_of(path))


def mutated(originals: dict[str, Original], folder: Path, seed: int, number: int) -> Workspace:
    rng = random.Random(f"{seed}/{number}")
    names = ("gan", "lstm") if number % GAN_EVERY == 0 else ("lstm", "gan")
    workspace = Workspace(*(originals[name] for name in names), folder, rng)
    workspace.make()
    wanted = rng.choice((1, 1, 1, 2))
    while len(workspace.done) < wanted:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            rng.choice(MUTATORS)(workspace)  # which a mutation before may have made impossible
    return workspace


# Readers: each returns what it read as {file: {tensor: …}}, and the rows of metrics where it reads them


@dataclass
class Read:
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rows: list[dict[str, Any]] | None = None
    state: Any = None
    checkpoint: Path | None = None
    went_on: bool = False


class Readers:
    def __init__(self, originals: dict[str, Original]) -> None:
        self.accelerator = start_accelerator(8)
        self.tasks = {
            name: {"lstm": LSTMTask, "gan": GANTask}[name](originals[name].settings, self.accelerator)
            for name in originals
        }
        self.counters = {name: dict(task.counters) for name, task in self.tasks.items()}
        self.sample = runpy.run_path(str(REPOSITORY / "launch" / "sample.py"), run_name="sample")
        self.of = {
            "lstm": (self.status, self.reported, self.sampled, self.audited, self.resumed),
            "gan": (
                self.status,
                self.reported,
                self.loaded,
                self.loaded_checkpoint,
                self.sampled,
                self.evaluated,
                self.resumed,
            ),
        }
        self.read = Read()

    def live(self, name: str) -> dict[str, dict[str, Tensor]]:
        task = self.tasks[name]
        return checkpoints_module.tensors_by_file(task.models, optimizer_tensors(task))

    @torch.no_grad()
    def zeroed(self, name: str) -> Any:
        for tensors in self.live(name).values():
            torch._foreach_zero_(list(tensors.values()))
        task = self.tasks[name]
        task.counters.clear()
        task.counters.update(self.counters[name])
        return task

    def status(self, w: Workspace) -> None:
        """What a batch script and a report ask."""
        run = RunDir(w.run)
        run.check_fits(w.original.name, lambda stored: [])
        config = run.read_config()
        assert isinstance(config, dict)
        lease.newest_generation(w.run / "owners")
        run.newest_step()
        self.read = Read(rows=run.read_metrics())

    def reported(self, w: Workspace) -> None:
        """launch/report.py; the walk is between any two images, as to find digits takes a second."""

        def any_two(generator: Any, dataset: str) -> tuple[Tensor, Tensor, str]:
            return *latents(generator, 0, 0, 2), "from one image to another"

        out = w.folder / "report.html"
        with mock.patch.multiple(pictures, walk_ends=any_two, WALK_FRAMES=2):
            write_report((w.run,), out)
        scripts = re.findall(r"<script(?! type=\"application/json\")", out.read_text())
        assert len(scripts) == 1, "the page holds a script that is not its own"
        out.unlink()

    def loaded(self, w: Workspace) -> None:
        self._generator(w, load_generator, w.run, w.rng.choice(("averaged", "raw")))

    def loaded_checkpoint(self, w: Workspace) -> None:
        self._generator(
            w, load_generator, w.run / "checkpoints" / "000000006", w.rng.choice(("averaged", "raw"))
        )

    def _generator(self, w: Workspace, load: Callable[..., Any], path: Path, weights: str) -> Any:
        generator = load(path, weights)
        name = "generator_ema" if weights == "averaged" else "generator"
        self.read = Read({f"{name}/model.safetensors": dict(generator.state_dict())})
        return generator

    def sampled(self, w: Workspace) -> None:
        """launch/sample.py tensor."""
        load = functools.partial(self._generator, w, load_generator)
        draw = self.sample["TensorFile"].draw
        out = w.folder / "out.safetensors"
        with mock.patch.dict(draw.__globals__, {"load_generator": load}):
            try:
                draw(self.sample["TensorFile"](w.run, count=2, out=out))
            except BaseException:
                assert not out.exists(), "a refusal has written a picture"
                raise

    def evaluated(self, w: Workspace) -> None:
        """launch/evaluate.py, as far as it reads the run."""

        def load(folder: Path, expected: type[Any]) -> Any:
            generator = load_model(folder, expected)
            self.read = Read({f"{folder.name}/model.safetensors": dict(generator.state_dict())})
            return generator

        def no_images(*_: Any) -> None:
            raise Enough

        with (
            mock.patch.multiple(measurement, load_model=load, load_images=no_images),
            contextlib.suppress(Enough),
        ):
            measurement.measure(w.run, 1000, 0, "averaged", None, Path("data"))

    def audited(self, w: Workspace) -> None:
        """launch/audit.py, all of it: what it accepts, it has found equal to the last bit."""
        with contextlib.redirect_stdout(io.StringIO()):
            audit_module.audit(w.run, None, from_start=False)

    def resumed(self, w: Workspace) -> None:
        """launch/lstm.py and launch/gan.py, but for their processes; the LSTM also goes on for a step."""
        name, honest = w.original.name, run_module.train
        settings = replace(w.original.settings, steps=7, run_dir=w.run)

        def train(task: Any, run: RunDir, accelerator: Any, stop: Any, start: Any) -> int | None:
            tensors = {
                file: {n: t.clone() for n, t in part.items()} for file, part in self.live(name).items()
            }
            self.read = Read(tensors, run.read_metrics(), start, run.checkpoint(start.step), went_on=True)
            return honest(task, run, accelerator, stop, start) if name == "lstm" else None

        def build(settings: Any, accelerator: Any) -> Any:
            task = self.zeroed(name)
            task.settings = settings
            return task

        with mock.patch.object(run_module, "train", train), StopRequest(1) as stop:
            run_module.run_to_the_end(name, build, settings, self.accelerator, stop)


class Enough(Exception):
    """All that was to be read has been."""


class Hung(BaseException):
    """A reader took too long."""


class LeftTheFolder(BaseException):
    """A reader was about to fetch data into a place that the run names."""


# Judgement

VERDICTS = ("refused", "set aside", "harmless", "forged", "unsigned")
BAD = ("crash", "silent acceptance", "code run", "touched", "memory", "hang", "unreadable line", "lost")


def snapshot(folder: Path) -> dict[str, Any]:
    """What is in a folder, but for lock files, which hold nothing, and names of files half written."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".lock", ".tmp"):
            stat = path.lstat()
            about = (
                ()
                if path.is_dir() and not path.is_symlink()
                else (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            )
            found[str(path.relative_to(folder))] = (stat.st_mode, *about)
    return found


def judged(readers: Readers, reader: Callable[[Workspace], None], w: Workspace) -> tuple[str, str, int]:
    """A verdict, what speaks for it, and by how much memory grew."""
    inside, beside = snapshot(w.run), snapshot(w.outside)
    there = [step for step in STEPS if is_folder(w.run / "checkpoints" / f"{step:09d}")]
    readers.read, said, raised, trace = Read(), io.StringIO(), None, ""
    readers.zeroed(w.original.name)
    before = reset_peak()
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            reader(w)
    except (Exception, Hung, LeftTheFolder, SystemExit) as error:
        raised, trace = error, traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    grown = peak() - before
    read = readers.read
    lines = said.getvalue().splitlines() + (list(raised.lines) if isinstance(raised, UserError) else [])

    def verdict() -> tuple[str, str]:
        if w.marker.exists():
            return "code run", ""
        if isinstance(raised, Hung):
            return "hang", trace
        if isinstance(raised, LeftTheFolder) or snapshot(w.outside) != beside:
            return "touched", f"{raised or sorted(set(snapshot(w.outside).items()) ^ set(beside.items()))}"
        if raised is not None and not isinstance(raised, UserError):
            return "crash", trace
        if grown > MEMORY or any("out of memory" in line for line in lines):
            return "memory", f"{grown >> 20} MiB; {lines}"
        for line in lines:
            if len(line) > LARGEST_LINE or not line.isprintable():
                return "unreadable line", repr(line[:300])
        if raised is not None and not read.went_on:
            if differing := sorted(set(snapshot(w.run).items()) ^ set(inside.items())):
                return "touched", f"in a refusal: {differing} after {lines}"
            return "refused", lines[0]
        return accepted(w, read, there, lines, raised)

    return *verdict(), grown


def accepted(
    w: Workspace, read: Read, there: list[int], lines: list[str], raised: UserError | None
) -> tuple[str, str]:
    step = w.original.step_of(read.tensors) if read.tensors else STEPS[-1]
    rows = [row for row in w.original.rows if read.state is None or row["step"] <= read.state.step]
    same_rows = read.rows is None or read.rows == rows
    if read.rows is not None and not all(well_formed_row(row) for row in read.rows):
        return "silent acceptance", f"a row that is none among {read.rows}"[:300]
    if read.went_on and w.original.name == "lstm" and raised is None:
        newest = RunDir(w.run).newest()
        if newest is None or int(newest.name) != 7:
            return "lost", f"the step that was taken is in no checkpoint: the newest is {newest}; {lines}"
        verify_checkpoint(newest)
    same_state = read.state is None or (
        step in w.original.states
        and replace(read.state, generation=1) == replace(w.original.states[step], generation=1)
    )
    if read.state is not None and read.state.step == 0 and not there:
        return "harmless", "no checkpoint is there"
    if step is None or not same_state:
        where = read.checkpoint or w.run / "checkpoints" / "000000006"
        if not w.forged:
            return "silent acceptance", f"other tensors or state {read.state}; {lines}"
        if problem := malformed(where, w.original):
            return "silent acceptance", f"{problem}; {lines}"
        return "forged", ""
    if not same_rows:
        return (
            ("unsigned", "") if w.unsigned or w.forged else ("silent acceptance", f"rows {read.rows}"[:500])
        )
    if step != STEPS[-1] and STEPS[-1] in there:
        aside = (w.run / "checkpoints" / "damaged-000000006").exists()
        named = any("moved to" in line and "000000006" in line for line in lines)
        if aside and named:
            return "set aside", ""
        return ("forged", "") if w.forged else ("silent acceptance", f"step {step} without a word: {lines}")
    return ("harmless" if raised is None else "refused"), ""  # refused: what stands in the way of going on


def is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def well_formed_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and all(v is None or (type(v) in (int, float) and math.isfinite(v)) for v in row.values())
    )


def malformed(checkpoint: Path, original: Original) -> str:
    """What a reader could have noticed in a checkpoint whose digests are right, found without the project."""
    content = json.loads((checkpoint / "trainer.json").read_bytes())
    counts = [content.get(key) for key in ("step", "world_size", "metrics_lines")]
    if not all(type(n) is int and 0 <= n <= 2**53 for n in counts) or content["world_size"] < 1:
        return f"counts {counts}"
    lengths = {"lstm": [{"length": n} for n in range(1, 5)], "gan": [{}]}[original.name]
    if content.get("counters") not in lengths:
        return f"counters {content.get('counters')}"
    for name, expected in original.tensors[STEPS[-1]].items():
        for tensor_name, tensor in load_file(checkpoint / name).items():
            wanted = expected.get(tensor_name)
            if wanted is None or tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
                return f"{name}: {tensor_name} is {tensor.dtype} {tuple(tensor.shape)}"
            if not tensor.isfinite().all():
                return f"{name}: {tensor_name} is not finite"
    return ""


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Most bytes of memory held since `reset_peak`."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


# The whole


@contextlib.contextmanager
def prepared(originals: dict[str, Original]) -> Iterator[None]:
    """Short waits, digests of the originals remembered, a limit to memory and time, no network."""
    known: dict[tuple[int, ...], str] = {}
    honest = files.sha256

    def sha256(path: Path) -> str:
        key = ((stat := path.stat()).st_ino, stat.st_size, stat.st_mtime_ns)
        return known.get(key) or honest(path)

    for original in originals.values():
        for path in original.path.rglob("*.safetensors"):
            stat = path.stat()
            if stat.st_size >= SMALL:
                known[stat.st_ino, stat.st_size, stat.st_mtime_ns] = honest(path)

    def alarm(*_: Any) -> None:
        raise Hung(f"more than {PATIENCE} s")

    def fetch(name: str, root: Path, *_: Any, **__: Any) -> None:
        raise LeftTheFolder(f"would fetch {name} into {root}")

    signal.signal(signal.SIGALRM, alarm)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    environment = functools.cache(environment_module.environment)
    with (
        mock.patch.multiple(lease, PATIENCE=0.01, SILENCE=0.02, HEARTBEAT=0.01),
        mock.patch.object(checkpoints_module, "sha256", sha256),
        mock.patch.object(run_dir_module, "environment", environment),
        mock.patch.object(images, "fetch", fetch),
    ):
        yield


def fuzz(mutations: range, seed: int, folder: Path) -> dict[str, Any]:
    originals = {name: launched(name, folder / "originals") for name in COMMANDS}
    untouched = digests(folder / "originals")
    readers = Readers(originals)
    tables: dict[str, Counter[str]] = {}
    peaks: Counter[str] = Counter()
    bad = []
    began, largest = time.monotonic(), 0
    with prepared(originals):
        for number in mutations:
            w = mutated(originals, folder / "work", seed, number)
            for reader in readers.of[w.original.name]:
                verdict, detail, grown = judged(readers, reader, w)
                name = f"{w.original.name} {reader.__name__}"
                tables.setdefault(name, Counter())[verdict] += 1
                peaks[name], largest = max(peaks[name], grown), max(largest, peak())
                if verdict in BAD:
                    bad.append(
                        {
                            "mutation": number,
                            "reader": name,
                            "verdict": verdict,
                            "what": w.done,
                            "detail": detail,
                        }
                    )
                    print(
                        f"{verdict}: {name}, --seed {seed} --only {number}: {'; '.join(w.done)}\n  {detail}",
                        flush=True,
                    )
            if sys.stderr.isatty() and number % 50 == 0:
                print(f"\r{number}", end="", file=sys.stderr)
    if digests(folder / "originals") != untouched:
        bad.append({"verdict": "touched", "detail": "the originals, which the mutated folders have links to"})
    return {
        "environment": environment_module.environment(),
        "seed": seed,
        "mutations": len(mutations),
        "seconds": round(time.monotonic() - began),
        "peak_rss_mib": largest >> 20,
        "readers": {
            name: {**{v: counts[v] for v in (*VERDICTS, *BAD)}, "grown_mib": peaks[name] >> 20}
            for name, counts in tables.items()
        },
        "bad": bad,
    }


def table(results: dict[str, Any]) -> str:
    columns = (*VERDICTS, *BAD, "grown_mib")
    lines = [
        "".join(
            [f"{'reader':24}{'tried':>7}", *(f"{c.replace('_', ' '):>{max(8, len(c) + 2)}}" for c in columns)]
        )
    ]
    for name, row in results["readers"].items():
        tried = sum(row[v] for v in (*VERDICTS, *BAD))
        lines.append("".join([f"{name:24}{tried:7}", *(f"{row[c]:>{max(8, len(c) + 2)}}" for c in columns)]))
    lines.append(
        f"{results['mutations']} mutations in {results['seconds']} s; "
        f"peak memory {results['peak_rss_mib']} MiB; bad: {len(results['bad'])}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat this mutation")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    in_memory = (
        "/dev/shm" if Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").free > 2 << 30 else None
    )
    with tempfile.TemporaryDirectory(dir=in_memory) as temporary:
        tried = range(options.mutations) if options.only is None else range(options.only, options.only + 1)
        results = fuzz(tried, options.seed, Path(temporary))
    print(table(results))
    if options.only is None:
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(bool(results["bad"]))
