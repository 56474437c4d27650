"""The model, its optimizer, and the DeepSpeed engine around both."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
from pathlib import Path

import torch
from torch import nn

from pdl import distributed
from pdl.config import Config, UserError, first_line
from pdl.data import cache_directory


def load_model_config(config: Config, tokenizer):
    """The transformers config of the model, pretrained or new, with `model.dropout` applied.

    tokenizer: gives a new model its vocabulary and special tokens. Raises UserError for settings that the architecture
    does not know, and for a model that does not know all tokens or is too short for the data's length limits.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    model = config.model
    if model.name_or_path is not None:
        try:
            settings = AutoConfig.from_pretrained(model.name_or_path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model.name_or_path={model.name_or_path} could not be loaded: {first_line(error)}"
            ) from error
    else:
        if model.architecture not in CONFIG_MAPPING:
            raise UserError(
                f"model.architecture={model.architecture} is not a transformers model type, such as t5, bart, llama, qwen2"
            )
        known = CONFIG_MAPPING[model.architecture]
        allowed = set(known().to_dict()) | set(known.attribute_map)
        unknown = sorted(set(model.settings) - allowed)
        if unknown:
            raise UserError(
                f"model.architecture={model.architecture} has no setting {', '.join(unknown)}; it has {', '.join(sorted(allowed))}"
            )
        special = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "decoder_start_token_id": tokenizer.pad_token_id,
        }
        if "forced_eos_token_id" in allowed:  # BART's default is an id of its own tokenizer
            special["forced_eos_token_id"] = tokenizer.eos_token_id
        try:
            settings = AutoConfig.for_model(model.architecture, **{**special, **model.settings})
        except (TypeError, ValueError) as error:
            raise UserError(
                f"model.architecture={model.architecture} does not take these settings: {first_line(error)}"
            ) from error
    if model.dropout is not None:
        _set_dropout(settings, model.dropout)
    _check_size(settings, tokenizer, config)
    return settings


def _check_size(settings, tokenizer, config: Config) -> None:
    text, data = settings.get_text_config(), config.data
    if text.vocab_size < len(tokenizer):
        raise UserError(
            f"the model knows {text.vocab_size} tokens and the tokenizer has {len(tokenizer)}: they do not belong together"
        )
    lengths = (data.max_source_tokens, data.max_target_tokens)
    needed = max(lengths) if settings.is_encoder_decoder else sum(lengths)
    positions = getattr(text, "max_position_embeddings", None)  # None for T5, whose positions are relative
    if positions is not None and needed > positions:
        raise UserError(
            f"data.max_source_tokens={lengths[0]} and data.max_target_tokens={lengths[1]} need {needed} positions; "
            f"the {settings.model_type} model has {positions}"
        )


def _set_dropout(settings, rate: float) -> None:
    text = settings.get_text_config()
    names = [
        name
        for name in text.to_dict()
        if re.search(r"(^|_)dropout(_rate|_prob)?$|_pdrop$", name) and not name.startswith("classifier")
    ]
    if rate == 0:
        names += [name for name in text.to_dict() if name.endswith("layerdrop")]
    elif not names:
        raise UserError(f"model.dropout={rate} cannot be honoured: {type(text).__name__} has no dropout setting")
    for name in names:
        setattr(text, name, rate)


