"""What a run needs before its model: tokenizer, token rows, frequencies, weights; made, checked and equal on every rank."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pdl import distributed
from pdl.config import Config, UserError
from pdl.cross_entropy import Loss, Objective
from pdl.data import Encoder, TokenRows, label_frequencies, load_frequencies, rows_key, text_frequencies, token_rows
from pdl.distributed import say
from pdl.frequencies import TokenFrequencies
from pdl.model import check_sharding, load_model_config
from pdl.records import Example, examples, examples_hash
from pdl.streaming import first_rows, stream_key
from pdl.tokenizer import run_tokenizer, tokenizer_hash
from pdl.weights import LossTables, loss_tables


@dataclass
class Prepared:
    tokenizer: Any
    encoder: Encoder
    train: TokenRows | None  # None where it is streamed
    validation: TokenRows
    frequencies: TokenFrequencies
    tables: LossTables
    scored_split: str  # what is generated from at the end: test, or validation where there is no test
    scored: list[Example]
    made_with: dict  # must be the same when the run is continued


def data_hashes(config: Config, *splits: str) -> dict[str, str]:
    """A hash of the examples of each split, the same on every rank. A collective: one rank of each node reads them."""
    hashes = distributed.once_per_node(lambda: {split: examples_hash(config, split) for split in splits})
    distributed.require_equal({f"data.{split}": hashed for split, hashed in hashes.items()})
    return hashes


def encoding(config: Config, data_hash: str) -> tuple[Any, Encoder, str, int]:
    """The tokenizer, the encoder, the tokenizer's hash and the rows of the model's vocabulary. A collective.

    data_hash: of the training examples.
    """

    def load():
        tokenizer = run_tokenizer(config, data_hash)
        settings = load_model_config(config, tokenizer)
        encoder = Encoder(
            tokenizer, settings.is_encoder_decoder, config.data.max_source_tokens, config.data.max_target_tokens
        )
        return tokenizer, encoder, tokenizer_hash(tokenizer), settings.get_text_config().vocab_size

    tokenizer, encoder, hashed, vocab_size = distributed.first_then_rest(load)
    distributed.require_equal({"the tokenizer": hashed, "the vocabulary": vocab_size})
    return tokenizer, encoder, hashed, vocab_size


def _counted_before(config: Config, key: str, hashed: str, vocab_size: int) -> TokenFrequencies:
    """What rank 0 finds in the file that `loss.frequencies` names. A collective.

    key: of the rows that are trained on. Counts of others may be meant; they are said to be.
    """
    path = Path(config.loss.frequencies)

    def load() -> TokenFrequencies | None:
        if distributed.rank() > 0:
            return None
        if not path.exists():
            raise UserError(
                f"loss.frequencies={path} does not exist: `python -m pdl count` with this configuration writes it"
            )
        return load_frequencies("loss.frequencies", path, hashed, vocab_size)

    frequencies = distributed.gathered(distributed.together(load))[0]
    if not frequencies.corpus.endswith(key):
        say(
            f"note: loss.frequencies={path} was not counted over this run's data and length limits, but over "
            f"{frequencies.corpus or 'a corpus without a name'}"
        )
    return frequencies


def tables_of(config: Config, counts: torch.Tensor, tokenizer, hashed: str) -> LossTables:
    """What a run's loss knows of each vocabulary row, its general corpus included. A collective. hashed: of the tokenizer."""
    general = None
    if config.loss.general_corpus is not None:
        general = text_frequencies(Path(config.loss.general_corpus), tokenizer, hashed, len(counts)).counts
    try:
        return loss_tables(config.loss, counts, general)
    except ValueError as error:
        raise UserError(f"loss: {error}") from error


def loss_of_run(config: Config, tables: LossTables) -> Loss:
    """What a run minimizes, on this rank's device."""
    device, loss = distributed.device(), config.loss
    return Loss(
        weights=tables.weights.to(device),
        reduction=loss.reduction,
        objective=Objective(
            label_smoothing=loss.label_smoothing, z_loss=loss.z_loss,
            certain=1.0 if loss.name == "dft" else 0.0, uncertain=loss.gamma or 0.0,
        ),
        untilt=None if tables.tilt is None else -tables.tilt.to(device),
        adjusted=loss.name == "logit_adjusted",
    )  # fmt: skip


def prepare(config: Config) -> Prepared:
    """Tokenizer, token rows, frequencies and weights. Raises UserError, on all ranks, for data that cannot be used."""

    distributed.together(lambda: check_sharding(config))
    hashes = data_hashes(config, "train", "validation")
    tokenizer, encoder, hashed, vocab_size = encoding(config, hashes["train"])
    train = None
    if config.data.streaming:
        train_key = stream_key(config, encoder, hashes["train"], hashed)
        distributed.together(lambda: first_rows(config, encoder))
    else:
        train = token_rows(config, "train", encoder, hashes["train"], hashed)
        train_key = train.key
    validation = token_rows(config, "validation", encoder, hashes["validation"], hashed)
    scored_split = "test" if config.data.test is not None else "validation"
    scored = distributed.once_per_node(lambda: list(islice(examples(config, scored_split), config.evaluation.examples)))
    if not scored and config.evaluation.examples:
        raise UserError(f"data.{scored_split}={getattr(config.data, scored_split)} holds no example to generate from")
    if config.loss.frequencies is not None:
        frequencies = _counted_before(config, rows_key(encoder, hashes["train"], hashed), hashed, vocab_size)
    else:
        frequencies = label_frequencies(train, hashed, vocab_size, str(config.data.train))
    tables = tables_of(config, frequencies.counts, tokenizer, hashed)
    weights = tables.weights
    made_with = {
        "zero_stage": config.zero_stage,
        "zero_optimization": config.deepspeed_sharding()["zero_optimization"],
        "seed": config.training.seed,
        "global_batch_size": config.training.global_batch_size,
        "train_rows": train_key,
        "validation_rows": validation.key,
        "frequencies": hashlib.sha256(frequencies.counts.numpy().tobytes()).hexdigest()[:32],
        "weights": hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:32],
    }
    if config.loss.name == "logit_adjusted":
        made_with["tilt"] = hashlib.sha256(tables.tilt.numpy().tobytes()).hexdigest()[:32]
    if config.data.stream_by == "shards":
        made_with["ranks (data.stream_by=shards)"] = distributed.world_size()
    distributed.require_equal(made_with)
    seen = int((frequencies.counts > 0).sum())
    share = float(
        (frequencies.counts * weights).sum() ** 2
        / (frequencies.total * (frequencies.counts * weights.double() ** 2).sum())
    )
    say(f"targets: {frequencies.total:,} tokens, {seen:,} of {vocab_size:,} vocabulary rows seen")
    say(
        f"loss: {config.loss.describe()}, weights {weights.min():.3g} to {weights.max():.3g}, effective sample fraction {share:.2f}"
    )
    return Prepared(tokenizer, encoder, train, validation, frequencies, tables, scored_split, scored, made_with)
