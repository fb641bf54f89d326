"""A throw-away Slurm on one machine, with nodes that can be powered off and cut from the network.

Every node is a set of Linux namespaces: a network, a hostname, processes and /dev/shm of its own. So is the
head, where the controller runs and the switch stands. Nothing outside of them is changed; it takes root.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "ip", "unshare", "nsenter", "setpriv")
PACKAGES = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge iproute2 util-linux"
SUBNET = "198.18.0"  # set aside for benchmarks (RFC 2544); seen inside of the namespaces only

# The first process of a machine reaps orphans; when it dies, all its processes do.
BOOT = """
set -e
hostname "$NAME"
mount --bind "$DIR/hosts" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
touch "$DIR/run/$NAME.booted"
"""
HEAD = """
ip link add name br0 type bridge
ip addr add $SUBNET.254/24 dev br0
ip link set br0 up
munged --force --socket="$DIR/munge.socket" --key-file="$DIR/munge.key" --pid-file="$DIR/run/munge.pid" \\
    --seed-file="$DIR/munge.seed" --log-file="$DIR/log/munged.log"
slurmctld
"""
NODE = """
until ip link show up dev eth0 2>/dev/null | grep -q eth0; do sleep 0.05; done
slurmd -N "$NAME"
"""
IDLE = """
touch "$DIR/run/$NAME.ready"
set +e
while :; do sleep 3600 & wait; done
"""

CONFIG = """
ClusterName=throwaway
SlurmctldHost=head
AuthType=auth/munge
# How long a requeued job waits before it starts again (default 120 s, at least 5).
AuthInfo=socket={dir}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/run/slurmctld.pid
SlurmdPidFile={dir}/run/slurmd-%n.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
PropagateResourceLimits=NONE
# A node may claim more CPUs and GPUs than the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
KillWait=5
# A busy machine answers late. If a node is wrongly declared dead, Slurm may start the job on it again while
# it still runs there. That start fails; Slurm then holds the job and drains the node.
SlurmdTimeout=30
SlurmctldTimeout=10
TCPTimeout=2
# Not shorter: an RPC that fails is tried again after 60 s.
MessageTimeout=15
UnkillableStepTimeout=120
# A job in "urgent" evicts and requeues jobs in "main": TERM to the steps, and the end GraceTime later.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n[1-{nodes}] NodeAddr={subnet}.[1-{nodes}] CPUs=8 RealMemory=1000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def find(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def version() -> str:
    """Slurm's."""
    return subprocess.check_output([str(find("slurmctld")), "-V"], text=True).split()[-1]


def missing() -> str:
    """What keeps a cluster from being started here; empty if nothing does."""
    if absent := [program for program in PROGRAMS if find(program) is None]:
        return f"{', '.join(absent)} not found: {PACKAGES}"
    probe = "ip link add name br0 type bridge && mount -t tmpfs tmpfs /dev/shm && hostname probe"
    if subprocess.run([*UNSHARE, "sh", "-c", probe], capture_output=True, check=False).returncode:
        return "namespaces cannot be made: this takes root with CAP_SYS_ADMIN and CAP_NET_ADMIN"
    return ""


UNSHARE = [
    *("unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork"),
    *("--kill-child=KILL", "--mount-proc", "--"),
]


