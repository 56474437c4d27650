"""The loss inside a model's head: what is accepted, what is refused. Exactness is in test_exactness.py."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "distributed"))

import models

from pdl import power_law_weights
from pdl.cross_entropy import Loss
from pdl.loss_head import LossHead, UnsupportedModel, check_parity, loss_of

LOSS = Loss(power_law_weights(torch.arange(models.VOCABULARY, 0, -1), 0.7))


def batch(model):
    inputs = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    labels = torch.tensor([[-100, 7, 8, 1], [-100, 11, 1, -100]])
    arguments = {"input_ids": inputs, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = torch.tensor([[0, 5, 7, 8], [0, 4, 11, 1]])
    return arguments, labels


@pytest.mark.parametrize("family", [*models.FAMILIES, "t5-untied"])
def test_parity_holds(family):
    model = models.build(family)
    head = LossHead.attach(model)
    inputs, labels = batch(model)
    random_state = torch.get_rng_state()
    check_parity(model, head, inputs, labels, LOSS, 1e-4)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", models.FAMILIES)
def test_without_labels_it_is_the_plain_head(family):
    plain, attached = models.build(family).eval(), models.build(family).eval()
    inputs, _ = batch(plain)
    names = list(attached.state_dict())
    LossHead.attach(attached)
    assert list(attached.state_dict()) == names
    assert torch.equal(attached(**inputs).logits, plain(**inputs).logits)


class ScaledAfterwards(nn.Module):
    """A model that does something to its logits that no config tells of."""

    def __init__(self):
        super().__init__()
        self.inner = models.build("llama")
        self.config = self.inner.config

    def get_output_embeddings(self):
        return self.inner.lm_head

    def forward(self, **inputs):
        outputs = self.inner(**inputs)
        outputs.logits = outputs.logits * 1.5
        return outputs


class CallsHeadTwice(ScaledAfterwards):
    def forward(self, **inputs):
        self.inner(**inputs)
        return self.inner(**inputs)


class NeverCallsHead(ScaledAfterwards):
    def forward(self, **inputs):
        outputs = self.inner.model(input_ids=inputs["input_ids"])
        outputs.logits = outputs.last_hidden_state @ self.inner.lm_head.weight.T
        return outputs


@pytest.mark.parametrize(
    ("unseen", "message"),
    [(ScaledAfterwards, "not the loss of its logits"), (CallsHeadTwice, "twice"), (NeverCallsHead, "did not call")],
)
def test_models_that_do_otherwise_are_refused_by_name(unseen, message):
    model = unseen()
    head = LossHead.attach(model)
    inputs, labels = batch(model)
    with pytest.raises(UnsupportedModel, match=message) as refused:
        check_parity(model, head, inputs, labels, LOSS, 1e-4)
    assert unseen.__name__ in str(refused.value) and "loss.path=logits" in str(refused.value)


def test_a_head_that_is_no_plain_linear_is_refused():
    model = models.build("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UnsupportedModel, match="plain nn"):
        LossHead.attach(model)


def test_labels_are_cleared_when_a_forward_fails():
    model = models.build("llama")
    head = LossHead.attach(model)
    inputs, labels = batch(model)
    with pytest.raises(IndexError):
        loss_of(model, head, inputs | {"input_ids": inputs["input_ids"] + 10_000}, labels, LOSS, 1.0)
    assert model(**inputs).logits.shape == (2, 4, models.VOCABULARY)


def test_a_loss_is_taken_once():
    model = models.build("llama")
    head = LossHead.attach(model)
    inputs, labels = batch(model)
    loss_of(model, head, inputs, labels, LOSS, 1.0)
    with pytest.raises(UnsupportedModel):
        head.take()
