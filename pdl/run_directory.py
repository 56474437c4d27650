"""A run's directory: who owns it, what state the run is in, and whether a configuration may continue it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from pdl import distributed
from pdl.config import Config, UserError, flattened
from pdl.distributed import say
from pdl.frequencies import TokenFrequencies
from pdl.storage import Storage, sync_directory, sync_tree, writable, write_json, write_whole

# Settings that do not touch the numbers of a run, so a run may continue with others. What stands in the DeepSpeed file is
# compared itself, not its path.
_MAY_CHANGE = {
    "training.log_every",
    "training.evaluate_every",
    "training.save_every",
    "training.keep_checkpoints",
    "training.resume",
    "training.trust_checkpoint",
    "training.hang_seconds",
    "training.output_dir",
    "evaluation.examples",
    "deepspeed",
}
LOCK = ".lock"


# --- status ---


@dataclass
class Status:
    """`status.json`, written by one of the ranks that see the same files: launchers change exit codes, so the true one is written down.

    state: running|done|refused|stopped|failed. step: the last one that is logged. checkpoint: the step of the newest one.
    restart: whether starting again as it is could end otherwise. launch: what started the run, see `launch_identity`.
    resume: the path of `training.resume` that was gone back to already.
    """

    state: str = "running"
    exit_code: int | None = None
    step: int | None = None
    checkpoint: int | None = None
    reason: str | None = None
    restart: bool = True
    launch: str | None = None
    resume: str | None = None

    def write(self, storage: Storage, **changes) -> None:
        for name, value in changes.items():
            setattr(self, name, value)
        if storage.writes:
            write_json(storage.directory / "status.json", asdict(self), sync=self.exit_code is not None)

    @classmethod
    def read(cls, directory: Path) -> Status | None:
        """None where there is none, or a damaged one."""
        try:
            return cls(**json.loads((directory / "status.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


def launch_identity() -> str:
    """The same for all that one launch starts, restarts by torchrun included; another for every other launch."""
    if "PDL_LAUNCH" in os.environ:  # our launch scripts name it
        return os.environ["PDL_LAUNCH"]
    parent = os.getppid()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # no Linux
        return uuid.uuid4().hex
    return f"{boot}-{parent}-{began}"


def ended_in_this_launch(directory: Path) -> Status | None:
    """How the run ended already, where torchrun restarts what must not run again: refused, stopped, or bound to fail alike."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return None
    status = Status.read(directory)
    if status is None or status.launch != launch_identity() or status.exit_code is None or status.restart:
        return None
    return status


# --- one owner, and who writes ---


def lock(directory: Path) -> int:
    """Own the directory until this process ends, however it ends: the kernel frees the lock. Returns the file descriptor.

    Raises UserError when another process owns it, and says which.
    """
    with writable(directory):
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    _flock(directory, descriptor, fcntl.LOCK_EX)
    return descriptor


def _flock(directory: Path, descriptor: int, kind: int) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 200).decode(errors="replace").strip()
        raise UserError(
            f"{directory} is in use by another run{f' ({owner})' if owner else ''}; wait for it, stop it, or name another training.output_dir"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        print(f"pdl: {directory} has no file locks: a second run on it at the same time would go unnoticed", flush=True)


def name_owner(descriptor: int) -> None:
    """Write into the lock who holds it, for those who are refused."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def check_not_owned(directory: Path) -> None:
    """Raises UserError when some process owns the directory; takes and writes nothing."""
    if (directory / LOCK).exists():
        descriptor = os.open(directory / LOCK, os.O_RDONLY)  # also where nothing can be written
        try:
            _flock(directory, descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)


# --- what is there already ---


def is_run(directory: Path) -> bool:
    """The lock is the first file of a run's directory; a copy may lack it, as a file with a dot."""
    others = (directory / "status.json").exists() or any(directory.glob("checkpoints/step-*"))
    return (directory / LOCK).exists() or (others and (directory / "config.yaml").exists())


def has_results(directory: Path) -> bool:
    """Whether a run got so far that there is something to continue, or to lose."""
    return (directory / "metrics.jsonl").exists() or any(directory.glob("checkpoints/step-*"))


def inspect_directory(config: Config) -> bool:
    """Whether the run that the configuration asks for is finished already. Reads only; for rank 0.

    Raises UserError when the output directory holds something else, a run with another configuration, or one that is going on.
    """
    directory = Path(config.training.output_dir)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"training.output_dir={directory} is a file")
    if not is_run(directory):
        if directory.exists() and any(not path.name.startswith(".probe-") for path in directory.iterdir()):
            raise UserError(f"training.output_dir={directory} holds files that are not a run's; name another")
        return False
    check_not_owned(directory)
    named_checkpoint(config)
    if not has_results(directory):
        return False
    status = Status.read(directory)
    restarted = status is not None and status.launch == launch_identity()
    if config.training.resume == "never" and not restarted:
        raise UserError(
            f"training.output_dir={directory} holds a run and training.resume=never; name another output_dir, or resume with auto"
        )
    if found := differences(read_config(directory / "config.yaml"), config, _newest_world_size(directory)):
        title = f"training.output_dir={directory} holds a run with another configuration; name another output_dir"
        raise UserError("\n  - ".join([title, *found]))
    return status is not None and status.state == "done" and (status.step or 0) >= (config.training.max_steps or 0)


