"""What only a GPU can show, in the order of what one most wants to know, in 25 minutes on one H100.

    python benchmarks/gpu_check.py               # every part
    python benchmarks/gpu_check.py facts speed   # some of them
    python benchmarks/gpu_check.py --pretend     # all on a CPU, small: no typing error costs a GPU's time

What is found is at once in benchmarks/results/gpu.json, from which results_page.py makes docs/gpu.md; that of
a pretended check is in benchmarks/out. data/ must hold MNIST: python launch/fetch_data.py
"""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import REPOSITORY, RESULTS, Row, add_parts, command_line, trainer_of

GAN, LSTM = ("launch/gan.py", "--dataset", "fake"), ("launch/lstm.py", "--length", "20")
COURSE = ("--preset", "course", "--length", "20")
TASKS = {
    "gan fast": GAN,
    "gan course": (*GAN, "--preset", "course"),
    "lstm fast": (*LSTM, "--curriculum", "1"),
    "lstm course": ("launch/lstm.py", *COURSE),
    "lstm equations": (*LSTM, "--curriculum", "1", "--kernel", "equations"),
    "rnn": ("launch/lstm.py", *COURSE, "--model", "rnn"),
    "classifier": ("examples/classifier.py", "--dataset", "fake"),
    "examples/mlp.py": ("examples/mlp.py",),
}
COMPILED = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "reduce-overhead"}
SPEED: dict[str, tuple[str, dict[str, str]]] = {  # a case of cases.py, and its environment
    "the notebook's loop": ("gan_notebook", {}),
    "GAN step of preset course": ("gan_ours", {}),
    "the same in bf16": ("gan_bf16", {}),
    "the same in bf16, compiled": ("gan_bf16", COMPILED),
    "the notebook's loop, images in memory": ("gan_notebook_in_memory", {}),
    "GAN step, bare": ("gan_bare", {}),
    "GAN step of preset fast": ("gan_fast", {}),
    "the same with --micro-batches 2": ("gan_exact", {}),
    "LSTM step of 50 digits": ("lstm_fused_50", {}),
    "the same by nn.LSTM": ("lstm_torch_50", {}),
    "LSTM step of 1000 digits": ("lstm_fused_1000", {}),
}
Finding = tuple[str, object, bool | None]  # what was looked at, what was found, whether that is good


class Check:
    """How a part runs what it looks at: small if it is pretended, and until its time is up."""

    def __init__(self, folder: Path, pretend: bool) -> None:
        self.folder, self.pretend, self.deadline = folder, pretend, math.inf

    def python(self, *arguments: object, **environment: str) -> tuple[int, str]:
        """The exit code, and what was printed."""
        left = self.deadline - time.monotonic()
        command = [sys.executable, *map(str, arguments)]
        with subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                said = process.communicate(timeout=left)[0]
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return process.returncode, said

    def train(self, run: str, command: tuple[str, ...], steps: int, *more: str, **environment: str) -> str:
        """Train in a folder below ours; returns what is wrong with the run, or nothing."""
        folder = self.folder / run
        options = ("--steps", steps, "--log-every", 1, "--wandb", "disabled", "--run-dir", folder)
        code, said = self.python(*command, *options, *more, **environment)
        if code:
            return said[-2000:]
        values = [value for line in metrics_in(folder) for value in line.values()]
        wrong = ["a metric is not finite"] * (None in values)
        return "; ".join([*wrong, *(line for line in said.splitlines() if "warning" in line.lower())])

    def child(self, name: str, **environment: str) -> Any:
        """What a function of this module returns, in a process of its own."""
        code, said = self.python(__file__, "--child", name, **environment)
        if code:
            raise RuntimeError(said[-2000:])
        return json.loads(said.splitlines()[-1])


