"""The launch scripts, run for real on one node: exit codes, signals, ranks and launchers that are killed."""

import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import REPOSITORY, environment
from transformers import T5Config

from pdl.tokenizer import train_tokenizer

SCRIPTS = ["torchrun.sh", "deepspeed.sh"]
SAMPLE = "configs/summarization/sample.yaml"
TINY = ["training.max_steps=2", "training.micro_batch_size=4", "evaluation.examples=2"]

# Runs that are long enough to be stopped, and log every step.
SEEN = [f"training.{name}" for name in ("schedule=constant", "log_every=1", "evaluate_every=5000", "save_every=5000")]
ENDLESS = [*SEEN, "training.max_steps=5000"]
PHASES = {
    "training": ENDLESS,
    # Nearly all of the time goes into evaluating, or a good part of it into saving.
    "evaluation": [*ENDLESS, "training.evaluate_every=1", "training.global_batch_size=2", "training.micro_batch_size=1",
                   "data.validation=recipes/summarization/sample/train.jsonl"],
    "save": [*ENDLESS, "training.save_every=1"],
}  # fmt: skip


def launch(script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    command = [f"launch/{script}", *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment(**{"NPROC": "2"} | more), capture_output=True, text=True, timeout=300
    )


@dataclass
class Launched:
    """A launch that goes on. All its processes have the path of the run's directory in their command lines."""

    started: subprocess.Popen
    run: Path
    output: Path

    def processes(self) -> dict[int, str]:
        """Command lines by process id: make, the script, launchers, ranks."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            line = read(entry / "cmdline").replace("\0", " ")
            if str(self.run) in line:
                found[int(entry.name)] = line
        return found

    def ranks(self) -> list[int]:
        """Process ids, in the order of ranks."""
        settings = {pid: read(Path(f"/proc/{pid}/environ")).split("\0") for pid in self.processes()}
        return sorted(
            (pid for pid in settings if any(setting.startswith("RANK=") for setting in settings[pid])),
            key=lambda pid: int(next(s for s in settings[pid] if s.startswith("RANK=")).removeprefix("RANK=")),
        )

    def steps(self) -> list[int]:
        """The logged ones."""
        return [json.loads(line)["step"] for line in read(self.run / "metrics.jsonl").split("\n")[:-1]]

    def status(self) -> dict:
        return json.loads((self.run / "status.json").read_text())

    def until(self, reached: Callable[[], object]) -> None:
        deadline = time.monotonic() + 240
        while not reached():
            assert self.started.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.01)

    def until_in(self, phase: str) -> None:
        """Until the run is in the middle of a phase, some steps after its start."""
        first = len(self.steps())
        self.until(lambda: len(self.steps()) >= first + 2)
        if phase == "save":
            self.until(lambda: list(self.run.glob("checkpoints/partial-*")))
        if phase == "evaluation":
            began = time.monotonic()
            first = len(self.steps())
            self.until(lambda: len(self.steps()) > first)
            halfway = time.monotonic() + (time.monotonic() - began) / 2
            self.until(lambda: time.monotonic() > halfway)

    def ends(self) -> int:
        """The exit code; no process is left behind."""
        code = self.started.wait(timeout=240)
        assert self.processes() == {}, self.output.read_text()
        return code

    def ends_stopped(self) -> dict:
        """As a run that was stopped does: saved, with every log line once. Returns the manifest of its checkpoint."""
        assert self.ends() == 75, self.output.read_text()
        status = self.status()
        assert (status["state"], status["exit_code"]) == ("stopped", 75)
        manifest = json.loads((self.run / f"checkpoints/step-{status['checkpoint']:08d}" / "manifest.json").read_text())
        last = status["checkpoint"] - manifest["trainer"]["owed"]
        assert self.steps() == list(range(last + 1))
        return manifest


def read(path: Path) -> str:
    """Empty where there is no such file, or no such process any more."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


@pytest.fixture
def start(tmp_path):
    """Start a command on a run in a directory of this test. Whatever is left of it at the end of the test is killed."""
    all_launched = []

    def start_it(*command: str, run: str = "run", terminal: int | None = None, **more: str) -> Launched:
        def child() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # also where the tests run in the background
            if terminal is not None:
                fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

        launched = Launched(None, tmp_path / run, tmp_path / "output")
        with launched.output.open("a") as file:
            launched.started = subprocess.Popen(
                [part.replace("RUN", str(launched.run)) for part in command], cwd=REPOSITORY, start_new_session=True,
                env=environment(**{"NPROC": "2"} | more), stdin=terminal, stdout=file, stderr=file, preexec_fn=child,
            )  # fmt: skip
        all_launched.append(launched)
        return launched

    yield start_it
    for launched in all_launched:
        for pid in launched.processes():
            os.kill(pid, signal.SIGKILL)
        launched.started.wait()


def command(script: str, settings: list[str]) -> list[str]:
    return [f"launch/{script}", SAMPLE, *TINY, *settings, "training.output_dir=RUN"]


# --- whole runs ---


ODD_NAME = """it's a "run", $HOME"""


def check_finished(launched: Launched, steps: int) -> None:
    assert launched.ends() == 0, launched.output.read_text()
    assert "2 x 4 examples x 2 micro-batches = 16 per step" in launched.output.read_text()
    status = launched.status()
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, steps)
    assert launched.steps() == list(range(steps + 1))
    assert (launched.run / "model" / "model.safetensors").stat().st_size > 1_000_000


