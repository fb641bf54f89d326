"""benchmarks/measure_gan.py: figures that repeat, beside what they are to be held against."""

import json
import math

import pytest
import torch
from gan_results import nearest


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


def test_neighbours_are_those_of_a_plain_loop():
    torch.manual_seed(0)
    points, known = torch.randn(700, 3), torch.randn(600, 3)  # all take two pieces
    listed = known.tolist()
    to_known = [[math.dist(point, one) for one in listed] for point in points.tolist()]
    least, place = nearest(points, known)
    assert least.tolist() == pytest.approx([min(row) for row in to_known], abs=1e-5)
    assert place.tolist() == [row.index(min(row)) for row in to_known]
