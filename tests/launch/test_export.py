"""What export.py writes is the run's network, whole, for this project and for the Hub's client."""

import base64
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from PIL import Image
from safetensors.torch import load_file

import cs324dist
from cs324dist.models.gan import Discriminator, Generator
from cs324dist.models.lstm import LSTM

REPOSITORY = Path(__file__).parents[2]
GAN = ("launch/gan.py", "--dataset", "fake", "--batch-size", "8", "--latent-dim", "8", "--ema-decay", "0.5",
       "--steps", "2", "--wandb", "disabled")  # fmt: skip
Done = subprocess.CompletedProcess[str]
LSTM_ = ("launch/lstm.py", "--length", "4", "--hidden-size", "8", "--steps", "4", "--checkpoint-every", "2",
         "--evaluate-every", "4", "--wandb", "disabled")  # fmt: skip


class PublishedGenerator(Generator, PyTorchModelHubMixin):
    pass


class PublishedLSTM(LSTM, PyTorchModelHubMixin):
    pass


@pytest.fixture(scope="module")
def runs(launch, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    launch(*GAN, "--run-dir", folder / "gan")
    launch(*LSTM_, "--run-dir", folder / "lstm")
    return folder


@pytest.fixture
def export(monkeypatch, capsys):
    """The script (or another one) in this process, as `__main__`."""

    def run(*words: object, check: bool = True, script: str = "export.py") -> Done:
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        try:
            runpy.run_path(str(REPOSITORY / "launch" / script), run_name="__main__")
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        done = Done([], code, *capsys.readouterr())
        assert not check or code == 0, done.stderr
        return done

    return run


@pytest.fixture
def push(launch, runs, tmp_path):
    """Export and push with a home of its own, without a login; the client reads it when it is imported."""

    def run(check: bool = True, **environment: str) -> Done:
        home = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "", **environment}
        words = (runs / "lstm", "--out", tmp_path / "model", "--push", "user/model")
        return launch("launch/export.py", *words, check=check, environment=home)

    return run


def refused(done) -> str:
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def assert_equal(model: torch.nn.Module, stored: Path) -> None:
    held, tensors = model.state_dict(), load_file(stored / "model.safetensors")
    assert held.keys() == tensors.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in tensors.items())
    assert not model.training


def test_a_generator_is_loaded_as_it_was_by_this_project_and_by_the_hubs_client(
    export, runs, tmp_path, launch
):
    out, (stored,) = tmp_path / "digits", runs.glob("gan/checkpoints/000000002-1/generator_ema")
    assert export(runs / "gan", "--out", out).stdout == f"{out}\n"
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "config.json",
        "grid.png",
        "model.safetensors",
    }
    for model in (
        cs324dist.load_model(out, Generator),
        cs324dist.load_generator(out),
        cs324dist.load_network(str(out), "generator", Generator),
        PublishedGenerator.from_pretrained(out, strict=True),
    ):
        assert_equal(model, stored)
        assert model.config == {"input_dim": 8}
    export("grid", runs / "gan", "--out", tmp_path / "run.png", script="sample.py")
    export("grid", out, "--out", tmp_path / "exported.png", script="sample.py")
    pictures = [Image.open(path).tobytes() for path in (out / "grid.png", *sorted(tmp_path.glob("*.png")))]
    assert pictures[0] == pictures[1] == pictures[2]
    done = export("grid", out, "--digit", 7, "--out", tmp_path / "7.png", script="sample.py", check=False)
    assert "are surely a 7" in refused(done)  # it is untrained, and not refused for its folder


def card_of(model: Path) -> str:
    return (model / "README.md").read_text()


def test_the_card_loads_a_network_that_says_no_arguments_by_its_weights(export, launch, tmp_path):
    run, out = tmp_path / "run", tmp_path / "model"
    launch("tests/training/stopping.py", "--steps", "1", "--run-dir", run)
    export(run, "--out", out)
    code = card_of(out).partition("```python\n")[2].partition("```")[0]
    assert "from your_own_file" not in code
    code = re.sub(r"snapshot_download\(.*\)", repr(str(out)), code)
    code = code.replace("...  # the Linear that the task makes", "torch.nn.Linear(1, 1, bias=False)")
    loaded = {"torch": torch}
    exec(code, loaded)
    assert_equal(loaded["network"], run / "checkpoints" / "000000001-1" / "model")


