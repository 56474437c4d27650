"""Trained tokenizers give every text back, and a tokenizer's hash says whether two runs speak of the same ids."""

import json
from pathlib import Path

import pytest
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer

from pdl.config import UserError, load_config
from pdl.data import Encoder
from pdl.records import Example, examples, examples_hash
from pdl.tokenizer import load_tokenizer, run_tokenizer, tokenizer_hash, train_tokenizer

TASKS = ["summarization", "dialogue", "style_transfer", "code_generation"]
TEXTS = ["The ferry was late.", "def f(x):\n    return  x\n", "Ærøskøbing, 14,200 m³", "a\tb\r\nc"]


@pytest.fixture(scope="module", params=TASKS)
def sample(request):
    """The configuration of an embedded sample, its tokenizer, and every text of its three splits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        config = load_config(f"configs/{request.param}/sample.yaml")
        texts = [
            text
            for split in ("train", "validation", "test")
            for example in examples(config, split)
            for text in (example.source, example.target, *example.references)
        ]
        assert len(texts) >= 3 * 160 and all(texts)
        yield config, run_tokenizer(config, examples_hash(config, "train")), texts


def altered(tokenizer, texts: list[str], **decoding) -> list[str]:
    ids = tokenizer(texts).input_ids
    return [text for text, row in zip(texts, ids, strict=True) if tokenizer.decode(row, **decoding) != text]


def test_every_text_of_the_samples_comes_back(sample, tmp_path):
    config, tokenizer, texts = sample
    assert len(tokenizer) == config.tokenizer.vocab_size
    tokenizer.save_pretrained(tmp_path)
    for read in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert not altered(read, texts)
        assert not altered(read, texts, skip_special_tokens=True)
        ended = [[*row, read.eos_token_id] for row in read(texts).input_ids]  # as the labels are
        assert read.batch_decode(ended, skip_special_tokens=True) == texts


def test_prompt_and_target_together_are_the_whole_text(sample):
    """Rows of decoder-only models are two texts put together; generated text is decoded from the second alone."""
    config, tokenizer, _ = sample
    for example in examples(config, "validation"):
        prompt, target = (tokenizer(text, add_special_tokens=False).input_ids for text in example[:2])
        assert tokenizer.decode(prompt + target) == example.source + example.target


def test_special_tokens_are_there_and_not_added(sample):
    _, tokenizer, _ = sample
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id) == (
        0,
        1,
        2,
        3,
    )
    assert tokenizer("").input_ids == []


def test_a_second_call_opens_the_cache(sample):
    config, tokenizer, _ = sample
    assert run_tokenizer(config, examples_hash(config, "train")).name_or_path == tokenizer.name_or_path
    made = Path(tokenizer.name_or_path)
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    run_tokenizer(config, examples_hash(config, "train"))
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before
    assert not list(made.parent.glob("*.partial"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small") / "tokenizer"
    train_tokenizer(TEXTS, 320, directory)
    return load_tokenizer(str(directory))


# What a tokenizer has words of its own for is not text: the names of special tokens and bytes, and SentencePiece's sign for a space.
foreign = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<")).filter(bool)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=foreign)
def test_any_text_comes_back(small, text):
    """Also of letters never seen, which are spelled in bytes."""
    assert not altered(small, [text]) and not altered(small, [text], skip_special_tokens=True)


def test_training_is_deterministic(small, tmp_path):
    train_tokenizer(iter(TEXTS), 320, tmp_path / "tokenizer")
    assert tokenizer_hash(load_tokenizer(str(tmp_path / "tokenizer"))) == tokenizer_hash(small)
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_bytes() == (
        Path(small.name_or_path) / "tokenizer.json"
    ).read_bytes()
    train_tokenizer(TEXTS[:3], 310, tmp_path / "other")
    assert tokenizer_hash(load_tokenizer(str(tmp_path / "other"))) != tokenizer_hash(small)


def test_hash_is_that_of_the_tokenizer_not_of_its_last_call(small, tmp_path):
    hashed = tokenizer_hash(small)
    small(TEXTS, truncation=True, max_length=3, padding="max_length")
    assert tokenizer_hash(small) == hashed
    small.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert tokenizer_hash(again) == hashed  # a frequency file of one run serves another with its tokenizer
    assert again(TEXTS).input_ids == small(TEXTS).input_ids
    again.add_tokens(["ferry"])
    assert tokenizer_hash(again) != hashed


def test_encoding_rows_leaves_no_truncation_in_what_is_saved(small, tmp_path):
    """A tokenizer.json with a truncation in it cuts the texts of whoever loads it with another library."""
    encoder = Encoder(small, is_encoder_decoder=True, max_source_tokens=4, max_target_tokens=4)
    encoder.rows([Example(text, text, (text,)) for text in TEXTS])
    small.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is None


def test_a_tokenizer_written_in_python_has_a_hash():
    assert tokenizer_hash(ByT5Tokenizer()) == tokenizer_hash(ByT5Tokenizer())
    assert tokenizer_hash(ByT5Tokenizer()) != tokenizer_hash(ByT5Tokenizer(extra_ids=7))


def test_too_few_texts_for_the_vocabulary(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer.vocab_size=4000 .* <= \d+"):
        train_tokenizer(TEXTS, 4000, tmp_path / "tokenizer")
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_texts_is_passed_on(tmp_path):
    def read():
        yield from TEXTS
        raise UserError("a.jsonl:5: not valid JSON")

    with pytest.raises(UserError, match=r"^a\.jsonl:5: not valid JSON$"):
        train_tokenizer(read(), 320, tmp_path / "tokenizer")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_cannot_be_loaded(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=f"{tmp_path} could not be loaded"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="no/where/at/all could not be loaded"):
        load_tokenizer("no/where/at/all")


def test_a_tokenizer_without_an_end(small, tmp_path):
    small.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for name in ("eos_token", "pad_token"):
        settings[name] = None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_padding_pads_with_its_end(small, tmp_path):
    small.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["pad_token"] = None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(str(tmp_path)).pad_token_id == small.eos_token_id
