import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from made_runs import make_gan, make_lstm

from cs324dist.report import provenance
from cs324dist.report.reading import Run, read_run
from cs324dist.settings import from_command_line
from cs324dist.tasks import gan, lstm


def read(path: Path) -> Run:
    return read_run(path, path.name)


def test_what_differs_from_the_preset_comes_first(tmp_path: Path) -> None:
    settings = provenance.settings(read(make_lstm(tmp_path / "run", length=7, max_grad_norm=0.5)))
    differing = [(s.name, s.value, s.usual) for s in settings if s.usual is not None]
    assert differing == [
        ("--steps", "300", "1500"),
        ("--length", "7", "50"),
        ("--max-grad-norm", "0.5", "10.0"),
    ]
    assert [s.usual is None for s in settings] == [False] * 3 + [True] * (len(settings) - 3)
    assert ("--hidden-size", "128", None) in [(s.name, s.value, s.usual) for s in settings]


@pytest.mark.parametrize(
    "changed",
    [
        replace(lstm.PRESETS["course"], length=7, learning_rate=3e-4, seed=5),
        replace(lstm.PRESETS["fast"], model="rnn"),
        replace(gan.PRESETS["fast"], dataset="fake", data_root=Path("a folder; with 'quotes'")),
    ],
    ids=["lstm", "rnn", "gan"],
)
def test_the_command_asks_for_the_same_settings(tmp_path: Path, changed) -> None:
    task, module = ("gan", gan) if isinstance(changed, gan.GANSettings) else ("lstm", lstm)
    run = replace(read(make_lstm(tmp_path / "run")), task=task, settings=changed.as_json())
    python, script, *arguments = shlex.split(provenance.command(run) or "")
    assert (python, script) == ("python", f"launch/{task}.py")
    assert from_command_line(module.PRESETS, "", arguments) == changed


def test_a_run_of_several_processes_is_repeated_by_as_many(tmp_path: Path) -> None:
    command = provenance.command(read(make_gan(tmp_path / "run")))
    assert command == "torchrun --nproc_per_node 2 launch/gan.py --preset fast --steps 400"


def test_a_run_in_bf16_is_repeated_in_it(tmp_path: Path) -> None:
    run = read(make_lstm(tmp_path / "run"))
    run = replace(run, environment={**run.environment, "precision": "bf16"})
    assert (provenance.command(run) or "").startswith(
        "ACCELERATE_MIXED_PRECISION=bf16 python launch/lstm.py "
    )


def test_a_task_of_ones_own_has_no_command(tmp_path: Path) -> None:
    run = replace(read(make_lstm(tmp_path / "run")), task="mine")
    assert provenance.command(run) is None
    assert {s.usual for s in provenance.settings(run)} == {None}


def test_by_what_it_was_made(tmp_path: Path) -> None:
    facts = dict(provenance.environment(read(make_gan(tmp_path / "run"))))
    assert facts["Processes"] == "2"
    assert facts["Precision"] == "float32"
    assert "torch 2." in facts["Versions"]


def test_training_time_follows_from_the_rates(tmp_path: Path) -> None:
    run = read(make_lstm(tmp_path / "run"))
    assert provenance.training_time(run) == pytest.approx(300 * 128 / 1000)
    assert provenance.training_time(replace(run, settings={})) is None


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
            "was stopped at step 300 of 300: a signal asked for it.",
        ),
        (
            "failed",
            "train/loss is nan",
            "failed: train/loss is nan. It was last saved at step 300",
        ),
        ("odd", "", "is odd"),
    ],
)
def test_an_unfinished_run_says_why(tmp_path: Path, state: str, why: str, said: str) -> None:
    run = replace(read(make_lstm(tmp_path / "run")), state=state, why=why)
    assert (provenance.notice(run) or "").startswith(said)


def test_a_run_that_was_killed_is_not_said_to_be_running(tmp_path: Path) -> None:
    path = make_lstm(tmp_path / "run", state="running")
    os.utime(path / "owners" / "1.json", (0, 0))
    assert "it was probably killed" in (provenance.notice(read(path)) or "")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (
            {"from_step": 1200, "lost_steps": 15, "seconds_since_previous": 130.2},
            "from step 1 200, took at least 15 steps again, 2 min after the last sign of life before it",
        ),
        ({"from_step": 0, "lost_steps": 0}, "from step 0"),
        ({"from_step": -1, "lost_steps": "x", "seconds_since_previous": -3}, ""),
        ({}, ""),
    ],
)
def test_a_start_says_what_it_cost(tmp_path: Path, written: dict[str, object], said: str) -> None:
    path = make_lstm(tmp_path / "run")
    (path / "owners" / "2.json").write_text(json.dumps(written))
    assert provenance.resumption(read(path).starts[1]).replace("\N{NARROW NO-BREAK SPACE}", " ") == said


def test_a_finished_run_says_nothing(tmp_path: Path) -> None:
    assert provenance.notice(read(make_lstm(tmp_path / "run"))) is None
