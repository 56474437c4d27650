"""What a PDL step costs: against plain cross-entropy in the same loop, and against the stock model's own `labels=` loss.

    python tests/benchmarks/step_cost.py [--rounds 20]

Steps of the three are interleaved in one process on the same batches, so that a noisy machine hits all alike; ratios of
medians are what counts. Peak memory is taken in a process of its own for each. On a GPU it runs there, in bf16.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import datasets
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from pdl import distributed, power_law_weights
from pdl.data import Collator, GlobalBatches, TokenRows
from pdl.loss_head import LossHead
from pdl.metrics import Meter, frequency_buckets
from pdl.model import initialize_engine
from pdl.train import Trainer

VOCABULARY = 16_000
SHAPES = {
    # source tokens, target tokens, settings; the decoder-only model has its prompt masked
    "t5": (192, 48, {"d_model": 256, "d_kv": 64, "d_ff": 768, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4}),
    "llama": (160, 80, {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}),
    "llama, nothing masked": (0, 240, {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}),
}  # fmt: skip
LOSSES = ("power_law", "cross_entropy", "stock")


class StockLoss(Trainer):
    """The loop of every finetuning script: the model's own loss, by its own labels, and its value logged."""

    def train_step(self, step: int) -> bool:
        for batch in self.batches.window(step, 0, 1):
            batch = batch.to(self.weights.device)
            # The collator has shifted the labels; a decoder-only model is told so.
            shifted = {} if "decoder_input_ids" in batch.inputs else {"shift_labels": batch.labels}
            loss = self.engine(**batch.inputs, labels=batch.labels, use_cache=False, **shifted).loss
            self.engine.backward(loss)
            self.engine.step()
        loss.item()  # the value that every script logs
        return True


def trainer(shape: str, loss: str) -> Trainer:
    sources, targets, settings = SHAPES[shape]
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "decoder_start_token_id": 0}
    config = AutoConfig.for_model(shape.split(",")[0], vocab_size=VOCABULARY, **special, **settings)
    torch.manual_seed(0)
    model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    head = None if loss == "stock" else LossHead.attach(model)
    rows = []
    zipf = 1.0 / torch.arange(1, VOCABULARY).double()
    for _ in range(64):
        tokens = (torch.multinomial(zipf, sources + targets, replacement=True) + 1).tolist()
        if config.is_encoder_decoder:
            rows.append({"input_ids": tokens[:sources], "labels": tokens[sources:]})
        else:
            rows.append({"input_ids": tokens[:-1], "labels": ([-100] * sources + tokens[sources:])[1:]})
    table = TokenRows(datasets.Dataset.from_list(rows), "benchmark", {})
    collator = Collator(0, 0 if config.is_encoder_decoder else None)
    batches = GlobalBatches(table, collator, seed=0, global_batch_size=8, micro_batch_size=8)
    deepspeed = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
    }
    deepspeed |= {"steps_per_print": None, "zero_optimization": {"stage": 2}}
    if torch.cuda.is_available():
        deepspeed |= {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    engine = initialize_engine(model, torch.optim.AdamW(model.parameters(), lr=1e-4), deepspeed)
    counts = table.count(VOCABULARY).counts
    weights = (power_law_weights(counts, 0.5) if loss == "power_law" else torch.ones(VOCABULARY)).to(
        distributed.device()
    )
    return (StockLoss if loss == "stock" else Trainer)(
        engine=engine, head=head, weights=weights, meter=Meter(weights, frequency_buckets(counts).to(weights.device), "weighted_mean"),
        batches=batches, validation=table, collator=collator, learning_rate=lambda step: 1e-4, reduction="weighted_mean", alpha=0.5, zero_stage=2,
    )  # fmt: skip


def peak_memory(shape: str, loss: str) -> float:
    """GiB at the peak of five steps: the median of three processes, whose allocators differ by some percent."""
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    command = [sys.executable, __file__, "--peak", shape, loss]
    done = [subprocess.run(command, env=alone, capture_output=True, text=True, check=True) for _ in range(3)]
    return statistics.median(json.loads(process.stdout.splitlines()[-1]) for process in done)


def print_peak(shape: str, loss: str) -> None:
    measured = trainer(shape, loss)
    measured.train_step(0)
    if not torch.cuda.is_available():
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak: making the engine takes more than its steps
    for step in range(1, 5):
        measured.train_step(step)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    print(json.dumps(peak / 2**30))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "LOSS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rounds = arguments.rounds
    distributed.start()
    if arguments.peak:
        print_peak(*arguments.peak)
        sys.exit(distributed.stop())
    print(
        "| model | loss | ms per step (median, quartiles) | of stock | power_law of cross_entropy | peak GiB | of stock |\n|"
        + "---|" * 7
    )
    for shape in arguments.models:
        trainers = {loss: trainer(shape, loss) for loss in LOSSES}
        taken = {loss: [] for loss in LOSSES}
        for step in range(rounds + 2):
            for loss in LOSSES if step % 2 else reversed(LOSSES):
                started = time.perf_counter()
                trainers[loss].train_step(step)
                if step >= 2:
                    taken[loss].append(1000 * (time.perf_counter() - started))
        del trainers
        medians = {loss: statistics.median(times) for loss, times in taken.items()}
        peaks = {loss: peak_memory(shape, loss) for loss in LOSSES}
        for loss in LOSSES:
            low, _, high = statistics.quantiles(taken[loss], n=4)
            against = f"{medians['power_law'] / medians['cross_entropy']:.3f}" if loss == "power_law" else ""
            print(
                f"| {shape} | {loss} | {medians[loss]:.0f} ({low:.0f} to {high:.0f}) | {medians[loss] / medians['stock']:.3f} | {against} "
                f"| {peaks[loss]:.2f} | {peaks[loss] / peaks['stock']:.3f} |"
            )
    distributed.stop()
