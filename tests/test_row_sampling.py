"""Sampled rows: which are drawn, and that what they give has the exact loss and gradients as its expectation."""

import pytest
import torch
from faults.runs import SAMPLE, logged, train
from hypothesis import given, settings
from hypothesis import strategies as st

from pdl import linear_weighted_cross_entropy, power_law_weights
from pdl.config import UserError, load_config
from pdl.row_sampling import RowSampling, inclusion_probabilities


@settings(deadline=None)
@given(
    number=st.integers(0, 50),
    fraction=st.floats(0.01, 0.99),
    spread=st.floats(0, 6),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_probabilities_are_proportional_up_to_one_and_add_up(number, fraction, spread, zeros, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = 10 ** (spread * torch.rand(number, generator=generator, dtype=torch.float64))
    weights[torch.rand(number, generator=generator) < zeros] = 0
    found = inclusion_probabilities(weights, fraction)
    assert found.shape == weights.shape
    assert float(found.sum()) == pytest.approx(min(fraction * number, int((weights > 0).sum())), abs=1e-9)
    assert ((found >= 0) & (found <= 1 + 1e-12)).all() and ((found > 0) == (weights > 0)).all()
    below = (found < 1 - 1e-9) & (weights > 0)
    if below.any():
        ratio = found[below] / weights[below]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
        assert (found <= ratio[0] * weights * (1 + 1e-9)).all()


def problem() -> dict:
    """300 tokens of a Zipf distribution, of which a third is ignored, in two sequences."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, width = 60, 8
    counts = (10**6 / torch.arange(1, vocabulary + 1)).long()
    labels = torch.multinomial(counts.double(), 300, replacement=True, generator=generator).reshape(2, 150)
    labels[:, :50] = -100
    head = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    hidden = torch.randn(300, width, generator=generator, dtype=torch.float64) + head[labels.flatten().clamp_min(0)] / 4
    return {"labels": labels, "weights": power_law_weights(counts, 0.75), "hidden": hidden, "head_weight": head}


def test_loss_gradients_and_sums_are_unbiased():
    given = problem()
    labels, weights = given["labels"], given["weights"]

    def measured(sums, head) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(sums.weighted, head)
        numbers = [
            sums.weighted.detach(),
            sums.weight,
            sums.cross_entropy,
            sums.token_losses.sum(),
            sums.token_correct.sum(),
        ]
        return torch.cat([torch.stack([number.double() for number in numbers]), gradient.flatten()])

    head = given["head_weight"].requires_grad_()
    exact = measured(linear_weighted_cross_entropy(given["hidden"], head, labels.flatten(), weights), head)
    sampling, draws, rows = RowSampling(0.25, seed=7), [], []
    for step in range(800):
        draw = sampling.draw(labels, weights, step, micro_batch=0)
        rows.append(int((draw.labels != -100).sum()))
        sums = linear_weighted_cross_entropy(
            given["hidden"], head, draw.labels.flatten(), weights, token_weights=draw.token_weights.flatten()
        )
        draws.append(measured(draw.estimate(sums), head))
    assert sum(rows) / len(rows) == pytest.approx(0.25 * 200, rel=0.03) and max(rows) < 100
    draws = torch.stack(draws)
    # In units of the standard error: of so many numbers none is 5 off by chance, and none may be.
    off = (draws.mean(0) - exact) / (draws.std(0) / len(draws) ** 0.5)
    assert off.abs().max() < 5, off
    # A sample that forgot the probabilities would be found out.
    assert abs(draws[:, 0].mean() / exact[0] - 1) < 0.04
    assert draws[:, 0].std() > 0


def test_a_draw_depends_on_where_the_micro_batch_stands_and_on_nothing_else():
    labels, weights = problem()["labels"], problem()["weights"]
    sampling = RowSampling(0.25, seed=7)
    first = sampling.draw(labels, weights, 3, 5)
    assert torch.equal(first.labels, sampling.draw(labels, weights, 3, 5).labels)
    others = [sampling.draw(labels, weights, *place).labels for place in ((3, 4), (4, 5))]
    others.append(RowSampling(0.25, seed=8).draw(labels, weights, 3, 5).labels)
    assert not any(torch.equal(first.labels, other) for other in others)


def test_runs_log_that_they_are_approximate_and_every_layout_draws_the_same(tmp_path):
    settings = ["loss.row_sampling=0.25", "training.max_steps=4", "training.log_every=1", "model.dropout=0.0"]
    runs = [tmp_path / "one rank", tmp_path / "two ranks"]
    for ranks, run in enumerate(runs, 1):
        started = train(run, *settings, ranks=ranks)
        assert started.exit_codes() == [0] * ranks, started.output()
        assert "row_sampling=0.25 (approximate)" in started.output()
    one, two = map(logged, runs)
    assert [line["train/row_sampling"] for line in one[1:]] == [0.25] * 4
    for name in ("train/loss", "train/cross_entropy", "train/accuracy", "validation/loss"):
        values = [[line[name] for line in lines if name in line] for lines in (one, two)]
        assert len(values[0]) > 1 and values[0] == pytest.approx(values[1], rel=1e-4), name


@pytest.mark.parametrize(
    "settings", [["loss.row_sampling=0"], ["loss.row_sampling=1.5"], ["loss.row_sampling=0.5", "loss.path=logits"]]
)
def test_what_makes_no_sense_is_refused(settings):
    with pytest.raises(UserError, match=r"loss\.row_sampling"):
        load_config(SAMPLE, settings, 1)
