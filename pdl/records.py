"""From files to examples: records of any format, and what a recipe makes of them."""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pdl.config import Config, UserError, files_of, first_line, hub_address, recipe_path


class Example(NamedTuple):
    """One thing to learn: the model sees `source` and is supervised on `target`. `references` are what outputs are scored against."""

    source: str
    target: str
    references: tuple[str, ...]


def records(source: Any, shard: tuple[int, int] | None = None, streaming: bool = False) -> Iterator[tuple[str, dict]]:
    """The records of a `data.*` value, each with the place it stands at ("file.jsonl:17"). Raises UserError naming that place.

    shard: (n, of) for the n-th of so many parts, made of whole files. streaming: a dataset of the hub is read as it comes,
    without being downloaded first.
    """
    if isinstance(source, dict):
        yield from _parallel_records(source["source"], source["target"], counted=not streaming)
    elif source.startswith("hub:"):
        rows = hub_stream(source, shard) if streaming else hub_dataset(source)
        for number, record in enumerate(rows):
            yield f"{source} row {number}", record
    else:
        number, of = shard or (0, 1)
        for path in files_of(source)[number::of]:
            reader = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}[path.suffix]
            for line, record in reader(path):
                if not isinstance(record, dict):
                    raise UserError(
                        f"{path}:{line}: a record must be an object with fields, not {type(record).__name__}"
                    )
                yield f"{path}:{line}", record


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


def _parallel_records(source: str, target: str, counted: bool) -> Iterator[tuple[str, dict]]:
    """counted: whether the lines are counted before the first is given; a stream finds out at the end."""
    with open(source, "rb") as source_lines, open(target, "rb") as target_lines:
        sizes = [sum(1 for _ in lines) for lines in (source_lines, target_lines)] if counted else [0, 0]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"parallel files must have as many lines as each other: {source} has {sizes[0]}, {target} has {sizes[1]}"
            )
        source_lines.seek(0), target_lines.seek(0)
        for number, pair in enumerate(itertools.zip_longest(source_lines, target_lines), 1):
            if None in pair:
                shorter = source if pair[0] is None else target
                raise UserError(
                    f"parallel files must have as many lines as each other: {shorter} ends before line {number}"
                )
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

    return _from_hub(datasets.load_dataset, source, split=hub_address(source)["split"])


def hub_stream(source: str, shard: tuple[int, int] | None = None):
    """The `datasets.IterableDataset` of a dataset of the hub, or of one part of it. Raises UserError when it cannot be had."""
    import datasets
    from datasets.distributed import split_dataset_by_node

    stream = _from_hub(datasets.load_dataset, source, split=hub_address(source)["split"], streaming=True)
    if shard is None:
        return stream
    number, of = shard
    if stream.num_shards < of:
        raise UserError(f"{source} has {stream.num_shards} files, fewer than {of} ranks: set data.stream_by=rows")
    return split_dataset_by_node(stream, number, of)


def _from_hub(load: Callable, source: str, **settings: Any):
    """What a function of `datasets` makes of an address. Raises UserError when it cannot be had."""
    address = hub_address(source)
    try:
        return load(address["repository"], address["config"], revision=address["revision"], **settings)
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
    """The examples of a split, in order."""
    return (example for _, example in placed_examples(config, split))


def placed_examples(config: Config, split: str, **part: Any) -> Iterator[tuple[str, Example]]:
    """The examples of a split, or of a part of it (see `records`), in order, each with its place. The recipe sees each record with `source` and `target` under those names.

    Raises UserError naming the place of a record that lacks a field, or whose fields are not what the recipe reads.
    """
    recipe = load_recipe(config.task)
    columns = {"source": config.data.source_field, "target": config.data.target_field}
    for place, record in records(getattr(config.data, split), **part):
        fields = {name: value for name, value in record.items() if columns.get(name) is None}
        fields |= {name: record[column] for name, column in columns.items() if column in record}
        if "target" in fields and fields["target"] is None:
            fields["target"] = ""  # dropped and counted with the empty ones
        try:
            if recipe:
                for example in recipe.examples(fields):
                    yield place, _checked(example)
            else:
                yield place, _checked(Example(fields["source"], fields["target"], (fields["target"],)))
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


def source_hash(source: Any) -> str:
    """A hash of what a `data.*` value holds now: file contents and their format, or the hub's fingerprint."""
    if isinstance(source, dict):
        return "+".join(source_hash(path) for path in (source["source"], source["target"]))
    if source.startswith("hub:"):
        return hub_dataset(source)._fingerprint
    states = [(path, path.stat()) for path in files_of(source)]
    return "+".join(_file_hash(path, state.st_size, state.st_mtime_ns) + path.suffix for path, state in states)


@functools.lru_cache
def _file_hash(path: Path, size: int, modified: int) -> str:
    """Of its contents. size, modified: what is no longer what was hashed is hashed again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_ENDS = 1 << 20  # bytes at the beginning and end of a file that are hashed where it is not read whole


def source_fingerprint(source: Any) -> str:
    """The same without reading everything: of each file its size, beginning and end; of a hub dataset the files it lists."""
    if isinstance(source, dict):
        return "+".join(source_fingerprint(path) for path in (source["source"], source["target"]))
    if source.startswith("hub:"):
        import datasets

        builder = _from_hub(datasets.load_dataset_builder, source)
        return f"{builder.hash}:{hub_address(source)['split']}"
    digest = hashlib.sha256()
    for path in files_of(source):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.name} {size}".encode() + file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read())
    return digest.hexdigest()


def examples_hash(config: Config, split: str) -> str:
    """A hash of the examples of a split: the data, and how the recipe reads it."""
    recipe = recipe_path(config.task).read_text(encoding="utf-8") if config.task else ""
    streamed = split == "train" and config.data.streaming
    data = (source_fingerprint if streamed else source_hash)(getattr(config.data, split))
    made_from = [data, recipe, config.data.source_field, config.data.target_field]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
