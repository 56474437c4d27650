"""The weighted loss from hidden states against plain torch over full logits in float64: loss, sums and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pdl import linear_weighted_cross_entropy, power_law_weights, weighted_cross_entropy
from pdl.cross_entropy import Objective
from pdl.linear_cross_entropy import _linear_cross_entropy


def inputs(
    rows: int, width: int, vocabulary: int, seed: int, ignored: float = 0.3, dtype=torch.float64, **more
) -> dict:
    """Peaked logits, labels of which a share is ignored, weights that span three orders of magnitude, some zero token weights."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    head = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64) + head[labels]
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    return {
        "hidden": hidden.to(dtype).requires_grad_(),
        "head_weight": head.to(dtype).requires_grad_(),
        "labels": labels,
        "weights": 10 ** (3 * torch.rand(vocabulary, generator=generator)),
        "token_weights": torch.rand(rows, generator=generator).round(decimals=1),
        "denominator": torch.tensor(2.5 * rows + 1, dtype=torch.float64),
    } | more


def reference(hidden, head_weight, labels, weights, token_weights, denominator, bias=None, logit_scale=1.0, softcap=None,
              objective=Objective(), shift=None, adjusted=False, **_):  # noqa: B008  # fmt: skip
    """The same in float64, row by row and by the book: (weighted loss, cross-entropy of each labelled row, gradients)."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in (hidden, head_weight, bias) if leaf is not None]
    logits = logit_scale * F.linear(*leaves)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    total, losses = logits.sum() * 0, []
    for row, label, own in zip(logits, labels.tolist(), token_weights.double(), strict=True):
        if label == -100:
            continue
        losses.append(-row.log_softmax(0)[label])
        row = row + shift.double() if adjusted else row
        log_p = row.log_softmax(0)
        value = (1 - objective.label_smoothing) * -log_p[label] - objective.label_smoothing * log_p.mean()
        value = value + objective.z_loss * row.logsumexp(0) ** 2
        p = log_p[label].exp().detach()
        value = value * p**objective.certain * (1 - p) ** objective.uncertain
        total = total + weights[label].double() * own * value / denominator
    gradients = torch.autograd.grad(total, leaves)
    return total.detach(), torch.stack(losses).detach() if losses else logits.new_zeros(0), gradients


def over_logits(hidden, head_weight, bias=None, logit_scale=1.0, softcap=None, **given):
    """The sums that autograd has full logits for, in the type of the inputs."""
    logits = logit_scale * F.linear(hidden, head_weight, bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return weighted_cross_entropy(logits, **given)


def eager(**given) -> tuple[torch.Tensor, ...]:
    leaves = {
        name: given[name].detach().requires_grad_() for name in ("hidden", "head_weight", "bias") if name in given
    }
    return torch.autograd.grad(over_logits(**given | leaves).weighted, list(leaves.values()))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm().clamp_min(1e-30))


OBJECTIVES = [Objective(), Objective(label_smoothing=0.1), Objective(z_loss=1e-2), Objective(uncertain=2.0),
              Objective(certain=1.0), Objective(0.2, 1e-3, 0.5, 1.5)]  # fmt: skip
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(0, 17), width=st.integers(1, 9), vocabulary=st.integers(2, 40), ignored=st.floats(0, 1), seed=st.integers(0, 10**6),
    with_bias=st.booleans(), logit_scale=st.sampled_from([1.0, 0.25, 4.0]), softcap=st.sampled_from([None, 3.0]), transposed=st.booleans(),
    chunk_rows=st.sampled_from([None, 1, 2, 3, 5, 100]), objective=st.sampled_from(OBJECTIVES), shifted=st.sampled_from([None, "measured", "minimized"]), dtype=st.sampled_from(list(ROUNDING)),
)  # fmt: skip
def test_exactness(
    rows,
    width,
    vocabulary,
    ignored,
    seed,
    with_bias,
    logit_scale,
    softcap,
    transposed,
    chunk_rows,
    objective,
    shifted,
    dtype,
):
    given = inputs(rows, width, vocabulary, seed, ignored, dtype)
    given |= {"logit_scale": logit_scale, "softcap": softcap, "objective": objective}
    if shifted:
        given |= {"shift": torch.linspace(-3, 2, vocabulary), "adjusted": shifted == "minimized"}
    if with_bias:
        given["bias"] = torch.linspace(-1, 1, vocabulary, dtype=dtype, requires_grad=True)
    if transposed:  # as where the head is a view of something else
        given["head_weight"] = given["head_weight"].detach().t().contiguous().t().requires_grad_()
        assert width == 1 or vocabulary == 1 or not given["head_weight"].is_contiguous()
    sums = linear_weighted_cross_entropy(**given, chunk_rows=chunk_rows)
    sums.weighted.backward()
    loss, losses, gradients = reference(**given)
    # Of sums of so many terms of this size, which may cancel; in narrow types also what the rounding of logits leaves in torch's own.
    factors = given["weights"][given["labels"].clamp_min(0)] * given["token_weights"] / given["denominator"]
    size = float(factors.sum()) * (1 + (objective.z_loss > 0)) * logit_scale
    allowed = (
        ROUNDING[dtype]
        * size
        * max(
            1.0,
            *(
                float(given[name].detach().abs().amax()) if given[name].numel() else 0.0
                for name in ("hidden", "head_weight")
            ),
        )
    )
    plain = eager(**given)
    assert sums.tokens == len(losses) and sums.token_losses.shape == sums.token_correct.shape == losses.shape
    if len(losses) == 0:
        assert sums.weighted == 0
    found = [given[name].grad for name in ("hidden", "head_weight", "bias") if name in given]
    for gradient, expected, of_torch in zip(found, gradients, plain, strict=True):
        assert gradient.dtype == dtype
        error = (gradient - expected).norm()
        assert error <= allowed + ROUNDING[dtype] * expected.norm() + 2 * (of_torch - expected).norm()
    if dtype in (torch.float64, torch.float32):  # else the loss is that of rounded logits
        assert (sums.weighted.detach() - loss).abs() <= max(ROUNDING[dtype], 1e-14) * (
            float(loss.abs()) + float(factors.sum())
        )
        torch.testing.assert_close(sums.token_losses.double(), losses, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(sums.cross_entropy, losses.sum(), rtol=2e-6, atol=2e-6)
        plain_sums = over_logits(**given)
        for name in ("shifted_losses", "token_values", "weight", "token_losses"):
            torch.testing.assert_close(getattr(sums, name), getattr(plain_sums, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(
        given["hidden"].grad[given["labels"] == -100], torch.zeros_like(given["hidden"].grad[given["labels"] == -100])
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chunk_rows", [None, 64])
def test_no_less_exact_than_the_logits_path_in_the_same_type(dtype, chunk_rows):
    given = inputs(400, 64, 1000, seed=1, dtype=dtype)
    given["weights"] = power_law_weights((10**6 / torch.arange(1, 1001)).long(), 0.5)
    loss, _, expected = reference(**given)
    errors = []
    for path in ("head", "logits"):
        for name in ("hidden", "head_weight"):
            given[name].grad = None
        if path == "head":
            sums = linear_weighted_cross_entropy(**given, chunk_rows=chunk_rows)
        else:
            others = {name: value for name, value in given.items() if name not in ("hidden", "head_weight")}
            sums = weighted_cross_entropy(F.linear(given["hidden"], given["head_weight"]), **others)
        sums.weighted.backward()
        errors.append(
            [
                relative(sums.weighted, loss),
                *(
                    relative(given[name].grad, gradient)
                    for name, gradient in zip(("hidden", "head_weight"), expected, strict=True)
                ),
            ]
        )
    for here, there in zip(*errors, strict=True):
        assert here <= 1.1 * there + 1e-6, errors


def test_gradcheck():
    given = inputs(7, 5, 11, seed=3, softcap=2.0, logit_scale=0.5, objective=Objective(0.1, 1e-2))
    leaves = given.pop("hidden"), given.pop("head_weight"), torch.randn(11, dtype=torch.float64, requires_grad=True)

    def loss(hidden, head_weight, bias):
        return linear_weighted_cross_entropy(hidden, head_weight, bias=bias, chunk_rows=2, **given).weighted

    assert torch.autograd.gradcheck(loss, leaves)


def test_the_operator_keeps_torchs_rules():
    """Schema, autograd registration, and under torch.compile's tracing."""
    given = inputs(9, 4, 13, seed=5, ignored=0)
    factors = torch.rand(9, dtype=torch.float64)
    arguments = (
        given["hidden"],
        given["head_weight"],
        None,
        None,
        torch.arange(9),
        given["labels"],
        factors,
        7,
        1.0,
        0.0,
        [0.0] * 4,
        False,
        3,
    )
    torch.library.opcheck(_linear_cross_entropy, (*arguments, [True, True, False]))
    torch.library.opcheck(_linear_cross_entropy, (*arguments, [False, True, False]))


