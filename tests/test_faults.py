"""Never lose a run: faults injected into real processes, and what becomes of the run.

The promise: killed anywhere, any way, a run logs the same losses bit for bit as one that was never disturbed. A quick set
runs in `make test`, the whole of it in `make test-faults`; a table at the end says what each fault cost.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, environment
from faults.runs import LOGGED, STEPS, alive, logged, names, status, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pdl.checkpoint import checkpoints, read_manifest, verify

STAGES = {stage: "deepspeed=tests/distributed/zero3.json" if stage == 3 else f"deepspeed=configs/deepspeed/zero{stage}.json" for stage in (0, 1, 2, 3)}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run logs that nothing happens to, by its overrides."""
    done: dict[tuple, list[dict]] = {}

    def of(*overrides: str) -> list[dict]:
        if overrides not in done:
            directory = tmp_path_factory.mktemp("undisturbed") / "run"
            run = train(directory, *overrides)
            assert run.exit_codes() == [0, 0], run.output()
            done[overrides] = logged(directory)
            assert [line["step"] for line in done[overrides]] == LOGGED
        return done[overrides]

    return of


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """A run that stopped after step 8: checkpoints 6 and 8. To be copied."""
    directory = tmp_path_factory.mktemp("interrupted") / "run"
    run = train(directory, faults={0: {"signal": {"step": 8, "number": signal.SIGTERM}}})
    assert run.exit_codes() == [75, 75], run.output()
    assert names(directory) == ["step-00000006", "step-00000008"]
    return directory


@pytest.fixture
def copied(interrupted, tmp_path) -> Path:
    """Its own copy, under the name that the configuration of the run has anyway: the directory may have another."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


def lost(directory: Path, reference: list[dict]) -> tuple[int, int]:
    """Log lines that are missing or not the same, and lines that are there twice. Both must be 0."""
    lines = logged(directory)
    return sum(line not in lines for line in reference), len(lines) - len(reference)


def finish(directory: Path, reference: list[dict], *overrides: str, **more) -> str:
    """Runs on to the end; the logs must be those of the undisturbed run, TensorBoard's too. Returns what was printed."""
    run = train(directory, *overrides, **more)
    assert run.exit_codes() == [0, 0], run.output()
    assert lost(directory, reference) == (0, 0)
    assert logged(directory) == reference and status(directory)["state"] == "done"
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    for tag in ("train/loss", "validation/loss"):
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        assert shown == [(line["step"], pytest.approx(line[tag])) for line in reference if tag in line]
    assert all(not verify(checkpoint) for checkpoint in checkpoints(directory))
    assert [name for name in names(directory) if name.startswith(("partial", "deleting"))] == []
    return run.output()


def steps_again(directory: Path, reached: int) -> int:
    """How many of the steps that were done are trained once more, from the newest whole checkpoint."""
    there = [int(path.name[5:]) for path in checkpoints(directory) if not verify(path)]
    return max(0, reached - max(there, default=0))


# --- SIGKILL ---


def kills(number: int, seed: int) -> list[dict]:
    """Ranks in turn, steps in ascending order with a random moment in each, so that every one of them is reached."""
    draw = random.Random(seed)
    at = sorted(draw.sample(range(STEPS), number))
    return [{number % 2: {"kill": {"step": step, "delay": draw.random() * 0.1}}} for number, step in enumerate(at)]


@pytest.mark.parametrize(
    ("stage", "number", "seed"),
    [
        (2, 6, 1),
        *[pytest.param(stage, 10, stage + 4, marks=pytest.mark.faults) for stage in (0, 3)],
        *[pytest.param(2, 10, seed, marks=pytest.mark.faults) for seed in (2, 3)],
    ],
)
def test_sigkill_of_each_rank_at_random_steps(undisturbed, tmp_path, faults, stage, number, seed):
    directory, reference, again = tmp_path / "run", undisturbed(STAGES[stage]), 0
    for fault in kills(number, seed):
        run = train(directory, STAGES[stage], faults=fault)
        codes = run.exit_codes()
        (rank,) = fault
        # One that dies in its last step's save or later may leave the others done.
        assert codes[rank] == -signal.SIGKILL and codes[1 - rank] != 0, run.output()
        again += steps_again(directory, fault[rank]["kill"]["step"])
    finish(directory, reference, STAGES[stage])
    faults(f"SIGKILL, ZeRO-{stage}", f"{number} times, ranks in turn", "survived", again, *lost(directory, reference))


