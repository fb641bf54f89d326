"""Write docs/results.md, performance.md and distributed.md, and their pictures, from what is stored.

python benchmarks/results_page.py
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cs324dist.metrics.accuracy import TRIALS

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
IMAGES = REPOSITORY / "docs" / "images"
LENGTHS = (5, 10, 15, 20, 50)
LINE = 3.77  # floors within which an image is close: a distance of 20 where the floor is 5.3
SETTLING = 30  # steps that `lstm_results.py settled` watches
SPACE = "\N{NARROW NO-BREAK SPACE}"

Trial = dict[str, Any]


def template(page: str) -> str:
    return (REPOSITORY / "benchmarks" / f"{page}.md.template").read_text()


def stored(part: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{part}.json").read_text())


def of(trials: Iterable[Trial], **wanted: object) -> list[Trial]:
    return [trial for trial in trials if all(trial[name] == value for name, value in wanted.items())]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def number(value: int) -> str:
    return f"{value:,}".replace(",", SPACE)


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Mean ± standard deviation (least to most)."""
    if not values:
        return "\N{EN DASH}"
    mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    ends = f"{min(values):.{digits}f} to {max(values):.{digits}f}"
    return f"{mean:.{digits}f} ± {deviation:.{digits}f} ({ends})"


def steps(trials: Sequence[Trial]) -> tuple[str, str]:
    """How many models solved it, and in how many steps those did."""
    solved = [trial["solved"] for trial in trials if trial["solved"]]
    return f"{len(solved)} of {len(trials)}", spread(solved)


def share(value: float) -> str:
    return "100 %" if value == 1 else f"{min(100 * value, 99.99):.2f} %"


def excluded(right: int, trials: int) -> str:
    """What a count says of all palindromes of a length: the rule of three, 3 / n at 95 %."""
    wrong = trials - right
    return f"{number(wrong)} of {number(trials)} wrong" if wrong else f"below {3 / trials:.1g}"


def counted(trials: Sequence[Trial], length: int) -> str:
    """What the evaluations of several models say of each model's error rate."""
    if length == 10:
        whole = [trial["all"][0] == trial["all"][1] for trial in trials]
        return (
            f"none, all {number(10**6)} tried"
            if all(whole)
            else f"none in {sum(whole)} of {len(whole)} models"
        )
    perfect = [trial["accuracy"] == 1 for trial in trials]
    if not all(perfect):
        return f"{sum(perfect)} of {len(perfect)} models without an error"
    return f"none, all {number(1000)} tried" if length == 5 else excluded(TRIALS, TRIALS)


def machines(*environment: dict[str, Any]) -> str:
    lines = set()
    for made in environment:
        torch, accelerate = (made["packages"][name].split("+")[0] for name in ("torch", "accelerate"))
        lines.add(
            f"{made['device']}, {made['cores']} cores, threads used: {made['threads']}, "
            f"Python {made['python']}, torch {torch}, accelerate {accelerate}"
        )
    return "; ".join(sorted(lines))


def reported(trials: list[Trial]) -> str:
    rows = []
    for length in LENGTHS:
        lstm, rnn = (of(trials, model=model, length=length, data="endless") for model in ("lstm", "rnn"))
        accuracies = [share(statistics.mean(trial["accuracy"] for trial in group)) for group in (lstm, rnn)]
        rows.append(
            (str(length), *steps(lstm), accuracies[0], counted(lstm, length), *steps(rnn), accuracies[1])
        )
    header = ("digits", "LSTM solved", "steps to 100 %", "accuracy at the end", "error rate of each model",
              "RNN solved", "steps to 100 %", "accuracy at the end")  # fmt: skip
    return table(header, rows)