def test_torchrun_stops_on_a_signal_goes_on_and_brings_back_a_killed_rank(start, tmp_path):
    this = command("torchrun.sh", [*SEEN, "training.max_steps=40"])
    stopped = start(*this, run=ODD_NAME)
    stopped.until(stopped.steps)
    stopped.started.send_signal(signal.SIGUSR1)
    step = stopped.ends_stopped()["step"]

    logs = tmp_path / "the logs"
    goes_on = start(*this, run=ODD_NAME, MAX_RESTARTS="1", LOG_DIR=str(logs))
    first = len(goes_on.steps())
    goes_on.until(lambda: len(goes_on.steps()) > first + 1)
    os.kill(goes_on.ranks()[1], signal.SIGKILL)
    check_finished(goes_on, 40)
    assert goes_on.output.read_text().count(f"continuing at step {step} of 40") == 2  # after the kill again
    kept = {path.relative_to(logs).parts[2:] for path in logs.glob("*/*/*/*/*.log")}  # below the host and the launch
    assert kept == {
        (f"attempt_{n}", rank, f"{out}.log") for n in (0, 1) for rank in "01" for out in ("stdout", "stderr")
    }


@pytest.mark.faults  # a minute; torchrun, what `make` uses, is tried in every test run
def test_deepspeed_stops_on_a_signal_and_goes_on(start):
    this = command("deepspeed.sh", [*SEEN, "training.max_steps=40"])
    stopped = start(*this, run=ODD_NAME)
    stopped.until(stopped.steps)
    stopped.started.send_signal(signal.SIGTERM)
    stopped.ends_stopped()
    check_finished(start(*this, run=ODD_NAME), 40)


@pytest.mark.parametrize(
    ("script", "override", "message"),
    [
        ("torchrun.sh", "training.max_stepz=2", "did you mean training.max_steps?"),
        ("deepspeed.sh", "training.max_stepz=2", "did you mean training.max_steps?"),
        ("torchrun.sh", "training.global_batch_size=4", "x 2 ranks; 8 would be"),  # the check itself is one process
    ],
)
def test_a_refused_configuration_ends_with_2(script, override, message, tmp_path):
    ended = launch(script, SAMPLE, *TINY, f"training.output_dir={tmp_path / 'run'}", override)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert not (tmp_path / "run").exists()


def test_an_elastic_run_is_refused_where_any_number_of_nodes_would_be():
    nodes = {"NNODES": "1:4", "NPROC": "1", "MAX_RESTARTS": "1", "RDZV_ENDPOINT": "localhost:29400"}
    ended = launch("torchrun.sh", SAMPLE, *TINY, **nodes)
    assert ended.returncode == 2
    assert "there can be 1 2 3 4 ranks; the configuration must do for each, and is refused on 3" in ended.stderr


def test_torchrun_keeps_the_code_of_a_run_refused_after_its_check_and_does_not_repeat_it(tmp_path):
    # A model without its weights: only the run loads them; torchrun itself would end with 1.
    run, pretrained = tmp_path / "run", tmp_path / "pretrained"
    train_tokenizer(["a few words to learn from"] * 50, 300, pretrained)
    T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=300).save_pretrained(pretrained)
    only_config = f"model={{name_or_path: {pretrained}}}"
    ended = launch(
        "torchrun.sh", SAMPLE, *TINY, f"training.output_dir={run}", only_config, "tokenizer=null", MAX_RESTARTS="1"
    )
    assert "could not be loaded" in ended.stderr
    assert json.loads((run / "status.json").read_text())["state"] == "refused"
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert ended.stderr.count("pdl: not started again: ") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    asked, bare = launch(script, "--help"), launch(script)
    assert (asked.returncode, bare.returncode) == (0, 2)
    assert f"launch/{script} [--dry-run] CONFIG.yaml" in asked.stdout
    assert asked.stdout == bare.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_a_line_to_paste_and_runs_nothing(script, tmp_path):
    run = f"training.output_dir={tmp_path / ODD_NAME}"
    shown = launch(script, "--dry-run", SAMPLE, run, INTERFACE="eth0")
    assert (shown.returncode, shown.stderr) == (0, ""), shown.stderr
    words = shlex.split(shown.stdout)
    assert words[:4] == ["env", "NCCL_SOCKET_IFNAME=eth0", "GLOO_SOCKET_IFNAME=eth0", script.removesuffix(".sh")]
    assert words[-4:] == ["pdl", "train", SAMPLE, run]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("script", "name"), [("torchrun.sh", "NNODES=2"), ("deepspeed.sh", "NODE_RANK=1")])
