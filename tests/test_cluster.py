"""The launch scripts on two hosts, for real: ZeRO-2 over both, stopped, cut off, lost, and brought back to the same losses.

The hosts are namespaces of this machine, see cluster/hosts.py. What is compared is compared bit for bit where there are two ranks:
the sum of two numbers has no order, so gloo over a network and over one machine's loopback log the same.
"""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import hosts, ssh
from cluster.hosts import Host, Network
from conftest import environment
from faults.runs import logged, status
from test_launch import ODD_NAME, SAMPLE, SEEN, TINY, launch, read

STEPS = 40
RUN = [SAMPLE, *TINY, *SEEN, f"training.max_steps={STEPS}", "training.save_every=5", "model.dropout=0.0"]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    if reason := hosts.missing():
        pytest.skip(reason)
    network = Network(tmp_path_factory.mktemp("network"))
    yield network
    network.close()


@pytest.fixture(autouse=True)
def _nothing_is_left_for_the_next_test(network):
    yield
    for host in network.hosts:
        if left := left_on(host):
            host.run("kill", "-KILL", *map(str, left), check=False)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, network):
    """What a run on two ranks of one host logs."""
    run = tmp_path_factory.mktemp("reference") / "run"
    ended = launch("torchrun.sh", *RUN, f"training.output_dir={run}")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [line["step"] for line in logged(run)] == list(range(STEPS + 1))
    return logged(run)


class Launched:
    """A script started on some hosts, on a run of its own."""

    def __init__(self, script: str, run: Path, on: list[Host], *overrides: str, **more: str):
        self.run, self.hosts, self.started = run, on, []
        for number, host in enumerate(on):
            settings = {"INTERFACE": "eth0"} | more
            each = {name: value.replace("NUMBER", str(number)) for name, value in settings.items()}
            command = [f"launch/{script}", *RUN, f"training.output_dir={run}", *overrides]
            self.started.append(host.start(*command, output=run.parent / f"{host.name}.output", **each))

    def steps(self) -> int:
        """The last one that is logged."""
        return read(self.run / "metrics.jsonl").count("\n") - 1

    def said(self) -> str:
        return "\n".join(f"--- {host.name}\n{one.said()}" for host, one in zip(self.hosts, self.started, strict=True))

    def until(self, reached: Callable[[], object]) -> None:
        deadline = time.monotonic() + 300
        while not reached():
            assert not any(one.ended() for one in self.started), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def until_steps(self, more: int = 3) -> None:
        first = self.steps()
        self.until(lambda: self.steps() >= first + more)

    def ends(self) -> list[int]:
        """The exit code of each script; no process is left on any host."""
        codes = [one.wait(300) for one in self.started]
        assert not any(map(left_on, self.hosts)), self.said()
        return codes


def left_on(host: Host) -> dict[int, str]:
    """What runs there, but for sshd."""
    return {pid: line for pid, line in host.processes().items() if "sshd" not in line}


def torchrun(run: Path, on: list[Host], *overrides: str, **more: str) -> Launched:
    return Launched(
        "torchrun.sh", run, on, *overrides, **{"NNODES": "2", "NPROC": "1", "RDZV_ENDPOINT": "node1:29400"} | more
    )


def test_torchrun_on_two_hosts_stops_on_a_signal_to_one_and_goes_on(tmp_path, network, reference):
    run = tmp_path / ODD_NAME
    stopped = torchrun(run, network.hosts)
    stopped.until_steps()
    stopped.started[1].signal(signal.SIGUSR1)
    assert stopped.ends() == [75, 75], stopped.said()
    assert status(run)["state"] == "stopped"

    goes_on = torchrun(run, network.hosts)
    assert goes_on.ends() == [0, 0], goes_on.said()
    assert logged(run) == reference