def claim(trials: list[Trial]) -> str:
    rows = []
    for data, name in (("endless", "endless"), ("fixed", f"a fixed set of 2{SPACE}048")):
        group = of(trials, model="lstm", length=50, data=data)
        fitted = [next((p[0] for p in trial["curve"] if p[2] >= 0.99), math.inf) for trial in group]
        before, reached = sum(step <= 1500 for step in fitted), [step for step in fitted if step < math.inf]
        accuracies = [trial["accuracy"] for trial in group]
        unseen = f"{share(min(accuracies))} to {share(max(accuracies))}"
        rows.append((name, f"{before} of {len(group)}", spread(reached), steps(group)[0], unseen))
    header = ("training data", f"99 % of a training batch right within 1{SPACE}500 steps", "steps to that",
              "all unseen palindromes right at some step", "unseen ones right at the end")  # fmt: skip
    return table(header, rows)


def initialised(trials: list[Trial]) -> str:
    names = dict.fromkeys(trial["initialisation"] for trial in trials)
    groups = {name: of(trials, initialisation=name) for name in names}
    return table(
        ("initialisation", "solved", "steps to 100 %", "accuracy at the end"),
        [(n, *steps(g), share(statistics.mean(t["accuracy"] for t in g))) for n, g in groups.items()],
    )


def read_otherwise(trials: list[Trial]) -> str:
    names = dict.fromkeys(trial["reading"] for trial in trials)
    groups = {name: of(trials, reading=name) for name in names}
    rows = []
    for name, group in groups.items():
        accuracies = [trial["accuracy"] for trial in group]
        rows.append((name, *steps(group), f"{share(min(accuracies))} to {share(max(accuracies))}"))
    return table(("reading", "solved", "steps to 100 %", "accuracy at the end"), rows)


def long(trials: list[Trial]) -> str:
    rows = [
        (
            f"`{trial['command']}`",
            share(trial["accuracy"]),
            excluded(round(trial["accuracy"] * trial["trials"]), trial["trials"]),
            f"{trial['seconds'] / 60:.1f}",
            f"{trial['peak_gib']:.2f}",
        )
        for trial in trials
    ]
    header = ("run", "accuracy", "error rate", "minutes", "peak memory, GiB")
    return table(header, rows)


def fast(trials: list[Trial]) -> str:
    rows = []
    for length in dict.fromkeys(trial["length"] for trial in trials):
        group = of(trials, length=length)
        median = statistics.median(trial["solved"] or math.inf for trial in group)
        rows.append((number(length), *steps(group), f"{median:.0f}", counted(group, length)))
    return table(("digits", "solved", "steps to 100 %", "median", "error rate of each model"), rows)


def generalised(trials: list[Trial]) -> str:
    return table(
        ("digits", "right"),
        [(number(t["length"]), f"{number(t['right'])} of {number(t['trials'])}") for t in trials],
    )


def held(trials: list[Trial]) -> str:
    rows = [
        (number(t["steps"]), f"{t['within']:.2f}", f"{t['between']:.2f}", number(round(t["largest_cell"])))
        for t in trials
    ]
    header = ("after steps", "distance of h to its digit's mean", "least distance of two digits' means",
              "largest cell, absolute")  # fmt: skip
    return table(header, rows)


def certain(trials: list[Trial]) -> str:
    return table(
        ("digits", "palindromes there are", "wrong"),
        [(str(t["length"]), number(t["trials"]), number(t["trials"] - t["right"])) for t in trials],
    )


def ablation(trials: list[Trial]) -> str:
    names = dict.fromkeys(trial["variant"] for trial in trials)
    return table(
        ("variant", "solved within 1 000 steps".replace(" 000", f"{SPACE}000"), "steps to 100 %"),
        [(name, *steps(of(trials, variant=name))) for name in names],
    )


def settled(trials: list[Trial]) -> str:
    names = {"length": "for the length", "linear": "as nn.Linear"}
    rows = [
        (names[t["initialisation"]], str(t["seed"]), str(t["reached"]), f"{t['wrong']} of {SETTLING}")
        for t in trials
    ]
    header = (
        "initialisation",
        "seed",
        f"1{SPACE}000 digits reached after steps",
        "batches not all right after it",
    )
    return table(header, rows)


def distances(trials: Sequence[Trial], name: str = "frechet_distance") -> str:
    return spread([trial[name] for trial in trials], 2)


