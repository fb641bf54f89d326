"""What the command line allows, how it says no, and that every option of every script says what it is for."""

import inspect
import json
import math
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cs324dist import command_line
from cs324dist.command_line import FRACTION, POSITIVE, Count, OneOf, Within, parse, problems
from cs324dist.errors import UserError

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.py"))
COMMANDS = {"sample.py": ["grid", "tensor", "interpolate"]}
PAGES = [(script, command) for script in SCRIPTS for command in COMMANDS.get(script, [""])]
MOST_OPTIONS = 25


@dataclass(frozen=True)
class Options:
    """Some options."""

    count: Count = 1
    """How many."""

    share: Annotated[float, FRACTION] = 0.5
    """What part."""

    kind: Annotated[str, OneOf("red", "blue")] = "red"
    """Which."""

    digit: Annotated[int | None, Within(0, 9)] = None
    """Only this one."""

    anything: int = 0
    """No rule."""


class TestRules:
    @settings(deadline=None)
    @given(st.floats() | st.integers(-(10**400), 10**400))
    def test_a_closed_range_holds_both_ends_and_nothing_beyond(self, value):
        assert Within(0, 9).allows(value) == (0 <= value <= 9)

    @pytest.mark.parametrize(
        ("rule", "allowed", "not_allowed"),
        [
            (Within(1), [1, 10**9], [0, -1]),
            (Within(0, 9), [0, 9], [-1, 10]),
            (POSITIVE, [1e-300, 1e9], [0.0, 1.1e9]),
            (FRACTION, [0.0, 1 - 1e-16], [1.0, -1e-16]),
        ],
        ids=lambda value: getattr(value, "wanted", ""),
    )
    def test_the_ends_of_a_range(self, rule, allowed, not_allowed):
        assert [rule.allows(value) for value in allowed] == [True, True]
        assert [rule.allows(value) for value in not_allowed] == [False, False]
        assert not any(rule.allows(value) for value in (math.nan, math.inf, -math.inf))

    def test_a_range_in_words(self):
        words = [Within(1).wanted, Within(0, 9).wanted, POSITIVE.wanted, FRACTION.wanted]
        assert words == [
            "at least 1",
            "at least 0 and at most 9",
            "more than 0 and at most 1e+09",
            "at least 0 and less than 1",
        ]

    def test_a_word_must_be_one_of_the_words_exactly(self):
        assert [OneOf("red", "blue").allows(word) for word in ("red", "re", "Red", "")] == [True] + [
            False
        ] * 3


class TestOptions:
    def test_the_defaults_have_no_problems(self):
        assert problems(Options()) == []

    def test_each_value_that_is_not_allowed_has_a_line_with_what_is(self):
        assert problems(Options(count=0, share=1.0, kind="green", digit=10, anything=-5)) == [
            "--count 0 is not allowed: give at least 1 and at most 1e+09",
            "--share 1.0 is not allowed: give at least 0 and less than 1",
            "--kind green is not allowed: give one of red, blue",
            "--digit 10 is not allowed: give at least 0 and at most 9",
        ]

    def test_what_is_given_replaces_the_defaults(self):
        options = parse(Options, "", Options(count=7, kind="blue"), ["--count", "9"])
        assert options == Options(count=9, kind="blue")

    def test_all_problems_of_a_command_line_are_refused_together(self):
        with pytest.raises(UserError) as caught:
            parse(Options, "", None, ["--count", "-2", "--kind", "green"])
        assert [line.split(" is not")[0] for line in caught.value.lines] == ["--count -2", "--kind green"]

    @pytest.mark.parametrize("arguments", [["--count", "many"], ["--colour", "red"], ["stray"]])
    def test_what_does_not_parse_exits_with_two_and_is_named(self, arguments, capsys):
        with pytest.raises(SystemExit) as caught:
            parse(Options, "", None, arguments)
        assert caught.value.code == 2
        assert arguments[-1] in capsys.readouterr().err


class TestScripts:
    @pytest.fixture
    def start(self, monkeypatch, tmp_path):
        """Run a script in this process, as `__main__`, in a folder of its own."""

        def run(script: str, *arguments: str) -> int:
            # As a user runs it, unchecked: sample.py hands `parse` a union, which is no `type`.
            monkeypatch.setattr(command_line, "parse", inspect.unwrap(parse))
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            monkeypatch.chdir(tmp_path)
            try:
                runpy.run_path(str(LAUNCH / script), run_name="__main__")
            except SystemExit as stopped:
                return int(stopped.code or 0)
            return 0

        return run

    @pytest.mark.parametrize(("script", "command"), PAGES)
    def test_every_option_has_help(self, start, capsys, script, command):
        assert start(script, *command.split(), "--help") == 0
        helps = options_of(capsys.readouterr().out)
        assert helps
        assert {name for name, text in helps.items() if len(text) < len("Optimizer.")} == set()
        assert len(helps.keys() - {"--help"}) <= MOST_OPTIONS

    def test_an_option_without_help_would_be_found(self, capsys):
        @dataclass
        class Undocumented:
            """None of these says anything."""

            number: int = 0
            flag: bool = False

        with pytest.raises(SystemExit):
            parse(Undocumented, "", Undocumented(), ["--help"])
        assert options_of(capsys.readouterr().out) == {
            "--help": "show this help message and exit",
            "--number": "",
            "--flag": "",
        }

    @pytest.mark.parametrize(
        ("script", "run_dir"),
        [
            ("gan.py", "runs/gan-fake-smoke-7"),
            ("lstm.py", "runs/lstm-length10-smoke-7"),
            ("classifier.py", "runs/classifier-fake-smoke-7"),
        ],
    )
    def test_a_dry_run_prints_all_settings_and_touches_nothing(
        self, start, capsys, tmp_path, script, run_dir
    ):
        dataset = [] if script == "lstm.py" else ["--dataset", "fake"]
        assert start(script, "--preset", "smoke", "--seed", "7", *dataset, "--dry-run") == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["run_dir"] == run_dir
        assert (printed["seed"], printed["steps"], printed["dry_run"]) == (7, 20, True)
        assert list(tmp_path.iterdir()) == []
        assert start(script, "--help") == 0
        offered = {name.removeprefix("--") for name in options_of(capsys.readouterr().out)} - {"help"}
        assert {name.replace("_", "-") for name in printed} == offered


def options_of(page: str) -> dict[str, str]:
    """What a help page says of each option, without placeholder and default."""
    helps: dict[str, str] = {}
    for line in page.splitlines():  # framed by │ or by blanks, as the terminal allows
        if re.match("[│ ] -", line):
            name, _, rest = line.strip("│ ").removeprefix("-h, ").partition(" ")
            helps[name] = re.sub(r"^(\{None\}\|)?[A-Z]+( |$)", "", rest)
        elif re.match("[│ ]  ", line) and helps:
            helps[name] += " " + line.strip("│ ")
    return {name: re.sub(r"\(default: .*", "", text).strip() for name, text in helps.items()}
