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
from pdl.data import Encoder, Example, TokenRows, examples, label_frequencies, text_frequencies, token_rows
from pdl.distributed import say
from pdl.frequencies import TokenFrequencies
from pdl.model import check_sharding, load_model_config
from pdl.tokenizer import run_tokenizer, tokenizer_hash
from pdl.weights import loss_weights


@dataclass
class Prepared:
    tokenizer: Any
    encoder: Encoder
    train: TokenRows
    validation: TokenRows
    frequencies: TokenFrequencies
    weights: torch.Tensor  # float32 [vocabulary]
    scored_split: str  # what is generated from at the end: test, or validation where there is no test
    scored: list[Example]
    made_with: dict  # must be the same when the run is continued


def prepare(config: Config) -> Prepared:
    """Tokenizer, token rows, frequencies and weights. Raises UserError, on all ranks, for data that cannot be used."""

    def read():
        check_sharding(config)
        tokenizer = run_tokenizer(config)
        settings = load_model_config(config, tokenizer)
        encoder = Encoder(
            tokenizer, settings.is_encoder_decoder, config.data.max_source_tokens, config.data.max_target_tokens
        )
        hashed = tokenizer_hash(tokenizer)
        train, validation = (token_rows(config, split, encoder, hashed, say) for split in ("train", "validation"))
        vocab_size = settings.get_text_config().vocab_size
        general = None
        if config.loss.general_corpus is not None:
            general = text_frequencies(Path(config.loss.general_corpus), tokenizer, hashed, vocab_size).counts
        scored = list(islice(examples(config, scored_split), config.evaluation.examples))
        if not scored and config.evaluation.examples:
            raise UserError(
                f"data.{scored_split}={getattr(config.data, scored_split)} holds no example to generate from"
            )
        return tokenizer, encoder, hashed, train, validation, vocab_size, general, scored

    scored_split = "test" if config.data.test is not None else "validation"
    tokenizer, encoder, hashed, train, validation, vocab_size, general, scored = distributed.first_then_rest(read)
    frequencies = label_frequencies(train, hashed, vocab_size, str(config.data.train))
    try:
        weights = loss_weights(config.loss, frequencies.counts, general)
    except ValueError as error:
        raise UserError(f"loss: {error}") from error
    made_with = {
        "zero_stage": config.zero_stage,
        "zero_optimization": config.deepspeed_sharding()["zero_optimization"],
        "seed": config.training.seed,
        "global_batch_size": config.training.global_batch_size,
        "train_rows": train.key,
        "validation_rows": validation.key,
        "frequencies": hashlib.sha256(frequencies.counts.numpy().tobytes()).hexdigest()[:32],
        "weights": hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:32],
    }
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
    return Prepared(tokenizer, encoder, train, validation, frequencies, weights, scored_split, scored, made_with)
