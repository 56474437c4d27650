"""`python -m pdl train CONFIG.yaml [section.key=value ...]`: finetune a model, from data files to an exported model.

Alone it is one process; under torchrun or deepspeed it is one rank of many.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from pdl.config import Config, UserError, load_config


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that reads a configuration and may be one rank of many."""
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="values over those of the file, in YAML; null is the default",
    )
    # Given by the deepspeed launcher, which also sets LOCAL_RANK.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser)
    parser.add_argument("--check", action="store_true", help="validate config and data, and end")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration, and end")


def main(arguments: argparse.Namespace) -> int:
    if arguments.print_config:
        try:
            config = load_config(arguments.config, arguments.overrides, int(os.environ.get("WORLD_SIZE", "1")))
        except UserError as error:
            print(f"pdl: {error}", file=sys.stderr)
            return 2
        print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
        return 0

    def work(config: Config) -> int:
        from pdl.run import check, train

        return check(config) if arguments.check else train(config)

    return with_configuration(arguments, work)


def with_configuration(arguments: argparse.Namespace, work: Callable[[Config], int], ranks: int | None = None) -> int:
    """Do `work` with the configuration, as one rank of those that the environment describes. Returns the exit code.

    ranks: the number that the configuration is to fit; default: those there are.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        # Nobody to agree with: what is wrong is said before the libraries are imported, which takes seconds.
        try:
            load_config(arguments.config, arguments.overrides)
        except UserError as error:
            print(f"pdl: {error}", file=sys.stderr)
            return 2

    def with_it() -> int:
        from pdl import distributed, preflight

        return work(
            preflight.on_every_host(
                lambda: load_config(arguments.config, arguments.overrides, ranks or distributed.world_size())
            )
        )

    return on_ranks(with_it)


def on_ranks(work: Callable[[], int]) -> int:
    """Do `work` as one rank of those that the environment describes. Returns the exit code."""
    from pdl import watch

    watch.start()  # before the imports, which take seconds
    from transformers.utils import logging

    from pdl import distributed

    logging.disable_progress_bar()
    try:
        distributed.start()
    except UserError as error:
        if os.environ["RANK"] == "0":
            print(f"pdl: {error}", file=sys.stderr)
        return _refused()
    except distributed.RunFailed as error:  # who could say it for all is not known
        print(f"pdl: rank {os.environ['RANK']} on {error}", file=sys.stderr)
        return 1
    try:
        code = work()
    except UserError as error:
        distributed.say(f"pdl: {error}", file=sys.stderr)
        code = _refused()
    except distributed.RunFailed as error:  # on every rank alike, before there is a run
        distributed.say(f"pdl: {error}", file=sys.stderr)
        code = 1
    watch.end()
    distributed.stop()
    return code


def _refused() -> int:
    """The exit code. A run that is refused before it owns its directory leaves no status.json: our launch scripts look here."""
    if "PDL_REFUSED" in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(os.environ["PDL_REFUSED"]).touch()
    return 2
