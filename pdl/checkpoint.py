"""Checkpoints: written whole or not at all, resumed from only when whole.

A checkpoint is `checkpoints/step-00000100/` with DeepSpeed's files (`engine/`), one file of each rank's own state, what is
needed to export the model (`model/`: its configuration and tokenizer), `config.yaml`, and `manifest.json`: every file with
size and hash, written last, under a temporary name that is then changed. Other names beside it: `partial-step-...` (not
finished), `damaged-step-...` (found not whole at a resume), `discarded-step-...` (newer than the one a user went back to),
`deleting-step-...`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.serialization import config as serialization
from xxhash import xxh3_128

from pdl import distributed, watch
from pdl.config import Config, UserError
from pdl.distributed import RunFailed, say
from pdl.run_directory import differences, named_checkpoint, read_config
from pdl.storage import Storage, sync_directory, sync_tree, write_json
from pdl.train import TrainerState

MANIFEST = "manifest.json"
_FORMAT = 1
_VERSIONS = ("torch", "deepspeed", "transformers")


# --- what a manifest says, and whether it is so ---


def manifest_text(content: dict) -> str:
    """The manifest as it is written: its last key is the hash of all before it."""
    return json.dumps(content | {"sha256": _hash_of(content)}, indent=1) + "\n"


def _hash_of(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(checkpoint: Path) -> dict:
    """Raises ValueError that says what is wrong with it."""
    try:
        content = json.loads((checkpoint / MANIFEST).read_bytes())
        stated = content.pop("sha256")
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is damaged ({type(error).__name__})") from None
    if stated != _hash_of(content):
        raise ValueError(f"{MANIFEST} is damaged (its hash is another)")
    if content["format"] != _FORMAT:
        raise ValueError(f"{MANIFEST} has format {content['format']}; this version reads {_FORMAT}")
    return content


def verify(checkpoint: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint, a sentence each; empty when it is whole.

    Each of `parts` callers reads its share of the files, and all of them together everything.
    """
    try:
        files = read_manifest(checkpoint)["files"]
    except ValueError as error:
        return [str(error)]
    problems = []
    for name in sorted(files)[part::parts]:
        path, stated = checkpoint / name, files[name]
        try:
            size = path.stat().st_size
            if size != stated["size"]:
                problems.append(f"{name} has {size} bytes instead of {stated['size']}")
            elif file_hash(path) != stated["xxh3_128"]:
                problems.append(f"{name} has the right size and other content")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
    return problems


