"""What sample.py draws from a run is what the run's generator makes of the seed's latents."""

import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import cs324dist
from cs324dist.data.streams import Stream
from cs324dist.tasks.gan.networks import Generator

SCRIPT = Path(__file__).parents[2] / "launch" / "sample.py"
PITCH, TILE = 30, 28  # pixels from tile to tile, and of a tile; a border of two all around


class PublishedGenerator(Generator, PyTorchModelHubMixin):
    pass


class Answer(NamedTuple):
    code: int
    out: str
    errors: list[str]


Draw = Callable[..., Answer]


@pytest.fixture(scope="module")
def gan_run(launch, tmp_path_factory) -> Path:
    """A run with two checkpoints, in fewer steps than the smoke preset's 20."""
    run = tmp_path_factory.mktemp("runs") / "gan"
    few = ("--steps", "6", "--checkpoint-every", "3")
    launch(
        *("launch/gan.py", "--preset", "smoke", "--dataset", "fake", "--wandb", "disabled"),
        *(*few, "--run-dir", run),
    )
    return run


@pytest.fixture
def newest(gan_run) -> Path:
    return gan_run / "checkpoints" / "000000006-1"


@pytest.fixture
def draw(monkeypatch, capsys) -> Draw:
    """The script in this process, as `__main__`."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        said = capsys.readouterr()
        return Answer(code, said.out, said.err.splitlines())

    return run


@torch.no_grad()
def images_of(folder: Path, seed: int, count: int) -> Tensor:
    """A model folder's images of the seed's first latents, one by one."""
    generator = Generator()
    generator.load_state_dict(load_file(folder / "model.safetensors"))
    generator.eval()
    z = Stream(seed, "latents/sampling").normals(torch.arange(count), 100)
    return torch.cat([generator(latent[None]) for latent in z])


def tiles(path: Path, rows: int, columns: int) -> np.ndarray:
    """The tiles of a grid, row by row, as grey levels."""
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "L")
        assert picture.size == (PITCH * columns + 2, PITCH * rows + 2)
        levels = np.asarray(picture).astype(int)
    corners = [(2 + PITCH * row, 2 + PITCH * column) for row in range(rows) for column in range(columns)]
    return np.stack([levels[y : y + TILE, x : x + TILE] for y, x in corners])


def assert_shows(found: np.ndarray, images: Tensor) -> None:
    """Grey level 0 is -1 and 255 is 1, but for the last bit's rounding."""
    expected = (images[:, 0].numpy() + 1) * 127.5
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 0.51
    assert expected.std() > 1  # not a grey square, which would look like any other


class TestGrid:
    def test_it_shows_the_averaged_generators_images_row_by_row(self, draw, gan_run, newest, tmp_path):
        out = tmp_path / "grid.png"
        answer = draw("grid", gan_run, "--rows", 2, "--columns", 3, "--seed", 5, "--out", out)
        assert (answer.code, answer.out.strip(), answer.errors) == (0, str(out), [])
        assert_shows(tiles(out, 2, 3), images_of(newest / "generator_ema", 5, 6))

    def test_raw_weights_are_those_of_the_generator_that_trains(self, draw, gan_run, newest, tmp_path):
        out = tmp_path / "raw.png"
        draw("grid", gan_run, "--rows", 1, "--columns", 3, "--weights", "raw", "--out", out)
        raw, averaged = (images_of(newest / name, 0, 3) for name in ("generator", "generator_ema"))
        assert_shows(tiles(out, 1, 3), raw)
        assert (raw - averaged).abs().max() > 0.01  # more than `assert_shows` overlooks


def test_a_file_of_tensors_holds_the_seeds_images_as_float32(draw, gan_run, newest, tmp_path):
    out, count = tmp_path / "samples.safetensors", 501  # more than go through the generator at once
    assert draw("tensor", gan_run, "--count", count, "--seed", 2, "--out", out).code == 0
    file = load_file(out)
    assert file.keys() == {"images"}
    images = file["images"]
    assert (images.shape, images.dtype) == ((count, 1, 28, 28), torch.float32)
    assert -1 <= images.min() < images.max() <= 1
    torch.testing.assert_close(images, images_of(newest / "generator_ema", 2, count), rtol=0, atol=1e-5)


