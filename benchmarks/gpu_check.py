"""What only a GPU can show, in four groups of less than nine minutes, evidence first.

    python benchmarks/gpu_check.py --group 1     # one of them; without it, all
    python benchmarks/gpu_check.py --pretend     # on a CPU, small: no typing error costs a GPU's time

Traces, logs and metrics are in benchmarks/out/gpu-check, and what was found is at once in
benchmarks/results/gpu.json, from which results_page.py makes docs/gpu.md (that of a pretended check is in
benchmarks/out). data/ must hold MNIST: python launch/fetch_data.py
"""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from common import REPOSITORY, RESULTS, Row, command_line, trainer_of

EVIDENCE = RESULTS.with_name("out") / "gpu-check"
FAKE, LENGTH = {"dataset": "fake"}, {"length": 20, "curriculum": 1.0}
STEPS: dict[str, tuple[str, str, Row]] = {  # a task, a preset, and what is changed of it
    "gan fast": ("gan", "fast", FAKE),
    "gan course": ("gan", "course", FAKE),
    **{f"gan course, batch {n}": ("gan", "course", {**FAKE, "batch_size": n}) for n in (256, 1024)},
    "lstm fast": ("lstm", "fast", LENGTH),
    "lstm fast, batch 1024": ("lstm", "fast", {**LENGTH, "batch_size": 1024}),
    "lstm course": ("lstm", "course", {"length": 20}),
    "lstm equations": ("lstm", "fast", {**LENGTH, "kernel": "equations"}),
    "rnn": ("lstm", "course", {"length": 20, "model": "rnn"}),
    "classifier": ("examples/classifier.py:ClassifierTask", "fast", FAKE),
    "mlp": ("examples/mlp.py:MLPTask", "fast", {"data": REPOSITORY / "examples" / "spirals.csv"}),
    "gpt": ("examples/gpt.py:GPTTask", "fast", {"text": (REPOSITORY / "docs" / "usage.md",)}),
}
EXACT = {f"gan fast, parts {n}": ("gan", "fast", {**FAKE, "micro_batches": n}) for n in (1, 2, 4, 8)}
EXACT["gpt, parts 4"] = (*STEPS["gpt"][:2], {**STEPS["gpt"][2], "micro_batches": 4})
COMPILED = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "reduce-overhead"}
SPEED: dict[str, tuple[str, dict[str, str]]] = {  # a case of cases.py, and its environment
    "the notebook's loop": ("gan_notebook", {}),
    "GAN step of preset course": ("gan_ours", {}),
    "the same in bf16": ("gan_bf16", {}),
    "the same in bf16, compiled": ("gan_bf16", COMPILED),
    "LSTM step of 50 digits": ("lstm_fused_50", {}),
    "the same by nn.LSTM": ("lstm_torch_50", {}),
}
GAN, LSTM = ("launch/gan.py", "--dataset", "fake"), ("launch/lstm.py", "--length", "20")
LONG = ["--steps", "100000", "--log-every", "1", "--peer-timeout", "10", "--wandb", "disabled"]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
Finding = tuple[str, object, bool | None]  # what was looked at, what was found, whether that is good


class Check:
    """How a part runs what it looks at: small if it is pretended, and until its time is up."""

    def __init__(self, folder: Path, pretend: bool) -> None:
        self.folder, self.pretend, self.deadline = folder, pretend, math.inf

    def python(self, *arguments: object, **environment: str) -> tuple[int, str]:
        """The exit code, and what was printed, which is also in the evidence."""
        command = [sys.executable, *map(str, arguments)]
        with (self.folder / "log").open("a+", encoding="utf-8", errors="replace") as log:
            print(f"\n$ {environment} {' '.join(command)}", file=log, flush=True)
            began, left = log.tell(), self.deadline - time.monotonic()
            code = subprocess.run(
                command, cwd=REPOSITORY, env=os.environ | environment, stdout=log, stderr=log, timeout=left
            ).returncode
            log.seek(began)
            return code, log.read()

    def train(self, run: str, command: tuple[str, ...], steps: int, *more: str, **environment: str) -> str:
        """Train in a folder below ours; returns what is wrong with the run, or nothing."""
        from launched import metrics

        folder = self.folder / run
        options = ("--steps", steps, "--log-every", 1, "--wandb", "disabled", "--run-dir", folder)
        code, said = self.python(*command, *options, *more, **environment)
        if code:
            return said[-2000:]
        return "a metric is not finite" * any(None in line.values() for line in metrics(folder))

    def child(self, name: str, *arguments: str, **environment: str) -> Any:
        """What a function of this module returns, in a process of its own."""
        code, said = self.python(__file__, "--child", name, *arguments, **environment)
        if code:
            raise RuntimeError(said[-2000:])
        return json.loads(said.splitlines()[-1])

    def apart(self, one: str, other: str) -> float:
        """The largest relative difference between the weights that two runs end in."""
        from distributed.paths import weights_in
        from launched import newest_checkpoint

        ours, theirs = (weights_in(newest_checkpoint(self.folder / run)) for run in (one, other))
        norms = ((ours[name].double() - theirs[name].double()).norm() for name in ours)
        return max(float(norm / ours[name].double().norm()) for norm, name in zip(norms, ours, strict=True))