def named_checkpoint(config: Config) -> Path | None:
    """The checkpoint of `training.resume=<path>`; None where that means `auto`. For rank 0; raises UserError where there is none.

    One inside the output directory is what a user goes back to, once: the same command then goes on from the newest. One
    outside is what a run begins with: once it has checkpoints of its own, those count.
    """
    resume, directory = config.training.resume, Path(config.training.output_dir)
    if resume in ("auto", "never"):
        return None
    status = Status.read(directory)
    if config.resumes_inside:
        carried_out = status is not None and status.resume == resume
    else:
        carried_out = any(directory.glob("checkpoints/step-*"))
    if carried_out:
        return None
    named = Path(resume).resolve()
    if not ((named / "manifest.json").is_file() and re.fullmatch(r"step-\d{8}", named.name)):
        raise UserError(
            f"training.resume={resume} is neither auto, never, nor the directory of a checkpoint (step-00000100)"
        )
    return named


def read_config(path: Path) -> dict:
    """A resolved configuration as written by a run, with dotted keys."""
    try:
        return flattened(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
        raise UserError(
            f"{path} is missing or damaged, so that nobody can tell which run this is ({type(error).__name__}); "
            "each checkpoint holds a copy of it"
        ) from error


def _newest_world_size(directory: Path) -> int | None:
    for checkpoint in sorted(directory.glob("checkpoints/step-*"), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError):
            return json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["world_size"]
    return None


def differences(stored: dict, config: Config, world_size: int | None) -> list[str]:
    """What keeps a run with the stored configuration from being continued with this one, a sentence each.

    world_size: the number of ranks it ran on. On another number micro-batches may have another size too.
    """
    wanted = flattened(config.to_dict())
    stored = flattened(Config().to_dict()) | stored  # settings that did not exist when the run began
    changed = {key for key in stored | wanted if stored.get(key) != wanted.get(key)} - _MAY_CHANGE
    if world_size != distributed.world_size():
        changed -= {"training.micro_batch_size"}
    found = []
    before, after = stored.get("training.max_steps"), wanted["training.max_steps"]
    if "training.max_steps" in changed and before and after and after > before:
        changed.remove("training.max_steps")
        ends = stored.get("training.schedule_steps") or before
        if wanted["training.schedule"] != "constant" and ends <= before:
            found.append(
                f"training.max_steps: {before} there, {after} asked for; the {wanted['training.schedule']} schedule ends at step {ends}, "
                "so that further steps would change nothing. A run that may grow states training.schedule_steps at its start"
            )
    return found + [
        f"{key}: {stored.get(key)!r} there, {wanted.get(key)!r} asked for" for key in wanted | stored if key in changed
    ]


def write_beginning(directory: Path, config: Config, tokenizer, frequencies: TokenFrequencies, continues: bool) -> None:
    """What a run's directory holds from the start: configuration, tokenizer, frequencies. For the rank that writes there.

    One that is continued keeps its own; a damaged frequency file is set aside and written again, from the same counts.
    """
    with writable(directory):
        for stale in directory.glob(".probe-*"):  # of a process that was killed
            stale.unlink(missing_ok=True)
        write_whole(directory / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
        if not (continues and (directory / "tokenizer").exists()):
            partial = directory / ".tokenizer.partial"
            shutil.rmtree(partial, ignore_errors=True)
            tokenizer.save_pretrained(partial)
            sync_tree(partial)
            shutil.rmtree(directory / "tokenizer", ignore_errors=True)
            partial.rename(directory / "tokenizer")
        path = directory / "frequencies.safetensors"
        if continues and path.exists():
            with contextlib.suppress(ValueError):
                if TokenFrequencies.load(path).counts.equal(frequencies.counts):
                    return
            aside = path.with_name(f"frequencies.damaged-{uuid.uuid4().hex[:8]}.safetensors")
            path.rename(aside)
            say(f"pdl: {path} is damaged; kept as {aside.name} and written again from the counts of the data")
        partial = directory / ".frequencies.partial"
        frequencies.save(partial)
        sync_tree(partial)
        partial.rename(path)
        sync_directory(directory)