def wait_until(what: str, ready: Callable[[], object], seconds: float = 30) -> None:
    """Wait until `ready` is true."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


class Cluster:
    """Nodes n1, n2, …, with eight CPUs and two make-believe GPUs each."""

    def __init__(self, folder: Path, nodes: int) -> None:
        assert len(str(folder)) < 60, "paths of sockets must fit in 107 bytes"
        self.folder, self.nodes = folder, [f"n{i}" for i in range(1, nodes + 1)]
        self.machines: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Bring up the head and all nodes."""
        for name in ("run", "log", "state", "gpus", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        hosts = {f"{SUBNET}.254": "head", **{f"{SUBNET}.{node[1:]}": node for node in self.nodes}}
        lines = ["127.0.0.1 localhost", "::1 localhost", *(f"{ip} {name}" for ip, name in hosts.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(dir=self.folder, nodes=len(self.nodes), subnet=SUBNET)
        )
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        for i in range(2):  # Slurm ignores a GPU without a device
            (self.folder / "gpus" / f"gpu{i}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/gpus/gpu[0-1]\n")
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        self._boot("head", HEAD)
        for node in self.nodes:
            self.power_on(node)
        self.wait_for_nodes()

    def stop(self) -> None:
        """End everything."""
        for machine in reversed(self.machines.values()):
            machine.kill()
            machine.wait()

    def power_on(self, node: str) -> None:
        """Boot a node and plug it in."""
        boot = self._boot(node, NODE, wait="booted")
        number = int(node[1:])
        # Always the same hardware address, or others would look for the node's old one for a while.
        plug = f"""
            ip link delete port{number} 2>/dev/null || true
            ip link add name port{number} type veth \\
                peer name eth0 address 02:00:00:00:00:{number:02x} netns /proc/{boot.pid}/ns/net
            ip link set port{number} master br0 up"""
        self._in("head", "sh", "-ec", plug, pid_namespace=False)
        self._in(node, "sh", "-ec", f"ip addr add {SUBNET}.{number}/24 dev eth0; ip link set eth0 up")
        wait_until(f"{node} is ready", (self.folder / "run" / f"{node}.ready").exists)

    def power_off(self, node: str) -> None:
        """End all of a node's processes, of which nobody gets word."""
        self.cut(node)  # first: a machine without power sends no FIN
        self.machines[node].kill()
        self.machines.pop(node).wait()

    def cut(self, node: str) -> None:
        """Pull the network cable."""
        self._in(node, "ip", "link", "set", "eth0", "down")

    def heal(self, node: str) -> None:
        """Put it back."""
        self._in(node, "ip", "link", "set", "eth0", "up")

    def restore(self) -> None:
        """Power all nodes on, resume those that are drained, and wait until Slurm would use them."""
        for node in self.nodes:
            if node not in self.machines:
                self.power_on(node)
            self.heal(node)
            if "drain" in self.call("sinfo", "-hN", "-n", node, "-o", "%T"):
                self.call("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.wait_for_nodes()

    def wait_for_nodes(self) -> None:
        """Wait until no node is down."""
        states = ("sinfo", "-hN", "-p", "main", "-o", "%T")
        usable = {"idle", "mixed", "allocated", "completing"}
        wait_until("all nodes are up", lambda: set(self.call(*states).split()) <= usable, 120)

    def call(self, *command: str, cwd: Path = Path("/"), env: dict[str, str] | None = None) -> str:
        """Run a client of Slurm on the head; returns what it prints."""
        return self._in("head", "env", f"--chdir={cwd}", *command, env=env)

    @property
    def controller_log(self) -> str:
        """What the controller has written."""
        return (self.folder / "log" / "slurmctld.log").read_text()

    def processes(self, node: str, pattern: str) -> list[str]:
        """The ids, on that node, of the processes whose command line matches."""
        return self._in(node, "pgrep", "-f", "--", pattern, check=False).split()

    def kill(self, node: str, pattern: str) -> None:
        """SIGKILL to the processes on a node whose command line matches."""
        self._in(node, "kill", "-KILL", *self.processes(node, pattern))

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "DIR": str(self.folder),
            "SUBNET": SUBNET,
        }

    def _boot(self, name: str, script: str, wait: str = "ready") -> "subprocess.Popen[bytes]":
        for mark in ("booted", "ready"):
            (self.folder / "run" / f"{name}.{mark}").unlink(missing_ok=True)
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            machine = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *UNSHARE, "bash", "-c", BOOT + script + IDLE],
                env={**self._environment(), "NAME": name},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.machines[name] = machine
        wait_until(f"{name} is {wait}", (self.folder / "run" / f"{name}.{wait}").exists)
        return machine

    def _in(
        self,
        name: str,
        *command: str,
        env: dict[str, str] | None = None,
        pid_namespace: bool = True,
        check: bool = True,
    ) -> str:
        pid = self.machines[name].pid
        namespaces = [f"--{kind}=/proc/{pid}/ns/{kind}" for kind in ("net", "uts", "ipc")]
        if pid_namespace:
            namespaces += [f"--mount=/proc/{pid}/ns/mnt", f"--pid=/proc/{pid}/ns/pid_for_children"]
        done = subprocess.run(
            ["nsenter", *namespaces, "--", *command],
            env={**(env or {}), **self._environment()},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{name}: {' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout
