"""From examples to batches: token rows in a cache, and the order in which every layout sees them."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import json
import math
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from pdl import distributed
from pdl.config import Config, UserError
from pdl.frequencies import TokenFrequencies
from pdl.records import Example, examples, source_hash
from pdl.storage import find_storage

IGNORE = -100  # the label of a position that takes no part in the loss
_FORMAT = 1  # of the cached rows; raised when the meaning of a row changes
BLOCK = 1000  # examples, or lines, that are tokenized together and by one rank
_LEFT_OVER = 7 * 24 * 3600  # seconds after which nobody still writes to a partial file
_ROWS_COPIED = 4096  # at a time, where a selection of rows is counted: bounds memory


# --- token rows ---


@dataclass
class Encoder:
    """Turns examples into token rows whose labels are aligned with the logits. The shift of decoder-only models is here and nowhere else."""

    tokenizer: Any
    is_encoder_decoder: bool
    max_source_tokens: int
    max_target_tokens: int

    @property
    def prefix(self) -> list[int]:
        """What the tokenizer puts before a text: `[bos]` or nothing."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("").input_ids[:1] == [bos] else []

    def sources(self, texts: list[str]) -> list[list[int]]:
        """What the model is given: the encoder's input, or a decoder-only model's prompt, whose beginning is cut when it is too long."""
        if self.is_encoder_decoder:
            rows = self.tokenizer(texts, truncation=True, max_length=self.max_source_tokens).input_ids
            return [row or [self.tokenizer.eos_token_id] for row in rows]  # an encoder needs something to read
        prefix = self.prefix
        keep = self.max_source_tokens - len(prefix)
        prompts = self.tokenizer(texts, add_special_tokens=False).input_ids
        return [prefix + prompt[max(0, len(prompt) - keep) :] for prompt in prompts]

    def targets(self, texts: list[str]) -> list[list[int]]:
        """What is to be learned, with EOS where the text really ends: a target that was cut has none, so nothing teaches to stop there."""
        eos = self.tokenizer.eos_token_id
        special = self.is_encoder_decoder  # a decoder-only model has its prompt before the target, not a prefix
        targets = self.tokenizer(text_target=texts, add_special_tokens=special).input_ids
        ended = [target if target[-1:] == [eos] else [*target, eos] for target in targets]
        return [target[: self.max_target_tokens] for target in ended]

    def rows(self, batch: list[Example]) -> tuple[list[dict], Counter]:
        """`{input_ids, labels}` of each example that has something to learn, and how many were dropped or cut."""
        report = Counter(examples=len(batch))
        kept = [example for example in batch if example.target.strip()]
        report["empty targets dropped"] = len(batch) - len(kept)
        if not kept:
            return [], report
        rows = []
        # Targets last: a tokenizer keeps the truncation of its last call, also when it is saved.
        sources = self.sources([example.source for example in kept])
        targets = self.targets([example.target for example in kept])
        for source, target in zip(sources, targets, strict=True):
            if target == [self.tokenizer.eos_token_id]:
                report["targets without a token dropped"] += 1
                continue
            report["sources at or over the length limit"] += len(source) >= self.max_source_tokens
            report["targets cut at the length limit"] += target[-1] != self.tokenizer.eos_token_id
            if self.is_encoder_decoder:
                row = {"input_ids": source, "labels": target}
            else:
                # Position i predicts token i + 1. The first token of an empty prompt is predicted by nothing.
                row = {"input_ids": (source + target)[:-1], "labels": ([IGNORE] * len(source) + target)[1:]}
            rows.append(row)
        report["rows"] = len(rows)
        return rows, report


