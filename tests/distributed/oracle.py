"""The oracle: one process, full logits, plain `F.cross_entropy`, plain SGD. Nothing of pdl is imported."""

import torch
import torch.nn.functional as F


def zipf_counts(vocabulary: int, tokens: int) -> torch.Tensor:
    """Counts that fall over four orders of magnitude; the rows beyond `tokens` are never seen."""
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    counts[:tokens] = (1e6 / torch.arange(1, tokens + 1).double() ** 2.2).long() + 1
    return counts


def weights(counts: torch.Tensor, alpha: float, epsilon: float = 1e-8) -> torch.Tensor:
    """(f + eps)^-alpha, unseen as the rarest, mean 1 over the counted tokens, written out again."""
    total = counts.sum().item()
    rarest = min(c for c in counts.tolist() if c > 0)
    raw = [((c if c > 0 else rarest) / total + epsilon) ** -alpha for c in counts.tolist()]
    mean = sum(c / total * w for c, w in zip(counts.tolist(), raw, strict=True))
    return torch.tensor([w / mean for w in raw], dtype=torch.float64).float()


def full_batch(model, pairs: list[tuple[list[int], list[int]]], masked: set[int]):
    """Logits `[batch, length, vocabulary]` and aligned labels of whole sequences, each family's own way."""
    longest = max(len(prompt) + len(target) for prompt, target in pairs)
    if model.config.is_encoder_decoder:
        width = max(len(prompt) for prompt, _ in pairs)
        inputs = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt, _ in pairs])
        mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt, _ in pairs])
        labels = torch.tensor([target + [-100] * (longest - len(target)) for _, target in pairs])
        shifted = torch.zeros_like(labels)
        shifted[:, 1:] = labels[:, :-1].clamp(min=0)
        for row in masked:
            labels[row] = -100
        return model(input_ids=inputs, attention_mask=mask, decoder_input_ids=shifted).logits, labels
    inputs = torch.tensor([p + t + [0] * (longest - len(p) - len(t)) for p, t in pairs])
    mask = torch.tensor([[1] * (len(p) + len(t)) + [0] * (longest - len(p) - len(t)) for p, t in pairs])
    labels = torch.tensor([[-100] * len(p) + t + [-100] * (longest - len(p) - len(t)) for p, t in pairs])
    for row in masked:
        labels[row] = -100
    return model(input_ids=inputs, attention_mask=mask).logits[:, :-1], labels[:, 1:]


def objective(logits, labels, weight, reduction: str) -> torch.Tensor:
    logits, labels = logits.flatten(0, 1).float(), labels.flatten()
    if reduction == "weighted_mean":
        return F.cross_entropy(logits, labels, weight=weight, ignore_index=-100)
    total = F.cross_entropy(logits, labels, weight=weight, ignore_index=-100, reduction="sum")
    return total / (labels != -100).sum() if reduction == "token_mean" else total


def train(model, windows, weight, reduction: str, learning_rate: float, max_norm: float) -> dict:
    """SGD over the windows (each a list of pairs and a set of masked rows). Returns the update and each step's numbers."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    steps = []
    for pairs, masked in windows:
        optimizer.zero_grad()
        logits, labels = full_batch(model, pairs, masked)
        loss = objective(logits, labels, weight, reduction)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm if max_norm else float("inf"))
        steps.append({"loss": loss.item(), "grad_norm": norm.item(), **per_token(logits, labels)})
        optimizer.step()
    pairs = [pair for window, _ in windows for pair in window]
    masked, first = set(), 0
    for window, rows in windows:
        masked |= {first + row for row in rows}
        first += len(window)
    with torch.no_grad():
        logits, labels = full_batch(model, pairs, masked)
        final = {"loss": objective(logits, labels, weight, reduction).item(), **per_token(logits, labels)}
    return {
        "update": {n: (p.detach() - before[n]) for n, p in model.named_parameters()},
        "steps": steps,
        "final": final,
    }


@torch.no_grad()
def per_token(logits, labels) -> dict[str, list]:
    rows = labels != -100
    losses = F.cross_entropy(logits[rows].float(), labels[rows], reduction="none").double()
    correct = logits[rows].argmax(-1) == labels[rows]
    return {"token_losses": losses.tolist(), "labels": labels[rows].tolist(), "correct": correct.tolist()}


def bf16_update(model, pairs, weight, reduction: str, learning_rate: float) -> dict[str, torch.Tensor]:
    """One SGD step with the gradients of plain PyTorch in bf16: the yardstick for what that precision can give."""
    model.bfloat16()
    logits, labels = full_batch(model, pairs, set())
    objective(logits, labels, weight, reduction).backward()
    return {name: -learning_rate * parameter.grad.float() for name, parameter in model.named_parameters()}


def stock_loss_update(model, pairs, learning_rate: float) -> dict[str, torch.Tensor]:
    """One SGD step on the model's own loss, by its own `labels=`."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    longest = max(len(p) + len(t) for p, t in pairs)
    if model.config.is_encoder_decoder:
        width = max(len(p) for p, _ in pairs)
        inputs = torch.tensor([p + [0] * (width - len(p)) for p, _ in pairs])
        mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p, _ in pairs])
        labels = torch.tensor([t + [-100] * (longest - len(t)) for _, t in pairs])
    else:
        inputs = torch.tensor([p + t + [0] * (longest - len(p) - len(t)) for p, t in pairs])
        mask = torch.tensor([[1] * (len(p) + len(t)) + [0] * (longest - len(p) - len(t)) for p, t in pairs])
        labels = torch.tensor([[-100] * len(p) + t + [-100] * (longest - len(p) - len(t)) for p, t in pairs])
    model(input_ids=inputs, attention_mask=mask, labels=labels).loss.backward()
    torch.optim.SGD(model.parameters(), lr=learning_rate).step()
    return {n: (p.detach() - before[n]) for n, p in model.named_parameters()}
