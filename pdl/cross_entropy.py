"""Weighted cross-entropy from logits, as sums.

Sums, never means: a mean over one micro-batch of one rank is the wrong number to average. Whoever holds the whole
global batch divides once (arXiv 2505.16900, Eq. 5, is the plain sum).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class LossSums:
    """What one forward contributes to the loss of a global batch.

    weighted: sum of w * l / denominator, float32, the only field with a gradient.
    weight, cross_entropy: sum of w and of the unweighted l, float64, detached.
    tokens: number of supervised tokens M.
    token_losses: unweighted l of each supervised token, in order, float32 `[M]`, detached.
    token_correct: whether the label is the largest logit, bool `[M]`.
    """

    weighted: torch.Tensor
    weight: torch.Tensor
    cross_entropy: torch.Tensor
    tokens: int
    token_losses: torch.Tensor
    token_correct: torch.Tensor


def weighted_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    *,
    token_weights: torch.Tensor | None = None,
    denominator: torch.Tensor | float = 1.0,
    ignore_index: int = -100,
) -> LossSums:
    """Sum of `weights[label] * token_weight * cross-entropy / denominator` over the labels that are not ignored.

    logits: `[N, vocabulary]`, any float dtype; the loss is computed in float32.
    labels: integers `[N]`, aligned with the logits.
    weights: float32 `[vocabulary]`, one per output row, as `power_law_weights` gives them.
    token_weights: `[N]`, an extra factor per position. denominator: a number or a scalar tensor.

    Only ignored labels are dropped: a row of weight 0 still counts in `tokens` and `cross_entropy`. Without any label
    `weighted` is 0 on a live graph, so that every gradient is zero and never None.
    Raises ValueError when the sizes do not fit.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or weights.shape != logits.shape[1:]:
        raise ValueError(
            f"logits [N, V], labels [N] and weights [V] do not fit: {list(logits.shape)}, {list(labels.shape)}, {list(weights.shape)}"
        )
    rows = (labels != ignore_index).nonzero().squeeze(1)
    if len(rows) < len(labels):
        logits, labels = logits.index_select(0, rows), labels.index_select(0, rows)
        token_weights = None if token_weights is None else token_weights.index_select(0, rows)
    return supervised_cross_entropy(logits, labels, weights, token_weights, denominator)


def supervised_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    token_weights: torch.Tensor | None,
    denominator: torch.Tensor | float,
) -> LossSums:
    """`weighted_cross_entropy` for rows that all have a label; arguments as there."""
    labels = labels.long()
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    token_weight = weights[labels].double()
    if token_weights is not None:
        token_weight = token_weight * token_weights.double()
    # The factor of each row is fixed before the product, in float64: one rounding, and no overflow of a large sum.
    weighted = (losses * (token_weight / denominator).float()).sum()
    with torch.no_grad():
        return LossSums(
            weighted=weighted,
            weight=token_weight.sum(),
            cross_entropy=losses.double().sum(),
            tokens=len(labels),
            token_losses=losses.detach(),
            token_correct=logits.argmax(-1) == labels,
        )


class PowerLawDecayLoss(nn.Module):
    """PDL as a criterion for a loop of one's own: `PowerLawDecayLoss(weights)(logits, labels) -> scalar`.

    weights: float32 `[vocabulary]` from `power_law_weights`. The buffer stays float32 whatever the module is cast to.
    reduction: `weighted_mean` = sum(w l) / sum(w) (as `F.cross_entropy(weight=w)`), `token_mean` = sum(w l) / N,
        `sum` = sum(w l) (arXiv 2505.16900, Eq. 5).

    The means are over the labels of this call. Under accumulation or several ranks the right denominator is the one of
    the whole global batch: use `weighted_cross_entropy(..., denominator=)` there.
    logits `[..., vocabulary]` and labels `[...]` are aligned: a decoder-only model's labels are shifted by the caller.
    Without any label the loss is 0.
    """

    def __init__(self, weights: torch.Tensor, reduction: str = "weighted_mean", ignore_index: int = -100):
        super().__init__()
        if reduction not in ("weighted_mean", "token_mean", "sum"):
            raise ValueError(f"reduction must be weighted_mean, token_mean or sum, not {reduction!r}")
        self.register_buffer("weights", weights.float(), persistent=False)
        self.reduction = reduction
        self.ignore_index = ignore_index

    def _apply(self, fn, recurse=True):
        # .to(device) moves the table; .half() or .bfloat16() must not round it.
        weights = self.weights
        super()._apply(fn, recurse)
        self.weights = weights.to(self.weights.device)
        return self

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        sums = weighted_cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), self.weights, ignore_index=self.ignore_index
        )
        if sums.tokens == 0 or self.reduction == "sum":
            return sums.weighted
        return sums.weighted / (sums.weight.float() if self.reduction == "weighted_mean" else sums.tokens)