def test_over_ssh_each_host_gets_the_same_command_and_what_a_run_reads(script, name, tmp_path):
    hostfile = tmp_path / "the hosts"
    hostfile.write_text("# two of them\n\nalpha slots=4\nbeta\tslots=2")
    settings = {"HOSTFILE": str(hostfile), "NPROC": "", "NCCL_DEBUG": "two words", "UNRELATED": "1"}
    shown = launch(script, "--dry-run", SAMPLE, ODD_NAME, **settings)
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = [shlex.split(line) for line in shown.stdout.splitlines()]
    assert [(line[0], line[-2]) for line in lines] == [("ssh", "alpha"), ("ssh", "beta")]
    words = shlex.split(lines[1][-1])
    assert words[:5] == ["cd", str(REPOSITORY), "&&", "exec", "env"]
    assert words[-3:] == [str(REPOSITORY / "launch" / script), SAMPLE, ODD_NAME]
    assert {name, "NCCL_DEBUG=two words", "HF_HUB_OFFLINE=1"} < set(words)
    assert "UNRELATED=1" not in words


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        ("torchrun.sh", {"NPROC": "two"}, "NPROC=two must be a number of ranks"),
        ("torchrun.sh", {"NPROC": "0"}, "NPROC=0 must be a number of ranks"),
        ("torchrun.sh", {"STOP_SECONDS": "10 minutes"}, "STOP_SECONDS=10 minutes must be a number of seconds"),
        ("torchrun.sh", {"MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1 must be a number of restarts"),
        ("torchrun.sh", {"NNODES": "2"}, "NNODES=2 needs RDZV_ENDPOINT"),
        ("torchrun.sh", {"NNODES": "few"}, "NNODES=few must be a number of nodes, or least:most"),
        ("torchrun.sh", {"NNODES": "2:1"}, "NNODES=2:1: the least comes first"),
        ("torchrun.sh", {"NNODES": "1:2"}, "NNODES=1:2 needs MAX_RESTARTS"),
        ("torchrun.sh", {"NNODES": "2", "HOSTFILE": "hosts"}, "HOSTFILE says how many nodes there are, and NNODES=2 too"),
        ("torchrun.sh", {"HOSTFILE": "no-such-file"}, "HOSTFILE=no-such-file is no file"),
        ("deepspeed.sh", {"HOSTFILE": "README.md"}, '"host slots=ranks", each host once:\n  - '),
        ("deepspeed.sh", {"HOSTFILE": "launch/hostfile.example", "NODE_RANK": "2"}, "NODE_RANK=2 must be a number below 2"),
        ("deepspeed.sh", {"HOSTFILE": "launch/hostfile.example", "MASTER_PORT": "x"}, "MASTER_PORT=x must be a port"),
        ("deepspeed.sh", {"NODE_RANK": "0"}, "NODE_RANK=0 needs HOSTFILE"),
    ],
)  # fmt: skip
def test_an_environment_that_cannot_be_honoured(script, settings, message):
    ended = launch(script, SAMPLE, **settings)
    assert ended.returncode == 2
    assert message in ended.stderr


def test_a_signal_during_the_check_ends_it(start):
    launched = start(*command("torchrun.sh", []))
    launched.until(lambda: any("--check" in line for line in launched.processes().values()))
    launched.started.send_signal(signal.SIGTERM)
    assert launched.ends() == 75
    assert not launched.run.exists()
    assert "stopped by a signal; the same command goes on" in launched.output.read_text()


# --- run_launcher: any command that starts processes is a launcher to it ---


def shell(run_directory, command: str) -> list[str]:
    script = 'set -euo pipefail; source launch/common.sh; run_directory=$1; run_launcher bash -c "$2"'
    return ["bash", "-c", script, "launch", str(run_directory), command]


