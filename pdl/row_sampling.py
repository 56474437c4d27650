"""Row sampling: gradients of some rows only, unbiased. Approximate, and off unless `loss.row_sampling` asks for it.

A loss weighted by 1/frequency^alpha has most of its weight in few rows. Row i is kept with probability pi_i, proportional to its
weight (at most 1), and its weight becomes w_i / pi_i; then the expectation of every sum over rows is the sum over all of them
(Horvitz and Thompson 1952, JASA 47, 663-685). Rows that are not kept get no logits at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from pdl.cross_entropy import LossSums


@dataclass
class Draw:
    """Which rows of one micro-batch were kept.

    labels, token_weights: like the batch's labels; a row that is not kept is ignored, one that is has 1 / probability.
    factors: the same, float64 `[M]`, of each supervised row in order; 0 where it is not kept.
    """

    labels: torch.Tensor
    token_weights: torch.Tensor
    factors: torch.Tensor

    def estimate(self, sums: LossSums) -> LossSums:
        """Estimates, float64: from the sums over kept rows those over all: what a kept row has of `token_losses` and the like stands for 1 / probability rows."""
        kept = self.factors > 0

        def of_all(values: torch.Tensor) -> torch.Tensor:
            spread = torch.zeros_like(self.factors)
            spread[kept] = values * self.factors[kept]
            return spread

        losses = of_all(sums.token_losses)
        return replace(
            sums, cross_entropy=losses.sum(), tokens=len(losses), token_losses=losses,
            token_correct=of_all(sums.token_correct), token_values=of_all(sums.token_values),
            shifted_losses=of_all(sums.shifted_losses),
        )  # fmt: skip


@dataclass(frozen=True)
class RowSampling:
    """fraction: of the supervised rows of a micro-batch that are kept on average, in (0, 1)."""

    fraction: float
    seed: int

    def draw(self, labels: torch.Tensor, weights: torch.Tensor, step: int, micro_batch: int) -> Draw:
        """labels: of any shape, -100 is ignored. micro_batch: its number in the global batch, so that every layout of ranks draws the same."""
        supervised = labels != -100
        probabilities = inclusion_probabilities(weights[labels[supervised]].double(), self.fraction)
        generator = np.random.default_rng([self.seed, step, micro_batch])
        uniform = torch.from_numpy(generator.random(len(probabilities))).to(labels.device)
        factors = torch.where(uniform < probabilities, 1 / probabilities, 0.0)
        token_weights = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
        token_weights[supervised] = factors
        return Draw(labels.masked_fill(token_weights == 0, -100), token_weights, factors)


def inclusion_probabilities(weights: torch.Tensor, fraction: float) -> torch.Tensor:
    """min(1, c * weight) with the c by which they sum up to `fraction` of their number; float64 `[M]` in and out."""
    if len(weights) == 0:
        return weights
    expected = min(fraction * len(weights), int((weights > 0).sum()))
    ordered, order = weights.sort(descending=True)
    # With the k largest at 1, c_k = (expected - k) / (the sum of the others). The right k is the first that pushes none over 1.
    certain = torch.arange(len(weights), dtype=weights.dtype, device=weights.device)
    others = ordered.flip(0).cumsum(0).flip(0)
    scales = ((expected - certain) / others).nan_to_num(0.0)  # 0 / 0 where only rows without a weight are left
    fits = (scales * ordered <= 1) & (scales >= 0)
    number = int(fits.byte().argmax())
    probabilities = torch.empty_like(weights)
    probabilities[order] = torch.where(certain < number, 1.0, scales[number] * ordered)
    return probabilities
