"""Scores of generated texts. Recipes choose from these. All in percent but `distinct` (a share) and `length_ratio`.

predictions: `[n]` texts; references: for each prediction, one or more texts.
"""

from __future__ import annotations

from collections.abc import Sequence

References = Sequence[Sequence[str]]


def rouge(predictions: Sequence[str], references: References) -> dict[str, float]:
    """ROUGE-1/2/L F-measure (rouge-score, Porter stemmer), the mean over a prediction's references."""
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    totals = dict.fromkeys(kinds, 0.0)
    for prediction, texts in zip(predictions, references, strict=True):
        for text in texts:
            for kind, score in scorer.score(text, prediction).items():
                totals[kind] += score.fmeasure / len(texts)
    return {kind: 100 * total / len(predictions) for kind, total in totals.items()}


def bleu(predictions: Sequence[str], references: References, tokenize: str = "13a") -> float:
    """Corpus BLEU (sacreBLEU). `tokenize="char"` is character BLEU, for code; `"none"` takes texts as tokenized."""
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=tokenize).corpus_score(list(predictions), _streams(references)).score


def exact_match(predictions: Sequence[str], references: References) -> float:
    """Share of predictions equal to one of their references, white space at the ends aside."""
    pairs = zip(predictions, references, strict=True)
    return (
        100
        * sum(prediction.strip() in {text.strip() for text in texts} for prediction, texts in pairs)
        / len(predictions)
    )


def distinct(predictions: Sequence[str], n: int, most: int | None = None) -> float:
    """Distinct n-grams of words over all n-grams of the predictions (Li et al. 2016), or over the first `most` of them.

    It falls with their number: compare equal ones.
    """
    grams = [gram for prediction in predictions for gram in _grams(prediction, n)][:most]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(predictions: Sequence[str], n: int) -> float:
    """The share of n-grams of words that were there before in the same text, the mean over texts that have any; in percent."""
    shares = [
        1 - len(set(grams)) / len(grams) for grams in (_grams(prediction, n) for prediction in predictions) if grams
    ]
    return 100 * sum(shares) / len(shares) if shares else 0.0


def self_bleu(predictions: Sequence[str]) -> float:
    """BLEU of each text with all others as its references, the mean (Zhu et al. 2018): 100 where all are alike. Compare equal numbers."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True)
    others = [[*predictions[:i], *predictions[i + 1 :]] for i in range(len(predictions))]
    scores = [bleu.sentence_score(text, rest).score for text, rest in zip(predictions, others, strict=True) if rest]
    return sum(scores) / len(scores) if scores else 0.0


def pinc(predictions: Sequence[str], sources: Sequence[str], most: int = 4) -> float:
    """How much of a paraphrase is not its source's (Chen and Dolan 2011): the share of n-grams up to `most` that are new; in percent."""
    found = []
    for prediction, source in zip(predictions, sources, strict=True):
        new = [
            len(own - set(_grams(source, n))) / len(own)
            for n in range(1, most + 1)
            if (own := set(_grams(prediction, n)))
        ]
        found.append(sum(new) / len(new) if new else 0.0)
    return 100 * sum(found) / len(found) if found else 0.0


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def length_ratio(predictions: Sequence[str], references: References) -> float:
    """Words of the predictions over words of the (mean) reference: most scores reward one side of 1."""
    wanted = sum(sum(len(text.split()) for text in texts) / len(texts) for texts in references)
    return sum(len(prediction.split()) for prediction in predictions) / wanted if wanted else 0.0


def _streams(references: References) -> list[list[str | None]]:
    """sacreBLEU wants the i-th reference of every prediction together; where one has fewer, the place stays empty."""
    most = max(len(texts) for texts in references)
    return [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
