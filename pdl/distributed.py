"""Ranks: one process group, and ways to agree so that all ranks go on together or end together."""

from __future__ import annotations

import contextlib
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

from pdl.config import UserError

T = TypeVar("T")


class RunFailed(Exception):
    """The run cannot go on: raised on every rank alike, so that all end together. One clear message, exit code 1."""


# Preparing data (tokenizing, counting) is waited for inside a collective; the default of 10 minutes is too short for it.
_TIMEOUT = timedelta(hours=2)


def start() -> None:
    """Join the process group that torchrun or deepspeed describes in the environment, or be a group of one."""
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
    if on_gpu():
        torch.cuda.set_device(local_rank())
    dist.init_process_group(backend(), timeout=_TIMEOUT)


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
