"""Bad input ends with exit code 2 and one message that names what is wrong and what would be right; nothing is written over."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from distributed.forked import Group, Rank

from pdl.__main__ import main
from pdl.config import _OURS, UserError, load_config
from pdl.frequencies import TokenFrequencies
from pdl.records import examples_hash
from pdl.tokenizer import run_tokenizer, tokenizer_hash

CONFIG = "configs/summarization/sample.yaml"
RECORDS = [{"document": f"The ferry {name} was late again.", "summary": f"{name} late"} for name in ("Ada", "Bo", "Cy")]
# No special words; 300 entries are few enough for the little text above.
SMALL = ["tokenizer.vocab_size=300", "training.global_batch_size=2", "training.micro_batch_size=1"]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch):
    """Paths of the configs are relative to the repository; a process group leaves its description in the environment."""
    before = dict(os.environ)
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # beside a recipe of the user's, Python's doing and not ours
    yield
    os.environ.clear()
    os.environ.update(before)


def listing(directory: Path) -> dict[str, tuple]:
    """Every path below a directory with its kind, content and time of change."""
    return {
        str(path.relative_to(directory)): (path.is_file() and path.read_bytes(), path.stat().st_mtime_ns)
        for path in directory.rglob("*")
    }


class Command:
    """`python -m pdl train` in this process, with an output directory of the test's own."""

    def __init__(self, tmp_path: Path, capsys):
        self.folder, self.capsys = tmp_path, capsys
        self.output = tmp_path / "run"

    def __call__(self, *overrides: str, config: str | Path = CONFIG) -> tuple[int, str, str]:
        ends_soon = ["training.max_steps=1", "evaluation.examples=0", f"training.output_dir={self.output}"]
        code = main(["train", str(config), *ends_soon, *overrides])
        return code, *self.capsys.readouterr()

    def refused(self, *overrides: str, config: str | Path = CONFIG) -> str:
        """The one message of a run that must be refused and must leave its output directory as it was."""
        before = listing(self.folder)
        code, _, errors = self(*overrides, config=config)
        assert code == 2
        assert listing(self.folder) == before
        assert errors.count("pdl: ") == 1 and errors.startswith("pdl: "), errors
        assert "Traceback" not in errors
        return errors

    def file(self, name: str, content: str | bytes | list[dict]) -> Path:
        path = self.folder / name
        if isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path


@pytest.fixture
def command(tmp_path, capsys):
    return Command(tmp_path, capsys)


# --- the configuration ---

