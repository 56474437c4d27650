"""Style transfer: a sentence is rewritten in another style. Fields: any two, or parallel files of lines."""

import re
from collections.abc import Iterator

from pdl import scores as score
from pdl.data import Example


def examples(record: dict) -> Iterator[Example]:
    # The Bible corpus of Carlson et al. (2018) begins each source line with a tag of the target style, such as <BBE>.
    source = re.sub(r"^<[A-Z]+>\s*", "", record["source"])
    yield Example(source, record["target"], (record["target"],))


def scores(predictions: list[str], examples: list[Example]) -> dict[str, float]:
    references = [example.references for example in examples]
    copied = sum(
        prediction.strip() == example.source.strip() for prediction, example in zip(predictions, examples, strict=True)
    )
    return {
        "bleu": score.bleu(predictions, references),
        "copied_percent": 100 * copied / len(examples),
        "distinct2": score.distinct(predictions, 2),
        "length_ratio": score.length_ratio(predictions, references),
    }
