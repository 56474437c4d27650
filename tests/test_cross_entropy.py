"""The weighted loss from logits and from hidden states, against `F.cross_entropy` and against Eq. 5 in float64."""

import pytest
import torch
import torch.nn.functional as F

from pdl import PowerLawDecayLoss, linear_weighted_cross_entropy, power_law_weights, weighted_cross_entropy

N, D, V = 23, 12, 31


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator)
    head = torch.randn(V, D, generator=generator)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::3] = -100
    weights = power_law_weights((1000 / torch.arange(1, V + 1)).long(), 0.8)
    return hidden, head, labels, weights


def equation_five(logits, labels, weights) -> float:
    """-sum_t w(t) log p(t), term by term in float64."""
    total = 0.0
    for row, label in zip(logits.double(), labels.tolist(), strict=True):
        if label != -100:
            total -= weights[label].double().item() * (row[label] - row.logsumexp(0)).item()
    return total


def test_the_sum_is_equation_five(inputs):
    hidden, head, labels, _ = inputs
    weights = power_law_weights((1000 / torch.arange(1, V + 1)).long(), 0.8, normalize=False)
    logits = hidden @ head.T
    expected = equation_five(logits, labels, weights)
    assert weighted_cross_entropy(logits, labels, weights).weighted.item() == pytest.approx(expected, rel=1e-6)
    assert PowerLawDecayLoss(weights, "sum")(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def test_weighted_mean_is_torchs(inputs):
    hidden, head, labels, weights = inputs
    logits = (hidden @ head.T).requires_grad_()
    reference = F.cross_entropy(logits, labels, weight=weights)
    (expected,) = torch.autograd.grad(reference, logits)
    loss = PowerLawDecayLoss(weights)(logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


def test_scaling_the_table_changes_nothing_under_the_weighted_mean(inputs):
    hidden, head, labels, weights = inputs
    logits = hidden @ head.T
    assert PowerLawDecayLoss(weights)(logits, labels).item() == pytest.approx(
        PowerLawDecayLoss(1000 * weights)(logits, labels).item(), rel=1e-6
    )


def test_token_mean(inputs):
    hidden, head, labels, weights = inputs
    logits = hidden @ head.T
    expected = equation_five(logits, labels, weights) / (labels != -100).sum().item()
    assert PowerLawDecayLoss(weights, "token_mean")(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def test_leading_dimensions_are_flattened(inputs):
    hidden, head, labels, weights = inputs
    logits = hidden @ head.T
    loss = PowerLawDecayLoss(weights)
    assert loss(logits.reshape(1, N, V), labels.reshape(1, N)) == loss(logits, labels)


def test_the_fields(inputs):
    hidden, head, labels, weights = inputs
    logits = hidden @ head.T
    token_weights = torch.linspace(0, 2, N)  # the first one is zero
    sums = weighted_cross_entropy(logits, labels, weights, token_weights=token_weights, denominator=torch.tensor(7.0))
    rows = labels != -100
    losses = F.cross_entropy(logits[rows], labels[rows], reduction="none")
    w = weights[labels[rows]].double() * token_weights[rows].double()
    assert sums.tokens == rows.sum()
    torch.testing.assert_close(sums.token_losses, losses)
    assert torch.equal(sums.token_correct, logits[rows].argmax(-1) == labels[rows])
    assert sums.weight.dtype == sums.cross_entropy.dtype == torch.float64
    assert sums.weight.item() == pytest.approx(w.sum().item(), rel=1e-12)
    assert sums.cross_entropy.item() == pytest.approx(losses.double().sum().item(), rel=1e-7)
    assert sums.weighted.item() == pytest.approx((w * losses.double()).sum().item() / 7, rel=1e-6)


def test_only_ignored_labels_are_dropped(inputs):
    hidden, head, labels, weights = inputs
    weights = weights.clone()
    weights[labels[labels != -100]] = 0.0
    sums = weighted_cross_entropy(hidden @ head.T, labels, weights)
    assert sums.tokens == (labels != -100).sum() and sums.cross_entropy > 0 and sums.weighted == 0


def test_only_weighted_has_a_gradient(inputs):
    hidden, head, labels, weights = inputs
    logits = (hidden @ head.T).requires_grad_()
    sums = weighted_cross_entropy(logits, labels, weights)
    assert sums.weighted.requires_grad
    assert not any(getattr(sums, name).requires_grad for name in ("weight", "cross_entropy", "token_losses"))


def test_without_a_label_gradients_are_zero_and_never_none(inputs):
    hidden, head, labels, weights = inputs
    hidden.requires_grad_(), head.requires_grad_()
    sums = linear_weighted_cross_entropy(hidden, head, torch.full_like(labels, -100), weights)
    sums.weighted.backward()
    assert sums.weighted == 0 and sums.tokens == 0 and len(sums.token_losses) == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden)) and torch.equal(head.grad, torch.zeros_like(head))
    logits = (hidden @ head.T).detach().requires_grad_()
    for reduction in ("weighted_mean", "token_mean", "sum"):
        loss = PowerLawDecayLoss(weights, reduction)(logits, torch.full_like(labels, -100))
        assert loss == 0 and torch.equal(torch.autograd.grad(loss, logits)[0], torch.zeros_like(logits))


def test_another_ignored_label(inputs):
    hidden, head, labels, weights = inputs
    relabelled = labels.masked_fill(labels == -100, 4)
    kept = (relabelled != 4).sum()
    assert weighted_cross_entropy(hidden @ head.T, relabelled, weights, ignore_index=4).tokens == kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_have_a_float32_loss(inputs, dtype):
    hidden, head, labels, weights = inputs
    logits = (hidden @ head.T).to(dtype)
    sums = weighted_cross_entropy(logits, labels, weights)
    assert sums.weighted.dtype == sums.token_losses.dtype == torch.float32
    assert sums.weighted.item() == pytest.approx(equation_five(logits.float(), labels, weights), rel=1e-6)


def test_the_table_is_not_rounded_with_its_module(inputs):
    *_, weights = inputs
    loss = torch.nn.Sequential(PowerLawDecayLoss(weights)).to(torch.bfloat16)[0]
    assert torch.equal(loss.weights, weights) and loss.state_dict() == {}


def test_sizes_that_do_not_fit_are_refused(inputs):
    hidden, head, labels, weights = inputs
    with pytest.raises(ValueError, match="do not fit"):
        weighted_cross_entropy(hidden @ head.T, labels[:-1], weights)
    with pytest.raises(ValueError, match="do not fit"):
        weighted_cross_entropy(hidden @ head.T, labels, weights[:-1])
    with pytest.raises(ValueError, match="do not fit"):
        linear_weighted_cross_entropy(hidden, head, labels, weights[:-1])
    with pytest.raises(ValueError, match="reduction"):
        PowerLawDecayLoss(weights, "mean")
