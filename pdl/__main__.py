"""The command line, `python -m pdl COMMAND`: one file of `pdl/commands/` per command, imported only when called."""

import argparse
import gc
import importlib
import sys

COMMANDS = {
    "train": "finetune a model from a configuration",
    "preflight": "look at all ranks of a launch: versions, data, disks, clocks, network",
    "count": "count the targets of a corpus, for training on it as a stream",
    "evaluate": "measure a finished run: cross-entropy by frequency, generated texts, scores",
    "checkpoints": "list, verify and prune the checkpoints of a run",
    "export": "make a model for from_pretrained of a checkpoint, without a GPU",
}


def main(argv: list[str]) -> int:
    # The deepspeed launcher puts --local_rank=N before everything else, where argparse expects the command.
    leading = [argument for argument in argv[:1] if argument.startswith("--local_rank=")]
    command, *others = argv[len(leading) :] or [""]
    if command not in COMMANDS:
        parser = argparse.ArgumentParser(prog="python -m pdl", description="Finetuning with the Power-Law Decay Loss.")
        commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        for name, help_text in COMMANDS.items():
            commands.add_parser(name, help=help_text)
        parser.parse_args(argv)  # ends with the help asked for, or with what is wrong
    module = importlib.import_module(f"pdl.commands.{command}")
    parser = argparse.ArgumentParser(
        prog=f"python -m pdl {command}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return module.main(parser.parse_intermixed_args(leading + others))  # options may stand between our overrides


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if "triton" not in sys.modules:  # which then complains of leaks, at length
        gc.freeze()  # the end of the process need not look through all that was imported: saves more than a second
    sys.exit(code)
