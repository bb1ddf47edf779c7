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
import fcntl
import functools
import gzip
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import lzma
import math
import os
import platform
import re
import resource
import signal
import struct
import sys
import sysconfig
import threading
import time
import traceback
import types
import typing
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.distributed.launcher.api as launcher
import torch.nn.functional as F
import zstandard
from torch import nn
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.utils.checkpoint import checkpoint

BOS = 1  # every document of the official shards starts with this token
EOS = 2  # the tokenizers have it, the shards do not use it
CODE_PATH = Path(__file__).resolve()  # its size counts towards the budget


def printable(text, limit=None, keep=""):
    """Text of a stranger's file as a terminal may show it: one line, of `limit` characters at most.

    Control characters could clear the screen, rename the window or hide what an error says; they
    are escaped, but for those in `keep`.
    """
    text = str(text)
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}…"
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode()
        for char in text
    )


class GolfError(Exception):
    """An error a user can act on; `code` is the process's exit code."""

    code = 1


class ConfigError(GolfError):
    """A setting is wrong, or does not fit the others or the run in RUN_DIR."""

    code = 2


class DataError(GolfError):
    """Shards or tokenizer are missing, damaged, or do not belong together."""

    code = 3


class ArtifactError(GolfError):
    """A file of weights is over the budget or unreadable."""

    code = 4


class DivergedError(GolfError):
    """The training loss is not finite."""

    code = 5


class LegalityError(GolfError):
    """A score would break one of the challenge's conditions."""

    code = 6


class ResourceError(GolfError):
    """Out of storage or memory."""

    code = 7


class Stopped(GolfError):
    """Raised after everything was saved, at a signal or before a time limit."""

    code = 75


# ==================================================================================================
# Configuration
# One frozen dataclass whose defaults are the nfm_7k submission; presets are its differences.
# A field's kind says what it belongs to: "arch" and "eval" travel inside the artifact, "train"
# fixes the weights, "run" changes where and how a run happens but not its result. The hash covers
# all but "run", so that two runs with equal hashes are comparable.
# ==================================================================================================
def option(kind, default, text, low=-math.inf, high=math.inf, choices=None):
    """A Config field with what --help and the range checks need to know."""
    metadata = dict(kind=kind, text=text, low=low, high=high, choices=choices)
    return dataclasses.field(default=default, metadata=metadata)


arch_option = functools.partial(option, "arch")
train_option = functools.partial(option, "train")
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
    mlp_mult: float = arch_option(
        3.0, "MLP width / model_dim, rounded down to a multiple of 8", 0.25, 16
    )
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

    # Architecture: what later records have instead or in addition.
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
    parallel_last_n: int = arch_option(
        0, "last layers whose attention and MLP read the same state", 0, 64
    )

    # Architecture: the refiners between the trunk and the logits, each off or on by itself.
    e2e_ttt_enabled: bool = arch_option(False, "TTT-Linear refiner, trained end to end")
    e2e_ttt_mini_batch: int = arch_option(16, "tokens per inner step of TTT-Linear", 1, 1024)
    e2e_ttt_base_lr: float = arch_option(1.0, "inner rate of TTT-Linear x head_dim", 0, 1e3)
    flow_enabled: bool = arch_option(False, "FlowRefiner after the trunk")
    flow_latent_dim: int = arch_option(64, "latent width of FlowRefiner", 1, 4096)
    flow_hidden_dim: int = arch_option(256, "hidden width of FlowRefiner", 1, 4096)
    nfm_enabled: bool = arch_option(True, "NativeFlowMatcher after the trunk")
    nfm_hidden_dim: int = arch_option(256, "hidden width of NativeFlowMatcher", 1, 4096)

    # Training: length and schedule.
    seed: int = train_option(42, "seed of weights and noise", 0, 2**31 - 1)
    iterations: int = train_option(7000, "optimiser steps", 0)
    train_batch_tokens: int = train_option(786432, "tokens per optimiser step, all ranks", 1)
    train_seq_len: int = train_option(2048, "training sequence length", 2)
    shuffle: bool = train_option(False, "read the training sequences in random order")
    warmdown_iters: int = train_option(2800, "last steps, over which the rate falls to 0", 0)
    warmdown_frac: float = train_option(
        0.0,
        "share of the run (of the steps, or of the wallclock cap) that the warmdown takes, "
        "0 = WARMDOWN_ITERS",
        0,
        1,
    )
    warmdown_shape: str = train_option("linear", "of the warmdown", choices=("linear", "cosine"))
    min_lr: float = train_option(0.0, "share of every rate below which the warmdown stays", 0, 1)
    max_wallclock_seconds: float = train_option(0.0, "training time cap, 0 = none", 0)

    # Training: Muon for the blocks' matrices, AdamW for the rest.
    embed_lr: float = train_option(0.035, "AdamW rate of embeddings", 0)
    scalar_lr: float = train_option(
        0.025, "AdamW rate of what is neither embedding nor block matrix", 0
    )
    matrix_lr: float = train_option(0.025, "Muon rate of the blocks' matrices", 0)
    # Gradients of the first steps turn fast, so the momentum begins lower.
    muon_momentum: float = train_option(0.99, "Muon momentum after its warm-up", 0, 1)
    muon_momentum_warmup_start: float = train_option(0.92, "Muon momentum at step 0", 0, 1)
    muon_momentum_warmup_steps: int = train_option(1500, "steps of that linear warm-up", 0)
    muon_ns_steps: int = train_option(5, "Newton-Schulz steps", 1, 20)
    muon_wd: float = train_option(0.04, "decoupled weight decay of Muon", 0)
    muon_row_norm: bool = train_option(False, "divide each row by its norm first: MuonEq-R")
    adam_wd: float = train_option(0.04, "decoupled weight decay of AdamW", 0)
    # Large embeddings want their own.
    embed_wd: float = train_option(-1.0, "that of the embeddings, -1 = ADAM_WD", -1)
    scalar_wd: float = train_option(-1.0, "that of all else in AdamW, -1 = ADAM_WD", -1)
    beta1: float = train_option(0.9, "AdamW beta1", 0, 0.9999)
    beta2: float = train_option(0.95, "AdamW beta2", 0, 0.999999)
    adam_eps: float = train_option(1e-8, "AdamW epsilon", 1e-30)
    grad_clip_norm: float = train_option(0.3, "clip of the global gradient norm, 0 = off", 0)

    # Training: initial values, and the weight of the second loss.
    qk_gain_init: float = train_option(1.5, "initial per-head query gain, not 0")
    embed_init_std: float = train_option(0.005, "standard deviation of the first embedding", 0)
    flow_init_scale: float = train_option(0.01, "scale of FlowRefiner's first up-projection", 0)
    nfm_loss_weight: float = train_option(0.1, "weight of the flow-matching loss", 0)

    # Training: which average of the weights is exported, and whether they learn to be rounded.
    ema_decay: float = train_option(
        0.997, "decay of the weight average in a run of EMA_FULL_STEPS, 0 = off", 0, 0.999999
    )
    ema_full_steps: int = train_option(
        5000, "steps from which EMA_DECAY holds; shorter runs forget sooner, 1 = always", 1
    )
    swa_enabled: bool = train_option(False, "export the mean of snapshots taken late in the run")
    swa_every: int = train_option(50, "steps between snapshots", 1)
    swa_start_scale: float = train_option(0.2, "rate scale below which snapshots start", 0, 1)
    loop_at: float = train_option(0.35, "share of the run after which layers are looped", 0, 1)
    late_qat_threshold: float = train_option(
        0.0, "learning-rate scale of rounding in training, 0 = off", 0, 1
    )

    # Compression.
    quantizer: str = train_option(
        "lite",
        "lite = rounding row by row, the MLPs in fewer bits until it fits; gptq = integers that "
        "make up for each other's errors, steps that fill BUDGET_BYTES",
        choices=("lite", "gptq"),
    )
    calibration_tokens: int = train_option(
        65536, "training tokens that QUANTIZER=gptq looks at", 1, 1 << 24
    )
    block_bits: int = train_option(6, "lite: bits of the blocks' matrices", choices=(5, 6, 8))
    embed_bits: int = train_option(8, "lite: bits of the other large matrices", choices=(5, 6, 8))
    compressor: str = train_option(
        "zstd", "lite: compressor of the artifact; gptq takes zstd", choices=("zstd", "lzma")
    )
    zstd_level: int = train_option(16, "lite: zstd level", 1, 22)
    lzma_preset: int = train_option(6, "lite: lzma preset", 0, 9)
    budget_bytes: int = train_option(16_000_000, "code + model must fit this", 1)

    # Evaluation: windows and arithmetic.
    dtype: str = eval_option(
        "bfloat16", "autocast type; float32 = none", choices=("bfloat16", "float32")
    )
    # A smaller stride gives targets more context, at a cost in proportion.
    eval_seq_len: int = eval_option(1024, "window of every evaluation", 2, 1 << 17)
    eval_stride: int = eval_option(64, "stride of the sliding window", 1, 1 << 17)
    eval_batch_seqs: int = eval_option(32, "windows per batch and rank", 1, 4096)

    # Evaluation: what adapts to text that has been scored already.
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

    # Where a run reads and writes. Nothing from here on changes a result, but for the rounding of
    # sums in another order (DEVICE, COMPILE, MICRO_BATCH_TOKENS).
    data_path: str = run_option("./data/datasets/fineweb10B_sp1024", "directory of the shards")
    tokenizer_path: str = run_option(
        "./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model"
    )
    val_sha256: str = run_option(
        "", "SHA-256 that the validation tokens must have; a canonical split is certain with it"
    )
    run_id: str = run_option("", "name of the run; default {preset}_seed{seed} and the SLURM job")
    run_dir: str = run_option("", "directory of the run; default runs/$RUN_ID")
    resume: str = run_option(
        "auto", "continue RUN_DIR; never keeps the old run aside", choices=("auto", "never", "must")
    )
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
        0,
        "seed of the audit's and the spot checks' places; 0 = from what is checked",
        0,
        2**31 - 1,
    )
    spot_checks: float = run_option(
        0.01, "share of scoring rounds repeated on other later tokens, which must agree", 0, 1
    )
    scores_file: str = run_option(
        "",
        "write the nll of every target here (little-endian float32, nats, in order); {label} "
        "becomes the score's name, and without it the last score stays",
    )
    ttt_cuda_graph: str = run_option(
        "auto",
        "replay test-time training as a CUDA graph; auto = with several ranks",
        choices=("auto", "0", "1"),
    )
    nproc: int = run_option(
        0, "processes to start on this machine, one per GPU; 0 = as torchrun starts them", 0, 1024
    )
    code_bytes: int = run_option(
        0, "bytes of code to leave room for when packing, 0 = this file's (see slurm/package.py)", 0
    )

    # What MODE=sample writes.
    prompt: str = run_option("The", "MODE=sample: the text to continue")
    sample_tokens: int = run_option(200, "MODE=sample: tokens to write at most", 1)
    temperature: float = run_option(0.8, "MODE=sample: flattens the distribution; 0 = likeliest", 0)
    top_k: int = run_option(50, "MODE=sample: tokens to choose from at each position", 1)

    # How it runs there.
    device: str = run_option("auto", "auto, cpu, cuda or cuda:N")
    compile: str = run_option(
        "auto", "torch.compile; auto = on CUDA only", choices=("auto", "0", "1")
    )
    micro_batch_tokens: int = run_option(98304, "tokens per forward pass and rank", 1)
    warmup_steps: int = run_option(
        20, "compile warm-up steps on synthetic tokens; weights are restored", 0
    )

    # How often it reports, saves, and when it must end.
    train_log_every: int = run_option(100, "steps between training log lines", 1)
    val_loss_every: int = run_option(
        1000, "steps between validations, 0 = only after the last step", 0
    )
    checkpoint_every: int = run_option(1000, "steps between checkpoints, 0 = off", 0)
    checkpoint_seconds: float = run_option(600.0, "seconds between checkpoints, 0 = off", 0)
    eval_checkpoint_seconds: float = run_option(
        300.0, "seconds between states of an evaluation, 0 = off", 0
    )
    time_limit_seconds: float = run_option(
        0.0, "save and stop within this time, 0 = SLURM's or none", 0
    )

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
    def artifact_compressor(self):
        # The sorted codes of gptq are made for zstd, which takes a tenth of lzma's time for them.
        return "zstd" if self.quantizer == "gptq" else self.compressor

    @classmethod
    def from_env(cls, environ, brought=None):
        """The configuration of a run: explicit variable > `brought` > PRESET > default.

        `brought` holds what the artifact of EVAL_ONLY brings along: its architecture, its
        evaluation settings and a default RUN_ID. Variables of the published scripts count as
        explicit ones, see PUBLISHED. Raises ConfigError for a near miss of a name, a wrong value,
        two variables that contradict each other, or an architecture variable that contradicts the
        artifact.
        """
        # An unknown preset is reported by check_fit, with the list of those there are.
        preset = PRESETS.get(environ.get("PRESET"), {})
        brought = brought or {}
        explicit = read_variables(environ)
        read_published(environ, {**preset, **brought}, explicit)
        for name in cls.names("arch"):
            if name in explicit and name in brought and explicit[name] != brought[name]:
                raise ConfigError(
                    f"{name.upper()}={explicit[name]} contradicts the artifact, which has "
                    f"{brought[name]}: unset {name.upper()} (an artifact brings its own "
                    "architecture)"
                )
        values = {"preset": "nfm_7k", **preset, **brought, **explicit}  # the last one wins
        if not values.get("run_id"):
            values["run_id"] = f"{values['preset']}_seed{values.get('seed', cls.seed)}"
        # Tasks of a job array share their variables, but must not share a directory.
        if "run_id" not in explicit:
            values["run_id"] += slurm_suffix(environ)
        if not values.get("run_dir"):
            values["run_dir"] = f"runs/{values['run_id']}"
        return cls(**values)

    @classmethod
    def names(cls, *kinds):
        """Names of the fields of these kinds, in order; of all fields without an argument."""
        fields = dataclasses.fields(cls)
        return [f.name for f in fields if not kinds or f.metadata["kind"] in kinds]

    def as_dict(self, *kinds):
        """{name: value} of the fields of these kinds, or of all."""
        return {name: getattr(self, name) for name in self.names(*kinds)}

    def hash(self, *kinds):
        """16 hex digits over the fields of these kinds; by default all that can change a result."""
        text = json.dumps(self.as_dict(*(kinds or ("arch", "train", "eval"))), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def idle(self):
        """{field: what makes it so} of those that differ from the preset and have no effect."""
        found = {}
        for name, value, fields in IDLE:
            if getattr(self, name) == value:
                found.update(dict.fromkeys(fields.split(), f"{name.upper()}={value}"))
        if self.quantizer == "gptq" and not self.late_qat_threshold:
            found["block_bits"] = found["embed_bits"] = "QUANTIZER=gptq"
        # A share of the run comes before a number of steps, and own decays before the common one.
        if self.warmdown_frac > 0:
            found["warmdown_iters"] = f"WARMDOWN_FRAC={self.warmdown_frac}"
        if min(self.embed_wd, self.scalar_wd) >= 0:
            found["adam_wd"] = f"EMBED_WD={self.embed_wd} and SCALAR_WD={self.scalar_wd}"
        return {name: found[name] for name in self.differences() if name in found}

    def differences(self):
        """Fields that differ from the preset (settings of place and pace included)."""
        base = {field.name: field.default for field in dataclasses.fields(self)}
        base.update(PRESETS[self.preset])
        # What a run is called is no difference.
        base.update(preset=self.preset, run_id=self.run_id, run_dir=self.run_dir)
        return {name: value for name, value in self.as_dict().items() if value != base[name]}


# What a field's value leaves without effect: (field, value, fields that then do nothing).
IDLE = (
    ("quantizer", "gptq", "compressor zstd_level lzma_preset"),
    ("quantizer", "lite", "calibration_tokens"),
    ("num_loops", 0, "loop_start loop_end loop_at"),
    ("smear_enabled", False, "smear_inputs"),
    ("gated_attention", False, "gate_inputs"),
    ("bigram_vocab_size", 0, "bigram_dim"),
    ("ve_dim", 0, "ve_last_n"),
    ("e2e_ttt_enabled", False, "e2e_ttt_mini_batch e2e_ttt_base_lr"),
    ("flow_enabled", False, "flow_latent_dim flow_hidden_dim flow_init_scale"),
    ("nfm_enabled", False, "nfm_hidden_dim nfm_loss_weight"),
    ("ema_decay", 0.0, "ema_full_steps"),
    ("swa_enabled", False, "swa_every swa_start_scale"),
    ("slot", "off", "slot_lr slot_steps"),
    (
        "ttt_enabled",
        False,
        "ttt_lr ttt_momentum ttt_epochs ttt_chunk_tokens ttt_batch_seqs ttt_freeze_blocks "
        "ttt_grad_clip",
    ),
)


def read_variables(environ):
    """{field name: value} of the variables that are set. Raises ConfigError for a near miss."""
    # A variable is its field's name in capitals.
    fields = {field.name.upper(): field for field in dataclasses.fields(Config)}
    check_names(environ, {*fields, *PUBLISHED})  # a slip must not silently train another model
    return {
        field.name: parse_value(name, field.type, environ[name])
        for name, field in fields.items()
        if name in environ
    }


def check_names(environ, known):
    """Raise ConfigError for a variable that is no setting but looks like one, such as ITERATONS."""
    for name in sorted(environ.keys() - known):
        # 0.86 lets one wrong letter in seven pass as a slip, but tells DATA_DIR from DATA_PATH.
        near = difflib.get_close_matches(name.upper(), sorted(known), n=1, cutoff=0.86)
        if near and len(name) > 3:
            raise ConfigError(
                f"environment variable {name}={environ[name]!r} is not a setting, but "
                f"looks like {near[0]}: rename or unset it (see --help)"
            )


def slurm_suffix(environ):
    """_JOB or _JOB_TASK under SLURM, so that tasks of an array do not share a RUN_DIR; else ""."""
    job = environ.get("SLURM_ARRAY_JOB_ID") or environ.get("SLURM_JOB_ID")
    task = environ.get("SLURM_ARRAY_TASK_ID")
    return "".join(f"_{part}" for part in (job, task) if part)


# What a shell may say for yes and no: bool("0") is True in Python, hence a table.
BOOLEANS = {"0": False, "1": True, "false": False, "true": True}


def parse_value(variable, kind, text):
    """The value of a variable's text as bool, int, float or str. Raises ConfigError."""
    try:
        return BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        expected = "0, 1, true or false" if kind is bool else kind.__name__
        raise ConfigError(f"{variable}={text!r}: expected {expected}") from None


# What a variable of the published scripts may mean here.
class Renamed(typing.NamedTuple):
    """Another name of a field."""

    field: str


class Switch(typing.NamedTuple):
    """1 means any value of the field but `off`; `on`, if nothing else says which."""

    field: str
    off: object
    on: object


class BuiltIn(typing.NamedTuple):
    """The one value that this code has."""

    value: str
    reason: str


class Follows(typing.NamedTuple):
    """Must be the value of a field."""

    field: str
    reason: str


class LastLayers(typing.NamedTuple):
    """Layer numbers, which must be the last ones of the model; the field is how many."""

    field: str


class FirstLayer(typing.NamedTuple):
    """Number of the layer from which on all have something, negative for none; the field counts."""

    field: str


class Refused(typing.NamedTuple):
    """Cannot be honoured, whatever its value."""

    reason: str


STEPS_FOUND = "QUANTIZER=gptq finds the steps that fill BUDGET_BYTES"
# The variables of the scripts of #1170, #1232, #1166, #1150 and of later records that are no
# fields, so that their commands run unchanged. A variable that was silently ignored would train
# another model than asked.
PUBLISHED = {
    "TIED_EMBED_LR": Renamed("embed_lr"),
    "TIED_EMBED_INIT_STD": Renamed("embed_init_std"),
    "MUON_BACKEND_STEPS": Renamed("muon_ns_steps"),
    "NATIVE_FLOW_ENABLED": Renamed("nfm_enabled"),
    "NATIVE_FLOW_HIDDEN_DIM": Renamed("nfm_hidden_dim"),
    "NATIVE_FLOW_LOSS_WEIGHT": Renamed("nfm_loss_weight"),
    # Of the records of April 2026 (#1493 and after).
    "MUON_ROW_NORMALIZE": Renamed("muon_row_norm"),
    "ENABLE_LOOPING_AT": Renamed("loop_at"),
    "SKIP_GATES_ENABLED": Renamed("skip_gates"),
    "EMBEDDING_DIM": Renamed("embed_dim"),
    "PARALLEL_RESIDUAL_START": FirstLayer("parallel_last_n"),
    "SLIDING_WINDOW_ENABLED": BuiltIn("1", "the sliding window is always scored"),
    "ROPE_TRAIN_SEQ_LEN": Follows("train_seq_len", "angles are the same at every length"),
    # They quantise by fixed steps, which QUANTIZER=gptq finds for each row and column instead.
    "MATRIX_BITS": Refused("QUANTIZER=gptq takes what BUDGET_BYTES allows; for lite: BLOCK_BITS"),
    "MATRIX_CLIP_SIGMAS": Refused(STEPS_FOUND),
    "EMBED_CLIP_SIGMAS": Refused(STEPS_FOUND),
    "GPTQ_CALIBRATION_BATCHES": Refused("set CALIBRATION_TOKENS"),
    "GPTQ_RESERVE_SECONDS": Refused("the time to leave free is measured: see wallclock_reserve"),
    # Of the records before and after them, which have other forms of the same parts.
    "RECUR_LAYERS": Refused("set NUM_LOOPS, LOOP_START and LOOP_END"),
    "RECUR_START_STEP": Refused("set LOOP_AT, a share of the run"),
    "PARALLEL_START_LAYER": Refused("there are no two lanes: set PARALLEL_LAST_N for the one here"),
    "SMEAR_GATE_ENABLED": Refused("set SMEAR_ENABLED, and SMEAR_INPUTS=12 for their form of it"),
    "SPARSE_ATTN_GATE_ENABLED": Refused("set GATED_ATTENTION=1 and GATE_INPUTS=12"),
    # #1170's second loss.
    "NATIVE_FLOW_INIT_SCALE": BuiltIn("0.01", "the velocity field starts at zero"),
    # Checkpoints of #1166.
    "SAVE_EVERY": Renamed("checkpoint_every"),
    "SAVE_DIR": Renamed("run_dir"),  # checkpoints lie below it
    # Features that have a size here, of which 0 is off.
    "EMA_ENABLED": Switch("ema_decay", 0.0, 0.997),
    "VE_ENABLED": Switch("ve_dim", 0, 128),
    "VE_LAYERS": LastLayers("ve_last_n"),
    "LATE_QAT": Switch("late_qat_threshold", 0.0, 0.15),
    # As published SLOT looks at what it scores; its legal form stands in unless SLOT=published.
    "SLOT_ENABLED": Switch("slot", "off", "causal"),
    # What is always so, or never.
    "QAT_ENABLED": BuiltIn("0", "rounding in training begins late: see LATE_QAT_THRESHOLD"),
    "INT5_MLP": BuiltIn("1", "MLPs drop to 5 bits as far as BUDGET_BYTES needs it"),
    "LEGAL_TTT": BuiltIn("1", "nothing trains on text before it is scored: see TTT_ENABLED"),
    "TTT_OPTIMIZER": BuiltIn("sgd", "test-time training has no other optimiser"),
    "LEAKY_RELU": BuiltIn("1", "the MLP has no other activation"),
    "LEAKY_SLOPE": BuiltIn("0.5", "the MLP has no other activation"),
    "LN_SCALE": BuiltIn("1", "normalised inputs are scaled by 1/sqrt(layer + 1)"),
    "TIE_EMBEDDINGS": BuiltIn("1", "the output layer is the embedding"),
    "CANON_LAST_N": BuiltIn("0", "there are no Canon layers"),
    "CTW_WEIGHT": BuiltIn("0", "there is no context tree"),
    "E2E_TTT_NUM_HEADS": Follows("num_heads", "TTT-Linear has the heads of the attention"),
    "WEIGHT_DECAY": Refused("set MUON_WD for the blocks' matrices and ADAM_WD for the rest"),
}


def read_published(environ, base, explicit):
    """Add the fields that published variables set to `explicit`; `base` is what it goes on top of.

    Raises ConfigError for a value that this code cannot honour, or that contradicts the field.
    """
    fields = {field.name: field for field in dataclasses.fields(Config)}

    def current(name):
        return {**base, **explicit}.get(name, fields[name].default)

    def set_field(variable, name, value):
        if explicit.get(name, value) != value:
            raise ConfigError(
                f"{variable}={environ[variable]} contradicts {name.upper()}={explicit[name]}: "
                "unset one of them"
            )
        explicit[name] = value

    for variable in [name for name in PUBLISHED if name in environ]:
        text = environ[variable]
        match PUBLISHED[variable]:
            case Renamed(name):
                set_field(variable, name, parse_value(variable, fields[name].type, text))
            case Switch(name, off, on):
                if not parse_value(variable, bool, text):
                    set_field(variable, name, off)
                elif current(name) == off:  # on already, if it is anything else
                    set_field(variable, name, on)
            case BuiltIn(value, reason):
                require_text(variable, text, value, reason)
            case Follows(name, reason):
                require_text(variable, text, current(name), f"{name.upper()}: {reason}")
            case LastLayers(name):
                # The model can give value embeddings to its last layers only.
                count = text.count(",") + 1
                last = [str(layer) for layer in range(current("num_layers"))[-count:]]
                require_text(variable, text.replace(" ", ""), ",".join(last), "the last layers")
                set_field(variable, name, count)
            case FirstLayer(name):
                first = parse_value(variable, int, text)
                set_field(variable, name, layers_from(first, current("num_layers")))
            case Refused(reason):
                raise ConfigError(f"{variable}={text} is not a setting: {reason}")


def layers_from(first, num_layers):
    """How many layers there are from number `first` on; none from a negative one."""
    if first < 0:
        return 0
    return max(0, num_layers - first)


def require_text(variable, text, expected, reason):
    """Raise ConfigError unless a variable has the expected value; 1, 1.0 and true are one."""
    expected = str(expected)
    # As text first: expected may be a word, a number or a list.
    same = text.lower() == expected
    with contextlib.suppress(ValueError):
        same = same or float(BOOLEANS.get(text.lower(), text)) == float(expected)
    if not same:
        raise ConfigError(f"{variable}={text!r} cannot be honoured: only {expected} ({reason})")


def check_value(field, value):
    """Type, range and choices of one field. Raises ConfigError."""
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
        # Bounds are inclusive; what has no upper bound says only the lower one.
        if not meta["low"] <= value <= meta["high"]:
            most = f" and at most {meta['high']}" if meta["high"] < math.inf else ""
            raise ConfigError(f"{name}={value}: expected at least {meta['low']}{most}")
    if meta["choices"] and value not in meta["choices"]:
        choices = ", ".join(map(str, meta["choices"]))
        raise ConfigError(f"{name}={value!r}: expected one of {choices}")


MAX_PASSES = 1024
MAX_ACTIVATIONS = 1 << 29  # 2 GB in float32: 512 windows of 2048 at a width of 512


def require(config, holds, names, expected):
    """Raise ConfigError with the settings of these names unless `holds`."""
    if not holds:
        settings = [f"{name.upper()}={getattr(config, name)!r}" for name in names.split()]
        raise ConfigError(f"{' and '.join(settings)}: {expected}")


def require_multiple(config, first, second):
    """Half of the rules are of this form."""
    holds = getattr(config, first) % getattr(config, second) == 0
    expected = "the first is no multiple of the second: change one of them"
    require(config, holds, f"{first} {second}", expected)


def check_fit(config):
    """Settings that only make sense together. Raises ConfigError with their names and values."""
    presets = ", ".join(PRESETS)
    require(config, config.preset in PRESETS, "preset", f"expected one of {presets}")
    is_digest = re.fullmatch(r"([0-9a-f]{64})?", config.val_sha256)
    require(config, is_digest, "val_sha256", "expected 64 hexadecimal digits in lower case")
    known_device = re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device)
    require(config, known_device, "device", "expected auto, cpu, cuda or cuda:N")
    check_model_fit(config)
    check_batch_fit(config)
    check_window_fit(config)
    check_training_fit(config)