CONFIGURATIONS = {
    "misspelled key": (["loss.alhpa=0.5"], ["loss.alhpa is not a key", "did you mean loss.alpha?"]),
    "misspelled section": (["trainning.seed=1"], ["trainning is not a key", "did you mean training?"]),
    "key like no other": (["loss.zzz=1"], ["loss.zzz is not a key", "epsilon", "max_weight"]),
    "key that is no text": (["model={architecture: t5, 5: 6}"], ["model.5 is not a key"]),
    "no value": (["training.seed"], ["'training.seed'", "section.key=value"]),
    "a value that is no YAML": (["loss.alpha={"], ["'loss.alpha={'", "not YAML"]),
    "section that is none": (["loss=3"], ["loss must be a section", "3"]),
    "text for a number": (["training.max_steps=many"], ["training.max_steps='many'", "must be a number"]),
    "bool for a number": (["training.learning_rate=true"], ["training.learning_rate=True", "must be a number"]),
    "fraction for a count": (["training.seed=1.5"], ["training.seed=1.5", "whole number"]),
    "number for a switch": (["loss.normalize=1"], ["loss.normalize=1", "true or false"]),
    "list for a text": (["task=[dialogue]"], ["task=['dialogue']", "must be a text"]),
    "unknown loss": (["loss.name=focus"], ["loss.name='focus'", "power_law, logit_adjusted, cross_entropy, focal"]),
    "unknown reduction": (["loss.reduction=mean"], ["loss.reduction='mean'", "weighted_mean, token_mean, sum"]),
    "alpha missing": (["loss.alpha=null"], ["loss.alpha is missing"]),
    "alpha negative": (["loss.alpha=-0.25"], ["loss.alpha=-0.25", ">= 0"]),
    "alpha nan": (["loss.alpha=nan"], ["loss.alpha=nan", "finite"]),
    "alpha infinite": (["loss.alpha=.inf"], ["loss.alpha=inf", "finite"]),
    "alpha negative infinite": (["loss.alpha=-.inf"], ["loss.alpha=-inf", "finite"]),
    "epsilon zero": (["loss.epsilon=0"], ["loss.epsilon=0.0", "> 0"]),
    "epsilon negative": (["loss.epsilon=-1e-8"], ["loss.epsilon=-1e-08", "> 0"]),
    "epsilon nan": (["loss.epsilon=nan"], ["loss.epsilon=nan", "finite"]),
    "max_weight below the mean": (["loss.max_weight=0.5"], ["loss.max_weight=0.5", ">= 1"]),
    "max_weight infinite": (["loss.max_weight=.inf"], ["loss.max_weight=inf", "finite"]),
    "general corpus without weight": (["loss.general_corpus=LICENSE"], ["loss.general_corpus", "loss.general_weight"]),
    "general weight without corpus": (["loss.general_weight=0.5"], ["loss.general_corpus", "loss.general_weight"]),
    "general weight above 1": (["loss.general_weight=1.5", "loss.general_corpus=LICENSE"], ["loss.general_weight=1.5", "[0, 1]"]),
    "global batch not divisible": (
        ["training.global_batch_size=15", "training.micro_batch_size=8"],
        ["training.global_batch_size=15", "training.micro_batch_size=8", "16 would be, or a micro_batch_size of 1"],
    ),
    "batch of nothing": (["training.micro_batch_size=0"], ["training.micro_batch_size=0", "> 0"]),
    "batch missing": (["training.global_batch_size=null"], ["training.global_batch_size is missing"]),
    "learning rate infinite": (["training.learning_rate=.inf"], ["training.learning_rate=inf", "finite"]),
    "steps and epochs": (["training.epochs=1"], ["training.max_steps or training.epochs"]),
    "neither steps nor epochs": (["training.max_steps=null"], ["training.max_steps or training.epochs"]),
    "epochs without end": (["training.max_steps=null", "training.epochs=.inf"], ["training.epochs=inf", "finite"]),
    "logs never": (["training.log_every=0"], ["training.log_every=0", "> 0"]),
    "dropout of everything": (["model.dropout=1"], ["model.dropout=1.0", "[0, 1)"]),
    "target of one token": (["data.max_target_tokens=1"], ["data.max_target_tokens=1", "> 1"]),
    "unknown task": (["task=summarisation"], ["task=summarisation", "did you mean summarization?"]),
    "task with a hyphen": (["task=style-transfer"], ["task=style-transfer", "did you mean style_transfer?"]),
    "task like no other": (["task=zzz"], ["task=zzz", "code_generation, dialogue, style_transfer, summarization"]),
    "no model": (["model=null"], ["model.name_or_path or model.architecture"]),
    "two models": (["model.name_or_path=t5-small"], ["model.name_or_path or model.architecture"]),
    "unknown architecture": (["model.architecture=t55"], ["model.architecture=t55"]),
    "unknown setting of the architecture": (["model.d_modell=64"], ["d_modell", "d_model"]),
    "no tokenizer": (["tokenizer.vocab_size=null"], ["tokenizer.name_or_path or tokenizer.vocab_size"]),
    "tokenizer smaller than its bytes": (["tokenizer.vocab_size=200"], ["tokenizer.vocab_size", ">= 300"]),
    "no training data": (["data.train=null"], ["data.train is missing"]),
    "missing data file": (["data.train=no/such.jsonl"], ["data.train=no/such.jsonl does not exist"]),
    "missing test file": (["data.test=no/such.jsonl"], ["data.test=no/such.jsonl does not exist"]),
    "unknown data format": (["data.train=notes.md"], ["data.train=notes.md", ".jsonl, .json, .csv, .tsv, .parquet"]),
    "data that is no path": (["data.train=7"], ["data.train=7", "hub:"]),
    "parallel files without target": (["data.train={source: LICENSE}"], ["data.train", "source and target"]),
    "missing parallel file": (
        ["data.train={source: LICENSE, target: no/such.txt}"],
        ["data.train.target=no/such.txt does not exist"],
    ),
    "hub without a split": (["data.train=hub:owner/name"], ["data.train=hub:owner/name", "[@revision]:split"]),
    "hub without a name": (["data.train=hub::train"], ["data.train=hub::train", "hub:owner/name"]),
    "missing DeepSpeed file": (["deepspeed=zero9.json"], ["deepspeed=zero9.json does not exist", "zero0.json"]),
    "bf16 with ZeRO-0": (
        ["training.precision=bf16", "deepspeed=configs/deepspeed/zero0.json"],
        ["training.precision=bf16", "zero1.json"],
    ),
    "fp16": (["training.precision=fp16"], ["training.precision='fp16'", "fp32, bf16"]),
}  # fmt: skip