def floors(trials: Sequence[Trial]) -> str:
    return f"{statistics.mean(trial['frechet_distance'] / trial['floor'] for trial in trials):.1f}"


def sure(trials: Sequence[Trial]) -> str:
    return f"{spread([100 * trial['sure'] for trial in trials], 1)} %"


def digits(trials: Sequence[Trial]) -> str:
    """The rarest digit's share and the most frequent one's."""
    shares = [100 * trial[f"share_of_{digit}"] for trial in trials for digit in range(10)]
    return f"{min(shares):.1f} to {max(shares):.1f} %"


def gan_reported(trials: list[Trial]) -> str:
    rows = []
    for trial in trials:
        late = [point[1] for point in trial["curve"] if point[0] >= 0.8 * trial["steps"]]
        best = min(trial["curve"], key=lambda point: point[1])
        rows.append(
            (
                trial["recipe"],
                number(trial["steps"]),
                f"{statistics.median(late):.1f} ({min(late):.1f} to {max(late):.1f})",
                f"{best[1]:.1f} after {number(best[0])}",
                f"{trial['frechet_distance']:.1f} ({floors([trial])})",
                f"{100 * trial['sure']:.1f} %",
                digits([trial]),
            )
        )
    header = (
        "the discriminator trains",
        "steps",
        "distance in the last fifth: median (least to most)",
        "least, after steps",
        "at the end (floors)",
        "sure at the end",
        "share of each digit",
    )
    return table(header, rows)


def gan_fast(trials: list[Trial]) -> str:
    rows = [
        (
            str(trial["trial"]),
            f"{trial['frechet_distance']:.2f}",
            floors([trial]),
            f"{trial['frechet_distance_to_training_images']:.2f}",
            f"{100 * trial['sure']:.1f} %",
            digits([trial]),
            str(trial["seconds"]),
        )
        for trial in trials
    ]
    everything = (
        "all",
        distances(trials),
        floors(trials),
        distances(trials, "frechet_distance_to_training_images"),
        sure(trials),
        digits(trials),
        spread([trial["seconds"] for trial in trials]),
    )
    header = ("seed", "distance", "floors", "to the training images", "sure", "share of each digit",
              "seconds, from the command to the end")  # fmt: skip
    return table(header, [*rows, everything])


def gan_quick(trials: list[Trial]) -> str:
    row = (
        f"{len(trials)}",
        distances(trials),
        floors(trials),
        sure(trials),
        digits(trials),
        spread([trial["seconds"] for trial in trials]),
    )
    header = ("trials", "distance", "floors", "sure", "share of each digit",
              "seconds, from the command to the end")  # fmt: skip
    return table(header, [row])


def overtaken(reported: list[Trial], fast: list[Trial], pace: list[Trial]) -> str:
    """When preset fast is as near as the report's recipe in its last fifth, and within `LINE` floors."""
    ms = {trial["recipe"]: trial["milliseconds"] for trial in pace}
    whole = reported[0]["steps"]
    late = [point[1] for point in reported[0]["curve"] if point[0] >= 0.8 * whole]

    def taken(steps: int, recipe: str) -> str:
        return f"{number(steps)} steps, {steps * ms[recipe] / 1000:.0f} s"

    rows = []
    for name, distance, theirs in (
        ("the report's, median of its last fifth", statistics.median(late), whole),
        ("the report's, least of its last fifth", min(late), whole),
        (f"{LINE} floors", LINE * fast[0]["floor"], None),
    ):
        ours = [next(point[0] for point in trial["curve"] if point[1] <= distance) for trial in fast]
        slowest = max(ours)  # all get there, or this fails
        rows.append(
            (
                name,
                f"{distance:.1f}",
                taken(theirs, "report") if theirs else "not reached",
                f"{taken(slowest, 'fast')} (mean {statistics.mean(ours) * ms['fast'] / 1000:.0f} s)",
                f"{theirs / slowest:.0f}" if theirs else "",
                f"{theirs * ms['report'] / slowest / ms['fast']:.0f}" if theirs else "",
            )
        )
    header = ("distance", "", "the report's recipe", f"preset fast, the slowest of {len(fast)} seeds",
              "times fewer steps", "times less time")  # fmt: skip
    return table(header, rows)