def check_model_fit(config):
    """Shapes of the model."""
    require_multiple(config, "model_dim", "num_heads")
    require_multiple(config, "num_heads", "num_kv_heads")
    # Rotation turns pairs of dimensions.
    fits = config.rope_dims % 2 == 0 and config.rope_dims <= config.head_dim
    expected = f"use an even number up to MODEL_DIM/NUM_HEADS = {config.head_dim}"
    require(config, fits, "rope_dims", expected)
    require(config, config.mlp_hidden >= 8, "mlp_mult", "no hidden unit is left: raise it")
    fits = config.ttt_freeze_blocks <= config.num_layers
    require(config, fits, "ttt_freeze_blocks num_layers", "lower the first")
    for name in ("embed_dim", "smear_inputs", "gate_inputs"):
        fits = getattr(config, name) <= config.model_dim
        require(config, fits, f"{name} model_dim", "lower the first")
    fits = config.parallel_last_n <= config.num_layers
    require(config, fits, "parallel_last_n num_layers", "lower the first")
    # What is off may have any size.
    fits = config.num_loops == 0 or config.loop_start <= config.loop_end < config.num_layers
    expected = "use layers of the model, the first not after the last"
    require(config, fits, "loop_start loop_end num_layers", expected)
    require(config, config.bigram_vocab_size != 1, "bigram_vocab_size", "use 0 or at least 2")
    fits = config.ve_dim == 0 or config.ve_last_n <= config.num_layers
    require(config, fits, "ve_last_n num_layers", "lower the first")


def check_batch_fit(config):
    """Batches are whole sequences, and small enough for a machine."""
    require_multiple(config, "train_batch_tokens", "train_seq_len")
    fits = config.micro_batch_tokens >= config.train_seq_len
    expected = "not one sequence fits: raise the first"
    require(config, fits, "micro_batch_tokens train_seq_len", expected)
    # An artifact says what its windows are: it must not ask for any amount of memory.
    windows = max(config.eval_batch_seqs, config.ttt_batch_seqs)
    numbers = windows * config.eval_seq_len * config.model_dim
    expected = f"a batch of windows has {numbers} activations, use at most {MAX_ACTIVATIONS}"
    names = "eval_batch_seqs ttt_batch_seqs eval_seq_len model_dim"
    require(config, numbers <= MAX_ACTIVATIONS, names, expected)


def check_window_fit(config):
    """Windows of an evaluation."""
    fits = config.eval_stride <= config.eval_seq_len
    expected = "targets between the windows would never be scored: lower the first"
    require(config, fits, "eval_stride eval_seq_len", expected)
    # Nor must an artifact ask for any amount of time.
    passes = config.eval_seq_len / config.eval_stride  # of every token through the model
    expected = f"every token would pass the model {passes:g} times, use at most {MAX_PASSES}"
    require(config, passes <= MAX_PASSES, "eval_seq_len eval_stride", expected)
    require_multiple(config, "ttt_chunk_tokens", "eval_seq_len")
    # SLOT is fitted on what earlier windows scored, so windows must overlap.
    overlap = config.eval_stride < config.eval_seq_len
    expected = "no window has a position that an earlier one scored: lower EVAL_STRIDE"
    fits = config.slot == "off" or overlap
    require(config, fits, "slot eval_stride eval_seq_len", expected)


def check_training_fit(config):
    """Settings of the optimisers and of what their schedules switch on."""
    # A gain of 0 makes every query 0, and leaves their matrix without a gradient.
    expected = "attention would see no difference between tokens: use 1.5 to 5.25, as published"
    require(config, config.qk_gain_init != 0, "qk_gain_init", expected)
    # Other negative numbers would act as -1 does.
    for name in ("embed_wd", "scalar_wd"):
        value = getattr(config, name)
        fits = value == -1 or value >= 0
        require(config, fits, name, "use 0 or more, or -1 for ADAM_WD")
    # Rounding begins below its threshold, where a rate that stays above it never comes.
    fits = config.late_qat_threshold == 0 or config.late_qat_threshold > config.min_lr
    expected = "rounding would never begin: raise the first or lower the second"
    require(config, fits, "late_qat_threshold min_lr", expected)


# The trunk alone, which #1170 compares its NativeFlowMatcher with.
BASE = dict(nfm_enabled=False, eval_seq_len=2048)
# The 20,000 steps of #1232, with 6-bit embeddings.
LONG = dict(BASE, iterations=20000, warmdown_iters=12000, warmdown_shape="cosine", embed_bits=6)
# What #1166 and #1150 share and #1170 does not have.
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
    ema_full_steps=1,  # about 4,650 steps, averaged by the published decay as it is
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
    ema_full_steps=4000,  # the record takes 4,650; a shorter run must forget sooner
)
PRESETS = {
    "nfm_7k": {},  # the defaults themselves
    "base_7k": BASE,
    "base_20k": LONG,
    "flow_20k": dict(LONG, flow_enabled=True),
    "ttt_linear_10l": dict(TTT_LINEAR, num_layers=10),
    "ttt_linear_11l": TTT_LINEAR,
    # #1150 scores with slot=published, which looks at what it scores; causal is its legal form.
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
    # The whole path of nfm_7k at a size that two free CPU cores do in under four minutes.
    # The number of steps is fixed: the same machine gives the same digits. The wallclock cap is a
    # guard for slow ones, which would warm down earlier.
    "demo": dict(
        audit=True,
        num_layers=5,
        model_dim=192,
        num_heads=3,
        num_kv_heads=1,
        bigram_vocab_size=2048,
        xsa_last_n=5,
        nfm_hidden_dim=96,
        iterations=400,
        warmdown_iters=160,
        max_wallclock_seconds=480.0,
        train_batch_tokens=4096,
        train_seq_len=256,
        micro_batch_tokens=4096,
        # Small batches are noisy: lower Adam rates. A short run: a momentum that forgets sooner.
        embed_lr=0.01,
        scalar_lr=0.01,
        muon_momentum=0.95,
        muon_momentum_warmup_start=0.85,
        muon_momentum_warmup_steps=100,
        warmup_steps=0,
        train_log_every=25,
        val_loss_every=60,
        checkpoint_every=0,
        checkpoint_seconds=60.0,
        eval_checkpoint_seconds=30.0,
        eval_seq_len=256,
        # Measured on a model of 300 steps: sliding window 2.0532 bits per byte, with this 2.0255.
        # At five times the rate two thirds of the gain are gone.
        ttt_lr=0.02,
        ttt_epochs=1,
        ttt_chunk_tokens=8192,
        ttt_batch_seqs=8,
        ttt_freeze_blocks=0,
        data_path="./data/datasets/demo_sp1024",
        tokenizer_path="./data/tokenizers/demo_1024_bpe.model",
    ),
}


def help_text():
    """Every variable with its meaning, default and the presets that change it."""
    lines = [__doc__, "Variables (default; [preset=value] where a preset differs):"]
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
        lines.append(f"  {name.upper()}={field.default}")
        lines.append(f"      {text}")
    lines += ["", "Published names, which set the same things:"]
    lines += [f"  {name}\n      {published_text(meaning)}" for name, meaning in PUBLISHED.items()]
    return "\n".join(lines)


def published_text(meaning):
    """A line of --help for an entry of PUBLISHED."""
    match meaning:
        case Renamed(field):
            return field.upper()
        case Switch(field, off, on):
            return f"0 is {field.upper()}={off}; 1 is {field.upper()}={on} or what that is set to"
        case BuiltIn(value, reason):
            return f"only {value}: {reason}"
        case Follows(field, reason):
            return f"only the value of {field.upper()}: {reason}"
        case LastLayers(field):
            return f"numbers of the last layers, {field.upper()} of them"
        case FirstLayer(field):
            return f"number of the first layer, {field.upper()} counts to the last; -1 for none"
        case Refused(reason):
            return f"no setting: {reason}"


# ==================================================================================================
# Runtime
# Device, ranks, log, clock and signals: everything that touches the machine sits in one object
# made in main and passed down, so that all that follows is the same code on a laptop and on eight
# GPUs.
# ==================================================================================================
# ---- files ----


def sha256_file(path):
    """Hex digest of a file, read in blocks of 1 MiB so that its size does not matter."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomic(path, parts):
    """Write byte strings to a temporary file and rename it: `path` is never half-written.

    Raises ResourceError when the file system refuses; an older file at `path` is intact then.
    """
    path = Path(path)
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(parts)
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


def write_json(path, value):
    """Write a JSON file, whole or not at all."""
    text = json.dumps(value, indent=1)
    write_atomic(path, [f"{text}\n".encode()])


def read_json(path):
    """What write_json wrote. Raises ConfigError for a damaged file."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # of JSON or of UTF-8
        raise ConfigError(
            f"{path} is damaged ({printable(error, 100)}): RESUME=never keeps this run aside and "
            "starts anew"
        ) from None


CHECKSUM_BYTES = hashlib.sha256().digest_size
MAX_TENSOR_BYTES = 32 << 30  # no checkpoint of a model that fits one GPU comes near


def save_tensors(path, state):
    """Write a tree of tensors and plain values with a trailing SHA-256; returns its bytes.

    PyTorch's reader does not compare the checksums of its own archive.
    """
    buffer = io.BytesIO()  # in memory first, since the checksum covers the whole archive
    torch.save(state, buffer)
    archive = buffer.getbuffer()
    write_atomic(path, [archive, hashlib.sha256(archive).digest()])
    return len(archive) + CHECKSUM_BYTES


def load_tensors(path, max_bytes=MAX_TENSOR_BYTES):
    """What save_tensors wrote, on the CPU, without running its code.

    Raises ArtifactError if the file is damaged, not one of ours, or larger than `max_bytes`.
    """
    try:
        size = os.path.getsize(path)
        if size > max_bytes:  # looked at before reading: a sparse file may claim any size
            raise ArtifactError(
                f"{path}: {size} bytes are more than the {max_bytes} that such a file may have: "
                "name another file"
            )
        blob = Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{path}: {error.strerror}: copy it again, or name another file"
        ) from None
    # A view: a copy of a large checkpoint would double the memory.
    archive = memoryview(blob)[:-CHECKSUM_BYTES]
    checksum = blob[-CHECKSUM_BYTES:]
    if len(blob) < CHECKSUM_BYTES or hashlib.sha256(archive).digest() != checksum:
        raise ArtifactError(
            f"{path}: checksum does not match: truncated, damaged or not ours: copy it again, or "
            "name another file"
        )
    try:
        check_archive(archive)
        # weights_only refuses pickled code: a checkpoint may come from a stranger.
        return torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception as error:  # a stranger's file may hold anything
        reason = printable(str(error).partition("\n")[0], 200)
        raise ArtifactError(f"{path}: not a checkpoint of tensors ({reason})") from None


def check_archive(archive):
    """Raise ValueError unless a torch.save archive, a zip file, has its entries as they are.

    Compressed or overlapping entries of a small file could fill any memory; torch.save makes none.
    """
    entries = zipfile.ZipFile(io.BytesIO(archive)).infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its entries are compressed")
    if sum(entry.file_size for entry in entries) > len(archive):
        raise ValueError("its entries are larger than the file")


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


CHECKPOINT_THREAD = "checkpoint"  # how names of threads that write a state begin


class Checkpointer:
    """Numbered states of one training run or evaluation, the last two of which are kept.

    They are written on a background thread: the caller waits only for the copy of its state. A
    write that failed is a warning, since the state before it is intact; `wait()` says whether it
    did.
    """

    KEPT = 2  # the newest may be damaged later, by a disk or a copy

    def __init__(self, runtime, name, every_seconds):
        self.runtime = runtime
        self.folder = runtime.dir / "checkpoint"
        self.name = name
        self.every_seconds = every_seconds  # 0: never due
        self.saved_at = time.monotonic()
        self.writing = None  # future of the write that is under way

    def path(self, number):
        return self.folder / f"{self.name}_{number:08d}.pt"

    def numbers(self):
        """Numbers of the states on disk, oldest first."""
        # Unfinished files end in .tmp, other phases have other names.
        pattern = re.compile(re.escape(self.name) + r"_(\d{8})\.pt")
        found = [pattern.fullmatch(path.name) for path in self.folder.glob("*.pt")]
        return sorted(int(match[1]) for match in found if match)

    def due(self):
        """Whether `every_seconds` have passed since the last save."""
        return 0 < self.every_seconds < time.monotonic() - self.saved_at

    def save(self, number, state, saved):
        """Copy `state` and begin to write it; saved(seconds, bytes) is called when it is there."""
        # One write at a time, so that states reach the disk in order.
        self.wait()
        self.saved_at = time.monotonic()
        # A pool of one thread, because its future carries an error to wait().
        executor = ThreadPoolExecutor(1, thread_name_prefix=CHECKPOINT_THREAD)
        self.writing = executor.submit(self._write, number, private_copy(state), saved)
        executor.shutdown(wait=False)  # the thread ends with this write

    def _write(self, number, state, saved):
        begin = time.monotonic()
        size = save_tensors(self.path(number), state)
        seconds = time.monotonic() - begin
        # The next save will take about as long: a time limit must leave room for it.
        self.runtime.stop.save_seconds = seconds
        saved(seconds, size)
        # Only now: an older state goes when a newer one is safe.
        for old in self.numbers()[: -self.KEPT]:
            self.path(old).unlink()

    def wait(self):
        """Wait for the write under way; returns its error, which is logged, or None."""
        if self.writing is None:
            return None
        error = self.writing.exception()
        self.writing = None
        if error is not None:
            self.runtime.log(f"warning: checkpoint not saved: {error}")
        return error

    def wait_or_raise(self):
        """For a state that is about to be needed: raises ResourceError if it was not written."""
        error = self.wait()
        if error is not None:
            raise ResourceError(str(error))

    def last(self):
        """Path of the last state that was written, or 'none'."""
        self.wait()
        numbers = self.numbers()
        return str(self.path(numbers[-1])) if numbers else "none"

    def newest(self):
        """(number, state) of the newest readable state, or (0, None)."""
        for number in reversed(self.numbers()):
            try:
                return number, load_tensors(self.path(number))
            except ArtifactError as error:
                self.runtime.log(f"warning: {error}; using the checkpoint before it")
        return 0, None

    def load(self):
        """newest() as rank 0 finds it, on every rank."""
        comm = self.runtime.comm
        number, state = self.newest() if comm.rank == 0 else (0, None)
        # Ranks that chose for themselves could go on from different states.
        number = int(comm.from_main(number))
        if number and state is None:
            state = load_tensors(self.path(number))
        return number, state

    def clear(self):
        """Delete all states of this name: they belong to something else."""
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

    # What follows sends a few numbers through the host (gloo), without making the device wait.
    def all_reduce_scalars(self, *values):
        """Element-wise sum of numbers over ranks, as floats."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def any_rank(self, condition):
        """Whether `condition` holds on any rank."""
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


class StopRequest:
    """The wish to stop: a signal, or a time limit that comes near.

    `reason` is empty until there is one.
    """

    def __init__(self, time_limit_seconds):
        self.started = time.monotonic()
        self.time_limit = time_limit_seconds  # math.inf without one
        self.reason = ""
        self.first_signal = None  # when it came
        self.save_seconds = 0.0  # what the last save took, hence what the next will need

    def watch_signals(self):
        """SLURM sends one of these before it kills a job; Ctrl-C stays what it is."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        """Note the first signal; a second one means now."""
        now = time.monotonic()
        if self.first_signal is None:
            self.first_signal = now
        # A cluster and torchrun may both deliver the same wish to stop, hence the half second.
        if now - self.first_signal > 0.5:
            os._exit(128 + number)
        self.reason = self.reason or signal.Signals(number).name

    def remaining(self):
        """Seconds until the time limit, less what saving needs."""
        if not math.isfinite(self.time_limit):
            return math.inf
        margin = min(60.0, 0.1 * self.time_limit)
        elapsed = time.monotonic() - self.started
        return self.time_limit - margin - self.save_seconds - elapsed

    def wanted(self, next_seconds=0.0):
        """Whether to stop now, given that the next piece of work takes `next_seconds`."""
        if not self.reason and self.remaining() < next_seconds:
            self.reason = "TIME_LIMIT"
        return bool(self.reason)


class PeakMemory(typing.NamedTuple):
    """Peaks in MiB. On the CPU both are the process's peak resident memory."""

    allocated: int
    reserved: int


class Runtime:
    """The machine as one object: device, comm, log, clock and the wish to stop.

    Reads the rank variables of torchrun and SLURM's end time from `environ`. Raises ConfigError for
    a RUN_DIR that cannot be written or that another process holds.
    """

    def __init__(self, config, environ):
        # Before CUDA starts: with it cuBLAS gives the same bits every time.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.comm = Comm(int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1)))
        self.is_main = self.comm.rank == 0
        self.device = pick_device(config.device, int(environ.get("LOCAL_RANK", 0)))
        self.dtype = getattr(torch, config.dtype)  # of autocast
        on_gpu = self.device.type == "cuda"
        self.compiling = config.compile == "1" or (config.compile == "auto" and on_gpu)
        self.dir = Path(config.run_dir)
        self.log_file = None
        self.events = None
        self.lock = None
        self.stop = StopRequest(time_limit(config, environ))
        self.on_line = False  # whether the terminal's last line is progress, to be overwritten
        if self.comm.world > 1:
            # gloo beside nccl: scalars are agreed on through the host.
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
        if on_gpu:
            torch.cuda.set_device(self.device)
            # DTYPE=float32 promises float32 products.
            torch.backends.cuda.matmul.allow_tf32 = self.dtype == torch.bfloat16
        else:
            keep_large_blocks()
        if self.is_main:
            self.open_dir(config.resume)

    def open_dir(self, resume):
        """Lock RUN_DIR and open its logs; with RESUME=never an earlier run is put aside."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            # The kernel drops the lock when the process ends, however it ends.
            self.lock = open(self.dir / "lock", "a")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if resume == "never" and (self.dir / "config.json").exists():
                self.put_aside()
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

    def put_aside(self):
        """Move the run in RUN_DIR into RUN_DIR/old_N, the first of these names that is free."""
        number = 1
        while (self.dir / f"old_{number}").exists():
            number += 1
        aside = self.dir / f"old_{number}"
        aside.mkdir()
        for item in self.dir.iterdir():
            if item.name != "lock" and not item.name.startswith("old_"):
                item.rename(aside / item.name)

    def stop_if_wanted(self, phase, seconds_needed):
        """Before a phase that cannot be interrupted: stop if it would not end in time."""
        # All ranks stop together: one that left alone would have the launcher end the others.
        if self.comm.any_rank(self.stop.wanted(seconds_needed)):
            raise Stopped(f"before {phase}")

    def log(self, line):
        """One line on rank 0's terminal and in train.log."""
        if not self.is_main:
            return
        line = printable(line)  # it may quote a file's text
        if self.on_line:
            print(CLEAR_LINE, end="")
        print(line, flush=True)
        self.on_line = False
        self.append(self.log_file, line)

    def append(self, file, line):
        """One line in one write, so that the saving thread's lines do not mix with the others."""
        if file is None:
            return
        try:
            file.write(f"{printable(line)}\n".encode())
        except OSError as error:
            # A full disk costs the line, not the run.
            warning = f"warning: {file.name} cannot be written ({error.strerror})"
            print(warning, file=sys.stderr, flush=True)

    def progress(self, text):
        """Rewrite the terminal's current line; nothing where the output is a file."""
        if self.is_main and sys.stdout.isatty():
            print(f"{CLEAR_LINE}{text}", end="", flush=True)
            self.on_line = True

    def event(self, event, **fields):
        """One JSON object in metrics.jsonl, for tools; the log is for people."""
        record = {"event": event, "time": round(time.time(), 3), **fields}
        self.append(self.events, json.dumps(record))

    def user_key(self):
        """A secret of this user on this system, made at its first use; "" where it cannot be kept.

        It tells states that this user's runs saved from states that came with somebody's files.
        """
        try:
            path = Path("~/.local/state/parameter_golf/key").expanduser()
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError), open(path, "x") as file:
                path.chmod(0o600)
                file.write(os.urandom(32).hex())
            return path.read_text()
        except (OSError, RuntimeError):  # RuntimeError: a container's user without a home
            return ""

    def autocast(self):
        """Matrix products in bfloat16 from float32 weights; does nothing with DTYPE=float32."""
        enabled = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def compiled(self, function, options=None):
        """The function, compiled where this run compiles: one graph, fixed shapes."""
        if not self.compiling:
            return function
        return torch.compile(function, dynamic=False, fullgraph=True, options=options)

    def cuda_graphs(self, wish):
        """Whether to replay a compiled function as a CUDA graph; `wish` is auto, 0 or 1.

        With several ranks a step is so small that launching its kernels takes longer than running
        them.
        """
        possible = self.compiling and self.device.type == "cuda"
        return possible and (wish == "1" or (wish == "auto" and self.comm.world > 1))

    def to_device(self, array):
        """An array of token ids or indices as an int64 tensor on the device."""
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
        if self.device.type == "cuda":
            # A copy from pageable memory would make the host wait until the GPU has come so far;
            # PyTorch keeps the pinned block until the copy is done.
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def peak_mib(self):
        """PeakMemory since the start: of the GPU, or of the process on a CPU."""
        if self.device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated() >> 20
            return PeakMemory(allocated, torch.cuda.max_memory_reserved() >> 20)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
        return PeakMemory(resident >> 10, resident >> 10)

    def close(self):
        """Close the files, which frees the lock on RUN_DIR, and leave the process group."""
        for file in (self.log_file, self.events, self.lock):
            if file is not None:
                file.close()
        if self.comm.world > 1:
            dist.destroy_process_group()


CLEAR_LINE = "\r\x1b[K"  # back to the first column, erase to the end


def time_limit(config, environ):
    """Seconds from now until this process must have ended; math.inf without a limit."""
    limit = config.time_limit_seconds or math.inf
    if "SLURM_JOB_END_TIME" in environ:
        limit = min(limit, float(environ["SLURM_JOB_END_TIME"]) - time.time())
    return limit


@contextlib.contextmanager
def deterministic_algorithms():
    """Inside, the same inputs give the same bits on a GPU too.

    The gradients of embeddings and attention are otherwise sums that atomics add in any order. What
    was set before is set again afterwards: training has no need of it.
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


def pick_device(wish, local_rank):
    """The torch device of this rank. Raises ConfigError for a GPU that is not there."""
    available = torch.cuda.is_available()
    if wish.startswith("cuda") and not available:
        raise ConfigError(f"DEVICE={wish}: no CUDA device here: unset DEVICE or use DEVICE=cpu")
    if wish == "cpu" or not available:
        return torch.device("cpu")
    if ":" not in wish:
        return torch.device(f"cuda:{local_rank}")
    if local_rank > 0:
        raise ConfigError(f"DEVICE={wish} is one GPU for several ranks: use DEVICE=cuda")
    return torch.device(wish)


def device_name(device):
    """What a person calls the device, for the manifest."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()}-core {platform.machine()} CPU"


# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
M_ARENA_MAX = -8


def keep_large_blocks():
    """Let glibc keep freed blocks.

    Training frees and takes the same hundreds of megabytes each step, and fresh pages from the
    kernel cost more than the arithmetic on them.
    """
    # Another C library than glibc (macOS, musl) simply goes without.
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)  # no block straight from the kernel
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # give nothing back below 2 GB
        libc.mallopt(M_ARENA_MAX, 1)  # one heap, which every thread reuses


# ==================================================================================================
# Data
# The challenge's own shard format, read as it lies on the disk. A training sequence is a function
# of its number alone, so a run needs no position and any number of ranks reads the same tokens.
# TokenBytes.count says how many bytes of text a token stands for: bits per byte rest on it.
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


def find_shards(config, split):
    """Sorted paths of the "train" or "val" shards in DATA_PATH. Raises DataError without any."""
    pattern = f"fineweb_{split}_*.bin"
    folder = Path(config.data_path)
    paths = sorted(folder.glob(pattern))
    if not paths:
        there = "no such file in it" if folder.is_dir() else "no such directory"
        raise DataError(
            f"no shard matches {config.data_path}/{pattern} ({there}): get the official shards "
            "(README, section Training) and set DATA_PATH and TOKENIZER_PATH, or try the whole "
            "path on data built here: PRESET=demo python train_gpt.py"
        )
    return paths


def check_ids(ids, vocab_size, where):
    """Return the ids if all of them are in the vocabulary, else raise DataError."""
    # Out of range, the embedding would read foreign memory on a GPU, or fail without a reason.
    if len(ids) and ids.max() >= vocab_size:
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
                self.spaced[i] = piece.startswith("▁")
                self.base[i] = len(piece.removeprefix("▁").replace("▁", " ").encode())

    def count(self, prev_ids, target_ids):
        """Bytes of text (same shape, uint16) of the target tokens, given the tokens before them."""
        prev_ids = np.asarray(prev_ids)
        target_ids = np.asarray(target_ids)
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

    def retokenisation_mismatch(self):
        """Whether another tokenizer seems to have made these tokens: text, encoded again, differs.

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
            return []  # no long text: spares the parsing, which is what takes the time
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
        lock = open(data / "lock", "w")
    except OSError as error:
        raise DataError(
            f"the demo's data cannot be built in {data} and {tokenizer.parent}: "
            f"{error.strerror}: run in a writable directory"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Verifying an artifact needs no training data.
        splits = ["val"] if config.eval_only else ["train", "val"]
        if tokenizer.exists() and all(any(data.glob(f"fineweb_{s}_*.bin")) for s in splits):
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


NORM_EPS = 2.0**-23  # float32's epsilon, whatever the type in use


class RMSNorm(torch.autograd.Function):
    """RMSNorm over the last dimension, times an optional gain, then an optional rotation.

    x (B, ..., d), gain (H, 1) or None, cos and sin (T, 1, r/2) or None. The arithmetic inside is
    float32 (or wider) on every device; the result has x's type.

    Written out because composed operations pass over memory too often: 16 x 512 x 256 in float32
    take 11 ms forward and backward on a CPU core instead of 24, with gain and rotation 18 instead
    of 57.
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

    A token already carries its own value in the residual stream; what remains is what attention
    brings from other tokens. Part of #549.
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
        device = self.weight.device
        off = torch.zeros((), device=device)
        scale = torch.ones(self.weight.size(0), 1, device=device)
        # Not persistent: both follow from the weights and the learning rate's schedule.
        self.register_buffer("qat_blend", off, persistent=False)
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
    """nn.Linear whose weight late QAT can round, without bias unless asked for."""

    def __init__(self, inputs, outputs, bias=False):
        super().__init__(inputs, outputs, bias=bias)

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
        self.proj = Linear(dim, dim)
        # After q/k norm the logits are bounded; the gain gives back the sharpness that costs.
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        self.attn_gate = None
        if config.gated_attention:
            # A gate of a few channels needs no bias: it starts half open, the others almost open.
            inputs = config.gate_inputs or dim
            self.attn_gate = Linear(inputs, config.num_heads, bias=not config.gate_inputs)
        self.vr_lambda = None
        if config.value_residual:
            self.vr_lambda = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, x, scale, out_scale, angles, v_first, v_emb):
        """Output y (B, T, D) and this layer's own values (B, T, K, d).

        x (B, T, D) is normalised and still without the layer's `scale` (0-d); `out_scale` (D,)
        multiplies the output; `angles` are cos and sin; v_first (B, T, K, d) are layer 0's values,
        or None in layer 0; v_emb (B, T, K*d) is the value embedding, or None.
        """
        q, k, v, gate = self.project(x, scale)
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
        if gate is not None:
            y = y * torch.sigmoid(gate).unsqueeze(-1)
        y = self.proj(y.flatten(2), out_scale[:, None])  # (B, T, D)
        return y, v

    def project(self, x, scale):
        """q (B, T, D), k and v (B, T, K*d) and the gates' logits (B, T, H) or None, of x (B, T, D).

        Four small products would each read x and leave the device half idle: the weights are put
        together and one product does it. They stay separate parameters, since the optimiser and the
        artifact treat each matrix on its own.
        """
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
        q, k, v, *gates = outputs.split([layer.out_features for layer in layers], -1)
        gate = gates[0] if gates else None
        if gates and self.attn_gate.bias is not None:
            gate = gate + self.attn_gate.bias.to(gate.dtype)
        return q, k, v, gate


