"""Write docs/results.md, performance.md, distributed.md, gpu.md, proof.md and their pictures.

python benchmarks/results_page.py

The templates beside this file hold the text and the tables; the functions that they call are defined here.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import jinja2
from common import IMAGES, REPOSITORY, RESULTS, Row, load, where
from gpu_check import PARTS
from matplotlib import colormaps
from matplotlib.figure import Figure

LENGTHS = (5, 10, 15, 20, 50)
TRIALS = 10_000  # palindromes of an evaluation
SPACE = "\N{NARROW NO-BREAK SPACE}"
PERCENT = f"{SPACE}%"


def number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}".replace(",", SPACE)


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}{PERCENT}"


def share(value: float) -> str:
    """A share of right answers, which is 100 % only if all are right."""
    return f"100{PERCENT}" if value == 1 else percent(min(value, 0.9999), 2)


def deviation(values: Sequence[float], digits: int = 0) -> str:
    """Mean ± standard deviation."""
    return f"{number(statistics.mean(values), digits)} ± {number(statistics.stdev(values), digits)}"


def least_to_most(values: Sequence[float], digits: int = 0) -> str:
    return " to ".join(dict.fromkeys(number(end(values), digits) for end in (min, max)))


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Mean ± standard deviation (least to most)."""
    if len(values) < 2:
        return number(values[0], digits) if values else "\N{EN DASH}"
    return f"{deviation(values, digits)} ({least_to_most(values, digits)})"


def spread_of(rows: Iterable[Row], name: str, digits: int = 0) -> str:
    return spread([row[name] for row in rows if row[name] is not None], digits)


def met(row: Row) -> bool:
    """Whether the median of a comparison is what its goal asks for: at least, or at most, so much."""
    bound, _, limit = row["goal"].rpartition(" ")
    median = statistics.median(row["ratios"])
    return median >= float(limit) if bound == "at least" else median <= float(limit)


def yes(is_so: bool) -> str:
    return "yes" if is_so else "**no**"


def effect(row: Row) -> str:
    """What leaving a measure out does to the time of a step; nothing, where the rounds do not agree."""
    shown = [round(ratio, 2) for ratio in row["ratios"]]  # the page's range
    if min(shown) > 1:
        return "slower"
    return "faster" if max(shown) < 1 else "no difference could be measured"


def environments(results: Iterable[Row]) -> list[Row]:
    """What each result was made in: the environments of its runs, if stored, or else its own."""
    made = []
    for result in results:
        runs = [row for row in result.get("rows", []) if "environment" in row]
        made += [run["environment"] for run in runs or [result]]
    return made


def machines(*results: Row) -> str:
    """What results were made on."""
    lines = set()
    for made in environments(results):
        torch, accelerate = (made["packages"][name].split("+")[0] for name in ("torch", "accelerate"))
        lines.add(
            f"{made['device']}, {made['cores']} cores, threads used: {made['threads']}, "
            f"Python {made['python']}, torch {torch}, accelerate {accelerate}"
        )
    return "; ".join(sorted(lines))


def processors(*results: Row) -> str:
    """The kinds of processor that results were made on."""
    return ", ".join(sorted({made["device"] for made in environments(results)}))


def commits(*results: Row) -> str:
    """The commits that results were made on."""
    return ", ".join(sorted({made["commit"][:7] for made in environments(results)}))


def grouped(rows: Iterable[Row], by: str) -> list[list[Row]]:
    """A group of rows for each value of `by`, in the order in which they come."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[by], []).append(row)
    return list(groups.values())


def solved(models: Sequence[Row]) -> str:
    return f"{sum(model['solved'] is not None for model in models)} of {len(models)}"


def median_steps(models: Sequence[Row]) -> float:
    return statistics.median(model["solved"] or math.inf for model in models)


def steps_of(models: Iterable[Row]) -> list[int]:
    """The steps that the models took which were solved."""
    return [model["solved"] for model in models if model["solved"]]


def accuracy(models: Sequence[Row]) -> str:
    return share(statistics.mean(model["accuracy"] for model in models))


def wrong(right: float, trials: int) -> str:
    """How many are wrong; if none is, the error rate that this excludes at 95 %: 3 / n, the rule of three."""
    return f"{number(trials - right)} of {number(trials)}" if right < trials else f"below {3 / trials:.1g}"


def error_rate(models: Sequence[Row]) -> str:
    """What the evaluations of several models say of each model's error rate."""
    counts = (model.get("all", (model["accuracy"], 1)) for model in models)
    perfect = [right == trials for right, trials in counts]
    if not all(perfect):
        return f"{sum(perfect)} of {len(perfect)} models without an error"
    all_there_are = {5: 1000, 10: 10**6}.get(models[0]["length"])
    trials = TRIALS if models[0]["length"] <= 2000 else TRIALS // 10
    return f"none, all {number(all_there_are)} tried" if all_there_are else wrong(trials, trials)


def seconds(models: Iterable[Row]) -> list[float]:
    """How long the training of each model took."""
    return [60 * model["minutes"] for model in models]


