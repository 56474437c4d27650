"""The configuration of a run: a YAML file plus `section.key=value` overrides, checked as a whole before anything starts."""

from __future__ import annotations

import dataclasses
import difflib
import glob
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """Something the user can mend. Shown without a traceback; the process ends with exit code 2."""


def first_line(error: Exception) -> str:
    """What a library's error says, short enough to quote in a UserError."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclass
class DataConfig:
    train: Any = None  # a path (.jsonl .json .csv .tsv .parquet), {source: a.txt, target: b.txt}, or hub:owner/name[/config][@revision]:split
    validation: Any = None
    test: Any = None  # optional: generated from and scored at the end
    source_field: str | None = None  # which field of a record is the source; without it the recipe decides
    target_field: str | None = None
    max_source_tokens: int = 512  # special tokens included
    max_target_tokens: int = 128
    streaming: bool = False  # training data is not cached: read, shuffled and tokenized as it is needed
    stream_by: Literal["rows", "shards"] = (
        "rows"  # every rank reads all of it and takes its rows; or reads its own files only
    )
    shuffle_buffer: int = 10_000  # examples among which a stream is shuffled


@dataclass
class ModelConfig:
    name_or_path: str | None = None  # a pretrained model: hub name or directory
    architecture: str | None = (
        None  # or a new one: a transformers model type (t5, llama, ...), its other settings beside it
    )
    dropout: float | None = None  # every dropout of the model; 0 makes runs equal on any layout
    settings: dict[str, Any] = field(
        default_factory=dict
    )  # what stands beside `architecture`, handed to the transformers config


@dataclass
class TokenizerConfig:
    name_or_path: str | None = None  # default: the pretrained model's own
    vocab_size: int | None = None  # or trained on the training data (SentencePiece BPE)


# Settings of one loss or two: the default, and whose they are.
_OF_ONE_LOSS = {
    "gamma": (2.0, ("focal",)),
    "beta": (0.9999, ("class_balanced",)),
    "temperature": (1.0, ("exponential", "chi_square")),
}


@dataclass
class LossConfig:
    name: Literal[
        "power_law", "logit_adjusted", "cross_entropy", "focal", "dft", "inverse_frequency", "class_balanced",
        "exponential", "chi_square", "face", "self_information",
    ] = "power_law"  # fmt: skip
    alpha: float | None = None  # strength of the decay; power_law and logit_adjusted have no default: state it
    epsilon: float = 1e-8  # in the unit of `frequency`
    frequency: Literal["probability", "count"] = "probability"
    unseen: Literal["rarest", "epsilon"] = "rarest"
    normalize: bool = True
    reduction: Literal["weighted_mean", "token_mean", "sum"] = "weighted_mean"
    min_weight: float | None = None  # a floor for frequent tokens, before the scaling
    max_weight: float | None = None
    gamma: float | None = None  # of focal; 2 where nothing else is said
    beta: float | None = None  # of class_balanced; 0.9999
    temperature: float | None = None  # of exponential and chi_square; 1
    label_smoothing: float = 0.0
    z_loss: float = 0.0  # times the square of the log of the partition function; 1e-4 keeps logits from drifting
    general_corpus: str | None = None  # a text file, or a frequency file made with the same tokenizer
    general_weight: float = 0.0  # share of the general corpus in the frequencies
    frequencies: str | None = None  # a frequency file (`python -m pdl count`); without it the training data is counted
    path: Literal["head", "logits"] = "head"  # where the loss is computed; `logits` serves models whose head cannot
    row_sampling: float | None = (
        None  # approximate: gradients of this share of the rows only, unbiased; default: of all
    )

    @property
    def decays(self) -> bool:
        """Whether it is made with the weights of Eq. 3, and alpha and epsilon mean something."""
        return self.name in ("power_law", "logit_adjusted")

    def describe(self) -> str:
        settings = {"alpha": self.alpha, "epsilon": self.epsilon} if self.decays else {}
        settings |= {"gamma": self.gamma, "beta": self.beta, "temperature": self.temperature}
        settings |= {"label_smoothing": self.label_smoothing or None, "z_loss": self.z_loss or None}
        said = " ".join([self.name, *(f"{key}={value:g}" for key, value in settings.items() if value is not None)])
        return said if self.row_sampling is None else f"{said} row_sampling={self.row_sampling:g} (approximate)"


@dataclass
class TrainingConfig:
    output_dir: str | None = None  # default: runs/<task>/<config>-<loss>-alpha<alpha>-seed<seed>
    resume: str = "auto"  # continue what output_dir holds; never; or the path of a checkpoint to continue from
    trust_checkpoint: bool = (
        False  # a checkpoint outside output_dir may run code when it is loaded: true says that it may
    )
    seed: int = 0
    global_batch_size: int | None = None  # examples per optimizer step, over all ranks
    micro_batch_size: int | None = None  # examples per forward on one rank; accumulation is derived
    max_steps: int | None = None  # optimizer steps; this or epochs
    epochs: float | None = None
    learning_rate: float | None = None  # AdamW, the peak of the schedule
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    schedule_steps: int | None = None  # where the schedule reaches 0; default: the last step
    warmup_steps: int = 0
    weight_decay: float = 0.0  # on matrices; biases and norms have none
    max_grad_norm: float = 1.0  # 0 switches clipping off
    precision: Literal["fp32", "bf16"] = "fp32"
    deterministic: bool = False  # refuse operations without a deterministic implementation
    skip_nonfinite: int = (
        0  # steps whose loss or gradient is not finite that a run leaves out, never two in a row, before it stops
    )
    hang_seconds: float = (
        1800.0  # without progress for so long a rank writes its stacks and ends; longer than a step, a save, the export
    )
    log_every: int = 10  # steps between log lines
    evaluate_every: int = 100  # steps between validations; also at step 0 and at the end
    save_every: int = 500  # steps between checkpoints
    keep_checkpoints: int = 2  # at least two: should the newest be damaged


@dataclass
class EvaluationConfig:
    examples: int = 200  # test examples generated and scored at the end; 0 for none


@dataclass
class Config:
    task: str | None = None  # a folder of recipes/, or the path of a recipe file; without one only losses are reported
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    deepspeed: str = "configs/deepspeed/zero2.json"

    def accumulation(self, world_size: int) -> int:
        """Micro-batches of one optimizer step on each rank."""
        return self.training.global_batch_size // (self.training.micro_batch_size * world_size)

    @property
    def zero_stage(self) -> int:
        return self.deepspeed_sharding()["zero_optimization"]["stage"]

    @property
    def resumes_inside(self) -> bool:
        """Whether `training.resume` names a checkpoint of this run's own."""
        own = Path(self.training.output_dir, "checkpoints").resolve()
        return Path(self.training.resume).resolve().parent == own

    def deepspeed_sharding(self) -> dict:
        """What the DeepSpeed JSON says: sharding and offload only."""
        return json.loads(Path(self.deepspeed).read_text(encoding="utf-8"))

    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:32]

    def to_dict(self) -> dict:
        """The configuration as its YAML file would say it, every default filled in."""
        resolved = dataclasses.asdict(self)
        resolved["model"].update(resolved["model"].pop("settings"))
        return resolved


