"""What linear_cross_entropy.py measures: the weighted mean cross-entropy of a linear head with its gradients, in many ways.

Each entry of PROVIDERS makes a function of a `Problem` that returns the loss. It imports and compiles what it needs, so
that what this machine, this torch or this shape lacks is an exception with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from pdl import linear_weighted_cross_entropy, power_law_weights

SEQUENCE = 256  # tokens; each begins with its prompt, which is ignored
CROSS_ENTROPY = 2.7  # nats that the inputs are scaled to


@dataclass
class Problem:
    """hidden `[N, D]` and head `[V, D]` are leaves; labels `[N]`, -100 where ignored; weights float32 `[V]`."""

    hidden: torch.Tensor
    head: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor

    def __post_init__(self):
        self.kept = self.labels != -100
        # A gather with -100 would read the 100th row from the end.
        self.token_weights = torch.where(self.kept, self.weights[self.labels.clamp(min=0)], 0.0)
        self.denominator = self.token_weights.double().sum()
        self.shares = (self.token_weights / self.denominator).float()  # of each row's loss in the weighted mean


def trained_inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str):
    """hidden, head, labels, weights as at the end of a training: few likely tokens, the frequent ones favoured by a common direction."""
    tokens, width, vocabulary = shape
    generator = torch.Generator(device).manual_seed(0)
    probability = 1.0 / torch.arange(1, vocabulary + 1, device=device).double()  # Zipf, exponent 1
    probability /= probability.sum()
    labels = torch.multinomial(probability, tokens, replacement=True, generator=generator)
    head = torch.randn(vocabulary, width, generator=generator, device=device) / math.sqrt(width)
    common = F.normalize(torch.randn(width, generator=generator, device=device), dim=0)
    logarithm = probability.log().float()
    head += torch.outer(0.1 * (logarithm - logarithm.mean()), common)
    # Without a hint of the label the logits are log p plus noise; the hint's strength differs from token to token.
    hint = torch.rand(tokens, 1, generator=generator, device=device) * head[labels]
    rest = 10 * common + torch.randn(tokens, width, generator=generator, device=device)
    sample = slice(min(tokens, 512))
    hint_logits, rest_logits = hint[sample] @ head.T, rest[sample] @ head.T
    low, high = 0.0, 100.0
    for _ in range(20):
        scale = (low + high) / 2
        too_hard = F.cross_entropy(scale * hint_logits + rest_logits, labels[sample]) > CROSS_ENTROPY
        low, high = (scale, high) if too_hard else (low, scale)
    counts = (1e9 * probability).long()
    weights = power_law_weights(counts.cpu(), alpha=0.5).to(device)
    hidden = (scale * hint + rest).to(dtype).requires_grad_()
    return hidden, head.to(dtype).requires_grad_(), labels, weights


def ignore_prompts(labels: torch.Tensor, fraction: float) -> torch.Tensor:
    prompt = round(SEQUENCE * (1 - fraction))
    position = torch.arange(len(labels), device=labels.device) % SEQUENCE
    return labels.masked_fill(position < prompt, -100)


def reference(p: Problem, weighted: bool) -> dict:
    """Loss, dX and dW from the formulas in float64, 256 rows at a time; and what the inputs are like."""
    head, weights = p.head.detach().double(), (p.token_weights if weighted else p.kept).double()
    weights = weights / weights.sum()
    hidden_gradient, head_gradient = torch.zeros_like(p.hidden, dtype=torch.float64), torch.zeros_like(head)
    loss, cross_entropy, correct = 0.0, 0.0, 0
    for rows in p.kept.nonzero().squeeze(1).split(256):
        hidden, labels = p.hidden.detach()[rows].double(), p.labels[rows][:, None]
        log_probability = (hidden @ head.T).log_softmax(-1)
        losses = -log_probability.gather(1, labels).squeeze(1)
        correct += (log_probability.argmax(-1, keepdim=True) == labels).sum().item()
        # d loss / d logits = w (p - onehot)
        logits_gradient = log_probability.exp_().scatter_add_(1, labels, -torch.ones_like(labels, dtype=torch.float64))
        logits_gradient *= weights[rows, None]
        loss += (losses * weights[rows]).sum().item()
        cross_entropy += losses.sum().item()
        hidden_gradient[rows] = logits_gradient @ head
        head_gradient += logits_gradient.T @ hidden
    supervised = p.kept.sum().item()
    return {
        "loss": loss, "hidden": hidden_gradient, "head": head_gradient,
        "input": {"cross_entropy": cross_entropy / supervised, "accuracy": correct / supervised},
    }  # fmt: skip


Step = Callable[[Problem], torch.Tensor]


def ours() -> Step:
    return lambda p: (
        linear_weighted_cross_entropy(p.hidden, p.head, p.labels, p.weights, denominator=p.denominator).weighted
    )


def plain(hidden, head, labels, weights):
    # Upcast, as the stock models do: torch refuses bf16 logits with float32 weights.
    return F.cross_entropy(F.linear(hidden, head).float(), labels, weight=weights)


def eager() -> Step:
    return lambda p: plain(p.hidden, p.head, p.labels, p.weights)


def compiled() -> Step:
    function = torch.compile(plain, dynamic=False)
    return lambda p: function(p.hidden, p.head, p.labels, p.weights)


def chunks(rows: int = 256) -> Step:
    """As TRL does: supervised rows only, chunk by chunk, logits made a second time in backward."""

    def part(hidden, head, labels, shares):
        return (F.cross_entropy(F.linear(hidden, head).float(), labels, reduction="none") * shares).sum()

    def step(p: Problem) -> torch.Tensor:
        kept = [tensor[p.kept].split(rows) for tensor in (p.hidden, p.labels, p.shares)]
        parts = [checkpoint(part, h, p.head, y, w, use_reentrant=False) for h, y, w in zip(*kept, strict=True)]
        return torch.stack(parts).sum()

    return step


def torch_linear(**options) -> Step:
    """torch's own, since 2.13."""
    options = torch.nn.LinearCrossEntropyOptions(**options)
    return lambda p: F.linear_cross_entropy(p.hidden, p.head, p.labels, weight=p.weights, options=options)


