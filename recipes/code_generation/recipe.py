"""Code generation: a description becomes code. Fields: any two, named by `data.source_field` and `data.target_field`.

Generated code is scored as text and never run.
"""

from collections.abc import Iterator

from pdl import scores as score
from pdl.data import Example


def examples(record: dict) -> Iterator[Example]:
    code = record["target"].replace("\r\n", "\n").replace("\r", "\n")
    yield Example(f"# {record['source'].strip()}\n", code, (code,))


def scores(predictions: list[str], examples: list[Example]) -> dict[str, float]:
    references = [example.references for example in examples]
    return {
        "exact_match": score.exact_match(predictions, references),
        "char_bleu": score.bleu(predictions, references, tokenize="char"),
        "length_ratio": score.length_ratio(predictions, references),
    }
