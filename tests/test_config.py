"""Options and records: what is allowed and how it is refused, what JSON keeps, what a run continues with."""

import enum
import json
import math
import re
import runpy
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

import pytest
from annotated_types import Interval
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import refusal

from cs324dist.command_line import from_command_line, parse
from cs324dist.config import MUTABLE, Config, Count, Fraction, Positive, as_json, conflicts, from_json
from cs324dist.errors import UserError
from cs324dist.loop import main, run_record
from cs324dist.tasks import find_task
from cs324dist.tasks.base import Task

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.py"))
TASKS = {name: find_task(name) for name in ("gan", "lstm")}
PRESETS = {name: task.presets for name, task in TASKS.items()}
MOST_OPTIONS = 31
STEPS = "give a whole number, at least 1 and at most 1 000 000 000"
LAUNCHER = "is an option of accelerate launch: give it before the name of the script"
COMMANDS = {"sample.py": ["grid", "tensor", "interpolate"], "train.py": ["examples/mlp.py:MLPTask"]}
PAGES = [(script, command) for script in SCRIPTS for command in COMMANDS.get(script, [""])]


def default(task: str, name: str) -> Any:
    return getattr(PRESETS[task]["fast"], name)


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def stored(config: Config) -> Config:
    """As it comes back from the run's config.json."""
    return from_json(type(config), json.loads(json.dumps(as_json(config))), "config.json")


def command_line(task: type[Task], *words: str) -> Config:
    return from_command_line(task.presets, "", task.run_name, words)