@pytest.mark.cluster
def test_a_host_that_is_cut_off_ends_the_run_which_goes_on_when_it_is_back(tmp_path, network, reference):
    run, (_, second) = tmp_path / "run", network.hosts
    # The ranks end after hang_seconds. torchrun waits for its store until the kernel gives the connection up, after a quarter of
    # an hour; here after a minute.
    second.run("sysctl", "-q", "-w", "net.ipv4.tcp_retries2=7")
    cut = torchrun(run, network.hosts, "training.hang_seconds=15")
    cut.until_steps(8)
    network.cut(second)
    try:
        codes = cut.ends()
    finally:
        network.join(second)
    assert not {0, 75} & set(codes), cut.said()
    assert "no progress for 15 s" in cut.said()

    goes_on = torchrun(run, network.hosts)
    assert goes_on.ends() == [0, 0], goes_on.said()
    assert logged(run) == reference


@pytest.fixture(scope="module")
def ssh_between(network, tmp_path_factory):
    if reason := ssh.missing():
        pytest.skip(reason)
    servers = ssh.start(network, tmp_path_factory.mktemp("ssh") / "keys")
    yield
    for server in servers:
        server.signal(signal.SIGTERM)
        server.wait(30)


@pytest.mark.cluster
def test_one_script_starts_both_hosts_over_ssh_under_either_launcher(tmp_path, network, ssh_between, reference):
    hostfile = tmp_path / "the hosts"
    hostfile.write_text("# of this test\nnode1 slots=1\nnode2 slots=1\n")
    run, first = tmp_path / ODD_NAME, network.hosts[:1]

    # Killed, it can tell nobody: the hosts notice.
    killed = Launched("torchrun.sh", run, first, HOSTFILE=str(hostfile))
    killed.until_steps()
    killed.started[0].signal(signal.SIGKILL)
    killed.started[0].wait(30)
    deadline = time.monotonic() + 300
    while any(map(left_on, network.hosts)):
        assert time.monotonic() < deadline, killed.said()
        time.sleep(0.5)
    assert status(run)["state"] == "stopped"

    stopped = Launched("deepspeed.sh", run, first, HOSTFILE=str(hostfile))
    stopped.until_steps()
    stopped.started[0].signal(signal.SIGTERM)
    assert stopped.ends() == [75], stopped.said()
    assert not any(map(left_on, network.hosts))
    assert status(run)["state"] == "stopped"

    goes_on = Launched("deepspeed.sh", run, first, HOSTFILE=str(hostfile))
    assert goes_on.ends() == [0], goes_on.said()
    assert logged(run) == reference


