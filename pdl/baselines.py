"""Other ways to weight a token by its frequency, to hold PDL against. Each takes counts and gives one weight per vocabulary row.

Inverse token frequency with an exponent (Nakamura 2018, "Another Diversity-Promoting Objective Function for Neural Dialogue
Generation", arXiv 1811.08100) is PDL without epsilon; it has no function of its own here, and its plain form is `power_law_weights(counts, 1.0)`.

counts: int64 `[vocabulary]`; a token that never occurs gets the weight of the rarest that does. Returned: float64 `[vocabulary]`,
before any scaling (`pdl.weights.loss_tables` does that). Raises ValueError for a parameter out of bounds.
"""

from __future__ import annotations

import math

import torch


def class_balanced(counts: torch.Tensor, beta: float) -> torch.Tensor:
    """w = (1 - beta) / (1 - beta^count): one over the effective number of samples (Cui 2019, arXiv 1901.05555)."""
    _require(0 <= beta < 1, f"beta must lie in [0, 1), not {beta}")
    if beta == 0:
        return torch.ones_like(counts, dtype=torch.float64)
    return (1 - beta) / -torch.expm1(_seen(counts) * math.log(beta))


def exponential(counts: torch.Tensor, temperature: float) -> torch.Tensor:
    """exp(-T c / median), rescaled to [1, e] (Gu 2020, arXiv 2010.04380, the exponential form; c: count)."""
    return _one_to_e(torch.exp(-temperature * _of_median(counts, temperature)))


def chi_square(counts: torch.Tensor, temperature: float) -> torch.Tensor:
    """(c / median)^2 exp(-T c / median), rescaled to [1, e]: also the rarest tokens count less (Gu 2020, the chi-square form)."""
    relative = _of_median(counts, temperature)
    return _one_to_e(relative.square() * torch.exp(-temperature * relative))


def face(counts: torch.Tensor) -> torch.Tensor:
    """1 - f / max f with the frequency f: FACE with frequencies of the corpus (Jiang 2019, arXiv 1902.09191).

    The most frequent token has no weight at all.
    """
    seen = _seen(counts)
    return 1 - seen / seen.max()


def self_information(counts: torch.Tensor) -> torch.Tensor:
    """-log p, what a token tells by itself, in nats."""
    seen = _seen(counts)
    return -(seen / counts.sum()).log()


def _seen(counts: torch.Tensor) -> torch.Tensor:
    return torch.where(counts > 0, counts, counts[counts > 0].min()).double()


def _of_median(counts: torch.Tensor, temperature: float) -> torch.Tensor:
    """Counts in units of the median count of a token that occurs."""
    _require(math.isfinite(temperature) and temperature > 0, f"temperature must be finite and > 0, not {temperature}")
    return _seen(counts) / counts[counts > 0].double().quantile(0.5)


def _one_to_e(values: torch.Tensor) -> torch.Tensor:
    low, high = values.min(), values.max()
    return 1 + (math.e - 1) * (values - low) / (high - low) if high > low else torch.ones_like(values)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
