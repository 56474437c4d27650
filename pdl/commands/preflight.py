"""`python -m pdl preflight CONFIG.yaml [section.key=value ...]`: look at all ranks of a launch, and train nothing.

Run it as training is run: alone, or under torchrun, deepspeed, or a cluster's launcher. It compares versions, code,
configuration and data of all ranks, writes to the output directory, reads the clocks, tries the collectives and measures
them, and prints a table of the hosts. Ends with 2, on every rank, with what is wrong and on which host.
Training on several ranks begins with the same; PDL_PREFLIGHT=0 leaves it out there.
"""

from __future__ import annotations

import argparse

from pdl.commands.train import add_configuration, with_configuration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser)


def main(arguments: argparse.Namespace) -> int:
    def work(config) -> int:
        from pdl.preflight import inspect

        inspect(config)
        return 0

    return with_configuration(arguments, work)
