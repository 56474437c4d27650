"""The embedded samples: written one by one, so no sentence repeats, no target leaks, and rare words are really there."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

RECIPES = Path(__file__).parent.parent / "recipes"
TASKS = ["summarization", "dialogue", "style_transfer", "code_generation"]
SIZES = {"train": 120, "validation": 20, "test": 20}


def records(task: str, split: str) -> list[dict]:
    path = RECIPES / task / "sample" / f"{split}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts(task: str, record: dict) -> list[str]:
    """Every text of a record that is written by hand, targets last."""
    match task:
        case "summarization":
            return [record["document"], record["summary"]]
        case "dialogue":
            return [turn["text"] for turn in record["turns"]]
        case "style_transfer":
            return [record["source"], record["target"]]
        case "code_generation":
            return [record["prompt"], *record["tests"], record["code"]]
    raise ValueError(task)


def targets(task: str, record: dict) -> list[str]:
    return texts(task, record)[1:] if task == "dialogue" else texts(task, record)[-1:]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@pytest.mark.parametrize("task", TASKS)
def test_sizes_and_ids(task):
    for split, size in SIZES.items():
        assert len(records(task, split)) == size
    ids = [record["id"] for split in SIZES for record in records(task, split)]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("task", TASKS)
def test_no_eight_words_stand_in_two_records(task):
    seen: dict[tuple, str] = {}
    repeated = []
    for split in SIZES:
        for record in records(task, split):
            for text in texts(task, record):
                sequence = words(text)
                for i in range(len(sequence) - 7):
                    gram = tuple(sequence[i : i + 8])
                    if seen.setdefault(gram, record["id"]) != record["id"]:
                        repeated.append((seen[gram], record["id"], " ".join(gram)))
    assert not repeated


@pytest.mark.parametrize("task", TASKS)
def test_no_target_is_shared_between_splits(task):
    owner: dict[str, str] = {}
    for split in SIZES:
        for record in records(task, split):
            for target in targets(task, record):
                assert owner.setdefault(" ".join(words(target)), split) == split, target


@pytest.mark.parametrize("task", TASKS)
def test_many_target_words_are_rare(task):
    counts = Counter(
        word
        for split in SIZES
        for record in records(task, split)
        for target in targets(task, record)
        for word in words(target)
    )
    once = sum(count == 1 for count in counts.values())
    assert once >= 0.30 * len(counts), f"{once} of {len(counts)}"


@pytest.mark.parametrize("split", SIZES)
def test_reference_programs_pass_their_own_tests(split):
    # Our own programs, written for this sample; one process for the split, each record in its own namespace.
    for record in records("code_generation", split):
        assert len(record["tests"]) >= 2, record["id"]
    script = (
        "import json, sys\n"
        "for record in json.load(sys.stdin):\n"
        "    try:\n"
        "        exec('\\n'.join([record['code'], *record['tests']]), {'__name__': 'sample'})\n"
        "    except BaseException as error:\n"
        "        sys.exit(f\"{record['id']}: {error!r}\")\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(records("code_generation", split)),
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
