"""The pages of results, speed and scaling say what the stored results say."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import common
import pytest
import results_page
import torch

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def stored(tmp_path: Path, monkeypatch) -> Path:
    """The results, to be changed."""
    stored = shutil.copytree(common.RESULTS, tmp_path / "results")
    for module in (common, results_page):
        monkeypatch.setattr(module, "RESULTS", stored)
    return stored


@pytest.mark.parametrize("name", ["results", "performance", "distributed", "gpu", "proof"])
def test_the_page_is_the_one_that_the_stored_results_make(name: str) -> None:
    assert (REPOSITORY / "docs" / f"{name}.md").read_text() == results_page.page(name)


def test_every_stored_result_is_of_a_commit() -> None:
    for path in common.RESULTS.rglob("*.json"):
        for made in results_page.environments([json.loads(path.read_text())]):
            assert re.fullmatch("[0-9a-f]{40}", made["commit"]), path  # with changes it ends in -dirty


def test_a_comparison_is_on_the_page_as_soon_as_it_is_stored(stored: Path) -> None:
    speed = common.load("speed")
    what = "GAN step of preset fast, --micro-batches 2 against none"
    milliseconds = {"slower_ms": 96.04, "faster_ms": 80}
    row = {"what": what, "goal": "at most 1.25", "ratios": [1.1, 1.2, 1.4], **milliseconds}
    line = f"| {what} | 1.20 | 1.10 to 1.40 | at most 1.25 | yes | 96.0 | 80.0 | \N{EN DASH} |"
    for rows, lines in ((speed["rows"], []), ([*speed["rows"], row], [line])):
        (stored / "speed.json").write_text(json.dumps({**speed, "rows": rows}))
        page = results_page.page("performance").splitlines()
        assert [line for line in page if line.startswith(f"| {what}")] == lines


def test_the_same_bits_are_on_the_page_as_soon_as_they_are_stored(stored: Path) -> None:
    row = {"task": "gan", "precision": "no", "sha256": "0123456789abcdef", "layouts": [[1, 2], [8, 1]]}
    row |= {"killed_on": [7, 2], "mismatches": ["8 processes of 1 threads: W differs"], "seconds": 99}
    made = {"environment": common.load("chaos")["environment"], "minutes": 20.1, "rows": [row]}
    (stored / "same_bits.json").write_text(json.dumps(made))
    line = "| gan | float32 | `0123456789ab` | 1 x 2, 8 x 1 | 7, 2 | 1 |"
    space = "\N{NARROW NO-BREAK SPACE}"
    assert line.replace(" x ", f"{space}\N{MULTIPLICATION SIGN}{space}") in results_page.page("results")


def test_what_a_gpu_showed_is_on_its_page(stored: Path) -> None:
    row = {"part": "speed", "what": "GAN step", "found": "1.2 ms | 3\nlines", "good": False}
    (stored / "gpu.json").write_text(json.dumps({"pretended": False, "rows": [row]}))
    page = results_page.page("gpu")
    assert "| speed | GAN step | 1.2 ms \\| 3 lines | **no** |" in page.splitlines()
    assert "Nothing here has been run" not in page


def test_the_cases_of_comparisons_and_of_the_check_of_a_gpu_are_there() -> None:
    from cases import CASES
    from gpu_check import GROUPS, SPEED, STEPS
    from speed import COMPARISONS

    compared = {case for group in COMPARISONS.values() for *cases, _ in group.values() for case in cases}
    assert compared | {case for case, _ in SPEED.values()} <= CASES.keys()
    files = (task.partition(":")[0] for task, _, _ in STEPS.values() if "/" in task)
    assert all((REPOSITORY / file).is_file() for file in files)
    assert all(sum(group.values()) < 9 * 60 for group in GROUPS)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_gpu_has_done_its_work_when_the_clock_is_read(monkeypatch, on_gpu: bool) -> None:
    import cases

    done: list[object] = []
    monkeypatch.setattr(cases, "ON_GPU", on_gpu)
    monkeypatch.setattr(cases.torch.cuda, "synchronize", lambda: done.append("waited"))
    monkeypatch.setattr(cases.time, "perf_counter", lambda: done.append("read") or float(len(done)))
    cases.milliseconds(done.append, 4, warm_up=1)
    on_cpu = [0, "read", 1, 2, "read", "read", 3, 4, "read"]
    assert done == ([0, "waited", "read", 1, 2, 3, 4, "waited", "read"] if on_gpu else on_cpu)


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([1.006, 1.2], "slower"),
        ([1.004, 1.2], "no difference could be measured"),  # the page shows 1.00
        ([0.9, 1.1], "no difference could be measured"),
        ([0.9, 0.996], "no difference could be measured"),
        ([0.9, 0.994], "faster"),
    ],
)
def test_a_measure_has_an_effect_where_the_shown_range_excludes_one(ratios: list[float], said: str) -> None:
    assert results_page.effect({"ratios": ratios}) == said


def assert_as_stored(made: list[common.Row], *names: str) -> None:
    """That the page can read what a benchmark finds."""
    for name in names:
        assert {tuple(row) for row in made} == {tuple(row) for row in common.load(name)["rows"]}


@pytest.mark.parametrize("part", ["course", "fast", "final", "ablation", "generalisation", "certain"])
def test_a_part_of_the_lstms_results_is_what_the_page_reads(part: str, monkeypatch) -> None:
    import lstm_results

    new_trainer, train, count = lstm_results.new_trainer, lstm_results.train, lstm_results.count
    short = {"length": 3, "batch_size": 4}
    for name, value in {
        "SEEDS": range(1),
        "UNSEEN_LENGTHS": (1, 5),
        "on_each_core": lambda *work: [*map(*work)],
        "train": lambda trainer, most, least=0: train(trainer, 2),
        "new_trainer": lambda *some, **options: new_trainer(*some, **{**options, **short}),
        "finished": lambda task, **_: new_trainer("fast", **short).task.model,
        "count": lambda model, length, batches: count(model, length, [next(iter(batches))]),
    }.items():
        monkeypatch.setattr(lstm_results, name, value)
    assert_as_stored(getattr(lstm_results, part)(), f"lstm/{part}")


def test_a_timed_run_of_the_lstm_is_what_the_page_reads() -> None:
    from lstm_results import timed_run

    made = timed_run(5, "--steps 2 --batch-size 4 --evaluate-every 2", 10_000)
    assert_as_stored([made], "lstm/long", "lstm/million")


GAN_PARTS = ["course", "fast", "bf16", "best", "draws", "pace", "ablation", "neighbours"]
TINY_GAN = {
    "launch/gan.py": ("--preset", "smoke", "--dataset", "fake", "--batch-size", "4", "--log-every", "2"),
    "benchmarks/measure_gan.py": ("--count", "1000"),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", GAN_PARTS)
def test_a_part_of_the_gans_results_is_what_the_page_reads(part: str, tmp_path, launch, monkeypatch) -> None:
    import gan_results

    from cs324dist.tasks.gan.images import load_images

    def tiny(script: str, *words: object, **environment: str) -> str:
        steps = ("--steps", "102" if part == "pace" else "2") if script == "launch/gan.py" else ()
        words = (*map(str, words), *TINY_GAN.get(script, ()), *steps)
        return launch(script, *words, environment=environment).stdout

    seeds = gan_results.seeds
    for name, value in {
        "load_images": lambda _, *where: load_images("fake", *where),
        "RUNS": tmp_path,
        "IMAGES": tmp_path,
        "run_python": tiny,
        "on_each_core": lambda *work: [*map(*work)],
        "pictures": lambda *some: None,  # their digits cannot be read
        "seeds": lambda name, count, *options: seeds(name, 1, *options),
        "COURSE_SEEDS": 1,
        "SEEDS": 1,
        "DRAWS": 1,
    }.items():
        monkeypatch.setattr(gan_results, name, value)
    assert_as_stored(getattr(gan_results, part)(), f"gan/{part}")


def test_work_on_each_core_has_one_thread(monkeypatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setenv("CS324DIST_THREADS", "7")
    try:
        assert common.on_each_core(os.getenv, ["CS324DIST_THREADS"] * 3) == ["1"] * 3
    finally:
        torch.set_num_threads(threads)


PARTS = """
import os
from pathlib import Path
import common
common.RESULTS = common.REPOSITORY = Path(__file__).parent
def first(): return [{'process': os.getpid()}]
def second(): return first()
common.run_parts('Parts.', '.', first, second)
"""


def test_several_parts_have_a_process_each(tmp_path: Path) -> None:
    (script := tmp_path / "parts.py").write_text(PARTS)
    environ = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'benchmarks'}"}
    subprocess.run([sys.executable, script], env=environ, check=True)
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second"))
    assert first["rows"] != second["rows"]


@pytest.mark.slow
def test_a_gans_figures_repeat_to_the_last_digit_and_real_digits_are_near(launch, mnist_root, tmp_path):
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


def test_neighbours_are_those_of_a_plain_loop() -> None:
    from gan_results import lies_among, nearest

    torch.manual_seed(0)
    points, known = 2 * torch.randn(700, 3), torch.randn(600, 3)  # all take two pieces
    listed = known.tolist()
    to_known = [[math.dist(point, one) for one in listed] for point in points.tolist()]
    least, place = nearest(points, known)
    assert least.tolist() == pytest.approx([min(row) for row in to_known], abs=1e-5)
    assert place.tolist() == [row.index(min(row)) for row in to_known]
    reach = [sorted(math.dist(one, other) for other in listed)[3] for one in listed]  # of the third neighbour
    inside = sum(any(map(float.__le__, row, reach)) for row in to_known)
    assert lies_among(points, known) == inside / len(points)