class MLP(nn.Module):
    """W2 f(W1 x), f the square of a leaky ReLU."""

    def __init__(self, config):
        super().__init__()
        self.fc = Linear(config.model_dim, config.mlp_hidden)
        self.proj = Linear(config.mlp_hidden, config.model_dim)

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
        # As a tensor it leaves all layers one code, which a compiler need see only once.
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
        # A parallel MLP does not see what attention has just added (as in GPT-J).
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
        self.proj = Linear(config.smear_inputs, 1)
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
        count = min(config.ve_last_n, config.num_layers)
        self.layers = range(config.num_layers - count, config.num_layers)
        self.embed = Embedding(config.vocab_size, config.ve_dim)
        self.proj = Linear(config.ve_dim, config.num_kv_heads * config.head_dim)
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.layer_scales = nn.Parameter(torch.ones(count))

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
        self.proj = Linear(hidden, latent, bias=True)
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
        # 23 bits and a half are what float32 holds exactly: never 0, never 1.
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
    place = f"{config.seed}/{step}"
    digest = hashlib.sha256(place.encode()).digest()
    start = as_int64(int.from_bytes(digest[:8], "little"))
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
        self.out = Linear(hidden, dim)
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
    start, so that what token i has learnt of tokens <= i is one masked product; only the loop over
    mini-batches is sequential.
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
        self.proj = Linear(dim, dim)
        # The inner model's start, one per head, and its LayerNorm.
        self.w = nn.Parameter(0.02 * torch.randn(heads, width, width))
        self.b = nn.Parameter(torch.zeros(heads, 1, width))
        self.ln_gain = nn.Parameter(torch.ones(heads, 1, width))
        self.ln_bias = nn.Parameter(torch.zeros(heads, 1, width))
        self.norm = nn.LayerNorm(dim)
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
        target = v - k - self.ln_bias  # what LN(kW + b) without its bias should be
        outputs = []
        for low in range(0, q.size(2), self.mini_batch):
            part = slice(low, low + self.mini_batch)
            q_part = q[:, :, part]  # (B, H, n, d)
            k_part = k[:, :, part]
            z = k_part @ w + b
            gradient = self.inner_gradient(z, target[:, :, part])  # (B, H, n, d)
            # Row i of W's change seen by query i is the sum over j <= i of k_j^T gradient_j; the 1
            # is the bias's share.
            seen = (q_part @ k_part.mT + 1).tril()  # (B, H, n, n)
            z = q_part @ w + b - self.rate * (seen @ gradient)
            unit, _ = self.layer_norm_parts(z)
            outputs.append(q_part + unit * self.ln_gain + self.ln_bias)
            w = w - self.rate * (k_part.mT @ gradient)
            b = b - self.rate * gradient.sum(-2, keepdim=True)
        return torch.cat(outputs, 2)

    def inner_gradient(self, z, target):
        """Gradient of 1/2 |LN(z) - target|^2 with respect to z (..., d), LN's bias left out."""
        unit, inverse = self.layer_norm_parts(z)
        g = (unit * self.ln_gain - target) * self.ln_gain
        # The Jacobian of a LayerNorm: take out the mean and the part along the unit vector.
        mean = g.mean(-1, keepdim=True)
        along = (g * unit).mean(-1, keepdim=True)
        return inverse * (g - mean - unit * along)

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
        # A model on the meta device has shapes and names only, which is what readers check.
        if not self.tok_emb.weight.is_meta:
            self.init_weights()
        self.qat_blend = 0.0  # as in the buffers of late QAT, known without asking the device
        if config.late_qat_threshold > 0:
            self.enable_qat()

    @torch.no_grad()
    def init_weights(self):
        """Start as REFERENCE section 4 says: what a residual branch adds is zero at first."""
        nn.init.normal_(self.tok_emb.weight, std=self.config.embed_init_std)
        # Table zero, projection orthogonal: with both zero neither would ever get a gradient.
        if self.bigram is not None:
            nn.init.zeros_(self.bigram.embed.weight)
            nn.init.orthogonal_(self.bigram.proj.weight)
        for block in self.blocks:
            attn = block.attn
            mlp = block.mlp
            for layer in (attn.c_q, attn.c_k, attn.c_v, mlp.fc):
                nn.init.orthogonal_(layer.weight)
            for layer in (attn.proj, mlp.proj):
                nn.init.zeros_(layer.weight)
            if attn.attn_gate is not None:
                nn.init.zeros_(attn.attn_gate.weight)
            if attn.attn_gate is not None and attn.attn_gate.bias is not None:
                nn.init.constant_(attn.attn_gate.bias, 4.0)  # sigmoid(4) = 0.98: almost open
        if self.ve is not None:
            nn.init.normal_(self.ve.embed.weight, std=0.01)
            nn.init.zeros_(self.ve.proj.weight)
        if self.flow is not None:
            self.flow.up.weight.mul_(self.config.flow_init_scale)
        if self.nfm is not None:
            nn.init.zeros_(self.nfm.out.weight)
        if self.embed_in is not None:
            nn.init.orthogonal_(self.embed_in.weight)
            nn.init.orthogonal_(self.embed_out.weight)
        if isinstance(self.smear, InputSmearGate):
            nn.init.zeros_(self.smear.proj.weight)

    def quantizable(self):
        """(name, module) of every module whose weight late QAT could round."""
        return [(n, m) for n, m in self.named_modules() if isinstance(m, Quantizable)]

    def enable_qat(self):
        """Prepare rounding of exactly the weights that the artifact stores as integers."""
        for name, module in self.quantizable():
            scheme = scheme_of(f"{name}.weight", module.weight.shape, self.config)
            if SCHEMES[scheme].bits:
                module.enable_qat(SCHEMES[scheme].bits)

    @torch.no_grad()
    def set_qat(self, blend):
        """Set the blend of straight-through rounding (0 or 1) and the present weights' scales.

        It runs before every step, so it launches nothing while rounding stays off, and treats all
        matrices of one width as the rows of a single one while it is on.
        """
        rounded = [module for _, module in self.quantizable() if module.bits]
        if blend != self.qat_blend and rounded:
            self.qat_blend = blend
            blends = [module.qat_blend for module in rounded]
            torch._foreach_zero_(blends)
            torch._foreach_add_(blends, blend)
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

    def trunk(self, ids):
        """Normalised states (B, T, D) of ids (B, T), before the refiners."""
        x = x0 = self.embed(ids)
        length = ids.size(1)
        assert length <= len(self.rotary_cos), "longer than TRAIN_SEQ_LEN and EVAL_SEQ_LEN"
        angles = self.rotary_cos[:length], self.rotary_sin[:length]  # (T, 1, rope_dims/2) each
        v_emb = self.ve(ids) if self.ve is not None else {}  # by layer
        v_first = None  # layer 0's values
        skips = []
        # U-Net: the first half of the visits (rounded down) are encoders, the rest decoders.
        order = layer_order(self.config, self.looped)
        num_encoders = len(order) // 2
        for visit, layer in enumerate(order):
            # A decoder first adds what its mirror image among the encoders left.
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
        return rms_norm(x)

    def refine(self, x):
        """States (B, T, D) after all refiners, and NativeFlowMatcher's input, for its loss."""
        if self.ttt is not None:
            x = self.ttt(x)
        if self.flow is not None:
            x = self.flow(x)
        flow_input = x
        if self.nfm is not None:
            x = self.nfm(x)
        return x, flow_input

    def hidden(self, ids):
        """Final states (B, T, D) of ids (B, T): what the head sees."""
        return self.refine(self.trunk(ids))[0]

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
        rows = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
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
        """Mean cross entropy in nats of targets (B, T), 0-d; in training mode plus
        NativeFlowMatcher's weighted loss.

        noise_keys (B,) int64 choose that loss's random draws; drawn here when absent.
        """
        hidden, flow_input = self.refine(self.trunk(ids))
        loss = self.cross_entropy(hidden, targets)
        weight = self.config.nfm_loss_weight
        if self.nfm is not None and self.training and weight:
            if noise_keys is None:
                noise_keys = torch.randint(2**62, ids.shape[:1], device=ids.device)
            # Detached: this loss teaches the velocity, not the trunk.
            loss = loss + weight * self.nfm.flow_loss(flow_input.detach(), noise_keys)
        return loss


def build_model(config, runtime):
    """GPT on the runtime's device, with the attention backend that runs there."""
    attend = pick_attention(runtime.device, runtime.dtype, runtime.compiling).function
    return GPT(config, attend).to(runtime.device)


# ==================================================================================================
# Optimisers
# Muon for the blocks' matrices, AdamW for the rest, both on gradients that are reduced first and
# clipped then. Parallel Muon shards what is expensive (Newton-Schulz and momentum) and hides its
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
        for stack in self.stacks:
            stack.sort(key=is_tall)  # wide ones first: `apply` transposes the others in one go
        self.grads = [None] * len(self.stacks)  # per stack: this rank's slice, (N / world, r, c)
        self.handles = []  # (handle, what is being sent)
        self.buffers = []  # per stack: momentum of this rank's matrices, (N / world, r, c)
        self.factors = []  # per stack: (N / world, 1, 1), see `shape_factors`
        self.num_wide = []  # per stack: how many of this rank's matrices are not transposed
        for stack in self.stacks:
            shape = as_wide(stack[0]).shape
            self.buffers.append(stack[0].new_zeros(self.share(stack), *shape))
            self.factors.append(self.shape_factors(stack))
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

    def shape_factors(self, stack):
        """(share, 1, 1): sqrt(max(1, rows / columns)) of this rank's matrices.

        An orthogonal matrix with more rows than columns has smaller entries than a square one; the
        factor makes their root mean square the same.
        """
        factors = []
        for param in stack:
            rows, columns = param.shape
            factors.append(param.new_full((1, 1), max(1, rows / columns) ** 0.5))
        share = self.share(stack)
        first = self.comm.rank * share
        return self.stacked(factors)[first : first + share]

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
        """This rank's share of the squared gradient norm (0-d)."""
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
        if waiting:
            self.apply(*waiting)

    def orthogonal_update(self, i, scale):
        # 3. update: (N / world, r, c). Nesterov looks one step of momentum ahead.
        grad = self.grads[i].mul_(scale)
        self.grads[i] = None
        buffer = self.buffers[i]
        buffer.mul_(self.momentum).add_(grad)
        ahead = grad.add(buffer, alpha=self.momentum)
        if self.row_norm:
            # The rows of a tall matrix are the columns of its place in the stack.
            wide = ahead[: self.num_wide[i]]
            tall = ahead[self.num_wide[i] :]
            for part, dim in ((wide, -1), (tall, -2)):
                if len(part):
                    part.div_(part.norm(dim=dim, keepdim=True).clamp(min=1e-7))
        return newton_schulz(ahead, self.ns_steps, self.dtype).mul_(self.factors[i])

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
            # Without the padding, and a copy, since the next step changes the buffer in place.
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
        """Such as "512x1536": no two stacks share a shape, and it is the same at any world size."""
        return "x".join(str(size) for size in buffer.shape[1:])


def parameter_groups(model):
    """{"muon" | "embed" | "scalar": {name: parameter}}, every parameter in exactly one.

    "embed" are lookup tables, whose rows see few tokens a step; "scalar" is the rest: gains, gates,
    mixes, biases and the refiners.
    """
    groups = {"muon": {}, "embed": {}, "scalar": {}}
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
        groups[group][name] = param
    return groups


def either(own, common):
    """A setting of its own, or the common one where it is negative."""
    return common if own < 0 else own


def build_optimizers(model, config, comm=None):
    """(Muon, AdamW) over all parameters of `model`; asserts that each is in exactly one group."""
    groups = parameter_groups(model)
    muon = Muon(
        groups["muon"].values(),
        config.matrix_lr,
        config.muon_momentum,
        config.muon_wd,
        config.muon_ns_steps,
        getattr(torch, config.dtype),
        comm,
        config.muon_row_norm,
    )
    # `base_lr` is what the schedule multiplies; "lr" itself changes with every step.
    adamw = torch.optim.AdamW(
        [
            dict(
                params=list(groups["embed"].values()),
                base_lr=config.embed_lr,
                weight_decay=either(config.embed_wd, config.adam_wd),
            ),
            dict(
                params=list(groups["scalar"].values()),
                base_lr=config.scalar_lr,
                weight_decay=either(config.scalar_wd, config.adam_wd),
            ),
        ],
        lr=config.scalar_lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,
    )
    check_groups(model, muon, adamw)
    return muon, adamw


def adamw_params(adamw):
    return [param for group in adamw.param_groups for param in group["params"]]


def check_groups(model, muon, adamw):
    """Assert that every parameter is trained, and by one optimiser only."""
    held = []
    for stack in muon.stacks:
        held += stack
    held += adamw_params(adamw)
    ids = [id(param) for param in held]
    wrong = [name for name, param in model.named_parameters() if ids.count(id(param)) != 1]
    foreign = len(held) - len(list(model.parameters()))
    assert not wrong and not foreign, f"not in exactly one optimiser group: {wrong}"


def reduce_clip_step(muon, adamw, comm, clip):
    """One optimiser step on the ranks' summed gradients, clipped by their global norm.

    They are clipped after the reduction: before it each rank would clip its own part, and the step
    would depend on the number of ranks.
    """
    muon.launch()
    params = adamw_params(adamw)
    for param in params:
        if param.grad is None:  # every rank must bring the same list
            param.grad = torch.zeros_like(param)
    grads = [param.grad for param in params]
    comm.sum_gradients(grads)
    squared = muon.collect()
    if comm.world > 1:  # Muon's gradients are sharded, AdamW's are whole on every rank
        comm.all_reduce(squared).wait()
    scale = torch.ones_like(squared)
    if clip:
        norm = (squared + squared_norm(grads)).sqrt()
        # A tensor all the way: reading the norm would make the host wait for the GPU.
        scale = (clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, scale)
    muon.step(scale, meanwhile=adamw.step)


def training_cap(config, step, seconds):
    """Seconds that the steps may take, 0 for no cap: the time of `calibrate` is left free."""
    cap = config.max_wallclock_seconds
    if not cap or config.quantizer != "gptq" or not step:  # nothing measured yet
        return cap
    return max(1e-9, cap - calibration_seconds(config, seconds / step))


def without_reserve(config, reserve):
    """The Config whose wallclock cap leaves `reserve` seconds for what follows training."""
    if not config.max_wallclock_seconds:
        return config
    cap = max(1e-9, config.max_wallclock_seconds - reserve)
    return dataclasses.replace(config, max_wallclock_seconds=cap)


def run_fraction(config, step, seconds=0.0):
    """Share in [0, 1] of the run that is over: of its steps, or of its time if that ends sooner."""
    fraction = step / max(1, config.iterations)
    cap = training_cap(config, step, seconds)
    if cap:
        fraction = max(fraction, seconds / cap)
    return min(1.0, fraction)


def expected_steps(config, step, seconds=0.0):
    """Steps that the whole run will have, by the pace so far where a wallclock cap ends it."""
    if not config.max_wallclock_seconds or not step or not seconds:
        return config.iterations
    step_seconds = seconds / step
    return min(config.iterations, training_cap(config, step, seconds) / step_seconds)


def warmdowns_left(config, step, seconds):
    """What is left of the run, in lengths of the warmdown: below 1 it has begun."""
    if config.warmdown_frac:
        return (1 - run_fraction(config, step, seconds)) / config.warmdown_frac
    warmdown = max(config.warmdown_iters, 1e-9)  # 0 steps: at full rate to the end
    left = (config.iterations - step) / warmdown
    if config.max_wallclock_seconds and step and seconds:
        step_seconds = seconds / step
        seconds_left = training_cap(config, step, seconds) - seconds
        left = min(left, seconds_left / (warmdown * step_seconds))
    return left


def lr_scale(config, step, seconds=0.0):
    """Factor in [0, 1] of every learning rate at `step` after `seconds` of training.

    1 until the warmdown, which covers the last WARMDOWN_ITERS steps, or with a wallclock cap the
    last WARMDOWN_ITERS times the measured step time, whichever begins first. With WARMDOWN_FRAC it
    is that share of the whole run instead. It ends at 0, or stays at MIN_LR once it is there.
    """
    left = min(1.0, max(0.0, warmdowns_left(config, step, seconds)))
    if config.warmdown_shape == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return max(left, config.min_lr)


def momentum_at(config, step):
    """Muon's momentum at `step`, warmed linearly: early gradients turn fast and soon outdate."""
    if step >= config.muon_momentum_warmup_steps:
        return config.muon_momentum
    done = step / config.muon_momentum_warmup_steps
    return (1 - done) * config.muon_momentum_warmup_start + done * config.muon_momentum


MIN_EMA_HORIZON = 8  # steps: a shorter average removes next to no noise and only lags


def ema_decay_at(config, step, seconds=0.0):
    """Decay of the weight average at `step` (from 0): EMA_DECAY in runs of EMA_FULL_STEPS or more.

    An average over a horizon of 1 / (1 - decay) steps removes noise, but lags behind weights that
    still improve. Published runs of 5,000 to 7,200 steps gain 0.001 bpb at a horizon of 333. Runs
    of 300 and of 1,000 steps (3 layers of 96, demo text) lose 0.006 bpb at the same share of the
    run, and 0.001 at a quarter of it. Hence a horizon that grows with the cube of the run's length,
    and 0 (which is the raw weights) where it would be under MIN_EMA_HORIZON.
    """
    decay = config.ema_decay
    length = expected_steps(config, step, seconds) / config.ema_full_steps
    if length < 1:
        horizon = length**3 / (1 - decay)
        decay = 0.0 if horizon < MIN_EMA_HORIZON else 1 - 1 / horizon
    # The initial weights must not stay in an average that is younger than its horizon.
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """EMA of the weights in float32 each step, and the mean of late snapshots of it (SWA).

    The last steps bounce between the walls of a valley, and their average lies nearer to its bottom
    (Izmailov et al. 2018, arXiv 1803.05407). Everything stays on the device.
    """

    def __init__(self, params, config):
        self.params = list(params)
        self.config = config
        self.snapshots = 0  # taken so far
        self.decay = 0.0  # of the last update
        self.ema = []
        self.swa = []  # the snapshots' sum
        if config.ema_decay:
            self.ema = [param.detach().clone() for param in self.params]
        if config.swa_enabled:
            self.swa = [torch.zeros_like(param) for param in self.params]

    def raw(self):
        return [param.detach() for param in self.params]

    @torch.no_grad()
    def update(self, step, scale, seconds=0.0):
        """After step `step` (from 0) at learning-rate scale `scale`, `seconds` after the start."""
        config = self.config
        if self.ema:
            self.decay = ema_decay_at(config, step, seconds)
            torch._foreach_lerp_(self.ema, self.raw(), 1 - self.decay)
        # Snapshots of the time at high learning rates would be far from the end.
        late = scale < config.swa_start_scale
        if self.swa and late and (step + 1) % config.swa_every == 0:
            torch._foreach_add_(self.swa, self.ema or self.raw())
            self.snapshots += 1

    def exported(self):
        """(what it is, tensors): snapshots' mean, else the EMA, else the raw weights."""
        kind = "raw weights"
        if self.decay:
            kind = f"EMA weights (decay {self.decay:.4f}: {1 / (1 - self.decay):.0f} steps)"
        elif self.ema:
            kind = "raw weights (a short run: see EMA_FULL_STEPS)"
        if self.snapshots:
            kind = f"mean of {self.snapshots} snapshots of the {kind}"
            return kind, [total / self.snapshots for total in self.swa]
        if self.swa:
            kind += (
                f"; warning: SWA took no snapshot (SWA_EVERY={self.config.swa_every}, "
                f"SWA_START_SCALE={self.config.swa_start_scale})"
            )
        return kind, self.ema or self.raw()

    def state_dict(self):
        return dict(ema=self.ema, swa=self.swa, snapshots=self.snapshots, decay=self.decay)

    @torch.no_grad()
    def load_state_dict(self, state):
        for mine, saved in ((self.ema, state["ema"]), (self.swa, state["swa"])):
            for target, value in zip(mine, saved, strict=True):
                target.copy_(value)
        self.snapshots = state["snapshots"]
        self.decay = state["decay"]


# ==================================================================================================
# Training
# Steps, checkpoints, resume. Nothing random is drawn from hidden state: noise is a function of
# (seed, step, sequence) and tokens of the step, so a checkpoint holds no generator and a resumed
# run is the uninterrupted one bit for bit.
# ==================================================================================================
class HostCopy:
    """A 0-d tensor on its way to the host, so that its value can be awaited late and alone.

    float(tensor) would wait for everything that the device was given so far. This copy is queued
    behind what exists now, and `read` waits for nothing that is launched later. On a CPU both are
    immediate.
    """

    def __init__(self, tensor):
        self.value = tensor.to("cpu", non_blocking=True)  # from CUDA: into pinned memory
        self.arrived = None
        if tensor.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self):
        if self.arrived is not None:
            self.arrived.synchronize()
        return float(self.value)


class StepFacts(typing.NamedTuple):
    """What all ranks agree on in every step."""

    loss: float  # mean over the step's tokens
    stop: bool  # some rank was told to stop
    save: bool  # a checkpoint is due by the clock
    seconds: float  # since the last step, by rank 0's clock


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
        # What a looped layer has is multiplied at each of its visits.
        further_visits = order.count(layer) - 1
        multiplied += further_visits * sum(param.numel() for param in block.parameters())
    attention = len(order) * config.model_dim * config.train_seq_len
    return 6 * multiplied + 12 * attention


class StepTimer:
    """Where training's time goes, by this rank's own clock; part of the checkpoint.

    It never waits for the device. On a CPU each part is what it says. On CUDA the host runs ahead
    and waits once a step, for the loss: "forward_backward" then holds whatever the device still had
    to do, the optimisers' kernels of the step before included, while "data" and "optimiser" are
    what the host itself needs to prepare and to launch. Their growth is what starves the device.
    """

    PARTS = ("data", "forward_backward", "optimiser", "validation")

    def __init__(self):
        self.seconds = dict.fromkeys(self.PARTS, 0.0)
        self.steps = []  # seconds of every step, as all ranks agreed on
        self.flops = 0.0  # floating-point operations of all steps and ranks

    @contextlib.contextmanager
    def part(self, name):
        begin = time.monotonic()
        yield
        self.seconds[name] += time.monotonic() - begin

    def recent(self, count):
        """Mean seconds of the last `count` steps."""
        last = self.steps[-count:]
        return sum(last) / len(last)

    def pace(self, count):
        """Median seconds of the last `count` steps, 0 without any: no single pause moves it."""
        return float(np.median(self.steps[-count:])) if self.steps else 0.0

    def milliseconds(self, percentile):
        """Of one step. The median is the pace; the 95th percentile shows what interrupts it."""
        return 1000 * float(np.percentile(self.steps, percentile))

    def state_dict(self):
        # A tensor, since thousands of Python floats are slow to write.
        steps = torch.tensor(self.steps, dtype=torch.float64)
        return dict(seconds=dict(self.seconds), steps=steps, flops=self.flops)

    def load_state_dict(self, state):
        self.seconds = dict(state["seconds"])
        self.steps = state["steps"].tolist()
        self.flops = state["flops"]


