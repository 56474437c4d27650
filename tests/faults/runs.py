"""What the fault tests share: starting runs, waiting for them, and comparing what they leave."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from conftest import REPOSITORY, environment

HERE = Path(__file__).parent
SAMPLE = "configs/summarization/sample.yaml"
# Dropout on, the end of an epoch inside a batch, logs and checkpoints at different steps.
SMALL = [
    "model.d_model=32", "model.d_kv=8", "model.d_ff=32", "model.num_layers=1", "model.num_decoder_layers=1", "model.num_heads=2",
    "training.global_batch_size=16", "training.micro_batch_size=8", "training.max_steps=12", "training.log_every=3", "training.save_every=2",
    "training.evaluate_every=5", "training.warmup_steps=3", "evaluation.examples=4", "data.max_source_tokens=48", "data.max_target_tokens=24",
]  # fmt: skip
STEPS, LOGGED = 12, [0, 3, 5, 6, 9, 10, 12]
TIMES = {"train/tokens_per_second", "train/step_seconds"}


class Run:
    """A run that goes on in processes of its own."""

    def __init__(self, pids: dict, log: Path):
        self.launcher, self.ranks, self.log = pids["launcher"], pids["ranks"], log

    def exit_codes(self, seconds: float = 180) -> list[int]:
        """Waits for all ranks to end by themselves."""
        path, deadline = self.log / "exit_codes.json", time.monotonic() + seconds
        while not path.exists():
            assert time.monotonic() < deadline, f"still there after {seconds} s:\n{self.output()}"
            time.sleep(0.02)
        return json.loads(path.read_text())

    def output(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.log.glob("rank-*.log")))


class Server:
    def __init__(self, directory: Path):
        self.directory, self.number = directory, 0
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py")], cwd=REPOSITORY, env=environment(PYTHONPATH=str(HERE)),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def start(self, argv: list, ranks: int = 2, faults: dict | None = None, **more) -> Run:
        """faults: by rank. more: `env` and `cwd` for all ranks, or lists with one for each."""
        self.number += 1
        log = self.directory / f"log-{self.number}"
        log.mkdir()
        each = [{"fault": (faults or {}).get(rank)} for rank in range(ranks)]
        for key, value in more.items():
            for rank, settings in enumerate(each):
                settings[key] = value[rank] if isinstance(value, list) else value
        self.process.stdin.write(json.dumps({"argv": list(map(str, argv)), "ranks": each, "log": str(log)}) + "\n")
        self.process.stdin.flush()
        return Run(json.loads(self.process.stdout.readline()), log)

    def train(self, directory: Path, *overrides: str, **more) -> Run:
        return self.start(["train", SAMPLE, *SMALL, f"training.output_dir={directory}", *overrides], **more)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def logged(directory: Path) -> list[dict]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def status(directory: Path) -> dict:
    return json.loads((directory / "status.json").read_text())


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
