"""Faults that a rank's own process brings about, installed before the run begins. Everything else in it is real."""

import os
import resource
import signal
import threading
import time
from pathlib import Path

import torch

from pdl import checkpoint, train
from pdl.__main__ import main


def run_with_fault(told: list) -> int:
    """One rank, told its fault and the command line. A fault is {name: value}: the functions below say which there are."""
    fault, arguments = told
    for name, value in fault.items():
        globals()[f"_{name}"](value)
    return main(arguments)


def _before_step(step: int, work) -> None:
    """Do `work` where the training step with this number begins."""
    original = train.Trainer.train_step

    def train_step(trainer, number):
        if number == step:
            work(trainer)
        return original(trainer, number)

    train.Trainer.train_step = train_step


def _kill(at: dict) -> None:
    """{"step", "delay"}: SIGKILL to this process, `delay` seconds after the step began."""
    _before_step(at["step"], lambda _: threading.Timer(at["delay"], os.kill, (os.getpid(), signal.SIGKILL)).start())


def _signal(at: dict) -> None:
    """{"step", "number"}: a signal to this process where the step begins."""
    _before_step(at["step"], lambda _: _signal_self(at["number"]))


def _signal_self(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.2)  # a thread hears it


def _hang(at: dict) -> None:
    """{"step"}: this rank never goes on."""
    _before_step(at["step"], lambda _: time.sleep(3600))


def _late(at: dict) -> None:
    """{"step", "seconds"}: this rank comes to the step later than the others."""
    _before_step(at["step"], lambda _: time.sleep(at["seconds"]))


def _bytes(at: dict) -> None:
    """{"save", "bytes", "kill"}: in the save of that step the kernel ends this process at that byte of a file, or refuses to write it."""
    original = checkpoint.Checkpointer.save

    def save(checkpointer, state, sums):
        if state.done == at["save"]:
            # What a full disk does at a byte nobody chooses, the kernel does here at a chosen one.
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if at["kill"] else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (at["bytes"], at["bytes"]))
        return original(checkpointer, state, sums)

    checkpoint.Checkpointer.save = save


def _not_deterministic(step: int) -> None:
    """An operation in that step of which torch knows no deterministic way."""
    _before_step(step, lambda _: torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0])))


def _fill(at: dict) -> None:
    """{"save", "file", "leave"}: in the save of that step, once room was found for it, this file takes the whole disk but `leave` bytes."""
    original = checkpoint.Checkpointer._begin

    def begin(checkpointer, partial):
        original(checkpointer, partial)
        if partial.name == f"partial-step-{at['save']:08d}":
            disk = os.statvfs(partial)
            with open(at["file"], "wb") as file:
                os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_bsize - at["leave"])

    checkpoint.Checkpointer._begin = begin


def _kill_at_rename(step: int) -> None:
    """SIGKILL when everything of the checkpoint of that step is written, but its name."""
    original = Path.rename

    def rename(path, target):
        if path.name == f"partial-step-{step:08d}":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, target)

    Path.rename = rename


def _signal_in(at: dict) -> None:
    """{"place": "save"|"validate"|"generate", "number"}: a signal to this process where that begins for the second time (generate: first)."""
    from pdl import report

    owner, name = {
        "save": (checkpoint.Checkpointer, "save"),
        "validate": (train.Trainer, "validate"),
        "generate": (report, "generate"),
    }[at["place"]]
    original, calls = getattr(owner, name), []

    def called(*arguments, **named):
        calls.append(None)
        if len(calls) == (1 if at["place"] == "generate" else 2):
            _signal_self(at["number"])
        return original(*arguments, **named)

    setattr(owner, name, called)


def _not_finite(at: dict) -> None:
    """{"steps", "where": "loss"|"gradient"|"weights"}: nan there, on this rank only."""
    original = train.loss_of
    state = {"step": -1}

    def train_step(trainer, number, begin=train.Trainer.train_step):
        state["step"] = number
        if number in at["steps"] and at["where"] == "weights":
            # Stage 3 may still have the weights gathered; their master copy makes the next ones.
            masters = getattr(trainer.engine.optimizer, "fp32_partitioned_groups_flat", None)
            weights = masters[0] if masters else next(iter(trainer.engine.module.parameters()))
            weights.data.view(-1)[:1] = torch.nan
        return begin(trainer, number)

    def loss_of(*arguments, **named):
        loss, sums = original(*arguments, **named)
        if state["step"] in at["steps"] and torch.is_grad_enabled():
            if at["where"] == "loss":
                loss = loss * torch.nan
            elif at["where"] == "gradient":
                loss = loss * 1.0
                loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss, sums

    train.Trainer.train_step, train.loss_of = train_step, loss_of