def test_compiled_it_is_one_node_and_the_same():
    given = inputs(12, 6, 20, seed=2)
    targets = []

    def look(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    given["hidden"].grad = None
    expected = linear_weighted_cross_entropy(**given)
    expected.weighted.backward()
    gradient, given["hidden"].grad = given["hidden"].grad, None
    found = torch.compile(lambda: linear_weighted_cross_entropy(**given).weighted, backend=look)()
    found.backward()
    assert sum("pdl.linear_cross_entropy" in target for target in targets) == 1
    assert not any("mm" in target for target in targets)
    assert torch.equal(found, expected.weighted) and torch.equal(given["hidden"].grad, gradient)


def test_the_order_of_rows_changes_nothing_but_rounding():
    given = inputs(50, 8, 30, seed=4, dtype=torch.float32)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    turned = given | {name: given[name].detach()[order] for name in ("hidden", "labels", "token_weights")}
    turned["hidden"].requires_grad_()
    sums, other = (
        linear_weighted_cross_entropy(**given, chunk_rows=7),
        linear_weighted_cross_entropy(**turned, chunk_rows=7),
    )
    torch.testing.assert_close(other.weighted, sums.weighted)
    (gradient,) = torch.autograd.grad(sums.weighted, given["hidden"])
    (turned_gradient,) = torch.autograd.grad(other.weighted, turned["hidden"])
    torch.testing.assert_close(turned_gradient, gradient[order])
    labelled = (given["labels"] != -100).cumsum(0) - 1
    kept = [int(labelled[row]) for row in order.tolist() if given["labels"][row] != -100]
    torch.testing.assert_close(other.token_losses, sums.token_losses[kept])  # in the order of the labels
    assert torch.equal(other.token_correct, sums.token_correct[kept])


def test_what_comes_in_from_above_is_a_factor():
    given = inputs(20, 6, 15, seed=6)
    once = torch.autograd.grad(linear_weighted_cross_entropy(**given).weighted, [given["hidden"], given["head_weight"]])
    thrice = torch.autograd.grad(
        3 * linear_weighted_cross_entropy(**given).weighted, [given["hidden"], given["head_weight"]]
    )
    for one, three in zip(once, thrice, strict=True):
        torch.testing.assert_close(three, 3 * one)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator makes, and which operators run."""

    def __init__(self):
        super().__init__()
        self.elements, self.names = 0, []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        for each in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        self.names.append(function.__name__)
        return made


def operator_arguments(given: dict, graded: int, chunk_rows: int, wanted: list[bool]) -> tuple:
    rows = torch.arange(len(given["labels"]))
    return (given["hidden"].detach(), given["head_weight"].detach(), None, None, rows, given["labels"], torch.ones(len(rows), dtype=torch.float64),
            graded, 1.0, 0.0, [0.0] * 4, False, chunk_rows, wanted)  # fmt: skip


def test_the_logits_are_never_there_all_at_once():
    given = inputs(300, 4, 500, seed=7, ignored=0, dtype=torch.float32)
    with Largest() as made:
        _linear_cross_entropy._init_fn(*operator_arguments(given, 300, 20, [True, True, False]))
    assert made.elements == 20 * 512  # rows begin at multiples of 16


def test_no_work_for_gradients_that_nobody_wants():
    given = inputs(30, 4, 50, seed=8, ignored=0, dtype=torch.float32)
    products = {}
    for name, graded, wanted in (("all", 30, [True, True, False]), ("a frozen head", 30, [True, False, False]),
                                 ("none", 0, [False, False, False]), ("half of the rows", 10, [True, True, False])):  # fmt: skip
        with Largest() as made:
            _linear_cross_entropy._init_fn(*operator_arguments(given, graded, 10, wanted))
        products[name] = sum("mm" in operator for operator in made.names)
    assert products == {"all": 9, "a frozen head": 6, "none": 3, "half of the rows": 5}
    with torch.no_grad():
        assert not linear_weighted_cross_entropy(**given).weighted.requires_grad
    given["head_weight"].requires_grad_(False)
    linear_weighted_cross_entropy(**given).weighted.backward()
    assert given["head_weight"].grad is None and given["hidden"].grad.abs().sum() > 0


def test_rows_of_weight_zero_count_and_stay_in_place():
    given = inputs(40, 6, 20, seed=9, dtype=torch.float32)
    given["token_weights"] = (torch.arange(40) % 3).float()
    sums = linear_weighted_cross_entropy(**given, chunk_rows=4)
    logits = (given["hidden"] @ given["head_weight"].t()).detach()
    labelled = given["labels"] != -100
    losses = F.cross_entropy(logits[labelled], given["labels"][labelled], reduction="none")
    torch.testing.assert_close(sums.token_losses, losses)
    assert torch.equal(sums.token_correct, logits[labelled].argmax(1) == given["labels"][labelled])
    sums.weighted.backward()
    weightless = given["token_weights"] == 0
    assert not given["hidden"].grad[weightless].any()


def test_autocast():
    given = inputs(30, 8, 40, seed=10, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        sums = linear_weighted_cross_entropy(**given)
    sums.weighted.backward()
    rounded = given | {name: given[name].detach().bfloat16().requires_grad_() for name in ("hidden", "head_weight")}
    expected = linear_weighted_cross_entropy(**rounded)
    expected.weighted.backward()
    assert torch.equal(sums.weighted, expected.weighted)
    assert given["head_weight"].grad.dtype == torch.float32
    assert torch.equal(given["head_weight"].grad, rounded["head_weight"].grad.float())
    assert torch.equal(given["hidden"].grad, rounded["hidden"].grad.float())


def test_types_that_differ_are_refused():
    given = inputs(5, 4, 6, seed=11, dtype=torch.float32)
    given["hidden"] = given["hidden"].detach().bfloat16()
    with pytest.raises(ValueError, match="cast one of them"):
        linear_weighted_cross_entropy(**given)


@pytest.mark.parametrize("factor", [1, 2])
def test_backward_runs_as_often_as_one_likes(factor):
    given = inputs(5, 4, 6, seed=12)
    loss = factor * linear_weighted_cross_entropy(**given).weighted
    (once,) = torch.autograd.grad(loss, given["head_weight"], retain_graph=True)
    once = once.clone()
    for _ in range(3):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(given["head_weight"].grad, 3 * once)
    given["head_weight"].grad.mul_(0)  # what was handed out is the caller's
    loss.backward()
    torch.testing.assert_close(given["head_weight"].grad, once)


def test_the_gradient_of_the_head_is_there_once():
    """What the operator made becomes `.grad`; a copy of it would be the largest tensor but the scratch."""
    given = inputs(64, 16, 4096, seed=17, dtype=torch.float32, ignored=0)
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_weighted_cross_entropy(**given, chunk_rows=8).weighted.backward()
    size = given["head_weight"].nbytes
    made = [event.self_cpu_memory_usage for event in profile.events() if event.name == "aten::empty"]
    assert sum(bytes >= size for bytes in made) == 1


def test_only_the_weighted_sum_has_a_gradient_and_it_has_no_second_one():
    given = inputs(5, 4, 6, seed=13, shift=torch.linspace(-1, 1, 6))
    sums = linear_weighted_cross_entropy(**given)
    differentiable = [
        name for name, value in vars(sums).items() if isinstance(value, torch.Tensor) and value.requires_grad
    ]
    assert differentiable == ["weighted"]
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(sums.weighted, given["hidden"], create_graph=True)


def test_small_gradients_survive_float16_as_they_do_over_logits():
    """The loss is scaled up, and the gradients with it; here they are made before the scale is known."""
    given = inputs(64, 32, 1000, seed=14, dtype=torch.float16, denominator=torch.tensor(1e8))
    *_, expected = reference(**given)
    factor = 2.0**16
    errors = []
    for sums in (linear_weighted_cross_entropy(**given), over_logits(**given)):
        gradients = torch.autograd.grad(factor * sums.weighted, [given["hidden"], given["head_weight"]])
        errors.append(
            [
                relative(found / factor, right)
                for found, right in zip(map(torch.Tensor.double, gradients), expected, strict=True)
            ]
        )
    for here, there in zip(*errors, strict=True):
        assert here <= 1.1 * there + 1e-3, errors


def test_what_cannot_be_is_refused():
    given = inputs(5, 4, 6, seed=15)
    with pytest.raises(ValueError, match="chunk_rows must be at least 1, not 0"):
        linear_weighted_cross_entropy(**given, chunk_rows=0)
    with pytest.raises((IndexError, RuntimeError)):
        linear_weighted_cross_entropy(**given | {"labels": torch.tensor([0, 1, 2, 3, 6])})


def test_autocast_leaves_float64_alone():
    given = inputs(9, 4, 6, seed=16)
    with torch.autocast("cpu", torch.bfloat16):
        sums = linear_weighted_cross_entropy(**given)
    assert torch.equal(sums.weighted, linear_weighted_cross_entropy(**given).weighted)


# --- on a GPU ---


def on_gpu(given: dict) -> dict:
    moved = {name: value.detach().cuda() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    return moved | {name: moved[name].requires_grad_() for name in ("hidden", "head_weight", "bias") if name in moved}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_rows", [None, 128])
@pytest.mark.parametrize(
    "more", [{}, {"softcap": 20.0, "logit_scale": 0.5, "objective": OBJECTIVES[-1]}, {"shift": True, "adjusted": True}]
)
def test_on_a_gpu_no_less_exact_than_over_logits(monkeypatch, dtype, chunk_rows, more):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    given = inputs(700, 64, 1003, seed=1, dtype=dtype) | more
    if "shift" in more:
        given["shift"] = torch.linspace(-2, 2, 1003)
    given["bias"] = torch.linspace(-1, 1, 1003, dtype=dtype).requires_grad_()
    loss, losses, expected = reference(**given)
    given, errors = on_gpu(given), []
    for sums in (linear_weighted_cross_entropy(**given, chunk_rows=chunk_rows), over_logits(**given)):
        gradients = torch.autograd.grad(sums.weighted, [given["hidden"], given["head_weight"], given["bias"]])
        errors.append(
            [
                relative(found.cpu(), right)
                for found, right in zip(
                    (sums.weighted, sums.token_losses, *gradients), (loss, losses, *expected), strict=True
                )
            ]
        )
    for here, there in zip(*errors, strict=True):
        assert here <= 1.2 * there + 2e-6, errors


@pytest.mark.gpu
def test_a_gpu_is_waited_for_once():
    given = on_gpu(inputs(300, 64, 1000, seed=2, dtype=torch.bfloat16))
    linear_weighted_cross_entropy(**given).weighted.backward()  # compiles
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as waits:
            linear_weighted_cross_entropy(**given).weighted.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1, [str(wait.message) for wait in waits]
