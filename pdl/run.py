"""A whole run: from a configuration to a trained, exported and scored model."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import yaml

from pdl import distributed, watch
from pdl.checkpoint import Checkpointer, Resume, choose_checkpoint, load_checkpoint, seed_ranks
from pdl.config import Config, UserError, first_line
from pdl.data import Collator, GlobalBatches
from pdl.distributed import RunFailed, say
from pdl.export import export_model
from pdl.loss_head import LossHead, UnsupportedModel, check_parity
from pdl.metrics import Meter, RunLog, frequency_buckets
from pdl.model import (
    adamw,
    build_extensions,
    decoder_start,
    deepspeed_settings,
    describe_model,
    initialize_engine,
    load_model,
)
from pdl.preflight import preflight
from pdl.prepare import Prepared, loss_of_run, prepare
from pdl.report import Progress, opening, report
from pdl.row_sampling import RowSampling
from pdl.run_directory import (
    Status,
    ended_in_this_launch,
    inspect_directory,
    launch_identity,
    lock,
    name_owner,
    write_beginning,
)
from pdl.storage import Storage, find_storage
from pdl.streaming import StreamedBatches
from pdl.train import Trainer, TrainerState, schedule


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
    ended = distributed.gathered(ended_in_this_launch(directory) if first else None)[0]
    if ended is not None:
        say(f"pdl: not started again: {ended.reason or ended.state}", file=sys.stderr)
        return ended.exit_code
    if distributed.gathered(distributed.together(lambda: inspect_directory(config) if first else None))[0]:
        say(
            f"{directory} is finished: its results are in report.json; name another training.output_dir for another run"
        )
        return 0
    preflight(config)
    prepared = prepare(config)
    watch.begin()
    storage, resume, status = claim(config, prepared, directory)
    code = 1
    try:
        run(config, prepared, storage, resume, status, started)
        code, outcome = 0, {"state": "done", "restart": False}
    except watch.Stopped:
        code = watch.EXIT_STOPPED
        outcome = {
            "state": "stopped",
            "reason": f"stopped by a signal; checkpoint {status.checkpoint}",
            "restart": "PDL_ELASTIC" in os.environ,  # torchrun stops the ranks when a node joins, and starts them again
        }
        say(f"pdl: stopped at step {status.checkpoint}, saved; the same command goes on from there", file=sys.stderr)
    except UnsupportedModel as error:
        code, outcome = 2, {"state": "refused", "reason": str(error), "restart": False}
        raise UserError(str(error)) from error
    except UserError as error:
        code, outcome = 2, {"state": "refused", "reason": str(error), "restart": False}
        raise
    except RunFailed as error:  # on every rank alike
        outcome = {"state": "failed", "reason": str(error), "restart": False}
        say(f"pdl: {error}", file=sys.stderr)
    except BaseException as error:
        outcome = {"state": "failed", "reason": traceback.format_exception_only(error)[-1].strip()}
        raise
    finally:
        try:
            status.write(storage, exit_code=code, **outcome)
        except OSError as error:  # the reason may be a full disk
            say(f"pdl: {directory / 'status.json'} could not be written: {error}", file=sys.stderr)
    return code


def claim(config: Config, prepared: Prepared, directory: Path) -> tuple[Storage, Resume | None, Status]:
    """Own the run's directory, and begin or continue the run in it.

    Raises UserError, having changed nothing, when another process owns it or its checkpoint was made with something else.
    """
    first = distributed.rank() == 0
    storage = find_storage(directory)
    descriptor = distributed.together(lambda: lock(directory) if storage.writes else None)
    known = Status.read(directory) if first else None
    known = distributed.gathered(known.checkpoint if known else None)[0]
    resume = choose_checkpoint(storage, config, prepared.made_with, known)
    status = Status(
        step=resume and resume.last_logged, checkpoint=resume and resume.step, launch=launch_identity(),
        resume=config.training.resume,
    )  # fmt: skip

    def begin() -> None:
        if storage.writes:
            name_owner(descriptor)
            status.write(storage)
            write_beginning(directory, config, prepared.tokenizer, prepared.frequencies, continues=resume is not None)

    distributed.together(begin, "beginning the run")
    return storage, resume, status


def run(
    config: Config, prepared: Prepared, storage: Storage, resume: Resume | None, status: Status, started: float
) -> None:
    """Train and export the model, then report on it."""
    with deterministic(config.training.deterministic):
        measured = train_model(config, prepared, storage, resume, status)
    gc.collect()  # of the model and its engine, before another one is loaded
    report(config, prepared, storage.directory, started, measured)


@contextlib.contextmanager
def deterministic(wanted: bool):
    """While training: an operation that has no deterministic implementation raises UserError."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    except RuntimeError as error:  # torch has no class of its own for it
        if not (wanted and "determinis" in str(error)):
            raise
        raise UserError(f"training.deterministic=true: {first_line(error)}") from error
    finally:
        torch.use_deterministic_algorithms(False)


