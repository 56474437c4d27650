"""What takes a rank seconds to import: done once, in the process that ranks are forked from (see forked.py)."""

import gc

import datasets  # noqa: F401
import deepspeed.ops.op_builder.all_ops
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (every start of ZeRO imports it, and with it a compiler)
import rouge_score.rouge_scorer  # noqa: F401
import sacrebleu  # noqa: F401
import setuptools  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers.models.bart.modeling_bart
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2
import transformers.models.t5.modeling_t5  # noqa: F401
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer  # noqa: F401

import pdl.commands.train
import pdl.run  # noqa: F401

gc.freeze()  # none of this is garbage: the collection in each start of ZeRO-3 need not look at it