def auto_class(settings):
    """The transformers class that makes a language model of a config."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if settings.is_encoder_decoder else AutoModelForCausalLM


def load_model(config: Config, tokenizer) -> nn.Module:
    """The model in float32 on the CPU, the same on every rank. Raises UserError when it cannot be loaded."""
    settings = load_model_config(config, tokenizer)
    auto = auto_class(settings)
    torch.manual_seed(config.training.seed)  # new weights are drawn alike on every rank
    try:
        if config.model.name_or_path is not None:
            model = auto.from_pretrained(config.model.name_or_path, config=settings, dtype=torch.float32)
        else:
            model = auto.from_config(settings, dtype=torch.float32)
    except Exception as error:  # the hub, transformers and safetensors have errors of their own
        raise UserError(
            f"the model {config.model.name_or_path or config.model.architecture} could not be loaded: {first_line(error)}"
        ) from error
    rows, known = model.get_output_embeddings().weight.shape[0], settings.get_text_config().vocab_size
    if rows != known:
        raise UserError(
            f"the model's output layer has {rows} rows and its config says {known}: they do not belong together"
        )
    return model


def describe_model(model: nn.Module, tokenizer, directory: Path) -> None:
    """Write what `from_pretrained` needs beside the weights: the configurations of model and generation, the tokenizer."""
    model.config.dtype = next(model.parameters()).dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def decoder_start(model: nn.Module) -> int:
    """The first decoder input of an encoder-decoder. Raises UserError where the model does not say."""
    start = getattr(model.config, "decoder_start_token_id", None)
    start = model.generation_config.decoder_start_token_id if start is None else start
    if start is None:
        raise UserError(f"{type(model).__name__} has no decoder_start_token_id; set it in the config.json of the model")
    return start


def adamw(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices, not on biases and norms. On the CPU by DeepSpeed where the JSON offloads the optimizer."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decay = config.training.weight_decay
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not _offloads(config):
        return torch.optim.AdamW(groups, lr=config.training.learning_rate)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer = DeepSpeedCPUAdam(groups, lr=config.training.learning_rate, adamw_mode=True)

    def forget_powers(*_) -> None:
        # Its C++ part keeps beta^t as a running product, which a resumed run does not have, and differs in the last bits
        # from the power that it takes where the step is not the one after the last. So it takes the power in every step.
        nothing = [torch.empty(0)] * 4
        beta1, beta2 = optimizer.param_groups[0]["betas"]
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, 0, 0.0, beta1, beta2, 1e-8, 0.0, True, *nothing)

    optimizer.register_step_pre_hook(forget_powers)
    return optimizer


def _offloads(config: Config) -> bool:
    offload = config.deepspeed_sharding()["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def deepspeed_settings(config: Config, world_size: int, *, universal: bool = False, node_local: bool = False) -> dict:
    """The whole DeepSpeed configuration: sharding and offload from the JSON, everything else from ours.

    universal: checkpoints are loaded in the form that fits any number of ranks. node_local: each node writes its own.
    """
    settings = config.deepspeed_sharding() | {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation(world_size),
        "gradient_clipping": config.training.max_grad_norm,  # always written: DeepSpeed's default is 1.0
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "checkpoint": {"load_universal": universal, "use_node_local_storage": node_local},
    }
    if config.training.precision == "bf16":
        # Without fp32 accumulation and communication 64 micro-batches in bf16 are off by 1e-2.
        settings |= {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return settings


def check_sharding(config: Config) -> None:
    """Raises UserError for what DeepSpeed does not know inside `zero_optimization`."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**config.deepspeed_sharding()["zero_optimization"])
    except ValidationError as error:
        problems = [f"zero_optimization.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise UserError(
            "\n  - ".join([f"deepspeed={config.deepspeed} is not what DeepSpeed takes", *problems])
        ) from error


def build_extensions(config: Config) -> None:
    """Compile what DeepSpeed needs and the installation did not: its collectives for CPUs, its optimizer for offload.

    Left to DeepSpeed every process builds at once, and one that is killed meanwhile leaves a file named `lock` on which the
    next waits for ever. Here one process builds at a time, in a directory of our own: a `lock` found there is stale.
    """
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    needed = [] if distributed.on_gpu() else ["deepspeed_shm_comm"]
    needed += ["cpu_adam"] if _offloads(config) else []
    needed = [name for name in needed if name in ALL_OPS and not installed_ops.get(name)]
    if not needed:
        return
    directory = cache_directory() / f"torch_extensions-{torch.__version__}"
    os.environ["TORCH_EXTENSIONS_DIR"] = str(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".building").open("w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        for stale in directory.glob("*/lock"):
            stale.unlink()
        for name in needed:
            ALL_OPS[name].load(verbose=False)


def _unlink_shared_memory() -> None:
    """DeepSpeed never deletes the shared memory of its collectives for CPUs: 66 MiB of each rank stayed until the machine restarts.

    Every rank has mapped it when it returns from `init_distributed`, and needs its name no longer. A collective.
    """
    distributed.together(lambda: None)
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
    Path("/dev/shm", f"{name}_{distributed.rank()}").unlink(missing_ok=True)


@contextlib.contextmanager
def _without_compiler():
    """DeepSpeed decorates an optimizer that we do not use with torch.compile, whose backend takes a second to import."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def initialize_engine(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict):
    """A DeepSpeed engine around the model and its optimizer."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed casts the whole module to bf16, rotary frequencies included, which transformers keeps in float32 when it
    # loads the exported model: the positions would differ between training and use.
    rotary = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    deepspeed.init_distributed(dist_backend=distributed.backend(), verbose=False)
    _unlink_shared_memory()
    with _without_compiler():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    for name, buffer in rotary.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        module._buffers[attribute] = buffer.to(distributed.device())
    return engine
