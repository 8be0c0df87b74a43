"""Machines for tests: a SLURM of two "nodes" on this one, and two "hosts" in network namespaces.

Both need root and programs that are not Python's; where they are missing the tests are skipped, and say why.
`make slurm` installs them on Debian.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

SLURM_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={port1}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
MinJobAge=300
KillWait=30
JobRequeue=1
OverTimeLimit=0
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{port1}-{port2}] CPUs=2 Sockets=1 CoresPerSocket=2 \
ThreadsPerCore=1 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 GraceTime=60
PartitionName=short Nodes=n1 MaxTime=00:10:00 State=UP OverSubscribe=NO PriorityTier=1
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=10 PreemptMode=off
"""


def why_no_slurm() -> str:
    """Why a SLURM cannot be started here; "" where it can."""
    missing = [program for program in SLURM_PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (`make slurm` installs Debian's packages)"
    return "" if os.geteuid() == 0 else "a SLURM of several users' nodes needs root"


class Slurm:
    """Two nodes of two cores and two GPUs (character devices that are none) on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.conf = folder, folder / "slurm.conf"
        self.environment = os.environ | {"SLURM_CONF": str(self.conf), "PATH": PATH}
        for name in list(self.environment):
            if name.startswith("SLURM_") and name != "SLURM_CONF":
                del self.environment[name]

    def start(self) -> None:
        folder = self.folder
        for name in ("state", "log", "spool/n1", "spool/n2"):
            (folder / name).mkdir(parents=True)
        port = _free_ports(3)
        values = {"host": socket.gethostname(), "folder": folder, "port": port, "port1": port + 1, "port2": port + 2}
        self.conf.write_text(CONF.format(**values))
        (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-1]\n")
        for number in range(2):
            os.mknod(folder / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        folder.chmod(0o755)
        names = ("socket", "pid-file", "log-file", "seed-file")
        files = ("munge.sock", "munge.pid", "log/munge.log", "munge.seed")
        self._run(
            "munged",
            "--force",
            f"--key-file={key}",
            *(f"--{n}={folder / f}" for n, f in zip(names, files, strict=True)),
        )
        self._run("slurmctld", "-f", str(self.conf), "-c")
        for node in ("n1", "n2"):
            self.start_node(node)
        wait_for(lambda: set(self.ask("sinfo", "-h", "-N", "-o", "%t").split()) == {"idle"}, 30, "idle nodes")

    def start_node(self, node: str) -> None:
        self._run("slurmd", "-N", node, "-f", str(self.conf))

    def kill_node(self, node: str) -> None:
        """Everything of a node at once, as if its power had gone: the daemon, its step managers, their tasks."""
        daemon = int((self.folder / f"slurmd.{node}.pid").read_text())
        spool = str(self.folder / "spool" / node)
        managers = [c.pid for c in psutil.net_connections("unix") if str(c.laddr).startswith(spool) and c.pid]
        victims = {victim for pid in (daemon, *managers) for victim in (pid, *descendants(pid))}
        for pid in sorted(victims):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def ask(self, *command: str) -> str:
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"
        return result.stdout

    def state(self, job: str) -> str:
        lines = self.ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").split()
        return lines[0] if lines else "GONE"

    def wait(self, job: str, timeout: float) -> str:
        """Until the job is over; its last state. Told by polling: `sbatch --wait` looks ever more rarely."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "GONE")
        wait_for(lambda: self.state(job) in ended, timeout, f"the end of job {job}")
        return self.state(job)

    def stop(self) -> None:
        with contextlib.suppress(AssertionError):
            self.ask("scancel", "--full", "--user=root")
            time.sleep(1)
        pids = [int(file.read_text()) for file in self.folder.glob("*.pid") if file.read_text().strip()]
        for pid in pids:
            for victim in (*descendants(pid), pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGTERM)
        time.sleep(1)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _run(self, *command: str) -> None:
        subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=60)


def wait_for(condition: Callable[[], bool], timeout: float, what: str) -> None:
    """Poll until `condition()`.

    Raises:
        AssertionError: it did not come within `timeout` seconds.
    """
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"no {what} within {timeout} s"
        time.sleep(0.2)


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, whatever their session."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring free ports, outside the range from which the kernel gives them away."""
    for first in range(17000 + os.getpid() % 1000 * 4, 30000, 10):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")


def why_no_hosts() -> str:
    """Why there cannot be two hosts in network namespaces here; "" where there can."""
    if shutil.which("ip", path=PATH) is None:
        return "not installed: ip (`make slurm` installs Debian's iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = subprocess.run(["ip", "netns", "add", f"probe{os.getpid()}"], env=os.environ | {"PATH": PATH}, check=False)
    if probe.returncode == 0:
        subprocess.run(["ip", "netns", "del", f"probe{os.getpid()}"], env=os.environ | {"PATH": PATH}, check=True)
    return "" if probe.returncode == 0 else "network namespaces are not permitted here"


class Hosts:
    """Two hosts with a cable between them: namespaces `a` and `b` with 10.77.0.1 and 10.77.0.2."""

    def __init__(self) -> None:
        self.names = {host: f"poly{os.getpid()}{host}" for host in ("a", "b")}
        self.addresses = {"a": "10.77.0.1", "b": "10.77.0.2"}
        self.cables = {host: f"v{os.getpid() % 100000}{host}" for host in ("a", "b")}

    def start(self) -> None:
        for host in self.names.values():
            self._ip("netns", "add", host)
        self._ip("link", "add", self.cables["a"], "type", "veth", "peer", "name", self.cables["b"])
        for host, name in self.names.items():
            self._ip("link", "set", self.cables[host], "netns", name)
            self._ip("-n", name, "addr", "add", f"{self.addresses[host]}/24", "dev", self.cables[host])
            self._ip("-n", name, "link", "set", self.cables[host], "up")
            self._ip("-n", name, "link", "set", "lo", "up")

    def run(self, host: str, command: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command on a host, its network alone different."""
        values = os.environ | {"PATH": PATH, "GLOO_SOCKET_IFNAME": self.cables[host]} | environment
        with open(log, "ab") as out:
            full = ["ip", "netns", "exec", self.names[host], *command]
            return subprocess.Popen(full, env=values, stdout=out, stderr=out, start_new_session=True)

    def kill(self, host: str) -> None:
        """The power of a host goes: all of its processes at once."""
        for pid in self._ip("netns", "pids", self.names[host]).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def stop(self) -> None:
        for host, name in self.names.items():
            with contextlib.suppress(subprocess.CalledProcessError):
                self.kill(host)
                self._ip("netns", "del", name)

    def _ip(self, *arguments: str) -> str:
        environment = os.environ | {"PATH": PATH}
        return subprocess.run(["ip", *arguments], env=environment, check=True, capture_output=True, text=True).stdout
