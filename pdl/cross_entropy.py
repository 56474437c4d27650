"""Weighted cross-entropy from logits, as sums.

Sums, never means: a mean over one micro-batch of one rank is the wrong number to average. Whoever holds the whole
global batch divides once (arXiv 2505.16900, Eq. 5, is the plain sum).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Objective(NamedTuple):
    """What is minimized for one token besides its cross-entropy l = -log p(label); by default nothing.

    f * ((1 - label_smoothing) * l + label_smoothing * mean over the vocabulary of -log p + z_loss * logsumexp(logits)^2), where
    f = p(label)^certain * (1 - p(label))^uncertain is a constant to the gradient.

    label_smoothing: in [0, 1) (Szegedy 2016, arXiv 1512.00567). z_loss: 1e-4 in PaLM (arXiv 2204.02311, section 5).
    uncertain: the gamma of focal loss (Lin 2017, arXiv 1708.02002, Eq. 4; there f has a gradient, too). certain: 1 is dynamic
    finetuning, DFT (arXiv 2508.05629).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    certain: float = 0.0
    uncertain: float = 0.0

    def value(self, losses: torch.Tensor, means: torch.Tensor | None, logsumexps: torch.Tensor) -> torch.Tensor:
        """Of each token. losses: l. means: of -log p over the vocabulary, wanted for label smoothing only."""
        value = losses
        if self.label_smoothing:
            value = (1 - self.label_smoothing) * losses + self.label_smoothing * means
        if self.z_loss:
            value = value + self.z_loss * logsumexps.square()
        return value

    def modulation(self, losses: torch.Tensor) -> torch.Tensor | None:
        """f of each token, without a gradient; None where it is 1."""
        if not self.certain and not self.uncertain:
            return None
        losses = losses.detach()
        return torch.exp(-self.certain * losses) * (-torch.expm1(-losses)) ** self.uncertain


@dataclass(frozen=True)
class Loss:
    """What a run minimizes.

    weights: float32 `[vocabulary]`. reduction: what the sum over a global batch is divided by, as in PowerLawDecayLoss.
    untilt: float32 `[vocabulary]` or None: what is added to the logits of a trained model to take its lean towards rare tokens out,
        -log w. adjusted: plain cross-entropy of those logits is minimized (`loss.name=logit_adjusted`); else they are measured only.
    """

    weights: torch.Tensor
    reduction: str = "weighted_mean"
    objective: Objective = Objective()  # noqa: RUF009  (immutable)
    untilt: torch.Tensor | None = None
    adjusted: bool = False


@dataclass
class LossSums:
    """What one forward contributes to the loss of a global batch.

    weighted: sum of w * value / denominator, float32 (float64 for float64 logits), the only field with a gradient.
    weight, cross_entropy: sum of w and of the unweighted l, float64, detached.
    tokens: number of supervised tokens M.
    token_losses: unweighted l of each supervised token, in order, float32 `[M]`, detached.
    token_correct: whether no logit is larger than the label's, bool `[M]`.
    token_values: what is minimized for each token, before its weight: l, unless an Objective or a shift says otherwise. Like token_losses.
    shifted_losses: unweighted l of the shifted logits, like token_losses; the same tensor without a shift.
    """

    weighted: torch.Tensor
    weight: torch.Tensor
    cross_entropy: torch.Tensor
    tokens: int
    token_losses: torch.Tensor
    token_correct: torch.Tensor
    token_values: torch.Tensor
    shifted_losses: torch.Tensor


def weighted_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    *,
    token_weights: torch.Tensor | None = None,
    denominator: torch.Tensor | float = 1.0,
    ignore_index: int = -100,
    objective: Objective = Objective(),  # noqa: B008  (immutable)
    shift: torch.Tensor | None = None,
    adjusted: bool = False,
) -> LossSums:
    """Sum of `weights[label] * token_weight * cross-entropy / denominator` over the labels that are not ignored.

    logits: `[N, vocabulary]`, any float dtype; the loss is computed in float32.
    labels: integers `[N]`, aligned with the logits.
    weights: float32 `[vocabulary]`, one per output row, as `power_law_weights` gives them.
    token_weights: `[N]`, an extra factor per position; without a gradient. denominator: a number or a scalar tensor.
    objective: what stands for l in `weighted`; the other fields are of the plain cross-entropy.
    shift: float32 `[vocabulary]`, added to the logits for `shifted_losses`. With -log w they say what a model knows when the lean
        towards rare tokens that a weight w teaches is taken out.
    adjusted: the shifted logits are what is minimized, too (logit adjustment, Menon 2020, arXiv 2007.07314, Eq. 10).

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
    labels = labels.long()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = shifted = F.cross_entropy(logits, labels, reduction="none")
    largest, label_logits = logits.detach().amax(-1), logits.detach().gather(1, labels[:, None]).squeeze(1)
    if shift is not None:
        with_shift = logits + shift.to(logits.dtype)
        shifted = F.cross_entropy(with_shift, labels, reduction="none")
    logits, minimized = (with_shift, shifted) if adjusted else (logits, losses)
    logsumexps = logits.logsumexp(-1) if objective != Objective() else minimized
    values = objective.value(minimized, logsumexps - logits.mean(-1), logsumexps)
    if (modulation := objective.modulation(minimized)) is not None:
        values = values * modulation
    token_weight = weight_of_tokens(labels, weights, token_weights)
    # The factor of each row is fixed before the product, in float64: one rounding, and no overflow of a large sum.
    weighted = (values * (token_weight / denominator).to(values.dtype)).sum()
    with torch.no_grad():
        return LossSums(
            weighted=weighted,
            weight=token_weight.sum(),
            cross_entropy=losses.double().sum(),
            tokens=len(labels),
            token_losses=losses.detach(),
            token_correct=label_logits >= largest,
            token_values=values.detach(),
            shifted_losses=shifted.detach(),
        )


def weight_of_tokens(labels: torch.Tensor, weights: torch.Tensor, token_weights: torch.Tensor | None) -> torch.Tensor:
    """w of each label, times its own factor; float64."""
    weight = weights[labels].double()
    return weight if token_weights is None else weight * token_weights.detach().double()


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