class Trainer:
    """Model, optimisers, averages, data position and clock of one training run."""

    PARTS = ("model", "muon", "adamw", "average")  # what changes weights, each with a state_dict

    def __init__(self, config, runtime, val, reserve=0.0):
        self.config = config
        self.timed = without_reserve(config, reserve)  # for all that depends on the clock
        self.runtime = runtime
        self.val = val
        self.comm = runtime.comm
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        self.model = build_model(config, runtime)
        self.muon, self.adamw = build_optimizers(self.model, config, self.comm)
        self.average = WeightAverage(self.model.parameters(), self.timed)
        self.stream = open_train_stream(config)
        self.loss = runtime.compiled(self.model)
        self.checkpoints = Checkpointer(runtime, "step", config.checkpoint_seconds)
        self.step = 0  # steps done
        self.seconds = 0.0  # of training: without start, warm-up and validation
        self.step_started = time.monotonic()  # moved forward by whatever is no training
        self.timer = StepTimer()
        self.logged_step = 0  # of the last log line in this process
        self.logged_order = []  # of the layers, in this process's log
        self.stopped_early = False  # by the wallclock cap
        self.saved_step = 0  # of the last checkpoint
        self.plan_micro_batches()
        # A checkpoint of other settings or other data must not be continued.
        tokens = self.stream.num_tokens
        self.identity = dict(hash=config.hash(), data=[tokens, val.fingerprint["val_sha256"]])

    def plan_micro_batches(self):
        """Share the batch among ranks, and cut each share into equal parts that fit in memory."""
        config = self.config
        world = self.comm.world
        sequences = config.train_batch_tokens // config.train_seq_len
        if sequences % world:
            raise ConfigError(
                f"TRAIN_BATCH_TOKENS={config.train_batch_tokens} is {sequences} sequences, "
                f"which {world} ranks cannot share evenly: change the batch or the number of "
                "ranks"
            )
        self.seqs_per_rank = sequences // world
        most = min(self.seqs_per_rank, config.micro_batch_tokens // config.train_seq_len)
        # Equal parts: the mean of their mean losses is the step's loss, and one graph fits all.
        divisors = [n for n in range(1, most + 1) if self.seqs_per_rank % n == 0]
        self.micro_batch_seqs = max(divisors)
        self.accumulation_steps = self.seqs_per_rank // self.micro_batch_seqs

    def announce(self):
        """Lines that the challenge's tools parse, in its own format."""
        log = self.runtime.log
        data_set = Path(self.config.data_path).name
        log(f"model_params:{sum(param.numel() for param in self.model.parameters())}")
        log(f"world_size:{self.comm.world} grad_accum_steps:{self.accumulation_steps}")
        log(f"train_loader:dataset:{data_set} train_shards:{len(self.stream.paths)}")
        self.warn_of_settings()

    def warn_of_settings(self):
        """Lines on settings that do other than whoever chose them may expect."""
        config = self.config
        log = self.runtime.log
        rounded = any(module.bits for _, module in self.model.quantizable())
        if config.late_qat_threshold and not rounded:
            log(
                "warning: LATE_QAT_THRESHOLD has no effect: no matrix of this model is stored in "
                "integers"
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
        """Train to the last step, the wallclock cap or a wish to stop; validate and save."""
        self.load()
        self.warm_up()
        # The clock starts here: compiling and reading a checkpoint are not training.
        self.step_started = time.monotonic()
        self.checkpoints.saved_at = self.step_started
        try:
            self.run_steps()
        # Whatever ends the run early, the user learns what is safe.
        except Stopped:
            if self.saved_step != self.step:  # stopped in a validation
                self.save(wait=True)
            raise
        except DataError as error:
            raise DataError(f"{error} (last checkpoint: {self.checkpoints.last()})") from None
        self.checkpoints.wait()

    def run_steps(self):
        every = self.config.val_loss_every
        done = False
        while not done:
            self.set_order()
            # Asked before the validation, so that the last one is of the final weights.
            done = self.step >= self.config.iterations or self.out_of_time()
            if done or (every and self.step and self.step % every == 0):
                self.validate()
            if not done:
                self.one_step()

    def out_of_time(self):
        """Whether the next step is predicted to pass the wallclock cap."""
        cap = training_cap(self.timed, self.step, self.seconds)
        if not cap or not self.step:  # nothing measured yet
            return False
        # Steps of looped layers take longer than the mean of the whole run.
        step_seconds = max(self.seconds / self.step, self.timer.pace(20))
        if self.seconds + step_seconds > cap:
            self.runtime.log(
                f"stopping_early: wallclock_cap train_time:{1000 * self.seconds:.0f}ms "
                f"step:{self.step}/{self.config.iterations}"
            )
            self.stopped_early = True
        return self.stopped_early

    def one_step(self):
        """One optimiser step, its log line, and a checkpoint where one is due."""
        config = self.config
        scale = lr_scale(self.timed, self.step, self.seconds)
        self.set_lrs(scale)
        facts = self.agree(self.accumulate(self.step, self.stream))
        # Before the optimisers: a loss that is not finite must not reach the weights.
        if not math.isfinite(facts.loss):
            self.diverged(facts.loss)
        with self.timer.part("optimiser"):
            reduce_clip_step(self.muon, self.adamw, self.comm, config.grad_clip_norm)
            self.average.update(self.step, scale, self.seconds)
        self.step += 1
        self.seconds += facts.seconds
        self.timer.steps.append(facts.seconds)
        # Counted step by step, because looped layers are switched on in mid-run.
        self.timer.flops += flops_per_token(self.model) * config.train_batch_tokens
        self.report(facts.loss, scale)
        if facts.stop and self.step < config.iterations:  # after the last one, packing comes next
            self.save(wait=True)
            raise Stopped(f"in training after step {self.step}/{config.iterations}")
        every = config.checkpoint_every
        if facts.save or (every and self.step % every == 0):
            self.save()

    def agree(self, loss):
        """StepFacts of this step, of which `loss` is this rank's share; the one exchange of hosts.

        Each rank has its own clock and hears its own signals. Whatever steers the run is therefore
        decided together, or one rank would wait for ever in a collective that no other enters.
        """
        now = time.monotonic()
        step_seconds = self.seconds / max(1, self.step)
        # The stop is seen one step late, so there must be time for two.
        stop = self.runtime.stop.wanted(2 * step_seconds)
        save = self.checkpoints.due()
        elapsed = now - self.step_started
        self.step_started = now
        if not self.runtime.is_main:  # rank 0's clock decides
            save = False
            elapsed = 0.0
        loss, stop, save, elapsed = self.comm.all_reduce_scalars(loss, stop, save, elapsed)
        return StepFacts(loss, stop > 0, save > 0, elapsed)

    def set_order(self):
        """Loop layers from LOOP_AT on: before that a step costs less and learns as much."""
        fraction = run_fraction(self.timed, self.step, self.seconds)
        self.model.looped = self.config.num_loops > 0 and fraction >= self.config.loop_at
        order = layer_order(self.config, self.model.looped)
        # Where it changes, loss and step time do: whoever reads the log must see why.
        if self.config.num_loops and order != self.logged_order:
            visits = " ".join(map(str, order))
            self.runtime.log(f"layer_order step:{self.step} visits:{len(order)} layers:{visits}")
            self.logged_order = order

    def set_lrs(self, scale):
        """Bring every schedule to this step: rates, Muon's momentum, late rounding of weights."""
        config = self.config
        self.muon.lr = config.matrix_lr * scale
        self.muon.momentum = momentum_at(config, self.step)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * scale
        if config.late_qat_threshold:
            self.model.set_qat(float(scale < config.late_qat_threshold))

    def accumulate(self, step, stream):
        """Gradients of this rank's share of the step's span; returns its share of the mean loss."""
        config = self.config
        first = self.comm.rank * self.seqs_per_rank  # this rank's first sequence in the step
        seqs_per_step = config.train_batch_tokens // config.train_seq_len
        with self.timer.part("data"):
            # (n, T + 1): one token more than there are inputs, the last target.
            rows = stream.sequences(step * seqs_per_step + first, self.seqs_per_rank)
        self.model.zero_grad()
        self.model.train()  # a validation may have left it in evaluation mode
        total = 0.0  # a 0-d tensor after the first micro-batch: it stays on the device
        for low in range(0, self.seqs_per_rank, self.micro_batch_seqs):
            high = low + self.micro_batch_seqs
            with self.timer.part("data"):
                tokens = self.runtime.to_device(rows[low:high])
                noise = flow_noise_keys(
                    config, step, first + low, self.micro_batch_seqs, self.runtime.device
                )
            with self.timer.part("forward_backward"), self.naming_a_smaller_batch():
                loss = self.micro_batch_loss(tokens, noise)
                total = total + loss.detach()
                if high == self.seqs_per_rank:
                    # Ahead of the last backward, for which it then need not wait.
                    on_host = HostCopy(total)
                loss.backward()
        with self.timer.part("forward_backward"):
            # The step's one synchronisation. On CUDA the last backward is still running behind it,
            # long enough to hide the agreement of the ranks and the optimisers' launches.
            return on_host.read()

    def micro_batch_loss(self, tokens, noise):
        """Share of the step's mean loss (0-d) of `tokens` (B, T + 1)."""
        ids = tokens[:, :-1]  # (B, T)
        targets = tokens[:, 1:]  # (B, T): each token's successor
        with self.runtime.autocast():
            # Divided here, so that sums over micro-batches and ranks are means.
            return self.loss(ids, targets, noise) / (self.accumulation_steps * self.comm.world)

    @contextlib.contextmanager
    def naming_a_smaller_batch(self):
        """Out of memory becomes a ResourceError that names the setting to change."""
        try:
            yield
        except OUT_OF_MEMORY:
            length = self.config.train_seq_len
            smaller = max(self.micro_batch_seqs * length // 2, length)
            raise ResourceError(
                "out of memory in training with MICRO_BATCH_TOKENS="
                f"{self.config.micro_batch_tokens}: run the same command with "
                f"MICRO_BATCH_TOKENS={smaller}"
            ) from None

    def clock(self):
        milliseconds = 1000 * self.seconds
        average = milliseconds / max(1, self.step)
        return f"train_time:{milliseconds:.0f}ms step_avg:{average:.2f}ms"

    def report(self, loss, scale):
        """The step's log line, and on a terminal the moving one."""
        config = self.config
        step = self.step
        text = f"step:{step}/{config.iterations} train_loss:{loss:.4f}"
        # The first steps show whether a run is sound at all.
        logged = step <= 5 or step % config.train_log_every == 0 or step == config.iterations
        # The pace since the last line, where a node that slows down shows at once.
        seconds = max(1e-9, self.timer.recent(step - self.logged_step))
        pace = f"tokens_per_s:{config.train_batch_tokens / seconds:.0f}"
        if logged:
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
        """Two lines at the end: the pace and its share of the device's peak, where time went."""
        timer = self.timer
        if not timer.steps:
            return
        median = timer.milliseconds(50)
        tokens = self.config.train_batch_tokens * len(timer.steps)
        tokens_per_second = tokens / max(1e-9, self.seconds)
        device = device_name(self.runtime.device)
        peak = peak_flops(device)
        share = None
        described = f"unknown (no bfloat16 peak is listed for {device})"
        if peak is not None:
            flops_per_second = timer.flops / max(1e-9, self.seconds)
            share = flops_per_second / (peak * self.comm.world)
            described = f"{100 * share:.1f}% (of {peak / 1e12:.0f} TFLOP/s, {device})"
        self.runtime.log(
            f"throughput tokens_per_s:{tokens_per_second:.0f} step_median:{median:.2f}ms "
            f"step_p95:{timer.milliseconds(95):.2f}ms peak_share:{described}"
        )
        parts = " ".join(f"{name}:{seconds:.1f}s" for name, seconds in timer.seconds.items())
        self.runtime.log(f"time_in {parts} all_steps:{self.seconds:.1f}s")
        self.runtime.event(
            "throughput",
            tokens_per_s=tokens_per_second,
            step_median_ms=median,
            step_p95_ms=timer.milliseconds(95),
            peak_share=share,
            flops=timer.flops,
            seconds_in=timer.seconds,
        )

    def validate(self):
        """Validate the raw weights by non-overlapping windows; this is no training time."""
        config = self.config
        begin = time.monotonic()
        try:
            with self.timer.part("validation"):
                score = evaluate(self.model, self.val, config, self.runtime, config.eval_seq_len)
        except ArtifactError:  # what the evaluation says to weights whose loss is not finite
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
        timing = self.timer.state_dict()
        generator = np.random.default_rng(0)
        shape = (self.seqs_per_rank, config.train_seq_len + 1)
        tokens = generator.integers(0, config.vocab_size, shape)
        synthetic = types.SimpleNamespace(sequences=lambda first, count: tokens)
        # Both orders of the layers, so that no graph is compiled in the middle of the run.
        for looped in (False, True) if config.num_loops else (False,):
            self.model.looped = looped
            for i in range(config.warmup_steps):
                self.accumulate(-1 - i, synthetic)  # steps that no run has: noise of their own
                reduce_clip_step(self.muon, self.adamw, self.comm, config.grad_clip_norm)
        self.restore(before)
        self.timer.load_state_dict(timing)
        self.runtime.log(
            f"warmup_steps:{config.warmup_steps} done, weights and optimisers restored"
        )

    def training_state(self):
        """Everything the next step depends on; every rank must call it."""
        return {name: getattr(self, name).state_dict() for name in self.PARTS}

    def restore(self, state):
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])

    def save(self, wait=False):
        """Copy the state and write it in the background.

        With `wait`, raises ResourceError if it cannot be written. Weights that are not finite are
        never saved: the checkpoints before them are the ones to keep.
        """
        finite = [bool(torch.isfinite(param).all()) for param in self.model.parameters()]
        if not all(finite):
            self.runtime.log(f"warning: no checkpoint at step {self.step}: weights are not finite")
            return
        state = self.training_state()  # a collective: momentum is gathered from all ranks
        self.saved_step = self.step
        if self.runtime.is_main:
            state.update(self.identity)
            state.update(step=self.step, seconds=self.seconds)
            state.update(timing=self.timer.state_dict())
            self.checkpoints.save(self.step, state, functools.partial(self.report_saved, self.step))
        self.checkpoints.saved_at = time.monotonic()
        if wait:
            self.checkpoints.wait_or_raise()
            # A rank that left now would have the launcher end the one that still writes.
            self.comm.barrier()

    def report_saved(self, step, seconds, size):
        self.runtime.log(f"checkpoint_saved step:{step} seconds:{seconds:.2f} bytes:{size}")
        self.runtime.event("checkpoint", step=step, seconds=round(seconds, 3), bytes=size)

    def load(self):
        """Go on from the newest readable checkpoint; all ranks read the one that rank 0 found."""
        step, state = self.checkpoints.load()
        if not step:
            return
        path = self.checkpoints.path(step)
        if any(state[name] != value for name, value in self.identity.items()):
            raise ConfigError(
                f"{path} belongs to other settings or data: set another RUN_ID or RESUME=never"
            )
        self.restore(state)
        # With step and clock the next step is the one that would have come.
        self.step = step
        self.seconds = state["seconds"]
        self.timer.load_state_dict(state["timing"])
        self.logged_step = step
        self.runtime.log(f"resumed_from:{path} step:{step}")

    def diverged(self, loss):
        """Save the weights that met the bad loss if they are finite themselves, and stop."""
        self.save(wait=True)
        raise DivergedError(
            f"loss is {loss} at step {self.step + 1}: lower the learning rates; last good "
            f"weights: {self.checkpoints.last()}"
        )

    def export(self):
        """{"config", "state_dict", "info"} of the weights to pack: the averages named by Config."""
        kind, tensors = self.average.exported()
        self.runtime.log(f"export:{kind}")
        # The model's own state first, for what is no parameter; then the averages in its place.
        state = dict(self.model.state_dict())
        names = [name for name, _ in self.model.named_parameters()]
        state.update(zip(names, tensors, strict=True))
        info = dict(
            steps=self.step,
            train_time_s=self.seconds,
            step_avg_ms=1000 * self.seconds / max(1, self.step),
            stopped_early=self.stopped_early,
            peak_mib=self.runtime.peak_mib().allocated,
        )
        return dict(
            config=self.config.as_dict("arch", "eval"), state_dict=private_copy(state), info=info
        )


def train(config, runtime, val, path, reserve=0.0):
    """Train (or go on training), write the exported float weights to `path`.

    A wallclock cap leaves `reserve` seconds free, the same number on every rank.
    Raises Stopped, DivergedError, DataError, ResourceError or ConfigError (see their exit codes).
    """
    trainer = Trainer(config, runtime, val, reserve)
    trainer.announce()
    trainer.run()
    trainer.report_throughput()
    exported = trainer.export()
    allocated, reserved = runtime.peak_mib()
    runtime.log(f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB")
    if runtime.is_main:
        save_tensors(path, exported)
    runtime.event("trained", **exported["info"])
    runtime.comm.barrier()  # whoever reads the file next finds it whole


# ==================================================================================================
# Evaluation
# One window plan, one meter, one scoring loop. Roundtrip, sliding window, test-time training and
# SLOT are that loop with other arguments: a flat list of work items (score these windows, take this
# training step) and a cursor, so that a killed evaluation goes on where it was.
# ==================================================================================================
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
LOGITS_ROWS = 8192  # positions whose (V,) logits exist at the same time
LOG_SECONDS = 15  # between two lines of progress in the log
# The same inputs give the same bits: no reduction is tuned by the clock.
DETERMINISTIC = {"deterministic": True}


@dataclasses.dataclass(frozen=True)
class Score:
    """Result of one evaluation: val_loss in nats per token, val_bpb in bits per byte."""

    label: str
    val_loss: float
    val_bpb: float
    tokens: int
    bytes: int
    seconds: float  # over all processes that worked on it, one after another
    legal: bool
    spot_checks: int = 0  # rounds of scoring that were repeated on other later tokens


class ScoredTwiceError(LegalityError):
    """C4: a target came twice or out of order."""


class TrainedAheadError(LegalityError):
    """C3: test-time training was about to use a target that is not scored yet."""


class NotAnEntryError(LegalityError):
    """C2: a score is not the entry of a normalised distribution."""


class LookedAheadError(LegalityError):
    """C1: a score depends on its own token or on a later one."""


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
    trained on: nothing would be scored with what it taught.
    """
    chunk = config.ttt_chunk_tokens if ttt else num_targets
    chunks = -(-num_targets // chunk)  # rounded up
    work = []
    high = 0
    for c in range(chunks):
        # The windows that begin to score in this chunk; rounds do not cross chunks, so that all
        # windows of the next one see what this one taught.
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
    """float64 sums of nll and bytes on this rank, and the targets that they hold."""

    def __init__(self, num_targets, device):
        # The sum stays on the device: to read it makes the host wait.
        self.nll = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = 0
        self.bytes = 0
        self.last = 0  # end of the last span that was added
        self.coverage = np.zeros(num_targets, np.uint8)  # how often each target was scored

    def add(self, windows, nll, num_bytes):
        """Add the scored targets of `windows` with their summed nll (0-d float64).

        Raises ScoredTwiceError for a target that comes twice or out of order.
        """
        for _, first, end in windows:
            if first < self.last or self.coverage[first:end].any():
                raise ScoredTwiceError(
                    f"targets {first}…{end} come after {self.last}: out of order or twice"
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
        """Take up a saved state: rows (ranks, 4) as of row(), coverage (num_targets,) of all."""
        nll, tokens, num_bytes, _ = rows[comm.rank]
        self.nll.fill_(nll)
        self.tokens = int(tokens)
        self.bytes = int(num_bytes)
        self.last = int(rows[:, 3].max())
        # Only one rank may keep what is that of all together.
        self.coverage = coverage if comm.rank == 0 else np.zeros_like(coverage)


@contextlib.contextmanager
def evaluation_mode(model, freeze_blocks):
    """Evaluation mode with the first blocks frozen; yields the parameters that may be trained.

    Weights, modes and what needs gradients are afterwards as they were found.
    """
    params = list(model.parameters())
    values = [p.detach().clone() for p in params]
    required = [p.requires_grad for p in params]
    training = model.training
    try:
        model.eval()
        for block in model.blocks[:freeze_blocks]:
            block.requires_grad_(False)
        yield [p for p in params if p.requires_grad]
    finally:
        with torch.no_grad():
            for param, value, requires_grad in zip(params, values, required):
                param.copy_(value)
                param.requires_grad_(requires_grad)
                param.grad = None
        model.train(training)


def other_tokens(tokens, vocab_size, random):
    """Tokens (n,) of the same type, each different from the one that it replaces."""
    # A shift by 1 to V - 1 modulo V never gives the same token again.
    shift = random.integers(1, vocab_size, len(tokens))
    return ((tokens + shift) % vocab_size).astype(tokens.dtype)


def equal_part(windows, size):
    """The first windows, up to `size`, as far as they score the same number of targets.

    Only the first and the last window of a stream score another number than the stride.
    """
    part = windows[:1]
    count = windows[0].end - windows[0].first
    for window in windows[1:size]:
        if window.end - window.first != count:
            break
        part.append(window)
    return part


class Batch(typing.NamedTuple):
    """Windows that go through the model together and score equally many targets each."""

    windows: list  # of Window, (n,)
    count: int  # targets that each window scores, its last ones
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
        known_until = first if causal else end
        known[i, : known_until - start] = 1
    rows = len(known) if causal else 1
    count = known.sum(1).clamp(min=1) if causal else known.sum()
    shift = torch.zeros(rows, 1, hidden.size(-1), device=hidden.device, requires_grad=True)
    adamw = torch.optim.AdamW([shift], lr=config.slot_lr)
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
    """nll (n * count,) of a batch's scored targets, window after window; only these get logits.

    hidden (B, T, D); `observer` is shown the targets' indices, log-probabilities and nll.
    """
    # Rows that only fill a compiled shape are left out.
    n = len(batch.windows)
    states = hidden[:n, -batch.count :].flatten(0, 1)  # (n * count, D)
    tokens = batch.targets[:n, -batch.count :].flatten()  # (n * count,)
    indices = np.concatenate([np.arange(first, end) for _, first, end in batch.windows])
    out = []
    for low in range(0, len(tokens), LOGITS_ROWS):
        part = slice(low, low + LOGITS_ROWS)
        logps = log_probs(model.logits(states[part]))  # (rows, V)
        entries = logps.gather(1, tokens[part, None])  # (rows, 1)
        nll = -entries[:, 0]
        observer.scored(indices[part], logps, nll)
        out.append(nll)
    return torch.cat(out)


class Observer:
    """What the audit sees of an evaluation; every method is called on the real path."""

    def scored(self, targets, logps, nll):
        """Target indices (n,), their log-probabilities (n, V) and the nll (n,) that is counted."""

    def before_item(self, evaluation, item):
        """Called before each work item, on every rank."""

    def after_item(self, evaluation, item):
        """Called after each work item, on every rank."""


class ScoresFile(Observer):
    """What SCORES_FILE shows a reviewer: the nll of every target (n,), in nats, as counted."""

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


class SpotCheck(Observer):
    """What a round of scoring shows of the targets up to `place`, which may see no later token."""

    def __init__(self, place, low, high, observer):
        self.place = place
        self.low = low  # first target of the round
        self.observer = observer  # is shown the same
        self.nll = np.zeros(high - low, np.float32)  # of targets before `place`
        self.logps = None  # (V,) of target `place`: of its distribution, not only of its own token
        self.normalised = True

    def scored(self, targets, logps, nll):
        self.observer.scored(targets, logps, nll)
        worst = logps.double().logsumexp(-1).abs().max().item()
        if worst > 1e-4:  # false for NaN, which is an error of another kind
            self.normalised = False
        before = targets < self.place
        self.nll[targets[before] - self.low] = nll.float().cpu().numpy()[before]
        if self.place in targets:
            row = int(np.flatnonzero(targets == self.place)[0])
            self.logps = logps[row].float().cpu().numpy()

    def equals(self, other):
        """Bit for bit; damaged weights may give NaN, which is an error of another kind."""
        same_nll = np.array_equal(self.nll, other.nll, equal_nan=True)
        return same_nll and np.array_equal(self.logps, other.logps, equal_nan=True)


def draw_rounds(work, share, seed):
    """Cursors of the ScoreRounds to check: about `share` of them, none or at least one."""
    rounds = [cursor for cursor, item in enumerate(work) if isinstance(item, ScoreRound)]
    if not share or not rounds:
        return set()
    count = max(1, round(share * len(rounds)))
    random = np.random.default_rng(seed)
    return set(random.choice(rounds, count, replace=False).tolist())


def check_seed(config, text):
    """AUDIT_SEED, or a seed that follows from what is checked: nobody can choose it beforehand."""
    if config.audit_seed:
        return config.audit_seed
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


class Evaluation:
    """One pass over a validation stream.

    `ttt` trains on scored chunks (score-first test-time training), `slot` shifts hidden states.
    `checkpoints`, if given, keeps the state (cursor, sums, coverage, adapted weights, momentum);
    only an evaluation of the same `identity`, settings and text goes on from it. `spot_checks` is
    the share of rounds that are scored again with other tokens after a random position.
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
        self.stride = stride
        self.ttt = ttt
        self.slot = slot
        self.observer = observer or Observer()
        self.checkpoints = checkpoints
        self.label = label
        self.quiet = quiet  # no lines of progress
        # What must agree before a saved state is taken up.
        text = stream.fingerprint["val_sha256"]
        self.identity = f"{identity}/{label}/{stride}/{ttt}/{slot}/{text}/{self.comm.world} ranks"
        if ttt:
            # Threads split the sums of gradients, and so do ranks.
            self.identity += f"/{torch.get_num_threads()} threads"
        # The text lies on the device: a batch is gathered there from a list of positions.
        tokens = torch.from_numpy(stream.tokens.astype(np.int32))  # (num_targets + 1,)
        self.tokens = tokens.to(runtime.device)
        self.plan(spot_checks)
        self.compile_functions()
        self.sgd = None  # the optimiser of test-time training
        self.batch_limit = None  # windows per batch that fit, once more did not
        self.cursor = 0  # the next work item
        self.scored_until = 0  # all targets before this one are scored, on all ranks
        self.spots_done = 0  # rounds that were checked and agreed
        self.seconds = 0.0  # spent so far, by earlier processes too

    def plan(self, spot_checks):
        """Set `windows`, `work`, the empty `meter`, and `spots`, the cursors of rounds to check."""
        config = self.config
        num_targets = self.stream.num_targets
        self.meter = Meter(num_targets, self.runtime.device)
        # The plan is the same list on every rank, so that collectives meet.
        self.windows = plan_windows(num_targets, config.eval_seq_len, self.stride)
        per_round = config.eval_batch_seqs * self.comm.world
        self.work = plan_work(self.windows, num_targets, config, per_round, self.ttt)
        self.spot_seed = check_seed(config, self.identity)
        if self.slot == "published":
            spot_checks = 0.0  # known to be illegal, and marked so
        self.spots = draw_rounds(self.work, spot_checks, self.spot_seed)

    def compile_functions(self):
        """Set the three functions that run the model, compiled where this run compiles."""
        compiled = self.runtime.compiled
        self.hidden = compiled(self.model.hidden, DETERMINISTIC)
        self.loss = compiled(self.model, DETERMINISTIC)
        self.step_loss = self.loss  # of a whole test-time training step
        if self.runtime.cuda_graphs(self.config.ttt_cuda_graph):
            graph = {**DETERMINISTIC, "triton.cudagraphs": True}
            self.step_loss = compiled(self.model, graph)

    def run(self, last_target=None):
        """Score all targets (or until a round begins beyond last_target); returns a Score."""
        with evaluation_mode(self.model, self.config.ttt_freeze_blocks) as params:
            if self.ttt:
                # Made anew for every evaluation: nothing is left of the one before.
                self.sgd = torch.optim.SGD(params, self.config.ttt_lr, self.config.ttt_momentum)
            self.load()
            # As if this process had done all of it.
            self.started = time.monotonic() - self.seconds
            self.shown = self.logged = self.started
            if self.spots:
                self.runtime.log(
                    f"spot_checks {self.label} rounds:{len(self.spots)} audit_seed:{self.spot_seed}"
                )
            while self.cursor < len(self.work):
                item = self.work[self.cursor]
                if last_target is not None and self.begins_beyond(last_target, item):
                    break
                self.observer.before_item(self, item)
                if isinstance(item, ScoreRound):
                    score = self.spot_check if self.cursor in self.spots else self.score
                    score(item)
                    self.scored_until = self.windows[item.high - 1].end
                else:
                    self.train(item)
                self.observer.after_item(self, item)
                self.cursor += 1
                self.after_item()
            if self.checkpoints is not None:
                self.checkpoints.wait()
            return self.result(complete=last_target is None)

    def begins_beyond(self, target, item):
        return isinstance(item, ScoreRound) and self.windows[item.low].first > target

    def after_item(self):
        """Between items: show progress, save the state when due, stop when wanted."""
        self.seconds = time.monotonic() - self.started
        self.show_progress()
        keeper = self.runtime.is_main and self.checkpoints is not None
        more = self.cursor < len(self.work)
        due = more and keeper and self.checkpoints.due()
        wanted = more and self.runtime.stop.wanted()
        # One collective for both, so that all ranks save or stop after the same item.
        stop, save = self.comm.all_reduce_scalars(wanted, due)
        if (stop or save) and self.checkpoints is not None:
            self.save(wait=bool(stop))
        if stop:
            raise Stopped(f"in {self.label or 'validation'} at item {self.cursor}/{len(self.work)}")

    def show_progress(self):
        """The running score: on a terminal every second, in the log every LOG_SECONDS."""
        now = time.monotonic()
        every = 1 if sys.stdout.isatty() else LOG_SECONDS
        # Not after every item: to read the sum makes the host wait for the device.
        if self.quiet or not (self.label and self.runtime.is_main and self.meter.bytes):
            return
        if now - self.shown < every:
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
            size = min(size, self.batch_limit or size)
            try:
                return run(size)
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

    def share_of(self, item):
        """This rank's windows of a round; the last round of a chunk may leave it without any."""
        size = self.config.eval_batch_seqs
        low = item.low + self.comm.rank * size
        return self.windows[low : min(low + size, item.high)]

    def score(self, item):
        """Score this rank's share of a round's windows."""
        share = self.share_of(item)
        if not share:
            return
        nll = self.summed_nll(share, self.observer)
        num_bytes = 0
        for _, first, end in share:
            num_bytes += int(self.stream.bytes[first:end].sum(dtype=np.int64))
        self.meter.add(share, nll, num_bytes)

    def summed_nll(self, windows, observer):
        """Summed nll (0-d float64) of the scored targets of `windows`."""
        total = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        left = list(windows)

        def next_batch(size):
            part = equal_part(left, size)
            return len(part), self.batch_nll(part, size, observer)

        while left:
            # Batch by batch, so that nothing is shown to the observer twice.
            done, nll = self.halving(next_batch, self.config.eval_batch_seqs)
            total += nll.double().sum()  # in float64: 62 million summands
            left = left[done:]
        return total

    @torch.no_grad()
    def batch_nll(self, windows, size, observer):
        """nll of the windows' scored targets, from one forward pass of up to `size` rows."""
        starts = [window.start for window in windows]
        if self.runtime.compiling:
            # One compiled shape: the last window fills the rows that are missing.
            starts += starts[-1:] * (size - len(starts))
        length = windows[0].end - windows[0].start  # all windows of a stream are equally long
        count = windows[0].end - windows[0].first
        batch = Batch(windows, count, *self.rows(starts, length))
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

    def spot_check(self, item):
        """Score a round, and again on other tokens from some target on, which is not counted.

        Raises LookedAheadError unless all that came before that target is the same, bit for bit,
        and NotAnEntryError where probabilities do not sum to 1.
        """
        self.spots_done += 1  # on all ranks, each of which checks its own share
        share = self.share_of(item)
        if not share:
            return
        low = share[0].first
        high = share[-1].end
        random = np.random.default_rng([self.spot_seed, self.cursor])
        place = int(random.integers(low, high))
        counted = SpotCheck(place, low, high, self.observer)
        self.score_for(item, counted, self.meter)
        again = SpotCheck(place, low, high, Observer())
        # Target `place` is token place + 1. Replaced is all that this round's windows hold from
        # there on, and a window's length more.
        with self.replaced_tokens(place + 1, high + self.config.eval_seq_len, random):
            self.score_for(item, again, Meter(self.stream.num_targets, self.runtime.device))
        if not counted.normalised:
            raise NotAnEntryError(f"{self.label}: a distribution of item {self.cursor} is none")
        if not counted.equals(again):
            raise LookedAheadError(
                f"{self.label}: scores of targets {low}…{place} change with tokens that come "
                f"after them (item {self.cursor}, AUDIT_SEED={self.spot_seed})"
            )

    def score_for(self, item, observer, meter):
        """score(item) before another observer and into another meter."""
        before = self.observer, self.meter
        self.observer = observer
        self.meter = meter
        try:
            self.score(item)
        finally:
            self.observer, self.meter = before

    @contextlib.contextmanager
    def replaced_tokens(self, low, high, random):
        """Inside, tokens [low, high) of the text are others, on the host and on the device."""
        before = self.stream.tokens[low:high].copy()
        self.put_tokens(low, other_tokens(before, self.config.vocab_size, random))
        try:
            yield
        finally:
            self.put_tokens(low, before)

    def put_tokens(self, low, tokens):
        high = low + len(tokens)
        self.stream.tokens[low:high] = tokens
        self.tokens[low:high] = torch.from_numpy(tokens.astype(np.int32))

    def train(self, item):
        """One SGD step on rows of a chunk. Raises TrainedAheadError unless all of it is scored."""
        length = self.config.eval_seq_len
        end = item.first + item.row_high * length
        if end > self.scored_until:
            raise TrainedAheadError(
                f"targets up to {end} were to be trained on, but only those before "
                f"{self.scored_until} are scored"
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

    def result(self, complete):
        """The Score over all ranks. Raises LegalityError unless each target was counted once."""
        nats, tokens, num_bytes, _ = self.comm.gather_rows(self.meter.row()).sum(0)
        coverage = self.all_coverage()
        if complete and not (coverage == 1).all():
            raise LegalityError(
                f"targets were scored {coverage.min()}…{coverage.max()} times instead of once"
            )
        # Checked once, here: a check after every batch would make the host wait.
        if not math.isfinite(nats):
            raise ArtifactError(
                f"{self.label or 'validation'}: the score is not finite: the weights are damaged"
            )
        return Score(
            label=self.label,
            val_loss=nats / max(tokens, 1),
            val_bpb=bits_per_byte(nats, max(num_bytes, 1)),
            tokens=int(tokens),
            bytes=int(num_bytes),
            seconds=time.monotonic() - self.started,
            legal=self.slot != "published",
            spot_checks=self.spots_done,
        )

    def all_coverage(self):
        """How often each target (num_targets,) was scored, by all ranks together."""
        total = torch.from_numpy(self.meter.coverage.copy())
        if self.comm.world > 1:
            dist.all_reduce(total)
        return total.numpy()

    def save(self, wait):
        """Write the state in the background; every rank must call it.

        With `wait`, raises ResourceError if it cannot be written.
        """
        # Sums of every rank, each of which goes on with its own.
        state = dict(
            identity=self.identity,
            cursor=self.cursor,
            seconds=self.seconds,
            scored_until=self.scored_until,
            spots_done=self.spots_done,
            rows=torch.from_numpy(self.comm.gather_rows(self.meter.row())),
            coverage=torch.from_numpy(np.packbits(self.all_coverage())),
        )
        if self.ttt:
            # What the chunks so far have taught.
            state.update(model=self.model.state_dict(), sgd=self.sgd.state_dict())
        text = f"evaluation_saved {self.label} item:{self.cursor}/{len(self.work)}"
        if self.runtime.is_main:
            self.checkpoints.save(self.cursor, state, lambda seconds, size: self.runtime.log(text))
        if wait:
            self.checkpoints.wait_or_raise()
            # A rank that left now would have the launcher end the one that still writes.
            self.comm.barrier()

    def load(self):
        """Go on from a saved state of the same evaluation, if there is one."""
        if self.checkpoints is None:
            return
        cursor, state = self.checkpoints.load()
        if state is None:
            return
        # Rank 0 decides for all: a rank on another machine may have another key in its identity.
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
        self.scored_until = state["scored_until"]
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
        # What adapts, after a word on whether it may: legal_ttt, illegal_ttt_slot_published.
        if config.slot == "published":
            adapting.insert(0, "illegal")
        elif config.ttt_enabled:
            adapting.insert(0, "legal")
        label = "_".join(adapting)
        jobs.append(EvaluationJob(label, config.eval_stride, config.ttt_enabled, config.slot))
    return jobs


# ---- legality ----

CHECKS = {
    "C1 future_flip": "no score depends on later tokens",
    "C1 own_token": "no distribution depends on the token that it predicts",
    "C1 dense_sweep": "the same for every position of a first, a later and an adapted window",
    "C2 normalised": "each distribution is over the whole vocabulary and sums to 1",
    "C2 nll_is_entry": "what is summed is minus the entry of each target",
    "C3 state_unchanged": "scoring leaves weights, buffers and optimiser alone",
    "C3 trained_is_scored": "no target is trained on before it is scored",
    "C3 twin_run": "no state depends on a token that it has not scored",
    "C4 coverage": "each target is scored once",
    "C4 single_pass": "from left to right, and sums only grow",
    "C4 score": "nats and bytes, counted anew, give the score that is returned",
    "C4 full_plan": "the plan of the whole evaluation is in order, without gaps",
    "rule smear_bos": "nothing is mixed into a document from the one before it",
}
# The condition that an evaluation found broken by itself.
BROKEN_BY = {
    ScoredTwiceError: "C4 single_pass",
    TrainedAheadError: "C3 trained_is_scored",
    LookedAheadError: "C1 future_flip",
    NotAnEntryError: "C2 nll_is_entry",
}
SWEPT = 16  # positions of a first window that every score's sweep looks at
LN_2 = 0.6931471805599453  # written out: the audit counts for itself


class SweepError(LegalityError):
    """A dense sweep found something, on all ranks: the rest is not worth its time."""


class Watch(Observer):
    """Checks every position that it is shown, and keeps the nll (n,) of every target.

    `keep`: targets whose log-probabilities (V,) are kept too.
    """

    def __init__(self, stream, vocab_size, keep=()):
        self.tokens = stream.tokens  # the text, whatever the evaluation makes of it
        self.vocab_size = vocab_size
        self.nll = np.zeros(stream.num_targets, np.float32)
        self.keep = {int(target): None for target in keep}
        self.worst = 0.0  # largest distance of a distribution's log-sum from 0
        self.wrong_entries = 0

    def scored(self, targets, logps, nll):
        self.nll[targets] = nll.float().cpu().numpy()
        # A subclass of Tensor could show one thing and give another.
        logps = logps.as_subclass(torch.Tensor)
        log_sums = logps.double().logsumexp(-1)  # (n,)
        worst = log_sums.abs().max().item()
        if logps.size(-1) != self.vocab_size or not math.isfinite(worst):
            worst = math.inf
        self.worst = max(self.worst, worst)
        # Looked up by the audit's own copy of the text: target t is token t + 1.
        own = self.tokens[targets + 1].astype(np.int64)
        own = torch.from_numpy(own).to(logps.device)
        entries = logps.gather(1, own.unsqueeze(1))  # (n, 1)
        wrong = nll != -entries.squeeze(1)
        self.wrong_entries += wrong.sum().item()
        wanted = np.isin(targets, list(self.keep))
        for row in np.flatnonzero(wanted):
            target = int(targets[row])
            self.keep[target] = logps[row].float().cpu().numpy()

    def same_distribution(self, other, target):
        """Whether both saw the same; also true where another rank scored the target."""
        mine = self.keep[target]
        if mine is None:
            return True
        return np.array_equal(mine, other.keep[target])


class Recorder(Watch):
    """Also keeps the course of an evaluation.

    `hash_state`: whether to hash the state that each round of scoring finds. `sweeps`: functions of
    the evaluation, by the first target of the round before which they are called.
    """

    def __init__(self, stream, vocab_size, keep=(), hash_state=False, sweeps=None):
        super().__init__(stream, vocab_size, keep)
        self.times = np.zeros(stream.num_targets, np.int64)  # how often each target was shown
        self.nats = 0.0
        self.hash_state = hash_state
        self.sweeps = sweeps or {}
        self.order = []  # first scored target of every round
        self.sums = []  # the meter's nats after every item
        self.state_entering = {}  # first scored target: hash of the state that scores it
        self.state = None  # hash of the state as scoring left it
        self.score_changed_state = False
        self.trained_ahead = False

    def scored(self, targets, logps, nll):
        super().scored(targets, logps, nll)
        np.add.at(self.times, targets, 1)  # counts a target twice if it is shown twice
        self.nats += float(nll.double().sum())

    def before_item(self, evaluation, item):
        if isinstance(item, TrainStep):
            self.trained_ahead |= trains_ahead(evaluation, item)
            self.state = None
            return
        first = evaluation.windows[item.low].first
        self.order.append(first)
        if self.hash_state:
            found = state_hash(evaluation)
            # Since the round before only scoring has happened.
            self.score_changed_state |= self.state not in (None, found)
            self.state = found
            self.state_entering[first] = found
        if first in self.sweeps:
            self.sweeps[first](evaluation)

    def after_item(self, evaluation, item):
        self.sums.append(float(evaluation.meter.nll))
        if isinstance(item, TrainStep) or not self.hash_state:
            return
        following = evaluation.cursor + 1
        if following < len(evaluation.work):
            item = evaluation.work[following]
            if isinstance(item, ScoreRound):
                return  # which compares for itself, before it scores
        left = state_hash(evaluation)
        self.score_changed_state |= left != self.state


def trains_ahead(evaluation, item):
    """Whether a TrainStep uses a target that is not scored yet, or that is to be scored later."""
    end = item.first + item.row_high * evaluation.config.eval_seq_len
    if not evaluation.all_coverage()[item.first : end].all():
        return True
    for upcoming in evaluation.work[evaluation.cursor + 1 :]:
        if isinstance(upcoming, ScoreRound):
            return end > evaluation.windows[upcoming.low].first
    return False


def state_hash(evaluation):
    """SHA-256 over parameters, buffers and optimiser state of an evaluation."""
    tensors = [*evaluation.model.parameters(), *evaluation.model.buffers()]
    if evaluation.sgd is not None:
        for state in evaluation.sgd.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):  # momentum; None before the first step
                    tensors.append(value)
    digest = hashlib.sha256()
    for tensor in tensors:
        # bfloat16 has no counterpart in NumPy, hence the bytes.
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def windows_fault(evaluation):
    """What is wrong with the windows of an evaluation, or an empty text."""
    seq_len = evaluation.config.eval_seq_len
    done = 0
    for start, first, end in evaluation.windows:
        in_order = start <= first < end and first == done
        if not in_order or end - start > seq_len:
            return f"window {start}…{end} scores from {first} after {done}"
        done = end
    if done != evaluation.stream.num_targets:
        return f"targets from {done} on are not scored"
    return ""


def work_fault(evaluation):
    """What is wrong with the work items of an evaluation: (check, text), the text may be empty."""
    windows = evaluation.windows
    upcoming = 0  # the next window
    scored = 0  # end of the targets that are scored by then
    for item in evaluation.work:
        if isinstance(item, TrainStep):
            end = item.first + item.row_high * evaluation.config.eval_seq_len
            if end > scored:
                text = f"targets up to {end} are trained on after {scored}"
                return "C3 trained_is_scored", text
            continue
        if item.low != upcoming or not item.low < item.high <= len(windows):
            return "C4 full_plan", f"windows {item.low}…{item.high} come after {upcoming}"
        upcoming = item.high
        scored = windows[upcoming - 1].end
    if upcoming != len(windows):
        return "C4 full_plan", f"windows from {upcoming} on are not scored"
    return "C4 full_plan", ""


class ByteCount:
    """The audit's own count of UTF-8 bytes, from the tokenizer's pieces.

    A piece that stands for no text has none; a space in front of a piece counts unless the piece
    before it stands for no text.
    """

    def __init__(self, tokenizer):
        lengths = []
        spaces = []
        for i in range(tokenizer.vocab_size()):
            text = tokenizer.id_to_piece(i).replace("▁", " ")
            if tokenizer.is_byte(i):
                text = "?"  # any one byte
            if tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i):
                text = ""
            lengths.append(len(text.encode()))
            spaces.append(text.startswith(" "))
        self.lengths = np.array(lengths)  # (V,)
        self.spaces = np.array(spaces)  # (V,)

    def of_targets(self, tokens):
        """Bytes (n,) of the targets tokens[1:] of n + 1 tokens."""
        targets = tokens[1:]
        silent_before = self.lengths[tokens[:-1]] == 0
        return self.lengths[targets] - (self.spaces[targets] & silent_before)

    def total(self, tokens):
        """Bytes of all targets, counted in parts for memory's sake."""
        total = 0
        for low in range(0, len(tokens) - 1, 1 << 20):
            part = tokens[low : low + (1 << 20) + 1]
            total += int(self.of_targets(part).sum())
        return total


class Audit:
    """Runs the checks for every EvaluationJob; report() logs and returns them."""

    def __init__(self, model, stream, config, runtime):
        self.model = model
        self.stream = stream
        self.config = config
        self.runtime = runtime
        self.comm = runtime.comm
        self.seed = check_seed(config, stream.fingerprint["val_sha256"])
        # All ranks draw the same texts and places from the first, their own from the second.
        self.random = np.random.default_rng(self.seed)
        self.own_random = np.random.default_rng([self.seed, self.comm.rank])
        self.byte_count = ByteCount(stream.token_bytes.model)
        # Half of it is short or silent: controls, bytes, single characters.
        vocab = np.arange(config.vocab_size)
        short = vocab[self.byte_count.lengths <= 1]
        often = np.resize(short, len(vocab))
        self.salt = np.concatenate([vocab, often])
        self.counts = dict.fromkeys(CHECKS, 0)  # comparisons that were made
        self.failures = {name: [] for name in CHECKS}

    def note(self, check, passed, what):
        """One comparison of a check; `what` is shown when it failed."""
        self.counts[check] += 1
        if not passed:
            self.failures[check].append(what)

    def report(self):
        """[{"name", "passed", "detail"}], logged; a check passes when it passes on every rank."""
        self.runtime.log(f"legality audit_seed:{self.seed}")
        checks = []
        for name, claim in CHECKS.items():
            failures = self.failures[name]
            # Each rank sees only what it scored.
            passed = not self.comm.any_rank(failures)
            detail = f"{claim}; {self.counts[name]} comparisons"
            if failures:
                some = ", ".join(failures[:3])
                detail += f"; {len(failures)} differ: {some}"
            checks.append(dict(name=name, passed=passed, detail=detail))
            verdict = "pass" if passed else "FAIL"
            if passed and not self.comm.any_rank(self.counts[name]):
                verdict = "not_reached"  # after a sweep that found something
            self.runtime.log(f"legality {name} {verdict} {detail}")
        return checks

    # ---- runs ----

    def evaluation(self, job, stream, observer=None):
        """The evaluation that scores, not a copy of it."""
        return Evaluation(
            self.model,
            stream,
            self.config,
            self.runtime,
            job.stride,
            ttt=job.ttt,
            slot=job.slot,
            observer=observer,
            label=job.label,
            quiet=True,
        )

    def changed(self, stream, low):
        """`stream` with all tokens from `low` on replaced by others, often by a BOS first."""
        tokens = np.array(stream.tokens)
        later = other_tokens(tokens[low:], self.config.vocab_size, self.random)
        later[0] = self.replacement(tokens[low])
        tokens[low:] = later
        return stream.replaced(tokens)

    def beginning(self, job):
        """The part of the text that a job is run on: some rounds, with TTT a chunk before them.

        One token in eight is replaced by any other, special ones above all: what is rare in a text
        must be treated like the rest.
        """
        config = self.config
        # At least two batches after the first window, and more than one round of all ranks.
        batches = max(2, self.comm.world + 1)
        windows = batches * config.eval_batch_seqs
        targets = config.eval_seq_len + windows * job.stride
        if job.ttt:
            targets += config.ttt_chunk_tokens
        targets = min(self.stream.num_targets, targets)
        tokens = np.array(self.stream.tokens[: targets + 1])
        salted = self.random.random(len(tokens)) < 1 / 8
        salt = self.random.choice(self.salt, len(tokens))
        tokens[salted] = salt[salted]
        return self.stream.replaced(tokens)

    def places(self, job, num_targets):
        """Targets after which everything is replaced: at and around edges, and some at random."""
        config = self.config
        last = num_targets - 1
        length = config.eval_seq_len
        chunk = config.ttt_chunk_tokens
        if job.ttt and last > chunk:
            # The edge between two chunks, and inside the second.
            inside = self.random.integers(chunk + 1, last + 1)
            wanted = [chunk, int(inside)]
        else:
            # The edges of the first window and of the first batch.
            batch_end = length + job.stride * (config.eval_batch_seqs - 1)
            wanted = [length, batch_end + 1, last]
        # Inside the first chunk, or anywhere in a short text.
        anywhere = self.random.integers(1, min(last, chunk) + 1)
        wanted.append(int(anywhere))
        places = {place for place in wanted if 0 < place <= last}
        return sorted(places)

    # ---- checks ----

    def check_job(self, job):
        """All checks that look at one score: its plan, its run, and runs on changed tokens."""
        if not self.check_plan(job):
            return  # what such a plan scores is not worth looking at
        vocab = self.config.vocab_size
        chunk = self.config.ttt_chunk_tokens
        stream = self.beginning(job)
        places = self.places(job, stream.num_targets)
        sweeps = {0: functools.partial(self.sweep_windows, job)}
        if job.ttt and stream.num_targets > chunk:
            # What the first chunk has taught is in use from here on.
            sweeps[chunk] = functools.partial(self.sweep_later, job)
        base = Recorder(stream, vocab, keep=places, hash_state=True, sweeps=sweeps)
        evaluation = self.evaluation(job, stream, base)
        score = evaluation.run()
        self.check_distributions(job, base)
        self.check_sharp(job, stream)
        self.check_order(job, base, evaluation)
        self.check_score(job, base, evaluation, score)
        for place in places:
            # Target `place` is token place + 1: it and all that follows are replaced.
            other = self.changed(stream, place + 1)
            # Without test-time training the state hardly moves: once is enough.
            hash_state = job.ttt or place == places[-1]
            twin = Recorder(other, vocab, keep=[place], hash_state=hash_state)
            self.evaluation(job, other, twin).run(last_target=place)
            self.check_twin(job, base, twin, place)

    def check_job_or_note(self, job):
        """check_job, of which an error is a finding too."""
        try:
            self.check_job(job)
        except SweepError:
            raise
        except LegalityError as error:
            if self.comm.world > 1:
                raise  # the other ranks wait in the middle of an evaluation
            check = BROKEN_BY.get(type(error), "C4 coverage")
            self.note(check, False, f"{job.label}: {error}")

    def check_plan(self, job):
        """C3 and C4 of the plan of the whole evaluation, which no short run shows."""
        evaluation = self.evaluation(job, self.stream)
        text = windows_fault(evaluation)
        self.note("C4 full_plan", not text, f"{job.label}: {text}")
        if text:
            return False
        check, text = work_fault(evaluation)
        self.note(check, not text, f"{job.label}: {text}")
        return not text

    def check_distributions(self, job, watch):
        """C2: every distribution that was shown, and that nll are its entries."""
        worst = watch.worst
        text = f"{job.label}: log-sum {worst:.1e}"
        is_normalised = worst < 1e-4
        self.note("C2 normalised", is_normalised, text)
        wrong = watch.wrong_entries
        text = f"{job.label}: {wrong} targets"
        self.note("C2 nll_is_entry", not wrong, text)

    def check_sharp(self, job, stream):
        """C2 where the model is sure of itself, which a weak or a surprised one never is."""
        observer = Watch(stream, self.config.vocab_size)
        evaluation = self.evaluation(job, stream)
        plain = evaluation.hidden

        def sharper(*ids_and_last):
            states = plain(*ids_and_last)  # (B, T, D)
            factors = torch.logspace(0, 2, states.size(1), device=states.device)
            return states * factors.unsqueeze(1).to(states.dtype)

        evaluation.hidden = sharper
        with evaluation_mode(self.model, self.config.ttt_freeze_blocks):
            evaluation.summed_nll(evaluation.windows[:1], observer)
        self.check_distributions(job, observer)

    def check_order(self, job, base, evaluation):
        """C3 and C4 as far as one run shows them."""
        label = job.label
        self.note("C3 state_unchanged", not base.score_changed_state, label)
        self.note("C3 trained_is_scored", not base.trained_ahead, label)
        # Counted twice: by the meter, and as seen here.
        by_meter = evaluation.all_coverage()
        seen = self.comm.gather_rows(base.times).sum(0)
        once = (by_meter == 1) & (seen == 1)
        missed = np.count_nonzero(~once)
        self.note("C4 coverage", not missed, f"{label}: {missed} targets")
        in_order = base.order == sorted(base.order)
        self.note("C4 single_pass", in_order, f"{label}: order of rounds")
        grows = base.sums == sorted(base.sums)
        self.note("C4 single_pass", grows, f"{label}: sums")
        counted = float(evaluation.meter.nll)
        same = math.isclose(counted, base.nats, rel_tol=1e-9)
        text = f"{label}: {counted} nats, not {base.nats}"
        self.note("C2 nll_is_entry", same, text)

    def check_score(self, job, base, evaluation, score):
        """C4: the returned Score is what was shown, per target and per byte of the text."""
        nats = float(self.comm.gather_rows([base.nats]).sum())  # of all ranks
        targets = evaluation.stream.num_targets
        num_bytes = self.byte_count.total(evaluation.stream.tokens)
        expected = {
            "tokens": targets,
            "bytes": num_bytes,
            "val_loss": nats / targets,
            "val_bpb": nats / LN_2 / num_bytes,
        }
        for name, value in expected.items():
            found = getattr(score, name)
            same = math.isclose(found, value, rel_tol=1e-9)
            self.note("C4 score", same, f"{job.label}: {name} is {found}, not {value}")

    def check_twin(self, job, base, twin, place):
        """C1 and C3: what came before target `place` is the same, whatever comes from it on."""
        where = f"{job.label} at {place}"
        # Of every round up to the one that scores `place`.
        same_state = True
        for first, state in twin.state_entering.items():
            same_state &= state == base.state_entering.get(first)
        if twin.hash_state:
            self.note("C3 twin_run", same_state, where)
        if same_state:
            # Otherwise the state is to blame for what differs.
            same_nll = np.array_equal(twin.nll[:place], base.nll[:place])
            self.note("C1 future_flip", same_nll, where)
            self.note("C1 own_token", twin.same_distribution(base, place), where)

    def sweep_windows(self, job, evaluation):
        """Dense sweep of a later window, and of a part of a first one, before the first round."""
        self.sweep_later(job, evaluation)
        length = evaluation.windows[0].end
        self.sweep(job, evaluation, 0, max(1, length // SWEPT))

    def sweep_later(self, job, evaluation):
        """Dense sweep of a window that scores its last `stride` targets."""
        length = evaluation.windows[0].end
        if 0 < job.stride < length:
            self.sweep(job, evaluation, length - job.stride, 1)

    def sweep_first(self):
        """Dense sweep of all positions of a first window, the longest of the checks."""
        _, sliding, *_ = evaluation_jobs(self.config)
        evaluation = self.evaluation(sliding, self.beginning(sliding))
        # The same blocks are frozen as in every evaluation: what is compiled for them serves here.
        with evaluation_mode(self.model, self.config.ttt_freeze_blocks):
            self.sweep(sliding, evaluation, 0, 1)

    def sweep(self, job, evaluation, known, step):
        """C1 for the scored positions of a window of which the first `known` are scored before.

        For every position j (each `step`-th) the token that it predicts is replaced in a copy of
        the window: the distribution at j and the scores before it must be the same. The copies are
        laid out as one text and go through the function that scores, in its own batches. Raises
        SweepError where something differs.
        """
        state = state_hash(evaluation)
        size = self.config.eval_batch_seqs
        length = evaluation.windows[0].end
        span = length + 1
        # Somewhere in the text.
        begin = self.random.integers(0, self.stream.num_targets - length + 1)
        text = np.array(self.stream.tokens[begin : begin + span])
        # A place where a document begins is rare, and may be treated apart: here every eighth.
        text[self.random.random(span) < 1 / 8] = BOS
        copies = np.tile(text, (size, 1))  # (size, span)
        positions = np.arange(known, length, step)
        rows = np.arange(len(positions)) % size
        targets = rows * span + positions  # in the text of copies
        # A copy is compared with the same row of a batch of unchanged ones: all else is equal.
        base = self.watch(job, copies, known, targets)
        for low in range(0, len(positions), size):
            part = slice(low, low + size)
            flipped = copies.copy()
            for row, j in zip(rows[part], positions[part]):
                flipped[row, j + 1] = self.replacement(text[j + 1])
            batch = low // size
            if batch % self.comm.world != self.comm.rank:
                continue  # another rank's; the replacements are drawn on all of them
            twin = self.watch(job, flipped, known, targets[part])
            for row, target in zip(rows[part], targets[part]):
                first = row * span + known
                self.check_flip(job, base, twin, first, target)
        unchanged = state_hash(evaluation) == state
        self.note("C3 state_unchanged", unchanged, f"{job.label}: in a sweep")
        # With another state other scores are no wonder.
        if self.comm.any_rank(unchanged and self.failures["C1 dense_sweep"]):
            raise SweepError(job.label)

    def check_flip(self, job, base, twin, first, target):
        """Compare what lies in a window from its first scored target up to `target`."""
        where = f"{job.label}, scored position {target - first}"
        before = slice(first, target)
        same_nll = np.array_equal(twin.nll[before], base.nll[before])
        self.note("C1 future_flip", same_nll, where)
        same = twin.same_distribution(base, target)
        self.note("C1 own_token", same, where)
        self.note("C1 dense_sweep", same and same_nll, where)

    def replacement(self, token):
        """Another token than `token`, every fourth time a BOS."""
        if token != BOS and self.random.random() < 0.25:
            return BOS
        alone = np.array([token])
        other = other_tokens(alone, self.config.vocab_size, self.random)
        return other[0]

    def watch(self, job, copies, known, keep):
        """Watch of windows laid out as one text: copies (n, T + 1)."""
        span = copies.shape[1]
        stream = self.stream.replaced(copies.reshape(-1))
        windows = []
        for start in range(0, copies.size, span):
            end = start + span - 1  # the last token of a copy is no input
            windows.append(Window(start, start + known, end))
        observer = Watch(stream, self.config.vocab_size, keep)
        evaluation = self.evaluation(job, stream)
        # Nothing may depend on how far an evaluation has come.
        evaluation.cursor = int(self.own_random.integers(0, 1000))
        evaluation.summed_nll(windows, observer)
        self.check_distributions(job, observer)
        return observer

    def check_bytes(self):
        """C4: the bytes by which bits are divided, of the whole text and of every single token."""
        token_bytes = self.stream.token_bytes
        counted = int(self.stream.bytes.sum(dtype=np.int64))
        expected = self.byte_count.total(self.stream.tokens)
        text = f"the text has {counted} bytes, not {expected}"
        self.note("C4 score", counted == expected, text)
        # Each token after a document's start and after itself: a text may not hold what is wrong.
        vocab = np.arange(self.config.vocab_size)
        starts = np.full_like(vocab, BOS)
        tokens = np.stack([starts, vocab, vocab], 1).flatten()
        counted = token_bytes.count(tokens[:-1], tokens[1:])
        differ = counted != self.byte_count.of_targets(tokens)
        wrong = tokens[1:][differ]
        text = f"the bytes of tokens {wrong[:5].tolist()}"
        self.note("C4 score", not len(wrong), text)

    def check_boundary(self):
        """A document's first state takes nothing from the token before it but the bigram's row.

        The organisers ruled on this for the smear gate (#1797); attention may cross documents.
        """
        vocab = self.config.vocab_size
        row = self.random.integers(2, vocab, 16)
        row[8] = BOS  # a new document in the middle
        other = row.copy()
        other[7:8] = other_tokens(row[7:8], vocab, self.random)  # differs just before it
        both = np.stack([row, other])  # (2, 16)
        ids = self.runtime.to_device(both)
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
    try:
        # The score to report first.
        for job in reversed(evaluation_jobs(config)):
            checker.check_job_or_note(job)
        checker.sweep_first()
    except SweepError:
        pass  # noted
    return checker.report()


# ==================================================================================================
# Quantisation
# How a matrix becomes small integers, and which tensors do. It stands before the model because
# rounding during training (late QAT) and packing must agree on the grid to the last bit.
# ==================================================================================================
# ---- the grid ----


class Scheme(typing.NamedTuple):
    """One way in which the artifact stores a tensor."""

    name: str  # as the artifact's header spells it
    dtype: type  # numpy type of the stored values
    bits: int  # of symmetric integer codes with a scale per row; 0 for floating point

    @property
    def top(self):
        """Largest value that may be stored."""
        return largest_code(self.bits) if self.bits else math.inf


# In the order in which the artifact groups them: like beside like compresses best.
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("grid", np.int16, 0),  # integers whose steps differ by row and column, see Grid
        Scheme("int5", np.int8, 5),
        Scheme("int6", np.int8, 6),
        Scheme("int8", np.int8, 8),
        Scheme("fp16", np.float16, 0),
        Scheme("fp32", np.float32, 0),
    )
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
    """Name of the scheme by which the artifact stores a tensor.

    The MLPs of `int5_layers` take 5 bits (see fit_budget). Anything of one dimension, or more than
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


def largest_code(bits):
    """The grid is symmetric: codes lie in [-largest_code, largest_code]."""
    return 2 ** (bits - 1) - 1


def round_to_grid(weight, scale, bits):
    """Codes, still floating point, of the grid points scale * code that are nearest to `weight`."""
    top = largest_code(bits)
    return (weight / scale).round().clamp(-top, top)


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
        low = min(int(place), count - 1)
        high = min(low + 1, count - 1)
        part = place - int(place)
        clips.append(torch.lerp(largest[:, low], largest[:, high], part))
    return torch.stack(clips).unsqueeze(-1)


@torch.no_grad()
def row_scales(rows, bits):
    """float16 step (R, 1) of each row of `rows` (R, C), by GPTQ-lite.

    The largest weight decides how coarse a row's grid is; clipping a few outliers makes it finer
    for all others. Each row takes the candidate that leaves the least squared error.
    """
    # The floor is float16's smallest number: an epsilon, so that rows of zeros stay zeros.
    steps = clip_candidates(rows) / largest_code(bits)  # (Q, R, 1)
    scales = steps.clamp(min=2.0**-24, max=65504.0).half()
    steps = scales.float()  # rounded to float16, as the artifact stores them
    rounded = round_to_grid(rows, steps, bits) * steps  # (Q, R, C)
    errors = (rounded - rows).square().sum(-1, keepdim=True)  # (Q, R, 1)
    best = errors.argmin(0, keepdim=True)  # (1, R, 1)
    return scales.gather(0, best)[0]


@torch.no_grad()
def quantize_rows(weight, bits):
    """int8 codes (R, C) and float16 scales (R, 1) of weight (..., C), one scale per row."""
    rows = weight.detach().float().flatten(0, -2)  # (R, C)
    scales = row_scales(rows, bits)
    codes = round_to_grid(rows, scales.float(), bits)
    return codes.to(torch.int8), scales


# The grid of QUANTIZER=gptq: entry (i, j) of a matrix is stored as an integer times
# unit * 2^(row[i] / 2) * 2^(column[j] / 2). `unit` is the dial that sets the file's size.
STEPS_PER_OCTAVE = 2  # a finer choice of steps costs more bytes than it saves
UNIT_LIMITS = (2.0**-60, 2.0**10)  # with these no stored step overflows or vanishes
MAX_EXPONENT = 64  # of a row or a column, in half octaves
MAX_CODE = 127 * 256 + 127  # codes travel as two signed bytes


class Grid(typing.NamedTuple):
    """Exponents of a matrix's steps, in half octaves, int8."""

    row: np.ndarray  # (R,)
    column: np.ndarray  # (C,)


def gptq_scheme_of(name, shape):
    """Name of the scheme under QUANTIZER=gptq: matrices on the grid, the rest in half precision.

    Half precision of the control scalars loses nothing that could be measured.
    """
    is_matrix = len(shape) == 2 and name.endswith(".weight")
    return "grid" if is_matrix else "fp16"


def exact_power(exponents):
    """2^(n / 2) as float32 of integers n; a table and ldexp give the same bits on every machine."""
    n = np.asarray(exponents).astype(np.int32)
    roots = np.array([1.0, 1.4142135623730951])
    return np.ldexp(roots[n & 1], n >> 1).astype(np.float32)


def grid_steps(grid, units):
    """Steps of the rows (R, 1), times `units` (R,) or a number, and of the columns (1, C)."""
    rows = exact_power(grid.row) * np.float32(units)
    return rows[:, None], exact_power(grid.column)[None, :]


def to_exponents(steps):
    """Nearest half octaves (int8) of positive steps, a float64 tensor."""
    exponents = (STEPS_PER_OCTAVE * steps.log2()).round()
    return exponents.clamp(-MAX_EXPONENT, MAX_EXPONENT).to(torch.int8).numpy()


# ---- calibration ----
# What the loss does when a matrix changes, to second order: an error E in a weight (R, C) costs
# 1/2 sum_i d_i (E H E^T)_ii nats per token. H is the second moment of the matrix's input (OBS,
# Hassibi and Stork 1993; GPTQ, arXiv 2210.17323), d_i the sensitivity of output i: its gradient's
# second moment on labels drawn from the model itself, which is the Fisher information (K-FAC,
# arXiv 1503.05671). Only training text is read.

UNIT_TOKENS = 8192  # tokens of one forward and backward pass, the atom that ranks share out
UNSEEN_COUNT = 2.0  # readings that each row of an embedding is credited with
SUM_BITS = 36  # precision of the largest entry of a first term; float32 itself has 24
# Seconds of a calibration token in seconds of a training token: 1.4 on a CPU, and a margin.
CALIBRATION_COST = 2.0


class Sensitivity(typing.NamedTuple):
    """Second-order knowledge of one matrix (R, C)."""

    hessian: str  # name of its H
    row_weight: torch.Tensor  # d (R,), nats per token


class Knowledge(typing.NamedTuple):
    """What calibration found, in float64 on the CPU."""

    hessians: dict  # H (C, C) by name
    sensitivities: dict  # Sensitivity by parameter name


class ExactSum:
    """Sums by name that do not depend on the order of their terms, hence not on the world size.

    Floating-point sums round differently in every order. Here a term is rounded to multiples of a
    power of two, whose sum is exact. The first term under a name chooses it: all ranks must start
    with the same one.
    """

    def __init__(self):
        self.totals = {}
        self.resolution = {}

    def add(self, name, value):
        """Add a tensor to the sum of this name."""
        value = value.detach().double()
        if name not in self.totals:
            # A first term of zeros says nothing about size: 1e-30 stands for it.
            exponent = math.frexp(max(float(value.abs().max()), 1e-30))[1]
            self.resolution[name] = 2.0 ** (exponent - SUM_BITS)
            self.totals[name] = torch.zeros_like(value, dtype=torch.int64)
        # Saturation keeps a wild term from overflowing; 2^12 terms of this size still fit.
        steps = (value / self.resolution[name]).round().clamp(-(2.0**50), 2.0**50)
        self.totals[name] += steps.long()

    def forget(self):
        """Keep the resolutions, drop the terms."""
        for total in self.totals.values():
            total.zero_()

    def result(self, comm):
        """{name: float64 sum over all ranks}, on the CPU."""
        sums = {}
        for name in sorted(self.totals):  # ranks must meet in the same order
            total = self.totals[name]
            if comm.world > 1:
                comm.all_reduce(total).wait()
            sums[name] = total.cpu().double() * self.resolution[name]
        return sums


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


class CalibrationHooks:
    """Adds to `sums` what passes through the real forward and backward while the context is open.

    A Linear contributes the Gram matrix of its inputs. An embedding's input is a one-hot vector:
    its H is diagonal over rows, and what couples its columns is the gradient of its output. A layer
    that is visited more than once adds up all its visits.
    """

    def __init__(self, model, sums):
        self.model = model
        self.sums = sums
        self.handles = []

    def __enter__(self):
        tapped = set()
        for name, module in self.model.named_modules():
            if isinstance(module, Embedding):
                hook = module.register_forward_hook(self.embedding_hook(name))
                self.handles.append(hook)
            if not isinstance(module, (Attention, Linear)):
                continue
            # Attention multiplies by the weights of its projections itself, in one product. It
            # comes before them here, so that its input is read and their hooks are not needed.
            is_attention = isinstance(module, Attention)
            source = f"{name}.c_q" if is_attention else hessian_name(name)
            if source not in tapped:
                tapped.add(source)
                self.handles.append(module.register_forward_pre_hook(self.input_hook(source)))

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def input_hook(self, source):
        def before_forward(module, args):
            self.sums.add(f"hessian/{source}", gram(args[0]))

        return before_forward

    def embedding_hook(self, name):
        def after_forward(module, args, output):
            rows = torch.bincount(args[0].flatten().long(), minlength=module.num_embeddings)
            self.sums.add(f"count/{name}", rows)
            output.register_hook(lambda grad: self.sums.add(f"hessian/{name}", gram(grad)))

        return after_forward


def drawn_labels(logps, unit, seed):
    """One label per position (n,) drawn from logps (n, V): a function of seed and unit alone.

    The Fisher information needs the model's own labels; with the data's, errors that the model
    makes anyway would count as sensitivity.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + unit)
    height = torch.rand(len(logps), 1, generator=generator).to(logps.device)
    below = logps.exp().cumsum(-1) < height  # (n, V)
    return below.sum(-1).clamp(max=logps.size(-1) - 1)


def calibrate_unit(model, ids, unit, runtime, sums):
    """Add what one batch of training tokens `ids` (B, T) says to `sums`."""
    # The same weights must give the same artifact on a GPU too.
    with deterministic_algorithms(), runtime.autocast():
        hidden = model.hidden(ids)  # (B, T, D)
        head_input = model.head_input(hidden)
        logits = model.head(head_input).flatten(0, 1)  # (B * T, V)
    logps = logits.detach().float().log_softmax(-1)
    probs = logps.exp()
    sums.add("hessian/head", gram(head_input))
    # p (1 - p) is the variance of a drawn label, so the second derivative of the loss in its logit.
    sums.add("label_variance", (probs * (1 - probs)).sum(0))
    labels = drawn_labels(logps, unit, model.config.seed)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    model.zero_grad()
    with deterministic_algorithms():
        loss.backward()
    for name, module in model.named_modules():
        # The labels of different tokens are independent: the square of the sum is, on average, the
        # sum of the squares.
        if isinstance(module, Linear):
            sums.add(f"gradient/{name}", module.weight.grad.float().square().sum(1))
    model.zero_grad()


class CalibrationText:
    """CALIBRATION_TOKENS training tokens in sequences spread evenly over the training shards."""

    def __init__(self, config):
        self.length = config.train_seq_len
        self.stream = open_train_stream(config)
        self.sequences = max(1, config.calibration_tokens // self.length)
        self.per_unit = max(1, UNIT_TOKENS // self.length)
        self.units = math.ceil(self.sequences / self.per_unit)

    def read(self, unit):
        """Token ids (B, T) of a unit, uint16."""
        first = unit * self.per_unit
        last = min(first + self.per_unit, self.sequences)
        spread = [i * self.stream.num_sequences // self.sequences for i in range(first, last)]
        return np.concatenate([self.stream.sequences(n, 1)[:, :-1] for n in spread])


def calibrate(model, config, runtime):
    """Knowledge of every matrix of `model` from training tokens; all ranks must call it.

    Ranks share the units out. Sums are exact, so any world size finds the same bits.
    """
    text = CalibrationText(config)
    comm = runtime.comm
    sums = ExactSum()
    model.eval()
    with CalibrationHooks(model, sums):
        # Every rank starts with unit 0, which sets the resolutions; only rank 0 counts it.
        calibrate_unit(model, runtime.to_device(text.read(0)), 0, runtime, sums)
        if comm.rank != 0:
            sums.forget()
        for unit in range(comm.rank, text.units, comm.world):
            if unit > 0:
                calibrate_unit(model, runtime.to_device(text.read(unit)), unit, runtime, sums)
    return knowledge_from(model, sums.result(comm), text.sequences * text.length)


def knowledge_from(model, sums, tokens):
    """Turn sums over `tokens` tokens into Hessians and sensitivities per token."""
    hessians = {}
    for key, total in sums.items():
        kind, _, name = key.partition("/")
        if kind == "hessian":
            hessians[name] = total / tokens
    sensitivities = {}
    for name, module in model.named_modules():
        if isinstance(module, Embedding):
            # A row's share of the loss is how often it is read.
            weight = (sums[f"count/{name}"] + UNSEEN_COUNT) / tokens
            sensitivities[f"{name}.weight"] = Sensitivity(name, weight)
        elif isinstance(module, Linear):
            # E |dW_i|^2 = d_i tr(H): the Kronecker factors' traces agree with the gradient's.
            source = hessian_name(name)
            columns = module.in_features
            if columns < hessians[source].size(0):  # a gate that reads the leading channels
                hessians[name] = hessians[source][:columns, :columns]
                source = name
            weight = sums[f"gradient/{name}"] / tokens
            weight = weight / hessians[source].trace().clamp(min=1e-30)
            sensitivities[f"{name}.weight"] = Sensitivity(source, weight)
    # The tied embedding is read as input and multiplied as output; token frequencies weigh both.
    variance = sums["label_variance"] / tokens
    hessians["tok_emb"] = hessians["tok_emb"] + variance.sum() * hessians.pop("head")
    sensitivities["tok_emb.weight"] = Sensitivity("tok_emb", variance / variance.sum())
    return Knowledge(hessians, sensitivities)


@functools.lru_cache(maxsize=8)
def parameter_count(config):
    """Parameters of the architecture, without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config).parameters())


