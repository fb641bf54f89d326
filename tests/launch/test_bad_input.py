"""Bad input as a user meets it: one `error:` line for each thing to change, exit code 2, nothing touched."""

import subprocess
from pathlib import Path

import pytest
from launched import PACKAGE

EXIT_REFUSED = 2
TINY = ("launch/lstm.py", "--length", "4", "--hidden-size", "8", "--steps", "2", "--wandb", "disabled")
Content = dict[str, bytes | None]
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def lstm_run(launch, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "lstm"
    launch(*TINY, "--run-dir", run)
    return run


def content_of(folder: Path) -> Content:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def assert_refused(done: Done, *expected: str) -> None:
    """Its lines are exactly these: each is given by how it begins and what else it holds, divided by …."""
    assert done.returncode == EXIT_REFUSED, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == len(expected), done.stderr
    for line, parts in zip(sorted(lines), sorted(expected), strict=True):
        start, *rest = parts.split(" … ")
        assert line.startswith(f"error: {start}")
        assert all(part in line for part in rest), line


LSTM, SAMPLE = " ".join(TINY), "launch/sample.py grid"
REFUSED = {  # RUN is a run of the LSTM, HERE a folder with a file
    f"{LSTM} --run-dir HERE/\udcff": ["HERE/ is not UTF-8 … give another name"],
    "launch/audit.py HERE/\x1b[31mred\n": ["HERE/[31mred is not a run folder … give"],
    f"{LSTM} --length 6 --hidden-size 16 --steps 1 --log-every 1 --run-dir RUN": [
        "--length 6 … run's 4", "--hidden-size 16 … run's 8", "--steps 1 … run's 2"],
    "launch/gan.py --dataset fake --run-dir RUN": ["RUN holds a run of 'lstm'"],
    f"{LSTM} --run-dir HERE": ["HERE is not a run folder … give an empty or a new"],
    f"{LSTM} --run-dir HERE/mine/run": ["HERE/mine/run cannot be written to … Not a directory"],
    f"{SAMPLE} HERE/absent --out HERE/grid.png": ["HERE/absent is neither a run nor a … give a run folder"],
    f"{SAMPLE} RUN --out HERE/grid.png": ["RUN/checkpoints/000000002-1 holds lstm, and no generator … give"],
    f"{SAMPLE} RUN --out HERE": ["HERE is a folder: give the name of a file"],
    "launch/report.py RUN --out HERE": ["HERE is a folder: give the name of a file"],
}  # fmt: skip


@pytest.mark.parametrize(("command", "said"), REFUSED.items(), ids=range(len(REFUSED)))
def test_it_is_refused_and_every_byte_is_kept(launch, lstm_run, tmp_path, command, said):
    def placed(word: str) -> str:
        return word.replace("RUN", str(lstm_run)).replace("HERE", str(tmp_path))

    (tmp_path / "mine").write_text("mine")
    before = content_of(lstm_run), content_of(tmp_path)
    done = launch(*map(placed, command.split(" ")), check=False)
    assert_refused(done, *map(placed, said))
    assert (content_of(lstm_run), content_of(tmp_path)) == before


def test_a_truncated_file_of_the_data_set_is_named_before_a_run_begins(launch, tmp_path, mnist_root):
    name, raw = "t10k-images-idx3-ubyte", tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (mnist_root / "MNIST" / "raw").iterdir():
        if path.name == name:
            (raw / name).write_bytes(path.read_bytes()[:1000])
        else:
            (raw / path.name).symlink_to(path)
    run = tmp_path / "run"
    options = ("--data-root", tmp_path / "data", "--steps", "1", "--wandb", "disabled", "--run-dir", run)
    done = launch("launch/gan.py", *options, check=False)
    assert_refused(done, f"{raw / name} is damaged … delete it")
    assert not run.exists()
    assert (raw / name).stat().st_size == 1000


def test_a_batch_that_two_processes_cannot_share_is_refused_once(launch, tmp_path):
    run = tmp_path / "run"
    done = launch(*TINY, "--batch-size", "63", "--run-dir", run, processes=2, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "error: --batch-size 63 is not divisible by the number of processes, 2: give a" in done.stderr
    assert f"{PACKAGE}/" not in done.stderr  # torchrun's traceback has no frame of ours
    assert not run.exists()


def test_two_commands_for_one_new_folder(launch, lstm_run, tmp_path):
    """The second finds the folder new, and owned; when it has it, it is a run of other settings."""
    run, fault = tmp_path / "run", {"FAULT": f"another was faster: {lstm_run}"}
    command = ("launch/train.py", "tests/faulty.py:LSTM", *TINY[1:], "--length", "5", "--run-dir", run)
    assert_refused(launch(*command, environment=fault, check=False), "--length 5 … run's 4")
    left, before = content_of(run), content_of(lstm_run)
    assert left == {name: content for name, content in before.items() if not name.endswith(".lock")}
