"""`python -m pdl evaluate`: what it measures is what training logged, and the texts are the same on any number of ranks."""

import json
import math

import pytest
from distributed.forked import Group, Rank
from faults.runs import logged, train

from pdl.evaluate import _nearest


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluated") / "run"
    long_enough = [
        "training.max_steps=60",
        "training.learning_rate=5e-3",
        "training.evaluate_every=60",
        "training.save_every=60",
    ]
    trained = train(directory, *long_enough, "evaluation.examples=0", ranks=1)
    assert trained.exit_codes() == [0], trained.output()
    return directory


def evaluate(run, *options: str, ranks: int = 1, code: int = 0) -> str:
    group = Group([Rank(["evaluate", str(run), *options]) for _ in range(ranks)])
    assert set(group.wait(120)) == {code}, group.said
    return group.said[0]


def found(run, name: str) -> tuple[dict, list[dict]]:
    path = run / "evaluations" / f"{name}.json"
    return json.loads(path.read_text()), [
        json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()
    ]


def test_measures_what_training_logged_and_writes_the_same_on_any_number_of_ranks(run):
    said = evaluate(run, "--split", "validation", "--name", "one")
    evaluate(run, "--split", "validation", "--name", "two", ranks=2)
    (one, texts), (two, others) = found(run, "one"), found(run, "two")
    assert any(text["prediction"] for text in texts)  # else there would be nothing to compare
    assert texts == others and one["scores"] == two["scores"]
    assert one["knowledge"] == pytest.approx(two["knowledge"], rel=1e-9)
    last = logged(run)[-1]
    for name, value in one["knowledge"].items():
        if name != "calibration_error":
            assert value == pytest.approx(last[f"validation/{name}"], rel=1e-5), name
    assert "cross_entropy_untilted/tail" in one["knowledge"] and 0 < one["knowledge"]["calibration_error"] < 1
    assert set(one["scores"]) == {"model", "copy", "lead", "most frequent", "nearest neighbour"}
    assert all(set(scores) == set(one["scores"]["model"]) for scores in one["scores"].values())
    assert one["scores"]["copy"]["length_ratio"] > 1 > one["scores"]["lead"]["self_bleu"] / 100
    assert one["scores"]["most frequent"]["self_bleu"] == pytest.approx(100)
    assert "rare_recall" in said and "nearest neighbour" in said


def test_the_loss_of_another_run_is_its_own(tmp_path):
    """With the frequencies of a general corpus in the weights, smoothed, and of untilted logits."""
    corpus, directory = tmp_path / "general.txt", tmp_path / "run"
    corpus.write_text("the cheese and the cave and the wheel\n" * 50)
    settings = [
        "loss.name=logit_adjusted",
        f"loss.general_corpus={corpus}",
        "loss.general_weight=0.5",
        "loss.label_smoothing=0.1",
    ]
    trained = train(directory, *settings, "training.max_steps=2", "evaluation.examples=0", ranks=1)
    assert trained.exit_codes() == [0], trained.output()
    evaluate(directory, "--split", "validation", "--name", "one")
    measured, last = found(directory, "one")[0]["knowledge"], logged(directory)[-1]
    for name in ("loss", "cross_entropy_untilted", "weight_mean"):
        assert measured[name] == pytest.approx(last[f"validation/{name}"], rel=1e-5), name


def test_sampled_texts_depend_on_the_seed_and_not_on_the_ranks(run):
    drawn = ["--examples", "12", "--sample", "--top-p", "0.9"]
    evaluate(run, *drawn, "--name", "a")
    evaluate(run, *drawn, "--name", "b", ranks=2)
    evaluate(run, *drawn, "--seed", "1", "--name", "c")
    a, b, c = (found(run, name)[1] for name in "abc")
    assert a == b and a != c and len(a) == 12


def test_beams_and_a_tilt(run):
    evaluate(run, "--examples", "4", "--beams", "3", "--tilt", "-1")
    content, _ = found(run, "test-3_beams-tilt_-1")
    assert content["decoding"] == "3 beams, tilt -1" and content["examples"] == 4
    plain = evaluate(run, "--examples", "4", "--name", "plain") and found(run, "plain")
    tilted = evaluate(run, "--examples", "4", "--tilt", "40", "--alpha", "1", "--name", "tilted") and found(
        run, "tilted"
    )
    assert [text["prediction"] for text in tilted[1]] != [text["prediction"] for text in plain[1]]
    assert math.isfinite(tilted[0]["scores"]["model"]["rare_recall"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", "twice", "--examples", "1"], "twice.json is there already; another --name keeps both"),
        (["--beams", "2", "--sample"], "--sample draws one text"),
        (["--temperature", "0.5", "--alpha", "1"], "--temperature and --top-p need --sample\n  - --alpha is of --tilt"),
        (["--name", "../elsewhere"], "--name must be a file's name"),
    ],
)
def test_what_cannot_be_done_is_refused(run, options, message):
    if "twice" in options:
        evaluate(run, *options)
    assert message in evaluate(run, *options, code=2)


def test_a_directory_without_a_finished_run_is_refused(tmp_path):
    assert "holds no finished run: config.yaml, model, frequencies.safetensors" in evaluate(tmp_path, code=2)


def test_the_nearest_source():
    corpus = ["the cat sat", "the dog ran fast", "a very fast car"]
    assert _nearest(corpus, ["where is the cat", "fast dog", "nothing alike", "car"]) == [0, 1, 0, 2]
