"""What the launcher or Slurm was asked for, and what came of it."""

import argparse
import os
import re
from pathlib import Path

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
    if processes > gpus:
        raise UserError(
            f"{processes} processes on a machine with {gpus} GPUs: give --num_processes {gpus}, or train on "
            f"its processors with --config_file accelerate_configs/cpu_ddp.yaml"
        )


def check_launcher(world_size: int, is_main_process: bool) -> None:
    """Name a default config that the user may have forgotten; refuse fewer processes than were asked for.

    `accelerate launch --cpu --num_processes 2` starts one process and says nothing (accelerate #2741).
    """
    _check_slurm(world_size)
    try:
        parent = psutil.Process().parent()
        command = parent.cmdline() if parent else []
    except psutil.Error:  # of another user
        return
    if not any(re.fullmatch(r"(.*/)?accelerate([-_]launch(\.py)?)?|accelerate\..*", w) for w in command[:3]):
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--config_file", "--config-file")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--gradient_accumulation_steps", "--gradient-accumulation-steps")
    asked, _ = parser.parse_known_args(command)
    _check_accumulation(asked.gradient_accumulation_steps)  # the environment has it with DeepSpeed only
    config_file = asked.config_file
    if config_file is None and not asked.cpu and Path(default_config_file).is_file():
        config_file = default_config_file
        if is_main_process:
            say(f"accelerate launch took its settings from {config_file}")
    config = load_config_from_file(str(config_file)) if config_file else None
    processes = asked.num_processes or (config.num_processes if config else 1) or 1
    if world_size < processes:
        raise UserError(
            f"{processes} processes were asked for, and accelerate launch started {world_size}: "
            f"give --config_file accelerate_configs/cpu_ddp.yaml, or multi_gpu.yaml"
        )


def _check_slurm(world_size: int) -> None:
    """Refuse to train apart on each node of a Slurm job, or in each task of a step."""
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_JOB_NUM_NODES") or 1)
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or nodes)
    nodes_used = world_size // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if world_size < tasks or nodes_used < nodes:
        raise UserError(
            f"Slurm started {tasks} tasks on {nodes} nodes, and here {world_size} would train alone: "
            f"submit slurm/gan.sbatch or slurm/lstm.sbatch, or start one with srun --nodes 1 --ntasks 1"
        )
