"""An entry of the zoo: a task with a habit, and what its runs may come to."""

import importlib
import pkgutil
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import habits

ON_SEVERAL = ("three", "killed")
ALSO_PLAIN = (*ON_SEVERAL, "plain")
RANKS = r"ranks?\b|processes"
REPEATED = "gradient|loss|metric|repeat"
OTHER_WHEN_WHOLE = {
    "draws": """mixup_in_collate mixup_by_workers masking_in_collate image_classifier dropout norm_and_dropout
        lstm transformer stochastic_depth compiled compiled_norm checkpointed vae gumbel two_views_in_bf16 gan
        event_in_loss dropout_midway frozen_midway eval_midway buffer_midway head_anew pure_function_of_step
        initial_rate_midway decay_midway betas_midway state_cleared_midway numpy_in_loss random_in_loss
        draws_in_some_steps more_draws_in_some_steps draws_in_some_parts""",
    "a loss that is no mean over samples": """siamese siamese_with_norm contrastive constant_in_some_parts
        loss_of_step decision_on_sum""",
    "an attribute of each part": """counter_in_module running_average carried_state list_as_long_as_parts
        counts_of_classes attribute_for_evaluation""",
    "rounding": "float16 bfloat16 autocast",
    "refused, or of other words": """lazy_layer constant_in_a_step plain_zero post_accumulate_hook
        optimizer_midway set_of_words_after_a_kill""",
}
"""Habits with other metrics without --micro-batches, and why; all others train as plain torch does."""


@dataclass(frozen=True)
class Finding:
    """What the starts of a habit came to: equal, refused, silent, hang, traceback or crash."""

    word: str
    why: str = ""
    said: Mapping[str, str] = field(default_factory=dict)  # by the starts that ended well
    errors: Mapping[str, str] = field(default_factory=dict)  # by the starts that were refused

    def __str__(self) -> str:
        where = f" ({', '.join(self.errors)})" if self.said and self.errors else ""
        return f"{self.word}{where}: {self.why or ' '.join(self.errors.values()).partition(chr(10))[0]}"


@dataclass(frozen=True)
class Expected:
    word: str
    text: str = ""
    only: Sequence[str] = ()

    def is_met(self, found: Finding) -> bool:
        texts = found.errors if self.word == "refused" else found.said
        in_these = set(texts) == set(self.only) if self.only else not (found.said and found.errors)
        matching = [re.search(self.text, text, re.IGNORECASE) for text in texts.values()]
        if self.word in ("silent", "warned"):
            return found.word == "silent" and (self.word == "silent" or any(matching))
        return found.word == self.word and in_these and all(matching)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.word, ", ".join(self.only), self.text)))


def equal(says: str = "") -> Expected:
    """All starts end well and in the same bits; each says something that matches."""
    return Expected("equal", says)


def refused(line: str, only: Sequence[str] = ()) -> Expected:
    """The starts `only`, by default all that are not killed, end with an error that matches."""
    return Expected("refused", line, only)


def unseen(reason: str) -> Expected:
    """Starts end in other bits, and no check can see why."""
    return Expected("silent", reason)


def warned(line: str) -> Expected:
    """Starts end in other bits, and the one that was killed, or all, have said something that matches."""
    return Expected("warned", line)


@dataclass(frozen=True)
class Habit:
    task: type
    accepted: Sequence[Expected]  # any of them
    threads: int = 1  # of the start on one process
    precision: str = "no"
    hash_seeds: Mapping[str, str] | None = None
    """PYTHONHASHSEED of each start, whose processes are then new interpreters and no forks."""

    @property
    def starts(self) -> Sequence[str]:
        """Two have no --micro-batches: "plain", where that should be refused as well, and "whole"."""
        plain = {"plain"} & {name for one in self.accepted for name in one.only}
        is_refused = self.accepted[0].word == "refused"
        other = {name for names in OTHER_WHEN_WHOLE.values() for name in names.split()}
        whole = () if is_refused or self.task.__name__ in other else ("whole",)
        return ("one", "three", "killed", *plain, *whole)

    @property
    def expected(self) -> str:
        return ", or ".join(map(str, self.accepted))

    def accepts(self, found: Finding) -> bool:
        return any(one.is_met(found) for one in self.accepted)


ZOO: dict[str, Habit] = {}


def load() -> Mapping[str, Habit]:
    """All habits by name."""
    for module in pkgutil.iter_modules(habits.__path__, "habits."):
        importlib.import_module(module.name)
    return ZOO
