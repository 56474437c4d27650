"""Checkpoints on a disk whose power goes, what the command says of them, and the directory's one owner."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, environment
from transformers import T5Config, T5ForConditionalGeneration

from pdl import distributed
from pdl.checkpoint import Checkpointer, checkpoints, newest_whole, verify
from pdl.config import Config, TrainingConfig, UserError
from pdl.distributed import RunFailed
from pdl.model import deepspeed_settings, initialize_engine
from pdl.run_directory import lock
from pdl.storage import find_storage
from pdl.train import TrainerState


@pytest.fixture(scope="module")
def engine():
    """One for all tests here: DeepSpeed keeps its process groups for the life of the process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "0")  # so that what `start` sets is taken back
            patch.delenv(name)
        distributed.start()
        settings = T5Config(
            d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=32, decoder_start_token_id=0
        )
        model = T5ForConditionalGeneration(settings)
        training = TrainingConfig(global_batch_size=1, micro_batch_size=1)
        config = Config(training=training, deepspeed="configs/deepspeed/zero2.json")
        engine = initialize_engine(model, torch.optim.AdamW(model.parameters()), deepspeed_settings(config, 1))
        yield engine
        engine.destroy()
        distributed.stop()


@pytest.fixture
def checkpointer(engine, tmp_path) -> Checkpointer:
    made_with = {"zero_stage": 2, "zero_optimization": {}}
    storage = find_storage(tmp_path / "run")
    return Checkpointer(storage, engine, made_with, "task: none\n", lambda target: target.mkdir(), keep=2)


def save(checkpointer: Checkpointer, step: int) -> None:
    checkpointer.save(TrainerState(done=step, owed=False), torch.zeros(3, dtype=torch.float64))


class Disk:
    """What a disk holds for certain: the content that files had when they were synced, the names that directories had.

    Everything else is lost when the power goes, which is the worst that POSIX allows.
    """

    def __init__(self, root: Path, monkeypatch):
        self.root, self.moments = root, []
        self._files: dict[int, bytes] = {}
        self._directories: dict[int, dict[str, int]] = {}
        real_fsync, real_rename = os.fsync, Path.rename

        def fsync(descriptor):
            real_fsync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            inode = os.fstat(descriptor).st_ino
            if path.is_dir():
                self._directories[inode] = {entry.name: entry.inode() for entry in os.scandir(path)}
            else:
                self._files[inode] = path.read_bytes()
            self._remember()

        def rename(path, target):
            moved = real_rename(path, target)
            self._remember()
            return moved

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Path, "rename", rename)

    def _remember(self) -> None:
        self.moments.append((dict(self._files), dict(self._directories)))

    def after_power_loss(self, moment: int, target: Path) -> Path:
        """What is found under the root when the power went at that moment."""
        files, directories = self.moments[moment]

        def restore(inode: int, path: Path) -> None:
            if inode in files:
                path.write_bytes(files[inode])
            elif inode in directories:
                path.mkdir(exist_ok=True)
                for name, child in directories[inode].items():
                    restore(child, path / name)
            else:
                path.touch()  # its name is there, nothing of its content

        restore(self.root.stat().st_ino, target)
        return target


def test_whenever_the_power_goes_a_checkpoint_is_whole_or_not_there(checkpointer, tmp_path, monkeypatch):
    disk = Disk(checkpointer.storage.directory, monkeypatch)
    for step in (2, 4, 6):
        save(checkpointer, step)
    checkpointer.settle()
    assert len(disk.moments) > 30
    newest = -1
    for moment in range(len(disk.moments)):
        found = disk.after_power_loss(moment, tmp_path / f"moment-{moment}")
        there = [int(path.name[5:]) for path in checkpoints(found)]
        assert all(verify(path) == [] for path in checkpoints(found))
        assert max(there, default=-1) >= newest  # what was once safe stays so
        newest = max(there, default=-1)
    assert newest == 6
    assert len(checkpoints(found)) >= 2


