"""Dialogue: a conversation becomes its next turn. One record gives one example for each turn that is learned.

A record has `turns` (a list of `speaker`, `text`), `messages` (a list of `role`, `content`), `dialog` (a list of texts
whose speakers alternate), or a source and a target. Every turn after the first is learned as the reply to those before
it; of `messages` only the assistant's.
"""

from collections.abc import Iterator

from pdl import scores as score
from pdl.data import Example


def turns_of(record: dict) -> list[tuple[str, str]]:
    """The conversation as (speaker, text), whatever the record calls them."""
    if "turns" in record:
        return [(turn["speaker"], turn["text"].strip()) for turn in record["turns"]]
    if "messages" in record:
        spoken = [message for message in record["messages"] if message["role"] in ("user", "assistant")]
        return [(message["role"], message["content"].strip()) for message in spoken]
    texts = record["dialog"] if "dialog" in record else [record["source"], record["target"]]
    return [("AB"[place % 2], text.strip()) for place, text in enumerate(texts)]


def examples(record: dict) -> Iterator[Example]:
    turns = turns_of(record)
    for place, (speaker, reply) in enumerate(turns):
        if place == 0 or speaker == "user":
            continue
        # Whoever replies is B and everybody else A, so that the model learns one voice.
        history = [f"{'B' if who == speaker else 'A'}: {text}" for who, text in turns[:place] if text]
        # The space belongs to the target: tokenizers have one token for " word" and another for "word".
        yield Example("\n".join([*history, "B:"]), f" {reply}" if reply else "", (reply,))


def scores(predictions: list[str], examples: list[Example]) -> dict[str, float]:
    references = [example.references for example in examples]
    return {
        "bleu": score.bleu(predictions, references),
        "distinct1": score.distinct(predictions, 1),
        "distinct2": score.distinct(predictions, 2),
        "length_ratio": score.length_ratio(predictions, references),
    }
