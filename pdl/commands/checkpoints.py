"""`python -m pdl checkpoints RUN_DIR`: list and verify the checkpoints of a run, and what else lies beside them.

Every file is read and compared with its manifest. With --prune it says what it would delete: all but the newest whole
checkpoints, unfinished and discarded ones, and damaged ones while whole ones are kept. --yes deletes it.
Ends with 1 when a checkpoint is damaged, 2 when there is nothing to look at.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import sys
from pathlib import Path

from pdl.config import UserError

# What a run leaves beside its checkpoints; whatever else a user put there stays.
_LEFT = re.compile(r"(\.?partial|damaged|discarded|deleting)-.*step-\d{8}.*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", metavar="RUN_DIR", type=Path)
    parser.add_argument("--prune", action="store_true", help="say what can be deleted")
    parser.add_argument("--keep", type=int, default=2, metavar="N", help="whole checkpoints that stay; default 2")
    parser.add_argument("--yes", action="store_true", help="with --prune: delete it")


def main(arguments: argparse.Namespace) -> int:
    try:
        return _main(arguments)
    except UserError as error:
        print(f"pdl: {error}", file=sys.stderr)
        return 2


def _main(arguments: argparse.Namespace) -> int:
    from pdl.checkpoint import checkpoints, read_manifest, verify
    from pdl.run_directory import LOCK, lock

    directory, keep = arguments.run_directory, arguments.keep
    if keep < 1 or (arguments.yes and not arguments.prune):
        raise UserError("--keep must be at least 1, and --yes goes with --prune")
    if not (directory / "checkpoints").is_dir():
        raise UserError(f"{directory} is not the directory of a run with checkpoints")
    if arguments.yes and (directory / LOCK).exists():
        lock(directory)  # nothing is deleted under a run that is going on

    whole, damaged = [], []
    print(f"{'checkpoint':<28} {'size':>10}  {'ranks':>5}  {'ZeRO':>4}  state")
    for checkpoint in checkpoints(directory):
        problems = verify(checkpoint)
        if not checkpoint.exists():
            continue  # a run that goes on has deleted it
        (damaged if problems else whole).append(checkpoint)
        ranks, stage = "?", "?"
        if not problems:
            manifest = read_manifest(checkpoint)
            ranks, stage = manifest["world_size"], manifest["made_with"]["zero_stage"]
        state = "whole" if not problems else "damaged: " + "; ".join(problems)
        print(f"{checkpoint.name:<28} {_size(checkpoint):>10}  {ranks:>5}  {stage:>4}  {state}")
    others = [path for path in sorted((directory / "checkpoints").iterdir()) if _LEFT.fullmatch(path.name)]
    for path in others:
        print(f"{path.name:<28} {_size(path):>10}  {'':>5}  {'':>4}  not used")
    if arguments.prune:
        doomed = whole[:-keep] + (damaged + others if whole else [])
        for path in doomed:
            print(f"{'deleted' if arguments.yes else 'would delete'} {path} ({_size(path)})")
            if arguments.yes:
                shutil.rmtree(path.rename(path.with_name(f"deleting-{path.name}")))  # half of it is never a checkpoint
        if not doomed:
            print("nothing to delete")
        elif not arguments.yes:
            print("--yes deletes it")
    return 1 if damaged else 0


def _size(path: Path) -> str:
    total = 0
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a run that goes on deletes and renames
            total += file.stat().st_size if file.is_file() else 0
    return f"{total / 1e6:,.1f} MB"
