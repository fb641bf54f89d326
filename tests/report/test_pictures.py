import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from made_runs import make_gan, make_lstm
from PIL import Image

from cs324dist.errors import UserError
from cs324dist.report.pictures import LARGEST, METHODS, WALK_FRAMES, film, walk
from cs324dist.report.reading import read_run
from cs324dist.tasks.gan.sampling import STRIP_IMAGES, generate, interpolate, latents, load_generator


def decoded(source: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
        return np.asarray(picture.convert("L")).astype(int)


def test_a_film_shows_the_samples_in_their_order(runs: Path) -> None:
    run = read_run(runs / "gan-fast-0", "gan")
    shown = film(run, 60)
    assert [frame.label for frame in shown] == [f"step {step}" for step in (100, 200, 300, 400)]
    assert shown[3].shares == pytest.approx([0.104, 0.096, *[0.1] * 8])
    for frame, path in zip(shown, run.samples.values(), strict=True):
        with Image.open(path) as stored:
            original = np.asarray(stored).astype(int)
        assert np.abs(decoded(frame.sources[0]) - original).mean() < 20  # noise, which compresses worst


def test_a_long_film_is_thinned_from_first_to_last(tmp_path: Path) -> None:
    run = read_run(make_gan(tmp_path / "run", frames=20, checkpoint=False), "run")
    labels = [frame.label for frame in film(run, 5)]
    assert len(labels) == 5
    assert (labels[0], labels[-1]) == ("step 100", "step\u00202\u202f000")


def test_pictures_that_are_none_are_named(tmp_path: Path) -> None:
    path = make_gan(tmp_path / "run", checkpoint=False)
    (path / "samples" / "000000100.png").write_bytes(b"<script>")
    (path / "samples" / "000000200.png").write_bytes((path / "samples" / "000000300.png").read_bytes()[:5000])
    (path / "samples" / "000000500.png").mkdir()
    run = read_run(path, "run")
    assert [frame.label for frame in film(run, 60)] == ["step 300", "step 400"]
    assert run.problems == ["samples/000000100.png and 2 more cannot be read: the film goes on without"]


def test_a_large_picture_of_any_task_is_made_smaller(tmp_path: Path) -> None:
    path = make_lstm(tmp_path / "run")
    (path / "samples").mkdir(exist_ok=True)
    Image.new("RGB", (1600, 800), "red").save(path / "samples" / "000000100.png")
    (frame,) = film(read_run(path, "run"), 60)
    assert decoded(frame.sources[0]).shape == (LARGEST // 2, LARGEST)


def test_a_walk_goes_from_one_end_to_the_other_by_both_methods(runs: Path) -> None:
    run = read_run(runs / "gan-fast-0", "gan")
    walked = walk(run)
    generator = load_generator(run.path)
    ends = (generate(generator, latents(generator, 0, 2)) + 1) * 127.5
    assert walked.ends == "from one image to another"
    assert (len(walked.frames), walked.frames[0].label) == (WALK_FRAMES, f"1 of {WALK_FRAMES}")
    for column in (0, 1):
        for frame, image in ((walked.frames[0], ends[0, 0]), (walked.frames[-1], ends[1, 0])):
            shown = torch.from_numpy(decoded(frame.sources[column]))
            assert (shown - image).abs().max() < 1
    between = [interpolate(*latents(generator, 0, 2), WALK_FRAMES, method)[20:21] for method in METHODS]
    for source, z in zip(walked.frames[20].sources, between, strict=True):
        image = (generate(generator, z)[0, 0] + 1) * 127.5
        assert (torch.from_numpy(decoded(source)) - image).abs().max() < 1
    assert list(walked.strips) == ["linear", "spherical"]
    for strip in walked.strips.values():
        assert decoded(strip).shape == (32, 30 * STRIP_IMAGES + 2)


def test_no_walk_without_a_generator(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint yet"):
        walk(read_run(make_lstm(tmp_path / "run"), "run"))
