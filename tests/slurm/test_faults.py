"""Jobs that something happens to end with the weights of a job that nothing happened to."""

import re

import pytest
from jobs import LAUNCHER, WORKER, Job, Outcome
from safetensors.torch import load

pytestmark = pytest.mark.timeout(900)

STEPS = 1000
LSTM = (
    *("lstm.sbatch", "--length", "10", "--steps", str(STEPS), "--log-every", "10", "--evaluate-every", "500"),
    *("--checkpoint-every", "100", "--learning-rate", "1e-4", "--schedule", "constant"),
    *("--wandb", "disabled", "--run-dir", "run"),
)
GAN = (
    *("gan.sbatch", "--preset", "smoke", "--dataset", "fake", "--steps", "12", "--log-every", "1"),
    *("--evaluate-every", "6", "--checkpoint-every", "4", "--wandb", "disabled", "--run-dir", "run"),
)


def test_two_nodes_are_one(uninterrupted, outcomes):
    one, two = uninterrupted(*LSTM, nodes=1), uninterrupted(*LSTM)
    assert "nodes: 2 (n[1-2]), processes on each: 1" in two.output
    assert "processes: 2," in two.output
    for a, b in zip(one.run.read_metrics(), two.run.read_metrics(), strict=True):
        assert a["step"] == b["step"]
        for name in a.keys() & {"train/loss", "eval/accuracy"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-3)
    assert_equal_but_for_rounding(one, two)
    outcomes.append(Outcome("none: two nodes against one (equal to 1e-4)", 0, equal=True))


def test_time_limit(submit, uninterrupted, outcomes):
    reference, mine = uninterrupted(*LSTM), []
    job = submit(*LSTM)
    job.wait_for_worker("n1")
    with job.fault("time limit, while the workers start", mine):
        job.signal_of_time_limit()
    job.wait_for_step(200)
    with job.fault("time limit", mine):
        job.signal_of_time_limit()
    outcomes += mine
    job.assert_as_if_uninterrupted(reference, mine)


def test_time_limit_of_a_gan(cluster, submit, uninterrupted, outcomes):
    reference, mine = uninterrupted(*GAN), []
    job = submit(*GAN)
    job.wait_for("the script", lambda: cluster.processes("n1", "launch/gan.py .*--dry-run"))
    with job.fault("time limit, before there is a worker", mine):
        job.signal_of_time_limit()
    with job.fault("time limit, during an evaluation", mine):
        job.wait_for_step(6)
        job.signal_of_time_limit()
        assert not any("eval/frechet_distance" in row for row in job.run.read_metrics())
    outcomes += mine
    job.assert_as_if_uninterrupted(reference, mine)


def test_preemption_without_warning(cluster, submit, uninterrupted, outcomes):
    reference, mine = uninterrupted(*LSTM), []
    job = submit(*LSTM)
    job.wait_for_step(200)
    with job.fault("preemption by a higher partition", mine):
        urgent = cluster.call(
            *("sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive"),
            *("--output=/dev/null", "--wrap=true"),
        )
        job.wait_for("the eviction", lambda: job.restarts == 1)
    assert Job(cluster, job.checkout, urgent.strip()).facts["JobState"] == "COMPLETED"
    assert "preempted: Slurm requeues this job" in job.output
    outcomes += mine
    job.assert_as_if_uninterrupted(reference, mine)


def test_processes_killed(cluster, submit, uninterrupted, outcomes):
    reference, mine = uninterrupted(*LSTM), []
    job = submit(*LSTM)
    job.wait_for_step(200)
    with job.fault("worker killed", mine):
        cluster.kill("n2", WORKER)
    assert "ended with exit code -9" in job.output
    assert "crashed with exit code" in job.output
    job.wait_for_step(600)
    with job.fault("launcher killed", mine):
        cluster.kill("n2", LAUNCHER)
    outcomes += mine
    job.assert_as_if_uninterrupted(reference, mine)
    assert not list(job.checkout.glob(".*crashes*"))


def test_nodes_powered_off(breakable, submit, uninterrupted, outcomes):
    reference, mine = uninterrupted(*LSTM), []
    job = submit(*LSTM)
    job.wait_for_step(200)
    assert job.facts["NodeList"] == "n[1-2]"
    with job.fault("node powered off, not the batch host", mine, or_once_more=True):
        breakable.power_off("n2")
    assert job.facts["NodeList"] == "n[1,3]"
    breakable.power_on("n2")
    job.wait_for_step(600)
    with job.fault("node powered off, the batch host", mine, or_once_more=True):
        breakable.power_off("n1")
    assert job.facts["NodeList"] == "n[2-3]"
    breakable.power_on("n1")
    outcomes += mine
    job.assert_as_if_uninterrupted(reference, mine)


