"""The figures among the README's results are the stored ones, and so is what it says of its picture."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text().replace("\N{NARROW NO-BREAK SPACE}", " ")
FIGURE = r"(?<![\w.])\d+(?: \d{3})*(?:\.\d+)?"


def stored(name: str) -> dict[str, Any]:
    return json.loads((REPOSITORY / "benchmarks" / "results" / f"{name}.json").read_text())


def rows(name: str, **values: object) -> list[dict[str, Any]]:
    return [row for row in stored(name)["rows"] if values.items() <= row.items()]


def lstm_of_50_digits() -> list[object]:
    course = rows("lstm/course", model="lstm", length=50, data="endless")
    in_time = [row for row in course if row["solved"] and row["solved"] <= 1500]
    fast = rows("lstm/fast", length=50)
    steps = [row["solved"] for row in fast if row["solved"]]
    return [50, len(in_time), len(course), 1500, min(steps), max(steps), len(steps), len(fast)]


def lstm_of_a_million_digits() -> list[object]:
    (row,) = rows("lstm/million")
    assert row["accuracy"] == 1  # all of them right
    steps = int(re.search(r"--steps (\d+)", row["command"])[1])
    return [row["length"], steps, f"{row['seconds'] / 60:.1f}", row["trials"]]


def lstm_of_any_length() -> list[object]:
    models = rows("lstm/proven", boxes=True)
    seconds = [round(60 * row["minutes"]) for row in models]
    return [min(seconds), max(seconds), sum(row["proven"] == 10 for row in models), len(models)]


def gan_runs(part: str) -> list[object]:
    runs = rows(f"gan/{part}")
    distances, seconds = ([row[name] for row in runs] for name in ("frechet_distance", "seconds"))
    (steps,) = {row["steps"] for row in runs}
    return [
        *(f"{statistics.mean(distances):.1f}", f"{statistics.stdev(distances):.1f}", steps),
        *(f"{statistics.mean(seconds):.0f}", f"{statistics.stdev(seconds):.0f}"),
    ]


def gan() -> list[object]:
    course = rows("gan/course", recipe="every second step")
    assert len(course) == 3
    (steps,) = {row["steps"] for row in course}
    distances = [row["frechet_distance"] for row in course]
    (pace,) = rows("gan/pace", recipe="course")
    best = rows("gan/best")
    assert {row["environment"]["precision"] for row in best} == {"bf16"}
    clear = (statistics.mean(row[of] for row in best) for of in ("sure", "sure_of_test_images"))
    return [
        f"{course[0]['floor']:.1f}",
        *(f"{statistics.mean(distances):.1f}", f"{statistics.stdev(distances):.1f}", steps),
        f"{steps * pace['milliseconds'] / 1000:.0f}",
        *gan_runs("fast"),
        *gan_runs("best"),
        *(f"{100 * share:.0f}" for share in clear),
    ]


RESULTS = {
    "LSTM, 50 digits": lstm_of_50_digits,
    "LSTM, 1 000 000 digits": lstm_of_a_million_digits,
    "LSTM, every length": lstm_of_any_length,
    "GAN, Fréchet distance": gan,
}


def test_every_line_of_the_results_is_known() -> None:
    table = README.partition("\n## Results\n")[2].partition("\n## ")[0]
    lines = [line for line in table.splitlines() if re.match(r"\| \w", line)]
    assert [line[2:].partition(" (")[0].partition(" |")[0] for line in lines] == list(RESULTS)


@pytest.mark.parametrize("line", RESULTS)
def test_the_figures_of_a_line_are_the_stored_ones(line: str) -> None:
    (text,) = re.findall(rf"^\| {line}.*$", README, re.MULTILINE)
    figures = [re.sub(r"\s", "", figure) for figure in re.findall(FIGURE, text)]
    assert figures == [str(figure) for figure in RESULTS[line]()]


def test_the_price_in_memory_is_the_stored_one() -> None:
    mib = stored("memory")["mib"]
    assert f"{mib['8'] / mib['1']:.2f} times the memory" in README


def test_the_machine_and_the_versions_are_those_of_the_results() -> None:
    torch, accelerate = (re.search(rf"{name} ([\d.]+\d)", README)[1] for name in ("torch", "accelerate"))
    lstm, gan = ("course", "fast", "million", "proven"), ("course", "fast", "pace")
    for name in (*(f"lstm/{part}" for part in lstm), *(f"gan/{part}" for part in gan), "killed_run"):
        environment = stored(name)["environment"]
        assert environment["cores"] == 2, name  # "on two CPU cores"
        assert environment["packages"]["torch"].startswith(f"{torch}."), name
        assert environment["packages"]["accelerate"].startswith(f"{accelerate}."), name


def test_the_picture_shows_what_is_said_of_it() -> None:
    runs = stored("killed_run")["runs"]
    whole, killed = runs["whole"], runs["killed"]
    assert [owner["processes"] for owner in killed["owners"]][1:] == [3, 2]  # "on three processes and on two"
    assert (whole["curve"], whole["sha256"]) == (killed["curve"], killed["sha256"])
    one, two = ({row["step"]: row["loss"] for row in runs[f"ddp {n}"]["curve"]} for n in (1, 2))
    apart = [step for step in one if abs(one[step] - two[step]) > 0.1 * one[step]]
    said = int(re.search(r"they\s+separate after (\d+) steps", README)[1])
    assert min(apart) == said + 1