def gan_ablation(trials: list[Trial]) -> str:
    names = dict.fromkeys(trial["variant"] for trial in trials)
    groups = {name: of(trials, variant=name) for name in names}
    rows = []
    for name, group in groups.items():
        options = f"`{group[0]['options']}`" if group[0]["options"] else ""
        rows.append((name, options, distances(group), floors(group), sure(group), digits(group)))
    return table(("variant", "options", "distance", "floors", "sure", "share of each digit"), rows)


def gan_memorised(trials: list[Trial]) -> str:
    return table(
        ("images", "median distance to the nearest training image"),
        [(trial["images"], f"{trial['to_nearest_training_image']:.2f}") for trial in trials],
    )


def gan_fashion(trials: list[Trial]) -> str:
    trial = trials[0]
    row = (
        share(trial["classifier_accuracy"]),
        f"{trial['floor']:.2f}",
        f"{trial['frechet_distance']:.2f} ({floors(trials)})",
        f"{100 * trial['sure']:.1f} %",
        f"{100 * trial['sure_of_test_images']:.1f} %",
        digits(trials),
    )
    header = (
        "classifier's accuracy",
        "floor",
        "distance (floors)",
        "sure",
        "of test images",
        "share of each class",
    )
    return table(header, [row])


def killed(chaos: dict[str, Any]) -> str:
    columns = ("trials", "kills", "during_write", "mismatches", "orphans", "median_restart", "worst_restart")
    header = ("task", "runs", "kills", "of which in a checkpoint's write", "ends that differ in a bit",
              "processes left behind", "restart to first new step: median, s", "worst, s")  # fmt: skip
    rows = chaos["table"].items()
    return table(header, [(name, *(str(row[column]) for column in columns)) for name, row in rows])


def fuzzed(fuzz: dict[str, Any]) -> str:
    fine = ("refused", "set aside", "harmless", "forged", "unsigned")
    rows = []
    for reader, found in fuzz["readers"].items():
        bad = sum(count for name, count in found.items() if name not in (*fine, "grown_mib"))
        tried = bad + sum(found[name] for name in fine)
        rows.append((reader.replace("_", " "), number(tried), *(number(found[n]) for n in fine), number(bad)))
    return table(("reader", "mutations", *fine, "bad"), rows)


