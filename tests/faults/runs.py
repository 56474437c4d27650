"""What the fault tests share: starting runs, waiting for them, and comparing what they leave."""

import json
import os
from pathlib import Path

from distributed.forked import Group, Rank

from faults.faults import run_with_fault

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

    def __init__(self, arguments: list, ranks: int = 2, faults: dict | None = None, **each):
        """faults: by rank. each: `folder` and `environment` of every rank, or a list with one for each of them."""
        told = [
            Rank(
                [(faults or {}).get(rank, {}), list(map(str, arguments))],
                **{key: value[rank] if isinstance(value, list) else value for key, value in each.items()},
            )
            for rank in range(ranks)
        ]
        self.group = Group(told, run_with_fault)
        self.ranks = [process.pid for process in self.group.processes]

    def exit_codes(self, seconds: float = 180) -> list[int]:
        """Waits for all ranks to end by themselves."""
        return self.group.wait(seconds)

    def output(self) -> str:
        return "\n".join(self.group.said)


def train(directory: Path | str, *overrides: str, **more) -> Run:
    return Run(["train", SAMPLE, *SMALL, f"training.output_dir={directory}", *overrides], **more)


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
