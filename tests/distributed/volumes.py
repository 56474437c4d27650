"""Counts the bytes that go through torch's collectives, or stay in memory, while the real Trainer takes a step on a real engine."""

import functools
import gc
import json
from collections import Counter
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from pdl import distributed, power_law_weights
from pdl.config import Config, TrainingConfig
from pdl.cross_entropy import Loss
from pdl.data import Collator, GlobalBatches, TokenRows
from pdl.loss_head import LossHead
from pdl.metrics import Meter, frequency_buckets
from pdl.model import adamw, deepspeed_settings, initialize_engine
from pdl.train import Trainer

VOCABULARY = 512
# The whole tensor that an operation is about, among its arguments: what is reduced, or what is gathered.
WHOLE = {
    "all_reduce": ("tensor", 0),
    "reduce": ("tensor", 0),
    "broadcast": ("tensor", 0),
    "all_gather_into_tensor": ("output_tensor", 0),
    "reduce_scatter_tensor": ("input", 1),
    "all_gather": ("tensor_list", 0),
    "reduce_scatter": ("input_list", 1),
}
counted: Counter = Counter()  # (operation, bytes) of the tensors that went through


def count_from_now_on() -> None:
    """To be called before DeepSpeed looks the functions up."""
    for name, (keyword, place) in WHOLE.items():
        original = getattr(dist, name)

        @functools.wraps(original)
        def counting(*arguments, name=name, keyword=keyword, place=place, original=original, **named):
            whole = named.get(keyword, named.get("input_tensor")) if len(arguments) <= place else arguments[place]
            tensors = whole if isinstance(whole, list) else [whole]
            counted[name, sum(tensor.numel() * tensor.element_size() for tensor in tensors)] += 1
            return original(*arguments, **named)

        setattr(dist, name, counting)
        setattr(dist.distributed_c10d, name, counting)


def volumes(work) -> list[tuple[str, int, int]]:
    """(operation, bytes, times) of what `work` sends."""
    counted.clear()
    work()
    return [(name, size, times) for (name, size), times in sorted(counted.items())]


def trainer(case: dict) -> Trainer:
    """case: `stage`, `precision`, `accumulation`, `deepspeed`; may say `width`, and `tokens` of a row. Gets `parameters`."""
    width, tokens = case.get("width", 64), case.get("tokens", 12)
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, hidden_size=width, intermediate_size=5 * width // 2, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    case["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    head = LossHead.attach(model)
    size = 2 * case["accumulation"] * distributed.world_size()
    ids = torch.randint(2, VOCABULARY, (size, tokens + 1)).tolist()
    rows = [{"input_ids": row[:-1], "labels": row[1:]} for row in ids]
    rows = TokenRows(datasets.Dataset.from_list(rows), "volumes", {})
    training = TrainingConfig(global_batch_size=size, micro_batch_size=2, precision=case["precision"], learning_rate=1e-3)  # fmt: skip
    settings = Config(training=training, deepspeed=case["deepspeed"])
    collator = Collator(0)
    engine = initialize_engine(model, adamw(model, settings), deepspeed_settings(settings, distributed.world_size()))
    counts = torch.ones(VOCABULARY, dtype=torch.int64)
    loss = Loss(power_law_weights(counts, 0.5))
    return Trainer(
        engine=engine, head=head, loss=loss, meter=Meter(loss, frequency_buckets(counts)),
        batches=GlobalBatches(rows, collator, 0, size, 2), validation=rows, collator=collator, learning_rate=lambda step: 1e-3,
        alpha=0.5, zero_stage=case["stage"],
    )  # fmt: skip


def run_all(arguments: list) -> None:
    """arguments: cases, and the file for what rank 0 counted: for each case the volumes of one step, a log, a count of labels."""
    cases, out = arguments
    count_from_now_on()
    distributed.start()
    for case in cases:
        trained = trainer(case)
        for step in range(4):  # stage 3 learns in the first ones what it needs when
            trained.train_step(step)
        case["step"] = volumes(lambda trained=trained: trained.train_step(4))
        case["log"] = volumes(lambda trained=trained: trained.meter.values("train"))
        case["count"] = volumes(lambda trained=trained: trained.validation.count(VOCABULARY, distributed.rank(), distributed.world_size()).all_reduce())  # fmt: skip
        trained.engine.destroy()
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(cases))
    distributed.stop()


def live_bytes() -> int:
    """Of all tensors that there are, whatever they are part of, each piece of memory once."""
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.device.type == "cpu"]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return sum({(part := tensor.untyped_storage()).data_ptr(): part.nbytes() for tensor in tensors}.values())


def states(arguments: list) -> None:
    """arguments: a case, and the file for the live bytes of rank 0 when its second step is due: gradients there, not applied."""
    case, out = arguments
    distributed.start()
    before = live_bytes()
    trained = trainer(case)
    apply, engine = trained.engine.step, trained.engine

    def step() -> None:
        if engine.is_gradient_accumulation_boundary():
            case["live"] = live_bytes() - before
        apply()

    engine.step = step
    for number in range(2):
        trained.train_step(number)
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(case))
    distributed.stop()