def steps_to_fit(models: Sequence[Row]) -> list[int]:
    """The steps to 99 % of a training batch, of the models that got there."""
    fitted = ([step for step, _, right in model["curve"] if right >= 0.99] for model in models)
    return [steps[0] for steps in fitted if steps]


def sure(runs: Sequence[Row]) -> str:
    return f"{spread([100 * run['sure'] for run in runs], 1)}{PERCENT}"


def digits(runs: Sequence[Row]) -> str:
    """The rarest digit's share and the most frequent one's."""
    shares = [100 * run[f"share_of_{digit}"] for run in runs for digit in range(10)]
    return f"{min(shares):.1f} to {max(shares):.1f}{PERCENT}"


def last_fifth(run: Row) -> list[float]:
    """The distances in the last fifth of a run."""
    return [distance for step, distance, _ in run["curve"] if step >= 0.8 * run["steps"]]


def smallest(run: Row) -> float:
    """The smallest distance of a run."""
    return min(distance for _, distance, _ in run["curve"])


def readings(fuzz: dict[str, Any]) -> Row:
    """What became of the mutations, over all readers."""
    total: Counter[str] = Counter()
    for counts in fuzz["readers"].values():
        total.update({name: count for name, count in counts.items() if name != "grown_mib"})
    fine = sum(total[name] for name in ("refused", "set aside", "harmless", "forged", "unsigned"))
    return {**total, "all": total.total(), "bad": total.total() - fine}


def ratios(result: Row, *comparisons: str) -> list[list[float]]:
    """The rounds' ratios of each comparison."""
    return [where(result["rows"], what=what)[0]["ratios"] for what in comparisons]


FUNCTIONS = (number, percent, share, deviation, spread, spread_of, met, yes, effect, machines, processors,
             commits, grouped, where, solved, median_steps, steps_of, accuracy, wrong, error_rate, seconds,
             steps_to_fit, sure, digits, last_fifth, smallest, readings, least_to_most, ratios,
             statistics.median, statistics.mean)  # fmt: skip


