"""What a checkpoint costs: against DeepSpeed's own `save_checkpoint` of the same engine, and as a share of a run.

    python tests/benchmarks/saving.py [--rounds 9] [--hidden 384] [--ranks 2]
    python tests/benchmarks/saving.py --recipes [summarization ...]

The first saves with both in turn, on the same disk, and compares medians: DeepSpeed's files as it writes them, ours hashed,
and brought to the disk, read again and renamed by a thread, for which each round waits unmeasured. `synced` is DeepSpeed's followed by the
fsync without which a power loss takes it. The second trains the sample recipes at their own cadence.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pdl import distributed
from pdl.checkpoint import Checkpointer
from pdl.config import Config, TrainingConfig
from pdl.model import adamw, deepspeed_settings, initialize_engine
from pdl.storage import find_storage
from pdl.train import TrainerState

WARM_UP = 10  # rounds until all the memory that the files are cached in was used once
REPOSITORY = Path(__file__).resolve().parent.parent.parent


def engine_of(stage: int, hidden: int):
    """A Llama with optimizer state; one rank's engine."""
    settings = AutoConfig.for_model(
        "llama", vocab_size=16_000, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(settings)
    ranks = distributed.world_size()
    training = TrainingConfig(global_batch_size=ranks, micro_batch_size=1, learning_rate=1e-3)
    config = Config(training=training, deepspeed=f"configs/deepspeed/zero{stage}.json")
    engine = initialize_engine(model, adamw(model, config), deepspeed_settings(config, ranks))
    ids = torch.ones(1, 8, dtype=torch.long, device=distributed.device())
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    return engine


def seconds_of(work) -> float:
    distributed.gathered(None)
    began = time.perf_counter()
    work()
    distributed.gathered(None)
    return time.perf_counter() - began


def compare(stage: int, hidden: int, rounds: int, directory: Path) -> dict:
    """In all ranks. Seconds of each way, in turn."""
    engine = engine_of(stage, hidden)
    made_with = {"zero_stage": stage, "zero_optimization": {}}
    ours = Checkpointer(find_storage(directory / "run"), engine, made_with, "", lambda target: target.mkdir(), keep=2)
    own_engine, own_script = engine.checkpoint_engine, engine._copy_recovery_script
    seconds = {"deepspeed": [], "synced": [], "ours": [], "in all": []}

    def deepspeed(number: int) -> None:
        engine.checkpoint_engine, engine._copy_recovery_script = own_engine, own_script
        engine.save_checkpoint(str(directory / f"deepspeed-{number}"), tag="engine")

    def sync(number: int) -> None:
        if distributed.rank() == 0:
            for path in (directory / f"deepspeed-{number}").rglob("*"):
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)

    for number in range(rounds + WARM_UP):
        if distributed.rank() == 0:
            shutil.rmtree(directory / f"deepspeed-{number - 2}", ignore_errors=True)  # both keep two
            os.sync()
        plain = seconds_of(lambda number=number: deepspeed(number))
        synced = plain + seconds_of(lambda number=number: sync(number))
        mine = seconds_of(lambda number=number: ours.save(TrainerState(done=number), torch.zeros(3)))
        in_all = mine + seconds_of(ours.settle)
        if number >= WARM_UP:
            for name, value in zip(seconds, (plain, synced, mine, in_all), strict=True):
                seconds[name].append(value)
    size = sum(path.stat().st_size for path in (directory / f"deepspeed-{number}").rglob("*") if path.is_file())
    engine.destroy()
    return {"stage": stage, "megabytes": size / 1e6, "seconds": seconds}


def recipes(names: list[str]) -> None:
    print("| recipe | steps | checkpoints | seconds saving | seconds in all | share |\n|---|---|---|---|---|---|")
    for name in names:
        with tempfile.TemporaryDirectory() as directory:
            began = time.perf_counter()
            command = ["launch/torchrun.sh", f"configs/{name}/sample.yaml", f"training.output_dir={directory}/run"]
            subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            passed = time.perf_counter() - began
            report = json.loads(Path(directory, "run/report.json").read_text())
            saved = len({step for step in range(1, report["steps"] + 1) if step % 100 == 0} | {report["steps"]})
        share = report["saving_seconds"] / report["wall_seconds"]
        print(f"| {name} | {report['steps']} | {saved} | {report['saving_seconds']:.2f} | {report['wall_seconds']:.0f} ({passed:.0f} with the launcher) | {share:.2%} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", type=int, nargs="*", default=[0, 2, 3])
    parser.add_argument("--recipes", nargs="*", help="measure whole runs instead; default all four")
    arguments = parser.parse_args()
    if arguments.recipes is not None:
        recipes(arguments.recipes or ["summarization", "dialogue", "style_transfer", "code_generation"])
    elif "RANK" not in os.environ:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={arguments.ranks}",
        ]
        sys.exit(subprocess.run([*launcher, *sys.argv], cwd=REPOSITORY).returncode)
    else:
        distributed.start()
        place = distributed.gathered(tempfile.mkdtemp(prefix="saving-") if distributed.rank() == 0 else None)[0]
        distributed.say(
            "| ZeRO | MB | DeepSpeed s | synced s | ours s | until it is named s | ours / DeepSpeed | ours / synced | best / best |\n|---|---|---|---|---|---|---|---|---|"
        )
        for stage in arguments.stages:
            found = compare(stage, arguments.hidden, arguments.rounds, Path(place, str(stage)))
            medians = {name: statistics.median(values) for name, values in found["seconds"].items()}
            ratios = [medians["ours"] / medians[name] for name in ("deepspeed", "synced")]
            best = min(found["seconds"]["ours"]) / min(found["seconds"]["deepspeed"])
            cells = [f"{value:.2f}" for value in [*medians.values(), *ratios, best]]
            distributed.say(f"| {stage} | {found['megabytes']:.0f} | {' | '.join(cells)} |")
        if distributed.rank() == 0:
            shutil.rmtree(place, ignore_errors=True)  # a thread may be deleting there
        distributed.stop()
