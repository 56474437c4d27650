"""A run goes on on another number of ranks: the same state bit for bit, the same losses to rounding.

Real processes, gloo and DeepSpeed. A chain of numbers of ranks is gone through: on each the checkpoint of the one before is
loaded, training goes on for `STEPS`, saves an ordinary checkpoint, and trains `ONWARD` steps more, once straight on and once
resumed from that checkpoint. The next one is compared with both.
"""

import itertools
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from distributed.forked import Group, Rank
from safetensors.torch import load_file, save_file

from pdl.config import Config, TrainingConfig, UserError
from pdl.reshard import load_universal, tensors_only, to_universal

VOCABULARY, DECAY, STEPS, ONWARD = 97, 0.1, 3, 2
FAST_CHAIN, SLOW_CHAIN = (2, 1, 2), (1, 2, 4, 1)
# Sizes are odd, so that parameters do not divide by the ranks.
_FAMILIES = {
    "t5": {"d_model": 33, "d_kv": 8, "d_ff": 65, "num_layers": 1, "num_heads": 3, "dropout_rate": 0.0},
    "llama": {"hidden_size": 33, "intermediate_size": 65, "num_hidden_layers": 1, "num_attention_heads": 3}
    | {"num_key_value_heads": 1, "head_dim": 10, "tie_word_embeddings": False},
}
# The shipped stages, and: every parameter sharded, many groups of them on each rank, what is kept on the CPU.
_SHARDING = {
    **{name: json.loads((REPOSITORY / f"configs/deepspeed/{name}.json").read_text()) for name in ("zero0", "zero1", "zero2", "zero3")},
    "zero3-all": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "zero3-groups": {"zero_optimization": {"stage": 3, "sub_group_size": 2000}},
    "zero1-offload": {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
    "zero2-offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "zero3-offload": json.loads((REPOSITORY / "configs/deepspeed/zero3_offload.json").read_text()),
}  # fmt: skip


def case(family: str, precision: str, sharding: str) -> dict:
    return {"family": family, "precision": precision, "sharding": sharding, "name": f"{family}-{precision}-{sharding}"}


FAST = [
    case("t5", "fp32", "zero0"), case("t5", "fp32", "zero2"), case("t5", "fp32", "zero3-all"),
    case("llama", "bf16", "zero1"), case("llama", "bf16", "zero3"),
]  # fmt: skip
SLOW = [
    case(*settings)
    for settings in itertools.product(_FAMILIES, ("fp32", "bf16"), _SHARDING)
    if settings[1:] != ("bf16", "zero0")  # refused by the configuration
]


# --- in the processes of the ranks ---


def build(family: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "decoder_start_token_id": 0}
    settings = AutoConfig.for_model(family, vocab_size=VOCABULARY, **special, **_FAMILIES[family])
    auto = AutoModelForSeq2SeqLM if settings.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(7)
    return auto.from_config(settings, dtype=torch.float32)


def engine_of(model: torch.nn.Module, wanted: dict, directory: Path, *, universal: bool = False):
    """The engine of a run with these settings, with our AdamW: weight decay on matrices only."""
    from pdl import distributed
    from pdl.model import adamw, deepspeed_settings, initialize_engine

    path, ranks = directory / f"{wanted['sharding']}.json", distributed.world_size()
    if distributed.rank() == 0:
        path.write_text(json.dumps(_SHARDING[wanted["sharding"]]))
    distributed.gathered(None)
    training = TrainingConfig(
        global_batch_size=8, micro_batch_size=8 // ranks, max_grad_norm=1.0,
        learning_rate=1e-2, weight_decay=DECAY, precision=wanted["precision"],
    )  # fmt: skip
    config = Config(training=training, deepspeed=str(path))
    return initialize_engine(model, adamw(model, config), deepspeed_settings(config, ranks, universal=universal))


def train(engine, first: int, count: int) -> list[float]:
    """The losses of some steps, on batches that only the step decides."""
    from pdl import distributed

    ranks, tokens, losses = distributed.world_size(), engine.module.config.vocab_size, []
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        ids, labels = torch.randint(2, tokens, (2, 8, 9), generator=generator)[:, distributed.rank() :: ranks]
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        more = {"decoder_input_ids": ids} if engine.module.config.is_encoder_decoder else {}
        logits = engine(input_ids=ids, **more).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum") / 72
        engine.backward(loss * ranks, scale_wrt_gas=False)
        engine.step()
        losses.append(distributed.summed(loss).item())
    return losses


def state_of(engine, stage: int) -> dict[str, torch.Tensor]:
    """Whole on every rank: each parameter as the model holds it, its master weights and its moments; the step counts."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer, state = engine.optimizer, {}
    if stage in (1, 2):  # DeepSpeed links the moments after the first group's first step, when others have none yet
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter] if stage == 3 else []):
            state[f"{name}/held"] = parameter.detach().clone()
        if stage == 0:
            whole = [parameter.detach(), *(optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq"))]
        else:
            moments = [safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")]
            whole = [safe_get_full_fp32_param(parameter), *moments]
        for key, value in zip(("master", "exp_avg", "exp_avg_sq"), whole, strict=True):
            state[f"{name}/{key}"] = value.detach().clone()
    steps = {float(state["step"]) for state in optimizer.state.values()}
    (state["step"],) = (torch.tensor(step) for step in steps)  # one for all parameters
    state["decays"] = torch.tensor([group["weight_decay"] for group in optimizer.param_groups])
    return state


def run(wanted: dict, directory: Path, leg: int) -> None:
    from pdl import distributed

    def keep(what: str, state: dict[str, torch.Tensor]) -> None:
        if distributed.rank() == 0:
            save_file(state, directory / f"{wanted['name']}-{leg}-{what}.safetensors")

    stage = _SHARDING[wanted["sharding"]]["zero_optimization"]["stage"]
    source = directory / f"{wanted['name']}-{leg - 1}"
    engine = engine_of(build(wanted["family"]), wanted, directory, universal=leg > 0 and stage > 0)
    if leg > 0 and stage > 0:
        load_universal(engine, source.with_name(f"{source.name}-universal"))
    elif leg > 0:
        engine.load_checkpoint(str(source), tag="engine")
    if leg > 0:
        keep("loaded", state_of(engine, stage))
    first = leg * STEPS
    losses = train(engine, first, STEPS)
    checkpoint = directory / f"{wanted['name']}-{leg}"
    engine.save_checkpoint(str(checkpoint), tag="engine", save_latest=False)
    keep("saved", state_of(engine, stage))
    onward = train(engine, first + STEPS, ONWARD)
    engine.destroy()
    engine = engine_of(build(wanted["family"]), wanted, directory)
    with tensors_only():
        engine.load_checkpoint(str(checkpoint), tag="engine")
    resumed = train(engine, first + STEPS, ONWARD)
    engine.destroy()
    if distributed.rank() == 0:
        logged = {"losses": losses, "onward": onward, "resumed": resumed}
        (directory / f"{wanted['name']}-{leg}.losses.json").write_text(json.dumps(logged))


# --- in the process of pytest ---


def run_all(told: list) -> None:
    from pdl import distributed

    directory, leg = Path(told[0]), told[1]
    distributed.start()
    for wanted in json.loads((directory / "cases.json").read_text()):
        run(wanted, directory, leg)
    distributed.stop()


def _gone_through(cases: list[dict], chain: tuple[int, ...], directory: Path) -> Path:
    (directory / "cases.json").write_text(json.dumps(cases))
    for leg, ranks in enumerate(chain):
        ended = Group([Rank([str(directory), leg])] * ranks, run_all)
        assert ended.wait(1800) == [0] * ranks, ended.said
        for wanted in cases:
            if wanted["sharding"] != "zero0" and leg < len(chain) - 1:
                checkpoint = directory / f"{wanted['name']}-{leg}"
                to_universal(checkpoint, checkpoint.with_name(f"{checkpoint.name}-universal"))
    return directory


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    return _gone_through(FAST, FAST_CHAIN, tmp_path_factory.mktemp("reshard"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return _gone_through(SLOW, SLOW_CHAIN, tmp_path_factory.mktemp("reshard-slow"))


def _check(directory: Path, wanted: dict, leg: int) -> None:
    saved = load_file(directory / f"{wanted['name']}-{leg - 1}-saved.safetensors")
    loaded = load_file(directory / f"{wanted['name']}-{leg}-loaded.safetensors")
    assert saved.keys() == loaded.keys()
    assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == []
    assert saved["step"] == leg * STEPS
    assert saved["decays"].tolist() == pytest.approx([DECAY, 0.0])
    for name in loaded:
        if name.endswith("/held"):
            assert torch.equal(loaded[name], loaded[name.replace("/held", "/master")].to(loaded[name].dtype))
    before, after = (
        json.loads((directory / f"{wanted['name']}-{number}.losses.json").read_text()) for number in (leg - 1, leg)
    )
    tolerance = 1e-6 if wanted["precision"] == "fp32" else 1e-3  # bf16 gradients are summed in another order
    assert after["losses"][:ONWARD] == pytest.approx(before["onward"], rel=tolerance)
    assert after["resumed"] == after["onward"]


@pytest.mark.parametrize("leg", range(1, len(FAST_CHAIN)), ids=lambda leg: f"{FAST_CHAIN[leg - 1]}to{FAST_CHAIN[leg]}")
@pytest.mark.parametrize("wanted", FAST, ids=lambda wanted: wanted["name"])
def test_another_number_of_ranks(fast, wanted, leg):
    _check(fast, wanted, leg)


@pytest.mark.slow
@pytest.mark.parametrize("leg", range(1, len(SLOW_CHAIN)), ids=lambda leg: f"{SLOW_CHAIN[leg - 1]}to{SLOW_CHAIN[leg]}")
@pytest.mark.parametrize("wanted", SLOW, ids=lambda wanted: wanted["name"])
def test_every_sharding(slow, wanted, leg):
    _check(slow, wanted, leg)


class Attack:
    """What a pickle does when it is loaded as Python loads it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def copied(fast, tmp_path):
    """A checkpoint to damage: ZeRO-3, written on two ranks."""
    return Path(shutil.copytree(fast / "t5-fp32-zero3-all-0", tmp_path / "checkpoint"))


def test_no_code_of_a_checkpoint_runs(copied, tmp_path):
    path = copied / "engine" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    stored = torch.load(path, weights_only=False)
    torch.save(stored | {"more": Attack(tmp_path / "ran")}, path)
    with pytest.raises(UserError, match="cannot be converted for another number of ranks: Weights only load failed"):
        to_universal(copied, tmp_path / "universal")
    with tensors_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=False)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


def test_what_cannot_be_converted_is_refused_and_leaves_nothing(fast, copied, tmp_path):
    engine, target = copied / "engine", tmp_path / "universal"
    shard = engine / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (engine / "offloaded_tensors").mkdir()
    with pytest.raises(UserError, match="offloaded to NVMe"):
        to_universal(copied, target)
    (engine / "offloaded_tensors").rmdir()
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(UserError, match="cannot be converted"):
        to_universal(copied, target)
    shard.unlink()
    with pytest.raises(UserError, match="the optimizer states of 1 ranks are there, and 2 wrote it"):
        to_universal(copied, target)
    with pytest.raises(UserError, match="the optimizer states of 0 ranks are there"):
        to_universal(fast / "t5-fp32-zero0-0", target)
    with pytest.raises(UserError, match="DeepSpeed's files are missing"):
        to_universal(tmp_path, target)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_conversion_is_silent(fast, tmp_path, capfd):
    for wanted in ("t5-fp32-zero2-0", "t5-fp32-zero3-all-0"):
        to_universal(fast / wanted, tmp_path / wanted)
    assert capfd.readouterr() == ("", "")
