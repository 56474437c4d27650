"""What a training step sends, how well that scales, and what fits where: on paper, before GPUs are asked for.

    python launch/scaling.py volume       bytes per optimizer step and ZeRO stage, and what the metrics of a run add
    python launch/scaling.py efficiency   time computing and sending, for given speeds
    python launch/scaling.py memory       per GPU and host, DeepSpeed's estimate beside what our settings need

With --config, the model's size, precision and tokens are those of a configuration.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GB, GiB = 1e9, 2**30
BYTES = {
    "fp32": 4,
    "bf16": 2,
}  # of a parameter as it is computed with; gradients are added up and sent in fp32 either way

# Defaults of DeepSpeed, and what configs/deepspeed/*.json set.
REUSE_DISTANCE = 1e9  # stage3_max_reuse_distance: parameters needed again within so many elements stay gathered
BUCKET = 5e7  # elements of a collective: reduce_bucket_size, stage3_prefetch_bucket_size

# Name, parameters, and those of the largest layer (the vocabulary times the width).
MODELS = [
    ("0.25 B (flan-t5-base)", 247.6e6, 32128 * 768),
    ("0.5 B (Qwen2.5-0.5B)", 494e6, 151936 * 896),
    ("1.5 B (Qwen2.5-1.5B)", 1.54e9, 151936 * 1536),
    ("7.6 B (Qwen2.5-7B)", 7.62e9, 152064 * 3584),
    ("72.7 B (Qwen2.5-72B)", 72.7e9, 152064 * 8192),
]


# --- what is sent ---


@dataclass(frozen=True)
class Volume:
    """A tensor that all ranks reduce or gather in an optimizer step: its elements and bytes, and how often."""

    what: str
    operation: str  # all-reduce, all-gather, reduce-scatter
    elements: float
    bytes: float
    times: int

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends, and receives, in a step, as in a ring: an all-reduce is a reduce-scatter and an all-gather."""
        passes = 2 if self.operation == "all-reduce" else 1
        return self.times * self.bytes * passes * (ranks - 1) / ranks

    def waiting(self, ranks: int, latency: float) -> float:
        """Seconds until the first bytes arrive, over all buckets and the levels of a tree."""
        passes = 2 if self.operation == "all-reduce" else 1
        return self.times * math.ceil(self.elements / BUCKET) * passes * math.log2(ranks) * latency


def step_volumes(
    parameters: float, stage: int, precision: str, accumulation: int, persistent: float = 0, reuse_distance: float = REUSE_DISTANCE
) -> list[Volume]:  # fmt: skip
    """What DeepSpeed sends in an optimizer step.

    persistent: elements of parameters so small that stage 3 keeps them whole. At stages 1 and 2 DeepSpeed reduces a gradient
    to all ranks and throws away what is others', where a reduce-scatter would do with half of it.
    """

    def volume(what: str, operation: str, elements: float, size: int, times: int) -> Volume:
        return Volume(what, operation, elements, elements * size, times)

    if stage < 3:
        reduced = accumulation if stage == 2 else 1  # stages 0 and 1 keep whole gradients until the last micro-batch
        volumes = [volume("gradients", "all-reduce", parameters, 4, reduced)]
        if stage > 0:
            volumes.append(volume("parameters", "all-gather", parameters, BYTES[precision], 1))
        return volumes
    sharded = parameters - persistent
    # At the end of the forward pass the last layers are needed again at once: their distance to the backward pass is twice
    # their distance to the end.
    again = max(0.0, sharded - reuse_distance / 2)
    return [
        volume("gradients", "reduce-scatter", parameters, 4, accumulation),
        volume("parameters, forward", "all-gather", sharded, BYTES[precision], accumulation),
        volume("parameters, backward", "all-gather", again, BYTES[precision], accumulation),
        volume("small parameters", "all-gather", persistent, BYTES[precision], 1),
    ]


def own_all_reduces(vocabulary: int) -> list[tuple[str, str, int]]:
    """What our loop and metrics reduce besides: what, how often, bytes."""
    return [
        ("sum of weights, number of tokens, stop or not, readable or not (float64)", "step", 32),
        ("whether every loss is finite (float32)", "step", 4),
        ("the metrics (float64)", "log line", 144),
        ("label counts (int64 per row of the vocabulary)", "once", 8 * vocabulary),
    ]


def volume_table(parameters: float, vocabulary: int, stages: list[int], precision: str, accumulation: int, gpus: list[int]) -> Iterator[str]:  # fmt: skip
    yield f"{parameters / 1e9:.3g} B parameters, {precision}, {accumulation} micro-batches a step on each GPU; GB, and GB that each GPU sends in a step:"
    yield ""
    yield from _table(
        ["ZeRO", "what", "operation", "GB", "times", *(f"{ranks} GPUs" for ranks in gpus)],
        [
            [stage, volume.what, volume.operation, _figure(volume.bytes / GB), volume.times]
            + [_figure(volume.sent(ranks) / GB) for ranks in gpus]
            for stage in stages
            for volume in step_volumes(parameters, stage, precision, accumulation)
            if volume.bytes
        ],
    )
    yield ""
    yield f"Ours, with a vocabulary of {vocabulary:,}:"
    yield ""
    yield from _table(
        ["what", "every", "bytes"], [[what, every, f"{size:,}"] for what, every, size in own_all_reduces(vocabulary)]
    )


