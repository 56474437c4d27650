"""Power-law weights against Eq. 3 of arXiv 2505.16900, written out in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdl import power_law_weights

COUNTS = torch.tensor([5000, 1200, 300, 300, 41, 7, 1, 0, 0])


def literal(counts, alpha, epsilon, unit="probability"):
    total = counts.sum().item() if unit == "probability" else 1
    return [1.0 / (count / total + epsilon) ** alpha for count in counts.tolist()]


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("epsilon", [1e-8, 1e-3])
@pytest.mark.parametrize("unit", ["probability", "count"])
def test_equation_three_to_the_letter(alpha, epsilon, unit):
    weights = power_law_weights(COUNTS, alpha, epsilon, frequency=unit, unseen="epsilon", normalize=False)
    assert weights.dtype == torch.float32
    assert weights.double().tolist() == pytest.approx(literal(COUNTS, alpha, epsilon, unit), rel=1e-6)


@pytest.mark.parametrize(("alpha", "epsilon", "unseen_weight"), [(1.0, 1e-7, 1e7), (0.5, 1e-8, 1e4)])
def test_equation_three_gives_unseen_tokens_epsilon_to_the_minus_alpha(alpha, epsilon, unseen_weight):
    weights = power_law_weights(COUNTS, alpha, epsilon, unseen="epsilon", normalize=False)
    assert weights[-1].item() == pytest.approx(unseen_weight, rel=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_unseen_tokens_weigh_as_the_rarest_by_default(normalize):
    weights = power_law_weights(COUNTS, 0.7, normalize=normalize)
    assert weights[7] == weights[8] == weights[6]


@pytest.mark.parametrize(
    "extra", [{}, {"unseen": "epsilon"}, {"frequency": "count"}, {"normalize": False}, {"max_weight": 1.5}]
)
def test_alpha_zero_is_exactly_one(extra):
    assert torch.equal(power_law_weights(COUNTS, 0.0, **extra), torch.ones(len(COUNTS)))


counts_strategy = st.lists(st.integers(0, 10**12), min_size=1, max_size=60).filter(lambda counts: sum(counts) > 0)


@settings(deadline=None, max_examples=100)
@given(
    counts_strategy, st.floats(0, 3), st.sampled_from(["rarest", "epsilon"]), st.one_of(st.none(), st.floats(1, 100))
)
def test_the_mean_weight_of_counted_tokens_is_one(counts, alpha, unseen, max_weight):
    counts = torch.tensor(counts)
    weights = power_law_weights(counts, alpha, 1e-6, unseen=unseen, max_weight=max_weight).double()
    probability = counts.double() / counts.sum()
    assert (probability * weights).sum().item() == pytest.approx(1, rel=1e-5)
    if max_weight is not None:
        assert weights.max() <= max_weight * (1 + 1e-6)
    order = counts.argsort()
    assert (weights[order].diff() <= 1e-6 * weights.max()).all(), "a more frequent token never weighs more"


def test_the_bound_scales_the_others_up():
    """With the bound the scale solves sum p min(c v, m) = 1: found here by bisection."""
    v = torch.tensor(literal(COUNTS, 0.8, 1e-8), dtype=torch.float64)
    p = COUNTS.double() / COUNTS.sum()
    v[COUNTS == 0] = v[6]
    low, high = 0.0, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (p * (middle * v).clamp(max=3.0)).sum() < 1 else (low, middle)
    expected = (low * v).clamp(max=3.0)
    assert power_law_weights(COUNTS, 0.8, max_weight=3.0).double().tolist() == pytest.approx(
        expected.tolist(), rel=1e-6
    )


def test_without_normalization_the_bound_only_cuts():
    free = power_law_weights(COUNTS, 0.8, normalize=False)
    assert torch.equal(power_law_weights(COUNTS, 0.8, normalize=False, max_weight=20.0), free.clamp(max=20.0))


def test_a_general_corpus_is_mixed_as_probabilities():
    general = torch.tensor([1, 1, 1, 1, 1, 1, 1, 93, 0])
    weights = power_law_weights(COUNTS, 1.0, 1e-8, general_counts=general, general_weight=0.25, normalize=False)
    mixed = 0.75 * COUNTS.double() / COUNTS.sum() + 0.25 * general.double() / general.sum()
    mixed[8] = mixed[mixed > 0].min()  # in neither corpus
    assert weights.double().tolist() == pytest.approx((1 / (mixed + 1e-8)).tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.5}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"alpha": math.inf}, "alpha"),
        ({"alpha": 1.0, "epsilon": 0.0}, "epsilon"),
        ({"alpha": 1.0, "epsilon": -1.0}, "epsilon"),
        ({"alpha": 1.0, "frequency": "share"}, "frequency"),
        ({"alpha": 1.0, "unseen": "drop"}, "unseen"),
        ({"alpha": 1.0, "max_weight": 0.5}, "max_weight"),
        ({"alpha": 1.0, "general_weight": 0.5}, "general_counts"),
        ({"alpha": 1.0, "general_weight": 1.5, "general_counts": COUNTS}, "general_weight"),
        ({"alpha": 1.0, "general_weight": 0.5, "general_counts": COUNTS, "frequency": "count"}, "count"),
        ({"alpha": 1.0, "general_weight": 0.5, "general_counts": COUNTS[:3]}, "9 rows"),
        ({"alpha": 10.0, "unseen": "epsilon", "normalize": False}, "beyond float32"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        power_law_weights(COUNTS, **arguments)


def test_bad_counts_are_refused():
    for counts in (
        torch.zeros(4, dtype=torch.int64),
        torch.tensor([1.0, 2.0]),
        torch.tensor([1, -1]),
        torch.ones(2, 2).long(),
    ):
        with pytest.raises(ValueError, match="counts"):
            power_law_weights(counts, 1.0)


def test_every_problem_is_named_at_once():
    with pytest.raises(ValueError, match=r"alpha.*epsilon"):
        power_law_weights(COUNTS, -1.0, -1.0)
