"""Parameter Golf in one file: train a language model, pack it under 16,000,000 bytes, score it.

    PRESET=demo python train_gpt.py                        # laptop CPU, builds its own data
    python train_gpt.py                                    # nfm_7k on one GPU, shards under ./data
    torchrun --standalone --nproc_per_node=8 train_gpt.py  # the same run on eight GPUs
    EVAL_ONLY=final_model.int6.ptz python train_gpt.py     # verify an artifact, no training data
    python train_gpt.py --help                             # every variable
    python train_gpt.py --print-config                     # the resolved configuration

Configuration comes from environment variables: explicit variable > PRESET > default. The same
command resumes a run that was stopped. Everything a run leaves behind lies in RUN_DIR (default
runs/$RUN_ID).

Shapes in comments: B batch, T time, D model, H query heads, K key/value heads, d head dim,
V vocabulary, N matrices in a stack.

Exit codes: 0 done, 2 configuration, 3 data, 4 artifact over budget or unreadable, 5 diverged,
6 legality audit failed, 7 out of storage or memory, 75 stopped with everything saved (run the same
command again).
"""

import ast
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import errno
import functools
import gzip
import hashlib
import importlib.util
import inspect
import io
import json
import lzma
import math
import os
import platform
import re
import resource
import shlex
import signal
import struct
import sys
import sysconfig
import time
import traceback
import typing
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import nn
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.utils.checkpoint import checkpoint

try:
    import fcntl
except ImportError:
    sys.exit("train_gpt.py locks files with fcntl, which Windows lacks: use Linux, macOS or WSL")

BOS = 1  # every document of the official shards starts with this token
EOS = 2  # the tokenizers have it, the shards do not use it
CODE_PATH = Path(__file__).resolve()  # its size counts towards the budget


def printable(text, limit=None, keep=""):
    """Return a stranger's text as a terminal may show it: one line of at most `limit` characters.

    Control characters could clear the screen, rename the window or hide an error; they are escaped,
    but for those in `keep`.
    """
    text = str(text)
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}…"
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode()
        for char in text
    )


class GolfError(Exception):
    """An error that a user can act on; `code` is the process's exit code."""

    code = 1


class ConfigError(GolfError):
    code = 2  # a setting is wrong, or does not fit the others or the run in RUN_DIR


class DataError(GolfError):
    code = 3  # shards or tokenizer are missing, damaged, or do not belong together


class ArtifactError(GolfError):
    code = 4  # a file of weights is over the budget or unreadable


class DivergedError(GolfError):
    code = 5  # the training loss is not finite


class LegalityError(GolfError):
    code = 6  # a score would break one of the challenge's conditions


class ResourceError(GolfError):
    code = 7  # out of storage or memory


class Stopped(GolfError):
    code = 75  # everything is saved, at a signal or before a time limit


# ==================================================================================================
# Configuration
# One frozen dataclass whose defaults are the nfm_7k submission; presets are its differences.
# Kinds of fields: "train" fixes the float weights, "pack" the artifact made of them, "arch" and
# "eval" travel inside the artifact, "run" changes where and how a run happens but not its result,
# but for rounding (DTYPE, DEVICE, COMPILE, MICRO_BATCH_TOKENS).
# The hash covers all but "run", so that runs with equal hashes are comparable.
# ==================================================================================================
def option(kind, default, text, low=-math.inf, high=math.inf, choices=None):
    """Return a Config field with its text for --help and its range."""
    metadata = dict(kind=kind, text=text, low=low, high=high, choices=choices)
    return dataclasses.field(default=default, metadata=metadata)


arch_option = functools.partial(option, "arch")
train_option = functools.partial(option, "train")
pack_option = functools.partial(option, "pack")
eval_option = functools.partial(option, "eval")
run_option = functools.partial(option, "run")


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run. Raises ConfigError for a wrong type, range or combination."""

    preset: str = run_option("nfm_7k", "named set of differences from the defaults")

    # Architecture: the trunk of #1170.
    # The bounds keep a hostile artifact from eating memory; no system of the field comes near them.
    vocab_size: int = arch_option(1024, "tokenizer pieces", 8, 65536)
    num_layers: int = arch_option(11, "transformer blocks", 1, 64)
    model_dim: int = arch_option(512, "width of the residual stream", 16, 4096)
    num_heads: int = arch_option(8, "query heads", 1, 64)
    num_kv_heads: int = arch_option(4, "key/value heads", 1, 64)
    mlp_mult: float = arch_option(3.0, "MLP width / MODEL_DIM, down to a multiple of 8", 0.25, 16)
    rope_dims: int = arch_option(16, "rotated dimensions per head", 0, 512)
    rope_base: float = arch_option(10000.0, "base of the rotary frequencies", 1, 1e9)
    # tanh keeps the logits bounded, which also keeps low-bit embeddings harmless.
    logit_softcap: float = arch_option(30.0, "logits are cap*tanh(logits/cap)", 1e-3, 1e6)
    # Two tokens hash to a row of this table: cheap knowledge of pairs.
    bigram_vocab_size: int = arch_option(4096, "rows of the bigram hash table, 0 = off", 0, 1 << 20)
    bigram_dim: int = arch_option(128, "width of the bigram hash table", 1, 4096)
    ve_dim: int = arch_option(0, "width of the shared value embedding, 0 = off", 0, 4096)
    ve_last_n: int = arch_option(2, "last layers that receive the value embedding", 1, 64)
    xsa_last_n: int = arch_option(11, "last layers with exclusive self-attention", 0, 64)
    gated_attention: bool = arch_option(True, "per-head sigmoid gate on the attention output")
    value_residual: bool = arch_option(True, "mix layer 0's values into every layer")

    # Architecture: parts of later records.
    embed_dim: int = arch_option(0, "width of the token embedding, 0 = MODEL_DIM", 0, 4096)
    smear_enabled: bool = arch_option(True, "mix each position with its predecessor")
    smear_inputs: int = arch_option(
        0, "leading channels that set the smear gate, 0 = one constant per channel", 0, 4096
    )
    gate_inputs: int = arch_option(
        0, "leading channels that set the attention gate, 0 = all, with a bias", 0, 4096
    )
    # Depth without bytes: the same layers several times.
    num_loops: int = arch_option(0, "further passes through layers LOOP_START to LOOP_END", 0, 8)
    loop_start: int = arch_option(3, "first of the looped layers", 0, 63)
    loop_end: int = arch_option(5, "last of the looped layers", 0, 63)
    skip_gates: bool = arch_option(False, "learned mean of stream and skip instead of a sum")
    parallel_last_n: int = arch_option(0, "last layers with attention and MLP in parallel", 0, 64)

    # Architecture: the refiners between the trunk and the logits.
    e2e_ttt_enabled: bool = arch_option(False, "TTT-Linear refiner, trained end to end")
    e2e_ttt_mini_batch: int = arch_option(16, "tokens per inner step of TTT-Linear", 1, 1024)
    e2e_ttt_base_lr: float = arch_option(1.0, "inner rate of TTT-Linear x head_dim", 0, 1e3)
    flow_enabled: bool = arch_option(False, "FlowRefiner after the trunk")
    flow_latent_dim: int = arch_option(64, "latent width of FlowRefiner", 1, 4096)
    flow_hidden_dim: int = arch_option(256, "hidden width of FlowRefiner", 1, 4096)
    nfm_enabled: bool = arch_option(True, "NativeFlowMatcher after the trunk")
    nfm_hidden_dim: int = arch_option(256, "hidden width of NativeFlowMatcher", 1, 4096)

    # Training: length and schedule.
    seed: int = train_option(42, "seed of weights and noise", 0, 2**63 - 1)
    iterations: int = train_option(7000, "optimiser steps", 0)
    train_batch_tokens: int = train_option(786432, "tokens per optimiser step, all ranks", 1)
    train_seq_len: int = train_option(2048, "training sequence length", 2)
    shuffle: bool = train_option(False, "read the training sequences in random order")
    warmdown_iters: int = train_option(2800, "last steps, over which the rate falls to 0", 0)
    warmdown_frac: float = train_option(
        0.0,
        "share of the run (of its steps or its training time) that the warmdown takes, "
        "0 = WARMDOWN_ITERS",
        0,
        1,
    )
    warmdown_shape: str = train_option("linear", "warmdown's shape", choices=("linear", "cosine"))
    min_lr: float = train_option(0.0, "share of every rate below which the warmdown stays", 0, 1)
    max_wallclock_seconds: float = train_option(0.0, "training time cap, 0 = none", 0)
    gptq_reserve_seconds: float = train_option(
        12.0,
        "QUANTIZER=gptq: seconds of MAX_WALLCLOCK_SECONDS that packing keeps, as published for "
        "8xH100",
        0,
    )

    # Training: Muon for the blocks' matrices, AdamW for the rest.
    embed_lr: float = train_option(0.035, "AdamW rate of embeddings", 0)
    scalar_lr: float = train_option(0.025, "AdamW rate of all other parameters", 0)
    matrix_lr: float = train_option(0.025, "Muon rate of the blocks' matrices", 0)
    # Gradients of the first steps turn fast, so the momentum begins lower.
    muon_momentum: float = train_option(0.99, "Muon momentum after its warm-up", 0, 1)
    muon_momentum_warmup_start: float = train_option(0.92, "Muon momentum at step 0", 0, 1)
    muon_momentum_warmup_steps: int = train_option(1500, "steps of that linear warm-up", 0)
    muon_ns_steps: int = train_option(5, "Newton-Schulz steps", 1, 20)
    muon_wd: float = train_option(0.04, "decoupled weight decay of Muon", 0)
    muon_row_norm: bool = train_option(False, "divide each row by its norm first: MuonEq-R")
    adam_wd: float = train_option(0.04, "decoupled weight decay of AdamW", 0)
    # Large embeddings want a decay of their own.
    embed_wd: float = train_option(-1.0, "weight decay of embeddings, -1 = ADAM_WD", -1)
    scalar_wd: float = train_option(-1.0, "weight decay beside SCALAR_LR, -1 = ADAM_WD", -1)
    beta1: float = train_option(0.9, "AdamW beta1", 0, 0.9999)
    beta2: float = train_option(0.95, "AdamW beta2", 0, 0.999999)
    adam_eps: float = train_option(1e-8, "AdamW epsilon", 1e-30)
    grad_clip_norm: float = train_option(0.3, "clip of the global gradient norm, 0 = off", 0)

    # Training: initial values, and the weight of the second loss.
    qk_gain_init: float = train_option(1.5, "initial per-head query gain, not 0")
    embed_init_std: float = train_option(0.005, "initial standard deviation of the embedding", 0)
    nfm_loss_weight: float = train_option(0.1, "weight of the flow-matching loss", 0)

    # Training: the exported average of the weights, looped layers, rounding in training.
    ema_decay: float = train_option(
        0.997, "decay of the weight average, lower in the first steps, 0 = off", 0, 0.999999
    )
    swa_enabled: bool = train_option(False, "export the mean of snapshots taken late in the run")
    swa_every: int = train_option(50, "steps between snapshots", 1)
    loop_at: float = train_option(0.35, "share of the run after which layers are looped", 0, 1)
    late_qat_threshold: float = train_option(
        0.0, "learning-rate scale below which training rounds the weights, 0 = off", 0, 1
    )

    # Packing: the form of the artifact that the float weights get.
    quantizer: str = pack_option(
        "lite",
        "lite = rounding row by row, the MLPs in fewer bits until it fits; gptq = integers that "
        "make up for each other's errors, steps that fill BUDGET_BYTES",
        choices=("lite", "gptq"),
    )
    calibration_tokens: int = pack_option(
        65536, "gptq: training tokens that calibrate it", 1, 1 << 24
    )
    block_bits: int = pack_option(6, "lite: bits of the blocks' matrices", choices=(5, 6, 8))
    embed_bits: int = pack_option(8, "lite: bits of the other large matrices", choices=(5, 6, 8))
    compressor: str = pack_option(
        "zstd", "lite: compressor of the artifact; gptq takes zstd", choices=("zstd", "lzma")
    )
    zstd_level: int = pack_option(16, "lite: zstd level", 1, 22)
    budget_bytes: int = pack_option(16_000_000, "bytes that code and artifact may take", 1)
    code_bytes: int = pack_option(
        0, "bytes of code to leave room for, 0 = this file's (see slurm/package.py)", 0
    )

    # Evaluation: windows and arithmetic.
    # A smaller stride gives targets more context, at a cost in proportion.
    eval_seq_len: int = eval_option(1024, "window of every evaluation", 2, 1 << 17)
    eval_stride: int = eval_option(64, "stride of the sliding window", 1, 1 << 17)
    eval_batch_seqs: int = eval_option(32, "windows per batch and rank", 1, 4096)

    # Evaluation: adaptation to text that has been scored already.
    ttt_enabled: bool = eval_option(True, "legal score-first test-time training")
    ttt_lr: float = eval_option(0.002, "SGD rate, cosine over chunks", 0, 100)
    ttt_momentum: float = eval_option(0.9, "SGD momentum", 0, 1)
    ttt_epochs: int = eval_option(10, "epochs over each scored chunk", 1, 100)
    ttt_chunk_tokens: int = eval_option(32768, "tokens per chunk", 1, 1 << 26)
    ttt_batch_seqs: int = eval_option(32, "sequences per SGD step, all ranks together", 1, 4096)
    ttt_freeze_blocks: int = eval_option(2, "first blocks that stay frozen", 0, 64)
    ttt_grad_clip: float = eval_option(1.0, "clip of the SGD gradient norm, 0 = off", 0, 1e6)
    slot: str = eval_option(
        "off",
        "per-window shift of the hidden state; published is illegal",
        choices=("off", "causal", "published"),
    )
    slot_lr: float = eval_option(0.003, "AdamW rate of SLOT", 0, 100)
    slot_steps: int = eval_option(5, "AdamW steps of SLOT", 1, 100)

    # Files and folders.
    data_path: str = run_option("./data/datasets/fineweb10B_sp1024", "directory of the shards")
    tokenizer_path: str = run_option(
        "./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model"
    )
    run_id: str = run_option("", "name of the run; default {preset}_seed{seed} and the SLURM job")
    run_dir: str = run_option("", "directory of the run; default runs/$RUN_ID")
    eval_only: str = run_option("", "score this artifact or float checkpoint, do not train")
    mode: str = run_option(
        "train",
        "audit = only the legality audit; sample = print how the artifact continues PROMPT",
        choices=("train", "audit", "sample"),
    )
    audit: bool = run_option(
        False, "check the four legality conditions before scoring; on for EVAL_ONLY and the demo"
    )
    audit_seed: int = run_option(
        0, "seed of the places that audit and spot checks take, 0 = from the files", 0, 2**63 - 1
    )
    spot_checks: float = run_option(
        0.01, "share of scoring rounds repeated on other later tokens, which must agree", 0, 1
    )
    scores_file: str = run_option(
        "",
        "write the nll of every target here (little-endian float32, nats, in order); {label} "
        "becomes the score's name, and without it the last score stays",
    )

    # MODE=sample.
    prompt: str = run_option("The", "MODE=sample: the text to continue")
    sample_tokens: int = run_option(200, "MODE=sample: tokens to write at most", 1)
    temperature: float = run_option(0.8, "MODE=sample: flattens the distribution; 0 = likeliest", 0)
    top_k: int = run_option(50, "MODE=sample: tokens to choose from at each position", 1)

    # The machine.
    device: str = run_option("auto", "auto, cpu, cuda or cuda:N")
    # A property of the machine: a laptop scores a model of eight H100 in its own fastest type.
    dtype: str = run_option(
        "auto",
        "of matrix products; auto = bfloat16 on CUDA from capability 8.0 and on CPUs with AMX, "
        "else float32",
        choices=("auto", "bfloat16", "float32"),
    )
    compile: str = run_option("auto", "torch.compile; auto = on CUDA", choices=("auto", "0", "1"))
    micro_batch_tokens: int = run_option(98304, "tokens per forward pass and rank", 1)
    warmup_steps: int = run_option(20, "compile warm-up steps; weights are restored", 0)

    # Intervals of reports and saves, and the time limit.
    train_log_every: int = run_option(100, "steps between training log lines", 1)
    val_loss_every: int = run_option(1000, "steps between validations, 0 = only the last", 0)
    checkpoint_every: int = run_option(1000, "training steps between checkpoints, 0 = off", 0)
    checkpoint_seconds: float = run_option(
        600.0, "seconds between checkpoints of training and of an evaluation, 0 = off", 0
    )
    time_limit_seconds: float = run_option(0.0, "stop within this time, 0 = SLURM's or none", 0)

    def __post_init__(self):
        # Every way to a Config passes here, an artifact's header included.
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
        check_fit(self)

    @property
    def head_dim(self):
        return self.model_dim // self.num_heads

    @property
    def mlp_hidden(self):
        # A multiple of 8 keeps the matrix products on the fast path of tensor cores.
        return int(self.mlp_mult * self.model_dim) // 8 * 8

    @property
    def training_seconds(self):
        """Seconds that training may take, 0 for no cap."""
        if self.max_wallclock_seconds and self.quantizer == "gptq":
            return self.max_wallclock_seconds - self.gptq_reserve_seconds
        return self.max_wallclock_seconds

    @property
    def artifact_compressor(self):
        # The sorted codes of gptq are made for zstd, which takes a tenth of lzma's time for them.
        return "zstd" if self.quantizer == "gptq" else self.compressor

    @classmethod
    def from_env(cls, environ, from_artifact=None):
        """Return a run's configuration: variable > `from_artifact` > PRESET > default.

        `from_artifact` holds the settings of the file that EVAL_ONLY names: its architecture, its
        evaluation and a default RUN_ID. Raises ConfigError for a variable that is misspelt, wrong
        or refused, and for variables that contradict each other or the artifact's architecture.
        """
        # The check of PRESET's own value comes last and lists the presets there are.
        base = {**PRESETS.get(environ.get("PRESET"), {}), **(from_artifact or {})}
        explicit = read_variables(environ, base)
        for name in cls.names("arch"):
            if from_artifact and name in explicit and explicit[name] != from_artifact[name]:
                raise ConfigError(
                    f"{name.upper()}={explicit[name]} contradicts the artifact, which has "
                    f"{from_artifact[name]}: unset {name.upper()} (an artifact brings its own "
                    "architecture)"
                )
        values = {"preset": "nfm_7k", **base, **explicit}  # the last one wins
        if not values.get("run_id"):
            values["run_id"] = f"{values['preset']}_seed{values.get('seed', cls.seed)}"
        if "run_id" not in explicit:
            # Tasks of a job array share their variables, but must not share a directory.
            job = environ.get("SLURM_ARRAY_JOB_ID") or environ.get("SLURM_JOB_ID")
            task = environ.get("SLURM_ARRAY_TASK_ID")
            values["run_id"] += "".join(f"_{part}" for part in (job, task) if part)
        if not values.get("run_dir"):
            values["run_dir"] = f"runs/{values['run_id']}"
        return cls(**values)

    @classmethod
    def names(cls, *kinds):
        """Return the names of the fields of these kinds, in order; of all without an argument."""
        fields = dataclasses.fields(cls)
        return [f.name for f in fields if not kinds or f.metadata["kind"] in kinds]

    def as_dict(self, *kinds):
        """Return {name: value} of the fields of these kinds, or of all."""
        return {name: getattr(self, name) for name in self.names(*kinds)}

    def hash(self, *kinds):
        """Return 16 hex digits over the fields of these kinds; by default of all but "run"."""
        kinds = kinds or ("arch", "train", "pack", "eval")
        text = json.dumps(self.as_dict(*kinds), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self):
        """Return {name: value} of the fields that differ from the preset; a run's name does not."""
        base = {field.name: field.default for field in dataclasses.fields(self)}
        base.update(PRESETS[self.preset])
        base.update(preset=self.preset, run_id=self.run_id, run_dir=self.run_dir)
        return {name: value for name, value in self.as_dict().items() if value != base[name]}


# ---- presets ----

# The trunk alone, which #1170 compares its NativeFlowMatcher with.
BASE = dict(nfm_enabled=False, eval_seq_len=2048)
# The 20,000 steps of #1232, with 6-bit embeddings.
LONG = dict(BASE, iterations=20000, warmdown_iters=12000, warmdown_shape="cosine", embed_bits=6)
# Shared by #1166 and #1150, absent from #1170.
VE128 = dict(
    BASE,
    gated_attention=False,
    value_residual=False,
    xsa_last_n=4,
    bigram_vocab_size=1536,
    ve_dim=128,
    swa_enabled=True,
    late_qat_threshold=0.15,
    compressor="lzma",
)
# #1166 adapts inside the model, in training and in evaluation, hence no test-time training on top.
TTT_LINEAR = dict(
    VE128,
    e2e_ttt_enabled=True,
    flow_enabled=True,
    iterations=7185,
    warmdown_iters=4311,
    ttt_enabled=False,
)
# The records of 04-05 to 04-09 on 8,192 pieces: none of #1170's small parts, more width and depth.
SP8192 = dict(
    BASE,
    vocab_size=8192,
    mlp_mult=4.0,
    bigram_vocab_size=0,
    smear_enabled=False,
    gated_attention=False,
    value_residual=False,
    skip_gates=True,
    num_loops=2,
    shuffle=True,
    iterations=20000,  # never reached: the cap ends the run
    max_wallclock_seconds=600.0,
    embed_lr=0.03,
    embed_wd=0.085,
    scalar_lr=0.02,
    scalar_wd=0.02,
    muon_row_norm=True,
    quantizer="gptq",
    data_path="./data/datasets/fineweb10B_sp8192",
    tokenizer_path="./data/tokenizers/fineweb_8192_bpe.model",
)
RECORD_0409 = dict(
    SP8192,
    loop_start=3,
    loop_end=5,
    loop_at=0.35,
    parallel_last_n=4,
    qk_gain_init=5.25,
    matrix_lr=0.022,
    muon_wd=0.095,
    ema_decay=0.9965,
    warmdown_frac=0.72,
    ttt_lr=0.005,
    ttt_epochs=3,
    ttt_freeze_blocks=0,
)
# The 04-09 record with what later records added and the small parts that cost few bytes.
FRONTIER = dict(
    RECORD_0409,
    smear_enabled=True,
    smear_inputs=12,
    gated_attention=True,
    gate_inputs=12,
)
PRESETS = {
    "nfm_7k": {},  # the defaults themselves
    "base_7k": BASE,
    "base_20k": LONG,
    "flow_20k": dict(LONG, flow_enabled=True),
    "ttt_linear_10l": dict(TTT_LINEAR, num_layers=10),
    "ttt_linear_11l": TTT_LINEAR,
    # #1150 scores with slot=published, which fits to its own targets; causal is the legal form.
    "slot_11l": dict(
        VE128,
        mlp_mult=2.8,
        iterations=9000,
        warmdown_iters=3500,
        max_wallclock_seconds=600.0,
        ttt_epochs=3,
        ttt_freeze_blocks=0,
        slot="causal",
    ),
    "record_0405": dict(
        SP8192,
        loop_start=4,
        loop_end=5,
        loop_at=0.5,
        qk_gain_init=4.0,
        matrix_lr=0.02,
        muon_wd=0.085,
        warmdown_frac=0.667,
        ttt_enabled=False,
    ),
    "record_0409": RECORD_0409,
    "frontier_8192": FRONTIER,
    # The same on 1,024 pieces, where pairs of tokens still tell much: with the bigram table, and
    # with layer 0's values in every layer. This is the stack that docs/ladder.md measures.
    "frontier_1024": dict(
        FRONTIER,
        vocab_size=1024,
        bigram_vocab_size=4096,
        value_residual=True,
        data_path="./data/datasets/fineweb10B_sp1024",
        tokenizer_path="./data/tokenizers/fineweb_1024_bpe.model",
    ),
    # The whole path of nfm_7k at a size that two CPU cores without AMX do in under four minutes.
    # The number of steps is fixed: the same machine gives the same digits. The wallclock cap is a
    # guard for slow ones, which would warm down earlier.
    "demo": dict(
        audit=True,
        num_layers=4,
        model_dim=128,
        num_heads=2,
        num_kv_heads=1,
        bigram_vocab_size=2048,
        xsa_last_n=4,
        nfm_hidden_dim=64,
        iterations=500,
        warmdown_iters=250,
        max_wallclock_seconds=480.0,
        train_batch_tokens=2048,
        train_seq_len=256,
        micro_batch_tokens=2048,
        # Small batches are noisy: lower Adam rates. A short run: averages that forget sooner.
        embed_lr=0.01,
        scalar_lr=0.01,
        muon_momentum=0.95,
        muon_momentum_warmup_start=0.85,
        muon_momentum_warmup_steps=100,
        ema_decay=0.95,
        warmup_steps=0,
        train_log_every=50,
        val_loss_every=100,
        checkpoint_every=0,
        checkpoint_seconds=60.0,
        eval_seq_len=256,
        eval_stride=128,
        # At five times this rate two thirds of the gain are gone.
        ttt_lr=0.02,
        ttt_epochs=1,
        ttt_chunk_tokens=8192,
        ttt_batch_seqs=8,
        ttt_freeze_blocks=0,
        data_path="./data/datasets/demo_sp1024",
        tokenizer_path="./data/tokenizers/demo_1024_bpe.model",
    ),
}

# ---- reading variables ----

# A shell's words for yes and no: bool("0") is True in Python, hence a table.
BOOLEANS = {"0": False, "1": True, "false": False, "true": True}


def parse_value(variable, kind, text):
    """Return a variable's text as bool, int, float or str. Raises ConfigError."""
    try:
        return BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        expected = "0, 1, true or false" if kind is bool else kind.__name__
        raise ConfigError(f"{variable}={text!r}: expected {expected}") from None


def require_text(variable, text, expected, reason):
    """Raise ConfigError unless a variable has the expected value; 1, 1.0 and true are one."""
    expected = str(expected)
    # As text first: expected may be a word, a number or a list.
    same = text.lower() == expected
    with contextlib.suppress(ValueError):
        same = same or float(BOOLEANS.get(text.lower(), text)) == float(expected)
    if not same:
        raise ConfigError(f"{variable}={text!r} cannot be honoured: only {expected} ({reason})")


def switch(field, off, on):
    """Return an entry of RENAMED: 0 is `off`, 1 keeps a size that is set and else is `on`."""

    def convert(variable, text, current):
        if not parse_value(variable, bool, text):
            return off
        return on if current(field) == off else current(field)

    return field, convert, f"0 is {off}; 1 is {on}, or the value that is set"


def same_as(field, reason):
    """Return an entry of RENAMED: the variable must have the field's value."""

    def convert(variable, text, current):
        require_text(variable, text, current(field), f"{field.upper()}: {reason}")
        return current(field)

    return field, convert, f"only this value: {reason}"


def count_last_layers(variable, text, current):
    """Return the number of listed layers, which must be the model's last ones."""
    count = text.count(",") + 1
    last = [str(layer) for layer in range(current("num_layers"))[-count:]]
    require_text(variable, text.replace(" ", ""), ",".join(last), "the last layers")
    return count


def count_layers_from(variable, text, current):
    """Return the number of layers from a first one on; a negative one stands for none."""
    first = parse_value(variable, int, text)
    return max(0, current("num_layers") - first) if first >= 0 else 0


# The scripts of #1170, #1232, #1166, #1150 and of later records have variables that are no fields.
# The published commands run unchanged: an ignored variable would train another model than asked.

# Other names of fields: {variable: field} or {variable: (field, converter, text for --help)}. A
# converter takes the variable, its text and current(name), the value of a field so far.
RENAMED = {
    "TIED_EMBED_LR": "embed_lr",
    "TIED_EMBED_INIT_STD": "embed_init_std",
    "MUON_BACKEND_STEPS": "muon_ns_steps",
    "NATIVE_FLOW_ENABLED": "nfm_enabled",
    "NATIVE_FLOW_HIDDEN_DIM": "nfm_hidden_dim",
    "NATIVE_FLOW_LOSS_WEIGHT": "nfm_loss_weight",
    "MUON_ROW_NORMALIZE": "muon_row_norm",
    "ENABLE_LOOPING_AT": "loop_at",
    "SKIP_GATES_ENABLED": "skip_gates",
    "EMBEDDING_DIM": "embed_dim",
    "SAVE_EVERY": "checkpoint_every",
    "SAVE_DIR": "run_dir",  # checkpoints lie below it
    "EMA_ENABLED": switch("ema_decay", off=0.0, on=0.997),
    "VE_ENABLED": switch("ve_dim", off=0, on=128),
    "LATE_QAT": switch("late_qat_threshold", off=0.0, on=0.15),
    # As published SLOT fits to its own targets; its legal form stands in unless SLOT=published.
    "SLOT_ENABLED": switch("slot", off="off", on="causal"),
    "VE_LAYERS": ("ve_last_n", count_last_layers, "numbers of these layers, the last ones"),
    "PARALLEL_RESIDUAL_START": (
        "parallel_last_n",
        count_layers_from,
        "number of the first of these layers, -1 for none",
    ),
    "ROPE_TRAIN_SEQ_LEN": same_as("train_seq_len", "angles are the same at every length"),
    "E2E_TTT_NUM_HEADS": same_as("num_heads", "TTT-Linear has the heads of the attention"),
}
# {variable: (the one value that this code has, why)}
BUILT_IN = {
    "SLIDING_WINDOW_ENABLED": ("1", "the sliding window is always scored"),
    "NATIVE_FLOW_INIT_SCALE": ("0.01", "the velocity field starts at zero"),
    # The scripts' later orthogonal start overwrites what this scaled.
    "FLOW_INIT_SCALE": ("0.01", "FlowRefiner starts orthogonal, as in the scripts"),
    "QAT_ENABLED": ("0", "rounding in training begins late: see LATE_QAT_THRESHOLD"),
    "INT5_MLP": ("1", "MLPs drop to 5 bits as far as BUDGET_BYTES needs it"),
    "LEGAL_TTT": ("1", "nothing trains on text before it is scored: see TTT_ENABLED"),
    "TTT_OPTIMIZER": ("sgd", "test-time training has no other optimiser"),
    "LEAKY_RELU": ("1", "the MLP has no other activation"),
    "LEAKY_SLOPE": ("0.5", "the MLP has no other activation"),
    "LN_SCALE": ("1", "normalised inputs are scaled by 1/sqrt(layer + 1)"),
    "TIE_EMBEDDINGS": ("1", "the output layer is the embedding"),
    "VAL_DOC_FRACTION": ("1.0", "the whole validation text is scored"),
    "CANON_LAST_N": ("0", "there are no Canon layers"),
    "CTW_WEIGHT": ("0", "there is no context tree"),
}
STEPS_FOUND = "QUANTIZER=gptq finds the steps that fill BUDGET_BYTES"
# {variable: advice}; these are refused with any value
REFUSED = {
    "WEIGHT_DECAY": "set MUON_WD for the blocks' matrices and ADAM_WD for the rest",
    "MUON_WEIGHT_DECAY": "set MUON_WD",
    "ADAM_WEIGHT_DECAY": "set ADAM_WD",
    "MLP_HIDDEN": "set MLP_MULT, the width divided by MODEL_DIM",
    # Later records quantise by fixed steps; QUANTIZER=gptq finds one for each row and column.
    "MATRIX_BITS": "QUANTIZER=gptq takes what BUDGET_BYTES allows; for lite: BLOCK_BITS",
    "MATRIX_CLIP_SIGMAS": STEPS_FOUND,
    "EMBED_CLIP_SIGMAS": STEPS_FOUND,
    "MLP_CLIP_SIGMAS": STEPS_FOUND,
    "ATTN_CLIP_SIGMAS": STEPS_FOUND,
    "GPTQ_CALIBRATION_BATCHES": "set CALIBRATION_TOKENS",
    # Later records have other forms of the same parts.
    "RECUR_LAYERS": "set NUM_LOOPS, LOOP_START and LOOP_END",
    "RECUR_START_STEP": "set LOOP_AT, a share of the run",
    "PARALLEL_START_LAYER": "there are no two lanes: set PARALLEL_LAST_N for the one here",
    "SMEAR_GATE_ENABLED": "set SMEAR_ENABLED, and SMEAR_INPUTS=12 for their form of it",
    "SPARSE_ATTN_GATE_ENABLED": "set GATED_ATTENTION=1 and GATE_INPUTS=12",
    # Removed settings, with their replacement.
    "NPROC": "start the ranks with torchrun --standalone --nproc_per_node=N",
    "RESUME": "the same command resumes RUN_DIR: unset it, or set another RUN_ID to start anew",
    "EMA_FULL_STEPS": "set a lower EMA_DECAY for a short run",
    "SWA_START_SCALE": "snapshots start at a learning-rate scale of 0.2: unset it",
    "LZMA_PRESET": "lzma packs with preset 6: unset it",
    "EVAL_CHECKPOINT_SECONDS": "set CHECKPOINT_SECONDS, which evaluations follow too",
    "TTT_CUDA_GRAPH": "test-time training is a CUDA graph with several ranks: unset it",
    "VAL_SHA256": "the log's data_fingerprint has the SHA-256 of the validation tokens: unset it",
}

