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
import time
from collections import Counter
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

    rows: list[str] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for (name, habit), found in zip(zoo.items(), pool.map(find, zoo), strict=True):
            counts[found.word] += 1
            counts["not as expected"] += not (met := habit.accepts(found))
            print(f"{'' if met else '!':1} {name:30} {str(found)[:90]:90} {habit.expected}", flush=True)
            rows.append(row(name, habit, found))
    for _ in range(options.jobs):
        keepers.get().end()
    wrong = counts.pop("not as expected")
    whole = sum("whole" in habit.starts for habit in zoo.values())
    words = ", ".join(f"{count} {word}" for word, count in counts.most_common())
    print(f"{len(zoo)} habits: {words}; {wrong} not as expected; {time.monotonic() - began:.0f} s")
    if options.page:
        options.page.write_text(
            INTRODUCTION.format(words=words, count=len(zoo), whole=whole) + "".join(sorted(rows))
        )
    return bool(wrong)


def row(name: str, habit: Habit, found: Finding) -> str:
    """A row of the page."""
    what = " ".join((habit.task.__doc__ or name).split()).replace("|", "\\|")
    first = habit.accepted[0]
    lost = "a line says what a kill loses" if first.word == "warned" else f"**not seen**: {first.text}"
    becomes = {"equal": "the same bits", "silent": lost}.get(found.word)
    lines = "".join(dict.fromkeys(found.errors.values())).splitlines()
    said = (
        re.sub(r"/\S*/zoo-\S*", "the run", re.sub(r"^error( on rank \d)?: ", "", lines[0])) if lines else ""
    )
    line = re.match(r".{0,20}[^:]*", said)[0] or found.word  # without the advice behind the colon
    becomes = becomes or f"refused: {line[:150]}"
    if found.word == "equal" and any("warning" in said for said in found.said.values()):
        becomes += ", and a line says so"
    return f"| {what} | {becomes.replace('|', '/')} |\n"


INTRODUCTION = """# Habits

What people write in a task, and what becomes of each with `--micro-batches 4`: on one process, on three, and
on three that are all killed (-9) and continued on another number. Each ends in **the same bits**, or is
**refused** in one line (its beginning is shown here), or a line says what no checkpoint can hold. A few end
in other bits, and no check sees them. {count} habits: {words}. The same gradients: {whole} of the habits are
trained once more without `--micro-batches`, as plain torch does it, and have the same metrics in each step to
a thousandth; the others draw, or have a loss that is no mean over samples (`tests/zoo/entry.py` says which).

`python tests/zoo --jobs 2 --page docs/habits.md` tries them all and writes this page; each is a few lines in
`tests/zoo/habits/`.

| what people write | what becomes of it |
| --- | --- |
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
