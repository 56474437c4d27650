"""A checkpoint on another number of ranks, through DeepSpeed's universal form; and reading DeepSpeed's files safely.

ZeRO stages 1, 2 and 3: `to_universal` once, then `load_universal` on every rank. Stage 0 holds everything on every rank and
loads plainly.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.serialization import config as serialization

from pdl.config import UserError, first_line


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """Within it `torch.load`, DeepSpeed's calls with `weights_only=False` included, runs no code from a file.

    DeepSpeed's files are pickles: tensors, containers, and three classes of its own that hold plain values. A file with
    anything else raises `pickle.UnpicklingError`.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def member(enum: type, name: str):
        if enum is not ZeroStageEnum:
            raise pickle.UnpicklingError(f"getattr of {enum}")
        return enum[name]

    # Python 3.11 up to 3.11.3 writes a member of an enumeration as a call of getattr, which here can do nothing else.
    enumerations = [(member, "builtins.getattr"), (member, "__builtin__.getattr")]
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address, *enumerations]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def to_universal(checkpoint: Path, target: Path) -> None:
    """Convert a checkpoint of ZeRO stage 1-3 into DeepSpeed's universal form. In one process, without a process group.

    checkpoint: holds DeepSpeed's files in `engine/`. target: made here, whole or not at all, for `load_universal`; up to
    three times as large as the optimizer's states while it is made. Raises UserError for what cannot be converted.
    """
    from deepspeed.checkpoint import ds_to_universal

    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    settings = argparse.Namespace(
        input_folder=str(checkpoint / "engine"),
        output_folder=str(partial / "engine"),
        num_extract_workers=1,  # more would be processes forked from this one
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # a section for Megatron's layouts, which no other model has
    )
    quiet = io.StringIO()
    # What is only cut up and put together is not read as a whole, and needs no checksums, which take half of the time.
    files = serialization.patch({"load.mmap": True, "save.compute_crc32": False})
    try:
        with tensors_only(), files, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            _refuse_incomplete(checkpoint / "engine")
            ds_to_universal.main(settings)
    except Exception as error:  # asserts, KeyError, UnpicklingError, OSError and more
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{checkpoint} cannot be converted for another number of ranks: {first_line(error)}") from error
    partial.rename(target)


def _refuse_incomplete(engine: Path) -> None:
    """Raises ValueError for what DeepSpeed would convert in part, and not say so."""
    if (engine / "offloaded_tensors").exists():
        raise ValueError("its optimizer was offloaded to NVMe, which DeepSpeed's universal form leaves out")
    files = sorted(engine.glob("*_model_states.pt"))
    if not files:
        raise ValueError("DeepSpeed's files are missing")
    wrote = torch.load(files[0], map_location="cpu")["dp_world_size"]
    found = len(list(engine.glob("*_optim_states.pt")))
    if found != wrote:
        raise ValueError(f"the optimizer states of {found} ranks are there, and {wrote} wrote it")


def load_universal(engine, target: Path) -> None:
    """Load what `to_universal` wrote: weights, master weights, Adam's moments and step count. A collective.

    engine: made with `{"checkpoint": {"load_universal": true}}` among DeepSpeed's settings, of the stage and the optimizer
    that the checkpoint was written with. It saves ordinary checkpoints afterwards.
    """
    groups = engine.optimizer.param_groups
    decays = [group["weight_decay"] for group in groups]
    log = logging.getLogger("DeepSpeed")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns on every rank that this is no Megatron model
    try:
        with tensors_only(), serialization.patch("load.mmap", True):  # a rank reads its own part
            loaded, _ = engine.load_checkpoint(str(target), tag="engine")
    finally:
        log.setLevel(level)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed found no checkpoint in {target}")
    # At stage 3 DeepSpeed 0.19.8 gives every group the weight decay of the first, and all states the same step tensor, to
    # which the update of each group then adds one.
    for group, decay in zip(groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in engine.optimizer.state.values():
        if torch.is_tensor(state["step"]):
            state["step"] = state["step"].clone()
