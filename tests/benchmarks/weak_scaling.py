"""Weak scaling from 1 to 2 ranks on one machine: the same work for each rank, one core each, and where the time goes.

    python tests/benchmarks/weak_scaling.py [--rounds 12] [--zero 2]

Three layouts take steps in turn: one rank; two ranks that know nothing of each other, which shows what sharing the
machine costs by itself; two ranks of one group. Time inside the collectives is measured around every call: what the rank
that waits least spends there is sending, what the other spends beyond it is waiting for its partner.
"""

import argparse
import functools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS.parent / "launch")]
STEPS = 3  # in each turn
ANSWER = "answer: "  # DeepSpeed prints lines of its own

inside = 0.0  # seconds in collectives


def time_collectives() -> None:
    """To be called before DeepSpeed looks the functions up."""
    import torch.distributed as dist
    from distributed.volumes import WHOLE

    class Timed:
        """Work that goes on: waiting for it counts."""

        def __init__(self, work):
            self.work = work

        def wait(self, *arguments):
            return timed(self.work.wait)(*arguments)

    def timed(call):
        @functools.wraps(call)
        def timing(*arguments, **named):
            global inside
            began = time.perf_counter()
            result = call(*arguments, **named)
            inside += time.perf_counter() - began
            return Timed(result) if hasattr(result, "wait") else result

        return timing

    for name in WHOLE:
        setattr(dist, name, timed(getattr(dist, name)))


def rank(zero: int, width: int, tokens: int) -> None:
    """One rank: takes STEPS steps for every line on stdin, and answers with seconds per step and those inside collectives."""
    time_collectives()
    from distributed.volumes import trainer

    from pdl import distributed

    distributed.start()
    case = {"stage": zero, "precision": "fp32", "accumulation": 1, "width": width, "tokens": tokens}
    case["deepspeed"] = f"configs/deepspeed/zero{zero}.json"
    trained = trainer(case)
    trained.train_step(0)
    answer(case["parameters"])
    number = 0
    for _ in sys.stdin:
        global inside
        inside, began = 0.0, time.perf_counter()
        for _ in range(STEPS):
            number += 1
            trained.train_step(number)
        answer([(time.perf_counter() - began) / STEPS, inside / STEPS])
    distributed.stop()


def answer(value: object) -> None:
    print(f"{ANSWER}{json.dumps(value)}", flush=True)


class Layout:
    """Ranks, each on a core of its own; groups: which ranks know each other."""

    def __init__(self, cores: list[int], groups: list[list[int]], arguments: list[str]):
        self.ranks = []
        for group in groups:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            for number, place in enumerate(group):
                surroundings = os.environ | {
                    "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(len(group)), "LOCAL_WORLD_SIZE": str(len(group)),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
                }  # fmt: skip
                command = ["taskset", "--cpu-list", str(cores[place]), sys.executable, __file__, "--rank", *arguments]
                self.ranks.append(
                    subprocess.Popen(
                        command, cwd=TESTS.parent, env=surroundings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
                    )
                )  # fmt: skip

    def answers(self) -> list:
        """The next one of each rank."""
        lines = [next((line for line in each.stdout if line.startswith(ANSWER)), None) for each in self.ranks]
        if None in lines:
            sys.exit("a rank has ended early; what it said is above")
        return [json.loads(line.removeprefix(ANSWER)) for line in lines]

    def turn(self) -> tuple[float, float, float]:
        """Seconds of a step: computing, sending, waiting for the partner."""
        for each in self.ranks:
            print(file=each.stdin, flush=True)
        answers = self.answers()
        sending = min(collectives for _, collectives in answers)
        waiting = statistics.mean(collectives for _, collectives in answers) - sending
        return statistics.mean(step - collectives for step, collectives in answers), sending, waiting


def main(rounds: int, zero: int, width: int, tokens: int) -> None:
    import scaling

    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        sys.exit("two cores are needed")
    arguments = ["--zero", str(zero), "--width", str(width), "--tokens", str(tokens)]
    layouts = {
        "1 rank": Layout(cores, [[0]], arguments),
        "2 ranks apart": Layout(cores, [[0], [1]], arguments),
        "2 ranks": Layout(cores, [[0, 1]], arguments),
    }
    taken = {name: [] for name in layouts}
    try:
        parameters, *_ = [layout.answers()[0] for layout in layouts.values()]
        for number in range(rounds + 1):
            for name in random.Random(number).sample(list(layouts), len(layouts)):
                seconds = layouts[name].turn()
                if number:  # the first turn warms up
                    taken[name].append(seconds)
    finally:
        for each in [each for layout in layouts.values() for each in layout.ranks]:
            each.kill()
            each.wait()
    volumes = scaling.step_volumes(parameters, zero, "fp32", 1)
    sent = sum(volume.sent(2) for volume in volumes)
    print(
        f"{parameters / 1e6:.1f} M parameters, 2 x {tokens} tokens a rank, fp32, ZeRO-{zero}; medians of {rounds} rounds\n"
    )
    print("| layout | ms a step | computing | sending | waiting | efficiency |\n|" + "---|" * 6)
    whole = {name: statistics.median(map(sum, turns)) for name, turns in taken.items()}
    for name, turns in taken.items():
        parts = [statistics.median(column) for column in zip(*turns, strict=True)]
        cells = " | ".join(f"{1000 * part:.0f}" for part in [whole[name], *parts])
        print(f"| {name} | {cells} | {whole['1 rank'] / whole[name]:.2f} |")
    ratios = [sum(alone) / sum(together) for alone, together in zip(taken["1 rank"], taken["2 ranks"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    apart = statistics.median(sum(a) / sum(b) for a, b in zip(taken["2 ranks apart"], taken["2 ranks"], strict=True))
    sending = statistics.median(turn[1] for turn in taken["2 ranks"])
    print(
        f"\nEfficiency from 1 to 2 ranks, by round: median {middle:.2f}, quartiles {low:.2f} to {high:.2f}; against two ranks apart {apart:.2f}."
    )
    print(f"Each rank sends {sent / 1e6:.1f} MB a step on paper: {sent / sending / 1e9:.2f} GB/s while sending.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--zero", type=int, default=2, choices=range(4))
    parser.add_argument("--width", type=int, default=384, help="of the model")
    parser.add_argument("--tokens", type=int, default=256, help="of a row; two rows a step and rank")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.zero, options.width, options.tokens)
    else:
        main(options.rounds, options.zero, options.width, options.tokens)
