"""From counts to one loss weight per vocabulary row."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch

from pdl import baselines


def power_law_weights(
    counts: torch.Tensor,
    alpha: float,
    epsilon: float = 1e-8,
    *,
    frequency: Literal["probability", "count"] = "probability",
    general_counts: torch.Tensor | None = None,
    general_weight: float = 0.0,
    unseen: Literal["rarest", "epsilon"] = "rarest",
    min_weight: float | None = None,
    max_weight: float | None = None,
    normalize: bool = True,
) -> torch.Tensor:
    """Power-law decay weights, `w(t) = (freq(t) + epsilon)^-alpha` (arXiv 2505.16900, Eq. 3).

    counts: int64 `[vocabulary]`, how often each token is a target.
    alpha: strength of the decay, >= 0; 0 gives exactly 1 everywhere, that is, cross-entropy.
    epsilon: > 0, in the unit of `frequency`.
    frequency: `probability` is count / total; `count` takes the counts as they are.
    general_counts, general_weight: mixes in a general corpus, `p = (1 - g) p_task + g p_general` (probabilities only).
    unseen: tokens of frequency 0 get the weight of the `rarest` seen token, or `epsilon^-alpha`, Eq. 3 to the letter.
    min_weight: lower bound of (freq + epsilon)^-alpha, before the scaling: a floor for the most frequent tokens.
    max_weight: upper bound of the final weights.
    normalize: scale so that the mean weight of the counted tokens is 1 (`sum p_task w = 1`), which keeps losses and
        learning rates comparable with cross-entropy. With `max_weight` the scale c solves
        `sum p_task min(c v, max_weight) = 1`, so both hold.

    Returns float32 `[vocabulary]` on the device of `counts`; computed in float64. Keep it in float32: a bf16 weight is off by up to 0.4 %.
    Raises ValueError for arguments outside these bounds, and when a weight would not be finite.
    """
    problems = []
    if counts.dtype.is_floating_point or counts.dim() != 1 or counts.numel() == 0 or int(counts.min()) < 0:
        problems.append(
            f"counts must be non-negative integers of one dimension, not {counts.dtype} {list(counts.shape)}"
        )
    elif int(counts.sum()) == 0:
        problems.append("counts are all zero: there is nothing to weight by")
    if not (math.isfinite(alpha) and alpha >= 0):
        problems.append(f"alpha must be finite and >= 0, not {alpha}")
    if not (math.isfinite(epsilon) and epsilon > 0):
        problems.append(f"epsilon must be finite and > 0, not {epsilon}")
    if frequency not in ("probability", "count"):
        problems.append(f"frequency must be 'probability' or 'count', not {frequency!r}")
    if unseen not in ("rarest", "epsilon"):
        problems.append(f"unseen must be 'rarest' or 'epsilon', not {unseen!r}")
    if not 0 <= general_weight <= 1:
        problems.append(f"general_weight must lie in [0, 1], not {general_weight}")
    if general_counts is None and general_weight > 0:
        problems.append(f"general_weight={general_weight} needs general_counts")
    if general_counts is not None:
        if frequency == "count":
            problems.append("frequency='count' cannot be mixed with a general corpus: the two have different totals")
        if general_counts.shape != counts.shape or int(general_counts.sum()) == 0:
            problems.append(f"general_counts must count over the same {counts.numel()} rows and not be empty")
    if min_weight is not None and not (math.isfinite(min_weight) and min_weight > 0):
        problems.append(f"min_weight must be finite and > 0, not {min_weight}")
    if max_weight is not None and not (math.isfinite(max_weight) and max_weight >= 1 if normalize else max_weight > 0):
        problems.append(f"max_weight must be {'finite and >= 1' if normalize else '> 0'}, not {max_weight}")
    if problems:
        raise ValueError("; ".join(problems))

    probability = counts.double() / counts.sum()
    freq = counts.double() if frequency == "count" else probability
    if general_counts is not None:
        freq = (1 - general_weight) * probability + general_weight * general_counts.double() / general_counts.sum()
    if unseen == "rarest":
        freq = torch.where(freq > 0, freq, freq[freq > 0].min())
    weights = _scaled((freq + epsilon).pow(-alpha), probability, min_weight, max_weight, normalize)
    if not bool(torch.isfinite(weights).all()):
        raise ValueError(
            f"alpha={alpha} with epsilon={epsilon} gives weights beyond float32; lower alpha or raise epsilon"
        )
    return weights


def _scaled(
    weights: torch.Tensor,
    probability: torch.Tensor,
    min_weight: float | None,
    max_weight: float | None,
    normalize: bool,
) -> torch.Tensor:
    """The bounds and the scaling that all weights have in common; float64 in, float32 out."""
    if min_weight is not None:
        weights = weights.clamp(min=min_weight)
    if normalize:
        weights = _unit_mean(weights, probability, max_weight)
    elif max_weight is not None:
        weights = weights.clamp(max=max_weight)
    return weights.float()


def _unit_mean(weights: torch.Tensor, probability: torch.Tensor, max_weight: float | None) -> torch.Tensor:
    """Scale by the c that solves `sum p min(c v, max_weight) = 1`; float64 `[vocabulary]` in and out."""
    if max_weight is None:
        return weights / (probability * weights).sum()
    # The sum grows with c and bends where a weight reaches the bound. With the k heaviest tokens at the bound,
    # c_k = (1 - max_weight * their mass) / (the weighted mass of the others). The right k is the first one whose
    # next token stays below the bound.
    order = weights.argsort(descending=True)
    v, p = weights[order], probability[order]
    capped = max_weight * (p.cumsum(0) - p)  # mass at the bound, before each token
    remaining = (p * v).flip(0).cumsum(0).flip(0)  # weighted mass from each token on
    scales = (1 - capped) / remaining
    fits = (remaining > 0) & (capped < 1) & (scales * v <= max_weight)
    if not bool(fits.any()):  # max_weight = 1: every seen token is at the bound
        return weights.new_full(weights.shape, max_weight)
    return (weights * scales[fits.nonzero()[0, 0]]).clamp(max=max_weight)


class LossTables(NamedTuple):
    """What a loss knows of each vocabulary row.

    weights: float32 `[vocabulary]`, the factor of a token's loss.
    tilt: float32 `[vocabulary]` or None. A model that minimizes the loss ends at q proportional to p * exp(tilt), where p is the
        distribution of the data: tilt = log w for a loss that is weighted by w (README, "What PDL does").
    """

    weights: torch.Tensor
    tilt: torch.Tensor | None


def loss_tables(loss, counts: torch.Tensor, general_counts: torch.Tensor | None = None) -> LossTables:
    """The tables that a `loss` section of a config asks for. A new `loss.name` is one more case here.

    loss: `pdl.config.LossConfig`; counts, general_counts: int64 `[vocabulary]`.
    """
    ones = torch.ones(counts.numel())
    match loss.name:
        case "cross_entropy" | "focal" | "dft":
            return LossTables(ones, None)
        case "power_law" | "logit_adjusted":
            weights = power_law_weights(
                counts,
                loss.alpha,
                loss.epsilon,
                frequency=loss.frequency,
                general_counts=general_counts,
                general_weight=loss.general_weight,
                unseen=loss.unseen,
                min_weight=loss.min_weight,
                max_weight=loss.max_weight,
                normalize=loss.normalize,
            )
        case "inverse_frequency":
            weights = power_law_weights(
                counts, 1.0, min_weight=loss.min_weight, max_weight=loss.max_weight, normalize=loss.normalize
            )
        case name:
            raw = {
                "class_balanced": lambda: baselines.class_balanced(counts, loss.beta),
                "exponential": lambda: baselines.exponential(counts, loss.temperature),
                "chi_square": lambda: baselines.chi_square(counts, loss.temperature),
                "face": lambda: baselines.face(counts),
                "self_information": lambda: baselines.self_information(counts),
            }[name]()
            probability = counts.double() / counts.sum()
            weights = _scaled(raw, probability, loss.min_weight, loss.max_weight, loss.normalize)
    # No tilt is infinite: a token of weight 0 is one that the loss says nothing about.
    tilt = weights.clamp_min(torch.finfo(torch.float32).tiny).log()
    return LossTables(ones if loss.name == "logit_adjusted" else weights, tilt)
