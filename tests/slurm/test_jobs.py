"""What is submitted, what is refused, and when a job gives up."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from jobs import REPOSITORY, Job, Outcome

pytestmark = pytest.mark.timeout(900)

SHORT = (
    *("lstm.sbatch", "--length", "5", "--steps", "400", "--log-every", "10", "--checkpoint-every", "100"),
    *("--wandb", "disabled", "--run-dir", "run"),
)


def test_two_jobs_on_the_same_nodes_do_not_meet(submit, uninterrupted, outcomes):
    jobs = [submit(*SHORT) for _ in range(2)]
    mine = [Outcome("two jobs at once on the same nodes", 0)]
    for job in jobs:
        job.wait_for_end()
        assert job.facts["NodeList"] == "n[1-2]"
        assert "processes: 2," in job.output
    for job in jobs:
        job.assert_as_if_uninterrupted(uninterrupted(*SHORT), mine)
    outcomes += mine


def test_array(submit, uninterrupted, outcomes, tmp_path):
    (tmp_path / "sweep.txt").write_text("lstm --length 5\nlstm --length 10\n")
    common = (str(tmp_path / "sweep.txt"), "--preset", "course", "--wandb", "disabled")
    array = submit("sweep.sbatch", *common, nodes=1, options=("--array=1-2",))
    tasks = [
        Job(array.cluster, array.checkout, f"{array.number}_{task}", f"runs/lstm-length{length}-course-0")
        for task, length in ((1, 5), (2, 10))
    ]
    # The last task of an array has the number of the whole array.
    tasks[1].wait_for_step(100)
    mine = []
    with tasks[1].fault("time limit of one task of an array", mine):
        tasks[1].signal_of_time_limit()
    for task, restarts in zip(tasks, (0, 1), strict=True):
        task.wait_for_end()
        assert task.state == "finished"
        assert task.restarts == restarts
        assert task.logged_step == 1500
    recipe = ("--preset", "course", "--length", "10", "--wandb", "disabled", "--run-dir", "run")
    tasks[1].assert_as_if_uninterrupted(uninterrupted("lstm.sbatch", *recipe, nodes=1), mine)
    outcomes += mine


def test_a_sweep_trains_each_line_of_a_file(submit, tmp_path):
    lines = ("lstm --length 5 --run-dir one", "gan --preset smoke --dataset fake --run-dir two")
    (tmp_path / "sweep.txt").write_text("\n".join(lines) + "\n")
    common = ("--steps", "20", "--wandb", "disabled")
    array = submit(*("sweep.sbatch", str(tmp_path / "sweep.txt"), *common), nodes=1, options=("--array=1-3",))
    tasks = [Job(array.cluster, array.checkout, f"{array.number}_{n}", run) for n, run in
             ((1, "one"), (2, "two"), (3, "none"))]  # fmt: skip
    for task, name in zip(tasks[:2], ("lstm", "gan"), strict=True):
        task.wait_for_end()
        assert (task.state, task.step) == ("finished", 20)
        assert task.run.read_record().task == name
    tasks[2].wait_for_end("FAILED")
    assert tasks[2].output == f"{tmp_path}/sweep.txt has no line 3\n"


def test_nodes_that_would_train_alone_are_refused(submit, cluster, launch_environment, outcomes, tmp_path):
    script = tmp_path / "alone.sbatch"
    lstm = f"{REPOSITORY}/launch/lstm.py {' '.join(SHORT[1:])}"
    config = f"{REPOSITORY}/accelerate_configs/cpu_ddp.yaml"
    script.write_text(
        f"#!/bin/bash\n"
        f"srun accelerate launch --cpu {lstm}\n"
        f"srun accelerate launch --config_file {config} {lstm}\n"
    )
    number = cluster.call("sbatch", "--parsable", "-N2", str(script), cwd=tmp_path, env=launch_environment)
    job = Job(cluster, tmp_path, number.strip())
    job.wait_for_end("FAILED")
    # whole lines: on one process Accelerate 1.16 repeats the error in a traceback of its own
    line = r"^error: Slurm started 2 tasks on 2 nodes, and here (\d) would train alone"
    refused = re.findall(line, job.output, re.M)
    assert sorted(refused) == ["1", "1", "2", "2"]
    assert not job.run.exists
    outcomes.append(Outcome("each node on its own (--cpu): refused", 0))


def test_what_is_refused_is_not_requeued(cluster, submit, uninterrupted, tmp_path):
    run = uninterrupted(*SHORT)
    jobs = {
        "--length 0 is not allowed": submit(*SHORT, "--length", "0"),
        "--seed 1 differs from the run's 0": submit(*SHORT, "--seed", "1", checkout=run.checkout),
    }
    number = cluster.call("sbatch", "--parsable", f"{REPOSITORY}/slurm/lstm.sbatch", cwd=tmp_path)
    jobs["has no slurm/train.sh: call sbatch in the checkout"] = Job(cluster, tmp_path, number.strip())
    for reason, job in jobs.items():
        job.wait_for_end("FAILED")
        assert reason in job.output
        assert job.facts["ExitCode"] == "2:0"
        assert job.restarts == 0
    assert run.state == "finished"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cluster's GPUs are make-believe")
def test_gpus_that_torch_cannot_use_are_refused(submit):
    job = submit(*SHORT, options=("--gpus-per-node=2",))
    job.wait_for_end("FAILED")
    assert "nodes: 2 (n[1-2]), processes on each: 2" in job.output
    assert "error: n1 was given 2 GPUs and torch sees 0" in job.output
    assert job.restarts == 0


def test_a_crash_requeues_three_times(submit, outcomes):
    job = submit(*SHORT, options=("--export=ALL,GLOO_SOCKET_IFNAME=nonsense",))
    job.wait_for_end("FAILED")
    assert job.restarts == 3
    assert job.facts["ExitCode"] == "1:0"
    assert "requeued 3 times after a crash or without progress, and no more" in job.output
    outcomes.append(Outcome("a crash at every start: gives up", 3))


def test_processes_of_a_cpu_job(submit):
    job = submit(*SHORT, "--steps", "10", nodes=1, options=("--ntasks-per-node=2", "--cpus-per-task=2"))
    job.wait_for_end()
    assert "nodes: 1 (n1), processes on each: 2" in job.output
    assert "processes: 2," in job.output


def test_shell_scripts_are_clean():
    if shutil.which("shellcheck") is None:
        (pytest.fail if os.environ.get("CS324DIST_CI") else pytest.skip)("apt-get install shellcheck")
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    files = [REPOSITORY / name for name in listed.stdout.splitlines()]
    scripts = [path for path in files if path.is_file() and is_shell_script(path)]
    assert len(scripts) >= 5
    subprocess.run(["shellcheck", *scripts], check=True)


def is_shell_script(path: Path) -> bool:
    with path.open("rb") as file:
        return bool(re.match(rb"#!.*\b(ba)?sh\b", file.readline(100)))