@pytest.mark.parametrize("overrides, named", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_configuration(command, overrides, named):
    message = command.refused(*overrides)
    for text in named:
        assert text in message
    assert "problems)" not in message, "one mistake must not be shown as several"


def test_batch_size_names_the_ranks():
    batch = ["training.global_batch_size=16", "training.micro_batch_size=8"]
    with pytest.raises(
        UserError, match=r"=16 is not a multiple of .*=8 x 4 ranks; 32 would be, or a micro_batch_size of 4"
    ):
        load_config(CONFIG, batch, world_size=4)
    with pytest.raises(UserError, match=r"=16 is not a multiple of .*=8 x 3 ranks; 24 would be$"):
        load_config(CONFIG, batch, world_size=3)


def test_a_resolved_configuration_says_the_same(command):
    config = load_config(CONFIG, ["loss.epsilon=1e-8", "training.seed=9007199254740993", "model.num_heads=2"])
    assert config.loss.epsilon == 1e-8 and config.training.seed == 2**53 + 1
    path = command.file("resolved.yaml", yaml.safe_dump(config.to_dict()))
    assert load_config(path).to_dict() == config.to_dict()


def test_problems_are_reported_together(command):
    message = command.refused(
        "loss.alpha=-1", "loss.epsilon=0", "training.global_batch_size=15", "training.micro_batch_size=8", "data.train=no.jsonl", "loss.alfa=1", "task=zzz"
    )  # fmt: skip
    assert "6 problems" in message
    for text in ("loss.alpha=-1", "loss.epsilon=0", "=15", "data.train=no.jsonl", "loss.alfa", "task=zzz"):
        assert message.count(text) == 1


@pytest.mark.parametrize(
    "content, named",
    {
        "is missing": (None, "does not exist"),
        "is no YAML": ("loss: {alpha: 1", "not YAML"),
        "is no text": (b"task: \xff\xfe", "not YAML"),
        "is a list": ("- loss", "sections"),
        "is empty": ("", "data.train is missing"),
    }.values(),
)
def test_config_file(command, content, named):
    path = command.folder / "mine.yaml" if content is None else command.file("mine.yaml", content)
    message = command.refused(config=path)
    assert str(path) in message and named in message


@pytest.mark.parametrize("key", _OURS)
def test_deepspeed_file_with_a_key_of_ours(command, key):
    path = command.file("mine.json", json.dumps({"zero_optimization": {"stage": 2}, key: {"enabled": True}}))
    message = command.refused(f"deepspeed={path}")
    assert f"{path} sets {key}, which is set by {_OURS[key]}" in message


@pytest.mark.parametrize(
    "content, named",
    [
        ("{", "is not JSON"),
        ("[2]", "zero_optimization"),
        ("{}", "zero_optimization"),
        ('{"zero_optimization": 2}', "zero_optimization"),
        ('{"zero_optimization": {"stage": 4}}', "0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 2}, "zero_optimisation": {"stage": 3}}', "zero_optimisation"),
        ('{"zero_optimization": {"stage": 2}, "gradient_allreduce_op": "sum"}', "gradient_allreduce_op"),
    ],
)
def test_deepspeed_file(command, content, named):
    path = command.file("mine.json", content)
    message = command.refused(f"deepspeed={path}")
    assert str(path) in message and named in message


# --- the data ---


def test_invalid_json_names_file_and_line(command):
    path = command.file("bad.jsonl", json.dumps(RECORDS[0]) + "\n\n" + '{"document": "a", "summary": \n')
    assert f"{path}:3: not valid JSON" in command.refused(f"data.train={path}")
    assert f"{path}:3: not valid JSON" in command.refused(f"data.validation={path}")  # read later, by other code


def test_record_that_is_no_object(command):
    path = command.file("bad.jsonl", json.dumps(RECORDS[0]) + "\n[1]\n")
    assert f"{path}:2" in command.refused(f"data.train={path}")


@pytest.mark.parametrize("name, content", {"a.jsonl": "\n \n", "a.json": "[]", "a.csv": "document,summary\n", "b.csv": ""}.items())  # fmt: skip
def test_empty_dataset(command, name, content):
    path = command.file(name, content)
    for split in ("train", "validation"):
        message = command.refused(f"data.{split}={path}")
        assert f"data.{split}={path} holds nothing to learn from" in message


def test_missing_field_lists_the_fields(command):
    records = [*RECORDS, {"text": "a", "summary": "b", "note": "c"}]
    path = command.file("a.jsonl", records)
    for split in ("train", "validation"):
        message = command.refused(f"data.{split}={path}")
        assert f"{path}:4 has no field 'document'; its fields are text, summary, note" in message
    message = command.refused("data.source_field=dokument")
    assert "no field 'dokument'" in message and "data.source_field" in message


def test_a_misspelled_field_is_not_taken_for_another(command):
    # The recipe reads `source`; that the records have a field of that name does not make up for the one asked for.
    path = command.file("a.jsonl", [{"source": "a", "target": "b"}])
    assert "no field 'documnet'" in command.refused(
        f"data.train={path}", "data.source_field=documnet", "data.target_field=target"
    )


@pytest.mark.parametrize(
    "value, kind", [(5, "int"), (True, "bool"), (["a"], "list"), ({"a": 1}, "dict"), (2.5, "float")]
)
def test_field_that_is_no_text(command, value, kind):
    for task in ("summarization", "style_transfer", "code_generation", "null"):
        for field in ("document", "summary"):
            path = command.file("a.jsonl", [*RECORDS, RECORDS[0] | {field: value}])
            message = command.refused(f"data.train={path}", f"task={task}")
            assert f"{path}:4" in message and f"{field} ({kind})" in message


def test_source_that_is_null(command):
    path = command.file("a.jsonl", [*RECORDS, RECORDS[0] | {"document": None}])
    assert f"{path}:4" in command.refused(f"data.train={path}")


def test_half_a_surrogate_pair(command):
    path = command.file("a.jsonl", [*RECORDS, RECORDS[0] | {"document": "cut \ud83d"}])
    message = command.refused(f"data.train={path}")
    assert f"{path}:4" in message and "surrogate" in message


def test_empty_targets_are_counted_and_dropped(command):
    empty = [RECORDS[0] | {"summary": text} for text in ("", " \n", None)]
    path = command.file("a.jsonl", [*RECORDS, *empty])
    code, output, _ = command(*SMALL, f"data.train={path}", "--check")
    assert code == 0 and "data.train: 3 examples (3 empty targets dropped)" in output
    path = command.file("b.jsonl", empty)
    for split, more in (("train", SMALL), ("validation", ())):
        message = command.refused(f"data.{split}={path}", *more)
        assert f"data.{split}={path} holds nothing to learn from" in message and "3 empty targets dropped" in message


def test_parallel_files_of_different_length(command):
    source, target = command.file("a.txt", "one\ntwo\nthree\n"), command.file("b.txt", "eins\nzwei")
    message = command.refused(
        f"data.train={{source: {source}, target: {target}}}", "data.source_field=null", "data.target_field=null"
    )
    assert f"{source} has 3" in message and f"{target} has 2" in message


@pytest.mark.parametrize(
    "name, content",
    [("a.csv", b"document,summary\na,b\nc,\xff\n"), ("a.jsonl", b'{"document": "a", "summary": "\xff"}'), ("a.parquet", b"PAR1")],
)  # fmt: skip
def test_damaged_file(command, name, content):
    path = command.file(name, content)
    assert str(path) in command.refused(f"data.train={path}")


def test_csv_row_of_another_length(command):
    path = command.file("a.csv", "document,summary\na,b\nc\n")
    message = command.refused(f"data.train={path}")
    assert f"{path}:3" in message and "2 columns" in message


def test_parallel_file_that_is_no_text(command):
    source, target = command.file("a.txt", "one\ntwo\n"), command.file("b.txt", b"eins\n\xff\n")
    message = command.refused(
        f"data.train={{source: {source}, target: {target}}}", "data.source_field=null", "data.target_field=null"
    )
    assert f"{target}:2" in message


def test_too_little_text_for_the_vocabulary(command):
    path = command.file("a.jsonl", RECORDS)
    message = command.refused(f"data.train={path}", "tokenizer.vocab_size=5000")
    assert "tokenizer.vocab_size=5000" in message and "<=" in message


def test_recipe_without_its_functions(command):
    path = command.file("mine.py", "def examples(record): ...\n")
    message = command.refused(f"task={path}")
    assert str(path) in message and "scores" in message


# --- the general corpus ---


def test_frequency_file(command):
    config = load_config(CONFIG)
    tokenizer = run_tokenizer(config, examples_hash(config, "train"))
    hashed, rows = tokenizer_hash(tokenizer), len(tokenizer)
    counts = TokenFrequencies.from_labels(tokenizer("a", return_tensors="pt").input_ids, rows).counts
    path = command.folder / "general.safetensors"

    def message(frequencies: TokenFrequencies) -> str:
        frequencies.save(path)
        return command.refused(f"loss.general_corpus={path}", "loss.general_weight=0.5")

    of_another_vocabulary = message(TokenFrequencies(counts[1:].clone(), hashed, "books"))
    assert (
        str(path) in of_another_vocabulary
        and f"{rows - 1} rows" in of_another_vocabulary
        and f"{rows} rows" in of_another_vocabulary
    )
    of_another_tokenizer = message(TokenFrequencies(counts, "0123456789abcdef", "books"))
    assert "0123456789ab" in of_another_tokenizer and hashed[:12] in of_another_tokenizer
    assert "not named" in message(TokenFrequencies(counts))
    assert "empty" in message(TokenFrequencies(counts * 0, hashed, "books"))

    TokenFrequencies(counts, hashed, "books").save(path)  # the negative control: this one is taken
    assert command(f"loss.general_corpus={path}", "loss.general_weight=0.5", "--check")[0] == 0


@pytest.mark.parametrize(
    "name, content, named",
    [
        ("a.safetensors", b"not one", "is not a frequency file"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.jsonl", b"{}", "plain text"),
    ],
)
def test_general_corpus(command, name, content, named):
    path = command.file(name, content)
    message = command.refused(f"loss.general_corpus={path}", "loss.general_weight=0.5")
    assert str(path) in message and named in message


# --- the output directory ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A real run of two steps, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    group = Group([Rank(["train", CONFIG, *RUN, f"training.output_dir={folder / 'run'}"])])
    assert group.wait() == [0], group.said
    return folder / "run"


RUN = [
    "loss.alpha=0.25",
    "training.seed=0",
    "training.max_steps=2",
    "evaluation.examples=0",
    "training.evaluate_every=2",
    "data.max_source_tokens=64",
]


def test_directory_of_another_run(command, finished):
    shutil.copytree(finished, command.output)
    stored = yaml.safe_load((command.output / "config.yaml").read_text())
    stored["training"]["output_dir"] = str(command.output)
    (command.output / "config.yaml").write_text(yaml.safe_dump(stored))

    message = command.refused(*RUN, "loss.alpha=0.75", "training.seed=4")
    assert str(command.output) in message and "name another output_dir" in message
    assert "loss.alpha: 0.25 there, 0.75 asked for" in message and "training.seed: 0 there, 4 asked for" in message
    assert "training.resume=never" in command.refused(*RUN, "training.resume=never")

    before = listing(command.output)  # the same configuration: done already, and left alone
    code, output, _ = command(*RUN)
    assert code == 0 and "is finished" in output
    assert listing(command.output) == before


@pytest.mark.parametrize("name", ["thesis.tex", "config.yaml"])
def test_directory_of_other_files(command, name):
    command.output.mkdir()
    (command.output / name).write_text("only: copy # with a comment")
    message = command.refused()
    assert f"training.output_dir={command.output}" in message and "name another" in message


def test_output_directory_that_is_a_file(command):
    command.output.write_text("a file")
    assert f"training.output_dir={command.output} is a file" in command.refused()
    assert f"training.output_dir={command.output}/run" in command.refused(f"training.output_dir={command.output}/run")


# --- real processes ---


@pytest.mark.parametrize(
    "overrides, named",
    [
        (["data.train=hub:owner/name:test_sft[:50%]"], ["hub:owner/name:test_sft[:50%]", "data.train=my.jsonl"]),
        (["model=null", "model.name_or_path=owner/model", "tokenizer=null"], ["owner/model", "could not be loaded"]),
        (["tokenizer={name_or_path: owner/tokenizer}"], ["owner/tokenizer", "could not be loaded"]),
    ],
    ids=["data", "model", "tokenizer"],
)
def test_hub_out_of_reach(tmp_path, overrides, named):
    """In a process that has imported the libraries as they are without a network."""
    group = Group([Rank(["train", CONFIG, f"training.output_dir={tmp_path}/run", *overrides])])
    assert group.wait() == [2]
    (said,) = group.said
    assert said.count("pdl: ") == 1 and "Traceback" not in said
    for text in named:
        assert text in said
    assert not list(tmp_path.iterdir())


# Each: what rank 0 and rank 1 are told besides what both are told, and what the one message must name. A rank runs in a
# folder of its own, with a cache of its own, as on two machines.
BETWEEN_RANKS = {
    "another alpha": ([], ["loss.alpha=0.5"], ["loss.alpha: ", "(rank 1) has 0.5"]),
    "another output directory": ([], ["training.output_dir=elsewhere"], ["training.output_dir: ", "(rank 1) has elsewhere"]),
    "another validation file of the same name": (["data.validation=mine.jsonl"], ["data.validation=mine.jsonl"], ["data.validation: ", "(rank 1) has"]),
    "one bad value": ([], ["loss.alpha=-1"], ["loss.alpha=-1.0"]),
    "a file that one rank lacks": (["data.train=only0.jsonl"], ["data.train=only0.jsonl"], ["data.train=only0.jsonl"]),
    "a line that one rank cannot read": (["data.train=bad1.jsonl"], ["data.train=bad1.jsonl"], ["data.train: ", "(rank 1) has"]),
    "a directory that rank 0 finds taken": (["training.output_dir=taken"], ["training.output_dir=taken"], ["training.output_dir=taken"]),
    "both alike": (["data.train=no.jsonl"], ["data.train=no.jsonl"], ["data.train=no.jsonl"]),
    "another vocabulary": ([], ["tokenizer.vocab_size=310"], ["tokenizer.vocab_size: ", "(rank 1) has 310"]),
    "a taken directory under --check": (["training.output_dir=taken", "--check"], ["training.output_dir=taken", "--check"], ["training.output_dir=taken"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """For each of two ranks a folder with the same names in it, and where it caches."""
    folders = [tmp_path_factory.mktemp(f"rank{rank}") for rank in (0, 1)]
    lines = [json.dumps(record) + "\n" for record in RECORDS]
    for rank, folder in enumerate(folders):
        (folder / "train.jsonl").write_text("".join(lines))
        (folder / "mine.jsonl").write_text("".join(lines[: 3 - rank]))
        (folder / "bad1.jsonl").write_text(lines[0] + ("{\n" if rank == 1 else lines[1]) + lines[2])
    (folders[0] / "only0.jsonl").write_text("".join(lines))
    (folders[0] / "taken").mkdir()
    (folders[0] / "taken" / "thesis.tex").write_text("the only copy")
    return [(folder, tmp_path_factory.mktemp("cache")) for folder in folders]


@pytest.mark.parametrize("case", BETWEEN_RANKS)
def test_all_ranks_end_with_code_2(machines, case):
    *told, named = BETWEEN_RANKS[case]
    both = [
        str(REPOSITORY / CONFIG), *SMALL, "training.max_steps=1", "training.output_dir=run", "data.train=train.jsonl",
        "data.validation=train.jsonl", "data.test=null", f"deepspeed={REPOSITORY}/configs/deepspeed/zero2.json",
    ]  # fmt: skip
    alone = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # on its machine
    before = [listing(folder) for folder, _ in machines]
    group = Group(
        [
            Rank(["train", *both, *mine], folder, alone | {"PDL_CACHE": str(cache)})
            for mine, (folder, cache) in zip(told, machines, strict=True)
        ]
    )
    assert group.wait(timeout=120) == [2, 2], group.said
    first, second = group.said
    assert first.count("pdl: ") == 1 and second.count("pdl: ") == 0
    assert "Traceback" not in first + second
    for text in named:
        assert text in first
    assert [listing(folder) for folder, _ in machines] == before