def calibration_seconds(config, step_seconds):
    """Predicted seconds of `calibrate`, from those of a training step."""
    token_seconds = step_seconds / config.train_batch_tokens
    return CALIBRATION_COST * token_seconds * config.calibration_tokens


# ---- gptq ----
# QUANTIZER=gptq, from knowledge to bytes: steps that equalise the predicted loss, integers by GPTQ,
# codes sorted by size. Only their coding is known to the reader; how codes were chosen is not.

DAMPING = 0.03  # of the mean diagonal, added to it
ROW_TEMPER = 0.7  # exponent of the rows' sensitivities
# Nats per token, far below what could be measured: predictions for a model that was hardly trained
# are too low, and the budget is there to be used.
FINEST_LOSS = 1e-9
BLOCK = 128  # columns whose updates are collected before the rest of the matrix sees them


class Factor(typing.NamedTuple):
    """H^-1 = U^T U of the damped Hessian, its columns in `order`."""

    order: torch.Tensor  # (C,)
    upper: torch.Tensor  # (C, C), float64


def factorise(hessian, name, warn):
    """Factor of a Hessian (C, C), float64. A matrix that has none gets that of its diagonal.

    With a diagonal Hessian GPTQ is plain rounding; `warn` then gets a line that names the matrix.
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
        return Factor(order, known[order].rsqrt().diag())
    identity = torch.eye(len(damped), dtype=damped.dtype)
    return Factor(order, torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True))


def equalising_grid(sensitivity, factor):
    """The Grid at which every entry's rounding error costs the same expected loss.

    Rounded with step s, entry (i, j) adds 1/2 d_i (s / U_jj)^2 / 12 to the loss, and s costs
    -log2(s) bits: at the least loss for a given size all s^2 d_i / U_jj^2 are equal (reverse
    water-filling, Cover and Thomas 10.3.3). So one unit serves all matrices: it is the multiplier.
    """
    diagonal = factor.upper.diagonal()
    reach = torch.empty_like(diagonal)  # (C,), U_jj in the matrix's own order
    reach[factor.order] = diagonal
    weight = sensitivity.row_weight.double()
    mean = weight.mean().clamp(min=1e-20)
    # Rows differ a little less than their sensitivities, which are estimates: measured, as is the
    # floor under rows that calibration never saw move.
    weight = mean * (weight / mean).clamp(min=2.0**-20) ** ROW_TEMPER
    level = reach.log().mean().exp()
    return Grid(to_exponents(level * weight.rsqrt()), to_exponents(reach / level))


def gptq(weight, factor, row_steps, column_steps):
    """Codes (R, C) of weight (R, C) on the grid row_steps (R, 1) * column_steps (1, C).

    Columns are rounded one after another, and each one's error is moved into the columns still to
    come, where the input's correlations let them make up for it (GPTQ, arXiv 2210.17323).
    """
    order = factor.order
    upper = factor.upper.to(weight.dtype)
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


def row_losses(error, hessian, row_weight):
    """Predicted loss (R,) in nats per token of an error (R, C)."""
    error = error.to(hessian.dtype)
    return 0.5 * row_weight * ((error @ hessian) * error).sum(1)


class Solved(typing.NamedTuple):
    """A matrix on its grid."""

    codes: np.ndarray  # (R, C), int16
    row: np.ndarray  # (R,), int8: exponents of the rows' steps
    losses: np.ndarray  # (R,), predicted, nats per token


def roomy_rows(weight, grid, unit):
    """Exponents (R,) of the rows' steps, larger than the Grid's where codes would not fit."""
    rows, columns = grid_steps(grid, unit)
    largest = np.abs(weight.numpy() / columns / rows).max(1)  # (R,) codes
    # Half of the range is left free: GPTQ moves weights before it rounds them.
    excess = STEPS_PER_OCTAVE * np.log2(np.maximum(1.0, largest / (MAX_CODE / 2)))
    return np.minimum(grid.row + np.ceil(excess), MAX_EXPONENT).astype(np.int8)


def solve(weight, sensitivity, hessian, factor, grid, unit):
    """Solved of weight (R, C): GPTQ's row where it beats plain rounding, else that."""
    grid = Grid(roomy_rows(weight, grid, unit), grid.column)
    rows, columns = (torch.from_numpy(side) for side in grid_steps(grid, unit))
    steps = rows * columns
    rounded = (weight / steps).round().clamp(-MAX_CODE, MAX_CODE)
    moved = gptq(weight, factor, rows, columns)
    hessian = hessian.to(weight.dtype)
    plain = row_losses(weight - rounded * steps, hessian, sensitivity.row_weight)
    losses = row_losses(weight - moved * steps, hessian, sensitivity.row_weight)
    better = losses <= plain
    codes = torch.where(better[:, None], moved, rounded).to(torch.int16)
    return Solved(codes.numpy(), grid.row, torch.minimum(losses, plain).numpy())


