"""What reaches the terminal and Weights & Biases, and what happens where that cannot be reached."""

import http.server
import io
import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import psutil
import pytest
import torch
import wandb
from accelerate import Accelerator
from accelerate.tracking import WandBTracker
from launched import Launched
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from cs324dist import Evaluation, trackers
from cs324dist.distributed.stop import StopRequest
from cs324dist.errors import say, warn
from cs324dist.loop import run_task
from cs324dist.tasks.lstm.task import LSTMTask

LSTM_SMOKE = ("launch/lstm.py", "--preset", "smoke")
SMOKE = ("launch/gan.py", "--preset", "smoke", "--dataset", "fake", "--steps", "10")
BLOCK, HEADER = 32_768, 7


def records(path: Path) -> list[Record]:
    """A `.wandb` file is a LevelDB log: 32 KiB blocks of chunks of (checksum, length, kind, bytes)."""
    data, at, parts, found = path.read_bytes(), 7, [], []
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts.append(data[at + HEADER : at + HEADER + length])
        at += HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(Record.FromString(b"".join(parts)))
            parts = []
    return found


def history(segment: Path) -> dict[int, dict]:
    """What a `.wandb` file holds of each step."""
    rows: dict[int, dict] = {}
    for record in records(segment):
        if record.WhichOneof("record_type") == "history":
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            rows.setdefault(row["_step"], {}).update(row)
    return rows


def metrics_by_step(run: Path) -> dict[int, dict]:
    rows: dict[int, dict] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row.pop("step"), {}).update(row)
    return rows


@pytest.mark.parametrize("place", ["run", "run/checkpoints", "mine"])
def test_the_settings_in_a_run_folder_name_no_server(tmp_path, monkeypatch, place):
    """The API key goes to the server that they name."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    settings = tmp_path / place / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = http://stranger.example\n")
    monkeypatch.chdir(tmp_path / place)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "none"))
    wandb.teardown()
    try:
        found = trackers._set_up().settings.base_url
    finally:
        wandb.teardown()
    assert (found == "http://stranger.example") == (place == "mine")


@pytest.fixture(scope="module")
def recorded(launch, tmp_path_factory):
    run = tmp_path_factory.mktemp("offline") / "run"
    return run, launch(*SMOKE, "--run-dir", run, environment={"WANDB_PROJECT": "mine"}).stderr


def test_without_a_login_it_records_offline_and_says_so_in_one_line(recorded):
    run, said = recorded
    lines = [line for line in said.splitlines() if "Weights & Biases" in line or "wandb" in line]
    assert lines == [f"Weights & Biases: no login (`wandb login`); recording offline in {run}/wandb"]


def test_the_same_values_and_pictures_go_there_as_to_the_metrics_file(recorded):
    run, _ = recorded
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    logged, expected = history(file), metrics_by_step(run)
    assert {r.run.project for r in records(file) if r.WhichOneof("record_type") == "run"} == {"mine"}
    assert expected.keys() == {5, 10}
    for step, row in expected.items():
        assert {name: logged[step][name] for name in row} == row
    for name in ("samples", "strip"):
        assert logged[10][f"{name}/_type"] == "images/separated"
        (picture,) = run.glob(f"wandb/offline-run-*/files/media/images/{name}_10_*.png")
    with Image.open(picture) as strip:
        assert strip.size == (302, 32)  # ten images of 28 pixels, two pixels apart


def project_and_name(run: Path) -> tuple[str, str]:
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    (found,) = {
        (r.run.project, r.run.display_name) for r in records(file) if r.WhichOneof("record_type") == "run"
    }
    return found


def test_the_runs_of_a_task_are_in_a_project_of_its_name(launch, tmp_path):
    launch(*LSTM_SMOKE, "--run-dir", tmp_path / "run")
    assert project_and_name(tmp_path / "run") == ("lstm", "run")
    launch(*LSTM_SMOKE, "--run-dir", tmp_path / "mine", environment={"WANDB_NAME": "first"})
    assert project_and_name(tmp_path / "mine") == ("lstm", "first")


def test_an_upload_is_announced_with_its_address_and_how_to_stop_it(monkeypatch, tmp_path, capsys):
    def start(tracker: WandBTracker) -> None:
        assert (tracker.run_name, tracker.init_kwargs["mode"]) == ("mine- 2", "online")
        tracker.run = MagicMock(url="https://me:secret@wandb.ai/me/lstm/runs/1")

    monkeypatch.setattr(LSTMTask, "name", "mine: 2")  # which is no name of a project
    monkeypatch.setattr(WandBTracker, "start", start)
    monkeypatch.setattr(WandBTracker, "store_init_configuration", lambda *_: None)
    monkeypatch.setattr(trackers, "_possible_mode", lambda: ("online", ""))
    train(tmp_path / "run", wandb="online")
    assert capsys.readouterr().err.splitlines()[1] == (
        "Weights & Biases: uploading to https://wandb.ai/me/lstm/runs/1; "
        "to stop this: --wandb disabled, or WANDB_MODE=disabled"
    )


class Terminal(io.StringIO):
    """What is on the screen in the end, if it is wide enough."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        return [line.rpartition("\r")[2] for line in self.getvalue().split("\n")[:-1]]


