"""Whole runs by the real command line: what is on disk at the end, the same logs after a kill, the same texts on any layout."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import REPOSITORY, environment, torchrun

SAMPLE = "configs/summarization/sample.yaml"
SMALL = [  # dropout on, the end of an epoch inside a batch, logs and checkpoints at different steps
    "model.d_model=32", "model.d_kv=8", "model.d_ff=32", "model.num_layers=1", "model.num_decoder_layers=1", "training.global_batch_size=32",
    "training.max_steps=11", "training.log_every=3", "training.save_every=2", "training.evaluate_every=5", "evaluation.examples=4",
]  # fmt: skip
ZERO3 = "deepspeed=configs/deepspeed/zero3.json"
TIMES = {"train/tokens_per_second", "train/step_seconds"}


def train(ranks: int, directory: Path, *overrides: str):
    return torchrun(ranks, "-m", "pdl", "train", SAMPLE, *SMALL, f"training.output_dir={directory}", *overrides)


def logged(directory: Path) -> list[dict]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("finished") / "run"
    ended = train(2, directory)
    assert ended.returncode == 0, ended.stderr
    return directory


@pytest.fixture(scope="module")
def finished_zero3(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("finished-zero3") / "run"
    ended = train(2, directory, ZERO3)
    assert ended.returncode == 0, ended.stderr
    return directory


def test_what_a_run_leaves(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {"config.yaml", "tokenizer", "frequencies.safetensors", "status.json", "metrics.jsonl", "tensorboard", "checkpoints", "model", "report.json"}  # fmt: skip
    assert json.loads((finished / "status.json").read_text()) == {
        "state": "done",
        "exit_code": 0,
        "step": 11,
        "reason": None,
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


@pytest.mark.parametrize("stage", [2, 3])
def test_the_exported_model_has_the_logged_loss(request, stage):
    """Model, tokenizer, template, labels and counts, end to end: the validation loss again, from the files, by transformers alone."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    finished = request.getfixturevalue("finished" if stage == 2 else "finished_zero3")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    model = AutoModelForSeq2SeqLM.from_pretrained(finished / "model").eval()
    records = [
        json.loads(line)
        for line in (REPOSITORY / "recipes/summarization/sample/validation.jsonl").read_text().splitlines()
    ]
    losses, labels = [], []
    for record in records:
        source = tokenizer(record["document"], return_tensors="pt", truncation=True, max_length=256).input_ids
        target = torch.tensor([[*tokenizer(record["summary"]).input_ids, tokenizer.eos_token_id]])[:, :64]
        with torch.no_grad():
            logits = model(input_ids=source, labels=target).logits[0]
        losses.append(F.cross_entropy(logits.double(), target[0], reduction="none"))
        labels.append(target[0])
    losses, labels = torch.cat(losses), torch.cat(labels)
    assert losses.mean().item() == pytest.approx(logged(finished)[-1]["validation/cross_entropy"], rel=1e-5)

    train = [
        json.loads(line) for line in (REPOSITORY / "recipes/summarization/sample/train.jsonl").read_text().splitlines()
    ]
    targets = [[*tokenizer(record["summary"]).input_ids, tokenizer.eos_token_id][:64] for record in train]
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
    assert ended.returncode == 0 and "is finished" in ended.stdout
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize("stage", [2, 3])
def test_killed_and_resumed_logs_the_same(request, tmp_path, stage):
    """SIGKILL to every process once step 5 is logged; the run goes on from step 4 as if nothing had happened."""
    directory = tmp_path / "run"
    overrides = [] if stage == 2 else [ZERO3]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pdl", "train", SAMPLE, *SMALL,
        f"training.output_dir={directory}", *overrides,
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = directory / "metrics.jsonl"
    deadline = time.time() + 120
    while not (log.exists() and '"step": 5' in log.read_text()):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(
        ["pkill", "-KILL", "-f", str(directory)], check=False
    )  # torchrun's workers have sessions of their own
    ended = train(2, directory, *overrides)
    assert ended.returncode == 0, ended.stderr
    assert "continuing at step" in ended.stdout
    assert logged(directory) == logged(request.getfixturevalue("finished" if stage == 2 else "finished_zero3"))


def test_another_configuration_is_refused_with_the_difference(finished):
    ended = train(2, finished, "loss.alpha=0.5")
    assert json.loads((finished / "status.json").read_text())["state"] == "done"
    assert ended.returncode != 0 and "loss.alpha: 0.25 there, 0.5 asked for" in ended.stderr


def test_another_number_of_ranks_sees_the_same_batches(tmp_path):
    """Dropout 0: one rank with twice the accumulation logs the same losses, up to rounding, and generates the same texts."""
    runs = [tmp_path / "one", tmp_path / "two"]
    for ranks, directory in enumerate(runs, 1):
        ended = train(ranks, directory, "model.dropout=0")
        assert ended.returncode == 0, ended.stderr
    for one, two in zip(*map(logged, runs), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_generation_is_the_models_own_greedy_output(finished):
    """Batches, padding and trimming change nothing against one prompt at a time through `model.generate`."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from pdl import distributed
    from pdl.config import load_config
    from pdl.data import Encoder, examples
    from pdl.generate import generate

    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    model = AutoModelForSeq2SeqLM.from_pretrained(finished / "model").eval()
    sources = [example.source for example in islice(examples(load_config(SAMPLE), "test"), 6)]
    distributed.start()
    try:
        texts = generate(model, Encoder(tokenizer, True, 256, 24), sources, batch_size=4)
    finally:
        distributed.stop()
    for source, text in zip(sources, texts, strict=True):
        inputs = tokenizer(source, return_tensors="pt", truncation=True, max_length=256).input_ids
        alone = model.generate(input_ids=inputs, max_new_tokens=24, do_sample=False, num_beams=1)
        assert text == tokenizer.decode(alone[0], skip_special_tokens=True)


def test_a_non_finite_loss_stops_before_the_update(tmp_path):
    """A learning rate that blows up: every rank ends, non-zero, and no checkpoint holds what is not finite."""
    directory = tmp_path / "run"
    ended = train(2, directory, "training.learning_rate=1e30", "training.warmup_steps=0", "training.max_grad_norm=0")
    status = json.loads((directory / "status.json").read_text())
    assert ended.returncode != 0 and status["state"] == "failed" and status["exit_code"] == 1
    assert "is not finite" in status["reason"] and "dataset rows" in status["reason"]
    shutil.rmtree(directory)
