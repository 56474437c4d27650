"""Real sshd on the hosts of `hosts.py`, with keys made for the test. Nothing of the machine's own ssh is read or touched."""

import shutil
import subprocess
import time
from pathlib import Path

from cluster.hosts import Host, Network, Started


def missing() -> str | None:
    """Why there can be no ssh between hosts, or None."""
    absent = [tool for tool in ("ssh", "ssh-keygen", "/usr/sbin/sshd") if shutil.which(tool) is None]
    return f"{', '.join(absent)} missing: apt-get install openssh-server" if absent else None


def start(network: Network, directory: Path) -> list[Started]:
    """Every host lets in whoever is on another one, without a password."""
    directory.mkdir()
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / key], check=True)
    client, server = directory / "ssh_config", directory / "sshd_config"
    client.write_text(
        f"IdentityFile {directory}/user\nIdentitiesOnly yes\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    )
    server.write_text(
        f"HostKey {directory}/host\nAuthorizedKeysFile {directory}/user.pub\nStrictModes no\nUsePAM no\nPidFile none\n"
    )
    return [_start_on(host, client, server) for host in network.hosts]


def _start_on(host: Host, client: Path, server: Path) -> Started:
    # ~/.ssh is found by the user's entry in /etc/passwd, whatever HOME says; the settings of all users hold before its keys.
    host.run("mount", "--bind", client, "/etc/ssh/ssh_config")
    host.run("mount", "-t", "tmpfs", "tmpfs", "/run")
    host.run("mkdir", "/run/sshd")  # where sshd locks itself into
    started = host.start("/usr/sbin/sshd", "-D", "-e", "-f", server, output=server.with_name(f"{host.name}.log"))
    deadline = time.monotonic() + 30
    while host.run("ssh", host.name, "true", check=False).returncode:
        assert not started.ended() and time.monotonic() < deadline, started.said()
        time.sleep(0.1)
    return started
