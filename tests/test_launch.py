"""The launch scripts, run for real on one node, and the exit codes that they give back."""

import json
import os
import signal
import subprocess
import time

import pytest
from conftest import REPOSITORY, environment
from transformers import T5Config

from pdl.tokenizer import train_tokenizer

SCRIPTS = ["torchrun.sh", "deepspeed.sh"]
SAMPLE = "configs/summarization/sample.yaml"
TINY = ["training.max_steps=2", "training.micro_batch_size=4", "evaluation.examples=2"]


def launch(script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    command = [f"launch/{script}", *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment(**{"NPROC": "2"} | more), capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_whole_run_on_two_ranks(script, tmp_path):
    run = tmp_path / """it's a "run", $HOME"""
    ended = launch(script, SAMPLE, *TINY, f"training.output_dir={run}")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 x 4 examples x 2 micro-batches = 16 per step" in ended.stdout
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, 2)
    assert (run / "model" / "model.safetensors").stat().st_size > 1_000_000


@pytest.mark.parametrize(
    ("script", "override", "message"),
    [
        ("torchrun.sh", "training.max_stepz=2", "did you mean training.max_steps?"),
        ("deepspeed.sh", "training.max_stepz=2", "did you mean training.max_steps?"),
        ("torchrun.sh", "training.global_batch_size=4", "x 2 ranks; 8 would be"),  # the check itself is one process
    ],
)
def test_a_refused_configuration_ends_with_2(script, override, message, tmp_path):
    ended = launch(script, SAMPLE, *TINY, f"training.output_dir={tmp_path / 'run'}", override)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert not (tmp_path / "run").exists()


def test_torchrun_keeps_the_code_of_a_run_refused_after_its_check(tmp_path):
    # A model without its weights: only the run loads them; torchrun itself would end with 1.
    run, pretrained = tmp_path / "run", tmp_path / "pretrained"
    train_tokenizer(["a few words to learn from"] * 50, 300, pretrained)
    T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=300).save_pretrained(pretrained)
    only_config = f"model={{name_or_path: {pretrained}}}"
    ended = launch("torchrun.sh", SAMPLE, *TINY, f"training.output_dir={run}", only_config, "tokenizer=null")
    assert "could not be loaded" in ended.stderr
    assert json.loads((run / "status.json").read_text())["state"] == "refused"
    assert ended.returncode == 2, ended.stdout + ended.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    asked, bare = launch(script, "--help"), launch(script)
    assert (asked.returncode, bare.returncode) == (0, 2)
    assert f"launch/{script} CONFIG.yaml" in asked.stdout
    assert asked.stdout == bare.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"NPROC": "two"}, "NPROC=two must be a number of ranks"),
        ({"NPROC": "0"}, "NPROC=0 must be a number of ranks"),
        ({"NNODES": "2"}, "NNODES=2 needs RDZV_ENDPOINT"),
    ],
)
def test_an_environment_that_cannot_be_honoured(settings, message):
    ended = launch("torchrun.sh", SAMPLE, **settings)
    assert ended.returncode == 2
    assert message in ended.stderr


# --- run_launcher: any command that starts processes is a launcher to it ---


def shell(run_directory, command: str) -> list[str]:
    script = 'set -euo pipefail; source launch/common.sh; run_directory=$1; run_launcher bash -c "$2"'
    return ["bash", "-c", script, "launch", str(run_directory), command]


@pytest.mark.parametrize(
    ("written_before", "command", "code"),
    [
        (None, "exit 0", 0),
        (None, "exit 3", 3),
        (None, """echo '{"exit_code": 75}' > "$STATUS"; exit 1""", 75),
        (None, """echo '{"exit_code": null}' > "$STATUS"; exit 0""", 1),  # a rank was killed and the launcher hid it
        (None, """echo '{"exit_code": null}' > "$STATUS"; exit 4""", 4),
        ('{"exit_code": 0}', "exit 5", 5),  # left by an earlier run
    ],
)
def test_the_exit_code_is_the_one_the_run_wrote(written_before, command, code, tmp_path):
    run = tmp_path / "a run"
    run.mkdir()
    status = run / "status.json"
    if written_before:
        status.write_text(written_before)
    ended = subprocess.run(shell(run, command), cwd=REPOSITORY, env=environment(STATUS=str(status)), timeout=60)
    assert ended.returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_all_that_the_launcher_started(number, tmp_path):
    command = 'sleep 300 & echo $! > "$PIDS.partial"; sleep 300 & echo $! >> "$PIDS.partial"; mv "$PIDS.partial" "$PIDS"; wait'
    pids = tmp_path / "pids"
    script = subprocess.Popen(shell(tmp_path, command), cwd=REPOSITORY, env=environment(PIDS=str(pids)))
    deadline = time.monotonic() + 30
    while not pids.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    script.send_signal(number)
    assert script.wait(timeout=30) == 128 + number
    for pid in map(int, pids.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