def liger(accum_dtype: torch.dtype | None = None) -> Step:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda p: liger_fused_linear_cross_entropy(
        p.hidden, p.head, p.labels, ce_weight=p.weights, accum_dtype=accum_dtype
    )


def liger_cute() -> Step:
    """Its fused head with the CuTe DSL kernel for the loss; asked for by name, it fails rather than fall back."""
    from liger_kernel.functional import fused_linear_cross_entropy

    return lambda p: fused_linear_cross_entropy(
        p.hidden, p.head, p.labels, ce_weight=p.weights, accum_dtype=torch.float32, impl="nvidia-cutedsl"
    )[0]


def liger_sm90() -> Step:
    """Its newest for Hopper and bf16: no logits in memory at all, a loss for each row."""
    from liger_kernel.ops.cutedsl.ops import LigerFusedScaledCrossEntropySM90Function

    return lambda p: (LigerFusedScaledCrossEntropySM90Function.apply(p.hidden, p.head, p.labels) * p.shares).sum()


def cut(filter_eps: str | None) -> Step:
    """filter_eps: `high` (the default) leaves small gradients out, None keeps all."""
    from cut_cross_entropy import linear_cross_entropy

    def step(p: Problem) -> torch.Tensor:
        losses = linear_cross_entropy(p.hidden, p.head, p.labels, reduction="none", filter_eps=filter_eps)
        return (losses * p.shares).sum()

    return step


def quack() -> Step:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda p: chunked_linear_cross_entropy(p.hidden, p.head, p.labels)


PROVIDERS: dict[str, Callable[[], Step]] = {
    "eager": eager,
    "ours": ours,
    "compiled": compiled,
    "chunks 256": chunks,
    "torch auto": torch_linear,
    "torch 512": lambda: torch_linear(batch_chunk_size=512),
    "torch 2048": lambda: torch_linear(batch_chunk_size=2048),
    "torch 4096": lambda: torch_linear(batch_chunk_size=4096),
    "liger": liger,
    "liger fp32": lambda: liger(torch.float32),
    "liger cute": liger_cute,
    "liger sm90": liger_sm90,
    "cce": lambda: cut("high"),
    "cce exact": lambda: cut(None),
    "quack": quack,
}
UNWEIGHTED = {"quack"}  # computes less than what is asked for: its time is a lower bound
