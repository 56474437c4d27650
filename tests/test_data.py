"""From files to batches: what a record, a label and a global batch are, whatever the file format and the number of ranks."""

import csv
import io
import json
import os
import random
import signal
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import REPOSITORY
from distributed.forked import Group, Rank
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pdl import data, distributed
from pdl.config import Config, DataConfig, UserError, hub_address
from pdl.data import (
    IGNORE,
    Collator,
    Encoder,
    GlobalBatches,
    TokenRows,
    column_values,
    label_frequencies,
    text_frequencies,
    token_rows,
    validation_batches,
)
from pdl.records import Example, examples, examples_hash, records, source_hash

FEW = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
PAD, EOS, UNK, BOS = range(4)
WORDS = ["<pad>", "</s>", "<unk>", "<s>", *"abcdefghijklmnopqrstuvwxyz"]


def word_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token for each letter that stands alone, so that expected ids can be read. template: special tokens around a text."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        backend.post_processor = processors.TemplateProcessing(template, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def encoder(
    template: str | None = None, *, is_encoder_decoder: bool = False, source: int = 8, target: int = 6
) -> Encoder:
    return Encoder(word_tokenizer(template), is_encoder_decoder, source, target)


def t5(**lengths) -> Encoder:
    return encoder("$A </s>", is_encoder_decoder=True, **lengths)


def row(of: Encoder, source: str, target: str) -> dict:
    rows, _ = of.rows([Example(source, target, (target,))])
    return rows[0]


def config(train, task: str | None = None, **fields) -> Config:
    return Config(task=task, data=DataConfig(train=train if isinstance(train, dict) else str(train), **fields))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PDL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- records ---

# Texts as they are in the wild: line and paragraph separators, carriage returns, tabs, quotes, other planes.
texts = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("\r\t\v\f\x1c\x85\u2028\u2029\"',\ufeff"))
)
pairs = st.lists(st.fixed_dictionaries({"source": texts, "target": texts}), min_size=1, max_size=6)


def read(source) -> list[dict]:
    return [record for _, record in records(source if isinstance(source, dict) else str(source))]


def table(rows: list[dict], delimiter: str) -> bytes:
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, ["source", "target"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue().encode()


WRITERS = {
    "jsonl": lambda rows: "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode(),
    "json": lambda rows: json.dumps(rows, ensure_ascii=False).encode(),
    "csv": lambda rows: table(rows, ","),
    "tsv": lambda rows: table(rows, "\t"),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
@FEW
@given(rows=pairs)
def test_text_formats_give_their_records(tmp_path, kind, mark, rows):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(mark + WRITERS[kind](rows))
    assert read(path) == rows


@FEW
@given(rows=pairs)
def test_parquet_gives_its_records(tmp_path, rows):
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path / "a.parquet") == rows


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False], ids=["closed", "open"])
@FEW
@given(rows=pairs)
def test_parallel_files_give_their_lines(tmp_path, end, last, rows):
    def line(
        text: str,
    ) -> str:  # what ends a line is no part of it, and a mark at the start of a file is none of its text
        return text.replace("\n", " ").rstrip("\r").lstrip("\ufeff")

    rows = [{side: line(text) for side, text in r.items()} for r in rows] + [{"source": "z", "target": "y"}]
    for side in ("source", "target"):
        lines = end.join(r[side] for r in rows) + (end if last else "")
        (tmp_path / side).write_bytes(lines.encode("utf-8-sig" if side == "target" else "utf-8"))
    assert read({"source": str(tmp_path / "source"), "target": str(tmp_path / "target")}) == rows


def test_places_are_lines_of_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "1"}\n\n\n{"a": "2"}\n')
    assert [place for place, _ in records(str(tmp_path / "a.jsonl"))] == [f"{tmp_path}/a.jsonl:{n}" for n in (1, 4)]
    (tmp_path / "a.csv").write_text('a\n1\n"two\nlines"\n3\n')
    assert [place for place, _ in records(str(tmp_path / "a.csv"))] == [f"{tmp_path}/a.csv:{n}" for n in (2, 4, 5)]


