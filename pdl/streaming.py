"""Training on a corpus that is not cached: its rows are read, shuffled and tokenized as they are needed, and counted beforehand."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from pdl import distributed, watch
from pdl.config import Config, UserError
from pdl.data import (
    BLOCK,
    IGNORE,
    Batch,
    Collator,
    Encoder,
    batched,
    load_frequencies,
    rows_key,
    unlabelled,
    whole_file,
)
from pdl.distributed import say
from pdl.frequencies import TokenFrequencies
from pdl.records import Example, placed_examples

_BLOCKS_A_ROUND = 20  # of each rank, between two notes of how far a count is
_PASSED_BETWEEN_BEATS = 100_000  # examples, while a continued run finds its place


def training_examples(config: Config, **part) -> Iterator[tuple[str, Example]]:
    """The training examples that have something to learn, each with its place, in the order of the corpus."""
    return (placed for placed in placed_examples(config, "train", **part) if placed[1].target.strip())


def shuffled(items: Iterator, size: int, seed: str) -> Iterator:
    """The items in an order that depends on them and the seed alone; none comes more than `size` places too early."""
    draw = random.Random(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big"))
    held = list(islice(items, size))
    for item in items:
        place = draw.randrange(size)
        yield held[place]
        held[place] = item
    draw.shuffle(held)
    yield from held


def stream_key(config: Config, encoder: Encoder, data_hash: str, tokenizer_hash: str) -> str:
    """A hash of all that the rows of a stream and their order depend on; what `TokenRows.key` is for rows in a cache."""
    made_from = [rows_key(encoder, data_hash, tokenizer_hash), config.data.shuffle_buffer, config.data.stream_by]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]


def first_rows(config: Config, encoder: Encoder) -> None:
    """Read the beginning of this rank's stream. Raises UserError where it cannot be read as examples."""
    shard = (distributed.rank(), distributed.world_size()) if config.data.stream_by == "shards" else None
    placed = islice(training_examples(config, shard=shard, streaming=True), 8)
    encoder.rows([example for _, example in placed])


