"""Summarization: a document becomes its summary. Fields: any two, named by `data.source_field` and `data.target_field`.

A record may have several references in numbered fields, as the `summary1`, `summary2`, `summary3` of DialogSum's test set:
a prediction is scored against each of them, and the first is the target.
"""

import re
from collections.abc import Iterator

from pdl import scores as score
from pdl.data import Example


def examples(record: dict) -> Iterator[Example]:
    numbered = [text for name, text in record.items() if re.fullmatch(r"(summary|target)\d+", name) and text]
    references = tuple(numbered) or (record["target"],)
    yield Example(record["source"], references[0], references)


def scores(predictions: list[str], examples: list[Example]) -> dict[str, float]:
    references = [example.references for example in examples]
    return {
        **score.rouge(predictions, references),
        "distinct2": score.distinct(predictions, 2),
        "length_ratio": score.length_ratio(predictions, references),
    }