@pytest.mark.parametrize(
    "where",
    [
        [{0: {"bytes": {"save": 2, "bytes": 1, "kill": True}}}, {1: {"bytes": {"save": 2, "bytes": 60_000, "kill": True}}}, {0: {"kill_at_rename": 4}}],
        pytest.param(
            [{rank: {"bytes": {"save": 4, "bytes": size, "kill": True}}} for rank in (0, 1) for size in (1, 999, 4096, 20_000, 50_000)],
            marks=pytest.mark.faults,
        ),
    ],
)  # fmt: skip
def test_killed_while_a_checkpoint_is_written(undisturbed, tmp_path, faults, where):
    """By the kernel, at a chosen byte of a file; and when only the name is missing."""
    directory, reference, again = tmp_path / "run", undisturbed(STAGES[2]), 0
    for fault in where:
        run = train(directory, STAGES[2], faults=fault)
        (rank,) = fault
        assert run.exit_codes()[rank] in (-signal.SIGKILL, -signal.SIGXFSZ), run.output()
        assert any(name.startswith("partial-") for name in names(directory))
        assert all(not verify(checkpoint) for checkpoint in checkpoints(directory))
        again += steps_again(directory, max(line["step"] for line in logged(directory)))
    finish(directory, reference, STAGES[2])
    faults("killed in a save", f"{len(where)} byte offsets", "survived", again, *lost(directory, reference))


# --- a damaged disk ---


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {"truncated": truncate, "missing": Path.unlink, "flipped": flip}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(
    "what",
    [
        "manifest.json",
        "config.yaml",
        "rank-00001.safetensors",
        "engine/zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "model/tokenizer.json",
    ],
)
def test_any_damage_to_any_file_is_found(copied, what, how):
    newest = checkpoints(copied)[-1]
    assert verify(newest) == []
    DAMAGE[how](newest / what)
    (problem,) = verify(newest)
    assert what in problem


def test_an_empty_checkpoint_is_not_whole(copied):
    newest = checkpoints(copied)[-1]
    shutil.rmtree(newest)
    newest.mkdir()
    assert verify(newest) == ["manifest.json is missing"]


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_used(undisturbed, copied, faults):
    """And with it a damaged frequency file, status and log: all are found, and the run ends as if nothing had happened."""
    reference = undisturbed()
    flip(copied / "checkpoints/step-00000008/engine/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    flip(copied / "frequencies.safetensors")
    truncate(copied / "status.json")
    with (copied / "metrics.jsonl").open("a") as log:
        log.write('{"step": 9, "train/lo')  # cut off in the middle of a write
    again = steps_again(copied, 8)
    printed = finish(copied, reference)
    assert "checkpoint step-00000008 is not whole and was set aside: engine/zero_pp_rank_0" in printed
    assert "frequencies.safetensors is damaged" in printed
    assert "damaged-step-00000008" in names(copied)
    assert (
        list(copied.glob("frequencies.damaged-*")) and "train/lo" in (copied / "metrics.discarded-6.jsonl").read_text()
    )
    faults("flipped bit in the newest checkpoint", "and three other files", "survived", again, *lost(copied, reference))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("what", "how"),
    [
        *[(what, how) for what in ("manifest.json", "engine/mp_rank_00_model_states.pt") for how in DAMAGE],
        ("directory", "missing"),
        ("directory", "empty"),
    ],
)
def test_each_damage_is_survived(undisturbed, copied, faults, what, how):
    reference, newest = undisturbed(), copied / "checkpoints/step-00000008"
    if what == "directory":
        shutil.rmtree(newest)
        if how == "empty":
            newest.mkdir()
    else:
        DAMAGE[how](newest / what)
    again = steps_again(copied, 8)
    printed = finish(copied, reference)
    assert (
        "checkpoint 8 was written and is missing" if (what, how) == ("directory", "missing") else "set aside"
    ) in printed
    faults(f"newest checkpoint: {how}", what, "survived", again, *lost(copied, reference))


