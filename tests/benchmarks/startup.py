"""What our own code adds to the start of a run: from the launcher's first moment to a DeepSpeed engine that is ready to train.

    python tests/benchmarks/startup.py [--rounds 5] [--ranks 2]

Each round starts both under torchrun: a bare script that imports torch, deepspeed and transformers and makes the engine of
the summarization sample's model, and `python -m pdl train` on the sample with a warm cache: configuration, pre-flight,
data, frequencies, weights, lock, engine, parity check. Prints medians and their difference.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SAMPLE = "configs/summarization/sample.yaml"


def bare() -> None:
    """One rank of the script that a user of DeepSpeed would begin with."""
    import deepspeed
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    sys.path.insert(0, str(REPOSITORY))
    from pdl.config import load_config

    config = load_config(REPOSITORY / SAMPLE, world_size=int(os.environ["WORLD_SIZE"]))
    model = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model(config.model.architecture, vocab_size=config.tokenizer.vocab_size, **config.model.settings)
    )
    settings = config.deepspeed_sharding() | {
        "train_batch_size": config.training.global_batch_size,
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
    }
    deepspeed.init_distributed()
    deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=settings)
    if int(os.environ["RANK"]) == 0:
        print("model:", flush=True)


def seconds_to_model(ranks: int, *command: str) -> float:
    """From the start of torchrun to the line that says that the model is there."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    began, seconds = time.perf_counter(), None
    process = subprocess.Popen(
        [*launcher, *command], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("model:"):
            seconds = time.perf_counter() - began
    errors = process.stderr.read()
    if process.wait() or seconds is None:
        sys.exit(errors)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        return bare()
    times = {"bare": [], "ours": []}
    with tempfile.TemporaryDirectory() as directory:
        for number in range(arguments.rounds + 1):
            run = [
                "train",
                SAMPLE,
                "training.max_steps=1",
                "evaluation.examples=0",
                f"training.output_dir={directory}/{number}",
            ]
            seconds = {
                "bare": seconds_to_model(arguments.ranks, __file__, "--bare"),
                "ours": seconds_to_model(arguments.ranks, "-m", "pdl", *run),
            }
            if number:  # the first one fills the caches
                for name, value in seconds.items():
                    times[name].append(value)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"to a ready engine, {arguments.ranks} ranks, medians of {arguments.rounds} rounds in turn")
    print("| bare DeepSpeed s | ours s | ours - bare s | spread of the bare one s |")
    print("|---|---|---|---|")
    spread = max(times["bare"]) - min(times["bare"])
    print(f"| {medians['bare']:.2f} | {medians['ours']:.2f} | {medians['ours'] - medians['bare']:.2f} | {spread:.2f} |")


if __name__ == "__main__":
    main()
