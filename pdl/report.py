"""What a person sees: progress while a run goes on, and at its end generated examples, scores, a table, `report.json`."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path

from pdl import distributed, watch
from pdl.config import Config
from pdl.distributed import say
from pdl.generate import generate, load_exported
from pdl.prepare import Prepared
from pdl.records import load_recipe
from pdl.storage import write_json


def opening(config: Config, directory: Path, model, resumed: int | None, last_step: int) -> str:
    parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    begins = f"continuing at step {resumed} of {last_step}" if resumed is not None else f"{last_step} steps"
    return "\n".join(
        [
            f"model: {type(model).__name__}, {parameters / 1e6:.1f} M parameters, {config.training.precision}, ZeRO-{config.zero_stage}",
            f"ranks: {distributed.world_size()} x {config.training.micro_batch_size} examples x {config.accumulation(distributed.world_size())} "
            f"micro-batches = {config.training.global_batch_size} per step; {begins}",
            f"run:   {directory}   (watch it: make tensorboard)",
        ]
    )


class Progress:
    """A bar with rate and time left on a terminal, plain lines elsewhere. Rank 0 only."""

    def __init__(self, first_step: int, last_step: int):
        from tqdm import tqdm

        self.speaks, self.last_step = distributed.rank() == 0, last_step
        self.bar = tqdm(
            initial=first_step, total=last_step, unit="step", disable=not (self.speaks and sys.stderr.isatty())
        )
        self.first_step, self.started = first_step, time.time()

    def update(self, done: int, values: dict[str, float]) -> None:
        with contextlib.suppress(OSError):  # a terminal that is gone ends no run
            self._show(done, values)

    def _show(self, done: int, values: dict[str, float]) -> None:
        self.bar.update(done - self.bar.n)
        if not values or not self.speaks:
            return
        parts = []
        if "train/loss" in values:
            parts += [
                f"loss {values['train/loss']:.3f}",
                f"cross-entropy {values['train/cross_entropy']:.3f}",
                f"{values['train/tokens_per_second']:,.0f} tokens/s",
            ]
            if "train/row_sampling" in values:
                parts.append("(approximate: rows sampled)")
        if "validation/cross_entropy" in values:
            parts.append(f"validation cross-entropy {values['validation/cross_entropy']:.3f}")
        line = f"step {done}/{self.last_step}  " + "  ".join(parts)
        if self.bar.disable:
            pace = (time.time() - self.started) / max(1, done - self.first_step)
            left = f"  {pace * (self.last_step - done):.0f} s left" if done > self.first_step else ""
            print(line + left, flush=True)
        else:
            self.bar.write(line)

    def close(self) -> None:
        self.bar.close()


def report(config: Config, prepared: Prepared, directory: Path, started: float, measured: dict) -> None:
    """Generate and score examples with the exported model, write `report.json`, print the table. A collective."""
    chosen = prepared.scored
    scores, predictions = {}, []
    if chosen:
        watch.beat("loading the exported model")
        say(f"generating for {len(chosen)} examples of data.{prepared.scored_split}")
        predictions = generate(
            load_exported(directory / "model"),
            prepared.encoder,
            [e.source for e in chosen],
            config.training.micro_batch_size,
        )
        if config.task is not None:
            watch.beat("scoring")
            scores = load_recipe(config.task).scores(predictions, chosen)
    if distributed.rank() != 0:
        return
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    validations = [line for line in lines if "validation/loss" in line]
    content = {
        "config_hash": config.hash(),
        "loss": config.loss.describe(),
        "steps": validations[-1]["step"],
        "first_validation": validations[0],
        "last_validation": validations[-1],
        "scores": scores,
        "scored": {"split": prepared.scored_split, "examples": len(chosen)},
        "tokens_per_second": _tokens_per_second(lines),
        **measured,  # peak memory of each rank while training, seconds spent in saving
        "ranks": distributed.world_size(),
        "zero_stage": config.zero_stage,
        "wall_seconds": round(time.time() - started, 1),  # of this session of the run
        "versions": {
            name: version(name) for name in ("torch", "deepspeed", "transformers", "datasets", "sentencepiece")
        },
    }
    write_json(directory / "report.json", content)
    print(table(content))
    for example, prediction in zip(chosen[:3], predictions[:3], strict=True):
        print(
            f"\nsource:     {_one_line(example.source)}\nreference:  {_one_line(example.references[0])}\ngenerated:  {_one_line(prediction)}"
        )
    print(
        f"\nmodel:      {directory / 'model'}\nreport:     {directory / 'report.json'}\ncurves:     python -m tensorboard.main --logdir {shlex.quote(str(directory))} --host 127.0.0.1"
    )


def _tokens_per_second(lines: list[dict]) -> float:
    """Over the whole run: the logged speeds, weighted by the seconds they were held for."""
    tokens, seconds, before = 0.0, 0.0, 0
    for line in lines:
        if "train/step_seconds" in line:
            held = (line["step"] - before) * line["train/step_seconds"]
            tokens, seconds, before = tokens + held * line["train/tokens_per_second"], seconds + held, line["step"]
    return tokens / seconds


def table(content: dict) -> str:
    before, after = content["first_validation"], content["last_validation"]
    rows = [("validation", "before", "after")]
    for key in (
        "cross_entropy",
        "cross_entropy/head",
        "cross_entropy/middle",
        "cross_entropy/tail",
        "cross_entropy_untilted",
        "perplexity",
        "accuracy",
        "loss",
    ):
        if f"validation/{key}" in after:
            rows.append((key, *(f"{line[f'validation/{key}']:.3f}" for line in (before, after))))
    rows += [(name, "", f"{value:.2f}") for name, value in content["scores"].items()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    drawn = [f"  {name:<{widths[0]}}  {a:>{widths[1]}}  {b:>{widths[2]}}" for name, a, b in rows]
    title = f"{content['loss']}, {content['steps']} steps, {content['wall_seconds']:.0f} s, {content['tokens_per_second']:,.0f} tokens/s"
    return "\n".join(["", title, drawn[0], "  " + "-" * (sum(widths) + 4), *drawn[1:]])


def _one_line(text: str, width: int = 160) -> str:
    text = text.replace("\n", " / ")
    return text if len(text) <= width else text[: width - 1] + "…"
