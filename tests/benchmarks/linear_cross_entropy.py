"""The weighted loss from hidden states against its peers: time, memory and error of one forward and backward.

    pip install -e .[bench]
    python tests/benchmarks/linear_cross_entropy.py [--device cuda] [--shapes 2048x512x50257 ...] [--fractions 1.0 0.3 0.07]

All run in one process on the same tensors, in a new order each round, so that a noisy machine hits all alike; ratios of
medians are what counts. What is timed gives the weighted mean, dX and dW, from gradients that are None. Inputs are like
a trained model's: peaked logits and Zipf labels; random ones flatter peers that leave small gradients out. Whatever could
not run is listed with its reason. Results go to DIR as JSONL, Markdown and pictures. For providers see peers.py.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from peers import PROVIDERS, SEQUENCE, UNWEIGHTED, Problem, Step, ignore_prompts, reference, trained_inputs
from tqdm import tqdm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {  # tokens x width x vocabulary
    "cpu": ["2048x512x50257", "512x768x50257", "1024x896x32000"],
    "cuda": [
        "8192x4096x128256", "16384x2048x151936", "8192x2304x256000", "16384x2048x248320", "16384x1024x151936",
        "1024x4096x128256", "2048x4096x128256", "4096x4096x128256", "8191x4096x128256",
    ],
}  # fmt: skip
MIB = 2**20
# Below this, errors differ by how the last bit falls.
ROUNDING = 1e-6


def run_step(step: Step, p: Problem) -> torch.Tensor:
    p.hidden.grad = p.head.grad = None
    loss = step(p)
    loss.backward()
    return loss.detach()


def errors(loss: torch.Tensor, p: Problem, expected: dict) -> dict:
    """Relative errors against the reference."""

    def relative(gradient: torch.Tensor, right: torch.Tensor) -> float:
        return ((gradient.double() - right).norm() / right.norm()).item()

    return {
        "loss_error": abs(loss.item() - expected["loss"]) / abs(expected["loss"]),
        "hidden_error": relative(p.hidden.grad, expected["hidden"]),
        "head_error": relative(p.head.grad, expected["head"]),
        "ignored_rows_zero": not p.hidden.grad[~p.kept].any().item(),
    }


def synchronize(p: Problem) -> None:
    if p.hidden.is_cuda:
        torch.cuda.synchronize()


def milliseconds(step: Step, p: Problem) -> float:
    p.hidden.grad = p.head.grad = None  # freed outside of the time
    synchronize(p)
    started = time.perf_counter()
    run_step(step, p)
    synchronize(p)
    return 1000 * (time.perf_counter() - started)


def peak_cuda(step: Step, p: Problem) -> int:
    """Bytes at the peak of a step, over the inputs."""
    p.hidden.grad = p.head.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_step(step, p)
    return torch.cuda.max_memory_allocated() - before


def peak_cpu(name: str, inputs: Path) -> int:
    """The same in a process of its own: what other providers left to the allocator is not there to be used again."""
    # glibc gives every block of some size back to the system, so that what is freed is not counted as held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--peak", name, str(inputs), "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_peak(name: str, inputs: Path) -> None:
    def resident(key: str) -> int:
        return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    problem = Problem(*torch.load(inputs))
    problem.hidden.requires_grad_(), problem.head.requires_grad_()
    step = PROVIDERS[name]()
    # Thread pools and code are no part of a step. What torch.compile makes is for one shape.
    tiny = Problem(
        torch.ones_like(problem.hidden[:64], requires_grad=True), torch.ones_like(problem.head[:256], requires_grad=True),
        torch.zeros(64, dtype=torch.long), problem.weights[:256],
    )  # fmt: skip
    warm_up = problem if name == "compiled" else tiny
    run_step(step, warm_up)
    warm_up.hidden.grad = warm_up.head.grad = None
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    run_step(step, problem)
    print(resident("VmHWM") - before)


def prepared(names: list[str], p: Problem, expected: Callable[[bool], dict], not_run: dict, said: dict) -> dict:
    """Warmed up, by name: the step and its errors. The others' reasons go to `not_run`, warnings to `said`."""
    ready = {}
    for name in names:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                step = PROVIDERS[name]()
                run_step(step, p)  # compiles, tunes
                found = errors(run_step(step, p), p, expected(name not in UNWEIGHTED))
            except Exception as error:  # whatever a peer raises is a reason to be told
                not_run[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                continue
        ready[name] = step, found
        for warning in heard:
            said[name] = str(warning.message).splitlines()[0][:200]
    return ready


def measure(case: dict, inputs: tuple, arguments: argparse.Namespace) -> list[dict]:
    """One record for each provider."""
    # torch would go over to dynamic shapes at the second case, and give up compiling at the ninth.
    torch.compiler.reset()
    hidden, head, labels, weights = inputs
    p = Problem(hidden, head, ignore_prompts(labels, case["fraction"]), weights)
    expected = functools.cache(functools.partial(reference, p))
    not_run, said = {}, {}
    ready = prepared(arguments.providers, p, expected, not_run, said)
    case = case | expected(True)["input"] | {"supervised": p.kept.sum().item()}
    expected.cache_clear()
    taken = {name: [] for name in ready}
    order = random.Random(0)
    for _ in range(arguments.runs):
        for name in order.sample(list(ready), len(ready)):
            taken[name].append(milliseconds(ready[name][0], p))
    peaks = {}
    with tempfile.TemporaryDirectory() as directory:
        saved = Path(directory, "inputs.pt")
        torch.save((hidden.detach(), head.detach(), p.labels, weights), saved)
        for name, (step, _) in ready.items():
            try:
                peak = peak_cuda(step, p) if hidden.is_cuda else peak_cpu(name, saved)
                peaks[name] = (peak - hidden.nbytes - head.nbytes) / MIB
            except RuntimeError as error:
                said[name] = f"memory not measured, {error}"
    p.hidden.grad = p.head.grad = None
    _, width, vocabulary = case["shape"]
    records = []
    for name, (_, found) in ready.items():
        first, median, third = statistics.quantiles(taken[name], n=4, method="inclusive")
        records.append(
            case | found | {
                "provider": name, "runs": len(taken[name]), "milliseconds": median, "first_quartile": first, "third_quartile": third,
                "mebibytes": peaks.get(name), "weighted": name not in UNWEIGHTED, "warning": said.get(name),
                "floor_milliseconds": 6e3 * case["supervised"] * width * vocabulary / arguments.peak_flops if hidden.is_cuda else None,
            }
        )  # fmt: skip
    compare(records)
    return records + [case | {"provider": name, "not_run": reason} for name, reason in not_run.items()]


def compare(records: list[dict]) -> None:
    """Ratios to eager, a flag on twice its error, ranks of the others."""
    eager = next((record for record in records if record["provider"] == "eager"), None)
    for record in records:
        record["of_eager"] = eager and record["milliseconds"] / eager["milliseconds"]
        record["flagged"] = not record["ignored_rows_zero"] or any(
            not record[name] <= 2 * max(eager[name] if eager else math.inf, ROUNDING)
            for name in ("loss_error", "hidden_error", "head_error")
        )
        record["rank"] = None
    ranked = [record for record in records if record["weighted"] and not record["flagged"]]
    for rank, record in enumerate(sorted(ranked, key=lambda record: record["milliseconds"]), 1):
        record["rank"] = rank


def shape_name(record: dict) -> str:
    return "x".join(map(str, record["shape"]))


def markdown(environment: dict, records: list[dict]) -> str:
    cases, seen = {}, {}
    for record in records:
        cases.setdefault((shape_name(record), record["dtype"], record["fraction"]), []).append(record)
    lines = [
        ", ".join(f"{key} {value}" for key, value in environment.items()),
        "",
        "Milliseconds of forward and backward: median, quartiles. Memory: MiB at the peak of a step over the inputs and their two",
        "gradients. Errors: relative, against float64 from the same inputs. A provider with more than twice eager's error (and more",
        f"than {2 * ROUNDING:g}) or with a gradient in ignored rows is flagged and has no rank; `bound`: unweighted, a lower bound only.",
    ]
    for (shape, dtype, fraction), rows in cases.items():
        first = rows[0]
        lines += [
            "",
            f"**{shape}, {dtype}, supervised fraction {fraction:g}**: {first['supervised']} labels, cross-entropy {first['cross_entropy']:.2f} nats, "
            f"accuracy {first['accuracy']:.2f}"
            + (f", floor {first['floor_milliseconds']:.2f} ms" if first.get("floor_milliseconds") else ""),
            "",
            "| provider | ms | of eager | MiB | error of the loss | of dX | of dW | rank |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in sorted((row for row in rows if "not_run" not in row), key=lambda row: row["milliseconds"]):
            ratio = f"{row['of_eager']:.2f}" if row["of_eager"] else ""
            memory = "" if row["mebibytes"] is None else f"{row['mebibytes']:.0f}"
            rank = row["rank"] or ("flagged" if row["flagged"] else "bound")
            lines.append(
                f"| {row['provider']} | {row['milliseconds']:.2f} ({row['first_quartile']:.2f} to {row['third_quartile']:.2f}) | {ratio} "
                f"| {memory} | {row['loss_error']:.1e} | {row['hidden_error']:.1e} | {row['head_error']:.1e} | {rank} |"
            )
        for row in rows:
            for kind in ("not_run", "warning"):
                if row.get(kind):
                    seen.setdefault((kind, row["provider"], row[kind]), []).append(f"{shape} {dtype} {fraction:g}")
    for kind, title in (("not_run", "Not run"), ("warning", "Warned")):
        told = [(provider, text, where) for (of, provider, text), where in seen.items() if of == kind]
        if told:
            lines += ["", f"{title}:", ""]
        for provider, text, where in told:
            lines.append(f"- {provider}: {text} ({'every case' if len(where) == len(cases) else ', '.join(where)})")
    return "\n".join(lines) + "\n"


def draw(records: list[dict], dtype: str, path: Path) -> None:
    """Time and memory against the supervised fraction, a row for each shape; in the last row of eager's, against the vocabulary."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    records = [record for record in records if record["dtype"] == dtype and "not_run" not in record]
    records.sort(key=lambda record: record["fraction"])
    whole = {(record["provider"], shape_name(record)): record for record in records if record["fraction"] == records[-1]["fraction"]}  # fmt: skip
    shapes = list(dict.fromkeys(shape_name(record) for record in records))
    names = [name for name in PROVIDERS if any(record["provider"] == name for record in records)]
    vocabularies = sorted({record["shape"][2] for record in records})
    size = {"figsize": (11, 3.2 * (len(shapes) + 1)), "layout": "constrained"}
    figure, axes = pyplot.subplots(len(shapes) + 1, 2, **size)
    for column, key, unit in zip(axes.T, ("milliseconds", "mebibytes"), ("ms", "MiB"), strict=True):

        def value(record: dict, key=key) -> float:
            return math.nan if record[key] is None else max(record[key], 0.1)  # the scale is logarithmic

        for number, name in enumerate(names):
            mine = [record for record in records if record["provider"] == name]
            style = {"color": f"C{number}" if number < 10 else pyplot.get_cmap("Set2")(number - 10), "label": name, "linewidth": 3 if name == "ours" else 1.3}  # fmt: skip
            for axis, shape in zip(column, shapes, strict=False):
                here = [record for record in mine if shape_name(record) == shape]
                form = "x--" if any(record["flagged"] for record in here) else "o-"
                axis.plot([record["fraction"] for record in here], [value(record) for record in here], form, **style)
            both = [(whole[name, shape], whole["eager", shape]) for shape in shapes if (name, shape) in whole and ("eager", shape) in whole]  # fmt: skip
            side = 0.8 * ((number + 0.5) / len(names) - 0.5)  # next to each other, not on top
            places = [vocabularies.index(record["shape"][2]) + side for record, _ in both]
            column[-1].plot(places, [value(record) / value(eager) for record, eager in both], "o", **style)
        for axis, shape in zip(column, shapes, strict=False):
            axis.set(title=f"{shape}, {dtype}", xlabel="supervised fraction", ylabel=unit)
        column[-1].set(xlabel="vocabulary", ylabel=f"{unit}, of eager", title=f"supervised fraction {records[-1]['fraction']:g}, {dtype}")  # fmt: skip
        column[-1].set(xticks=range(len(vocabularies)), xticklabels=vocabularies, xlim=(-0.5, len(vocabularies) - 0.5))
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(ticker.NullLocator())
        axis.grid(alpha=0.3)
    figure.suptitle("dashed: flagged, an error more than twice eager's", fontsize="medium")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def environment_of(device: str) -> dict:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = torch.cuda.get_device_name() if device == "cuda" else model[1] if model else platform.machine()
    versions = {}
    for package in ("torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {"device": name, "threads": torch.get_num_threads()} | versions


def shape_of(text: str) -> tuple[int, int, int]:
    shape = tuple(map(int, text.split("x")))
    if len(shape) != 3 or shape[0] < SEQUENCE:
        raise argparse.ArgumentTypeError(f"{text}: tokens x width x vocabulary, of at least {SEQUENCE} tokens")
    return shape


def fraction_of(text: str) -> float:
    if not 0.5 / SEQUENCE < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: no token of {SEQUENCE} would be supervised, or more than all")
    return float(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SHAPES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default bf16 on a GPU, fp32 and bf16 on a CPU")
    parser.add_argument("--shapes", nargs="+", type=shape_of, help="tokens x width x vocabulary, as 2048x512x50257")
    parser.add_argument("--fractions", nargs="+", type=fraction_of, default=[1.0, 0.3, 0.07], help="supervised tokens")
    parser.add_argument("--runs", type=int, default=20, help="timed steps of each provider, at least 2")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--peak-flops", type=float, default=790e12, help="of the GPU, for the floor 6 N D V / peak")
    parser.add_argument("--output", type=Path, metavar="DIR", default=Path("runs/benchmarks/linear_cross_entropy"))
    parser.add_argument("--peak", nargs=2, metavar=("PROVIDER", "INPUTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.runs < 2:
        parser.error("--runs: quartiles need at least 2")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print_peak(arguments.peak[0], Path(arguments.peak[1]))
        sys.exit()
    dtypes = arguments.dtypes or (["bf16"] if arguments.device == "cuda" else ["fp32", "bf16"])
    shapes = arguments.shapes or list(map(shape_of, SHAPES[arguments.device]))
    environment = environment_of(arguments.device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    records = []
    cases = len(shapes) * len(dtypes) * len(arguments.fractions)
    with open(arguments.output / "results.jsonl", "w") as file, tqdm(total=cases, unit="case") as bar:
        for shape, dtype in itertools.product(shapes, dtypes):
            inputs = trained_inputs(shape, DTYPES[dtype], arguments.device)
            for fraction in arguments.fractions:
                found = measure({"shape": shape, "dtype": dtype, "fraction": fraction}, inputs, arguments)
                file.writelines(json.dumps(environment | record) + "\n" for record in found)
                file.flush()
                records += found
                bar.update()
    table = markdown(environment, records)
    (arguments.output / "results.md").write_text(table)
    print(table)
    try:
        for dtype in {record["dtype"] for record in records if "not_run" not in record}:
            draw(records, dtype, arguments.output / f"{dtype}.png")
    except ModuleNotFoundError as error:
        print(f"No picture: {error}")
