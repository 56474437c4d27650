"""The command line, `python -m pdl COMMAND`: one file of `pdl/commands/` per command, imported only when called."""

import argparse
import importlib
import sys

COMMANDS = {"train": "finetune a model from a configuration"}


def main(argv: list[str]) -> int:
    # The deepspeed launcher puts --local_rank=N before everything else; argparse wants it behind the command.
    leading = [argument for argument in argv[:1] if argument.startswith("--local_rank=")]
    argv = argv[len(leading) :]
    parser = argparse.ArgumentParser(prog="python -m pdl", description="Finetuning with the Power-Law Decay Loss.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in COMMANDS.items():
        command = commands.add_parser(name, help=help_text)
        if argv[:1] == [name]:
            module = importlib.import_module(f"pdl.commands.{name}")
            command.description = module.__doc__
            command.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(command)
    arguments = parser.parse_args(argv + leading)
    return module.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