# Features of the challenge's other scripts: {feature: names of its variables}. A value that means
# off is accepted, and so are a feature's other variables beside its own ..._ENABLED=0.
LACKING = {
    "case tokens": r"CASEOPS_\w+",
    "low-rank error correction": r"LQER_\w+",
    "AWQ scaling": r"AWQ_\w+",
    "phased test-time training": r"(PHASED|GLOBAL)_TTT_\w+",
    "LoRA test-time training": (
        r"TTT_(LORA|SHORT|WARM_START|TRAIN|ENTROPY)_\w+|TTT_([KVQO]|MLP)_LORA|LORA_\w+|"
        r"TTT_(BETA[12]|WEIGHT_DECAY|ADAMW_WD|CHUNK_SIZE|BATCH_SIZE|GRAD_STEPS\w*|EVAL_SEQ_LEN|"
        r"LOCAL_LR_MULT|UPDATE_EVERY|DOC_LIMIT|MASK|NS_STEPS)"
    ),
    "n-gram model": r"NGRAM_\w+|CTW_\w+|TRIGRAM\w*|TOKEN_(BOOST|ORDER|THRESHOLD)|W(ORD|ITHIN)_\w+",
    "attention gate of this form (see GATED_ATTENTION, GATE_INPUTS)": (
        r"GATED_ATTN\w*|(SPARSE_)?ATTN_(OUT_)?GATE_\w+|GATE_(ATTN|MLP)_\w+|GATE_(WIDTH|WINDOW)"
    ),
    "smear gate of this form (see SMEAR_ENABLED, SMEAR_INPUTS)": r"(USE_)?SMEAR_?GATE\w*|SMEAR",
    "two lanes (see PARALLEL_LAST_N)": r"PARALLEL_\w+",
    "other recurrence (see NUM_LOOPS)": (
        r"RECUR_\w+|LOOP_(PHASE2|LAYER)_\w+|\w+_DEPTH_RECURRENCE|UNTIE_\w+|REPEAT_UNTIE_\w+"
    ),
    "growing sequences or batches": (
        r"(TRAIN_)?SEQ_(LEN_|SCHEDULE|CHANGE_)\w*|BATCH_(SCHEDULE|TOKENS)_\w+"
    ),
    "rotation that stretches with the length": r"ROPE_(YARN|TYPE)|YARN_\w+|EVAL_NTK_ALPHA",
    "multi-token prediction": r"MTP_\w+",
    "asymmetric softcap": r"ASYM\w*_LOGIT\w*|SOFTCAP_TYPE",
    "Polar Express coefficients": r"(USE_)?POLAR_EXPRESS",
    "weight-decay taper or cautious decay": r"WD_TAPER_\w+|CAUTIOUS_WD",
    "lookahead average of weights": r"LAWA_\w+",
    "differential or Gated Delta attention": r"DIFF_ATTN|GDN_\w+|DTG_\w+",
    "hashed embedding beside the bigram table": r"HASH_EMBED_\w+|BIGRAM_(HASH|BUCKETS)\w*",
    "rounding of this form (see QUANTIZER, LATE_QAT_THRESHOLD)": (
        r"QAT(_\w+)?|SOFT_ROUND_QAT|INT[456]_\w+|MIXED_QUANT|QUANT_\w+|PRUNE_RATIO|USE_INT6|"
        r"GPTQ_(ENABLED|DAMP|CALIB\w+|AR_\w+|BLOCK_SIZE|TEMPERATURE)|HESSIAN_CLIP_\w+|OPTROT_\w+"
    ),
    "evaluation of this form": r"ETLB_\w+|TEMP_SCALING|SLIDING_EVAL\w*|EVAL_INCLUDE_TAIL",
    "block of this form": (
        r"ATTN_(PROJ_TYPE|RES|VARIANT)|BLOCK_\w+|LEGENDRE_\w+|LATENT_KV_DIM|MLP_(GROUPS|RANK)|"
        r"REFINER\w*|NUM_(LIGHT|UNIQUE|VIRTUAL)_\w+|(USE_)?WRAP\w*|CANON_\w+|LOGIT_HEAD_TYPE"
    ),
    "schedule of this form": (
        r"(EMA|SWA)_(START_\w+|DECAY)|MATRIX_LR_(EARLY|LATE)|MUON_COOLDOWN_\w+|LR_START|"
        r"QK_GAIN_INIT_SCHEDULE|MIDRUN_CAP_SCHEDULE|CLIP_MULT_\w+"
    ),
    "other training objective or optimiser": (
        r"EGGROLL_\w+|JEPA_\w+|SIGREG_\w+|BITNET_\w+|XNOR_\w+|BINARIZE_\w+|TVERSKY_\w+|"
        r"MUON_HUBER_\w+|MATRIX_OPTIMIZER|LR_SCHEDULE|LR_WARMUP_STEPS|NEGATIVE_SLOPE|ACTIVATION"
    ),
}
OFF = {"", "0", "0.0", "-1", "false", "none", "off", "standard"}
# {variable of other scripts: setting to use here}; a warning names it and the run goes on.
PLACES = {
    "DATA_DIR": "DATA_PATH and TOKENIZER_PATH",
    "DATASETS_DIR": "DATA_PATH",
    "TRAIN_FILES": "DATA_PATH",
    "VAL_FILES": "DATA_PATH",
    "ARTIFACT_DIR": "RUN_DIR",
    "CHECKPOINT_DIR": "RUN_DIR",
    "OUT_DIR": "RUN_DIR",
    "MODEL_SAVE_PATH": "RUN_DIR",
    "EVAL_ONLY_PATH": "EVAL_ONLY",
    "RESUME_FROM": "RUN_DIR: the same command resumes",
    "VAL_BATCH_SIZE": "EVAL_BATCH_SEQS",
    "VAL_BATCH_TOKENS": "EVAL_BATCH_SEQS",
    "GRAD_ACCUM_STEPS": "MICRO_BATCH_TOKENS",
}


def read_variables(environ, base):
    """Return {field: value} of the variables that are set, published names included.

    `base` holds the values below them, of preset and artifact. Raises ConfigError.
    """
    fields = {field.name: field for field in dataclasses.fields(Config)}
    check_names(environ, {*map(str.upper, fields), *RENAMED, *BUILT_IN, *REFUSED})
    explicit = {}  # a variable is its field's name in capitals
    for name, field in fields.items():
        if name.upper() in environ:
            explicit[name] = parse_value(name.upper(), field.type, environ[name.upper()])

    def current(name):
        return {**base, **explicit}.get(name, fields[name].default)

    for variable in [name for name in RENAMED if name in environ]:
        text = environ[variable]
        if isinstance(RENAMED[variable], str):
            name = RENAMED[variable]
            value = parse_value(variable, fields[name].type, text)
        else:
            name, convert, _ = RENAMED[variable]
            value = convert(variable, text, current)
        if name in explicit and explicit[name] != value:
            raise ConfigError(
                f"{variable}={text} contradicts {name.upper()}={explicit[name]}: unset one of them"
            )
        explicit[name] = value
    for variable in [name for name in BUILT_IN if name in environ]:
        require_text(variable, environ[variable], *BUILT_IN[variable])
    for variable in [name for name in REFUSED if name in environ]:
        raise ConfigError(f"{variable}={environ[variable]} is not a setting: {REFUSED[variable]}")
    return explicit


def check_names(environ, known):
    """Raise ConfigError for a slip such as ITERATONS and for a feature that this code lacks."""
    for name, near in near_misses(environ, known):
        if len(near) > SHORT_NAME or near == "PRESET":
            raise ConfigError(
                f"environment variable {name}={environ[name]!r} is not a setting, but "
                f"looks like {near}: rename or unset it (see --help)"
            )
    for name in sorted(environ.keys() - known):
        for feature, pattern in LACKING.items():
            if not re.fullmatch(pattern, name) or environ[name].lower() in OFF:
                continue
            family = [n for n in environ if n.endswith("_ENABLED") and re.fullmatch(pattern, n)]
            if not any(environ[switch].lower() in OFF for switch in family):
                raise ConfigError(
                    f"{name}={environ[name]}: this code has no {feature}: unset {name}"
                )


SHORT_NAME = 7  # letters: a machine may export MODEL, SEEDS or COMPILER for purposes of its own


def near_misses(environ, known):
    """Return [(variable, setting)] of variables that are no settings but look like one."""
    found = []
    for name in sorted(environ.keys() - known):
        # 0.86 lets one wrong letter in seven pass as a slip, but tells DATA_DIR from DATA_PATH.
        near = difflib.get_close_matches(name.upper(), sorted(known), n=1, cutoff=0.86)
        if near and len(name) > 3 and name not in PLACES:
            found.append((name, near[0]))
    return found


def name_warnings(environ):
    """Return a warning for each variable that looks like a setting, or is one of other scripts."""
    known = {*map(str.upper, Config.names()), *RENAMED, *BUILT_IN, *REFUSED}
    warnings = [
        f"warning: {name}={environ[name]} is no setting and does nothing; did you mean {near}?"
        for name, near in near_misses(environ, known)
    ]
    for name, instead in PLACES.items():
        if name in environ:
            warnings.append(f"warning: {name}={environ[name]} does nothing here: set {instead}")
    return warnings


# ---- checking values ----


def check_value(field, value):
    """Raise ConfigError unless a field's value has its type, range and choices."""
    meta = field.metadata
    name = field.name.upper()
    is_number = field.type in (int, float)
    # An integer may stand for a float, but True (an int to Python) may not stand for 1.
    accepted = (int, float) if field.type is float else field.type
    if not isinstance(value, accepted) or (is_number and isinstance(value, bool)):
        raise ConfigError(f"{name}={value!r}: expected {field.type.__name__}")
    if is_number:
        # `not <=` also refuses NaN; the bound refuses infinity and integers beyond every float.
        if not abs(value) <= sys.float_info.max:
            raise ConfigError(f"{name}={value}: expected a finite number")
        # Bounds are inclusive; an error about a field without an upper one names the lower alone.
        if not meta["low"] <= value <= meta["high"]:
            most = f" and at most {meta['high']}" if meta["high"] < math.inf else ""
            raise ConfigError(f"{name}={value}: expected at least {meta['low']}{most}")
    if meta["choices"] and value not in meta["choices"]:
        choices = ", ".join(map(str, meta["choices"]))
        raise ConfigError(f"{name}={value!r}: expected one of {choices}")


MAX_PASSES = 1024
MAX_ACTIVATIONS = 1 << 29  # 2 GB in float32: 512 windows of 2048 at a width of 512


def check_fit(c):
    """Raise ConfigError for settings that do not fit together, with their names and values."""
    uneven = "the first is no multiple of the second: change one of them"
    too_large = "lower the first"
    own_decay = "use 0 or more, or -1 for ADAM_WD"
    # An artifact brings its windows, and must not ask for any amount of memory or time.
    activations = max(c.eval_batch_seqs, c.ttt_batch_seqs) * c.eval_seq_len * c.model_dim
    passes = c.eval_seq_len / c.eval_stride  # of every token through the model
    # (what must hold, settings that the error quotes, what to do)
    rules = [
        (c.preset in PRESETS, "preset", f"expected one of {', '.join(PRESETS)}"),
        (
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", c.device),
            "device",
            "expected auto, cpu, cuda or cuda:N",
        ),
        # The model.
        (c.model_dim % c.num_heads == 0, "model_dim num_heads", uneven),
        (c.num_heads % c.num_kv_heads == 0, "num_heads num_kv_heads", uneven),
        (
            c.rope_dims % 2 == 0 and c.rope_dims <= c.head_dim,  # rotation turns pairs
            "rope_dims",
            f"use an even number up to MODEL_DIM/NUM_HEADS = {c.head_dim}",
        ),
        (c.mlp_hidden >= 8, "mlp_mult", "no hidden unit is left: raise it"),
        (c.ttt_freeze_blocks <= c.num_layers, "ttt_freeze_blocks num_layers", too_large),
        (c.embed_dim <= c.model_dim, "embed_dim model_dim", too_large),
        (c.smear_inputs <= c.model_dim, "smear_inputs model_dim", too_large),
        (c.gate_inputs <= c.model_dim, "gate_inputs model_dim", too_large),
        (c.parallel_last_n <= c.num_layers, "parallel_last_n num_layers", too_large),
        (
            c.num_loops == 0 or c.loop_start <= c.loop_end < c.num_layers,
            "loop_start loop_end num_layers",
            "use layers of the model, the first not after the last",
        ),
        (c.bigram_vocab_size != 1, "bigram_vocab_size", "use 0 or at least 2"),
        (c.ve_dim == 0 or c.ve_last_n <= c.num_layers, "ve_last_n num_layers", too_large),
        # Batches and windows.
        (c.train_batch_tokens % c.train_seq_len == 0, "train_batch_tokens train_seq_len", uneven),
        (
            c.micro_batch_tokens >= c.train_seq_len,
            "micro_batch_tokens train_seq_len",
            "not one sequence fits: raise the first",
        ),
        (
            activations <= MAX_ACTIVATIONS,
            "eval_batch_seqs ttt_batch_seqs eval_seq_len model_dim",
            f"a batch of windows has {activations} activations, use at most {MAX_ACTIVATIONS}",
        ),
        (
            c.eval_stride <= c.eval_seq_len,
            "eval_stride eval_seq_len",
            "targets between the windows would never be scored: lower the first",
        ),
        (
            passes <= MAX_PASSES,
            "eval_seq_len eval_stride",
            f"every token would pass the model {passes:g} times, use at most {MAX_PASSES}",
        ),
        (c.ttt_chunk_tokens % c.eval_seq_len == 0, "ttt_chunk_tokens eval_seq_len", uneven),
        (
            c.slot == "off" or c.eval_stride < c.eval_seq_len,
            "slot eval_stride eval_seq_len",
            "no window has a position that an earlier one scored: lower EVAL_STRIDE",
        ),
        # Training. A gain of 0 makes every query 0, and leaves their matrix without a gradient.
        (
            c.qk_gain_init != 0,
            "qk_gain_init",
            "attention would see no difference between tokens: use 1.5 to 5.25, as published",
        ),
        # Other negative numbers would act as -1 does.
        (c.embed_wd == -1 or c.embed_wd >= 0, "embed_wd", own_decay),
        (c.scalar_wd == -1 or c.scalar_wd >= 0, "scalar_wd", own_decay),
        # A rate that stays above the threshold never reaches the rounding.
        (
            c.late_qat_threshold == 0 or c.late_qat_threshold > c.min_lr,
            "late_qat_threshold min_lr",
            "rounding would never begin: raise the first or lower the second",
        ),
        (
            c.max_wallclock_seconds == 0 or c.training_seconds > 0,
            "gptq_reserve_seconds max_wallclock_seconds",
            "no time is left for training: lower the first or raise the second",
        ),
    ]
    for holds, names, expected in rules:
        if not holds:
            settings = [f"{name.upper()}={getattr(c, name)!r}" for name in names.split()]
            raise ConfigError(f"{' and '.join(settings)}: {expected}")


def help_text():
    """Return every variable with its meaning, default and the presets that change it."""
    lines = [__doc__ or "", "Variables (default; [preset=value] where a preset differs):"]
    for field in dataclasses.fields(Config):
        name = field.name
        text = field.metadata["text"]
        # The presets' names are not known yet where the field is declared.
        choices = PRESETS if name == "preset" else field.metadata["choices"]
        if choices:
            text += f" ({'|'.join(map(str, choices))})"
        for preset, values in PRESETS.items():
            if name in values:
                text += f" [{preset}={values[name]}]"
        lines += [f"  {name.upper()}={field.default}", f"      {text}"]
    lines += ["", "Published names, and names that are refused:"]
    for name, meaning in RENAMED.items():
        if isinstance(meaning, str):
            lines += [f"  {name}", f"      {meaning.upper()}"]
        else:
            lines += [f"  {name}", f"      {meaning[0].upper()}: {meaning[2]}"]
    for name, (value, reason) in BUILT_IN.items():
        lines += [f"  {name}", f"      only {value}: {reason}"]
    for name, instead in REFUSED.items():
        lines += [f"  {name}", f"      no setting: {instead}"]
    return "\n".join(lines)


# ==================================================================================================
# Runtime
# Device, ranks, log, clock and signals: everything that touches the machine sits in one object
# made in main and passed down, so that all that follows is the same code on a laptop and on eight
# GPUs.
# ==================================================================================================
# ---- files ----


def sha256_file(path):
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_file(path):
    """A binary file that takes the name `path` once it is whole: `path` is never half-written.

    Raises ResourceError when the file system refuses; an older file at `path` is intact then.
    """
    path = Path(path)
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            # The bytes must be on the disk before the name is, or a power cut leaves an empty file.
            os.fsync(file.fileno())
        os.replace(temporary, path)
        # The rename itself is an entry of the folder, which is flushed on its own.
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ResourceError(
            f"cannot write {path}: {error.strerror}: free space or change RUN_DIR; what was "
            "saved before is intact"
        ) from None


def write_atomic(path, parts):
    """Write byte strings as one file, whole or not at all; see atomic_file."""
    with atomic_file(path) as file:
        file.writelines(parts)


def write_json(path, value):
    """Write a JSON file, whole or not at all."""
    text = json.dumps(value, indent=1)
    write_atomic(path, [f"{text}\n".encode()])


def read_json(path):
    """The value that write_json wrote. Raises ConfigError for a damaged file."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # of JSON or of UTF-8
        raise ConfigError(
            f"{path} is damaged ({printable(error, 100)}): restore it, or set another RUN_ID to "
            "start anew"
        ) from None


def save_tensors(path, state):
    """Write a tree of tensors and plain values as a torch.save archive; returns its bytes."""
    # An open file, not a path: where a disk is full to the last bytes, PyTorch's own file writer
    # truncates the archive and raises nothing.
    with atomic_file(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError:
            # PyTorch's archive writer does not say why a write fell short: one more write does.
            file.write(bytes(1 << 20))
            file.flush()
            raise
    return os.path.getsize(path)


def load_tensors(path):
    """The tree that save_tensors wrote, on the CPU, mapped to memory; runs no code of the file.

    Raises ArtifactError if the file is damaged or not one of ours.
    """
    try:
        # torch.load accepts a flipped bit: it does not compare the checksums of the archive.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        # weights_only refuses pickled code: a checkpoint may come from a stranger.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise ArtifactError(
            f"{path}: {error.strerror}: copy it again, or name another file"
        ) from None
    except Exception as error:  # a stranger's file may hold anything
        reason = printable(str(error).partition("\n")[0], 200)
        raise ArtifactError(
            f"{path}: truncated, damaged or not a checkpoint of tensors ({reason}): copy it again, "
            "or name another file"
        ) from None


def private_copy(tree):
    """A tree of tensors, in dicts and lists, copied to the host."""
    if isinstance(tree, torch.Tensor):
        # copy=True: on a CPU .to() would return the tensor itself, which training changes.
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: private_copy(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [private_copy(value) for value in tree]
    return tree


class Checkpointer:
    """Numbered states of one training run or evaluation, the last two of which are kept.

    All ranks wait while rank 0 writes. A write that fails is a warning: the state before it is
    intact.
    """

    def __init__(self, runtime, name, every_seconds):
        self.runtime = runtime
        self.folder = runtime.dir / "checkpoint"
        self.name = name
        self.every_seconds = every_seconds  # 0: never due
        self.saved_at = time.monotonic()

    def path(self, number):
        return self.folder / f"{self.name}_{number:08d}.pt"

    def numbers(self):
        """Numbers of the states on disk, oldest first."""
        # Unfinished files end in .tmp, other phases have other names.
        pattern = re.compile(re.escape(self.name) + r"_(\d{8})\.pt")
        found = [pattern.fullmatch(path.name) for path in self.folder.glob("*.pt")]
        return sorted(int(match[1]) for match in found if match)

    def due(self):
        """True once `every_seconds` have passed since the last save."""
        return 0 < self.every_seconds < time.monotonic() - self.saved_at

    def save(self, number, state):
        """Write rank 0's `state`; every rank must call this.

        Returns (seconds, bytes) on every rank, or None where the state could not be written.
        """
        begin = time.monotonic()
        size = 0
        if self.runtime.is_main:
            try:
                size = save_tensors(self.path(number), state)
            except ResourceError as error:
                self.runtime.log(f"warning: checkpoint not saved: {error}")
            else:  # an older state goes when a newer one is safe
                # Two are kept: the newest may be damaged later, by a disk or a copy.
                for old in self.numbers()[:-2]:
                    self.path(old).unlink()
        mine = (time.monotonic() - begin, size) if self.runtime.is_main else (0, 0)
        # The others wait here: a rank that left now would have the launcher end rank 0's write.
        seconds, size = self.runtime.comm.all_reduce_scalars(*mine)
        self.saved_at = time.monotonic()
        # The next save will take about as long: a time limit must leave room for it.
        self.runtime.stop.save_seconds = seconds
        return (seconds, int(size)) if size else None

    def last(self):
        """Path of the newest state, or 'none'."""
        numbers = self.numbers()
        return str(self.path(numbers[-1])) if numbers else "none"

    def load(self):
        """(number, state) of the newest state that rank 0 can read, on every rank, or (0, None)."""
        found, state = 0, None
        for number in reversed(self.numbers()) if self.runtime.is_main else ():
            try:
                state = load_tensors(self.path(number))
            except ArtifactError as error:
                self.runtime.log(f"warning: {error}; using the checkpoint before it")
            else:
                found = number
                break
        # Ranks that chose for themselves could go on from different states.
        found = int(self.runtime.comm.from_main(found))
        if found and state is None:
            state = load_tensors(self.path(found))
        return found, state

    def clear(self):
        """Delete all states of this name: nothing will go on from them."""
        if self.runtime.is_main:
            for number in self.numbers():
                self.path(number).unlink()


def open_lines(path):
    """Open for appending, unbuffered, after ending a line that a killed process left unfinished."""
    file = open(path, "ab+", buffering=0)  # reading too, for the last byte
    if file.tell() > 0:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


def lock(file, flags=0):
    """Take the exclusive lock of an open file, until it is closed.

    Returns False where the file system has no locks. With fcntl.LOCK_NB, raises BlockingIOError
    when another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        return False
    return True


# ---- the machine ----

# PyTorch 2.13 renamed two collectives.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Comm:
    """Rank, world size and the collectives in use."""

    def __init__(self, rank=0, world=1):
        self.rank = rank
        self.world = world

    # Three collectives on device tensors. They return at once, with a handle to wait for, so that
    # the optimiser computes while they run.
    def all_reduce(self, tensor):
        """Sum over ranks, in place."""
        return dist.all_reduce(tensor, async_op=True)

    def reduce_scatter(self, out, stack):
        """out (N/world, ...) = this rank's slice of the sum over ranks of stack (N, ...)."""
        return reduce_scatter(out, stack, async_op=True)

    def all_gather(self, out, part):
        """out (N, ...) = every rank's part (N/world, ...)."""
        return all_gather(out, part, async_op=True)

    def sum_gradients(self, grads):
        """Sum a list of tensors over ranks, in place."""
        if self.world == 1:
            return
        # One bucket: many small messages would cost their latency each.
        flat = torch.cat([grad.flatten() for grad in grads])
        self.all_reduce(flat).wait()
        parts = flat.split([grad.numel() for grad in grads])
        summed = [part.view_as(grad) for part, grad in zip(parts, grads)]
        torch._foreach_copy_(grads, summed)

    # The rest sends a few numbers through the host (gloo), without making the device wait.
    def all_reduce_scalars(self, *values):
        """Element-wise sum of numbers over ranks, as floats."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def any_rank(self, condition):
        """True on every rank if `condition` holds on one."""
        (count,) = self.all_reduce_scalars(bool(condition))
        return count > 0

    def from_main(self, number):
        """Rank 0's number, as a float, on every rank."""
        mine = number if self.rank == 0 else 0
        (total,) = self.all_reduce_scalars(mine)
        return total

    def gather_rows(self, row):
        """(world, n) float64: one row of n numbers from every rank."""
        rows = np.zeros((self.world, len(row)))
        rows[self.rank] = row  # the others' rows stay zero, so the sum is a gather
        total = self.all_reduce_scalars(*rows.flatten())
        return np.array(total).reshape(rows.shape)

    def barrier(self):
        """Wait until every rank is here."""
        self.all_reduce_scalars(0)


# SLURM sends one of the first two before it kills a job; a terminal sends the others.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """A signal to stop, or a time limit that comes near; `reason` is empty until there is one."""

    def __init__(self, time_limit_seconds):
        self.started = time.monotonic()
        self.time_limit = time_limit_seconds  # math.inf without one
        self.reason = ""
        self.first_signal = None  # time of the first signal
        self.save_seconds = 0.0  # of the last save: the next one will need about as many

    def watch_signals(self):
        """Handle the signals of STOP_SIGNALS from here on."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        """Note the first signal; a second one exits at once.

        In training the step ends first: Trainer.agree asks for the wish, one_step saves and stops.
        """
        now = time.monotonic()
        if self.first_signal is None:
            self.first_signal = now
        # A cluster and torchrun may both deliver the same wish to stop, hence the half second.
        if now - self.first_signal > 0.5:
            os._exit(128 + number)
        self.reason = self.reason or signal.Signals(number).name

    def remaining(self):
        """Seconds until the time limit, less the time that saving needs."""
        margin = min(60.0, 0.1 * self.time_limit)
        elapsed = time.monotonic() - self.started
        return self.time_limit - margin - self.save_seconds - elapsed

    def wanted(self, next_seconds=0.0):
        """True if the run is to stop rather than begin work of `next_seconds`."""
        if not self.reason and self.remaining() < next_seconds:
            self.reason = "TIME_LIMIT"
        return bool(self.reason)


class Runtime:
    """The machine as one object: device, ranks, log, clock and the wish to stop.

    Reads the rank variables of torchrun and SLURM's end time from `environ`. Raises ConfigError for
    a RUN_DIR that cannot be written or that another process holds.
    """

    def __init__(self, config, environ):
        # Before CUDA starts: with it cuBLAS gives the same bits every time.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        rank = read_number(environ, "RANK", int, 0)
        world = read_number(environ, "WORLD_SIZE", int, 1, low=1)
        if rank >= world or (world > 1 and "MASTER_ADDR" not in environ):
            raise ConfigError(
                f"RANK={rank} and WORLD_SIZE={world}: expected a rank below the number of ranks, "
                "and MASTER_ADDR beside several: start them with torchrun, or unset both"
            )
        self.comm = Comm(rank, world)
        self.is_main = self.comm.rank == 0
        self.device = pick_device(config.device, read_number(environ, "LOCAL_RANK", int, 0))
        on_gpu = self.device.type == "cuda"
        self.dtype, self.dtype_reason = pick_dtype(config.dtype, self.device)  # of autocast
        self.compiling = config.compile == "1" or (config.compile == "auto" and on_gpu)
        # With several ranks a step is so small that launching its kernels takes longer than
        # running them, so test-time training is replayed as a CUDA graph.
        self.cuda_graphs = self.compiling and on_gpu and self.comm.world > 1
        self.dir = Path(config.run_dir)
        self.log_file = None
        self.events = None
        self.lock = None
        self.on_line = False  # the terminal's last line is progress, to be overwritten
        job_end = read_number(environ, "SLURM_JOB_END_TIME", float, math.inf)
        self.stop = StopRequest(min(config.time_limit_seconds or math.inf, job_end - time.time()))
        if self.comm.world > 1:
            # gloo beside nccl: scalars are agreed on through the host.
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
        if not on_gpu:
            keep_freed_blocks()
        if on_gpu:
            torch.cuda.set_device(self.device)
            # DTYPE=float32 promises float32 products.
            torch.backends.cuda.matmul.allow_tf32 = self.dtype == torch.bfloat16
        self.attention = pick_attention(self.device, self.dtype, self.compiling)
        if self.is_main:
            self.open_dir()
        if self.comm.world > 1:
            self.check_dir_is_shared()

    def open_dir(self):
        """Make RUN_DIR, lock it and open its logs."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            # The kernel drops the lock when the process ends, however it ends.
            self.lock = open(self.dir / "lock", "a")
            locked = lock(self.lock, fcntl.LOCK_NB)
            checkpoints = self.dir / "checkpoint"
            checkpoints.mkdir(exist_ok=True)
            for unfinished in checkpoints.glob("*.pt.tmp"):  # of a killed process
                unfinished.unlink()
            self.log_file = open_lines(self.dir / "train.log")
            self.events = open_lines(self.dir / "metrics.jsonl")
        except BlockingIOError:
            raise ConfigError(
                f"RUN_DIR={self.dir} is in use by another process: wait for it, or set another "
                "RUN_ID"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"RUN_DIR={self.dir} cannot be written ({error.strerror}): set RUN_DIR to a "
                "writable directory"
            ) from None
        if not locked:
            self.log(
                f"warning: no locks on the file system of {self.dir}: start one run in it only"
            )

    def check_dir_is_shared(self):
        """Raise ConfigError unless every rank sees the file that rank 0 makes in RUN_DIR."""
        number = int(self.comm.from_main(time.time_ns() % 2**40))
        probe = self.dir / f"shared_{number}"
        if self.is_main:
            probe.touch()
        self.comm.barrier()
        deadline = time.monotonic() + 10  # network file systems show a new file late
        while not probe.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        missing = self.comm.any_rank(not probe.exists())
        if self.is_main:
            probe.unlink()
        if missing:
            raise ConfigError(
                f"RUN_DIR={self.dir} is not the same directory on all nodes: set RUN_DIR to a "
                "directory on a shared file system"
            )

    def stop_if_wanted(self, phase, seconds_needed=0.0):
        """Raise Stopped on every rank if one of them is to stop before `phase`."""
        # All ranks stop together: one that left alone would have the launcher end the others.
        if self.comm.any_rank(self.stop.wanted(seconds_needed)):
            raise Stopped(f"before {phase}")

    def log(self, line):
        """Write one line to rank 0's terminal and to train.log."""
        if not self.is_main:
            return
        line = printable(line)  # it may quote a file's text
        say(f"{CLEAR_LINE if self.on_line else ''}{line}\n")
        self.on_line = False
        self.append(self.log_file, line)

    def append(self, file, line):
        """Write one line to a file of RUN_DIR, which only rank 0 has open."""
        if file is None:
            return
        try:
            file.write(f"{printable(line)}\n".encode())
        except OSError as error:
            # A full disk costs the line, not the run.
            say(f"warning: {file.name} cannot be written ({error.strerror})\n", sys.stderr)

    def progress(self, text):
        """Rewrite the terminal's current line; nothing where the output is a file."""
        if self.is_main and sys.stdout.isatty():
            say(f"{CLEAR_LINE}{text}")
            self.on_line = True

    def event(self, event, **fields):
        """Write one JSON object to metrics.jsonl, for tools; the log is for people."""
        record = {"event": event, "time": round(time.time(), 3), **fields}
        self.append(self.events, json.dumps(record))

    def autocast(self):
        """A context of matrix products in bfloat16; it does nothing with DTYPE=float32."""
        enabled = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def compiled(self, function, options=None):
        """The function, compiled where this run compiles: one graph, fixed shapes."""
        if not self.compiling:
            return function
        return torch.compile(function, dynamic=False, fullgraph=True, options=options)

    def to_device(self, array):
        """An array of token ids or indices as an int64 tensor on the device."""
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
        if self.device.type == "cuda":
            # A copy from pageable memory would make the host wait until the GPU has come so far;
            # PyTorch keeps the pinned block until the copy is done.
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def peak_mib(self):
        """(allocated, reserved) peaks on the GPU; on a CPU both are the process's resident one."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resident >>= 20 if sys.platform == "darwin" else 10  # macOS counts bytes, Linux KiB
        return resident, resident

    def close(self):
        """Close the files, which frees the lock on RUN_DIR, and leave the process group."""
        for file in (self.log_file, self.events, self.lock):
            if file is not None:
                file.close()
        if self.comm.world > 1:
            dist.destroy_process_group()


CLEAR_LINE = "\r\x1b[K"  # back to the first column, erase to the end


@contextlib.contextmanager
def deterministic_algorithms():
    """A context in which the same inputs give the same bits, on a GPU too.

    The gradients of embeddings and attention are otherwise sums that atomics add in any order.
    The earlier settings are restored at its end: training has no need of it.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory that it has not written; to fill it would cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def say(text, stream=None):
    """Write to the terminal; a closed pipe or a full disk behind it costs text, never the run."""
    stream = stream or sys.stdout
    try:
        print(text, end="", file=stream, flush=True)
    except OSError:
        # The text that is still buffered would raise again at exit.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def read_number(environ, name, kind, default, low=0):
    """The number in a variable that torchrun or SLURM sets. Raises ConfigError for another text."""
    with contextlib.suppress(ValueError):
        number = kind(environ.get(name, default))
        if number >= low:
            return number
    raise ConfigError(
        f"{name}={environ[name]!r}: expected a number of at least {low}: unset {name}"
    )


def pick_dtype(wish, device):
    """(torch dtype of matrix products on a device, reason); DTYPE=auto takes the faster one.

    Without AMX a CPU multiplies bfloat16 up to a hundred times slower than float32.
    """
    if wish != "auto":
        return getattr(torch, wish), f"DTYPE={wish}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        fast = major >= 8
        reason = f"auto: CUDA capability {major}.{minor}"
    else:
        # oneDNN does the products, and can be told to do without AMX. AVX512-BF16 alone is faster
        # than float32 on some CPUs and slower on others: DTYPE=bfloat16 asks for it.
        isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
        allowed = isa in ("ALL", "DEFAULT") or "AMX" in isa
        fast = allowed and torch.cpu.get_capabilities().get("amx_bf16", False)
        reason = f"auto: this CPU has {'' if fast else 'no '}AMX"
    return (torch.bfloat16 if fast else torch.float32), reason


def pick_device(wish, local_rank):
    """The torch device of this rank. Raises ConfigError for a GPU that is not there."""
    available = torch.cuda.is_available()
    if wish == "auto" and available:
        try:  # a GPU that this build of PyTorch has no kernels for fails at the first one
            torch.ones(1, device="cuda").add_(1).item()
        except RuntimeError:
            available = False
    if wish.startswith("cuda") and not available:
        raise ConfigError(f"DEVICE={wish}: no CUDA device here: unset DEVICE or use DEVICE=cpu")
    if wish == "cpu" or not available:
        return torch.device("cpu")
    if ":" not in wish:
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ConfigError(
                f"LOCAL_RANK={local_rank}, but this machine has {count} GPUs: start torchrun with "
                f"--nproc_per_node={count}"
            )
        return torch.device(f"cuda:{local_rank}")
    if local_rank > 0:
        raise ConfigError(f"DEVICE={wish} is one GPU for several ranks: use DEVICE=cuda")
    return torch.device(wish)


def keep_freed_blocks():
    """Let glibc keep freed memory: fresh pages cost the demo 20 % of scoring, 4 % of a step."""
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # numbers of mallopt(3)
    # Another C library than glibc (macOS, musl) goes without.
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)  # no block straight from the kernel
        libc.mallopt(trim_threshold, 2**31 - 1)  # give nothing back below 2 GB
        libc.mallopt(arena_max, 1)  # one heap, which every thread reuses


