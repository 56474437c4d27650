"""Tiny models of the families that the loss is tried on, and the rows they are trained on. Nothing of pdl is used here."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

VOCABULARY = 96  # rows of the model
TOKENS = 80  # ids that occur: the vocabulary is padded beyond them
PAD, EOS, START = 0, 1, 0

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64} | {
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64
}  # fmt: skip
FAMILIES = {
    "llama": ("llama", _LLAMA | {"tie_word_embeddings": False}),
    "llama-tied": ("llama", _LLAMA | {"tie_word_embeddings": True}),
    "t5": ("t5", _T5),
    "bart": ("bart", _BART),
    "gemma2": ("gemma2", _LLAMA | {"head_dim": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 20.0}),
    "granite": ("granite", _LLAMA | {"logits_scaling": 4.0, "attention_multiplier": 0.35, "embedding_multiplier": 6.0}),
}


def build(family: str) -> torch.nn.Module:
    """A model with dropout 0 and the same weights each time, scaled up so that logits are far from uniform and errors cannot hide."""
    architecture, settings = FAMILIES[family.removesuffix("-untied")]
    special = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None, "decoder_start_token_id": START}
    config = AutoConfig.for_model(architecture, vocab_size=VOCABULARY, **special, **settings)
    for name in config.to_dict():
        if "dropout" in name:
            setattr(config, name, 0.0)
    torch.manual_seed(7)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    if family.endswith("-untied"):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and architecture != "t5":  # whose own initial weights are large
                parameter.mul_(2.0)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(3))
    return model


def prompts_and_targets(count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Pairs of ids. Targets alternate between 1-2 and 14-20 tokens, EOS included, so micro-batches differ by more than 5x."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        zipf = 1.0 / torch.arange(1, TOKENS - 1).double()
        return (torch.multinomial(zipf, 20, replacement=True, generator=generator) + 2).tolist()[:length]

    pairs = []
    for number in range(count):
        long = (number // 2) % 2  # by pairs: whole micro-batches of two rows are short or long
        pairs.append((draw(3 + number % 5), [*draw(13 + number % 6 if long else number % 2), EOS]))
    return pairs