# --- how it scales ---


@dataclass(frozen=True)
class Cluster:
    """Speeds. teraflops: of a GPU, at its peak; utilisation: the share of it that computing reaches.

    inside, between: GB/s that a GPU sends inside a node, and that all network cards of a node send together: rings over
    several nodes leave each node once and share its cards. latency: seconds of one hop.
    """

    gpus_per_node: int
    teraflops: float
    utilisation: float
    inside: float
    between: float
    latency: float

    def bandwidth(self, ranks: int) -> float:
        """Bytes per second that each GPU of so many sends in a ring."""
        return GB * (self.inside if ranks <= self.gpus_per_node else min(self.inside, self.between))


def computing(parameters: float, tokens: float, cluster: Cluster) -> float:
    """Seconds for so many tokens on one GPU: two floating-point operations per parameter forward, four backward."""
    return 6 * parameters * tokens / (cluster.teraflops * 1e12 * cluster.utilisation)


def sending(volumes: list[Volume], ranks: int, cluster: Cluster) -> float:
    """Seconds for all of it, one after another."""
    return sum(
        volume.sent(ranks) / cluster.bandwidth(ranks) + volume.waiting(ranks, cluster.latency) for volume in volumes
    )


def own_seconds(ranks: int, cluster: Cluster) -> float:
    """Seconds of our all-reduces of a step: so few bytes that only their waiting counts."""
    return sum(every == "step" for _, every, _ in own_all_reduces(0)) * 2 * math.log2(ranks) * cluster.latency


def efficiency_table(
    parameters: float, stages: list[int], precision: str, accumulation: int, tokens: float, gpus: list[int], clusters: list[Cluster]
) -> Iterator[str]:  # fmt: skip
    cluster = clusters[0]
    compute = computing(parameters, tokens * accumulation, cluster)
    yield (
        f"{parameters / 1e9:.3g} B parameters, {precision}, {accumulation} x {tokens:,.0f} tokens a step on each GPU, which computes them in {compute:.2f} s "
        f"({cluster.utilisation:.0%} of {cluster.teraflops:g} TFLOP/s); {cluster.gpus_per_node} GPUs a node, {cluster.inside:g} GB/s between them, "
        f"{1e6 * cluster.latency:g} µs a hop:"
    )
    yield ""
    rows = []
    for cluster in clusters:
        for stage in stages:
            row = [f"{cluster.between:g}", stage]
            for ranks in gpus:
                seconds = sending(step_volumes(parameters, stage, precision, accumulation), ranks, cluster)
                seconds += own_seconds(ranks, cluster)
                row += [_figure(seconds), f"{compute / (compute + seconds):.0%} to {min(1, compute / seconds):.0%}"]
            rows.append(row)
    headings = [heading for ranks in gpus for heading in (f"{ranks} GPUs: s sending", "efficiency")]
    yield from _table(["GB/s a node", "ZeRO", *headings], rows)
    yield ""
    waits = ", ".join(f"{1e6 * own_seconds(ranks, clusters[0]):.0f} µs on {ranks}" for ranks in gpus)
    yield f"Our two all-reduces of a step are among it: {waits} GPUs."


# --- what fits ---


def gpu_memory(parameters: float, largest: float, ranks: int, file: str, precision: str = "bf16") -> float:
    """Bytes on each GPU for parameters, gradients and optimizer with our settings when a step is due, without activations.

    In bf16 a parameter takes 2 bytes, its fp32 master 4, Adam's two moments 8, the sum of its gradients 4, in fp32 as well;
    each of them is whole on every GPU or shared out. A bucket of gradients on their way has 4 an element.
    """
    size = BYTES[precision]
    bucket = 4 * min(BUCKET, parameters)
    if file == "zero0":
        return 16 * parameters
    if file == "zero1":  # gradients are whole: in bf16 those of a micro-batch besides their sum
        return parameters * (size + 4 + (size if size < 4 else 0)) + 12 * parameters / ranks
    if file == "zero2":
        return size * parameters + 16 * parameters / ranks + bucket
    gathered = size * min(parameters, REUSE_DISTANCE / 2 + BUCKET + largest)
    if file == "zero3":
        return (size + 16) * parameters / ranks + gathered + bucket
    return gathered + bucket  # zero3_offload


