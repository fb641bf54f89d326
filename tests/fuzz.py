"""Damage real run folders in thousands of ways, and read them with everything that reads a run.

    python tests/fuzz.py --mutations 10000 --seed 0

What may come of it:

refused     an error in lines that a terminal can show; the folder stays as it was
set aside   the damaged checkpoint is named and moved, and the valid one before it is used
harmless    what was read is what was there before the mutation
forged      well-formed content whose digests were corrected: no reader can tell
unsigned    well-formed content of a file without a digest: no reader can tell

All else is bad: a traceback, other content, code that ran, a file outside the folder that was written.
Prints the counts, writes them as JSON, and exits with 1 if anything was bad. `--only N` repeats mutation N of
a seed.
"""

import argparse
import hashlib
import io
import json
import math
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ |= {"CS324DIST_THREADS": "1", "OMP_NUM_THREADS": "1"}

import torch
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cs324dist.audit import audit
from cs324dist.config import as_json
from cs324dist.distributed.process import start_accelerator
from cs324dist.errors import errors_as_exit_codes
from cs324dist.loop import run_task
from cs324dist.report.page import write_report
from cs324dist.runs import checkpoints, environment, history, lease
from cs324dist.runs.run_dir import RunDir
from cs324dist.tasks import find_task
from cs324dist.tasks.gan import sampling
from cs324dist.tasks.gan.networks import Generator
from cs324dist.tasks.gan.sampling import load_generator

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "fuzz.json"
TensorFile = runpy.run_path(str(REPOSITORY / "launch" / "sample.py"), run_name="sample")["TensorFile"]

COMMON = (
    "--steps 6 --batch-size 8 --checkpoint-every 2 --log-every 1 --evaluate-every 6 --schedule constant "
    "--wandb disabled"
)
OPTIONS = {"lstm": f"{COMMON} --length 6 --hidden-size 8", "gan": f"{COMMON} --dataset fake --latent-dim 8"}
STATES = ({}, {"length": 4}, {"length": 5}, {"length": 6})  # that the tasks can be in
STEPS = (2, 4, 6)  # of the three checkpoints
NEWEST = f"{STEPS[-1]:09d}-1"
GAN_EVERY = 8  # of so many mutations, one is of the GAN's run: its files are ten thousand times as large
SMALL = 1 << 16  # bytes; larger files of a run are linked, not copied, until they are mutated


# Runs, and copies of them


def train(name: str, path: Path) -> SimpleNamespace:
    """A real run, and what every reader must find in it."""
    command = [sys.executable, f"launch/{name}.py", *OPTIONS[name].split(), "--run-dir", path]
    subprocess.run(command, cwd=REPOSITORY, check=True, stderr=subprocess.DEVNULL)
    run, config_type = RunDir(path), type(find_task(name).presets["fast"])
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    found = {step: content(run.checkpoint(step)) for step in STEPS}
    config = run.read_config(config_type)
    return SimpleNamespace(name=name, path=path, config=config, rows=rows, checkpoints=found)


def content(checkpoint: Path) -> dict[str, Any]:
    """The facts of a checkpoint's tensors by file, of what its averaged generator draws, and trainer.json."""
    files = sorted(checkpoint.rglob("*.safetensors"))
    tensors = {str(path.relative_to(checkpoint)): load_file(path) for path in files}
    if weights := tensors.get("generator_ema/model.safetensors"):
        (generator := Generator(8).eval()).load_state_dict(weights)
        with torch.no_grad():
            tensors["images"] = {"images": generator(sampling.latents(generator, 0, 2))}
    trainer = json.loads((checkpoint / "trainer.json").read_bytes())
    return {**{file: facts(part) for file, part in tensors.items()}, "trainer.json": trainer}


