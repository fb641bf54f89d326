"""Two nodes, each a network namespace; /etc/hosts has 127.0.1.1 for the node's own name, as on Ubuntu.

Gloo takes the address of the host's name if it can bind to it, and tells the other nodes that one (torch,
c10d/ProcessGroupGloo.cpp, createDefaultDevice; pytorch #68726).
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launched import REPOSITORY, status

NODES = ("first", "second")
SHELL = "hostname {node} && mount --bind {hosts} /etc/hosts && ip link set lo up && exec {command}"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def namespaces() -> Iterator[dict[str, str]]:
    names = {node: f"{node}-{os.getpid()}" for node in NODES}
    ends = [f"cable{number}-{os.getpid()}"[-15:] for number in range(2)]
    try:
        for name in names.values():
            ip("netns", "add", name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (end, name) in enumerate(zip(ends, names.values(), strict=True), 1):
            ip("link", "set", end, "netns", name, "name", "cable")
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces can be made here: {error}")
    else:
        yield names
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.slow
def test_nodes_whose_own_name_is_on_the_loopback_meet(namespaces, launch_environment, tmp_path):
    def run_on(rank: int, node: str) -> "subprocess.CompletedProcess[str]":
        other = NODES[1 - rank]
        hosts = tmp_path / node
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {node}\n10.77.0.{2 - rank} {other}\n")
        launcher = f"{sys.executable} -m torch.distributed.run --nnodes 2 --node-rank {rank}"
        launcher += f" --master-addr {NODES[0]} --master-port 29500"
        command = f"{launcher} launch/lstm.py --length 10 --steps 2 --peer-timeout 20 --wandb disabled"
        shell = SHELL.format(node=node, hosts=hosts, command=f"{command} --run-dir {tmp_path / 'run'}")
        return subprocess.run(
            ["ip", "netns", "exec", namespaces[node], "unshare", "--mount", "--uts", "sh", "-c", shell],
            cwd=REPOSITORY, env=launch_environment, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip

    with ThreadPoolExecutor(2) as nodes:
        ended = list(nodes.map(run_on, (0, 1), NODES))
    assert [one.returncode for one in ended] == [0, 0], ended[0].stderr[-3000:]
    assert "processes: 2" in ended[0].stderr
    assert status(Path(tmp_path / "run"))["state"] == "finished"