@pytest.mark.parametrize(
    ("written_before", "command", "code"),
    [
        (None, "exit 0", 0),
        (None, "exit 3", 3),
        (None, """echo '{"launch": "'$PDL_LAUNCH'", "exit_code": 75}' > "$STATUS"; exit 1""", 75),
        # A rank was killed, and the launcher hid it or not.
        (None, """echo '{"launch": "'$PDL_LAUNCH'", "exit_code": null}' > "$STATUS"; exit 0""", 1),
        (None, """echo '{"launch": "'$PDL_LAUNCH'", "exit_code": null}' > "$STATUS"; exit 4""", 4),
        # Left by an earlier launch, as it was or with another time.
        ('{"launch": "earlier", "exit_code": 0}', "exit 5", 5),
        ('{"launch": "earlier", "exit_code": 75}', 'touch "$STATUS"; exit 5', 5),
        ("damaged", "exit 5", 5),
        # The clock was set back.
        ("{}", """echo '{"launch": "'$PDL_LAUNCH'", "exit_code": 2}' > "$STATUS"; touch -d 2001-01-01 "$STATUS"; exit 1""", 2),
    ],
)  # fmt: skip
def test_the_exit_code_is_the_one_the_run_wrote(written_before, command, code, tmp_path):
    run = tmp_path / "a run"
    run.mkdir()
    status = run / "status.json"
    if written_before:
        status.write_text(written_before)
    ended = subprocess.run(shell(run, command), cwd=REPOSITORY, env=environment(STATUS=str(status)), timeout=60)
    assert ended.returncode == code


def suspended(pid: int) -> bool:
    return read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[:1] == ["T"]


def gone(pid: int) -> bool:
    return read(Path(f"/proc/{pid}/cmdline")) == ""  # of a process that has ended, and that nobody has waited for, too


@pytest.fixture
def starting(tmp_path):
    """Start a launcher that writes the ids of its processes to the file $PIDS; returns the script, and these."""

    def start_it(command: str, **more: str) -> tuple[subprocess.Popen, list[int]]:
        pids = tmp_path / "pids"
        script = subprocess.Popen(
            shell(tmp_path, f"{{ {command}; }} > $PIDS.partial; mv $PIDS.partial $PIDS; wait"), cwd=REPOSITORY,
            env=environment(PIDS=str(pids), **more), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while not pids.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return script, [int(pid) for pid in pids.read_text().split()]

    return start_it


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_ends_all_that_the_launcher_started(number, starting):
    script, pids = starting("sleep 300 & echo $!; sleep 300 & echo $!")
    script.send_signal(number)
    assert script.wait(timeout=30) == 75
    assert all(map(gone, pids))


def test_a_rank_that_does_not_stop_is_killed(starting):
    script, pids = starting("trap '' TERM; RANK=0 setsid sleep 300 & echo $!", STOP_SECONDS="1")
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=30) == 128 + signal.SIGKILL
    assert all(map(gone, pids))


def test_ranks_do_not_outlive_a_launcher_that_was_killed(starting):
    script, (launcher, *ranks) = starting(
        "echo $$; RANK=0 setsid sleep 300 & echo $!; RANK=1 setsid sleep 300 & echo $!"
    )
    os.kill(launcher, signal.SIGKILL)
    assert script.wait(timeout=30) == 128 + signal.SIGKILL
    assert all(map(gone, ranks))


def test_a_suspended_rank_is_told_to_stop_when_its_launcher_dies(starting, tmp_path):
    # The kernel sends SIGHUP to a process group that is orphaned with a suspended process in it.
    rank = """RANK=0 bash -c 'trap "touch $SAVED; exit 75" TERM; while :; do sleep 0.1; done' & echo $!"""
    script, (launcher, rank) = starting(f"echo $$; {rank}", SAVED=str(tmp_path / "saved"))
    time.sleep(0.5)  # for its trap
    os.kill(rank, signal.SIGSTOP)
    while not suspended(rank):  # the kernel does so only where it is by then
        time.sleep(0.01)
    os.kill(launcher, signal.SIGKILL)
    assert script.wait(timeout=30) == 128 + signal.SIGKILL
    assert gone(rank)
    assert (tmp_path / "saved").exists()


# --- injected faults: stops at bad times, of everything that can be told to stop ---

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


