"""Every command that a page names can be given: its script is there and takes these options.

`make docs-check` runs those that stand in blocks of README.md and docs/; here is what it goes by.
"""

import argparse
import itertools
import re
import runpy
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from launched import python

import cs324dist
from cs324dist import command_line, testing

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("slurm/*.md")])
BEGINNINGS = ("python ", "accelerate launch ", "torchrun ", "sbatch ", "make ", "CS324DIST_THREADS=1 ")
CHECK = SimpleNamespace(**runpy.run_path(str(REPOSITORY / "docs" / "check.py")))


class Parsed(BaseException):
    """The options have been understood; what would follow is not wanted here."""


def commands() -> list[str]:
    """What stands in the pages as a command, in a block of its own or between backticks."""
    found = []
    for page in PAGES:
        text = page.read_text()
        lines = re.findall(r"^ {4,}(\S.*)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
        blocks = CHECK.blocks_of(text)
        lines += [line for block in blocks if block.language == "bash" for line in block.code.splitlines()]
        found += [part.strip() for line in lines for part in line.split("&&")]
    whole = (line for line in found if not line.endswith("\N{HORIZONTAL ELLIPSIS}"))
    # which stand for files of the reader's
    whole = (line for line in whole if not re.search(r"path/to/|my_(task|loop)\.py", line))
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
    if "--" in words:  # of a script for slurm/train.sbatch
        assert words[words.index("slurm/train.sbatch") + 1] == "--run-dir"
        words = words[words.index("--") + 1 :]
    if words[0] == "make":
        makefile = (REPOSITORY / "Makefile").read_text()
        known = set(re.findall(r"^[a-z-]+(?=:.*##)|(?<=\$\()[A-Z]+(?=\))", makefile, re.MULTILINE))
        assert {word.partition("=")[0] for word in words[1:]} <= known
        return
    if words[0] == "python" and (REPOSITORY / words[1] / "__main__.py").is_file():
        done = python(REPOSITORY / words[1], "--help")
        assert all(word in done.stdout for word in words if word.startswith("--")), done.stderr
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

    parsers = (command_line, "_parsed"), (argparse.ArgumentParser, "parse_args")
    place = parsers["argparse" in script.read_text()]
    honest = getattr(*place)

    def parsed(*given: object) -> None:
        honest(*given)
        raise Parsed

    monkeypatch.setattr(*place, parsed)
    monkeypatch.setattr("sys.argv", [str(script), *arguments])
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("page", CHECK.PAGES, ids=lambda page: page.name)
def test_every_block_can_be_run_or_says_why_it_is_not(page: Path) -> None:
    text, blocks = page.read_text(), CHECK.blocks_of(page.read_text())
    text = re.sub(r"^```diff\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert len(re.findall("^ *```", text, re.MULTILINE)) == 2 * len(blocks)  # all of a language that is run
    outside = CHECK.BLOCK.sub("", text)
    assert "<!-- not run: " not in outside  # where it would leave nothing out
    assert not [
        line
        for line in outside.splitlines()
        if re.match(" {4,}", line) and line.lstrip().startswith(BEGINNINGS)
    ]
    for block in blocks:
        if block.language == "python" and not block.reason:  # signatures are no programs
            compile(block.code, page.name, "exec")
        elif block.language != "python":
            subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)


PAGE = """
```bash
echo one > file
false | cat
echo two >> file
```
<!-- not run: needs a GPU -->
```bash
echo three >> file
```
```console
$ cat file
what it prints
```
```python
# mine.py
import time
assert open("file").read() == "one\\n"
time.sleep(600)
```
"""


def test_blocks_share_a_folder_and_stop_at_what_fails_or_takes_too_long(tmp_path: Path) -> None:
    first, left_out, second, third = CHECK.blocks_of(PAGE)
    assert (left_out.language, left_out.reason) == ("bash", "needs a GPU")
    assert [first.reason, second.reason, third.reason] == ["", "", ""]
    assert CHECK.failure_of(first, tmp_path) == "exit code 1"
    assert CHECK.failure_of(second, tmp_path) == ""
    assert CHECK.failure_of(third, tmp_path, limit=1) == "not done after 1 seconds"
    assert "sleep" in (tmp_path / "mine.py").read_text()


COPY = """```bash
mkdir elsewhere  # whose Python does not find the package by the folder that it is in
echo "import cs324dist; print(cs324dist.__path__[0])" > elsewhere/where.py
test "$(realpath "$(python elsewhere/where.py)")" = "$(realpath cs324dist)"
```
"""


def test_what_a_failing_page_says(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(COPY + "```bash\necho no >&2; exit 3\n```\n")
    done = python(REPOSITORY / "docs" / "check.py", tmp_path / "page.md")
    assert done.returncode == 1
    assert re.search(
        r"^page.md +2 +0 +1 .*\necho no >&2; exit 3\nno\nexit code 3$", done.stdout, re.MULTILINE
    )
    (tmp_path / "page.md").write_text("<!-- not run on this page: needs a cluster -->\n```bash\nfalse\n```\n")
    done = python(REPOSITORY / "docs" / "check.py", tmp_path / "page.md")
    assert done.returncode == 0
    assert re.search(r"^left out: +1  needs a cluster$", done.stdout, re.MULTILINE)
