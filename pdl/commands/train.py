"""`python -m pdl train CONFIG.yaml [section.key=value ...]`: finetune a model, from data files to an exported model.

Alone it is one process; under torchrun or deepspeed it is one rank of many.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import resource
import sys
import time
import traceback
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from pdl.config import Config, UserError, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="values over those of the file, in YAML; null is the default",
    )
    parser.add_argument("--check", action="store_true", help="validate config and data, and end")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration, and end")
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # given by the deepspeed launcher, which also sets LOCAL_RANK


def main(arguments: argparse.Namespace) -> int:
    if arguments.print_config:
        return _print_config(arguments)
    from transformers.utils import logging

    from pdl import distributed

    logging.disable_progress_bar()
    distributed.start()
    try:
        config = distributed.together(
            lambda: load_config(arguments.config, arguments.overrides, distributed.world_size())
        )
        if arguments.check:
            prepare(config)
            say(f"{arguments.config}: configuration and data are fine")
            code = 0
        else:
            code = train(config)
    except UserError as error:
        say(f"pdl: {error}", file=sys.stderr)
        code = 2
    distributed.stop()
    return code


def _print_config(arguments: argparse.Namespace) -> int:
    import yaml

    try:
        config = load_config(arguments.config, arguments.overrides, int(os.environ.get("WORLD_SIZE", "1")))
    except UserError as error:
        print(f"pdl: {error}", file=sys.stderr)
        return 2
    print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
    return 0


def say(text: str, file=None) -> None:
    """Print on rank 0 only."""
    from pdl import distributed

    if distributed.rank() == 0:
        print(text, file=file or sys.stdout, flush=True)


@dataclass
class Prepared:
    """What a run needs before its model: made, checked and equal on every rank."""

    tokenizer: object
    encoder: object
    train: object
    validation: object
    frequencies: object
    weights: object
    made_with: dict  # must be the same when the run is continued


def prepare(config: Config) -> Prepared:
    """Tokenizer, token rows, frequencies and weights. Raises UserError, on all ranks, for data that cannot be used."""
    import torch

    from pdl import distributed
    from pdl.data import Encoder, label_frequencies, text_frequencies, token_rows
    from pdl.model import load_model_config
    from pdl.tokenizer import run_tokenizer, tokenizer_hash
    from pdl.weights import loss_weights

    def read():
        tokenizer = run_tokenizer(config)
        settings = load_model_config(config, tokenizer)
        encoder = Encoder(
            tokenizer, settings.is_encoder_decoder, config.data.max_source_tokens, config.data.max_target_tokens
        )
        hashed = tokenizer_hash(tokenizer)
        train, validation = (token_rows(config, split, encoder, hashed, say) for split in ("train", "validation"))
        vocab_size = settings.get_text_config().vocab_size
        general = None
        if config.loss.general_corpus is not None:
            general = text_frequencies(Path(config.loss.general_corpus), tokenizer, hashed, vocab_size).counts
        return tokenizer, encoder, hashed, train, validation, vocab_size, general

    tokenizer, encoder, hashed, train, validation, vocab_size, general = distributed.first_then_rest(read)
    frequencies = label_frequencies(train, hashed, vocab_size, str(config.data.train))
    try:
        weights = loss_weights(config.loss, frequencies.counts, general)
    except ValueError as error:
        raise UserError(f"loss: {error}") from error
    made_with = {
        "world_size": distributed.world_size(),
        "zero_stage": config.zero_stage,
        "seed": config.training.seed,
        "global_batch_size": config.training.global_batch_size,
        "train_rows": train.key,
        "validation_rows": validation.key,
        "frequencies": hashlib.sha256(frequencies.counts.numpy().tobytes()).hexdigest()[:32],
    }
    distributed.require_equal(configuration=config_hash(config), **made_with)
    seen = int((frequencies.counts > 0).sum())
    share = float(
        (frequencies.counts * weights).sum() ** 2
        / (frequencies.total * (frequencies.counts * weights.double() ** 2).sum())
    )
    say(f"targets: {frequencies.total:,} tokens, {seen:,} of {vocab_size:,} vocabulary rows seen")
    say(
        f"loss: {describe_loss(config)}, weights {weights.min():.3g} to {weights.max():.3g}, effective sample fraction {share:.2f}"
    )
    return Prepared(tokenizer, encoder, train, validation, frequencies, weights.to(torch.float32), made_with)


def config_hash(config: Config) -> str:
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=str).encode()).hexdigest()[:32]


def describe_loss(config: Config) -> str:
    loss = config.loss
    return f"power_law alpha={loss.alpha:g} epsilon={loss.epsilon:g}" if loss.name == "power_law" else loss.name


def train(config: Config) -> int:
    """A whole run. Returns the exit code; `status.json` has it too."""
    from pdl import distributed
    from pdl.checkpoint import claim_directory, inspect_directory, write_status
    from pdl.loss_head import UnsupportedModel
    from pdl.train import NonFiniteLoss

    started = time.time()
    first = distributed.rank() == 0
    directory = Path(config.training.output_dir)
    if distributed.gathered(distributed.together(lambda: inspect_directory(config) if first else None))[0]:
        say(
            f"{directory} is finished: its results are in report.json; raise training.max_steps or name another output_dir to train more"
        )
        return 0
    prepared = prepare(config)
    distributed.together(lambda: claim_directory(config, prepared.tokenizer, prepared.frequencies) if first else None)
    state, code, reason, step = "failed", 1, None, None
    try:
        step = run(config, prepared, directory, started)
        state, code = "done", 0
    except UnsupportedModel as error:
        state, code, reason = "refused", 2, str(error)
        raise UserError(str(error)) from error
    except UserError as error:
        state, code, reason = "refused", 2, str(error)
        raise
    except NonFiniteLoss as error:  # on every rank alike
        reason = str(error)
        say(f"pdl: {reason}", file=sys.stderr)
    except BaseException as error:
        reason = traceback.format_exception_only(error)[-1].strip()
        raise
    finally:
        if first:
            write_status(directory, state, code, step, reason)
    return code


def run(config: Config, prepared: Prepared, directory: Path, started: float) -> int:
    """Model, engine, loop, export, report. Returns the number of steps done."""
    import torch

    from pdl import distributed
    from pdl.checkpoint import export_model, load_checkpoint, save_checkpoint
    from pdl.data import Collator, GlobalBatches
    from pdl.loss_head import LossHead, check_parity
    from pdl.metrics import Meter, RunLog, frequency_buckets
    from pdl.model import adamw, deepspeed_settings, initialize_engine, load_model
    from pdl.train import Trainer, schedule

    training = config.training
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    device, world_size = distributed.device(), distributed.world_size()
    model = distributed.together(lambda: load_model(config, prepared.tokenizer))
    head = LossHead.attach(model) if config.loss.path == "head" else None
    engine = initialize_engine(model, adamw(model, config), deepspeed_settings(config, world_size))
    weights = prepared.weights.to(device)
    decoder_start = model.config.decoder_start_token_id if prepared.encoder.is_encoder_decoder else None
    collator = Collator(prepared.tokenizer.pad_token_id, decoder_start)
    batches = GlobalBatches(
        prepared.train, collator, training.seed, training.global_batch_size, training.micro_batch_size,
        epochs=training.epochs if training.max_steps is None else None,
    )  # fmt: skip
    last_step = training.max_steps or batches.steps
    if head is not None:
        batch = collator([prepared.train.table[number] for number in range(min(2, len(prepared.train)))]).to(device)
        check_parity(
            engine.module,
            head,
            batch.inputs,
            batch.labels,
            weights,
            tolerance=1e-4 if training.precision == "fp32" else 2e-2,
        )

    trainer = Trainer(
        engine=engine,
        head=head,
        weights=weights,
        meter=Meter(weights, frequency_buckets(prepared.frequencies.counts).to(device), config.loss.reduction),
        batches=batches,
        validation=prepared.validation,
        collator=collator,
        learning_rate=schedule(
            training.schedule, training.learning_rate, training.warmup_steps, training.schedule_steps or last_step
        ),
        reduction=config.loss.reduction,
        alpha=config.loss.alpha if config.loss.name == "power_law" else 0.0,
        zero_stage=config.zero_stage,
    )
    torch.manual_seed(training.seed * 1_000_003 + distributed.rank() + 1)  # dropout differs between ranks
    resumed = load_checkpoint(directory, engine, trainer.meter.sums, prepared.made_with)
    log = RunLog(directory, resumed) if distributed.rank() == 0 else None
    say(_where(config, directory, model, resumed, last_step))
    progress = Progress(resumed or 0, last_step)
    for done, values in trainer.steps(resumed or 0, last_step, training.log_every, training.evaluate_every):
        progress.update(done, values)
        if values and log:
            log.write(done, values)
        if done and (done % training.save_every == 0 or done == last_step):
            save_checkpoint(directory, engine, done, trainer.meter.sums, prepared.made_with, training.keep_checkpoints)
    progress.close()
    if log:
        log.close()
    export_model(directory, engine, prepared.tokenizer)
    engine.destroy()
    del trainer, engine, head, model
    gc.collect()
    report(config, prepared, directory, started)
    return last_step


def _where(config: Config, directory: Path, model, resumed: int | None, last_step: int) -> str:
    from pdl import distributed

    parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    begins = f"continuing at step {resumed} of {last_step}" if resumed is not None else f"{last_step} steps"
    return "\n".join(
        [
            f"model: {type(model).__name__}, {parameters / 1e6:.1f} M parameters, {config.training.precision}, ZeRO-{config.zero_stage}",
            f"ranks: {distributed.world_size()} x {config.training.micro_batch_size} examples x {config.accumulation(distributed.world_size())} "
            f"micro-batches = {config.training.global_batch_size} per step; {begins}",
            f"run:   {directory}   (tensorboard --logdir {directory} --host 127.0.0.1)",
        ]
    )


class Progress:
    """A bar with rate and time left on a terminal, plain lines elsewhere. Rank 0 only."""

    def __init__(self, first_step: int, last_step: int):
        from tqdm import tqdm

        from pdl import distributed

        self.speaks, self.last_step = distributed.rank() == 0, last_step
        self.bar = tqdm(
            initial=first_step, total=last_step, unit="step", disable=not (self.speaks and sys.stderr.isatty())
        )
        self.first_step, self.started = first_step, time.time()

    def update(self, done: int, values: dict[str, float]) -> None:
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


# --- the end of a run: generate, score, tell ---


def report(config: Config, prepared: Prepared, directory: Path, started: float) -> None:
    """Generate and score examples with the exported model, write `report.json`, print the table. A collective."""
    from pdl import distributed
    from pdl.checkpoint import write_json
    from pdl.data import examples, load_recipe
    from pdl.generate import generate, load_exported

    split = "test" if config.data.test is not None else "validation"
    chosen = list(islice(examples(config, split), config.evaluation.examples))
    scores, predictions = {}, []
    if chosen:
        say(f"generating for {len(chosen)} examples of data.{split}")
        predictions = generate(
            load_exported(directory / "model"),
            prepared.encoder,
            [e.source for e in chosen],
            config.training.micro_batch_size,
        )
        if config.task is not None:
            scores = load_recipe(config.task).scores(predictions, chosen)
    memory = distributed.gathered(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    if distributed.rank() != 0:
        return
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    validations = [line for line in lines if "validation/loss" in line]
    trained = [line["train/tokens_per_second"] for line in lines if "train/tokens_per_second" in line]
    content = {
        "config_hash": config_hash(config),
        "loss": describe_loss(config),
        "steps": validations[-1]["step"],
        "first_validation": validations[0],
        "last_validation": validations[-1],
        "scores": scores,
        "scored": {"split": split, "examples": len(chosen)},
        "tokens_per_second": sum(trained) / len(trained),
        "peak_memory_bytes": memory,  # of each rank
        "ranks": distributed.world_size(),
        "zero_stage": config.zero_stage,
        "wall_seconds": round(time.time() - started, 1),  # of this session of the run
        "versions": {
            name: version(name) for name in ("torch", "deepspeed", "transformers", "datasets", "sentencepiece")
        },
    }
    write_json(directory / "report.json", content)
    print(table(content, directory))
    for example, prediction in zip(chosen[:3], predictions[:3], strict=True):
        print(
            f"\nsource:     {_one_line(example.source)}\nreference:  {_one_line(example.references[0])}\ngenerated:  {_one_line(prediction)}"
        )
    print(
        f"\nmodel:      {directory / 'model'}\nreport:     {directory / 'report.json'}\ncurves:     tensorboard --logdir {directory} --host 127.0.0.1"
    )


def table(content: dict, directory: Path) -> str:
    before, after = content["first_validation"], content["last_validation"]
    rows = [("validation", "before", "after")]
    for key in (
        "cross_entropy",
        "cross_entropy/head",
        "cross_entropy/middle",
        "cross_entropy/tail",
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
