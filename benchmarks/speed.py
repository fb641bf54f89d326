"""Every speed that is claimed, as a ratio of two cases measured in turn on one machine.

    make bench
    python benchmarks/speed.py ablation   # what each measure brings
    python benchmarks/speed.py scaling    # one process against two
    python benchmarks/speed.py exact      # what --micro-batches costs

Each case (see `cases.py`) runs in a process of its own, so that nothing of one reaches the other; the cases
take turns, five times, and a ratio is that of two measurements of one round. They are stored in
benchmarks/results/GROUP.json, from which `python benchmarks/results_page.py` makes docs/performance.md and
docs/distributed.md. The ratios of earlier commits stay in the file as its history.
"""

import statistics
import sys
import time

from common import RESULTS, Row, command_line, load, run_python, store

ROUNDS = 5
COMPARISONS = {  # the slower case, the faster one, and the goal of their ratio
    "speed": {
        "GAN step against the notebook's loop": ("gan_notebook", "gan_ours", "at least 1.65"),
        "the same, images in memory": ("gan_notebook_in_memory", "gan_ours", "at least 1.4"),
        "the same, in the style of Accelerate's examples": ("gan_accelerate", "gan_ours", "at least 1.65"),
        "GAN step against its floor": ("gan_ours", "gan_floor", "at most 1.35"),
        "GAN loop against the bare step": ("gan_loop", "gan_bare", "at most 1.05"),
        "fused LSTM, 50 digits, against nn.LSTM": ("lstm_fused_50", "lstm_torch_50", "at most 1.03"),
        "the same, 1000 digits": ("lstm_fused_1000", "lstm_torch_1000", "at most 1.03"),
        "LSTM equations, 50 digits, against nn.LSTM": ("lstm_equations_50", "lstm_torch_50", "at most 1.5"),
        "the equations, 1000 digits": ("lstm_equations_1000", "lstm_torch_1000", "at most 1.5"),
        "LSTM loop, 10 digits, against the bare step": ("lstm_loop", "lstm_fused_10", "at most 1.1"),
        "start to first step against the imports": ("start", "imports", "at most 1.9"),
        "GAN step in float32 against bf16": ("gan_ours", "gan_bf16", ""),
        "GAN step in bf16 against the notebook's loop": ("gan_notebook", "gan_bf16", "at least 2.8"),
    },
    "ablation": {  # one measure left out, against all of them
        "channels_last": ("gan_without_channels_last", "gan_bare", ""),
        "fused Adam": ("gan_without_fused_adam", "gan_bare", ""),
        "discriminator frozen in the generator's step": ("gan_without_frozen_discriminator", "gan_bare", ""),
        "one discriminator forward": ("gan_without_one_forward", "gan_bare", ""),
        "pooling before the LeakyReLU": ("gan_without_pooling_first", "gan_bare", ""),
        "allocator thresholds, LSTM of 50 digits": ("lstm_without_allocator", "lstm_fused_50", ""),
        "denormals flushed, LSTM of 1000 digits": ("lstm_without_flushing", "lstm_fused_1000", ""),
    },
    "exact": {  # --micro-batches against none
        "GAN step, batch 64, 2 parts": ("2 x 32 exact", "2 x 32", "at most 1.15"),
        "GAN step, batch 256, 2 parts": ("2 x 128 exact", "2 x 128", "at most 1.10"),
        "LSTM step, 50 digits, 2 parts": ("lstm 2 exact", "lstm 2", "at most 1.10"),
        "GAN step, batch 64, 4 parts": ("2 x 32 exact 4", "2 x 32", ""),
        "GAN step, batch 64, 8 parts": ("2 x 32 exact 8", "2 x 32", ""),
        "GAN step, batch 64, against one process of two threads": ("2 x 32 exact", "64 on two threads", ""),
        "LSTM step, against one process of two threads": ("lstm 2 exact", "lstm on two threads", ""),
    },
    "scaling": {  # processes x samples of each, one thread a process
        "strong scaling at global batch 64": ("1 x 64", "2 x 32", "at least 0.9"),
        "strong scaling at global batch 256": ("1 x 256", "2 x 128", "at least 1.45"),
        "weak scaling at 64 a process": ("1 x 64", "2 x 64", "at least 0.8"),
        "weak scaling at 256 a process": ("1 x 256", "2 x 256", "at least 0.93"),
    },
}


def history(before: Row) -> list[Row]:
    """The ratios of a stored measurement, after those that it has from earlier ones."""
    ratios = {row["what"]: statistics.median(row["ratios"]) for row in before["rows"]}
    made_in = {name: before["environment"][name] for name in ("commit", "device")}
    return [*before.get("history", ()), {**made_in, "ratios": ratios}]


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("group", nargs="?", choices=COMPARISONS, default="speed", help="what to compare")
    group = parser.parse_args().group
    comparisons = COMPARISONS[group]
    times: dict[str, list[float]] = {case: [] for *cases, _ in comparisons.values() for case in cases}
    began = time.monotonic()
    for number in range(1, ROUNDS + 1):
        for case, measured in times.items():
            measured.append(float(run_python("benchmarks/cases.py", case).split()[-1]))
        minutes = (time.monotonic() - began) / 60
        print(f"round {number} of {ROUNDS} after {minutes:.1f} min", file=sys.stderr)
    median = {case: round(statistics.median(measured), 2) for case, measured in times.items()}
    rows = []
    for what, (first, second, goal) in comparisons.items():
        ratios = sorted(round(a / b, 3) for a, b in zip(times[first], times[second], strict=True))
        row = {"what": what, "slower": first, "faster": second, "goal": goal, "ratios": ratios}
        rows.append({**row, "slower_ms": median[first], "faster_ms": median[second]})
        print(f"{what}: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) {goal}")
    milliseconds = {case: sorted(round(ms, 2) for ms in measured) for case, measured in times.items()}
    result = {"rounds": ROUNDS, "rows": rows, "milliseconds": milliseconds}
    if (RESULTS / f"{group}.json").exists():
        result["history"] = history(load(group))
    store(group, result, **({"threads": 1} if group == "scaling" else {}))
