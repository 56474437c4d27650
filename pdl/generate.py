"""Generation: batched, spread over ranks, the same texts on any number of them."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig, GenerationConfig

from pdl import distributed, watch
from pdl.data import Encoder, padded
from pdl.model import auto_class, decoder_start
from pdl.tilt import TiltLogits


def load_exported(directory: Path):
    """The model in `directory`, on this rank's device, ready to generate."""
    auto = auto_class(AutoConfig.from_pretrained(directory))
    return auto.from_pretrained(directory).to(distributed.device()).eval()


@dataclass
class Decoding:
    """How texts are written: greedy, by beams, or sampled from the nucleus `top_p` at a temperature, the same with every seed.

    tilt: how much of log `weights` (`[vocabulary]`) is added to the logits, see `TiltLogits`.
    """

    beams: int = 1
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    tilt: float = 0.0
    weights: torch.Tensor | None = None

    def describe(self) -> str:
        how = f"{self.beams} beams" if self.beams > 1 else "greedy"
        if self.sample:
            how = f"sampled, temperature {self.temperature:g}, top_p {self.top_p:g}, seed {self.seed}"
        return f"{how}, tilt {self.tilt:g}" if self.tilt else how

    def settings(self) -> dict:
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.sample else {}
        return {"do_sample": self.sample, "num_beams": self.beams, **sampling}

    def begin(self, batch: int) -> None:
        """Random numbers of a batch depend on its number, so that ranks may share the batches in any way."""
        if self.sample:
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{self.seed} {batch}".encode()).digest()[:6]))


def _settings(model, encoder: Encoder, decoding: Decoding) -> GenerationConfig:
    """A pretrained model's own settings (penalties, minimum lengths, sampling) stay out of it."""
    tokenizer, own = encoder.tokenizer, model.generation_config
    return GenerationConfig(
        max_new_tokens=encoder.max_target_tokens,
        **decoding.settings(),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=decoder_start(model) if encoder.is_encoder_decoder else None,
        forced_bos_token_id=own.forced_bos_token_id,  # the language that a multilingual model is to write
    )


@torch.inference_mode()
def generate(
    model, encoder: Encoder, sources: list[str], batch_size: int, decoding: Decoding | None = None
) -> list[str]:
    """The model's output for each source, greedy unless `decoding` says otherwise, at most `encoder.max_target_tokens` long. A collective.

    Batch b always holds the same sources and whole batches go to ranks, so padding, and with it rounding, does not
    depend on the layout. Decoder-only prompts are padded on the left.
    """
    tokenizer, device = encoder.tokenizer, distributed.device()
    side = "right" if encoder.is_encoder_decoder else "left"
    decoding = decoding or Decoding()
    model.generation_config = _settings(model, encoder, decoding)
    processors = [TiltLogits(decoding.weights, decoding.tilt)] if decoding.tilt else []
    # A decoder-only model with nothing to go on begins as a text does.
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    tokens = [row or [begin] for row in encoder.sources(sources)]
    mine: dict[int, str] = {}
    starts = range(0, len(tokens), batch_size)
    speaks = distributed.rank() == 0 and sys.stderr.isatty()
    for number, start in enumerate(tqdm(starts, "generating", disable=not speaks, leave=False)):
        if number % distributed.world_size() == 0:
            watch.agree(f"generating from example {start}")
        if number % distributed.world_size() != distributed.rank():
            continue
        batch = tokens[start : start + batch_size]
        input_ids = padded(batch, tokenizer.pad_token_id, side).to(device)
        attention_mask = padded([[1] * len(row) for row in batch], 0, side).to(device)
        decoding.begin(number)
        outputs = model.generate(input_ids=input_ids, attention_mask=attention_mask, logits_processor=processors)
        if not encoder.is_encoder_decoder:
            outputs = outputs[:, input_ids.shape[1] :]
        for offset, output in enumerate(tokenizer.batch_decode(outputs, skip_special_tokens=True)):
            mine[start + offset] = output
    whole = {index: text for part in distributed.gathered(mine) for index, text in part.items()}
    return [whole[index] for index in range(len(sources))]
