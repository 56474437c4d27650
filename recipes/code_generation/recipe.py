"""Code generation: a description becomes code. Fields: any two, named by `data.source_field` and `data.target_field`.

The description becomes a comment, which code in many languages may begin with. Generated code is scored as text and
never run.
"""

from collections.abc import Iterator

from pdl import scores as score
from pdl.data import Example


def examples(record: dict) -> Iterator[Example]:
    comment = "".join(f"# {line}".rstrip() + "\n" for line in record["source"].strip().splitlines())
    # Indentation and line breaks are part of the code. Only the kind of line break is made one: some sets have \r\n.
    code = record["target"].replace("\r\n", "\n").replace("\r", "\n")
    yield Example(comment, code, (code,))


def scores(predictions: list[str], examples: list[Example]) -> dict[str, float]:
    references = [example.references for example in examples]
    return {
        "exact_match": score.exact_match(predictions, references),
        "char_bleu": score.bleu(predictions, references, tokenize="char"),
        "length_ratio": score.length_ratio(predictions, references),
    }
