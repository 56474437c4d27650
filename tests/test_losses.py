"""The losses by name: their tables against formulas written out here, where they lead a model, and what is logged of them."""

import math
import statistics

import pytest
import torch
from distributed import models
from faults.runs import SAMPLE, logged, train

from pdl import TiltLogits, linear_weighted_cross_entropy, power_law_weights, weighted_cross_entropy
from pdl.config import LossConfig, UserError, load_config
from pdl.cross_entropy import Objective
from pdl.weights import loss_tables

COUNTS = torch.tensor([500, 0, 120, 120, 40, 7, 1, 12])
SEEN = [500, 1, 120, 120, 40, 7, 1, 12]  # what never occurs counts as the rarest that does
P = [count / 800 for count in SEEN]


def rescaled(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [1 + (math.e - 1) * (value - low) / (high - low) for value in values]


MEDIAN = statistics.median(count for count in COUNTS.tolist() if count)
FORMULAS = {
    "inverse_frequency": [1 / (p + 1e-8) for p in P],
    "class_balanced": [(1 - 0.99) / (1 - 0.99**count) for count in SEEN],
    "exponential": rescaled([math.exp(-2 * count / MEDIAN) for count in SEEN]),
    "chi_square": rescaled([(count / MEDIAN) ** 2 * math.exp(-2 * count / MEDIAN) for count in SEEN]),
    "face": [1 - count / 500 for count in SEEN],
    "self_information": [-math.log(p) for p in P],
}
SETTINGS = {"class_balanced": {"beta": 0.99}, "exponential": {"temperature": 2.0}, "chi_square": {"temperature": 2.0}}


@pytest.mark.parametrize("name", FORMULAS)
def test_tables(name):
    raw = torch.tensor(FORMULAS[name], dtype=torch.float64)
    plain = loss_tables(LossConfig(name=name, normalize=False, **SETTINGS.get(name, {})), COUNTS)
    torch.testing.assert_close(plain.weights, raw.float())
    mean_one = loss_tables(LossConfig(name=name, **SETTINGS.get(name, {})), COUNTS)
    assert float((COUNTS * mean_one.weights.double()).sum() / COUNTS.sum()) == pytest.approx(1)
    torch.testing.assert_close(mean_one.weights / mean_one.weights[6], plain.weights / plain.weights[6])
    torch.testing.assert_close(mean_one.tilt.exp(), mean_one.weights, atol=1e-30, rtol=1e-5)


def test_power_law_and_logit_adjustment_share_a_tilt():
    settings = {"alpha": 0.6, "unseen": "epsilon", "max_weight": 4.0, "min_weight": 2.0}
    expected = power_law_weights(COUNTS, 0.6, unseen="epsilon", max_weight=4.0, min_weight=2.0)
    power_law = loss_tables(LossConfig(name="power_law", **settings), COUNTS)
    adjusted = loss_tables(LossConfig(name="logit_adjusted", **settings), COUNTS)
    assert torch.equal(power_law.weights, expected)
    assert torch.equal(adjusted.weights, torch.ones(8)) and torch.equal(adjusted.tilt, power_law.tilt)


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "dft"])
def test_losses_without_a_table(name):
    weights, tilt = loss_tables(LossConfig(name=name), COUNTS)
    assert torch.equal(weights, torch.ones(8)) and tilt is None


def test_a_floor_lifts_the_frequent_tokens_before_the_scaling():
    free = power_law_weights(COUNTS, 0.5, normalize=False)
    floor = float(free[2])
    held = power_law_weights(COUNTS, 0.5, normalize=False, min_weight=floor)
    assert torch.equal(held, free.clamp(min=floor)) and held[0] > free[0]
    scaled = power_law_weights(COUNTS, 0.5, min_weight=floor)
    torch.testing.assert_close(scaled / scaled[6], held / held[6])


# --- where a loss leads: q is proportional to p * exp(tilt) ---