def load_config(path: str | Path, overrides: list[str] = (), world_size: int = 1) -> Config:
    """Read, override and check a configuration.

    overrides: `section.key=value`, the value in YAML; `null` sets a key back to its default.
    Raises UserError that names every problem found, each with what would be right.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config file {path} does not exist")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections (task, data, model, ...), not {type(tree).__name__}")

    problems: list[str] = []
    for override in overrides:
        _override(tree, override, problems)
    unusable: set[str] = set()
    config = _fill(Config, tree, "", problems, unusable)
    found: list[str] = []
    _check_values(config, world_size, found)
    # A value that could not be read, or has a misspelled key, was left at its default; what that default lacks is no second problem.
    problems += [problem for problem in found if not any(key in problem for key in unusable)]
    if problems:
        raise UserError(_listed(f"{path}: the configuration cannot be used", problems))
    if config.training.output_dir is None:
        alpha = config.loss.alpha if config.loss.decays else 0
        task = Path(config.task).parent.name if config.task and config.task.endswith(".py") else config.task
        run = f"{path.stem}-{config.loss.name}-alpha{alpha:g}-seed{config.training.seed}"
        config.training.output_dir = str(Path("runs", task or "none", run))
    resume = config.training.resume
    if resume not in ("auto", "never") and not (config.resumes_inside or config.training.trust_checkpoint):
        raise UserError(
            f"training.resume={resume} lies outside training.output_dir={config.training.output_dir}: DeepSpeed's checkpoints are pickles, "
            "which can run code when they are loaded. Where you trust it, set training.trust_checkpoint=true"
        )
    return config


def flattened(tree: dict, prefix: str = "") -> dict[str, Any]:
    """A resolved configuration with dotted keys; parallel files stay one value."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and prefix != "data.":
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _listed(title: str, problems: list[str]) -> str:
    return "\n  - ".join([title + (f" ({len(problems)} problems)" if len(problems) > 1 else ""), *problems])