def estimates(parameters: float, largest: float, ranks: int, per_node: int, file: str) -> tuple[float | None, float | None]:  # fmt: skip
    """DeepSpeed's own for 16-bit training: bytes on each GPU, and in the memory of each host. It has none for stages 0 and 1."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    on_node = min(ranks, per_node)
    size = {"num_gpus_per_node": on_node, "num_nodes": ranks // on_node}
    if file in ("zero0", "zero1"):
        return None, None
    if file == "zero2":
        host, gpu = estimate_zero2_model_states_mem_needs(parameters, cpu_offload=False, **size)
        return gpu, host
    offload = file == "zero3_offload"
    host, gpu, _ = estimate_zero3_model_states_mem_needs(
        parameters, largest, cpu_offload=offload, cpu_offload_params=offload, zero_init=False, **size
    )
    return gpu, host


def memory_table(
    models: list[tuple[str, float, float]], precision: str, gpus: list[int], per_node: int
) -> Iterator[str]:
    yield (
        f"GiB on each GPU (DeepSpeed's estimate), and DeepSpeed's for each host; {precision}, {per_node} GPUs a node, without activations:"
    )
    yield ""
    rows = []
    for name, parameters, largest in models:
        for file in (*(["zero0"] if precision == "fp32" else []), "zero1", "zero2", "zero3", "zero3_offload"):
            row = [name, file]
            for ranks in gpus:
                needed = f"{gpu_memory(parameters, largest, ranks, file, precision) / GiB:.1f}"
                gpu, host = (
                    estimates(parameters, largest, ranks, per_node, file) if precision == "bf16" else (None, None)
                )
                row += [
                    needed if gpu is None else f"{needed} ({gpu / GiB:.1f})",
                    "" if host is None else f"{host / GiB:.0f}",
                ]
            rows.append(row)
    headings = [heading for ranks in gpus for heading in (f"{ranks} GPU{'s' * (ranks > 1)}", "host")]
    yield from _table(["model", "file", *headings], rows)


# --- the command ---


def _figure(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _table(headings: list, rows: list[list]) -> Iterator[str]:
    for row in [headings, ["---"] * len(headings), *rows]:
        yield f"| {' | '.join(map(str, row))} |"


def read_config(path: str) -> dict:
    """The options that a configuration states. Its model is built without weights."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from pdl.config import load_config
    from pdl.model import auto_class

    config = load_config(path)
    if config.model.name_or_path is not None:
        settings = AutoConfig.from_pretrained(config.model.name_or_path)
    else:
        name, rows = config.tokenizer.name_or_path, config.tokenizer.vocab_size
        rows = rows or len(AutoTokenizer.from_pretrained(name))
        settings = AutoConfig.for_model(config.model.architecture, **{"vocab_size": rows, **config.model.settings})
    with torch.device("meta"):
        model = auto_class(settings).from_config(settings)
    layers = (sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    return {
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "largest": float(max(layers)),
        "vocabulary": settings.get_text_config().vocab_size,
        "precision": config.training.precision,
        "stages": [config.zero_stage],
        "tokens": float(config.training.micro_batch_size * (config.data.max_source_tokens + config.data.max_target_tokens)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("volume", "efficiency", "memory"))
    parser.add_argument("--config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("--parameters", type=float, help="default: 7.62e9; memory: several models")
    parser.add_argument("--largest", type=float, default=0.0, help="elements of the largest layer")
    parser.add_argument("--vocabulary", type=int, default=152064)
    parser.add_argument("--precision", choices=BYTES, default="bf16")
    parser.add_argument("--stages", type=int, nargs="+", choices=range(4), metavar="ZERO", help="default: all that the precision allows")  # fmt: skip
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step on each GPU")
    parser.add_argument("--tokens", type=float, default=16384, help="of a micro-batch on each GPU")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--teraflops", type=float, default=989, help="of a GPU, at its peak; an H100's in bf16")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak while computing")
    parser.add_argument("--inside", type=float, default=450, help="GB/s of a GPU inside its node")
    parser.add_argument("--between", type=float, nargs="+", default=[400, 12.5], help="GB/s of a node, all its network cards together")  # fmt: skip
    parser.add_argument("--latency", type=float, default=10e-6, help="seconds of a hop between ranks")
    options = parser.parse_args()
    if options.config is not None:
        parser.set_defaults(**read_config(str(options.config)))
        options = parser.parse_args()  # again: what is said on the command line counts more
    models = (
        [(f"{options.parameters / 1e9:.3g} B", options.parameters, options.largest)] if options.parameters else MODELS
    )
    parameters = options.parameters or 7.62e9
    stages = options.stages or ([1, 2, 3] if options.precision == "bf16" else [0, 1, 2, 3])
    if 0 in stages and options.precision == "bf16":
        parser.error("bf16 needs ZeRO stage 1, 2 or 3")
    if options.table == "volume":
        lines = volume_table(
            parameters, options.vocabulary, stages, options.precision, options.accumulation, options.gpus
        )
    elif options.table == "efficiency":
        clusters = [
            Cluster(options.gpus_per_node, options.teraflops, options.utilisation, options.inside, between, options.latency)
            for between in options.between
        ]  # fmt: skip
        lines = efficiency_table(
            parameters, stages, options.precision, options.accumulation, options.tokens, options.gpus, clusters
        )
    else:
        lines = memory_table(models, options.precision, options.gpus, options.gpus_per_node)
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
