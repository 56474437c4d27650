"""Pre-flight: what goes wrong on clusters, looked for in a second before a run, and said with the name of the host at fault.

Compared on every rank: versions, our own code, configuration, data. Tried out: the disk and who shares it, the clocks, the
collectives that training uses, their bandwidth. Works alike on NCCL and gloo.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from pdl import distributed, watch
from pdl.config import Config, UserError, flattened
from pdl.distributed import RunFailed, gathered, say
from pdl.hosts import Hosts, by_value, difference, ranges
from pdl.records import examples_hash, source_hash
from pdl.storage import find_storage, writable

T = TypeVar("T")

# torchrun compares the hosts' clocks: it takes a host whose last heartbeat is 15 s old for dead, and hosts beat every 5 s.
# With clocks further apart than this a host that is a little slow is thrown out.
_CLOCK_LIMIT = 5.0
_CLOCK_ROUNDS = 8
# What a checkpoint takes is checked when the model is known. Here: whether the disk takes anything.
_WRITTEN = 1 << 20
_PERIOD = 8191  # of the patterns that are sent; a prime, so that no chunk of a collective begins where another one does
_LARGEST = 256 << 20  # bytes of the largest all-reduce
_LONG_ENOUGH = 0.01  # seconds of an all-reduce from which its bandwidth is read
_BANDWIDTH_ROUNDS = 3  # of which the best one counts, after one to warm up: connections are made, buffers registered


def preflight(config: Config) -> None:
    """What `train` calls: `inspect`, or where every rank has PDL_PREFLIGHT=0 only that all have the same configuration. A collective."""
    if all(gathered(os.environ.get("PDL_PREFLIGHT") == "0")):
        distributed.require_equal(flattened(config.to_dict()))
    elif distributed.world_size() > 1:
        inspect(config)


def inspect(config: Config) -> None:
    """Look at all ranks and print a table of the hosts. A collective.

    Raises UserError, on all ranks, with every problem and the host that it is on.
    """
    started = time.perf_counter()
    watch.beat("pre-flight", config.training.hang_seconds)
    hosts = _hosts()
    problems: list[str] = []
    facts = _on_every_rank(hosts, problems, lambda: _facts(config))
    if not problems:
        problems += _differences(hosts, facts)
        data = _on_every_rank(hosts, problems, lambda: _data(config) if distributed.local_rank() == 0 else {})
        problems += _different_data(hosts, data)
    free, shared = _storage(hosts, problems, Path(config.training.output_dir))
    clocks = _clocks(hosts, problems)
    wrong = _wrong_collectives(hosts)
    speed = _bandwidth(wrong) if distributed.world_size() > 1 else "one rank alone"
    problems += _said_wrong(hosts, wrong)
    if None not in facts:
        _say_table(hosts, facts, free, shared, clocks)
    say(f"  {speed}; pre-flight took {time.perf_counter() - started:.2f} s")
    watch.beat("preparing", 0)  # reading, tokenizing and fetching take as long as they take
    if problems:
        raise UserError("\n  - ".join(["pre-flight found what would end the run or spoil it", *problems]))


def on_every_host(work: Callable[[], T]) -> T:
    """Run `work` on every rank. A UserError on some of them is raised on all, with the names of their hosts. A collective."""
    hosts, problems = _hosts(), []
    result = _on_every_rank(hosts, problems, work)[distributed.rank()]
    if problems:
        raise UserError("\n".join(problems))
    return result


def _hosts() -> Hosts:
    return Hosts.of(gathered((socket.gethostname(), distributed.local_rank())))


def _on_every_rank(hosts: Hosts, problems: list[str], work: Callable[[], T]) -> list[T | None]:
    """What `work` returns on each rank, None where it was refused: then `problems` has one more for every kind of refusal.

    Raises RunFailed on all ranks where it broke on one: no rank is to wait for it.
    """
    result, refused, broken = None, None, None
    try:
        result = work()
    except (UserError, OSError) as error:
        refused = str(error)
    except Exception as error:
        traceback.print_exc()
        broken = traceback.format_exception_only(error)[-1].strip()
    outcomes = gathered((result, refused, broken))

    def told(messages: list[str | None]) -> list[str]:
        found = [(message, ranks) for message, ranks in by_value(messages) if message is not None]
        alike = len(messages)  # nothing to do with a host
        return [message if len(ranks) == alike else f"{hosts.where(ranks)}: {message}" for message, ranks in found]

    results, refusals, failures = (list(each) for each in zip(*outcomes, strict=True))
    if any(failures):
        raise RunFailed("; ".join(told(failures)))
    problems += told(refusals)
    return results


# --- what is compared ---


def _facts(config: Config) -> dict:
    """What this rank is made of."""
    versions = {name: importlib.metadata.version(name) for name in ("deepspeed", "transformers", "datasets")}
    versions = {"python": platform.python_version(), "torch": torch.__version__, **versions}
    if distributed.on_gpu():
        properties = torch.cuda.get_device_properties(distributed.device())
        versions |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
        device, memory = properties.name, properties.total_memory
    else:
        cores = len(os.sched_getaffinity(0))
        device = f"{cores} core{'s' * (cores > 1)}, {_processor()}"
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "versions": versions | {"pdl": _own_code()},
        "machine": platform.machine(),
        "device": device,
        "memory": memory,
        "configuration": flattened(config.to_dict()) | {"deepspeed file": _short_hash(config.deepspeed_sharding())},
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _short_hash(value: object) -> str:
    content = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:12]


def _own_code() -> str:
    """A hash of the sources of this package."""
    package = Path(__file__).parent
    sources = sorted(package.rglob("*.py"))
    return _short_hash({path.relative_to(package).as_posix(): _short_hash(path.read_bytes()) for path in sources})


def _differences(hosts: Hosts, facts: list[dict]) -> list[str]:
    problems = []
    for name in facts[0]["versions"]:
        title = "the sources of pdl" if name == "pdl" else name
        problems += difference(hosts, title, [fact["versions"].get(name) for fact in facts])
    problems += difference(hosts, "machine", [fact["machine"] for fact in facts])
    configurations = [fact["configuration"] for fact in facts]
    for key in dict.fromkeys(key for configuration in configurations for key in configuration):
        problems += difference(hosts, key, [configuration.get(key) for configuration in configurations])
    return problems


def _data(config: Config) -> dict[str, str]:
    """Hashes of what the configuration names and this host has."""
    splits = [split for split in ("train", "validation", "test") if getattr(config.data, split) is not None]
    hashes = {f"data.{split}": examples_hash(config, split)[:12] for split in splits}
    if (path := config.loss.general_corpus) is not None:
        hashes["loss.general_corpus"] = source_hash(path)[:12] if Path(path).is_file() else "no such file"
    for section in (config.model, config.tokenizer):
        if section.name_or_path is not None:
            hashes[f"{section.name_or_path}/"] = _directory_hash(Path(section.name_or_path))
    return hashes


def _directory_hash(directory: Path) -> str:
    """Of a model's or a tokenizer's files: names, sizes, and what the small ones say. Weights are sent by rank 0 anyway."""
    if not directory.is_dir():
        return "no such directory"  # on every host alike: a name of the hub
    listed = {
        path.name: [path.stat().st_size, _short_hash(path.read_bytes()) if path.suffix == ".json" else None]
        for path in directory.iterdir()
        if path.is_file()
    }
    return _short_hash(listed)


def _different_data(hosts: Hosts, data: list[dict | None]) -> list[str]:
    """A host's first rank speaks for all of them; where it could not, that is said already."""
    spoken = [data[hosts.first_of(rank)] for rank in range(len(data))]
    if None in spoken:
        return []
    return [problem for key in spoken[0] for problem in difference(hosts, key, [said.get(key) for said in spoken])]


