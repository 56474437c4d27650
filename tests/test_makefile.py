"""The Makefile's promises that need no installation, and the pins that it installs."""

import re
import shutil
import subprocess
import tomllib

import pytest
from conftest import REPOSITORY, environment
from packaging.requirements import Requirement
from packaging.version import Version

TASKS = ["summarization", "dialogue", "style-transfer", "code-generation"]
TARGETS = [
    "install",
    *(f"train-{task}" for task in TASKS),
    "launch-torchrun",
    "launch-deepspeed",
    "launch-slurm",
    "test",
    "test-slow",
    "test-faults",
    "test-cluster",
    "lint",
    "tensorboard",
    "clean",
]


@pytest.fixture
def checkout(tmp_path):
    """What of a fresh clone the Makefile reads."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    return tmp_path


def make(directory, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    # Under `make test` the outer make's flags and variables are in the environment.
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "NPROC", "CONFIG", "ARGS")
    env = {name: value for name, value in environment(**more).items() if name not in outer}
    return subprocess.run(
        ["make", *arguments], cwd=directory, env=env, capture_output=True, text=True, timeout=60, check=False
    )


def test_help_is_the_default_and_lists_every_target(checkout):
    told = make(checkout, "help")
    assert told.returncode == 0, told.stderr
    assert make(checkout).stdout == told.stdout
    listed = re.findall(r"^make (\S+) ", told.stdout, flags=re.MULTILINE)
    assert listed == TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_but_clean_installs_on_a_fresh_clone(checkout, target):
    plan = make(checkout, "-n", target)
    assert plan.returncode == 0, plan.stderr
    assert ("pip install torch==" in plan.stdout) == (target != "clean")


@pytest.mark.parametrize("task", TASKS)
def test_training_runs_the_sample_or_what_is_given(checkout, task):
    (command,) = re.findall(r"^launch/.*", make(checkout, "-n", f"train-{task}").stdout, flags=re.MULTILINE)
    script, config = command.split()
    assert (REPOSITORY / script).is_file() and (REPOSITORY / config).is_file()
    assert config == f"configs/{task.replace('-', '_')}/sample.yaml"

    given = make(checkout, "-n", f"train-{task}", "CONFIG=my.yaml", "ARGS=training.max_steps=3 loss.alpha=0.5")
    assert f"{script} my.yaml training.max_steps=3 loss.alpha=0.5\n" in given.stdout


def test_launching_takes_hosts_nodes_and_a_configuration(checkout):
    def command(*arguments: str) -> str:
        return make(checkout, "-n", *arguments).stdout.splitlines()[-1].rstrip()

    sample = "configs/summarization/sample.yaml"
    assert command("launch-torchrun") == f"launch/torchrun.sh {sample}"
    given = ["HOSTS=my hosts", "CONFIG=my.yaml", "ARGS=loss.alpha=0.5"]
    assert command("launch-deepspeed", *given) == 'HOSTFILE="my hosts" launch/deepspeed.sh my.yaml loss.alpha=0.5'
    assert command("launch-slurm") == f"sbatch launch/slurm.sbatch {sample}"
    assert command("launch-slurm", "NNODES=4", "CONFIG=my.yaml") == "sbatch --nodes=4 launch/slurm.sbatch my.yaml"
    assert (
        command("launch-slurm", "SBATCH=--time=60 --gpus=2")
        == f"sbatch --time=60 --gpus=2 launch/slurm.sbatch {sample}"
    )


def test_nproc_reaches_the_launch_script(checkout):
    shutil.copytree(REPOSITORY / "launch", checkout / "launch")
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "installed").touch()  # newer than what was copied: nothing to install
    ended = make(checkout, "train-dialogue", "NPROC=three")
    assert ended.returncode == 2
    assert "NPROC=three must be a number of ranks" in ended.stderr


def test_clean_leaves_runs_and_the_environment_alone(checkout):
    kept = [
        "runs/dialogue/sample/report.json",
        "runs/dialogue/sample/__pycache__/odd.pyc",
        ".venv/installed",
        ".venv/lib/__pycache__/module.pyc",
        "pdl/train.py",
    ]
    removed = [
        "pdl/__pycache__/train.pyc",
        "tests/__pycache__/x.pyc",
        "build/lib/x.py",
        ".pytest_cache/x",
        ".ruff_cache/x",
    ]
    for name in kept + removed:
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("content")
    ended = make(checkout, "clean")
    assert ended.returncode == 0, ended.stderr
    assert [name for name in kept if not (checkout / name).exists()] == []
    assert [name for name in removed if (checkout / name).exists()] == []


def test_a_missing_compiler_is_named_before_anything_is_installed(checkout):
    ended = make(checkout, "install", CXX="no-such-compiler")
    assert ended.returncode == 2
    assert "C++ compiler" in ended.stderr
    assert not (checkout / ".venv").exists()


def test_every_dependency_is_pinned_to_a_version_that_the_package_admits():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    admitted = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["dev"],
    ]
    lines = [line.partition("#")[0].strip() for line in (REPOSITORY / "requirements.txt").read_text().splitlines()]
    pins = dict(line.split("==") for line in lines if line)
    for requirement in map(Requirement, admitted):
        assert Version(pins[requirement.name]) in requirement.specifier, requirement
