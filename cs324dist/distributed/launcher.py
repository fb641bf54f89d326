"""What the launcher or Slurm was asked for, and what came of it."""

import argparse
import os
import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from accelerate.commands.config.config_args import default_config_file, load_config_from_file

from cs324dist.errors import UserError, say


def check_environment() -> None:
    """Refuse what the launcher was asked for and this toolkit would ignore."""
    plugins = {
        "FSDP": "FSDP",
        "DEEPSPEED": "DeepSpeed",
        "MEGATRON_LM": "Megatron-LM",
        "PARALLELISM_CONFIG": "Parallelism",
    }
    for name, title in plugins.items():
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true"):
            raise UserError(
                f"accelerate launch was asked for {title}, and this toolkit trains with DDP: "
                f"leave it out of the launcher's options and configuration"
            )
    _check_accumulation(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"))


def _check_accumulation(steps: str | None) -> None:
    if steps not in (None, "", "1"):
        raise UserError(
            f"--gradient_accumulation_steps {steps} of accelerate launch would change nothing: "
            f"give the script the global --batch-size that you want"
        )


def check_gpus(gpus: int) -> None:
    """Refuse more processes on this machine than it has GPUs: NCCL gives each of them one of its own."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # srun can show each of its tasks another GPU; torchrun and accelerate launch show all the same.
    shown_another = gpus == 1 and "TORCHELASTIC_RUN_ID" not in os.environ
    if processes > gpus and not shown_another:
        raise UserError(
            f"{processes} processes on a machine with {gpus} GPUs: give --num_processes {gpus}, or train on "
            f"its processors with --config_file accelerate_configs/cpu_ddp.yaml"
        )


def asked_precision() -> str | None:
    """The precision that the launcher was asked for; None if it was not: accelerate launch says "no" then.

    Raises:
        UserError: it is not one that this toolkit trains in.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    if asked not in ("", "no", "bf16", "fp16"):
        raise UserError(
            f"{asked} as --mixed_precision or ACCELERATE_MIXED_PRECISION is not allowed: "
            f"give one of no, bf16, fp16"
        )
    if asked == "no" and (launched := _accelerate_launch()):
        options, config = launched
        return asked if options.mixed_precision or (config and config.mixed_precision) else None
    return asked or None


def check_launcher(world_size: int, is_main_process: bool) -> None:
    """Name a default config that the user may have forgotten; refuse fewer processes than were asked for.

    `accelerate launch --cpu --num_processes 2` starts one process and says nothing (accelerate #2741).
    """
    _check_slurm(world_size)
    launched = _accelerate_launch()
    if launched is None:
        return
    asked, config = launched
    _check_accumulation(asked.gradient_accumulation_steps)  # the environment has it with DeepSpeed only
    if config and asked.config_file is None and is_main_process:
        say(f"accelerate launch took its settings from {default_config_file}")
    processes = asked.num_processes or (config.num_processes if config else 1) or 1
    if world_size < processes:
        raise UserError(
            f"{processes} processes were asked for, and accelerate launch started {world_size}: "
            f"give --config_file accelerate_configs/cpu_ddp.yaml, or multi_gpu.yaml"
        )


def _accelerate_launch() -> tuple[argparse.Namespace, Any] | None:
    """The options that accelerate launch was given, and the configuration that it read; None without it."""
    try:
        parent = psutil.Process().parent()
        command = parent.cmdline() if parent else []
    except psutil.Error:  # of another user
        return None
    if not any(re.fullmatch(r"(.*/)?accelerate([-_]launch(\.py)?)?|accelerate\..*", w) for w in command[:3]):
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--cpu", action="store_true")
    for name in ("config_file", "mixed_precision", "gradient_accumulation_steps"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    asked, _ = parser.parse_known_args(command)
    file = asked.config_file
    if file is None and not asked.cpu and Path(default_config_file).is_file():
        file = default_config_file
    return asked, load_config_from_file(str(file)) if file else None


def nodes_used() -> int:
    """Machines that train together."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return world_size // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def choose_interface() -> None:
    """Have gloo use the network interface that reaches the first node, unless one is chosen.

    It would take the address of this node's name, which is 127.0.1.1 in many an /etc/hosts (pytorch #68726).
    """
    if nodes_used() <= 1 or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    own = [(at.address, name) for name, all_of in psutil.net_if_addrs().items() for at in all_of]
    names = {at: name for at, name in own if re.fullmatch(r"(?!127)[\d.]+", at)}  # IPv4, not the loopback's
    hosts = (os.environ.get("MASTER_ADDR", "localhost"), "192.0.2.1")  # the latter is anywhere
    if usable := [at for at in (*map(_address_towards, hosts), *names) if at in names]:
        os.environ["GLOO_SOCKET_IFNAME"] = names[usable[0]]


def _address_towards(host: str) -> str:
    """The address from which this node would send to `host`; nothing is sent."""
    with socket.socket(type=socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((host, 9))
        return str(probe.getsockname()[0])
    return ""


def _check_slurm(world_size: int) -> None:
    """Refuse to train apart on each node of a Slurm job, or in each task of a step."""
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_JOB_NUM_NODES") or 1)
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or nodes)
    if world_size < tasks or nodes_used() < nodes:
        raise UserError(
            f"Slurm started {tasks} tasks on {nodes} nodes, and here {world_size} would train alone: "
            f"submit slurm/gan.sbatch or slurm/lstm.sbatch, or start one with srun --nodes 1 --ntasks 1"
        )
