"""Weighted cross-entropy straight from hidden states, without the `[tokens, vocabulary]` logits.

They are the largest tensor of a finetuning step, and most of their rows are wasted: prompts and padding have no label. Here
only labelled rows get logits, some hundred at a time in one scratch buffer, and the buffer's gradient is made in place before
the next rows come: three matrix products in all, as many as cross-entropy needs, and one pass over the logits between them.
The factor of each row (its weight over the denominator of the global batch) is known before, so gradients come out final.
"""

from __future__ import annotations

import contextlib

import torch

from pdl.cross_entropy import LossSums, Objective, weight_of_tokens

# Rows whose logits exist at the same time, the bytes that those may take, and the bytes in float32 of what the pass in torch works on
# together. With fewer rows matrix products are slow; what a pass works on a CPU holds in its caches.
_LIMITS = {"cpu": (512, 128 << 20, 2 << 20), "cuda": (4096, 5 << 29, 256 << 20)}


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
    objective: Objective = Objective(),  # noqa: B008  (immutable)
    shift: torch.Tensor | None = None,
    adjusted: bool = False,
    chunk_rows: int | None = None,
) -> LossSums:
    """`weighted_cross_entropy` of `softcap(logit_scale * (hidden @ head_weight.T + bias))`.

    hidden: `[N, width]`; head_weight: `[vocabulary, width]` of the same float type, unless autocast casts both.
    labels: integers `[N]`; bias: `[vocabulary]`.
    logit_scale: a factor on the logits (Granite, Cohere). softcap: `c * tanh(logits / c)` (Gemma).
    chunk_rows: rows whose logits are made at a time; by default it follows the device and the sizes.
    The rest, the result and the errors are those of `weighted_cross_entropy`. The gradients of `weighted` are made with it;
    backward multiplies them by what comes in (on a CPU it hands them out as they are where that is 1). There are no second ones.
    """
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, not {chunk_rows}")
    if hidden.dim() != 2 or hidden.shape[:1] != labels.shape or weights.shape != head_weight.shape[:1]:
        raise ValueError(
            "hidden [N, D], labels [N], head_weight [V, D] and weights [V] do not fit: "
            f"{list(hidden.shape)}, {list(labels.shape)}, {list(head_weight.shape)}, {list(weights.shape)}"
        )
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, head_weight = hidden.to(dtype), head_weight.to(dtype)
    if hidden.dtype != head_weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype}, head_weight {head_weight.dtype}: cast one of them, or use autocast"
        )
    bias = None if bias is None else bias.to(hidden.dtype)
    with torch.no_grad():
        token_weight = weight_of_tokens(labels.masked_fill(labels == ignore_index, 0), weights, token_weights)
        rows, graded = _labelled_first(labels != ignore_index, token_weight != 0)
        labels, token_weight = labels[rows].long(), token_weight[rows]
        if labels.is_cuda:  # a CPU finds out by itself
            torch._assert_async(((labels >= 0) & (labels < len(head_weight))).all(), "a label is no row of the head")
        factors = token_weight / denominator
    wanted = [
        torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in (hidden, head_weight, bias)
    ]
    with torch.autocast(hidden.device.type, enabled=False):  # all has the type that it is to have
        weighted, values, losses, shifted, correct, *_ = _linear_cross_entropy(
            hidden, head_weight, bias, shift, rows, labels, factors, graded if any(wanted) else 0,
            logit_scale, softcap or 0.0, list(objective), adjusted, chunk_rows or _chunk_rows(len(rows), head_weight), wanted,
        )  # fmt: skip
    shifted = losses if shift is None else shifted
    if graded < len(rows):
        in_order = rows.argsort()
        values, losses, shifted, correct = (each[in_order] for each in (values, losses, shifted, correct))
    return LossSums(
        weighted=weighted,
        weight=token_weight.sum(),
        cross_entropy=losses.double().sum(),
        tokens=len(rows),
        token_losses=losses,
        token_correct=correct,
        token_values=values,
        shifted_losses=shifted,
    )


