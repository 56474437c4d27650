"""The promise: the same loss and the same update on any number of ranks, any accumulation, any ZeRO stage.

Real processes, gloo and DeepSpeed; compared with an oracle that shares no code (tests/distributed/oracle.py).
"""

import itertools
import json
from pathlib import Path

import pytest
import torch
from distributed import models, oracle, worker
from distributed.forked import Group, Rank
from safetensors.torch import load_file

ALPHA = 0.5  # weights span more than 100x over the counts of the oracle
TOLERANCE = 1e-5  # fp32, relative, over the whole update
_DEFAULTS = {
    "family": "llama", "ranks": 1, "accumulation": 1, "stage": 2, "precision": "fp32", "path": "head", "reduction": "weighted_mean",
    "alpha": ALPHA, "windows": 1.0, "mask_rank": None, "naive": False, "max_norm": 0.0, "learning_rate": 0.1, "checkpointing": False, "poison": False,
}  # fmt: skip


def case(**settings) -> dict:
    merged = _DEFAULTS | settings
    return merged | {"name": "-".join(f"{value}" for value in merged.values()).replace(".", "_")}


def _matrix(ranks, stages, families, accumulations=(1, 3), precisions=("fp32", "bf16")):
    layouts = itertools.product(ranks, accumulations, stages, families, precisions)
    for rank, accumulation, stage, family, precision in layouts:
        if not (stage == 0 and precision == "bf16"):  # refused by the configuration
            yield case(ranks=rank, accumulation=accumulation, stage=stage, family=family, precision=precision)


FAST = [
    *_matrix((1, 2), (0, 2, 3), ("llama", "t5"), accumulations=(3,)),
    # One micro-batch a step is the easier half; on one rank it is among the cases of alpha = 0.
    *_matrix((2,), (0, 2, 3), ("llama", "t5"), accumulations=(1,), precisions=("fp32",)),
    # Every family once, where most can go wrong: two ranks, accumulation, a sharded head.
    *[case(ranks=2, accumulation=3, stage=3, family=family) for family in ("llama-tied", "bart", "gemma2", "granite", "t5-untied")],
    *[case(ranks=2, accumulation=3, stage=stage, windows=1.75) for stage in (0, 2, 3)],  # a short last window
    *[case(ranks=2, accumulation=3, stage=stage, mask_rank=1, family=family) for stage in (0, 2, 3) for family in ("llama", "t5")],
    *[case(ranks=2, accumulation=3, stage=2, reduction=reduction, learning_rate=0.01) for reduction in ("token_mean", "sum")],
    *[case(ranks=2, accumulation=3, stage=stage, max_norm=0.3) for stage in (0, 2, 3)],  # clipped by the norm of the whole update
    *[case(ranks=2, accumulation=3, stage=stage, path="logits") for stage in (2, 3)],
    *[case(ranks=2, accumulation=3, stage=3, checkpointing=True, family=family) for family in ("llama", "t5")],
]  # fmt: skip
SLOW = [
    c
    for c in [
        *_matrix((1, 2, 4), (0, 1, 2, 3), (*models.FAMILIES, "t5-untied")),
        *[
            case(ranks=ranks, accumulation=accumulation, stage=stage, family=family, windows=1.75, mask_rank=mask)
            for ranks, accumulation, stage, family, mask in itertools.product(
                (2, 4), (1, 3), (0, 1, 2, 3), models.FAMILIES, (None, 1)
            )
        ],
    ]
    if c not in FAST
]


class Runs:
    """Runs all cases of a number of ranks in one process group."""

    def __init__(self, cases: list[dict], directory: Path):
        self.directory = directory
        by_ranks = {ranks: [c for c in cases if c["ranks"] == ranks] for ranks in {c["ranks"] for c in cases}}
        self.groups = {
            ranks: Group([Rank([of_ranks, directory])] * ranks, worker.run_all) for ranks, of_ranks in by_ranks.items()
        }

    def of(self, wanted: dict) -> tuple[dict[str, torch.Tensor], list[dict]]:
        group = self.groups[wanted["ranks"]]
        assert not any(group.wait(timeout=1800)), "\n".join(group.said)
        logged = json.loads((self.directory / f"{wanted['name']}.json").read_text())
        return load_file(self.directory / f"{wanted['name']}.safetensors"), logged


