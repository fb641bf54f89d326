"""The precision of a run: what the user asked for, or else what its task prefers and the machine has."""

from types import SimpleNamespace

import pytest
import torch
from launched import refusal

from cs324dist.distributed import launcher, process
from cs324dist.distributed.launcher import asked_precision
from cs324dist.errors import UserError

LAUNCH = ["python", "/somewhere/bin/accelerate", "launch"]
CPU = ["--config_file", "accelerate_configs/cpu.yaml"]


@pytest.mark.parametrize(
    ("command", "environment", "asked"),
    [
        (["bash"], None, None),
        (["bash"], "", None),
        (["bash"], "no", "no"),
        (["bash"], "bf16", "bf16"),
        (LAUNCH, "no", None),  # accelerate's own default
        ([*LAUNCH, *CPU], "no", None),
        ([*LAUNCH, *CPU, "--mixed_precision", "bf16"], "bf16", "bf16"),
    ],
)
def test_what_was_asked_for(monkeypatch, tmp_path, command, environment, asked):
    parent = SimpleNamespace(cmdline=lambda: command)
    monkeypatch.setattr(launcher, "default_config_file", tmp_path / "none.yaml")
    monkeypatch.setattr(launcher.psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if environment is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment)
    assert asked_precision() == asked


def test_a_precision_that_there_is_not_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "FP8")
    with pytest.raises(UserError, match=r"^fp8 as .* is not allowed: give one of no, bf16, fp16$"):
        asked_precision()


@pytest.mark.parametrize("asked", ["abc", "0", "1.5", "99999"])
def test_a_number_of_threads_that_there_is_not_is_refused(monkeypatch, asked):
    monkeypatch.setenv("CS324DIST_THREADS", asked)
    assert refusal(process._threads) == (
        f"CS324DIST_THREADS={asked} is not allowed: give a whole number from 1 to 9999"
    )


def test_threads_that_outnumber_the_cores_are_warned_of_once(monkeypatch, capsys):
    monkeypatch.setattr(process.os, "sched_getaffinity", lambda _: {0, 1})
    for asked, rank, warned in (("2", "0", False), ("3", "1", False), ("3", "0", True)):
        monkeypatch.setenv("CS324DIST_THREADS", asked)
        monkeypatch.setattr(process, "RANK", rank)
        assert process._threads() == int(asked)
        expected = "warning: CS324DIST_THREADS=3 is more than the 2 cores: steps take many times longer\n"
        assert capsys.readouterr().err == expected * warned


@pytest.mark.parametrize(
    ("processes", "variables", "said"),
    [(1, {}, "1 of 4 are used"), (3, {}, ""), (1, {"CS324DIST_THREADS": "1"}, "")],
)
def test_idle_cores_are_said_unless_one_was_asked_for(monkeypatch, capsys, processes, variables, said):
    monkeypatch.setattr(process, "_cores", lambda: 4)
    monkeypatch.delenv("CS324DIST_THREADS", raising=False)
    for name, value in {"LOCAL_WORLD_SIZE": str(processes), **variables}.items():
        monkeypatch.setenv(name, value)
    process.say_idle_cores(3)
    found = capsys.readouterr().err
    assert (said in found) if said else not found


def test_machines_that_may_differ_choose_nothing_themselves(monkeypatch):
    monkeypatch.setattr(process, "_has_bf16", lambda on_gpu: True)
    monkeypatch.setattr(process, "processor", lambda: "AMD")
    assert process.is_faster_in_bf16()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not process.is_faster_in_bf16()
    monkeypatch.setattr(process, "has_gpu", lambda: True)  # nodes of a job have the same GPUs
    assert process.is_faster_in_bf16()


def test_a_run_goes_on_in_its_own_precision_where_nothing_else_is_asked_for(launch, tmp_path):
    run = (*GAN[:-3], "1", "--schedule", "constant", "--wandb", "disabled", "--run-dir", tmp_path / "run")
    launch(*run, environment={"ACCELERATE_MIXED_PRECISION": "bf16"})
    for steps, asked, option, taken in (
        ("2", "", (), "bf16"),
        ("3", "no", (), "float32"),
        ("4", "", (), "float32"),
        ("5", "no", ("--precision", "bf16"), "bf16"),  # an option wins over the launcher
        ("6", "", (), "bf16"),
    ):
        done = launch(*run, "--steps", steps, *option, environment={"ACCELERATE_MIXED_PRECISION": asked})
        assert f"precision: {taken}\n" in done.stderr


class Reached(Exception):
    """Accelerate is asked for the precision that is its argument."""


@pytest.mark.parametrize(
    ("option", "asked", "preferred", "taken"),
    [
        (None, None, "bf16", "bf16"),
        (None, None, "no", "no"),
        (None, None, "fp16", "no"),  # an audit of a run that was made on a GPU
        (None, None, "fp8", "no"),  # as a folder may say
        (None, "no", "bf16", "no"),
        (None, "bf16", "no", "bf16"),
        ("no", "bf16", "bf16", "no"),
        ("bf16", "no", "no", "bf16"),
    ],
)
def test_what_is_taken(monkeypatch, option, asked, preferred, taken):
    def reached(*, mixed_precision, **_):
        raise Reached(mixed_precision)

    monkeypatch.setattr(process, "asked_precision", lambda: asked)
    monkeypatch.setattr(process, "Accelerator", reached)
    with pytest.raises(Reached, match=f"^{taken}$"):
        process.start_accelerator(precision=option, preferred=preferred)


@pytest.mark.parametrize(
    ("name", "avx512_bf16", "amx", "faster"),
    [
        ("Intel(R) Xeon(R) Processor", True, True, True),
        ("Intel(R) Xeon(R) Processor", True, False, False),  # slower, in fact
        ("Intel(R) Xeon(R) Processor", False, False, False),
        ("AMD EPYC 9R14", True, False, True),
        ("AMD EPYC 7763", False, False, False),
    ],
)
def test_which_processors_are_faster_in_bf16(monkeypatch, name, avx512_bf16, amx, faster):
    monkeypatch.setattr(process, "processor", lambda: name)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert process.is_faster_in_bf16() == faster


GAN = ("launch/gan.py", "--preset", "smoke", "--dataset", "fake", "--steps", "1", "--wandb", "disabled")


@pytest.mark.parametrize(
    ("script", "launcher", "options"),
    [
        (GAN, "accelerate", ()),
        (GAN, "accelerate", (*CPU, "--mixed_precision", "no")),
        (("launch/lstm.py", *GAN[1:3], *GAN[5:]), "python", ()),
    ],
    ids=["gan", "gan, float32", "lstm"],
)
def test_the_gan_takes_bf16_where_nothing_else_was_asked_for(launch, tmp_path, script, launcher, options):
    environment = {"ACCELERATE_MIXED_PRECISION": ""}
    done = launch(
        *script, "--run-dir", tmp_path / "run", launcher=launcher, options=options, environment=environment
    )
    prefers = script is GAN and "--mixed_precision" not in options
    taken = "bf16" if prefers and process.is_faster_in_bf16() else "float32"
    assert f"precision: {taken}\n" in done.stderr