def test_a_pattern_is_its_files_in_order(tmp_path):
    for name in ("b/2.jsonl", "a.jsonl", "b/c/3.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, [{"name": name}])
    (tmp_path / "b/directory.jsonl").mkdir()
    assert [record["name"] for record in read(tmp_path / "**/*.jsonl")] == ["a.jsonl", "b/2.jsonl", "b/c/3.jsonl"]
    assert [record["name"] for record in read(tmp_path / "*/*.jsonl")] == ["b/2.jsonl"]
    before = source_hash(str(tmp_path / "**/*.jsonl"))
    write(tmp_path / "b/c/3.jsonl", [{"name": "other"}])
    assert source_hash(str(tmp_path / "**/*.jsonl")) != before


@pytest.mark.parametrize("name, content", [("a.jsonl", '{"a": "1"}\n{\n'), ("a.csv", 'a\n1\n"2\n')])
def test_records_are_streamed(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    read_one_by_one = records(str(tmp_path / name))
    assert next(read_one_by_one)[1] == {"a": "1"}  # before the end of the file, where the mistake is
    with pytest.raises(UserError, match=name):
        next(read_one_by_one)


@pytest.mark.parametrize(
    "source, parts",
    {
        "hub:owner/name:train": ("owner/name", None, None, "train"),
        "hub:squad:validation": ("squad", None, None, "validation"),
        "hub:owner/name/config:test": ("owner/name", "config", None, "test"),
        "hub:owner/name@v1.0:test": ("owner/name", None, "v1.0", "test"),
        "hub:owner/name@refs/convert/parquet:test": ("owner/name", None, "refs/convert/parquet", "test"),
        "hub:owner/name/en-de@abc123:train[:50%]": ("owner/name", "en-de", "abc123", "train[:50%]"),
        "hub:owner/name:train[10:20]+test": ("owner/name", None, None, "train[10:20]+test"),
    }.items(),
)
def test_hub_addresses(source, parts):
    assert tuple(hub_address(source)[part] for part in ("repository", "config", "revision", "split")) == parts


def read_splits(arguments: list) -> None:
    """Write the records and the hash of each address to `home`, where datasets' own cache is as well."""
    home, addresses = arguments
    datasets.config.HF_DATASETS_CACHE = home
    read = [[list(records(address)), source_hash(address)] for address in addresses]
    (home / "read.json").write_text(json.dumps(read))


def test_hub_dataset_through_the_library(tmp_path, monkeypatch):
    """`datasets` takes a folder of the same name before it asks the hub: the same code, without a network."""
    (tmp_path / "owner" / "name").mkdir(parents=True)
    lines = [json.dumps({"source": f"s{n}", "target": f"t{n}"}) + "\n" for n in range(8)]
    (tmp_path / "owner" / "name" / "train.jsonl").write_text("".join(lines))
    addresses = [f"hub:owner/name:{split}" for split in ("train[:25%]", "train[6:]")]
    homes = [tmp_path / "one", tmp_path / "two"]
    for home in homes:
        home.mkdir()
    group = Group([Rank([homes[0], addresses], folder=tmp_path)], read_splits)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", homes[1])
    read_splits([homes[1], addresses])
    assert group.wait() == [0], group.said
    elsewhere, here = (json.loads((home / "read.json").read_text()) for home in homes)
    assert elsewhere == here  # the hash as well: two machines must not disagree on their data
    (first, first_hash), (second, second_hash) = here
    assert first == [[f"hub:owner/name:train[:25%] row {n}", {"source": f"s{n}", "target": f"t{n}"}] for n in (0, 1)]
    assert [record["source"] for _, record in second] == ["s6", "s7"]
    assert first_hash != second_hash


# --- examples ---


def write(path, rows: list[dict]):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_fields_are_mapped(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"source": "s", "target": "t", "x": "1", "y": "2"}])
    assert list(examples(config(path), "train")) == [("s", "t", ("t",))]
    assert list(examples(config(path, source_field="x", target_field="y"), "train")) == [("1", "2", ("2",))]
    assert list(examples(config(path, source_field="x"), "train")) == [("1", "t", ("t",))]
    # Both directions of one file: neither field may be overwritten before it is read.
    assert list(examples(config(path, source_field="target", target_field="source"), "train")) == [("t", "s", ("s",))]