def facts_here() -> Row:  # these run in processes of their own
    import torch

    from cs324dist.runs.environment import environment, has_gpu

    here: Row = {**asdict(environment()), "GPUs": torch.cuda.device_count(), "cores": os.cpu_count()}
    if has_gpu():
        here["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        here["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
        query = "--query-gpu=driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"
        smi = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True)
        here["nvidia-smi"] = smi.stdout.strip()
    return here


def steps_here(cases: str, steps: str) -> Row:
    """Of each case the milliseconds of a step and the peak of memory, or what went wrong."""
    import torch
    from cases import milliseconds

    found: Row = {}
    for name, (task, preset, changes) in globals()[cases].items():
        try:
            trainer = trainer_of(task, preset, **changes)
            if on_gpu := trainer.accelerator.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            took = milliseconds(partial(trainer.step, is_logged=False), int(steps))
            trainer.step(int(steps) + 4, is_logged=True)
            peak = f", {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB" if on_gpu else ""
            wrong = [name for name, value in trainer.read_metrics().items() if not math.isfinite(value)]
            found[name] = f"{took:.2f} ms{peak}" if not wrong else f"not finite: {wrong}"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def trace_here(case: str, folder: str, steps: int = 10) -> str:
    """How many kernels a step launches, for how long the device is busy, and which take the longest."""
    import torch
    from cases import seconds
    from torch.autograd import DeviceType

    task, preset, changes = STEPS[case]
    trainer = trainer_of(task, preset, **changes)
    precision = trainer.accelerator.mixed_precision
    for step in range(4):
        trainer.step(step, is_logged=False)
    with torch.profiler.profile() as profiler:
        began = seconds()
        for step in range(4, 4 + steps):
            trainer.step(step, is_logged=False)
        took = seconds() - began
    profiler.export_chrome_trace(f"{folder}/{case} {precision}.trace.json.gz")
    on = DeviceType.CUDA if trainer.accelerator.device.type == "cuda" else DeviceType.CPU
    kernels = [event for event in profiler.events() or () if event.device_type == on]
    times: Counter[str] = Counter()
    for kernel in kernels:
        times[kernel.name] += kernel.time_range.elapsed_us()
    share = times.total() / 1e6 / took
    longest = [name[:60] for name, _ in times.most_common(4)]
    return f"{len(kernels) / steps:.0f} kernels a step, busy {share:.0%} of the time; longest: {longest}"


def facts(check: Check) -> Iterator[Finding]:  # the first line of each part says what it shows
    """Versions, the GPU, its clocks."""
    yield from ((name, found, None) for name, found in check.child("facts_here").items())


def steps(check: Check) -> Iterator[Finding]:
    """Steps of every task in float32, bf16, fp16, with micro-batches: finite, how fast, how much memory."""
    all_of = ("STEPS", "bf16"), ("EXACT", "no"), ("STEPS", "no"), ("STEPS", "fp16")
    for cases, precision in all_of[: 2 if check.pretend else 4]:
        few = "2" if check.pretend else "40"
        found = check.child("steps_here", cases, few, ACCELERATE_MIXED_PRECISION=precision)
        yield from ((f"{case}, {precision}", said, " ms" in said) for case, said in found.items())


def trace(check: Check) -> Iterator[Finding]:
    """Kernels of a step and the busy share; whether cuDNN's kernels compute the LSTM, by their names."""
    for case in ("gan course", "lstm fast"):
        for precision in ("bf16",) if check.pretend else ("no", "bf16"):
            asked = {"ACCELERATE_MIXED_PRECISION": precision}
            yield f"{case}, {precision}", check.child("trace_here", case, str(check.folder), **asked), None


