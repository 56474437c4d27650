"""Counting labels."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdl import TokenFrequencies


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(-1, 30), max_size=40), max_size=8), st.sampled_from([torch.int32, torch.int64]))
def test_counts_are_those_of_a_counter(pieces, dtype):
    labels = [torch.tensor(piece, dtype=dtype).masked_fill(torch.tensor(piece) == -1, -100) for piece in pieces]
    counted = TokenFrequencies.from_labels(labels, 31)
    expected = Counter(label for piece in pieces for label in piece if label != -1)
    assert counted.counts.tolist() == [expected[token] for token in range(31)]
    assert counted.counts.dtype == torch.int64 and counted.total == sum(expected.values())


def test_shape_does_not_matter():
    labels = torch.tensor([[1, 2, -100], [2, 2, 0]])
    assert torch.equal(
        TokenFrequencies.from_labels(labels, 4).counts, TokenFrequencies.from_labels(labels.flatten(), 4).counts
    )


def test_more_than_a_chunk():
    labels = torch.arange(3_000_001) % 7
    assert TokenFrequencies.from_labels(labels, 7).total == 3_000_001


@pytest.mark.parametrize("label", [31, -1, -99, -101])
def test_labels_out_of_range_are_refused(label):
    with pytest.raises(ValueError, match="labels"):
        TokenFrequencies.from_labels(torch.tensor([3, label]), 31)


def test_an_ignored_label_inside_the_vocabulary():
    assert TokenFrequencies.from_labels(torch.tensor([0, 0, 1, 2]), 3, ignore_index=0).counts.tolist() == [0, 1, 1]


def test_a_count_beyond_float32_is_kept(tmp_path):
    frequencies = TokenFrequencies(torch.tensor([2**24 + 1, 2**40 + 1]), "hash", "corpus")
    frequencies.save(tmp_path / "f.safetensors")
    loaded = TokenFrequencies.load(tmp_path / "f.safetensors")
    assert torch.equal(loaded.counts, frequencies.counts)
    assert (loaded.tokenizer_hash, loaded.corpus) == ("hash", "corpus")


def test_files_that_are_no_frequencies_are_refused(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("no table")
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    save_file({"counts": torch.zeros(2)}, tmp_path / "float.safetensors")
    for name in ("text", "other.safetensors", "float.safetensors"):
        with pytest.raises(ValueError, match="not a frequency file"):
            TokenFrequencies.load(tmp_path / name)