def test_a_null_target_is_an_empty_one(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"source": "s", "target": None}])
    for task in (None, "summarization", "style_transfer", "code_generation", "dialogue"):
        assert [example.target for example in examples(config(path, task), "train")] == [""]


def only(tmp_path, task: str, record: dict, **fields) -> Example:
    (example,) = examples(config(write(tmp_path / "a.jsonl", [record]), task, **fields), "train")
    return example


def test_summarization_records(tmp_path):
    fields = {"source_field": "dialogue", "target_field": "summary"}
    one = only(tmp_path, "summarization", {"dialogue": "d", "summary": "s", "topic": "x"}, **fields)
    assert one == ("d", "s", ("s",))
    three = only(
        tmp_path, "summarization", {"dialogue": "d", "summary1": "a", "summary2": "b", "summary3": "c"}, **fields
    )
    assert three == ("d", "a", ("a", "b", "c"))


def test_dialogue_records_of_every_kind_say_the_same(tmp_path):
    a, b = "Is it far?", "Two stops."
    kinds = [
        {"turns": [{"speaker": "A", "text": a}, {"speaker": "B", "text": b}]},
        {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": a}, {"role": "assistant", "content": b}]},
        {"dialog": [a, b]},
        {"source": a, "target": b},
    ]  # fmt: skip
    seen = [only(tmp_path, "dialogue", kind) for kind in kinds]
    assert len(set(seen)) == 1
    assert (
        a in seen[0].source and b not in seen[0].source and seen[0].target.strip() == b and seen[0].references == (b,)
    )


def test_dialogue_gives_an_example_for_every_reply(tmp_path):
    turns = ["one", "two", "three", "four"]
    path = write(tmp_path / "a.jsonl", [{"dialog": turns}])
    found = list(examples(config(path, "dialogue"), "train"))
    assert [example.target.strip() for example in found] == turns[1:]
    for number, example in enumerate(found, 1):
        assert [turn in example.source for turn in turns] == [place < number for place in range(4)]


def test_style_transfer_records(tmp_path):
    assert only(tmp_path, "style_transfer", {"source": "<BBE> in the beginning", "target": "at first"}) == (
        "in the beginning", "at first", ("at first",),
    )  # fmt: skip
    (tmp_path / "s.txt").write_text("eins\nzwei\n")
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    parallel = config({"source": str(tmp_path / "s.txt"), "target": str(tmp_path / "t.txt")}, "style_transfer")
    assert list(examples(parallel, "train")) == [("eins", "one", ("one",)), ("zwei", "two", ("two",))]


def test_code_records_keep_their_layout(tmp_path):
    code = "def f():\r\n\tif 1:\r\n\t\treturn  2\r\n"
    example = only(
        tmp_path, "code_generation", {"prompt": "two", "code": code}, source_field="prompt", target_field="code"
    )
    assert example.target == code.replace("\r\n", "\n") and "two" in example.source


def test_a_recipe_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from pdl.data import Example\n"
        "def examples(record):\n    for word in record['source']:\n        yield Example(word, record['target'], (record['target'],))\n"
        "def scores(predictions, examples): return {}\n"
    )
    path = write(tmp_path / "a.jsonl", [{"words": ["a", "b"], "target": "t"}])
    found = examples(config(path, str(tmp_path / "mine.py"), source_field="words"), "train")
    assert list(found) == [("a", "t", ("t",)), ("b", "t", ("t",))]


# --- token rows ---


def supervised(row: dict) -> list[tuple[list[int], int]]:
    """What a decoder-only row teaches: after these tokens comes that one."""
    return [(row["input_ids"][: i + 1], label) for i, label in enumerate(row["labels"]) if label != IGNORE]