@pytest.mark.cluster
def test_deepspeed_called_without_the_script_over_pdsh(tmp_path, network, ssh_between, reference):
    if shutil.which("pdsh") is None:
        pytest.skip("pdsh missing: apt-get install pdsh")
    run, hostfile, forwarded = tmp_path / "run", tmp_path / "hosts", tmp_path / "environment"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    names = ("PATH", "PDL_CACHE", "DS_ACCELERATOR", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
    forwarded.write_text("".join(f"{name}={environment()[name]}\n" for name in names))
    launcher = ["deepspeed", "--hostfile", hostfile, "--master_addr", "node1", "--module"]
    ended = network.hosts[0].run(
        *launcher, "pdl", "train", *RUN, f"training.output_dir={run}", timeout=300, check=False, DS_ENV_FILE=str(forwarded)
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert logged(run) == reference


@pytest.mark.cluster
def test_what_one_host_refuses_ends_the_launch_on_all(tmp_path, network, ssh_between):
    hostfile, config = tmp_path / "hosts", tmp_path / "config" / "sample.yaml"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    shown, hidden = config.parent, tmp_path / "empty"
    shown.mkdir()
    config.write_text(Path(SAMPLE).read_text())
    network.hosts[1].own(hidden, shown)  # the file is on the first host only
    script = ["launch/torchrun.sh", config, *RUN[1:], f"training.output_dir={tmp_path / 'run'}"]
    ended = network.hosts[0].run(*script, check=False, timeout=300, HOSTFILE=str(hostfile))
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "sample.yaml does not exist" in ended.stderr
    assert not any(map(left_on, network.hosts))


@pytest.mark.cluster
def test_a_host_with_other_data_is_named_and_both_scripts_end_with_2(tmp_path, network):
    """Each host alone would train; it is the pre-flight that finds it, before there is a run."""
    data = tmp_path / "data"
    lines = Path("recipes/summarization/sample/train.jsonl").read_text().splitlines(keepends=True)
    for number, host in enumerate(network.hosts):
        host.own(tmp_path / host.name, data)
        (tmp_path / host.name / "train.jsonl").write_text("".join(lines[number:]))
    other = torchrun(tmp_path / "run", network.hosts, f"data.train={data}/train.jsonl", MAX_RESTARTS="1")
    assert other.ends() == [2, 2], other.said()
    assert "data.train: node1 (rank 0) has" in other.said() and "node2 (rank 1) has" in other.said()
    assert not (tmp_path / "run").exists()


@pytest.mark.cluster
def test_deepspeed_without_ssh_and_without_a_shared_file_system(tmp_path, network, reference):
    shared, hostfile = tmp_path / "shared", tmp_path / "hosts"
    run = shared / "run"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    for host in network.hosts:
        host.own(tmp_path / f"of-{host.name}", shared)
    here = tmp_path / "of-node1" / "run"

    def deepspeed() -> Launched:
        settings = {"HOSTFILE": str(hostfile), "NODE_RANK": "NUMBER", "PDL_CACHE": str(shared / "cache")}
        launched = Launched("deepspeed.sh", run, network.hosts, **settings)
        launched.run = here
        return launched

    stopped = deepspeed()
    stopped.until_steps()
    stopped.started[0].signal(signal.SIGINT)
    assert stopped.ends() == [75, 75], stopped.said()
    assert not run.exists()  # what the hosts wrote is on them
    assert (tmp_path / "of-node2" / "cache").is_dir() and not (tmp_path / "of-node2" / "run" / "metrics.jsonl").exists()

    goes_on = deepspeed()
    assert goes_on.ends() == [0, 0], goes_on.said()
    assert logged(here) == reference


@pytest.mark.cluster
def test_a_node_is_lost_and_comes_back_while_the_other_goes_on(tmp_path, network, reference):
    run, (first, second) = tmp_path / "run", network.hosts
    elastic = {
        "NNODES": "1:2", "MAX_RESTARTS": "3", "LOGLEVEL": "INFO",  # so that torchrun says who joins
        "PET_RDZV_CONF": "last_call_timeout=15,keep_alive_interval=2",  # seconds that torchrun waits for more nodes, and for dead ones
    }  # fmt: skip
    stays, lost = torchrun(run, [first], **elastic), torchrun(run, [second], **elastic)
    stays.until_steps(8)
    assert "2 x 4 examples x 2 micro-batches = 16 per step" in stays.said()
    second.run("kill", "-KILL", *map(str, left_on(second)))

    stays.until(lambda: "1 x 4 examples x 4 micro-batches = 16 per step" in stays.said())
    stays.until_steps()
    (rank,) = [pid for pid, line in left_on(first).items() if "-u -m pdl train" in line]
    first.run("kill", "-STOP", str(rank))  # else it would be done before the other one is there
    lost.started[0].wait(30)
    back = torchrun(run, [second], **elastic)
    back.until(lambda: "Detected 1 new nodes" in stays.said())
    first.run("kill", "-CONT", str(rank))
    assert (stays.ends(), back.ends()) == ([0], [0]), stays.said() + back.said()
    assert stays.said().count("2 x 4 examples x 2 micro-batches = 16 per step") == 2
    batches = ["step", "train/supervised_fraction", "train/token_share/head", "train/token_share/tail"]
    assert [[line.get(name) for name in batches] for line in logged(run)] == [
        [line.get(name) for name in batches] for line in reference
    ]
    # Sums over one rank and over two are rounded differently, which Adam lets grow: after step 30 to 1e-5 and more.
    losses, expected = ([line["train/loss"] for line in lines[1:]] for lines in (logged(run), reference))
    assert losses[:20] == pytest.approx(expected[:20], rel=1e-6)
    assert losses == pytest.approx(expected, rel=1e-3)
