"""Pre-flight on real ranks: what is the same everywhere is said once, and what is not ends all of them with the host's name."""

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cluster.hosts import Network, missing
from conftest import REPOSITORY, environment
from distributed import hosts_apart
from distributed.forked import Group, Rank

SAMPLE = "configs/summarization/sample.yaml"
RECORD = '{"document": "A long text about cheese.", "summary": "Cheese."}\n'
DATA = ["data.train=data/train.jsonl", "training.output_dir=out/run", "training.global_batch_size=12", "training.micro_batch_size=4"]  # fmt: skip


class Flight:
    """Ranks that look at each other, each a host of its own unless `together`: node1 is rank 0, and so on.

    beings: what each is, see distributed/hosts_apart.py; `arguments` and `folder` are its own. codes, said: of all ranks.
    """

    def __init__(self, *beings: dict, arguments: list[str] = (), together: bool = False):
        ranks = []
        for number, being in enumerate(beings, 1):
            being = {"name": f"node{1 if together else number}"} | being
            told = ["preflight", SAMPLE, *map(str, arguments), *being.pop("arguments", [])]
            place = {} if together else {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            folder = being.pop("folder", REPOSITORY)
            ranks.append(Rank([being, told], folder=folder, environment=place))
        group = Group(ranks, hosts_apart.run)
        self.codes, self.said = group.wait(), group.said

    def problems(self) -> list[str]:
        """Every rank has ended with 2; rank 0 has said why, once, and no rank anything else."""
        assert set(self.codes) == {2}, self.said
        assert not any(self.said[1:]) and "Traceback" not in self.said[0]
        _, _, told = self.said[0].partition("pdl: pre-flight found what would end the run or spoil it\n  - ")
        assert told, self.said[0]
        return told.strip().split("\n  - ")


@pytest.fixture
def folders(tmp_path):
    """What three hosts have under the same name: configurations, and data of their own, which are the same."""
    places = [tmp_path / f"host{number}" for number in (1, 2, 3)]
    for place in places:
        (place / "data").mkdir(parents=True)
        (place / "data/train.jsonl").write_text(RECORD * 20)
        (place / "recipes").symlink_to(REPOSITORY / "recipes")
        shutil.copytree(REPOSITORY / "configs", place / "configs")
    return places


def test_hosts_that_agree(tmp_path):
    flight = Flight({}, {}, arguments=[f"training.output_dir={tmp_path / 'a/run'}"])
    assert flight.codes == [0, 0] and flight.said[1] == ""
    title, header, *rows, versions, last = flight.said[0].splitlines()
    assert title == "pre-flight: 2 ranks, 2 hosts"
    assert header.split("  ")[1] == "host" and "disk free" in header
    for number, row in enumerate(rows):
        assert re.fullmatch(rf"  node{number + 1}  +{number}  .+ GiB .+ GiB  +shared by all  +[+-]\S+ ms ± \S+", row)
    assert re.fullmatch(r"  python \S+, torch \S+, deepspeed \S+, transformers \S+, datasets \S+, pdl [0-9a-f]{12}", versions)  # fmt: skip
    assert re.fullmatch(r"  all-reduce of \d+ MiB: algorithm bandwidth \S+ GB/s, bus bandwidth \S+ GB/s; pre-flight took \S+ s", last)  # fmt: skip
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_ranks_of_a_host_are_one_row(tmp_path):
    flight = Flight({}, {}, arguments=[f"training.output_dir={tmp_path / 'run'}"], together=True)
    assert flight.codes == [0, 0]
    assert "2 ranks, 1 hosts" in flight.said[0] and re.search(r"^  node1  0-1  ", flight.said[0], re.MULTILINE)


def test_one_process_alone(tmp_path):
    command = [sys.executable, "-m", "pdl", "preflight", SAMPLE, f"training.output_dir={tmp_path / 'run'}"]
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert socket.gethostname() in ended.stdout and "one rank alone; pre-flight took" in ended.stdout


def test_hosts_with_disks_of_their_own(folders):
    """No file system is shared: that is seen, said, and no mistake."""
    flight = Flight(*({"folder": folder} for folder in folders), arguments=DATA)
    assert flight.codes == [0, 0, 0], flight.said
    assert flight.said[0].count("  its own  ") == 3
    assert not any((folder / "out").exists() for folder in folders)


def made_of_something_else(folders: list[Path]) -> dict:
    (folders[1] / "data/train.jsonl").write_text(RECORD * 21)
    path = folders[1] / "configs/deepspeed/zero2.json"
    path.write_text(path.read_text().replace("50000000", "60000000"))
    library = [str(folders[1] / "site"), "transformers", "0.0.1"]
    return {"library": library, "clock": -60, "arguments": ["training.seed=1", "loss.alpha=0.5"]}


def no_directory(folders: list[Path]) -> dict:
    (folders[1] / "out").write_text("a file")
    return {}


OTHERS = {
    "made of something else": (
        made_of_something_else,
        [
            r"transformers: node2 (rank 1) has 0.0.1; the other 2 ranks have \d.*",
            "loss.alpha: node2 (rank 1) has 0.5; the other 2 ranks have 0.25",
            "training.seed: node2 (rank 1) has 1; the other 2 ranks have 0",
            r"deepspeed file: node2 (rank 1) has \w{12}; the other 2 ranks have \w{12}",
            r"data.train: node2 (rank 1) has \w{12}; the other 2 ranks have \w{12}",
            r"the clock of node2 (rank 1) is 60.0 s behind that of node[13] (rank [02]); 5 s are tolerated: have NTP set them",
        ],
    ),
    "output directory": (
        no_directory,
        ["node2 (rank 1): training.output_dir=out/run cannot be written to: Not a directory"],
    ),
    "disk": (
        lambda _: {"full": 100_000},
        ["node2 (rank 1): training.output_dir=out/run cannot be written to: File too large"],
    ),
    "all-reduce": (
        lambda _: {"garbles": "all_reduce"},
        [r"node2 (rank 1) got wrong results from all-reduce in float32, all-reduce in float64, all-reduce in int64, "
         r"all-reduce of \d+ MiB: 1 of \S+ values, the first at 17: \d+ instead of \d+"],
    ),
    "reduce-scatter": (
        lambda _: {"garbles": "reduce_scatter_tensor"},
        [r"node2 (rank 1) got wrong results from reduce-scatter in float32: 1 of \S+ values, the first at 17: \d+ instead of \d+"],
    ),
    "all-gather": (
        lambda _: {"garbles": "all_gather_into_tensor"},
        [r"node2 (rank 1) got wrong results from all-gather in bfloat16 of what node1 (rank 0) sent: 1 of .*"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("other", "expected"), OTHERS.values(), ids=OTHERS)
def test_a_host_that_is_not_like_the_others_is_named(folders, other, expected):
    beings = [{"folder": folder} for folder in folders]
    beings[1] |= other(folders)
    problems = Flight(*beings, arguments=DATA).problems()
    assert len(problems) == len(expected), problems
    for problem, pattern in zip(problems, expected, strict=True):
        pattern = re.sub(r"\((ranks? [^)]*)\)", r"\\(\1\\)", pattern)
        assert re.fullmatch(pattern, problem), problem


def test_a_configuration_that_is_refused_on_one_host_only(folders):
    (folders[1] / "data/train.jsonl").unlink()
    flight = Flight(*({"folder": folder} for folder in folders), arguments=DATA)
    assert flight.codes == [2, 2, 2]
    assert re.match(r"pdl: node2 \(rank 1\): .*\n  - data.train=data/train.jsonl does not exist", flight.said[0])


def test_two_hosts_that_differ_are_both_named(tmp_path):
    flight = Flight({}, {"arguments": ["training.seed=1"]}, arguments=[f"training.output_dir={tmp_path / 'run'}"])
    assert flight.problems() == ["training.seed: node1 (rank 0) has 0; node2 (rank 1) has 1"]


# --- before there is a group ---


@pytest.mark.parametrize("odd", [0, 1], ids=["the rank that keeps the store", "another"])
def test_a_host_without_its_gpus_is_refused_before_a_group_waits_for_it(tmp_path, odd):
    """The machine of these tests has no GPU; one rank is told to use its own."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    ranks = [
        Rank([{"name": f"node{number + 1}"}, ["preflight", SAMPLE, f"training.output_dir={tmp_path / 'run'}"]],
             environment={"LOCAL_RANK": "0", "PDL_REFUSED": str(tmp_path / f"refused{number}")} | ({"DS_ACCELERATOR": "cuda"} if number == odd else {}))
        for number in range(3)
    ]  # fmt: skip
    group = Group(ranks, hosts_apart.run)
    assert group.wait(60) == [2, 2, 2]
    assert group.said[0].strip().splitlines() == [
        "pdl: the ranks cannot form a group",
        f"  - node{odd + 1} (rank {odd}): DS_ACCELERATOR=cuda, and of 0 GPUs none for local rank 0",
    ]
    assert group.said[1:] == ["", ""]
    assert len(list(tmp_path.glob("refused*"))) == 3


@pytest.mark.parametrize("missing_rank", [0, 1])
def test_a_rank_that_never_comes_ends_the_others(tmp_path, missing_rank):
    told = [{"name": "node1", "patience": 3}, ["preflight", SAMPLE, f"training.output_dir={tmp_path / 'run'}"]]
    place = {"RANK": str(1 - missing_rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    group = Group([Rank(told, environment=place)], hosts_apart.run)
    assert group.wait(60) == [1]
    reason = "no sign of rank 1 after 0:00:03" if missing_rank == 1 else "the ranks could not meet: "
    assert f"pdl: rank {1 - missing_rank} on node1: {reason}" in group.said[0] and "Traceback" not in group.said[0]


def test_groups_that_are_made_later_may_take_their_time():
    group = Group([Rank(None), Rank(None)], hosts_apart.ask_the_store)
    assert group.wait(60) == [0, 0] and [float(said) for said in group.said] == [2.0, 2.0]


def test_a_rank_that_hangs_in_the_first_collective_ends_all(tmp_path):
    told = ["preflight", SAMPLE, f"training.output_dir={tmp_path / 'run'}"]
    ranks = [Rank([{"patience": 3} | more, told]) for more in ({}, {"suspends": "barrier"})]
    group = Group(ranks, hosts_apart.run)
    group.processes[0].join(60)
    assert group.processes[0].exitcode == 1
    assert "no progress for 3 s while trying gloo" in group.said[0]
    group.processes[1].kill()


def test_what_breaks_on_one_rank_only_ends_all_with_its_name():
    """An error that nobody foresaw: no rank waits in a collective for the one that raised it."""
    group = Group([Rank(1), Rank(0)], hosts_apart.divide_by)
    assert group.wait(60) == [1, 1]  # nothing was wrong with the configuration: another try may go well
    assert re.fullmatch(r"\S+ \(rank 1\): ZeroDivisionError: division by zero\n", group.said[0])
    assert "return 1 / divisor" in group.said[1]  # where it broke, for whoever mends it


@pytest.mark.cluster
def test_two_real_hosts(tmp_path):
    """Names and addresses of their own, an output directory of their own, and nothing told to anybody."""
    if why := missing():
        pytest.skip(why)
    network = Network(tmp_path, 2)
    try:
        place = tmp_path / "run"
        for host in network.hosts:
            host.own(tmp_path / host.name, place)
        group = {
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": network.hosts[0].address,
            "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        started = [
            host.start(
                sys.executable,
                "-m",
                "pdl",
                "preflight",
                SAMPLE,
                f"training.output_dir={place}",
                output=tmp_path / f"said{rank}",
                RANK=str(rank),
                **group,
            )
            for rank, host in enumerate(network.hosts)
        ]
        codes = [each.wait(120) for each in started]
        said = [each.said() for each in started]
        assert codes == [0, 0], said
        assert "2 ranks, 2 hosts" in said[0] and "pre-flight" not in said[1]
        for rank, host in enumerate(network.hosts):
            assert re.search(rf"^  {host.name}  +{rank}  .*  its own  ", said[0], re.MULTILINE), said[0]
    finally:
        network.close()


@pytest.mark.parametrize("ahead", [0.25, -3.0])
def test_how_far_a_clock_is_off(tmp_path, ahead):
    """The stated error holds the true offset; what is within the limit is shown only."""
    flight = Flight({}, {"clock": ahead}, arguments=[f"training.output_dir={tmp_path / 'run'}"])
    assert flight.codes == [0, 0], flight.said
    shown = re.search(r"node2 .* (\S+) ms ± (\S+)", flight.said[0])
    offset, error = (float(number.replace(",", "")) for number in shown.groups())
    assert abs(offset - 1000 * ahead) <= error + 0.1  # rounded to a tenth


def test_other_sources_on_one_host(tmp_path):
    """A checkout of its own, with one more line in a file. Real starts, without anything forked."""
    copy = tmp_path / "checkout"
    shutil.copytree(REPOSITORY / "pdl", copy / "pdl", ignore=shutil.ignore_patterns("__pycache__"))
    for room in ("configs", "recipes"):
        (copy / room).symlink_to(REPOSITORY / room)
    with (copy / "pdl/weights.py").open("a") as file:
        file.write("# another version\n")
    command = [sys.executable, "-m", "pdl", "preflight", SAMPLE, f"training.output_dir={tmp_path / 'run'}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            command, cwd=folder, stderr=subprocess.PIPE, text=True,
            env=environment(**group, RANK=str(rank), LOCAL_RANK=str(rank)) | {"PYTHONPATH": str(folder)},
        )
        for rank, folder in enumerate([REPOSITORY, copy])
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], said
    name = re.escape(socket.gethostname())
    assert re.search(
        rf"the sources of pdl: {name} \(rank 0\) has \w{{12}}; {name} \(rank 1\) has \w{{12}}$", said[0].strip()
    )


@pytest.mark.parametrize(("skips", "looks"), [((False, False), True), ((True, True), False), ((True, False), True)])
def test_training_looks_unless_every_rank_is_told_not_to(tmp_path, skips, looks):
    """Were it each rank's own decision, those that look would wait for those that do not."""
    arguments = [SAMPLE, [f"training.output_dir={tmp_path / 'run'}"]]
    told = [Rank(arguments, environment={"PDL_PREFLIGHT": "0"} if skip else {}) for skip in skips]
    group = Group(told, hosts_apart.begin_to_train)
    assert group.wait() == [0, 0], group.said
    assert ("pre-flight: 2 ranks" in group.said[0]) == looks


def test_training_alone_does_not_look(tmp_path):
    group = Group([Rank([SAMPLE, [f"training.output_dir={tmp_path / 'run'}"]])], hosts_apart.begin_to_train)
    assert group.wait() == [0] and group.said == [""]


def test_many_ranks_are_named_briefly():
    from pdl.hosts import Hosts

    hosts = Hosts([f"node{rank // 8}" for rank in range(512)], list(range(0, 512, 8)))
    assert hosts.where([8, 9, 10, 15, 16]) == "node1 (ranks 8-10,15), node2 (rank 16)"
    assert hosts.where(list(range(512))).endswith("node7 (ranks 56-63), 56 more hosts")