def test_decoder_only_row():
    found = row(encoder(), "a b", "c d")
    assert found == {"input_ids": ids("a b c d"), "labels": [IGNORE, *ids("c d </s>")]}
    assert supervised(found) == [(ids("a b"), ids("c")[0]), (ids("a b c"), ids("d")[0]), (ids("a b c d"), EOS)]


def test_bos_stands_before_the_prompt_once_and_never_before_the_target():
    assert row(encoder("<s> $A"), "a", "c") == {"input_ids": ids("<s> a c"), "labels": [IGNORE, *ids("c </s>")]}
    # A tokenizer that adds EOS too: none between prompt and target, one at the end.
    assert row(encoder("<s> $A </s>"), "a", "c") == {"input_ids": ids("<s> a c"), "labels": [IGNORE, *ids("c </s>")]}


def test_empty_prompt():
    # Nothing predicts the first token of a text without BOS; with it, everything is predicted.
    assert row(encoder(), "", "c d") == {"input_ids": ids("c d"), "labels": ids("d </s>")}
    assert row(encoder("<s> $A"), "", "c d") == {"input_ids": ids("<s> c d"), "labels": ids("c d </s>")}


def test_a_target_that_is_cut_has_no_end():
    whole, cut = "a b c d e", "a b c d e f"  # with its end the one is as long as the limit, the other longer
    for of in (encoder(), t5()):
        for text, learned in ((whole, whole + " </s>"), (cut, cut)):
            labels = [label for label in row(of, "z", text)["labels"] if label != IGNORE]
            assert labels == ids(learned)


def test_a_long_prompt_loses_its_beginning():
    text = "a b c d e f g h i j"
    assert row(encoder(), text, "z")["input_ids"] == ids("c d e f g h i j z")
    assert row(encoder("<s> $A"), text, "z")["input_ids"] == ids("<s> d e f g h i j z")
    assert row(encoder("<s> $A", source=1), text, "z")["input_ids"] == ids("<s> z")


def test_encoder_decoder_row():
    assert row(t5(), "a b", "c d") == {"input_ids": ids("a b </s>"), "labels": ids("c d </s>")}
    assert row(t5(), "", "c") == {"input_ids": [EOS], "labels": ids("c </s>")}
    assert row(t5(), "a b c d e f g h i", "c")["input_ids"] == ids("a b c d e f g </s>")  # the encoder keeps its EOS


def test_report_counts_what_is_dropped_and_cut():
    pairs = [("a", ""), ("a", " \n\t"), ("a b c d e f g h i j", "c"), ("a", "a b c d e f g"), ("a", "b")]
    for of in (encoder(), t5()):
        rows, report = of.rows([Example(source, target, (target,)) for source, target in pairs])
        assert len(rows) == report["rows"] == 3
        assert report["examples"] == 5 and report["empty targets dropped"] == 2
        assert report["sources at or over the length limit"] == report["targets cut at the length limit"] == 1


def test_a_target_without_tokens_is_dropped():
    # A normalizer may leave nothing of a text: teaching EOS alone would teach to say nothing.
    from tokenizers import normalizers

    for of in (encoder(), t5()):
        of.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
        rows, report = of.rows([Example("", "\u200b", ()), Example("a", "\u200b", ()), Example("a", "b", ())])
        assert len(rows) == 1 and report["targets without a token dropped"] == 2


letters = st.lists(st.sampled_from("abcdefgh"), max_size=14).map(" ".join)


@pytest.mark.parametrize("template", [None, "<s> $A"])
@FEW
@given(source=letters, target=letters.filter(bool))
def test_decoder_only_rows_teach_every_token_of_the_target_after_what_stands_before_it(template, source, target):
    of = encoder(template)
    prompt = of.sources([source])[0]
    whole = prompt + [*ids(target), EOS][: of.max_target_tokens]
    expected = [(whole[:i], whole[i]) for i in range(max(1, len(prompt)), len(whole))]
    assert supervised(row(of, source, target)) == expected


# --- the cache ---


@pytest.fixture(scope="module", autouse=True)
def alone():
    """A process group of one, for what is a collective."""
    before = dict(os.environ)
    distributed.start()
    yield
    distributed.stop()
    os.environ.clear()
    os.environ.update(before)


