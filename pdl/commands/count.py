"""`python -m pdl count CONFIG.yaml [section.key=value ...]`: count the targets of the training data into a frequency file.

The file is the one that `loss.frequencies` names; a stream (`data.streaming=true`) needs it before training. Runs alone or
under torchrun, each rank counting its share. A count that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse

from pdl.commands.train import add_configuration, with_configuration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser)


def main(arguments: argparse.Namespace) -> int:
    return with_configuration(arguments, _count, ranks=1)  # a count fits any number, whatever the batches do


def _count(config) -> int:
    from pdl import distributed
    from pdl.config import UserError, flattened
    from pdl.prepare import data_hashes, encoding
    from pdl.streaming import count_corpus

    if config.loss.frequencies is None:
        raise UserError("loss.frequencies is missing: name the file to write, loss.frequencies=counts.safetensors")
    distributed.require_equal(flattened(config.to_dict()))
    data_hash = data_hashes(config, "train")["train"]
    _, encoder, tokenizer_hash, vocab_size = encoding(config, data_hash)
    count_corpus(config, encoder, data_hash, tokenizer_hash, vocab_size)
    return 0
