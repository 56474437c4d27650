"""One machine as several hosts: each with its own address, host name, processes and mounts.

A host is a process that holds namespaces (network, host name, processes, mounts). When it is killed, the kernel kills
everything that was started on it and takes its network away. A switch of the same making joins the hosts; the machine's
own network is not touched. Needs root and Debian's iproute2 and util-linux.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from conftest import REPOSITORY, environment

# The first process of a host adopts and reaps what loses its parent, as init does.
_INIT = ["bash", "-c", "sleep infinity & wait $!"]


def missing() -> str | None:
    """Why this machine cannot be several hosts, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in ("ip", "unshare", "nsenter", "setpriv") if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} missing: apt-get install iproute2 util-linux"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "true"],
        capture_output=True,
        text=True,
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Host:
    """Commands run on it see its host name, address, processes and mounts; the files are the machine's but for what is mounted."""

    def __init__(self, name: str, address: str | None = None):
        self.name, self.address = name, address
        self._holder = subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL",  # also where the tests are killed
             "unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *_INIT],
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 10
        while not self._children(self._holder.pid):
            assert time.monotonic() < deadline and self._holder.poll() is None, f"host {name} does not start"
            time.sleep(0.01)
        self.run("hostname", name)
        self.run("ip", "link", "set", "lo", "up")
        self.run("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")  # shared memory is of one host only

    @staticmethod
    def _children(pid: int) -> list[int]:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def _enter(self, command: tuple) -> list[str]:
        holder = self._holder.pid
        namespaces = [
            f"--{kind}=/proc/{holder}/ns/{name}" for kind, name in (("net", "net"), ("uts", "uts"), ("mount", "mnt"))
        ]
        return [
            "nsenter",
            *namespaces,
            f"--pid=/proc/{holder}/ns/pid_for_children",
            f"--wdns={REPOSITORY}",
            "--",
            *map(str, command),
        ]

    def start(self, *command: str | Path, output: Path | None = None, **more: str) -> Started:
        """A command that goes on; its output goes to a file. more: environment variables."""
        with open(output or os.devnull, "ab") as file:
            return Started(self._enter(command), file, environment(**more), output)

    def run(
        self, *command: str | Path, timeout: float = 60, check: bool = True, **more: str
    ) -> subprocess.CompletedProcess:
        """A command to its end, output captured."""
        ended = subprocess.run(
            self._enter(command), env=environment(**more), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )  # fmt: skip
        assert not check or ended.returncode == 0, f"{self.name}: {command}: {ended.stdout}{ended.stderr}"
        return ended

    def processes(self) -> dict[int, str]:
        """The command lines of what runs on it (not of its init), by process id as seen on the host."""
        listed = self.run("ps", "-e", "-o", "pid=,stat=,args=").stdout.splitlines()
        split = [line.split(None, 2) for line in listed]
        return {
            int(pid): line
            for pid, state, line in split
            if not state.startswith("Z") and not line.startswith(("ps -e", "sleep infinity", "bash -c sleep"))
        }

    def own(self, directory: Path, place: Path) -> None:
        """Mount a directory of its own over a place that other hosts see otherwise: no shared file system there."""
        directory.mkdir(parents=True, exist_ok=True)
        place.mkdir(parents=True, exist_ok=True)
        self.run("mount", "--bind", directory, place)

    def close(self) -> None:
        """The kernel kills all that runs on it."""
        self._holder.kill()
        self._holder.wait()


class Started:
    """A command that runs on a host."""

    def __init__(self, command: list[str], file, environment: dict, output: Path | None):
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )  # fmt: skip
        self._output = output

    def signal(self, number: int) -> None:
        """To the command itself; `nsenter`, its parent, would not pass it on."""
        for child in Host._children(self._process.pid):
            os.kill(child, number)

    def wait(self, timeout: float) -> int:
        """Its exit code."""
        return self._process.wait(timeout)

    def ended(self) -> bool:
        return self._process.poll() is not None

    def said(self) -> str:
        return self._output.read_text(errors="replace")


class Network:
    """Hosts joined by a switch: node1 is 10.77.0.1, node2 10.77.0.2, ...; all know each other's names."""

    def __init__(self, directory: Path, count: int = 2):
        self.switch = Host("switch")
        self.hosts: list[Host] = []
        self.switch.run("ip", "link", "add", "bridge", "type", "bridge")
        self.switch.run("ip", "link", "set", "bridge", "up")
        names = directory / "hosts"
        addresses = {f"node{number}": f"10.77.0.{number}" for number in range(1, count + 1)}
        names.write_text(
            "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
        )
        for name, address in addresses.items():
            host = Host(name, address)
            self.hosts.append(host)
            # A pair of interfaces: one end on the host, the other on the switch, named by their holders' process ids.
            self.switch.run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0")
            subprocess.run(
                ["nsenter", f"--net=/proc/{self.switch._holder.pid}/ns/net", "ip", "link", "set", "eth0", "netns", str(host._holder.pid)], check=True
            )  # fmt: skip
            self.switch.run("ip", "link", "set", name, "master", "bridge", "up")
            host.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
            host.run("mount", "--bind", names, "/etc/hosts")

    def cut(self, host: Host) -> None:
        """Pull the host's cable."""
        self.switch.run("ip", "link", "set", host.name, "down")

    def join(self, host: Host) -> None:
        self.switch.run("ip", "link", "set", host.name, "up")

    def close(self) -> None:
        for host in [*self.hosts, self.switch]:
            host.close()