def _labelled_first(labelled: torch.Tensor, weighty: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The numbers of the labelled rows, those that have a gradient first, and how many have one. One wait for the device."""
    weighty = weighty & labelled
    order = torch.argsort(labelled.byte() + weighty.byte(), descending=True, stable=True)
    number, graded = torch.stack([labelled.sum(), weighty.sum()]).tolist()
    return order[:number], graded


def _chunk_rows(rows: int, head_weight: torch.Tensor) -> int:
    """Chunks of equal size, as few as there is room for."""
    vocabulary, width = head_weight.shape
    products = _product_type(head_weight)
    most, scratch, _ = _limits(head_weight)
    fit = max(1, scratch // (vocabulary * products.itemsize))
    # So few rows that all of them at once take less room than a float32 sum of the chunks' gradients of the head.
    at_once = rows <= 2 * width and products.itemsize == 2
    most = fit if at_once else min(fit, most)
    chunks = -(-rows // most)
    return -(-rows // max(1, chunks))


@torch.library.custom_op("pdl::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    rows: torch.Tensor,
    labels: torch.Tensor,
    factors: torch.Tensor,
    graded: int,
    logit_scale: float,
    softcap: float,
    objective: list[float],
    adjusted: bool,
    chunk_rows: int,
    wanted: list[bool],
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    """An operator of its own, which torch.compile takes as one node, as it is.

    rows, labels, factors: `[M]`; gradients flow to the first `graded` of them only. wanted: whether to hidden, head_weight and bias.
    Returns the sum of factor * value; of each row value, cross-entropy, that of the shifted logits (empty without a shift) and
    correctness; the unit of the gradients; and those of the sum to hidden, head_weight and bias (empty where they are not wanted).
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    vocabulary, products = len(head_weight), _product_type(hidden)
    head = head_weight.to(products)
    hidden_gradient = torch.zeros_like(hidden) if wanted[0] else hidden.new_empty(0)
    # Narrow sums over many chunks would lose what the later ones add; a single chunk is summed wide inside its product.
    summed = products if graded <= chunk_rows else wide
    head_gradient = head.new_empty(head.shape if wanted[1] else 0, dtype=summed)
    if graded == 0:
        head_gradient.zero_()
    bias_gradient = hidden.new_zeros(vocabulary if wanted[2] else 0, dtype=wide)
    values = hidden.new_zeros(len(rows), dtype=wide)
    losses, correct = torch.empty_like(values), torch.empty_like(values, dtype=torch.bool)
    shifted = torch.empty_like(values if shift is not None else values[:0])
    # Rows begin where a GPU reads and writes 16 numbers at once.
    scratch = head.new_empty(min(chunk_rows, len(rows)), -(-vocabulary // 16) * 16)[:, :vocabulary]
    # A row's gradient may be too small for float16, which is why losses are scaled up there; but that is known in backward only. So
    # gradients are kept in units of the largest factor.
    unit = torch.ones((), dtype=factors.dtype, device=factors.device)
    if hidden.dtype == torch.float16 and graded:
        largest = factors.abs().max()
        unit = torch.where(largest > 0, largest, unit).log2().ceil().exp2()
    row_pass = _row_pass_for(scratch)
    for start, end in _chunks(graded, len(rows), chunk_rows):
        those = slice(start, end)
        inputs = hidden.index_select(0, rows[those]).to(products)
        logits = torch.mm(inputs, head.t(), out=scratch[: end - start])
        with_gradient = end <= graded
        row_pass(
            logits, bias, shift, labels[those], factors[those] / unit,
            values[those], losses[those], shifted[those] if shift is not None else None, correct[those],
            Objective(*objective), adjusted, logit_scale, softcap, with_gradient,
        )  # fmt: skip
        if not with_gradient:
            continue
        if wanted[0]:
            hidden_gradient.index_copy_(0, rows[those], torch.mm(logits, head).to(hidden.dtype))
        if wanted[1]:
            _add_product(head_gradient, logits.t(), inputs, first=start == 0)
        if wanted[2]:
            bias_gradient += logits.sum(0, dtype=wide)
    weighted = (values * factors).sum().to(wide)
    scratch = logits = None  # before the gradient of the head is there twice
    gradients = hidden_gradient, head_gradient.to(head_weight.dtype), bias_gradient.to(hidden.dtype)
    return weighted, values, losses, shifted, correct, unit, *gradients


@_linear_cross_entropy.register_fake
def _(
    hidden,
    head_weight,
    bias,
    shift,
    rows,
    labels,
    factors,
    graded,
    logit_scale,
    softcap,
    objective,
    adjusted,
    chunk_rows,
    wanted,
):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(len(rows), dtype=wide),
        hidden.new_empty(len(rows), dtype=wide),
        hidden.new_empty(len(rows) if shift is not None else 0, dtype=wide),
        hidden.new_empty(len(rows), dtype=torch.bool),
        factors.new_empty(()),
        torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0),
        torch.empty_like(head_weight) if wanted[1] else hidden.new_empty(0),
        hidden.new_empty(len(head_weight) if wanted[2] else 0),
    )


def _keep_gradients(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[5:])
    ctx.wanted = inputs[-1]
    ctx.set_materialize_grads(False)  # else each of the other outputs would get zeros of its size


def _hand_out_gradients(ctx, upstream, *_):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_weighted_cross_entropy has no second derivatives: use weighted_cross_entropy for them"
        )
    if upstream is None:
        return (None,) * 14
    unit, *gradients = ctx.saved_tensors
    factor = upstream * unit
    # To know it on a GPU the CPU would have to wait; what only stands for a tensor, while it is traced, has no value.
    unchanged = factor.device.type == "cpu" and type(factor) is torch.Tensor and factor == 1
    handed_out = [
        (gradient if unchanged else gradient * factor) if wanted else None
        for gradient, wanted in zip(gradients, ctx.wanted, strict=True)
    ]
    return (*handed_out, *[None] * 11)