def metrics_in(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def difference(one: Path, other: Path) -> float:
    """The largest relative difference between the weights that two runs end in."""
    from distributed.paths import weights_in
    from launched import newest_checkpoint

    ours, theirs = (weights_in(newest_checkpoint(run)) for run in (one, other))
    norms = ((ours[name].double() - theirs[name].double()).norm() for name in ours)
    return max(float(norm / ours[name].double().norm()) for norm, name in zip(norms, ours, strict=True))


# In processes of their own


def facts_here() -> Row:
    import torch

    from cs324dist.runs.environment import environment, has_gpu
    from cs324dist.tasks.lstm.networks import LSTM

    device = torch.device("cuda" if has_gpu() else "cpu")
    x = torch.zeros(5, 4, 10, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        hidden, _ = LSTM(10).to(device).scan(x)
    here: Row = {**asdict(environment()), "GPUs": torch.cuda.device_count()}
    here["LSTM under bf16 autocast"] = str(hidden.dtype)
    if has_gpu():
        here["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        here["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
        here["memory, GiB"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    return here


def profile_here(steps: int = 20) -> Row:
    import torch
    from torch.autograd import DeviceType

    trainer = trainer_of("gan", "course", dataset="fake")
    on_gpu = trainer.accelerator.device.type == "cuda"
    for step in range(4):
        trainer.step(step, is_logged=False)
    if on_gpu:
        torch.cuda.synchronize()
    with torch.profiler.profile() as profiler:
        began = time.perf_counter()
        for step in range(4, 4 + steps):
            trainer.step(step, is_logged=False)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    device = DeviceType.CUDA if on_gpu else DeviceType.CPU
    kernels = [event.time_range for event in profiler.events() or () if event.device_type == device]
    busy = sum(kernel.elapsed_us() for kernel in kernels) / 1e6 / seconds
    return {"kernels": round(len(kernels) / steps), "busy": round(busy, 3)}


# The parts; the first line of each says what it shows


def facts(check: Check) -> Iterator[Finding]:
    """Versions, the GPU, and in what precision cuDNN computes the LSTM under bf16 autocast."""
    wanted = {"LSTM under bf16 autocast": "torch.bfloat16", "bf16": True}
    for name, found in check.child("facts_here").items():
        yield name, found, found == wanted[name] if name in wanted else None


def tests(check: Check) -> Iterator[Finding]:
    """The tests that need a GPU: numbers and paths of the CPU, two processes that share it, no waits."""
    only = ("--collect-only",) if check.pretend else ()
    code, said = check.python("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *only)
    yield "pytest -m gpu", said[-3000:] if code else said.splitlines()[-1], code == 0


def tasks(check: Check) -> Iterator[Finding]:
    """Every task in float32, bf16 and fp16: finite losses, an evaluation, a checkpoint, no warning."""
    for name, command in TASKS.items():
        for precision in ("bf16",) if check.pretend else ("no", "bf16", "fp16"):
            began, run = time.monotonic(), f"{name.replace('/', ' ')} {precision}"
            steps = 2 if check.pretend else 50
            wrong = check.train(run, command, steps, ACCELERATE_MIXED_PRECISION=precision)
            took = f"{steps} steps, {time.monotonic() - began:.0f} s in all"
            yield f"{name}, {precision}", wrong or took, not wrong


def determinism(check: Check) -> Iterator[Finding]:
    """The same bits twice, after a resume and in an audit: required with --micro-batches 4."""
    steps = 4 if check.pretend else 200
    half = ("--checkpoint-every", str(steps // 2), "--schedule", "constant")
    for name, options in (("micro-batches", ("--micro-batches", "4")), ("ddp", ()))[: 2 - check.pretend]:
        for task, command in (("lstm", LSTM),) if check.pretend else (("lstm", LSTM), ("gan", GAN)):
            title, options = f"{task}, {' '.join(options) or 'no option'}", (*half, *options)
            first, again, resumed = (f"{task} {name} {run}" for run in ("first", "again", "resumed"))
            for run, length in ((first, steps), (again, steps), (resumed, steps // 2), (resumed, steps)):
                if wrong := check.train(run, command, length, *options):
                    yield f"{title}, {run}", wrong, False
            for what, other in (("twice the same steps", again), ("a resume", resumed)):
                apart = difference(check.folder / first, check.folder / other)
                good = apart == 0 if name == "micro-batches" else None
                yield f"{title}: {what}", "the same bits" if apart == 0 else f"{apart:.1e} apart", good
            if name == "micro-batches":
                code, said = check.python("launch/audit.py", check.folder / first, "--from-start")
                yield f"{title}: audit", said.strip().rpartition("\n")[2], code == 0
                check.train(f"{task} cpu", command, 4, *options, CUDA_VISIBLE_DEVICES="")
                check.train(f"{task} short", command, 4, *options)
                apart = difference(check.folder / f"{task} short", check.folder / f"{task} cpu")
                yield f"{title}: 4 steps on the GPU and the CPU", f"{apart:.1e} apart", None


def speed(check: Check) -> Iterator[Finding]:
    """Milliseconds of a step, ours against the notebook's loop, kernels of a step and the busy share."""
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
    yield (
        "ours against the notebook's loop, at least 10",
        f"{ratio:.2f}",
        None if check.pretend else ratio >= 10,
    )
    for precision in ("no", "bf16"):
        found = check.child("profile_here", ACCELERATE_MIXED_PRECISION=precision)
        text = f"{found['kernels']} kernels, the GPU is busy {found['busy']:.0%} of the time"
        yield f"GAN step of preset course, {precision}, profiled", text, None


def quality(check: Check) -> Iterator[Finding]:
    """Preset fast of both tasks, trained to its end."""
    from cs324dist.tasks import find_task

    for task, command in (("lstm", ("launch/lstm.py",)), ("gan", ("launch/gan.py",))):
        steps = 2 if check.pretend else find_task(task).presets["fast"].steps
        for precision in ("bf16",) if check.pretend else ("no", "bf16"):
            run = f"fast {task} {precision}"
            wrong = check.train(run, command, steps, ACCELERATE_MIXED_PRECISION=precision)
            if wrong:
                yield run, wrong, False
                continue
            last = metrics_in(check.folder / run)[-1]
            (name, value) = next(
                (k, v) for k, v in last.items() if k in ("eval/accuracy", "eval/frechet_distance")
            )
            yield run, f"{name} {value:.4g}", None


def faults(check: Check) -> Iterator[Finding]:
    """TERM in mid-run, and too little memory: one line, a status, and no traceback."""
    from launched import Launched, status

    command = (*LSTM, "--steps", "100000", "--log-every", "1", "--wandb", "disabled")
    with Launched(command, check.folder / "term", dict(os.environ)) as launched:
        launched.wait_for_line("step 2/")
        launched.send_signal(signal.SIGTERM)
        code, state = launched.end(), status(launched.run)["state"]
    yield "TERM in mid-run", f"exit code {code}, {state}", (code, state) == (75, "stopped")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if check.pretend:
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, limits[1]))
    too_large = ("launch/lstm.py", "--length", "300", "--batch-size", "1000000", "--curriculum", "1")
    said = check.train("memory", too_large, 2)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    lines = [line for line in said.splitlines() if line.startswith("error")]
    good = len(lines) == 1 and "out of memory: lower --batch-size" in lines[0] and "Traceback" not in said
    yield "too little memory", lines or said[-500:], good


def nccl(check: Check) -> Iterator[Finding]:
    """With two GPUs or more: the same bits on 1, 2 and all of them; a rank is killed, a rank is stopped."""
    from launched import Launched, status

    gpus = 2 if check.pretend else check.child("facts_here")["GPUs"]
    if gpus < 2:
        yield "GPUs", gpus, None
        return
    steps, exact = 4 if check.pretend else 50, ("--micro-batches", str(gpus), "--batch-size", str(16 * gpus))
    for processes in sorted({1, 2, gpus}):
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
        wrong = check.train(f"on {processes}", (*launcher, *GAN), steps, *exact)
        apart = math.inf if wrong else difference(check.folder / "on 1", check.folder / f"on {processes}")
        yield f"gan on {processes}", wrong or f"{apart:.1e} apart from one", apart == 0
    command = (*LSTM, "--steps", "100000", "--log-every", "1", "--peer-timeout", "10", "--wandb", "disabled")
    for title, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
        run = check.folder / title
        with Launched(command, run, dict(os.environ), "torchrun with two") as launched:
            launched.wait_for_line("step 2/")
            launched.workers()[1].send_signal(number)
            code = launched.process.wait(120)
        found = f"exit code {code}, {status(run)['state']}: {status(run).get('why')}"
        yield f"a rank that is {title}", found, code != 0


PARTS = {
    facts: 40,
    tests: 280,
    tasks: 330,
    determinism: 300,
    speed: 250,
    quality: 150,
    faults: 150,
    nccl: 240,
}


def main() -> None:
    by_name = {part.__name__: part for part in PARTS}
    parser = command_line(__doc__)
    add_parts(parser, by_name)
    parser.add_argument("--pretend", action="store_true", help="on a CPU, small")
    parser.add_argument("--child", choices=("facts_here", "profile_here"), help="used by the parts")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(globals()[options.child]()))
        return
    sys.path.insert(0, str(REPOSITORY / "tests"))  # for `launched`
    out = RESULTS.with_name("out") / "gpu.json" if options.pretend else RESULTS / "gpu.json"
    out.parent.mkdir(exist_ok=True)
    if options.pretend:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "CS324DIST_THREADS": "1", "OMP_NUM_THREADS": "1"}
    rows: list[Row] = []

    def note(part: str, what: str, found: object, good: bool | None) -> None:
        rows.append({"part": part, "what": what, "found": found, "good": good})
        out.write_text(json.dumps({"pretended": options.pretend, "rows": rows}, indent=1) + "\n")
        print(f"{part:12} {'' if good is None else 'good' if good else 'BAD':5}{what}: {found}", flush=True)

    with TemporaryDirectory(prefix="gpu-check-") as folder:
        check = Check(Path(folder), options.pretend)
        for name in options.parts or by_name:
            began, limit = time.monotonic(), PARTS[by_name[name]]
            check.deadline = began + limit * (10 if options.pretend else 1)  # a CPU is slow
            try:
                for finding in by_name[name](check):
                    note(name, *finding)
            except subprocess.TimeoutExpired:
                note(name, "the rest of the part", f"not within its {limit} s", False)
            except Exception as error:  # the other parts are looked at nevertheless
                note(name, "the rest of the part", f"{type(error).__name__}: {error}", False)
            print(f"{name} took {time.monotonic() - began:.0f} s")
    sys.exit(any(row["good"] is False for row in rows))


if __name__ == "__main__":
    main()
