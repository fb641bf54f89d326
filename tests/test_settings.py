"""What a run may be continued with, which recipe is taken, and what is said of wrong values."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from cs324dist.command_line import problems
from cs324dist.errors import UserError
from cs324dist.settings import RunSettings, conflicts, from_command_line
from cs324dist.tasks import classifier, gan, lstm

MUTABLE = {
    "peer_timeout",
    "preset",
    "run_dir",
    "steps",
    "log_every",
    "evaluate_every",
    "checkpoint_every",
    "keep_last",
    "wandb",
    "dry_run",
    "data_root",
    "kernel",
}
TASKS = {"gan": gan.PRESETS, "lstm": lstm.PRESETS, "classifier": classifier.PRESETS}
FIELDS = [(task, field.name) for task, presets in TASKS.items() for field in fields(presets["fast"])]


def stored(settings: RunSettings) -> dict[str, Any]:
    """As they come back from the run's config.json."""
    return json.loads(json.dumps(settings.as_json()))


def another(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value / 2 + 0.1
        case str():
            return f"other-{value}"
        case Path() | None:
            return Path("elsewhere")
    raise TypeError(value)


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def default(task: str, name: str) -> Any:
    return getattr(TASKS[task]["fast"], name)


class TestContinuing:
    @pytest.mark.parametrize("task", TASKS)
    @pytest.mark.parametrize("preset", ["fast", "course", "smoke"])
    def test_with_the_same_settings_nothing_is_in_conflict(self, task, preset):
        settings = TASKS[task].get(preset, TASKS[task]["fast"])
        assert conflicts(settings, stored(settings)) == []

    @pytest.mark.parametrize(("task", "name"), [(task, name) for task, name in FIELDS if name != "steps"])
    def test_a_setting_is_free_or_refused_with_old_and_new_value(self, task, name):
        old = TASKS[task]["fast"]
        new = replace(old, **{name: another(default(task, name))})
        lines = conflicts(new, stored(old))
        if name in MUTABLE:
            assert lines == []
        else:
            (line,) = lines
            values = f"{getattr(new, name)} differs from the run's {getattr(old, name)}: "
            assert line.startswith(f"{option(name)} {values}")

    def test_the_free_settings_are_those_of_some_task(self):
        assert {name for _, name in FIELDS} >= MUTABLE

    @pytest.mark.parametrize(
        "old", [gan.PRESETS["course"], lstm.PRESETS["fast"]], ids=lambda s: type(s).__name__
    )
    def test_steps_go_up_and_not_down(self, old):
        more, fewer = (replace(old, steps=old.steps + change) for change in (1, -1))
        assert conflicts(more, stored(old)) == []
        (line,) = conflicts(fewer, stored(old))
        assert line.startswith(f"--steps {old.steps - 1} is less than the run's {old.steps}: ")

    @pytest.mark.parametrize("change", [1, -1])
    @pytest.mark.parametrize(
        "old",
        [gan.PRESETS["fast"], replace(gan.PRESETS["course"], lr_decay="linear"), classifier.PRESETS["fast"]],
        ids=["gan fast", "gan report with decay", "classifier"],
    )
    def test_steps_that_the_learning_rate_depends_on_stay(self, old, change):
        new = replace(old, steps=old.steps + change)
        (line,) = conflicts(new, stored(old))
        assert line.startswith(f"--steps {new.steps} differs from the run's {old.steps}, ")

    def test_all_conflicts_are_named_together(self):
        old = lstm.PRESETS["course"]
        new = replace(old, seed=1, max_grad_norm=2.5, steps=7, wandb="disabled")
        assert {line.split()[0] for line in conflicts(new, stored(old))} == {
            "--seed",
            "--max-grad-norm",
            "--steps",
        }

    def test_a_run_that_lacks_a_setting_is_refused(self):
        settings = gan.PRESETS["fast"]
        old = stored(settings)
        del old["gradient_penalty"]
        (line,) = conflicts(settings, old)
        assert line.startswith("--gradient-penalty 0.1 differs from the run's None")


class TestPresets:
    @pytest.mark.parametrize(("task", "preset"), [(task, p) for task in TASKS for p in TASKS[task]])
    def test_a_preset_says_its_name_and_is_allowed(self, task, preset):
        settings = TASKS[task][preset]
        assert settings.preset == preset
        assert problems(settings) == []

    @pytest.mark.parametrize("words", [["--preset", "course"], ["--preset=course"]])
    def test_the_reports_gan_is_the_reports(self, words):
        settings = from_command_line(gan.PRESETS, "", words)
        # 200 epochs of 60 000 images in batches of 64; Adam as torch has it by default.
        assert settings.steps == 200 * 60_000 // 64
        assert (settings.generator_lr, settings.discriminator_lr, settings.batch_size) == (2e-4, 2e-4, 64)
        assert (settings.beta1, settings.beta2, settings.lr_decay) == (0.9, 0.999, "none")
        assert (settings.gradient_penalty, settings.ema_decay, settings.discriminator_every) == (0, 0, 2)

    def test_the_reports_lstm_is_the_reports(self):
        settings = from_command_line(lstm.PRESETS, "", ["--preset", "course"])
        assert (settings.optimizer, settings.learning_rate, settings.max_grad_norm) == ("rmsprop", 1e-3, 10.0)
        assert (settings.hidden_size, settings.batch_size) == (128, 128)
        assert (settings.encoding, settings.initialisation, settings.curriculum) == ("scalar", "linear", 1.0)

    @pytest.mark.parametrize(
        "words",
        [
            ["--preset", "course", "--max-grad-norm", "3", "--steps=9"],
            ["--max-grad-norm", "3", "--steps=9", "--preset", "course"],
        ],
    )
    def test_what_is_given_overrides_the_preset_in_any_order(self, words):
        assert from_command_line(lstm.PRESETS, "", words) == replace(
            lstm.PRESETS["course"], max_grad_norm=3.0, steps=9
        )

    def test_without_a_preset_it_is_the_fast_one(self):
        assert from_command_line(gan.PRESETS, "", []) == gan.PRESETS["fast"]

    def test_an_unknown_preset_is_named_with_everything_else_that_is_wrong(self):
        with pytest.raises(UserError) as caught:
            from_command_line(gan.PRESETS, "", ["--preset", "slow", "--steps", "0", "--beta2", "1"])
        assert caught.value.lines == (
            "--preset slow is not allowed: give one of fast, course, smoke",
            "--steps 0 is not allowed: give at least 1 and at most 1e+09",
            "--beta2 1.0 is not allowed: give at least 0 and less than 1",
        )


@pytest.mark.parametrize("task", TASKS)
def test_every_option_that_has_a_rule_can_be_wrong_and_all_are_named_together(task):
    free_text = {"run_dir", "data_root", "dry_run"}
    names = [field.name for field in fields(TASKS[task]["fast"]) if field.name not in free_text]
    wrong = {name: "nonsense" if isinstance(default(task, name), str) else "-1" for name in names}
    with pytest.raises(UserError) as caught:
        from_command_line(TASKS[task], "", [f"{option(name)}={value}" for name, value in wrong.items()])
    assert {line.split()[0] for line in caught.value.lines} == set(map(option, names))


def test_what_happens_every_so_many_steps_happens_after_the_last_one_too():
    settings = replace(lstm.PRESETS["fast"], steps=10)
    assert [step for step in range(1, 11) if settings.is_due(step, 4)] == [4, 8, 10]
    assert [step for step in range(1, 11) if settings.is_due(step, 50)] == [10]


def test_runs_of_other_seeds_presets_and_data_have_folders_of_their_own():
    fast = gan.PRESETS["fast"]
    others = [fast, replace(fast, seed=1), gan.PRESETS["course"], replace(fast, dataset="fashion-mnist")]
    assert len({settings.folder for settings in others}) == 4
    assert fast.folder == Path("runs/gan-fast-0")
    assert replace(fast, run_dir=Path("mine")).folder == Path("mine")