def test_own_loop_on_a_node_that_is_powered_off(breakable, submit, outcomes, launch, tmp_path):
    launch("examples/shapes.py", tmp_path / "shapes", "120")
    script = ("python", "examples/own_loop.py", "--data", str(tmp_path / "shapes"), "--epochs", "120")
    command = ("train.sbatch", "--run-dir", "run", "--", *script, "--run-dir", "run")
    reference, mine = submit(*command, nodes=1), []
    reference.wait_for_end()
    job = submit(*command)
    job.wait_for_step(90)
    with job.fault("own loop: node powered off", mine, or_once_more=True):
        breakable.power_off("n2")
    breakable.power_on("n2")
    with job.fault("own loop: time limit", mine):
        job.signal_of_time_limit()
    outcomes += mine
    job.assert_as_if_uninterrupted(reference, mine)


def test_cable_pulled_and_put_back(breakable, submit, uninterrupted, outcomes):
    """The old process trains on, on the same disk, when the job is started again on another node."""
    job, mine = submit(*LSTM, "--steps", "1000000", nodes=1), []
    job.wait_for_step(200)
    assert job.facts["NodeList"] == "n1"
    with job.fault("cable pulled, and put back while the old rank runs", mine):
        breakable.cut("n1")
        job.wait_for("a start on another node", lambda: job.restarts == 1)
        job.wait_for_worker("n2")
        assert breakable.processes("n1", WORKER)
        breakable.heal("n1")
    job.wait_for("the end of the old process", lambda: not breakable.processes("n1", WORKER))
    breakable.call("scancel", job.number)
    job.wait_for_end("CANCELLED")
    assert job.restarts == 1
    assert job.state == "stopped"
    reference = uninterrupted(*LSTM, "--steps", str(job.step), nodes=1)
    mine[0].equal = job.tensors() == reference.tensors()
    outcomes += mine
    assert mine[0].equal
    steps = [row["step"] for row in job.run.read_metrics() if "train/loss" in row]
    assert steps == list(range(10, job.step + 1, 10))


def test_fewer_nodes_and_more_give_the_same_bits(breakable, submit, uninterrupted, outcomes):
    """Each start takes the nodes that are free, from one to three."""
    exact, mine = (*LSTM, "--micro-batches", "4"), []
    other = breakable.call(
        *("sbatch", "--parsable", "--nodelist=n3", "--exclusive", "--output=/dev/null", "--wrap=sleep inf")
    )
    job = submit(*exact, "--steps", "1000000", nodes="1-3")
    job.wait_for_step(200)
    assert job.facts["NodeList"] == "n[1-2]"
    with job.fault("of two nodes one is powered off, none is free", mine, or_once_more=True):
        breakable.power_off("n2")
    assert job.facts["NodeList"] == "n1"
    breakable.power_on("n2")
    breakable.wait_for_nodes()
    with job.fault("time limit, on one node; two are there", mine):
        job.signal_of_time_limit()
    assert job.facts["NodeList"] == "n[1-2]"
    breakable.call("scancel", other.strip())
    with job.fault("scontrol requeue, on two nodes; three are there", mine):
        breakable.call("scontrol", "requeue", job.number)
    assert job.output.count("run: stopped after") == 2  # both times it has saved
    assert job.facts["NodeList"] == "n[1-3]"
    breakable.call("scancel", job.number)
    job.wait_for_end("CANCELLED")
    assert job.state == "stopped"
    reference = uninterrupted(*exact, "--steps", str(job.step), nodes=1)
    last = job.logged_step  # the reference has logged its last step, too
    assert job.losses() == [(step, loss) for step, loss in reference.losses() if step <= last]
    equal = job.tensors() == reference.tensors()
    for outcome in mine:
        outcome.equal = equal
    outcomes += mine
    assert equal


def test_cancelled_and_continued_on_one_node(submit, uninterrupted, outcomes):
    job = submit(*LSTM)
    job.wait_for_step(200)
    job.cluster.call("scancel", job.number)
    job.wait_for_end("CANCELLED")
    assert job.restarts == 0
    assert job.state == "stopped"
    again = submit(*LSTM, nodes=1, checkout=job.checkout)
    again.wait_for_end()
    assert again.state == "finished"
    assert re.search(r"run goes on from step 2\d\d\n", again.output)
    assert_equal_but_for_rounding(again, uninterrupted(*LSTM))
    outcomes.append(Outcome("scancel; submitted again on one node (equal to 1e-4)", 0, equal=True))


def assert_equal_but_for_rounding(one: Job, other: Job) -> None:
    for name, content in one.tensors().items():
        others = load(other.tensors()[name])
        for tensor, values in load(content).items():
            assert (values - others[tensor]).norm() <= 1e-4 * others[tensor].norm(), (name, tensor)
