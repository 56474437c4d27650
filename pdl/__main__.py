"""The command line, `python -m pdl COMMAND`: one file of `pdl/commands/` per command, imported only when called."""

import argparse
import importlib
import sys

COMMANDS = {"train": "finetune a model from a configuration"}


def main(argv: list[str]) -> int:
    # The deepspeed launcher puts --local_rank=N before everything else, where argparse expects the command.
    leading = [argument for argument in argv[:1] if argument.startswith("--local_rank=")]
    command, *others = argv[len(leading) :] or [""]
    parser = argparse.ArgumentParser(prog="python -m pdl", description="Finetuning with the Power-Law Decay Loss.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in COMMANDS.items():
        described = commands.add_parser(name, help=help_text)
        if command == name:
            module = importlib.import_module(f"pdl.commands.{name}")
            described.description = module.__doc__
            described.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(described)
    # Options first: argparse takes no further positional arguments, our overrides, behind an option.
    ordered = sorted(leading + others, key=lambda argument: not argument.startswith("-"))
    arguments = parser.parse_args([command, *ordered] if command else ordered)
    return module.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
