"""An exported checkpoint is, byte for byte, the model that the run itself exports at that step."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, environment
from distributed import models
from distributed.forked import Group, Rank
from test_reshard import Attack, case, engine_of, train

from pdl.commands import export as export_command
from pdl.config import UserError
from pdl.export import export_checkpoint

# Tied, tied in part, with a buffer (BART's bias of the logits), with rotary frequencies that stay in float32.
FAST = [
    case("t5", "fp32", "zero0"), case("t5-untied", "bf16", "zero1"), case("bart", "bf16", "zero2"),
    case("t5", "bf16", "zero3-all"), case("t5-untied", "fp32", "zero3-groups"), case("bart", "bf16", "zero3"),
    case("llama", "bf16", "zero3-all"),
]  # fmt: skip
SLOW = [
    *FAST,
    *[
        case(family, precision, sharding)
        for family in (*models.FAMILIES, "t5-untied")
        for precision, sharding in (("fp32", "zero0"), ("fp32", "zero1"), ("bf16", "zero2"), ("bf16", "zero3-all"))
        if case(family, precision, sharding) not in FAST
    ],
]


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    known = Tokenizer(WordLevel({"<pad>": models.PAD, "</s>": models.EOS, "a": 2}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=known, pad_token="<pad>", eos_token="</s>")


def run(wanted: dict, directory: Path) -> None:
    """Train a little, save a checkpoint, export."""
    from pdl import distributed
    from pdl.export import export_model
    from pdl.loss_head import LossHead
    from pdl.model import describe_model

    model = models.build(wanted["family"])
    LossHead.attach(model)
    engine = engine_of(model, wanted, directory)
    train(engine, 0, 2)
    checkpoint = directory / wanted["name"]
    engine.save_checkpoint(str(checkpoint), tag="engine", save_latest=False)
    first = distributed.rank() == 0
    if first:
        describe_model(model, tokenizer(), checkpoint / "model")
    export_model(checkpoint.with_name(f"{checkpoint.name}-run"), engine, tokenizer(), writes=first)
    engine.destroy()


def run_all(told: list) -> None:
    from pdl import distributed

    directory = Path(told[0])
    distributed.start()
    for wanted in json.loads((directory / "cases.json").read_text()):
        run(wanted, directory)
    distributed.stop()


def _trained(cases: list[dict], ranks: int, directory: Path) -> Path:
    (directory / "cases.json").write_text(json.dumps(cases))
    ended = Group([Rank([str(directory)])] * ranks, run_all)
    assert ended.wait(1800) == [0] * ranks, ended.said
    return directory


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    return _trained(FAST, 2, tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module", params=[1, 4], ids=lambda ranks: f"{ranks}ranks")
def slow(request, tmp_path_factory):
    return _trained(SLOW, request.param, tmp_path_factory.mktemp("export-slow"))


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _check(directory: Path, wanted: dict, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    export_checkpoint(directory / wanted["name"], target)
    assert not torch.distributed.is_initialized()
    expected = _files(directory / f"{wanted['name']}-run" / "model")
    written = _files(target)
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= written.keys()
    assert [name for name in expected | written if expected.get(name) != written.get(name)] == []
    auto = AutoModelForSeq2SeqLM if wanted["family"].startswith(("t5", "bart")) else AutoModelForCausalLM
    model, report = auto.from_pretrained(target, output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == (torch.bfloat16 if wanted["precision"] == "bf16" else torch.float32)
    AutoTokenizer.from_pretrained(target)


@pytest.mark.parametrize("wanted", FAST, ids=lambda wanted: wanted["name"])
def test_export_equals_the_runs_own(fast, tmp_path, wanted):
    _check(fast, wanted, tmp_path / "exported")


@pytest.mark.slow
@pytest.mark.parametrize("wanted", SLOW, ids=lambda wanted: wanted["name"])
def test_every_kind_of_model(slow, tmp_path, wanted):
    _check(slow, wanted, tmp_path / "exported")


# --- what is refused ---


@pytest.fixture
def copied(fast, tmp_path):
    """A checkpoint to damage: ZeRO-3, written on two ranks."""
    return Path(shutil.copytree(fast / "t5-bf16-zero3-all", tmp_path / "checkpoint"))


def test_no_code_of_a_checkpoint_runs(copied, tmp_path):
    for name in ("bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        path = copied / "engine" / name
        stored = torch.load(path, weights_only=False)
        torch.save(stored | {"more": Attack(tmp_path / "ran")}, path)
        with pytest.raises(UserError, match="cannot be read: Weights only load failed"):
            export_checkpoint(copied, tmp_path / "exported")
        assert not (tmp_path / "ran").exists()
        torch.save(stored, path)


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(copied, tmp_path):
    target, engine = tmp_path / "exported", copied / "engine"
    with pytest.raises(UserError, match="exists already"):
        export_checkpoint(copied, tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        export_checkpoint(tmp_path / "nothing", target)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        export_checkpoint(copied, tmp_path / "file" / "exported")
    (tmp_path / "file").unlink()
    shard = engine / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(UserError, match="cannot be read"):
        export_checkpoint(copied, target)
    shard.unlink()  # as on one of several nodes without a shared file system
    with pytest.raises(UserError, match="Expected 2 of"):
        export_checkpoint(copied, target)
    (engine / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        export_checkpoint(copied, target)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


# --- the command ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of the sample, in one process, with checkpoints at steps 1 and 2."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    small = [
        "model.d_model=32", "model.d_kv=8", "model.d_ff=32", "model.num_layers=1", "model.num_decoder_layers=1", "evaluation.examples=0",
        "training.max_steps=2", "training.save_every=1", "training.global_batch_size=8", "deepspeed=tests/distributed/zero3.json",
    ]  # fmt: skip
    ended = pdl("train", "configs/summarization/sample.yaml", *small, f"training.output_dir={directory}")
    assert ended.returncode == 0, ended.stderr
    return directory


def pdl(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pdl", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=600)


def test_a_run_directory_is_its_newest_whole_checkpoint(finished, tmp_path):
    ended = pdl("export", finished, tmp_path / "exported")
    newest = finished / "checkpoints" / "step-00000002"
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"{newest} exported to {tmp_path / 'exported'}\n"
    assert _files(tmp_path / "exported") == _files(finished / "model")


def test_a_damaged_checkpoint_is_refused(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    older, newest = sorted((run / "checkpoints").iterdir())
    weights = newest / "engine" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)

    def export(path: Path) -> tuple[int, str]:
        code = export_command.main(argparse.Namespace(checkpoint=path, target=tmp_path / "exported"))
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    code, said = export(newest)
    assert code == 2
    assert said.startswith(f"pdl: {newest} is not a whole checkpoint\n  - engine/{weights.name} ")
    assert export(run / "nothing") == (2, f"pdl: {run / 'nothing'} is not a directory\n")
    assert not (tmp_path / "exported").exists()
    assert export(run) == (0, f"{older} exported to {tmp_path / 'exported'}\n")
