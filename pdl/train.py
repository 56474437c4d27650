"""THE loop: finetuning with a weighted loss that is exact on any number of ranks, any accumulation, any ZeRO stage."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pdl import distributed
from pdl.data import Batch, Collator, GlobalBatches, TokenRows, validation_batches
from pdl.loss_head import LossHead, loss_of
from pdl.metrics import Meter


class StepRefused(Exception):
    """An update that must not be applied, and was not: a loss or a gradient is not finite, or no token has a weight."""


@dataclass
class Trainer:
    """All that a step needs. Made by `pdl.run`; everything in it is the same on every rank but the data it reads.

    head: None computes the loss over full logits. weights: float32 `[vocabulary]` on this rank's device; alpha is logged.
    learning_rate: the rate of an update, as a function of its step (from 0).
    """

    engine: torch.nn.Module
    head: LossHead | None
    weights: torch.Tensor
    meter: Meter
    batches: GlobalBatches
    validation: TokenRows
    collator: Collator
    learning_rate: Callable[[int], float]
    reduction: str
    alpha: float
    zero_stage: int

    def steps(
        self, first_step: int, last_step: int, log_every: int, evaluate_every: int
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Train from `first_step` to `last_step`, yielding after each step how many are done and what there is to log."""
        if first_step == 0:
            yield 0, self.validate()
        self.engine.train()  # a pretrained model comes in eval mode, without dropout
        for step in range(first_step, last_step):
            started = time.perf_counter()
            gradient_norm = self.train_step(step)
            self.meter.count_step(time.perf_counter() - started)
            done, values = step + 1, {}
            if done % log_every == 0 or done == last_step:
                values = self.meter.values("train") | {
                    "train/alpha": self.alpha, "train/learning_rate": self.learning_rate(step), "train/grad_norm": gradient_norm
                }  # fmt: skip
                self.meter.reset()
            if done % evaluate_every == 0 or done == last_step:
                values |= self.validate()
            yield done, values

    def train_step(self, step: int) -> float:
        """One optimizer step over this rank's window of micro-batches; returns the gradient norm before clipping."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        window = self.batches.window(step, distributed.rank(), distributed.world_size())
        window = [batch.to(self.weights.device) for batch in window]
        denominator = self.global_denominator(step, window)
        finite = torch.ones((), device=self.weights.device)
        for number, batch in enumerate(window):
            loss, sums = loss_of(self.engine, self.head, batch.inputs, batch.labels, self.weights, denominator)
            # The denominator is that of the whole global batch, so gradients are to be summed over micro-batches and ranks.
            # DeepSpeed sums over micro-batches (scale_wrt_gas=False) and averages over ranks, hence the factor.
            self.engine.backward(loss * distributed.world_size(), scale_wrt_gas=False)
            finite *= torch.isfinite(loss.detach())
            if number == len(window) - 1:
                gradient_norm = self._refuse_non_finite(step, finite)
            self.engine.step()
            self.meter.add(sums, batch.labels, read=_tokens_read(batch))
        return gradient_norm if gradient_norm is not None else self._norm_of_applied_update(step)

    def global_denominator(self, step: int, window: list[Batch]) -> torch.Tensor:
        """What the loss of a global batch is divided by, float64: sum(w), N or 1 over all its supervised tokens. One all-reduce."""
        labels = torch.cat([batch.labels.flatten() for batch in window])
        labels = labels[labels != -100]
        weight_and_tokens = torch.stack([self.weights[labels].double().sum(), torch.ones_like(labels).double().sum()])
        dist.all_reduce(weight_and_tokens)
        weight, tokens = weight_and_tokens
        denominator = {"weighted_mean": weight, "token_mean": tokens, "sum": torch.ones_like(tokens)}[self.reduction]
        if tokens == 0 or denominator == 0:
            raise StepRefused(
                f"step {step}: no token of the global batch has a weight; dataset rows {self.batches.row_numbers(step)}"
            )
        return denominator

    def _refuse_non_finite(self, step: int, finite: torch.Tensor) -> float | None:
        """Before the update: raise on every rank when any rank saw a loss that is not finite.

        At ZeRO stage 0 DeepSpeed would apply non-finite gradients, so their norm is taken and checked here; the other
        stages check it themselves (None is returned, see `_norm_of_applied_update`).
        """
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        norm = None
        if self.zero_stage == 0:
            gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients).item()
        if not finite or (norm is not None and not math.isfinite(norm)):
            what = "gradient" if finite else "loss"
            raise StepRefused(f"step {step}: the {what} is not finite; dataset rows {self.batches.row_numbers(step)}")
        return norm

    def _norm_of_applied_update(self, step: int) -> float:
        # DeepSpeed skips an update whose gradients are not finite and goes on; we stop instead.
        norm = float(self.engine.get_global_grad_norm())
        if self.engine.skipped_steps or not math.isfinite(norm):
            raise StepRefused(f"step {step}: the gradient is not finite; dataset rows {self.batches.row_numbers(step)}")
        return norm

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """All validation metrics, over every supervised token of the split once."""
        self.engine.eval()
        meter = Meter(self.weights, self.meter.buckets, self.reduction)
        size = self.batches.micro_batch_size
        for batch in validation_batches(
            self.validation, self.collator, size, distributed.rank(), distributed.world_size()
        ):
            batch = batch.to(self.weights.device)
            _, sums = loss_of(self.engine, self.head, batch.inputs, batch.labels, self.weights, denominator=1.0)
            meter.add(sums, batch.labels)
        self.engine.train()
        return meter.values("validation")


def _tokens_read(batch: Batch) -> torch.Tensor:
    """Tokens that the model reads, padding excluded: its input, and the decoder's where there is one."""
    read = batch.inputs["attention_mask"].sum()
    return read + (batch.labels != -100).sum() if "decoder_input_ids" in batch.inputs else read


def schedule(kind: str, peak: float, warmup_steps: int, schedule_steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the step (from 0): linear warm-up to `peak`, then `kind` down to 0 at `schedule_steps`."""

    def rate(step: int) -> float:
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, schedule_steps - warmup_steps))
        match kind:
            case "constant":
                return peak
            case "linear":
                return peak * (1 - progress)
            case "cosine":
                return peak * (1 + math.cos(math.pi * progress)) / 2
        raise ValueError(f"unknown schedule {kind!r}")

    return rate
