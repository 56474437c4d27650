"""First runs on real data: each recipe with cross-entropy and with PDL, two ranks, a small model from scratch.

    python tests/benchmarks/first_runs.py DATA_DIRECTORY RUNS_DIRECTORY [--steps 300] [--tasks summarization ...]

DATA_DIRECTORY holds summarization/dialogsum, dialogue/dailydialog, style-transfer/bible and code-generation/tldr-pages.
A finished run is not repeated. At the end, and with --table alone, prints the table of all that is finished.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ENCODER_DECODER = {"d_model": 192, "d_kv": 48, "num_heads": 4, "d_ff": 512, "num_layers": 2, "num_decoder_layers": 2}
DECODER = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
LOSSES = {
    "cross_entropy": ["loss.name=cross_entropy"],
    "power_law 0.25": ["loss.name=power_law", "loss.alpha=0.25"],
    "power_law 0.75": ["loss.name=power_law", "loss.alpha=0.75"],
}
CELLS = [(loss, 2) for loss in LOSSES] + [("power_law 0.25", 3)]


def first_lines(source: Path, count: int, target: Path) -> Path:
    """A file with the first `count` lines of another: validation and test that fit a CPU."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open(encoding="utf-8", newline="\n") as lines:
        target.write_text(
            "".join(line for line, _ in zip(lines, range(count), strict=False)), encoding="utf-8", newline="\n"
        )
    return target


def settings(task: str, data: Path, scratch: Path) -> dict:
    """The configuration of a task; the same for every loss."""
    cut = scratch / "data" / task
    encoder_decoder = {"model": {"architecture": "t5", "dropout": 0.1, **ENCODER_DECODER}}
    decoder = {"model": {"architecture": "llama", "dropout": 0.0, "tie_word_embeddings": True, **DECODER}}
    match task:
        case "summarization":
            corpus = data / "summarization/dialogsum"
            specific = encoder_decoder | {
                "data": {
                    "train": str(corpus / "dialogsum.train.jsonl"),
                    "validation": str(first_lines(corpus / "dialogsum.dev.jsonl", 500, cut / "validation.jsonl")),
                    "test": str(first_lines(corpus / "dialogsum.test.jsonl", 100, cut / "test.jsonl")),
                    "source_field": "dialogue", "target_field": "summary", "max_source_tokens": 192, "max_target_tokens": 48,
                }
            }  # fmt: skip
        case "dialogue":
            corpus = data / "dialogue/dailydialog"
            specific = decoder | {
                "data": {
                    "train": str(corpus / "train.jsonl"),
                    "validation": str(first_lines(corpus / "dev.jsonl", 150, cut / "validation.jsonl")),
                    "test": str(first_lines(corpus / "test.jsonl", 100, cut / "test.jsonl")),
                    "max_source_tokens": 128, "max_target_tokens": 48,
                }
            }  # fmt: skip
        case "style_transfer":
            corpus = data / "style-transfer/bible/YLTToBBE"
            splits = {"train": ("Train", 10**9), "validation": ("Dev", 500), "test": ("Test", 100)}
            specific = encoder_decoder | {"data": {"max_source_tokens": 64, "max_target_tokens": 64}}
            for split, (name, count) in splits.items():
                sides = {"source": first_lines(corpus / f"{name}.sourc", count, cut / f"{split}.source.txt")}
                sides["target"] = first_lines(corpus / f"{name}.tgt", count, cut / f"{split}.target.txt")
                specific["data"][split] = {side: str(path) for side, path in sides.items()}
        case "code_generation":
            corpus = data / "code-generation/tldr-pages"
            specific = decoder | {
                "data": {
                    "train": str(corpus / "train.jsonl"),
                    "validation": str(corpus / "dev.jsonl"),
                    "test": str(first_lines(corpus / "test.jsonl", 100, cut / "test.jsonl")),
                    "source_field": "nl", "target_field": "code", "max_source_tokens": 48, "max_target_tokens": 48,
                }
            }  # fmt: skip
    training = {
        "global_batch_size": 32, "micro_batch_size": 16, "learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 30,
        "log_every": 20, "evaluate_every": 10**6, "save_every": 10**6,
    }  # fmt: skip
    common = {"task": task, "tokenizer": {"vocab_size": 4000}, "training": training, "evaluation": {"examples": 100}}
    return common | specific


def run(task: str, loss: str, stage: int, steps: int, data: Path, scratch: Path) -> None:
    import yaml

    config = scratch / f"{task}.yaml"
    config.write_text(yaml.safe_dump(settings(task, data, scratch), sort_keys=False))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pdl", "train", str(config), *LOSSES[loss],
        f"training.max_steps={steps}", f"training.output_dir={directory(scratch, task, loss, stage)}", f"deepspeed=configs/deepspeed/zero{stage}.json",
    ]  # fmt: skip
    subprocess.run(command, cwd=REPOSITORY, check=True)


def directory(scratch: Path, task: str, loss: str, stage: int) -> Path:
    return scratch / task / f"{loss.replace(' ', '-')}-zero{stage}"


def table(scratch: Path, tasks: list[str]) -> str:
    lines = [
        "| task | loss | ZeRO | cross-entropy before | after | head | middle | tail | objective | tokens/s | GiB per rank | scores |",
        "|" + "---|" * 12,
    ]
    for task in tasks:
        for loss, stage in CELLS:
            path = directory(scratch, task, loss, stage) / "report.json"
            if not path.exists():
                continue
            report = json.loads(path.read_text())
            before, after = report["first_validation"], report["last_validation"]
            figures = [before["validation/cross_entropy"]] + [
                after[f"validation/{key}"]
                for key in ("cross_entropy", "cross_entropy/head", "cross_entropy/middle", "cross_entropy/tail", "loss")
            ]
            scores = ", ".join(f"{name} {value:.2f}" for name, value in report["scores"].items())
            memory = max(report["peak_memory_bytes"]) / 2**30
            cells = [
                task,
                loss,
                str(stage),
                *(f"{figure:.2f}" for figure in figures),
                f"{report['tokens_per_second']:,.0f}",
                f"{memory:.2f}",
                scores,
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--tasks", nargs="+", default=["summarization", "style_transfer", "dialogue", "code_generation"]
    )
    parser.add_argument("--table", action="store_true", help="print the table of finished runs only")
    arguments = parser.parse_args()
    scratch = arguments.runs.resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        for cell_loss, cell_stage in CELLS:
            for task in arguments.tasks:
                run(task, cell_loss, cell_stage, arguments.steps, arguments.data.resolve(), scratch)
    print(table(scratch, arguments.tasks))
