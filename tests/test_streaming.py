"""Training on a stream: the same batches on any number of ranks, counts that are those of the rows, runs that go on where they were."""

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from distributed.forked import Group, Rank
from faults.runs import SAMPLE, SMALL, logged, status, train
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import config as data_config
from test_data import encoder, random_pairs, rows_of, t5
from tokenizers.normalizers import Replace

from pdl import distributed, streaming
from pdl.config import UserError, flattened, load_config
from pdl.cross_entropy import Loss
from pdl.data import IGNORE, Collator, Encoder
from pdl.frequencies import TokenFrequencies
from pdl.records import examples_hash, records
from pdl.run_directory import differences
from pdl.streaming import StreamedBatches, count_corpus, shuffled, training_examples
from pdl.train import Trainer

WORDS = 30  # of test_data's tokenizer


@given(
    number=st.integers(0, 60), size=st.integers(1, 30), seed=st.sampled_from(["0 0", "0 1"])
)  # fmt: skip
@settings(deadline=None)
def test_shuffled(number, size, seed):
    order = list(shuffled(iter(range(number)), size, seed))
    assert sorted(order) == list(range(number))
    assert order == list(shuffled(iter(range(number)), size, seed))
    assert all(item <= place + size for place, item in enumerate(order))  # it was in the buffer by then
    if number > 20 and size > 5:
        assert order != list(range(number)) and order != list(shuffled(iter(range(number)), size, "another"))


def corpus(folder: Path, number: int = 75, files: int = 3, **settings):
    """A configuration that streams the files of a folder; empty targets, and one that no token is left of, among them."""
    folder.mkdir(exist_ok=True)
    pairs = random_pairs(number, seed=5)
    pairs[7]["target"] = "\u00ad"  # something to strip(), nothing to the tokenizer
    for part in range(files):
        lines = [json.dumps(pair) + "\n" for pair in pairs[part::files]]
        (folder / f"part-{part}.jsonl").write_text("".join(lines))
    made = data_config(folder / "*.jsonl", streaming=True, shuffle_buffer=16, **settings)
    made.training.global_batch_size, made.training.micro_batch_size = 8, 2
    return made


def pass_over(folder: str) -> int:
    """One rank of a run that goes on at its third step: what is wrong is the same on all."""
    streaming._PASSED_BETWEEN_BEATS = 5
    distributed.start()
    read = batches(corpus(Path(folder)) if Path(folder).name == "whole" else corpus_cut_off(Path(folder)))
    trainer = Trainer(
        engine=None, head=None, loss=Loss(torch.ones(WORDS), "sum"), meter=None, batches=read, validation=None, collator=None,
        learning_rate=None, alpha=0.0, zero_stage=0,
    )  # fmt: skip
    window, unreadable = trainer.window(2)
    try:
        trainer.global_denominator(2, window, unreadable)
    except UserError as error:
        print(error, flush=True)
    distributed.stop()
    return 0


def corpus_cut_off(folder: Path):
    """The second file ends in the middle of a line, here and not on the other host."""
    made = corpus(folder)
    path = folder / "part-0.jsonl"
    path.write_text(path.read_text()[:-20])
    return made


def test_what_one_rank_alone_cannot_read_on_its_way_ends_all(tmp_path):
    group = Group([Rank(str(tmp_path / name)) for name in ("whole", "cut")], pass_over)
    assert group.wait(120) == [0, 0], group.said
    assert all("part-0.jsonl:25" in said for said in group.said), group.said


def batches(made, of: Encoder | None = None) -> StreamedBatches:
    of = of or encoder()
    return StreamedBatches(made, of, Collator(0, 0 if of.is_encoder_decoder else None))


def rows_in(batch) -> list[tuple]:
    """Its rows without padding, so that they can be compared."""
    inputs = batch.inputs["input_ids"].tolist()
    kept = batch.inputs["attention_mask"].sum(1).tolist()
    labels = [[label for label in row if label != IGNORE] for row in batch.labels.tolist()]
    return [(tuple(row[:length]), tuple(label)) for row, length, label in zip(inputs, kept, labels, strict=True)]


