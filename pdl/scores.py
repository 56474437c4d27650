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


def distinct(predictions: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams of the predictions (Li et al. 2016). Falls with sample size: compare equal sizes."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, predictions) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def length_ratio(predictions: Sequence[str], references: References) -> float:
    """Words of the predictions over words of the (mean) reference: most scores reward one side of 1."""
    wanted = sum(sum(len(text.split()) for text in texts) / len(texts) for texts in references)
    return sum(len(prediction.split()) for prediction in predictions) / wanted if wanted else 0.0


def _streams(references: References) -> list[list[str | None]]:
    """sacreBLEU wants the i-th reference of every prediction together; where one has fewer, the place stays empty."""
    most = max(len(texts) for texts in references)
    return [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
