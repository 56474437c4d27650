"""Starts runs of `python -m pdl` as real processes, forked from one that has imported everything: seconds saved per start.

Reads one request a line, {"argv": [...], "ranks": [{"fault": ..., "env": ...}, ...], "log": directory, "cwd": directory}. For
each it forks a launcher, and that one a process per rank; it answers with their process ids. The launcher writes
`exit_codes.json` into the log directory when all ranks have ended: it ends none itself, so a test sees whether they do.
"""

import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import datasets  # noqa: F401
import deepspeed  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers  # noqa: F401
from faults import install

import pdl.run  # noqa: F401
from pdl.__main__ import main


def run_rank(request: dict, rank: int, port: int) -> None:
    """In a process of its own, which ends here."""
    log = os.open(Path(request["log"], f"rank-{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    ranks = len(request["ranks"])
    mine = request["ranks"][rank]
    group = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in group.items()} | mine.get("env", {}))
    os.chdir(mine.get("cwd", os.getcwd()))
    code = 1
    try:
        if mine.get("fault"):
            install(mine["fault"])
        code = main(request["argv"])
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def launch(request: dict, answer: int) -> None:
    """In a process of its own: the parent of the ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(len(request["ranks"])):
        pid = os.fork()
        if pid == 0:
            os.close(answer)
            run_rank(request, rank, port)
        pids.append(pid)
    os.write(answer, (json.dumps({"launcher": os.getpid(), "ranks": pids}) + "\n").encode())
    os.close(answer)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    partial = Path(request["log"], "exit_codes.partial")
    partial.write_text(json.dumps(codes))
    partial.rename(Path(request["log"], "exit_codes.json"))
    os._exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # launchers are not waited for
    print("ready", flush=True)
    for line in sys.stdin:
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.close(reading)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            launch(json.loads(line), writing)
        os.close(writing)
        with os.fdopen(reading) as answer:
            print(answer.readline(), end="", flush=True)