NEGATIVE_CONTROL = case(ranks=2, accumulation=3, naive=True)
POISONED = [
    case(ranks=2, stage=stage, poison=True, precision=precision)
    for stage, precision in [(0, "fp32"), (2, "fp32"), (3, "bf16")]
]
NO_DECAY = [
    case(ranks=ranks, stage=stage, family=family, alpha=0.0)
    for ranks, stage, family in [(1, 0, "llama"), (2, 3, "llama"), (1, 2, "t5"), (2, 2, "t5")]
]


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    return Runs([*FAST, NEGATIVE_CONTROL, *NO_DECAY, *POISONED], tmp_path_factory.mktemp("exactness"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return Runs(SLOW, tmp_path_factory.mktemp("exactness-slow"))


def _windows(wanted: dict):
    size = 2 * wanted["accumulation"] * wanted["ranks"]
    pairs = models.prompts_and_targets(round(wanted["windows"] * size), seed=11)
    for first in range(0, len(pairs), size):
        window = pairs[first : first + size]
        masked = {
            i
            for i in range(len(window))
            if wanted["mask_rank"] is not None and (i // 2) % wanted["ranks"] == wanted["mask_rank"]
        }
        yield window, masked


def _weight(wanted: dict) -> torch.Tensor:
    return oracle.weights(oracle.zipf_counts(models.VOCABULARY, models.TOKENS), wanted["alpha"])


def _reference(wanted: dict) -> dict:
    model = models.build(wanted["family"])
    if wanted["precision"] == "bf16":  # DeepSpeed's master weights start from the rounded ones
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
    windows, weight = list(_windows(wanted)), _weight(wanted)
    return oracle.train(model, windows, weight, wanted["reduction"], wanted["learning_rate"], wanted["max_norm"])


def _error(update: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """The norm of the difference over the norm of the reference, over the whole update."""
    assert set(reference) <= set(update)
    difference = sum((update[name].double() - reference[name].double()).square().sum() for name in reference)
    return float((difference / sum(value.double().square().sum() for value in reference.values())).sqrt())


def _check(runs: Runs, wanted: dict) -> None:
    update, logged = runs.of(wanted)
    reference = _reference(wanted)
    if wanted["precision"] == "fp32":
        assert _error(update, reference["update"]) <= TOLERANCE
    else:  # as close to the oracle in fp32 as plain PyTorch in bf16 comes, up to chance in the rounding
        ((pairs, _),) = _windows(wanted)
        model, weight = models.build(wanted["family"]), _weight(wanted)
        plain = oracle.bf16_update(model, pairs, weight, wanted["reduction"], wanted["learning_rate"])
        assert _error(update, reference["update"]) <= 1.5 * _error(plain, reference["update"])
    assert len(logged) == len(reference["steps"])
    tolerance = 1e-5 if wanted["precision"] == "fp32" else 2e-2
    for values, step in zip(logged, reference["steps"], strict=True):
        _check_metrics("train", values, step, wanted, tolerance)
    _check_metrics("validation", logged[-1], reference["final"], wanted, tolerance)
    if wanted["windows"] == 1.0:
        assert logged[0]["train/supervised_fraction"] == pytest.approx(
            _supervised_fraction(wanted, len(reference["steps"][0]["labels"]))
        )


def _supervised_fraction(wanted: dict, supervised: int) -> float:
    """Supervised tokens over all label positions, padding of each micro-batch of two included."""
    ((pairs, _),) = _windows(wanted)
    decoder_only = not wanted["family"].startswith(("t5", "bart"))
    lengths = [len(target) + (len(prompt) - 1 if decoder_only else 0) for prompt, target in pairs]
    return supervised / sum(2 * max(lengths[i : i + 2]) for i in range(0, len(lengths), 2))


def _check_metrics(prefix: str, values: dict, step: dict, wanted: dict, tolerance: float) -> None:
    """Every logged metric against its recomputation from the oracle's per-token values."""
    counts = oracle.zipf_counts(models.VOCABULARY, models.TOKENS)
    weight = oracle.weights(counts, wanted["alpha"]).double()
    losses, labels = torch.tensor(step["token_losses"]).double(), torch.tensor(step["labels"])
    w = weight[labels]
    tokens = len(labels)
    expected = {
        "loss": step["loss"],
        "cross_entropy": losses.mean().item(),
        "perplexity": losses.mean().exp().item(),
        "weight_mean": w.mean().item(),
        "effective_sample_fraction": (w.sum() ** 2 / (tokens * w.square().sum())).item(),
    }
    if prefix == "train":
        expected["grad_norm"] = step["grad_norm"]
    if wanted["precision"] == "fp32":
        expected["accuracy"] = sum(step["correct"]) / tokens
    mass, bucket_of = 0, {}
    for token in sorted(range(len(counts)), key=lambda t: (-counts[t].item(), t)):
        share = mass / counts.sum().item()
        bucket_of[token] = "head" if share < 0.5 else "middle" if share < 0.9 and counts[token] > 0 else "tail"
        mass += counts[token].item()
    for bucket in ("head", "middle", "tail"):
        inside = torch.tensor([bucket_of[label] == bucket for label in labels.tolist()])
        expected[f"token_share/{bucket}"] = inside.double().mean().item()
        if inside.any():
            expected[f"cross_entropy/{bucket}"] = losses[inside].mean().item()
        else:
            assert f"{prefix}/cross_entropy/{bucket}" not in values
    for name, value in expected.items():
        assert values[f"{prefix}/{name}"] == pytest.approx(value, rel=tolerance, abs=1e-9), name


@pytest.mark.parametrize("wanted", FAST, ids=lambda c: c["name"])
def test_update_and_metrics_equal_the_oracle(fast, wanted):
    _check(fast, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", SLOW, ids=lambda c: c["name"])
def test_full_matrix(slow, wanted):
    _check(slow, wanted)


def test_a_mean_of_means_fails_the_same_test(fast):
    """Without this the tests above could pass for a loss that nobody needs."""
    update, _ = fast.of(NEGATIVE_CONTROL)
    assert _error(update, _reference(NEGATIVE_CONTROL)["update"]) > 100 * TOLERANCE


def test_the_cases_are_hard_enough():
    weight = oracle.weights(oracle.zipf_counts(models.VOCABULARY, models.TOKENS), ALPHA)
    assert weight.max() / weight.min() >= 100
    sizes = [
        sum(len(target) for _, target in window[i : i + 2])
        for window, _ in _windows(case(ranks=2, accumulation=3))
        for i in range(0, len(window), 2)
    ]
    assert max(sizes) >= 5 * min(sizes)


@pytest.mark.parametrize("wanted", NO_DECAY, ids=lambda c: c["name"])
def test_alpha_zero_is_the_models_own_loss(fast, wanted):
    update, _ = fast.of(wanted)
    ((pairs, _),) = _windows(wanted)
    assert (
        _error(update, oracle.stock_loss_update(models.build(wanted["family"]), pairs, wanted["learning_rate"])) <= 1e-5
    )


@pytest.mark.parametrize("wanted", POISONED, ids=lambda c: c["name"])
def test_an_infinite_gradient_on_one_rank_stops_all_before_the_update(fast, wanted):
    """DeepSpeed would apply it at stage 0, and skip it silently at the others."""
    update, logged = fast.of(wanted)
    assert "the gradient is not finite; dataset rows" in logged[0]["refused"]
    assert all(not value.any() for value in update.values())
