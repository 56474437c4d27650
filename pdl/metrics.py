"""Exact metrics: numerators and denominators are summed over steps and ranks, and divided once.

Written to `metrics.jsonl` (one object per logged step, TensorBoard tags as keys) and to TensorBoard.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from pdl import distributed
from pdl.cross_entropy import Loss, LossSums
from pdl.storage import sync_directory, sync_tree, write_whole

BUCKETS = ("head", "middle", "tail")


def frequency_buckets(counts: torch.Tensor) -> torch.Tensor:
    """The bucket of each token, int64 `[vocabulary]`: 0 head, 1 middle, 2 tail.

    Tokens sorted by count, then id; a token is head while the probability mass before it is < 0.5, middle while < 0.9,
    else tail. Unseen tokens are tail.
    """
    order = torch.sort(counts, descending=True, stable=True).indices
    mass_before = (counts[order].cumsum(0) - counts[order]).double() / counts.sum()
    buckets = torch.empty_like(counts)
    buckets[order] = (mass_before >= 0.5).long() + (mass_before >= 0.9).long()
    return buckets.masked_fill(counts == 0, 2)


class Meter:
    """Sums over supervised tokens, float64, on this rank until `values` reduces them over all.

    buckets: `[vocabulary]`. Untilted cross-entropies are there where `LossSums` had them: at validation, of losses that tilt.
    """

    _NAMES = (
        "steps", "seconds", "weighted", "weight", "weight_squared", "tokens", "correct", "positions", "read",
        *(f"cross_entropy/{bucket}" for bucket in BUCKETS), *(f"tokens/{bucket}" for bucket in BUCKETS),
        *(f"cross_entropy_untilted/{bucket}" for bucket in BUCKETS),
    )  # fmt: skip

    def __init__(self, loss: Loss, buckets: torch.Tensor):
        self.loss, self.buckets = loss, buckets
        self.sums = torch.zeros(len(self._NAMES), dtype=torch.float64, device=loss.weights.device)

    @torch.no_grad()
    def add(self, sums: LossSums, labels: torch.Tensor, read: torch.Tensor | int = 0) -> None:
        """Add one micro-batch. labels: those that gave `sums`. read: tokens the model read, padding excluded."""
        supervised = labels[labels != -100]
        losses = sums.token_losses.double()
        weights = self.loss.weights[supervised].double()
        buckets = self.buckets[supervised]
        by_bucket = torch.zeros(3, len(BUCKETS), dtype=torch.float64, device=losses.device)
        by_bucket[0].index_add_(0, buckets, losses)
        by_bucket[1].index_add_(0, buckets, torch.ones_like(losses))
        by_bucket[2].index_add_(0, buckets, sums.shifted_losses.double())
        scalars = [
            0,
            0,
            (weights * sums.token_values.double()).sum(),
            weights.sum(),
            weights.square().sum(),
            len(losses),
            sums.token_correct.sum(),
            labels.numel(),
            read,
        ]
        self.sums += torch.cat(
            [torch.stack([torch.as_tensor(s, dtype=torch.float64, device=losses.device) for s in scalars]), *by_bucket]
        )

    def count_step(self, seconds: float) -> None:
        self.sums[0] += 1
        self.sums[1] += seconds

    def reset(self) -> None:
        self.sums.zero_()

    def values(self, prefix: str) -> dict[str, float]:
        """All metrics over everything added on any rank, tagged `prefix/...`. A collective: every rank calls it.

        A bucket without a token leaves its cross-entropy out; without a counted step there is no speed, without any token nothing.
        """
        total = dict(zip(self._NAMES, distributed.summed(self.sums).tolist(), strict=True))
        if not total["tokens"]:
            return {}
        tokens, steps = total["tokens"], total["steps"] / distributed.world_size()
        cross_entropy = sum(total[f"cross_entropy/{bucket}"] for bucket in BUCKETS) / tokens
        denominator = {"weighted_mean": total["weight"], "token_mean": tokens, "sum": max(steps, 1.0)}[
            self.loss.reduction
        ]
        values = {
            "loss": total["weighted"] / denominator if denominator else math.nan,
            "cross_entropy": cross_entropy,
            "perplexity": math.exp(cross_entropy) if cross_entropy < 700 else math.inf,
            "accuracy": total["correct"] / tokens,
            "weight_mean": total["weight"] / tokens,
            "effective_sample_fraction": total["weight"] ** 2 / (tokens * total["weight_squared"])
            if total["weight_squared"]
            else 0.0,
        }
        for bucket in BUCKETS:
            values[f"token_share/{bucket}"] = total[f"tokens/{bucket}"] / tokens
            if total[f"tokens/{bucket}"]:
                values[f"cross_entropy/{bucket}"] = total[f"cross_entropy/{bucket}"] / total[f"tokens/{bucket}"]
        if prefix == "validation" and self.loss.untilt is not None:
            untilted = {bucket: total[f"cross_entropy_untilted/{bucket}"] for bucket in BUCKETS}
            values["cross_entropy_untilted"] = sum(untilted.values()) / tokens
            for bucket in filter(lambda bucket: total[f"tokens/{bucket}"], BUCKETS):
                values[f"cross_entropy_untilted/{bucket}"] = untilted[bucket] / total[f"tokens/{bucket}"]
        if steps:
            values["supervised_fraction"] = tokens / total["positions"]
            values["step_seconds"] = total["seconds"] / total["steps"]
            values["tokens_per_second"] = total["read"] / (values["step_seconds"] * steps)
        return {f"{prefix}/{name}": value for name, value in values.items()}


class RunLog:
    """`metrics.jsonl` and `tensorboard/` of a run directory. Every rank has one, rank 0 writes; a full disk is RunFailed on all."""

    def __init__(self, directory: Path, last_kept: int):
        """last_kept: the last step that stays in the log, -1 for none. What was logged after it is set aside, not lost."""
        self.path, self.events = directory / "metrics.jsonl", directory / "tensorboard"
        self._on_rank_0(lambda: self._open(last_kept))

    def write(self, step: int, values: dict[str, float]) -> None:
        """A collective, as are the others."""

        def write() -> None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            for tag, value in values.items():
                self.tensorboard.add_scalar(tag, value, step)
            self.tensorboard.flush()

        self._on_rank_0(write)

    def sync(self) -> None:
        """Bring what was written to the disk: a checkpoint must not outlive the lines before it."""

        def sync() -> None:
            for path in (self.path, self.events):
                if path.exists():
                    sync_tree(path)
            for directory in (self.events.parent, self.path.parent):
                sync_directory(directory)

        self._on_rank_0(sync)

    def close(self) -> None:
        """Not a collective: also called where ranks part."""
        if distributed.rank() == 0:
            with contextlib.suppress(OSError):  # all that matters was flushed by `write`
                self.tensorboard.close()

    def _on_rank_0(self, work: Callable[[], None]) -> None:
        distributed.together(lambda: work() if distributed.rank() == 0 else None, "writing the log")

    def _open(self, last_kept: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self.path.exists():
            self._set_aside_after(last_kept)
        earlier = sorted(self.events.glob("events.out.tfevents.*"))
        self.tensorboard = SummaryWriter(str(self.events), purge_step=last_kept + 1)
        self.tensorboard.flush()
        (self.events,) = set(self.events.glob("events.out.tfevents.*")) - set(earlier)
        # TensorBoard reads event files in the order of their names, which begin with the time. After a clock went backwards
        # the new one would be read first, and the earlier ones would bring back what it purges.
        if earlier and earlier[-1].name > self.events.name:
            for number, path in enumerate(earlier):
                path.rename(path.with_name(f"events.out.tfevents.{number:010d}.{path.name.split('.', 4)[4]}"))

    def _set_aside_after(self, step: int) -> None:
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if -1 < _step_of(line) <= step]
        later = [line for line in lines if not -1 < _step_of(line) <= step]
        if later:
            aside = self.path.with_name(f"metrics.discarded-{max(step, 0)}.jsonl")
            with aside.open("a", encoding="utf-8") as discarded:
                discarded.writelines(line if line.endswith("\n") else line + "\n" for line in later)
            sync_tree(aside)
            write_whole(self.path, "".join(kept))


def _step_of(line: str) -> int:
    """The step of a log line, -1 for one that is cut off or damaged."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else -1
    except (ValueError, KeyError, TypeError):
        return -1