def refused(task: type[Task], *words: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        command_line(task, *words)
    return caught.value.lines


@dataclass(frozen=True)
class Options:
    kind: Literal["red", "blue"] = "red"
    size: Literal[28, 32] | None = None


class TestRanges:
    @pytest.mark.parametrize(
        ("kind", "words", "allowed", "not_allowed"),
        [
            (Count, "at least 1 and at most 1 000 000 000", [1, 10**9], [0, -1, 10**9 + 1]),
            (Annotated[int, Interval(ge=0, le=9)] | None, "at least 0 and at most 9", [0, 9], [-1, 10]),
            (
                Positive,
                "more than 0 and at most 1 000 000 000",
                [1e-300, 1e9],
                [0.0, 1.1e9, math.inf, math.nan],
            ),
            (Fraction, "at least 0 and less than 1", [0.0, 1 - 1e-16], [1.0, -0.5, math.inf, math.nan]),
        ],
        ids=["count", "digit", "positive", "fraction"],
    )
    def test_the_ends_of_a_range(self, kind, words, allowed, not_allowed):
        options = dataclass(frozen=True)(type("Ranged", (), {"__annotations__": {"value": kind}}))
        for value in allowed:
            assert parse(options, "", [f"--value={value}"]).value == value
        for value in not_allowed:
            line = f"--value {value} is not allowed: give {words}"
            assert refusal(parse, options, "", [f"--value={value}"]) == line

    def test_a_word_must_be_one_of_the_words_exactly(self):
        assert parse(Options, "", ["--kind", "blue"]).kind == "blue"
        for word in ("bl", "Blue", ""):
            with pytest.raises(UserError, match=rf"^--kind {word} is not allowed: give one of red, blue$"):
                parse(Options, "", ["--kind", word])

    def test_choices_may_be_numbers(self):
        assert parse(Options, "", ["--size", "32"]).size == 32
        assert parse(Options, "", ["--size", "none"]).size is None
        with pytest.raises(UserError, match=r"^--size 30 is not allowed: give one of 28, 32$"):
            parse(Options, "", ["--size", "30"])


class TestOptions:
    def test_none_takes_a_limit_away(self):
        assert PRESETS["lstm"]["fast"].max_grad_norm == 0.25
        assert command_line(TASKS["lstm"], "--max-grad-norm", "none").max_grad_norm is None
        assert command_line(TASKS["lstm"], "--run-dir", "none").run_dir == Path("none")
        (line,) = refused(TASKS["lstm"], "--steps", "none")
        assert line.startswith("--steps none is not allowed")

    @pytest.mark.parametrize(
        ("words", "line"),
        [
            ("--steps abc", "--steps abc is not allowed: " + STEPS),
            ("--steps 1e4", "--steps 1e4 is not allowed: " + STEPS),
            ("--length 4.5", "--length 4.5 is not allowed: " + STEPS.replace("1 000 000 000", "10 000 000")),
            ("--curriculum x", "--curriculum x is not allowed: " + STEPS.replace("whole ", "")),
            ("--preset", "--preset needs a value"),
            ("--steps --seed 1", "--steps needs a value"),
            ("--hiden-size 3", "--hiden-size is unknown: did you mean --hidden-size?"),
            ("--max_grad_norm=3", "--max_grad_norm is unknown: did you mean --max-grad-norm?"),
            ("--xylophone", "--xylophone is unknown: see --help"),
            ("stray", "stray is not an option: see --help"),
            *(
                (words, f"{words.split()[0].split('=')[0]} {LAUNCHER}")
                for words in ("--mixed_precision bf16", "--num-processes=2", "--multi_gpu")
            ),
        ],
    )  # fmt: skip
    def test_what_cannot_be_used_is_one_line_that_says_what_to_do(self, words, line):
        assert refused(TASKS["lstm"], *words.split()) == (line,)

    @pytest.mark.parametrize("task", TASKS)
    def test_every_option_that_has_a_rule_can_be_wrong_and_all_are_named_together(self, task):
        free_text = {"run_dir", "data_root", "keep_best"}
        free_text |= {"dry_run", "tensorboard"}  # flags
        names = [field.name for field in fields(PRESETS[task]["fast"]) if field.name not in free_text]
        wrong = {name: "nonsense" if isinstance(default(task, name), str) else "-1" for name in names}
        lines = refused(TASKS[task], *(f"{option(name)}={value}" for name, value in wrong.items()))
        assert {line.split()[0] for line in lines} == set(map(option, names))


class Shade(enum.Enum):
    LIGHT = "light"
    DARK = "dark"


@dataclass(frozen=True)
class Nested:
    weight: float = 1.0
    places: tuple[Path, ...] = ()
    shade: Shade | None = None


@dataclass(frozen=True)
class Mixed(Config):
    """Options of all kinds."""

    betas: tuple[float, float] = (0.9, 0.99)
    """Decays."""

    widths: tuple[Count, ...] = (64, 64)
    """Widths of the layers."""

    shade: Shade = Shade.LIGHT
    """Colour."""

    table: Path = Path("table.csv")
    """File."""

    shuffled: bool = True
    """Whether in another order."""

    nested: Nested = Nested()


class MixedTask(Task[Mixed]):
    name = "mixed"
    presets: ClassVar = {"default": Mixed(steps=5)}


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
PATHS = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1).map(Path)
MIXED = st.builds(
    Mixed,
    betas=st.tuples(NUMBERS, NUMBERS),
    widths=st.lists(st.integers(1, 10**9)).map(tuple),
    shade=st.sampled_from(Shade),
    table=PATHS,
    shuffled=st.booleans(),
    run_dir=PATHS,
    nested=st.builds(
        Nested, NUMBERS, st.lists(PATHS, max_size=3).map(tuple), st.none() | st.sampled_from(Shade)
    ),
)


class TestRecords:
    @settings(max_examples=30)
    @given(MIXED)
    def test_tuples_paths_choices_and_nested_options_come_back_from_json(self, config):
        assert stored(config) == config
        assert conflicts(config, stored(config)) == []

    def test_they_are_given_on_the_command_line_too(self):
        words = "--betas 0.5 0.75 --widths 3 --shade dark --table a/b.csv --no-shuffled"
        config = command_line(MixedTask, *words.split())
        assert (config.betas, config.widths, config.shade) == ((0.5, 0.75), (3,), Shade.DARK)
        assert (config.table, config.shuffled) == (Path("a/b.csv"), False)
        lines = refused(MixedTask, *["--betas", "0.5", "--widths", "3.5", "--shade", "red", "--nested", "3"])
        assert sorted(line.split()[0] for line in lines) == ["--betas", "--nested", "--shade", "--widths"]

    @pytest.mark.parametrize(
        ("change", "line"),
        [
            ({"steps": "3"}, "steps is 3"),
            ({"steps": True}, "steps is True"),
            ({"steps": 0}, "steps is 0"),
            ({"seed": 2**63}, f"seed is {2**63}"),
            ({"batch_size": 64.0}, "batch_size is 64.0"),
            ({"dry_run": 1}, "dry_run is 1"),
            ({"betas": [0.9, "0.99"]}, "betas.1 is 0.99"),
            ({"shade": "red"}, "shade is red"),
            ({"nested": {"weight": "1"}}, "nested.weight is 1"),
            ({"colour": 1}, "colour is unknown: it is damaged, or of a newer version"),
            ({"\x1b[2J" + "x" * 999: 1}, f"[2J{'x' * 196} is unknown: it is damaged, or of a newer version"),
        ],
        ids=str,
    )  # fmt: skip
    def test_what_a_field_does_not_allow_is_refused_by_name(self, change, line):
        content = {**as_json(Mixed()), **change}
        assert refusal(from_json, Mixed, content, "config.json") == f"config.json: {line}"