def cache_directory() -> Path:
    return Path(
        os.environ.get("PDL_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "power-law-decay"
    )


@dataclass
class TokenRows:
    """The token rows of one split: memory-mapped Arrow columns `input_ids` and `labels`, and the key they are cached under."""

    table: Any  # datasets.Dataset
    key: str
    report: dict[str, int]

    def __len__(self) -> int:
        return len(self.table)

    def count(self, vocab_size: int, rank: int = 0, world_size: int = 1) -> TokenFrequencies:
        """Count this rank's share of the labels; the shares of all ranks are the whole split, each row once."""
        start, stop = (len(self) * r // world_size for r in (rank, rank + 1))
        return TokenFrequencies.from_labels(column_values(self.table, "labels", start, stop), vocab_size)


def column_values(table, column: str, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
    """The values of a list column in pieces, flattened, zero-copy where the rows stand together; their order is not kept.

    table: a `datasets.Dataset`, also one that was shuffled or selected from: rows are visited in the order they are stored in.
    """
    stop = len(table) if stop is None else stop
    values = table.data.column(column)
    if table._indices is None:
        for chunk in values.slice(start, stop - start).chunks:
            yield _flat(chunk)
        return
    stored = np.sort(table._indices.column(0).slice(start, stop - start).to_numpy().astype(np.int64))
    first = 0  # stored row of the chunk's beginning
    for chunk in values.chunks:
        begin, end = np.searchsorted(stored, [first, first + len(chunk)])
        rows = stored[begin:end] - first
        first += len(chunk)
        if (np.diff(rows) == 1).all():
            yield _flat(chunk.slice(rows[0] if len(rows) else 0, len(rows)))
        else:
            for few in np.split(rows, range(_ROWS_COPIED, len(rows), _ROWS_COPIED)):
                yield _flat(chunk.take(few))


def _flat(lists) -> torch.Tensor:
    flat = lists.flatten()  # not .values, which ignores the slice
    return torch.from_dlpack(flat.drop_null() if flat.null_count else flat)


def rows_key(encoder: Encoder, data_hash: str, tokenizer_hash: str) -> str:
    """A hash of all that token rows depend on."""
    made_from = [
        _FORMAT, data_hash, tokenizer_hash, inspect.getsource(Encoder),
        encoder.is_encoder_decoder, encoder.max_source_tokens, encoder.max_target_tokens,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]


def token_rows(config: Config, split: str, encoder: Encoder, data_hash: str, tokenizer_hash: str) -> TokenRows:
    """Tokenize a split, or open it from the cache. A collective: the ranks that share a cache share the work.

    data_hash: of the split's examples (`examples_hash`). The key covers all that the rows depend on.
    Raises UserError for data that cannot be used: no record, no target left, a missing field, an invalid line.
    """
    import datasets

    key = rows_key(encoder, data_hash, tokenizer_hash)
    path = cache_directory() / f"{key}.arrow"
    if not all(distributed.gathered(path.exists())):
        _tokenize(config, split, encoder, path)
    report = json.loads(path.with_suffix(".json").read_text())
    source = getattr(config.data, split)
    if not report.get("rows"):
        why = ", ".join(f"{count} {name}" for name, count in report.items() if count) or "no record"
        raise UserError(f"data.{split}={source} holds nothing to learn from: {why}")
    notes = ", ".join(f"{count} {name}" for name, count in report.items() if count and name not in ("examples", "rows"))
    distributed.say(f"data.{split}: {report['rows']} examples" + (f" ({notes})" if notes else ""))
    return TokenRows(datasets.Dataset.from_file(str(path)), key, report)


_ROW = pa.list_(pa.int32())
_SCHEMA = pa.schema({"input_ids": _ROW, "labels": _ROW})


def _tokenize(config: Config, split: str, encoder: Encoder, path: Path) -> None:
    """Write the rows of a split, and beside them what was dropped and cut. A collective.

    Each rank that sees the same cache tokenizes every n-th block of examples; one of them puts the blocks together in their order.
    """
    storage = find_storage(path.parent, "PDL_CACHE")
    part, parts = storage.part
    wanted, name = distributed.gathered((not path.exists(), f"{path.name}.{uuid.uuid4().hex}.partial"))[
        storage.ranks[0]
    ]
    shards = path.with_name(name)  # a directory of this launch: another one may do the same now

    def own_blocks() -> dict | None:
        if not wanted:
            return None
        if storage.writes:
            _remove_leftovers(path.parent)
        shards.mkdir(exist_ok=True)
        report: Counter = Counter()
        with pa.OSFile(str(shards / f"{part}.arrow"), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
            for batch in islice(batched(examples(config, split), BLOCK), part, None, parts):
                rows, counted = encoder.rows(batch)
                report.update(counted)
                columns = [pa.array([row[column] for row in rows], _ROW) for column in _SCHEMA.names]
                writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        return dict(report)

    def join(reports: list[dict]) -> None:
        with whole_file(path) as whole:
            if parts == 1:
                (shards / "0.arrow").rename(whole)
            else:
                with contextlib.ExitStack() as opened:
                    files = [opened.enter_context(pa.memory_map(str(shards / f"{i}.arrow"))) for i in range(parts)]
                    in_turn = itertools.zip_longest(*map(pa.ipc.open_stream, files))
                    file = opened.enter_context(pa.OSFile(str(whole), "wb"))
                    writer = opened.enter_context(pa.ipc.new_stream(file, _SCHEMA))
                    for block in itertools.chain.from_iterable(in_turn):
                        if block is not None:
                            writer.write_batch(block)
            with whole_file(path.with_suffix(".json")) as notes:  # before the rows: where they are, it is
                notes.write_text(json.dumps(sum(map(Counter, reports), Counter())))

    try:
        what = f"filling the cache {path.parent}"
        reports = distributed.gathered(distributed.together(own_blocks, what))
        distributed.together(
            lambda: join([reports[rank] for rank in storage.ranks]) if wanted and storage.writes else None, what
        )
    finally:
        if storage.writes:
            shutil.rmtree(shards, ignore_errors=True)


def _remove_leftovers(cache: Path) -> None:
    """What launches that were killed have left in the cache: nothing in it was written to for a week."""
    for partial in cache.glob("*.partial"):
        with contextlib.suppress(OSError):  # another launch is removing it, too
            if time.time() - max(path.stat().st_mtime for path in (partial, *partial.glob("*"))) > _LEFT_OVER:
                partial.unlink() if partial.is_file() else shutil.rmtree(partial)


def text_frequencies(path: Path, tokenizer, tokenizer_hash: str, vocab_size: int) -> TokenFrequencies:
    """Token counts of a general corpus: a frequency file, or a text, counted once by all ranks together and cached. A collective.

    Raises UserError for a frequency file of another tokenizer or vocabulary.
    """
    if path.suffix == ".safetensors":
        return load_frequencies("loss.general_corpus", path, tokenizer_hash, vocab_size)
    made_from = [distributed.once_per_node(lambda: source_hash(str(path))), tokenizer_hash, vocab_size]
    distributed.require_equal({"loss.general_corpus": made_from})
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]
    cached = cache_directory() / f"text-{key}.safetensors"
    if all(distributed.gathered(cached.exists())):
        return load_frequencies("loss.general_corpus", cached, tokenizer_hash, vocab_size)

    def own_lines() -> TokenFrequencies:
        try:
            with path.open(encoding="utf-8-sig") as lines:
                own = islice(batched(lines, BLOCK), distributed.rank(), None, distributed.world_size())
                ids = (tokenizer(batch, add_special_tokens=False).input_ids for batch in own)
                pieces = (torch.tensor([token for line in batch for token in line]) for batch in ids)
                return TokenFrequencies.from_labels(pieces, vocab_size, tokenizer_hash=tokenizer_hash, corpus=str(path))
        except UnicodeDecodeError as error:
            raise UserError(f"loss.general_corpus={path} is not a UTF-8 text: {error}") from error

    counted = distributed.together(own_lines).all_reduce()
    if counted.total == 0:
        raise UserError(f"loss.general_corpus={path} holds no text")
    return _kept(counted, cached)


def load_frequencies(setting: str, path: Path, tokenizer_hash: str, vocab_size: int) -> TokenFrequencies:
    """A frequency file. Raises UserError, naming the setting, for one of another tokenizer or vocabulary."""
    try:
        frequencies = TokenFrequencies.load(path)
    except ValueError as error:
        raise UserError(f"{setting}: {error}") from error
    if frequencies.tokenizer_hash != tokenizer_hash or len(frequencies.counts) != vocab_size:
        raise UserError(
            f"{setting}={path} was counted with another tokenizer or vocabulary ({len(frequencies.counts)} rows, tokenizer "
            f"{frequencies.tokenizer_hash[:12] or 'not named'}); the model has {vocab_size} rows, tokenizer {tokenizer_hash[:12]}"
        )
    return frequencies


def label_frequencies(rows: TokenRows, tokenizer_hash: str, vocab_size: int, corpus: str) -> TokenFrequencies:
    """Counts over all labels of a split: each rank counts its share, the sum is cached under a key of its own. A collective."""
    cached = cache_directory() / f"labels-{rows.key}-{vocab_size}.safetensors"
    if all(distributed.gathered(cached.exists())):
        return TokenFrequencies.load(cached)
    frequencies = rows.count(vocab_size, distributed.rank(), distributed.world_size()).all_reduce()
    frequencies.tokenizer_hash, frequencies.corpus = tokenizer_hash, corpus
    return _kept(frequencies, cached)


def _kept(frequencies: TokenFrequencies, path: Path) -> TokenFrequencies:
    """The same, in the cache of each node for the next run."""

    def keep() -> None:
        if distributed.local_rank() == 0:
            with whole_file(path) as partial:
                frequencies.save(partial)

    distributed.together(keep, f"filling the cache {path.parent}")
    return frequencies


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write under; the file gets its real one at the end, so that nobody reads half of it. Several nodes may write at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def batched(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


# --- batches ---


class Batch(NamedTuple):
    """One micro-batch: the model's keyword arguments, and labels `[batch, sequence]` aligned with the logits."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch({name: tensor.to(device) for name, tensor in self.inputs.items()}, self.labels.to(device))


@dataclass
class Collator:
    """Pads rows on the right to the longest of the micro-batch.

    decoder_start_token_id: the first decoder input of an encoder-decoder, whose decoder sees the labels shifted by one;
    None for decoder-only models.
    """

    pad_token_id: int
    decoder_start_token_id: int | None = None

    def __call__(self, rows: list[dict]) -> Batch:
        inputs = padded([row["input_ids"] for row in rows], self.pad_token_id)
        labels = padded([row["labels"] for row in rows], IGNORE)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        attention_mask = (torch.arange(inputs.shape[1]) < lengths[:, None]).long()
        arguments = {"input_ids": inputs, "attention_mask": attention_mask}
        if self.decoder_start_token_id is not None:
            start = torch.full_like(labels[:, :1], self.decoder_start_token_id)
            arguments["decoder_input_ids"] = torch.cat(
                [start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORE, self.pad_token_id)], dim=1
            )
        return Batch(arguments, labels)


def padded(sequences: list[list[int]], value: int, side: str = "right") -> torch.Tensor:
    """int64 `[batch, longest]`."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def unlabelled(row: dict) -> dict:
    """A row that the model reads and learns nothing from: it fills up a batch."""
    return {**row, "labels": [IGNORE] * len(row["labels"])}


@dataclass
class GlobalBatches:
    """The order of the data, the same for every number of ranks.

    Epoch e is a permutation of the n rows by (seed, e); the epochs stand one after another, and global batch k is rows
    [kB, (k+1)B) of that stream, so that resuming needs k alone. It is cut into micro-batches; micro-batch j of the
    window goes to rank j mod world_size. Only the very last window can be short: it is filled up with rows without labels,
    which are neutral under sums.
    """

    rows: TokenRows
    collator: Collator
    seed: int
    global_batch_size: int
    micro_batch_size: int
    epochs: float | None = None  # None: the stream has no end

    def __post_init__(self):
        self._permutations: dict[int, torch.Tensor] = {}

    @property
    def steps(self) -> int:
        """Windows in all the epochs."""
        return -(-self._end // self.global_batch_size)

    @property
    def _end(self) -> int:
        return math.ceil(round(self.epochs * len(self.rows), 6))  # 1.1 * 10 is a little over 11

    def row_numbers(self, step: int) -> list[int]:
        """The dataset rows of global batch `step`, in order."""
        first = step * self.global_batch_size
        last = first + self.global_batch_size
        if self.epochs is not None:
            last = min(last, self._end)
        return [
            int(self._permutation(position // len(self.rows))[position % len(self.rows)])
            for position in range(first, last)
        ]

    def window(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """This rank's micro-batches of one optimizer step."""
        numbers = self.row_numbers(step)
        table = self.rows.table
        micro_batches = []
        for start in range(rank * self.micro_batch_size, self.global_batch_size, world_size * self.micro_batch_size):
            real = numbers[start : start + self.micro_batch_size]
            rows = [table[number] for number in real]
            if len(rows) < self.micro_batch_size:
                filler = unlabelled(rows[0] if rows else table[numbers[0]])
                rows += [filler] * (self.micro_batch_size - len(rows))
            micro_batches.append(self.collator(rows))
        return micro_batches

    def _permutation(self, epoch: int) -> torch.Tensor:
        if epoch not in self._permutations:
            digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            self._permutations[epoch] = torch.randperm(len(self.rows), generator=generator)
        return self._permutations[epoch]


def validation_batches(rows: TokenRows, collator: Collator, size: int, rank: int, world_size: int) -> Iterator[Batch]:
    """Whole batches in a fixed order, batch b to rank b mod world_size, so that padding does not depend on the layout.

    Every rank gets the same number of batches, as ZeRO-3 needs it: the last ones may be fillers without labels.
    """
    batches = -(-len(rows) // size)
    for first in range(0, batches, world_size):
        number = first + rank
        if number < batches:
            yield collator([rows.table[i] for i in range(number * size, min((number + 1) * size, len(rows)))])
        else:
            yield collator([unlabelled(rows.table[0])])
