"""A zoo of what people write: with --micro-batches, each ends in the same bits, or is refused in one line.

python tests/zoo -k norm --jobs 2
PYTHONPATH=another/checkout python tests/zoo
"""

import argparse
import dataclasses
import gc
import importlib
import json
import queue
import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
for module in ("cs324dist.loop", "torch._dynamo"):  # the latter is imported by the first optimizer
    importlib.import_module(module)

from entry import Finding, Habit, load  # noqa: E402
from harness import Keeper, judge, train  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-k", default="", help="only habits whose name or title matches this")
    parser.add_argument("--page", type=Path, help="page to write, such as docs/habits.md")
    parser.add_argument("--jobs", type=int, default=1, help="habits beside each other")
    options = parser.parse_args()
    zoo = {name: h for name, h in load().items() if re.search(options.k, f"{name} {h.task.__doc__}")}
    began, counts, keepers = time.monotonic(), Counter(), queue.SimpleQueue()
    for _ in range(options.jobs):
        keepers.put(Keeper())

    def find(name: str) -> Finding:
        keeper = keepers.get()
        found = keeper.judge(name)
        keepers.put(keeper)
        return found

    findings: list[tuple[Habit, Finding]] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for (name, habit), found in zip(zoo.items(), pool.map(find, zoo), strict=True):
            counts[found.word] += 1
            counts["not as expected"] += not (met := habit.accepts(found))
            print(f"{'' if met else '!':1} {name:30} {str(found)[:90]:90} {habit.expected}", flush=True)
            findings.append((habit, found))
    for _ in range(options.jobs):
        keepers.get().end()
    wrong = counts.pop("not as expected")
    whole = sum("whole" in habit.starts for habit in zoo.values())
    words = ", ".join(f"{count} {word}" for word, count in counts.most_common())
    print(f"{len(zoo)} habits: {words}; {wrong} not as expected; {time.monotonic() - began:.0f} s")
    if options.page:
        introduction = INTRODUCTION.format(words=words, count=len(zoo), whole=whole)
        options.page.write_text(page(findings, introduction))
    return bool(wrong)


def what(habit: Habit) -> str:
    """What the page calls it."""
    words = " ".join((habit.task.__doc__ or habit.task.__name__).split()).replace("|", "\\|")
    outside_of_code = re.compile(r"(`[^`]*`)|([_*])")
    return outside_of_code.sub(lambda found: found[1] or "\\" + found[2], words)


def becomes(habit: Habit, found: Finding) -> str:
    """What is said of it, if it does not end in the same bits."""
    if found.word == "silent":
        first = habit.accepted[0]
        return "a line says what a kill loses" if first.word == "warned" else f"**not seen**: {first.text}"
    line = (" ".join(found.errors.values()) or found.why).partition("\n")[0]
    line = re.sub(r"/\S*/zoo-\S*", "the run", re.sub(r"^error( on rank \d)?: ", "", line))
    line = re.match(r".{0,20}[^:]*", line)[0]  # without the advice behind the colon
    return f"{found.word}: {line[:150]}".replace("|", "/")


def page(findings: Sequence[tuple[Habit, Finding]], introduction: str) -> str:
    """The page: a table, and lists of those that need no word."""
    rows, silent, told = [], [], []
    for habit, found in findings:
        if found.word != "equal":
            rows.append(f"| {what(habit)} | {becomes(habit, found)} |")
        else:
            (told if any("warning" in said for said in found.said.values()) else silent).append(what(habit))
    lists = [textwrap.fill(" · ".join(sorted(some)), 110, break_on_hyphens=False) for some in (silent, told)]
    return introduction.format(*lists, rows="\n".join(sorted(rows)))


INTRODUCTION = """# Habits

What people write in a task, and what becomes of each with `--micro-batches 4`: on one process, on three, and
on three that are all killed (-9) and continued on another number. Each ends in **the same bits**, or is
**refused** in one line (its beginning is shown here), or a line says what no checkpoint can hold. A few end
in other bits, and no check sees them. {count} habits: {words}.

The same gradients: {whole} of the habits are trained once more without `--micro-batches`, as plain torch does
it, and in each step their metrics are the same within a thousandth. The others draw, or have a loss that is
no mean over samples (`tests/zoo/entry.py` says which).

`python tests/zoo --jobs 2 --page docs/habits.md` tries them all and writes this page; each is a few lines in
`tests/zoo/habits/`.

## The same bits

{{}}

## The same bits, and a line says what to know

{{}}

## Refused, or lost

| what people write | what becomes of it |
| --- | --- |
{{rows}}
"""


def serve() -> None:
    zoo = load()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(dataclasses.astuple(judge(zoo[line.strip()]))), flush=True)


match sys.argv[1:]:
    case ["--serve"]:
        serve()
    case ["--train", name, *words]:
        train(load()[name], words)
    case _:
        sys.exit(main())
