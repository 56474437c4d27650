"""The loss inside a model's own output head, so that it is ZeRO-safe and the full logits are never made.

A parameter that is read inside its own module's forward is gathered by ZeRO-3 like any other. So the model's output
projection computes the loss itself: given labels, `forward(hidden)` returns a `[1, 1, 1]` tensor made from the loss,
which the model passes on as its `logits`; without labels it is the plain projection.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from pdl.cross_entropy import Loss, LossSums, weighted_cross_entropy
from pdl.linear_cross_entropy import linear_weighted_cross_entropy


class UnsupportedModel(Exception):
    """The loss cannot be computed in this model's head; the message says why and what to do."""


@dataclass
class _Target:
    labels: torch.Tensor
    loss: Loss
    denominator: torch.Tensor | float
    token_weights: torch.Tensor | None
    untilted: bool

    def arguments(self) -> dict:
        """Of the functions that compute the loss, beyond what they compute it from."""
        shifted = self.untilted or self.loss.adjusted
        return {
            "labels": self.labels.reshape(-1),
            "weights": self.loss.weights,
            "token_weights": None if self.token_weights is None else self.token_weights.reshape(-1),
            "denominator": self.denominator,
            "objective": self.loss.objective,
            "shift": self.loss.untilt if shifted else None,
            "adjusted": self.loss.adjusted,
        }


class LossHead(nn.Linear):
    """A model's output projection that can also compute the loss. Made from the model's own by `LossHead.attach`."""

    _target: _Target | None = None
    _sums: LossSums | None = None
    _input: torch.Tensor | None = None

    @classmethod
    def attach(cls, model: nn.Module) -> LossHead:
        """Turn the output projection of a Hugging Face model into a LossHead, in place (parameters, names, tying stay).

        Call before `deepspeed.initialize`. Raises UnsupportedModel for a head that is not a plain `nn.Linear`.
        """
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise UnsupportedModel(
                f"the output head of {type(model).__name__} is {type(head).__name__}, not a plain nn.Linear; "
                "loss.path=logits trains it over full logits"
            )
        head.__class__ = cls
        head._logit_scale, head._softcap = _after_head(model)
        head._owner = [model]  # in a list, so that the model does not become a submodule of its own head
        head.register_forward_pre_hook(cls._remember_input)
        return head

    @contextmanager
    def supervise(self, target: _Target):
        """For one forward of the model: compute the loss against `target.labels` `[batch, sequence]`, aligned with the logits."""
        self._target = target
        try:
            yield
        finally:
            self._target = None

    def take(self) -> LossSums:
        """The loss of the last supervised forward, once."""
        sums, self._sums = self._sums, None
        if sums is None:
            raise UnsupportedModel(
                f"{type(self._owner[0]).__name__} did not call its output head; loss.path=logits trains it over full logits"
            )
        return sums

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._target is None:
            return super().forward(hidden)
        if self._sums is not None:
            raise UnsupportedModel(
                f"{type(self._owner[0]).__name__} called its output head twice in one forward; "
                "loss.path=logits trains it over full logits"
            )
        self._sums = linear_weighted_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            self.weight,
            **self._target.arguments(),
            bias=self._bias(),
            logit_scale=self._logit_scale,
            softcap=self._softcap,
        )
        return self._sums.weighted.reshape(1, 1, 1)

    def _bias(self) -> torch.Tensor | None:
        """The head's own bias plus the one that BART and its kin add to the logits after the head."""
        added = getattr(self._owner[0], "final_logits_bias", None)
        if added is None:
            return self.bias
        return added.reshape(-1) if self.bias is None else self.bias + added.reshape(-1)

    def _remember_input(self, args: tuple) -> None:
        # For the parity check only. A pre-hook registered before DeepSpeed's sees the tensor that DeepSpeed's hooks
        # wrap, so a gradient taken with respect to it passes through them and gathered parameters are released.
        if self._input is not None:
            self._input = args[0]


def _after_head(model: nn.Module) -> tuple[float, float | None]:
    """What the model does to the logits after its head: (factor, softcap), read from its config."""
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logits_scaling", None) is not None:  # Granite divides
        scale /= config.logits_scaling
    if getattr(config, "logit_scale", None) is not None:  # Cohere multiplies
        scale *= config.logit_scale
    return scale, getattr(config, "final_logit_softcapping", None)


def loss_of(
    forward,
    head: LossHead | None,
    inputs: dict,
    labels: torch.Tensor,
    loss: Loss,
    denominator: torch.Tensor | float,
    token_weights: torch.Tensor | None = None,
    untilted: bool = False,
) -> tuple[torch.Tensor, LossSums]:
    """One forward with its loss: `(loss, sums)`, where `loss` is the scalar to call backward on.

    forward: the model, or the DeepSpeed engine around it. inputs: its keyword arguments, without labels.
    head: the model's LossHead, or None to compute over the model's full logits (`loss.path=logits`).
    token_weights: like labels, a factor of each position's weight. untilted: fill `LossSums.shifted_losses` from untilted logits,
    also where they are not what is minimized.
    """
    target = _Target(labels, loss, denominator, token_weights, untilted)
    if head is None:
        logits = forward(**inputs, use_cache=False).logits
        sums = weighted_cross_entropy(logits.flatten(0, 1), **target.arguments())
        return sums.weighted, sums
    with head.supervise(target):
        logits = forward(**inputs, use_cache=False).logits
    sums = head.take()
    # The second term is 0, but it keeps what the model did after its head, and ZeRO-3's hooks on it, in the graph.
    return sums.weighted + 0 * logits.sum(), sums


def check_parity(
    model: nn.Module, head: LossHead, inputs: dict, labels: torch.Tensor, loss: Loss, tolerance: float
) -> None:
    """Refuse a model whose head does not give the loss of its logits.

    model: the engine's module, with ZeRO's hooks on it. (The engine's own forward would start its gradient reduction.)
    Compares, on one small batch in eval mode, the loss and its gradient with respect to the head's input, once computed
    in the head and once from the model's full logits. Leaves no gradient and no change of random state behind.
    Raises UnsupportedModel naming the model class.
    """

    def loss_and_gradient(path_head):
        head._input = torch.empty(0)  # asks the pre-hook to remember
        value, _ = loss_of(model, path_head, inputs, labels, loss, denominator)
        hidden, head._input = head._input, None
        (gradient,) = torch.autograd.grad(value, hidden)
        return value.detach().double(), gradient.double()

    denominator = loss.weights[labels[labels != -100]].double().sum()
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[labels.device] if labels.is_cuda else []):
        try:
            found, gradient = loss_and_gradient(head)
        except (IndexError, RuntimeError, ValueError) as error:
            raise UnsupportedModel(
                f"{type(head._owner[0]).__name__} does more with its logits than pass them on ({error}); "
                "loss.path=logits trains it over full logits"
            ) from error
        reference, reference_gradient = loss_and_gradient(None)
    model.train(was_training)
    loss_error = ((found - reference).abs() / reference.abs()).item()
    gradient_error = ((gradient - reference_gradient).norm() / reference_gradient.norm()).item()
    if not (loss_error <= tolerance and gradient_error <= tolerance):
        raise UnsupportedModel(
            f"the loss in the head of {type(head._owner[0]).__name__} is not the loss of its logits: relative error "
            f"{loss_error:.1e} of the loss and {gradient_error:.1e} of the gradient, {tolerance:.0e} allowed; "
            "loss.path=logits trains it over full logits"
        )
