"""Whole runs by the real command line: what is on disk at the end, the same logs after a kill, the same texts on any layout."""

import json
import signal
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import REPOSITORY, torchrun
from distributed.forked import Group, Rank

from pdl.config import load_config
from pdl.data import Collator, Encoder
from pdl.generate import generate, load_exported
from pdl.records import Example, examples

SAMPLE = "configs/summarization/sample.yaml"
DIALOGUE = "configs/dialogue/sample.yaml"
SOURCE, TARGET = 256, 72  # the sample's length limits
SMALL = [  # dropout on, the end of an epoch inside a batch, logs and checkpoints at different steps
    "model.d_model=32", "model.d_kv=8", "model.d_ff=32", "model.num_layers=1", "model.num_decoder_layers=1", "training.global_batch_size=32",
    "training.max_steps=11", "training.log_every=3", "training.save_every=2", "training.evaluate_every=5", "evaluation.examples=4",
]  # fmt: skip
ZERO3 = "deepspeed=tests/distributed/zero3.json"  # every parameter sharded, however small
TIMES = {"train/tokens_per_second", "train/step_seconds"}


def train(ranks: int, directory: Path, *overrides: str) -> Group:
    """Ranks forked from one process that has everything imported; `finished` starts under torchrun."""
    group = Group([Rank(["train", SAMPLE, *SMALL, f"training.output_dir={directory}", *overrides])] * ranks)
    group.wait()
    # DeepSpeed itself leaves 66 MiB of each rank in the machine's memory, named after the port that the ranks met at.
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{group.port}_*"))
    return group


def codes(group: Group) -> set[int]:
    return {process.exitcode for process in group.processes}


def logged(directory: Path) -> list[dict]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("finished") / "run"
    ended = torchrun(2, "-m", "pdl", "train", SAMPLE, *SMALL, f"training.output_dir={directory}")
    assert ended.returncode == 0, ended.stderr
    return directory


@pytest.fixture(scope="module")
def other_overrides(finished) -> list[str]:
    """ZeRO-3, and a pretrained model: it comes in eval mode, so that a resumed run must switch dropout on itself."""
    return [ZERO3, f"model={{name_or_path: {finished / 'model'}, dropout: 0.2}}", "tokenizer=null"]


@pytest.fixture(scope="module")
def finished_other(tmp_path_factory, other_overrides) -> Path:
    directory = tmp_path_factory.mktemp("finished-other") / "run"
    ended = train(2, directory, *other_overrides)
    assert codes(ended) == {0}, ended.said
    return directory


@pytest.fixture(scope="module")
def finished_dialogue(tmp_path_factory) -> Path:
    """A decoder-only model."""
    directory = tmp_path_factory.mktemp("finished-dialogue") / "run"
    small = ["training.max_steps=8", "training.warmup_steps=0", "evaluation.examples=4", "training.evaluate_every=100"]
    ended = Group([Rank(["train", DIALOGUE, *small, f"training.output_dir={directory}"])])
    assert ended.wait() == [0], ended.said
    return directory


