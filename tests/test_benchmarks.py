"""The benchmark of the loss from hidden states runs on a tiny shape, and what it writes is complete."""

import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY, environment

PROVIDERS = {"eager", "ours", "chunks 256"}
FIELDS = {
    "device", "threads", "torch", "shape", "dtype", "fraction", "supervised", "cross_entropy", "accuracy", "provider", "runs", "milliseconds",
    "first_quartile", "third_quartile", "mebibytes", "weighted", "loss_error", "hidden_error", "head_error", "ignored_rows_zero",
    "floor_milliseconds", "of_eager", "flagged", "rank", "warning",
}  # fmt: skip


@pytest.mark.slow
def test_the_benchmark_of_the_linear_loss(tmp_path):
    script = REPOSITORY / "tests/benchmarks/linear_cross_entropy.py"
    told = ["--device", "cpu", "--dtypes", "fp32", "--shapes", "512x32x512", "--fractions", "0.3", "--runs", "2"]
    command = [sys.executable, script, *told, "--providers", *PROVIDERS, "liger", "--output", tmp_path]
    own = environment(PYTHONPATH=str(REPOSITORY))
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    (missing,) = (record for record in records if "not_run" in record)
    measured = [record for record in records if "not_run" not in record]
    assert missing["provider"] == "liger" and f"- liger: {missing['not_run']}" in done.stdout  # it needs a GPU
    assert {record["provider"] for record in measured} == PROVIDERS
    assert {record["rank"] for record in measured} == {1, 2, 3}
    for record in measured:
        assert record.keys() >= FIELDS
        assert record["supervised"] == 2 * 77 and record["runs"] == 2
        assert max(record["loss_error"], record["hidden_error"], record["head_error"]) < 1e-5
        assert record["ignored_rows_zero"] and not record["flagged"] and not record["warning"]
        assert 0 < record["first_quartile"] <= record["milliseconds"] <= record["third_quartile"]
        assert record["mebibytes"] is not None and record["of_eager"] > 0
        assert f"| {record['provider']} |" in (tmp_path / "results.md").read_text()
