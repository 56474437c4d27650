"""Buckets, sums and the log. That logged values equal their recomputation is part of test_exactness.py."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pdl.cross_entropy import Loss
from pdl.metrics import Meter, RunLog, frequency_buckets
from pdl.train import schedule


def test_buckets_by_the_mass_before():
    # Sorted: token 1 (50 of 100, mass before 0), token 3 (25, .50), token 0 (15, .75), token 4 (10, .90); token 2 unseen.
    assert frequency_buckets(torch.tensor([15, 50, 0, 25, 10])).tolist() == [1, 0, 2, 1, 2]


def test_equal_counts_are_ordered_by_id():
    assert frequency_buckets(torch.tensor([1, 1, 1, 1])).tolist() == [0, 0, 1, 1]


def test_one_token_alone_is_head():
    assert frequency_buckets(torch.tensor([0, 9])).tolist() == [2, 0]


def test_the_log_and_tensorboard_agree(group_of_one, tmp_path):
    log = RunLog(tmp_path, -1)
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


def test_starting_over_keeps_no_line_of_before(group_of_one, tmp_path):
    RunLog(tmp_path, -1).write(1, {"train/loss": 1.0})
    log = RunLog(tmp_path, -1)
    log.write(1, {"train/loss": 2.0})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_schedules():
    constant, linear, cosine = (
        schedule(kind, 1.0, warmup_steps=4, schedule_steps=14) for kind in ("constant", "linear", "cosine")
    )
    assert [linear(step) for step in (0, 1, 3, 4, 9, 14, 20)] == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0])
    assert [cosine(step) for step in (0, 3, 4, 9, 14)] == pytest.approx([0.25, 1.0, 1.0, 0.5, 0.0], abs=1e-12)
    assert [constant(step) for step in (0, 4, 100)] == [0.25, 1.0, 1.0]


# --- the log of a run that goes on ---


def read_events(directory) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


@pytest.mark.parametrize("clock", ["forwards", "backwards"])
def test_a_log_that_goes_on_has_no_gap_and_no_line_twice(group_of_one, tmp_path, clock):
    """Also where the clock went backwards meanwhile: TensorBoard reads event files in the order of their times."""
    log = RunLog(tmp_path, -1)
    for step in range(6):
        log.write(step, {"train/loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/l')  # killed in a write
    if clock == "backwards":  # what was written then is from a future
        for path in (tmp_path / "tensorboard").iterdir():
            path.rename(path.with_name(path.name.replace("tfevents.1", "tfevents.9")))
    log = RunLog(tmp_path, 3)
    for step in range(4, 8):
        log.write(step, {"train/loss": float(step)})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(8))
    assert read_events(tmp_path) == [(step, float(step)) for step in range(8)]
    discarded = (tmp_path / "metrics.discarded-3.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in discarded[:2]] == [4, 5] and discarded[2] == '{"step": 6, "train/l'


def test_a_damaged_line_is_set_aside_and_the_others_stay(group_of_one, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st\x00p": 1}\nnothing\n{"step": 2}\n')
    RunLog(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 2}\n'
    assert len((tmp_path / "metrics.discarded-2.jsonl").read_text().splitlines()) == 2


def test_no_values_without_a_token(group_of_one):
    """A window of which every step was left out, not finite."""
    assert Meter(Loss(torch.ones(4)), torch.zeros(4, dtype=torch.long)).values("train") == {}