def facts(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    """Type, shape, and a digest of the bits."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return {name: (tensor.dtype, tensor.shape, sha256(tensor.numpy())) for name, tensor in contiguous.items()}


def own(path: Path) -> Path:
    """A file that may be replaced: an earlier mutation may have put a link there."""
    if os.path.realpath(path) != str(path) or not path.is_file():
        raise OSError(f"{path} is no file any more")
    return path


def words(text: str) -> list[str]:
    return text.split()


def sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def copy_or_link(source: str, target: str) -> None:
    (shutil.copy2 if Path(source).stat().st_size < SMALL else os.link)(source, target)


class Copy:
    """A mutated copy of a run, a place beside it that nothing may write, and what a reader found."""

    def __init__(
        self, originals: Mapping[str, SimpleNamespace], folder: Path, seed: int, number: int
    ) -> None:
        self.rng = random.Random(f"{seed}/{number}")
        names = ("gan", "lstm") if number % GAN_EVERY == 0 else ("lstm", "gan")
        self.original, self.other = (originals[name] for name in names)
        self.folder, self.run, self.outside = folder, folder / "run", folder / "outside"
        self.marker = self.outside / "code ran"
        self.forged = False  # digests were corrected
        self.unsigned = False  # a file without a digest was changed
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.original.path, self.run, copy_function=copy_or_link)
        (self.outside / "folder").mkdir(parents=True)
        (self.outside / "victim").write_text("mine")
        self.done: list[str] = []
        wanted = self.rng.choice((1, 1, 1, 2))
        while len(self.done) < wanted:  # a mutation before may have made the next impossible
            with suppress(*IMPOSSIBLE):
                mutate = self.rng.choices(list(MUTATIONS), list(MUTATIONS.values()))[0]
                self.done.append(f"{mutate.__name__}: {mutate(self)}".replace(f"{self.run}/", ""))

    def path(self, *patterns: str) -> Path:
        """A path of one of these kinds; `@` stands for a checkpoint, most often the newest."""
        step = self.rng.choice((STEPS[-1],) * 4 + STEPS)
        pattern = self.rng.choice(patterns).replace("@", f"checkpoints/{step:09d}-1")
        return self.rng.choice(sorted(self.run.glob(pattern)) or [self.run / pattern])

    def write(self, path: Path, data: bytes, mend: float = 0.0) -> None:
        path.unlink()  # it may be a link to the original
        path.write_bytes(data)
        self.mend(path, mend)

    def mend(self, path: Path, probability: float) -> None:
        """Correct the digests after a change, so that a reader has to look further."""
        folder, *rest = path.relative_to(self.run).parts
        self.unsigned |= folder != "checkpoints"
        with suppress(*IMPOSSIBLE):
            if self.rng.random() < probability:
                trainer = own(self.run / folder / rest[0] / "trainer.json")
                found = json.loads(text := trainer.read_text())
                before = found.pop("own_sha256")
                if path != trainer:
                    found["step"] = history.step_of(trainer.parent)
                    for name in found["sha256"]:
                        with suppress(OSError):
                            found["sha256"][name] = sha256(own(trainer.parent / name).read_bytes())
                    text = json.dumps({**found, "own_sha256": before})
                after = sha256(json.dumps(found, sort_keys=True).encode())
                self.write(trainer, text.replace(before, after).encode())
                self.forged = True

    def note(self, tensors: Mapping[str, Mapping[str, Tensor]], **state: Any) -> None:
        """Look up which checkpoint has what was read: these tensors, to the last bit, and state."""
        read = {file: facts(part) for file, part in tensors.items()}

        def is_in(found: Mapping[str, Any]) -> bool:
            return read.items() <= found.items() and state.items() <= found["trainer.json"].items()

        steps = (step for step, found in self.original.checkpoints.items() if is_in(found))
        self.origin, self.problem = next(steps, None), "no checkpoint holds what was read"
        if any(map(is_in, self.other.checkpoints.values())):
            self.problem = ""  # a whole checkpoint of the other run
            return
        for checkpoint in self.run.glob("checkpoints/[0-9]*") if self.forged and not self.origin else ():
            with suppress(Exception):  # not one that can be read
                if is_in(found := content(checkpoint)):
                    self.problem = self.malformed(found)
                    return

    def malformed(self, found: Mapping[str, Any]) -> str:
        """What a reader could have noticed in a checkpoint whose digests are right."""
        trainer = found["trainer.json"]
        counts = [trainer.get(key) for key in ("step", "metrics_lines", "processes")]
        if not all(type(n) is int and n >= low for n, low in zip(counts, (0, 0, 1), strict=True)):
            return f"counts {counts}"
        if trainer.get("task") not in STATES:
            return f"state {trainer}"
        known = [run.checkpoints[STEPS[-1]] for run in (self.original, self.other)]
        like = next(one for one in known if one.keys() == found.keys())
        for file in like.keys() - {"trainer.json", "images"}:
            kinds = [{name: fact[:2] for name, fact in one[file].items()} for one in (like, found)]
            if kinds[0] != kinds[1]:
                return f"{file} has a tensor of another kind"
        return ""


IMPOSSIBLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)


# Mutations. Each changes a copy, and says what it did.

JSON = words("""config.json status.json metrics.jsonl owners/1.json @/trainer.json @/trainer.json
@/*/config.json @/*/model.safetensors @/optimizers.safetensors""")
WRITTEN = words(""".config.json.tmp .status.json.tmp .metrics.jsonl.tmp wandb
checkpoints/.000000000-2.tmp owners/.2.json.tmp owners/2.json owners/1-0123456789abcdef.lock
owners/999999999.json samples/000000007.png samples/.000000007.png.tmp checkpoints/000000007-2
checkpoints/.000000007-2.tmp checkpoints/.000000007-99.tmp checkpoints/damaged-000000006-1""")
FOREIGN = words("""checkpoints/000000000-1 checkpoints/000000004-2 checkpoints/000000008-1
checkpoints/0999999999-1 checkpoints/000000004-999999999 checkpoints/.000000006-1.tmp checkpoints/000000004
checkpoints/latest @/.hidden @/pytorch_model.bin @/x.json @/extra.safetensors owners/x.json""")
FOLDERS = words("checkpoints owners samples @ @/*")
THINGS: dict[str, Callable[[Copy, Path], Any]] = {
    "nothing": lambda w, path: None,
    "a file": lambda w, path: path.write_text("x"),
    "a folder": lambda w, path: path.mkdir(),
    "a full folder": lambda w, path: (path / "inside").mkdir(parents=True),
    "a pickle": lambda w, path: path.write_text(f"cos\nmkdir\n(V{w.marker}\ntR."),  # makes a folder
    "PostScript": lambda w, path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "another of the run": lambda w, path: w.rng.choice(sorted(w.run.rglob("*"))).rename(path),
    "a copy of its like": lambda w, path: copy_like(w, path, w.original),
    "a copy of the other run's": lambda w, path: copy_like(w, path, w.other),
    "a link": lambda w, path: path.symlink_to(w.outside / w.rng.choice(("victim", "folder", "absent"))),
    "a link to itself": lambda w, path: path.symlink_to(path),
}


def copy_like(w: Copy, path: Path, run: SimpleNamespace) -> None:
    """A copy of a file of this name, or of a checkpoint."""
    source = w.rng.choice(sorted(run.path.rglob(path.name)) or sorted(run.path.glob("checkpoints/*")))
    (shutil.copytree if source.is_dir() else shutil.copy)(source, path)


def put_something(w: Copy) -> str:
    """In the place of a file, of anything, of what is about to be written, or where nothing should be."""
    path = w.path(*w.rng.choice((JSON, JSON, ["**/*"], FOLDERS, WRITTEN, WRITTEN, FOREIGN)))
    path.parent.mkdir(exist_ok=True)
    if os.path.realpath(path.parent) != str(path.parent):
        raise OSError("it is in a linked folder")
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    THINGS[what := w.rng.choice(list(THINGS))](w, path)
    w.mend(path, 0.5)
    w.unsigned = True
    if w.rng.random() < 0.2:  # so that the newest is set aside
        w.write(own(w.run / "checkpoints" / NEWEST / "trainer.json"), b"{")
        what += ", and the newest trainer.json is damaged"
    return f"{path}: {what}"


def change_bytes(w: Copy) -> str:
    """Some bytes are replaced by noise, zeros or a copy of others, or left out."""
    path, rng = own(w.path(*JSON, "samples/*.png")), w.rng
    data, count = path.read_bytes(), rng.choice((1, 2, 8, 64, 4096))
    places = (0, 1, 7, 8, len(data) - 1, len(data), *(rng.randrange(n) for n in (400, 400, 400, len(data))))
    start = rng.choice(places)
    end = rng.choice((start, start + 1, start + count, len(data)))
    new = rng.choice((b"", bytes(count), rng.randbytes(1), rng.randbytes(count), data[start : start + count]))
    w.write(path, data[:start] + new + data[end:], mend=0.3)
    return f"{path}: bytes {start} to {end} are now {len(new)} others"


VALUES = words(r"""null true false 0 -1 1 2 3 7 1.5 -0.0 NaN Infinity 1e999 "" "x" "lstm" "gan" "running"
"mnist" "course" "../../outside/victim" "/etc/passwd" "a\u0000b" "\ud800" "\u202e\u001b[31m\n\r"
"<script>alert(1)</script>" "</script><script>" "<img/src=x>" [] [0] {} {"a":{"b":[1,2,{}]}} {"length":4}
{"length":-4} {"length":0} {"other":4} {"../../outside/victim":"0"} {"scale":0.0} {"$tensor":"x"}
[4] [-1] [32,8] [0,0] [0,64] "F64" "F16" "I64" "BOOL" "F4" "X"
{"dtype":"F32","shape":[0],"data_offsets":[0,0]}""")
KEYS = ("new", "class", "__class__", "", "\x00", "../../outside/victim", "\ud800", "lstm/../../x.json",
        "$tensor", "__metadata__", "\u202e\x1b[31m\n", "<img/src=x>")  # fmt: skip
VALUE, KEY = "\x01", "\x02"  # stand for one of the values, and for a key that is there twice
CHANGES: dict[str, Callable[[dict[str, Any], str, random.Random], Any]] = {
    "value": lambda parent, key, rng: parent.update({key: VALUE}),
    "absent": lambda parent, key, rng: parent.pop(key),
    "one more": lambda parent, key, rng: parent.update({rng.choice(KEYS): VALUE}),
    "other key": lambda parent, key, rng: parent.update({rng.choice((*KEYS, key + " ")): parent.pop(key)}),
    "copied": lambda parent, key, rng: parent.update({key: rng.choice(list(parent.values()))}),
    "twice": lambda parent, key, rng: parent.update({KEY: VALUE}),
}


def change_json(w: Copy) -> str:
    """A value or a key becomes another: in a JSON file, in rows of metrics, or in the header of tensors."""
    path, rng, size, body = own(w.path(*JSON)), w.rng, 0, b""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        size = int.from_bytes(data[:8], "little")
        data, body = data[8 : 8 + size], data[8 + size :]
    lines = data.splitlines() if path.suffix == ".jsonl" else [data]
    root = parent = {str(number): json.loads(line) for number, line in enumerate(lines)}
    key = rng.choice(list(parent))
    while isinstance(parent[key], dict) and parent[key] and rng.random() < 0.8:
        parent = parent[key]
        key = rng.choice(sorted(parent))
    how = rng.choice(("value", *CHANGES))
    CHANGES[how](parent, key, rng)
    value = rng.choice(VALUES)
    text = "\n".join(map(json.dumps, root.values())) + "\n"
    data = text.replace(json.dumps(KEY), json.dumps(key)).replace(json.dumps(VALUE), value).encode()
    if body:
        claimed = rng.choice((size - 1, size + 1)) if rng.random() < 0.1 else len(data)
        data = claimed.to_bytes(8, "little") + data + body
    w.write(path, data, mend=0.7)
    return f"{path}: {how} of {key!r}: {value}"


TENSORS: dict[Any, Callable[[Tensor], Tensor | None]] = {
    "absent": lambda tensor: None,
    "flat": lambda tensor: tensor.flatten(),
    "short": lambda tensor: tensor[:1].clone(),
    "double": lambda tensor: tensor.double(),
    "whole numbers": lambda tensor: tensor.long(),
    **dict.fromkeys((math.nan, math.inf, -math.inf, 1e30, -1.0, 0.0), lambda tensor: tensor),
}


def change_tensor(w: Copy) -> str:
    """A tensor that is absent, of another shape or type, or holds what it cannot, in a well-formed file."""
    path = own(w.path("@/*/model.safetensors", "@/optimizers.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name, how = w.rng.choice(sorted(tensors)), w.rng.choice(list(TENSORS))
    if isinstance(how, float):
        tensors[name].view(-1)[0] = how
    changed = TENSORS[how](tensors.pop(name))
    w.write(path, save({**tensors, **({} if changed is None else {name: changed})}), mend=0.6)
    return f"{path}: {name} is {how}"


MUTATIONS = {put_something: 20, change_bytes: 12, change_json: 20, change_tensor: 6}


# Readers. Each reads a copy, and notes what it found in it.


class Enough(BaseException):
    """All that was to be read has been."""


def status(w: Copy) -> None:
    """What a batch script asks."""
    run = RunDir(w.run)
    run.check_fits(w.original.name, w.original.config)
    run.newest_step()
    run.read_status()
    w.rows = list(run.read_metrics())


def reported(w: Copy) -> None:
    """launch/report.py."""
    write_report((w.run,), out := w.folder / "report.html")
    page = out.read_text()
    assert len(re.findall(r"<script(?! type=\"application/json\")", page)) == 1, "a script of another's"
    assert "<img/src=x" not in page, "HTML of another's"


def loaded(w: Copy) -> None:
    """What a program of one's own loads."""
    path = w.rng.choice((w.run, w.run / "checkpoints" / NEWEST))
    name, weights = w.rng.choice((("generator_ema", "averaged"), ("generator", "raw")))
    w.note({f"{name}/model.safetensors": load_generator(path, weights).state_dict()})


def sampled(w: Copy) -> None:
    """launch/sample.py tensor."""
    TensorFile(w.run, count=2, out=(out := w.folder / "out.safetensors")).draw()
    w.note({"images": load_file(out)})


def audited(w: Copy) -> None:
    """launch/audit.py: what it accepts, it has found equal to the last bit."""
    audit(w.run, None, from_start=False)


def resumed(w: Copy) -> None:
    """launch/lstm.py and launch/gan.py without their processes; only the LSTM takes steps."""
    task_type: Any = find_task(w.original.name)

    def step(task: Any, number: int, trainer: Any) -> None:
        if w.step is None:
            w.rows, w.step = list(RunDir(w.run).read_metrics()), number
            w.note(checkpoints.tensors_by_file(task), step=number, task=checkpoints.plain_state(task))
        if w.original.name == "gan":
            raise Enough
        task_type.step(task, number, trainer)

    config = replace(w.original.config, steps=7, run_dir=w.run)
    watched = type("Watched", (task_type,), {"step": step})
    run_task(watched, config, start_accelerator(config.batch_size))
    if w.step is not None:
        newest = history.checkpoints_in(w.run / "checkpoints")[0]
        assert history.step_of(newest) == 7, "the step that was taken is lost"
        checkpoints.verify_checkpoint(newest)


READERS = {
    "lstm": (status, reported, sampled, audited, resumed),
    "gan": (status, reported, loaded, sampled, resumed),
}


# Judgement

FINE = ("refused", "set aside", "harmless", "forged", "unsigned")
BAD = ("crash", "silent acceptance", "code run", "touched", "unreadable line")


def snapshot(w: Copy) -> set[tuple[Any, ...]]:
    """What there is except for locks and temporary files, which hold nothing."""
    found = set()
    for path in w.folder.rglob("*"):
        place = path.relative_to(w.folder)
        if not any(part.endswith((".lock", ".tmp")) for part in place.parts):
            stat, is_folder = path.lstat(), path.is_dir() and not path.is_symlink()
            about = () if is_folder else (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            found.add((str(place), stat.st_mode, *about))
    return found


def judge(reader: Callable[[Copy], None], w: Copy) -> tuple[str, str]:
    """A verdict, and what speaks for it."""
    AcceleratorState._reset_state(reset_partial_state=True)  # a reader is a process of its own
    there_was = snapshot(w)
    there = {path.name for path in w.run.glob("checkpoints/0*") if path.is_dir() and not path.is_symlink()}
    said, ended, trace = io.StringIO(), False, ""
    w.rows, w.step = None, None  # of metrics; that it goes on from
    w.origin, w.problem = STEPS[-1], ""  # the original checkpoint that it has read, or what is wrong
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()), suppress(Enough), errors_as_exit_codes():
            reader(w)
    except SystemExit:
        ended = True
    except Exception:
        trace = traceback.format_exc()
    lines = said.getvalue().splitlines()
    has_begun = any(re.search(r": (starting at|continuing from) step", line) for line in lines)
    is_refusal = ended and not has_begun  # or it has failed later: in an evaluation that was still owed
    touched = [one for one in snapshot(w) ^ there_was if is_refusal or one[0].startswith("outside")]
    bad = {
        "code run": w.marker.exists(),
        "touched": touched,
        "crash": trace,
        "unreadable line": [line for line in lines if not line.isprintable()],
    }
    if found := next((verdict for verdict, detail in bad.items() if detail), None):
        return found, f"{bad[found]}; {lines}"[:3000]
    if is_refusal:
        return "refused", lines[-1]
    verdict, detail = accepted(w, there, lines)
    if ended and verdict == "harmless":  # it has read, but cannot go on
        verdict = "refused"
    return verdict, detail


def accepted(w: Copy, there: set[str], lines: list[str]) -> tuple[str, str]:
    """The verdict on what a reader took for a run."""
    rows = [row for row in w.original.rows if w.step is None or row["step"] <= w.step]
    if not all(map(is_row, w.rows or ())):
        return "silent acceptance", f"a row that is none among {w.rows}"[:300]
    if w.step == 0 and not there & {f"{step:09d}-1" for step in STEPS}:
        return "harmless", "no checkpoint is there"
    if w.origin is None:
        if w.problem:
            return "silent acceptance", f"{w.problem}; {lines}"
        return "forged" if w.forged else "unsigned", ""
    if w.rows not in (None, rows):
        return ("unsigned" if w.unsigned or w.forged else "silent acceptance"), f"rows {w.rows}"[:500]
    names = (re.fullmatch(history.CHECKPOINT, name) for name in there)
    owner, newest = max(((int(name[2]), int(name[1])) for name in names if name), default=(0, 0))
    if w.origin == STEPS[-1] or NEWEST not in there or (owner > 1 and w.origin == newest):
        return "harmless", ""  # a later owner's counts as newer
    aside = (w.run / "checkpoints" / f"damaged-{NEWEST}").exists()
    if aside and any("moved to" in line and NEWEST in line for line in lines):
        return "set aside", ""
    return ("forged" if w.forged else "silent acceptance"), f"step {w.origin} without a word: {lines}"


def is_row(row: Any) -> bool:
    values = row.values() if isinstance(row, dict) and type(row.get("step")) is int else [()]
    return all(v is None or type(v) in (int, float) for v in values)


# The whole


def fuzz(numbers: Sequence[int], seed: int, folder: Path) -> dict[str, Any]:
    originals = {name: train(name, folder / "originals" / name) for name in OPTIONS}
    files = [path for path in (folder / "originals").rglob("*") if path.is_file()]
    untouched = [sha256(path.read_bytes()) for path in files]
    found: dict[str, Counter[str]] = {}
    bad: list[dict[str, Any]] = []
    with (
        mock.patch.multiple(lease, PATIENCE=0.01, SILENCE=0.02, HEARTBEAT=0.01),
        mock.patch.object(environment, "_commit", mock.Mock(return_value=environment._commit())),
        mock.patch.object(sampling, "CANDIDATES", 20),  # of digits to walk between: a second for the page
    ):
        for number in numbers:
            w = Copy(originals, folder / "work", seed, number)
            for reader in READERS[w.original.name]:
                verdict, detail = judge(reader, w)
                name = f"{w.original.name} {reader.__name__}"
                found.setdefault(name, Counter(dict.fromkeys((*FINE, *BAD), 0)))[verdict] += 1
                if verdict in BAD:
                    found_bad = {"mutation": number, "reader": name, "verdict": verdict, "what": w.done}
                    bad.append({**found_bad, "detail": detail})
                    print(*bad[-1].values(), sep="; ", flush=True)
    if [sha256(path.read_bytes()) for path in files] != untouched:
        bad.append({"verdict": "touched", "detail": "the originals, which the mutated folders have links to"})
    return {"readers": found, "bad": bad}


def together(numbers: Sequence[int], seed: int, folder: Path, jobs: int) -> dict[str, Any]:
    """What `jobs` processes find, each in some of the mutations."""
    began = time.monotonic()
    for job in range(jobs):
        (folder / str(job)).mkdir()
    with ProcessPoolExecutor(jobs) as pool:
        ends = [len(numbers) * job // jobs for job in range(jobs + 1)]
        shares = [numbers[first:last] for first, last in pairwise(ends)]
        folders = [folder / str(job) for job in range(jobs)]
        parts = list(pool.map(fuzz, shares, [seed] * jobs, folders))
    readers: dict[str, Counter[str]] = {}
    for name, counts in (item for part in parts for item in part["readers"].items()):
        readers.setdefault(name, Counter(dict.fromkeys(counts, 0))).update(counts)
    return {
        "environment": as_json(environment.environment()),
        "seed": seed,
        "mutations": len(numbers),
        "seconds": round(time.monotonic() - began),
        "readers": readers,
        "bad": [one for part in parts for one in part["bad"]],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat this mutation")
    parser.add_argument("--jobs", type=int, default=1, help="processes beside each other")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    numbers = range(options.mutations) if options.only is None else (options.only,)
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as temporary:
        results = together(numbers, options.seed, Path(os.path.realpath(temporary)), options.jobs)
    for name, counts in results["readers"].items():
        print(f"{name:16}", ", ".join(f"{column} {count}" for column, count in counts.items() if count))
    print(f"{len(numbers)} mutations in {results['seconds']} s, bad: {len(results['bad'])}")
    if options.only is None:
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(bool(results["bad"]))