_linear_cross_entropy.register_autograd(_hand_out_gradients, setup_context=_keep_gradients)


def _chunks(graded: int, rows: int, size: int):
    """(start, end) of rows that have gradients, then of those that have none."""
    for first, last in ((0, graded), (graded, rows)):
        for start in range(first, last, max(1, size)):
            yield start, min(start + size, last)


def _limits(tensor: torch.Tensor) -> tuple[int, int, int]:
    return _LIMITS.get(tensor.device.type, _LIMITS["cuda"])


def _product_type(tensor: torch.Tensor) -> torch.dtype:
    """The type in which matrices are multiplied: on a CPU without instructions for a narrow one, which torch then emulates slowly, float32."""
    if tensor.device.type != "cpu" or tensor.element_size() > 2:
        return tensor.dtype
    native = "_is_mkldnn_bf16_supported" if tensor.dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return tensor.dtype if getattr(torch.ops.mkldnn, native)() else torch.float32


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, first: bool) -> None:
    """total += left @ right, summed in the type of total, which holds nothing yet at first."""
    beta = 0 if first else 1
    if total.dtype == right.dtype:
        torch.addmm(total, left, right, beta=beta, out=total)
    elif total.is_cuda:
        torch.addmm(total, left, right, beta=beta, out_dtype=total.dtype, out=total)
    else:
        product = left @ right
        total.copy_(product) if first else total.add_(product)


def _row_pass_for(logits: torch.Tensor):
    if logits.is_cuda and logits.dtype != torch.float64:
        with contextlib.suppress(ImportError):  # not every torch for GPUs comes with Triton
            from pdl import row_kernel  # takes a while, for nothing on a CPU

            return row_kernel.row_pass
    return row_pass


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
    """From logits `[rows, vocabulary]` the cross-entropies, in place of the logits the gradient of the sum of factor * value where it is wanted.

    values, losses, shifted (where there is a shift), correct: `[rows]`, filled here. Works on few rows at a time, so that on a CPU they stay in its caches.
    """
    together = max(1, _limits(logits)[2] // (4 * logits.shape[1]))
    shifted = losses if shifted is None else shifted
    blocks = [each.split(together) for each in (logits, labels, factors, values, losses, shifted, correct)]
    for narrow, *others in zip(*blocks, strict=True):
        work = narrow.to(values.dtype)  # as it is, where it has that type
        if bias is not None:
            work += bias
        _pass_over_block(work, shift, *others, objective, adjusted, logit_scale, softcap, with_gradient)
        if with_gradient and work is not narrow:
            narrow.copy_(work)


def _pass_over_block(
    logits,
    shift,
    labels,
    factors,
    values,
    losses,
    shifted,
    correct,
    objective,
    adjusted,
    logit_scale,
    softcap,
    with_gradient,
) -> None:
    labels = labels[:, None]
    if logit_scale != 1.0:
        logits *= logit_scale
    slopes = None
    if softcap:
        logits.div_(softcap).tanh_()
        if with_gradient:
            slopes = 1 - logits.square()
        logits *= softcap
    largest = logits.amax(1, keepdim=True)
    label_logits = logits.gather(1, labels)
    torch.ge(label_logits, largest, out=correct[:, None])
    minimized = losses
    if shift is not None:
        with_shift = logits + shift
        shifted_largest, shifted_label_logits = with_shift.amax(1, keepdim=True), label_logits + shift[labels]
        if adjusted:  # the plain ones are measured only
            torch.add(_log_sum(logits, largest), -label_logits, out=losses[:, None])
            logits.copy_(with_shift)
            minimized, largest, label_logits = shifted, shifted_largest, shifted_label_logits
        else:
            torch.add(_log_sum(with_shift, shifted_largest), -shifted_label_logits, out=shifted[:, None])
    mean = logits.mean(1) if objective.label_smoothing else None
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    log_total = total.log()
    torch.add(log_total, largest - label_logits, out=minimized[:, None])
    logsumexps = (log_total + largest).squeeze(1)
    values.copy_(objective.value(minimized, None if mean is None else logsumexps - mean, logsumexps))
    if (modulation := objective.modulation(minimized)) is not None:
        values *= modulation
        factors = factors * modulation
    if not with_gradient:
        return
    factors = (factors * logit_scale).to(logits.dtype)
    # p * (1 + 2 * z_loss * logsumexp) - label_smoothing / vocabulary, and 1 - label_smoothing less at the label
    logits *= (factors * (1 + 2 * objective.z_loss * logsumexps))[:, None] / total
    if objective.label_smoothing:
        logits -= (factors * (objective.label_smoothing / logits.shape[1]))[:, None]
    logits.scatter_add_(1, labels, (factors * (objective.label_smoothing - 1))[:, None])
    if slopes is not None:
        logits *= slopes


def _log_sum(logits: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """logsumexp of each row, in place of the logits."""
    return logits.sub_(largest).exp_().sum(1, keepdim=True).log_() + largest