class Quantiser:
    """All matrices of a model and what is known of them; `solve(unit)` is the model at one size.

    The result depends neither on the number of threads nor on the device.
    """

    def __init__(self, state_dict, knowledge, warn):
        self.knowledge = knowledge
        sensitivities = knowledge.sensitivities
        # In the order of the model, which is the artifact's.
        self.weights = {
            name: tensor.detach().float().cpu()
            for name, tensor in state_dict.items()
            if name in sensitivities
        }
        self.parameters = sum(weight.numel() for weight in self.weights.values())
        names = list(knowledge.hessians)
        factors = self.map(lambda name: factorise(knowledge.hessians[name], name, warn), names)
        self.factors = dict(zip(names, factors))
        self.grids = {}
        for name in self.weights:
            factor = self.factors[sensitivities[name].hessian]
            self.grids[name] = equalising_grid(sensitivities[name], factor)

    def map(self, function, items):
        """[function(item) ...] on all cores: each item on one thread, whose sums have one order."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(pool.map(function, items))
        finally:
            torch.set_num_threads(threads)

    def solve(self, unit):
        """{name: Solved} with all steps times `unit`."""

        def solve_one(name):
            sensitivity = self.knowledge.sensitivities[name]
            hessian = self.knowledge.hessians[sensitivity.hessian]
            factor = self.factors[sensitivity.hessian]
            grid = self.grids[name]
            return solve(self.weights[name], sensitivity, hessian, factor, grid, unit)

        return dict(zip(self.weights, self.map(solve_one, self.weights)))

    def finest_unit(self):
        """The unit below which steps buy nothing: every code adds unit^2 / 24 to the loss."""
        return math.sqrt(24 * FINEST_LOSS / self.parameters)

    def guessed_unit(self, budget):
        """A first unit by bisection: plain rounding of some rows, with Gaussian entropies."""
        low = -30.0  # log2 of a unit whose file is too large
        high = 10.0  # of one whose file fits
        for _ in range(12):
            middle = (low + high) / 2
            if self.estimated_bits(2.0**middle) / 8 > budget:
                low = middle
            else:
                high = middle
        return 2.0**high

    def estimated_bits(self, unit):
        """Bits of all matrices at a unit, about."""
        bits = 0.0
        for name, weight in self.weights.items():
            rows, columns = grid_steps(self.grids[name], unit)
            part = slice(None, None, 8 if len(weight) >= 64 else 1)  # an eighth says enough
            codes = (weight[part].numpy() / (rows[part] * columns)).round()
            row, column = code_classes(codes)
            octaves = (row[:, None] + column.astype(np.float32)) / CLASSES_PER_OCTAVE
            # log2 of sqrt(2 pi e) sigma, which falls to 0 as the codes become zeros.
            entropy = 0.5 * np.log2(1 + 2 * math.pi * math.e * 4**octaves)
            bits += weight.numel() * float(entropy.mean())
        return bits


# ---- coding ----
# zstd counts symbols over blocks of 128 KiB. Each row and column of codes has a class, the size of
# its entries; codes are stored in the order of their classes' sum, whatever matrix they are from,
# so that a block holds codes of one distribution and its table fits them all.

CLASSES_PER_OCTAVE = 2


class GridTensor(typing.NamedTuple):
    """A stored matrix."""

    codes: np.ndarray  # (R, C), int16
    grid: Grid
    classes: Grid  # of its rows and columns


def code_classes(codes):
    """Half octaves of the codes' root mean square by row and by column, as a Grid.

    Their sum predicts the size of an entry: two rounds of alternating means fit the product.
    """
    square = codes.astype(np.float32) ** 2 + np.float32(0.02)  # (R, C); never log2(0)
    columns = np.ones(codes.shape[1], np.float32)
    for _ in range(2):
        rows = (square / columns).mean(1)
        columns = (square / rows[:, None]).mean(0)
    halves = [CLASSES_PER_OCTAVE / 2 * np.log2(part) for part in (rows, columns)]
    return Grid(*(half.round().clip(-120, 120).astype(np.int8) for half in halves))


def coding_keys(classes):
    """The sum of row and column class of every code of every matrix, flat, int16."""
    parts = []
    for grid in classes:
        keys = grid.row.astype(np.int16)[:, None] + grid.column.astype(np.int16)  # (R, C)
        parts.append(keys.ravel())
    return np.concatenate(parts)


def grid_sections(tensors):
    """The bytes of GridTensors: exponents, classes, then the codes' low and high planes, sorted."""
    codes = np.concatenate([tensor.codes.ravel() for tensor in tensors])
    order = coding_keys([tensor.classes for tensor in tensors]).argsort(kind="stable")
    codes = codes[order].astype(np.int32)
    low = codes.astype(np.int8)  # wraps: the signed low byte
    high = ((codes - low) >> 8).astype(np.int8)  # nearly all zeros
    sides = [
        *(tensor.grid.row for tensor in tensors),
        *(tensor.grid.column for tensor in tensors),
        *(tensor.classes.row for tensor in tensors),
        *(tensor.classes.column for tensor in tensors),
    ]
    return b"".join(part.tobytes() for part in [*sides, low, high])


def grid_bytes(shape):
    """Bytes of one matrix (R, C) in the sections above."""
    rows, columns = shape
    return 2 * (rows + columns) + 2 * rows * columns


class GridUnits(typing.NamedTuple):
    """The units of a model's rows, counted through all its matrices.

    The first `fine_rows` rows take `fine`, the others `coarse`, a neighbour of it: where the border
    lies sets the file's size more exactly than a unit can.
    """

    fine: float
    coarse: float
    fine_rows: int

    def of_rows(self, rows):
        """[(R,) float32 units] of matrices with these numbers of rows."""
        units = np.full(sum(rows), self.coarse, np.float32)
        units[: self.fine_rows] = self.fine
        return np.split(units, np.cumsum(rows)[:-1])

    def check(self, rows):
        """Raise ArtifactError unless the steps of a model with `rows` rows are sound numbers."""
        least, most = UNIT_LIMITS
        for unit in (self.fine, self.coarse):
            if type(unit) is not float or not least <= unit <= most:
                raise ArtifactError(f"artifact: unit {ascii(unit)} is outside {least}…{most}")
        if type(self.fine_rows) is not int or not 0 <= self.fine_rows <= rows:
            raise ArtifactError(f"artifact: fine_rows {ascii(self.fine_rows)} is outside 0…{rows}")


def read_grid_sections(raw, shapes, units):
    """Float32 matrices of `shapes` from the bytes that grid_sections wrote.

    `raw` holds exactly the bytes of the shapes: the table's check has made sure. Raises
    ArtifactError for a step or a code that no writer stores; all others give finite weights.
    """
    heights = [rows for rows, _ in shapes]
    widths = [columns for _, columns in shapes]
    at = 0
    sides = []
    for lengths in (heights, widths, heights, widths):
        flat = np.frombuffer(raw, np.int8, sum(lengths), at)
        sides.append(np.split(flat, np.cumsum(lengths)[:-1]))
        at += len(flat)
    grids = [Grid(*pair) for pair in zip(sides[0], sides[1])]
    classes = [Grid(*pair) for pair in zip(sides[2], sides[3])]
    exponents = np.frombuffer(raw, np.int8, sum(heights) + sum(widths))
    # As integers of 16 bits: the absolute value of -128 is no int8.
    if np.abs(exponents.astype(np.int16)).max(initial=0) > MAX_EXPONENT:
        raise ArtifactError(f"artifact: a step's exponent is outside ±{MAX_EXPONENT}")
    total = sum(rows * columns for rows, columns in shapes)
    low, high = np.frombuffer(raw, np.int8, 2 * total, at).reshape(2, total)
    codes = np.empty(total, np.float32)
    codes[coding_keys(classes).argsort(kind="stable")] = low + 256 * high.astype(np.float32)
    if np.abs(codes).max(initial=0) > MAX_CODE:
        raise ArtifactError(f"artifact: a code is outside ±{MAX_CODE}")
    matrices = []
    at = 0
    for shape, grid, row_units in zip(shapes, grids, units.of_rows(heights)):
        rows, columns = grid_steps(grid, row_units)
        size = math.prod(shape)
        matrices.append(codes[at : at + size].reshape(shape) * rows * columns)
        at += size
    return matrices


def code_bits(codes, keys):
    """Bits (n,) of each code by the entropy of its class; zstd comes within a few percent."""
    bits = np.empty(len(codes), np.float32)
    for key in np.unique(keys):
        mine = np.flatnonzero(keys == key)
        _, inverse, counts = np.unique(codes[mine], return_inverse=True, return_counts=True)
        bits[mine] = (np.log2(len(mine)) - np.log2(counts))[inverse]
    return bits