def test_the_card_lists_no_option_that_would_not_be_one(export, runs, tmp_path):
    export(runs / "lstm", "--out", tmp_path / "model")
    listed = [line.split() for line in card_of(tmp_path / "model").splitlines() if line.startswith("    --")]
    assert ["--length", "4"] in listed
    assert not [words for words in listed if len(words) == 1 or words[1] in ("false", "none")]


def test_a_checkpoint_of_an_lstm(export, runs, tmp_path):
    checkpoint = runs / "lstm" / "checkpoints" / "000000002-1"
    export(checkpoint, "--out", tmp_path / "model")
    for model in (
        cs324dist.load_model(str(tmp_path / "model"), LSTM),
        PublishedLSTM.from_pretrained(tmp_path / "model", strict=True),
    ):
        assert_equal(model, checkpoint / "lstm")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.eval_results is None  # step 2 was not evaluated, and the figures are not those of step 4


def test_the_card_has_the_metrics_of_the_step_and_the_command_that_repeats_the_run(export, runs, tmp_path):
    export(runs / "lstm", "--out", tmp_path / "model", "--license", "apache-2.0")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    last = json.loads((runs / "lstm" / "metrics.jsonl").read_text().splitlines()[-1])
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", last["eval/accuracy"])
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "cs324dist")
    assert card.data.tags == ["cs324dist", "lstm"]
    assert card.data.model_name == "model"
    (command,) = (line for line in card.text.splitlines() if "launch/lstm.py" in line)
    assert all(word in command for word in ("--length 4", "--hidden-size 8", "--steps 4"))
    assert "\n    --learning-rate 0.04\n" in card.text
    assert "from cs324dist.models.lstm import LSTM\n" in card.text


def test_the_cards_code_block_loads_the_network(export, runs, tmp_path, monkeypatch):
    export(runs / "lstm", "--out", tmp_path / "model")
    code = (tmp_path / "model" / "README.md").read_text().split("```python\n")[1].partition("```")[0]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, local_dir: tmp_path / local_dir)
    names: dict = {}
    exec(code, names)
    assert isinstance(names["network"], LSTM)


OWN = """
import torch
from torch import nn

from cs324dist import Config, Task


class Generator(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.config = {"width": width}
        self.layer = nn.Linear(width, 1)


class Own(Task[Config]):
    name = "own"
    presets = {"fast": Config(steps=1, wandb="disabled")}

    def __init__(self, config, device):
        super().__init__(config, device)
        self.networks = {"net": Generator(4)}
        self.optimizers = {"net": torch.optim.SGD(self.networks["net"].parameters(), 0.1)}

    def loss(self, batch):
        return self.networks["net"].layer(torch.ones(4)).mean(), {}
"""


def test_a_network_of_ones_own_may_have_the_name_of_one_of_ours(export, launch, tmp_path):
    script, run, out = tmp_path / "own.py", tmp_path / "run", tmp_path / "model"
    script.write_text(OWN)
    launch("launch/train.py", f"{script}:Own", "--run-dir", run)
    export(run, "--out", out)
    assert not (out / "grid.png").exists()
    assert "from your_own_file import Generator" in card_of(out)
    (command,) = (line for line in card_of(out).splitlines() if "launch/train.py" in line)
    words = shlex.split(command)[2:]  # after the precision and `python`
    launch(*words, "--run-dir", tmp_path / "again")
    assert (tmp_path / "again" / "status.json").exists()


def test_a_checkpoint_that_was_copied_under_another_name(export, runs, tmp_path):
    best = tmp_path / "best"
    shutil.copytree(runs / "lstm" / "checkpoints" / "000000002-1", best)
    export(best, "--out", tmp_path / "model")
    assert "after 2 steps" in card_of(tmp_path / "model")