MUTABLE_OPTIONS = """check_every checkpoint_every data_root dry_run evaluate_every keep_best keep_last kernel
    log_every peer_timeout precision preset run_dir steps tensorboard wandb"""


class TestContinuing:
    @pytest.mark.parametrize("task", TASKS)
    def test_these_options_may_change_and_no_others(self, task):
        hints = get_type_hints(type(PRESETS[task]["fast"]), include_extras=True)
        found = {name for name, hint in hints.items() if MUTABLE in getattr(hint, "__metadata__", ())}
        assert found == set(MUTABLE_OPTIONS.split()) & hints.keys()

    def test_steps_go_up_and_not_down(self):
        old = PRESETS["gan"]["course"]
        more, fewer = (replace(old, steps=old.steps + change) for change in (1, -1))
        assert conflicts(more, stored(old)) == []
        (line,) = conflicts(fewer, stored(old))
        assert line.startswith(f"--steps {old.steps - 1} is less than the run's {old.steps}: ")

    @pytest.mark.parametrize("change", [1, -1])
    @pytest.mark.parametrize(
        "old",
        [
            replace(PRESETS["gan"]["course"], schedule="linear"),
            replace(PRESETS["lstm"]["fast"], schedule="cosine", warmup_steps=7),
        ],
        ids=["with decay", "with warm-up"],
    )
    def test_steps_that_the_learning_rate_depends_on_stay(self, old, change):
        new = replace(old, steps=old.steps + change)
        (line,) = conflicts(new, stored(old))
        assert line.startswith(f"--steps {new.steps} differs from the run's {old.steps}, ")

    def test_a_warm_up_alone_leaves_the_steps_free(self):
        old = replace(PRESETS["lstm"]["course"], warmup_steps=7)
        assert conflicts(replace(old, steps=old.steps + 1), stored(old)) == []

    def test_what_changes_is_named_with_old_and_new_value_unless_it_may(self):
        changed = Mixed(betas=(0.9, 0.999), shuffled=False, log_every=7, run_dir=Path("elsewhere"))
        lines = conflicts(changed, stored(Mixed()))
        assert [line.partition(": ")[0] for line in lines] == [
            "--betas (0.9, 0.999) differs from the run's (0.9, 0.99)",
            "--shuffled False differs from the run's True",
        ]