def rows_of(of: Config, encoder: Encoder, tokenizer_hash: str = "hash") -> TokenRows:
    return token_rows(of, "train", encoder, examples_hash(of, "train"), tokenizer_hash)


def files(cache) -> dict:
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("*")} if cache.exists() else {}


PAIRS = [{"source": "a b", "target": "c d"}, {"source": "e", "target": "f g h"}, {"source": "", "target": "a"}]


def test_second_call_opens_the_cache(tmp_path, cache, capsys):
    path = write(tmp_path / "a.jsonl", [*PAIRS, {"source": "a", "target": ""}])
    first = rows_of(config(path), encoder())
    before = files(cache)
    second = rows_of(config(path), encoder())
    assert before and files(cache) == before
    assert first.key == second.key and first.table[:] == second.table[:]
    assert capsys.readouterr().out == "data.train: 3 examples (1 empty targets dropped)\n" * 2
    # The same bytes under another name are the same data; where a file is does not matter.
    (tmp_path / "b.jsonl").write_bytes(path.read_bytes())
    assert rows_of(config(tmp_path / "b.jsonl"), encoder()).key == first.key


def test_key_covers_all_that_rows_depend_on(tmp_path, cache):
    recipe = tmp_path / "mine.py"
    recipe.write_text((REPOSITORY / "recipes/style_transfer/recipe.py").read_text())
    path = write(tmp_path / "a.jsonl", [row | {"x": "z"} for row in PAIRS])
    keys = []

    def add(of: Encoder, tokenizer_hash: str = "hash", **fields):
        task = fields.pop("task", str(recipe))
        keys.append(rows_of(config(path, task, **fields), of, tokenizer_hash).key)

    add(encoder())
    add(encoder(target=5))
    add(encoder(source=5))
    add(t5())
    add(encoder(), "another")
    add(encoder(), task=None)
    add(encoder(), source_field="x")
    add(encoder(), target_field="x")
    recipe.write_text(recipe.read_text() + "\n# changed\n")
    add(encoder())
    write(path, PAIRS[:2])
    add(encoder())
    assert len(set(keys)) == len(keys)


def test_the_format_is_part_of_the_key(tmp_path, cache):
    for name in ("a.csv", "a.tsv"):  # the same bytes mean one thing here and another there
        (tmp_path / name).write_text("source\ttarget,target\tsource\na\tb,c\td\n")
    as_csv = rows_of(
        config(tmp_path / "a.csv", source_field="source\ttarget", target_field="target\tsource"), encoder()
    )
    with pytest.raises(UserError, match="no field"):
        rows_of(config(tmp_path / "a.tsv", source_field="source\ttarget", target_field="target\tsource"), encoder())
    assert len(as_csv) == 1


