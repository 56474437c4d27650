"""What makes a rank another host than the others: its name, its clock, its libraries, a network that garbles. In its process only."""

import importlib.metadata
import os
import resource
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from pdl import distributed
from pdl.__main__ import main
from pdl.config import load_config
from pdl.preflight import on_every_host, preflight


def run(told: list) -> int:
    """One rank, told what it is and the command line. What it is: {name: value}, the functions below say which there are."""
    being, arguments = told
    for name, value in being.items():
        globals()[f"_{name}"](value)
    return main(arguments)


def ask_the_store(_) -> int:
    """For how long it is waited for what a group that is made later needs, in hours."""
    distributed.start()
    print(dist.distributed_c10d._get_default_store().timeout.total_seconds() / 3600)
    distributed.stop()
    return 0


def begin_to_train(arguments: list[str]) -> int:
    """What training does before anything else."""
    distributed.start()
    preflight(load_config(*arguments, world_size=distributed.world_size()))
    distributed.stop()
    return 0


def divide_by(divisor: int) -> int:
    """Work that may break, on every rank."""
    distributed.start()

    def work() -> float:
        return 1 / divisor

    try:
        on_every_host(work)
    except distributed.RunFailed as error:
        distributed.say(str(error))
        return 1
    finally:
        distributed.stop()
    return 0


def _name(name: str) -> None:
    """The host's name."""
    socket.gethostname = lambda: name


def _clock(seconds: float) -> None:
    """Its clock is ahead by so much."""
    true = time.time
    time.time = lambda: true() + seconds


def _library(told: list) -> None:
    """[directory, name, version]: another version of a library is installed here, and found first."""
    directory, name, version = told
    there = Path(directory, f"{name}-{version}.dist-info")
    there.mkdir(parents=True)
    (there / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    sys.path.insert(0, str(directory))
    assert importlib.metadata.version(name) == version


def _garbles(operation: str) -> None:
    """One value of what this rank receives in the operation is off by one, where there is enough of it to be data."""
    original = getattr(dist, operation)

    def garbled(received, *others, **named):
        work = original(received, *others, **named)
        if received.numel() > 1000:
            received.view(-1)[17] += 1
        return work

    setattr(dist, operation, garbled)


def _patience(seconds: float) -> None:
    """For how long it waits for ranks that do not come, or do nothing."""
    distributed._MEETING = timedelta(seconds=seconds)


def _suspends(operation: str) -> None:
    """The process is stopped where it would begin the operation, as by a debugger or a frozen container."""
    setattr(dist, operation, lambda *_, **__: os.kill(os.getpid(), signal.SIGSTOP))


def _full(size: int) -> None:
    """The kernel lets this process write no more than so many bytes into a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