# --- what is tried ---


def _storage(hosts: Hosts, problems: list[str], directory: Path) -> tuple[list[int | None], list[list[int]]]:
    """Free bytes of the output directory's file system by rank, and with which ranks each rank shares it."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]

    def write() -> int:
        with writable(directory):
            directory.mkdir(parents=True, exist_ok=True)
            if distributed.local_rank() == 0:
                with tempfile.TemporaryFile(dir=directory, prefix=".probe-") as file:
                    file.write(bytes(_WRITTEN))
                    file.flush()
                    os.fsync(file.fileno())
        return shutil.disk_usage(directory).free

    gathered(None)  # all have seen what is missing before any makes it
    free = _on_every_rank(hosts, problems, write)
    shared = [] if None in free else gathered(find_storage(directory).ranks)
    gathered(None)  # all probes are gone
    for path in missing:  # a run that is refused leaves nothing behind
        with contextlib.suppress(OSError):
            path.rmdir()
    return free, shared


def _clocks(hosts: Hosts, problems: list[str]) -> list[tuple[float, float]]:
    """How far each rank's clock is ahead of rank 0's, and how far off that can be at most; in seconds.

    Nobody leaves a barrier before everybody has entered it. So what one clock shows on leaving is later than what any
    other shows on entering, however long the network takes: every barrier bounds the difference on both sides.
    """
    moments = []
    for _ in range(_CLOCK_ROUNDS):
        entered = time.time()
        dist.barrier()
        moments.append((entered, time.time()))
    by_rank = gathered(moments)
    offsets = []
    for own in by_rank:
        pairs = list(zip(own, by_rank[0], strict=True))
        low = max(entered - first_left for (entered, _), (_, first_left) in pairs)
        high = min(left - first_entered for (_, left), (first_entered, _) in pairs)
        offsets.append(((low + high) / 2, (high - low) / 2))
    middle = statistics.median_low([offsets[first][0] for first in hosts.firsts])
    reference = next(first for first in hosts.firsts if offsets[first][0] == middle)
    for first in hosts.firsts:
        ahead = offsets[first][0] - middle
        if abs(ahead) - offsets[first][1] - offsets[reference][1] > _CLOCK_LIMIT:
            problems.append(
                f"the clock of {hosts.where(hosts.ranks_of(first))} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} "
                f"that of {hosts.where(hosts.ranks_of(reference))}; {_CLOCK_LIMIT:g} s are tolerated: have NTP set them"
            )
    return offsets


def _pattern(rank: int) -> torch.Tensor:
    """One period of the whole numbers that a rank sends, in [0, 1009): sums of 16,000 ranks are exact in float32."""
    places = torch.arange(_PERIOD) + 131 * rank
    return places * places % 1009


def _filled(period: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """The period over and over, on this rank's device."""
    period = period.to(distributed.device(), dtype)
    return period.repeat(-(-size // len(period)))[:size]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wrong(received: torch.Tensor, expected: torch.Tensor) -> str | None:
    bad = (received != expected).nonzero().flatten()
    if not len(bad):
        return None
    place = int(bad[0])
    instead = f"{received[place].item():g} instead of {expected[place].item():g}"
    return f"{len(bad):,} of {len(received):,} values, the first at {place:,}: {instead}"


def _wrong_collectives(hosts: Hosts) -> dict[str, str]:
    """The collectives of training, tried on whole numbers, so that every result is known exactly: what is wrong on this rank."""
    rank, world_size = distributed.rank(), distributed.world_size()
    size = 3 * _PERIOD + 17  # divides into nothing
    total = sum(_pattern(other) for other in range(world_size))
    found: dict[str, str | None] = {}
    for dtype in (torch.float32, torch.float64, torch.int64):  # gradients, sums of weights and of metrics, counts
        reduced = _filled(_pattern(rank), size, dtype)
        dist.all_reduce(reduced)
        found[f"all-reduce in {_short(dtype)}"] = _wrong(reduced, _filled(total, size, dtype))
    parts = _filled(_pattern(rank), size * world_size, torch.float32)  # gradients at stage 3
    part = parts.new_empty(size)
    dist.reduce_scatter_tensor(part, parts)
    expected = _filled(total, size * world_size, torch.float32)[rank * size :][:size]
    found["reduce-scatter in float32"] = _wrong(part, expected)
    own = _filled(_pattern(rank) % 256, size, torch.bfloat16)  # parameters
    whole = own.new_empty(size * world_size)
    dist.all_gather_into_tensor(whole, own)
    for other in range(world_size):
        expected = _filled(_pattern(other) % 256, size, torch.bfloat16)
        found[f"all-gather in bfloat16 of what {hosts.where([other])} sent"] = _wrong(
            whole[other * size :][:size], expected
        )
    return {name: told for name, told in found.items() if told}


def _bandwidth(wrong: dict[str, str]) -> str:
    """What to say about an all-reduce of float32 that takes long enough for its time to mean something.

    wrong: gets another entry when its result is.
    """
    world_size, size = distributed.world_size(), 1 << 20
    total = sum(_pattern(rank) for rank in range(world_size))
    slowest = 0.0
    while slowest < _LONG_ENOUGH and size < _LARGEST:
        size *= 2
        times = []
        for _ in range(1 + _BANDWIDTH_ROUNDS):
            buffer = _filled(_pattern(distributed.rank()), size // 4, torch.float32)
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(buffer)
            if distributed.on_gpu():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        rounds = torch.tensor(times[1:], dtype=torch.float64, device=distributed.device())
        dist.all_reduce(rounds, op=dist.ReduceOp.MAX)
        slowest = float(rounds.min())
    if told := _wrong(buffer, _filled(total, size // 4, torch.float32)):
        wrong[f"all-reduce of {size >> 20} MiB"] = told
    algorithm = size / slowest / 1e9
    bus = algorithm * 2 * (world_size - 1) / world_size  # what a ring sends and receives on each rank
    return f"all-reduce of {size >> 20} MiB: algorithm bandwidth {algorithm:.2f} GB/s, bus bandwidth {bus:.2f} GB/s"


def _said_wrong(hosts: Hosts, wrong: dict[str, str]) -> list[str]:
    """A sentence for all wrong results that the same ranks got. A collective."""
    by_rank = gathered(wrong)
    names: dict[tuple[int, ...], list[str]] = {}
    for name in dict.fromkeys(name for found in by_rank for name in found):
        ranks = tuple(rank for rank, found in enumerate(by_rank) if name in found)
        names.setdefault(ranks, []).append(name)
    return [
        f"{hosts.where(list(ranks)) if len(ranks) < len(by_rank) else 'every rank'} got wrong results from {', '.join(there)}: "
        f"{by_rank[ranks[0]][there[0]]}"
        for ranks, there in names.items()
    ]


# --- what is said ---


def _say_table(
    hosts: Hosts, facts: list[dict], free: list[int | None], shared: list[list[int]], clocks: list[tuple[float, float]]
) -> None:
    rows = [("host", "ranks", "device", "memory", "disk free", "output_dir", "clock")]
    for first in hosts.firsts:
        ranks = hosts.ranks_of(first)
        devices = " + ".join(
            f"{len(there)} x {device}" if distributed.on_gpu() else device
            for device, there in by_value([facts[rank]["device"] for rank in ranks])
        )
        ahead, error = clocks[first]
        rows.append(
            (
                hosts.names[first],
                ranges(ranks),
                devices,
                f"{min(facts[rank]['memory'] for rank in ranks) / 2**30:.0f} GiB",
                "none" if free[first] is None else f"{free[first] / 2**30:.1f} GiB",
                _sharing(hosts, shared[first], ranks) if shared else "",
                f"{1000 * ahead:+,.1f} ms ± {1000 * error:.1f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    say(f"pre-flight: {len(hosts.names)} ranks, {len(hosts.firsts)} hosts")
    for row in rows:
        say("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    (versions, ranks), *_ = by_value([fact["versions"] for fact in facts])
    alike = "" if len(ranks) == len(facts) else f" on {hosts.where(ranks)}"
    say("  " + ", ".join(f"{name} {version}" for name, version in versions.items()) + alike)


def _sharing(hosts: Hosts, sharing: list[int], ranks: list[int]) -> str:
    if len(sharing) == len(hosts.names):
        return "shared by all"
    return "its own" if sharing == ranks else f"shared by ranks {ranges(sharing)}"