def _override(tree: dict, override: str, problems: list[str]) -> None:
    keys, separator, value = override.partition("=")
    if not separator or not keys:
        problems.append(f"override {override!r} is not of the form section.key=value")
        return
    try:
        value = yaml.safe_load(value)
    except yaml.YAMLError:
        problems.append(f"override {override!r}: the value is not YAML; quote it")
        return
    *sections, key = keys.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[key] = value


def _fill(cls: type, tree: dict, prefix: str, problems: list[str], unusable: set[str]) -> Any:
    """An instance of the dataclass `cls` from a mapping; what does not fit is added to `problems`, its key to `unusable`."""
    hints = typing.get_type_hints(cls)
    hints.pop("settings", None)
    settings = {}
    values = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in hints:
            if cls is ModelConfig and tree.get("architecture") and isinstance(key, str):
                if value is not None:
                    settings[key] = value
                continue
            near = difflib.get_close_matches(str(key), hints, n=1)
            if near and near[0] not in tree:
                unusable.add(f"{prefix}{near[0]}")
            problems.append(
                f"{name} is not a key"
                + (f"; did you mean {prefix}{near[0]}?" if near else f"; there are {', '.join(hints)}")
            )
        elif dataclasses.is_dataclass(hints[key]):
            if value is not None and not isinstance(value, dict):
                problems.append(f"{name} must be a section, not {value!r}")
                unusable.add(f"{name}.")
            else:
                values[key] = _fill(hints[key], value or {}, f"{name}.", problems, unusable)
        elif value is not None:  # null leaves the default
            try:
                values[key] = _coerce(value, hints[key])
            except ValueError as error:
                problems.append(f"{name}={value!r}: {error}")
                unusable.add(name)
    if settings:
        values["settings"] = settings
    return cls(**values)


def _coerce(value: Any, hint: Any) -> Any:
    """`value` as the type of a field. YAML reads 1e-8 as a string and `no` as a bool; only what is meant is accepted."""
    if hint is Any:
        return value
    if isinstance(hint, types.UnionType):
        hint = next(option for option in get_args(hint) if option is not type(None))
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"must be one of {', '.join(get_args(hint))}")
        return value
    if hint is bool:
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value
    if hint is str:
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise ValueError("must be a text")
        return str(value)
    if isinstance(value, bool):
        raise ValueError("must be a number")
    if hint is int and isinstance(value, int):
        return value  # not by way of a float, which is exact up to 2^53 only
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError("must be a number") from None
    if hint is int:
        if not number.is_integer():
            raise ValueError("must be a whole number")
        return int(number)
    return number


# --- what values may be, alone and together ---

_OURS = {  # DeepSpeed keys that are written by us, and where they are set instead
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "gradient_clipping": "training.max_grad_norm",
    "fp16": "training.precision",
    "bf16": "training.precision",
    "bfloat16": "training.precision",
    "amp": "training.precision",
    "torch_autocast": "training.precision",
    "data_types": "training.precision",
    "communication_data_type": "training.precision",
    "optimizer": "training.learning_rate and training.weight_decay",
    "scheduler": "training.schedule",
    "zero_allow_untested_optimizer": "the choice of optimizer, in the code",
}
_SHARDING = ("zero_optimization", "aio")  # what the DeepSpeed JSON is for: sharding, offload and its disk
_WATCHING = ("wall_clock_breakdown", "memory_breakdown", "comms_logger", "flops_profiler")  # and what changes no number
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_HUB = re.compile(r"hub:(?P<repository>[^/@:]+(/[^/@:]+)?)(/(?P<config>[^@:]+))?(@(?P<revision>[^:]+))?:(?P<split>.+)")


