"""What tests share: a clean environment for real processes, and a way to start process groups."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # in this process too, also on a machine with GPUs
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is made: before anything imports Triton

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"  # real corpora where they are at hand; tests skip without them


def environment(**more: str) -> dict[str, str]:
    """For child processes: CPU, one thread each, no network, a cache of the tests' own, tools of this interpreter on the path."""
    return os.environ | {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHDYNAMO_DISABLE": "1",  # nothing is compiled; DeepSpeed would import the compiler all the same
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **more,
    }


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    os.environ["PDL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def torchrun(ranks: int, *arguments: str | Path, timeout: float = 600, **more: str) -> subprocess.CompletedProcess:
    """Run a script or `-m module` on some ranks of this machine, output captured."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        *map(str, arguments),
    ]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment(**more), capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture
def group_of_one(monkeypatch):
    """A process group of this process alone, for what is a collective."""
    from pdl import distributed

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # so that what `start` sets is taken back
        monkeypatch.delenv(name)
    distributed.start()
    yield
    distributed.stop()


# --- the table of faults that were injected, at the end of the tests ---

_FAULTS: list[tuple] = []


@pytest.fixture
def faults():
    """Note a fault: what, how it was injected, what became of the run, steps trained again, log lines lost, log lines twice."""
    return lambda *row: _FAULTS.append(row)


def pytest_terminal_summary(terminalreporter):
    if _FAULTS:
        rows = [("fault", "injected", "outcome", "steps again", "lines lost", "lines twice"), *_FAULTS]
        widths = [max(len(str(row[column])) for row in rows) for column in range(6)]
        terminalreporter.section("faults")
        for row in rows:
            cells = [f"{cell:<{width}}" for cell, width in zip(map(str, row), widths, strict=True)]
            terminalreporter.write_line("  ".join(cells).rstrip())
