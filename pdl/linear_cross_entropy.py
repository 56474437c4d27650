"""Weighted cross-entropy straight from hidden states: logits are made for supervised rows only.

Prompts and padding are most of a finetuning batch; their rows of the `[tokens, vocabulary]` logits, the largest tensor
of a step, are never made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pdl.cross_entropy import LossSums, supervised_cross_entropy


def linear_weighted_cross_entropy(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    *,
    token_weights: torch.Tensor | None = None,
    denominator: torch.Tensor | float = 1.0,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> LossSums:
    """`weighted_cross_entropy` of `softcap(logit_scale * (hidden @ head_weight.T + bias))`.

    hidden: `[N, width]`; head_weight: `[vocabulary, width]`; labels: `[N]`; bias: `[vocabulary]`.
    logit_scale: a factor on the logits (Granite, Cohere). softcap: `c * tanh(logits / c)` (Gemma).
    The rest, the result and the errors are those of `weighted_cross_entropy`.
    """
    if hidden.dim() != 2 or hidden.shape[:1] != labels.shape or weights.shape != head_weight.shape[:1]:
        raise ValueError(
            "hidden [N, D], labels [N], head_weight [V, D] and weights [V] do not fit: "
            f"{list(hidden.shape)}, {list(labels.shape)}, {list(head_weight.shape)}, {list(weights.shape)}"
        )
    rows = (labels != ignore_index).nonzero().squeeze(1)
    if len(rows) < len(labels):
        hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
        token_weights = None if token_weights is None else token_weights.index_select(0, rows)
    logits = F.linear(hidden, head_weight, None if bias is None else bias.to(hidden.dtype))
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return supervised_cross_entropy(logits, labels, weights, token_weights, denominator)
