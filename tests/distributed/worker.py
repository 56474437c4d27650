"""Runs cases of the exactness matrix in one process group.

For each case the real Trainer takes its steps on a real DeepSpeed engine with SGD; rank 0 saves the update of every
parameter and the logged values.
"""

import dataclasses
import json
from pathlib import Path

import datasets
import torch
from safetensors.torch import save_file

from distributed.models import TOKENS, VOCABULARY, build, prompts_and_targets
from distributed.oracle import zipf_counts
from pdl import distributed, power_law_weights
from pdl.config import Config, TrainingConfig
from pdl.cross_entropy import Loss
from pdl.data import Collator, GlobalBatches, TokenRows
from pdl.loss_head import LossHead, check_parity, loss_of
from pdl.metrics import Meter, frequency_buckets
from pdl.model import deepspeed_settings, initialize_engine
from pdl.train import StepRefused, Trainer

HERE = Path(__file__).parent


class MeanOfMeans(Trainer):
    """The negative control: what most trainers do, a weighted mean per micro-batch, averaged by DeepSpeed."""

    def train_step(self, step: int) -> bool:
        for batch in self.batches.window(step, distributed.rank(), distributed.world_size()):
            denominator = self.loss.weights[batch.labels[batch.labels != -100]].double().sum().clamp(min=1e-9)
            loss, sums = loss_of(self.engine, self.head, batch.inputs, batch.labels, self.loss, denominator)
            self.engine.backward(loss)
            self.engine.step()
            self.meter.add(sums, batch.labels)
        return True


def token_row(model, pair: tuple[list[int], list[int]], masked: bool) -> dict:
    prompt, target = pair
    if model.config.is_encoder_decoder:
        row = {"input_ids": prompt, "labels": target}
    else:
        row = {"input_ids": (prompt + target)[:-1], "labels": ([-100] * len(prompt) + target)[1:]}
    return row | {"labels": [-100] * len(row["labels"])} if masked else row


def full_parameters(model, precision: str) -> dict[str, torch.Tensor]:
    """Every parameter whole, in float32: the master weights under bf16."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    whole = {}
    for name, parameter in model.named_parameters():
        if precision == "bf16":
            whole[name] = safe_get_full_fp32_param(parameter).detach().float().cpu().clone()
        else:
            with deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
                whole[name] = parameter.detach().float().cpu().clone()
    return whole


def poison(model) -> None:
    """The loss stays finite, the gradients behind the last norm do not."""

    def infinite(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.inf)

    model.model.norm.register_forward_hook(infinite)


def run(case: dict, out: Path) -> None:
    world_size = distributed.world_size()
    model = build(case["family"])
    head = LossHead.attach(model) if case["path"] == "head" else None
    micro, accumulation = 2, case["accumulation"]
    size = micro * accumulation * world_size
    count = round(case["windows"] * size)
    pairs = prompts_and_targets(count, seed=11)
    masked = {
        row
        for row in range(count)
        if case["mask_rank"] is not None and (row // micro) % world_size == case["mask_rank"]
    }

    # The rows are laid out so that the permutation of the epoch brings them back in the order of `pairs`.
    order = GlobalBatches(TokenRows(range(count), "", {}), None, 5, size, micro, epochs=1.0)
    positions = [number for step in range(order.steps) for number in order.row_numbers(step)]
    laid_out = [None] * count
    for place, number in enumerate(positions):
        laid_out[number] = token_row(model, pairs[place], place in masked)
    rows = TokenRows(datasets.Dataset.from_list(laid_out), "test", {})
    collator = Collator(0, 0 if model.config.is_encoder_decoder else None)
    batches = dataclasses.replace(order, rows=rows, collator=collator)

    training = TrainingConfig(
        global_batch_size=size, micro_batch_size=micro, max_grad_norm=case["max_norm"], precision=case["precision"]
    )
    # Stage 3 keeps small parameters whole on every rank; here nothing is small, so that all are gathered and released.
    sharding = HERE / "zero3.json" if case["stage"] == 3 else f"configs/deepspeed/zero{case['stage']}.json"
    config = Config(training=training, deepspeed=str(sharding))
    assert config.accumulation(world_size) == accumulation
    if case["checkpointing"]:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD(model.parameters(), lr=case["learning_rate"])
    engine = initialize_engine(model, optimizer, deepspeed_settings(config, world_size))
    counts = zipf_counts(VOCABULARY, TOKENS)
    loss = Loss(power_law_weights(counts, case["alpha"]), case["reduction"])
    if head is not None:
        batch = batches.window(0, 0, world_size)[0]
        if (batch.labels != -100).any():
            check_parity(
                engine.module, head, batch.inputs, batch.labels, loss, 1e-4 if case["precision"] == "fp32" else 2e-2
            )
            assert all(parameter.grad is None for parameter in model.parameters()), (
                "the parity check left gradients behind"
            )
    before = full_parameters(model, case["precision"])
    trainer = (MeanOfMeans if case["naive"] else Trainer)(
        engine=engine, head=head, loss=loss, meter=Meter(loss, frequency_buckets(counts)),
        batches=batches, validation=rows, collator=collator, learning_rate=lambda step: case["learning_rate"],
        alpha=case["alpha"], zero_stage=case["stage"],
    )  # fmt: skip
    if case["poison"] and distributed.rank() == world_size - 1:
        poison(model)
    values = []
    try:
        for done, logged in trainer.steps(batches.steps, log_every=1, evaluate_every=10**9):
            values += [logged] if done else []
    except StepRefused as refused:
        values = [{"refused": str(refused)}]
    after = full_parameters(model, case["precision"])
    if distributed.rank() == 0:
        save_file({name: after[name] - before[name] for name in after}, out / f"{case['name']}.safetensors")
        (out / f"{case['name']}.json").write_text(json.dumps(values))
    engine.destroy()


def run_all(arguments: list) -> None:
    """arguments: the cases, and the directory for their results."""
    cases, out = arguments
    distributed.start()
    for case in cases:
        run(case, out)
    distributed.stop()
