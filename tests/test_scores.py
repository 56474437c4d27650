"""Scores against values that are known."""

from pathlib import Path

import pytest
from conftest import SHARED_DATA

from pdl import scores


def test_identical_texts_score_full():
    texts, references = ["the cat sat on the mat today"] * 2, [["the cat sat on the mat today"]] * 2
    assert scores.rouge(texts, references) == pytest.approx({"rouge1": 100, "rouge2": 100, "rougeL": 100})
    assert scores.bleu(texts, references) == pytest.approx(100)
    assert scores.exact_match(texts, references) == 100
    assert scores.length_ratio(texts, references) == 1


def test_rouge_is_the_mean_over_references():
    one = scores.rouge(["a b"], [["a b"]])["rouge1"], scores.rouge(["a b"], [["c d"]])["rouge1"]
    assert scores.rouge(["a b"], [["a b", "c d"]])["rouge1"] == pytest.approx(sum(one) / 2)


def test_bleu_takes_uneven_numbers_of_references():
    assert scores.bleu(
        ["one two three four", "five six seven eight"], [["x", "one two three four"], ["five six seven eight"]]
    ) == pytest.approx(100)


def test_character_bleu_sees_spaces_inside_words():
    near = scores.bleu(["return value + 1"], [["return values + 1"]], tokenize="char")
    assert 0 < scores.bleu(["yield"], [["return values + 1"]], tokenize="char") < near < 100


def test_exact_match_leaves_out_white_space_at_the_ends_only():
    assert scores.exact_match(["x = 1\n", "x  = 1"], [["x = 1"], ["x = 1"]]) == 50


def test_distinct():
    assert scores.distinct(["a b a b"], 1) == 0.5
    assert scores.distinct(["a b", "a b"], 2) == 0.5
    assert scores.distinct(["", "a"], 2) == 0.0


def test_length_ratio_counts_words():
    assert scores.length_ratio(["a b c"], [["a b", "a b c d"]]) == 1


@pytest.mark.parametrize(("system", "published"), [("YLTToBBEMoses", 24.01), ("publicToPublicSeq2Seq", 24.94)])
def test_published_outputs_score_as_published(system, published):
    """Carlson, Riddell and Rockmore (2018): BLEU of their systems on YLT to BBE."""
    corpus = SHARED_DATA / "style-transfer" / "bible"
    if not corpus.exists():
        pytest.skip(f"needs the Bible corpus of Carlson et al. in {corpus.name}/ of the shared data")
    outputs = _lines(corpus / "published_outputs" / f"{system}.YLTToBBE.txt")
    references = [[line] for line in _lines(corpus / "YLTToBBE" / "Test.tgt")]
    assert scores.bleu(outputs, references, tokenize="none") == pytest.approx(published, abs=0.005)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def test_distinct_over_the_first_so_many():
    assert scores.distinct(["a b c a", "x y"], 1, 3) == 1.0
    assert scores.distinct(["a b c a", "x y"], 1, 4) == 0.75


def test_repetition_is_within_a_text():
    assert scores.repetition(["a a a a", "a b c d"], 1) == pytest.approx(100 * (3 / 4 + 0) / 2)
    assert scores.repetition(["a b", ""], 3) == 0.0


def test_self_bleu():
    alike = ["the cat sat on the mat"] * 3
    apart = ["the cat sat on the mat", "one two three four five", "red green blue black white"]
    assert scores.self_bleu(alike) == pytest.approx(100) and scores.self_bleu(apart) < 10
    assert scores.self_bleu(["alone"]) == 0.0


def test_pinc():
    assert scores.pinc(["a b c"], ["a b c"]) == 0
    assert scores.pinc(["x y"], ["a b c"]) == 100
    # Of one-, two- and three-grams 1/3, 1/2 and 1/1 are new; there is no four-gram.
    assert scores.pinc(["a b x"], ["a b c"]) == pytest.approx(100 * (1 / 3 + 1 / 2 + 1) / 3)