class TestInterpolation:
    @pytest.mark.parametrize("method", ["linear", "spherical"])
    def test_the_ends_are_the_seeds_images(self, draw, gan_run, newest, tmp_path, method):
        out = tmp_path / "strip.png"
        seeds = ("--start-seed", 3, "--end-seed", 8)
        answer = draw("interpolate", gan_run, *seeds, "--between", 4, "--method", method, "--out", out)
        assert answer.code == 0
        strip = tiles(out, 1, 4 + 2)
        ends = torch.cat([images_of(newest / "generator_ema", seed, 1) for seed in (3, 8)])
        assert_shows(strip[[0, -1]], ends)
        steps = np.abs(np.diff(strip, axis=0)).mean((1, 2))
        assert (steps > 0).all()
        assert steps.max() < np.abs(strip[-1] - strip[0]).mean()

    @pytest.mark.parametrize(
        ("ends", "named"),
        [
            ((), ["start", "end"]),
            (("--start-seed", 1), ["end"]),
            (("--start-seed", 1, "--start-digit", 4, "--end-digit", 1), ["start"]),
        ],
        ids=["no end", "one end", "one end twice"],
    )
    def test_each_end_is_a_digit_or_a_seed(self, draw, gan_run, tmp_path, ends, named):
        out = tmp_path / "strip.png"
        answer = draw("interpolate", gan_run, *ends, "--out", out)
        assert (answer.code, out.exists()) == (2, False)
        assert answer.errors == [f"error: give either --{end}-digit or --{end}-seed" for end in named]


class TestRefusals:
    @pytest.fixture
    def refused(self, draw, tmp_path):
        """Draw a grid over an older picture: refused in one line, and the picture stands."""

        def run(*arguments: object) -> str:
            out = tmp_path / "grid.png"
            out.write_bytes(b"the last one")
            answer = draw("grid", *arguments, "--out", out)
            assert (answer.code, answer.out, out.read_bytes()) == (2, "", b"the last one")
            (line,) = answer.errors
            return line

        return run

    @pytest.mark.parametrize("file", ["generator_ema/model.safetensors", "optimizers.safetensors"])
    def test_a_damaged_checkpoint_is_named_and_none_other_is_taken(self, refused, gan_run, tmp_path, file):
        run = tmp_path / "damaged"
        shutil.copytree(gan_run, run, copy_function=os.link)
        path = run / "checkpoints" / "000000006-1" / file
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.unlink()  # it is the run's own file, by another name
        path.write_bytes(content)
        assert refused(run).startswith(f"error: {path} is damaged")

    def test_the_best_of_a_run_that_keeps_none(self, refused, gan_run):
        assert refused(gan_run, "--best").startswith(f"error: {gan_run} was trained without --keep-best ")


class TestLoadGenerator:
    def test_a_network_s_folder_needs_no_checkpoint_around_it(self, draw, newest, tmp_path):
        folder = tmp_path / "digits"
        shutil.copytree(newest / "generator_ema", folder)
        for generator in (
            cs324dist.load_model(folder, Generator),
            cs324dist.load_generator(folder),
            PublishedGenerator.from_pretrained(folder, strict=True),
        ):
            assert generator.config == {"input_dim": 100}
            assert not generator.training
            assert_holds(generator, folder)
        assert draw("grid", folder, "--rows", 1, "--columns", 2, "--out", tmp_path / "grid.png").code == 0
        assert_shows(tiles(tmp_path / "grid.png", 1, 2), images_of(folder, 0, 2))


def assert_holds(generator: Generator, folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    held = generator.state_dict()
    assert held.keys() == stored.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in stored.items())
