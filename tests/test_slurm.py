"""launch/slurm.sbatch on a real Slurm cluster of two hosts: jobs that are stopped, preempted, refused, or fail again."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import hosts, slurm
from conftest import REPOSITORY, environment
from test_launch import ENDLESS, ODD_NAME, SAMPLE, SEEN, TINY, read

SCRIPT = "launch/slurm.sbatch"
RUN = [SAMPLE, *TINY, *SEEN, "training.max_steps=30", "model.dropout=0.0"]


# --- without a cluster ---


def bash(*arguments: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        cwd=REPOSITORY,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_scripts_pass_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck missing: apt-get install shellcheck")
    scripts = [*(REPOSITORY / "launch").glob("*.sh"), REPOSITORY / SCRIPT]
    ended = subprocess.run(["shellcheck", "--severity=style", *scripts], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


def test_help():
    asked, bare = bash("--help"), bash()
    assert (asked.returncode, bare.returncode) == (0, 2)
    assert f"sbatch [options of sbatch] {SCRIPT} CONFIG.yaml" in asked.stdout
    assert asked.stdout == bare.stderr


def test_a_dry_run_prints_what_a_shell_reads_back():
    ended = bash("--dry-run", SAMPLE, f"training.output_dir={ODD_NAME}")
    assert ended.returncode == 0
    read_back = subprocess.run(["bash", "-c", f"printf '%s\\n' {ended.stdout}"], capture_output=True, text=True).stdout
    *settings, script, config, override = read_back.splitlines()
    assert settings[:5] == ["env", "NNODES=NODES", "RDZV_ENDPOINT=NODE:PORT", "RDZV_ID=JOB", "srun"]
    assert (script, config) == (f"{REPOSITORY}/launch/torchrun.sh", SAMPLE)
    assert override == f"training.output_dir={ODD_NAME}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"MAX_REQUEUES": "often"}, "MAX_REQUEUES=often must be a number of requeues"), ({}, "this is no Slurm job")],
)
def test_what_cannot_be_honoured_ends_with_2(settings, message):
    ended = bash(SAMPLE, **settings)
    assert ended.returncode == 2
    assert message in ended.stderr


# --- on a cluster ---


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := hosts.missing() or slurm.missing():
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("slurm")
    network = hosts.Network(directory)
    try:
        yield slurm.Slurm(network, directory)
    finally:
        network.close()


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> list[float]:
    """Of the same two ranks on one host."""
    run = tmp_path_factory.mktemp("single") / "run"
    command = ["launch/torchrun.sh", *RUN, f"training.output_dir={run}"]
    subprocess.run(command, cwd=REPOSITORY, env=environment(NPROC="2"), check=True, timeout=300)
    return logged(run)


def logged(run: Path) -> list[float]:
    """The loss of every step; each is logged once."""
    lines = [json.loads(line) for line in read(run / "metrics.jsonl").splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [line["train/loss"] for line in lines[1:]]


def steps(run: Path) -> int:
    return read(run / "metrics.jsonl").count("\n")


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def submit(cluster, run: Path, settings: list[str], *options: str, **more: str) -> slurm.Job:
    return cluster.submit(
        "--nodes=2", *options, SCRIPT, *settings, f"training.output_dir={run}", **{"NPROC": "1"} | more
    )


@pytest.mark.cluster
def test_a_job_that_is_told_to_saves_is_requeued_and_ends_as_if_it_had_never_stopped(cluster, losses, tmp_path):
    run = tmp_path / ODD_NAME
    job = submit(cluster, run, RUN)
    job.until(lambda: steps(run) > 2)
    cluster.command("scancel", "--batch", "--signal=USR1", str(job.number))
    assert job.ends() == ("COMPLETED", "0:0"), job.said()
    assert job.restarts() == 1
    assert "2 x 4 examples x 2 micro-batches = 16 per step" in job.said()
    assert job.said().count("stopped by a signal; requeued, time 1 of at most 20") == 1
    assert job.said().count(" of 30") and "continuing at step" in job.said()
    assert (status(run)["state"], status(run)["step"]) == ("done", 30)
    # Two hosts sum over the network, two ranks of one host in shared memory: the same up to rounding.
    assert logged(run) == pytest.approx(losses, rel=1e-5)
    assert list(tmp_path.iterdir()) == [run]


@pytest.mark.cluster
def test_a_time_limit_and_a_preemption_requeue_and_scancel_ends_for_good(cluster, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, run, [SAMPLE, *TINY, *ENDLESS], "--time=60", "--signal=B:USR1@600")
    job.until(lambda: steps(run) > 2)
    # Less is left than the signal's 600 s: it comes when Slurm looks at time limits next, every 30 s.
    cluster.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=9")
    job.until(lambda: job.restarts() == 1)
    assert "stopped by a signal; requeued, time 1 of at most 20" in job.said()
    assert status(run)["state"] == "stopped"
    cluster.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")

    seen = steps(run)
    job.until(lambda: steps(run) > seen + 2)
    urgent = cluster.submit("--nodes=2", "--partition=urgent", "--wrap=true")
    job.until(lambda: job.restarts() == 2)
    assert "preempted; requeued, time 2 of at most 20" in job.said()
    assert urgent.ends() == ("COMPLETED", "0:0")

    seen = steps(run)
    job.until(lambda: steps(run) > seen + 2)
    cluster.command("scancel", str(job.number))
    state, _ = job.ends()
    assert (state, job.restarts()) == ("CANCELLED", 2), job.said()
    assert status(run)["state"] == "stopped", job.said()
    assert logged(run)


@pytest.mark.cluster
def test_a_job_that_fails_at_the_same_step_each_time_is_requeued_once(cluster, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        (REPOSITORY / "recipes/summarization/recipe.py").read_text()
        + "\n\nimport os\nimport signal\n\n\ndef scores(predictions, examples):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = tmp_path / "run"
    job = submit(cluster, run, [SAMPLE, *TINY, f"task={recipe}"])
    state, code = job.ends()
    assert (state, code.partition(":")[0] != "0", job.restarts()) == ("FAILED", True, 1), job.said()
    assert "at step 2; requeued, time 1 of at most 20" in job.said()
    assert "at step 2, as it did before; not requeued" in job.said()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.py", "run"]


@pytest.mark.cluster
def test_a_refused_job_ends_with_2_from_any_place_of_the_repository_with_its_own_environment(cluster, tmp_path):
    repository = tmp_path / "it's a repository"
    shutil.copytree(REPOSITORY / "launch", repository / "launch")
    (repository / ".venv").symlink_to(sys.prefix)
    path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if not Path(part, "torchrun").exists())
    data = tmp_path / "data.jsonl"
    data.write_text("no JSON\n")
    job = cluster.submit(
        "--nodes=2", repository / SCRIPT, SAMPLE, *TINY, f"data.train={data}", f"training.output_dir={tmp_path / 'run'}",
        NPROC="1", PATH=path,
    )  # fmt: skip
    assert job.ends() == ("FAILED", "2:0"), job.said()
    assert job.restarts() == 0
    assert f"{data}:1" in job.said()
    assert not (tmp_path / "run").exists()


@pytest.mark.cluster
def test_a_job_that_gets_no_further_is_not_requeued_for_ever(cluster, tmp_path):
    """As where the time limit leaves nothing before the signal that announces it."""
    run = tmp_path / "run"
    job = submit(cluster, run, [SAMPLE, *TINY, *ENDLESS])
    job.until(lambda: steps(run) > 2)
    cluster.command("scancel", "--batch", "--signal=USR1", str(job.number))
    job.until(lambda: job.restarts() == 1)
    saved = status(run)["checkpoint"]
    job.until(lambda: job.state() == "RUNNING")
    time.sleep(1)  # the script is there; the ranks take seconds
    cluster.command("scancel", "--batch", "--signal=USR1", str(job.number))
    assert job.ends() == ("FAILED", "75:0"), job.said()
    assert job.restarts() == 1
    assert f"stopped by a signal, its checkpoint at step {saved}, as it did before; not requeued" in job.said()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.cluster
def test_a_job_without_gpus_is_refused_unless_it_is_to_train_without(cluster, tmp_path):
    job = submit(cluster, tmp_path / "run", RUN, DS_ACCELERATOR="")
    assert job.ends() == ("FAILED", "2:0"), job.said()
    assert "the job has no GPU: sbatch --gpus-per-node=N ..., or DS_ACCELERATOR=cpu" in job.said()
    assert job.restarts() == 0


@pytest.mark.cluster
def test_no_more_requeues_than_allowed(cluster, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, run, [SAMPLE, *TINY, *ENDLESS], MAX_REQUEUES="0")
    job.until(lambda: steps(run) > 2)
    cluster.command("scancel", "--batch", "--signal=USR1", str(job.number))
    assert job.ends() == ("FAILED", "75:0"), job.said()
    assert "not requeued: it was 0 times already, MAX_REQUEUES=0" in job.said()


@pytest.mark.cluster
def test_what_slurm_itself_starts_again_counts(cluster, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, run, [SAMPLE, *TINY, *ENDLESS], MAX_REQUEUES="0")
    job.until(lambda: steps(run) > 2)
    cluster.command("scontrol", "requeue", str(job.number))
    assert job.ends() == ("FAILED", "75:0"), job.said()
    assert "Slurm has started this job again 1 times, MAX_REQUEUES=0; not run" in job.said()