def file_hash(path: Path) -> str:
    """XXH3: against accidents, not against forgers, and faster than any disk."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxh3_128).hexdigest()


def checkpoints(directory: Path) -> list[Path]:
    """The finished checkpoints of a run directory, oldest first, whole or damaged since."""
    return sorted(path for path in directory.glob("checkpoints/step-????????") if path.is_dir())


def newest_whole(directory: Path) -> Path:
    """The newest checkpoint of a run that verifies. Raises UserError when there is none."""
    for checkpoint in reversed(checkpoints(directory)):
        if not verify(checkpoint):
            return checkpoint
    raise UserError(f"{directory} holds no whole checkpoint")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


# --- writing ---


class _HashedFile:
    """A file that is hashed as it is written. An error is kept until `close`: raised through torch.save it would end the process."""

    def __init__(self, path: Path):
        self.file = path.open("wb", buffering=0)
        self.hash, self.size, self.error = xxh3_128(), 0, None

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        self.hash.update(data)
        self.size += len(data)
        rest = data
        while len(rest) and self.error is None:  # at most 2 GiB are written at once
            try:
                rest = rest[self.file.write(rest) :]
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> dict:
        """What the manifest says of the file. Raises the first error there was."""
        self.file.close()
        if self.error is not None:
            raise self.error
        return {"size": self.size, "xxh3_128": self.hash.hexdigest()}


def _write_hashed(path: Path, write: Callable[[_HashedFile], Any]) -> dict:
    file = _HashedFile(path)
    try:
        write(file)
    finally:
        stated = file.close()
    return stated


def _writing_engine():
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class Writing(TorchCheckpointEngine):
        """How DeepSpeed writes its files: hashed meanwhile.

        An error is kept for all ranks to see afterwards: an exception inside `engine.save_checkpoint` would leave the other
        ranks waiting in its barriers.
        """

        def __init__(self):
            super().__init__()
            self.files: dict[str, dict] = {}
            self.error: OSError | None = None

        def makedirs(self, path, exist_ok=False):
            self._keep_error(lambda: os.makedirs(path, exist_ok=True))

        def save(self, state_dict, path):
            def write():
                with serialization.patch("save.compute_crc32", False):  # the hash is the better checksum
                    self.files[str(path)] = _write_hashed(Path(path), lambda file: torch.save(state_dict, file))

            if self.error is None:
                self._keep_error(write)

        def _keep_error(self, work: Callable[[], None]) -> None:
            try:
                work()
            except OSError as error:
                self.error = self.error or error

    return Writing()


@dataclass
class Checkpointer:
    """Writes the checkpoints of a run: handed to the system while training waits, brought to the disk while it goes on.

    made_with: what must be the same at resume. config: the text of the configuration. describe: writes what an export needs
    (model configuration, tokenizer) into a directory. keep: how many stay. newest: the step of the newest finished one.
    """

    storage: Storage
    engine: Any
    made_with: dict
    config: str
    describe: Callable[[Path], None]
    keep: int
    newest: int | None = None

    def __post_init__(self):
        self.directory = self.storage.directory / "checkpoints"
        self.seconds = 0.0  # that training waited
        self._finishing: _Background | None = None

    def bytes_needed(self) -> int:
        """An upper estimate of one checkpoint on this file system: weights, and their fp32 copy with two moments, sharded."""
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters())
        share = len(self.storage.ranks) / distributed.world_size()
        return int(parameters * (4 + 12 * share)) + (1 << 20)

    def refuse_too_little_room(self) -> None:
        """Raises UserError, before training, when the checkpoints that will be there at once do not fit. A collective."""

        def refuse() -> None:
            self._delete_leftovers()
            existing = len(checkpoints(self.storage.directory))
            needed = self.bytes_needed() * max(1, self.keep + 1 - existing)
            free = shutil.disk_usage(self.storage.directory).free
            if free < needed:
                raise UserError(
                    f"training.output_dir={self.storage.directory} has {free / 1e9:.2f} GB free and checkpoints need up to {needed / 1e9:.2f} GB: "
                    f"training.keep_checkpoints={self.keep} of up to {self.bytes_needed() / 1e9:.2f} GB each, and one more while it is written"
                )

        distributed.together(refuse)

    def save(self, state: TrainerState, meter_sums: torch.Tensor) -> None:
        """Write `step-00000100/`. A collective; nothing is done when it is there.

        On return all of it is written, and a thread goes on with syncing, reading again and naming it. Raises RunFailed, on
        all ranks, when the disk is full, a weight is not finite, or the checkpoint before this one could not be finished.
        """
        final = self.directory / f"step-{state.done:08d}"
        self.settle()
        if any(distributed.gathered(final.exists())):
            return
        started = time.perf_counter()
        watch.beat(f"saving step {state.done}")
        _refuse_non_finite_weights(self.engine, state.done)
        partial, what = self.directory / f"partial-{final.name}", f"checkpoint {final.name}"
        distributed.together(lambda: self._begin(partial) if self.storage.writes else None, what)
        writing = _writing_engine()
        self.engine.checkpoint_engine = writing
        # A copy of DeepSpeed's export script, whose errors would not be kept; `python -m pdl export` is ours.
        self.engine._copy_recovery_script = lambda _: None
        self.engine.save_checkpoint(str(partial), tag="engine", save_latest=False)

        def own_files() -> dict[str, dict]:
            if writing.error is not None:
                raise writing.error
            path = partial / f"rank-{distributed.rank():05d}.safetensors"
            _save_rank_state(path, meter_sums)
            return writing.files | {str(path): {"size": path.stat().st_size, "xxh3_128": file_hash(path)}}

        try:
            files = distributed.together(own_files, what)
        except RunFailed:
            if self.storage.writes:
                shutil.rmtree(partial, ignore_errors=True)  # its room is needed
            raise
        content = {
            "format": _FORMAT,
            "step": state.done,
            "save": distributed.gathered(uuid.uuid4().hex)[0],  # ties the parts of nodes together
            "world_size": distributed.world_size(),
            "ranks": self.storage.ranks,
            "trainer": asdict(state),
            "made_with": self.made_with,
            "config": hashlib.sha256(self.config.encode()).hexdigest(),
            "versions": {name: version(name) for name in _VERSIONS} | {"python": platform.python_version()},
        }
        self._finishing = _Background(state.done, lambda: self._finish(partial, final, content, files))
        watch.beat(f"training after step {state.done}")
        self.seconds += time.perf_counter() - started

    def settle(self, wait: bool = True) -> None:
        """Hear of the checkpoint that is being finished, on all ranks; once it is there, delete all but the newest `keep`. A collective.

        Raises RunFailed when it could not be finished: what was there before stays.
        """
        started = time.perf_counter()
        while self._finishing is not None:
            ended = distributed.gathered(self._finishing.ended)
            if failures := [str(error) for error in ended if isinstance(error, Exception)]:
                raise RunFailed(f"the last checkpoint could not be finished: {failures[0]}")
            if all(ended):
                self._finishing, self.newest = None, self._finishing.step
                self._delete_old()
            elif not wait:
                break
            else:
                time.sleep(0.005)
        self.seconds += time.perf_counter() - started

    def _begin(self, partial: Path) -> None:
        if not self.directory.exists():
            self.directory.mkdir()
            sync_directory(self.storage.directory)
        self._delete_leftovers()
        free, needed = shutil.disk_usage(self.directory).free, self.bytes_needed()
        if free < needed:
            raise OSError(f"it needs up to {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free in {self.directory}")
        partial.mkdir()

    def _delete_leftovers(self) -> None:
        """Of a save or a deletion that was cut off."""
        if self.storage.writes:
            for kind in ("partial-*", ".partial-*", "deleting-*"):
                for leftover in self.directory.glob(kind):
                    shutil.rmtree(leftover, ignore_errors=True)  # a thread may be deleting it

    def _finish(self, partial: Path, final: Path, content: dict, files: dict[str, dict]) -> None:
        """In a thread of each rank, without collectives: its own files to the disk; one rank then gives the whole its name."""
        for name, stated in files.items():
            sync_tree(Path(name))
            if file_hash(Path(name)) != stated["xxh3_128"]:
                raise OSError(f"{name} is not what was written; the disk cannot be trusted")
        relative = {str(Path(name).relative_to(partial)): stated for name, stated in files.items()}
        write_json(partial / f"part-{content['save']}-{distributed.rank():05d}.json", relative)
        if not self.storage.writes:
            while partial.exists():  # it is named by the rank that writes
                time.sleep(0.01)
            return
        (partial / "config.yaml").write_text(self.config, encoding="utf-8")
        self.describe(partial / "model")
        stated = {}
        for rank in self.storage.ranks:
            part = partial / f"part-{content['save']}-{rank:05d}.json"
            while not part.exists():
                time.sleep(0.01)
            stated |= json.loads(part.read_text(encoding="utf-8"))
            part.unlink()
        for path in sorted(partial.rglob("*")):
            name = str(path.relative_to(partial))
            if path.is_file() and name not in stated:
                sync_tree(path)
                stated[name] = {"size": path.stat().st_size, "xxh3_128": file_hash(path)}
        manifest = partial / MANIFEST
        manifest.write_text(manifest_text(content | {"files": stated}), encoding="utf-8")
        sync_tree(manifest)
        for directory in [*(path for path in partial.rglob("*") if path.is_dir()), partial]:
            sync_directory(directory)
        partial.rename(final)
        sync_directory(self.directory)

    def _delete_old(self) -> None:
        if self.storage.writes:
            for old in checkpoints(self.storage.directory)[: -self.keep]:
                doomed = old.with_name(f"deleting-{old.name}")
                old.rename(doomed)  # so that half of it is never taken for a checkpoint
                threading.Thread(target=shutil.rmtree, args=(doomed,), kwargs={"ignore_errors": True}).start()


class _Background:
    """Work on the checkpoint of a step, in a thread that ends with the process.

    ended: None as long as it goes on, then True or its exception.
    """

    def __init__(self, step: int, work: Callable[[], None]):
        self.step = step
        self.ended: bool | Exception | None = None
        self._work = work
        threading.Thread(target=self._run, daemon=True, name="pdl-checkpoint").start()

    def _run(self) -> None:
        try:
            self._work()
            self.ended = True
        except Exception as error:
            self.ended = error


def _refuse_non_finite_weights(engine, step: int) -> None:
    """Nothing poisoned is saved: every weight and optimizer moment on any rank is finite."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    tensors = [getattr(parameter, "ds_tensor", parameter).data for parameter in engine.module.parameters()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    # A sum is fast and hides no nan and no inf; one that overflows is looked at again.
    finite = all(
        bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
        for tensor in tensors
        if tensor.is_floating_point()
    )
    if not all(distributed.gathered(finite)):
        raise RunFailed(f"step {step}: a weight or a moment of the optimizer is not finite; it was not saved")


