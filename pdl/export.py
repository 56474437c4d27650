"""The trained model as others use it: a directory of safetensors that `AutoModel*.from_pretrained` loads.

From the engine at the end of a run, or from a checkpoint: both write the same files.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from pdl.config import UserError, first_line
from pdl.model import auto_class
from pdl.reshard import tensors_only
from pdl.storage import sync_directory, sync_tree


def export_model(directory: Path, engine, tokenizer, writes: bool) -> None:
    """Write `model/` (safetensors and tokenizer) in the precision of training, in place of one that is there. A collective.

    writes: whether this rank does. Without a shared file system one rank of each node does.
    """
    import deepspeed

    state, seen = {}, {}
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        first = seen.setdefault(id(tensor), name)
        # ZeRO-3 holds a shard of each parameter; one at a time is gathered, so only a rank that writes holds the whole model.
        with deepspeed.zero.GatheredParameters([tensor] if hasattr(tensor, "ds_id") else [], modifier_rank=None):
            if writes:
                state[name] = state[first] if first in state else tensor.detach().to("cpu", copy=True)
    if writes:
        _write(directory / "model", engine.module, state, tokenizer.save_pretrained)


def export_checkpoint(checkpoint: Path, target: Path) -> None:
    """Write to `target` what `export_model` wrote, or would have written, at the step of a checkpoint.

    In one process, without a GPU or a process group, and without running code from the checkpoint. checkpoint: DeepSpeed's
    files in `engine/`, of any stage, precision and number of ranks; configuration and tokenizer in `model/`. Raises UserError
    when `target` exists, and for a checkpoint that cannot be read.
    """
    from transformers import AutoConfig

    if target.exists():
        raise UserError(f"{target} exists already; name another directory")
    try:
        state = _state_of(checkpoint)
        settings = AutoConfig.from_pretrained(checkpoint / "model")
        with torch.device("meta"):  # names, tied weights and a class; the values are in `state`
            model = auto_class(settings).from_config(settings)
    except Exception as error:  # pickle, zipfile, torch, DeepSpeed and transformers have errors of their own
        raise UserError(f"{checkpoint} cannot be read: {first_line(error)}") from error
    try:
        _write(target, model, state, lambda made: shutil.copytree(checkpoint / "model", made, dirs_exist_ok=True))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target} cannot be written: {first_line(error)}") from error


def _state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The state dict as training held it, whole and on the CPU; tied weights are one tensor under several names.

    What is tied is what was in training: a configuration does not always say (T5's always says tied).
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    engine, quiet = checkpoint / "engine", io.StringIO()
    path = engine / "zero_pp_rank_0_mp_rank_00_model_states.pt"  # stage 3: one for each rank, parameters left out
    sharded = path.exists()
    state, seen = {}, {}
    with tensors_only(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        stored = torch.load(path if sharded else engine / "mp_rank_00_model_states.pt", map_location="cpu", mmap=True)
        if sharded:  # in float32, and each put together only when asked for
            masters = get_fp32_state_dict_from_zero_checkpoint(checkpoint, "engine", lazy_mode=True)
        for name, held in stored["module"].items():
            if sharded and name not in stored["buffer_names"]:
                first = seen.setdefault(id(masters[name]), name)
                state[name] = state[first] if first in state else masters[name].contiguous().to(held.dtype)
            else:
                first = seen.setdefault(held.data_ptr(), name)
                state[name] = state[first] if first in state else held.clone()
    return state


def _write(target: Path, model, state: dict[str, torch.Tensor], describe: Callable[[Path], object]) -> None:
    """Write `target` whole or not at all. model: for its class and configuration. describe: writes the rest beside the weights."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    # transformers lets rank 0 alone write; without a shared file system one rank of each node is called here.
    model.should_save_on_this_rank = lambda is_main_process: True
    try:
        model.save_pretrained(partial, state_dict=state)
        describe(partial)
        sync_tree(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        sync_directory(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
