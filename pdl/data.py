"""From files to batches: records, examples, token rows in a cache, and the order in which every layout sees them."""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pdl import distributed
from pdl.config import Config, UserError, first_line, hub_address, recipe_path
from pdl.frequencies import TokenFrequencies

IGNORE = -100  # the label of a position that takes no part in the loss
_FORMAT = 1  # of the cached rows; raised when the meaning of a row changes
_ROWS_COPIED = 4096  # at a time, where a selection of rows is counted: bounds memory


class Example(NamedTuple):
    """One thing to learn: the model sees `source` and is supervised on `target`. `references` are what outputs are scored against."""

    source: str
    target: str
    references: tuple[str, ...]


# --- records and examples ---


def records(source: Any) -> Iterator[tuple[str, dict]]:
    """The records of a `data.*` value, each with the place it stands at ("file.jsonl:17"). Raises UserError naming that place."""
    if isinstance(source, dict):
        yield from _parallel_records(source["source"], source["target"])
    elif source.startswith("hub:"):
        for number, record in enumerate(hub_dataset(source)):
            yield f"{source} row {number}", record
    else:
        reader = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}[
            Path(source).suffix
        ]
        for number, record in reader(Path(source)):
            if not isinstance(record, dict):
                raise UserError(
                    f"{source}:{number}: a record must be an object with fields, not {type(record).__name__}"
                )
            yield f"{source}:{number}", record


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}:{number}: not valid JSON: {error}") from error


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        whole = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(whole, list):
        raise UserError(f"{path} must hold a list of records; for one record a line name it .jsonl")
    yield from enumerate(whole, 1)


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(1 << 27)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            for record in reader:
                if None in record or None in record.values():
                    raise UserError(
                        f"{path}:{reader.line_num}: the row does not have the {len(reader.fieldnames)} columns of the header"
                    )
                yield reader.line_num, record
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{reader.line_num}: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        yield from enumerate((record for batch in batches for record in batch.to_pylist()), 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from error


def _parallel_records(source: str, target: str) -> Iterator[tuple[str, dict]]:
    with open(source, "rb") as source_lines, open(target, "rb") as target_lines:
        sizes = [sum(1 for _ in lines) for lines in (source_lines, target_lines)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"parallel files must have as many lines as each other: {source} has {sizes[0]}, {target} has {sizes[1]}"
            )
        source_lines.seek(0), target_lines.seek(0)
        for number, pair in enumerate(zip(source_lines, target_lines, strict=True), 1):
            record = {}
            for name, path, line in zip(("source", "target"), (source, target), pair, strict=True):
                try:
                    record[name] = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}:{number}: {error}") from error
            yield f"{source}:{number}", record


@functools.cache
def hub_dataset(source: str):
    """The `datasets.Dataset` of `hub:owner/name[/config][@revision]:split`. Raises UserError when it cannot be had."""
    import datasets

    address = hub_address(source)
    try:
        return datasets.load_dataset(
            address["repository"], address["config"], split=address["split"], revision=address["revision"]
        )
    except Exception as error:  # the library raises a dozen kinds, OSError and ValueError among them
        raise UserError(
            f"{source} could not be loaded from the hub: {type(error).__name__}: {first_line(error)}\n"
            "    Without a network, give a local file (data.train=my.jsonl), or fill the cache where there is one and set HF_HUB_OFFLINE=1 here."
        ) from error


