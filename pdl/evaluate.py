"""What a finished run's model knows and how it writes: cross-entropy by frequency, calibration, generated texts and their scores.

Beside the model stand systems that know nothing of language; who cannot beat them has learned nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pdl import distributed, scores, watch
from pdl.config import Config, UserError, load_config
from pdl.data import IGNORE, Collator, Encoder, TokenRows, load_frequencies, validation_batches
from pdl.distributed import say
from pdl.frequencies import TokenFrequencies
from pdl.generate import Decoding, generate, load_exported
from pdl.loss_head import loss_of
from pdl.metrics import BUCKETS, Meter, frequency_buckets
from pdl.model import decoder_start
from pdl.prepare import loss_of_run, tables_of
from pdl.records import Example, examples, load_recipe
from pdl.storage import write_json, write_whole
from pdl.tokenizer import tokenizer_hash
from pdl.weights import power_law_weights

_BINS = 15  # of confidence, for calibration
_SAMPLE = 2000  # n-grams over which distinct-n is taken: it falls with their number
_SELF_BLEU = 100  # predictions that are held against each other


class Evaluation:
    """A finished run, opened. A collective, as are its methods; each rank takes whole batches.

    Raises UserError for a directory that holds no finished run, or a split that the configuration does not name.
    """

    def __init__(self, directory: Path, split: str, number: int | None):
        from transformers import AutoTokenizer

        def opened() -> tuple[Config, Any, torch.nn.Module, TokenFrequencies, str, list[Example]]:
            missing = [
                name for name in ("config.yaml", "model", "frequencies.safetensors") if not (directory / name).exists()
            ]
            if missing:
                raise UserError(f"{directory} holds no finished run: {', '.join(missing)} is not there")
            config = load_config(directory / "config.yaml")
            if getattr(config.data, split, None) is None:
                raise UserError(f"{directory / 'config.yaml'} names no data.{split}")
            tokenizer = AutoTokenizer.from_pretrained(directory / "model")
            model = load_exported(directory / "model")
            rows, hashed = model.config.get_text_config().vocab_size, tokenizer_hash(tokenizer)
            frequencies = load_frequencies(
                "frequencies.safetensors", directory / "frequencies.safetensors", hashed, rows
            )
            return config, tokenizer, model, frequencies, hashed, list(islice(examples(config, split), number))

        self.directory, self.split = directory, split
        opened_run = distributed.together(opened)
        self.config, self.tokenizer, self.model, self.frequencies, hashed, self.examples = opened_run
        self.tables = tables_of(self.config, self.frequencies.counts, self.tokenizer, hashed)
        if not self.examples:
            raise UserError(f"data.{split} holds no example")
        data = self.config.data
        self.encoder = Encoder(
            self.tokenizer, self.model.config.is_encoder_decoder, data.max_source_tokens, data.max_target_tokens
        )
        self.buckets = frequency_buckets(self.frequencies.counts)
        self.size = self.config.training.micro_batch_size

    def weights(self, alpha: float | None) -> torch.Tensor:
        """Of a tilt: those of `alpha`, or of the run's own loss."""
        if alpha is not None:
            return power_law_weights(self.frequencies.counts, alpha)
        if self.tables.tilt is None:
            raise UserError(
                f"loss.name={self.config.loss.name} tilts nothing: say of what alpha the tilt is, with --alpha"
            )
        return self.tables.tilt.exp()

    @torch.no_grad()
    def knowledge(self) -> dict[str, float]:
        """Cross-entropies over the targets by frequency, as in training's validation, and expected calibration error (Naeini 2015)."""
        import datasets

        rows, _ = self.encoder.rows(self.examples)
        if not rows:
            raise UserError(f"data.{self.split} has no target that a token is left of")
        table = TokenRows(datasets.Dataset.from_list(rows), "", {})
        device = distributed.device()
        loss = loss_of_run(self.config, self.tables)
        meter = Meter(loss, self.buckets.to(device))
        start = decoder_start(self.model) if self.encoder.is_encoder_decoder else None
        collator = Collator(self.tokenizer.pad_token_id, start)
        bins = torch.zeros(3, _BINS, dtype=torch.float64, device=device)  # number, right, confidence
        kept: list[torch.Tensor] = []

        def forward(**inputs):
            outputs = self.model(**inputs)
            kept[:] = [outputs.logits]
            return outputs

        for batch in validation_batches(table, collator, self.size, distributed.rank(), distributed.world_size()):
            watch.agree("measuring cross-entropy")
            batch = batch.to(device)
            _, sums = loss_of(forward, None, batch.inputs, batch.labels, loss, denominator=1.0, untilted=True)
            meter.add(sums, batch.labels)
            confidence = kept[0][batch.labels != IGNORE].float().softmax(-1).amax(-1).double()
            place = (confidence * _BINS).long().clamp(max=_BINS - 1)
            for row, values in enumerate((torch.ones_like(confidence), sums.token_correct.double(), confidence)):
                bins[row].index_add_(0, place, values)
        number, right, confidence = distributed.summed(bins)
        values = {name.removeprefix("validation/"): value for name, value in meter.values("validation").items()}
        return values | {"calibration_error": float((right - confidence).abs().sum() / number.sum())}

    def written(self, decoding: Decoding) -> list[str]:
        sources = [example.source for example in self.examples]
        return generate(self.model, self.encoder, sources, self.size, decoding)

    def scores(self, predictions: list[str]) -> dict[str, float]:
        """The recipe's, and those that any text has. On rank 0."""
        found = {}
        if self.config.task is not None:
            found |= load_recipe(self.config.task).scores(predictions, self.examples)
        references = [example.references for example in self.examples]
        for n in (1, 2, 3):
            found[f"distinct{n}_of_{_SAMPLE}"] = scores.distinct(predictions, n, _SAMPLE)
        found |= {
            "repetition4": scores.repetition(predictions, 4),
            "self_bleu": scores.self_bleu(predictions[:_SELF_BLEU]),
            "length_ratio": scores.length_ratio(predictions, references),
        }
        return found | self._rare(predictions)

    def _rare(self, predictions: list[str]) -> dict[str, float]:
        """How many of the tokens written are rare (tail), and how many of a reference's rare ones were written; in percent."""

        def rare(texts: Iterable[str]) -> list[tuple[set[int], int, int]]:
            rows = [
                torch.tensor(ids, dtype=torch.long)
                for ids in self.tokenizer(list(texts), add_special_tokens=False).input_ids
            ]
            tails = [row[self.buckets[row] == len(BUCKETS) - 1] for row in rows]
            return [(set(tail.tolist()), len(tail), len(row)) for row, tail in zip(rows, tails, strict=True)]

        written, wanted = rare(predictions), rare(example.target for example in self.examples)
        tokens = sum(length for _, _, length in written)
        asked = sum(len(types) for types, _, _ in wanted)
        met = sum(len(there & types) for (there, _, _), (types, _, _) in zip(written, wanted, strict=True))
        return {
            "rare_tokens": 100 * sum(number for _, number, _ in written) / tokens if tokens else 0.0,
            "rare_recall": 100 * met / asked if asked else math.nan,
        }

    def trivial(self) -> dict[str, list[str]]:
        """What is written without a model: the source, its beginning, the most frequent target, that of the most similar training source.

        On rank 0.
        """
        sources = [example.source for example in self.examples]
        trained = list(islice(examples(self.config, "train"), 20_000))
        length = round(sum(len(example.target.split()) for example in trained) / len(trained))
        frequent, _ = Counter(example.target for example in trained).most_common(1)[0]
        nearest = _nearest([example.source for example in trained], sources)
        return {
            "copy": sources,
            "lead": [" ".join(source.split()[:length]) for source in sources],
            "most frequent": [frequent] * len(sources),
            "nearest neighbour": [trained[number].target for number in nearest],
        }


