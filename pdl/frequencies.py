"""Token frequencies: how often each token is a target of the loss.

PDL weights a token by its frequency, so the counts must be those of the labels that the loss sees: after truncation,
with EOS, without masked prompts, over every rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

_CHUNK = 1 << 20  # labels counted at a time: bounds the memory of a count whatever the size of the corpus


@dataclass
class TokenFrequencies:
    """Counts of target tokens.

    counts: int64 `[vocabulary]`, one entry per row of the model's output embedding. float32 would stop counting at 2^24.
    tokenizer_hash, corpus: what was counted with what; checked by whoever loads a saved table.
    """

    counts: torch.Tensor
    tokenizer_hash: str = ""
    corpus: str = ""

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @classmethod
    def from_labels(
        cls, labels: torch.Tensor | Iterable[torch.Tensor], vocab_size: int, *, ignore_index: int = -100, **described
    ) -> TokenFrequencies:
        """Count labels of any shape and integer dtype, given whole or in pieces (one pass, constant memory).

        Raises ValueError for a label that is neither `ignore_index` nor in [0, vocab_size).
        """
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for piece in [labels] if isinstance(labels, torch.Tensor) else labels:
            for chunk in piece.reshape(-1).split(_CHUNK):
                if chunk.numel() == 0:
                    continue
                # Shifted so that a negative ignore_index becomes a bin of its own: no mask, no second pass.
                shift = max(0, -ignore_index)
                if int(chunk.min()) < -shift or int(chunk.max()) >= vocab_size:
                    raise ValueError(f"labels must lie in [0, {vocab_size}) or be {ignore_index}")
                bins = torch.bincount(chunk.to(torch.int64) + shift, minlength=shift + vocab_size).cpu()
                if shift > 1 and int(bins[1:shift].sum()):
                    raise ValueError(f"labels hold negative values other than {ignore_index}")
                counts += bins[shift:]
        if ignore_index >= 0:
            counts[ignore_index] = 0
        return cls(counts, **described)

    def all_reduce(self) -> TokenFrequencies:
        """Sum the counts of all ranks, in place. Without a process group the counts are the sum already."""
        if dist.is_available() and dist.is_initialized():
            on_device = self.counts.to("cuda") if dist.get_backend() == "nccl" else self.counts
            dist.all_reduce(on_device)
            self.counts.copy_(on_device)
        return self

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the counts, the tokenizer's hash and the corpus' name."""
        from safetensors.torch import save_file

        save_file(
            {"counts": self.counts}, str(path), metadata={"tokenizer_hash": self.tokenizer_hash, "corpus": self.corpus}
        )

    @classmethod
    def load(cls, path: str | Path) -> TokenFrequencies:
        """Read what `save` wrote. Raises ValueError for a file that is no frequency table."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                described = file.metadata() or {}
                counts = file.get_tensor("counts")
        except SafetensorError as error:
            raise ValueError(f"{path} is not a frequency file: {error}") from error
        if counts.dtype != torch.int64 or counts.dim() != 1:
            raise ValueError(f"{path} is not a frequency file: counts are {counts.dtype} {list(counts.shape)}")
        return cls(counts, described.get("tokenizer_hash", ""), described.get("corpus", ""))