def load_recipe(task: str | None):
    """The module of a recipe, with its `examples(record)` and `scores(predictions, examples)`; None without a task."""
    if task is None:
        return None
    path = recipe_path(task)
    spec = importlib.util.spec_from_file_location(f"recipe_{path.parent.name}", path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    for name in ("examples", "scores"):
        if not callable(getattr(recipe, name, None)):
            raise UserError(f"{path} has no function {name}")
    return recipe


def examples(config: Config, split: str) -> Iterator[Example]:
    """The examples of a split, in order. The recipe sees each record with `source` and `target` under those names.

    Raises UserError naming the place of a record that lacks a field, or whose fields are not what the recipe reads.
    """
    recipe = load_recipe(config.task)
    columns = {"source": config.data.source_field, "target": config.data.target_field}
    for place, record in records(getattr(config.data, split)):
        fields = {name: value for name, value in record.items() if columns.get(name) is None}
        fields |= {name: record[column] for name, column in columns.items() if column in record}
        if "target" in fields and fields["target"] is None:
            fields["target"] = ""  # dropped and counted with the empty ones
        try:
            if recipe:
                for example in recipe.examples(fields):
                    yield _checked(example)
            else:
                yield _checked(Example(fields["source"], fields["target"], (fields["target"],)))
        except KeyError as error:
            missing = error.args[0]
            hint = f"; set data.{missing}_field to one of them" if missing in columns else ""
            raise UserError(
                f"{place} has no field {columns.get(missing) or missing!r}; its fields are {', '.join(record)}{hint}"
            ) from error
        except (TypeError, AttributeError, IndexError, ValueError) as error:
            kinds = ", ".join(f"{name} ({type(value).__name__})" for name, value in record.items())
            raise UserError(f"{place} cannot be read as an example: {error}; its fields are {kinds}") from error


def _checked(example: Example) -> Example:
    for text in (example.source, example.target, *example.references):
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is not a text")
        text.encode()  # half of a surrogate pair ("\ud83d" in JSON) is no text that a tokenizer takes
    return example


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


def source_hash(source: Any) -> str:
    """A hash of what a `data.*` value holds now: file contents and their format, or the hub's fingerprint."""
    if isinstance(source, dict):
        return "+".join(source_hash(path) for path in (source["source"], source["target"]))
    if source.startswith("hub:"):
        return hub_dataset(source)._fingerprint
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() + Path(source).suffix


def examples_hash(config: Config, split: str) -> str:
    """A hash of the examples of a split: the data, and how the recipe reads it."""
    recipe = recipe_path(config.task).read_text(encoding="utf-8") if config.task else ""
    made_from = [source_hash(getattr(config.data, split)), recipe, config.data.source_field, config.data.target_field]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


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


def token_rows(
    config: Config, split: str, encoder: Encoder, tokenizer_hash: str, say: Callable[[str], None]
) -> TokenRows:
    """Tokenize a split, or open it from the cache. The key covers all that the rows depend on.

    Raises UserError for data that cannot be used: no record, no target left, a missing field, an invalid line.
    """
    import datasets
    import pyarrow as pa

    made_from = [
        _FORMAT, examples_hash(config, split), tokenizer_hash, inspect.getsource(Encoder),
        encoder.is_encoder_decoder, encoder.max_source_tokens, encoder.max_target_tokens,
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]
    path = cache_directory() / f"{key}.arrow"
    if not path.exists():
        report: Counter = Counter()
        row_type = pa.list_(pa.int32())
        schema = pa.schema({"input_ids": row_type, "labels": row_type})
        with _whole(path) as partial:
            with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                for batch in _batched(examples(config, split), 1000):
                    rows, counted = encoder.rows(batch)
                    report.update(counted)
                    columns = [pa.array([row[name] for row in rows], row_type) for name in schema.names]
                    writer.write_batch(pa.record_batch(columns, schema=schema))
            with _whole(path.with_suffix(".json")) as notes:  # before the rows: where they are, it is
                notes.write_text(json.dumps(report))
    report = json.loads(path.with_suffix(".json").read_text())
    source = getattr(config.data, split)
    if not report.get("rows"):
        why = ", ".join(f"{count} {name}" for name, count in report.items() if count) or "no record"
        raise UserError(f"data.{split}={source} holds nothing to learn from: {why}")
    notes = ", ".join(f"{count} {name}" for name, count in report.items() if count and name not in ("examples", "rows"))
    say(f"data.{split}: {report['rows']} examples" + (f" ({notes})" if notes else ""))
    return TokenRows(datasets.Dataset.from_file(str(path)), key, report)


def text_frequencies(path: Path, tokenizer, tokenizer_hash: str, vocab_size: int) -> TokenFrequencies:
    """Token counts of a general corpus: a frequency file made with the same tokenizer, or a text, counted once and cached.

    Raises UserError for a frequency file of another tokenizer or vocabulary.
    """
    if path.suffix != ".safetensors":
        key = hashlib.sha256(json.dumps([source_hash(str(path)), tokenizer_hash, vocab_size]).encode()).hexdigest()[:32]
        cached = cache_directory() / f"text-{key}.safetensors"
        if not cached.exists():
            try:
                with path.open(encoding="utf-8-sig") as lines:
                    ids = (tokenizer(batch, add_special_tokens=False).input_ids for batch in _batched(lines, 1000))
                    pieces = (torch.tensor([token for line in batch for token in line]) for batch in ids)
                    counted = TokenFrequencies.from_labels(
                        pieces, vocab_size, tokenizer_hash=tokenizer_hash, corpus=str(path)
                    )
            except UnicodeDecodeError as error:
                raise UserError(f"loss.general_corpus={path} is not a UTF-8 text: {error}") from error
            if counted.total == 0:
                raise UserError(f"loss.general_corpus={path} holds no text")
            with _whole(cached) as partial:
                counted.save(partial)
        path = cached
    try:
        frequencies = TokenFrequencies.load(path)
    except ValueError as error:
        raise UserError(f"loss.general_corpus: {error}") from error
    if frequencies.tokenizer_hash != tokenizer_hash or len(frequencies.counts) != vocab_size:
        raise UserError(
            f"loss.general_corpus={path} was counted with another tokenizer or vocabulary ({len(frequencies.counts)} rows, tokenizer "
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
    if distributed.local_rank() == 0:
        with _whole(cached) as partial:
            frequencies.save(partial)
    return frequencies


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name to write under; the file gets its real one at the end, so that nobody reads half of it. Several nodes may write at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _batched(items: Iterable, size: int) -> Iterator[list]:
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
                filler = rows[0] if rows else table[numbers[0]]
                filler = {**filler, "labels": [IGNORE] * len(filler["labels"])}
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
            filler = rows.table[0]
            yield collator([{**filler, "labels": [IGNORE] * len(filler["labels"])}])