def train(folder: Path, **changed: object) -> None:
    preset = LSTMTask.presets["smoke"]
    config = replace(preset, preset="smoke", run_dir=folder, wandb="disabled", tensorboard=False)
    run_task(LSTMTask, replace(config, **changed), Accelerator(cpu=True))


def train_in_terminal(folder: Path, **changed: object) -> Terminal:
    with redirect_stderr(Terminal()) as terminal:
        train(folder, **changed)
    return terminal


def test_the_bar_moves_at_every_step_whatever_is_logged(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers, "tqdm", partial(trackers.tqdm, mininterval=0))
    terminal = train_in_terminal(tmp_path / "run", steps=8, log_every=1000, evaluate_every=1000)
    found = dict.fromkeys(re.findall(r"(\d+)/8 \[", terminal.getvalue()))
    assert list(found) == [str(step) for step in range(9)]


def test_lines_and_the_bar_keep_out_of_each_other(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers, "open_wandb", lambda *_: say("Weights & Biases: something"))
    monkeypatch.setattr(trackers, "save_png", lambda *_: warn("amid the steps"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(LSTMTask, "evaluate", lambda *_: Evaluation({}, torch.zeros(1, 2, 2).byte()))
    terminal = train_in_terminal(tmp_path / "run", steps=4, log_every=2, evaluate_every=2, wandb="offline")
    bar = terminal.lines()[-2]
    assert bar.startswith("100%")
    assert "4/4" in bar
    assert [line for line in terminal.lines() if line != bar] == [
        f"{tmp_path}/run: starting at step 0 of 4, processes: 1, device: cpu, precision: float32",
        "Weights & Biases: something",
        *["evaluation after 2 steps", "warning: amid the steps"],
        *["evaluation after 4 steps", "warning: amid the steps"],
        f"{tmp_path}/run: finished after 4 steps",
    ]
    assert "step/s" not in terminal.getvalue().partition("something")[0]


def test_where_a_stopped_run_is_and_how_it_goes_on_is_the_last_line(monkeypatch, tmp_path):
    closing = MagicMock(finish=lambda: say("the last of its trackers"))
    monkeypatch.setattr(trackers, "open_wandb", lambda *_: closing)
    monkeypatch.setattr(StopRequest, "agreed", lambda _: True)
    *_, bar, tracker, last = train_in_terminal(tmp_path / "run").lines()
    assert "1/20" in bar
    assert tracker == "the last of its trackers"
    assert last == f"{tmp_path}/run: stopped after 1 steps; run the same command to go on"


@pytest.mark.parametrize("login", ["WANDB_API_KEY", "NETRC"])
def test_a_login_without_a_network_falls_back_to_offline(launch, tmp_path, login):
    run, key = tmp_path / "run", "0" * 40
    written = tmp_path / "netrc"  # as `wandb login` writes it
    written.write_text(f"machine 127.0.0.1\n  login user\n  password {key}\n")
    done = launch(
        *LSTM_SMOKE, "--run-dir", run,
        environment={login: {"WANDB_API_KEY": key, "NETRC": str(written)}[login],
                     "WANDB_BASE_URL": "http://127.0.0.1:9"},
    )  # fmt: skip
    assert "http://127.0.0.1:9 cannot be reached" in done.stderr
    assert list(run.glob("wandb/offline-run-*"))


@pytest.fixture
def no_tracker() -> Iterator[str]:
    """A server that answers, and is not Weights & Biases."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_that_is_another_falls_back_to_offline(launch, tmp_path, no_tracker):
    run = tmp_path / "run"
    environment = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": no_tracker}
    done = launch(*LSTM_SMOKE, "--run-dir", run, environment=environment)
    lines = [line for line in done.stderr.splitlines() if line.startswith("Weights & Biases: ")]
    assert len(lines) == 1
    assert lines[0].endswith(f"; recording offline in {run}/wandb")
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    assert history(file).keys() == {10, 20}


def test_a_key_that_cannot_be_one_does_not_end_the_run(launch, tmp_path):
    run = tmp_path / "run"
    environment = {"WANDB_API_KEY": "0" * 40 + "\n"}
    done = launch(*LSTM_SMOKE, "--run-dir", run, environment=environment)
    assert "Weights & Biases: " in done.stderr
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(
    ("mode", "words", "segments"),
    [("offline", (), 1), ("disabled", (), 0), ("online", ("--wandb", "disabled"), 0)],
)
def test_its_own_variable_and_our_option_are_heeded(launch, tmp_path, mode, words, segments):
    run = tmp_path / "run"
    environment = {"WANDB_MODE": mode, "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = launch(*LSTM_SMOKE, *words, "--run-dir", run, environment=environment)
    assert "Weights & Biases" not in done.stderr
    assert len(list(run.glob("wandb/offline-run-*"))) == segments


def test_a_client_that_dies_does_not_end_the_run(launch_environment, tmp_path):
    run = tmp_path / "run"
    command = ("launch/lstm.py", "--length", "10", "--steps", "60", "--log-every", "1", "--wandb", "offline")
    with Launched(command, run, launch_environment) as started:
        started.wait_for_line("step 10/")
        for client in psutil.Process(started.process.pid).children():
            client.kill()
        assert started.end() == 0
    assert started.said.count("warning: Weights & Biases:") == 1
    assert list(metrics_by_step(run)) == list(range(1, 61))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["TERM", "KILL"])
@pytest.mark.slow
def test_the_segments_of_an_interrupted_run_make_up_its_metrics(launch, launch_environment, tmp_path, number):
    run = tmp_path / "run"
    command = ("launch/lstm.py", "--length", "10", "--steps", "60", "--log-every", "1", "--wandb", "offline",
               "--evaluate-every", "10", "--checkpoint-every", "5")  # fmt: skip
    for at_step in (17, 38):
        with Launched(command, run, launch_environment) as started:
            started.wait_for_line(f"step {at_step}/")
            started.send_signal(number)
            assert started.end() == {signal.SIGTERM: 75, signal.SIGKILL: -signal.SIGKILL}[number]
    launch(*command, "--run-dir", run)
    segments = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    tracker_id = json.loads((run / "config.json").read_text())["tracker_run_id"]
    assert [segment.name for segment in segments] == [f"run-{tracker_id}.wandb"] * 3
    logged: dict[int, dict] = {}
    for segment in segments:
        logged.update(history(segment))
    expected = metrics_by_step(run)
    assert logged.keys() == expected.keys() == set(range(1, 61))
    for step, row in expected.items():
        assert {name: value for name, value in logged[step].items() if "/" in name} == row
