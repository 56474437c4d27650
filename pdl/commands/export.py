"""`python -m pdl export CHECKPOINT OUTPUT_DIR`: the model of a checkpoint, as a directory that `from_pretrained` loads.

One process, no GPU, no launcher. The files are those that a run which ends at this step leaves in `model/`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pdl.config import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="a checkpoint (RUN_DIR/checkpoints/step-00000100), or a run directory: its newest whole one",
    )
    parser.add_argument("target", metavar="OUTPUT_DIR", type=Path, help="a directory that is not there yet")


def main(arguments: argparse.Namespace) -> int:
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for one when it is imported
    from transformers.utils import logging

    from pdl.export import export_checkpoint

    logging.disable_progress_bar()
    try:
        checkpoint = _whole(arguments.checkpoint)
        export_checkpoint(checkpoint, arguments.target)
    except UserError as error:
        print(f"pdl: {error}", file=sys.stderr)
        return 2
    print(f"{checkpoint} exported to {arguments.target}")
    return 0


def _whole(path: Path) -> Path:
    """The checkpoint that a path names. Raises UserError when it is damaged, or none."""
    from pdl.checkpoint import newest_whole, verify

    if not path.is_dir():
        raise UserError(f"{path} is not a directory")
    if (path / "checkpoints").is_dir():
        return newest_whole(path)
    if problems := verify(path):
        raise UserError("\n  - ".join([f"{path} is not a whole checkpoint", *problems]))
    return path
