"""Every command that a page names can be given: its script is there and takes these options."""

import itertools
import re
import runpy
import shlex
from pathlib import Path

import pytest

import cs324dist
from cs324dist import command_line, testing

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("slurm/*.md")])
BEGINNINGS = ("python ", "accelerate launch ", "torchrun ", "sbatch ", "make ", "CS324DIST_THREADS=1 ")


class Parsed(BaseException):
    """The options have been understood; what would follow is not wanted here."""


def commands() -> list[str]:
    """What stands in the pages as a command, in a block of its own or between backticks."""
    found = []
    for page in PAGES:
        text = page.read_text()
        lines = re.findall(r"^ {4,}(\S.*)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
        found += [part.strip() for line in lines for part in line.split("&&")]
    whole = (line for line in found if not line.endswith("\N{HORIZONTAL ELLIPSIS}"))
    whole = (line for line in whole if "path/to/" not in line)  # which stands for a file of the reader's
    return sorted({line for line in whole if line.startswith(BEGINNINGS)})


def test_the_page_of_the_api_is_made_from_the_source_as_it_is_and_leaves_nothing_out():
    made = runpy.run_path(str(REPOSITORY / "docs" / "api.py"))
    assert (REPOSITORY / "docs" / "api.md").read_text() == made["page"](), "python docs/api.py writes it anew"
    names = {title: [*itertools.chain(*modules.values())] for title, modules in made["PARTS"].items()}
    assert sorted(names["From `cs324dist`"]) == sorted(cs324dist.__all__)
    functions = {name for name in vars(testing) if name.startswith("assert_")}
    assert functions <= {*names["From `cs324dist.testing`"]}


@pytest.mark.parametrize("command", commands())
def test_a_command_of_a_page_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(re.sub(r"-m cs324dist\.launch\.(\w+)", r"launch/\1.py", command), comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):.*##", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
        return
    if "--config_file" in words:
        assert (REPOSITORY / words[words.index("--config_file") + 1]).is_file()
    place = next((i for i, word in enumerate(words) if word.endswith((".py", ".sbatch"))), None)
    if place is None or "-c" in words:
        assert words[0] in ("accelerate", "sbatch") or words[1] == "-c"  # named in passing
        return
    script, arguments = REPOSITORY / words[place], words[place + 1 :]
    assert script.is_file()
    if script.suffix == ".sbatch":
        name = {"gan": "gan"}.get(script.stem, "lstm")
        arguments = arguments[script.stem == "sweep" :]  # after its file
        script = REPOSITORY / "launch" / f"{name}.py"
    if script.parent.name not in ("launch", "examples") or "--help" in arguments:
        return
    if "cs324dist" not in script.read_text():  # it makes something to train on
        return

    honest = command_line._parsed

    def parsed(*given: object) -> None:
        honest(*given)
        raise Parsed

    monkeypatch.setattr(command_line, "_parsed", parsed)
    monkeypatch.setattr("sys.argv", [str(script), *arguments])
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")