class TestPresets:
    @pytest.mark.parametrize(("task", "preset"), [(task, p) for task in TASKS for p in PRESETS[task]])
    def test_a_preset_says_its_name_and_is_allowed(self, task, preset):
        config = command_line(TASKS[task], "--preset", preset)
        assert config.preset == preset
        assert stored(config) == config

    def test_the_courses_sizes_are_the_courses(self):
        """test_equality.py holds the recipes to plain loops."""
        gan, lstm = (command_line(TASKS[name], "--preset=course") for name in ("gan", "lstm"))
        assert (gan.steps, gan.batch_size) == (200 * 60_000 // 64, 64)  # 200 epochs of 60 000 images
        assert (lstm.hidden_size, lstm.batch_size) == (128, 128)

    def test_what_is_given_overrides_the_preset_in_any_order(self):
        expected = replace(PRESETS["lstm"]["course"], max_grad_norm=3.0, preset="course")
        words = ("--max-grad-norm", "3", "--preset", "course")
        folder = Path("runs/lstm-length50-course-0")
        assert command_line(TASKS["lstm"], *words) == replace(expected, run_dir=folder)

    def test_an_unknown_preset_is_named_with_everything_else_that_is_wrong(self):
        assert refused(TASKS["gan"], "--preset", "slow", "--steps", "0", "--betas", "0.5", "1.0") == (
            "--preset slow is not allowed: give one of fast, best, course, smoke",
            "--steps 0 is not allowed: give at least 1 and at most 1 000 000 000",
            "--betas 0.5 1.0 is not allowed: give 2 values, each at least 0 and less than 1",
        )

    def test_the_only_preset_of_a_task_may_have_any_name(self):
        config = command_line(MixedTask)
        assert config == replace(Mixed(steps=5), preset="default", run_dir=Path("runs/mixed-default-0"))
        assert run_record(MixedTask, config).changed == {}
        assert refused(MixedTask, "--preset", "fast") == (
            "--preset fast is not allowed: give one of default",
        )

    def test_the_record_of_a_run_says_what_differs_from_its_preset(self):
        config = command_line(MixedTask, "--steps", "9", "--run-dir", "mine", "--betas", "0", "0.5")
        record = run_record(MixedTask, config)
        assert record.changed == {"steps": 5, "betas": [0.9, 0.99]}
        assert (record.task, record.config) == ("mixed", as_json(config))


class TestRunNames:
    def test_runs_of_other_seeds_presets_and_data_have_folders_of_their_own(self):
        folders = {
            command_line(TASKS["gan"], *words.split()).folder
            for words in ("", "--seed 1", "--preset course", "--dataset fake")
        }
        assert len(folders) == 4
        assert Path("runs/gan-fast-0") in folders
        assert command_line(TASKS["gan"], "--run-dir", "mine", "--seed", "1").folder == Path("mine")

    @pytest.mark.parametrize("name", TASKS)
    def test_runs_of_a_task_that_changes_another_have_folders_of_their_own(self, name):
        changed = type("Changed", (TASKS[name],), {"name": "changed"})
        folder, other = (command_line(task).folder for task in (changed, TASKS[name]))
        assert (folder.name.split("-")[0], other.name.split("-")[0]) == ("changed", name)


class TestHelp:
    """`start` runs a script in this process, in a folder of its own, and gives the exit code."""

    @pytest.fixture
    def start(self, monkeypatch, tmp_path):
        def run(script: str, *arguments: str) -> int:
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            monkeypatch.setenv("COLUMNS", "1000")
            monkeypatch.chdir(tmp_path)
            try:
                runpy.run_path(str(LAUNCH / script), run_name="__main__")
            except SystemExit as stopped:
                return int(stopped.code or 0)
            return 0

        return run

    @pytest.fixture
    def page(self, start, capsys):
        """The help page of a script: what it says of each option, below its heading."""

        def read(script: str, *arguments: str) -> dict[str, dict[str, str]]:
            assert start(script, *arguments, "--help") == 0
            return options_of(capsys.readouterr().out)

        return read

    @pytest.mark.parametrize(("script", "command"), PAGES)
    def test_every_option_has_help(self, page, script, command):
        command = command.replace("examples/", f"{LAUNCH.parent}/examples/")
        helps = {
            name: text for some in page(script, *command.split()).values() for name, text in some.items()
        }
        assert helps.keys() > {"--help"}
        assert {name for name, text in helps.items() if len(bare(text)) < len("Optimizer.")} == set()
        assert len(helps.keys() - {"--help"}) <= MOST_OPTIONS

    def test_an_option_without_help_would_be_found(self, capsys):
        @dataclass
        class Undocumented:
            """None of these says anything."""

            number: int = 0
            flag: bool = False

        with pytest.raises(SystemExit):
            parse(Undocumented, "", ["--help"])
        (group,) = options_of(capsys.readouterr().out).values()
        assert {name: bare(text) for name, text in group.items()} == {
            "--help": "Show this help, and stop.",
            "--number": "",
            "--flag": "",
        }

    def test_the_options_of_a_task_are_in_groups(self, page):
        gan, lstm = page("gan.py"), page("lstm.py")
        assert [*gan] == [*lstm] == ["recipe", "model", "data", "run"]
        assert lstm["run"].keys() == gan["run"].keys() > {"--micro-batches", "--keep-best", "--help"}
        assert [*lstm["recipe"]][:3] == ["--preset", "--steps", "--batch-size"]
        assert lstm["data"].keys() == {"--seed", "--length", "--encoding"}
        assert lstm["model"].keys() == {"--model", "--kernel", "--hidden-size", "--initialisation"}

    def test_the_choices_are_shown(self, page):
        gan = page("gan.py")
        assert gan["recipe"]["--preset"].startswith("{fast,best,course,smoke} ")
        assert gan["run"]["--wandb"].startswith("{online,offline,disabled} ")
        assert gan["recipe"]["--schedule"].startswith("{constant,linear,cosine,wsd} ")
        assert page("sample.py", "grid")["options"]["--weights"].startswith("{averaged,raw} ")

    def test_the_defaults_are_those_of_the_preset(self, page):
        for words, rate, folder in (
            ((), "0.01", "gan-fast-0"),
            (("--preset=course",), "0.0002", "gan-course-0"),
        ):
            gan = page("gan.py", *words)
            assert gan["recipe"]["--generator-lr"].endswith(f"(default: {rate})")
            assert gan["run"]["--run-dir"].endswith(f"(default: runs/{folder})")

    def test_a_learning_rate_has_four_digits(self, capsys):
        @dataclass(frozen=True)
        class Own(Config):
            learning_rate: Positive = 1.23456789e-4
            """Rate."""

            shade: Shade = Shade.DARK
            """Colour."""

        with pytest.raises(SystemExit):
            from_command_line({"mine": Own()}, "", lambda config: "own", ["--help"])
        recipe = options_of(capsys.readouterr().out)["recipe"]
        assert recipe["--learning-rate"] == "FLOAT Rate. (default: 0.0001235)"
        assert recipe["--shade"] == "{light,dark} Colour. (default: dark)"

    def test_a_dry_run_prints_all_options_and_touches_nothing(self, start, page, capsys, tmp_path):
        assert start("gan.py", "--preset", "smoke", "--seed", "7", "--dataset", "fake", "--dry-run") == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["run_dir"] == "runs/gan-fake-smoke-7"
        assert (printed["seed"], printed["steps"], printed["dry_run"]) == (7, 20, True)
        assert list(tmp_path.iterdir()) == []
        offered = {name.removeprefix("--") for group in page("gan.py").values() for name in group} - {"help"}
        assert {name.replace("_", "-") for name in printed} == offered

    @pytest.mark.parametrize(
        ("command", "line"),
        [
            ("lstm.py --steps abc", "--steps abc is not allowed: " + STEPS),
            ("sample.py", "a command is missing: give grid, tensor, interpolate, and then the run"),
            ("sample.py RUN", "RUN is not a command: give grid, tensor, interpolate, and then the run"),
            ("sample.py grid", "missing: RUN"),
            ("sample.py grid RUN --row 3", "--row is unknown: did you mean --rows?"),
            ("train.py", "a task is missing: give path/to/file.py:Class or package.module:Class first"),
            ("train.py mlp", "task 'mlp' is unknown: give lstm, gan, path/file.py:Class, or "
                             "package.module:Class"),
        ],
    )  # fmt: skip
    def test_a_script_refuses_in_one_line(self, start, capsys, command, line):
        assert start(*command.split()) == 2
        said = capsys.readouterr()
        assert (said.out, said.err) == ("", f"error: {line}\n")

    def test_a_script_without_a_docstring_is_described_by_its_options(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["mine.py", "--help"])
        with pytest.raises(SystemExit):
            main(MixedTask, None)
        assert "usage: mine.py [options]\n\nOptions of all kinds.\n\nrecipe:\n" in capsys.readouterr().out


def options_of(page: str) -> dict[str, dict[str, str]]:
    """What a help page says of each option, by heading."""
    groups: dict[str, dict[str, str]] = {}
    group, name = groups, ""
    for line in page.splitlines():
        if heading := re.fullmatch(r"(\w+):", line):
            group = groups.setdefault(heading[1], {})
        elif groups and (found := re.match(r"  (?:-h, )?(\S+)(.*)", line)):
            name = found[1]
            group[name] = " ".join(found[2].split())
        elif groups and line.strip():
            group[name] = f"{group[name]} {line.strip()}".strip()
    return groups


def bare(text: str) -> str:
    """What is said of an option, without placeholder and default."""
    return re.sub(r"\(default: .*", "", re.sub(r"^(\{\S*\}|[A-Z]+)( |$)", "", text)).strip()


def test_what_happens_every_so_many_steps_happens_after_the_last_one_too():
    config = replace(PRESETS["lstm"]["fast"], steps=10)
    assert [step for step in range(1, 11) if config.is_due(step, 4)] == [4, 8, 10]
    assert [step for step in range(1, 11) if config.is_due(step, 50)] == [10]