def device_name(device):
    """The device's name as a person knows it, for the manifest."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()}-core {platform.machine()} CPU"


# ==================================================================================================
# Data
# The challenge's own shard format, read as it lies on the disk. A training sequence is a function
# of its number alone, so a run needs no position and any number of ranks reads the same tokens.
# TokenBytes.count gives the bytes of text that a token stands for: bits per byte rest on them.
# ==================================================================================================
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER = 256  # int32 words before the tokens
HEADER_BYTES = 4 * SHARD_HEADER

# The challenge's validation split: targets by the number of the tokenizer's pieces, and bytes of
# text, which vary a little with what the tokenizers normalise.
CANONICAL_TARGETS = {1024: 62_021_632, 8192: 40_540_160}
CANONICAL_BYTES = (151_020_000, 151_080_000)


def read_shard(path):
    """Memory-mapped uint16 tokens (n,) of one shard.

    The file is 256 little-endian int32 of header (magic, version, n, zeros), then n little-endian
    uint16. Raises DataError for an unreadable file, a wrong magic or version, or a size that
    differs from the header's.
    """
    try:
        header = np.fromfile(path, "<i4", SHARD_HEADER)
        size = os.path.getsize(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: restore the shard") from None
    expected_start = [SHARD_MAGIC, SHARD_VERSION]
    if len(header) < SHARD_HEADER or header[:2].tolist() != expected_start:
        raise DataError(
            f"{path}: not a token shard: header starts with {header[:2].tolist()}, expected "
            f"{expected_start}: download it again, or set DATA_PATH"
        )
    num_tokens = int(header[2])
    expected_size = HEADER_BYTES + 2 * num_tokens
    if num_tokens <= 0 or size != expected_size:
        raise DataError(
            f"{path}: {size} bytes, expected {expected_size} for the {num_tokens} tokens of its "
            "header (at least one): truncated or over-long: restore the shard or download it again"
        )
    return np.memmap(path, "<u2", "r", HEADER_BYTES, (num_tokens,))


def write_shard(path, tokens):
    """Write tokens (n,) as a shard that read_shard reads."""
    header = np.zeros(SHARD_HEADER, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    write_atomic(path, [header.tobytes(), tokens.astype("<u2").tobytes()])


SHARD_NAME = re.compile(r"fineweb_(train|val)_\d+\.bin")


def list_data(config):
    """Sorted names of the files in DATA_PATH that begin with fineweb_. Raises DataError."""
    try:
        return sorted(name for name in os.listdir(config.data_path) if name.startswith("fineweb_"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(
            f"DATA_PATH={config.data_path} cannot be read ({error.strerror}): change its "
            "permissions, or set DATA_PATH"
        ) from None


def find_shards(config, split):
    """Sorted paths of the "train" or "val" shards in DATA_PATH. Raises DataError without any.

    Only fineweb_{split}_{digits}.bin are shards: data sets of case tokens have files of bytes
    beside them, fineweb_val_bytes_*.bin, in the same format.
    """
    folder = Path(config.data_path)
    names = [name for name in list_data(config) if SHARD_NAME.fullmatch(name)]
    paths = [folder / name for name in names if name.startswith(f"fineweb_{split}_")]
    if not paths:
        there = "no such file in it" if folder.is_dir() else "no such directory"
        raise DataError(
            f"no shard matches {config.data_path}/fineweb_{split}_*.bin ({there}): get the "
            "official shards (README, section Training) and set DATA_PATH and TOKENIZER_PATH, or "
            "try the whole path on data built here: PRESET=demo python train_gpt.py"
        )
    seen = {}  # path by size and both ends of the file
    for path in paths:
        tokens = read_shard(path)
        key = len(tokens), tokens[:4096].tobytes(), tokens[-4096:].tobytes()
        if key in seen:
            raise DataError(
                f"{path} holds the same tokens as {seen[key]}: remove one of them, or download "
                "the right shard"
            )
        seen[key] = path
    return paths


def check_ids(ids, vocab_size, where):
    """Return the ids if all of them are in the vocabulary, else raise DataError."""
    # Out of range, the embedding would read foreign memory on a GPU, or fail without a reason.
    if ids.max() >= vocab_size:
        raise DataError(
            f"{where}: token id {ids.max()} is outside VOCAB_SIZE={vocab_size}: set DATA_PATH "
            "and TOKENIZER_PATH that belong together"
        )
    return ids


class TrainStream:
    """The training sequences in the order of the shards, which form one ring of tokens.

    Sequence n is the ring's tokens n T to n T + T: its last target is the next one's first input.
    """

    def __init__(self, paths, vocab_size, seq_len):
        self.paths = paths
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.sizes = [len(read_shard(path)) for path in paths]
        self.ends = np.cumsum(self.sizes)  # index in the ring after each shard's last token
        self.num_tokens = int(self.ends[-1])
        self.num_sequences = self.num_tokens // seq_len  # of one pass

    def sequences(self, first, count):
        """Sequences number `first` to `first + count - 1` of the run (count, T + 1), uint16.

        A sequence has one token more than inputs: its last target. Raises DataError when a shard
        vanished, changed its size or holds a bad id.
        """
        at = first * self.seq_len % self.num_tokens
        missing = count * self.seq_len + 1
        parts = []
        while missing:
            # Sequences may reach over the end of a shard, and of the last one into the first.
            shard = int(np.searchsorted(self.ends, at, side="right"))
            left = int(self.ends[shard]) - at
            length = min(missing, left)
            parts.append(self.read(shard, [self.sizes[shard] - left], length)[0])
            missing -= length
            at = (at + length) % self.num_tokens
        windows = np.lib.stride_tricks.sliding_window_view(np.concatenate(parts), self.seq_len + 1)
        return windows[:: self.seq_len]

    def read(self, shard, starts, length):
        """Tokens (n, length) from these places of a shard on; reads their bytes and no more."""
        path = self.paths[shard]
        size = 2 * length
        try:
            # Not mapped: a map over a file that shrinks would be SIGBUS.
            with open(path, "rb", buffering=0) as file:
                number = file.fileno()
                found = os.fstat(number).st_size
                # The system would read ahead 128 KiB for each sequence of 4.
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(number, 0, 0, os.POSIX_FADV_RANDOM)
                parts = [os.pread(number, size, HEADER_BYTES + 2 * int(i)) for i in starts]
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}: restore the shard") from None
        expected = HEADER_BYTES + 2 * self.sizes[shard]
        if found != expected or any(len(part) != size for part in parts):
            raise DataError(
                f"{path}: {found} bytes instead of {expected} in mid-run: restore the shard"
            )
        tokens = np.frombuffer(b"".join(parts), "<u2")
        return check_ids(tokens, self.vocab_size, path).reshape(len(starts), length)


class ShuffledStream(TrainStream):
    """The training sequences in random order, each of them once per pass (#1493).

    In every pass each shard is cut into sequences from a random phase on, and all sequences of all
    shards are visited in one random order, which is the same as to draw shards in proportion to
    what they have left. The order is a function of (seed, sequence number).
    """

    def __init__(self, paths, vocab_size, seq_len, seed):
        super().__init__(paths, vocab_size, seq_len)
        self.seed = seed
        if max(self.sizes) <= seq_len:
            raise DataError(
                f"no training shard has a sequence of TRAIN_SEQ_LEN={seq_len} and its last target: "
                "lower it, or use SHUFFLE=0"
            )
        self.begin_pass(0, first=0)
        self.num_sequences = len(self.order)  # of the first pass; others differ by their phases

    def begin_pass(self, number, first):
        """Lay out pass `number`, whose first sequence has the number `first` in the run."""
        random = np.random.default_rng([self.seed, number])
        sizes = np.array(self.sizes)
        # A phase leaves every shard at least one sequence, if it is long enough for any.
        self.phases = random.integers(0, np.clip(sizes - self.seq_len, 1, self.seq_len))
        counts = np.maximum(0, (sizes - 1 - self.phases) // self.seq_len)
        self.counted = np.cumsum(counts)  # sequences up to and with each shard
        self.before = self.counted - counts  # and without it
        self.order = random.permutation(int(self.counted[-1]))
        self.pass_number = number
        self.first = first

    def sequences(self, first, count):
        """The same as TrainStream.sequences, in this stream's order."""
        rows = np.empty((count, self.seq_len + 1), np.uint16)
        done = 0
        while done < count:
            # One pass after the other is laid out: they differ in length.
            if first + done < self.first:
                self.begin_pass(0, first=0)
            while first + done >= self.first + len(self.order):
                self.begin_pass(self.pass_number + 1, self.first + len(self.order))
            at = first + done - self.first
            picks = self.order[at : at + count - done]
            shards = np.searchsorted(self.counted, picks, side="right")
            starts = self.phases[shards] + (picks - self.before[shards]) * self.seq_len
            # Shard by shard and from front to back: a network file system is slow at jumping about.
            for shard in np.unique(shards):
                rows_of_it = np.flatnonzero(shards == shard)
                rows_of_it = rows_of_it[starts[rows_of_it].argsort()]
                tokens = self.read(shard, starts[rows_of_it], self.seq_len + 1)
                rows[done + rows_of_it] = tokens
            done += len(picks)
        return rows


def open_train_stream(config):
    """The training shards of DATA_PATH, as a stream in the order that SHUFFLE says."""
    paths = find_shards(config, "train")
    if config.shuffle:
        return ShuffledStream(paths, config.vocab_size, config.train_seq_len, config.seed)
    return TrainStream(paths, config.vocab_size, config.train_seq_len)


class TokenBytes:
    """UTF-8 bytes that each target token stands for, by the rule of the challenge's lookup tables.

    Control, unknown and unused pieces have 0; byte pieces 1; others those of their text, with one
    byte for a leading space unless the previous token is a control, unknown or unused piece.
    """

    def __init__(self, tokenizer_path):
        try:
            model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
        except (OSError, RuntimeError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(
                f"TOKENIZER_PATH={tokenizer_path}: cannot be read as a SentencePiece model "
                f"({reason}): see README, section Training"
            ) from None
        self.model = model
        self.vocab_size = model.vocab_size()
        # Tables over the vocabulary, so that counting is indexing.
        self.is_boundary = np.zeros(self.vocab_size, bool)  # (V,) pieces without text
        self.is_byte = np.zeros(self.vocab_size, bool)  # (V,)
        self.spaced = np.zeros(self.vocab_size, bool)  # (V,) pieces that begin with a space
        self.base = np.zeros(self.vocab_size, np.uint16)  # (V,) bytes without that space
        for i in range(self.vocab_size):
            self.is_boundary[i] = model.is_control(i) or model.is_unknown(i) or model.is_unused(i)
            self.is_byte[i] = model.is_byte(i)
            if self.is_byte[i]:
                self.base[i] = 1
            elif not self.is_boundary[i]:
                # SentencePiece writes a space as "▁" (three bytes in UTF-8, one in the text).
                piece = model.id_to_piece(i)
                if any("\ue000" <= char <= "\uf8ff" for char in piece):
                    raise DataError(
                        f"TOKENIZER_PATH={tokenizer_path}: piece {i}, {ascii(piece)}, stands for "
                        "an operator on the text (case tokens), whose bytes cannot be counted by "
                        "pieces: use a tokenizer without private-use characters"
                    )
                self.spaced[i] = piece.startswith("▁")
                self.base[i] = len(piece.removeprefix("▁").replace("▁", " ").encode())

    def count(self, prev_ids, target_ids):
        """Bytes of text (same shape, uint16) of the target tokens, given the tokens before them."""
        # A document's first space is dropped when it is decoded, so it does not count.
        has_space = self.spaced[target_ids] & ~self.is_boundary[prev_ids]
        return self.base[target_ids] + has_space

    def check(self, ids):
        """Compare the count with the decoded text of every document in `ids`. Raises DataError."""
        ids = np.asarray(ids, np.int64)
        # The slice may begin or end inside a character, which is some byte pieces.
        whole = np.flatnonzero(~self.is_byte[ids])
        if len(whole) == 0:
            return
        ids = ids[whole[0] : whole[-1] + 1]
        # SentencePiece drops spaces at the start of a text: decode behind a piece without any.
        plain = ~self.is_boundary & ~self.spaced & ~self.is_byte & (self.base > 0)
        anchor = int(np.argmax(plain)) if plain.any() else self.model.piece_to_id("<0x41>")
        start = len(self.model.decode([anchor]))
        # Cut before every piece without text: these start documents, or stand for unknown text.
        for document in np.split(ids, np.flatnonzero(self.is_boundary[ids])):
            if len(document) < 2:
                continue
            # The first token is only the context of the others.
            counted = int(self.count(document[:-1], document[1:]).sum())
            text = self.model.decode([anchor, *document[1:].tolist()])[start:].replace("▁", " ")
            length = len(text.encode())
            if self.spaced[document[1]] and self.is_boundary[document[0]]:
                length -= 1  # the first space, see count
            if length != counted and "\ufffd" in text:
                raise DataError(
                    f"the document {text[:60]!r} is cut inside a character, its bytes are no "
                    "UTF-8: restore the shard, or cut documents between characters"
                )
            if length != counted:
                raise DataError(
                    f"bytes per token are wrong for {text[:60]!r}: counted {counted}, decoded "
                    f"{length}: use the tokenizer that made these shards, with a piece for a space"
                )


class ValidationSet:
    """Validation tokens (n + 1,), bytes (n,) of the n targets, and the fingerprint of the split.

    Scores on a split of scope "canonical-by-counts" compare with published ones; other text can be
    made to have the same counts, so the scope is no proof. Scores on a "proxy" compare with others
    on the same data.
    """

    def __init__(self, tokens, token_bytes):
        self.tokens = tokens  # (n + 1,) uint16
        self.num_targets = len(tokens) - 1
        self.token_bytes = token_bytes
        # In blocks: indexing makes int64 copies, which for a whole split would be gigabytes.
        blocks = []
        for low in range(0, self.num_targets, 1 << 20):
            high = min(low + (1 << 20), self.num_targets)
            blocks.append(token_bytes.count(tokens[low:high], tokens[low + 1 : high + 1]))
        self.bytes = np.concatenate(blocks)  # (n,) uint16
        total = int(self.bytes.sum(dtype=np.int64))
        if total == 0:
            raise DataError(
                "the validation tokens stand for no text (0 bytes): use the tokenizer that made "
                "these shards"
            )
        low, high = CANONICAL_BYTES
        has_the_targets = self.num_targets == CANONICAL_TARGETS.get(token_bytes.vocab_size)
        self.scope = "canonical-by-counts" if has_the_targets and low <= total <= high else "proxy"
        self.fingerprint = dict(
            val_tokens=len(tokens),
            val_targets=self.num_targets,
            val_bytes=total,
            val_documents=int((tokens == BOS).sum()),
            bytes_per_token=total / self.num_targets,
            val_sha256=hashlib.sha256(tokens.tobytes()).hexdigest(),
            scope=self.scope,
        )

    @classmethod
    def load(cls, config, token_bytes):
        """The shards' tokens, trimmed to whole windows as the official script does.

        Raises DataError.
        """
        shards = [read_shard(path) for path in find_shards(config, "val")]
        tokens = np.concatenate(shards)
        check_ids(tokens, config.vocab_size, f"{config.data_path}/fineweb_val_*.bin")
        windows = (len(tokens) - 1) // config.eval_seq_len
        if windows == 0:
            raise DataError(
                f"{config.data_path}: {len(tokens)} validation tokens are less than one window "
                f"of EVAL_SEQ_LEN={config.eval_seq_len}: lower it or get the whole split"
            )
        # The beginning shows whether tokenizer and shards belong together.
        token_bytes.check(tokens[:100_000])
        return cls(tokens[: windows * config.eval_seq_len + 1], token_bytes)

    def warnings(self, config):
        """Warnings (lines) about a text other than the one that the challenge scores."""
        lines = []
        if self.fingerprint["val_documents"] == 0:
            lines.append(
                f"warning: no document starts in the validation text (token {BOS}): states cross "
                "from each document into the next one"
            )
        expected = CANONICAL_TARGETS.get(self.token_bytes.vocab_size)
        if expected and self.num_targets != expected and config.preset != "demo":
            lines.append(
                f"warning: {self.num_targets} validation targets, the challenge's split has "
                f"{expected} at {self.token_bytes.vocab_size} pieces: scores compare only with "
                "others on this text"
            )
        if self.retokenisation_mismatch():
            lines.append(
                f"warning: TOKENIZER_PATH={config.tokenizer_path} does not seem to have made "
                "these shards: it encodes their text otherwise. Bytes per token, and so bits per "
                "byte, would be wrong: use the tokenizer that came with them"
            )
        return lines

    def retokenisation_mismatch(self):
        """True if the text, encoded again, gives other tokens: another tokenizer made these.

        Each piece still decodes and counts, only to other text. Where another tokenizer of English
        made them, 2 to 20 % of the pieces do not return (measured, 1,024 to 8,192 pieces); else
        none but those of an end that is cut inside a word.
        """
        sample = self.tokens[:20_000].astype(np.int64)
        is_boundary = self.token_bytes.is_boundary
        model = self.token_bytes.model
        lost = 0
        for document in np.split(sample, np.flatnonzero(is_boundary[sample])):
            pieces = document[~is_boundary[document]].tolist()
            again = model.encode(model.decode(pieces))
            # Order aside: one piece that is cut otherwise would move all that follow it.
            lost += (collections.Counter(pieces) - collections.Counter(again)).total()
        return lost > max(20, len(sample) // 100)

    def replaced(self, tokens):
        """The same stream with other tokens (the audit's twin runs)."""
        return ValidationSet(tokens, self.token_bytes)


def load_token_bytes(config, expected_sha256=""):
    """TokenBytes of config's tokenizer. Raises DataError if the model needs another one."""
    token_bytes = TokenBytes(config.tokenizer_path)
    where = f"TOKENIZER_PATH={config.tokenizer_path}"
    if token_bytes.vocab_size != config.vocab_size:
        raise DataError(
            f"{where} has {token_bytes.vocab_size} pieces, but the model's VOCAB_SIZE is "
            f"{config.vocab_size}: set the one that matches"
        )
    if expected_sha256 and sha256_file(config.tokenizer_path) != expected_sha256:
        raise DataError(
            f"{where} is not the tokenizer this artifact was trained with (sha256 "
            f"{expected_sha256[:16]}… expected): set TOKENIZER_PATH to that one"
        )
    return token_bytes


# The demo's text: the English that every installation has, in the docstrings of its libraries.
DEMO_PACKAGES = ("torch", "numpy", "sentencepiece", "zstandard")
DEMO_SKIPPED_FOLDERS = {"site-packages", "__pycache__", "test", "idlelib"}


def english_of(path):
    """Paragraphs (a list) of docstrings and other long texts in one Python file, in its order."""
    try:
        source = path.read_text(encoding="utf-8")
        if '"""' not in source and "'''" not in source:
            return []  # no long text; parsing would take most of the time
        tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return []
    paragraphs = []
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        # Prose has a space at least every twelve characters; tables and data have not.
        if isinstance(text, str) and len(text) > 160 and text.count(" ") > len(text) / 12:
            paragraphs += re.split(r"\n\s*\n", inspect.cleandoc(text))
    return paragraphs


def demo_modules():
    """Yield (name, path) of the installed Python libraries' modules, in a fixed order."""
    site = Path(torch.__file__).parent.parent
    for root in (Path(sysconfig.get_paths()["stdlib"]), *(site / name for name in DEMO_PACKAGES)):
        for folder, subfolders, files in os.walk(root):
            # os.walk follows this list: sorted, so that every file system gives the same order.
            subfolders[:] = sorted(set(subfolders) - DEMO_SKIPPED_FOLDERS)
            for name in sorted(files):
                if name.endswith(".py"):
                    path = Path(folder, name)
                    yield f"{root.name}/{path.relative_to(root)}", path


def demo_documents():
    """{"train": documents, "val": documents}: one per module, no paragraph twice."""
    seen = set()
    documents = []  # (digest of the module's name, its text)
    for module, path in demo_modules():
        fresh = []
        for paragraph in english_of(path):
            key = " ".join(paragraph.split())
            if len(key) > 60 and key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        if fresh:
            digest = hashlib.sha256(module.encode()).digest()
            documents.append((digest, "\n\n".join(fresh)))
    # In the order of digests, which is random but fixed: modules that stand side by side are
    # alike, and a stream in their order would make the loss jump from package to package.
    documents.sort()
    parts = {"train": [], "val": []}
    for digest, text in documents:
        parts["val" if digest[0] < 9 else "train"].append(text)  # val: about 3.5 % of the modules
    return parts


def build_demo_data(config, log):
    """Build the demo's tokenizer and shards unless they exist: one process at a time."""
    data = Path(config.data_path)
    tokenizer = Path(config.tokenizer_path)
    try:
        data.mkdir(parents=True, exist_ok=True)
        tokenizer.parent.mkdir(parents=True, exist_ok=True)
        lock_file = open(data / "lock", "w")
    except OSError as error:
        raise DataError(
            f"the demo's data cannot be built in {data} and {tokenizer.parent}: "
            f"{error.strerror}: run in a writable directory"
        ) from None
    with lock_file:
        if not lock(lock_file):
            log(f"warning: no locks on the file system of {data}: build the data in one run only")
        # Verifying an artifact needs no training data.
        splits = ["val"] if config.eval_only else ["train", "val"]
        shards = [data / f"fineweb_{split}_000000.bin" for split in splits]
        if all(path.exists() for path in [tokenizer, *shards]):
            return
        begin = time.monotonic()
        log("demo_data: reading the English of the installed Python libraries (once, a minute)")
        parts = demo_documents()
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            # The training part alone: a tokenizer that saw the validation text would fit it.
            sentence_iterator=(
                line for text in parts["train"] for line in text.split("\n") if line.strip()
            ),
            model_writer=model,
            # The options of the challenge's tokenizers.
            vocab_size=config.vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            character_coverage=0.999,
            pad_id=0,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=3,
            minloglevel=2,
        )
        write_atomic(tokenizer, [model.getvalue()])
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        for split, documents in parts.items():
            ids = processor.encode(documents, num_threads=2)
            tokens = np.concatenate([np.array([BOS, *document]) for document in ids])
            write_shard(data / f"fineweb_{split}_000000.bin", tokens)
            num_bytes = sum(len(text.encode()) for text in documents)
            log(
                f"demo_data: {split} {num_bytes} bytes, {len(documents)} documents, "
                f"{time.monotonic() - begin:.1f} s"
            )


# ==================================================================================================
# Model
# The trunk of #1170/#1232, then the refiners in a fixed order: TTT-Linear, FlowRefiner,
# NativeFlowMatcher. `forward` is the loss of `logits(hidden(ids))`; there is no second copy of the
# trunk. Values that change during a run or from layer to layer are 0-d tensors, so that one
# compiled graph serves them all; only the order of looped layers, which changes once, has two.
# Late QAT touches a weight in one place: Quantizable.effective_weight.
# ==================================================================================================
def sdpa_attention(q, k, v):
    """Causal attention by PyTorch. q (B, T, H, d), k and v (B, T, K, d) -> (B, T, H, d)."""
    q = q.transpose(1, 2)  # (B, H, T, d)
    k = k.transpose(1, 2)  # (B, K, T, d)
    v = v.transpose(1, 2)  # (B, K, T, d)
    grouped = q.size(1) != k.size(1)  # H/K query heads share a key/value head
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return y.transpose(1, 2)


def flash_first_attention(q, k, v):
    """The same with flash before cuDNN: FlashAttention-3, once it is activated, stands for flash.

    Shah et al. 2024, arXiv 2407.08608.
    """
    order = [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    with sdpa_kernel(order, set_priority=True):
        return sdpa_attention(q, k, v)


class AttentionChoice(typing.NamedTuple):
    function: typing.Callable  # attend(q, k, v)
    reason: str  # for the log


@functools.cache
def pick_attention(device, dtype, compiling=False):
    """AttentionChoice: FlashAttention-3 where its package is, else PyTorch's own order of backends.

    The choice has run forward and backward once, compiled if the model will be: published runs
    failed after hours in the queue because a fixed backend did not exist on their GPU.
    """
    options = dict(device=device, dtype=dtype, requires_grad=True)
    q = torch.zeros(1, 64, 2, 64, **options)  # (B, T, H, d)
    k = torch.zeros(1, 64, 1, 64, **options)  # (B, T, K, d)
    by_head = [x.transpose(1, 2) for x in (q, k, k)]
    first = SDPBackend(torch._fused_sdp_choice(*by_head, is_causal=True, enable_gqa=True))
    choices = [AttentionChoice(sdpa_attention, f"{first.name.lower()}: PyTorch's own order")]
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    if is_hopper and importlib.util.find_spec("flash_attn_interface"):
        reason = "flash_attention_3: made for Hopper, and flash_attn_interface is installed"
        choices.insert(0, AttentionChoice(flash_first_attention, reason))
    failures = []
    for attend, reason in choices:
        try:
            if attend is flash_first_attention:
                activate_flash_attention_impl("FA3")
            trial = torch.compile(attend, dynamic=False, fullgraph=True) if compiling else attend
            trial(q, k, k).float().sum().backward()
            return AttentionChoice(attend, "; not usable: ".join([reason, *failures]))
        except Exception as error:
            line = str(error).partition("\n")[0]
            failures.append(f"{reason} ({type(error).__name__}: {line})")
            if current_flash_attention_impl():
                restore_flash_attention_impl()
    raise ConfigError(
        f"no attention backend runs forward and backward on {device} in {dtype}: tried "
        f"{'; '.join(failures)}: use DEVICE=cpu or another PyTorch build"
    )


NORM_EPS = 2.0**-23  # float32's epsilon, used with every type


class RMSNorm(torch.autograd.Function):
    """RMSNorm over the last dimension, times an optional gain, then an optional rotation.

    x (B, ..., d), gain (H, 1) or None, cos and sin (T, 1, r/2) or None. The arithmetic inside is
    float32 (or wider) on every device; the result has x's type.

    Written out because composed operations pass over memory too often: on a CPU core 16 x 512 x 256
    in float32 take half the time of F.rms_norm, with gain and rotation a third. That is 3 % of a
    training step of the demo and 3 % of its scoring.
    """

    @staticmethod
    def forward(ctx, x, gain=None, cos=None, sin=None):
        wide = torch.promote_types(x.dtype, torch.float32)
        y = x.to(wide, copy=True)
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        inverse = torch.rsqrt(norm.square() / x.size(-1) + NORM_EPS)  # (B, ..., 1): 1 / rms
        y.mul_(inverse if gain is None else inverse * gain)
        if cos is not None:
            rotate_(y, cos, sin)
        ctx.save_for_backward(x, inverse, gain, cos, sin)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, inverse, gain, cos, sin = ctx.saved_tensors
        value = x.to(inverse.dtype)
        dx = grad.to(inverse.dtype, copy=True)
        if cos is not None:
            rotate_(dx, cos, -sin)  # the transposed rotation
        dot = (dx * value).sum(-1, keepdim=True)  # (B, ..., 1)
        scale = inverse
        dgain = None
        if gain is not None:
            dgain = (dot * inverse).sum((0, 1))
            scale = inverse * gain
        # y = scale * x with scale ~ 1/|x|: the part of the gradient along x is taken out.
        along = dot * scale * inverse.square()
        dx.mul_(scale).addcmul_(value, along, value=-1 / x.size(-1))
        return dx.to(x.dtype), dgain, None, None


def rms_norm(x):
    """Plain RMSNorm, without gain (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    return RMSNorm.apply(x)


def rotary_tables(config):
    """cos, sin (T, 1, rope_dims/2) for the longest sequence of training or evaluation.

    Angles do not depend on the length in use, so a shorter sequence takes the first rows.
    """
    length = max(config.train_seq_len, config.eval_seq_len)
    even = torch.arange(0, config.rope_dims, 2)
    frequency = config.rope_base ** (-even / config.rope_dims)  # (rope_dims/2,)
    position = torch.arange(length)[:, None, None]  # (T, 1, 1)
    angle = position * frequency
    return angle.cos(), angle.sin()


def rotate_(x, cos, sin):
    """Rotary position embedding, in place, on the first 2 * r of d dimensions. x (B, T, H, d).

    Su et al. 2021 (arXiv 2104.09864); partial as in #1170: the other dimensions see no position.
    """
    half = cos.size(-1)
    cos = cos.to(x.dtype)
    sin = sin.to(x.dtype)
    a = x[..., :half]
    b = x[..., half : 2 * half]
    # The new b needs the old a, so a is written last.
    a_new = a * cos - b * sin
    x[..., half : 2 * half] = a * sin + b * cos
    x[..., :half] = a_new


def exclusive_attention(y, v):
    """XSA: each head's output y (B, T, H, d) less its part along its own value v (B, T, K, d).

    A token already carries its own value in the residual stream; attention then brings only the
    values of other tokens. Part of #549.
    """
    # Sums accumulate in float32, which CUDA's autocast would carry on into the output, unlike the
    # CPU's: hence the casts by hand.
    wide = torch.promote_types(y.dtype, torch.float32)
    grouped = y.unflatten(2, (v.size(2), -1))  # (B, T, K, H/K, d)
    v = v.unsqueeze(3)  # (B, T, K, 1, d)
    square = (v * v).sum(-1, keepdim=True).to(wide)  # (B, T, K, 1, 1)
    dot = (grouped * v).sum(-1, keepdim=True).to(wide)  # (B, T, K, H/K, 1)
    along = (dot / square.clamp(min=1e-24)).to(y.dtype)
    return torch.addcmul(grouped, along, v, value=-1).flatten(2, 3)


class Quantizable:
    """A module whose weight can be rounded in training as the artifact will round it (late QAT).

    `qat_blend` (0-d) and `qat_scale` (rows, 1) are buffers: switching rounding on changes a number
    in memory, not the code, so that nothing is compiled again in the middle of a run.
    """

    bits = 0  # 0: never rounded

    def enable_qat(self, bits):
        self.bits = bits
        scale = self.weight.new_ones(self.weight.size(0), 1)
        # Not persistent: both follow from the weights and the learning rate's schedule.
        self.register_buffer("qat_blend", self.weight.new_zeros(()), persistent=False)
        self.register_buffer("qat_scale", scale, persistent=False)

    def effective_weight(self):
        """The weight, rounded if late QAT is on; its gradient always reaches the full weight."""
        if not self.bits or not self.training:
            return self.weight
        value = self.weight.detach()
        rounded = round_to_grid(value, self.qat_scale, self.bits) * self.qat_scale
        # weight - value is exactly 0 and carries the straight-through gradient.
        return torch.lerp(value, rounded, self.qat_blend) + (self.weight - value)


class Linear(Quantizable, nn.Linear):
    """nn.Linear whose weight late QAT can round; a bias starts at zero.

    Where a branch must add nothing at first, only its last matrix is made with `zero`: behind a
    second zero factor neither would ever get a gradient. GPT.init_weights draws the others.
    """

    def __init__(self, inputs, outputs, bias=False, zero=False):
        super().__init__(inputs, outputs, bias=bias)
        if bias:
            nn.init.zeros_(self.bias)
        if zero:
            nn.init.zeros_(self.weight)

    def forward(self, x, scale=None):
        """`scale`, 0-d or (outputs, 1), multiplies the weight: cheaper than every output."""
        weight = self.effective_weight()
        if scale is not None:
            weight = weight * scale
        return F.linear(x, weight, self.bias)


class Embedding(Quantizable, nn.Embedding):
    """nn.Embedding whose weight late QAT can round; GPT.init_weights draws it."""

    def __init__(self, rows, width):
        super().__init__(rows, width, _weight=torch.zeros(rows, width))

    def forward(self, ids):
        return F.embedding(ids, self.effective_weight())


class Attention(nn.Module):
    """Grouped-query attention with everything the records found useful, each a switch of Config:
    q/k norm, partial RoPE, a gain per query head, value residual, XSA and a gate per head."""

    def __init__(self, config, layer, attend):
        super().__init__()
        self.head_dim = config.head_dim
        self.attend = attend
        self.xsa = layer >= config.num_layers - config.xsa_last_n
        dim = config.model_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.c_q = Linear(dim, dim)
        self.c_k = Linear(dim, kv_dim)
        self.c_v = Linear(dim, kv_dim)
        self.proj = Linear(dim, dim, zero=True)
        # After q/k norm the logits are bounded; the gain gives back the sharpness that costs.
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        self.attn_gate = None
        if config.gated_attention:
            # A gate of a few channels needs no bias: it starts half open, the others almost open.
            inputs = config.gate_inputs or dim
            self.attn_gate = Linear(inputs, config.num_heads, not config.gate_inputs, zero=True)
            if not config.gate_inputs:
                nn.init.constant_(self.attn_gate.bias, 4.0)  # sigmoid(4) = 0.98: almost open
        self.vr_lambda = None
        if config.value_residual:
            self.vr_lambda = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, x, scale, out_scale, angles, v_first, v_emb):
        """Output y (B, T, D) and this layer's own values (B, T, K, d).

        x (B, T, D) is normalised and still without the layer's `scale` (0-d); `out_scale` (D,)
        multiplies the output; `angles` are cos and sin; v_first (B, T, K, d) are layer 0's values,
        or None in layer 0; v_emb (B, T, K*d) is the value embedding, or None.
        """
        # Four small products would each read x and leave the device half idle: the weights are put
        # together and one product does it. They stay separate parameters, since the optimiser and
        # the artifact treat each matrix on its own.
        layers = [self.c_q, self.c_k, self.c_v]
        if self.attn_gate is not None:
            layers.append(self.attn_gate)
        weights = []
        for layer in layers:
            # A gate of the leading channels gives no weight to the others.
            missing = x.size(-1) - layer.in_features
            weight = layer.effective_weight()
            weights.append(F.pad(weight, (0, missing)) if missing else weight)
        outputs = F.linear(x, torch.cat(weights) * scale)
        # q (B, T, D), k and v (B, T, K*d), and with a gate its logits (B, T, H).
        q, k, v, *gates = outputs.split([layer.out_features for layer in layers], -1)
        if v_emb is not None:
            v = v + v_emb.to(v.dtype)
        q = q.unflatten(-1, (-1, self.head_dim))  # (B, T, H, d)
        k = k.unflatten(-1, (-1, self.head_dim))  # (B, T, K, d)
        v = v.unflatten(-1, (-1, self.head_dim))  # (B, T, K, d)
        mixed = v
        if self.vr_lambda is not None:
            # Value residual (Zhou et al. 2024, arXiv 2410.17897): layer 0's values stay within
            # reach. Layer 0 mixes its values with themselves.
            mix = self.vr_lambda.to(v.dtype)
            mixed = mix[0] * (v if v_first is None else v_first) + mix[1] * v
        # q/k norm (Henry et al. 2020, arXiv 2010.04245), gain and rotation in one pass.
        cos, sin = angles
        q = RMSNorm.apply(q, self.q_gain[:, None], cos, sin)
        k = RMSNorm.apply(k, None, cos, sin)
        y = self.attend(q, k, mixed)  # (B, T, H, d)
        if self.xsa:
            y = exclusive_attention(y, mixed)
        if gates:
            gate = gates[0]
            if self.attn_gate.bias is not None:
                gate = gate + self.attn_gate.bias.to(gate.dtype)
            y = y * torch.sigmoid(gate).unsqueeze(-1)
        y = self.proj(y.flatten(2), out_scale[:, None])  # (B, T, D)
        return y, v


class MLP(nn.Module):
    """W2 f(W1 x), f the square of a leaky ReLU."""

    def __init__(self, config):
        super().__init__()
        self.fc = Linear(config.model_dim, config.mlp_hidden)
        self.proj = Linear(config.mlp_hidden, config.model_dim, zero=True)

    def forward(self, x, scale, out_scale):
        """x (B, T, D) -> (B, T, D); the scales as in Attention.forward."""
        # ReLU^2 (Primer, So et al. 2021, arXiv 2109.08668), leaky as in #549.
        hidden = F.leaky_relu(self.fc(x, scale), 0.5).square()  # (B, T, hidden)
        return self.proj(hidden, out_scale[:, None])


class Block(nn.Module):
    """Attention, then MLP, each on the normalised stream and scaled per channel."""

    def __init__(self, config, layer, attend):
        super().__init__()
        dim = config.model_dim
        self.attn = Attention(config, layer, attend)
        self.mlp = MLP(config)
        self.attn_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        mix = torch.stack([torch.ones(dim), torch.zeros(dim)])  # (2, D): the stream as it is
        self.resid_mix = nn.Parameter(mix)
        self.parallel = layer >= config.num_layers - config.parallel_last_n
        # LN scale: deeper layers read a quieter input (Sun et al. 2025, arXiv 2502.05795).
        # As a tensor it leaves all layers one code, so that one graph could serve every layer.
        self.register_buffer("norm_scale", torch.tensor((layer + 1) ** -0.5), persistent=False)

    def forward(self, x, x0, angles, v_first, v_emb):
        """The stream x (B, T, D) after this block, and the attention's own values.

        x0 (B, T, D) is the stream before the first block, mixed back in per channel; the others as
        in Attention.forward.
        """
        mix = self.resid_mix.to(x.dtype)  # (2, D)
        x = torch.addcmul(x * mix[0], x0, mix[1])
        normed = rms_norm(x)
        y, v = self.attn(normed, self.norm_scale, self.attn_scale, angles, v_first, v_emb)
        x = x + y
        # A parallel MLP reads the stream before attention adds to it (as in GPT-J).
        mlp_input = normed if self.parallel else rms_norm(x)
        x = x + self.mlp(mlp_input, self.norm_scale, self.mlp_scale)
        return x, v


class BigramHash(nn.Module):
    """Embedding of the hashed pair (previous token, token): the cheapest possible context."""

    def __init__(self, config):
        super().__init__()
        self.embed = Embedding(config.bigram_vocab_size, config.bigram_dim)
        self.proj = Linear(config.bigram_dim, config.model_dim)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def rows(self, ids):
        """Table rows (B, T): ((36313 t_i) xor (27191 t_{i-1})) mod (rows - 1), in int32.

        Position 0 has no predecessor and takes the last row, which no pair can reach.
        """
        last = self.embed.num_embeddings - 1
        t = ids.int()
        pair = torch.bitwise_xor(36313 * t[:, 1:], 27191 * t[:, :-1]) % last  # (B, T - 1)
        return F.pad(pair, (1, 0), value=last)

    def forward(self, ids):
        """ids (B, T) -> (B, T, D)."""
        return self.proj(self.embed(self.rows(ids))) * self.scale


def predecessors(x, ids):
    """x (B, T, D) shifted by one position: zero at position 0 and where a document begins.

    A BOS token takes nothing from before it, so that no document leaks into the next one.
    """
    before = F.pad(x[:, :-1], (0, 0, 1, 0))  # (B, T, D)
    inside = (ids != BOS).unsqueeze(-1)  # (B, T, 1)
    return before * inside.to(x.dtype)


class SmearGate(nn.Module):
    """Mix each position with its predecessor, by one gate per channel."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(config.model_dim))

    def forward(self, x, ids):
        """x (B, T, D) and its tokens (B, T) -> (1 - g) * x_i + g * x_{i-1}."""
        return x + torch.sigmoid(self.gate).to(x.dtype) * (predecessors(x, ids) - x)


class InputSmearGate(nn.Module):
    """SmearGate v2: each token decides by its first channels how much of its predecessor it adds.

    Part of the records from 2026-04-16 on. Strength and weights start at zero: nothing is added.
    """

    def __init__(self, config):
        super().__init__()
        self.proj = Linear(config.smear_inputs, 1, zero=True)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x, ids):
        """x (B, T, D) and its tokens (B, T) -> x_i + scale * g(x_i) * x_{i-1}."""
        channels = x[..., : self.proj.in_features]
        gate = torch.sigmoid(self.proj(channels))  # (B, T, 1)
        strength = (self.scale * gate).to(x.dtype)
        return torch.addcmul(x, strength, predecessors(x, ids))


class ValueEmbedding(nn.Module):
    """VE128 (#549): a narrow token embedding that is added to the values of the last layers."""

    def __init__(self, config):
        super().__init__()
        self.layers = range(config.num_layers - config.ve_last_n, config.num_layers)
        self.embed = Embedding(config.vocab_size, config.ve_dim)
        self.proj = Linear(config.ve_dim, config.num_kv_heads * config.head_dim)
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.layer_scales = nn.Parameter(torch.ones(config.ve_last_n))

    def forward(self, ids):
        """{layer: (B, T, K*d)} of ids (B, T)."""
        shared = self.proj(self.embed(ids)) * self.scale  # (B, T, K*d)
        values = shared * self.layer_scales[:, None, None, None]  # (layers, B, T, K*d)
        return dict(zip(self.layers, values))


class FlowRefiner(nn.Module):
    """#1232/#1166: a small residual step in a latent space; its gate starts almost closed."""

    def __init__(self, config):
        super().__init__()
        latent = config.flow_latent_dim
        hidden = config.flow_hidden_dim
        self.down = Linear(config.model_dim, latent)
        self.up = Linear(latent, config.model_dim)
        self.fc = Linear(latent, hidden, bias=True)
        self.proj = Linear(hidden, latent, bias=True, zero=True)
        self.gate = nn.Parameter(torch.tensor(-5.0))

    def forward(self, x):
        """(B, T, D) -> (B, T, D)."""
        z = self.down(x)  # (B, T, latent)
        z = z + self.proj(F.gelu(self.fc(z)))
        return x + torch.sigmoid(self.gate).to(x.dtype) * self.up(z)


GOLDEN_RATIO = 0x9E3779B97F4A7C15  # 2^64 divided by it: steps that cover the integers evenly
GOLDEN_INVERSE = pow(GOLDEN_RATIO, -1, 2**64)  # their product is 1 modulo 2^64


def as_int64(number):
    """The signed integer with the same 64 bits: PyTorch multiplies no unsigned ones."""
    number %= 2**64
    return number - 2**64 if number >= 2**63 else number


def mix64(x):
    """Hash of int64 tensors: each bit of the input turns over half of the output's.

    SplitMix64's finaliser (Steele, Lea and Flood 2014), the constants of Stafford's variant 13.
    """

    def shifted(value, bits):
        # PyTorch's shift repeats the sign; a hash needs zeros.
        return (value >> bits) & (2 ** (64 - bits) - 1)

    x = (x ^ shifted(x, 30)) * as_int64(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(x, 27)) * as_int64(0x94D049BB133111EB)
    return x ^ shifted(x, 31)


def hash64(*parts):
    """64 bits that follow from `parts`; their upper 63 are a seed that no other parts share."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def draw_noise(keys, length, width):
    """Standard normal z (B, T, D) and uniform t (B, T) in (0, 1), float32, of keys (B,) int64.

    A function of the keys alone, number by number, so that it is the same however sequences are
    spread over ranks and micro-batches, and in a compiled graph costs no memory and no generator.
    """
    batch = keys.size(0)
    pairs = -(-length * width // 2)  # a hash of 64 bits gives two normal numbers
    counter = torch.arange(pairs + length, device=keys.device)
    # keys + counter * GOLDEN_RATIO, multiplied last: the compiler takes a product of positions
    # alone for an index, computes it without wrapping at 64 bits, and fails.
    steps = keys[:, None] * as_int64(GOLDEN_INVERSE) + counter
    hashes = mix64(steps * as_int64(GOLDEN_RATIO))  # (B, pairs + T)

    def uniform(bits):
        # float32 holds 23 bits and a half exactly: never 0, never 1.
        integer = bits & (2**23 - 1)
        return (integer.float() + 0.5) * 2.0**-23

    high = uniform(hashes >> 40)  # (B, pairs + T)
    low = uniform(hashes[:, :pairs])
    t = high[:, pairs:]
    both = torch.cat([high[:, :pairs], low], 1)
    share = both[:, : length * width]  # of the normal distribution that lies below z
    z = math.sqrt(2) * torch.erfinv(2 * share - 1)
    return z.view(batch, length, width), t


def flow_noise_keys(config, step, first, count, device):
    """Keys (count,) of draw_noise for the step's sequences [first, first + count), or None.

    A function of seed, step and sequence alone, hence the same at any number of ranks and after a
    resume. None where no loss would use it.
    """
    if not config.nfm_enabled or config.nfm_loss_weight == 0:
        return None
    start = as_int64(hash64(config.seed, step))
    sequences = torch.arange(first, first + count, device=device)
    return mix64(start + sequences * as_int64(GOLDEN_RATIO))


class NativeFlowMatcher(nn.Module):
    """#1170: a velocity field trained by flow matching, used as one gated Euler step at t = 1.

    Flow matching (Lipman et al. 2023, arXiv 2210.02747): on the straight line from noise z at t = 0
    to a state x at t = 1, the velocity is x - z.
    """

    def __init__(self, config):
        super().__init__()
        dim = config.model_dim
        hidden = config.nfm_hidden_dim
        self.inp = Linear(dim, hidden, bias=True)
        self.time = Linear(dim, hidden, bias=True)
        self.out = Linear(hidden, dim, zero=True)
        self.gate = nn.Parameter(torch.tensor(-5.0))

    def velocity(self, x, t):
        """Velocity (B, T, D) at states x (B, T, D) and times t (B, T) or 0-d, in [0, 1]."""
        # Time is embedded by sinusoids, as positions are.
        half = self.inp.in_features // 2
        place = torch.arange(half, device=t.device, dtype=t.dtype)
        frequency = torch.exp(-math.log(10000.0) / half * place)  # (D/2,)
        angle = t[..., None] * frequency  # (..., D/2)
        sinusoids = torch.cat([angle.cos(), angle.sin()], -1)  # (..., D)
        tau = F.gelu(self.time(sinusoids))  # (..., hidden)
        hidden = F.gelu(self.inp(x) + tau)  # (B, T, hidden)
        return self.out(hidden)

    def forward(self, x):
        """One Euler step: (B, T, D) -> (B, T, D)."""
        # A 0-d time makes its embedding one row for all tokens.
        one = torch.ones((), device=x.device, dtype=self.gate.dtype)
        return x + torch.sigmoid(self.gate).to(x.dtype) * self.velocity(x, one)

    def flow_loss(self, x, keys):
        """Mean squared error of the velocity at random times, 0-d.

        x (B, T, D) detached; keys (B,): of draw_noise, one for each sequence.
        """
        z, t = draw_noise(keys, x.size(1), x.size(2))  # (B, T, D), (B, T)
        z = z.to(x.dtype)
        t = t.to(torch.promote_types(x.dtype, torch.float32))
        along = t.unsqueeze(-1)  # (B, T, 1)
        x_t = (1 - along) * z + along * x  # float32: near t = 0 or 1 the weights are small
        velocity = self.velocity(x_t.to(x.dtype), t)
        error = velocity - (x - z)
        return error.float().square().mean()


class TTTLinear(nn.Module):
    """TTT-Linear (Sun et al. 2024, arXiv 2407.04620), trained end to end, in its dual form.

    The hidden state is itself a linear model f(k) = k + LN(kW + b) that takes a gradient step on
    1/2 |LN(kW + b) - (v - k)|^2 for every token. Inside a mini-batch all gradients are taken at its
    start, so that all updates from tokens <= i reach token i in one masked product; only the loop
    over mini-batches is sequential.
    """

    def __init__(self, config):
        super().__init__()
        dim = config.model_dim
        heads = config.num_heads
        width = config.head_dim
        self.mini_batch = config.e2e_ttt_mini_batch
        self.rate = config.e2e_ttt_base_lr / width
        self.c_q = Linear(dim, dim)
        self.c_k = Linear(dim, dim)
        self.c_v = Linear(dim, dim)
        self.proj = Linear(dim, dim, zero=True)
        # The inner model's start, one per head, and its LayerNorm.
        self.w = nn.Parameter(0.02 * torch.randn(heads, width, width))
        self.b = nn.Parameter(torch.zeros(heads, 1, width))
        self.ln_gain = nn.Parameter(torch.ones(heads, 1, width))
        self.ln_bias = nn.Parameter(torch.zeros(heads, 1, width))
        self.norm = nn.LayerNorm(dim, eps=1e-6)  # as the inner LayerNorm's
        self.gate = nn.Parameter(torch.tensor(-5.0))

    def forward(self, x):
        """(B, T, D) -> (B, T, D)."""
        q = self.split(self.c_q(x))  # (B, H, T, d)
        k = self.split(self.c_k(x))
        v = self.split(self.c_v(x))
        # The inner state sums hundreds of steps: they are kept out of bfloat16.
        with torch.autocast(x.device.type, enabled=False):
            z = self.inner(q, k, v)  # (B, H, T, d)
        z = z.transpose(1, 2).flatten(2)  # (B, T, D)
        y = self.norm(z).to(x.dtype)
        return x + torch.sigmoid(self.gate).to(x.dtype) * self.proj(y)

    def split(self, x):
        """(B, T, D) -> (B, H, T, d) in the type of the inner model."""
        x = x.unflatten(-1, (self.w.size(0), -1))  # (B, T, H, d)
        return x.transpose(1, 2).to(self.w.dtype)

    def inner(self, q, k, v):
        """Outputs (B, H, T, d) of the inner model while it learns along T."""
        w = self.w  # (H, d, d), later (B, H, d, d)
        b = self.b  # (H, 1, d), later (B, H, 1, d)
        target = v - k - self.ln_bias  # wanted from LN(kW + b) without its bias
        outputs = []
        for low in range(0, q.size(2), self.mini_batch):
            part = slice(low, low + self.mini_batch)
            q_part = q[:, :, part]  # (B, H, n, d)
            k_part = k[:, :, part]
            # Gradient of 1/2 |LN(z) - (v - k)|^2 with respect to z = kW + b.
            unit, inverse = self.layer_norm_parts(k_part @ w + b)
            g = (unit * self.ln_gain - target[:, :, part]) * self.ln_gain
            # The Jacobian of a LayerNorm: take out the mean and the part along the unit vector.
            mean = g.mean(-1, keepdim=True)
            along = (g * unit).mean(-1, keepdim=True)
            gradient = inverse * (g - mean - unit * along)  # (B, H, n, d)
            # Row i of W's change seen by query i is the sum over j <= i of k_j^T gradient_j; the 1
            # is the bias's share.
            seen = (q_part @ k_part.mT + 1).tril()  # (B, H, n, n)
            z = q_part @ w + b - self.rate * (seen @ gradient)
            unit, _ = self.layer_norm_parts(z)
            outputs.append(q_part + unit * self.ln_gain + self.ln_bias)
            w = w - self.rate * (k_part.mT @ gradient)
            b = b - self.rate * gradient.sum(-2, keepdim=True)
        return torch.cat(outputs, 2)

    @staticmethod
    def layer_norm_parts(z):
        """(z - mean) / sd and 1 / sd over the last dimension."""
        centred = z - z.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        inverse = torch.rsqrt(variance + 1e-6)
        return centred * inverse, inverse


# Logits that exist at the same time in training: 512 MB of float32. A vocabulary of 1024 pieces
# stays below it at the default micro-batch.
LOGITS_AT_ONCE = 2**27


def layer_order(config, looped):
    """Layers in the order in which the trunk visits them.

    Depth recurrence: LOOP_START to LOOP_END run NUM_LOOPS more times in place, which makes the
    network deeper without a further parameter.
    """
    layers = list(range(config.num_layers))
    if not looped:
        return layers
    after = config.loop_end + 1
    repeated = layers[config.loop_start : after] * (config.num_loops + 1)
    return layers[: config.loop_start] + repeated + layers[after:]


class GPT(nn.Module):
    """The language model of `config`; `attend(q, k, v)` is the attention backend."""

    def __init__(self, config, attend=sdpa_attention):
        super().__init__()
        self.config = config
        width = config.embed_dim or config.model_dim
        self.tok_emb = Embedding(config.vocab_size, width)
        # A narrower embedding (ALBERT, Lan et al. 2019, arXiv 1909.11942) has a way in and one out.
        narrow = width < config.model_dim
        self.embed_in = Linear(width, config.model_dim) if narrow else None
        self.embed_out = Linear(config.model_dim, width) if narrow else None
        self.bigram = BigramHash(config) if config.bigram_vocab_size else None
        self.smear = None
        if config.smear_enabled:
            self.smear = InputSmearGate(config) if config.smear_inputs else SmearGate(config)
        layers = range(config.num_layers)
        self.blocks = nn.ModuleList(Block(config, layer, attend) for layer in layers)
        # Training begins without loops; every evaluation has them.
        self.looped = config.num_loops > 0
        num_skips = len(layer_order(config, self.looped)) // 2
        self.skip_weights = nn.Parameter(torch.ones(num_skips, config.model_dim))
        self.skip_gates = None
        if config.skip_gates:
            self.skip_gates = nn.Parameter(torch.zeros(num_skips, config.model_dim))
        self.ve = ValueEmbedding(config) if config.ve_dim else None
        self.ttt = TTTLinear(config) if config.e2e_ttt_enabled else None
        self.flow = FlowRefiner(config) if config.flow_enabled else None
        self.nfm = NativeFlowMatcher(config) if config.nfm_enabled else None
        # Looked up instead of computed: inside a compiled graph the trigonometry would run again in
        # every kernel that rotates, forward and backward.
        cos, sin = rotary_tables(config)
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)
        self.init_weights()
        self.qat_blend = 0.0  # as in the buffers of late QAT, known without asking the device
        if config.late_qat_threshold > 0:
            self.enable_qat()

    @torch.no_grad()
    def init_weights(self):
        """Draw what does not start at a constant, as REFERENCE section 4 says."""
        nn.init.normal_(self.tok_emb.weight, std=self.config.embed_init_std)
        if self.bigram is not None:
            nn.init.orthogonal_(self.bigram.proj.weight)
        for block in self.blocks:
            attn = block.attn
            for layer in (attn.c_q, attn.c_k, attn.c_v, block.mlp.fc):
                nn.init.orthogonal_(layer.weight)
        if self.ve is not None:
            nn.init.normal_(self.ve.embed.weight, std=0.01)
            nn.init.orthogonal_(self.ve.proj.weight)
        layers = []
        if self.ttt is not None:
            layers += [self.ttt.c_q, self.ttt.c_k, self.ttt.c_v]
        if self.flow is not None:
            layers += [self.flow.down, self.flow.fc, self.flow.up]
        if self.nfm is not None:
            layers += [self.nfm.inp, self.nfm.time]
        if self.embed_in is not None:
            layers += [self.embed_in, self.embed_out]
        for layer in layers:
            nn.init.orthogonal_(layer.weight)

    def enable_qat(self):
        """Prepare rounding of exactly the weights that the artifact stores as integers."""
        for name, module in self.named_modules():
            if isinstance(module, Quantizable):
                scheme = scheme_of(f"{name}.weight", module.weight.shape, self.config)
                _, bits = SCHEMES[scheme]
                if bits:
                    module.enable_qat(bits)

    @torch.no_grad()
    def set_qat(self, blend):
        """Set the blend of straight-through rounding (0 or 1) and the present weights' scales.

        It runs before every step, so it launches nothing while rounding stays off, and treats all
        matrices of one width as the rows of a single one while it is on.
        """
        rounded = [m for m in self.modules() if isinstance(m, Quantizable) and m.bits]
        if blend != self.qat_blend:
            self.qat_blend = blend
            for module in rounded:
                module.qat_blend.fill_(blend)
        if not blend:
            return
        alike = {}  # modules by number of columns and bits
        for module in rounded:
            kind = module.weight.size(1), module.bits
            alike.setdefault(kind, []).append(module)
        for (_, bits), modules in alike.items():
            rows = torch.cat([module.weight for module in modules]).float()  # (R, C)
            scales = row_scales(rows, bits).float()  # (R, 1)
            targets = [module.qat_scale for module in modules]
            parts = scales.split([len(target) for target in targets])
            torch._foreach_copy_(targets, parts)

    def embed(self, ids):
        """The stream (B, T, D) before the first block, in the autocast type; ids (B, T)."""
        x = self.tok_emb(ids)
        if self.embed_in is not None:
            x = self.embed_in(x)
        if self.bigram is not None:
            x = x + self.bigram(ids)
        if torch.is_autocast_enabled(ids.device.type):
            x = x.to(torch.get_autocast_dtype(ids.device.type))
        x = rms_norm(x)
        return x if self.smear is None else self.smear(x, ids)

    def states(self, ids):
        """Final states (B, T, D) of ids (B, T), and NativeFlowMatcher's input, for its loss."""
        x = x0 = self.embed(ids)
        length = ids.size(1)
        angles = self.rotary_cos[:length], self.rotary_sin[:length]  # (T, 1, rope_dims/2) each
        v_emb = self.ve(ids) if self.ve is not None else {}  # by layer
        v_first = None  # layer 0's values
        skips = []
        # U-Net: the first half of the visits (rounded down) are encoders, the rest decoders.
        order = layer_order(self.config, self.looped)
        num_encoders = len(order) // 2
        for visit, layer in enumerate(order):
            # A decoder first adds the output of its mirror image among the encoders.
            if visit >= num_encoders and skips:
                index = visit - num_encoders
                weight = self.skip_weights[index].to(x.dtype)
                skip = skips.pop()
                if self.skip_gates is None:
                    x = torch.addcmul(x, weight, skip)
                else:
                    gate = torch.sigmoid(self.skip_gates[index]).to(x.dtype)
                    x = torch.lerp(weight * skip, x, gate)
            x, v = self.blocks[layer](x, x0, angles, v_first, v_emb.get(layer))
            if v_first is None:
                v_first = v
            if visit < num_encoders:
                skips.append(x)
        x = rms_norm(x)
        if self.ttt is not None:
            x = self.ttt(x)
        if self.flow is not None:
            x = self.flow(x)
        flow_input = x
        if self.nfm is not None:
            x = self.nfm(x)
        return x, flow_input

    def hidden(self, ids):
        """Final states (B, T, D) of ids (B, T): the input of the head."""
        return self.states(ids)[0]

    def logits(self, hidden):
        """float32 logits (..., V) of final states (..., D)."""
        return self.head(self.head_input(hidden))

    def head_input(self, hidden):
        """The states that the tied embedding multiplies: (..., D), or narrower by EMBED_DIM."""
        return hidden if self.embed_out is None else self.embed_out(hidden)

    def head(self, x):
        """Logits (..., V) of head_input's output, softly capped (Gemma 2, arXiv 2408.00118)."""
        cap = self.config.logit_softcap
        # The division belongs to the weight: it is smaller than the logits.
        raw = F.linear(x, self.tok_emb.effective_weight() / cap)
        if raw.dtype == torch.bfloat16:
            raw = raw.float()
        return cap * torch.tanh(raw)

    def cross_entropy(self, hidden, targets, reduction="mean"):
        """Nats of targets (B, T) given states (B, T, D): their mean, or with "none" all (B*T,).

        The logits of a large vocabulary would outweigh all else that training keeps. Beyond
        LOGITS_AT_ONCE they are computed block by block of positions, and again in the backward.
        """
        states = hidden.flatten(0, 1)  # (B*T, D)
        targets = targets.flatten()  # (B*T,)
        rows = LOGITS_AT_ONCE // self.config.vocab_size
        if rows >= targets.size(0):
            return F.cross_entropy(self.logits(states), targets, reduction=reduction)

        def block_nats(states, targets):
            return F.cross_entropy(self.logits(states), targets, reduction="none")

        nats = [
            checkpoint(block_nats, *block, use_reentrant=False, preserve_rng_state=False)
            for block in zip(states.split(rows), targets.split(rows))
        ]
        nats = torch.cat(nats)
        return nats.mean() if reduction == "mean" else nats

    def forward(self, ids, targets, noise_keys=None):
        """Mean cross entropy in nats of targets (B, T), 0-d.

        With noise_keys (B,), of flow_noise_keys, plus NativeFlowMatcher's weighted loss.
        """
        hidden, flow_input = self.states(ids)
        loss = self.cross_entropy(hidden, targets)
        if noise_keys is not None:
            weight = self.config.nfm_loss_weight
            # Detached: this loss teaches the velocity, not the trunk.
            loss = loss + weight * self.nfm.flow_loss(flow_input.detach(), noise_keys)
        return loss


def build_model(config, runtime):
    """GPT on the runtime's device, with the attention backend that runs there."""
    return GPT(config, runtime.attention.function).to(runtime.device)


# ==================================================================================================
# Optimisers
# Muon for the blocks' matrices, AdamW for the rest, both on gradients that are reduced first and
# clipped then. Parallel Muon shards the expensive parts (Newton-Schulz, momentum) and hides its
# traffic behind the arithmetic.
# ==================================================================================================
# Coefficients of the quintic x -> a x + b (x x^T) x + c (x x^T)^2 x. They are Jordan's: as steep as
# possible at 0, so that small singular values grow fast, and then only roughly 1 (0.7 to 1.2),
# which is enough.
NEWTON_SCHULZ_A = 3.4445
NEWTON_SCHULZ_B = -4.7750
NEWTON_SCHULZ_C = 2.0315


def newton_schulz(matrices, steps, dtype):
    """Nearly the nearest semi-orthogonal matrices of `matrices` (N, r, c), in `dtype`.

    Quintic Newton-Schulz iteration, Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """
    x = matrices.to(dtype)
    # The Gram matrix of the short side is the smaller one.
    tall = is_tall(x)
    if tall:
        x = x.mT
    # Singular values must start in (0, 1]; the Frobenius norm is at least the largest of them.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        # Sums inside the products: three launches a step instead of five.
        gram = x @ x.mT  # (N, r, r)
        polynomial = torch.baddbmm(
            gram, gram, gram, beta=NEWTON_SCHULZ_B, alpha=NEWTON_SCHULZ_C
        )  # b G + c G^2
        x = torch.baddbmm(x, polynomial, x, beta=NEWTON_SCHULZ_A)
    return x.mT if tall else x


def is_tall(matrix):
    return matrix.size(-2) > matrix.size(-1)


def as_wide(matrix):
    """`matrix`, transposed if it has more rows than columns."""
    return matrix.mT if is_tall(matrix) else matrix


def squared_norm(tensors):
    """Sum of all squared elements (0-d float32), in four launches for any number of tensors."""
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


class Muon:
    """Momentum orthogonalised by Newton-Schulz, stacks of same-shape matrices over ranks.

    Parallel Muon is #399's. Tall matrices are stacked transposed: W1 and W2 of an MLP share a
    stack, which leaves less padding on many ranks. With `row_norm`, MuonEq-R: rows of equal norm go
    into Newton-Schulz, so that no neuron's large gradient crowds out the others' (record of
    2026-04-03). Phases of one step, as marked in the code:
      1. launch   biggest first: stack gradients (N, r, c), reduce-scatter their sum asynchronously
      2. collect  wait: this rank holds the reduced gradients of N / world matrices
      3. update   momentum, Nesterov, batched Newton-Schulz on that slice; all-gather asynchronously
      4. apply    weight decay and step, while the next stack is computed
    """

    def __init__(
        self,
        params,
        lr,
        momentum,
        weight_decay,
        ns_steps=5,
        dtype=torch.bfloat16,
        comm=None,
        row_norm=False,
    ):
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.ns_steps = ns_steps
        self.row_norm = row_norm
        self.dtype = dtype  # of Newton-Schulz; momentum and weights stay float32
        self.comm = comm or Comm()
        by_shape = {}
        for param in params:
            shape = tuple(as_wide(param).shape)
            by_shape.setdefault(shape, []).append(param)
        # Biggest first: its transfer takes longest and hides behind all others.
        self.stacks = sorted(by_shape.values(), key=lambda stack: -len(stack) * stack[0].numel())
        self.grads = [None] * len(self.stacks)  # per stack: this rank's slice, (N / world, r, c)
        self.handles = []  # (handle, tensors being sent)
        self.buffers = []  # per stack: momentum of this rank's matrices, (N / world, r, c)
        self.num_wide = []  # per stack: number of this rank's matrices that are not transposed
        for stack in self.stacks:
            stack.sort(key=is_tall)  # wide ones first: `apply` transposes the others in one go
            shape = as_wide(stack[0]).shape
            self.buffers.append(stack[0].new_zeros(self.share(stack), *shape))
            num_wide = sum(not is_tall(param) for param in stack)
            before = self.comm.rank * self.share(stack)  # matrices of earlier ranks
            self.num_wide.append(max(0, num_wide - before))

    def share(self, matrices):
        """Matrices per rank; the last ranks' shares are padded with zeros."""
        return -(-len(matrices) // self.comm.world)  # rounded up

    def stacked(self, matrices):
        """(world * share, r, c): reduce-scatter wants equal parts, hence the padding."""
        missing = self.share(matrices) * self.comm.world - len(matrices)
        if missing:
            matrices = [*matrices, *[torch.zeros_like(matrices[0])] * missing]
        return torch.stack(matrices)

    def launch(self):
        # 1. launch: everything is on its way before the first wait.
        for i, params in enumerate(self.stacks):
            stack = self.stacked([as_wide(param.grad) for param in params])
            if self.comm.world == 1:
                self.grads[i] = stack
                continue
            self.grads[i] = torch.empty_like(self.buffers[i])
            handle = self.comm.reduce_scatter(self.grads[i], stack)
            self.handles.append((handle, stack))  # the stack must live until it was sent

    def collect(self):
        """Squared gradient norm of this rank's matrices (0-d)."""
        # 2. collect: the norm needs all stacks, so this waits for all.
        for handle, _ in self.handles:
            handle.wait()
        self.handles.clear()  # 105 MB of nfm_7k's gradients, not to be held through the next step
        return squared_norm(self.grads)

    def step(self, scale=1.0, meanwhile=lambda: None):
        """Phases 3 and 4 on gradients times `scale`; `meanwhile()` runs in the last all-gather."""
        # A stack is applied only after the next one was computed: its all-gather had that long.
        waiting = None
        for i, params in enumerate(self.stacks):
            update = self.orthogonal_update(i, scale)
            full = update
            handle = None
            if self.comm.world > 1:
                full = update.new_empty(len(update) * self.comm.world, *update.shape[1:])
                handle = self.comm.all_gather(full, update)
            if waiting:
                self.apply(*waiting)
            waiting = (params, full, handle)
        meanwhile()
        self.apply(*waiting)

    def orthogonal_update(self, i, scale):
        # 3. update: (N / world, r, c). Nesterov looks one step of momentum ahead.
        grad = self.grads[i].mul_(scale)
        self.grads[i] = None
        buffer = self.buffers[i]
        buffer.mul_(self.momentum).add_(grad)
        ahead = grad.add(buffer, alpha=self.momentum)
        num_wide = self.num_wide[i]
        if self.row_norm:
            # The rows of a tall matrix are the columns of its place in the stack.
            for part, dim in ((ahead[:num_wide], -1), (ahead[num_wide:], -2)):
                part.div_(part.norm(dim=dim, keepdim=True).clamp(min=1e-7))
        update = newton_schulz(ahead, self.ns_steps, self.dtype)
        # An orthogonal matrix with more rows than columns has smaller entries than a square one:
        # sqrt(rows / columns) makes their root mean square the same.
        columns, rows = update.shape[1:]  # of a tall matrix, which stands here transposed
        update[num_wide:].mul_((rows / columns) ** 0.5)
        return update

    @torch.no_grad()
    def apply(self, params, full, handle):
        # 4. apply: decay is decoupled as in AdamW: its strength is lr * weight_decay alone.
        if handle:
            handle.wait()
        torch._foreach_mul_(params, 1 - self.lr * self.weight_decay)
        # One cast for all, without the padding behind the last one.
        updates = full[: len(params)].to(params[0].dtype)
        # Laid out as the weights are: the fused addition below takes no transposed views.
        num_wide = sum(not is_tall(param) for param in params)
        wide = updates[:num_wide]
        tall = updates[num_wide:].mT.contiguous()
        torch._foreach_add_(params, [*wide.unbind(), *tall.unbind()], alpha=-self.lr)

    def state_dict(self):
        """Momentum of every matrix by shape, at any number of ranks; all ranks must call it."""
        state = {}
        for params, buffer in zip(self.stacks, self.buffers):
            full = buffer
            if self.comm.world > 1:
                full = buffer.new_empty(len(buffer) * self.comm.world, *buffer.shape[1:])
                self.comm.all_gather(full, buffer).wait()
            # Without the padding: of a view torch.save would write the whole storage.
            state[self.stack_name(buffer)] = full[: len(params)].clone()
        return state

    def load_state_dict(self, state):
        for buffer in self.buffers:
            full = state[self.stack_name(buffer)].to(buffer.device)
            first = self.comm.rank * len(buffer)
            part = full[first : first + len(buffer)]  # shorter, or empty, on the last ranks
            buffer.zero_()
            buffer[: len(part)].copy_(part)

    @staticmethod
    def stack_name(buffer):
        """A stack's shape, "512x1536": unique among stacks, the same at any world size."""
        return "x".join(str(size) for size in buffer.shape[1:])


def build_optimizers(model, config, comm=None):
    """(Muon, AdamW), which together hold every parameter of `model` once.

    Muon's are the six matrices of every block: c_q, c_k, c_v, attn.proj, mlp.fc, mlp.proj. AdamW's
    first group are the lookup tables, whose rows see few tokens a step; its second is the rest:
    gains, gates, mixes, biases and the refiners.
    """
    groups = {"muon": [], "embed": [], "scalar": []}
    embeddings = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            embeddings.add(f"{name}.weight")
    for name, param in model.named_parameters():
        # Orthogonalised momentum is made for matrices between hidden states.
        if BLOCK_MATRIX.fullmatch(name):
            group = "muon"
        elif name in embeddings:
            group = "embed"
        else:
            group = "scalar"
        groups[group].append(param)
    muon = Muon(
        groups["muon"],
        config.matrix_lr,
        config.muon_momentum,
        config.muon_wd,
        config.muon_ns_steps,
        pick_dtype(config.dtype, next(model.parameters()).device)[0],
        comm,
        config.muon_row_norm,
    )
    # The schedule multiplies `base_lr`; "lr" itself changes with every step.
    adamw = torch.optim.AdamW(
        [
            dict(
                params=groups["embed"],
                base_lr=config.embed_lr,
                weight_decay=config.embed_wd if config.embed_wd >= 0 else config.adam_wd,
            ),
            dict(
                params=groups["scalar"],
                base_lr=config.scalar_lr,
                weight_decay=config.scalar_wd if config.scalar_wd >= 0 else config.adam_wd,
            ),
        ],
        lr=config.scalar_lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,
    )
    held = collections.Counter()
    for params in [*muon.stacks, *(group["params"] for group in adamw.param_groups)]:
        held.update(map(id, params))
    wrong = [name for name, param in model.named_parameters() if held[id(param)] != 1]
    assert not wrong, f"not in exactly one optimiser group: {wrong}"
    return muon, adamw


def reduce_clip_step(muon, adamw, comm, clip):
    """One optimiser step on the ranks' summed gradients, clipped by their global norm.

    They are clipped after the reduction: before it each rank would clip its own part, and the step
    would depend on the number of ranks.
    """
    muon.launch()
    params = [param for group in adamw.param_groups for param in group["params"]]
    for param in params:
        if param.grad is None:  # every rank must bring the same list
            param.grad = torch.zeros_like(param)
    grads = [param.grad for param in params]
    comm.sum_gradients(grads)
    squared = muon.collect()
    scale = 1.0
    if clip:
        if comm.world > 1:  # Muon's gradients are sharded, AdamW's are whole on every rank
            comm.all_reduce(squared).wait()
        norm = (squared + squared_norm(grads)).sqrt()
        # A tensor all the way: reading the norm would make the host wait for the GPU.
        scale = (clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, scale)
    muon.step(scale, meanwhile=adamw.step)


def run_fraction(config, step, seconds=0.0):
    """Share in [0, 1] of the run that is over: of its steps, or of its time if that ends sooner."""
    fraction = step / max(1, config.iterations)
    if config.training_seconds:
        fraction = max(fraction, seconds / config.training_seconds)
    return min(1.0, fraction)


def lr_scale(config, step, seconds=0.0):
    """Factor in [0, 1] of every learning rate at `step` after `seconds` of training.

    The factor is 1 until the warmdown, which covers the last WARMDOWN_ITERS steps, or with a
    wallclock cap the last WARMDOWN_ITERS times the measured step time, whichever begins first. With
    WARMDOWN_FRAC the warmdown is that share of the whole run instead. The factor falls to 0, or to
    MIN_LR.
    """
    if config.warmdown_frac:
        left = (1 - run_fraction(config, step, seconds)) / config.warmdown_frac
    else:
        steps_left = config.iterations - step
        if config.training_seconds and step and seconds:
            step_seconds = seconds / step
            steps_left = min(steps_left, (config.training_seconds - seconds) / step_seconds)
        left = steps_left / max(config.warmdown_iters, 1e-9)  # 0 steps: at full rate to the end
    left = min(1.0, max(0.0, left))  # in units of the warmdown
    if config.warmdown_shape == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return max(left, config.min_lr)


def momentum_at(config, step):
    """Muon's momentum at `step`, warmed linearly: early gradients turn fast and soon outdate."""
    if step >= config.muon_momentum_warmup_steps:
        return config.muon_momentum
    done = step / config.muon_momentum_warmup_steps
    return (1 - done) * config.muon_momentum_warmup_start + done * config.muon_momentum


SWA_START_SCALE = 0.2  # snapshots at higher learning rates would be far from the end


class WeightAverage:
    """EMA of the weights in float32 each step, and the mean of late snapshots of it (SWA).

    The last steps bounce between the walls of a valley, and their average lies nearer to its bottom
    (Izmailov et al. 2018, arXiv 1803.05407). Everything stays on the device.
    """

    def __init__(self, params, config):
        self.params = [param.detach() for param in params]  # the same memory
        self.config = config
        self.snapshots = 0  # taken so far
        self.ema = []
        self.swa = []  # the snapshots' sum
        if config.ema_decay:
            self.ema = [param.clone() for param in self.params]
        if config.swa_enabled:
            self.swa = [torch.zeros_like(param) for param in self.params]

    def update(self, step, scale):
        """Take in the weights after step `step` (from 0), made at learning-rate scale `scale`."""
        if self.ema:
            # The initial weights must not stay in an average that is younger than its horizon.
            decay = min(self.config.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.ema, self.params, 1 - decay)
        if self.swa and scale < SWA_START_SCALE and (step + 1) % self.config.swa_every == 0:
            torch._foreach_add_(self.swa, self.ema or self.params)
            self.snapshots += 1

    def exported(self):
        """(kind, tensors): the snapshots' mean, else the EMA, else the raw weights."""
        kind = f"EMA weights (decay {self.config.ema_decay})" if self.ema else "raw weights"
        if self.snapshots:
            kind = f"mean of {self.snapshots} snapshots of the {kind}"
            return kind, [total / self.snapshots for total in self.swa]
        if self.swa:
            kind += (
                f"; warning: SWA took no snapshot: no step at under {SWA_START_SCALE} of the "
                f"learning rate is a multiple of SWA_EVERY={self.config.swa_every}"
            )
        return kind, self.ema or self.params

    def state_dict(self):
        return dict(ema=self.ema, swa=self.swa, snapshots=self.snapshots)

    def load_state_dict(self, state):
        for mine, saved in ((self.ema, state["ema"]), (self.swa, state["swa"])):
            for target, value in zip(mine, saved, strict=True):
                target.copy_(value)
        self.snapshots = state["snapshots"]


# ==================================================================================================
# Training
# Steps, checkpoints, resume. Nothing random is drawn from hidden state: a step's tokens and noise
# are functions of its number (and of SEED), so a checkpoint holds neither position nor generator,
# and a resumed run is the uninterrupted one bit for bit. A signal in the middle of a step only sets
# a flag: the step ends, all ranks agree to stop, save a checkpoint and leave with exit code 75.
# ==================================================================================================
# Dense bfloat16 FLOP/s by NVIDIA's data sheets. The first name found in the device's own counts.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,  # SXM, which calls itself "H100 80GB HBM3"
    "H200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(name):
    """Dense bfloat16 FLOP/s of the device `name`, None where the table has no honest answer."""
    if "MIG" in name:  # a slice of a GPU, which says nothing of its size
        return None
    for part, flops in PEAK_FLOPS.items():
        if part in name:
            return flops
    return None


def flops_per_token(model):
    """Floating-point operations of one token's forward and backward pass: 6 N + 12 L D T.

    N counts the parameters that multiply every token, those of a looped layer at each visit: not
    the tables that are only looked up, but the token embedding, which is also the head. L layers
    attend over T tokens at width D. This is the formula of PaLM (Chowdhery et al. 2022, arXiv
    2204.02311, appendix B), which gives no discount for the causal half, so that shares of the peak
    compare with those of others.
    """
    config = model.config
    multiplied = sum(param.numel() for param in model.parameters())
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name != "tok_emb":
            multiplied -= module.weight.numel()
    order = layer_order(config, model.looped)
    for layer, block in enumerate(model.blocks):
        further_visits = order.count(layer) - 1
        multiplied += further_visits * sum(param.numel() for param in block.parameters())
    attention = len(order) * config.model_dim * config.train_seq_len
    return 6 * multiplied + 12 * attention


class Trainer:
    """Model, optimisers, averages and clock of one training run.

    `identity` holds the names and values that a checkpoint must agree on to be continued.
    """

    PARTS = ("model", "muon", "adamw", "average")  # they change weights, each has a state_dict

    def __init__(self, config, runtime, val, identity=None):
        self.config = config
        self.runtime = runtime
        self.val = val
        self.identity = identity or {}
        self.comm = runtime.comm
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        self.model = build_model(config, runtime)
        self.muon, self.adamw = build_optimizers(self.model, config, self.comm)
        self.average = WeightAverage(self.model.parameters(), config)
        self.stream = open_train_stream(config)
        self.loss = runtime.compiled(self.model)
        self.checkpoints = Checkpointer(runtime, "step", config.checkpoint_seconds)
        self.step = 0  # steps done
        self.seconds = 0.0  # of training: without start, warm-up, validations and checkpoints
        self.step_started = time.monotonic()  # moved forward by validations and checkpoints
        self.step_seconds = []  # of every step, as all ranks agreed on
        self.flops = 0.0  # floating-point operations of all steps and ranks
        self.logged_step = 0  # of the last log line in this process
        self.logged_order = []  # of the layers, in this process's log
        self.stopped_early = False  # by the wallclock cap
        # The batch is shared among ranks, and each share cut into parts that fit in memory.
        sequences = config.train_batch_tokens // config.train_seq_len
        world = self.comm.world
        if sequences % world:
            raise ConfigError(
                f"TRAIN_BATCH_TOKENS={config.train_batch_tokens} is {sequences} sequences, which "
                f"{world} ranks cannot share evenly: change the batch or the number of ranks"
            )
        self.seqs_per_rank = sequences // world
        most = min(self.seqs_per_rank, config.micro_batch_tokens // config.train_seq_len)
        # Equal parts: the mean of their mean losses is the step's loss, and one graph fits all.
        divisors = [n for n in range(1, most + 1) if self.seqs_per_rank % n == 0]
        self.micro_batch_seqs = max(divisors)
        self.accumulation_steps = self.seqs_per_rank // self.micro_batch_seqs

    def announce(self):
        """Log the lines that the challenge's tools parse, in its own format, and warnings."""
        config = self.config
        log = self.runtime.log
        data_set = Path(config.data_path).name
        log(f"model_params:{sum(param.numel() for param in self.model.parameters())}")
        log(f"world_size:{self.comm.world} grad_accum_steps:{self.accumulation_steps}")
        log(f"train_loader:dataset:{data_set} train_shards:{len(self.stream.paths)}")
        passes = config.iterations * config.train_batch_tokens / self.stream.num_tokens
        if passes > 1:
            log(
                f"warning: ITERATIONS={config.iterations} read the {self.stream.num_tokens} "
                f"training tokens {passes:.1f} times, unless MAX_WALLCLOCK_SECONDS ends it sooner"
            )
        if config.late_qat_threshold and config.quantizer == "gptq":
            log(
                "warning: LATE_QAT_THRESHOLD: training rounds to the steps of QUANTIZER=lite; gptq "
                "chooses its own after training"
            )
        last_step = max(0, config.iterations - 1)
        if config.num_loops and run_fraction(config, last_step) < config.loop_at:
            log(
                f"warning: LOOP_AT={config.loop_at}: no step of this run loops layers, but every "
                "score does"
            )

    def run(self):
        """Train to the last step, the wallclock cap or a wish to stop."""
        self.load()
        self.warm_up()
        # The clock starts here: compiling and reading a checkpoint are not training.
        self.step_started = time.monotonic()
        every = self.config.val_loss_every
        done = False
        while not done:
            self.set_layer_order()
            # Asked before the validation, so that the last one is of the final weights.
            done = self.step >= self.config.iterations or self.out_of_time()
            if done or (every and self.step and self.step % every == 0):
                self.validate()
            if not done:
                self.one_step()

    def out_of_time(self):
        """True if the next step is predicted to pass the wallclock cap."""
        cap = self.config.training_seconds
        if not cap or not self.step:  # nothing measured yet
            return False
        # Steps of looped layers take longer than the mean of the whole run; no single pause moves
        # the median.
        mean = self.seconds / self.step
        median = float(np.median(self.step_seconds[-20:]))
        if self.seconds + max(mean, median) > cap:
            self.runtime.log(
                f"stopping_early: wallclock_cap train_time:{1000 * self.seconds:.0f}ms "
                f"step:{self.step}/{self.config.iterations}"
            )
            self.stopped_early = True
        return self.stopped_early

    def one_step(self):
        """One optimiser step, its log line, and a checkpoint where one is due."""
        config = self.config
        scale = lr_scale(config, self.step, self.seconds)
        self.set_schedules(scale)
        # The number of the step is all that decides which sequences it reads.
        first = (self.step * self.comm.world + self.comm.rank) * self.seqs_per_rank
        try:
            rows = self.stream.sequences(first, self.seqs_per_rank)  # (n, T + 1)
        except DataError as error:
            raise DataError(f"{error} (last checkpoint: {self.checkpoints.last()})") from None
        loss, stop, save, seconds = self.agree(self.accumulate(self.step, rows))
        # Before the optimisers: a loss that is not finite must not reach the weights.
        if not math.isfinite(loss):
            self.diverged(loss)
        reduce_clip_step(self.muon, self.adamw, self.comm, config.grad_clip_norm)
        self.average.update(self.step, scale)
        self.step += 1
        self.seconds += seconds
        self.step_seconds.append(seconds)
        # Counted step by step, because looped layers are switched on in mid-run.
        self.flops += flops_per_token(self.model) * config.train_batch_tokens
        self.report(loss, scale)
        if self.step == 2:  # the pace is known: the first step still warms up
            self.warn_of_warmdown(seconds)
        if stop:
            self.save(needed=True)
            raise Stopped(f"in training after step {self.step}/{config.iterations}")
        every = config.checkpoint_every
        if save or (every and self.step % every == 0):
            self.save()

    def warn_of_warmdown(self, step_seconds):
        """Log a warning if the wallclock cap ends the run inside its warmdown."""
        config = self.config
        steps = config.training_seconds / step_seconds
        inside = steps < min(config.warmdown_iters, config.iterations)
        if config.training_seconds and inside and not config.warmdown_frac:
            peak = lr_scale(config, 1, step_seconds)
            frac = min(1.0, config.warmdown_iters / config.iterations)
            self.runtime.log(
                f"warning: MAX_WALLCLOCK_SECONDS ends this run after about {steps:.0f} steps, but "
                f"WARMDOWN_ITERS={config.warmdown_iters}: after step 1 the rate stays below "
                f"{peak:.3f} of its peak; WARMDOWN_FRAC={frac:.2f} keeps the warmdown's share"
            )

    def agree(self, loss):
        """(mean loss, stop, save, seconds) of this step, the same on every rank.

        `loss` is this rank's share. Each rank has its own clock and hears its own signals, so
        all decisions are taken in one exchange: else one rank would wait for ever in a collective
        that no other enters. `seconds` are those since the last step.
        """
        # A signal is seen one step late, so there must be time for two.
        stop = self.runtime.stop.wanted(2 * self.seconds / max(1, self.step))
        save = self.checkpoints.due()
        now = time.monotonic()
        seconds = now - self.step_started
        self.step_started = now
        if not self.runtime.is_main:  # rank 0's clock decides
            save = False
            seconds = 0.0
        loss, stop, save, seconds = self.comm.all_reduce_scalars(loss, stop, save, seconds)
        return loss, stop > 0, save > 0, seconds

    def set_layer_order(self):
        """Loop layers from LOOP_AT on: before that a step costs less and learns as much."""
        fraction = run_fraction(self.config, self.step, self.seconds)
        self.model.looped = self.config.num_loops > 0 and fraction >= self.config.loop_at
        order = layer_order(self.config, self.model.looped)
        # Loss and step time change with the order, so the log names it.
        if self.config.num_loops and order != self.logged_order:
            visits = " ".join(map(str, order))
            self.runtime.log(f"layer_order step:{self.step} visits:{len(order)} layers:{visits}")
            self.logged_order = order

    def set_schedules(self, scale):
        """Bring every schedule to this step: rates, Muon's momentum, late rounding of weights."""
        config = self.config
        self.muon.lr = config.matrix_lr * scale
        self.muon.momentum = momentum_at(config, self.step)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * scale
        if config.late_qat_threshold:
            self.model.set_qat(float(scale < config.late_qat_threshold))

    def accumulate(self, step, rows):
        """Add up the gradients of `rows` (n, T + 1), this rank's sequences of step number `step`.

        Returns their share of the step's mean loss, as a float.
        """
        config = self.config
        first = self.comm.rank * self.seqs_per_rank  # number of rows[0] in the step
        self.model.zero_grad()
        total = 0.0  # a 0-d tensor after the first micro-batch: it stays on the device
        try:
            for low in range(0, self.seqs_per_rank, self.micro_batch_seqs):
                high = low + self.micro_batch_seqs
                tokens = self.runtime.to_device(rows[low:high])  # (B, T + 1)
                # A function of (SEED, step, sequence): a resumed run draws the same noise.
                noise = flow_noise_keys(
                    config, step, first + low, self.micro_batch_seqs, self.runtime.device
                )
                with self.runtime.autocast():
                    # Each token's target is its successor. Divided here, so that sums over
                    # micro-batches and ranks are means.
                    loss = self.loss(tokens[:, :-1], tokens[:, 1:], noise)
                    loss = loss / (self.accumulation_steps * self.comm.world)
                total = total + loss.detach()
                if high == self.seqs_per_rank:
                    # Queued ahead of the last backward, for which the host then need not wait.
                    on_host = total.to("cpu", non_blocking=True)
                    copied = torch.cuda.current_stream().record_event() if total.is_cuda else None
                loss.backward()
        except OUT_OF_MEMORY:
            length = config.train_seq_len
            smaller = max(self.micro_batch_seqs * length // 2, length)
            raise ResourceError(
                f"out of memory in training with MICRO_BATCH_TOKENS={config.micro_batch_tokens}: "
                f"run the same command with MICRO_BATCH_TOKENS={smaller}"
            ) from None
        # The step's one synchronisation. On CUDA the last backward is still running behind it, long
        # enough to hide the agreement of the ranks and the optimisers' launches.
        if copied is not None:
            copied.synchronize()
        return float(on_host)

    def clock(self):
        milliseconds = 1000 * self.seconds
        average = milliseconds / max(1, self.step)
        return f"train_time:{milliseconds:.0f}ms step_avg:{average:.2f}ms"

    def report(self, loss, scale):
        """The step's log line, and on a terminal the moving one."""
        config = self.config
        step = self.step
        text = f"step:{step}/{config.iterations} train_loss:{loss:.4f}"
        # The pace since the last line, where a node that slows down shows at once.
        recent = self.step_seconds[self.logged_step :]
        tokens = config.train_batch_tokens * len(recent)
        pace = f"tokens_per_s:{tokens / sum(recent):.0f}"
        # The first steps show whether a run is sound at all.
        if step <= 5 or step % config.train_log_every == 0 or step == config.iterations:
            self.runtime.log(f"{text} {self.clock()} {pace}")
            self.logged_step = step
        # Every step's, so that the curve that is drawn of them can be smoothed.
        self.runtime.event(
            "step",
            step=step,
            train_loss=loss,
            train_time_ms=1000 * self.seconds,
            lr_scale=scale,
        )
        # By the mean of the whole run: steadier than the last step's time.
        eta = (config.iterations - step) * self.seconds / step
        self.runtime.progress(f"{text} {pace} eta:{eta:.0f}s")

    def report_throughput(self):
        """Log tokens per second, milliseconds per step and the share of the devices' peak."""
        if not self.step_seconds:
            return
        tokens_per_second = self.config.train_batch_tokens * self.step / self.seconds
        # The median is the pace; the 95th percentile shows interruptions.
        median, p95 = (1000 * float(np.percentile(self.step_seconds, p)) for p in (50, 95))
        device = device_name(self.runtime.device)
        peak = peak_flops(device)
        share = None
        described = f"unknown (no bfloat16 peak is listed for {device})"
        if peak is not None:
            share = self.flops / self.seconds / (peak * self.comm.world)
            described = f"{100 * share:.1f}% (of {peak / 1e12:.0f} TFLOP/s, {device})"
        self.runtime.log(
            f"throughput tokens_per_s:{tokens_per_second:.0f} step_median:{median:.2f}ms "
            f"step_p95:{p95:.2f}ms peak_share:{described}"
        )
        self.runtime.event(
            "throughput",
            tokens_per_s=tokens_per_second,
            step_median_ms=median,
            step_p95_ms=p95,
            peak_share=share,
            flops=self.flops,
        )

    def validate(self):
        """Validate the raw weights by non-overlapping windows; this is no training time."""
        config = self.config
        begin = time.monotonic()
        try:
            score = evaluate(self.model, self.val, config, self.runtime, config.eval_seq_len)
        except Stopped:
            self.save(needed=True)
            raise
        except ArtifactError:  # the evaluation's error for a loss that is not finite
            self.diverged(math.nan)
        self.runtime.log(
            f"step:{self.step}/{config.iterations} val_loss:{score.val_loss:.4f} "
            f"val_bpb:{score.val_bpb:.4f} {self.clock()}"
        )
        self.runtime.event(
            "val",
            step=self.step,
            val_loss=score.val_loss,
            val_bpb=score.val_bpb,
            train_time_ms=1000 * self.seconds,
        )
        self.step_started += time.monotonic() - begin  # as if no time had passed

    def warm_up(self):
        """Compile on synthetic tokens, then restore weights and optimisers bit for bit.

        Compilation takes minutes on CUDA and would otherwise count against the wallclock cap.
        """
        config = self.config
        finished = self.step >= config.iterations
        if not self.runtime.compiling or not config.warmup_steps or finished:
            return
        before = private_copy(self.training_state())  # on the host: the device may be full
        shape = (self.seqs_per_rank, config.train_seq_len + 1)
        rows = np.random.default_rng(0).integers(0, config.vocab_size, shape)
        # Both orders of the layers, so that no graph is compiled in the middle of the run.
        for looped in (False, True) if config.num_loops else (False,):
            self.model.looped = looped
            for i in range(config.warmup_steps):
                self.accumulate(-1 - i, rows)  # steps that no run has: noise of their own
                reduce_clip_step(self.muon, self.adamw, self.comm, config.grad_clip_norm)
        self.restore(before)
        self.runtime.log(
            f"warmup_steps:{config.warmup_steps} done, weights and optimisers restored"
        )

    def training_state(self):
        """Everything the next step depends on but its number; every rank must call it."""
        return {name: getattr(self, name).state_dict() for name in self.PARTS}

    def restore(self, state):
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])

    def save(self, needed=False):
        """Write a checkpoint while the clock stands still; every rank must call it.

        With `needed`, raises ResourceError if it cannot be written. Weights that are not finite are
        never saved: the checkpoints before them are the ones to keep. With `needed` they raise
        DivergedError.
        """
        begin = time.monotonic()
        if not all(bool(torch.isfinite(param).all()) for param in self.model.parameters()):
            text = f"no checkpoint at step {self.step}: weights are not finite"
            if needed:
                raise DivergedError(f"{text}; last good weights: {self.checkpoints.last()}")
            self.runtime.log(f"warning: {text}")
            return
        state = self.training_state()  # a collective: momentum is gathered from all ranks
        # A tensor, since thousands of Python floats are slow to write.
        steps = torch.tensor(self.step_seconds, dtype=torch.float64)
        state.update(
            identity=self.identity,
            step=self.step,
            seconds=self.seconds,
            timing=dict(steps=steps, flops=self.flops),
        )
        written = self.checkpoints.save(self.step, state)
        if written:
            seconds, size = written
            self.runtime.log(
                f"checkpoint_saved step:{self.step} seconds:{seconds:.2f} bytes:{size}"
            )
            self.runtime.event("checkpoint", step=self.step, seconds=round(seconds, 3), bytes=size)
        elif needed:
            raise ResourceError(
                f"the checkpoint of step {self.step} could not be written to "
                f"{self.checkpoints.folder}: free space or change RUN_DIR; last checkpoint: "
                f"{self.checkpoints.last()}"
            )
        self.step_started += time.monotonic() - begin

    def load(self):
        """Go on from the newest readable checkpoint; all ranks read the one that rank 0 found."""
        step, state = self.checkpoints.load()
        if not step:
            return
        path = self.checkpoints.path(step)
        saved = state["identity"]
        differences = [
            f"{name}: {saved.get(name)!r} -> {self.identity.get(name)!r}"
            for name in {**saved, **self.identity}
            if saved.get(name) != self.identity.get(name)
        ]
        if differences:
            raise ConfigError(
                f"{path} belongs to other settings or data: {'; '.join(differences)}: use the same "
                "to resume it, or set another RUN_ID"
            )
        self.restore(state)
        # With its number and the clock, the next step is the one that would have come.
        self.step = step
        self.seconds = state["seconds"]
        self.step_seconds = state["timing"]["steps"].tolist()
        self.flops = state["timing"]["flops"]
        self.logged_step = step
        self.runtime.log(f"resumed_from:{path} step:{step}")

    def diverged(self, loss):
        """Save the weights that met the bad loss if they are finite themselves, and stop."""
        self.save()
        raise DivergedError(
            f"loss is {loss} at step {self.step + 1}: lower the learning rates; last good "
            f"weights: {self.checkpoints.last()}"
        )

    def export(self):
        """{"config", "state_dict", "info"} of the weights to pack: the averages named by Config."""
        kind, tensors = self.average.exported()
        self.runtime.log(f"export:{kind}")
        # The model's own state first, for its buffers; then the averages instead of its parameters.
        state = dict(self.model.state_dict())
        names = [name for name, _ in self.model.named_parameters()]
        state.update(zip(names, tensors, strict=True))
        info = dict(
            steps=self.step,
            train_time_s=self.seconds,
            step_avg_ms=1000 * self.seconds / max(1, self.step),
            stopped_early=self.stopped_early,
            peak_mib=self.runtime.peak_mib()[0],
        )
        return dict(
            config=self.config.as_dict("arch", "eval"), state_dict=private_copy(state), info=info
        )


def train(config, runtime, val, path, identity=None):
    """Train (or go on training) and write the exported float weights to `path`.

    A checkpoint is continued only where its `identity` is this one. Raises Stopped, DivergedError,
    DataError, ResourceError or ConfigError (see their exit codes).
    """
    trainer = Trainer(config, runtime, val, identity)
    trainer.announce()
    trainer.run()
    trainer.report_throughput()
    exported = trainer.export()
    allocated, reserved = runtime.peak_mib()
    runtime.log(f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB")
    if runtime.is_main:
        save_tensors(path, exported)
    runtime.event("trained", **exported["info"])
    runtime.comm.barrier()  # no rank reads the file before it is whole


# ==================================================================================================
# Evaluation
# One window plan, one meter, one scoring loop. Roundtrip, sliding window, test-time training and
# SLOT are that loop with other arguments: a flat list of work items (score these windows, take this
# training step) and a cursor, so that a killed evaluation goes on where it was.
# Legality: the meter refuses a target that comes twice (C4), train() a target that is not scored
# yet (C3), spot checks a score that changes with later tokens (C1) or is no entry of a normalised
# distribution (C2). SLOT is illegal where slot_shift is fitted on targets about to be scored.
# ==================================================================================================
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
LOGITS_ROWS = 8192  # positions whose (V,) logits exist at the same time
LOG_SECONDS = 15  # between two lines of progress in the log
# The same inputs give the same bits: no reduction is tuned by the clock.
DETERMINISTIC = {"deterministic": True}


@dataclasses.dataclass(frozen=True)
class Score:
    """Result of one evaluation: val_loss in nats per token, val_bpb in bits per byte."""

    val_loss: float
    val_bpb: float
    tokens: int
    bytes: int
    seconds: float  # over all processes that worked on it, one after another
    legal: bool
    spot_checks: int  # rounds of scoring that were repeated on other later tokens


class ConditionError(LegalityError):
    """A condition of the challenge is broken; `check` is the check of CHECKS that fails."""

    def __init__(self, check, message):
        super().__init__(message)
        self.check = check


def bits_per_byte(nats, num_bytes):
    """The challenge's unit: it compares models with different tokenizers."""
    return nats / math.log(2) / num_bytes


class Window(typing.NamedTuple):
    """Targets [start, end) of one forward pass, of which [first, end) are scored.

    Target t is token t + 1 of the stream, predicted from the tokens up to t.
    """

    start: int
    first: int
    end: int


class ScoreRound(typing.NamedTuple):
    """Work item: score windows[low:high], shared out over all ranks."""

    low: int
    high: int


class TrainStep(typing.NamedTuple):
    """Work item: one SGD step on rows [row_low, row_high) of the chunk at target `first`.

    A row is EVAL_SEQ_LEN targets.
    """

    first: int
    row_low: int
    row_high: int
    rate: float


def plan_windows(num_targets, seq_len, stride):
    """[Window(start, first, end)] that score every target exactly once, in order.

    Each target has as much context as a window of seq_len holds. A stride beyond seq_len would
    leave gaps and counts as seq_len.
    """
    stride = min(stride, seq_len)
    windows = []
    done = 0
    while done < num_targets:
        # The first window has nothing before it and scores all of its targets.
        step = stride if done else seq_len
        end = min(num_targets, done + step)
        windows.append(Window(max(0, end - seq_len), done, end))
        done = end
    return windows


def plan_work(windows, num_targets, config, per_round, ttt):
    """The evaluation as a flat list of ScoreRound (up to `per_round` windows) and TrainStep.

    With test-time training a chunk's windows come first, then its training. The last chunk is never
    trained on: no target is scored after it.
    """
    chunk = config.ttt_chunk_tokens if ttt else num_targets
    chunks = -(-num_targets // chunk)  # rounded up
    work = []
    high = 0
    for c in range(chunks):
        # The windows that begin to score in this chunk; rounds do not cross chunks, so that all
        # windows of the next chunk are scored after training on this one.
        low = high
        while high < len(windows) and windows[high].first < (c + 1) * chunk:
            high += 1
        for at in range(low, high, per_round):
            work.append(ScoreRound(at, min(at + per_round, high)))
        if c < chunks - 1:
            work += plan_training(c, chunks, config)
    return work


def plan_training(c, chunks, config):
    """[TrainStep] of chunk c: TTT_EPOCHS passes over its rows, all at one learning rate."""
    # A cosine over the chunks: TTT_LR at the first, towards 0 at the last.
    rate = 0.5 * config.ttt_lr * (1 + math.cos(math.pi * c / (chunks - 1)))
    first = c * config.ttt_chunk_tokens
    rows = config.ttt_chunk_tokens // config.eval_seq_len
    steps = []
    for _ in range(config.ttt_epochs):
        for low in range(0, rows, config.ttt_batch_seqs):
            high = min(low + config.ttt_batch_seqs, rows)
            steps.append(TrainStep(first, low, high, rate))
    return steps


def log_probs(logits):
    """The one normaliser: float32 log-probabilities (n, V) over the whole vocabulary."""
    return F.log_softmax(logits, -1)


class Meter:
    """float64 sums of nll and bytes on this rank, and the targets that they hold.

    add() refuses a target that comes twice on this rank, Evaluation.result() one on two ranks.
    """

    def __init__(self, num_targets, device):
        # The sum stays on the device: to read it makes the host wait.
        self.nll = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = 0
        self.bytes = 0
        self.last = 0  # end of the last span that was added
        self.coverage = np.zeros(num_targets, np.uint8)  # number of scores of each target

    def add(self, windows, nll, num_bytes):
        """Add the scored targets of `windows` with their summed nll (0-d float64).

        Raises ConditionError for a target that comes twice or out of order.
        """
        for _, first, end in windows:
            if first < self.last:
                raise ConditionError(
                    "C4 single_pass",
                    f"targets {first}…{end} come after {self.last}: out of order or twice",
                )
            self.coverage[first:end] = 1
            self.tokens += end - first
            self.last = end
        self.nll += nll
        self.bytes += num_bytes

    def row(self):
        """The sums as plain numbers, for a collective or a saved state."""
        return [float(self.nll), self.tokens, self.bytes, self.last]

    def restore(self, rows, coverage, comm):
        """Go on from a saved state: rows (ranks, 4) as of row(), coverage (num_targets,) of all."""
        nll, tokens, num_bytes, _ = rows[comm.rank]
        self.nll.fill_(nll)
        self.tokens = int(tokens)
        self.bytes = int(num_bytes)
        self.last = int(rows[:, 3].max())
        # Coverage is summed over ranks, so one rank alone keeps the saved one.
        self.coverage = coverage if comm.rank == 0 else np.zeros_like(coverage)


@contextlib.contextmanager
def evaluation_mode(model, freeze_blocks):
    """Evaluation mode with the first blocks frozen; yields the parameters that may be trained.

    At its end weights, modes and requires_grad are restored.
    """
    saved = [(p, p.detach().clone(), p.requires_grad) for p in model.parameters()]
    training = model.training
    try:
        model.eval()
        for block in model.blocks[:freeze_blocks]:
            block.requires_grad_(False)
        yield [p for p in model.parameters() if p.requires_grad]
    finally:
        with torch.no_grad():
            for param, value, requires_grad in saved:
                param.copy_(value)
                param.requires_grad_(requires_grad)
                param.grad = None
        model.train(training)


class Batch(typing.NamedTuple):
    """Windows that go through the model together; each scores its last targets."""

    windows: list  # of Window, (n,)
    ids: torch.Tensor  # (B, T); B > n where the last window is repeated to fill a compiled shape
    targets: torch.Tensor  # (B, T)


def slot_shift(model, hidden, batch, config, slot):
    """SLOT: a shift of the final states, fitted by AdamW with the weights frozen.

    hidden (B, T, D) is computed once; only the head runs in each step.
    causal: (B, 1, D), one shift per window, fitted on the window's positions that earlier windows
    scored; a window without any gets none.
    published (#1150): (1, 1, D), fitted on all positions of the batch, those about to be scored
    included, which is why it is illegal (#1240).
    """
    causal = slot == "causal"
    known = torch.zeros(batch.targets.shape, device=hidden.device)  # (B, T): 1 = may be fitted on
    for i, (start, first, end) in enumerate(batch.windows):
        # Targets from `first` on are about to be scored: fitting on them makes SLOT illegal.
        known_until = first if causal else end
        known[i, : known_until - start] = 1
    rows = len(known) if causal else 1
    count = known.sum(1).clamp(min=1) if causal else known.sum()
    shift = torch.zeros(rows, 1, hidden.size(-1), device=hidden.device, requires_grad=True)
    # Epsilon and decay as in #1150: a mean's gradients are so small that the epsilon counts.
    adamw = torch.optim.AdamW([shift], lr=config.slot_lr, eps=1e-5, weight_decay=1e-8)
    for _ in range(config.slot_steps):
        with torch.enable_grad():
            nll = model.cross_entropy(hidden.detach() + shift, batch.targets, "none")  # (B*T,)
            mean = (nll.view_as(known) * known).sum(1) / count  # (B,)
            # Each window's mean depends on its own shift alone: the sum mixes no gradients.
            total = mean.sum()
        (shift.grad,) = torch.autograd.grad(total, shift)
        adamw.step()
    return shift.detach()


@torch.no_grad()
def scored_nll(model, hidden, batch, observer):
    """nll (n,) of a batch's scored targets, window after window; only these get logits.

    hidden (B, T, D); `observer` is shown the targets' indices, log-probabilities and nll.
    """
    counts = [end - first for _, first, end in batch.windows]
    # zip leaves out rows that only fill a compiled shape.
    states = torch.cat([row[-count:] for row, count in zip(hidden, counts)])  # (n, D)
    tokens = torch.cat([row[-count:] for row, count in zip(batch.targets, counts)])  # (n,)
    indices = np.concatenate([np.arange(first, end) for _, first, end in batch.windows])
    out = []
    for low in range(0, len(tokens), LOGITS_ROWS):
        part = slice(low, low + LOGITS_ROWS)
        logps = log_probs(model.logits(states[part]))  # (rows, V)
        nll = -logps.gather(1, tokens[part, None])[:, 0]  # (rows,)
        observer.scored(indices[part], logps, nll)
        out.append(nll)
    return torch.cat(out)


# ---- observers ----


class Observer:
    """Sees an evaluation's scores on their way to the meter; this one ignores them."""

    def scored(self, targets, logps, nll):
        """Target indices (n,), their log-probabilities (n, V) and the nll (n,) that is counted."""

    def before_item(self, evaluation, item):
        """Called before each work item, on every rank."""


class ScoresFile(Observer):
    """Writes SCORES_FILE for a reviewer: the nll of every target (n,), in nats, as counted."""

    def __init__(self, num_targets):
        self.nll = torch.zeros(num_targets)

    def scored(self, targets, logps, nll):
        self.nll[targets] = nll.float().cpu()

    def write(self, path, runtime):
        """Write all ranks' values as little-endian float32, in the order of the targets."""
        if runtime.comm.world > 1:
            dist.all_reduce(self.nll)  # a target is scored on one rank and zero on all others
        if runtime.is_main:
            write_atomic(path, [self.nll.numpy().astype("<f4").tobytes()])


class Watch(Observer):
    """Checks every score of targets [low, high); keeps what tokens after `place` may not change.

    Another observer is shown the same.
    """

    def __init__(self, stream, low, high, place, observer=None):
        self.stream = stream
        self.low = low
        self.place = place
        self.observer = observer or Observer()
        self.nll = np.zeros(high - low, np.float32)
        self.at_place = np.zeros(0)  # (V,) log-probabilities of target `place`, its own rank's only
        self.fault = ""  # description of a score that broke C2

    def scored(self, targets, logps, nll):
        self.observer.scored(targets, logps, nll)
        self.nll[targets - self.low] = nll.float().cpu().numpy()
        if self.place in targets:
            row = int(np.flatnonzero(targets == self.place)[0])
            self.at_place = logps[row].float().cpu().numpy()
        # Damaged weights give NaN, which is an error of another kind and no fault here.
        worst = logps.double().logsumexp(-1).abs().max().item()
        if worst > 1e-4:
            self.fault = f"a distribution's log-sum is {worst:.1e}"
        # Read from the text itself, not from the evaluation's targets: target t is token t + 1.
        tokens = torch.from_numpy(self.stream.tokens[targets + 1].astype(np.int64))
        entries = logps.gather(1, tokens.to(logps.device)[:, None])[:, 0]  # (n,)
        wrong = (nll != -entries) & ~nll.isnan()
        if wrong.any():
            self.fault = f"{int(wrong.sum())} scores are not minus their target's entry"

    def equals(self, other):
        """True if all scores before `place` and the distribution at `place` are the same bits."""
        before = slice(0, self.place - self.low)
        same_nll = np.array_equal(self.nll[before], other.nll[before], equal_nan=True)
        return same_nll and np.array_equal(self.at_place, other.at_place, equal_nan=True)


def other_tokens(tokens, vocab_size, random):
    """Tokens (n,) of the same type, each another one; every second time a document begins."""
    # A shift by 1 to V - 1 modulo V never gives the same token again.
    shift = random.integers(1, vocab_size, len(tokens))
    others = ((tokens + shift) % vocab_size).astype(tokens.dtype)
    if tokens[0] != BOS and random.random() < 0.5:
        others[0] = BOS
    return others


def draw_rounds(work, share, seed):
    """Cursors of the ScoreRounds to check: about `share` of them, none or at least one."""
    rounds = [cursor for cursor, item in enumerate(work) if isinstance(item, ScoreRound)]
    if not share:
        return set()
    count = max(1, round(share * len(rounds)))
    random = np.random.default_rng(seed)
    return set(random.choice(rounds, count, replace=False).tolist())


def check_seed(config, text):
    """AUDIT_SEED, or a hash of `text`, which names the checked run: nobody can choose it before."""
    return config.audit_seed or hash64(text) >> 1


class Evaluation:
    """One pass over a validation stream.

    `ttt` trains on scored chunks (score-first test-time training), `slot` shifts hidden states.
    `checkpoints`, if given, keeps the state (cursor, sums, coverage, adapted weights, momentum);
    only an evaluation of the same `identity`, settings and text goes on from it. `spot_checks` is
    the share of rounds that are scored again with other tokens after a random position. A `quiet`
    one logs neither progress nor its spot checks.
    """

    def __init__(
        self,
        model,
        stream,
        config,
        runtime,
        stride,
        ttt=False,
        slot="off",
        observer=None,
        checkpoints=None,
        identity="",
        label="",
        spot_checks=0.0,
        quiet=False,
    ):
        self.model = model
        self.stream = stream
        self.config = config
        self.runtime = runtime
        self.comm = runtime.comm
        self.ttt = ttt
        self.slot = slot
        self.observer = observer or Observer()
        self.checkpoints = checkpoints
        self.label = label
        self.quiet = quiet
        # A saved state is used only where all of this agrees.
        text = stream.fingerprint["val_sha256"]
        self.identity = f"{identity}/{label}/{stride}/{ttt}/{slot}/{text}/{self.comm.world} ranks"
        if ttt:
            # Threads split the sums of gradients, and so do ranks.
            self.identity += f"/{torch.get_num_threads()} threads"
        # The text lies on the device: a batch is gathered there from a list of positions.
        tokens = torch.from_numpy(stream.tokens.astype(np.int32))  # (num_targets + 1,)
        self.tokens = tokens.to(runtime.device)
        # The plan is the same list on every rank, so that collectives meet.
        num_targets = stream.num_targets
        self.windows = plan_windows(num_targets, config.eval_seq_len, stride)
        per_round = config.eval_batch_seqs * self.comm.world
        self.work = plan_work(self.windows, num_targets, config, per_round, ttt)
        self.meter = Meter(num_targets, runtime.device)
        if slot == "published":
            spot_checks = 0.0  # known to be illegal, and marked so
        self.spot_seed = check_seed(config, self.identity)
        self.spots = draw_rounds(self.work, spot_checks, self.spot_seed)  # cursors
        self.compile_functions()
        self.sgd = None  # the optimiser of test-time training
        self.batch_limit = math.inf  # windows per batch that fit, once more did not
        self.cursor = 0  # the next work item
        self.scored_until = 0  # all targets before this one are scored, on all ranks
        self.spots_done = 0  # rounds that were checked and agreed
        self.seconds = 0.0  # spent so far, by earlier processes too

    def compile_functions(self):
        """Set the three functions that run the model, compiled where this run compiles."""
        compiled = self.runtime.compiled
        self.hidden = compiled(self.model.hidden, DETERMINISTIC)
        self.loss = compiled(self.model, DETERMINISTIC)
        self.step_loss = self.loss  # of a whole test-time training step
        if self.runtime.cuda_graphs:
            graph = {**DETERMINISTIC, "triton.cudagraphs": True}
            self.step_loss = compiled(self.model, graph)

    def run(self):
        """Score all targets; returns a Score."""
        with evaluation_mode(self.model, self.config.ttt_freeze_blocks) as params:
            if self.ttt:
                # Made anew for every evaluation: nothing is left of the one before.
                self.sgd = torch.optim.SGD(params, self.config.ttt_lr, self.config.ttt_momentum)
            self.load()
            # The clock goes on from the seconds of earlier processes.
            self.started = time.monotonic() - self.seconds
            self.shown = self.logged = self.started
            if self.spots and not self.quiet:
                self.runtime.log(
                    f"spot_checks {self.label} rounds:{len(self.spots)} audit_seed:{self.spot_seed}"
                )
            while self.cursor < len(self.work):
                item = self.work[self.cursor]
                self.observer.before_item(self, item)
                if isinstance(item, TrainStep):
                    self.train(item)
                else:
                    self.score_round(item)
                self.cursor += 1
                self.after_item()
            return self.result()

    def after_item(self):
        """Between items: show progress, save the state when due, stop when wanted."""
        self.seconds = time.monotonic() - self.started
        self.show_progress()
        if self.cursor == len(self.work):
            return
        due = self.checkpoints is not None and self.checkpoints.due()
        # One collective for both, so that all ranks save or stop after the same item.
        stop, save = self.comm.all_reduce_scalars(self.runtime.stop.wanted(), due)
        if self.checkpoints is not None and (stop or save):
            self.save(needed=bool(stop))
        if stop:
            raise Stopped(f"in {self.label or 'validation'} at item {self.cursor}/{len(self.work)}")

    def show_progress(self):
        """The running score: on a terminal every second, in the log every LOG_SECONDS."""
        now = time.monotonic()
        every = 1 if sys.stdout.isatty() else LOG_SECONDS
        # Not after every item: to read the sum makes the host wait for the device.
        if self.quiet or not self.label or not self.runtime.is_main or now - self.shown < every:
            return
        if not self.meter.bytes:  # rank 0 had no window of the first rounds
            return
        self.shown = now
        bpb = bits_per_byte(float(self.meter.nll), self.meter.bytes)
        eta = (len(self.work) - self.cursor) * self.seconds / self.cursor
        text = (
            f"{self.label}_progress {self.cursor}/{len(self.work)} tokens:{self.meter.tokens} "
            f"running_bpb:{bpb:.4f} eta:{eta:.0f}s"
        )
        self.runtime.progress(text)
        if now - self.logged >= LOG_SECONDS:
            self.logged = now
            self.runtime.log(text)

    def halving(self, run, size):
        """run(size) with at most `size` rows at a time; out of memory, again with half as many."""
        while True:
            size = min(size, self.batch_limit)
            try:
                run(size)
                return
            except OUT_OF_MEMORY:
                if size == 1:
                    raise ResourceError(
                        "out of memory with one window per batch: lower EVAL_SEQ_LEN or use "
                        "a larger device"
                    ) from None
                self.batch_limit = size // 2
                self.runtime.log(f"out_of_memory: evaluation batch halved to {size // 2} windows")
            # Outside the handler, whose traceback still holds the tensors that did not fit.
            torch.cuda.empty_cache()

    # ---- scoring ----

    def score_round(self, item):
        """Score this rank's share of a round, with a check where its cursor was drawn."""
        size = self.config.eval_batch_seqs
        low = item.low + self.comm.rank * size
        # The last round of a chunk may leave this rank without any.
        share = self.windows[low : min(low + size, item.high)]
        checked = self.cursor in self.spots
        if share and checked:
            self.spot_check(share)
        elif share:
            self.score(share, self.observer, self.meter)
        self.spots_done += checked  # on all ranks, each of which checks its own share
        self.scored_until = self.windows[item.high - 1].end

    def score(self, windows, observer, meter):
        """Score windows before an observer and add them to a meter."""
        left = list(windows)

        def next_batch(size):
            part = left[:size]
            nll = self.batch_nll(part, size, observer)
            num_bytes = 0
            for _, first, end in part:
                num_bytes += int(self.stream.bytes[first:end].sum(dtype=np.int64))
            meter.add(part, nll.double().sum(), num_bytes)  # in float64: 62 million summands
            del left[:size]

        while left:
            # Batch by batch, so that nothing is shown to the observer twice.
            self.halving(next_batch, self.config.eval_batch_seqs)

    @torch.no_grad()
    def batch_nll(self, windows, size, observer):
        """nll of the windows' scored targets, from one forward pass of up to `size` rows."""
        starts = [window.start for window in windows]
        if self.runtime.compiling:
            # One compiled shape: the last window fills the rows that are missing.
            starts += starts[-1:] * (size - len(starts))
        length = windows[0].end - windows[0].start  # all windows of a stream are equally long
        batch = Batch(windows, *self.rows(starts, length))
        with self.runtime.autocast():
            hidden = self.states(batch)  # (B, T, D)
            if self.slot != "off":
                hidden = hidden + slot_shift(self.model, hidden, batch, self.config, self.slot)
            return scored_nll(self.model, hidden, batch, observer)

    def states(self, batch):
        """Final states (B, T, D) of a batch."""
        return self.hidden(batch.ids)

    def rows(self, starts, length):
        """ids and targets (n, length) of the rows that begin at targets `starts`."""
        at = self.runtime.to_device(starts)  # (n,)
        spans = self.tokens.unfold(0, length + 1, 1)  # a view: every span of the text
        rows = spans[at].long()  # (n, length + 1)
        return rows[:, :-1], rows[:, 1:]

    def spot_check(self, windows):
        """Score windows, and again on other tokens from some target on, which is not counted.

        Raises ConditionError unless all that came before that target is the same, bit for bit, and
        each score is the entry of a distribution.
        """
        low = windows[0].first
        high = windows[-1].end
        random = np.random.default_rng([self.spot_seed, self.cursor])
        place = int(random.integers(low, high))
        if random.random() < 0.5:
            # A window's first scored target: SLOT, for one, may know all targets before this one.
            place = windows[random.integers(len(windows))].first
        counted = Watch(self.stream, low, high, place, self.observer)
        self.score(windows, counted, self.meter)
        again = Watch(self.stream, low, high, place)
        # Target `place` is token place + 1. The tokens from there to the end of these windows are
        # replaced, and a window's length more.
        replaced = self.stream.tokens[place + 1 : high + self.config.eval_seq_len].copy()
        self.put_tokens(place + 1, other_tokens(replaced, self.config.vocab_size, random))
        self.score(windows, again, Meter(self.stream.num_targets, self.runtime.device))
        self.put_tokens(place + 1, replaced)
        if counted.fault:
            raise ConditionError(
                "C2 nll_is_entry", f"{self.label}: {counted.fault} (item {self.cursor})"
            )
        if not counted.equals(again):
            raise ConditionError(
                "C1 future_flip",
                f"{self.label}: scores of targets {low}…{place} change with tokens that come "
                f"after them (item {self.cursor}, AUDIT_SEED={self.spot_seed})",
            )

    def put_tokens(self, low, tokens):
        """Write tokens into the text from `low` on, on host and device."""
        span = slice(low, low + len(tokens))
        self.stream.tokens[span] = tokens
        self.tokens[span] = torch.from_numpy(tokens.astype(np.int32))

    # ---- test-time training ----

    def train(self, item):
        """One SGD step on rows of a chunk. Raises ConditionError unless all of it is scored."""
        length = self.config.eval_seq_len
        end = item.first + item.row_high * length
        if end > self.scored_until:
            raise ConditionError(
                "C3 trained_is_scored",
                f"targets up to {end} were to be trained on, but only those before "
                f"{self.scored_until} are scored",
            )
        rows = range(item.row_low, item.row_high)
        starts = [item.first + row * length for row in rows]
        mine = starts[self.comm.rank :: self.comm.world]  # perhaps none
        params = self.sgd.param_groups[0]["params"]

        def accumulate(part):
            # Anew: after an out-of-memory error some gradients are there already.
            for param in params:
                param.grad = None
            # A CUDA graph's gradients are gone with its next replay: it takes all rows or none.
            loss_of = self.step_loss if part >= len(mine) else self.loss
            for i in range(0, len(mine), part):
                ids, targets = self.rows(mine[i : i + part], length)
                with self.runtime.autocast():
                    loss = loss_of(ids, targets)
                share = len(ids) / len(rows)  # of the step's mean
                (loss * share).backward()

        with deterministic_algorithms():
            self.halving(accumulate, max(1, len(mine)))
            self.sgd_step(params, item.rate)

    def sgd_step(self, params, rate):
        """Step on the gradients of all ranks together, clipped by the norm of their sum."""
        if self.comm.world > 1:
            for param in params:
                if param.grad is None:  # a rank without a row adds zeros
                    param.grad = torch.zeros_like(param)
            self.comm.sum_gradients([param.grad for param in params])
        if self.config.ttt_grad_clip:
            nn.utils.clip_grad_norm_(params, self.config.ttt_grad_clip)
        self.sgd.param_groups[0]["lr"] = rate  # momentum lives on from chunk to chunk
        self.sgd.step()

    # ---- the result and the saved state ----

    def result(self):
        """The Score over all ranks. Raises ConditionError unless each target came once."""
        nats, tokens, num_bytes, _ = self.comm.gather_rows(self.meter.row()).sum(0)
        coverage = self.all_coverage()
        if not (coverage == 1).all():
            raise ConditionError(
                "C4 single_pass",
                f"targets were scored {coverage.min()}…{coverage.max()} times instead of once",
            )
        # Checked once, here: a check after every batch would make the host wait.
        if not math.isfinite(nats):
            raise ArtifactError(
                f"{self.label or 'validation'}: the score is not finite: the weights are damaged"
            )
        return Score(
            val_loss=nats / tokens,
            val_bpb=bits_per_byte(nats, num_bytes),
            tokens=int(tokens),
            bytes=int(num_bytes),
            seconds=time.monotonic() - self.started,
            legal=self.slot != "published",
            spot_checks=self.spots_done,
        )

    def all_coverage(self):
        """Number of scores of each target (num_targets,), summed over ranks."""
        total = torch.from_numpy(self.meter.coverage.copy())
        if self.comm.world > 1:
            dist.all_reduce(total)
        return total.numpy()

    def save(self, needed):
        """Write the state; every rank must call it.

        With `needed`, raises ResourceError if it cannot be written.
        """
        rows = torch.from_numpy(self.comm.gather_rows(self.meter.row()))  # each rank has its own
        coverage = torch.from_numpy(np.packbits(self.all_coverage()))
        state = None
        if self.runtime.is_main:
            state = dict(
                identity=self.identity,
                cursor=self.cursor,
                seconds=self.seconds,
                spots_done=self.spots_done,
                rows=rows,
                coverage=coverage,
            )
            if self.ttt:
                # The weights and momentum that the chunks so far have left.
                state.update(model=self.model.state_dict(), sgd=self.sgd.state_dict())
        if self.checkpoints.save(self.cursor, state):
            self.runtime.log(f"evaluation_saved {self.label} item:{self.cursor}/{len(self.work)}")
        elif needed:
            raise ResourceError(
                f"the state of {self.label} could not be written to {self.checkpoints.folder}: "
                "free space or change RUN_DIR"
            )

    def load(self):
        """Go on from a saved state of the same evaluation, if there is one."""
        if self.checkpoints is None:
            return
        cursor, state = self.checkpoints.load()
        if state is None:
            return
        # Rank 0 decides for all: a rank on another machine may find another identity.
        if not self.comm.from_main(state["identity"] == self.identity):
            self.comm.barrier()  # every rank has read it
            self.checkpoints.clear()
            self.runtime.log(
                f"warning: {self.checkpoints.path(cursor)} belongs to another evaluation; this "
                "evaluation starts at its beginning"
            )
            return
        coverage = np.unpackbits(state["coverage"].numpy(), count=self.stream.num_targets)
        self.meter.restore(state["rows"].numpy(), coverage, self.comm)
        self.cursor = state["cursor"]
        self.seconds = state["seconds"]
        self.scored_until = self.meter.last
        self.spots_done = state["spots_done"]
        if self.ttt:
            self.model.load_state_dict(state["model"])
            self.sgd.load_state_dict(state["sgd"])
        self.runtime.log(f"resumed_evaluation {self.label} item:{self.cursor}/{len(self.work)}")


def evaluate(model, stream, config, runtime, stride=None, **options):
    """Score a validation stream; EVAL_SEQ_LEN as stride means non-overlapping windows.

    The options are those of Evaluation; returns a Score.
    """
    stride = stride or config.eval_stride
    return Evaluation(model, stream, config, runtime, stride, **options).run()


class EvaluationJob(typing.NamedTuple):
    """One score that a run reports."""

    label: str  # of its log lines
    stride: int  # EVAL_SEQ_LEN: non-overlapping windows
    ttt: bool
    slot: str


def evaluation_jobs(config):
    """[EvaluationJob] of an artifact, from the weakest to the strongest: the one to report."""
    jobs = [
        EvaluationJob("final_int6_roundtrip", config.eval_seq_len, False, "off"),
        EvaluationJob("final_int6_sliding_window", config.eval_stride, False, "off"),
    ]
    adapting = []
    if config.ttt_enabled:
        adapting.append("ttt")
    if config.slot != "off":
        adapting.append(f"slot_{config.slot}")
    if adapting:
        # Labels begin with the verdict: legal_ttt, illegal_ttt_slot_published.
        if config.slot == "published":
            adapting.insert(0, "illegal")
        elif config.ttt_enabled:
            adapting.insert(0, "legal")
        label = "_".join(adapting)
        jobs.append(EvaluationJob(label, config.eval_stride, config.ttt_enabled, config.slot))
    return jobs


# ---- legality ----
# A self-test against mistakes: a patched script can have a patched audit, so a reviewer runs
# slurm/verify.py as well.

CHECKS = {
    "C1 future_flip": "no score depends on its own token or on a later one",
    "C2 nll_is_entry": "each summed nll is minus the entry of a distribution that sums to 1",
    "C3 trained_is_scored": "no target is trained on before it is scored",
    "C3 twin_run": "no state depends on a token that it has not scored",
    "C4 single_pass": "each target is scored once, from left to right",
    "C4 score": "nats and bytes, counted anew, give the score that is returned",
    "rule smear_bos": "nothing is mixed into a document from the one before it",
}
AUDITED_ROUNDS = 3  # after the first window, with test-time training after a chunk


class Recorder(Watch):
    """Watches a whole evaluation; keeps a hash of each state that scores targets up to `place`."""

    def __init__(self, stream, place):
        super().__init__(stream, 0, stream.num_targets, place)
        self.states = []  # one of each round

    def before_item(self, evaluation, item):
        if isinstance(item, TrainStep) or evaluation.windows[item.low].first > self.place:
            return
        tensors = [*evaluation.model.parameters(), *evaluation.model.buffers()]
        if evaluation.sgd is not None:
            for state in evaluation.sgd.state.values():
                # Momentum; None before the first step.
                tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        digest = hashlib.sha256()
        for tensor in tensors:
            # bfloat16 has no counterpart in NumPy, hence the bytes.
            flat = tensor.detach().cpu().contiguous().view(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        self.states.append(digest.hexdigest())


class Audit:
    """Runs the checks for every EvaluationJob; report() logs and returns them."""

    def __init__(self, model, stream, config, runtime):
        self.model = model
        self.stream = stream
        self.config = config
        self.runtime = runtime
        self.comm = runtime.comm
        self.seed = check_seed(config, stream.fingerprint["val_sha256"])
        self.random = np.random.default_rng(self.seed)  # the same on all ranks
        # Bytes of every piece, and whether a space begins it; TokenBytes has tables of its own.
        tokenizer = stream.token_bytes.model
        texts = []
        for i in range(tokenizer.vocab_size()):
            text = tokenizer.id_to_piece(i).replace("▁", " ")
            if tokenizer.is_byte(i):
                text = "?"  # any one byte
            if tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i):
                text = ""  # stands for no text
            texts.append(text)
        self.lengths = np.array([len(text.encode()) for text in texts])  # (V,)
        self.spaces = np.array([text.startswith(" ") for text in texts])  # (V,)
        self.counts = dict.fromkeys(CHECKS, 0)  # comparisons that were made
        self.failures = {name: [] for name in CHECKS}

    def note(self, check, passed, text, count=1):
        """Comparisons of a check; `text` is shown when they failed."""
        self.counts[check] += count
        if not passed:
            self.failures[check].append(text)

    def report(self):
        """[{"name", "passed", "detail"}], logged; a check passes when it passes on every rank."""
        self.runtime.log(f"legality audit_seed:{self.seed}")
        checks = []
        for name, claim in CHECKS.items():
            failures = self.failures[name]
            # Each rank sees only its own scores.
            passed = not self.comm.any_rank(failures)
            detail = f"{claim}; {self.counts[name]} comparisons"
            if failures:
                detail += f"; {len(failures)} differ: {', '.join(failures[:3])}"
            checks.append(dict(name=name, passed=passed, detail=detail))
            self.runtime.log(f"legality {name} {'pass' if passed else 'FAIL'} {detail}")
        return checks

    def count_bytes(self, tokens):
        """UTF-8 bytes of the targets tokens[1:]; a space counts unless a silent piece precedes."""
        total = 0
        for low in range(0, len(tokens) - 1, 1 << 20):  # in parts for memory's sake
            part = tokens[low : low + (1 << 20) + 1]
            uncounted = self.spaces[part[1:]] & (self.lengths[part[:-1]] == 0)
            total += int(self.lengths[part[1:]].sum() - uncounted.sum())
        return total

    def beginning(self, job):
        """The text that a job is audited on: some rounds, with test-time training a chunk before.

        One token in eight is replaced: by one without text, of one byte at most, or by any. Rare
        tokens must be treated like the rest.
        """
        config = self.config
        rounds = AUDITED_ROUNDS * config.eval_batch_seqs * self.comm.world
        targets = config.eval_seq_len + rounds * job.stride
        if job.ttt:
            targets += config.ttt_chunk_tokens
        tokens = np.array(self.stream.tokens[: targets + 1])
        pools = [np.flatnonzero(self.lengths <= limit) for limit in (0, 1, math.inf)]
        salt = [self.random.choice(pool, len(tokens)) for pool in pools]
        salt = np.choose(self.random.integers(0, len(pools), len(tokens)), salt)
        tokens = np.where(self.random.random(len(tokens)) < 1 / 8, salt, tokens)
        return self.stream.replaced(tokens.astype(np.uint16))

    def check_job(self, job):
        """Score the beginning with every round checked, and again with another text after it."""
        stream = self.beginning(job)
        # The first target after the first chunk, without test-time training after the first window.
        edge = self.config.ttt_chunk_tokens if job.ttt else self.config.eval_seq_len
        place = min(edge, stream.num_targets - 1)
        # The audit runs the same function that scores, not a copy.
        options = dict(job._asdict(), config=self.config, runtime=self.runtime, quiet=True)
        run = functools.partial(evaluate, self.model, **options)
        base = Recorder(stream, place)
        score = run(stream, observer=base, spot_checks=1.0)
        self.note("C1 future_flip", True, "", score.spot_checks)
        self.note("C2 nll_is_entry", not base.fault, f"{job.label}: {base.fault}")
        self.note("C3 trained_is_scored", True, "")
        self.note("C4 single_pass", True, "")
        nats = float(self.comm.gather_rows([base.nll.sum(dtype=np.float64)]).sum())
        num_bytes = self.count_bytes(stream.tokens)
        expected = {
            "tokens": stream.num_targets,
            "bytes": num_bytes,
            "val_loss": nats / stream.num_targets,
            "val_bpb": nats / math.log(2) / num_bytes,
        }
        for name, value in expected.items():
            found = getattr(score, name)
            same = math.isclose(found, value, rel_tol=1e-9)
            self.note("C4 score", same, f"{job.label}: {name} is {found}, not {value}")
        # Target `place` is token place + 1: it and all that follow are replaced.
        tokens = np.array(stream.tokens)
        tokens[place + 1 :] = other_tokens(tokens[place + 1 :], self.config.vocab_size, self.random)
        other = stream.replaced(tokens)
        twin = Recorder(other, place)
        run(other, observer=twin)
        where = f"{job.label}: another text from target {place} on"
        same_states = base.states == twin.states
        self.note("C3 twin_run", same_states, where)
        # With another state other scores are no wonder.
        self.note("C1 future_flip", not same_states or base.equals(twin), where)

    def check_bytes(self):
        """The bytes by which bits are divided, of the text and of every token after two others."""
        vocab = np.arange(self.config.vocab_size, dtype=np.uint16)
        after_bos_and_itself = np.stack([np.full_like(vocab, BOS), vocab, vocab], 1).flatten()
        for stream in (self.stream, self.stream.replaced(after_bos_and_itself)):
            counted = int(stream.bytes.sum(dtype=np.int64))
            expected = self.count_bytes(stream.tokens)
            text = f"a text has {counted} bytes, not {expected}"
            self.note("C4 score", counted == expected, text)

    def check_boundary(self):
        """A document's first state takes nothing from around it but the bigram's row.

        The organisers ruled on this for the smear gate (#1797); attention may cross documents.
        """
        vocab = self.config.vocab_size
        row = self.random.integers(2, vocab, 16)
        row[8] = BOS  # a new document in the middle
        other = row.copy()
        other[[7, 9]] = other_tokens(row[[7, 9]], vocab, self.random)  # its neighbours
        ids = self.runtime.to_device(np.stack([row, other]))  # (2, 16)
        bigram = self.model.bigram
        self.model.bigram = None  # its row is that of a pair of tokens
        try:
            with torch.no_grad(), self.runtime.autocast():
                states = self.model.embed(ids)  # (2, 16, D)
        finally:
            self.model.bigram = bigram
        same_before = torch.equal(states[0, :7], states[1, :7])
        same_at_bos = torch.equal(states[0, 8], states[1, 8])
        self.note("rule smear_bos", same_before and same_at_bos, "the state at a BOS")


def audit(model, stream, config, runtime):
    """[{"name", "passed", "detail"}] of CHECKS, for every score of evaluation_jobs."""
    checker = Audit(model, stream, config, runtime)
    checker.check_bytes()
    checker.check_boundary()
    for job in evaluation_jobs(config):
        try:
            checker.check_job(job)
        except ConditionError as error:
            if runtime.comm.world > 1:
                raise  # the other ranks wait in the middle of an evaluation
            checker.note(error.check, False, f"{job.label}: {error}")
    return checker.report()


# ==================================================================================================
# Quantisation
# From float weights to the artifact's bytes and back. QUANTIZER=lite rounds each row by itself and
# lowers MLPs to int5, the middle layers first, until the file fits. QUANTIZER=gptq measures the
# cost of an error (calibrate), lets roundings make up for each other, and has one dial for the
# file's size: the `step` that multiplies the steps of all matrices.
# ==================================================================================================
# ---- the grid ----


# {scheme: (numpy type of the stored values, bits)}: bits of symmetric integer codes that have a
# scale per row, 0 for all others. The artifact groups tensors in this order: like beside like
# compresses best.
SCHEMES = {
    "grid": (np.int16, 0),  # integers whose steps differ by row and column, see Grid
    "int5": (np.int8, 5),
    "int6": (np.int8, 6),
    "int8": (np.int8, 8),
    "fp16": (np.float16, 0),
    "fp32": (np.float32, 0),
}
# Last parts of the names of control scalars: few numbers that steer many, so they stay float32.
CONTROL = (
    "scale",
    "scales",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "skip_gates",
    "gate",
    "vr_lambda",
)
HALF_LIMIT = 65_536  # tensors up to this many elements stay float16, but for block matrices
# The six matrices of a block, where most of the weights are.
BLOCK_MATRIX = re.compile(r"blocks\.\d+\.(attn\.(c_[qkv]|proj)|mlp\.(fc|proj))\.weight")
# GPTQ-lite: candidates for the clip of a row, as quantiles of its absolute values.
CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)


def scheme_of(name, shape, config, int5_layers=()):
    """Name of the scheme by which QUANTIZER=lite stores a tensor.

    The MLPs of `int5_layers` take 5 bits (see fit_lite). Anything of one dimension, or more than
    two, is never rounded to integers: a row has no meaning there.
    """
    if len(shape) < 2 or name.split(".")[-1] in CONTROL:
        return "fp32"
    small = math.prod(shape) <= HALF_LIMIT and not BLOCK_MATRIX.fullmatch(name)
    if len(shape) > 2 or small:
        return "fp16"
    mlp = re.match(r"blocks\.(\d+)\.mlp\.", name)
    if mlp and int(mlp.group(1)) in int5_layers:
        return "int5"
    bits = config.block_bits if name.startswith("blocks.") else config.embed_bits
    return f"int{bits}"


def gptq_scheme_of(name, shape):
    """Name of the scheme under QUANTIZER=gptq: matrices on the grid, the rest in half precision.

    Half precision of the control scalars loses nothing that could be measured.
    """
    is_matrix = len(shape) == 2 and name.endswith(".weight")
    return "grid" if is_matrix else "fp16"


def largest_code(bits):
    """The grid is symmetric: codes lie in [-largest_code, largest_code]."""
    return 2 ** (bits - 1) - 1


def round_to_grid(weight, scale, bits):
    """Codes, still floating point, of the grid points scale * code that are nearest to `weight`."""
    top = largest_code(bits)
    return (weight / scale).round().clamp(-top, top)


# The grid of QUANTIZER=gptq: entry (i, j) of a matrix is stored as an integer times
# step * 2^(row[i] / 2) * 2^(column[j] / 2). Exponents of a finer spacing than half octaves cost
# more bytes than they save.
MAX_EXPONENT = 64
MAX_CODE = 127 * 256 + 127  # codes travel as two signed bytes


class Grid(typing.NamedTuple):
    """Two numbers of half octaves (int8) whose sum belongs to each entry of a matrix (R, C)."""

    row: np.ndarray  # (R,)
    column: np.ndarray  # (C,)


def exact_power(exponents):
    """2^(n / 2) as float32 of integers n; a table and ldexp give the same bits on every machine."""
    n = np.asarray(exponents).astype(np.int32)
    roots = np.array([1.0, 1.4142135623730951])
    return np.ldexp(roots[n & 1], n >> 1).astype(np.float32)


def grid_steps(grid, step):
    """Steps of the rows (R, 1), times the dial `step`, and of the columns (1, C)."""
    rows = exact_power(grid.row) * np.float32(step)
    return rows[:, None], exact_power(grid.column)[None, :]


def to_exponents(steps):
    """Nearest half octaves (int8) of positive steps, a float64 tensor."""
    exponents = (2 * steps.log2()).round()
    return exponents.clamp(-MAX_EXPONENT, MAX_EXPONENT).to(torch.int8).numpy()


# ---- lite ----


def clip_candidates(rows):
    """(Q, R, 1): the CLIP_QUANTILES of |row| for rows (R, C), as torch.quantile defines them.

    They lie among the few largest values, so a partial sort replaces the full one.
    """
    columns = rows.size(1)
    # Fractional places in the descending order of a row's absolute values.
    places = [(columns - 1) * (1 - quantile) for quantile in CLIP_QUANTILES]
    count = min(columns, int(max(places)) + 2)
    largest = rows.abs().topk(count, dim=1).values  # (R, count)
    clips = []
    for place in places:
        low = int(place)
        high = min(low + 1, count - 1)
        part = place - low
        clips.append(torch.lerp(largest[:, low], largest[:, high], part))
    return torch.stack(clips).unsqueeze(-1)


@torch.no_grad()
def row_scales(rows, bits):
    """float16 step (R, 1) of each row of `rows` (R, C), by GPTQ-lite; late QAT rounds by it too.

    The largest weight decides how coarse a row's grid is; clipping a few outliers makes it finer
    for all others. Each row takes the candidate that leaves the least squared error.
    """
    top = largest_code(bits)
    # The published scripts take no step below 1/top. This is coarse for small
    # weights, and makes 11 layers of 6 bits fit 16 MB.
    scales = (clip_candidates(rows) / top).clamp(min=1 / top, max=65504.0).half()  # (Q, R, 1)
    steps = scales.float()  # rounded to float16, as the artifact stores them
    rounded = round_to_grid(rows, steps, bits) * steps  # (Q, R, C)
    errors = (rounded - rows).square().sum(-1, keepdim=True)  # (Q, R, 1)
    best = errors.argmin(0, keepdim=True)  # (1, R, 1)
    return scales.gather(0, best)[0]


@torch.no_grad()
def quantize_rows(weight, bits):
    """int8 codes (R, C) and float16 scales (R, 1) of weight (R, C), one scale per row."""
    rows = weight.detach().float()
    scales = row_scales(rows, bits)
    codes = round_to_grid(rows, scales.float(), bits)
    return codes.to(torch.int8), scales


def fit_lite(
    config,
    state_dict,
    code_bytes,
    tokenizer_sha256="",
    log=lambda line: None,
    check_stop=lambda: None,
):
    """(artifact, int5 layers): as few MLPs in int5 as code + model need to fit BUDGET_BYTES.

    `check_stop` is called before each trial and may raise. Raises ArtifactError when the model does
    not fit with every MLP in int5.
    """
    # From the middle outward (5, 6, 4, 7, … of 11), as #1170 does: the ends are most sensitive.
    middle = (config.num_layers - 1) / 2
    order = sorted(range(config.num_layers), key=lambda layer: (abs(layer - middle), -layer))
    cache = {}  # encoded tensors: between two trials one layer's MLP changes
    for count in range(len(order) + 1):
        check_stop()
        layers = order[:count]
        # Only packing tells the size: compression depends on the distribution of the integers.
        blob = pack_artifact(config, state_dict, layers, tokenizer_sha256, cache)
        over = len(blob) + code_bytes - config.budget_bytes
        if over <= 0:
            return blob, layers
        if count < len(order):
            log(f"budget: {over} bytes over, MLP of layer {order[count]} to int5")
    raise ArtifactError(
        f"the artifact is {over} bytes over BUDGET_BYTES={config.budget_bytes} with every MLP in "
        f"int5 and {code_bytes} bytes of code: run the same command with CODE_BYTES at the size of "
        "the packed script (slurm/package.py), or train a smaller model (MLP_MULT, NUM_LAYERS)"
    )


# ---- calibration ----
# Rise of the loss when a matrix changes, to second order: an error E in a weight (R, C) costs
# 1/2 sum_i d_i (E H E^T)_ii nats per token. H is the second moment of the matrix's input (OBS,
# Hassibi and Stork 1993; GPTQ, arXiv 2210.17323), d_i the Fisher information of output i: its
# gradient's second moment on labels drawn from the model itself (K-FAC, arXiv 1503.05671). Only
# training text is read.

BATCH_TOKENS = 8192  # of one forward and backward pass; ranks share the passes out
UNSEEN_COUNT = 2.0  # readings that each row of an embedding is credited with


def hessian_name(module_name):
    """Name of the H of a Linear: queries, keys, values and gates read one input and share one H."""
    stem, _, leaf = module_name.rpartition(".")
    if leaf in ("c_k", "c_v", "attn_gate"):
        return f"{stem}.c_q"
    return module_name


def gram(x):
    """Sum of x x^T over tokens (C, C), float32, of x (..., C).

    Hooks run under the forward's autocast, whose bfloat16 product would not be positive definite;
    neither would TF32's, which a GPU uses for float32 products unless it is told not to.
    """
    x = x.detach().float().reshape(-1, x.size(-1))  # (tokens, C)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(x.device.type, enabled=False):
            return x.T @ x
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


@contextlib.contextmanager
def calibration_hooks(model, add):
    """Call add(name, tensor) with second moments of the real forward and backward pass.

    A Linear contributes the Gram matrix of its inputs. An embedding's input is a one-hot vector:
    its H is diagonal over rows, and the gradient of its output couples its columns. A layer that is
    visited more than once adds up all its visits.
    """

    def before_linear(source):
        return lambda module, args: add(f"hessian/{source}", gram(args[0]))

    def after_embedding(name):
        def hook(module, args, output):
            rows = torch.bincount(args[0].flatten().long(), minlength=module.num_embeddings)
            add(f"count/{name}", rows)
            output.register_hook(lambda grad: add(f"hessian/{name}", gram(grad)))

        return hook

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, Embedding):
                hooks.enter_context(module.register_forward_hook(after_embedding(name)))
            # Attention multiplies by the weights of its projections itself, in one product: they
            # are never called, and its input is theirs.
            elif isinstance(module, Attention):
                hooks.enter_context(module.register_forward_pre_hook(before_linear(f"{name}.c_q")))
            elif isinstance(module, Linear) and hessian_name(name) == name:
                hooks.enter_context(module.register_forward_pre_hook(before_linear(name)))
        yield


def calibrate_batch(model, ids, batch, runtime, add):
    """Call add(name, tensor) with the moments of batch number `batch`, token ids (B, T)."""
    # The same weights must give the same artifact on a GPU too.
    with deterministic_algorithms(), runtime.autocast():
        hidden = model.hidden(ids)  # (B, T, D)
        head_input = model.head_input(hidden)
        logits = model.head(head_input).flatten(0, 1)  # (B * T, V)
    probs = logits.detach().float().log_softmax(-1).exp()
    add("hessian/head", gram(head_input))
    # p (1 - p) is the variance of a drawn label, so the second derivative of the loss in its logit.
    add("label_variance", (probs * (1 - probs)).sum(0))
    # The Fisher information needs labels drawn from the model itself; with the data's, errors that
    # the model makes anyway would count as sensitivity. They depend on seed and batch alone.
    generator = torch.Generator().manual_seed(hash64(model.config.seed, "labels", batch) >> 1)
    height = torch.rand(len(probs), 1, generator=generator).to(probs.device)
    labels = (probs.cumsum(-1) < height).sum(-1).clamp(max=probs.size(-1) - 1)  # (B * T,)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    with deterministic_algorithms():
        loss.backward()
    for name, module in model.named_modules():
        # The labels of different tokens are independent: the square of the sum is, on average, the
        # sum of the squares.
        if isinstance(module, Linear):
            add(f"gradient/{name}", module.weight.grad.float().square().sum(1))
    model.zero_grad()


def calibrate(model, config, runtime):
    """(hessians, fisher) of all matrices of `model` from training tokens; all ranks must call it.

    hessians: {parameter: H (C, C)}, one tensor for all that read the same input. fisher:
    {parameter: d (R,)}, nats per token. Both are float64 on the CPU: the same bits each time at one
    number of ranks, the same up to the order of sums at others.
    """
    comm = runtime.comm
    length = config.train_seq_len
    stream = open_train_stream(config)
    # At least one sequence and one batch per rank: every rank must bring the same sums.
    wanted = max(comm.world, config.calibration_tokens // length)
    batch_size = max(1, min(BATCH_TOKENS // length, wanted // comm.world))
    sums = {}

    def add(name, value):
        sums[name] = sums.get(name, 0) + value.double()

    model.eval()
    with calibration_hooks(model, add):
        for batch in range(comm.rank, math.ceil(wanted / batch_size), comm.world):
            first = batch * batch_size
            numbers = range(first, min(first + batch_size, wanted))
            # Spread evenly over the training shards.
            rows = [stream.sequences(i * stream.num_sequences // wanted, 1) for i in numbers]
            ids = np.concatenate(rows)[:, :-1]  # (B, T)
            calibrate_batch(model, runtime.to_device(ids), batch, runtime, add)
    for name in sorted(sums):  # ranks must meet in the same order
        if comm.world > 1:
            comm.all_reduce(sums[name]).wait()
        sums[name] = sums[name].cpu() / (wanted * length)  # per token
    return per_matrix(model, sums, wanted * length)


def per_matrix(model, sums, tokens):
    """(hessians, fisher) as calibrate returns them, from means over `tokens` tokens."""
    hessians = {}
    fisher = {}
    for name, module in model.named_modules():
        if isinstance(module, Embedding):
            hessians[f"{name}.weight"] = sums[f"hessian/{name}"]
            # A row's share of the loss is its number of reads.
            fisher[f"{name}.weight"] = sums[f"count/{name}"] + UNSEEN_COUNT / tokens
        elif isinstance(module, Linear):
            hessian = sums[f"hessian/{hessian_name(name)}"]
            columns = module.in_features
            if columns < len(hessian):  # a gate that reads the leading channels
                hessian = hessian[:columns, :columns]
            hessians[f"{name}.weight"] = hessian
            # E |dW_i|^2 = d_i tr(H): the Kronecker factors' traces agree with the gradient's.
            fisher[f"{name}.weight"] = sums[f"gradient/{name}"] / hessian.trace().clamp(min=1e-30)
    # The tied embedding is read as input and multiplied as output; token frequencies weigh both.
    variance = sums["label_variance"]
    hessians["tok_emb.weight"] = sums["hessian/tok_emb"] + variance.sum() * sums["hessian/head"]
    fisher["tok_emb.weight"] = variance / variance.sum()
    return hessians, fisher


# ---- gptq ----
# From hessians and fisher to codes: steps that equalise the predicted loss, integers by GPTQ, and
# the search for the `step` that fills the budget. Reading needs none of this.

DAMPING = 0.03  # of the mean diagonal, added to it
ROW_TEMPER = 0.7  # exponent of the rows' Fisher information
BLOCK = 128  # columns whose updates are collected before the rest of the matrix sees them
# Nats per token, far below any measurable difference: predictions for a model that was hardly
# trained are too low, and the budget is there to be used.
FINEST_LOSS = 1e-9


def factorise(hessian, name, warn):
    """(order (C,), U (C, C)): H^-1 = U^T U of the damped H (C, C), float64, columns in `order`.

    A matrix that has none gets that of its diagonal, for which GPTQ is plain rounding; `warn` then
    gets a line that names the matrix.
    """
    diagonal = hessian.diagonal().clone()
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * diagonal.mean())
    order = diagonal.argsort(descending=True, stable=True)
    damped = damped[order][:, order]
    # With rows and columns reversed, the lower Cholesky factor is the upper one: H = R R^T.
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if failed or not lower.isfinite().all():
        warn(f"warning: the Hessian of {name} has no Cholesky factor: plain rounding instead")
        known = diagonal.nan_to_num(0, 0, 0).clamp(min=1e-12)
        order = known.argsort(descending=True, stable=True)
        return order, known[order].rsqrt().diag()
    identity = torch.eye(len(damped), dtype=damped.dtype)
    return order, torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)


def equalising_grid(weight, factor):
    """The Grid at which every entry's rounding error costs the same expected loss.

    Rounded with step s, entry (i, j) adds 1/2 d_i (s / U_jj)^2 / 12 to the loss, and s costs
    -log2(s) bits: at the least loss for a given size all s^2 d_i / U_jj^2 are equal (reverse
    water-filling, Cover and Thomas 10.3.3). So one dial serves all matrices: it is the multiplier.
    `weight` is d (R,), `factor` that of factorise.
    """
    order, upper = factor
    diagonal = upper.diagonal()
    reach = torch.empty_like(diagonal)  # (C,), U_jj in the matrix's own order
    reach[order] = diagonal
    weight = weight.double()
    mean = weight.mean().clamp(min=1e-20)
    # Rows differ a little less than their Fisher information, an estimate: measured, as is the
    # floor under rows that calibration never saw move.
    weight = mean * (weight / mean).clamp(min=2.0**-20) ** ROW_TEMPER
    level = reach.log().mean().exp()
    return Grid(to_exponents(level * weight.rsqrt()), to_exponents(reach / level))


def gptq(weight, factor, row_steps, column_steps):
    """Codes (R, C) of weight (R, C) on the grid row_steps (R, 1) * column_steps (1, C).

    Columns are rounded one after another, and each one's error is moved into the columns still to
    come, where the input's correlations let them make up for it (GPTQ, arXiv 2210.17323).
    """
    order, upper = factor
    upper = upper.to(weight.dtype)
    left = (weight / row_steps)[:, order]  # (R, C), in units of the rows' steps
    steps = column_steps[0, order]
    codes = torch.empty_like(left)
    columns = left.size(1)
    for low in range(0, columns, BLOCK):
        high = min(columns, low + BLOCK)
        errors = left.new_empty(len(left), high - low)
        for j in range(low, high):
            code = (left[:, j] / steps[j]).round().clamp(-MAX_CODE, MAX_CODE)
            error = (left[:, j] - code * steps[j]) / upper[j, j]
            # Inside the block at once, on the columns beyond it in one product.
            left[:, j + 1 : high].addr_(error, upper[j, j + 1 : high], alpha=-1)
            codes[:, j] = code
            errors[:, j - low] = error
        left[:, high:] -= errors @ upper[low:high, high:]
    return torch.empty_like(codes).index_copy_(1, order, codes)


def row_losses(error, hessian, weight):
    """Predicted loss (R,) in nats per token of an error (R, C), from H (C, C) and d (R,)."""
    return 0.5 * weight * ((error @ hessian) * error).sum(1)


def widen_overflowing_rows(weight, grid, step):
    """The Grid with larger steps for the rows of weight (R, C) whose codes would not fit."""
    rows, columns = grid_steps(grid, step)
    largest = np.abs(weight.numpy() / columns / rows).max(1)  # (R,) codes
    # Half of the range is left free: GPTQ moves weights before it rounds them.
    excess = 2 * np.log2(np.maximum(1.0, largest / (MAX_CODE / 2)))
    row = np.minimum(grid.row + np.ceil(excess), MAX_EXPONENT).astype(np.int8)
    return Grid(row, grid.column)


class Quantised(typing.NamedTuple):
    """A matrix on its grid."""

    codes: np.ndarray  # (R, C), int16
    grid: Grid
    losses: np.ndarray  # (R,), predicted, nats per token


class Quantiser:
    """All matrices of a model and their errors' costs; quantise(step) is the model at one size.

    The result depends neither on the number of threads nor on the device.
    """

    def __init__(self, state_dict, hessians, fisher, warn):
        self.hessians = hessians
        self.fisher = fisher
        # In the order of the model, which is the artifact's.
        self.weights = {
            name: tensor.detach().float().cpu()
            for name, tensor in state_dict.items()
            if name in fisher
        }
        self.parameters = sum(weight.numel() for weight in self.weights.values())
        # Matrices that read the same input share one H, which is factorised once.
        names = list({id(hessians[name]): name for name in self.weights}.values())
        factors = self.map(lambda name: factorise(hessians[name], name, warn), names)
        found = {id(hessians[name]): factor for name, factor in zip(names, factors)}
        self.factors = {name: found[id(hessians[name])] for name in self.weights}
        self.grids = {
            name: equalising_grid(fisher[name], self.factors[name]) for name in self.weights
        }

    def map(self, function, items):
        """[function(item) ...] on all cores: each item on one thread, whose sums have one order."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(pool.map(function, items))
        finally:
            torch.set_num_threads(threads)

    def quantise(self, step):
        """{name: Quantised} with all steps times `step`."""
        found = self.map(lambda name: self.quantise_matrix(name, step), self.weights)
        return dict(zip(self.weights, found))

    def quantise_matrix(self, name, step):
        """Quantised of one matrix: of each row GPTQ's codes where they beat plain rounding's."""
        weight = self.weights[name]  # (R, C)
        grid = widen_overflowing_rows(weight, self.grids[name], step)
        rows, columns = (torch.from_numpy(side) for side in grid_steps(grid, step))
        steps = rows * columns
        rounded = (weight / steps).round().clamp(-MAX_CODE, MAX_CODE)
        moved = gptq(weight, self.factors[name], rows, columns)
        hessian = self.hessians[name].to(weight.dtype)
        plain = row_losses(weight - rounded * steps, hessian, self.fisher[name])
        losses = row_losses(weight - moved * steps, hessian, self.fisher[name])
        better = losses <= plain
        codes = torch.where(better[:, None], moved, rounded).to(torch.int16)
        return Quantised(codes.numpy(), grid, torch.minimum(losses, plain).numpy())

    def finest_step(self):
        """The step below which bytes buy nothing: every code adds step^2 / 24 to the loss."""
        return math.sqrt(24 * FINEST_LOSS / self.parameters)

    def first_step(self, budget):
        """The step of about `budget` bytes if codes were Gaussian: log2(sqrt(2 pi e) rms) bits."""
        finest = self.finest_step()
        bits = -8.0 * max(0, budget)
        for name, weight in self.weights.items():
            rows, columns = grid_steps(self.grids[name], finest)
            part = slice(None, None, 8 if len(weight) >= 64 else 1)  # an eighth says enough
            row, column = code_classes(weight[part].numpy() / (rows[part] * columns))
            octaves = float(row.mean() + column.mean()) / 2
            bits += weight.numel() * (octaves + 0.5 * math.log2(2 * math.pi * math.e))
        return finest * 2 ** max(0.0, bits / self.parameters)


MAX_TRIALS = 12
BUDGET_SLACK = 0.0008  # share of the budget that may stay unused


def search_step(pack, budget, first, finest, slope, log, check_stop):
    """(blob, quantised, trials): the largest artifact within `budget` bytes.

    pack(step) gives (blob, quantised). The size is close to linear in log2(step), the octave, at
    about `slope` bytes per octave: a secant through the two trials that enclose the budget, or the
    last two while none do. No step is below `finest`, so that a model too small for the budget
    leaves some of it unused. Raises ArtifactError when MAX_TRIALS do not fit.
    """
    target = budget * (1 - BUDGET_SLACK / 2)
    lowest = math.log2(finest)
    octave = math.log2(first)
    best = None  # the largest that fits
    over = None  # (octave, size) of the coarsest trial that does not fit
    under = None  # of the finest trial that fits
    before = None  # of the last trial
    for trial in range(1, MAX_TRIALS + 1):
        check_stop()
        blob, quantised = pack(2.0**octave)
        size = len(blob)
        log(f"packing:{trial} step:{2.0**octave:.4e} bytes:{size} of {budget}")
        if size <= budget:
            under = (octave, size)
            if best is None or size > len(best[0]):
                best = (blob, quantised)
            if octave == lowest or size >= budget * (1 - BUDGET_SLACK):
                break
        else:
            over = (octave, size)
        if over and under:
            share = (over[1] - target) / (over[1] - under[1])
            octave = over[0] + min(0.9, max(0.1, share)) * (under[0] - over[0])
            continue
        if before:
            measured = (size - before[1]) / (octave - before[0])
            slope = max(2 * slope, min(slope / 4, measured))  # noise must not turn it around
        before = (octave, size)
        octave = max(lowest, octave + min(4, (target - size) / slope))
    if best is None:
        raise ArtifactError(
            f"the artifact is {size - budget} bytes over the {budget} that BUDGET_BYTES leaves "
            f"after {trial} packings with ever larger steps: train a smaller model (MLP_MULT, "
            "NUM_LAYERS)"
        )
    return *best, trial


def fit_gptq(
    config,
    state_dict,
    hessians,
    fisher,
    code_bytes,
    tokenizer_sha256="",
    log=lambda line: None,
    check_stop=lambda: None,
):
    """(artifact, size breakdown, trials) of the finest steps that fit BUDGET_BYTES beside the code.

    Deterministic: the same weights, hessians and fisher give the same bytes. `check_stop` is called
    before each trial and may raise. Raises ArtifactError when nothing fits.
    """
    quantiser = Quantiser(state_dict, hessians, fisher, log)
    budget = config.budget_bytes - code_bytes

    def pack(step):
        quantised = quantiser.quantise(step)
        return pack_grid(config, state_dict, quantised, step, tokenizer_sha256), quantised

    first, finest = quantiser.first_step(budget), quantiser.finest_step()
    slope = -quantiser.parameters / 8  # while codes are not mostly zeros
    blob, quantised, trials = search_step(pack, budget, first, finest, slope, log, check_stop)
    breakdown = size_breakdown(state_dict, quantised, len(blob))
    log_size_breakdown(breakdown, log)
    return blob, breakdown, trials


# ---- packing ----
# Plain data behind a head with a checksum: a JSON header, then the tensors' bytes, all in one
# compressed payload. zstd counts symbols over blocks of 128 KiB, so gptq sorts its codes: each row
# and column has a class, the size of its entries, and codes lie in the order of their classes' sum,
# across all matrices. A block then holds codes of one distribution.

ARTIFACT_NAME = "final_model.int6.ptz"
FLOAT_NAME = "final_model.pt"
# Like PNG's, the magic bytes show a transfer that changed line ends.
ARTIFACT_MAGIC = b"PGolf\r\n\x1a"
ARTIFACT_VERSION = 1
# magic, version, compressor, two zero bytes, raw bytes, compressed bytes, sha256 of the payload
ARTIFACT_HEAD = struct.Struct("<8sBB2xQQ32s")
COMPRESSORS = ("zstd", "lzma")
MAX_RAW_BYTES = 96 << 20  # six times the budget: no artifact of the challenge comes near
MAX_HEADER_BYTES = 1 << 20


def code_classes(codes):
    """Half octaves of the codes' root mean square by row and by column, as a Grid.

    Their sum predicts the size of an entry: two rounds of alternating means fit the product.
    """
    square = codes.astype(np.float32) ** 2 + np.float32(0.02)  # (R, C); never log2(0)
    columns = np.ones(codes.shape[1], np.float32)
    for _ in range(2):
        rows = (square / columns).mean(1)
        columns = (square / rows[:, None]).mean(0)
    halves = [np.log2(part) for part in (rows, columns)]
    return Grid(*(half.round().clip(-120, 120).astype(np.int8) for half in halves))


def coding_keys(classes):
    """The sum of row and column class of every code of every matrix, flat, int16."""
    parts = []
    for grid in classes:
        keys = grid.row.astype(np.int16)[:, None] + grid.column.astype(np.int16)  # (R, C)
        parts.append(keys.ravel())
    return np.concatenate(parts)


def grid_sections(matrices):
    """The bytes of Quantised matrices: exponents, classes, codes' low and high planes, sorted."""
    codes = np.concatenate([matrix.codes.ravel() for matrix in matrices])
    classes = [code_classes(matrix.codes) for matrix in matrices]
    codes = codes[coding_keys(classes).argsort(kind="stable")].astype(np.int32)
    low = codes.astype(np.int8)  # wraps: the signed low byte
    high = ((codes - low) >> 8).astype(np.int8)  # nearly all zeros
    sides = [
        *(matrix.grid.row for matrix in matrices),
        *(matrix.grid.column for matrix in matrices),
        *(grid.row for grid in classes),
        *(grid.column for grid in classes),
    ]
    return b"".join(part.tobytes() for part in [*sides, low, high])


def encode_tensor(tensor, scheme):
    """(bytes of the values, row-major; bytes of the float16 scales, one per row of integers)."""
    dtype, bits = SCHEMES[scheme]
    if bits:
        codes, scales = quantize_rows(tensor, bits)
        return codes.cpu().numpy().tobytes(), scales.cpu().numpy().tobytes()
    return tensor.detach().float().cpu().numpy().astype(dtype).tobytes(), b""


def tensor_table(schemes, state_dict):
    """[(name, shape, scheme)] of a state in the artifact's order, from {name: scheme}."""
    table = [(name, tuple(tensor.shape), schemes[name]) for name, tensor in state_dict.items()]
    # A stable sort: within a scheme the tensors keep the order of the model.
    order = list(SCHEMES)
    return sorted(table, key=lambda row: order.index(row[2]))


def pack_artifact(config, state_dict, int5_layers=(), tokenizer_sha256="", cache=None):
    """The artifact's bytes under QUANTIZER=lite; the MLPs of `int5_layers` are stored in 5 bits.

    All values grouped by scheme, then all scales in the same order: like bytes next to like
    compress best. `cache` (a dict) keeps encoded tensors between calls.
    """
    cache = {} if cache is None else cache
    schemes = {
        name: scheme_of(name, tensor.shape, config, int5_layers)
        for name, tensor in state_dict.items()
    }
    table = tensor_table(schemes, state_dict)
    for name, _, scheme in table:
        if (name, scheme) not in cache:
            cache[name, scheme] = encode_tensor(state_dict[name], scheme)
    values, scales = zip(*(cache[name, scheme] for name, _, scheme in table))
    return seal(config, table, [*values, *scales], tokenizer_sha256)


def pack_grid(config, state_dict, quantised, step, tokenizer_sha256=""):
    """The artifact's bytes under QUANTIZER=gptq, of {name: Quantised} and the state's other
    tensors."""
    schemes = {name: gptq_scheme_of(name, tensor.shape) for name, tensor in state_dict.items()}
    table = tensor_table(schemes, state_dict)
    on_grid = [quantised[name] for name, _, scheme in table if scheme == "grid"]
    others = [
        encode_tensor(state_dict[name], scheme)[0] for name, _, scheme in table if scheme != "grid"
    ]
    data = [grid_sections(on_grid), *others]
    return seal(config, table, data, tokenizer_sha256, step=step)


def seal(config, table, data, tokenizer_sha256, **entries):
    """Head, then the compressed payload: JSON header with `entries`, and `data`, byte strings."""
    header = dict(
        config=config.as_dict("arch", "eval"),
        tokenizer_sha256=tokenizer_sha256,
        tensors=table,
        **entries,
    )
    text = json.dumps(header).encode()
    raw = b"".join([struct.pack("<I", len(text)), text, *data])
    if len(raw) > MAX_RAW_BYTES:
        raise ArtifactError(
            f"the model is {len(raw)} bytes before compression, no reader takes more than "
            f"{MAX_RAW_BYTES}: train a smaller model (MLP_MULT, NUM_LAYERS)"
        )
    body = compress(config, raw)
    compressor = COMPRESSORS.index(config.artifact_compressor)
    digest = hashlib.sha256(body).digest()
    head = (ARTIFACT_MAGIC, ARTIFACT_VERSION, compressor, len(raw), len(body), digest)
    return ARTIFACT_HEAD.pack(*head) + body


def compress(config, raw):
    """The bytes, compressed as QUANTIZER and COMPRESSOR say."""
    if config.quantizer == "gptq":
        # Codes hardly ever repeat, so the search for matches is kept as small as zstd allows: a
        # tenth of the time. Level 22 is kept for its choice of block ends, and with them of symbol
        # tables; at lower levels the size jumps about when a step moves.
        parameters = zstandard.ZstdCompressionParameters.from_level(
            22,
            source_size=len(raw),
            min_match=6,
            search_log=1,
            hash_log=6,
            chain_log=6,
        )
        return zstandard.ZstdCompressor(compression_params=parameters).compress(raw)
    if config.compressor == "zstd":
        return zstandard.ZstdCompressor(level=config.zstd_level).compress(raw)
    return lzma.compress(raw, preset=6)


def code_bits(codes, keys):
    """Bits (n,) of each code by the entropy of its class; zstd comes within a few percent."""
    bits = np.empty(len(codes), np.float32)
    for key in np.unique(keys):
        mine = np.flatnonzero(keys == key)
        _, inverse, counts = np.unique(codes[mine], return_inverse=True, return_counts=True)
        bits[mine] = (np.log2(len(mine)) - np.log2(counts))[inverse]
    return bits


def size_breakdown(state_dict, quantised, artifact_bytes):
    """[dict(group, parameters, bytes, loss)]: where an artifact's bytes went, its predicted loss.

    zstd codes all matrices together: each gets its share of their bytes by the entropy of its
    codes. The bytes of all groups add up to the artifact's.
    """
    matrices = list(quantised.values())
    codes = np.concatenate([matrix.codes.ravel() for matrix in matrices])
    bits = code_bits(codes, coding_keys([code_classes(matrix.codes) for matrix in matrices]))
    others = [tensor for name, tensor in state_dict.items() if name not in quantised]
    halves = b"".join(encode_tensor(tensor, "fp16")[0] for tensor in others)
    rest = dict(
        group="half precision",
        parameters=sum(tensor.numel() for tensor in others),
        bytes=len(zstandard.ZstdCompressor().compress(halves)),
        loss=0.0,
    )
    scale = (artifact_bytes - rest["bytes"]) / max(1.0, float(bits.sum(dtype=np.float64)))
    groups = {}
    ends = np.cumsum([matrix.codes.size for matrix in matrices])
    for name, matrix, part in zip(quantised, matrices, np.split(bits, ends[:-1])):
        label, *inner = name.split(".")
        if label == "blocks":
            label = f"blocks {inner[1]} {'out' if inner[2] == 'proj' else 'in'}"
        group = groups.setdefault(label, dict(group=label, parameters=0, bytes=0.0, loss=0.0))
        group["parameters"] += part.size
        group["bytes"] += scale * float(part.sum(dtype=np.float64))
        group["loss"] += float(matrix.losses.sum())
    return [*groups.values(), rest]


def log_size_breakdown(groups, log):
    """The size breakdown as a table, its lines aligned."""
    totals = {key: sum(group[key] for group in groups) for key in ("parameters", "bytes", "loss")}
    total_loss = max(1e-30, totals["loss"])
    log(
        f"size_breakdown {'group':24} {'parameters':>11} {'bits each':>9} {'bytes':>10} "
        f"{'loss share':>10}"
    )
    for group in [*groups, dict(totals, group="all")]:
        bits = 8 * group["bytes"] / max(1, group["parameters"])
        log(
            f"size_breakdown {group['group']:24} {group['parameters']:11d} {bits:9.3f} "
            f"{group['bytes']:10.0f} {group['loss'] / total_loss:10.1%}"
        )
    log(f"predicted_loss:{total_loss:.3g} nats per token from quantisation")


# ---- reading ----
# Refused: a wrong head (magic bytes, version, compressor, reserved bytes, lengths) or checksum; a
# frame whose size is not the head's promise, or above MAX_RAW_BYTES; a header with missing or
# unknown entries or settings, or with tensors (a name twice, another shape) that are not exactly
# the architecture's; data of another length than these need. Nothing is unpickled, no code of the
# file runs. load_float_weights refuses the same in a float checkpoint.


def decompress(body, compressor, size):
    """Exactly `size` bytes, or ArtifactError; never allocates more than that."""
    raw = b""
    whole = True
    try:
        if compressor == "lzma":
            # One byte more than promised is enough to see that the promise is wrong.
            unpacker = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=128 << 20)
            raw = unpacker.decompress(body, max_length=size + 1)
            whole = unpacker.eof and not unpacker.unused_data
        # zstd allocates the size that the frame declares, so that size is compared first.
        elif zstandard.frame_content_size(body) == size:
            unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 27)
            raw = unpacker.decompress(body, allow_extra_data=False)
    except (zstandard.ZstdError, lzma.LZMAError, MemoryError) as error:
        raise ArtifactError(f"artifact: the payload does not decompress ({error})") from None
    if not whole or len(raw) != size:
        raise ArtifactError(f"artifact: the payload is not the {size} bytes that its head promises")
    return raw


def open_payload(blob):
    """The decompressed payload of an artifact's bytes, after every check of its head."""
    if len(blob) < ARTIFACT_HEAD.size:
        raise ArtifactError(
            f"artifact: {len(blob)} bytes are less than its head: truncated or not an artifact"
        )
    # Cheap checks first; the checksum comes before anything of the payload is interpreted.
    magic, version, compressor, raw_size, size, digest = ARTIFACT_HEAD.unpack_from(blob)
    body = memoryview(blob)[ARTIFACT_HEAD.size :]
    wrong_size = (
        f"{len(body)} bytes of payload, its head promises {size}: truncated or trailing bytes"
    )
    for holds, wrong in [
        (magic == ARTIFACT_MAGIC, "magic bytes are not ours: not an artifact"),
        (version == ARTIFACT_VERSION, f"version {version} is not {ARTIFACT_VERSION}"),
        (compressor < len(COMPRESSORS), f"compressor {compressor} is unknown"),
        (blob[10:12] == b"\0\0", "reserved bytes are not zero"),
        (size == len(body) <= MAX_RAW_BYTES, wrong_size),
        (4 <= raw_size <= MAX_RAW_BYTES, f"raw size {raw_size} is outside 4…{MAX_RAW_BYTES}"),
        (hashlib.sha256(body).digest() == digest, "checksum does not match: damaged"),
    ]:
        if not holds:
            raise ArtifactError(f"artifact: {wrong}")
    return decompress(body, COMPRESSORS[compressor], raw_size)


def config_from_file(settings):
    """The Config of a file's {name: value}: all of "arch" and "eval", and nothing else."""
    names = Config.names("arch", "eval")
    # DTYPE belongs to the machine: a file may have it or not.
    unknown = (set(settings) ^ set(names)) - {"dtype"}
    if unknown:
        raise ConfigError(f"settings are missing or unknown: {sorted(unknown)[:5]}")
    return Config(**{name: settings[name] for name in names})


def check_shapes(config, found):
    """{name: shape} of the architecture. Raises ArtifactError unless `found` is the same."""
    with torch.device("meta"):  # allocates none of them
        state = GPT(config).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != expected:
        wrong = sorted(map(ascii, set(found.items()) ^ set(expected.items())))[:3]
        raise ArtifactError(f"artifact: tensors differ from the architecture's: {'; '.join(wrong)}")
    return expected


def read_grid_sections(raw, shapes, step):
    """Float32 matrices of `shapes` from the bytes, as int8, that grid_sections wrote."""
    count = len(shapes)
    lengths = [rows for rows, _ in shapes] + [columns for _, columns in shapes]
    *sides, planes = np.split(raw, np.cumsum(2 * lengths))
    grids = map(Grid, sides[:count], sides[count : 2 * count])
    classes = map(Grid, sides[2 * count : 3 * count], sides[3 * count :])
    low, high = planes.reshape(2, -1)
    codes = np.empty(len(low), np.float32)
    codes[coding_keys(classes).argsort(kind="stable")] = low + 256 * high.astype(np.float32)
    matrices = []
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    for shape, grid, part in zip(shapes, grids, np.split(codes, ends[:-1])):
        rows, columns = grid_steps(grid, step)
        matrices.append(part.reshape(shape) * rows * columns)
    return matrices


def read_payload(raw):
    """The values of read_artifact from a decompressed payload; a wrong one may raise anything."""
    (header_bytes,) = struct.unpack_from("<I", raw)
    start = 4 + header_bytes
    if start > min(MAX_HEADER_BYTES, len(raw)):
        raise ArtifactError(f"artifact: header of {header_bytes} bytes does not fit")
    header = json.loads(raw[4:start])
    config = config_from_file(header["config"])
    schemes = {name: scheme for name, _, scheme in header["tensors"]}
    on_grid = [name for name in schemes if schemes[name] == "grid"]
    dial = {"step"} if on_grid else set()  # only QUANTIZER=gptq writes this entry
    if header.keys() != {"config", "tokenizer_sha256", "tensors"} | dial:
        raise ConfigError("entries are missing or unknown")
    tokenizer_sha256 = header["tokenizer_sha256"]
    if not re.fullmatch(r"([0-9a-f]{64})?", tokenizer_sha256):
        raise ConfigError("tokenizer_sha256 is neither 64 hexadecimal digits nor empty")
    found = {name: tuple(shape) for name, shape, _ in header["tensors"] if type(shape) is list}
    if len(found) != len(header["tensors"]):
        raise ArtifactError("artifact: a tensor appears twice, or has no list as its shape")
    # The shapes' own integers from here on: 16.0 and True equal integers, too.
    shapes = check_shapes(config, found)
    at = start

    def take(dtype, count):
        nonlocal at
        part = np.frombuffer(raw, dtype, count, at)
        at += part.nbytes
        return part

    # Views alone, until the length has proved right.
    others = [name for name in schemes if schemes[name] != "grid"]
    grid_shapes = [shapes[name] for name in on_grid]
    sections = take(np.int8, sum(2 * (sum(shape) + math.prod(shape)) for shape in grid_shapes))
    values = [take(SCHEMES[schemes[name]][0], math.prod(shapes[name])) for name in others]
    with_scales = [name for name in others if SCHEMES[schemes[name]][1]]
    scales = {name: take(np.float16, math.prod(shapes[name][:-1])) for name in with_scales}
    # Exactly: a payload with room to spare could hide something else.
    if at != len(raw):
        raise ArtifactError(
            f"artifact: tensors need {at - start} bytes, {len(raw) - start} are there"
        )
    state = {}
    if on_grid:
        matrices = read_grid_sections(sections, grid_shapes, float(header["step"]))
        state = {name: torch.from_numpy(matrix) for name, matrix in zip(on_grid, matrices)}
    for name, part in zip(others, values):
        tensor = part.astype(np.float32)
        if name in scales:
            rows = scales[name].astype(np.float32)[:, None]
            tensor = tensor.reshape(len(rows), -1) * rows
        state[name] = torch.from_numpy(tensor.reshape(shapes[name]))
    return config, state, tokenizer_sha256


def read_artifact(blob):
    """(Config, float32 state_dict, tokenizer's SHA-256 or "") of an artifact's bytes.

    The Config has the architecture and evaluation settings; the rest are defaults. Raises
    ArtifactError for anything that is wrong. Weights that are not finite are found by their score.
    """
    raw = open_payload(blob)
    try:
        return read_payload(raw)
    except ArtifactError:
        raise
    except Exception as error:  # a stranger's file may hold anything, escape sequences included
        what = f"{type(error).__name__}: {printable(error, 200)}"
        raise ArtifactError(f"artifact: its header is not valid ({what})") from None


def unpack_artifact(blob):
    """(Config, float32 state_dict) of an artifact's bytes. Raises ArtifactError."""
    return read_artifact(blob)[:2]


class LoadedWeights(typing.NamedTuple):
    """A file of final weights; read once per run."""

    config: Config  # architecture and evaluation settings; the rest are defaults
    state_dict: dict  # float32 tensors by name
    tokenizer_sha256: str  # of the tokenizer it was trained with, or "" if the file does not say
    info: dict  # measurements of training (float checkpoints only)
    sha256: str  # of the file

    def from_artifact(self):
        """Settings that the file gives a run that only evaluates it, the audit included."""
        settings = self.config.as_dict("arch", "eval")
        return {**settings, "run_id": f"eval_{self.sha256[:8]}", "audit": True}


def load_weights(path):
    """LoadedWeights of an artifact (*.ptz) or a float checkpoint (*.pt). Raises ArtifactError."""
    try:
        with open(path, "rb") as file:
            blob = file.read(len(ARTIFACT_MAGIC))
            if blob == ARTIFACT_MAGIC:
                # No more than an artifact may have: a sparse file may claim any size.
                blob += file.read(ARTIFACT_HEAD.size + MAX_RAW_BYTES)
    except OSError as error:
        raise ArtifactError(
            f"{path}: {error.strerror}: name a readable artifact (*.ptz) or float checkpoint (*.pt)"
        ) from None
    if not blob.startswith(ARTIFACT_MAGIC):
        return load_float_weights(path)
    try:
        return LoadedWeights(*read_artifact(blob), {}, hashlib.sha256(blob).hexdigest())
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}: copy it again, or name another file") from None


def load_float_weights(path):
    """LoadedWeights of a run's float checkpoint (*.pt). Raises ArtifactError."""
    if not str(path).endswith(".pt"):
        raise ArtifactError(
            f"{path}: does not start like an artifact: damaged, or of another submission: "
            "copy it again, or name another file"
        )
    saved = load_tensors(path)
    try:
        if not isinstance(saved, dict):
            raise TypeError("no dictionary")
        config = config_from_file(saved["config"])
        state = saved["state_dict"]
        if any(tensor.dtype != torch.float32 for tensor in state.values()):
            raise TypeError("a tensor is not float32")
        check_shapes(config, {name: tuple(tensor.shape) for name, tensor in state.items()})
        return LoadedWeights(config, state, "", dict(saved["info"]), sha256_file(path))
    except Exception as error:  # a stranger's file may hold anything, escape sequences included
        raise ArtifactError(
            f"{path}: not the final weights of a run ({type(error).__name__}: "
            f"{printable(error, 200)}): name {FLOAT_NAME} or {ARTIFACT_NAME}"
        ) from None


# ==================================================================================================
# main
# A run is a list of phases, each of which leaves a file: a rerun does the missing phases and logs
# the others. Only rank 0 reads and writes RUN_DIR's records; the other ranks follow its decisions.
# ==================================================================================================
class Run:
    """The phases of one run in RUN_DIR."""

    def __init__(self, config, runtime, loaded=None):
        self.config = config
        self.runtime = runtime
        self.log = runtime.log
        self.path = Path(config.run_dir)
        self.float_path = self.path / FLOAT_NAME
        self.artifact_path = Path(config.eval_only or self.path / ARTIFACT_NAME)
        # LoadedWeights by path: a file is read and decompressed once, however many scores it gets.
        self.files = {}
        if loaded is not None:
            self.files[self.artifact_path] = loaded
        self.dtype = str(runtime.dtype).removeprefix("torch.")
        self.model = None
        self.audited = False
        self.results = {"scores": {}}

    def run(self):
        """Run all phases that are configured and missing."""
        config = self.config
        self.prepare()
        if not config.eval_only and config.mode == "train":
            self.train()
            self.pack()
        if config.audit or config.mode == "audit":
            self.audit()
        if config.mode == "train":
            self.score()

    def load(self, path):
        """LoadedWeights of a file."""
        if path not in self.files:
            self.files[path] = load_weights(path)
        return self.files[path]

    def model_of(self, path):
        """The model with the weights of a file; one object for all scores: compiled once."""
        if self.model is None:
            # Late QAT rounds in training only: a file's weights are scored unchanged.
            settings = dataclasses.replace(self.config, late_qat_threshold=0.0)
            self.model = build_model(settings, self.runtime)
        self.model.load_state_dict(self.load(path).state_dict)
        return self.model

    def on_main(self, condition):
        """Rank 0's `condition` on every rank: only rank 0 is sure to see files it wrote."""
        return self.runtime.comm.from_main(bool(condition)) > 0

    def already_done(self, phase, condition):
        """Rank 0's `condition`, that a phase has left its result, which is then logged."""
        done = self.on_main(condition)
        if done:
            self.log(f"phase_done:{phase} found in {self.path}")
        return done

    # ---- before the first phase ----

    def prepare(self):
        """Load the data, compare with the run in RUN_DIR, write config.json and manifest.json."""
        config = self.config
        if config.mode == "train" and not config.eval_only:
            self.warn_of_slow_device()
        if config.preset == "demo" and config.data_path == PRESETS["demo"]["data_path"]:
            if self.runtime.is_main:
                build_demo_data(config, self.log)
            self.runtime.comm.barrier()
        # An artifact names its tokenizer: with another one its token ids would mean other text.
        expected_sha256 = ""
        if config.eval_only:
            expected_sha256 = self.load(self.artifact_path).tokenizer_sha256
        else:
            find_shards(config, "train")  # fails now rather than after the validation text is read
        token_bytes = load_token_bytes(config, expected_sha256)
        self.tokenizer_sha256 = sha256_file(config.tokenizer_path)
        self.val = ValidationSet.load(config, token_bytes)
        self.identity = self.identify()
        if self.runtime.is_main:
            self.claim_directory()
        self.write_manifest()
        self.announce()
        if config.eval_only:
            self.check_budget()

    def warn_of_slow_device(self):
        """Log a warning if this CPU would train for more than a day."""
        config = self.config
        if self.runtime.device.type != "cpu":
            return
        with torch.device("meta"):
            flops = flops_per_token(GPT(config)) * config.train_batch_tokens * config.iterations
        matrix = torch.ones(1024, 1024)
        begin = time.monotonic()
        for _ in range(3):
            matrix @ matrix
        rate = 3 * 2 * 1024**3 / (time.monotonic() - begin) * self.runtime.comm.world
        days = flops / (0.3 * rate) / 86400  # a step reaches about a third of a product's rate
        if days > 1:
            found = "DEVICE=cpu" if config.device == "cpu" else "no GPU found"
            if config.device != "cpu" and Path("/dev/nvidia0").exists():
                found = f"PyTorch {torch.__version__} cannot use the GPU"
            self.log(
                f"warning: {found}: {config.preset} on this CPU would take about {days:.0f} days; "
                "PRESET=demo runs here"
            )

    def identify(self):
        """{"training", "packing", "evaluation": {name: value}} that a RUN_DIR belongs to.

        A phase depends on its own part and on those before it. The evaluation of a given file knows
        nothing of the file's training and packing but the digest of the file.
        """
        config = self.config
        training = {"train_gpt.py": sha256_file(CODE_PATH)}  # other code may do otherwise
        packing = {"tokenizer": self.tokenizer_sha256}
        evaluation = dict(config.as_dict("eval"), dtype=self.dtype)
        evaluation["validation text"] = self.val.fingerprint["val_sha256"]
        evaluation["file that is scored"] = "the run's own"
        if config.eval_only:
            evaluation["file that is scored"] = self.load(self.artifact_path).sha256
        else:
            training.update(config.as_dict("arch", "train"), dtype=self.dtype)
            training["training tokens"] = open_train_stream(config).num_tokens
            packing.update(config.as_dict("pack"))
            if config.late_qat_threshold:  # training then rounds to these bits
                for name in ("block_bits", "embed_bits"):
                    training[name] = packing.pop(name)
        return dict(training=training, packing=packing, evaluation=evaluation)

    def claim_directory(self):
        """Write config.json; go on with the scores of the run in RUN_DIR, if it is this one.

        Other settings of packing alone pack the run's float weights again. Raises ConfigError when
        RUN_DIR holds another run.
        """
        config = self.config
        path = self.path / "config.json"
        old = read_json(path) if path.exists() else None
        # The evaluation of a given file is a check of the file and takes up no earlier score, so
        # the earlier check may be of another file. A training run is never overwritten.
        if old is not None and not (config.eval_only and old["config"].get("eval_only")):
            self.compare_with(old)
            with contextlib.suppress(FileNotFoundError):
                self.results = read_json(self.path / "scores.json")
        record = dict(
            preset=config.preset,
            hash=config.hash(),
            identity=self.identity,
            config=config.as_dict(),
            kinds={field.name: field.metadata["kind"] for field in dataclasses.fields(config)},
            differs=config.differences(),
        )
        write_json(path, record)
        (self.path / "STOPPED").unlink(missing_ok=True)  # from here on this run goes on

    def compare_with(self, old):
        """Raise ConfigError if `old`, a config.json, is another run's; delete an old packing."""
        config = self.config
        changed = {}  # by part of the identity: {name: "NAME: old -> new"}
        for part, values in self.identity.items():
            before = old.get("identity", {}).get(part, {})
            changed[part] = {
                name: f"{name.upper() if hasattr(config, name) else name}: "
                f"{before.get(name)!r} -> {value!r}"
                for name, value in values.items()
                if before.get(name) != value
            }
        differences = {name: text for part in changed.values() for name, text in part.items()}
        if not differences:
            return
        repacks = changed["packing"] and not changed["training"]
        repacks = repacks and config.mode == "train" and not config.eval_only
        if config.max_wallclock_seconds and not self.float_path.exists():
            # The reserve of gptq changes the training that is still to be done.
            repacks = repacks and "quantizer" not in changed["packing"]
        if not repacks:
            before = old.get("identity", {}).get("evaluation", {}).get("dtype")
            same = f"set DTYPE={before}" if "dtype" in differences else "use the same"
            raise ConfigError(
                f"{self.path} holds a run of other settings, data or code: "
                f"{'; '.join(differences.values())}: {same} to resume it, or set another RUN_ID"
            )
        # Scores go first: a kill must not leave them beside another artifact.
        stale = [self.path / name for name in ("scores.json", "audit.json", ARTIFACT_NAME)]
        for path in [*stale, *(self.path / "checkpoint").glob("eval_*.pt")]:
            path.unlink(missing_ok=True)
        self.log(
            f"packing_changed {'; '.join(differences.values())}: artifact, audit and scores are "
            "made anew, from the same float weights"
        )

    def announce(self):
        """Log the configuration and the data in the lines that other tools parse (REFERENCE, 9)."""
        config = self.config
        log = self.log
        differs = config.differences()
        # An artifact does not carry its training settings: the values set here are not its own.
        kinds = ("arch", "eval", "run") if config.eval_only else ()
        for name, value in config.as_dict(*kinds).items():
            mark = " *" if name in differs else ""
            log(f"config:{name}={value}{mark}")
        if not config.eval_only:
            log(f"config_hash:{config.hash()}")
        log(f"evaluation_hash:{config.hash('arch', 'eval')}")
        log(f"dtype:{self.dtype} ({self.runtime.dtype_reason})")
        log(f"attention:{self.runtime.attention.reason}")
        log(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={config.tokenizer_path}")
        split = self.val.fingerprint
        pattern = f"{config.data_path}/fineweb_val_*.bin"
        log(f"val_loader:shards pattern={pattern} tokens:{split['val_targets']}")
        log(
            f"data_fingerprint tokens:{split['val_tokens']} targets:{split['val_targets']} "
            f"bytes:{split['val_bytes']} bytes_per_token:{split['bytes_per_token']:.4f} "
            f"documents:{split['val_documents']} sha256:{split['val_sha256']} "
            f"score_scope:{split['scope']}"
        )
        stray = [name for name in list_data(config) if not SHARD_NAME.fullmatch(name)]
        if stray:
            log(f"warning: not shards, not read: {', '.join(stray)} in {config.data_path}")
        for warning in self.val.warnings(config):
            log(warning)
        log(f"seed:{config.seed}")
        steps = Checkpointer(self.runtime, "step", 0).numbers()
        self.runtime.event("start", resumed_step=max(steps, default=0))

    def write_manifest(self):
        """Write manifest.json: versions, machine and hashes, to trace a score to its files."""
        if not self.runtime.is_main:
            return
        config = self.config
        # Before packing there is no artifact; the manifest is written again after it.
        packed = self.artifact_path.exists()
        shards = [name for name in list_data(config) if SHARD_NAME.fullmatch(name)]
        train_shards = [name for name in shards if name.startswith("fineweb_train_")]
        manifest = dict(
            python=platform.python_version(),
            torch=torch.__version__,
            numpy=np.__version__,
            sentencepiece=sentencepiece.__version__,
            zstandard=zstandard.__version__,
            device=str(self.runtime.device),
            device_name=device_name(self.runtime.device),
            world_size=self.runtime.comm.world,
            torch_threads=torch.get_num_threads(),
            dtype=self.dtype,
            config_hash=config.hash(),
            code_sha256=self.identity["training"]["train_gpt.py"],
            code_bytes=CODE_PATH.stat().st_size,
            artifact_sha256=self.load(self.artifact_path).sha256 if packed else None,
            artifact_bytes=self.artifact_path.stat().st_size if packed else None,
            tokenizer_sha256=self.tokenizer_sha256,
            data=dict(train_shards=len(train_shards), **self.val.fingerprint),
        )
        self.log(f"manifest:{json.dumps(manifest)}")
        write_json(self.path / "manifest.json", manifest)

    # ---- the phases ----

    def train(self):
        """Write the float weights, unless they are there."""
        config = self.config
        if self.already_done("train", self.float_path.exists()):
            return
        if config.quantizer == "gptq" and config.max_wallclock_seconds:
            self.log(
                f"gptq_reserve: {config.gptq_reserve_seconds:g}s of MAX_WALLCLOCK_SECONDS="
                f"{config.max_wallclock_seconds:g} stay free for calibration and packing; 12 s is "
                "the published value on 8xH100"
            )
        train(config, self.runtime, self.val, self.float_path, self.identity["training"])

    def pack(self):
        """Quantise, fit the budget, write the artifact, log the sizes."""
        if self.already_done("pack", self.artifact_path.exists()):
            return
        self.runtime.stop_if_wanted("packing")
        begin = time.monotonic()
        statistics = None
        if self.config.quantizer == "gptq":  # all ranks calibrate
            model = self.model_of(self.float_path)
            statistics = calibrate(model, self.config, self.runtime)
        stopped = False
        if self.runtime.is_main:
            try:
                self.pack_on_main(statistics, begin)
            except Stopped:
                stopped = True
        # The others wait here, and stop with rank 0.
        if self.on_main(stopped):
            raise Stopped("in packing")
        self.write_manifest()

    def pack_on_main(self, statistics, begin):
        """Write the artifact; packing is deterministic, so one rank does it for all.

        `statistics` are the hessians and the Fisher information of QUANTIZER=gptq, None for lite;
        `begin` is when their calibration began. Raises Stopped between two trials.
        """
        config = self.config
        weights = self.load(self.float_path)
        code_bytes = self.code_bytes()

        def check_stop():
            if self.runtime.stop.wanted():
                raise Stopped("in packing")

        options = dict(tokenizer_sha256=self.tokenizer_sha256, log=self.log, check_stop=check_stop)
        if config.quantizer == "lite":
            blob, layers = fit_lite(config, weights.state_dict, code_bytes, **options)
            facts = dict(int5_layers=layers)
        else:
            calibrated = time.monotonic() - begin
            self.log(f"calibrated tokens:{config.calibration_tokens} seconds:{calibrated:.1f}")
            blob, breakdown, trials = fit_gptq(
                config, weights.state_dict, *statistics, code_bytes, **options
            )
            seconds = time.monotonic() - begin
            total = weights.info.get("train_time_s", 0.0) + seconds  # packing counts as training
            self.log(
                f"quantised packings:{trials} seconds:{seconds:.1f} with_training:{total:.1f}s"
            )
            if 0 < config.max_wallclock_seconds < total:
                self.log(
                    f"warning: training and packing took {total:.1f} s, more than "
                    f"MAX_WALLCLOCK_SECONDS={config.max_wallclock_seconds:g}: raise "
                    f"GPTQ_RESERVE_SECONDS={config.gptq_reserve_seconds:g}"
                )
            facts = dict(
                packings=trials,
                calibration_seconds=calibrated,
                quantiser_seconds=seconds,
                with_training_seconds=total,
                size_breakdown=breakdown,
            )
        write_atomic(self.artifact_path, [blob])
        self.log_sizes(len(blob), code_bytes, config.artifact_compressor)
        self.runtime.event("packed", artifact_bytes=len(blob), code_bytes=code_bytes, **facts)

    def code_bytes(self):
        """Bytes of code that the artifact must share BUDGET_BYTES with."""
        return self.config.code_bytes or CODE_PATH.stat().st_size

    def log_sizes(self, artifact_bytes, code_bytes, compressor):
        """Log the three lines of the challenge's logs, and the rest of the budget."""
        total = artifact_bytes + code_bytes
        # "int6" is the name that the field's logs use, whatever the bits of a tensor.
        self.log(f"Code size: {code_bytes} bytes")
        self.log(f"Serialized model int6+{compressor}: {artifact_bytes} bytes")
        self.log(f"Total submission size int6+{compressor}: {total} bytes")
        self.log(f"headroom: {self.config.budget_bytes - total} bytes")

    def check_budget(self):
        """Log the sizes; raise ArtifactError unless the scored file and this very script fit."""
        if self.artifact_path.suffix == ".pt":
            return  # float weights are no submission
        with open(self.artifact_path, "rb") as file:
            head = ARTIFACT_HEAD.unpack(file.read(ARTIFACT_HEAD.size))
        artifact_bytes = self.artifact_path.stat().st_size
        # The code that runs, not CODE_BYTES: a promise of the author's is no measurement.
        code_bytes = CODE_PATH.stat().st_size
        # An evaluation has no packing settings: the file's head names the compressor.
        self.log_sizes(artifact_bytes, code_bytes, COMPRESSORS[head[2]])
        over = artifact_bytes + code_bytes - self.config.budget_bytes
        if over > 0:
            raise ArtifactError(
                f"{self.artifact_path}: {artifact_bytes} bytes and {code_bytes} bytes of code are "
                f"{over} more than BUDGET_BYTES={self.config.budget_bytes}: score it with the "
                "script it was submitted with, or raise BUDGET_BYTES to look at it all the same"
            )

    def evaluation_key(self, path):
        """The digest that an audit or a cut-off evaluation of a file must agree on to be used."""
        text = json.dumps([self.load(path).sha256, self.identity], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def audit(self):
        """Write audit.json; raises LegalityError when a check fails."""
        config = self.config
        path = self.path / "audit.json"
        begin = time.monotonic()
        if not self.on_main(self.artifact_path.exists()):
            raise ConfigError(
                f"MODE=audit: {self.artifact_path} does not exist: set EVAL_ONLY=path"
            )
        key = self.evaluation_key(self.artifact_path)
        passed_before = False
        # A given file is audited anew each time, and so is a run with MODE=audit.
        if path.exists() and config.mode == "train" and not config.eval_only:
            old = read_json(path)
            passed_before = old.get("key") == key and old["passed"]
        self.audited = True  # below, a failure raises
        # Scores of an earlier start of this run are of the same file, script and settings.
        for label, score in self.results["scores"].items():
            score["audited"] = self.is_submission(label)
        if self.already_done("audit", passed_before):
            return
        self.runtime.stop_if_wanted("the audit", 30)
        # The audit tests the written file: the weights come from it, through its reader.
        checks = audit(self.model_of(self.artifact_path), self.val, config, self.runtime)
        failed = [check["name"] for check in checks if not check["passed"]]
        seconds = time.monotonic() - begin
        if self.runtime.is_main:
            write_json(path, dict(passed=not failed, key=key, seconds=seconds, checks=checks))
        self.runtime.event("audit", passed=not failed)
        verdict = "FAIL" if failed else "pass"
        self.log(f"audit {verdict} {len(checks)} checks in {seconds:.1f} s")
        if failed:
            raise LegalityError(f"the audit failed: {', '.join(failed)}: the score is not legal")

    def score(self):
        """Compute every score that is configured and missing, from the files that were written."""
        config = self.config
        for job in self.jobs():
            scored = self.already_done(job.label, job.label in self.results["scores"])
            if scored and not config.scores_file:
                continue
            # States are kept apart by label: several scores may be cut off and go on.
            checkpoints = Checkpointer(self.runtime, f"eval_{job.label}", config.checkpoint_seconds)
            scores_file = ScoresFile(self.val.num_targets) if config.scores_file else None
            path = self.float_path if job.label == "pre_quant" else self.artifact_path
            score = evaluate(
                self.model_of(path),
                self.val,
                config,
                self.runtime,
                **job._asdict(),
                observer=scores_file,
                # The file needs every target of one pass, so no earlier part of one is taken up.
                checkpoints=None if scores_file else checkpoints,
                identity=self.evaluation_key(path),
                spot_checks=config.spot_checks,
            )
            self.record(score, job)
            checkpoints.clear()
            if scores_file is not None:
                scores_file.write(config.scores_file.replace("{label}", job.label), self.runtime)
        if self.runtime.is_main:
            self.write_results(finished=True)
            self.summarise()
        self.runtime.event("done")
        self.log(f"run_finished {self.path}")

    def jobs(self):
        """The evaluations of this run, the float weights' first."""
        jobs = evaluation_jobs(self.config)
        if self.artifact_path.suffix == ".pt":
            labels = [job.label.removeprefix("final_int6_") for job in jobs]
            return [job._replace(label=f"float_{label}") for job, label in zip(jobs, labels)]
        if self.config.eval_only:
            return jobs
        return [jobs[0]._replace(label="pre_quant"), *jobs]

    def record(self, score, job):
        """Log a score and add it to scores.json."""
        name = job.label
        mark = "" if score.legal else " legality:illegal"
        stride = f" stride:{job.stride}" if name.endswith("sliding_window") else ""
        self.log(
            f"{name} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f}{stride} "
            f"eval_time:{1000 * score.seconds:.0f}ms{mark}"
        )
        self.log(f"{name}_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}{mark}")
        self.log(f"score_scope:{self.val.scope}")
        entry = dict(
            val_loss=score.val_loss,
            val_bpb=score.val_bpb,
            tokens=score.tokens,
            bytes=score.bytes,
            eval_time_s=score.seconds,
            legal=score.legal,
            spot_checks=score.spot_checks,
            dtype=self.dtype,
            audited=self.audited and self.is_submission(name),
        )
        self.runtime.event("score", label=name, scope=self.val.scope, **entry)
        self.results["scores"][name] = entry
        if self.runtime.is_main:
            self.write_results(finished=False)

    def write_results(self, finished):
        """Write scores.json: measurements of training and scoring; manifest.json has the rest."""
        code_bytes = self.code_bytes()
        artifact_bytes = self.artifact_path.stat().st_size
        if not self.config.eval_only:  # measurements of training travel with its weights
            self.results.update(self.load(self.float_path).info)
        self.results.update(
            finished=finished,
            seed=self.config.seed,
            preset=self.config.preset,
            headline=self.headline(),
            artifact_bytes=artifact_bytes,
            code_bytes=code_bytes,
            total_bytes=artifact_bytes + code_bytes,
        )
        write_json(self.path / "scores.json", self.results)

    # ---- the summary ----

    def is_submission(self, label):
        """False for float weights, which do not fit, and for the roundtrip, the cost of packing."""
        return not label.startswith(("pre_quant", "float")) and not label.endswith("_roundtrip")

    def headline(self):
        """Label of the score to report: the last legal one in the order of jobs.

        To choose the lowest after seeing them would be selection on validation text.
        """
        legal = [
            label
            for label, score in self.results["scores"].items()  # recorded in the order of jobs
            if score["legal"] and self.is_submission(label)
        ]
        return legal[-1] if legal else None

    def legality_of(self, label):
        """1 passed by this run's audit, 0 known to be illegal, or why there is nothing to say."""
        score = self.results["scores"][label]
        if not score["legal"]:
            return "0"
        if not self.is_submission(label):
            return "no_submission"
        return "1" if score["audited"] else "unaudited"

    def summarise(self):
        """Log the results, and the command to try next, in plain words."""
        config = self.config
        log = self.log
        results = self.results
        for label, score in results["scores"].items():
            log(
                f"result {label} val_bpb:{score['val_bpb']:.8f} "
                f"spot_checks:{score['spot_checks']} legal:{self.legality_of(label)} "
                f"score_scope:{self.val.scope} dtype:{score['dtype']}"
            )
        if config.preset == "demo":  # general compressors on the same text
            ids = self.val.tokens.astype(int).tolist()
            text = self.val.token_bytes.model.decode(ids).encode()
            for name, blob in [("gzip -9", gzip.compress(text, 9)), ("xz -6", lzma.compress(text))]:
                bpb = 8 * len(blob) / len(text)
                log(f"baseline {name} bpb:{bpb:.4f} on the same {len(text)} bytes of text")
        headline = self.headline()
        if headline is not None:
            score = results["scores"][headline]
            log(
                f"summary: score  {score['val_bpb']:.4f} bits per byte ({headline}, "
                f"legal:{self.legality_of(headline)}, score_scope:{self.val.scope})"
            )
            log(
                f"summary: scored {self.val.num_targets:,} targets in {score['eval_time_s']:,.0f} s"
            )
        log(
            f"summary: size   {results['artifact_bytes']:,} + {results['code_bytes']:,} of code = "
            f"{results['total_bytes']:,} of {config.budget_bytes:,} bytes"
        )
        if not config.eval_only:
            log(f"summary: steps  {results['steps']:,} in {results['train_time_s']:,.0f} s")
        log(f"summary: files  {self.path}")
        settings = [f"EVAL_ONLY={self.artifact_path}", f"TOKENIZER_PATH={config.tokenizer_path}"]
        if config.eval_only:
            settings += ["MODE=sample", "PROMPT=The"]
            purpose = "read what it writes"
        else:
            settings.append(f"DATA_PATH={config.data_path}")
            purpose = "verify the artifact"
        log(f"next: {' '.join(map(shlex.quote, settings))} python train_gpt.py  # {purpose}")
        if headline is not None:
            log(f"official_form: {headline}, under the name in the logs of the challenge's script")
            log(
                f"final_int8_zlib_roundtrip_exact val_loss:{score['val_loss']:.8f} "
                f"val_bpb:{score['val_bpb']:.8f}"
            )


# ---- MODE=sample ----


@torch.no_grad()
def sample(config, runtime, loaded):
    """Print PROMPT and the artifact's continuation; nothing is scored or recorded.

    Each next token is drawn from softmax(logits / TEMPERATURE) over the TOP_K likeliest; at
    TEMPERATURE=0 it is the likeliest one. BOS and EOS end the text.
    """
    tokenizer = load_token_bytes(config, loaded.tokenizer_sha256).model
    model = build_model(config, runtime)
    model.load_state_dict(loaded.state_dict)
    model.eval()
    generator = torch.Generator().manual_seed(config.seed)
    ids = [BOS, *tokenizer.encode(config.prompt)]  # as every document of the shards begins
    shown = ""
    for _ in range(config.sample_tokens):
        # The states of all positions are computed anew for each token: simple, and fast enough to
        # read along. The context is as long as the windows that the model is scored with.
        window = runtime.to_device(np.array([ids[-config.eval_seq_len :]]))  # (1, T)
        with runtime.autocast():
            hidden = model.hidden(window)  # (1, T, D)
            logits = model.logits(hidden[:, -1])[0]  # (V,)
        best, candidates = logits.topk(min(config.top_k, len(logits)))
        chosen = 0
        if config.temperature > 0:
            probabilities = torch.softmax(best / config.temperature, 0).cpu()
            chosen = int(torch.multinomial(probabilities, 1, generator=generator))
        token = int(candidates[chosen])
        if token in (BOS, EOS):
            break
        ids.append(token)
        text = tokenizer.decode(ids[1:])
        # A character of several bytes is a replacement mark until its last byte is there.
        if runtime.is_main and not text.endswith("\ufffd"):
            say(printable(text[len(shown) :], keep="\n\t"))
            shown = text
    if runtime.is_main:
        say("\n")


# ---- the end of a process ----


@contextlib.contextmanager
def reported_errors(runtime):
    """Log the error or signal that stops a run, with the rank, and exit with its code."""
    try:
        yield
        return
    except Stopped as stop:
        code = stop.code
        if runtime.is_main:
            with contextlib.suppress(OSError):  # a job script requeues where this file lies
                (runtime.dir / "STOPPED").write_text(f"{stop}\n")
        reason = runtime.stop.reason or "another_rank"  # rank 0 need not have heard it itself
        runtime.log(f"stopped signal:{reason} phase:{stop}; run the same command again to go on")
        runtime.event("stopped", signal=reason, phase=str(stop))
        with contextlib.suppress(RuntimeError):
            runtime.comm.barrier()  # all ranks leave together
    except BaseException as error:
        code = 1
        message = f"{type(error).__name__}: {error}"
        shown = traceback.format_exc()
        if isinstance(error, GolfError):  # its text says what to do
            code = error.code
            message = str(error)
            shown = f"error: {message}"
        runtime.event("error", code=code, message=message)
        runtime.append(runtime.log_file, f"error: {message}")
        rank = f"[rank {runtime.comm.rank}] " if runtime.comm.world > 1 else ""
        lines = [f"{rank}{printable(line)}\n" for line in shown.splitlines()]
        say("".join(lines), sys.stderr)
    if runtime.comm.world > 1:
        os._exit(code)  # tearing down a process group whose peers may be gone can hang
    sys.exit(code)


def main():
    """Read the configuration, build the runtime, train or load, pack, audit, score."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by `>&-`
            setattr(sys, name, open(os.devnull, "w"))
        if isinstance(getattr(sys, name), io.TextIOWrapper):
            # Characters that the terminal lacks are escaped.
            getattr(sys, name).reconfigure(errors="backslashreplace")
    arguments = set(sys.argv[1:])
    if arguments & {"--help", "-h"}:
        say(f"{help_text()}\n")
        return
    if arguments - {"--print-config"}:
        raise ConfigError(
            f"unknown arguments {sys.argv[1:]}: settings are environment variables, see --help"
        )
    # The file comes first: its architecture and evaluation settings belong to the configuration.
    path = os.environ.get("EVAL_ONLY")
    if not path and os.environ.get("MODE") == "sample":
        # Without EVAL_ONLY, MODE=sample reads the artifact of the run that the same settings made.
        path = Path(Config.from_env(os.environ).run_dir) / ARTIFACT_NAME
    loaded = load_weights(path) if path else None
    config = Config.from_env(os.environ, loaded.from_artifact() if loaded else None)
    if arguments:
        say("".join(f"{name.upper()}={value}\n" for name, value in config.as_dict().items()))
        return
    runtime = Runtime(config, os.environ)
    runtime.stop.watch_signals()
    for warning in name_warnings(os.environ):
        runtime.log(warning)
    with reported_errors(runtime):
        if config.mode == "sample":
            sample(config, runtime, loaded)
        else:
            Run(config, runtime, loaded).run()
        runtime.close()


if __name__ == "__main__":
    try:
        main()
    except GolfError as error:
        say(f"error: {printable(error)}\n", sys.stderr)
        sys.exit(error.code)
