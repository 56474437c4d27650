"""What ends a run from outside: signals, a rank that hangs, a launcher that dies. One watch per process.

A first SIGTERM, SIGINT or SIGUSR1 asks for a stop: all ranks agree on it at the next boundary (`agree`, or the all-reduce
of a training step), save, and end with exit code 75. Launchers deliver a signal twice, so only one that comes
`_REPEAT_SECONDS` or more after the first ends the process at once. Before `begin` there is nothing to save, and the
first signal ends it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import select
import signal
import sys
import threading
import time

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on from a good checkpoint
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_REPEAT_SECONDS = 10.0
_DUMP_SECONDS = 5.0  # from the stack dump of a hung rank to its end: time for the other ranks to write theirs
_PR_SET_PDEATHSIG = 1  # of prctl(2)


class Stopped(Exception):
    """Some rank was asked to stop, and all agreed: raised on every rank at the same boundary."""


class _Watch:
    def __init__(self):
        self.begun = self.ending = False
        self.asked: signal.Signals | None = None
        self.asked_at = 0.0
        self.hang_seconds: float | None = None
        self.beaten_at = 0.0
        self.doing = ""


_watch = _Watch()


def start() -> None:
    """Watch this process. To be called first, by the main thread."""
    if "RANK" in os.environ:
        _end_with_the_launcher()
    # The C part of Python's signal handling writes the number of a signal to this file as it arrives. A thread that reads
    # it is heard even while the main thread waits in a collective, where no Python handler runs.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_listen, args=(reading,), daemon=True, name="pdl-watch").start()


def begin() -> None:
    """From here on a run is at stake: a first signal no longer ends the process but asks for a stop."""
    _watch.begun = True


def beat(doing: str, hang_seconds: float | None = None) -> None:
    """This rank is alive. doing: what it begins now, for the message when it never beats again.

    hang_seconds: from now on a rank without a beat for so long writes the stacks of its threads to stderr and ends with
    code 1; 0 ends the watching.
    """
    now = time.monotonic()
    _watch.doing = doing
    if hang_seconds is not None:
        _watch.beaten_at = now  # before the thread of `_listen` sees that it is to look
        _watch.hang_seconds = hang_seconds or None
    if _watch.hang_seconds is None:
        faulthandler.cancel_dump_traceback_later()
    elif hang_seconds is not None or now - _watch.beaten_at > min(1.0, _watch.hang_seconds / 10):
        # That thread is first, with a name to the dump; this one needs no interpreter, should that be stuck too.
        faulthandler.dump_traceback_later(_watch.hang_seconds + 2 * _DUMP_SECONDS, exit=True, file=sys.__stderr__)
        _watch.beaten_at = now


def asked() -> bool:
    """Whether this rank, on its own, was asked to stop."""
    return _watch.asked is not None


def end() -> None:
    """The process is about to end, in agreement with the others: a launcher's signal changes nothing any more."""
    _watch.begun = _watch.ending = True
    beat("ending")


def agree(doing: str) -> None:
    """A boundary at which all ranks can stop: raises Stopped on all of them when any was asked to. A collective."""
    # Imported here: the watch starts before torch is imported, which takes seconds.
    import torch
    import torch.distributed as dist

    from pdl.distributed import device

    beat(doing)
    flag = torch.tensor(float(asked()), device=device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    if flag:
        raise Stopped


def _listen(reading: int) -> None:
    while True:
        left = None
        if _watch.hang_seconds is not None:
            left = _watch.beaten_at + _watch.hang_seconds - time.monotonic()
            if left <= 0:
                _dump()
                time.sleep(_DUMP_SECONDS)
                os._exit(1)
        ready, _, _ = select.select([reading], [], [], min(1.0, left) if left is not None else 1.0)
        for number in os.read(reading, 64) if ready else b"":
            if number in _SIGNALS:
                _receive(signal.Signals(number))


def _receive(number: signal.Signals) -> None:
    name = f"rank {os.environ.get('RANK', '0')}"
    now = time.monotonic()
    if not _watch.begun:
        _write(f"pdl: {name}: {number.name} before training began: nothing to save")
        os._exit(EXIT_STOPPED)
    if _watch.asked is None:
        _watch.asked, _watch.asked_at = number, now
        if not _watch.ending:
            _write(f"pdl: {name}: {number.name}: stopping at the next step; once more in 10 s or later ends it at once")
    elif now - _watch.asked_at >= _REPEAT_SECONDS:
        _write(f"pdl: {name}: {number.name} again: ending at once, without saving")
        os._exit(128 + number)


def _dump() -> None:
    name = f"rank {os.environ.get('RANK', '0')} (process {os.getpid()})"
    _write(
        f"pdl: {name}: no progress for {_watch.hang_seconds:g} s while {_watch.doing}; its threads, then the end of this process:"
    )
    faulthandler.dump_traceback(all_threads=True)


def _write(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno(), (text + "\n").encode())  # one write: ranks share the stream


def _end_with_the_launcher() -> None:
    """A launcher that is killed takes nobody along: its ranks get SIGTERM from the kernel instead of being orphans."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died meanwhile
        os._exit(1)