def _nearest(corpus: list[str], texts: list[str]) -> list[int]:
    """For each text the number of the corpus' text with the largest cosine of tf-idf vectors of words."""

    def words(text: str) -> Counter:
        return Counter(re.findall(r"\w+", text.lower()))

    counted = [words(text) for text in corpus]
    places: dict[str, list[int]] = defaultdict(list)
    for number, bag in enumerate(counted):
        for word in bag:
            places[word].append(number)
    idf = {word: math.log(len(corpus) / len(there)) for word, there in places.items()}
    norms = [math.sqrt(sum((count * idf[word]) ** 2 for word, count in bag.items())) or 1.0 for bag in counted]
    found = []
    for text in texts:
        likeness: Counter = Counter()
        for word, count in words(text).items():
            for number in places.get(word, ()):
                likeness[number] += count * counted[number][word] * idf[word] ** 2 / norms[number]
        found.append(max(likeness, key=lambda number: (likeness[number], -number)) if likeness else 0)
    return found


def evaluate(
    directory: Path, split: str, number: int | None, decoding: Decoding, alpha: float | None, name: str
) -> int:
    """Measure, generate, score, write RUN_DIR/evaluations/NAME.json and NAME.jsonl, and print a table. A collective."""
    target = directory / "evaluations" / f"{name}.json"
    distributed.together(lambda: _refuse_to_overwrite(target) if distributed.rank() == 0 else None)
    evaluation = Evaluation(directory, split, number)
    if decoding.tilt:
        decoding.weights = distributed.together(lambda: evaluation.weights(alpha))
    say(f"{directory}: {len(evaluation.examples)} examples of data.{split}, {decoding.describe()}")
    knowledge = evaluation.knowledge()
    predictions = evaluation.written(decoding)
    if distributed.rank() == 0:
        rows = {"model": evaluation.scores(predictions)}
        rows |= {system: evaluation.scores(texts) for system, texts in evaluation.trivial().items()}
        content = {
            "run": evaluation.config.hash(), "loss": evaluation.config.loss.describe(), "split": split, "examples": len(evaluation.examples),
            "decoding": decoding.describe(), "knowledge": knowledge, "scores": rows,
        }  # fmt: skip
        target.parent.mkdir(exist_ok=True)
        texts = [
            {"source": example.source, "references": example.references, "prediction": prediction}
            for example, prediction in zip(evaluation.examples, predictions, strict=True)
        ]
        write_whole(
            target.with_suffix(".jsonl"), "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
        )
        write_json(target, content)
        print(_table(content))
        print(f"\nscores:     {target}\ntexts:      {target.with_suffix('.jsonl')}")
    return 0


def _table(content: dict) -> str:
    lines = ["", "targets:", *(f"  {name:<28} {value:.3f}" for name, value in content["knowledge"].items())]
    systems = list(content["scores"])
    width = max(map(len, content["scores"]["model"]))
    lines += ["", "texts:".ljust(width + 2) + "".join(f"{system:>19}" for system in systems)]
    for name in content["scores"]["model"]:
        lines.append(f"  {name:<{width}}" + "".join(f"{content['scores'][system][name]:>19.2f}" for system in systems))
    return "\n".join(lines)


def _refuse_to_overwrite(target: Path) -> None:
    if target.exists():
        raise UserError(f"{target} is there already; another --name keeps both")
