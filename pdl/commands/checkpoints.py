"""`python -m pdl checkpoints RUN_DIR`: list and verify the checkpoints of a run, and what else lies beside them.

Every file is read and compared with its manifest. With --prune it says what it would delete: all but the newest whole
checkpoints, unfinished and discarded ones, and damaged ones while whole ones are kept. --yes deletes it.
Ends with 1 when a checkpoint is damaged, 2 when there is nothing to look at.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from pdl.config import UserError


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
        (damaged if problems else whole).append(checkpoint)
        ranks, stage = "?", "?"
        if not problems:
            manifest = read_manifest(checkpoint)
            ranks, stage = manifest["world_size"], manifest["made_with"]["zero_stage"]
        state = "whole" if not problems else "damaged: " + "; ".join(problems)
        print(f"{checkpoint.name:<28} {_size(checkpoint):>10}  {ranks:>5}  {stage:>4}  {state}")
    others = sorted(path for path in (directory / "checkpoints").iterdir() if path not in whole + damaged)
    for path in others:
        print(f"{path.name:<28} {_size(path):>10}  {'':>5}  {'':>4}  not used")
    if arguments.prune:
        doomed = whole[:-keep] + (damaged + others if whole else [])
        for path in doomed:
            print(f"{'deleted' if arguments.yes else 'would delete'} {path} ({_size(path)})")
            if arguments.yes:
                doomed_name = path.rename(path.with_name(f"deleting-{path.name}"))  # half of it is never a checkpoint
                (shutil.rmtree if doomed_name.is_dir() else os.remove)(doomed_name)
        if not doomed:
            print("nothing to delete")
        elif not arguments.yes:
            print("--yes deletes it")
    return 1 if damaged else 0


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"