@pytest.mark.faults
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("number", "target", "phase"),  # every pair of two of them
    [
        (TERM, "script", "training"), (TERM, "worker", "evaluation"), (TERM, "all", "save"),
        (INT, "script", "evaluation"), (INT, "worker", "save"), (INT, "all", "training"),
        (USR1, "script", "save"), (USR1, "worker", "training"), (USR1, "all", "evaluation"),
    ],
)  # fmt: skip
def test_a_stop_at_any_time_with_ranks_apart(script, number, target, phase, start, faults):
    launched = start(*command(script, PHASES[phase]), MAX_RESTARTS="1")
    launched.until_in(phase)
    first, second = launched.ranks()
    late = first if target == "worker" else second
    os.kill(late, signal.SIGSTOP)
    told = {"script": [launched.started.pid], "worker": [second], "all": launched.processes()}[target]
    for pid in told:
        os.kill(pid, number)
    time.sleep(2)
    # Launchers that die of the signal leave an orphaned process group, whose suspended processes the kernel wakes.
    apart = "a rank 2 s late" if suspended(late) else "a rank suspended, woken by the kernel"
    with contextlib.suppress(ProcessLookupError):
        os.kill(late, signal.SIGCONT)
    manifest = launched.ends_stopped()
    assert manifest["trainer"]["owed"] == (phase == "evaluation")
    faults(f"{number.name} to {target}", f"{script}, {phase}, {apart}", "stopped, 75", 0, 0, 0)


@pytest.mark.faults
@pytest.mark.parametrize("script", SCRIPTS)
def test_signals_that_follow_each_other(script, start, faults):
    """torchrun never ends by itself when it is sent three while its ranks end."""
    launched = start(*command(script, PHASES["training"]))
    launched.until_in("training")
    late = launched.ranks()[1]
    os.kill(late, signal.SIGSTOP)
    for number in (USR1, TERM, USR1, TERM):
        launched.started.send_signal(number)
        time.sleep(1)
    os.kill(late, signal.SIGCONT)
    launched.ends_stopped()
    faults("four signals", f"{script}, a second apart", "stopped, 75", 0, 0, 0)


@pytest.mark.faults
@pytest.mark.parametrize(("script", "number"), [("torchrun.sh", USR1), ("deepspeed.sh", INT)])
def test_a_signal_before_there_are_ranks(script, number, start):
    launched = start(*command(script, ENDLESS))
    launcher = f"{script.removesuffix('.sh')} --"
    launched.until(lambda: any(launcher in line for line in launched.processes().values()))
    launched.started.send_signal(number)
    assert launched.ends() == 75, launched.output.read_text()
    assert not (launched.run / "status.json").exists()


@pytest.mark.faults
@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_on_a_terminal(script, start):
    keyboard, terminal = os.openpty()
    launched = start(*command(script, ENDLESS), terminal=terminal)
    launched.until_in("training")
    os.write(keyboard, b"\x03")
    launched.ends_stopped()


@pytest.mark.faults
@pytest.mark.parametrize("by", ["Ctrl-C", "SIGTERM"])
def test_make_stops(by, start, faults):
    keyboard, terminal = os.openpty()
    settings = " ".join([*TINY, *ENDLESS, "training.output_dir=RUN"])
    launched = start("make", "-o", ".venv/installed", "train-summarization", f"ARGS={settings}", terminal=terminal)
    launched.until_in("training")
    if by == "Ctrl-C":
        os.write(keyboard, b"\x03")
    else:
        launched.started.send_signal(TERM)
    launched.started.wait(timeout=240)
    assert launched.status()["state"] == "stopped"
    assert launched.processes() == {}
    faults(f"{by} to make", "training", "stopped, 75", 0, 0, 0)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("script", "killed"),
    [("torchrun.sh", "torchrun --"), ("deepspeed.sh", "deepspeed --"), ("deepspeed.sh", "launcher.launch")],
)
def test_a_launcher_that_is_killed_leaves_no_orphans(script, killed, start, faults):
    launched = start(*command(script, ENDLESS))
    launched.until_in("training")
    (launcher,) = [pid for pid, line in launched.processes().items() if killed in line]
    os.kill(launcher, signal.SIGKILL)
    launched.ends_stopped()
    faults(f"SIGKILL of {killed.removesuffix(' --')}", f"{script}, training", "stopped, 75", 0, 0, 0)


@pytest.mark.faults
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_frozen_rank_is_killed(script, start, faults):
    launched = start(*command(script, ENDLESS), STOP_SECONDS="5")
    launched.until_in("training")
    os.kill(launched.ranks()[1], signal.SIGSTOP)
    launched.started.send_signal(TERM)
    assert launched.ends() not in (0, 2, 75)
    assert launched.status()["state"] == "running"
    faults("SIGTERM, a rank frozen", f"{script}, STOP_SECONDS=5", "killed", launched.status()["step"], 0, 0)