# ---- the artifact ----
# Integers row by row, then a general compressor. The container is plain data with a checksum: its
# reader believes nothing that it has not compared with what the architecture must contain, and
# allocates nothing of a size that the architecture does not have.

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
MAX_PARAMETERS = MAX_RAW_BYTES  # at one byte each


class TensorEntry(typing.NamedTuple):
    """One line of the artifact's table of tensors."""

    name: str
    shape: tuple
    scheme: str

    def rows(self):
        """Rows that share a scale each; 0 for floats."""
        return math.prod(self.shape[:-1]) if SCHEMES[self.scheme].bits else 0

    def value_bytes(self):
        return math.prod(self.shape) * np.dtype(SCHEMES[self.scheme].dtype).itemsize

    def scale_bytes(self):
        if self.scheme == "grid":  # exponents and classes of rows and columns
            return grid_bytes(self.shape) - self.value_bytes()
        return self.rows() * np.dtype(np.float16).itemsize


class EncodedTensor(typing.NamedTuple):
    """A tensor as the artifact stores it."""

    values: bytes  # integers or floats, row-major
    scales: bytes  # float16, one per row; empty for floats


def encode_tensor(tensor, scheme):
    """EncodedTensor of a tensor under the scheme of that name."""
    if SCHEMES[scheme].bits:
        codes, scales = quantize_rows(tensor, SCHEMES[scheme].bits)
        return EncodedTensor(codes.cpu().numpy().tobytes(), scales.cpu().numpy().tobytes())
    values = tensor.detach().float().cpu().numpy().astype(SCHEMES[scheme].dtype)
    return EncodedTensor(values.tobytes(), b"")


def pack_artifact(config, state_dict, int5_layers=(), tokenizer_sha256="", cache=None):
    """The artifact's bytes: a fixed head, then one compressed payload.

    The payload is a JSON header (settings, tokenizer, table of tensors), then the tensors' values
    grouped by scheme, then their scales in the same order: like bytes next to like compress best.
    The MLPs of `int5_layers` are stored in 5 bits; `cache` (a dict) keeps encoded tensors between
    calls.
    """
    cache = {} if cache is None else cache
    table = []
    for name, tensor in state_dict.items():
        # One rung of the ladder changes one layer's scheme: the other tensors are encoded already.
        scheme = scheme_of(name, tensor.shape, config, int5_layers)
        if (name, scheme) not in cache:
            cache[name, scheme] = encode_tensor(tensor, scheme)
        table.append(TensorEntry(name, tuple(tensor.shape), scheme))
    order = list(SCHEMES)
    # A stable sort: within a scheme the tensors keep the order of the model.
    table.sort(key=lambda entry: order.index(entry.scheme))
    header = framed_header(artifact_header(config, tokenizer_sha256, table))
    encoded = [cache[entry.name, entry.scheme] for entry in table]
    values = [tensor.values for tensor in encoded]
    scales = [tensor.scales for tensor in encoded]
    return seal_payload(config, b"".join([header, *values, *scales]))


def artifact_header(config, tokenizer_sha256, table):
    """What the artifact says of itself."""
    return dict(
        config=config.as_dict("arch", "eval"), tokenizer_sha256=tokenizer_sha256, tensors=table
    )


def framed_header(header):
    """The header as JSON behind its length."""
    text = json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text


def seal_payload(config, raw):
    """Head and compressed payload of the raw bytes."""
    if len(raw) > MAX_RAW_BYTES:
        raise ArtifactError(
            f"the model is {len(raw)} bytes before compression, no reader takes more than "
            f"{MAX_RAW_BYTES}: train a smaller model (MLP_MULT, NUM_LAYERS)"
        )
    if config.quantizer == "gptq":
        # Codes hardly ever repeat, so the search for matches is kept as small as zstd allows: a
        # tenth of the time. What counts is level 22's choice of where blocks, and with them symbol
        # tables, end; at lower levels the size jumps about when a step moves.
        parameters = zstandard.ZstdCompressionParameters.from_level(
            22,
            source_size=len(raw),
            min_match=6,
            search_log=1,
            hash_log=6,
            chain_log=6,
        )
        body = zstandard.ZstdCompressor(compression_params=parameters).compress(raw)
    elif config.compressor == "zstd":
        body = zstandard.ZstdCompressor(level=config.zstd_level).compress(raw)
    else:
        body = lzma.compress(raw, preset=config.lzma_preset)
    compressor = COMPRESSORS.index(config.artifact_compressor)
    digest = hashlib.sha256(body).digest()
    head = ARTIFACT_HEAD.pack(
        ARTIFACT_MAGIC, ARTIFACT_VERSION, compressor, len(raw), len(body), digest
    )
    return head + body


def int5_order(num_layers):
    """Layers from the middle outward (5, 6, 4, 7, … of 11), the order in which #1170's ladder
    lowers MLPs to int5: first and last layers are the most sensitive."""
    middle = (num_layers - 1) / 2
    return sorted(range(num_layers), key=lambda layer: (abs(layer - middle), -layer))


def fit_budget(config, state_dict, code_bytes, tokenizer_sha256="", log=lambda line: None):
    """(artifact, int5 layers): the first rung of the ladder on which code + model fit BUDGET_BYTES.

    The ladder starts with every MLP at BLOCK_BITS and lowers one more to int5 at each rung. Raises
    ArtifactError when even the last rung does not fit.
    """
    order = int5_order(config.num_layers)
    cache = {}
    for rung in range(len(order) + 1):
        layers = order[:rung]
        # Only packing tells the size: how far integers compress depends on their distribution.
        blob = pack_artifact(config, state_dict, tuple(layers), tokenizer_sha256, cache)
        over = len(blob) + code_bytes - config.budget_bytes
        if over <= 0:
            return blob, layers
        if rung < len(order):
            log(f"budget: {over} bytes over, MLP of layer {order[rung]} to int5")
    raise ArtifactError(
        f"the artifact is {over} bytes over BUDGET_BYTES={config.budget_bytes} with every MLP in "
        f"int5 and {code_bytes} bytes of code: run the same command with CODE_BYTES at the size of "
        "the packed script (slurm/package.py), or train a smaller model (MLP_MULT, NUM_LAYERS)"
    )


# ---- QUANTIZER=gptq: the size ----
# The unit's logarithm is moved by the secant through the last packings until one file fits and the
# next is over. Between these two it is a matter of how many rows take the finer unit.

MAX_PACKINGS = 12
BUDGET_SLACK = 0.0005  # of the budget may stay unused
BRACKET = 0.1  # of the budget: files that differ by less can be mixed


class Packing(typing.NamedTuple):
    """One trial of the rate control."""

    units: GridUnits
    solved: dict  # Solved by name
    blob: bytes  # the artifact


class RateControl:
    """Finds the units whose artifact lies just below `budget` bytes, in MAX_PACKINGS trials.

    `solve(unit)` gives {name: Solved}, `encode(solved, units)` an artifact's bytes; no unit is
    below `finest`, so that a model too small for the budget leaves some of it unused.
    """

    def __init__(self, solve, encode, budget, parameters, finest, log=lambda line: None):
        self.solve = solve
        self.encode = encode
        self.budget = budget
        self.log = log
        self.packings = 0
        self.finest = math.log2(finest)
        self.slope = -parameters / 8  # bytes per octave while codes are not mostly zeros
        self.least_slope = -parameters / 256
        self.fits = None  # the largest Packing that fits
        self.over = None  # the smallest that does not

    def run(self, guess):
        """The Packing to keep. Raises ArtifactError when none fits."""
        position = max(self.finest, math.log2(guess))
        before = None  # position and size of the trial before
        while self.packings < MAX_PACKINGS and not self.is_done() and not self.is_bracketed():
            unit = 2.0**position
            size = self.try_solution(GridUnits(unit, unit, 0), self.solve(unit))
            if before is not None and before[0] != position:
                measured = (size - before[1]) / (position - before[0])
                # A slope of noise or of a file of zeros would throw the next try far away.
                self.slope = min(measured, self.least_slope)
            if size <= self.budget and position == self.finest:
                break  # a small model: finer steps would be bytes for nothing
            before = (position, size)
            position = max(self.finest, position + (self.aim(size) - size) / self.slope)
        self.mix()
        if self.fits is None:
            over = len(self.over.blob) - self.budget
            raise ArtifactError(
                f"the artifact is {over} bytes over the {self.budget} that BUDGET_BYTES leaves "
                f"after {self.packings} packings with ever larger steps: train a smaller model "
                "(MLP_MULT, NUM_LAYERS)"
            )
        return self.fits

    def is_done(self):
        """Whether a packing is within BUDGET_SLACK below the budget."""
        return self.fits is not None and len(self.fits.blob) >= self.budget * (1 - BUDGET_SLACK)

    def is_bracketed(self):
        """Whether two packings enclose the budget closely enough to be mixed."""
        if self.fits is None or self.over is None:
            return False
        return len(self.over.blob) - len(self.fits.blob) <= BRACKET * self.budget

    def aim(self, size):
        """Bytes that the trial after one of `size` should have, so that both enclose the budget."""
        beyond = 0.05 * BRACKET * self.budget
        return self.budget + beyond if size <= self.budget else self.budget - beyond

    def try_solution(self, units, solved):
        """Encode, keep it if it is the closest on its side, return its size."""
        blob = self.encode(solved, units)
        self.packings += 1
        size = len(blob)
        packing = Packing(units, solved, blob)
        if size <= self.budget:
            if self.fits is None or size > len(self.fits.blob):
                self.fits = packing
        elif self.over is None or size < len(self.over.blob):
            self.over = packing
        self.log(f"packing:{self.packings} unit:{units.fine:.4e} bytes:{size} of {self.budget}")
        return size

    def mix(self):
        """Between the two packings that enclose the budget: the number of rows with finer steps."""
        if self.is_done() or not self.is_bracketed():
            return
        coarse = self.fits
        fine = self.over
        rows = [len(solved.codes) for solved in coarse.solved.values()]
        low = (0, len(coarse.blob))  # rows that are fine, and bytes
        high = (sum(rows), len(fine.blob))
        target = self.budget * (1 - BUDGET_SLACK / 2)
        while self.packings < MAX_PACKINGS and not self.is_done() and high[0] - low[0] > 1:
            share = (target - low[1]) / max(1, high[1] - low[1])
            middle = low[0] + round(min(0.95, max(0.05, share)) * (high[0] - low[0]))
            middle = min(max(middle, low[0] + 1), high[0] - 1)
            units = GridUnits(fine.units.fine, coarse.units.fine, middle)
            size = self.try_solution(units, mixed_rows(fine.solved, coarse.solved, middle))
            if size <= target:
                low = (middle, size)
            else:
                high = (middle, size)


def mixed_rows(fine, coarse, fine_rows):
    """{name: Solved} with the first `fine_rows` rows of `fine` and the others of `coarse`."""
    mixed = {}
    left = fine_rows
    for name, second in coarse.items():
        first = fine[name]
        count = min(left, len(first.codes))
        left -= count
        codes = np.concatenate([first.codes[:count], second.codes[count:]])
        row = np.concatenate([first.row[:count], second.row[count:]])
        losses = np.concatenate([first.losses[:count], second.losses[count:]])
        mixed[name] = Solved(codes, row, losses)
    return mixed


class GridEncoder:
    """Turns solved matrices into an artifact's bytes; what never changes is encoded once."""

    def __init__(self, config, state_dict, grids, tokenizer_sha256):
        self.config = config
        self.grids = grids
        self.tokenizer_sha256 = tokenizer_sha256
        self.table = []
        floats = []
        for name, tensor in state_dict.items():
            scheme = gptq_scheme_of(name, tensor.shape)
            self.table.append(TensorEntry(name, tuple(tensor.shape), scheme))
            if scheme != "grid":
                floats.append(encode_tensor(tensor, scheme).values)
        self.floats = b"".join(floats)
        # A stable sort: within a scheme the tensors keep the order of the model.
        order = list(SCHEMES)
        self.table.sort(key=lambda entry: order.index(entry.scheme))

    def header(self, units):
        """Length and text of the JSON header."""
        header = artifact_header(self.config, self.tokenizer_sha256, self.table)
        header["grid"] = units._asdict()
        return framed_header(header)

    def tensors(self, solved):
        """GridTensors of {name: Solved}, in the order of the table."""
        tensors = []
        for name in [entry.name for entry in self.table if entry.scheme == "grid"]:
            codes, row, _ = solved[name]
            grid = Grid(row, self.grids[name].column)
            tensors.append(GridTensor(codes, grid, code_classes(codes)))
        return tensors

    def encode(self, solved, units):
        """The artifact."""
        sections = grid_sections(self.tensors(solved))
        return seal_payload(self.config, b"".join([self.header(units), sections, self.floats]))

    def bytes_without_matrices(self, units):
        """Size of an artifact of all the rest, for the account."""
        return len(seal_payload(self.config, self.header(units) + self.floats))


class GroupSize(typing.NamedTuple):
    """One line of the account of an artifact."""

    group: str
    parameters: int
    bytes: float
    loss: float  # predicted, nats per token


def tensor_group(name):
    """What a line of the account calls a matrix."""
    parts = name.split(".")
    if parts[0] != "blocks":
        return parts[0]
    leaf = parts[3]
    if parts[2] == "attn" and leaf != "proj":
        return "blocks attn in"
    return f"blocks {parts[2]} {'out' if leaf == 'proj' else 'in'}"


def account(encoder, packing):
    """[GroupSize] of an artifact: where its bytes went, and its predicted loss.

    zstd codes all matrices together: each gets its share of their bytes by the entropy of its
    codes. The bytes of all lines add up to the artifact's.
    """
    tensors = encoder.tensors(packing.solved)
    codes = np.concatenate([tensor.codes.ravel() for tensor in tensors])
    bits = code_bits(codes, coding_keys([tensor.classes for tensor in tensors]))
    rest = encoder.bytes_without_matrices(packing.units)
    scale = (len(packing.blob) - rest) / max(1.0, float(bits.sum(dtype=np.float64)))
    groups = {}
    at = 0
    for entry in encoder.table:
        if entry.scheme != "grid":
            continue
        size = math.prod(entry.shape)
        share = scale * float(bits[at : at + size].sum(dtype=np.float64))
        loss = float(packing.solved[entry.name].losses.sum())
        group = tensor_group(entry.name)
        before = groups.get(group, GroupSize(group, 0, 0.0, 0.0))
        groups[group] = GroupSize(
            group, before.parameters + size, before.bytes + share, before.loss + loss
        )
        at += size
    others = [entry for entry in encoder.table if entry.scheme != "grid"]
    others_size = sum(math.prod(entry.shape) for entry in others)
    return [*groups.values(), GroupSize("half precision, header", others_size, rest, 0.0)]


def log_account(groups, log):
    """The account as a table, its lines aligned."""
    total_bytes = max(1.0, sum(group.bytes for group in groups))
    total_loss = max(1e-30, sum(group.loss for group in groups))
    log(
        f"account {'group':24} {'parameters':>11} {'bits each':>9} {'bytes':>10} {'loss share':>10}"
    )
    for group in groups:
        bits = 8 * group.bytes / max(1, group.parameters)
        log(
            f"account {group.group:24} {group.parameters:11d} {bits:9.3f} {group.bytes:10.0f} "
            f"{group.loss / total_loss:10.1%}"
        )
    parameters = sum(group.parameters for group in groups)
    bits = 8 * total_bytes / parameters
    log(f"account {'all':24} {parameters:11d} {bits:9.3f} {total_bytes:10.0f} {1:10.1%}")
    log(f"predicted_loss:{total_loss:.3g} nats per token from quantisation")


class Packed(typing.NamedTuple):
    """An artifact that fits, and how it came about."""

    blob: bytes
    packings: int
    groups: list  # of GroupSize


def fit_gptq(config, state_dict, knowledge, code_bytes, tokenizer_sha256="", log=lambda line: None):
    """Packed of the finest steps with which code + model fit BUDGET_BYTES.

    Deterministic: the same weights and knowledge give the same bytes. Raises ArtifactError when
    nothing fits.
    """
    quantiser = Quantiser(state_dict, knowledge, log)
    encoder = GridEncoder(config, state_dict, quantiser.grids, tokenizer_sha256)
    budget = config.budget_bytes - code_bytes
    control = RateControl(
        quantiser.solve,
        encoder.encode,
        budget,
        quantiser.parameters,
        quantiser.finest_unit(),
        log,
    )
    packing = control.run(quantiser.guessed_unit(budget))
    groups = account(encoder, packing)
    log_account(groups, log)
    return Packed(packing.blob, control.packings, groups)


TRIAL_SIZE = 512  # rows and columns of the matrix that is solved and packed to time this machine
# RateControl usually needs 2 solutions and 4 to 6 packings; the rest is margin.
RESERVED_SOLUTIONS = 4
RESERVED_PACKINGS = 12
SOLVING_WORKERS = 2  # cores that solutions keep busy: their loops over columns share Python's lock


def trial_seconds(config):
    """Seconds of one solution and of one packing of a single matrix, with the real functions."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * TRIAL_SIZE, TRIAL_SIZE, generator=generator).double()
    weight = torch.randn(TRIAL_SIZE, TRIAL_SIZE, generator=generator)
    sensitivity = Sensitivity("inputs", torch.ones(TRIAL_SIZE))
    knowledge = Knowledge({"inputs": inputs.T @ inputs}, {"trial": sensitivity})
    begin = time.monotonic()
    quantiser = Quantiser({"trial": weight}, knowledge, print)
    unit = quantiser.guessed_unit(weight.numel() / 2)  # about 4 bits each
    solved = quantiser.solve(unit)["trial"]
    solving = time.monotonic() - begin
    begin = time.monotonic()
    grid = Grid(solved.row, quantiser.grids["trial"].column)
    tensor = GridTensor(solved.codes, grid, code_classes(solved.codes))
    seal_payload(config, grid_sections([tensor]))
    return solving, time.monotonic() - begin


def solving_seconds(config):
    """Predicted seconds of all solutions and packings on this machine, from trials scaled up."""
    trials = [trial_seconds(config) for _ in range(3)]
    # The fastest: the first one loads code, and any may be interrupted.
    solving, packing = (min(seconds) for seconds in zip(*trials))
    workers = min(SOLVING_WORKERS, os.cpu_count() or 1)
    each = RESERVED_SOLUTIONS * solving / workers + RESERVED_PACKINGS * packing
    return each * parameter_count(config) / TRIAL_SIZE**2


# ---- reading ----


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
        # zstd allocates what the frame declares, so the declaration is compared first.
        elif zstandard.frame_content_size(body) == size:
            unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 27)
            raw = unpacker.decompress(body, allow_extra_data=False)
    except (zstandard.ZstdError, lzma.LZMAError, MemoryError) as error:
        raise ArtifactError(f"artifact: the payload does not decompress ({error})") from None
    if not whole or len(raw) != size:
        raise ArtifactError(f"artifact: the payload is not the {size} bytes that its head promises")
    return raw


class Payload(typing.NamedTuple):
    """A payload whose header has been checked, its tensors not yet."""

    config: Config
    tokenizer_sha256: str
    table: list  # of TensorEntry
    units: GridUnits | None  # of the matrices on the grid; None in an artifact of QUANTIZER=lite
    raw: bytes
    values_at: int  # offset of the first tensor


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
        (size == len(body), wrong_size),
        (4 <= raw_size <= MAX_RAW_BYTES, f"raw size {raw_size} is outside 4…{MAX_RAW_BYTES}"),
        (hashlib.sha256(body).digest() == digest, "checksum does not match: damaged"),
    ]:
        if not holds:
            raise ArtifactError(f"artifact: {wrong}")
    return decompress(body, COMPRESSORS[compressor], raw_size)


def read_header(blob):
    """Payload of an artifact's bytes: settings and table are valid and belong together."""
    raw = open_payload(blob)
    header_bytes = struct.unpack_from("<I", raw)[0]
    end = 4 + header_bytes
    if end > min(MAX_HEADER_BYTES, len(raw)):
        raise ArtifactError(f"artifact: header of {header_bytes} bytes does not fit")
    try:
        header = json.loads(raw[4:end])
        config = Config(**header["config"])  # checks types, ranges and combinations
        if header["config"].keys() != config.as_dict("arch", "eval").keys():
            raise ConfigError("settings are missing or foreign")
        if header.keys() - {"grid"} != {"config", "tokenizer_sha256", "tensors"}:
            raise ConfigError("entries are missing or foreign")
        tokenizer_sha256 = header["tokenizer_sha256"]
        if not re.fullmatch(r"([0-9a-f]{64})?", tokenizer_sha256):
            raise ConfigError("tokenizer_sha256 is neither 64 hexadecimal digits nor empty")
        table = [
            TensorEntry(name, tuple(shape), scheme) for name, shape, scheme in header["tensors"]
        ]
        # Only QUANTIZER=gptq writes this entry.
        units = GridUnits(**header["grid"]) if "grid" in header else None
        check_table(config, table, len(raw) - end, units)
    except ArtifactError:
        raise
    except Exception as error:  # a stranger's JSON may hold anything, escape sequences included
        what = f"{type(error).__name__}: {printable(error, 200)}"
        raise ArtifactError(f"artifact: its header is not valid ({what})") from None
    return Payload(config, tokenizer_sha256, table, units, raw, end)


def expected_shapes(config):
    """{name: shape} of the tensors that the architecture must have; allocates none of them."""
    with torch.device("meta"):
        state = GPT(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def check_shapes(config, found):
    """Raise ArtifactError unless {name: shape} `found` is the architecture's."""
    expected = expected_shapes(config)
    parameters = sum(math.prod(shape) for shape in expected.values())
    if parameters > MAX_PARAMETERS:
        raise ArtifactError(f"{parameters} parameters are more than {MAX_PARAMETERS}")
    if found != expected:
        wrong = sorted(map(ascii, set(found.items()) ^ set(expected.items())))[:3]
        raise ArtifactError(f"tensors differ from the architecture's: {'; '.join(wrong)}")


def schemes_fit(config, table, is_gptq):
    """Whether the schemes are those of a QUANTIZER, BLOCK_BITS, EMBED_BITS and rung."""
    schemes = [entry.scheme for entry in table]
    if is_gptq:
        return schemes == [gptq_scheme_of(entry.name, entry.shape) for entry in table]
    # The ladder lowers the MLPs of some layers to int5: of which, the table itself says.
    int5_layers = {
        int(entry.name.split(".")[1])
        for entry in table
        if entry.scheme == "int5" and re.match(r"blocks\.\d+\.mlp\.", entry.name)
    }
    for block_bits, embed_bits in itertools.product((5, 6, 8), repeat=2):
        setting = dataclasses.replace(config, block_bits=block_bits, embed_bits=embed_bits)
        if schemes == [scheme_of(entry.name, entry.shape, setting, int5_layers) for entry in table]:
            return True
    return False


def check_table(config, table, data_bytes, units=None):
    """Raise ArtifactError unless names, shapes, schemes and sizes are the architecture's.

    `units` are the GridUnits of an artifact of QUANTIZER=gptq.
    """
    names = {entry.name for entry in table}
    if len(names) != len(table):
        raise ArtifactError("artifact: a tensor appears twice")
    # 16.0 and True equal integers, but are no sizes of an array.
    if any(type(size) is not int for entry in table for size in entry.shape):
        raise ArtifactError("artifact: a shape holds something else than integers")
    try:
        check_shapes(config, {entry.name: entry.shape for entry in table})
    except ArtifactError as error:
        raise ArtifactError(f"artifact: {error}") from None
    for entry in table:
        scheme = SCHEMES.get(entry.scheme)
        if scheme is None or (scheme.bits and len(entry.shape) < 2):
            wrong = f"scheme {ascii(entry.scheme)} is unknown or does not fit"
            raise ArtifactError(f"artifact: {entry.name}: {wrong}")
    if not schemes_fit(config, table, units is not None):
        raise ArtifactError("artifact: the tensors' schemes are of no setting of QUANTIZER")
    if units is not None:
        units.check(sum(entry.shape[0] for entry in table if entry.scheme == "grid"))
    # Exactly: a payload with room to spare could hide something else.
    needed = sum(entry.value_bytes() + entry.scale_bytes() for entry in table)
    if needed != data_bytes:
        raise ArtifactError(f"artifact: tensors need {needed} bytes, {data_bytes} are there")


def decode_tensor(entry, values, scales):
    """float32 tensor of what the artifact stores. Raises ArtifactError for values off the grid."""
    top = SCHEMES[entry.scheme].top
    finite = np.isfinite(values).all() and np.isfinite(scales).all()
    inside = values.max(initial=0) <= top and values.min(initial=0) >= -top
    if not (finite and inside and (scales > 0).all()):
        raise ArtifactError(
            f"artifact: {entry.name}: codes, scales or values are outside {entry.scheme}"
        )
    tensor = values.astype(np.float32)
    if len(scales):
        tensor = tensor.reshape(len(scales), -1) * scales.astype(np.float32)[:, None]
    return torch.from_numpy(tensor.reshape(entry.shape))


class Artifact(typing.NamedTuple):
    """What an artifact holds."""

    config: Config  # architecture and evaluation settings; the rest are defaults
    state_dict: dict  # float32 tensors by name
    tokenizer_sha256: str  # "" if it does not say


def read_matrices(payload, entries):
    """{name: float32 matrix} of the table's `entries` on the grid, which come first."""
    if not entries:
        return {}
    shapes = [entry.shape for entry in entries]
    size = sum(map(grid_bytes, shapes))
    raw = memoryview(payload.raw)[payload.values_at : payload.values_at + size]
    matrices = read_grid_sections(raw, shapes, payload.units)
    return {entry.name: torch.from_numpy(matrix) for entry, matrix in zip(entries, matrices)}


def read_artifact(blob):
    """Artifact of its bytes. Runs no code of the file; raises ArtifactError for any damage."""
    payload = read_header(blob)
    on_grid = [entry for entry in payload.table if entry.scheme == "grid"]
    state = read_matrices(payload, on_grid)
    others = [entry for entry in payload.table if entry.scheme != "grid"]
    values_at = payload.values_at + sum(grid_bytes(entry.shape) for entry in on_grid)
    scales_at = values_at + sum(entry.value_bytes() for entry in others)
    for entry in others:
        # Views into the payload, no copies; check_table has made sure that they lie inside it.
        dtype = SCHEMES[entry.scheme].dtype
        values = np.frombuffer(payload.raw, dtype, math.prod(entry.shape), values_at)
        scales = np.frombuffer(payload.raw, np.float16, entry.rows(), scales_at)
        values_at += values.nbytes
        scales_at += scales.nbytes
        state[entry.name] = decode_tensor(entry, values, scales)
    return Artifact(payload.config, state, payload.tokenizer_sha256)


def unpack_artifact(blob):
    """(Config, float32 state_dict) of an artifact's bytes. Raises ArtifactError."""
    artifact = read_artifact(blob)
    return artifact.config, artifact.state_dict


class LoadedWeights(typing.NamedTuple):
    """What a file of final weights holds; read once per run."""

    config: Config  # architecture and evaluation settings; the rest are defaults
    state_dict: dict  # float32 tensors by name
    tokenizer_sha256: str  # of the tokenizer it was trained with, or "" if the file does not say
    info: dict  # what training measured (float checkpoints only)
    sha256: str  # of the file

    def brought(self):
        """Settings that the file brings into a run that only evaluates it, the audit included."""
        settings = self.config.as_dict("arch", "eval")
        return {**settings, "run_id": f"eval_{self.sha256[:8]}", "audit": True}


def load_weights(path):
    """LoadedWeights of an artifact (*.ptz) or a float checkpoint (*.pt). Raises ArtifactError."""
    most = ARTIFACT_HEAD.size + MAX_RAW_BYTES
    try:
        with open(path, "rb") as file:
            head = file.read(len(ARTIFACT_MAGIC))
        size = os.path.getsize(path)
    except OSError as error:
        raise ArtifactError(
            f"{path}: {error.strerror}: name a readable artifact (*.ptz) or float checkpoint (*.pt)"
        ) from None
    if head != ARTIFACT_MAGIC:
        return load_float_weights(path)
    if size > most:  # looked at before reading: a sparse file may claim any size
        raise ArtifactError(f"{path}: {size} bytes are more than any artifact has ({most})")
    blob = Path(path).read_bytes()
    try:
        artifact = read_artifact(blob)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}: copy it again, or name another file") from None
    return LoadedWeights(*artifact, {}, hashlib.sha256(blob).hexdigest())