def _save_rank_state(path: Path, meter_sums: torch.Tensor) -> None:
    from safetensors.torch import save_file

    version_, words, _ = random.getstate()
    assert version_ == 3
    _, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "meter_sums": meter_sums.cpu(),
        "torch_rng": torch.get_rng_state(),
        "python_rng": torch.tensor(words, dtype=torch.int64),
        "numpy_rng": torch.from_numpy(keys.astype(np.int64)),
        "numpy_rng_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
    }
    if distributed.on_gpu():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    save_file(state, str(path))


# --- resuming ---


@dataclass
class Resume:
    """The checkpoint that a run continues from. reshard: its optimizer was sharded over another number of ranks."""

    checkpoint: Path
    manifest: dict
    reshard: bool

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def last_logged(self) -> int:
        """The last step whose log line stands: a run stopped during an evaluation still owes the one of its last step."""
        return self.step - 1 if self.manifest["trainer"]["owed"] else self.step


def choose_checkpoint(storage: Storage, config: Config, made_with: dict, known: int | None) -> Resume | None:
    """The checkpoint to continue from: the newest that is whole on every file system, or the one that `training.resume` names.

    known: the step of the newest checkpoint as the run's status has it. None for a run that begins. Damaged ones are named
    and set aside, but only once the one to use is known to fit. Raises UserError when it was made with something else, and
    when there were checkpoints and none is whole. A collective.
    """
    named = distributed.gathered(
        distributed.together(lambda: named_checkpoint(config) if distributed.rank() == 0 else None)
    )[0]
    if named is not None:
        chosen, problems = named, distributed.gathered(verify(named, *storage.part))
        if found := [problem for part in problems for problem in part]:
            raise UserError("\n  - ".join([f"training.resume={named} is not whole", *found]))
        broken = {}
        newer = []
        if config.resumes_inside:
            chosen = storage.directory / "checkpoints" / named.name
            newer = [path for path in checkpoints(storage.directory) if step_of(path) > step_of(named)]
    else:
        chosen, broken = _newest_whole_everywhere(storage)
        newer = []
    if chosen is None:
        if broken or known is not None:
            listed = [f"{name}: {problem}" for name, found in broken.items() for problem in found]
            expected = f"checkpoint {known} was written and is missing" if not broken else "no checkpoint is whole"
            raise UserError(
                "\n  - ".join(
                    [f"{storage.directory}: {expected}; name another training.output_dir to begin anew", *listed]
                )
            )
        return None
    manifest = distributed.together(lambda: _manifest_of_this_run(chosen, config, made_with))
    _refuse_other_nodes(storage, chosen, manifest)
    for name, found in broken.items():
        say(f"pdl: checkpoint {name} is not whole and was set aside: {'; '.join(found)}")
    if not broken and named is None and known is not None and known > manifest["step"]:
        say(f"pdl: checkpoint {known} was written and is missing; going on from step {manifest['step']}")
    distributed.gathered(None)  # all have read before names change
    if storage.writes:
        for name in broken:
            _set_aside(storage.directory / "checkpoints" / name, "damaged")
        for path in newer:
            _set_aside(path, "discarded")
    reshard = manifest["world_size"] != distributed.world_size() and made_with["zero_stage"] > 0
    now = {name: version(name) for name in _VERSIONS}
    then = {name: manifest["versions"].get(name) for name in _VERSIONS}
    if now != then:
        changed = ", ".join(f"{name} {then[name]} to {now[name]}" for name in _VERSIONS if now[name] != then[name])
        say(
            f"pdl: versions changed since step {manifest['step']} ({changed}): losses agree to rounding, not bit for bit"
        )
    return Resume(chosen, manifest, reshard)