@pytest.mark.faults
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("what", ["frequencies.safetensors", "status.json"])
def test_damage_beside_the_checkpoints(undisturbed, copied, faults, what, how):
    DAMAGE[how](copied / what)
    finish(copied, undisturbed())
    faults(f"{what} {how}", "", "survived", 0, *lost(copied, undisturbed()))


@pytest.mark.faults
def test_a_clock_that_goes_backwards(undisturbed, copied, faults):
    """What was written before is from the future then: its times, and the names of TensorBoard's files."""
    future = time.time() + 10**6
    for path in copied.rglob("*"):
        os.utime(path, (future, future))
    for path in (copied / "tensorboard").iterdir():
        path.rename(path.with_name(path.name.replace("tfevents.1", "tfevents.9")))
    finish(copied, undisturbed())
    faults("clock going backwards", "by 11 days", "survived", 0, *lost(copied, undisturbed()))


@pytest.mark.faults
def test_other_data_under_the_same_name_is_refused(tmp_path, faults):
    data, directory = tmp_path / "train.jsonl", tmp_path / "run"
    records = (REPOSITORY / "recipes/summarization/sample/train.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(records))
    run = train(directory, f"data.train={data}", faults={0: {"signal": {"step": 3, "number": signal.SIGTERM}}})
    assert run.exit_codes() == [75, 75]
    data.write_text("".join(records[:-1]))
    run = train(directory, f"data.train={data}")
    assert run.exit_codes() == [2, 2] and "train_rows" in run.output()
    faults("resumed with another data file", "", "refused", "", "", "")


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_a_run_without_a_whole_checkpoint_never_starts_over(copied, faults, how):
    before = (copied / "metrics.jsonl").read_bytes()
    for checkpoint in checkpoints(copied):
        shutil.rmtree(checkpoint / "engine") if how == "damaged" else shutil.rmtree(checkpoint)
    run = train(copied)
    assert run.exit_codes() == [2, 2]
    assert ("no checkpoint is whole" if how == "damaged" else "checkpoint 8 was written and is missing") in run.output()
    assert (copied / "metrics.jsonl").read_bytes() == before and len(checkpoints(copied)) == (
        2 if how == "damaged" else 0
    )
    faults(f"all checkpoints {how}", "", "refused", "", "", "")


# --- a full or read-only disk ---


def test_a_disk_that_fills_up_during_a_save(undisturbed, tmp_path, faults):
    directory, reference = tmp_path / "run", undisturbed(STAGES[2])
    run = train(directory, STAGES[2], faults={1: {"bytes": {"save": 4, "bytes": 50_000, "kill": False}}})
    assert run.exit_codes() == [1, 1]
    assert "checkpoint step-00000004: [Errno 27] File too large" in run.output() and "Traceback" not in run.output()
    ended = status(directory)
    assert (ended["state"], ended["exit_code"], ended["checkpoint"], ended["restart"]) == ("failed", 1, 2, False)
    assert names(directory) == ["step-00000002"]  # what was half written is gone: its room is needed
    again = steps_again(directory, 4)
    finish(directory, reference, STAGES[2])
    faults("disk full in a save", "at byte 50,000 on rank 1", "survived", again, *lost(directory, reference))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes, of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.faults
def test_too_little_room_is_refused_before_training(small_disk, faults):
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    run = train(small_disk / "run")
    assert run.exit_codes() == [2, 2] and "GB free and checkpoints need up to" in run.output()
    faults("little room", "4 MB", "refused", "", "", "")


@pytest.mark.faults
@pytest.mark.parametrize("while_", ["logging", "saving"])
def test_a_full_disk(undisturbed, small_disk, faults, while_):
    """Really full: another file takes all the room while the run goes on. It ends clearly, and continues when there is room."""
    directory, reference = small_disk / "run", undisturbed("training.save_every=4")
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    late = {"late": {"step": 4 if while_ == "logging" else 7, "seconds": 4}}
    run = train(directory, "training.save_every=4", faults={0: late})
    deadline = time.monotonic() + 60
    while (
        not (directory / "metrics.jsonl").exists()
        or f'"step": {3 if while_ == "logging" else 6}' not in (directory / "metrics.jsonl").read_text()
    ):
        assert time.monotonic() < deadline, run.output()
        time.sleep(0.05)
    time.sleep(1)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            pass
    assert run.exit_codes() == [1, 1], run.output()
    assert "No space left on device" in run.output() or "are free in" in run.output()
    filler.unlink()
    assert "Traceback" not in run.output()
    again = steps_again(directory, status(directory)["step"])
    finish(directory, reference, "training.save_every=4")
    faults("disk full", f"while {while_}", "survived", again, *lost(directory, reference))


@pytest.mark.faults
@pytest.mark.parametrize("leave", [0, 1 << 16, 1 << 18])
def test_a_disk_that_is_full_inside_a_file(undisturbed, small_disk, faults, leave):
    """The first file of the checkpoint, or a later one, does not end: there was room for it when it began."""
    directory, reference = small_disk / "run", undisturbed(STAGES[2])
    filler = small_disk / "filler"
    run = train(directory, STAGES[2], faults={0: {"fill": {"save": 4, "file": str(filler), "leave": leave}}})
    assert run.exit_codes() == [1, 1], run.output()
    assert "checkpoint step-00000004: [Errno 28] No space left on device" in run.output()
    assert "Traceback" not in run.output()
    assert names(directory) == ["step-00000002"]
    filler.unlink()
    again = steps_again(directory, 4)
    finish(directory, reference, STAGES[2])
    faults("disk full inside a file", f"{leave >> 10} KiB left", "survived", again, *lost(directory, reference))


@pytest.mark.faults
@pytest.mark.parametrize("holds", ["nothing", "a stopped run"])
def test_a_read_only_output_directory(small_disk, interrupted, faults, holds):
    (small_disk / "run").mkdir() if holds == "nothing" else shutil.copytree(interrupted, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    run = train(small_disk / "run")
    assert run.exit_codes() == [2, 2] and "cannot be written to: Read-only file system" in run.output()
    faults("read-only directory", f"holding {holds}", "refused", "", "", "")


# --- signals ---


def test_signals_during_evaluation_saving_and_generation(undisturbed, tmp_path, faults):
    """To one rank each; all stop at the next boundary with a checkpoint, code 75, and go on as if nothing had happened."""
    directory, reference = tmp_path / "run", undisturbed(STAGES[2])
    places = [("validate", signal.SIGUSR1, 5), ("save", signal.SIGINT, 8), ("generate", signal.SIGTERM, 12)]
    for rank, (place, number, stopped_at) in enumerate(places):
        run = train(directory, STAGES[2], faults={rank % 2: {"signal_in": {"place": place, "number": number}}})
        assert run.exit_codes() == [75, 75], run.output()
        ended = status(directory)
        assert (ended["state"], ended["exit_code"], ended["checkpoint"]) == ("stopped", 75, stopped_at), run.output()
        assert f"{signal.Signals(number).name}: stopping at the next step" in run.output()
        if place == "validate":  # the line of its step is owed, and logged by the run that goes on
            assert logged(directory)[-1]["step"] == 3
    finish(directory, reference, STAGES[2])
    faults("signal to one rank", "in evaluation, save, generation", "survived", 0, *lost(directory, reference))


@pytest.mark.faults
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_with_ranks_seconds_apart(undisturbed, tmp_path, faults, number, stage):
    directory, reference = tmp_path / "run", undisturbed(STAGES[stage])
    run = train(
        directory, STAGES[stage], faults={0: {"signal": {"step": 5, "number": number}}, 1: {"late": {"step": 5, "seconds": 3}}}
    )  # fmt: skip
    assert run.exit_codes() == [75, 75] and status(directory)["checkpoint"] == 5
    finish(directory, reference, STAGES[stage])
    faults(f"{number.name}, ranks 3 s apart", f"ZeRO-{stage}", "survived", 0, *lost(directory, reference))


@pytest.mark.faults
def test_a_signal_repeated_at_once_counts_once_and_later_ends_the_process(tmp_path, faults):
    run = train(tmp_path / "run", faults={0: {"hang": {"step": 5}}})
    wait_for_step(tmp_path / "run", 5, run)
    for _ in range(3):  # as launchers do
        os.kill(run.ranks[1], signal.SIGTERM)
        time.sleep(0.2)
    time.sleep(10)
    assert alive(run.ranks[1])
    os.kill(run.ranks[1], signal.SIGTERM)
    assert run.exit_codes(30)[1] == 128 + signal.SIGTERM if wait_killed(run) else False
    assert "SIGTERM again: ending at once" in run.output()
    faults("signal again after 10 s", "in a hung collective", "ended at once", "", "", "")


def wait_killed(run) -> bool:
    """Rank 0 sleeps for ever in this test: it is ended by hand once rank 1 is gone."""
    deadline = time.monotonic() + 20
    while alive(run.ranks[1]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(run.ranks[0], signal.SIGKILL)
    return True


def wait_for_step(directory: Path, step: int, run) -> None:
    deadline = time.monotonic() + 60
    while (
        not (directory / "metrics.jsonl").exists()
        or f'{{"step": {step},' not in (directory / "metrics.jsonl").read_text()
    ):
        assert time.monotonic() < deadline, run.output()
        time.sleep(0.02)


# --- ranks that hang, launchers that die, two owners ---


def test_a_rank_that_hangs_ends_all_with_their_stacks(tmp_path, faults):
    began = time.monotonic()
    run = train(tmp_path / "run", "training.hang_seconds=4", faults={1: {"hang": {"step": 4}}})
    assert run.exit_codes(120) == [1, 1]
    for rank in (0, 1):
        log = run.group.said[rank]
        assert f"rank {rank} (process {run.ranks[rank]}): no progress for 4 s while" in log
        assert "faults.py" in log if rank == 1 else "train_step" in log  # where it stands
    faults("a rank hangs", "at step 4", f"ended after {time.monotonic() - began:.0f} s with stacks", "", "", "")


def test_a_second_run_on_the_directory_is_refused(tmp_path, faults):
    directory = tmp_path / "run"
    run = train(directory, faults={0: {"late": {"step": 5, "seconds": 5}}})
    wait_for_step(directory, 5, run)
    second = train(directory)
    assert second.exit_codes() == [2, 2] and f"is in use by another run (process {run.ranks[0]} on " in second.output()
    assert run.exit_codes() == [0, 0]
    faults("two runs on one directory", "", "refused", "", "", "")


@pytest.mark.faults
def test_a_stale_lock_of_the_compiler_is_no_obstacle(tmp_path, faults):
    """Left by a run that was killed while DeepSpeed compiled: torch would wait on it for ever. This compiles, for a minute."""
    program = """
import os, sys, torch
from pathlib import Path
from deepspeed.git_version_info import installed_ops
from pdl import distributed
from pdl.config import Config
from pdl.model import build_extensions
installed_ops["deepspeed_shm_comm"] = False  # as in an environment that `make install` did not make
stale = Path(os.environ["PDL_CACHE"], f"torch_extensions-{torch.__version__}", "deepspeed_shm_comm", "lock")
stale.parent.mkdir(parents=True)
stale.touch()
distributed.start()
build_extensions(Config())
print(sorted(path.suffix for path in stale.parent.iterdir()))
distributed.stop()
"""
    built = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=environment(PDL_CACHE=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert built.returncode == 0 and "'.so'" in built.stdout, built.stdout + built.stderr
    faults("stale lock of DeepSpeed's compiler", "", "survived", "", "", "")


# --- what is not finite ---


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (2, "fp32"),
        *[pytest.param(stage, "fp32", marks=pytest.mark.faults) for stage in (0, 1, 3)],
        *[pytest.param(stage, "bf16", marks=pytest.mark.faults) for stage in (1, 2, 3)],
    ],
)
def test_isolated_steps_that_are_not_finite_are_left_out(tmp_path, faults, stage, precision):
    """The loss of rank 1 in step 3, a gradient of rank 0 in step 6: no update there, on any rank. A third one ends the run."""
    directory = tmp_path / "run"
    own = [
        STAGES[stage],
        f"training.precision={precision}",
        "training.skip_nonfinite=2",
        "training.evaluate_every=1",
        "training.log_every=1",
    ]
    each = {
        1: {"not_finite": {"steps": [3], "where": "loss"}},
        0: {"not_finite": {"steps": [6, 9], "where": "gradient"}},
    }
    run = train(directory, *own, faults=each)
    assert run.exit_codes() == [1, 1], run.output()
    assert (
        "step 9: the gradient is not finite; 2 before it were left out; dataset rows [" in status(directory)["reason"]
    )
    lines = {line["step"]: line for line in logged(directory)}
    assert [lines[step]["train/skipped_steps"] for step in range(1, 10)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for step in (3, 6):  # nothing changed in them, and the steps after them did
        before, after, later = (
            {k: v for k, v in lines[n].items() if k.startswith("validation")} for n in (step, step + 1, step + 2)
        )
        assert before == after != later
        assert "train/loss" not in lines[step + 1] and "train/loss" in lines[step + 2]
    assert all(not verify(checkpoint) for checkpoint in checkpoints(directory))
    faults(f"nan loss, inf gradient, ZeRO-{stage} {precision}", "on one rank", "2 left out, then refused", "", "", "")


@pytest.mark.faults
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("where", ["loss", "gradient", "weights"])
def test_what_is_not_finite_stops_all_ranks_before_anything_is_saved(undisturbed, tmp_path, faults, stage, where):
    directory, reference = tmp_path / "run", undisturbed(STAGES[stage])
    run = train(directory, STAGES[stage], faults={1: {"not_finite": {"steps": [5], "where": where}}})
    assert run.exit_codes() == [1, 1], run.output()
    ended = status(directory)
    # At stage 3 the weights of step 5 are finite, those that it makes are not.
    found = "step 6: a weight" if (stage, where) == (3, "weights") else "step 5: the"
    assert found in ended["reason"] and "is not finite" in ended["reason"] and not ended["restart"]
    assert names(directory) == ["step-00000002", "step-00000004"]
    again = steps_again(directory, 5)
    finish(directory, reference, STAGES[stage])  # the fault was the machine's, not the data's
    faults(
        f"nan in {where}, ZeRO-{stage}", "rank 1, step 5", "refused, then survived", again, *lost(directory, reference)
    )


@pytest.mark.faults
def test_a_deterministic_run_refuses_what_is_not(undisturbed, tmp_path, faults):
    directory, setting = tmp_path / "run", "training.deterministic=true"
    run = train(directory, setting, faults={rank: {"not_deterministic": 5} for rank in (0, 1)})
    assert run.exit_codes() == [2, 2], run.output()
    assert f"{setting}: put_ does not have a deterministic implementation" in run.output()
    assert status(directory)["state"] == "refused"
    again = steps_again(directory, 5)
    finish(directory, undisturbed(setting), setting)
    faults("not deterministic", "an operation in step 5", "refused", again, *lost(directory, undisturbed(setting)))


@pytest.mark.faults
def test_two_steps_in_a_row_are_not_isolated(tmp_path, faults):
    fault = {"not_finite": {"steps": [4, 5], "where": "loss"}}
    run = train(tmp_path / "run", "training.skip_nonfinite=5", faults={1: fault})
    assert run.exit_codes() == [1, 1] and "step 5: the loss is not finite; 1 before it" in run.output()
    faults("nan twice in a row", "skip_nonfinite=5", "refused", "", "", "")


# --- resumed with something else ---


def test_another_run_is_refused_with_every_difference(copied, faults):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    run = train(copied, "training.seed=1", "loss.alpha=0.5")
    assert run.exit_codes() == [2, 2]
    assert (
        "training.seed: 0 there, 1 asked for" in run.output()
        and "loss.alpha: 0.25 there, 0.5 asked for" in run.output()
    )
    run = train(copied, STAGES[1])
    assert run.exit_codes() == [2, 2]
    assert "written at ZeRO stage 2 and is asked for at stage 1" in run.output()
    run = train(copied, "training.max_steps=20")
    assert run.exit_codes() == [2, 2] and "the linear schedule ends at step 12" in run.output()
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before
    for what in ("seed", "alpha", "stage", "max_steps beyond the schedule"):
        faults(f"resumed with another {what}", "", "refused", "", "", "")


@pytest.mark.faults
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 4])
def test_another_number_of_ranks_goes_on_with_the_same_batches(tmp_path, faults, stage, ranks):
    own = [STAGES[stage], "model.dropout=0", "training.micro_batch_size=4"]
    whole, directory = tmp_path / "whole", tmp_path / "run"
    assert train(whole, *own).exit_codes() == [0, 0]
    stopped = train(directory, *own, faults={0: {"signal": {"step": 7, "number": signal.SIGTERM}}})
    assert stopped.exit_codes() == [75, 75]
    run = train(directory, *own, ranks=ranks)
    assert run.exit_codes() == [0] * ranks, run.output()
    assert (f"resharding step-00000007 from 2 ranks to {ranks}" in run.output()) == (stage > 0)
    for mine, reference in zip(logged(directory), logged(whole), strict=True):
        assert mine == pytest.approx(reference, rel=1e-4)
    assert read_manifest(checkpoints(directory)[-1])["world_size"] == ranks
    faults(f"2 ranks, then {ranks}", f"ZeRO-{stage}", "survived, to rounding", "", "", "")


def test_going_back_to_a_named_checkpoint(undisturbed, copied, tmp_path):
    """One of the run's own: the newer ones are set aside. One of elsewhere: only where it is trusted, and exact too."""
    reference, older = undisturbed(), copied / "checkpoints/step-00000006"
    elsewhere = tmp_path / "elsewhere"
    refused = train(elsewhere, f"training.resume={older}")
    assert refused.exit_codes() == [2, 2] and "training.trust_checkpoint=true" in refused.output()
    run = train(elsewhere, f"training.resume={older}", "training.trust_checkpoint=true")
    assert run.exit_codes() == [0, 0], run.output()
    assert logged(elsewhere) == [line for line in reference if line["step"] > 6]
    printed = finish(copied, reference, f"training.resume={older}")
    assert "continuing at step 6" in printed and "discarded-step-00000008" in names(copied)


# --- nodes without a shared file system ---


def test_nodes_without_a_shared_file_system(undisturbed, tmp_path, faults):
    """Two nodes, as far as the run can see: one rank each, the same relative directory, different disks."""
    reference, nodes = undisturbed(STAGES[2]), [tmp_path / "node0", tmp_path / "node1"]
    for node in nodes:
        node.mkdir()
        for shared in ("configs", "recipes"):
            (node / shared).symlink_to(REPOSITORY / shared)
    apart = {"folder": nodes, "environment": {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}}
    run = train("run", STAGES[2], faults={1: {"kill": {"step": 7, "delay": 0.0}}}, **apart)
    assert run.exit_codes()[1] == -signal.SIGKILL
    for node, manifest in ((node, read_manifest(node / "run/checkpoints/step-00000006")) for node in nodes):
        assert verify(node / "run/checkpoints/step-00000006") == []
        assert manifest["ranks"] == [nodes.index(node)]
    flip(nodes[1] / "run/checkpoints/step-00000006/engine/zero_pp_rank_1_mp_rank_00_optim_states.pt")
    again = steps_again(nodes[1] / "run", 7)
    run = train("run", STAGES[2], **apart)
    assert run.exit_codes() == [0, 0], run.output()
    assert "continuing at step 4" in run.output() and logged(nodes[0] / "run") == reference
    assert all("damaged-step-00000006" in names(node / "run") for node in nodes)
    assert all((node / "run/model/model.safetensors").exists() for node in nodes)
    faults("damage on one of two nodes", "no shared file system", "survived", again, *lost(nodes[0] / "run", reference))
