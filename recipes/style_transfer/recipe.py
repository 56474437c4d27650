"""Style transfer: a sentence becomes the same one in another style. Fields: any two, or parallel files of lines."""

import re
from collections.abc import Iterator

from pdl import scores as score
from pdl.data import Example


def examples(record: dict) -> Iterator[Example]:
    # The Bible corpus of Carlson et al. (2018) begins each source line with the name of the target's version, as <BBE>.
    source = re.sub(r"^<[A-Z]{2,5}>\s*", "", record["source"])
    yield Example(source, record["target"], (record["target"],))


def scores(predictions: list[str], examples: list[Example]) -> dict[str, float]:
    references = [example.references for example in examples]
    # Copying the source keeps all of its meaning and scores well in BLEU, but transfers nothing.
    pairs = zip(predictions, examples, strict=True)
    copied = sum(prediction.strip() == example.source.strip() for prediction, example in pairs)
    return {
        "bleu": score.bleu(predictions, references),
        "copied_percent": 100 * copied / len(examples),
        "pinc": score.pinc(predictions, [example.source for example in examples]),
        "distinct2": score.distinct(predictions, 2),
        "length_ratio": score.length_ratio(predictions, references),
    }