def train_model(config: Config, prepared: Prepared, storage: Storage, resume: Resume | None, status: Status) -> dict:
    """Model, engine, loop, export. Returns what was measured of it, for the report."""
    training, directory = config.training, storage.directory
    device = distributed.device()
    distributed.first_then_rest(lambda: build_extensions(config))
    model = distributed.together(lambda: load_model(config, prepared.tokenizer))
    head = LossHead.attach(model) if config.loss.path == "head" else None
    settings = deepspeed_settings(
        config, distributed.world_size(), universal=resume is not None and resume.reshard, node_local=not storage.shared
    )
    engine = initialize_engine(model, adamw(model, config), settings)
    loss = loss_of_run(config, prepared.tables)
    start = decoder_start(model) if prepared.encoder.is_encoder_decoder else None
    collator = Collator(prepared.tokenizer.pad_token_id, start)
    if prepared.train is None:
        batches = StreamedBatches(config, prepared.encoder, collator)
    else:
        batches = GlobalBatches(
            prepared.train, collator, training.seed, training.global_batch_size, training.micro_batch_size,
            epochs=training.epochs if training.max_steps is None else None,
        )  # fmt: skip
    last_step = training.max_steps or batches.steps
    if head is not None:
        batch = collator([prepared.validation.table[number] for number in range(min(2, len(prepared.validation)))]).to(
            device
        )
        tolerance = 1e-4 if training.precision == "fp32" else 2e-2
        check_parity(engine.module, head, batch.inputs, batch.labels, loss, tolerance)

    trainer = Trainer(
        engine=engine,
        head=head,
        loss=loss,
        meter=Meter(loss, frequency_buckets(prepared.frequencies.counts).to(device)),
        batches=batches,
        validation=prepared.validation,
        collator=collator,
        learning_rate=schedule(
            training.schedule, training.learning_rate, training.warmup_steps, training.schedule_steps or last_step
        ),
        alpha=config.loss.alpha if config.loss.decays else 0.0,
        zero_stage=config.zero_stage,
        skip_nonfinite=training.skip_nonfinite,
        row_sampling=RowSampling(config.loss.row_sampling, training.seed) if config.loss.row_sampling else None,
    )
    checkpointer = Checkpointer(
        storage, engine, prepared.made_with, yaml.safe_dump(config.to_dict(), sort_keys=False),
        lambda target: describe_model(model, prepared.tokenizer, target), training.keep_checkpoints, status.checkpoint,
    )  # fmt: skip
    checkpointer.refuse_too_little_room()
    seed_ranks(training.seed)
    if resume is not None:
        load_checkpoint(resume, storage, engine, trainer.meter.sums, training.seed)
        trainer.state = TrainerState(**resume.manifest["trainer"])
        if resume.step >= last_step and resume.checkpoint.parent != checkpointer.directory:
            raise UserError(
                f"{resume.checkpoint} is at step {resume.step} already: {last_step} steps leave nothing to train"
            )
    log = RunLog(directory, resume.last_logged if resume else -1)
    say(opening(config, directory, model, resume and resume.step, last_step))
    bar = Progress(trainer.state.done, last_step)

    def save() -> None:
        began = time.perf_counter()
        log.sync()
        checkpointer.seconds += time.perf_counter() - began
        checkpointer.save(trainer.state, trainer.meter.sums)

    watch.beat("training", training.hang_seconds)
    try:
        for done, values in trainer.steps(last_step, training.log_every, training.evaluate_every):
            bar.update(done, values)
            if values:
                log.write(done, values)
                checkpointer.settle(wait=False)
                status.step, status.checkpoint = done, checkpointer.newest
                distributed.together(lambda: status.write(storage), "writing the status")
            if done and (done % training.save_every == 0 or done == last_step):
                save()
    except watch.Stopped:
        save()
        checkpointer.settle()
        raise
    except (RunFailed, UserError):
        with contextlib.suppress(RunFailed):
            checkpointer.settle()  # the checkpoint before what failed is a good one
        raise
    finally:
        status.checkpoint = checkpointer.newest
        bar.close()
        log.close()
    checkpointer.settle()
    status.checkpoint = checkpointer.newest
    measured = {"peak_memory_bytes": distributed.peak_memory(), "saving_seconds": round(checkpointer.seconds, 3)}
    watch.beat("exporting the model")
    distributed.together(
        lambda: export_model(directory, engine, prepared.tokenizer, storage.writes), "exporting the model"
    )
    engine.destroy()
    return measured
