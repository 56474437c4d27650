"""The Triton kernel against the torch pass that it stands for; without a GPU in Triton's interpreter."""

import pytest
import torch

from pdl.cross_entropy import Objective
from pdl.linear_cross_entropy import row_pass

pytest.importorskip("triton", reason="needs Triton: pip install triton")
from pdl import row_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OBJECTIVES = [
    Objective(),
    Objective(label_smoothing=0.1),
    Objective(z_loss=1e-2),
    Objective(certain=1.0),
    Objective(0.2, 1e-3, 0.5, 1.5),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("logit_scale", "softcap", "biased", "shifted", "adjusted"),
    [(1.0, 0.0, False, False, False), (0.5, 3.0, True, True, True), (2.0, 0.0, True, True, False)],
)
def test_the_same_as_in_torch(monkeypatch, dtype, objective, logit_scale, softcap, biased, shifted, adjusted):
    monkeypatch.setattr(row_kernel, "_BLOCK", 16)  # several, of which the last is not full
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(3, 45, generator=generator)).to(DEVICE, dtype)
    labels = torch.randint(0, 45, (3,), generator=generator).to(DEVICE)
    factors = torch.rand(3, generator=generator, dtype=torch.float64).to(DEVICE)
    bias = torch.linspace(-1, 1, 45, device=DEVICE, dtype=dtype) if biased else None
    shift = torch.linspace(2, -2, 45, device=DEVICE) if shifted else None
    for with_gradient in (True, False):
        results = []
        for work in (row_pass, row_kernel.row_pass):
            into = logits.clone()
            values, losses = torch.zeros(3, device=DEVICE), torch.zeros(3, device=DEVICE)
            correct = torch.zeros(3, dtype=torch.bool, device=DEVICE)
            of_shifted = torch.zeros(3, device=DEVICE) if shifted else None
            work(
                into,
                bias,
                shift,
                labels,
                factors,
                values,
                losses,
                of_shifted,
                correct,
                objective,
                adjusted,
                logit_scale,
                softcap,
                with_gradient,
            )
            results.append(
                (
                    values,
                    losses,
                    *([of_shifted] if shifted else []),
                    correct.float(),
                    *([into.float()] if with_gradient else []),
                )
            )
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=2e-6)


@pytest.mark.parametrize("stride", [45, 48, 64])
def test_rows_that_stand_apart_and_logits_that_are_impossible(monkeypatch, stride):
    """A whole block of them, and a negative scale; what stands behind a row is not part of it."""
    monkeypatch.setattr(row_kernel, "_BLOCK", 16)
    generator = torch.Generator().manual_seed(1)
    storage = torch.full((3, stride), 1e4, device=DEVICE)
    storage[:, :45] = torch.randn(3, 45, generator=generator).to(DEVICE)
    bias = torch.zeros(45, device=DEVICE)
    bias[:20] = float("inf")  # times the scale: impossible
    labels, factors = torch.tensor([44, 20, 30], device=DEVICE), torch.ones(3, dtype=torch.float64, device=DEVICE)
    results = []
    for work in (row_pass, row_kernel.row_pass):
        into = storage.clone()[:, :45]
        values, losses = torch.zeros(3, device=DEVICE), torch.zeros(3, device=DEVICE)
        correct = torch.zeros(3, dtype=torch.bool, device=DEVICE)
        work(into, bias, None, labels, factors, values, losses, None, correct, Objective(), False, -0.5, 0.0, True)
        results.append((values, losses, correct.float(), into))
    assert results[0][1].isfinite().all()
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31():
    """Of 17,000 rows of 128,256 logits the last ones begin beyond 2^31."""
    logits = torch.zeros(17_000, 128_256, device="cuda", dtype=torch.bfloat16)
    logits[:, 7] = 10.0
    labels = torch.full((17_000,), 7, device="cuda")
    factors = torch.ones(17_000, device="cuda", dtype=torch.float64)
    values, losses = torch.zeros(17_000, device="cuda"), torch.zeros(17_000, device="cuda")
    correct = torch.zeros(17_000, dtype=torch.bool, device="cuda")
    row_kernel.row_pass(
        logits, None, None, labels, factors, values, losses, None, correct, Objective(), False, 1.0, 0.0, True
    )
    assert correct.all() and (losses == losses[0]).all() and losses[0] > 0
    assert torch.equal(logits[-1], logits[0]) and float(logits[0, 7]) < 0
