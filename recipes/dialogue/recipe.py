"""Dialogue: each turn after the first is learned as the reply to the turns before it.

A record has `turns` (`speaker`, `text`), `messages` (`role`, `content`), `dialog` (a list of texts), or a source and a target.
"""

from collections.abc import Iterator

from pdl import scores as score
from pdl.data import Example


def examples(record: dict) -> Iterator[Example]:
    if "turns" in record:
        turns = [turn["text"] for turn in record["turns"]]
    elif "messages" in record:
        turns = [message["content"] for message in record["messages"] if message["role"] != "system"]
    elif "dialog" in record:
        turns = record["dialog"]
    else:
        turns = [record["source"], record["target"]]
    for place in range(1, len(turns)):
        # Speakers alternate; the reply is always B's, so that the model learns one voice.
        history = turns[: place + 1]
        lines = [f"{'B' if (place - i) % 2 == 0 else 'A'}: {text.strip()}" for i, text in enumerate(history)]
        reply = history[-1].strip()
        yield Example("\n".join(lines[:-1]) + "\nB:", f" {reply}" if reply else "", (reply,))


def scores(predictions: list[str], examples: list[Example]) -> dict[str, float]:
    references = [example.references for example in examples]
    return {
        "bleu": score.bleu(predictions, references),
        "distinct1": score.distinct(predictions, 1),
        "distinct2": score.distinct(predictions, 2),
        "length_ratio": score.length_ratio(predictions, references),
    }
