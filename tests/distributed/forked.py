"""Ranks without the ten seconds of their start: one process imports everything once, and every rank is forked from it.

They are real processes of a real process group, with signals and exit codes of their own. What is left out, a fresh
`python -m pdl` under a launcher, is tried by test_launch.py and test_run.py.
"""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from tempfile import NamedTemporaryFile

from conftest import REPOSITORY, environment

from pdl.__main__ import main


@dataclass
class Rank:
    """What one rank is told, where it runs, and what its environment has besides that of all tests."""

    arguments: list
    folder: Path = REPOSITORY
    environment: dict[str, str] = field(default_factory=dict)


class Group:
    """Ranks that run `work(arguments)`, by default the command line. What it returns is a rank's exit code.

    processes: of `multiprocessing`, with `pid`, `kill()`, `exitcode`. A rank that dies does not end the others.
    """

    def __init__(self, ranks: list[Rank], work: Callable[[list], int | None] = main):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = port = str(free.getsockname()[1])
        size = str(len(ranks))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        context = multiprocessing.get_context("forkserver")
        _start_server()
        self._written = [NamedTemporaryFile() for _ in ranks]  # noqa: SIM115  (they go when the group does)
        self.processes = []
        for number, rank in enumerate(ranks):
            place = group | {"RANK": str(number), "LOCAL_RANK": str(number)} | rank.environment
            told = (work, rank.arguments, rank.folder, environment(**place), self._written[number].name)
            self.processes.append(context.Process(target=_run, args=told, daemon=True))
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 300) -> list[int]:
        """The exit codes of all ranks; negative for a signal. AssertionError when they have not ended by then."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        late = [process for process in self.processes if process.exitcode is None]
        for process in late:
            process.kill()
        assert not late, "\n".join(["still running:", *self.said])
        return [process.exitcode for process in self.processes]

    @property
    def said(self) -> list[str]:
        """What each rank has written to stdout and stderr."""
        return [Path(written.name).read_text() for written in self._written]


def _start_server() -> None:
    """What libraries read from the environment when they are imported, such as OMP_NUM_THREADS, they read here, once."""
    before = dict(os.environ)
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    os.environ.update(environment(PYTHONPATH=path))
    try:
        forkserver.set_forkserver_preload(["distributed.imports"])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(work: Callable, arguments: list, folder: Path, surroundings: dict[str, str], written: str) -> None:
    os.environ.clear()
    os.environ.update(surroundings)
    os.chdir(folder)
    with open(written, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(work(arguments))
