"""Buckets, sums and the log. That logged values equal their recomputation is part of test_exactness.py."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pdl.metrics import RunLog, frequency_buckets
from pdl.train import schedule


def test_buckets_by_the_mass_before():
    # Sorted: token 1 (50 of 100, mass before 0), token 3 (25, .50), token 0 (15, .75), token 4 (10, .90); token 2 unseen.
    assert frequency_buckets(torch.tensor([15, 50, 0, 25, 10])).tolist() == [1, 0, 2, 1, 2]


def test_equal_counts_are_ordered_by_id():
    assert frequency_buckets(torch.tensor([1, 1, 1, 1])).tolist() == [0, 0, 1, 1]


def test_one_token_alone_is_head():
    assert frequency_buckets(torch.tensor([0, 9])).tolist() == [2, 0]


def test_the_log_and_tensorboard_agree(tmp_path):
    log = RunLog(tmp_path, None)
    log.write(0, {"validation/loss": 3.0})
    log.write(5, {"train/loss": 2.5, "train/cross_entropy/head": 1.25})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 0, "validation/loss": 3.0},
        {"step": 5, "train/loss": 2.5, "train/cross_entropy/head": 1.25},
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(5, 2.5)]
    assert set(events.Tags()["scalars"]) == {"validation/loss", "train/loss", "train/cross_entropy/head"}


def test_resuming_sets_aside_what_came_after(tmp_path):
    log = RunLog(tmp_path, None)
    for step in (1, 2, 3, 4):
        log.write(step, {"train/loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')  # killed while writing
    log = RunLog(tmp_path, 2)
    log.write(3, {"train/loss": 30.0})
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    discarded = (tmp_path / "metrics.discarded-2.jsonl").read_text()
    assert '"train/loss": 3.0' in discarded and '"train/loss": 4.0' in discarded
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_starting_over_keeps_no_line_of_before(tmp_path):
    RunLog(tmp_path, None).write(1, {"train/loss": 1.0})
    log = RunLog(tmp_path, None)
    log.write(1, {"train/loss": 2.0})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_schedules():
    constant, linear, cosine = (
        schedule(kind, 1.0, warmup_steps=4, schedule_steps=14) for kind in ("constant", "linear", "cosine")
    )
    assert [linear(step) for step in (0, 1, 3, 4, 9, 14, 20)] == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0])
    assert [cosine(step) for step in (0, 3, 4, 9, 14)] == pytest.approx([0.25, 1.0, 1.0, 0.5, 0.0], abs=1e-12)
    assert [constant(step) for step in (0, 4, 100)] == [0.25, 1.0, 1.0]