def test_what_a_run_leaves(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {".lock", "config.yaml", "tokenizer", "frequencies.safetensors", "status.json", "metrics.jsonl", "tensorboard", "checkpoints", "model", "report.json"}  # fmt: skip
    status = json.loads((finished / "status.json").read_text())
    assert status.pop("launch")
    assert status == {
        "state": "done",
        "exit_code": 0,
        "step": 11,
        "checkpoint": 11,
        "reason": None,
        "restart": False,
        "resume": "auto",
    }
    assert yaml.safe_load((finished / "config.yaml").read_text())["loss"]["epsilon"] == 1e-8
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == ["step-00000010", "step-00000011"]
    assert [line["step"] for line in logged(finished)] == [0, 3, 5, 6, 9, 10, 11]
    assert list(finished.glob("model/*.safetensors")) and not list(finished.glob("model/*.bin"))
    last = logged(finished)[-1]
    tags = {"loss", "cross_entropy", "perplexity", "accuracy", "weight_mean", "effective_sample_fraction"}
    tags |= {f"{name}/{bucket}" for name in ("cross_entropy", "token_share") for bucket in ("head", "middle", "tail")}
    assert {f"validation/{tag}" for tag in tags} | {f"train/{tag}" for tag in tags} <= set(last)
    assert {"train/alpha", "train/learning_rate", "train/grad_norm", "train/supervised_fraction"} <= set(last)
    report = json.loads((finished / "report.json").read_text())
    assert report["last_validation"]["validation/loss"] == last["validation/loss"] and report["steps"] == 11
    assert set(report["scores"]) == {"rouge1", "rouge2", "rougeL", "distinct2", "length_ratio"}


@pytest.mark.parametrize("run", ["finished", "finished_other"])
def test_the_exported_model_has_the_logged_loss(request, run):
    """Model, tokenizer, template, labels and counts, end to end: the validation loss again, from the files, by transformers alone."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    finished = request.getfixturevalue(run)
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    model = AutoModelForSeq2SeqLM.from_pretrained(finished / "model").eval()
    records = [
        json.loads(line)
        for line in (REPOSITORY / "recipes/summarization/sample/validation.jsonl").read_text().splitlines()
    ]
    losses, labels = [], []
    for record in records:
        source = tokenizer(record["document"], return_tensors="pt", truncation=True, max_length=SOURCE).input_ids
        target = torch.tensor([[*tokenizer(record["summary"]).input_ids, tokenizer.eos_token_id]])[:, :TARGET]
        with torch.no_grad():
            logits = model(input_ids=source, labels=target).logits[0]
        losses.append(F.cross_entropy(logits.double(), target[0], reduction="none"))
        labels.append(target[0])
    losses, labels = torch.cat(losses), torch.cat(labels)
    assert losses.mean().item() == pytest.approx(logged(finished)[-1]["validation/cross_entropy"], rel=1e-5)

    train = [
        json.loads(line) for line in (REPOSITORY / "recipes/summarization/sample/train.jsonl").read_text().splitlines()
    ]
    targets = [[*tokenizer(record["summary"]).input_ids, tokenizer.eos_token_id][:TARGET] for record in train]
    counts = torch.bincount(
        torch.tensor([token for target in targets for token in target]), minlength=model.config.vocab_size
    ).double()
    frequency = torch.where(counts > 0, counts, counts[counts > 0].min()) / counts.sum()
    weights = (frequency + 1e-8) ** -0.25
    weighted = (weights[labels] * losses).sum() / weights[labels].sum()
    assert weighted.item() == pytest.approx(logged(finished)[-1]["validation/loss"], rel=1e-5)


def test_a_finished_run_says_so_and_is_left_alone(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    ended = train(2, finished)
    assert codes(ended) == {0} and "is finished" in ended.said[0]
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_pretrained_model_killed_and_resumed_logs_the_same(finished_other, tmp_path, other_overrides):
    """SIGKILL to every process once step 5 is logged; the run goes on as if nothing had happened. More in test_faults.py."""
    directory = tmp_path / "run"
    group = Group([Rank(["train", SAMPLE, *SMALL, f"training.output_dir={directory}", *other_overrides])] * 2)
    log = directory / "metrics.jsonl"
    deadline = time.time() + 120
    while not (log.exists() and '"step": 5' in log.read_text()):
        assert time.time() < deadline, group.said
        time.sleep(0.01)
    for process in group.processes:
        process.kill()
    assert group.wait() == [-signal.SIGKILL] * 2
    ended = train(2, directory, *other_overrides)
    assert codes(ended) == {0}, ended.said
    assert "continuing at step" in ended.said[0]
    assert logged(directory) == logged(finished_other)


def test_other_data_under_the_same_name_is_refused_and_nothing_touched(finished_other, other_overrides, tmp_path):
    """The data is a part of what a run was made with: here its rows change, the configuration does not."""
    directory = tmp_path / "run"
    records = (REPOSITORY / "recipes/summarization/sample/train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(records))
    overrides = [f"data.train={tmp_path / 'train.jsonl'}", "training.max_steps=4", "training.schedule_steps=9"]
    assert codes(train(2, directory, *other_overrides, *overrides)) == {0}
    (tmp_path / "train.jsonl").write_text("".join(records[:-1]))
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    ended = train(2, directory, *other_overrides, *overrides, "training.max_steps=6")
    assert codes(ended) == {2} and "cannot be continued here" in ended.said[0] and "train_rows" in ended.said[0]
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


def test_another_configuration_is_refused_with_the_difference(finished):
    ended = train(2, finished, "loss.alpha=0.5")
    assert json.loads((finished / "status.json").read_text())["state"] == "done"
    assert codes(ended) == {2} and "loss.alpha: 0.25 there, 0.5 asked for" in ended.said[0]


def test_another_number_of_ranks_sees_the_same_batches(tmp_path):
    """Dropout 0: one rank with twice the accumulation logs the same losses, up to rounding, and generates the same texts."""
    runs = [tmp_path / "one", tmp_path / "two"]
    for ranks, directory in enumerate(runs, 1):
        ended = train(ranks, directory, "model.dropout=0")
        assert codes(ended) == {0}, ended.said
    for one, two in zip(*map(logged, runs), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    one, two = (json.loads((directory / "report.json").read_text())["scores"] for directory in runs)
    assert one == two


def test_the_exported_decoder_has_the_logged_loss(finished_dialogue):
    """The same for a decoder-only model: prompt masked, shifted once, by the model's own loss."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished_dialogue / "model")
    model = AutoModelForCausalLM.from_pretrained(finished_dialogue / "model").eval()
    config = load_config(DIALOGUE)
    total, tokens = 0.0, 0
    for example in examples(config, "validation"):
        prompt = tokenizer(example.source).input_ids[-config.data.max_source_tokens :]
        target = [*tokenizer(example.target).input_ids, tokenizer.eos_token_id][: config.data.max_target_tokens]
        ids, labels = torch.tensor([prompt + target]), torch.tensor([[-100] * len(prompt) + target])
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * len(target)
        tokens += len(target)
    assert total / tokens == pytest.approx(logged(finished_dialogue)[-1]["validation/cross_entropy"], rel=1e-5)


@pytest.mark.parametrize(("run", "config"), [("finished", SAMPLE), ("finished_dialogue", DIALOGUE)])
def test_generation_is_the_models_own_greedy_output(request, group_of_one, run, config):
    """Batches, padding (on the left for decoder-only models) and trimming change nothing against one prompt at a time."""
    from transformers import AutoTokenizer

    model = load_exported(request.getfixturevalue(run) / "model")
    model.generation_config.update(repetition_penalty=1.5, min_length=20)  # what a pretrained model may bring along
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(run) / "model")
    encoder = Encoder(tokenizer, model.config.is_encoder_decoder, 192, 24)
    sources = [example.source for example in islice(examples(load_config(config), "test"), 6)]
    texts = generate(model, encoder, sources, batch_size=4)
    for ids, text in zip(encoder.sources(sources), texts, strict=True):
        read = torch.tensor([ids])
        written = torch.tensor([[tokenizer.pad_token_id]]) if encoder.is_encoder_decoder else read
        for _ in range(24):  # greedy, written out
            inputs = (
                {"input_ids": read, "decoder_input_ids": written}
                if encoder.is_encoder_decoder
                else {"input_ids": written}
            )
            with torch.no_grad():
                following = model(**inputs).logits[:, -1].argmax(-1, keepdim=True)
            written = torch.cat([written, following], dim=1)
            if following.item() == tokenizer.eos_token_id:
                break
        begun = 1 if encoder.is_encoder_decoder else len(ids)
        assert text == tokenizer.decode(written[0, begun:], skip_special_tokens=True)


