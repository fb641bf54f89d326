"""The paths that different numbers of processes take from one seed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from launched import free_port, newest_checkpoint
from paths import Weights, command, weights_in

Follow = Callable[..., Weights]


@pytest.fixture(scope="session")
def follow(launch, tmp_path_factory) -> Follow:
    """The weights of a task trained in float64 on `processes` processes; each asked for once."""
    known: dict[str, Weights] = {}

    def run(case: str, config: dict, processes: int = 1, fault: str = "") -> Weights:
        key = f"{case} {config} {processes} {fault}"
        if key not in known:
            folder = tmp_path_factory.mktemp("follow") / "run"
            several = {"processes": processes} if processes > 1 else {}
            launch(*command(case, config, folder), environment={"FAULT": fault}, **several)
            known[key] = weights_in(newest_checkpoint(folder))
        return known[key]

    return run


@pytest.fixture
def launch_on_two_nodes(launch) -> Callable[..., list[str]]:
    """Run a script on two nodes of two processes each; returns what each node says on stderr."""

    def run(*command: object) -> list[str]:
        options = (
            *("--config_file", "accelerate_configs/multi_node.yaml", "--mixed_precision", "no"),
            *("--num_machines", "2", "--num_processes", "4"),
            *("--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()), "--machine_rank"),
        )

        def node(rank: str) -> str:
            return launch(*command, launcher="accelerate", options=(*options, rank)).stderr

        with ThreadPoolExecutor(2) as nodes:
            return list(nodes.map(node, ("0", "1")))

    return run
