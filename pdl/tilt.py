"""Leaning towards rare tokens, or away from them, while a model writes (README, "What PDL does")."""

from __future__ import annotations

import math

import torch
from transformers import LogitsProcessor


class TiltLogits(LogitsProcessor):
    """Adds `strength * log w` to the logits: `model.generate(..., logits_processor=[TiltLogits(weights, strength)])`.

    weights: `[vocabulary]`, positive, as `power_law_weights` gives them. strength: 1 gives a model trained with cross-entropy the lean
    that training with these weights would give it; -1 takes it out of one that was. Raises ValueError for others.
    """

    def __init__(self, weights: torch.Tensor, strength: float = 1.0):
        if not math.isfinite(strength):
            raise ValueError(f"strength must be finite, not {strength}")
        if not bool((weights > 0).all()):
            raise ValueError("weights must be positive: the logarithm of another one is no number")
        self.shift = strength * weights.double().log()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.shift = self.shift.to(scores.device)
        return (scores + self.shift).to(scores.dtype)
