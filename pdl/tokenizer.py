"""Tokenizers: a pretrained one, or a SentencePiece model trained on the run's own data."""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from pdl.config import Config, UserError, first_line
from pdl.data import cache_directory
from pdl.records import examples


def load_tokenizer(name_or_path: str):
    """A pretrained tokenizer. Raises UserError when it cannot be had, or has no end of sequence or padding token to use."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:  # a dozen kinds, bare Exception from the tokenizers library among them
        raise UserError(
            f"the tokenizer {name_or_path} could not be loaded: {type(error).__name__}: {first_line(error)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {name_or_path} has no end-of-sequence token, which marks where a target ends")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked and unlabelled, so any token will do
    return tokenizer


def run_tokenizer(config: Config, data_hash: str):
    """The tokenizer that a configuration asks for: a pretrained one, or one trained on the training data and kept in the cache.

    data_hash: of the training examples (`examples_hash`).
    """
    if config.tokenizer.vocab_size is None:
        return load_tokenizer(config.tokenizer.name_or_path or config.model.name_or_path)
    made_from = json.dumps([data_hash, config.tokenizer.vocab_size, inspect.getsource(train_tokenizer)])
    directory = cache_directory() / f"tokenizer-{hashlib.sha256(made_from.encode()).hexdigest()[:32]}"
    if not directory.exists():
        train_tokenizer(_training_texts(config), config.tokenizer.vocab_size, directory)
    return load_tokenizer(str(directory))


def _training_texts(config: Config) -> Iterator[str]:
    empty = True
    for example in examples(config, "train"):
        for text in filter(None, (example.source, example.target)):
            empty = False
            yield text
    if empty:
        raise UserError(f"data.train={config.data.train} holds nothing to learn from: no text")


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: Path) -> None:
    """Train a SentencePiece BPE tokenizer that gives every text back unchanged, and save it in `directory`.

    SentencePiece's defaults collapse spaces and drop newlines, which destroys code; hence no normalisation, no dummy
    prefix, and bytes for what the vocabulary lacks. `directory` appears whole or not at all.
    Raises UserError when the texts are too few for `vocab_size`.
    """
    import sentencepiece
    from transformers import AutoTokenizer

    special = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>", "bos": "<s>"}
    refused: list[UserError] = []

    def sentences() -> Iterator[str]:
        try:
            yield from texts
        except UserError as error:
            refused.append(error)  # SentencePiece makes a RuntimeError of it
            raise

    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, suffix=".partial") as scratch:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=sentences(),
                model_prefix=f"{scratch}/tokenizer",
                model_type="bpe",
                vocab_size=vocab_size,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                byte_fallback=True,
                max_sentence_length=1 << 20,
                num_threads=1,  # the same model on every machine
                minloglevel=2,
                **{f"{name}_id": number for number, name in enumerate(special)},
                **{f"{name}_piece": piece for name, piece in special.items()},
            )
        except RuntimeError as error:
            if refused:
                raise refused[0] from error
            why = first_line(error).rpartition("] ")[2]  # what follows "INTERNAL: file.cc(744) [condition] "
            raise UserError(f"tokenizer.vocab_size={vocab_size} does not fit the training data: {why}") from error
        settings = {
            "tokenizer_class": "LlamaTokenizer",  # the one of transformers that reads BPE with bytes and keeps spaces
            "add_prefix_space": False,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            **{f"{name}_token": piece for name, piece in special.items()},
        }
        Path(scratch, "tokenizer_config.json").write_text(json.dumps(settings))
        whole = Path(scratch, "whole")
        AutoTokenizer.from_pretrained(scratch).save_pretrained(whole)
        try:
            whole.rename(directory)
        except OSError:  # another node may have been first, with the same tokenizer
            if not directory.exists():
                raise


def tokenizer_hash(tokenizer) -> str:
    """A hash of how texts become ids: vocabulary, merges, normalisation, special tokens."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.pop("truncation"), state.pop("padding")  # set by the last call, not part of the tokenizer
    else:  # written in Python, such as ByT5's
        state = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
