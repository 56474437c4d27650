"""THE loop: finetuning with a weighted loss that is exact on any number of ranks, any accumulation, any ZeRO stage."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from pdl import distributed, watch
from pdl.config import UserError
from pdl.cross_entropy import Loss, LossSums
from pdl.data import Batch, Collator, GlobalBatches, TokenRows, validation_batches
from pdl.distributed import RunFailed
from pdl.loss_head import LossHead, loss_of
from pdl.metrics import Meter
from pdl.row_sampling import RowSampling
from pdl.streaming import StreamedBatches


class StepRefused(RunFailed):
    """An update that must not be applied, and was not: a loss or a gradient is not finite, or no token has a weight."""


@dataclass
class TrainerState:
    """Where a run stands. With the engine, the sums of the meter and the random state it is all that a checkpoint holds.

    done: optimizer steps taken. owed: the log line of `done` is still to come. gradient_norm: of the last update, before
    clipping. skipped: steps left out because they were not finite; last_skipped: how many were done after the last of them.
    """

    done: int = 0
    owed: bool = True
    gradient_norm: float = 0.0
    skipped: int = 0
    last_skipped: int = 0


@dataclass
class Trainer:
    """All that a step needs. Made by `pdl.run`; everything in it is the same on every rank but the data it reads.

    head: None computes the loss over full logits. loss: with its tables on this rank's device; alpha is logged.
    learning_rate: the rate of an update, as a function of its step (from 0). skip_nonfinite: how many steps that are not
    finite a run leaves out, never two in a row. row_sampling: which rows give gradients; None: all of them.
    """

    engine: torch.nn.Module
    head: LossHead | None
    loss: Loss
    meter: Meter
    batches: GlobalBatches | StreamedBatches
    validation: TokenRows
    collator: Collator
    learning_rate: Callable[[int], float]
    alpha: float
    zero_stage: int
    skip_nonfinite: int = 0
    row_sampling: RowSampling | None = None
    state: TrainerState = field(default_factory=TrainerState)

    def steps(self, last_step: int, log_every: int, evaluate_every: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Train until `last_step`, yielding after each step how many are done and what there is to log.

        Raises Stopped on every rank at a boundary where nothing is half done: `state` says where.
        """
        state = self.state
        self.engine.train()  # a pretrained model comes in eval mode, without dropout
        while True:
            if state.owed:
                values = self.values(state.done, last_step, log_every, evaluate_every)
                state.owed = False
                yield state.done, values
            if state.done >= last_step:
                return
            started = time.perf_counter()
            if self.train_step(state.done):
                self.meter.count_step(time.perf_counter() - started)
            state.done, state.owed = state.done + 1, True

    def values(self, done: int, last_step: int, log_every: int, evaluate_every: int) -> dict[str, float]:
        """What there is to log after `done` steps. The meter starts again only when all of it is there."""
        values, logs = {}, done > 0 and (done % log_every == 0 or done == last_step)
        if logs:
            values = self.meter.values("train") | {
                "train/alpha": self.alpha,
                "train/learning_rate": self.learning_rate(done - 1),
                "train/grad_norm": self.state.gradient_norm,
            }
            if self.row_sampling is not None:
                values["train/row_sampling"] = self.row_sampling.fraction  # the values above are estimates
            if self.skip_nonfinite:
                values["train/skipped_steps"] = self.state.skipped
        if done % evaluate_every == 0 or done == last_step:
            values |= self.validate()
        if logs:
            self.meter.reset()
        return values

    def train_step(self, step: int) -> bool:
        """One optimizer step over this rank's window of micro-batches; False when it was not finite and left out."""
        watch.beat(f"training step {step}")
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        window, unreadable = self.window(step)
        # The denominator is that of the whole global batch, so gradients are to be summed over micro-batches and ranks.
        # DeepSpeed sums over micro-batches (scale_wrt_gas=False) and averages over ranks, hence the number of ranks.
        denominator = self.global_denominator(step, window, unreadable) / distributed.world_size()
        all_sums, finite = [], torch.ones((), device=self.loss.weights.device)
        for number, batch in enumerate(window):
            loss, sums = self.loss_of(batch, denominator, step, number)
            all_sums.append(replace(sums, weighted=sums.weighted.detach()))
            finite *= torch.isfinite(loss.detach())
            if number == len(window) - 1 and not self._finite_on_all_ranks(finite):
                self._tolerate(step, "loss")
                loss = loss * torch.nan  # so that the gradient is not either, and no stage of ZeRO applies it
            self.engine.backward(loss, scale_wrt_gas=False)
            if number < len(window) - 1:
                self.engine.step()
        if not self._update(step):
            return False
        for batch, sums in zip(window, all_sums, strict=True):
            self.meter.add(sums, batch.labels, read=_tokens_read(batch))
        return True

    def loss_of(self, batch: Batch, denominator: torch.Tensor, step: int, number: int) -> tuple[torch.Tensor, LossSums]:
        """Of this rank's micro-batch `number`: the scalar to call backward on, and its sums."""
        arguments = self.engine, self.head, batch.inputs
        if self.row_sampling is None:
            return loss_of(*arguments, batch.labels, self.loss, denominator)
        place = number * distributed.world_size() + distributed.rank()
        draw = self.row_sampling.draw(batch.labels, self.loss.weights, step, place)
        loss, sums = loss_of(*arguments, draw.labels, self.loss, denominator, draw.token_weights)
        return loss, draw.estimate(sums)

    def window(self, step: int) -> tuple[list[Batch], UserError | None]:
        """This rank's micro-batches, or why they cannot be read: only a stream finds out so late, and maybe on one rank alone."""
        try:
            window = self.batches.window(step, distributed.rank(), distributed.world_size())
        except UserError as error:
            return [], error
        return [batch.to(self.loss.weights.device) for batch in window], None

    def global_denominator(self, step: int, window: list[Batch], unreadable: UserError | None = None) -> torch.Tensor:
        """What the loss of a global batch is divided by, float64: sum(w), N or 1 over all its supervised tokens. One all-reduce.

        In it all ranks agree whether to stop, too: raises Stopped, or what is unreadable to any of them, before anything of
        the step is done.
        """
        weights = self.loss.weights
        labels = torch.cat([weights.new_empty(0, dtype=torch.long), *(batch.labels.flatten() for batch in window)])
        labels = labels[labels != -100]
        weight = weights[labels].double().sum()
        told = [len(labels), watch.asked(), unreadable is not None]
        sums = torch.stack([weight, *map(weight.new_tensor, told)])
        dist.all_reduce(sums)
        weight, tokens, asked, unread = sums
        if unread:
            raise next(filter(None, distributed.gathered(unreadable)))
        if asked:
            raise watch.Stopped
        denominator = {"weighted_mean": weight, "token_mean": tokens, "sum": torch.ones_like(tokens)}[
            self.loss.reduction
        ]
        if tokens == 0 or denominator == 0:
            raise StepRefused(
                f"step {step}: no token of the global batch has a weight; dataset rows {self.batches.row_numbers(step)}"
            )
        return denominator

    def _finite_on_all_ranks(self, finite: torch.Tensor) -> bool:
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite)

    def _tolerate(self, step: int, what: str) -> None:
        """Leave out a step that is not finite, on every rank alike, or raise StepRefused: too many, or two in a row."""
        state = self.state
        if state.last_skipped == step + 1:
            return  # its loss was found already, its gradient is no second event
        isolated = state.skipped == 0 or state.last_skipped < step
        if state.skipped >= self.skip_nonfinite or not isolated:
            told = f"; {state.skipped} before it were left out" if state.skipped else ""
            rows = self.batches.row_numbers(step)
            raise StepRefused(f"step {step}: the {what} is not finite{told}; dataset rows {rows}")
        state.skipped, state.last_skipped = state.skipped + 1, step + 1
        distributed.say(f"step {step}: the {what} is not finite; left out ({state.skipped} of {self.skip_nonfinite})")

    def _update(self, step: int) -> bool:
        """Apply the accumulated gradients if they are finite on every rank.

        DeepSpeed leaves out an update that is not finite at stages 1 to 3, and applies it at stage 0, where the norm is taken
        and the update left out here.
        """
        norm = None
        if self.zero_stage == 0:
            gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients).item()
            if not math.isfinite(norm):
                self._tolerate(step, "gradient")
                self.engine.optimizer.zero_grad(set_to_none=True)
                self.engine.micro_steps += 1  # all that is left of `engine.step`: the accumulation starts again
                return False
        skipped = self.engine.skipped_steps
        self.engine.step()
        if norm is None:
            norm = float(self.engine.get_global_grad_norm())
            if self.engine.skipped_steps > skipped:
                norm = math.inf
            if not math.isfinite(norm):
                self._tolerate(step, "gradient")
        if not math.isfinite(norm):
            return False
        self.state.gradient_norm = norm
        return True

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """All validation metrics, over every supervised token of the split once."""
        self.engine.eval()
        meter = Meter(self.loss, self.meter.buckets)
        size = self.batches.micro_batch_size
        for batch in validation_batches(
            self.validation, self.collator, size, distributed.rank(), distributed.world_size()
        ):
            watch.agree(f"validating after step {self.state.done}")
            batch = batch.to(self.loss.weights.device)
            _, sums = loss_of(
                self.engine, self.head, batch.inputs, batch.labels, self.loss, denominator=1.0, untilted=True
            )
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