def converged(loss: LossConfig, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distribution of a model that is a bias alone, trained on these counts until nothing changes; and the loss' tilt."""
    weights, tilt = loss_tables(loss, counts)
    labels = torch.repeat_interleave(torch.arange(len(counts)), counts)
    hidden, head = torch.zeros(len(labels), 1, dtype=torch.float64), torch.zeros(len(counts), 1, dtype=torch.float64)
    bias = torch.zeros(len(counts), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [bias], max_iter=1000, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        sums = linear_weighted_cross_entropy(
            hidden, head, labels, weights, bias=bias, denominator=weights[labels].double().sum(),
            shift=-tilt if loss.name == "logit_adjusted" else None, adjusted=loss.name == "logit_adjusted",
        )  # fmt: skip
        sums.weighted.backward()
        return sums.weighted

    optimizer.step(closure)
    return bias.detach().softmax(0), tilt


@pytest.mark.parametrize(
    "loss",
    [LossConfig(name="power_law", alpha=0.5), LossConfig(name="power_law", alpha=1.0), LossConfig(name="logit_adjusted", alpha=0.5),
     LossConfig(name="self_information"), LossConfig(name="exponential", temperature=1.0)],
    ids=lambda loss: f"{loss.name}-{loss.alpha}",
)  # fmt: skip
def test_a_model_that_minimizes_a_loss_leans_by_its_tilt(loss):
    counts = torch.tensor([500, 120, 60, 40, 7, 1])
    q, tilt = converged(loss, counts)
    expected = (counts / counts.sum()).double() * tilt.double().exp()
    expected /= expected.sum()
    assert (q - expected).abs().max() < 1e-4
    # Cross-entropy's own optimum is elsewhere; the tilt leads back to it.
    p = counts / counts.sum()
    assert (q - p).abs().max() > 0.01
    assert ((q.log() - tilt).softmax(0) - p).abs().max() < 1e-4


def test_a_tilt_while_writing_is_the_one_that_training_leaves():
    """A model whose bias leans by log w writes, with the tilt taken out, what it writes without; and the other way round."""
    weights = power_law_weights(torch.arange(models.VOCABULARY, 0, -1), 0.7)
    plain, leaning = models.build("bart").eval(), models.build("bart").eval()
    leaning.final_logits_bias += weights.log()
    prompt = torch.tensor([[5, 6, 7, 8], [20, 30, 40, 50]])

    def write(model, *processors):
        return model.generate(
            prompt, max_new_tokens=12, do_sample=False, num_beams=1, logits_processor=list(processors)
        ).tolist()

    assert write(plain) != write(leaning)
    assert write(leaning, TiltLogits(weights, -1)) == write(plain)
    assert write(plain, TiltLogits(weights)) == write(leaning)


@pytest.mark.parametrize("unfit", [(torch.tensor([1.0, 0.0]), 1.0), (torch.ones(2), math.nan)])
def test_a_tilt_that_is_no_number_is_refused(unfit):
    with pytest.raises(ValueError, match="must be"):
        TiltLogits(*unfit)


# --- what is logged ---


def test_untilted_losses_are_those_of_logits_less_the_tilt():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(30, 8, generator=generator), torch.randint(0, 8, (30,), generator=generator)
    weights, tilt = loss_tables(LossConfig(name="power_law", alpha=0.5), COUNTS)
    sums = weighted_cross_entropy(logits, labels, weights, shift=-tilt)
    torch.testing.assert_close(sums.shifted_losses, -(logits - weights.log()).log_softmax(1)[range(30), labels])
    torch.testing.assert_close(sums.token_losses, -logits.log_softmax(1)[range(30), labels])
    assert torch.equal(sums.token_values, sums.token_losses)
    smoothed = weighted_cross_entropy(logits, labels, weights, objective=Objective(label_smoothing=0.1))
    log_p = logits.log_softmax(1)
    torch.testing.assert_close(smoothed.token_values, -0.9 * log_p[range(30), labels] - 0.1 * log_p.mean(1))


RUNS = {
    "logit_adjusted": ["loss.name=logit_adjusted", "loss.alpha=0.5"],
    "focal with smoothing": ["loss.name=focal", "loss.label_smoothing=0.1", "loss.z_loss=1e-4"],
    "over logits": ["loss.name=face", "loss.path=logits"],
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_runs(tmp_path, settings):
    run = train(tmp_path / "run", *settings, "training.max_steps=3", "training.log_every=1", ranks=1)
    assert run.exit_codes() == [0], run.output()
    first, *_, last = logged(tmp_path / "run")
    assert math.isfinite(last["train/loss"]) and last["validation/cross_entropy"] < first["validation/cross_entropy"]
    tilts = "loss.name=focal" not in settings
    assert ("validation/cross_entropy_untilted" in last) == tilts and "train/cross_entropy_untilted" not in last
    if settings[0] == "loss.name=logit_adjusted":  # it minimizes what is logged as untilted
        assert last["validation/loss"] == pytest.approx(last["validation/cross_entropy_untilted"], rel=1e-6)
        assert last["validation/weight_mean"] == 1 and last["validation/effective_sample_fraction"] == 1
    if tilts:
        buckets = [
            last[f"validation/token_share/{name}"] * last.get(f"validation/cross_entropy_untilted/{name}", 0)
            for name in ("head", "middle", "tail")
        ]
        assert sum(buckets) == pytest.approx(last["validation/cross_entropy_untilted"], rel=1e-9)
    else:
        assert last["validation/loss"] != pytest.approx(last["validation/cross_entropy"], rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["loss.name=focal", "loss.beta=0.5"],
            r"loss\.beta=0\.5 means nothing to loss\.name=focal; it is of class_balanced",
        ),
        (["loss.gamma=1"], r"loss\.gamma=1\.0 means nothing to loss\.name=power_law"),
        (["loss.name=class_balanced", "loss.beta=1"], r"loss\.beta=1\.0 must lie in \[0, 1\)"),
        (["loss.name=chi_square", "loss.temperature=0"], r"loss\.temperature=0\.0 must be finite and > 0"),
        (["loss.label_smoothing=1"], r"loss\.label_smoothing=1\.0 must lie in"),
        (["loss.z_loss=-1"], r"loss\.z_loss=-1\.0 must be finite"),
        (["loss.min_weight=0"], r"loss\.min_weight=0\.0 must be finite and > 0"),
        (["loss.name=dft", "loss.max_weight=3"], r"loss\.max_weight means nothing to loss\.name=dft"),
        (["loss.name=logit_adjusted", "loss.alpha=null"], r"loss\.alpha is missing: state it for logit_adjusted"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        load_config(SAMPLE, settings, 1)
