"""Ranks: one process group, and ways to agree so that all ranks go on together or end together."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import TextIO, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from pdl import watch
from pdl.config import UserError
from pdl.hosts import Hosts, difference

T = TypeVar("T")


class RunFailed(Exception):
    """The run cannot go on: raised on every rank alike, so that all end together. One clear message, exit code 1."""


# Preparing data (tokenizing, counting) is waited for inside a collective; the default of 10 minutes is too short for it.
_TIMEOUT = timedelta(hours=2)
# Ranks that were started together come within the time that imports take, on a slow file system at most some minutes.
_MEETING = timedelta(minutes=10)


def start() -> None:
    """Join the process group that torchrun or deepspeed describes in the environment, or be a group of one.

    Raises, on every rank alike, UserError when what the ranks bring can form no group, RunFailed when one does not come.
    """
    # DeepSpeed calls collectives under names that torch is about to rename; nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # DeepSpeed picks the accelerator from this, also where a CUDA build of torch finds no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
    watch.beat("meeting the other ranks", 4 * _MEETING.total_seconds())  # more than `_meet` waits for
    store = _meet()
    if on_gpu():
        torch.cuda.set_device(local_rank())
    ranks = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    dist.init_process_group(backend(), timeout=_TIMEOUT, store=store, **ranks)
    watch.beat(f"trying {backend()}", _MEETING.total_seconds())
    dist.barrier()
    watch.beat("reading the configuration", 0)


def _meet() -> dist.Store:
    """The store at which all ranks have met, and found that they can form a group.

    Looked at here, over TCP: a group of NCCL and gloo, or of two versions of NCCL, is not refused but waits.
    """
    here = socket.gethostname()
    own: dict[str, object] = {"place": (here, local_rank()), "device": "CPU, over gloo", "torch": torch.__version__}
    if on_gpu():
        own["device"] = "GPU, over NCCL"
        if local_rank() < torch.cuda.device_count():
            own["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        else:
            own["problem"] = (
                f"DS_ACCELERATOR=cuda, and of {torch.cuda.device_count()} GPUs none for local rank {local_rank()}"
            )
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        # torchrun keeps a store for its ranks; else rank 0 does. One that is told the number of ranks cannot say which is missing.
        keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*place, is_master=keeps, timeout=_MEETING, wait_for_workers=False, multi_tenant=True)
        meeting = dist.PrefixStore("meeting", store)
        meeting.set(str(rank), json.dumps(own))
        names = [str(number) for number in range(world_size)]
        try:
            meeting.wait(names, _MEETING)
        except dist.DistStoreError as error:
            late = [name for name in names if not meeting.check([name])]
            raise RunFailed(f"{here}: no sign of rank {', '.join(late)} after {_MEETING}") from error
        met = [json.loads(value) for value in meeting.multi_get(names)]
        _leave_together(meeting, rank, names)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise RunFailed(f"{here}: the ranks could not meet: {error}") from error
    hosts = Hosts.of([tuple(each["place"]) for each in met])
    problems = [f"{hosts.where([number])}: {each['problem']}" for number, each in enumerate(met) if "problem" in each]
    for name in ("device", "torch", "NCCL") if not problems else ():
        problems += difference(hosts, name, [each.get(name) for each in met])
    if problems:
        raise UserError("\n  - ".join(["the ranks cannot form a group", *problems]))
    store.set_timeout(_TIMEOUT)  # of groups that are made later
    return store


def _leave_together(meeting: dist.Store, rank: int, names: list[str]) -> None:
    """Rank 0 may keep the store, which ends with it: it leaves when all have read what they came for."""
    meeting.set(f"read {rank}", "")
    if rank == 0:
        meeting.wait([f"read {name}" for name in names], _MEETING)


def stop() -> None:
    """Leave together: launchers kill the other ranks when the first process ends."""
    dist.barrier()
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def on_gpu() -> bool:
    """Known once `start` was called; DS_ACCELERATOR=cpu keeps a machine's GPUs out of it."""
    return os.environ.get("DS_ACCELERATOR") == "cuda"


def backend() -> str:
    return "nccl" if on_gpu() else "gloo"


def device() -> torch.device:
    return torch.device("cuda", local_rank()) if on_gpu() else torch.device("cpu")


def say(text: str, file: TextIO | None = None) -> None:
    """Print on rank 0 only."""
    if rank() == 0:
        with contextlib.suppress(OSError):  # a terminal that is gone ends no run
            print(text, file=file or sys.stdout, flush=True)


def peak_memory() -> list[int]:
    """Bytes at the peak so far, of each rank: of its GPU, or of its process."""
    if on_gpu():
        return gathered(torch.cuda.max_memory_allocated())
    return gathered(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of a tensor of any device, as a new tensor on this rank's device."""
    total = values.detach().to(device(), copy=True)
    dist.all_reduce(total)
    return total


def gathered(value: T) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank."""
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def together(work: Callable[[], T], what: str | None = None) -> T:
    """Run `work` on every rank; a UserError on any of them is raised on all, so that no rank waits for one that left.

    what: names the work in the RunFailed that an error of the file system on any rank (a full disk) becomes on all.
    """
    result, failure = None, None
    try:
        result = work()
    except UserError as error:
        failure = UserError(str(error))
    except (OSError, SafetensorError) as error:
        if what is None:
            raise
        failure = RunFailed(f"{what}: {error}")
    failures = [failure for failure in gathered(failure) if failure is not None]
    if failures:
        raise failures[0]
    return result


def first_then_rest(work: Callable[[], T]) -> T:
    """Run `work` on one rank of each node, then on the others: the first fills the caches that the rest read."""
    if local_rank() == 0:
        result = together(work)
        together(lambda: None)
    else:
        together(lambda: None)
        result = together(work)
    return result


def once_per_node(work: Callable[[], T]) -> T:
    """The result of `work`, which one rank of each node does for all of it. A collective; the result is pickled."""
    result = together(work if local_rank() == 0 else lambda: None)
    return gathered(result)[rank() - local_rank()]  # launchers number the ranks of a node in a row


def require_equal(values: dict[str, object]) -> None:
    """Refuse to start when ranks see different values (another config, another data file). A collective."""
    seen = gathered(values)
    differences = [
        f"{name}: rank 0 has {seen[0].get(name)!r}, rank {number} has {other.get(name)!r}"
        for number, other in enumerate(seen)
        for name in seen[0] | other
        if other.get(name) != seen[0].get(name)
    ]
    if differences:
        raise UserError("\n  - ".join(["the ranks disagree", *differences]))