def _newest_whole_everywhere(storage: Storage) -> tuple[Path | None, dict[str, list[str]]]:
    """The newest checkpoint that is whole on every file system, and those newer than it, each with what is wrong."""
    broken: dict[str, list[str]] = {}
    mine = {path.name for path in checkpoints(storage.directory)}
    for name in sorted(set().union(*distributed.gathered(mine)), reverse=True):
        path = storage.directory / "checkpoints" / name
        problems = verify(path, *storage.part) if path.exists() else [f"it is missing on {socket.gethostname()}"]
        found = {problem: None for part in distributed.gathered(problems) for problem in part}
        if not found and len(set(distributed.gathered(read_manifest(path)["save"]))) > 1:
            found = {"its parts are of different saves": None}
        if not found:
            return path, broken
        broken[name] = list(found)
    return None, broken


def _manifest_of_this_run(checkpoint: Path, config: Config, made_with: dict) -> dict:
    """Raises UserError when the checkpoint was made with something else than what is asked for."""
    try:
        manifest = read_manifest(checkpoint)
    except ValueError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    stored = manifest["made_with"]
    found = differences(read_config(checkpoint / "config.yaml"), config, manifest["world_size"])
    if stored["zero_stage"] != made_with["zero_stage"]:
        found.append(
            f"it was written at ZeRO stage {stored['zero_stage']} and is asked for at stage {made_with['zero_stage']}: DeepSpeed continues at the "
            f"same stage only, on any number of ranks; `python -m pdl export {checkpoint} OUTPUT_DIR` gives a model to begin anew with"
        )
    elif stored["zero_optimization"] != made_with["zero_optimization"]:
        found.append(f"zero_optimization: {stored['zero_optimization']} there, {made_with['zero_optimization']} now")
    found += [
        f"{key}: {stored.get(key)!r} there, {value!r} now"
        for key, value in made_with.items()
        if key not in ("zero_stage", "zero_optimization") and stored.get(key) != value
    ]
    if found:
        raise UserError("\n  - ".join([f"{checkpoint} cannot be continued here", *found]))
    return manifest