@dataclass
class StreamedBatches:
    """The order of a stream, the same for every number of ranks; what `GlobalBatches` is for rows in a cache.

    Epoch e is the corpus, shuffled through a buffer by (seed, e); the epochs stand one after another, without an end, and
    global batch k is examples [kB, (k+1)B). Every rank reads them all and tokenizes those of its own micro-batches;
    micro-batch j goes to rank j mod world_size. With `data.stream_by=shards` a rank reads its own files only, and global
    batch k is the next B/world_size examples of each: then the order depends on the number of ranks.
    """

    config: Config
    encoder: Encoder
    collator: Collator

    def __post_init__(self):
        training = self.config.training
        self.micro_batch_size, self._size = training.micro_batch_size, training.global_batch_size
        self._own_files = self.config.data.stream_by == "shards"
        self._stream: Iterator[tuple[str, Example]] = iter(())
        self._next = None  # the step whose examples come next in the stream
        self._examples: list[tuple[str, Example]] = []  # of the step before it

    def window(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """This rank's micro-batches of one optimizer step. Steps that follow each other are read on; else the stream begins anew."""
        size = self._size // world_size if self._own_files else self._size
        if step != self._next:
            self._stream = self._endless((rank, world_size) if self._own_files else None)
            self._pass_over(step * size)
        self._examples = list(islice(self._stream, size))
        self._next = step + 1
        apart = self.micro_batch_size * (1 if self._own_files else world_size)
        first = 0 if self._own_files else rank * self.micro_batch_size
        starts = range(first, size, apart)
        return [self._batch(self._examples[start : start + self.micro_batch_size]) for start in starts]

    def _pass_over(self, count: int) -> None:
        """A collective: what cannot be read is raised when all ranks are through, so that none waits for one that left."""
        unreadable = None
        for passed in range(0, count, _PASSED_BETWEEN_BEATS):
            watch.beat(doing := f"passing over {count:,} examples that were trained on")
            if passed:
                say(f"{doing}: {passed:,}")
                watch.agree(doing)
            number = min(_PASSED_BETWEEN_BEATS, count - passed)
            try:
                next(islice(self._stream, number, number), None)
            except UserError as error:
                unreadable = unreadable or error
        if unreadable:
            raise unreadable

    def row_numbers(self, step: int) -> list[str]:
        """The places of the examples of the step that was read last: of this rank, where each has its own files."""
        return [place for place, _ in self._examples]

    def _endless(self, shard: tuple[int, int] | None) -> Iterator[tuple[str, Example]]:
        epoch = 0
        while True:
            examples = training_examples(self.config, shard=shard, streaming=True)
            seed = f"{self.config.training.seed} {epoch} {shard or ''}"
            empty = True
            for example in shuffled(examples, self.config.data.shuffle_buffer, seed):
                empty = False
                yield example
            if empty:
                part = f" for rank {shard[0]}: more files, or data.stream_by=rows" if shard else ""
                raise UserError(f"data.train={self.config.data.train} holds nothing to learn from{part}")
            epoch += 1

    def _batch(self, examples: list[tuple[str, Example]]) -> Batch:
        """A target of which the tokenizer leaves nothing is dropped only here; a row without labels, neutral under sums, takes its place."""
        rows, _ = self.encoder.rows([example for _, example in examples])
        spare = rows[0] if rows else {"input_ids": [self.encoder.tokenizer.eos_token_id], "labels": [IGNORE]}
        return self.collator(rows + [unlabelled(spare)] * (self.micro_batch_size - len(rows)))


# --- counting ---


def count_corpus(config: Config, encoder: Encoder, data_hash: str, tokenizer_hash: str, vocab_size: int) -> None:
    """Count the targets of the training data into the file that `loss.frequencies` names. A collective.

    Each rank tokenizes every n-th block of examples. How far the count is stands in a file beside it after every round: a
    count that was cut off goes on from there, on any number of ranks. Raises UserError when the file is there and holds
    another count.
    """
    target = Path(config.loss.frequencies)
    key = rows_key(encoder, data_hash, tokenizer_hash)
    corpus = f"{config.data.train} {key}"
    notes = target.with_name(f".{target.name}.{key}.partial")
    rank, world_size = distributed.rank(), distributed.world_size()

    def begin() -> tuple[torch.Tensor, int] | None:
        if rank > 0:
            return None
        if target.exists():
            found = load_frequencies("loss.frequencies", target, tokenizer_hash, vocab_size)
            if found.corpus != corpus:
                raise UserError(
                    f"loss.frequencies={target} holds another count, of {found.corpus or 'a corpus without a name'}, or with other "
                    "length limits: name another file"
                )
            return found.counts, -1
        target.parent.mkdir(parents=True, exist_ok=True)
        if not notes.exists():
            return torch.zeros(vocab_size, dtype=torch.int64), 0
        found = load_frequencies("loss.frequencies", notes, tokenizer_hash, vocab_size)
        return found.counts, int(found.corpus)

    counts, blocks_done = distributed.gathered(distributed.together(begin, "counting"))[0]
    if blocks_done < 0:
        say(f"{target} holds the count of {config.data.train} already: {int(counts.sum()):,} tokens")
        return
    if blocks_done:
        say(f"going on after {blocks_done * BLOCK:,} examples")
    texts = (example for _, example in training_examples(config, streaming=config.data.streaming))
    blocks = islice(batched(texts, BLOCK), blocks_done, None)

    def own_round() -> tuple[TokenFrequencies, int]:
        read, labels = 0, []
        for number, block in enumerate(islice(blocks, _BLOCKS_A_ROUND * world_size)):
            read += 1
            if number % world_size == rank:
                labels += [torch.tensor(row["labels"]) for row in encoder.rows(block)[0]]
        return TokenFrequencies.from_labels(labels, vocab_size), read

    def keep(path: Path, total: TokenFrequencies) -> None:
        if rank == 0:
            with whole_file(path) as partial:
                total.save(partial)

    read = 1
    while read:
        counted, read = distributed.together(own_round, "counting")
        counts += counted.all_reduce().counts
        blocks_done += read
        if read:
            progress = TokenFrequencies(counts, tokenizer_hash, corpus=str(blocks_done))
            distributed.together(lambda progress=progress: keep(notes, progress), f"writing {notes}")
    if int(counts.sum()) == 0:
        raise UserError(f"data.train={config.data.train} holds nothing to learn from")
    distributed.together(lambda: keep(target, TokenFrequencies(counts, tokenizer_hash, corpus)), f"writing {target}")
    if rank == 0:
        notes.unlink(missing_ok=True)
    say(f"{target}: {int(counts.sum()):,} tokens, {int((counts > 0).sum()):,} of {vocab_size:,} vocabulary rows seen")