def test_an_empty_source_is_learned_and_generated_from(finished, finished_dialogue, group_of_one):
    from transformers import AutoTokenizer

    for directory, example in (
        (finished, Example("", "words", ("words",))),
        (finished_dialogue, Example("", " words", (" words",))),
    ):
        model = load_exported(directory / "model")
        encoder = Encoder(AutoTokenizer.from_pretrained(directory / "model"), model.config.is_encoder_decoder, 64, 8)
        rows, _ = encoder.rows([example])
        batch = Collator(0, 0 if encoder.is_encoder_decoder else None)(rows)
        assert torch.isfinite(model(**batch.inputs).logits).all()
        assert len(generate(model, encoder, ["", ""], batch_size=2)) == 2


def test_a_non_finite_loss_stops_before_the_update(tmp_path):
    """A learning rate that blows up at the first step: every rank ends, non-zero, before a checkpoint is written."""
    directory = tmp_path / "run"
    ended = train(2, directory, "training.learning_rate=1e30", "training.warmup_steps=0", "training.max_grad_norm=0")
    status = json.loads((directory / "status.json").read_text())
    assert codes(ended) == {1} and status["state"] == "failed" and status["exit_code"] == 1
    assert "is not finite" in status["reason"] and "dataset rows" in status["reason"]
    assert not list(directory.glob("checkpoints/*")) and not (directory / "model").exists()
