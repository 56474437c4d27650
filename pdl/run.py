"""A whole run: from a configuration to a trained, exported and scored model."""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from pathlib import Path

import torch

from pdl import distributed
from pdl.checkpoint import (
    claim_directory,
    export_model,
    inspect_directory,
    load_checkpoint,
    read_status,
    save_checkpoint,
    write_status,
)
from pdl.config import Config, UserError
from pdl.data import Collator, GlobalBatches
from pdl.distributed import say
from pdl.loss_head import LossHead, UnsupportedModel, check_parity
from pdl.metrics import Meter, RunLog, frequency_buckets
from pdl.model import adamw, decoder_start, deepspeed_settings, initialize_engine, load_model
from pdl.prepare import Prepared, prepare
from pdl.report import Progress, opening, report
from pdl.train import StepRefused, Trainer, schedule


def check(config: Config) -> int:
    """Everything that can be refused before training. Returns the exit code; raises UserError."""
    distributed.together(lambda: inspect_directory(config) if distributed.rank() == 0 else None)
    prepare(config)
    say("configuration and data are fine")
    return 0


def train(config: Config) -> int:
    """A whole run. Returns the exit code; `status.json` has it too."""
    started = time.time()
    first = distributed.rank() == 0
    directory = Path(config.training.output_dir)
    if distributed.gathered(distributed.together(lambda: inspect_directory(config) if first else None))[0]:
        say(
            f"{directory} is finished: its results are in report.json; name another training.output_dir for another run"
        )
        return 0
    prepared = prepare(config)
    distributed.together(
        lambda: claim_directory(config, prepared.tokenizer, prepared.frequencies, prepared.made_with) if first else None
    )
    state, code, reason = "failed", 1, None
    try:
        run(config, prepared, directory, started)
        state, code = "done", 0
    except UnsupportedModel as error:
        state, code, reason = "refused", 2, str(error)
        raise UserError(str(error)) from error
    except UserError as error:
        state, code, reason = "refused", 2, str(error)
        raise
    except StepRefused as error:  # on every rank alike
        reason = str(error)
        say(f"pdl: {reason}", file=sys.stderr)
    except BaseException as error:
        reason = traceback.format_exception_only(error)[-1].strip()
        raise
    finally:
        if first:
            write_status(directory, state, code, read_status(directory)["step"], reason)
    return code


def run(config: Config, prepared: Prepared, directory: Path, started: float) -> None:
    """Model, engine, loop, export, report."""
    training = config.training
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    device, world_size = distributed.device(), distributed.world_size()
    model = distributed.together(lambda: load_model(config, prepared.tokenizer))
    head = LossHead.attach(model) if config.loss.path == "head" else None
    engine = initialize_engine(model, adamw(model, config), deepspeed_settings(config, world_size))
    weights = prepared.weights.to(device)
    start = decoder_start(model) if prepared.encoder.is_encoder_decoder else None
    collator = Collator(prepared.tokenizer.pad_token_id, start)
    batches = GlobalBatches(
        prepared.train, collator, training.seed, training.global_batch_size, training.micro_batch_size,
        epochs=training.epochs if training.max_steps is None else None,
    )  # fmt: skip
    last_step = training.max_steps or batches.steps
    if head is not None:
        batch = collator([prepared.train.table[number] for number in range(min(2, len(prepared.train)))]).to(device)
        tolerance = 1e-4 if training.precision == "fp32" else 2e-2
        check_parity(engine.module, head, batch.inputs, batch.labels, weights, tolerance)

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
    resumed = load_checkpoint(directory, engine, trainer.meter.sums)
    log = RunLog(directory, resumed) if distributed.rank() == 0 else None
    say(opening(config, directory, model, resumed, last_step))
    first_step = resumed or 0
    progress = Progress(first_step, last_step)
    for done, values in trainer.steps(first_step, last_step, training.log_every, training.evaluate_every):
        progress.update(done, values)
        if values and log:
            log.write(done, values)
            write_status(directory, "running", step=done)
        if done and (done % training.save_every == 0 or done == last_step):
            save_checkpoint(directory, engine, done, trainer.meter.sums, prepared.made_with, training.keep_checkpoints)
    progress.close()
    if log:
        log.close()
    memory = distributed.peak_memory()
    export_model(directory, engine, prepared.tokenizer)
    engine.destroy()
    del trainer, engine, head, model
    gc.collect()
    report(config, prepared, directory, started, memory)
