"""The pass over a chunk of logits on a GPU, as one Triton kernel: a program for each row, which reads it twice and writes it once. How
much of the second reading the L2 cache serves depends on the vocabulary. The formulas are those of `pdl.linear_cross_entropy`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pdl.cross_entropy import Objective

_BLOCK = 8192  # logits that a program holds at a time
_WARPS = 16


@triton.jit
def _block(
    logits_pointer, bias_pointer, places, logit_scale, vocabulary: tl.constexpr, padded: tl.constexpr, BIASED: tl.constexpr
):  # fmt: skip
    """What the product gave, with bias and scale; behind the vocabulary it has no meaning.

    It is read up to where the next row begins, so that whole vectors are read.
    """
    z = tl.load(logits_pointer + places, mask=places < padded, other=0.0).to(tl.float32)
    if BIASED:
        z += tl.load(bias_pointer + places, mask=places < vocabulary, other=0.0).to(tl.float32)
    return z * logit_scale


@triton.jit
def _row(
    logits_pointer, bias_pointer, shift_pointer, labels_pointer, factors_pointer,
    values_pointer, losses_pointer, shifted_pointer, correct_pointer,
    stride, logit_scale, softcap, label_smoothing, z_loss, certain, uncertain,
    vocabulary: tl.constexpr, padded: tl.constexpr, BIASED: tl.constexpr, SHIFTED: tl.constexpr, ADJUSTED: tl.constexpr, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, MODULATED: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # rows times their length may be more than 2**31
    logits_pointer += row * stride
    label = tl.load(labels_pointer + row)
    factor = tl.load(factors_pointer + row).to(tl.float32)
    places = tl.arange(0, BLOCK)

    largest = -float("inf")
    total = 0.0
    other_largest = -float(
        "inf"
    )  # the same two of what is measured only: shifted logits, or where those are minimized the plain ones
    other_total = 0.0
    everything = 0.0  # sum of the logits, for label smoothing
    for start in range(0, vocabulary, BLOCK):
        inside = start + places < vocabulary
        z = _block(logits_pointer, bias_pointer, start + places, logit_scale, vocabulary, padded, BIASED)
        if CAPPED:
            z = softcap * (2.0 / (1.0 + tl.exp(-2.0 / softcap * z)) - 1.0)
        z = tl.where(inside, z, -float("inf"))
        if SHIFTED:
            other = z + tl.load(shift_pointer + start + places, mask=inside, other=0.0).to(tl.float32)
            if ADJUSTED:
                z, other = other, z
            before = other_largest
            other_largest = tl.maximum(other_largest, tl.max(other))
            base = tl.where(
                other_largest == -float("inf"), 0.0, other_largest
            )  # of a block that is impossible as a whole
            other_total = other_total * tl.exp(before - base) + tl.sum(tl.exp(other - base))
        if SMOOTHED:
            everything += tl.sum(tl.where(inside, z, 0.0))
        before = largest
        largest = tl.maximum(largest, tl.max(z))
        base = tl.where(largest == -float("inf"), 0.0, largest)
        total = total * tl.exp(before - base) + tl.sum(tl.exp(z - base))

    label_z = tl.load(logits_pointer + label).to(tl.float32)
    if BIASED:
        label_z += tl.load(bias_pointer + label).to(tl.float32)
    label_z *= logit_scale
    if CAPPED:
        label_z = softcap * (2.0 / (1.0 + tl.exp(-2.0 / softcap * label_z)) - 1.0)
    if ADJUSTED:
        tl.store(correct_pointer + row, label_z >= other_largest)
    else:
        tl.store(correct_pointer + row, label_z >= largest)
    if SHIFTED:
        other_label = label_z + tl.load(shift_pointer + label).to(tl.float32)
        if ADJUSTED:
            label_z, other_label = other_label, label_z
        other_loss = tl.log(other_total) + (other_largest - other_label)
        tl.store((losses_pointer if ADJUSTED else shifted_pointer) + row, other_loss)
    log_total = tl.log(total)
    loss = log_total + (largest - label_z)
    logsumexp = log_total + largest
    tl.store((shifted_pointer if ADJUSTED else losses_pointer) + row, loss)
    value = loss
    if SMOOTHED:
        value = (1.0 - label_smoothing) * loss + label_smoothing * (logsumexp - everything / vocabulary)
    value += z_loss * logsumexp * logsumexp
    if MODULATED:
        doubt = tl.maximum(1.0 - tl.exp(-loss), 1e-30)
        modulation = tl.exp(-certain * loss + uncertain * tl.log(doubt))
        factor *= modulation
        value *= modulation
    tl.store(values_pointer + row, value)

    if GRADIENT:
        tl.debug_barrier()  # the label's logit is read by all before it is overwritten
        of_p = factor * (1.0 + 2.0 * z_loss * logsumexp) / total
        for start in range(0, vocabulary, BLOCK):
            inside = start + places < vocabulary
            z = _block(logits_pointer, bias_pointer, start + places, logit_scale, vocabulary, padded, BIASED)
            slope = logit_scale
            if CAPPED:
                t = 2.0 / (1.0 + tl.exp(-2.0 / softcap * z)) - 1.0
                z = softcap * t
                slope = logit_scale * (1.0 - t * t)
            if ADJUSTED:
                z += tl.load(shift_pointer + start + places, mask=inside, other=0.0).to(tl.float32)
            gradient = of_p * tl.exp(z - largest)
            if SMOOTHED:
                gradient -= factor * label_smoothing / vocabulary
            gradient -= tl.where(start + places == label, factor * (1.0 - label_smoothing), 0.0)
            gradient *= slope
            gradient = gradient.to(logits_pointer.dtype.element_ty)
            tl.store(logits_pointer + start + places, gradient, mask=start + places < padded)


def row_pass(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    labels: torch.Tensor,
    factors: torch.Tensor,
    values: torch.Tensor,
    losses: torch.Tensor,
    shifted: torch.Tensor | None,
    correct: torch.Tensor,
    objective: Objective,
    adjusted: bool,
    logit_scale: float,
    softcap: float,
    with_gradient: bool,
) -> None:
    """Fill values, losses, shifted (where there is a shift) and correct `[rows]` from logits `[rows, vocabulary]`, which become their gradient where that is wanted.

    logits: float32 or narrower, rows contiguous; what stands between one row and the next is written to. labels: int64, factors: float64 `[rows]`. values, losses: float32.
    """
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    padded = min(logits.stride(0), -(-vocabulary // 16) * 16) if rows > 1 else vocabulary
    with torch.cuda.device_of(logits):  # where Triton is to launch it
        _row[(rows,)](
            logits, bias, shift, labels, factors, values, losses, losses if shifted is None else shifted, correct,
            logits.stride(0), logit_scale, softcap, *objective, vocabulary=vocabulary, padded=padded,
            BIASED=bias is not None, SHIFTED=shift is not None, ADJUSTED=adjusted,
            CAPPED=softcap != 0.0, SMOOTHED=objective.label_smoothing != 0.0,
            MODULATED=objective.certain != 0.0 or objective.uncertain != 0.0, GRADIENT=with_gradient,
            BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)), num_warps=_WARPS,
        )  # fmt: skip