def _refuse_other_nodes(storage: Storage, checkpoint: Path, manifest: dict) -> None:
    """Without a shared file system each rank must find what it wrote itself. A collective."""
    parts = distributed.gathered((socket.gethostname(), manifest["ranks"], storage.ranks))
    if storage.shared:
        return
    if manifest["world_size"] != distributed.world_size():
        raise UserError(
            f"{checkpoint} was written on {manifest['world_size']} ranks and lies on nodes without a shared file system: it goes on on "
            "that number of ranks only"
        )
    if any(wrote != runs for _, wrote, runs in parts):
        found = {f"{host} holds what ranks {wrote} wrote and runs ranks {runs}" for host, wrote, runs in parts}
        raise UserError(
            f"{checkpoint} lies on nodes without a shared file system, and the ranks run on other nodes now; start the nodes in the order of "
            f"the first time: {'; '.join(sorted(found))}"
        )


def _set_aside(checkpoint: Path, why: str) -> None:
    if not checkpoint.exists():
        return
    aside, number = checkpoint.with_name(f"{why}-{checkpoint.name}"), 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{why}-{checkpoint.name}.{number}")
    checkpoint.rename(aside)
    sync_directory(checkpoint.parent)


def load_checkpoint(resume: Resume, storage: Storage, engine, meter_sums: torch.Tensor, seed: int) -> None:
    """Continue: engine, unlogged sums and random state of this rank. A collective."""
    from safetensors.torch import load_file

    from pdl.reshard import load_universal, tensors_only, to_universal

    def reshard() -> None:
        shutil.rmtree(universal, ignore_errors=True)
        sizes = [
            stated["size"] for name, stated in resume.manifest["files"].items() if name.endswith("optim_states.pt")
        ]
        needed, free = 3 * sum(sizes), shutil.disk_usage(universal.parent).free
        if free < needed:
            raise UserError(
                f"{universal.parent} has {free / 1e9:.2f} GB free and resharding {resume.checkpoint.name} needs up to {needed / 1e9:.2f} GB"
            )
        to_universal(resume.checkpoint, universal)

    ranks = resume.manifest["world_size"]
    if resume.reshard:
        universal = storage.directory / "checkpoints" / f"partial-universal-{resume.checkpoint.name}"
        say(f"resharding {resume.checkpoint.name} from {ranks} ranks to {distributed.world_size()}")
        distributed.together(lambda: reshard() if storage.writes else None)
        load_universal(engine, universal)
        distributed.gathered(None)
        if storage.writes:
            shutil.rmtree(universal)
    else:
        with tensors_only():
            loaded, _ = engine.load_checkpoint(str(resume.checkpoint), tag="engine")
        if loaded is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {resume.checkpoint}")
    if ranks == distributed.world_size():
        state = load_file(resume.checkpoint / f"rank-{distributed.rank():05d}.safetensors")
        meter_sums.copy_(state["meter_sums"])
        _restore_random_state(state)
    else:
        seed_ranks(seed, resume.step)
        if distributed.rank() == 0:
            parts = [
                load_file(resume.checkpoint / f"rank-{rank:05d}.safetensors")["meter_sums"] for rank in range(ranks)
            ]
            meter_sums.copy_(torch.stack(parts).sum(0))
            meter_sums[:2] *= distributed.world_size() / ranks  # steps and seconds are counted by every rank


def _restore_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["torch_rng"])
    random.setstate((3, tuple(state["python_rng"].tolist()), None))
    position, has_gauss, gauss = state["numpy_rng_rest"].tolist()
    keys = state["numpy_rng"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    if distributed.on_gpu():
        torch.cuda.set_rng_state(state["cuda_rng"])


def seed_ranks(seed: int, step: int = 0) -> None:
    """Random numbers that differ between ranks: dropout. step: where a run goes on on another number of ranks."""
    own = (seed * 1_000_003 + distributed.rank() + 1 + step * 7_919) % 2**32
    torch.manual_seed(own)
    random.seed(own)
    np.random.seed(own)