def speed(check: Check) -> Iterator[Finding]:
    """Milliseconds of a step, ours against the notebook's loop, and compiled against eager."""
    times: dict[str, float] = {}
    for title, (case, environment) in list(SPEED.items())[: 4 if check.pretend else None]:
        if environment and check.pretend:
            environment = {"ACCELERATE_DYNAMO_BACKEND": "EAGER"}
        code, said = check.python("benchmarks/cases.py", case, **environment)
        if code == 0:
            times[title] = float(said.split()[-1])
        yield title, said[-2000:] if code else f"{times[title]:.2f} ms", code == 0
    ours = (times[title] for title in list(SPEED)[1:4] if title in times)
    ratio = times.get("the notebook's loop", math.nan) / min(ours, default=math.nan)
    good = None if check.pretend else ratio >= 10
    yield "ours against the notebook's loop, at least 10", f"{ratio:.2f}", good


def determinism(check: Check) -> Iterator[Finding]:
    """With --micro-batches 4, the same bits twice, after a resume and in an audit; and how far from a CPU."""
    count = 4 if check.pretend else 200
    exact = ("--checkpoint-every", str(count // 2), "--schedule", "constant", "--micro-batches", "4")
    for task, command in (("lstm", LSTM), ("gan", GAN))[: 2 - check.pretend]:
        first, again, resumed = (f"{task} {run}" for run in ("first", "again", "resumed"))
        for run, length in ((first, count), (again, count), (resumed, count // 2), (resumed, count)):
            if wrong := check.train(run, command, length, *exact):
                yield run, wrong, False
        for what, other in (("twice the same steps", again), ("a resume", resumed)):
            apart = check.apart(first, other)
            yield f"{task}: {what}", "the same bits" if apart == 0 else f"{apart:.1e} apart", apart == 0
        code, said = check.python("launch/audit.py", check.folder / first, "--from-start")
        yield f"{task}: audit", said.strip().rpartition("\n")[2], code == 0
        check.train(f"{task} cpu", command, 4, *exact, CUDA_VISIBLE_DEVICES="")
        check.train(f"{task} short", command, 4, *exact, NVIDIA_TF32_OVERRIDE="0")
        apart = check.apart(f"{task} short", f"{task} cpu")
        yield f"{task}: 4 steps in true float32 on the GPU and the CPU", f"{apart:.1e} apart", None


def tests(check: Check) -> Iterator[Finding]:
    """The tests that need a GPU: numbers and paths of the CPU, two processes that share it, no waits."""
    only = ["--collect-only"] * check.pretend
    code, said = check.python("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *only)
    yield "pytest -m gpu", said[-3000:] if code else said.splitlines()[-1], code == 0


def quality(check: Check) -> Iterator[Finding]:
    """Preset fast of both tasks, trained to its end, in float32 and bf16."""
    from launched import metrics

    from cs324dist.tasks import find_task

    for task in ("lstm", "gan"):
        n = 2 if check.pretend else find_task(task).presets["fast"].steps
        for precision in ("bf16",) if check.pretend else ("no", "bf16"):
            wrong = check.train(
                run := f"{task} {precision}", (f"launch/{task}.py",), n, "--precision", precision
            )
            last = {} if wrong else metrics(check.folder / run)[-1]
            yield run, wrong or {k: v for k, v in last.items() if k.startswith("eval/")}, not wrong


def faults(check: Check) -> Iterator[Finding]:
    """TERM in mid-run, and too little memory: one line, a status, and no traceback."""
    from launched import Launched, status

    with Launched((*LSTM, *LONG), check.folder / "term", dict(os.environ)) as launched:
        launched.wait_for_line("step 2/")
        launched.send_signal(signal.SIGTERM)
        code, state = launched.end(), status(launched.run)["state"]
    yield "TERM in mid-run", f"exit code {code}, {state}", (code, state) == (75, "stopped")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if check.pretend:
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, limits[1]))
    large = ("--length", "300", "--batch-size", "1000000", "--curriculum", "1")
    said = check.train("memory", LSTM, 2, *large, PYTORCH_CUDA_ALLOC_CONF="per_process_memory_fraction:0.02")
    resource.setrlimit(resource.RLIMIT_AS, limits)
    lines = [line for line in said.splitlines() if line.startswith("error")]
    good = len(lines) == 1 and "out of memory: lower the batch size" in lines[0] and "Traceback" not in said
    yield "too little memory", lines or said[-500:], good


def nccl(check: Check) -> Iterator[Finding]:
    """NCCL on one GPU and on all: the same bits; a rank that is killed or stopped, over gloo on one GPU."""
    from launched import Launched, status

    gpus = 2 if check.pretend else check.child("facts_here")["GPUs"]
    count, exact = 4 if check.pretend else 50, ("--micro-batches", "8")
    yield "DDP of one process", check.train("ddp", (*TORCHRUN, "1", *GAN), count) or "trains", None
    for processes in sorted({1, gpus}):
        wrong = check.train(f"on {processes}", (*TORCHRUN, str(processes), *GAN), count, *exact)
        apart = math.inf if wrong else check.apart("on 1", f"on {processes}")
        yield f"gan on {processes}", wrong or f"{apart:.1e} apart from one", apart == 0
    command, environment = (*LSTM, *LONG), dict(os.environ)
    if gpus == 1:  # which NCCL does not let two share
        command = ("launch/train.py", "tests/distributed/faults.py:LSTM", *command[1:])
        environment["BACKEND"] = "gloo"
    for number in (signal.SIGKILL, signal.SIGSTOP):
        with Launched(command, check.folder / number.name, environment, "torchrun with two") as launched:
            launched.wait_for_line("step 2/")
            launched.workers()[1].send_signal(number)
            code = launched.process.wait(120)
            said = [line for line in launched.lines() if line.startswith("error on rank 0")]
        state = status(launched.run)
        good = (state["state"], len(said)) == ("failed", 1)
        yield f"rank 1 gets {number.name}", f"exit code {code}, {state}, {said}", good


GROUPS = (
    {facts: 40, steps: 260, trace: 120},
    {speed: 220, determinism: 300},
    {tests: 280, quality: 200},
    {faults: 120, nccl: 300},
)
PARTS = {part: limit for group in GROUPS for part, limit in group.items()}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--group", type=int, choices=range(1, 1 + len(GROUPS)), help="one of them")
    parser.add_argument("--pretend", action="store_true", help="on a CPU, small")
    parser.add_argument("--child", nargs="+", help="used by the parts")
    options = parser.parse_args()
    if options.child:
        name, *arguments = options.child
        print(json.dumps(globals()[name](*arguments), default=str))
        return
    sys.path.insert(0, str(REPOSITORY / "tests"))  # for `launched`
    out = (RESULTS.with_name("out") if options.pretend else RESULTS) / "gpu.json"
    if options.pretend:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "CS324DIST_THREADS": "1", "OMP_NUM_THREADS": "1"}
    chosen = (GROUPS[options.group - 1],) if options.group else GROUPS
    parts = [part.__name__ for group in chosen for part in group]
    before = json.loads(out.read_text())["rows"] if options.group and out.exists() else []
    rows: list[Row] = [row for row in before if row["part"] not in parts]

    def note(part: str, what: str, found: object, good: bool | None) -> None:
        rows.append({"part": part, "what": what, "found": found, "good": good})
        out.write_text(json.dumps({"pretended": options.pretend, "rows": rows}, indent=1) + "\n")
        print(f"{part:12} {'' if good is None else 'good' if good else 'BAD':5}{what}: {found}", flush=True)

    for group in chosen:
        number, began = 1 + GROUPS.index(group), time.monotonic()
        check = Check(EVIDENCE / f"group {number}", options.pretend)
        shutil.rmtree(check.folder, ignore_errors=True)
        check.folder.mkdir(parents=True)
        for part in group:
            name, limit = part.__name__, group[part]
            check.deadline = time.monotonic() + limit * (10 if options.pretend else 1)  # a CPU is slow
            try:
                for finding in part(check):
                    note(name, *finding)
            except subprocess.TimeoutExpired:
                note(name, "the rest of the part", f"not within its {limit} s", False)
            except Exception as error:  # the other parts are looked at nevertheless
                note(name, "the rest of the part", f"{type(error).__name__}: {error}", False)
        print(f"group {number} took {time.monotonic() - began:.0f} s", flush=True)
        for checkpoints in check.folder.glob("*/checkpoints"):
            shutil.rmtree(checkpoints)
    sys.exit(any(row["good"] is False for row in rows))


if __name__ == "__main__":
    main()