def _check_values(config: Config, world_size: int, problems: list[str]) -> None:
    data, model, tokenizer, loss, training = config.data, config.model, config.tokenizer, config.loss, config.training

    def need(holds: bool, problem: str) -> None:
        if not holds:
            problems.append(problem)

    for split in ("train", "validation", "test"):
        value = getattr(data, split)
        if value is not None:
            _check_data_source(f"data.{split}", value, problems)
        else:
            need(
                split == "test",
                f"data.{split} is missing: a file, {{source: a.txt, target: b.txt}}, or hub:owner/name:split",
            )
    _check_streaming(config, world_size, need)
    need(data.max_source_tokens > 0, f"data.max_source_tokens={data.max_source_tokens} must be > 0")
    need(
        data.max_target_tokens > 1,
        f"data.max_target_tokens={data.max_target_tokens} must be > 1 (a token and the end of sequence)",
    )
    if config.task is not None:
        try:
            recipe_path(config.task)
        except UserError as error:
            problems.append(str(error))

    need(
        (model.name_or_path is None) != (model.architecture is None),
        "state model.name_or_path or model.architecture, one of the two",
    )
    need(model.dropout is None or 0 <= model.dropout < 1, f"model.dropout={model.dropout} must lie in [0, 1)")
    if model.architecture is not None:
        need(
            (tokenizer.name_or_path is None) != (tokenizer.vocab_size is None),
            "a model built from model.architecture needs tokenizer.name_or_path or tokenizer.vocab_size, one of the two",
        )
    elif model.name_or_path is not None:
        need(
            tokenizer.vocab_size is None,
            "tokenizer.vocab_size trains a new tokenizer, which a pretrained model does not know; leave it out",
        )
    need(
        tokenizer.vocab_size is None or tokenizer.vocab_size >= 300,
        "tokenizer.vocab_size must be >= 300: 256 bytes, special tokens and characters",
    )

    for key, (default, names) in _OF_ONE_LOSS.items():
        if loss.name in names and getattr(loss, key) is None:
            setattr(loss, key, default)
        need(
            loss.name in names or getattr(loss, key) is None,
            f"loss.{key}={getattr(loss, key)} means nothing to loss.name={loss.name}; it is of {' and '.join(names)}",
        )
    if loss.gamma is not None:
        need(math.isfinite(loss.gamma) and loss.gamma >= 0, f"loss.gamma={loss.gamma} must be finite and >= 0")
    if loss.beta is not None:
        need(0 <= loss.beta < 1, f"loss.beta={loss.beta} must lie in [0, 1)")
    if loss.temperature is not None:
        need(
            math.isfinite(loss.temperature) and loss.temperature > 0,
            f"loss.temperature={loss.temperature} must be finite and > 0",
        )
    need(0 <= loss.label_smoothing < 1, f"loss.label_smoothing={loss.label_smoothing} must lie in [0, 1)")
    need(math.isfinite(loss.z_loss) and loss.z_loss >= 0, f"loss.z_loss={loss.z_loss} must be finite and >= 0")
    if loss.min_weight is not None:
        need(
            math.isfinite(loss.min_weight) and loss.min_weight > 0,
            f"loss.min_weight={loss.min_weight} must be finite and > 0",
        )
    if loss.name in ("cross_entropy", "focal", "dft"):
        for key in ("min_weight", "max_weight"):
            need(
                getattr(loss, key) is None, f"loss.{key} means nothing to loss.name={loss.name}, which weights no token"
            )
    if loss.decays:
        need(
            loss.alpha is not None,
            f"loss.alpha is missing: state it for {loss.name} (0.25 is mild, 0.75 strong, 0 is cross-entropy)",
        )
    need(
        loss.alpha is None or (math.isfinite(loss.alpha) and loss.alpha >= 0),
        f"loss.alpha={loss.alpha} must be finite and >= 0",
    )
    need(math.isfinite(loss.epsilon) and loss.epsilon > 0, f"loss.epsilon={loss.epsilon} must be finite and > 0")
    if loss.max_weight is not None:
        need(
            math.isfinite(loss.max_weight) and loss.max_weight > 0,
            f"loss.max_weight={loss.max_weight} must be finite and > 0",
        )
        need(
            not loss.normalize or loss.max_weight >= 1,
            f"loss.max_weight={loss.max_weight} must be >= 1 with loss.normalize: the mean weight is 1",
        )
    if loss.row_sampling is not None:
        need(
            0 < loss.row_sampling < 1,
            f"loss.row_sampling={loss.row_sampling} must lie between 0 and 1; null takes all rows",
        )
        need(
            loss.path == "head",
            "loss.row_sampling saves what loss.path=logits has paid for already; use loss.path=head, or leave it out",
        )
    need(0 <= loss.general_weight <= 1, f"loss.general_weight={loss.general_weight} must lie in [0, 1]")
    need(
        (loss.general_corpus is None) == (loss.general_weight == 0),
        "loss.general_corpus and a loss.general_weight > 0 go together: one without the other does nothing",
    )
    if loss.general_corpus is not None:
        need(
            loss.frequency == "probability",
            "loss.frequency=count cannot be mixed with loss.general_corpus: the two have different totals",
        )
        need(
            not loss.general_corpus.endswith(_SUFFIXES),
            f"loss.general_corpus={loss.general_corpus} would be counted markup and all: give plain text or a frequency file",
        )
        need(Path(loss.general_corpus).is_file(), f"loss.general_corpus={loss.general_corpus} does not exist")

    for key in ("global_batch_size", "micro_batch_size", "learning_rate"):
        need(getattr(training, key) is not None, f"training.{key} is missing")
    if (
        training.global_batch_size
        and training.micro_batch_size
        and training.global_batch_size > 0
        and training.micro_batch_size > 0
    ):
        unit = training.micro_batch_size * world_size
        right = f"{max(1, round(training.global_batch_size / unit)) * unit} would be"
        if training.global_batch_size % world_size == 0:
            smaller = math.gcd(training.global_batch_size // world_size, training.micro_batch_size)
            right += f", or a micro_batch_size of {smaller}"
        need(
            training.global_batch_size % unit == 0,
            f"training.global_batch_size={training.global_batch_size} is not a multiple of training.micro_batch_size={training.micro_batch_size} "
            f"x {world_size} ranks; {right}",
        )
    need(
        (training.max_steps is None) != (training.epochs is None),
        "state training.max_steps or training.epochs, one of the two",
    )
    for key in (
        "global_batch_size",
        "micro_batch_size",
        "learning_rate",
        "max_steps",
        "epochs",
        "schedule_steps",
        "log_every",
        "evaluate_every",
        "save_every",
    ):
        value = getattr(training, key)
        need(value is None or (math.isfinite(value) and value > 0), f"training.{key}={value} must be finite and > 0")
    need(
        training.keep_checkpoints >= 2,
        f"training.keep_checkpoints={training.keep_checkpoints} must be >= 2: should the newest be damaged, the one before is used",
    )
    need(
        0 <= training.hang_seconds <= 1e7,
        f"training.hang_seconds={training.hang_seconds} must lie in [0, 1e7]; 0 watches nothing",
    )
    for key in ("warmup_steps", "weight_decay", "max_grad_norm", "seed", "skip_nonfinite"):
        value = getattr(training, key)
        need(math.isfinite(value) and value >= 0, f"training.{key}={value} must be finite and >= 0")
    need(config.evaluation.examples >= 0, f"evaluation.examples={config.evaluation.examples} must be >= 0")
    _check_deepspeed(config, problems)


def _check_streaming(config: Config, world_size: int, need: Callable[[bool, str], None]) -> None:
    data, defaults = config.data, DataConfig()
    if not data.streaming:
        for key in ("stream_by", "shuffle_buffer"):
            need(getattr(data, key) == getattr(defaults, key), f"data.{key} is for data.streaming=true")
        return
    if isinstance(data.train, str) and _HUB.fullmatch(data.train):
        need(
            hub_address(data.train)["revision"] is not None,
            f"data.train={data.train} may change while it is streamed: state a revision, hub:owner/name@REVISION:split",
        )
    need(data.shuffle_buffer > 0, f"data.shuffle_buffer={data.shuffle_buffer} must be > 0")
    need(
        config.training.epochs is None, "training.epochs: the length of a stream is not known; state training.max_steps"
    )
    need(
        config.tokenizer.vocab_size is None,
        "tokenizer.vocab_size: a tokenizer is not trained on a stream; train one on a part of the data and give tokenizer.name_or_path",
    )
    need(
        config.loss.frequencies is not None,
        "loss.frequencies is missing: a stream is not counted before training; name the file that `python -m pdl count` is to write",
    )
    need(
        not (isinstance(data.train, str) and data.train.endswith(".json")),
        f"data.train={data.train} is read whole: a stream needs .jsonl, .csv, .tsv, .parquet or hub:",
    )
    if data.stream_by == "shards" and data.train is not None:
        need(
            isinstance(data.train, str), "data.stream_by=shards needs files that each rank has some of; set it to rows"
        )
        if isinstance(data.train, str) and not data.train.startswith("hub:"):
            number = len(files_of(data.train))
            need(
                number >= world_size,
                f"data.train={data.train} has {number} files, fewer than {world_size} ranks: set data.stream_by=rows",
            )


def files_of(source: str) -> list[Path]:
    """The files of a path, or of a pattern with `*` (in a name) or `**` (through directories), sorted."""
    if Path(source).is_file():
        return [Path(source)]
    return sorted(path for path in map(Path, glob.glob(source, recursive=True)) if path.is_file())


def _check_data_source(name: str, value: Any, problems: list[str]) -> None:
    if isinstance(value, dict):
        if set(value) != {"source", "target"}:
            problems.append(
                f"{name} as parallel files has the two keys source and target, not {', '.join(map(str, value))}"
            )
            return
        for side, path in value.items():
            if not Path(str(path)).is_file():
                problems.append(f"{name}.{side}={path} does not exist")
    elif not isinstance(value, str):
        problems.append(
            f"{name}={value!r} is neither a path, {{source: a.txt, target: b.txt}}, nor hub:owner/name:split"
        )
    elif value.startswith("hub:"):
        if not _HUB.fullmatch(value):
            problems.append(f"{name}={value} is not of the form hub:owner/name[/config][@revision]:split")
    elif Path(value).suffix not in _SUFFIXES:
        problems.append(f"{name}={value} must end in {', '.join(_SUFFIXES)}, or start with hub:")
    elif not files_of(value):
        problems.append(f"{name}={value} does not exist")


def _check_deepspeed(config: Config, problems: list[str]) -> None:
    path = config.deepspeed
    if not Path(path).is_file():
        problems.append(f"deepspeed={path} does not exist; configs/deepspeed/ holds zero0.json to zero3.json")
        return
    try:
        sharding = config.deepspeed_sharding()
    except ValueError as error:
        problems.append(f"deepspeed={path} is not JSON: {error}")
        return
    zero = sharding.get("zero_optimization") if isinstance(sharding, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (0, 1, 2, 3):
        problems.append(f'deepspeed={path} must be {{"zero_optimization": {{"stage": 0, 1, 2 or 3, ...}}}}')
    for key in sharding if isinstance(sharding, dict) else ():
        if key in _OURS:
            problems.append(
                f"deepspeed={path} sets {key}, which is set by {_OURS[key]}; the file holds sharding and offload only"
            )
        elif key not in _SHARDING + _WATCHING:
            # DeepSpeed ignores a key that it does not know, and some that it knows would scale the gradients.
            problems.append(f"deepspeed={path} sets {key}; it may set {', '.join(_SHARDING + _WATCHING)}")
    for key, value in zero.items() if isinstance(zero, dict) else ():
        if key.startswith("zero_quantized") or (key == "compute_grad_norm" and value is False):
            problems.append(
                f"deepspeed={path} sets zero_optimization.{key}, with which updates are not exact or not checked"
            )
    if stage == 0 and config.training.precision == "bf16":
        problems.append(
            "training.precision=bf16 needs ZeRO stage 1, 2 or 3: at stage 0 DeepSpeed cannot accumulate bf16 gradients in fp32; "
            "use configs/deepspeed/zero1.json, or training.precision=fp32"
        )


def hub_address(source: str) -> dict[str, str | None]:
    """repository, config, revision and split of `hub:owner/name[/config][@revision]:split`; a split may be `train[:50%]`."""
    return _HUB.fullmatch(source).groupdict()


def recipe_path(task: str) -> Path:
    """The recipe file of a task: a folder of recipes/ or a path ending in .py. Raises UserError when there is none."""
    path = Path(task) if task.endswith(".py") else REPOSITORY / "recipes" / task / "recipe.py"
    if not path.is_file():
        there = sorted(folder.parent.name for folder in (REPOSITORY / "recipes").glob("*/recipe.py"))
        near = difflib.get_close_matches(task.replace("-", "_"), there, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(there)}, or give the path of a recipe.py"
        raise UserError(f"task={task} has no recipe; {hint}")
    return path