def test_a_refused_file_leaves_nothing_in_the_cache(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", PAIRS * 500)  # more than is written at once
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(UserError, match="1501"):
        rows_of(config(path), encoder())
    assert not files(cache)


def write_rows(arguments: list) -> None:
    path, recipe = arguments
    distributed.start()
    rows_of(config(path, recipe), encoder())
    distributed.stop()


def test_a_killed_write_leaves_nothing_that_looks_whole(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", PAIRS * 500)
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "import os, signal\nfrom pdl.data import Example\nread = 0\n"
        "def examples(record):\n"
        "    global read\n    read += 1\n"
        "    if read == 1200 and os.environ.get('DIE'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    yield Example(record['source'], record['target'], (record['target'],))\n"
        "def scores(predictions, examples): return {}\n"
    )
    group = Group([Rank([path, str(recipe)], environment={"DIE": "1"})], write_rows)
    assert group.wait() == [-signal.SIGKILL], group.said
    left = list(files(cache))
    assert left and all(name.endswith(".partial") for name in left)
    rows = rows_of(config(path, str(recipe)), encoder())
    assert len(rows) == 1500
    assert set(left) < set(files(cache))  # whose they are is not known; after a week nobody's
    (partial,) = cache.glob("*.partial")
    eight_days_ago = time.time() - 8 * 24 * 3600
    for name in (*partial.iterdir(), partial):
        os.utime(name, (eight_days_ago, eight_days_ago))
    (cache / "now.arrow.partial").touch()
    rows_of(config(write(tmp_path / "b.jsonl", PAIRS)), encoder())
    assert [partial.name for partial in cache.glob("*.partial")] == ["now.arrow.partial"]


def share_the_work(told: list) -> None:
    """One rank: tokenizes with the others, and leaves its rows, how many examples it tokenized itself, and its counts of a text."""
    path, text, left = told
    data.BLOCK = 7
    distributed.start()
    of, own = encoder(), []
    rows, take = of.rows, lambda batch: own.append(len(batch)) or rows(batch)
    of.rows = take
    found = rows_of(config(path), of)
    counts = text_frequencies(Path(text), word_tokenizer(None), "hash", len(WORDS)).counts.tolist()
    left.write_text(json.dumps([found.table[:], found.report, sum(own), counts]))
    distributed.stop()


def test_ranks_that_share_a_cache_share_the_work(tmp_path, cache):
    """Ranks 0 and 1 are a node, rank 2 is one of its own, with another file system."""
    path, text = write(tmp_path / "a.jsonl", random_pairs(150)), tmp_path / "a.txt"
    text.write_text("".join(pair["source"] + "\n" for pair in random_pairs(40, seed=1)))
    places = [("0", "node0"), ("1", "node0"), ("0", "node1")]
    group = Group(
        [
            Rank([str(path), str(text), tmp_path / f"{rank}.json"], environment={"LOCAL_RANK": local, "PDL_CACHE": str(tmp_path / node)})
            for rank, (local, node) in enumerate(places)
        ],
        share_the_work,
    )  # fmt: skip
    assert group.wait() == [0, 0, 0], group.said
    left = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    alone = rows_of(config(path), encoder())
    counts = text_frequencies(text, word_tokenizer(None), "hash", len(WORDS)).counts.tolist()
    assert [rest[:2] + rest[3:] for rest in left] == [[alone.table[:], alone.report, counts]] * 3
    assert [tokenized for _, _, tokenized, _ in left] == [77, 73, 150]  # blocks of 7 in turn
    for node in ("node0", "node1"):
        assert {file.suffix for file in (tmp_path / node).iterdir()} == {".arrow", ".json", ".safetensors"}


# --- counts ---


def random_pairs(number: int, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    text = lambda most: " ".join(draw.choices("abcdefghij", weights=range(1, 11), k=draw.randint(0, most)))  # noqa: E731
    return [{"source": text(10), "target": text(7)} for _ in range(number)]


KINDS = {"decoder-only": lambda: encoder(), "with BOS": lambda: encoder("<s> $A"), "encoder-decoder": t5}


@pytest.fixture(params=KINDS)
def rows(request, tmp_path, cache) -> tuple[TokenRows, Encoder]:
    """Token rows of random texts, of each kind of model: empty prompts, cut targets and dropped ones among them."""
    of = KINDS[request.param]()
    path = write(tmp_path / "random.jsonl", random_pairs(150))
    return rows_of(config(path), of), of


def collator(of: Encoder) -> Collator:
    return Collator(PAD, PAD if of.is_encoder_decoder else None)


def test_counts_are_those_of_the_collated_labels(rows):
    rows, of = rows
    batches = GlobalBatches(rows, collator(of), seed=3, global_batch_size=16, micro_batch_size=4, epochs=1)
    seen = Counter(
        label
        for step in range(batches.steps)
        for rank in range(2)
        for batch in batches.window(step, rank, 2)
        for label in batch.labels.flatten().tolist()
    )
    seen.pop(IGNORE)
    assert rows.count(len(WORDS)).counts.tolist() == [seen[token] for token in range(len(WORDS))]
    assert seen[EOS] and seen[PAD] == 0
    for world_size in (2, 3, 7, 200):  # the last has ranks without a row
        shares = [rows.count(len(WORDS), rank, world_size).counts for rank in range(world_size)]
        assert torch.equal(sum(shares), rows.count(len(WORDS)).counts)


def test_counts_are_cached_under_the_key_of_the_rows(rows, cache):
    rows, _ = rows
    counted = label_frequencies(rows, "hash", len(WORDS), "corpus")
    assert torch.equal(counted.counts, rows.count(len(WORDS)).counts)
    assert (counted.tokenizer_hash, counted.corpus) == ("hash", "corpus")
    before = files(cache)
    again = label_frequencies(rows, "hash", len(WORDS), "corpus")
    assert files(cache) == before and torch.equal(again.counts, counted.counts)
    assert len(label_frequencies(rows, "hash", len(WORDS) + 2, "corpus").counts) == len(WORDS) + 2  # another vocabulary


@FEW
@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    order=st.lists(st.integers(0, 39), max_size=60),
    chunk=st.integers(1, 12),
    shards=st.integers(1, 4),
    shuffled=st.booleans(),
)
def test_column_values_of_any_selection(lengths, order, chunk, shards, shuffled):
    values = [[10 * number + place for place in range(length)] for number, length in enumerate(lengths)]
    table = pa.Table.from_batches(
        [
            pa.record_batch({"labels": pa.array(values[i : i + chunk], pa.list_(pa.int32()))})
            for i in range(0, len(values), chunk)
        ]
    )
    data = datasets.Dataset(table)
    if order:  # with duplicates, out of order, some rows never
        data = data.select([number % len(values) for number in order])
    if shuffled:
        data = data.shuffle(seed=1)
    found = [
        value
        for shard in range(shards)
        for piece in column_values(data, "labels", len(data) * shard // shards, len(data) * (shard + 1) // shards)
        for value in piece.tolist()
    ]
    assert Counter(found) == Counter(value for row in data["labels"] for value in row)


def test_general_corpus_counts_a_text(tmp_path, cache):
    text = tmp_path / "a.txt"
    text.write_bytes(b"\xef\xbb\xbfa b b\na\xe2\x80\xa8c\n")
    counted = text_frequencies(text, word_tokenizer("<s> $A </s>"), "hash", len(WORDS))
    assert counted.counts.tolist() == [Counter(ids("a b b a c"))[token] for token in range(len(WORDS))]
    before = files(cache)
    again = text_frequencies(text, word_tokenizer("<s> $A </s>"), "hash", len(WORDS))
    assert files(cache) == before and torch.equal(again.counts, counted.counts)


# --- batches ---


def numbered(n: int) -> TokenRows:
    """n rows of different lengths, each knowing its number."""
    columns = {
        "input_ids": [[i] * (1 + i % 3) for i in range(n)],
        "labels": [[IGNORE] * (i % 3) + [i] for i in range(n)],
    }
    return TokenRows(datasets.Dataset.from_dict(columns), "key", {})


def in_order(batches: GlobalBatches, step: int, world_size: int) -> list:
    """The micro-batches of a global batch, as one rank would see them."""
    windows = [batches.window(step, rank, world_size) for rank in range(world_size)]
    assert len({len(window) for window in windows}) == 1, "every rank has the same number of micro-batches"
    return [window[place] for place in range(len(windows[0])) for window in windows]


def same(a, b) -> bool:
    return torch.equal(a.labels, b.labels) and all(torch.equal(a.inputs[name], b.inputs[name]) for name in b.inputs)


@FEW
@given(
    n=st.integers(1, 23),
    micro=st.integers(1, 3),
    multiple=st.integers(1, 3),
    epochs=st.sampled_from([0.1, 0.5, 1, 1.1, 2, 2.75, 3]),
    seed=st.integers(0, 5),
)
def test_the_same_global_batches_on_any_number_of_ranks(n, micro, multiple, epochs, seed):
    size = 4 * micro * multiple
    rows = numbered(n)
    batches = GlobalBatches(rows, Collator(PAD), seed, size, micro, epochs)
    total = -(-round(epochs * n, 6) // 1)
    assert batches.steps == -(-total // size)
    stream = []
    for step in range(batches.steps):
        one = in_order(batches, step, 1)
        for world_size in (2, 4):
            # Made anew, as a resumed run would: a step needs its number alone.
            fresh = GlobalBatches(rows, Collator(PAD), seed, size, micro, epochs)
            assert all(same(a, b) for a, b in zip(in_order(fresh, step, world_size), one, strict=True))
        labels = torch.cat([batch.labels.flatten() for batch in one])
        stream += labels[labels != IGNORE].tolist()
        assert all(len(batch.labels) == micro for batch in one)
        assert stream[step * size :] == batches.row_numbers(step)
        assert len(batches.row_numbers(step)) == size or step == batches.steps - 1
    assert len(stream) == total
    for epoch in range(int(total // n)):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n)), "every row once in an epoch"


def test_epochs_and_seeds_are_shuffled_differently():
    def epoch(seed: int, number: int) -> list[int]:
        return GlobalBatches(numbered(20), Collator(PAD), seed, 20, 20).row_numbers(number)

    orders = [epoch(0, 0), epoch(0, 1), epoch(0, 2), epoch(1, 0), list(range(20))]
    assert all(orders[i] != orders[j] for i in range(5) for j in range(i))
    assert epoch(0, 10**6) == epoch(0, 10**6)


def test_a_short_last_window_is_filled_with_rows_without_labels():
    batches = GlobalBatches(numbered(5), Collator(PAD), seed=0, global_batch_size=8, micro_batch_size=2, epochs=1)
    windows = [batches.window(0, rank, 2) for rank in range(2)]
    assert [[batch.labels.shape[0] for batch in window] for window in windows] == [[2, 2], [2, 2]]
    tokens = [[int((batch.labels != IGNORE).sum()) for batch in window] for window in windows]
    assert tokens == [[2, 1], [2, 0]]  # micro-batches 0 and 2 are rank 0's; the last has fillers only
    assert all(int(batch.inputs["attention_mask"].sum()) > 0 for window in windows for batch in window)


@FEW
@given(n=st.integers(1, 23), size=st.integers(1, 5), world_size=st.sampled_from([1, 2, 3, 4]))
def test_validation_is_the_whole_split_once(n, size, world_size):
    rows = numbered(n)
    of_ranks = [list(validation_batches(rows, Collator(PAD), size, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in of_ranks}) == 1
    alone = list(validation_batches(rows, Collator(PAD), size, 0, 1))
    spread = [of_ranks[number % world_size][number // world_size] for number in range(len(alone))]
    assert all(same(a, b) for a, b in zip(spread, alone, strict=True))
    seen = [
        label
        for batches in of_ranks
        for batch in batches
        for label in batch.labels.flatten().tolist()
        if label != IGNORE
    ]
    assert sorted(seen) == list(range(n))


def test_collated_batch():
    of = encoder()
    rows, _ = of.rows([Example("a b", "c", ()), Example("d", "e f g", ())])
    batch = Collator(PAD)(rows)
    assert batch.inputs["input_ids"].tolist() == [[*ids("a b c"), PAD], ids("d e f g")]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [[IGNORE, *ids("c </s>"), IGNORE], ids("e f g </s>")]
    assert set(batch.inputs) == {
        "input_ids",
        "attention_mask",
    }  # never labels: the model must not compute a loss of its own

    rows, _ = t5().rows([Example("a b", "c", ()), Example("d", "e f g", ())])
    batch = Collator(PAD, decoder_start_token_id=BOS)(rows)
    assert batch.inputs["decoder_input_ids"].tolist() == [[BOS, *ids("c </s>"), PAD], [BOS, *ids("e f g")]]
    assert batch.labels.tolist() == [[*ids("c </s>"), IGNORE, IGNORE], ids("e f g </s>")]


def test_rows_are_read_in_order(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", random_pairs(2500, seed=1))  # several batches of the writer
    table = rows_of(config(path), t5()).table
    kept = (example for example in examples(config(path), "train") if example.target.strip())
    for example, found in islice(zip(kept, table, strict=True), 0, None, 97):
        assert found == row(t5(), example.source, example.target)