def test_another_network(export, runs, tmp_path):
    export(runs / "gan", "--network", "discriminator", "--out", tmp_path / "model")
    assert not (tmp_path / "model" / "grid.png").exists()
    stored = runs / "gan" / "checkpoints" / "000000002-1" / "discriminator"
    assert_equal(cs324dist.load_model(tmp_path / "model", Discriminator), stored)


class TestRefusals:
    def test_a_network_that_there_is_not(self, export, runs, tmp_path):
        line = refused(export(runs / "gan", "--network", "x", "--out", tmp_path / "model", check=False))
        assert "holds discriminator, generator, generator_ema: give one of these as --network" in line
        assert not list(tmp_path.glob("*model*"))

    @pytest.mark.parametrize("is_folder", [True, False])
    def test_something_that_is_there_stays(self, export, runs, tmp_path, is_folder):
        out = tmp_path / "model"
        mine = out / "thesis.tex" if is_folder else out
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        assert "is there already: give" in refused(export(runs / "lstm", "--out", out, check=False))
        assert mine.read_text() == "mine"
        assert list(tmp_path.rglob("*.*")) == [mine] * is_folder

    def test_an_empty_folder_is_taken(self, export, runs, tmp_path):
        (tmp_path / "model").mkdir()
        export(runs / "lstm", "--out", tmp_path / "model")
        assert (tmp_path / "model" / "README.md").exists()

    def test_a_damaged_checkpoint_leaves_nothing(self, export, runs, tmp_path):
        run = tmp_path / "run"
        shutil.copytree(runs / "lstm", run)
        weights = run / "checkpoints" / "000000004-1" / "lstm" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
        assert f"{weights} is damaged" in refused(export(run, "--out", tmp_path / "model", check=False))
        assert [path.name for path in tmp_path.iterdir()] == ["run"]

    def test_a_folder_that_is_not_there(self, export, runs, tmp_path):
        done = export(runs / "lstm", "--out", tmp_path / "absent" / "model", check=False)
        assert "cannot be written: No such file or directory" in refused(done)

    def test_a_push_without_a_login(self, push, tmp_path):
        assert "--push needs a login: run `hf auth login`, or set HF_TOKEN" in refused(push(check=False))
        assert not (tmp_path / "model").exists()


class Hub(ThreadingHTTPServer):
    """What of the Hub an upload needs: a repository is made, files are announced, and sent in a commit."""

    def __init__(self, refuses: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.refuses, self.made, self.files = refuses, [], {}


class Asked(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        assert self.headers["Authorization"] == "Bearer hf_secret"
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        repository = f"http://127.0.0.1:{self.server.server_port}/user/model"
        if self.server.refuses:
            return self.answer(403, {"error": "no room for you"})
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            return self.answer(200, {"url": repository, "name": "user/model"})
        if self.path.endswith("/preupload/main"):
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self.answer(200, {"files": files})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(200, {"commitUrl": f"{repository}/commit/1", "commitOid": "1"})
        return self.answer(200, {})  # of the card, which is checked before it is sent

    def do_GET(self) -> None:
        self.answer(200, {"id": "user/model", "sha": "0" * 40, "siblings": []})

    def answer(self, code: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(request) -> Iterator[Hub]:
    with Hub(getattr(request, "param", False)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_push_sends_every_file_to_the_hub(push, tmp_path, hub):
    out = tmp_path / "model"
    login = {"HF_TOKEN": "hf_secret", "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
    push(**login)
    assert [(repository["organization"], repository["name"]) for repository in hub.made] == [
        ("user", "model")
    ]
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert 'snapshot_download("user/model", local_dir="model")' in hub.files["README.md"].decode()


@pytest.mark.parametrize("hub", [True], indirect=True)
def test_a_push_that_fails_says_so_in_one_line_and_the_folder_is_there(push, tmp_path, hub):
    out = tmp_path / "model"
    login = {"HF_TOKEN": "hf_secret", "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
    done = push(check=False, **login)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --push user/model failed (")
    assert line.endswith(f"to try again: hf upload user/model {out}")
    assert len(list(out.iterdir())) == 3
    assert done.returncode == 2
