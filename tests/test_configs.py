"""What is shipped works: every config loads and trains, and every path and command of the READMEs exists."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from distributed.forked import Group, Rank

from pdl.__main__ import main
from pdl.config import load_config
from pdl.frequencies import TokenFrequencies
from pdl.records import load_recipe
from pdl.tokenizer import train_tokenizer

TASKS = ["summarization", "dialogue", "style_transfer", "code_generation"]
# The public data set of each task's real config, and the family of its model.
REAL = {"summarization": "dialogsum", "dialogue": "everyday_conversations", "style_transfer": "coedit", "code_generation": "mbpp"}  # fmt: skip
CONFIGS = sorted((REPOSITORY / "configs").glob("*/*.yaml"))


def sample_records(task: str, split: str) -> list[dict]:
    path = REPOSITORY / "recipes" / task / "sample" / f"{split}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # where the paths of the configs lead from


# --- loading ---


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_config_loads(path):
    for ranks in (1, 2) if path.stem == "sample" else (1, 2, 4, 8):
        config = load_config(path, world_size=ranks)
    assert config.task == path.parent.name and config.loss.name == "power_law"
    if path.stem != "sample":
        assert config.data.train.startswith("hub:") and config.data.validation.startswith("hub:")
        assert config.model.name_or_path and config.training.precision == "bf16" and config.zero_stage in (2, 3)


def test_each_task_has_a_sample_and_a_real_config():
    stems = {task: {path.stem for path in CONFIGS if path.parent.name == task} for task in TASKS}
    assert stems == {task: {"sample", REAL[task]} for task in TASKS}


# --- what the recipes make of records ---


def test_dialogue_learns_each_reply_from_all_turns_before_it():
    examples = load_recipe("dialogue").examples
    turns = [("Ann", " Is it late? "), ("Bo", "By an hour."), ("Bo", "Sorry."), ("Ann", "")]
    assert list(examples({"turns": [{"speaker": speaker, "text": text} for speaker, text in turns]})) == [
        ("A: Is it late?\nB:", " By an hour.", ("By an hour.",)),
        ("A: Is it late?\nB: By an hour.\nB:", " Sorry.", ("Sorry.",)),
        ("B: Is it late?\nA: By an hour.\nA: Sorry.\nB:", "", ("",)),  # an empty target, dropped and counted later
    ]
    only = [("A: Is it late?\nB:", " By an hour.", ("By an hour.",))]
    assert list(examples({"dialog": ["Is it late?", "By an hour."]})) == only
    assert list(examples({"source": "Is it late?", "target": "By an hour."})) == only
    assert list(examples({"dialog": [" ", "By an hour."]})) == [("B:", " By an hour.", ("By an hour.",))]
    assert not list(examples({"dialog": ["Is it late?"]})) and not list(examples({"dialog": []}))


def test_dialogue_learns_only_the_assistants_messages():
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": f"{role} {place}"} for place, role in enumerate(roles)]
    assert [
        (example.source, example.target) for example in load_recipe("dialogue").examples({"messages": messages})
    ] == [
        ("A: user 1\nB:", " assistant 2"),
        ("A: user 1\nB: assistant 2\nA: user 3\nB:", " assistant 4"),
    ]


def test_code_keeps_its_indentation_and_lines():
    code = "    total = 0\r\n\r\n\tif x:\r        return  1\n\n"
    (example,) = load_recipe("code_generation").examples({"source": " Sum.\n\nAll of it. \n", "target": code})
    assert example.source == "# Sum.\n#\n# All of it.\n"
    assert example.target == "    total = 0\n\n\tif x:\n        return  1\n\n" == example.references[0]


def test_summaries_may_have_several_references():
    examples = load_recipe("summarization").examples
    assert list(examples({"source": "s", "summary1": "one", "summary2": "two", "summary3": None})) == [
        ("s", "one", ("one", "two"))
    ]
    assert list(examples({"source": "s", "target": "t", "id": "x1"})) == [("s", "t", ("t",))]


def test_style_transfer_leaves_the_tag_of_the_target_style_out():
    assert list(load_recipe("style_transfer").examples({"source": "<BBE> And he saith", "target": "And he said"})) == [
        ("And he saith", "And he said", ("And he said",))
    ]


# --- two steps of each, by overrides alone ---


def dialogsum(split: str) -> list[dict]:
    records = sample_records("summarization", split)
    return [{"id": r["id"], "dialogue": r["document"], "summary": r["summary"], "topic": "news"} for r in records]


def everyday_conversations(split: str) -> list[dict]:
    roles = {"A": "user", "B": "assistant"}
    return [
        {"messages": [{"role": roles[turn["speaker"]], "content": turn["text"]} for turn in record["turns"]]}
        for record in sample_records("dialogue", split)
    ]


def coedit(split: str) -> list[dict]:
    records = sample_records("style_transfer", split)
    return [{"_id": r["id"], "task": "simplification", "src": f"Make this plain: {r['source']}", "tgt": r["target"]} for r in records]  # fmt: skip


def mbpp(split: str) -> list[dict]:
    return [
        {"task_id": i, "text": r["prompt"], "code": r["code"].replace("\n", "\r\n"), "test_list": r["tests"]}
        for i, r in enumerate(sample_records("code_generation", split))
    ]


def write_pretrained(directory: Path, task: str) -> None:
    """A tiny model of the real config's family with its tokenizer, as the hub would give it: more rows than tokens."""
    from transformers import (
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    texts = [text for record in sample_records(task, "train") for text in re.findall(r'"((?:[^"\\]|\\.)*)"', json.dumps(record))]  # fmt: skip
    train_tokenizer(texts, 400, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = {"vocab_size": len(tokenizer) + 28, "eos_token_id": tokenizer.eos_token_id}
    t5 = {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1}
    t5 |= {"pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
    decoder = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}  # fmt: skip
    torch.manual_seed(0)
    match task:
        case "dialogue":  # SmolLM2 ties its embeddings, has no padding token, and begins texts with what ends them
            model = LlamaForCausalLM(LlamaConfig(**decoder, **rows, bos_token_id=rows["eos_token_id"], tie_word_embeddings=True))  # fmt: skip
            tokenizer.pad_token, tokenizer.bos_token = None, tokenizer.eos_token
            tokenizer.save_pretrained(directory)
        case "code_generation":
            model = Qwen2ForCausalLM(Qwen2Config(**decoder, **rows, tie_word_embeddings=True))
        case _:  # FLAN-T5 has a gated feed-forward, and its checkpoint an output embedding of its own
            model = T5ForConditionalGeneration(T5Config(**t5, **rows, feed_forward_proj="gated-gelu"))
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(directory)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> dict[str, Path]:
    """The run directory of two steps of every config: the samples on one process, the real ones on two ranks."""
    folder = tmp_path_factory.mktemp("two_steps")
    directories = {}
    for task in TASKS:
        groups = []
        for name, ranks in (("sample", 1), ("real", 2)):  # side by side
            directories[f"{task}/{name}"] = output = folder / task / name
            path = f"configs/{task}/{'sample' if name == 'sample' else REAL[task]}.yaml"
            overrides = ["training.max_steps=2", "evaluation.examples=2", f"training.output_dir={output}"]
            overrides += local_overrides(folder / task, task, path) if name == "real" else []
            groups.append(Group([Rank(["train", path, *overrides])] * ranks))
        for group in groups:
            assert not any(group.wait()), "\n".join(group.said)
    return directories


def local_overrides(folder: Path, task: str, path: str) -> list[str]:
    """What makes a real config small: a model and data that are here, and a rate that moves bf16 weights in two steps."""
    write_pretrained(folder / "pretrained", task)
    overrides = [
        f"model.name_or_path={folder / 'pretrained'}", "training.epochs=null", "training.learning_rate=0.01",
        "training.warmup_steps=0", "training.global_batch_size=8", "training.micro_batch_size=2",
    ]  # fmt: skip
    data = yaml.safe_load((REPOSITORY / path).read_text())["data"]
    for split in {"train", "validation", "test"} & set(data):
        local = folder / f"{split}.jsonl"
        local.write_text("".join(json.dumps(record) + "\n" for record in globals()[REAL[task]](split)))
        overrides.append(f"data.{split}={local}")
    return overrides


@pytest.mark.parametrize("name", ["sample", "real"])
@pytest.mark.parametrize("task", TASKS)
def test_two_steps(task, name, two_steps):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    directory = two_steps[f"{task}/{name}"]
    config = yaml.safe_load((directory / "config.yaml").read_text())
    report = json.loads((directory / "report.json").read_text())
    assert json.loads((directory / "status.json").read_text())["state"] == "done"
    assert config["deepspeed"] == f"configs/deepspeed/zero{report['zero_stage']}.json"
    assert report["steps"] == 2 and report["ranks"] == (1 if name == "sample" else 2)
    before, after = (report[f"{when}_validation"]["validation/cross_entropy"] for when in ("first", "last"))
    assert 0 < after != before > 0
    assert all(0 <= score < float("inf") for score in report["scores"].values()) and len(report["scores"]) >= 3

    saved = directory / "model"
    kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(saved).is_encoder_decoder else AutoModelForCausalLM
    assert (kind is AutoModelForSeq2SeqLM) == (task in ("summarization", "style_transfer"))
    model, tokenizer = kind.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    head = model.get_output_embeddings().weight
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    if name == "real":
        assert config["training"]["precision"] == "bf16" and model.dtype == torch.bfloat16
        assert len(head) == len(tokenizer) + 28
        given = kind.from_pretrained(directory.parent / "pretrained").get_output_embeddings().weight
        assert not torch.equal(head.float(), given.bfloat16().float())


# --- whole runs of the samples ---


def unigram_entropy(counts: torch.Tensor) -> float:
    share = counts[counts > 0].double() / counts.sum()
    return float(-(share * share.log()).sum())


WHOLE = [pytest.param(task, [], marks=pytest.mark.slow, id=task) for task in TASKS]
QUICK = ["training.max_steps=40", "training.warmup_steps=10", "training.learning_rate=4e-3", "evaluation.examples=0"]
SHORT = pytest.param("style_transfer", QUICK, id="style_transfer-short")


@pytest.mark.parametrize(("task", "overrides"), [SHORT, *WHOLE])
def test_a_sample_run_learns_more_than_frequencies(task, overrides, tmp_path):
    """Unseen targets cost less than the entropy of the training targets: no model that knows only frequencies gets there."""
    path = f"configs/{task}/sample.yaml"
    group = Group([Rank(["train", path, f"training.output_dir={tmp_path}/run", *overrides])] * 2)
    assert group.wait(timeout=900) == [0, 0], group.said
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    entropy = unigram_entropy(TokenFrequencies.load(tmp_path / "run" / "frequencies.safetensors").counts)
    before, after = (report[f"{when}_validation"]["validation/cross_entropy"] for when in ("first", "last"))
    assert after < entropy < before


# --- the READMEs ---

DOCUMENTS = [
    path
    for path in (REPOSITORY / "README.md", REPOSITORY / "launch/README.md", *sorted(REPOSITORY.glob("recipes/*/README.md")))
    if path.exists()
]  # fmt: skip
ROOMS = [".ci", "configs", "launch", "pdl", "recipes", "tests"]
WRITTEN_BY_RUNS = {
    "config.yaml",
    "metrics.jsonl",
    "report.json",
    "status.json",
    "manifest.json",
    "frequencies.safetensors",
}
PATH = re.compile(
    rf"(?<![\w./:@-])((?:{'|'.join(map(re.escape, ROOMS))})/[\w.*{{}},/-]*|[\w-]+\.(?:py|toml|txt|jsonl?|yaml|sh|sbatch|md))\b"
)
OWN_FILE = re.compile(r"(?<![\w./])my[\w./-]*\.\w+")  # by convention: my.yaml, my_train.jsonl, my/train.jsonl
USAGE = re.compile(r"[<*\[…]|\.\.\.|CONFIG\.yaml|RUN_DIR|CHECKPOINT")  # a form of commands, not a command


def code_of(document: Path) -> tuple[list[str], list[str], str]:
    """The lines of code of a README (continued ones joined) and its code spans; its YAML blocks; the text around them."""
    text = document.read_text(encoding="utf-8")
    block = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    fenced, rest = block.findall(text), block.sub("", text)
    code = "".join([code for _, code in fenced] + re.findall(r"^ {4}.*\n", rest, re.MULTILINE))
    lines = [line.strip() for line in code.replace("\\\n", " ").splitlines()]
    return (
        lines + re.findall(r"`([^`\n]+)`", rest),
        [code for kind, code in block.findall(text) if kind == "yaml"],
        rest,
    )


def expanded(path: str) -> list[str]:
    """`zero{2,3}.json` as the two names it stands for."""
    found = re.search(r"\{([^{}]*)\}", path)
    if not found:
        return [path]
    before, after = path[: found.start()], path[found.end() :]
    return [name for choice in found[1].split(",") for name in expanded(before + choice + after)]


def exists(path: str, names: set[str]) -> bool:
    if path in WRITTEN_BY_RUNS or path == "CONFIG.yaml" or re.search(r"(^|/)my", path):
        return True
    return any(REPOSITORY.glob(path)) if "/" in path else path in names


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_paths_of_a_readme_exist(document):
    lines, _, text = code_of(document)
    names = {path.name for room in ROOMS for path in (REPOSITORY / room).rglob("*")}
    names |= {path.name for path in REPOSITORY.iterdir()}
    named = [path for line in lines for found in PATH.findall(line) for path in expanded(found)]
    links = re.findall(r"\]\(([^)#:\s]+)\)", text)
    assert named
    assert not [path for path in named if not exists(path, names)]
    assert not [link for link in links if not (document.parent / link).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_commands_of_a_readme_are_accepted(document, tmp_path, monkeypatch, capsys):
    """make targets exist; commands that train name configs, keys and values that load, on as many ranks as they say.

    Where a README shows YAML, that is the reader's my.yaml, otherwise a sample; the reader's data files are made up.
    """
    lines, configs, _ = code_of(document)
    task = document.parent.name if document.parent.name in TASKS else "summarization"
    config = configs[0] if configs else Path(f"configs/{task}/sample.yaml").read_text()
    for path in OWN_FILE.findall("\n".join([*lines, config])):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(config if path.endswith(".yaml") else "")
    for room in ("configs", "recipes"):
        (tmp_path / room).symlink_to(REPOSITORY / room)
    monkeypatch.chdir(tmp_path)
    commands = 0
    for line in lines:
        command = re.search(
            r"^(?:\$ )?((?:[A-Z_]+=\S+ )*(?:make|launch/\w+\.sh|(?:torchrun|deepspeed|python) .*-m pdl)(?: .*|$))", line
        )
        if not command or USAGE.search(line):
            continue
        words = shlex.split(command[1], comments=True)
        settings = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
        words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
        commands += 1
        if words[0] == "make":
            # The tests may run under make themselves; its variables would reach the one started here.
            clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
            plan = subprocess.run(
                ["make", "-n", "-C", REPOSITORY, *words[1:]], env=clean, capture_output=True, text=True
            )
            assert plan.returncode == 0, f"{line}\n{plan.stderr}"
            if not words[1:] or not words[1].startswith("train-"):
                continue
            sample = f"configs/{words[1].removeprefix('train-').replace('-', '_')}/sample.yaml"
            arguments = ["train", settings.get("CONFIG", sample), *shlex.split(settings.get("ARGS", ""))]
        elif words[0].startswith("launch/"):
            arguments = ["train", *words[1:]]
        else:
            arguments = ["train", *words[words.index("pdl") + 2 :]]  # other commands read configurations alike
        monkeypatch.setenv("WORLD_SIZE", str(int(settings.get("NPROC", 1)) * int(settings.get("NNODES", 1))))
        assert main([*arguments, "--print-config"]) == 0, f"{line}\n{capsys.readouterr().err}"
    assert commands
