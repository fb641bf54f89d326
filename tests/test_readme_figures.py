"""The figures among the README's results are those of results.md, and so is what it says of its picture."""

import json
import re
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
RESULTS = (REPOSITORY / "docs" / "results.md").read_text()
FIGURES = r"^\| what \|.*\n\| ---.*\n((?:\|.*\n)+)"


def stored(name: str) -> dict[str, Any]:
    return json.loads((REPOSITORY / "benchmarks" / "results" / f"{name}.json").read_text())


def figures(page: str) -> list[list[str]]:
    """The first two columns of a page's table of figures."""
    (table,) = re.findall(FIGURES, page, re.MULTILINE)
    return [re.findall(r"(?<=\| )[^|]*(?= \|)", line)[:2] for line in table.splitlines()]


def test_every_figure_of_the_results_is_a_stored_one() -> None:
    # test_results_page.py holds results.md to what is stored
    assert figures(README) == figures(RESULTS)
    assert len(figures(README)) > 10
    prose = re.sub(r"```.*?```|<[^>]*>|\]\([^)]*\)|`[^`]*`", "", README, flags=re.DOTALL)
    prose = re.sub(FIGURES, "", prose, flags=re.MULTILINE)
    assert not re.findall(r"\d+\.\d+ (?:times|seconds|minutes)|\d+ %", prose.replace("\u202f", " "))


def test_each_figure_names_its_command_and_commit_and_processor() -> None:
    (table,) = re.findall(FIGURES, RESULTS, re.MULTILINE)
    for line in table.splitlines():
        assert re.search(r"\| `(?:make|python) [^`]+` \| [0-9a-f]{7}(?:, [0-9a-f]{7})* \| [^|]+ \|$", line), (
            line
        )


def test_the_machine_and_the_versions_are_those_of_the_results() -> None:
    (torch,) = re.search(r"torch ([\d.]+\d)", README).groups()
    accelerate = re.search(r"accelerate ([\d.]+\d) and ([\d.]+\d)", README).groups()
    lstm, gan = ("course", "fast", "million", "proven"), ("course", "fast", "best", "pace")
    other = ("speed", "exact", "memory", "same_bits", "chaos", "crash_points", "killed_run")
    for name in (*(f"lstm/{part}" for part in lstm), *(f"gan/{part}" for part in gan), *other):
        environment = stored(name)["environment"]
        assert environment["cores"] == 2, name  # "on two CPU cores"
        assert environment["packages"]["torch"].startswith(f"{torch}."), name
        assert environment["packages"]["accelerate"].rpartition(".")[0] in accelerate, name


def test_the_picture_shows_what_is_said_of_it() -> None:
    runs = stored("killed_run")["runs"]
    whole, killed = runs["whole"], runs["killed"]
    assert [owner["processes"] for owner in killed["owners"]][1:] == [3, 2]  # "on three processes and on two"
    assert (whole["curve"], whole["sha256"]) == (killed["curve"], killed["sha256"])
    one, two = ({row["step"]: row["loss"] for row in runs[f"ddp {n}"]["curve"]} for n in (1, 2))
    apart = [step for step in one if abs(one[step] - two[step]) > 0.1 * one[step]]
    said = int(re.search(r"they\s+separate after (\d+) steps", README)[1])
    assert min(apart) == said + 1
