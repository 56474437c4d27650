"""Files that are there whole or not at all, and which ranks see the same ones."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from pdl import distributed
from pdl.config import UserError


def write_whole(path: Path, text: str, sync: bool = True) -> None:
    """Write a file that is there whole or not at all; with `sync` also when the power goes."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    partial.replace(path)
    if sync:
        sync_directory(path.parent)


def write_json(path: Path, content: dict, sync: bool = True) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n", sync)


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Bring a file, or a directory with all in it, to the disk."""
    if path.is_dir():
        for inside in path.iterdir():
            sync_tree(inside)
        sync_directory(path)
    else:
        with path.open("rb") as file:
            os.fsync(file.fileno())


@dataclass
class Storage:
    """Which ranks see the same files under a directory: all of them, or without a shared file system those of a node."""

    directory: Path
    ranks: list[int]  # that see the same files as this one

    @property
    def writes(self) -> bool:
        """Whether this rank writes what is written once: checkpoints' manifests, the exported model."""
        return distributed.rank() == self.ranks[0]

    @property
    def shared(self) -> bool:
        return len(self.ranks) == distributed.world_size()

    @property
    def part(self) -> tuple[int, int]:
        """This rank's place among those that see the same files, and their number: work on files is divided so."""
        return self.ranks.index(distributed.rank()), len(self.ranks)


def find_storage(directory: Path, setting: str = "training.output_dir") -> Storage:
    """Make the directory, and find out which ranks share it. A collective; raises UserError where it cannot be written to."""

    mine = directory / f".probe-{uuid.uuid4().hex}"

    def probe() -> None:
        with writable(directory, setting):
            directory.mkdir(parents=True, exist_ok=True)
            mine.touch()

    try:
        distributed.together(probe)
        seen = [(directory / name).exists() for name in distributed.gathered(mine.name)]
        seen_by_all = distributed.gathered(seen)  # nobody removes its own before all have looked
    finally:
        with contextlib.suppress(OSError):
            mine.unlink()
    return Storage(directory, [rank for rank, other in enumerate(seen_by_all) if other == seen])


@contextlib.contextmanager
def writable(directory: Path, setting: str = "training.output_dir"):
    """What is refused inside, because of the disk or its permissions, is a UserError about the setting."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{setting}={directory} cannot be written to: {error.strerror}") from error
