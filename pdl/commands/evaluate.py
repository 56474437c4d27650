"""`python -m pdl evaluate RUN_DIR [--split validation]`: what a finished run's model knows, and how it writes.

Cross-entropy by frequency with PDL's tilt and without it, calibration; texts, greedy unless told otherwise, scored as the recipe
does and by repetition, diversity and rare tokens; beside them systems that need no model. Figures and texts go to
RUN_DIR/evaluations/. Alone it is one process; under torchrun ranks share the work, and the texts are the same.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from pdl.commands.train import on_ranks
from pdl.config import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", type=Path)
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test")
    parser.add_argument("--examples", type=int, help="the first so many of the split; default: all")
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--sample", action="store_true", help="draw instead of taking the most likely token")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tilt", type=float, default=0.0, metavar="STRENGTH",
        help="add so much of log w to the logits: -1 takes the lean of PDL training out, 1 puts it onto another model",
    )  # fmt: skip
    parser.add_argument("--alpha", type=float, help="of the tilt's w; default: the run's own loss")
    parser.add_argument("--name", help="of the files in RUN_DIR/evaluations; default: split and decoding")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's


def main(arguments: argparse.Namespace) -> int:
    def work() -> int:
        from pdl.evaluate import evaluate
        from pdl.generate import Decoding

        _check(arguments)
        decoding = Decoding(
            arguments.beams, arguments.sample, arguments.temperature, arguments.top_p, arguments.seed, arguments.tilt
        )
        alpha = "" if arguments.alpha is None else f", alpha {arguments.alpha:g}"
        name = arguments.name or f"{arguments.split}, {decoding.describe()}{alpha}".replace(", ", "-").replace(" ", "_")
        return evaluate(arguments.run, arguments.split, arguments.examples, decoding, arguments.alpha, name)

    return on_ranks(work)


def _check(arguments: argparse.Namespace) -> None:
    problems = [
        (arguments.examples is not None and arguments.examples < 1, "--examples must be at least 1"),
        (arguments.beams < 1, "--beams must be at least 1"),
        (arguments.sample and arguments.beams > 1, "--sample draws one text, --beams searches: give one of them"),
        (not arguments.sample and (arguments.temperature, arguments.top_p) != (1.0, 1.0), "--temperature and --top-p need --sample"),
        (not (math.isfinite(arguments.temperature) and arguments.temperature > 0), "--temperature must be finite and > 0"),
        (not 0 < arguments.top_p <= 1, "--top-p must lie in (0, 1]"),
        (not math.isfinite(arguments.tilt), "--tilt must be finite"),
        (arguments.alpha is not None and not arguments.tilt, "--alpha is of --tilt: without it it does nothing"),
        (arguments.name is not None and Path(arguments.name).name != arguments.name, "--name must be a file's name"),
    ]  # fmt: skip
    found = [message for wrong, message in problems if wrong]
    if found:
        raise UserError("\n  - ".join(["evaluate cannot do this", *found]))