@pytest.mark.parametrize("kind", [encoder, t5])
def test_every_layout_sees_the_same_global_batches(tmp_path, kind):
    made, of = corpus(tmp_path / "corpus"), kind()
    of.tokenizer.backend_tokenizer.normalizer = Replace("\u00ad", "")
    steps = 20  # more than an epoch: 75 examples
    alone = batches(made, of)
    one = [list(map(rows_in, alone.window(step, 0, 1))) for step in range(steps)]
    for world_size in (2, 4):
        streams = [batches(made, of) for _ in range(world_size)]
        for step in range(steps):
            windows = [list(map(rows_in, streams[rank].window(step, rank, world_size))) for rank in range(world_size)]
            assert [windows[j % world_size][j // world_size] for j in range(4)] == one[step]
            assert all(stream.row_numbers(step) == streams[0].row_numbers(step) for stream in streams)
    # An epoch is the corpus, each example once.
    seen = [row for window in one for micro in window for row in micro]
    examples = [example for _, example in training_examples(made)]
    expected = Counter(
        (tuple(row["input_ids"]), tuple(i for i in row["labels"] if i != IGNORE)) for row in of.rows(examples)[0]
    )
    first = Counter(seen[: len(examples)])
    assert sum(first.values()) == len(examples) and all(
        first[row] == number for row, number in expected.items() if row[1]
    )
    assert sum(not labels for _, labels in seen[: len(examples)]) == len(examples) - sum(expected.values()) == 1


def test_a_stream_goes_on_where_it_was(tmp_path):
    made = corpus(tmp_path / "corpus")
    first = batches(made)
    windows = [list(map(rows_in, first.window(step, 1, 2))) for step in range(25)]
    for step in (1, 9, 10, 24):
        later = batches(made)
        assert list(map(rows_in, later.window(step, 1, 2))) == windows[step]
        place = later.row_numbers(step)[0]
        assert place.startswith(str(tmp_path / "corpus" / "part-")) and place.rpartition(":")[2].isdigit()
        if step < 24:
            assert list(map(rows_in, later.window(step + 1, 1, 2))) == windows[step + 1]
    made.training.seed = 1
    assert list(map(rows_in, batches(made).window(1, 1, 2))) != windows[1]


def test_ranks_with_files_of_their_own(tmp_path):
    made = corpus(tmp_path / "corpus", number=64, files=4, stream_by="shards")
    streams = [batches(made) for _ in range(2)]
    for step in range(8):
        for rank, stream in enumerate(streams):
            assert len(stream.window(step, rank, 2)) == 2
            files = {Path(place.rpartition(":")[0]).name for place in stream.row_numbers(step)}
            assert files <= {f"part-{rank}.jsonl", f"part-{rank + 2}.jsonl"}


def test_an_empty_stream_is_refused(tmp_path):
    made = corpus(tmp_path / "corpus", number=0 + 9)
    (tmp_path / "corpus/part-1.jsonl").write_text(json.dumps({"source": "a", "target": " "}) + "\n")
    made.data.train = str(tmp_path / "corpus/part-1.jsonl")
    with pytest.raises(UserError, match="nothing to learn from"):
        batches(made).window(0, 0, 1)


@pytest.mark.parametrize("stream_by", ["rows", "shards"])
def test_streams_of_the_hub(tmp_path, monkeypatch, stream_by):
    """`datasets` takes a folder of the same name before it asks the hub: the same code, without a network."""
    (tmp_path / "owner/name").mkdir(parents=True)
    for part in range(4):
        lines = [json.dumps({"source": f"{part}", "target": f"{number}"}) + "\n" for number in range(6)]
        (tmp_path / f"owner/name/train-{part}.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "home")
    source = "hub:owner/name:train"
    whole = [(record["source"], record["target"]) for _, record in records(source, streaming=True)]
    assert len(whole) == 24 and not list((tmp_path / "home").rglob("*.arrow"))
    parts = [[(r["source"], r["target"]) for _, r in records(source, (rank, 2), streaming=True)] for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(whole) and len({part for part, _ in parts[0]}) == 2
    with pytest.raises(UserError, match="4 files, fewer than 5 ranks"):
        list(records(source, (0, 5), streaming=True))
    made = data_config(source, streaming=True, stream_by=stream_by, shuffle_buffer=4)
    made.training.global_batch_size, made.training.micro_batch_size = 4, 2
    before = examples_hash(made, "train")
    assert len(batches(made).window(3, 0, 2)) == 1
    (tmp_path / "owner/name/train-3.jsonl").write_text(json.dumps({"source": "x", "target": "y"}) + "\n")
    assert examples_hash(made, "train") != before


# --- counts ---


def count(told: list) -> None:
    """One rank: [folder, file, the round at whose end it dies]."""
    folder, file, dies = told
    made = data_config(str(folder / "*.jsonl"), streaming=True)
    made.loss.frequencies = str(file)
    streaming.BLOCK, streaming._BLOCKS_A_ROUND = 7, 1
    rounds = []

    def whole_file(path, write=streaming.whole_file):
        rounds.append(path)
        if len(rounds) == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path)

    streaming.whole_file = whole_file
    distributed.start()
    count_corpus(made, encoder(), examples_hash(made, "train"), "hash", WORDS)
    distributed.stop()


def test_a_count_that_is_killed_goes_on_and_is_that_of_the_rows(tmp_path, monkeypatch, group_of_one):
    monkeypatch.setenv("PDL_CACHE", str(tmp_path / "cache"))
    made, file = corpus(tmp_path / "corpus"), tmp_path / "counts/a.safetensors"
    made.data.streaming = False
    expected = rows_of(made, encoder()).count(WORDS).counts
    killed = Group([Rank([tmp_path / "corpus", file, 2 if rank == 0 else None]) for rank in range(2)], count)
    killed.processes[0].join(120)
    assert killed.processes[0].exitcode == -signal.SIGKILL and not file.exists()
    for process in killed.processes:
        process.kill()
    (notes,) = file.parent.glob(".*.partial")
    assert TokenFrequencies.load(notes).corpus == "2"  # blocks: one of each rank
    for world_size in (3, 1):  # goes on; is there already
        group = Group([Rank([tmp_path / "corpus", file, None]) for _ in range(world_size)], count)
        assert group.wait() == [0] * world_size, group.said
        assert ("going on after 14 examples" if world_size == 3 else "already") in "\n".join(group.said)
        assert torch.equal(TokenFrequencies.load(file).counts, expected)
        assert not list(file.parent.glob(".*"))
    (tmp_path / "corpus/part-0.jsonl").write_text(json.dumps({"source": "a", "target": "b"}) + "\n")
    other = Group([Rank([tmp_path / "corpus", file, None])], count)
    assert other.wait() != [0] and "holds another count" in "\n".join(other.said)
    assert torch.equal(TokenFrequencies.load(file).counts, expected)


# --- whole runs ---


@pytest.fixture(scope="module")
def streamed(tmp_path_factory) -> list[str]:
    """Overrides of a run on a stream, with a tokenizer and counts made beforehand by the real commands."""
    folder = tmp_path_factory.mktemp("streamed")
    first = train(folder / "first", "training.max_steps=1", "evaluation.examples=0", ranks=1)
    assert first.exit_codes() == [0], first.output()
    overrides = [
        "data.streaming=true", "data.shuffle_buffer=20", "tokenizer.vocab_size=null", f"tokenizer.name_or_path={folder / 'first/tokenizer'}",
        f"loss.frequencies={folder / 'counts.safetensors'}", "model.dropout=0.0",
    ]  # fmt: skip
    early = train(folder / "early", *overrides, ranks=1)
    assert early.exit_codes() == [2] and "`python -m pdl count` with this configuration writes it" in early.output()
    counting = Group([Rank(["count", SAMPLE, *SMALL, *overrides])] * 2)
    assert counting.wait() == [0, 0], counting.said
    counted = TokenFrequencies.load(folder / "counts.safetensors").counts
    assert torch.equal(counted, TokenFrequencies.load(folder / "first/frequencies.safetensors").counts)
    return overrides


def test_a_stopped_run_on_a_stream_goes_on(tmp_path, streamed):
    whole = train(tmp_path / "whole", *streamed)
    assert whole.exit_codes() == [0, 0], whole.output()
    stopped = train(tmp_path / "run", *streamed, faults={0: {"signal": {"step": 7, "number": signal.SIGTERM}}})
    assert stopped.exit_codes() == [75, 75], stopped.output()
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    changed = train(tmp_path / "run", *streamed, "data.shuffle_buffer=21")
    assert changed.exit_codes() == [2, 2] and "shuffle_buffer" in changed.output()
    again = train(tmp_path / "run", *streamed)
    assert again.exit_codes() == [0, 0], again.output()
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    alone = train(tmp_path / "alone", *streamed, f"training.output_dir={tmp_path / 'alone'}", ranks=1)
    assert alone.exit_codes() == [0], alone.output()
    for one, two in zip(logged(tmp_path / "alone"), logged(tmp_path / "whole"), strict=True):
        assert one["step"] == two["step"] and one.get("train/loss", 0) == pytest.approx(
            two.get("train/loss", 0), rel=1e-4
        )


def test_files_of_their_own_bind_a_run_to_its_ranks(tmp_path, streamed):
    lines = (REPOSITORY / "recipes/summarization/sample/train.jsonl").read_text().splitlines(keepends=True)
    for part in range(2):
        (tmp_path / f"part-{part}.jsonl").write_text("".join(lines[part::2]))
    overrides = [*streamed, f"data.train={tmp_path}/part-*.jsonl", "data.stream_by=shards"]
    stopped = train(tmp_path / "run", *overrides, faults={1: {"signal": {"step": 5, "number": signal.SIGTERM}}})
    assert stopped.exit_codes() == [75, 75], stopped.output()
    fewer = train(tmp_path / "run", *overrides, ranks=1)
    assert fewer.exit_codes() == [2] and "ranks (data.stream_by=shards): 2 there, 1 now" in fewer.output(), (
        fewer.output()
    )
    again = train(tmp_path / "run", *overrides)
    assert again.exit_codes() == [0, 0] and status(tmp_path / "run")["state"] == "done"
    assert "was not counted over this run's data" in again.output()


def test_what_one_rank_cannot_read_ends_all(tmp_path, streamed):
    lines = (REPOSITORY / "recipes/summarization/sample/train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part-0.jsonl").write_text("".join(lines[::2]))
    (tmp_path / "part-1.jsonl").write_text("".join([*lines[1:101:2], "{\n", *lines[101::2]]))
    shards = [*streamed, f"data.train={tmp_path}/part-*.jsonl", "data.stream_by=shards", "training.save_every=1"]
    run = train(tmp_path / "run", *shards)
    assert run.exit_codes() == [2, 2], run.output()
    assert "part-1.jsonl:51: not valid JSON" in run.output() and "Traceback" not in run.output()
    ended = status(tmp_path / "run")
    assert (ended["state"], ended["restart"]) == ("refused", False) and ended["checkpoint"] >= 2
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("partial*")] == []


def test_a_count_is_of_the_same_data_and_lengths_on_every_rank(tmp_path, streamed):
    other = Group([Rank(["count", SAMPLE, *SMALL, *streamed, "data.max_target_tokens=10"])])
    assert other.wait() == [2] and "holds another count" in other.said[0]
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()
        (tmp_path / f"rank{rank}/mine.jsonl").write_text(
            json.dumps({"document": "a", "summary": "b" * (rank + 1)}) + "\n"
        )
    told = [
        "count",
        str(REPOSITORY / SAMPLE),
        *SMALL,
        *streamed,
        "data.train=mine.jsonl",
        f"loss.frequencies={tmp_path}/c.safetensors",
    ]
    told += [f"data.validation={REPOSITORY}/recipes/summarization/sample/validation.jsonl", "data.test=null"]
    told += [f"deepspeed={REPOSITORY}/configs/deepspeed/zero2.json"]
    apart = Group([Rank(told, tmp_path / f"rank{rank}", {"LOCAL_RANK": "0"}) for rank in range(2)])
    assert apart.wait() == [2, 2], apart.said
    assert "the ranks disagree" in apart.said[0] and "data.train" in apart.said[0]
    assert not list(tmp_path.glob("*c.safetensors*"))


def test_a_run_from_before_a_setting_existed_goes_on(group_of_one):
    config = load_config(SAMPLE)
    stored = flattened(config.to_dict())
    del stored["data.streaming"], stored["loss.frequencies"]
    assert differences(stored, config, 1) == []
    config.data.streaming = True
    assert differences(stored, config, 1) == ["data.streaming: False there, True asked for"]


def test_what_a_stream_cannot_honour_is_refused_all_at_once():
    with pytest.raises(UserError) as refused:
        load_config(SAMPLE, ["data.streaming=true", "training.max_steps=null", "training.epochs=1"])
    for key in ("training.epochs", "tokenizer.vocab_size", "loss.frequencies is missing"):
        assert key in str(refused.value)
    with pytest.raises(UserError, match="stream_by is for data"):
        load_config(SAMPLE, ["data.stream_by=shards"])
    with pytest.raises(UserError, match="has 1 files, fewer than 2 ranks"):
        shards = ["data.streaming=true", "data.stream_by=shards", "tokenizer={name_or_path: x}", "loss.frequencies=x"]
        load_config(SAMPLE, shards, world_size=2)
