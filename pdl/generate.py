"""Generation: greedy, batched, spread over ranks, the same texts on any number of them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig

from pdl import distributed, watch
from pdl.data import Encoder, padded
from pdl.model import auto_class, decoder_start


def load_exported(directory: Path):
    """The model in `directory`, on this rank's device, ready to generate."""
    auto = auto_class(AutoConfig.from_pretrained(directory))
    return auto.from_pretrained(directory).to(distributed.device()).eval()


def _greedy(model, encoder: Encoder) -> GenerationConfig:
    """Plain greedy decoding. A pretrained model's own settings (penalties, minimum lengths, sampling) stay out of it."""
    tokenizer, own = encoder.tokenizer, model.generation_config
    return GenerationConfig(
        max_new_tokens=encoder.max_target_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=decoder_start(model) if encoder.is_encoder_decoder else None,
        forced_bos_token_id=own.forced_bos_token_id,  # the language that a multilingual model is to write
    )


@torch.inference_mode()
def generate(model, encoder: Encoder, sources: list[str], batch_size: int) -> list[str]:
    """The model's output for each source, greedy, at most `encoder.max_target_tokens` long. A collective.

    Batch b always holds the same sources and whole batches go to ranks, so padding, and with it rounding, does not
    depend on the layout. Decoder-only prompts are padded on the left.
    """
    tokenizer, device = encoder.tokenizer, distributed.device()
    side = "right" if encoder.is_encoder_decoder else "left"
    model.generation_config = _greedy(model, encoder)
    # A decoder-only model with nothing to go on begins as a text does.
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    tokens = [row or [begin] for row in encoder.sources(sources)]
    mine: dict[int, str] = {}
    for number, start in enumerate(range(0, len(tokens), batch_size)):
        if number % distributed.world_size() == 0:
            watch.agree(f"generating from example {start}")
        if number % distributed.world_size() != distributed.rank():
            continue
        batch = tokens[start : start + batch_size]
        input_ids = padded(batch, tokenizer.pad_token_id, side).to(device)
        attention_mask = padded([[1] * len(row) for row in batch], 0, side).to(device)
        outputs = model.generate(input_ids=input_ids, attention_mask=attention_mask)
        if not encoder.is_encoder_decoder:
            outputs = outputs[:, input_ids.shape[1] :]
        for offset, output in enumerate(tokenizer.batch_decode(outputs, skip_special_tokens=True)):
            mine[start + offset] = output
    whole = {index: text for part in distributed.gathered(mine) for index, text in part.items()}
    return [whole[index] for index in range(len(sources))]
