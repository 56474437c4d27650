"""A real Slurm cluster on the hosts of a network: the controller on the first, a daemon and munge on each.

Everything it writes is in one directory. It ends with its hosts. Needs Debian's slurm-wlm and munge.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from cluster.hosts import Network

# Processes are followed by their parents: no cgroups needed. A requeued job waits for its old credential to expire.
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/linear
SchedulerType=sched/builtin
ReturnToService=2
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """What keeps Slurm from running here, or None."""
    absent = [tool for tool in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(tool) is None]
    return f"{', '.join(absent)} missing: apt-get install slurm-wlm munge" if absent else None


class Slurm:
    def __init__(self, network: Network, directory: Path):
        self.network, self.directory = network, directory
        self.controller = network.hosts[0]
        for name in ("munge", "state", *(f"spool-{host.name}" for host in network.hosts)):
            (directory / name).mkdir()
        nodes = [f"NodeName={host.name} NodeAddr={host.address} CPUs=2 State=UNKNOWN" for host in network.hosts]
        self._configuration = directory / "slurm.conf"
        self._configuration.write_text(
            _CONFIGURATION.format(controller=self.controller.name, directory=directory, nodes="\n".join(nodes))
        )
        (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for host in network.hosts:
            # A service of each host's own behind the one path that the configuration names.
            host.own(directory / f"munge-{host.name}", directory / "munge")
            files = {"key": key, "pid": "munge/pid", "log": "munge/log", "seed": "munge/seed"}
            host.start(
                "munged", "--foreground", "--force", f"--socket={directory}/munge/socket",
                *(f"--{kind}-file={directory / name}" for kind, name in files.items()),
                output=directory / f"munged-{host.name}.log",
            )  # fmt: skip
            _until(lambda host=host: (directory / f"munge-{host.name}" / "socket").exists(), "munged does not start")
        self.controller.start("slurmctld", "-D", "-f", self._configuration, output=directory / "slurmctld.out")
        for host in network.hosts:
            output = directory / f"slurmd-{host.name}.out"
            host.start("slurmd", "-D", "-N", host.name, "-f", self._configuration, output=output)
        _until(lambda: self._idle() == len(network.hosts), f"the nodes do not come up; see {directory}/*.log")

    def _idle(self) -> int:
        return self.command(
            "sinfo", "--noheader", "--Node", "--partition=main", "--states=idle", check=False
        ).stdout.count("\n")

    def command(self, *command: str | Path, check: bool = True, **more: str) -> subprocess.CompletedProcess:
        """A command of Slurm, on the first host. more: environment variables."""
        return self.controller.run(*command, check=check, SLURM_CONF=str(self._configuration), **more)

    def submit(self, *arguments: str | Path, **more: str) -> Job:
        output = self.directory / "job-%j.out"
        said = self.command("sbatch", "--parsable", f"--output={output}", *arguments, **more).stdout
        return Job(self, int(said))


class Job:
    def __init__(self, slurm: Slurm, number: int):
        self._slurm, self.number = slurm, number

    def field(self, name: str) -> str:
        """Of `scontrol show job`."""
        shown = self._slurm.command("scontrol", "show", "job", str(self.number)).stdout
        return re.search(rf"\b{name}=(\S*)", shown)[1]

    def state(self) -> str:
        return self.field("JobState")

    def restarts(self) -> int:
        return int(self.field("Restarts"))

    def said(self) -> str:
        path = self._slurm.directory / f"job-{self.number}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def until(self, reached: Callable[[], object]) -> None:
        _until(lambda: reached() or self._lost(), self.said, seconds=600)

    def _lost(self) -> bool:
        assert not self._ended(), f"{self.state()}: {self.said()}"
        return False

    def _ended(self) -> bool:
        return self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

    def ends(self) -> tuple[str, str]:
        """Its state, and exit code:signal; none of its processes is left on any host."""
        _until(self._ended, self.said, seconds=600)
        for host in self._slurm.network.hosts:
            left = {pid: line for pid, line in host.processes().items() if "pdl" in line or "torchrun" in line}
            assert left == {}, (host.name, left, self.said())
        return self.state(), self.field("ExitCode")


def _until(reached: Callable[[], object], what: str | Callable[[], str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.2)
