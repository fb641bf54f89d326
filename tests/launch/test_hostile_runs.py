"""Run folders from strangers, as a user meets them: a clear line, exit code 2, nothing touched, no code run.

`make fuzz` tries thousands of such folders, in one process.
"""

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launched import mend as forge

LSTM = ("launch/lstm.py", "--length", "4", "--hidden-size", "8", "--batch-size", "8",
        "--checkpoint-every", "2", "--log-every", "1", "--evaluate-every", "6",
        "--schedule", "constant", "--wandb", "disabled")  # fmt: skip
GAN = ("launch/gan.py", "--dataset", "fake", "--batch-size", "8", "--latent-dim", "8", "--steps", "1",
       "--wandb", "disabled")  # fmt: skip
LONGEST = 500  # characters of a line


@pytest.fixture(scope="module")
def runs(launch, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    launch(*LSTM, "--steps", "6", "--run-dir", folder / "lstm")
    launch(*GAN, "--run-dir", folder / "gan")
    return folder


class Hostile:
    """A copy of a run with one or more checkpoints, of which all are tampered with alike."""

    def __init__(self, original: Path, place: Path) -> None:
        self.run, self.outside = place / "run", place / "outside"
        shutil.copytree(original, self.run)
        self.outside.mkdir()
        (self.outside / "victim").write_text("mine")
        self.marker = self.outside / "code ran"

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.run / "checkpoints").iterdir())

    def each(self, tamper: Callable[[Path], None], name: str, *, mend: bool = True) -> None:
        """Tamper with a file of every checkpoint, and make the digests right as a forger would."""
        for checkpoint in self.checkpoints:
            tamper(checkpoint / name)
            if mend:
                forge(checkpoint)

    def content(self) -> dict[str, object]:
        """All there is but lock files, which hold nothing."""
        return {
            str(path): path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
            for path in sorted(self.run.parent.rglob("*"))
            if path.suffix != ".lock"
        }


@pytest.fixture
def lstm(runs, tmp_path) -> Hostile:
    return Hostile(runs / "lstm", tmp_path)


@pytest.fixture
def gan(runs, tmp_path) -> Hostile:
    return Hostile(runs / "gan", tmp_path)


@pytest.fixture
def refused(launch) -> Iterator[Callable[..., list[str]]]:
    """The lines of a command that must refuse a run and leave everything as it is."""

    def refused(hostile: Hostile, *command: object) -> list[str]:
        before = hostile.content()
        done: subprocess.CompletedProcess[str] = launch(*command, check=False)
        assert done.returncode == 2, done.stderr
        lines = done.stderr.splitlines()
        for line in lines:
            assert line.startswith("error: "), done.stderr
            assert line.isprintable()
            assert len(line) <= LONGEST
        assert hostile.content() == before
        return lines

    return refused


def resume(hostile: Hostile) -> tuple[object, ...]:
    return (*LSTM, "--steps", "7", "--run-dir", hostile.run)


def sample(hostile: Hostile) -> tuple[object, ...]:
    out = hostile.run.parent / "grid.png"
    return ("launch/sample.py", "grid", hostile.run, "--rows", "1", "--columns", "1", "--out", out)


class Code:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_by_another_name_is_not_run(gan, refused):
    gan.each(lambda path: path.write_bytes(pickle.dumps(Code(gan.marker))), "generator_ema/model.safetensors")
    (line,) = refused(gan, *sample(gan))
    assert "cannot be read as safetensors" in line
    assert not gan.marker.exists()
    pickle.loads(pickle.dumps(Code(gan.marker)))
    assert gan.marker.exists()  # it would have been


@pytest.mark.parametrize("name", ["../../outside/victim", "x" * 300 + ".json"])
def test_a_list_of_files_that_names_others(lstm, refused, name):
    for checkpoint in lstm.checkpoints:
        content = json.loads((checkpoint / "trainer.json").read_text())
        forge(checkpoint, sha256={**content["sha256"], name: "0"})
    lines = refused(lstm, *resume(lstm))
    assert all("which is no file of a checkpoint" in line for line in lines[:-1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metrics_lines": "6"}, "trainer.json: metrics_lines is 6"),
        ({"task": {"length": "4"}}, "a curriculum of this run cannot reach length 4"),
        ({"task": {}}, "holds a state that does not fit: {}"),
    ],
    ids=["the trainer's", "the task's", "none"],
)
def test_a_state_of_another_type(lstm, refused, change, said):
    for checkpoint in lstm.checkpoints:
        forge(checkpoint, **change)
    assert said in refused(lstm, *resume(lstm))[0]


def test_noise_in_the_metrics(lstm, refused):
    lines = (lstm.run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (lstm.run / "metrics.jsonl").write_bytes(lines[0] + os.urandom(500) + b"\n" + b"".join(lines[1:]))
    (line,) = refused(lstm, *resume(lstm))
    assert f"{lstm.run}/metrics.jsonl: line 2 is damaged" in line


def test_an_audit_reads_no_data_that_the_run_names(gan, refused):
    path = gan.run / "owners" / "1.json"
    owner = json.loads(path.read_text())
    owner["config"] |= {"dataset": "mnist", "data_root": str(gan.outside)}
    path.write_text(json.dumps(owner))
    (root := gan.run.parent / "root").touch()
    (line,) = refused(gan, "launch/audit.py", gan.run, "--from-start", "--data-root", root)
    assert f"data root {root} is unusable" in line


@pytest.mark.parametrize("name", ["trainer.json", "optimizers.safetensors"])
def test_what_cannot_be_read_now_is_named_and_nothing_is_touched(gan, launch, name):
    path = gan.checkpoints[0] / name
    path.unlink()
    path.symlink_to("/proc/self/mem")  # whoever reads it meets an input/output error
    before = gan.content()
    for command in (
        (*GAN, "--steps", "2", "--run-dir", gan.run),
        sample(gan),
        ("launch/audit.py", gan.run, "--from-start"),
    ):
        done = launch(*command, check=False)
        assert (done.returncode, done.stderr) == (1, f"error: {path}: Input/output error\n")
    assert gan.content() == before
    launch("launch/report.py", gan.run, "--out", gan.run.parent / "report.html")


@pytest.mark.parametrize("name", ["checkpoints", "owners", "wandb", ".wandb", "tensorboard"])
def test_a_folder_that_is_a_link_to_another_place(lstm, refused, name):
    shutil.rmtree(lstm.run / name, ignore_errors=True)
    (lstm.run / name).symlink_to(lstm.outside)
    (line,) = refused(lstm, *resume(lstm))
    assert f"{lstm.run / name} is a link" in line


@pytest.mark.parametrize(
    "name",
    [".config.json.tmp", ".metrics.jsonl.tmp", "owners/.2.json.tmp", "owners/1-0123456789abcdef.lock",
     "checkpoints/.000000007-2.tmp", "checkpoints/000000007-2", "samples/.000000007.png.tmp"],
)  # fmt: skip
def test_a_planted_link_is_not_written_through(lstm, launch, name):
    (lstm.run / name).symlink_to(lstm.outside / "victim")
    launch(*resume(lstm), check=False)
    assert (lstm.outside / "victim").read_text() == "mine"