def load_float_weights(path):
    """LoadedWeights of a run's float checkpoint (*.pt). Raises ArtifactError."""
    if not str(path).endswith(".pt"):
        raise ArtifactError(
            f"{path}: does not start like an artifact: damaged, or of another submission: "
            "copy it again, or name another file"
        )
    # float32 weights, and what is said about them.
    saved = load_tensors(path, 4 * MAX_PARAMETERS + MAX_HEADER_BYTES)
    try:
        if not isinstance(saved, dict):  # a bare tensor would answer to indices, too
            raise TypeError(f"a {type(saved).__name__} instead of a dictionary")
        config = Config(**saved["config"])
        state = saved["state_dict"]
        for name, tensor in state.items():
            if tensor.layout != torch.strided or tensor.dtype != torch.float32:
                raise TypeError(f"{ascii(name)} is not a dense float32 tensor")
        check_shapes(config, {name: tuple(tensor.shape) for name, tensor in state.items()})
        return LoadedWeights(config, state, "", dict(saved["info"]), sha256_file(path))
    except Exception as error:  # a stranger's file may hold anything, escape sequences included
        raise ArtifactError(
            f"{path}: not the final weights of a run ({type(error).__name__}: "
            f"{printable(error, 200)}): name {FLOAT_NAME} or {ARTIFACT_NAME}"
        ) from None


# ==================================================================================================
# main
# A run is a list of phases, each of which leaves a file: a rerun does what is missing and says what
# it found. Only rank 0 reads and writes RUN_DIR's records; the others follow what it says.
# ==================================================================================================
def check_places(config):
    """Refuse, before anything is moved, to set aside the very file that is to be read."""
    if config.resume != "never" or (config.mode == "train" and not config.eval_only):
        return
    if not config.eval_only:
        raise ConfigError(
            f"MODE={config.mode} reads the run in RUN_DIR={config.run_dir}, which RESUME=never "
            "would set aside: leave RESUME at auto"
        )
    artifact = Path(config.eval_only).resolve()
    if artifact.is_relative_to(Path(config.run_dir).resolve()):
        raise ConfigError(
            f"EVAL_ONLY={config.eval_only} lies in RUN_DIR={config.run_dir}, which RESUME=never "
            "would set aside: set another RUN_DIR, or leave RESUME at auto"
        )


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
        self.code_sha256 = sha256_file(CODE_PATH)
        self.model = None
        self.audited = False
        self.results = {"scores": {}}

    def load(self, path):
        """LoadedWeights of a file."""
        if path not in self.files:
            self.files[path] = load_weights(path)
        return self.files[path]

    def on_main(self, test):
        """What test() says on rank 0, the one that is sure to see what it wrote."""
        return self.runtime.comm.from_main(self.runtime.is_main and test()) > 0

    def already_done(self, phase, test):
        """Whether a phase has left its result already, by test() on rank 0."""
        done = self.on_main(test)
        if done:
            self.log(f"phase_done:{phase} found in {self.path}")
        return done

    # ---- before the first phase ----

    def prepare(self):
        """Load the data, compare with the run in RUN_DIR, write down what this run is."""
        config = self.config
        if config.resume == "must" and not self.on_main((self.path / "config.json").exists):
            raise ConfigError(
                f"RESUME=must, but {self.path} holds no run: check RUN_ID, or use RESUME=auto"
            )
        if config.preset == "demo" and config.data_path == PRESETS["demo"]["data_path"]:
            if self.runtime.is_main:
                build_demo_data(config, self.log)
            self.runtime.comm.barrier()
        # An artifact names its tokenizer: with another one its token ids would mean other text.
        tokenizer_sha256 = ""
        if config.eval_only:
            tokenizer_sha256 = self.load(self.artifact_path).tokenizer_sha256
        else:
            find_shards(config, "train")  # fails now rather than after the validation text is read
        self.val = ValidationSet.load(config, load_token_bytes(config, tokenizer_sha256))
        if self.runtime.is_main:
            self.take_over_record()
        self.write_manifest()
        self.announce()
        if config.eval_only:
            self.check_budget()

    def run(self):
        """All phases that are configured and missing."""
        config = self.config
        self.prepare()
        if not config.eval_only and config.mode == "train":
            self.train()
            self.pack()
        if config.audit or config.mode == "audit":
            self.audit()
        if config.mode == "train":
            self.score()

    def identity(self):
        """What two runs must agree on to share a RUN_DIR: settings, text, code and scored file.

        An evaluation does not use the settings of training, so it does not compare them.
        """
        config = self.config
        kinds = ("arch", "eval") if config.eval_only else ("arch", "train", "eval")
        identity = config.as_dict(*kinds)
        identity["validation text"] = self.val.fingerprint["val_sha256"]
        identity["train_gpt.py"] = self.code_sha256  # other code may score otherwise
        identity["file that is scored"] = "the run's own"
        if config.eval_only:
            identity["file that is scored"] = self.load(self.artifact_path).sha256
        return identity

    def origin(self):
        """Shows that this user's runs made something, without giving the key away."""
        key = self.runtime.user_key()
        return hashlib.sha256(f"{key}/{self.code_sha256}".encode()).hexdigest() if key else ""

    def take_over_record(self):
        """Write config.json; go on with the scores of the run in RUN_DIR, if it is this one."""
        path = self.path / "config.json"
        old = read_json(path) if path.exists() else None
        # The evaluation of a given file is a check of it: what an earlier one found is not taken
        # up, so it may be another one's. A training run in RUN_DIR is never overwritten.
        earlier_check = self.config.eval_only and old and old["config"].get("eval_only")
        if old is not None and not earlier_check:
            self.check_same_run(old)
            with contextlib.suppress(FileNotFoundError):
                self.results = read_json(self.path / "scores.json")
        config = self.config
        kinds = {field.name: field.metadata["kind"] for field in dataclasses.fields(config)}
        record = dict(
            preset=config.preset,
            hash=config.hash(),
            origin=self.origin(),
            identity=self.identity(),
            config=config.as_dict(),
            kinds=kinds,
            differs=config.differences(),
        )
        write_json(path, record)
        (self.path / "STOPPED").unlink(missing_ok=True)  # from here on this run goes on

    def check_same_run(self, old):
        """Raise ConfigError when RUN_DIR holds a run of other settings, data or code."""
        before = old.get("identity", {})
        differences = []
        for name, value in self.identity().items():
            if before.get(name) != value:
                shown = name.upper() if name in old.get("config", {}) else name
                differences.append(f"{shown}: {before.get(name)!r} -> {value!r}")
        if differences:
            raise ConfigError(
                f"{self.path} holds a run of other settings, data or code: "
                f"{'; '.join(differences)}: use the same to resume it, set another RUN_ID, or "
                "RESUME=never to keep it aside"
            )
        if old.get("origin") != self.origin():
            self.log(
                f"warning: {self.path} was begun elsewhere (another user, machine or container): "
                "phases that it calls done are taken on trust; RESUME=never starts anew"
            )

    def announce(self):
        """Log the configuration and the data in the lines that other tools parse (REFERENCE, 9)."""
        config = self.config
        log = self.log
        differs = config.differences()
        # An artifact does not bring the settings of its training: what is set here is not theirs.
        kinds = ("arch", "eval", "run") if config.eval_only else ()
        for name, value in config.as_dict(*kinds).items():
            mark = " *" if name in differs else ""
            log(f"config:{name}={value}{mark}")
        if not config.eval_only:  # an artifact brings what others set
            for name, reason in config.idle().items():
                log(f"warning: {name.upper()}={getattr(config, name)} has no effect with {reason}")
        if not config.eval_only:
            log(f"config_hash:{config.hash()}")
        log(f"evaluation_hash:{config.hash('arch', 'eval')}")
        machine = self.runtime
        attention = pick_attention(machine.device, machine.dtype, machine.compiling)
        log(f"attention:{attention.reason}")
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
        if self.val.retokenisation_mismatch():
            log(
                f"warning: TOKENIZER_PATH={config.tokenizer_path} does not seem to have made these "
                "shards: it encodes their text otherwise. Bytes per token, and so bits per byte, "
                "would be wrong: use the tokenizer that came with them"
            )
        log(f"seed:{config.seed}")
        steps = Checkpointer(self.runtime, "step", 0).numbers()
        self.runtime.event("start", resumed_step=max(steps, default=0))

    def write_manifest(self):
        """manifest.json: versions, machine and hashes, to trace a score to its files."""
        if not self.runtime.is_main:
            return
        config = self.config
        # Before packing there is no artifact; the manifest is written again after it.
        artifact_sha256 = None
        artifact_bytes = None
        if self.artifact_path.exists():
            artifact_sha256 = self.load(self.artifact_path).sha256
            artifact_bytes = self.artifact_path.stat().st_size
        train_shards = list(Path(config.data_path).glob("fineweb_train_*.bin"))
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
            config_hash=config.hash(),
            code_sha256=self.code_sha256,
            code_bytes=CODE_PATH.stat().st_size,
            artifact_sha256=artifact_sha256,
            artifact_bytes=artifact_bytes,
            tokenizer_sha256=sha256_file(config.tokenizer_path),
            data=dict(train_shards=len(train_shards), **self.val.fingerprint),
        )
        self.log(f"manifest:{json.dumps(manifest)}")
        write_json(self.path / "manifest.json", manifest)

    # ---- the phases ----

    def train(self):
        """Write the float weights, unless they are there."""
        if not self.already_done("train", self.float_path.exists):
            train(self.config, self.runtime, self.val, self.float_path, self.packing_reserve())

    def packing_reserve(self):
        """Seconds of a wallclock cap that solving and packing will need, as rank 0 finds them."""
        config = self.config
        if config.quantizer != "gptq" or not config.max_wallclock_seconds:
            return 0.0
        seconds = solving_seconds(config) if self.runtime.is_main else 0.0
        seconds = self.runtime.comm.from_main(seconds)
        self.log(f"wallclock_reserve: {seconds:.4f}s for solving and packing")
        return seconds

    def pack(self):
        """Quantise, fit the budget, write the artifact, log the sizes."""
        if self.already_done("pack", self.artifact_path.exists):
            return
        weights = self.load(self.float_path)
        self.runtime.stop_if_wanted("packing", self.packing_seconds(weights))
        if self.config.quantizer == "gptq":
            self.pack_gptq(weights)
        elif self.runtime.is_main:
            # Deterministic, and it takes seconds: one rank packs, the others read the file.
            self.pack_lite(weights.state_dict)
        self.runtime.comm.barrier()
        self.write_manifest()

    def packing_seconds(self, weights):
        """Predicted seconds of packing LoadedWeights, calibration included."""
        if self.config.quantizer == "gptq":
            step_seconds = weights.info.get("step_avg_ms", 0.0) / 1000
            calibrating = calibration_seconds(self.config, step_seconds)
            return 3 + calibrating + solving_seconds(self.config)
        # Measured: a few microseconds a parameter on one core, most of them in the compressor.
        return 3 + 2e-6 * sum(tensor.numel() for tensor in weights.state_dict.values())

    def pack_lite(self, state_dict):
        """Artifact of rounded rows, on rank 0."""
        tokenizer_sha256 = sha256_file(self.config.tokenizer_path)
        code_bytes = self.code_bytes()
        blob, layers = fit_budget(self.config, state_dict, code_bytes, tokenizer_sha256, self.log)
        self.write_artifact(blob, int5_layers=layers)

    def pack_gptq(self, weights):
        """Calibrate on all ranks, then solve and pack on rank 0; all of it counts as training."""
        begin = time.monotonic()
        config = self.config
        knowledge = calibrate(self.model_of(self.float_path), config, self.runtime)
        calibrated = time.monotonic() - begin
        self.log(f"calibrated tokens:{config.calibration_tokens} seconds:{calibrated:.1f}")
        if self.runtime.is_main:
            tokenizer_sha256 = sha256_file(config.tokenizer_path)
            packed = fit_gptq(
                config, weights.state_dict, knowledge, self.code_bytes(), tokenizer_sha256, self.log
            )
            seconds = time.monotonic() - begin
            total = weights.info.get("train_time_s", 0.0) + seconds
            self.log(
                f"quantised packings:{packed.packings} seconds:{seconds:.1f} "
                f"with_training:{total:.1f}s"
            )
            self.write_artifact(
                packed.blob,
                packings=packed.packings,
                calibration_seconds=calibrated,
                quantiser_seconds=seconds,
                with_training_seconds=total,
                account=[group._asdict() for group in packed.groups],
            )

    def write_artifact(self, blob, **facts):
        """The file, the lines of its sizes and the event."""
        write_atomic(self.artifact_path, [blob])
        self.log_sizes(len(blob), self.code_bytes(), self.config.artifact_compressor)
        self.runtime.event(
            "packed", artifact_bytes=len(blob), code_bytes=self.code_bytes(), **facts
        )

    def code_bytes(self):
        """Bytes of code that the artifact must share BUDGET_BYTES with."""
        return self.config.code_bytes or CODE_PATH.stat().st_size

    def log_sizes(self, artifact_bytes, code_bytes, compressor):
        """The three lines of the challenge's logs, and what is left of the budget."""
        log = self.log
        total = artifact_bytes + code_bytes
        # "int6" is the name that the field's logs use, whatever the bits of a tensor.
        log(f"Code size: {code_bytes} bytes")
        log(f"Serialized model int6+{compressor}: {artifact_bytes} bytes")
        log(f"Total submission size int6+{compressor}: {total} bytes")
        log(f"headroom: {self.config.budget_bytes - total} bytes")

    def check_budget(self):
        """The file that is scored and this very script must fit. Raises ArtifactError."""
        if self.artifact_path.suffix == ".pt":
            return  # float weights are no submission
        with open(self.artifact_path, "rb") as file:
            head = ARTIFACT_HEAD.unpack(file.read(ARTIFACT_HEAD.size))
        artifact_bytes = self.artifact_path.stat().st_size
        # The code that runs, not CODE_BYTES: a promise of the author's is no measurement.
        code_bytes = CODE_PATH.stat().st_size
        # How it was packed is no setting of an evaluation: the file's head says it.
        compressor = COMPRESSORS[head[2]]
        self.log_sizes(artifact_bytes, code_bytes, compressor)
        over = artifact_bytes + code_bytes - self.config.budget_bytes
        if over > 0:
            raise ArtifactError(
                f"{self.artifact_path}: {artifact_bytes} bytes and {code_bytes} bytes of code are "
                f"{over} more than BUDGET_BYTES={self.config.budget_bytes}: score it with the "
                "script it was submitted with, or raise BUDGET_BYTES to look at it all the same"
            )

    def model_of(self, path):
        """The model with the weights of a file; one object for all scores: compiled once."""
        if self.model is None:
            # Rounding in training has no place here: the weights are what they are.
            settings = dataclasses.replace(self.config, late_qat_threshold=0.0)
            self.model = build_model(settings, self.runtime)
        self.model.load_state_dict(self.load(path).state_dict)
        return self.model

    def audit(self):
        """Write audit.json; raises LegalityError when a check fails."""
        config = self.config
        path = self.path / "audit.json"
        begin = time.monotonic()
        if not self.on_main(self.artifact_path.exists):
            raise ConfigError(
                f"MODE=audit: {self.artifact_path} does not exist: set EVAL_ONLY=path"
            )
        audit_key = self.evaluation_key(self.artifact_path)

        def passed_before():
            # A given file is audited anew each time; so is all when the audit is what was asked.
            if config.eval_only or config.mode == "audit" or not path.exists():
                return False
            old = read_json(path)
            return old.get("audit_key") == audit_key and old["passed"]

        self.audited = True  # below, a failure raises
        # Scores of an earlier start of this run are of the same file, script and settings.
        for label, score in self.results["scores"].items():
            score["audited"] = self.is_submission(label)
        if self.already_done("audit", passed_before):
            return
        self.runtime.stop_if_wanted("the audit", 30)
        # What is audited is what was written: the weights come from the file, through its reader.
        checks = audit(self.model_of(self.artifact_path), self.val, config, self.runtime)
        failed = [check["name"] for check in checks if not check["passed"]]
        seconds = time.monotonic() - begin
        if self.runtime.is_main:
            record = dict(passed=not failed, audit_key=audit_key, seconds=seconds, checks=checks)
            write_json(path, record)
        self.runtime.event("audit", passed=not failed)
        verdict = "FAIL" if failed else "pass"
        self.log(f"audit {verdict} {len(checks)} checks in {seconds:.1f} s")
        if failed:
            raise LegalityError(f"the audit failed: {', '.join(failed)}: the score is not legal")

    def evaluation_key(self, path):
        """A score or an audit belongs to one file of weights, one script and its settings."""
        settings = self.config.hash("arch", "eval")
        return f"{self.load(path).sha256}/{self.code_sha256}/{settings}"

    def state_key(self, path):
        """What a cut-off evaluation of a file must agree on to be continued.

        A given file is checked, so only states of this user's own runs are believed. A training
        run's phases are taken on trust anyway: its job may go on where the user's key is not.
        """
        key = self.evaluation_key(path)
        return f"{key}/{self.origin()}" if self.config.eval_only else key

    def score(self):
        """Every score that is configured and missing, from the files that were written."""
        config = self.config
        for job in self.jobs():
            scored = self.already_done(
                job.label, lambda job=job: job.label in self.results["scores"]
            )
            if scored and not config.scores_file:
                continue
            # States are kept apart by label: several scores may be cut off and go on.
            name = f"eval_{job.label}"
            checkpoints = Checkpointer(self.runtime, name, config.eval_checkpoint_seconds)
            scores_file = None
            if config.scores_file:
                # It needs every target of one pass, so no earlier part of one is taken up.
                checkpoints = None
                scores_file = ScoresFile(self.val.num_targets)
            path = self.float_path if job.label == "pre_quant" else self.artifact_path
            score = evaluate(
                self.model_of(path),
                self.val,
                config,
                self.runtime,
                job.stride,
                ttt=job.ttt,
                slot=job.slot,
                label=job.label,
                observer=scores_file,
                checkpoints=checkpoints,
                identity=self.state_key(path),
                spot_checks=config.spot_checks,
            )
            self.record(score, job)
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
        log = self.log
        name = score.label
        mark = "" if score.legal else " legality:illegal"
        stride = f" stride:{job.stride}" if name.endswith("sliding_window") else ""
        milliseconds = 1000 * score.seconds
        log(
            f"{name} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f}{stride} "
            f"eval_time:{milliseconds:.0f}ms{mark}"
        )
        log(f"{name}_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}{mark}")
        log(f"score_scope:{self.val.scope}")
        entry = dict(
            val_loss=score.val_loss,
            val_bpb=score.val_bpb,
            tokens=score.tokens,
            bytes=score.bytes,
            eval_time_s=score.seconds,
            legal=score.legal,
            spot_checks=score.spot_checks,
            audited=self.audited and self.is_submission(name),
        )
        self.runtime.event("score", label=name, scope=self.val.scope, **entry)
        self.results["scores"][name] = entry
        if self.runtime.is_main:
            self.write_results(finished=False)

    def write_results(self, finished):
        """scores.json: what training and scoring measured; manifest.json has the rest."""
        code_bytes = self.code_bytes()
        artifact_bytes = self.artifact_path.stat().st_size
        if not self.config.eval_only:  # what training measured travels with its weights
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

    # ---- what a person reads ----

    def is_submission(self, label):
        """Float weights do not fit the budget, and the roundtrip only shows what packing cost."""
        return not label.startswith(("pre_quant", "float")) and not label.endswith("_roundtrip")

    def headline(self):
        """Label of the score to report: the last legal one in the order of jobs.

        To choose the lowest after seeing them would be selection on validation text.
        """
        scores = self.results["scores"]
        legal = [
            job.label
            for job in self.jobs()
            if job.label in scores and scores[job.label]["legal"] and self.is_submission(job.label)
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
        """What happened and what to try next, in plain words."""
        log = self.log
        results = self.results
        for label, score in results["scores"].items():
            log(
                f"result {label} val_bpb:{score['val_bpb']:.8f} "
                f"spot_checks:{score['spot_checks']} legal:{self.legality_of(label)} "
                f"score_scope:{self.val.scope}"
            )
        if self.config.preset == "demo":
            self.log_baselines()
        headline = self.headline()
        if headline is not None:
            bpb = results["scores"][headline]["val_bpb"]
            seconds = results["scores"][headline]["eval_time_s"]
            legal = self.legality_of(headline)
            log(
                f"summary: score  {bpb:.4f} bits per byte ({headline}, legal:{legal}, "
                f"score_scope:{self.val.scope})"
            )
            log(f"summary: scored {self.val.num_targets:,} targets in {seconds:,.0f} s")
        total = results["total_bytes"]
        log(
            f"summary: size   {results['artifact_bytes']:,} + {results['code_bytes']:,} of code = "
            f"{total:,} of {self.config.budget_bytes:,} bytes"
        )
        if not self.config.eval_only:
            log(f"summary: steps  {results['steps']:,} in {results['train_time_s']:,.0f} s")
        log(f"summary: files  {self.path}")
        log(f"next: {self.next_command()}")

    def log_baselines(self):
        """What general compressors make of the text that the demo was scored on."""
        ids = self.val.tokens.astype(int).tolist()
        text = self.val.token_bytes.model.decode(ids).encode()
        packed = {"gzip -9": gzip.compress(text, 9), "xz -6": lzma.compress(text)}
        for name, blob in packed.items():
            bpb = 8 * len(blob) / len(text)
            log_line = f"baseline {name} bpb:{bpb:.4f} on the same {len(text)} bytes of text"
            self.log(log_line)

    def next_command(self):
        """The one command to try next."""
        where = f"EVAL_ONLY={self.artifact_path} TOKENIZER_PATH={self.config.tokenizer_path}"
        if self.config.eval_only:
            return f'{where} MODE=sample PROMPT="The" python train_gpt.py  # read what it writes'
        return (
            f"{where} DATA_PATH={self.config.data_path} python train_gpt.py  # verify the artifact"
        )


# ---- MODE=sample ----


@torch.no_grad()
def continue_tokens(model, ids, config, runtime, generator):
    """Yield SAMPLE_TOKENS token ids that continue `ids` (a list), one at a time, until BOS or EOS.

    Each next token is drawn from softmax(logits / TEMPERATURE) over the TOP_K likeliest; at
    TEMPERATURE=0 it is the likeliest one.
    """
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
            return
        ids = [*ids, token]
        yield token


def sample(config, runtime, loaded):
    """MODE=sample: print PROMPT and how the artifact goes on; nothing is scored or recorded."""
    token_bytes = load_token_bytes(config, loaded.tokenizer_sha256)
    tokenizer = token_bytes.model
    model = build_model(config, runtime)
    model.load_state_dict(loaded.state_dict)
    model.eval()
    prompt = [BOS, *tokenizer.encode(config.prompt)]  # as every document of the shards begins
    generator = torch.Generator().manual_seed(config.seed)
    shown = ""
    text_ids = prompt[1:]
    for token in continue_tokens(model, prompt, config, runtime, generator):
        text_ids = [*text_ids, token]
        text = tokenizer.decode(text_ids)
        # A character of several bytes is a replacement mark until its last byte is there.
        if runtime.is_main and not text.endswith("\ufffd"):
            print(printable(text[len(shown) :], keep="\n\t"), end="", flush=True)
            shown = text
    if runtime.is_main:
        print()


# ---- the end of a process ----


@contextlib.contextmanager
def reported_errors(runtime):
    """Log what stops a run, once and with the rank, and end the process with its exit code."""
    rank = f"[rank {runtime.comm.rank}] " if runtime.comm.world > 1 else ""
    try:
        yield
    except Stopped as stop:
        report_stop(runtime, stop)
        leave(runtime, stop.code)
    except GolfError as error:
        report_error(runtime, error.code, str(error), f"error: {printable(error)}", rank)
        leave(runtime, error.code)
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"
        report_error(runtime, 1, message, traceback.format_exc(), rank)
        leave(runtime, 1)


def report_stop(runtime, stop):
    """One line, one event, and the file STOPPED that tells a job script to requeue."""
    if runtime.is_main:
        with contextlib.suppress(OSError):
            (runtime.dir / "STOPPED").write_text(f"{stop}\n")
    reason = runtime.stop.reason or "another_rank"  # rank 0 need not have heard it itself
    runtime.log(f"stopped signal:{reason} phase:{stop}; run the same command again to go on")
    runtime.event("stopped", signal=reason, phase=str(stop))
    with contextlib.suppress(RuntimeError):
        runtime.comm.barrier()  # all ranks leave together


def report_error(runtime, code, message, shown, rank):
    """`message` to the log and the events, `shown` with its rank to the terminal."""
    runtime.event("error", code=code, message=message)
    runtime.append(runtime.log_file, f"error: {message}")
    lines = [f"{rank}{printable(line)}" for line in shown.splitlines()]
    print("\n".join(lines), file=sys.stderr, flush=True)


def leave(runtime, code):
    """Exit now: tearing down a process group whose peers may be gone can hang."""
    # A checkpoint that is being written must be whole before the process goes. Other threads are
    # not waited for: those of the compiler's pools do not end by themselves.
    for thread in threading.enumerate():
        if thread.name.startswith(CHECKPOINT_THREAD):
            thread.join()
    sys.stdout.flush()
    if runtime.comm.world > 1:
        os._exit(code)
    sys.exit(code)


def launch_ranks(config):
    """Start NPROC processes of this command on this machine; returns the exit code of the job.

    It is what `torchrun --standalone` does, but for the end: torchrun exits with 1 whatever its
    workers say, and a job script could not tell a failed audit from a full disk.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: ranks share the cores
    launch_config = launcher.LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.nproc,
        run_id=f"train_gpt_{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,  # a stopped run goes on when its command is run again
        monitor_interval=0.1,
        shutdown_timeout=110,  # seconds that a rank has to save before it is killed
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    )
    begin = time.time()
    try:
        launcher.elastic_launch(launch_config, sys.executable)("-u", str(CODE_PATH))
    except launcher.ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode
    except SignalException:
        # The workers got the signal too; the file tells whether they saved everything in time.
        stopped = Path(config.run_dir) / "STOPPED"
        saved = stopped.exists() and stopped.stat().st_mtime >= begin
        return Stopped.code if saved else 1
    return 0


def load_given(environ):
    """LoadedWeights that this command only scores or samples from, or None when it is to train."""
    path = environ.get("EVAL_ONLY")
    # Without EVAL_ONLY, MODE=sample reads the artifact of the run that the same settings made.
    if not path and environ.get("MODE") == "sample":
        path = Path(Config.from_env(environ).run_dir) / ARTIFACT_NAME
    return load_weights(path) if path else None


def main():
    """Read the configuration, build the runtime, train or load, pack, audit, score."""
    arguments = set(sys.argv[1:])
    if arguments & {"--help", "-h"}:
        print(help_text())
        return
    if arguments - {"--print-config"}:
        raise ConfigError(
            f"unknown arguments {sys.argv[1:]}: settings are environment variables, see --help"
        )
    # The file comes first: its architecture and evaluation settings belong to the configuration.
    loaded = load_given(os.environ)
    config = Config.from_env(os.environ, loaded.brought() if loaded else None)
    if arguments:
        print("\n".join(f"{name.upper()}={value}" for name, value in config.as_dict().items()))
        return
    check_places(config)
    if config.nproc > 1 and "WORLD_SIZE" not in os.environ:
        sys.exit(launch_ranks(config))
    runtime = Runtime(config, os.environ)
    runtime.stop.watch_signals()
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
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(error.code)
