import html
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from made_runs import leave, make_gan, make_lstm, save_generator

from cs324dist.command_line import from_command_line
from cs324dist.config import Config, Positive
from cs324dist.loop import run_record
from cs324dist.report import provenance
from cs324dist.report.page import TEMPLATES
from cs324dist.report.reading import Run, read_run
from cs324dist.runs.checkpoints import TrainerState
from cs324dist.runs.lease import this_process
from cs324dist.runs.records import LOOP, RunRecord
from cs324dist.tasks.base import Task
from cs324dist.tasks.gan.task import GANTask
from cs324dist.tasks.lstm.task import LSTMTask


def read(path: Path) -> Run:
    return read_run(path, path.name)


def text(macro: str, of: object) -> str:
    """What the page says, as it is read there."""
    written = getattr(TEMPLATES.get_template("texts.html").module, macro)(of)
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", written)).split())


def test_what_differs_from_the_preset_comes_first(tmp_path: Path) -> None:
    settings = provenance.settings(read(make_lstm(tmp_path / "run", length=7, max_grad_norm=0.5)))
    assert settings[:3] == [
        ("--steps", "300", "1500"),
        ("--max-grad-norm", "0.5", "10.0"),
        ("--length", "7", "50"),
    ]
    assert [usual is None for _, _, usual in settings] == [False] * 3 + [True] * (len(settings) - 3)
    assert ("--hidden-size", "128", None) in settings


def test_only_what_a_command_line_takes_is_listed(tmp_path: Path) -> None:
    """Flags that are as the preset has them, and what is empty, are no words of one."""
    run = read(make_lstm(tmp_path / "run"))
    config = {"a": False, "b": True, "c": None, "d": "", "e": 0, "f": False, "g": True, "h": None}
    changed = {"f": True, "g": False, "h": 2.5}
    run = replace(run, record=replace(run.record, config=config, changed=changed))
    assert provenance.settings(run) == [
        ("--no-f", "", "true"),
        ("--g", "", "false"),
        ("--h", "none", "2.5"),
        ("--e", "0", None),
    ]


def test_runs_are_told_apart_by_the_options_that_differ(tmp_path: Path) -> None:
    paths = [
        make_lstm(tmp_path / f"{seed}-{length}", length, seed=seed) for seed, length in ((1, 5), (2, 10))
    ]
    runs = [read_run(path, path.name) for path in paths]
    assert provenance.differing(runs) == (["--seed", "--length"], [["1-5", "1", "5"], ["2-10", "2", "10"]])
    assert provenance.differing(runs[:1]) == ([], [])


@dataclass(frozen=True)
class OwnConfig(Config):
    betas: tuple[float, ...] = (0.9, 0.99)
    tied: bool = True
    noisy: bool = False
    shift: float = 0.5
    limit: Positive | None = 10.0
    words: str = "some"


FLOAT32 = "ACCELERATE_MIXED_PRECISION=no "


class OwnTask(Task[OwnConfig]):
    name = "mine"
    presets: ClassVar = {"default": OwnConfig(), "deep": OwnConfig(steps=7)}


OF_OWN = {"betas": (0.0, 0.5), "tied": False, "noisy": True, "shift": -1.5, "limit": None, "words": "-ü'$x"}


@pytest.mark.parametrize(
    ("task", "preset", "changes"),
    [
        (LSTMTask, "course", {"length": 7, "learning_rate": 3e-5, "seed": 5}),
        (LSTMTask, "fast", {"model": "rnn", "max_grad_norm": None, "micro_batches": 4}),
        (GANTask, "fast", {"dataset": "fake", "data_root": Path("a folder; with 'quotes'")}),
        (OwnTask, "deep", OF_OWN),
    ],
    ids=["lstm", "rnn", "gan", "own"],
)
def test_the_command_asks_for_the_same(tmp_path, task, preset, changes):
    config = replace(task.presets[preset], preset=preset, **changes)
    record = replace(run_record(task, config), script="some where/train.py")
    run = replace(read(make_lstm(tmp_path / "run")), record=record)
    precision, python, script, *arguments = shlex.split(provenance.command(run) or "")
    assert (precision, python, script) == (FLOAT32.strip(), "python", "some where/train.py")
    asked = from_command_line(task.presets, "", task.run_name, arguments)
    assert asked == replace(config, run_dir=tmp_path / "run-again")


def test_a_task_that_was_given_to_a_script_is_given_again(tmp_path: Path) -> None:
    run = read(make_lstm(tmp_path / "run"))
    record = replace(run.record, script="launch/train.py", task_given="a folder/own.py:Own")
    command = provenance.command(replace(run, record=record)) or ""
    assert command.startswith(f"{FLOAT32}python launch/train.py 'a folder/own.py:Own' --preset ")
    assert provenance.command(replace(run, record=replace(record, task_given="--help"))) is None


def test_a_run_of_several_processes_is_repeated_by_as_many(tmp_path: Path) -> None:
    command = provenance.command(read(make_gan(tmp_path / "run")))
    options = f"--preset fast --steps 400 --run-dir {tmp_path}/run-again"
    assert command == f"{FLOAT32}torchrun --nproc_per_node 2 launch/gan.py {options}"


def test_a_loop_of_ones_own_has_a_command_without_options(tmp_path: Path) -> None:
    run = read(make_lstm(tmp_path / "run"))
    record = RunRecord(LOOP, "mine.py", {"steps": 3}, {})
    assert provenance.command(replace(run, record=record)) == f"{FLOAT32}python mine.py"


