"""What a run leaves on disk: its directory, its status, checkpoints to resume from, and the exported model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import yaml

from pdl import distributed
from pdl.config import Config, UserError, flattened
from pdl.frequencies import TokenFrequencies

# Settings that do not touch the numbers of a run, so a run may continue with others.
_MAY_CHANGE = {
    "training.log_every",
    "training.evaluate_every",
    "training.save_every",
    "training.keep_checkpoints",
    "training.resume",
    "training.output_dir",
    "evaluation.examples",
}


def write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, content: dict) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_status(
    directory: Path, state: str, exit_code: int | None = None, step: int | None = None, reason: str | None = None
) -> None:
    """`status.json`: launchers change exit codes, so rank 0 writes the true one down. state: running|done|refused|stopped|failed."""
    write_json(directory / "status.json", {"state": state, "exit_code": exit_code, "step": step, "reason": reason})


def read_status(directory: Path) -> dict:
    return json.loads((directory / "status.json").read_text(encoding="utf-8"))


def inspect_directory(config: Config) -> bool:
    """Whether the run that the configuration asks for is finished already. Reads only; for rank 0.

    Raises UserError when the output directory holds something else, or a run with another configuration.
    """
    directory = Path(config.training.output_dir)
    stored_path = directory / "config.yaml"
    if directory.exists() and not directory.is_dir():
        raise UserError(f"training.output_dir={directory} is a file")
    if not (stored_path.exists() and (directory / "status.json").exists()):
        if directory.exists() and any(directory.iterdir()):
            raise UserError(f"training.output_dir={directory} holds files that are not a run's; name another")
        return False
    if not (directory / "metrics.jsonl").exists() and not _checkpoints(directory):
        return False  # refused or ended before its first result: nothing to continue, nothing to lose
    if config.training.resume == "never":
        raise UserError(
            f"training.output_dir={directory} holds a run and training.resume=never; name another output_dir, or resume with auto"
        )
    stored = flattened(yaml.safe_load(stored_path.read_text(encoding="utf-8")))
    wanted = flattened(config.to_dict())
    changed = [key for key in stored | wanted if stored.get(key) != wanted.get(key) and key not in _MAY_CHANGE]
    if (
        changed == ["training.max_steps"]
        and stored["training.schedule_steps"]
        and (wanted["training.max_steps"] or 0) > (stored["training.max_steps"] or 0)
    ):
        changed = []  # a longer run on a schedule that was fixed beforehand
    if changed:
        differences = [f"{key}: {stored.get(key)!r} there, {wanted.get(key)!r} asked for" for key in changed]
        raise UserError(
            "\n  - ".join(
                [
                    f"training.output_dir={directory} holds a run with another configuration; name another output_dir",
                    *differences,
                ]
            )
        )
    status = read_status(directory)
    return status["state"] == "done" and status["step"] >= (config.training.max_steps or 0)


def claim_directory(config: Config, tokenizer, frequencies: TokenFrequencies, made_with: dict) -> None:
    """Begin or continue the run in its directory. For rank 0.

    A new run writes what it starts with: the resolved configuration, tokenizer, frequencies. One that can be continued
    keeps them. Raises UserError, having written nothing, when its newest checkpoint was made with something else
    (another number of ranks, data file, seed).
    """
    directory = Path(config.training.output_dir)
    step = None
    if newest := _checkpoints(directory)[-1:]:
        stored = json.loads((newest[0] / "run.json").read_text(encoding="utf-8"))
        step = stored["step"]
        differences = [
            f"{key}: {stored.get(key)!r} there, {value!r} now"
            for key, value in made_with.items()
            if stored.get(key) != value
        ]
        if differences:
            raise UserError("\n  - ".join([f"{newest[0]} cannot be continued here", *differences]))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_status(directory, "running", step=step)  # first: it tells a run's directory from others
        write_whole(directory / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
        if not newest:
            tokenizer.save_pretrained(directory / "tokenizer")
            frequencies.save(directory / "frequencies.safetensors")
    except OSError as error:
        raise UserError(f"training.output_dir={directory} cannot be written to: {error.strerror}") from error


def _checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first. One that was not finished still has its temporary name."""
    return sorted(directory.glob("checkpoints/step-????????"))


def save_checkpoint(directory: Path, engine, step: int, meter_sums: torch.Tensor, made_with: dict, keep: int) -> None:
    """Write `checkpoints/step-00000100/`, complete or not at all, and delete all but the newest `keep`. A collective.

    made_with: what must be the same at resume. Each rank adds its random state and its unlogged sums.
    """
    from safetensors.torch import save_file

    final = directory / "checkpoints" / f"step-{step:08d}"
    partial = final.with_name(f"partial-{final.name}")
    if distributed.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.gathered(None)  # a barrier that works on any backend
    engine.save_checkpoint(str(partial), tag="engine")
    rank_state = {"meter_sums": meter_sums.cpu(), "torch_rng": torch.get_rng_state()}
    if distributed.on_gpu():
        rank_state["cuda_rng"] = torch.cuda.get_rng_state()
    save_file(rank_state, str(partial / f"rank-{distributed.rank():05d}.safetensors"))
    distributed.gathered(None)
    if distributed.rank() == 0:
        write_json(partial / "run.json", {"step": step, **made_with})
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        for old in _checkpoints(directory)[:-keep]:
            shutil.rmtree(old)


def load_checkpoint(directory: Path, engine, meter_sums: torch.Tensor) -> int | None:
    """Continue from the newest checkpoint, which `claim_directory` found fit: engine, sums and random state of this rank.

    Returns its step, None without one. A collective.
    """
    from safetensors.torch import load_file

    newest = distributed.gathered([str(path) for path in _checkpoints(directory)[-1:]])[0]
    if not newest:
        return None
    newest = Path(newest[0])
    step = json.loads((newest / "run.json").read_text(encoding="utf-8"))["step"]
    loaded, _ = engine.load_checkpoint(str(newest), tag="engine")
    if loaded is None:
        raise RuntimeError(f"DeepSpeed found no checkpoint in {newest}")
    rank_state = load_file(newest / f"rank-{distributed.rank():05d}.safetensors")
    meter_sums.copy_(rank_state["meter_sums"])
    torch.set_rng_state(rank_state["torch_rng"])
    if distributed.on_gpu():
        torch.cuda.set_rng_state(rank_state["cuda_rng"])
    return step


def export_model(directory: Path, engine, tokenizer) -> None:
    """Write `model/` (safetensors and tokenizer) in the precision of training; `AutoModel*.from_pretrained` loads it. A collective."""
    import deepspeed

    final, partial = directory / "model", directory / ".model.partial"
    model = engine.module
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        # ZeRO-3 holds a shard of each parameter; one at a time is gathered, so memory stays that of the whole model on rank 0 only.
        with deepspeed.zero.GatheredParameters([tensor] if hasattr(tensor, "ds_id") else [], modifier_rank=None):
            if distributed.rank() == 0:
                state[name] = tensor.detach().to("cpu", copy=True)
    if distributed.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        shared = {}  # tied weights are one tensor again, so that save_pretrained writes them once
        for name, tensor in model.state_dict(keep_vars=True).items():
            first = shared.setdefault(id(tensor), name)
            state[name] = state[first]
        model.config.dtype = next(iter(model.parameters())).dtype
        model.save_pretrained(partial, state_dict=state)
        tokenizer.save_pretrained(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
    distributed.gathered(None)
