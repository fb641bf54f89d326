"""benchmarks/measure_gan.py: figures that repeat, beside what they are to be held against."""

import json
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")


@pytest.mark.slow
def test_figures_repeat_to_the_last_digit_and_real_digits_are_near(launch, mnist_root, tmp_path):
    run = tmp_path / "run"
    launch("launch/gan.py", "--preset", "smoke", "--dataset", "fake", "--wandb", "disabled", "--run-dir", run)
    command = ("benchmarks/measure_gan.py", run, "--count", "1000", "--data-root", mnist_root)
    stdout = launch(*command).stdout
    figures = json.loads(stdout)
    assert 0 < figures["floor"] < 5  # real digits are near digits, noise is far from them
    assert min(figures["frechet_distance"], figures["frechet_distance_to_training_images"]) > 50
    assert 0.97 < figures["sure_of_test_images"] < 0.98
    assert sum(figures["shares"]) == pytest.approx(1)
    assert launch(*command).stdout == stdout
    other = json.loads(launch(*command, "--seed", "1").stdout)
    assert other["frechet_distance"] != figures["frechet_distance"]


def test_a_run_without_a_generator_is_refused(launch, tmp_path):
    done = launch("benchmarks/measure_gan.py", tmp_path, check=False)
    assert (done.returncode, done.stderr.count("error: ")) == (2, 1)


def test_neighbours_are_those_of_a_plain_loop():
    from gan_results import lies_among, nearest

    torch.manual_seed(0)
    points, known = (
        torch.randn(700, 3),
        0.7 * torch.randn(600, 3),
    )  # some lie outside, and all take two pieces

    def distance(a, b):
        return sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5

    listed = known.tolist()
    reach = [sorted(distance(one, other) for other in listed)[3] for one in listed]  # the first is itself
    to_known = [[distance(point, one) for one in listed] for point in points.tolist()]
    among = [any(d <= r for d, r in zip(row, reach, strict=True)) for row in to_known]
    assert lies_among(points, known).tolist() == among
    assert 50 < sum(among) < 650
    least, place = nearest(points, known)
    assert least.tolist() == pytest.approx([min(row) for row in to_known], abs=1e-5)
    assert place.tolist() == [row.index(min(row)) for row in to_known]


def test_copies_of_training_images_are_found_out(monkeypatch):
    import gan_results

    torch.manual_seed(0)
    images = {"train": torch.rand(50, 1, 28, 28) * 2 - 1, "test": torch.rand(40, 1, 28, 28) * 2 - 1}
    copies = images["train"][:15]
    for name, value in {
        "trained": lambda *run: None,
        "load_generator": lambda run: None,
        "latents": lambda *draw: None,
        "generate": lambda *draw: copies,
        "real_images": images.get,
    }.items():
        monkeypatch.setattr(gan_results, name, value)
    of_copies, of_test = gan_results.neighbours()
    assert (of_copies["precision"], of_copies["recall"], of_copies["count"]) == (1, 1, 15)
    assert of_copies["to_nearest_training_image"] < 1e-2 < of_test["to_nearest_training_image"]