def test_after_a_takeover_it_is_repeated_by_as_many_as_the_new_owner_has(tmp_path: Path) -> None:
    path = make_gan(tmp_path / "run")  # saved at step 400 by two processes, which were cut off then
    save_generator(path / "checkpoints" / "000000300-2", TrainerState(300, processes=4))
    run = read(path)
    assert run.processes == 4
    assert (provenance.command(run) or "").startswith(f"{FLOAT32}torchrun --nproc_per_node 4 launch/gan.py ")


@pytest.mark.parametrize(
    ("changes", "variables"),
    [
        ({"precision": "bf16"}, "ACCELERATE_MIXED_PRECISION=bf16"),
        ({"precision": "no"}, "ACCELERATE_MIXED_PRECISION=no"),  # its task's default may be another
        ({"compiled": "inductor"}, "ACCELERATE_MIXED_PRECISION=no ACCELERATE_DYNAMO_BACKEND=inductor"),
        ({"compiled": "x; rm y\n"}, "ACCELERATE_MIXED_PRECISION=no ACCELERATE_DYNAMO_BACKEND='x; rm y'"),
    ],
)
def test_a_run_is_repeated_as_precise_and_as_compiled(tmp_path, changes, variables):
    run = read(make_lstm(tmp_path / "run"))
    run = replace(run, environment=replace(run.environment, **changes))
    assert (provenance.command(run) or "").startswith(f"{variables} python launch/lstm.py --preset course ")


def test_a_command_from_a_stranger_s_folder_is_quoted(tmp_path: Path) -> None:
    run = read(make_lstm(tmp_path / "run"))
    config = {"preset": "$(a)", "b; c": "`d`", "e": ["&&", "f g"], "h": {"i": "'"}}
    changed = dict.fromkeys(("b; c", "e", "h", "z"))
    record = replace(run.record, script="x.py | y", config=config, changed=changed)
    words = [FLOAT32.strip(), "python", "x.py | y", "--preset", "$(a)"]
    words += ["--b; c", "`d`", "--e", "&&", "f g", "--h", '{"i": "\'"}', "--run-dir", f"{tmp_path}/run-again"]
    assert shlex.split(provenance.command(replace(run, record=record)) or "") == words


@pytest.mark.parametrize(
    "changes",
    [{"script": ""}, {"script": "-cimport os"}, {"script": "x\u202egp.py"}, {"config": {"preset": "a\nb"}}],
)
def test_there_is_no_command_where_it_cannot_be_shown(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = read(make_lstm(tmp_path / "run"))
    assert provenance.command(run) is not None
    assert provenance.command(replace(run, record=replace(run.record, **changes))) is None


def test_the_environment(tmp_path: Path) -> None:
    said = text("environment", read(make_gan(tmp_path / "run")))
    assert "Processes 2 " in said
    assert "Precision float32 " in said
    assert re.search(r"Versions Python 3\.\d+\.\d+, cs324dist .*, torch 2\.", said)
    assert "Compiled" not in said


def test_training_time_follows_from_the_rates(tmp_path: Path) -> None:
    run = read(make_lstm(tmp_path / "run"))
    assert provenance.training_time(run) == pytest.approx(300 * 128 / 1000)
    assert provenance.training_time(replace(run, metrics={})) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "\N{EN DASH}"), (0.4, "0 s"), (80.0, "80 s"), (120.0, "2 min"), (1e4, "2.8 h"), (1e6, "12 days")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert provenance.duration(seconds) == text


@pytest.mark.parametrize(
    ("state", "why", "said"),
    [
        ("running", "", "is still running, step 300 of 300"),
        (
            "stopped",
            "a signal asked for it",
            "was stopped at step 300 of 300: a signal asked for it. The same command continues it.",
        ),
        ("failed", "train/loss is nan", "failed: train/loss is nan. It was last saved at step 300 of 300."),
        ("failed", "", "failed: no reason was recorded. It was last saved at step 300 of 300."),
        ("unclear", "", "has a status that cannot be read, step 300 of 300"),
        ("not started", "", "has not started: its folder holds no status yet"),
        ("finished", "", ""),
    ],
)
def test_an_unfinished_run_says_why(tmp_path: Path, state: str, why: str, said: str) -> None:
    run = replace(read(make_lstm(tmp_path / "run")), state=state, why=why)
    assert text("notice", run) == said


def test_a_run_that_was_killed_is_not_said_to_be_running(tmp_path: Path) -> None:
    path = make_lstm(tmp_path / "run", state="running")
    assert text("notice", read(path)).startswith("is still running")
    leave(path)
    assert "it was probably killed" in text("notice", read(path))


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (
            {"from_step": 1200, "lost_steps": 15, "seconds_since_previous": 130.2},
            "from step 1 200, repeated at least 15 steps, 2 min after the previous process's last heartbeat",
        ),
        ({"from_step": 0, "lost_steps": 0}, "from step 0"),
        ({"seconds_since_previous": 7.0}, "7 s after the previous process's last heartbeat"),
        ({}, ""),
    ],
)
def test_a_start_says_what_it_cost(written: dict[str, Any], said: str) -> None:
    assert text("resumption", replace(this_process(), **written)) == said


def test_a_start_says_when_and_where() -> None:
    owner = replace(this_process(), host="node<b>", pid=12, slurm_job="34", since="2026-11-26T07:18:39+00:00")
    assert text("origin", owner) == "2026-11-26 07:18:39 UTC node<b>, process 12, Slurm job 34"