def compared(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        ratios = row["ratios"]
        ends = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        times = (f"{row['slower_ms']:.1f}", f"{row['faster_ms']:.1f}")
        lines.append((row["what"], f"{statistics.median(ratios):.2f}", ends, row["goal"], *times))
    return table(("comparison", "ratio", "least to most", "goal", "ms", "against ms"), lines)


def ablated(rows: list[dict[str, Any]]) -> str:
    return table(
        ("without", "times as long", "least to most"),
        [
            (
                r["what"],
                f"{statistics.median(r['ratios']):.2f}",
                f"{r['ratios'][0]:.2f} to {r['ratios'][-1]:.2f}",
            )
            for r in rows
        ],
    )


def performance() -> str:
    """The page on speed."""
    speed, ablation = stored("speed"), stored("ablation")
    rows = speed["comparisons"]
    bf16 = [row for row in rows if "bf16" in row["what"]]
    return template("performance").format(
        rounds=speed["rounds"],
        environment=machines(speed["environment"], ablation["environment"]),
        compared=compared([row for row in rows if row["goal"]]),
        ablated=ablated(ablation["comparisons"]),
        bf16=compared(bf16),
    )


def scaled(result: dict[str, Any]) -> str:
    rows = [
        (name, *(f"{value:.2f}" for value in (statistics.median(ratios), ratios[0], ratios[-1])))
        for name, ratios in result["ratios"].items()
    ]
    return table(("comparison", "median", "least", "most"), rows)


def scaling_model(result: dict[str, Any]) -> dict[str, float]:
    """Milliseconds a step as `fixed + per_sample x samples of a process + moved, if there are two`.

    Both cells of one process and the smallest of two give the three numbers; the other cells check them.
    """
    median = {cell: statistics.median(times) for cell, times in result["milliseconds"].items()}
    per_sample = (median["1 x 256"] - median["1 x 64"]) / (256 - 64)
    fixed = median["1 x 64"] - 64 * per_sample
    return {
        "fixed": fixed,
        "per_sample": per_sample,
        "moved": median["2 x 32"] - fixed - 32 * per_sample,
    }


def modelled(cell: str, fixed: float, per_sample: float, moved: float) -> float:
    processes, samples = map(int, cell.split(" x "))
    return fixed + per_sample * samples + (moved if processes > 1 else 0.0)


def cells(result: dict[str, Any]) -> str:
    model = scaling_model(result)
    rows = []
    for cell, times in result["milliseconds"].items():
        values = (statistics.median(times), times[0], times[-1], modelled(cell, **model))
        rows.append((cell, *(f"{value:.0f}" for value in values)))
    header = ("processes x samples of each", "ms a step, median", "least", "most", "model")
    return table(header, rows)


def distributed() -> str:
    """The page on any number of processes."""
    result = stored("scaling")
    model = scaling_model(result)
    missed = [
        abs(modelled(cell, **model) / statistics.median(times) - 1)
        for cell, times in result["milliseconds"].items()
    ]
    return template("distributed").format(
        scaled=scaled(result),
        cells=cells(result),
        environment=machines(result["hardware"]),
        pays=f"{2 * model['moved'] / model['per_sample']:.0f}",
        missed=f"{max(missed):.0%}".replace("%", " %"),
        **model,
    )


def results() -> str:
    """The page of results."""
    parts = {name: stored(f"lstm/{name}")["trials"] for name in PARTS}
    gan = {name: stored(f"gan/{name}")["trials"] for name in GAN_PARTS}
    chaos, fuzz, stall = (stored(name) for name in ("chaos", "fuzz", "checkpoint_stall"))
    return template("results").format(
        **{name: write(parts[part]) for name, (part, write) in TABLES.items()},
        environment=machines(*(stored(f"lstm/{name}")["environment"] for name in PARTS if name != "long")),
        long_made_by=machines(stored("lstm/long")["environment"]),
        **{f"gan_{name}": write(gan[name]) for name, write in GAN_PARTS.items() if write},
        overtaken=overtaken(gan["report"], gan["fast"], gan["pace"]),
        classifier=gan["fast"][0]["classifier_sha256"][:16],
        floor=gan["fast"][0]["floor"],
        sure_of_test_images=f"{100 * gan['fast'][0]['sure_of_test_images']:.1f} %",
        **{
            f"gan_{name}_made_by": machines(*(trial["environment"] for trial in gan[name]))
            for name in ("report", "fast", "bf16", "quick", "ablation")
        },
        killed=killed(chaos),
        chaos_made_by=machines(chaos["hardware"]),
        chaos_jobs=chaos["jobs"],
        fuzzed=fuzzed(fuzz),
        fuzz=fuzz,
        stall=stall,
        stall_share=f"{stall['share']:.2%}".replace("%", " %"),
        stall_made_by=machines(stall["hardware"]),
    )


TABLES = {
    "reported": ("report", reported),
    "claim": ("report", claim),
    "read_otherwise": ("readings", read_otherwise),
    "initialised": ("initialisation", initialised),
    "fast": ("fast", fast),
    "long": ("long", long),
    "generalised": ("generalisation", generalised),
    "held": ("held", held),
    "certain": ("certain", certain),
    "ablation": ("ablation", ablation),
    "settled": ("settled", settled),
}
GAN_PARTS = {
    "report": gan_reported,
    "fast": gan_fast,
    "bf16": gan_fast,
    "quick": gan_quick,
    "pace": None,
    "ablation": gan_ablation,
    "memorised": gan_memorised,
    "fashion": gan_fashion,
}
PARTS = tuple(dict.fromkeys(part for part, _ in TABLES.values()))


def draw() -> None:
    """Write the pictures."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    trials, colours = stored("lstm/report")["trials"], plt.get_cmap("viridis")
    for column, name in ((2, "accuracy"), (1, "loss")):
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        for model, style in (("lstm", "-"), ("rnn", ":")):
            for place, length in enumerate(LENGTHS):
                group = of(trials, model=model, length=length, data="endless")
                curves = [[point for point in trial["curve"] if point[0] <= 1500] for trial in group]
                points = list(zip(*curves, strict=True))  # one for each seed
                means = [statistics.mean(point[column] for point in seeds) for seeds in points]
                label = f"{'LSTM' if model == 'lstm' else 'RNN'}, {length} digits"
                colour = colours(place / len(LENGTHS))
                axes.plot([seeds[0][0] for seeds in points], means, style, color=colour, label=label)
        axes.set(xlabel="step", ylabel=name, ylim=(0, None))
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=len(LENGTHS), fontsize="small")
        figure.savefig(IMAGES / f"lstm-{name}.png", dpi=120)
        plt.close(figure)
    counted = stored("lstm/generalisation")["trials"]
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    shares = [t["right"] / t["trials"] for t in counted]
    axes.semilogx([t["length"] for t in counted], shares, "o-", color=colours(0.3))
    axes.axvline(1000, color="grey", linestyle="--", linewidth=1)
    axes.annotate("trained to", (1000, 0.03), (-4, 0), textcoords="offset points", ha="right", color="grey")
    axes.axhline(0.1, color="grey", linestyle=":", linewidth=1)
    axes.annotate("chance", (1, 0.1), (0, 3), textcoords="offset points", color="grey")
    axes.set(xlabel="digits", ylabel="share of right answers", ylim=(0, 1.05))
    axes.grid(alpha=0.3)
    figure.savefig(IMAGES / "lstm-generalisation.png", dpi=120)
    plt.close(figure)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    recipes = [(trial["recipe"], [trial]) for trial in stored("gan/report")["trials"]]
    recipes.append(("preset fast, five seeds", stored("gan/fast")["trials"]))
    for place, (name, runs) in enumerate(recipes):
        colour = colours(place / len(recipes))
        for run in runs:
            points = [point[:2] for point in run["curve"]]
            axes.loglog(*zip(*points, strict=True), color=colour, label=name if run is runs[0] else None)
    axes.axhline(runs[0]["floor"], color="grey", linestyle=":", linewidth=1)
    axes.annotate("floor", (250, runs[0]["floor"]), (0, 3), textcoords="offset points", color="grey")
    axes.set(xlabel="step", ylabel="Fréchet distance", ylim=(2.5, None))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(IMAGES / "gan-distance.png", dpi=120)
    plt.close(figure)
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    ratios = stored("scaling")["ratios"]
    medians = [statistics.median(values) for values in ratios.values()]
    ends = [[m - v[0] for m, v in zip(medians, ratios.values(), strict=True)],
            [v[-1] - m for m, v in zip(medians, ratios.values(), strict=True)]]  # fmt: skip
    bars = ["#0072b2" if "strong" in name else "#e69f00" for name in ratios]
    axes.barh(list(ratios), medians, xerr=ends, color=bars, capsize=3)
    axes.axvline(1, color="grey", linestyle=":")
    axes.invert_yaxis()
    axes.set_xlabel("two processes over one: speed-up (strong), efficiency (weak)")
    for row, median in enumerate(medians):
        axes.text(0.03, row, f"{median:.2f}", color="white", va="center", weight="bold")
    figure.savefig(IMAGES / "scaling.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    for page in (results, performance, distributed):
        path = REPOSITORY / "docs" / f"{page.__name__}.md"
        path.write_text(page())
        print(path.relative_to(REPOSITORY))
    draw()