def test_the_disk_of_the_test_does_lose_what_is_not_synced(tmp_path, monkeypatch):
    """The test before can fail: the same without a sync of the file leaves it empty."""
    root = tmp_path / "root"
    root.mkdir()
    disk = Disk(root, monkeypatch)
    (root / "file").write_text("content")
    descriptor = os.open(root, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    assert (disk.after_power_loss(-1, tmp_path / "after") / "file").read_text() == ""


def test_old_ones_go_only_when_the_new_one_verifies(checkpointer, monkeypatch):
    for step in (2, 4, 6):
        save(checkpointer, step)
    checkpointer.settle()
    assert [path.name for path in checkpoints(checkpointer.storage.directory)] == ["step-00000004", "step-00000006"]

    def damage_when_synced(descriptor, fsync=os.fsync):
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name == "mp_rank_00_model_states.pt":
            path.write_bytes(path.read_bytes()[:-1] + b"?")

    monkeypatch.setattr(os, "fsync", damage_when_synced)
    save(checkpointer, 8)
    with pytest.raises(RunFailed, match="is not what was written"):
        checkpointer.settle()
    assert [path.name for path in checkpoints(checkpointer.storage.directory)] == ["step-00000004", "step-00000006"]
    assert newest_whole(checkpointer.storage.directory).name == "step-00000006"


def test_weights_that_are_not_finite_are_not_saved(checkpointer, engine):
    weight = next(iter(engine.module.parameters())).data
    before = weight[0, 0].item()
    weight[0, 0] = torch.nan
    try:
        with pytest.raises(RunFailed, match="step 2: a weight or a moment of the optimizer is not finite"):
            save(checkpointer, 2)
    finally:
        weight[0, 0] = before
    assert not checkpoints(checkpointer.storage.directory)


def test_leftovers_of_a_killed_save_go_at_the_next(checkpointer):
    save(checkpointer, 2)
    directory = checkpointer.storage.directory / "checkpoints"
    for name in ("partial-step-00000003", "deleting-step-00000001"):
        (directory / name).mkdir()
    save(checkpointer, 4)
    checkpointer.settle()
    assert sorted(path.name for path in directory.iterdir()) == ["step-00000002", "step-00000004"]


# --- python -m pdl checkpoints ---


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pdl", "checkpoints", *map(str, arguments)], cwd=REPOSITORY, env=environment(), capture_output=True, text=True
    )  # fmt: skip


def test_the_command_lists_verifies_and_prunes(checkpointer):
    run = checkpointer.storage.directory
    checkpointer.keep = 4
    for step in (2, 4, 6, 8):
        save(checkpointer, step)
    checkpointer.settle()
    (run / "checkpoints/partial-step-00000010").mkdir()
    os.truncate(run / "checkpoints/step-00000008/engine/mp_rank_00_model_states.pt", 10)
    listed = command(run)
    assert listed.returncode == 1  # something is damaged
    lines = {line.split()[0]: line for line in listed.stdout.splitlines()}
    assert lines["step-00000006"].endswith("whole") and "not used" in lines["partial-step-00000010"]
    assert "damaged: engine/mp_rank_00_model_states.pt has 10 bytes instead of" in lines["step-00000008"]

    before = sorted(run.rglob("*"))
    shown = command(run, "--prune")
    doomed = ["step-00000002", "step-00000008", "partial-step-00000010"]
    assert all(f"would delete {run}/checkpoints/{name} " in shown.stdout for name in doomed)
    assert sorted(run.rglob("*")) == before

    owner = lock(run)
    refused = command(run, "--prune", "--yes")
    assert refused.returncode == 2 and "in use by another run" in refused.stderr
    os.close(owner)
    assert all(f"deleted {run}/checkpoints/{name} " in command(run, "--prune", "--yes").stdout for name in doomed[:1])
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000004", "step-00000006"]
    assert command(run).returncode == 0


@pytest.mark.parametrize("arguments", [["nowhere"], [".", "--keep", "0"], [".", "--yes"]])
def test_the_command_refuses(arguments, tmp_path):
    refused = command(*arguments)
    assert refused.returncode == 2 and refused.stderr.startswith("pdl: ") and not refused.stdout


def test_newest_whole_says_when_there_is_none(tmp_path):
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        newest_whole(tmp_path)


def test_a_deletion_that_is_cut_off_leaves_no_half_checkpoint(checkpointer, monkeypatch):
    def cut_off(path, ignore_errors):
        next(path.rglob("*.pt")).unlink()

    save(checkpointer, 2)
    save(checkpointer, 4)
    save(checkpointer, 6)
    monkeypatch.setattr(shutil, "rmtree", cut_off)
    checkpointer.settle()
    assert [path.name for path in checkpoints(checkpointer.storage.directory)] == ["step-00000004", "step-00000006"]


# --- one owner ---


def test_the_lock_is_freed_by_the_death_of_its_owner(tmp_path):
    held = "import sys, time; from pdl.run_directory import lock, name_owner; from pathlib import Path; name_owner(lock(Path(sys.argv[1]))); print('held', flush=True); time.sleep(60)"
    owner = subprocess.Popen(
        [sys.executable, "-c", held, tmp_path], cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by another run \\(process {owner.pid} on "):
        lock(tmp_path)
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 5
    while True:
        try:
            os.close(lock(tmp_path))
            break
        except UserError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
