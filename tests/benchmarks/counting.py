"""Counting labels of an already tokenized Arrow column, one core: tokens per second, in order and shuffled, and the memory it takes.

python tests/benchmarks/counting.py [--tokens 50000000]
"""

import argparse
import re
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch

from pdl import TokenFrequencies
from pdl.data import column_values

VOCABULARY, ROW = 32_000, 250


def write(path: Path, tokens: int) -> datasets.Dataset:
    """A table as the cache has it: int32 lists, 30 % of the labels masked, Zipf-distributed."""
    generator = np.random.default_rng(0)
    labels = (generator.zipf(1.3, 10_000_000) % VOCABULARY).astype(np.int32)
    labels[generator.random(len(labels)) < 0.3] = -100
    schema = pa.schema({"labels": pa.list_(pa.int32())})
    offsets = pa.array(np.arange(0, 1000 * ROW + 1, ROW, dtype=np.int32))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in range(tokens // (1000 * ROW)):
            start = batch * 1000 * ROW % (len(labels) - 1000 * ROW)
            rows = pa.ListArray.from_arrays(offsets, pa.array(labels[start : start + 1000 * ROW]))
            writer.write_batch(pa.record_batch([rows], schema=schema))
    return datasets.Dataset.from_file(str(path))


def own_memory() -> int:
    """KiB of this process, pages of mapped files left out: those the system takes back when it needs them."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def seconds(table: datasets.Dataset) -> float:
    started = time.perf_counter()
    TokenFrequencies.from_labels(column_values(table, "labels"), VOCABULARY)
    return time.perf_counter() - started


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000_000)
    tokens = parser.parse_args().tokens // (1000 * ROW) * 1000 * ROW
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        table = write(Path(scratch) / "rows.arrow", tokens)
        shuffled = table.shuffle(seed=1)
        seconds(table.select(range(1000)))
        whole = table.data.column("labels")
        flat = np.concatenate([chunk.flatten().to_numpy() for chunk in whole.slice(0, min(len(whole), 40_000)).chunks])
        started = time.perf_counter()
        np.bincount(flat[flat >= 0], minlength=VOCABULARY)
        lower_bound = len(flat) / (time.perf_counter() - started)
        del flat
        for name, counted in (("in order", table), ("shuffled", shuffled)):
            rates = [tokens / seconds(counted) / 1e6 for _ in range(5)]
            print(
                f"{name}: {np.median(rates):.0f} M tokens/s (of 5: {min(rates):.0f} to {max(rates):.0f}), numpy on an array in memory {lower_bound / 1e6:.0f}"
            )
        before, peak = own_memory(), 0
        for piece in column_values(shuffled, "labels"):
            TokenFrequencies.from_labels(piece, VOCABULARY)
            peak = max(peak, own_memory())
        print(
            f"own memory grew by {(peak - before) / 1024:.0f} MiB over {tokens * 4 / 2**20:.0f} MiB of labels, whose file is mapped"
        )
