"""What a PDL step costs: against plain cross-entropy in the same loop, the same over full logits, the stock model's own `labels=`
loss, and Hugging Face's `Trainer`, which people would use otherwise.

    pip install accelerate  # Hugging Face's Trainer needs it
    python tests/benchmarks/step_cost.py [--rounds 20]

Steps of all are interleaved in one process on the same batches, so that a noisy machine hits all alike; ratios of
medians are what counts. The optimizer is the same AdamW. Peak memory is taken in a process of its own for each. On a GPU it runs there,
in bf16: the weights in DeepSpeed's engine, autocast in the Trainer, which are two kinds of work.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import datasets
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from pdl import distributed, power_law_weights
from pdl.cross_entropy import Loss
from pdl.data import Collator, GlobalBatches, TokenRows
from pdl.loss_head import LossHead
from pdl.metrics import Meter, frequency_buckets
from pdl.model import initialize_engine
from pdl.train import Trainer

SHAPES = {
    # source tokens, target tokens, settings; the decoder-only model has its prompt masked
    "t5": (192, 48, {"d_model": 256, "d_kv": 64, "d_ff": 768, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4}),
    "llama": (160, 80, {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}),
    "llama, nothing masked": (0, 240, {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}),
}  # fmt: skip
LOSSES = ("power_law", "power_law over logits", "cross_entropy", "stock", "Trainer")


class StockLoss(Trainer):
    """The loop of every finetuning script: the model's own loss, by its own labels, and its value logged."""

    def train_step(self, step: int) -> bool:
        for batch in self.batches.window(step, 0, 1):
            batch = batch.to(self.loss.weights.device)
            # The collator has shifted the labels; a decoder-only model is told so.
            shifted = {} if "decoder_input_ids" in batch.inputs else {"shift_labels": batch.labels}
            loss = self.engine(**batch.inputs, labels=batch.labels, use_cache=False, **shifted).loss
            self.engine.backward(loss)
            self.engine.step()
        loss.item()  # the value that every script logs
        return True


class HuggingFace:
    """transformers.Trainer, held at the beginning of each step until it is its turn. A step here is from one beginning to the next."""

    def __init__(self, model: torch.nn.Module, table: TokenRows, collator: Collator):
        self.turn, self.arrived, turns = threading.Semaphore(0), threading.Semaphore(0), self

        class Turns(transformers.TrainerCallback):
            def on_step_begin(self, *_, **__):
                turns.arrived.release()
                turns.turn.acquire()

        def collate(rows: list[dict]) -> dict:
            batch = collator(rows)
            shifted = {} if "decoder_input_ids" in batch.inputs else {"shift_labels": batch.labels}
            return {**batch.inputs, "labels": batch.labels, **shifted}

        # Else it takes our group of one rank for several, and wraps the model for them.
        launched = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        arguments = transformers.TrainingArguments(
            tempfile.mkdtemp(), per_device_train_batch_size=8, max_steps=10**6, learning_rate=1e-4, lr_scheduler_type="constant",
            max_grad_norm=1.0, optim="adamw_torch", weight_decay=0.01, save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(), bf16=torch.cuda.is_available(),
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, collate, table.table, callbacks=[Turns()])
        os.environ.update(launched)
        threading.Thread(target=trainer.train, daemon=True).start()
        self.arrived.acquire()

    def train_step(self, step: int) -> None:
        self.turn.release()
        self.arrived.acquire()


def trainer(shape: str, loss: str, vocabulary: int) -> Trainer | HuggingFace:
    sources, targets, settings = SHAPES[shape]
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "decoder_start_token_id": 0}
    config = AutoConfig.for_model(shape.split(",")[0], vocab_size=vocabulary, **special, **settings)
    torch.manual_seed(0)
    model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    head = LossHead.attach(model) if loss in ("power_law", "cross_entropy") else None
    rows = []
    zipf = 1.0 / torch.arange(1, vocabulary).double()
    for _ in range(64):
        tokens = (torch.multinomial(zipf, sources + targets, replacement=True) + 1).tolist()
        if config.is_encoder_decoder:
            rows.append({"input_ids": tokens[:sources], "labels": tokens[sources:]})
        else:
            rows.append({"input_ids": tokens[:-1], "labels": ([-100] * sources + tokens[sources:])[1:]})
    table = TokenRows(datasets.Dataset.from_list(rows), "benchmark", {})
    collator = Collator(0, 0 if config.is_encoder_decoder else None)
    if loss == "Trainer":
        return HuggingFace(model, table, collator)
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
    counts = table.count(vocabulary).counts
    weights = power_law_weights(counts, 0.5) if loss.startswith("power_law") else torch.ones(vocabulary)
    loss_made = Loss(weights.to(distributed.device()))
    return (StockLoss if loss == "stock" else Trainer)(
        engine=engine, head=head, loss=loss_made, meter=Meter(loss_made, frequency_buckets(counts).to(distributed.device())),
        batches=batches, validation=table, collator=collator, learning_rate=lambda step: 1e-4, alpha=0.5, zero_stage=2,
    )  # fmt: skip


def peak_memory(shape: str, loss: str, vocabulary: int) -> float:
    """GiB at the peak of five steps: the median of three processes, whose allocators differ by some percent."""
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    command = [sys.executable, __file__, "--vocabulary", str(vocabulary), "--peak", shape, loss]
    done = [subprocess.run(command, env=alone, capture_output=True, text=True, check=True) for _ in range(3)]
    return statistics.median(json.loads(process.stdout.splitlines()[-1]) for process in done)


def print_peak(shape: str, loss: str, vocabulary: int) -> None:
    measured = trainer(shape, loss, vocabulary)
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
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "LOSS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rounds, vocabulary = arguments.rounds, arguments.vocabulary
    distributed.start()
    if arguments.peak:
        print_peak(*arguments.peak, vocabulary)
        sys.exit(distributed.stop())
    print(
        "| model | loss | ms per step (median, quartiles) | tokens/s | of Trainer | of stock | of cross_entropy | peak GiB | of Trainer |\n|"
        + "---|" * 9
    )
    for shape in arguments.models:
        trainers = {loss: trainer(shape, loss, vocabulary) for loss in LOSSES}
        taken = {loss: [] for loss in LOSSES}
        for step in range(rounds + 2):
            for loss in LOSSES if step % 2 else reversed(LOSSES):
                started = time.perf_counter()
                trainers[loss].train_step(step)
                if step >= 2:
                    taken[loss].append(1000 * (time.perf_counter() - started))
        del trainers
        medians = {loss: statistics.median(times) for loss, times in taken.items()}
        peaks = {loss: peak_memory(shape, loss, vocabulary) for loss in LOSSES}
        for loss in LOSSES:
            low, _, high = statistics.quantiles(taken[loss], n=4)
            ratios = [f"{medians[loss] / medians[other]:.3f}" for other in ("Trainer", "stock", "cross_entropy")]
            tokens = 8 * sum(SHAPES[shape][:2])
            print(
                f"| {shape} | {loss} | {medians[loss]:.0f} ({low:.0f} to {high:.0f}) | {1000 * tokens / medians[loss]:,.0f} | {' | '.join(ratios)} "
                f"| {peaks[loss]:.2f} | {peaks[loss] / peaks['Trainer']:.3f} |"
            )
    distributed.stop()
    sys.stdout.flush()
    os._exit(0)  # the Trainer's thread waits for a turn that never comes