def page(name: str) -> str:
    """The text of a page."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(REPOSITORY / "benchmarks"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    for function in FUNCTIONS:
        templates.filters[function.__name__] = templates.globals[function.__name__] = function
    parts = [(part.__name__, str(part.__doc__).rstrip("."), limit) for part, limit in PARTS.items()]
    templates.globals["parts"] = parts
    stored: dict[str, Any] = {path.stem: load(path.stem) for path in RESULTS.glob("*.json")}
    for model in ("lstm", "gan"):
        stored[model] = {path.stem: load(f"{model}/{path.stem}") for path in (RESULTS / model).glob("*.json")}
    return templates.get_template(f"{name}.md.template").render(stored)


@contextmanager
def axes(
    name: str, size: tuple[float, float], xlabel: str, ylabel: str = "", legend_columns: int = 0
) -> Iterator[Any]:
    """The axes of a picture to draw into; it is then written to docs/images."""
    figure = Figure(size, layout="constrained")
    picture = figure.subplots()
    picture.set(xlabel=xlabel, ylabel=ylabel)
    yield picture
    if legend_columns:
        figure.legend(loc="outside lower center", ncols=legend_columns, fontsize="small")
    figure.savefig(IMAGES / f"{name}.png", dpi=120)


def draw() -> None:
    """Write the pictures."""
    colours = colormaps["viridis"]
    line: dict[str, Any] = {"color": "grey", "linewidth": 1}
    note: dict[str, Any] = {"color": "grey", "textcoords": "offset points"}

    course = where(load("lstm/course")["rows"], data="endless")
    with axes("lstm-accuracy", (8, 4.5), "step", "accuracy", len(LENGTHS)) as picture:
        for (model, style), length in product((("lstm", "-"), ("rnn", ":")), LENGTHS):
            runs = where(course, model=model, length=length)
            curves = [[point for point in run["curve"] if point[0] <= 1500] for run in runs]
            points = list(zip(*curves, strict=True))  # one for each seed
            means = [statistics.mean(right for _, _, right in seeds) for seeds in points]
            colour = colours(LENGTHS.index(length) / len(LENGTHS))
            label = f"{model.upper()}, {length} digits"
            picture.plot([seeds[0][0] for seeds in points], means, style, color=colour, label=label)
        picture.set_ylim(0, None)
        picture.grid(alpha=0.3)

    with axes("lstm-generalisation", (8, 3.5), "digits", "share of right answers") as picture:
        shares = {row["length"]: row["right"] / row["trials"] for row in load("lstm/generalisation")["rows"]}
        picture.semilogx(list(shares), list(shares.values()), "o-", color=colours(0.3))
        picture.axvline(1000, linestyle="--", **line)
        picture.annotate("trained to", (1000, 0.03), (-4, 0), ha="right", **note)
        picture.axhline(0.1, linestyle=":", **line)
        picture.annotate("chance", (1, 0.1), (0, 3), **note)
        picture.set_ylim(0, 1.05)
        picture.grid(alpha=0.3)

    recipes = {runs[0]["recipe"]: runs for runs in grouped(load("gan/course")["rows"], "recipe")}
    recipes["preset fast"] = load("gan/fast")["rows"]
    with axes("gan-distance", (8, 4.5), "step", "Fréchet distance", 2) as picture:
        for place, (name, runs) in enumerate(recipes.items()):
            for run in runs:
                steps, distances, _ = zip(*run["curve"], strict=True)
                label = name if run is runs[0] else None
                picture.loglog(steps, distances, color=colours(place / len(recipes)), label=label)
        floor = runs[0]["floor"]
        picture.axhline(floor, linestyle=":", **line)
        picture.annotate("floor", (250, floor), (0, 3), **note)
        picture.set_ylim(2.5, None)
        picture.grid(alpha=0.3)

    label = "two processes over one: speed-up (strong), efficiency (weak)"
    with axes("scaling", (7, 3.2), label) as picture:
        for place, row in enumerate(load("scaling")["rows"]):
            ratios, median = row["ratios"], statistics.median(row["ratios"])
            ends = [[median - min(ratios)], [max(ratios) - median]]
            colour = "#0072b2" if "strong" in row["what"] else "#e69f00"
            picture.barh(row["what"], median, xerr=ends, color=colour, capsize=3)
            picture.text(0.03, place, f"{median:.2f}", color="white", va="center", weight="bold")
        picture.axvline(1, color="grey", linestyle=":")
        picture.invert_yaxis()


def draw_killed_run() -> None:
    """Write the picture of the front page."""
    runs = load("killed_run")["runs"]
    colours = {1: "#0072b2", 2: "#d55e00", 3: "#009e73"}
    figure = Figure((9, 3), layout="constrained")
    exact, ddp = figure.subplots(1, 2, sharey=True)

    def plot(picture: Any, name: str, style: str, **options: Any) -> None:
        points = runs[name]["curve"]
        picture.semilogy([row["step"] for row in points], [row["loss"] for row in points], style, **options)

    plot(exact, "whole", "-", color="#bbbbbb", linewidth=5, label="never stopped, 1 process")
    owners = runs["killed"]["owners"]
    for owner, end in zip(owners, [*(one["step"] for one in owners[1:]), None], strict=True):
        some = [row for row in runs["killed"]["curve"] if owner["step"] <= row["step"] <= (end or math.inf)]
        label = f"then on {owner['processes']}" if owner["step"] else "killed: on 1 process"
        steps, losses = [row["step"] for row in some], [row["loss"] for row in some]
        exact.semilogy(steps, losses, color=colours[owner["processes"]], linewidth=1.5, label=label)
        if end:
            exact.axvline(end, color="grey", linestyle=":", linewidth=1)
            place = exact.get_xaxis_transform()  # steps across, a share of the height
            exact.text(end - 1, 0.03, "kill -9", color="grey", ha="right", transform=place)
    for processes in (1, 2):
        label = f"{processes} process{'es' * (processes > 1)}"
        plot(ddp, f"ddp {processes}", "-", color=colours[processes], linewidth=1.5, label=label)
    same = runs["whole"]["sha256"] == runs["killed"]["sha256"]
    exact.set(title="--micro-batches 4: one SHA-256" if same else "other bits", xlabel="step", ylabel="loss")
    exact.set_ylim(top=1e2)  # room for the legend
    ddp.set(title="without: equal up to rounding, which grows", xlabel="step")
    for picture in (exact, ddp):
        picture.grid(alpha=0.3)
        picture.legend(fontsize="small")
    figure.savefig(IMAGES / "killed-run.png", dpi=120)


def draw_boxes() -> None:
    """Write the picture of the proof: what one cell holds, and what its box allows."""
    figure = Figure((9, 3.6), layout="constrained")
    for picture, row in zip(figure.subplots(1, 2), load("lstm/boxes")["rows"], strict=True):
        steps = range(1, len(row["bounds"]) + 1)
        for digit, colour in enumerate(("#0072b2", "#d55e00")):
            for name, what, alpha, line in (
                ("bounds", "its box allows", 0.2, 0),
                ("found", "it holds", 1, 2),
            ):
                low, high = zip(*(step[digit] for step in row[name]), strict=True)
                style = {"color": colour, "alpha": alpha, "linewidth": line, "capstyle": "butt"}
                picture.fill_between(steps, low, high, label=f"first digit {digit}: what {what}", **style)
        title = "trained on palindromes and boxes" if row["boxes"] else "preset fast: palindromes alone"
        picture.set(title=f"{title}, cell {row['cell']}", xlabel="step", ylabel="c")
        picture.grid(alpha=0.3)
    handles, labels = picture.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(IMAGES / "proof.png", dpi=110)


if __name__ == "__main__":
    for name in ("results", "performance", "distributed", "gpu", "proof"):
        path = REPOSITORY / "docs" / f"{name}.md"
        path.write_text(page(name))
        print(path.relative_to(REPOSITORY))
    draw()
    draw_killed_run()
    draw_boxes()
