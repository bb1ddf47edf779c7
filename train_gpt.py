"""Parameter Golf in one file: train an 11-layer language model, pack it under 16,000,000 bytes, score it.

    PRESET=demo python train_gpt.py                        # laptop CPU, builds its own data, 4 minutes
    python train_gpt.py                                    # nfm_7k on one GPU (FineWeb shards under ./data)
    torchrun --standalone --nproc_per_node=8 train_gpt.py  # the same run on eight GPUs
    EVAL_ONLY=final_model.int6.ptz python train_gpt.py     # verify an artifact: no training data, no network
    python train_gpt.py --help | --print-config            # every variable, or the resolved configuration

Configuration comes from environment variables: explicit variable > PRESET > default. The same command resumes
a run that was stopped. Everything a run leaves behind lies in RUN_DIR (default runs/$RUN_ID).

Shapes in comments: B batch, T time, D model, H query heads, K key/value heads, d head dim, V vocabulary,
N matrices in a stack.
Exit codes: 0 done, 2 configuration, 3 data, 4 artifact over budget or unreadable, 5 diverged, 6 legality
audit failed, 7 out of storage or memory, 75 stopped with everything saved (run the same command again).
"""

import ast
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import fcntl
import functools
import gzip
import hashlib
import inspect
import io
import json
import lzma
import math
import multiprocessing
import os
import platform
import re
import signal
import struct
import sys
import sysconfig
import threading
import time
import traceback
import types
import typing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import nn

BOS = 1  # every document of the official shards starts with this token
EOS = 2  # the tokenizers have it, the shards do not use it
CODE_PATH = Path(__file__).resolve()


class GolfError(Exception):
    """An error a user can act on; `code` is the process's exit code."""

    code = 1


class ConfigError(GolfError):
    code = 2


class DataError(GolfError):
    code = 3


class ArtifactError(GolfError):
    code = 4


class DivergedError(GolfError):
    code = 5


class LegalityError(GolfError):
    code = 6


class ResourceError(GolfError):
    code = 7


class Stopped(GolfError):
    """Raised after everything was saved, at a signal or before a time limit."""

    code = 75


# ==================================================================================================
# Configuration
# One frozen dataclass whose defaults are the nfm_7k submission; presets are its differences. A field's kind
# says what it belongs to: "arch" and "eval" travel inside the artifact, "train" fixes the weights, "run"
# changes where and how a run happens but not its result. The hash covers all but "run".
# ==================================================================================================
def opt(kind, default, text, low=-math.inf, high=math.inf, choices=None):
    """A Config field with what --help and the range checks need to know."""
    return dataclasses.field(
        default=default, metadata=dict(kind=kind, text=text, low=low, high=high, choices=choices)
    )


arch_opt, train_opt = functools.partial(opt, "arch"), functools.partial(opt, "train")
eval_opt, run_opt = functools.partial(opt, "eval"), functools.partial(opt, "run")


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run. Raises ConfigError for a wrong type, range or combination."""

    preset: str = run_opt("nfm_7k", "named set of differences from the defaults")
    # architecture
    vocab_size: int = arch_opt(1024, "tokenizer pieces", 8, 65536)
    num_layers: int = arch_opt(11, "transformer blocks", 1, 64)
    model_dim: int = arch_opt(512, "width of the residual stream", 16, 4096)
    num_heads: int = arch_opt(8, "query heads", 1, 64)
    num_kv_heads: int = arch_opt(4, "key/value heads", 1, 64)
    mlp_mult: float = arch_opt(
        3.0, "MLP width / model_dim, rounded down to a multiple of 8", 0.25, 16
    )
    rope_dims: int = arch_opt(16, "rotated dimensions per head", 0, 512)
    rope_base: float = arch_opt(10000.0, "base of the rotary frequencies", 1)
    logit_softcap: float = arch_opt(30.0, "logits are cap*tanh(logits/cap)", 1e-3)
    bigram_vocab_size: int = arch_opt(4096, "rows of the bigram hash table", 2, 1 << 20)
    bigram_dim: int = arch_opt(128, "width of the bigram hash table", 1, 4096)
    ve_dim: int = arch_opt(0, "width of the shared value embedding, 0 = off", 0, 4096)
    ve_last_n: int = arch_opt(2, "last layers that receive the value embedding", 1, 64)
    xsa_last_n: int = arch_opt(11, "last layers with exclusive self-attention", 0, 64)
    gated_attention: bool = arch_opt(True, "per-head sigmoid gate on the attention output")
    value_residual: bool = arch_opt(True, "mix layer 0's values into every layer")
    e2e_ttt_enabled: bool = arch_opt(False, "TTT-Linear refiner, trained end to end")
    e2e_ttt_mini_batch: int = arch_opt(16, "tokens per inner step of TTT-Linear", 1, 1024)
    e2e_ttt_base_lr: float = arch_opt(1.0, "inner rate of TTT-Linear x head_dim", 0)
    flow_enabled: bool = arch_opt(False, "FlowRefiner after the trunk")
    flow_latent_dim: int = arch_opt(64, "latent width of FlowRefiner", 1, 4096)
    flow_hidden_dim: int = arch_opt(256, "hidden width of FlowRefiner", 1, 4096)
    nfm_enabled: bool = arch_opt(True, "NativeFlowMatcher after the trunk")
    nfm_hidden_dim: int = arch_opt(256, "hidden width of NativeFlowMatcher", 1, 4096)
    # training
    seed: int = train_opt(42, "seed of weights and noise", 0, 2**31 - 1)
    iterations: int = train_opt(7000, "optimiser steps", 0)
    train_batch_tokens: int = train_opt(786432, "tokens per optimiser step, all ranks together", 1)
    train_seq_len: int = train_opt(2048, "training sequence length", 2)
    warmdown_iters: int = train_opt(2800, "last steps over which the learning rate falls to 0", 0)
    warmdown_shape: str = train_opt("linear", "shape of the warmdown", choices=("linear", "cosine"))
    max_wallclock_seconds: float = train_opt(0.0, "training time cap, 0 = none", 0)
    embed_lr: float = train_opt(0.035, "AdamW rate of embeddings", 0)
    scalar_lr: float = train_opt(
        0.025, "AdamW rate of what is neither embedding nor block matrix", 0
    )
    matrix_lr: float = train_opt(0.025, "Muon rate of the blocks' matrices", 0)
    muon_momentum: float = train_opt(0.99, "Muon momentum after its warm-up", 0, 1)
    muon_momentum_warmup_start: float = train_opt(0.92, "Muon momentum at step 0", 0, 1)
    muon_momentum_warmup_steps: int = train_opt(1500, "steps of the linear momentum warm-up", 0)
    muon_ns_steps: int = train_opt(5, "Newton-Schulz steps", 1, 20)
    weight_decay: float = train_opt(0.04, "decoupled weight decay, Muon and AdamW", 0)
    beta1: float = train_opt(0.9, "AdamW beta1", 0, 0.9999)
    beta2: float = train_opt(0.95, "AdamW beta2", 0, 0.999999)
    adam_eps: float = train_opt(1e-8, "AdamW epsilon", 1e-30)
    grad_clip_norm: float = train_opt(0.3, "clip of the global gradient norm, 0 = off", 0)
    qk_gain_init: float = train_opt(1.5, "initial per-head query gain")
    embed_init_std: float = train_opt(0.005, "standard deviation of the initial embedding", 0)
    flow_init_scale: float = train_opt(0.01, "scale of FlowRefiner's initial up-projection", 0)
    nfm_loss_weight: float = train_opt(0.1, "weight of the flow-matching loss", 0)
    ema_decay: float = train_opt(0.997, "decay of the weight average, 0 = off", 0, 0.999999)
    swa_enabled: bool = train_opt(False, "export the mean of snapshots taken late in the run")
    swa_every: int = train_opt(50, "steps between snapshots", 1)
    swa_start_scale: float = train_opt(0.2, "snapshots start below this learning-rate scale", 0, 1)
    late_qat_threshold: float = train_opt(
        0.0, "learning-rate scale of rounding in training, 0 = off", 0, 1
    )
    # compression
    block_bits: int = train_opt(6, "bits of the blocks' matrices", choices=(5, 6, 8))
    embed_bits: int = train_opt(8, "bits of the other large matrices", choices=(5, 6, 8))
    compressor: str = train_opt("zstd", "compressor of the artifact", choices=("zstd", "lzma"))
    zstd_level: int = train_opt(16, "zstd level", 1, 22)
    lzma_preset: int = train_opt(6, "lzma preset", 0, 9)
    budget_bytes: int = train_opt(16_000_000, "code + model must fit this", 1)
    # evaluation
    dtype: str = eval_opt(
        "bfloat16", "autocast type; float32 = none", choices=("bfloat16", "float32")
    )
    eval_seq_len: int = eval_opt(1024, "window of every evaluation", 2)
    eval_stride: int = eval_opt(64, "stride of the sliding window", 1)
    eval_batch_seqs: int = eval_opt(32, "windows per batch and rank", 1)
    ttt_enabled: bool = eval_opt(True, "legal score-first test-time training")
    ttt_lr: float = eval_opt(0.002, "SGD rate, cosine over chunks", 0)
    ttt_momentum: float = eval_opt(0.9, "SGD momentum", 0, 1)
    ttt_epochs: int = eval_opt(10, "epochs over each scored chunk", 1)
    ttt_chunk_tokens: int = eval_opt(32768, "tokens per chunk", 1)
    ttt_batch_seqs: int = eval_opt(32, "sequences per SGD step, all ranks together", 1)
    ttt_freeze_blocks: int = eval_opt(2, "first blocks that stay frozen", 0)
    ttt_grad_clip: float = eval_opt(1.0, "clip of the SGD gradient norm, 0 = off", 0)
    slot: str = eval_opt(
        "off",
        "per-window shift of the hidden state; published is illegal",
        choices=("off", "causal", "published"),
    )
    slot_lr: float = eval_opt(0.003, "AdamW rate of SLOT", 0)
    slot_steps: int = eval_opt(5, "AdamW steps of SLOT", 1)
    # where and how
    data_path: str = run_opt("./data/datasets/fineweb10B_sp1024", "directory of the shards")
    tokenizer_path: str = run_opt("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model")
    run_id: str = run_opt("", "name of the run; default {preset}_seed{seed} and the SLURM job")
    run_dir: str = run_opt("", "directory of the run; default runs/$RUN_ID")
    resume: str = run_opt(
        "auto", "continue RUN_DIR; never keeps the old run aside", choices=("auto", "never", "must")
    )
    eval_only: str = run_opt("", "score this artifact or float checkpoint, do not train")
    mode: str = run_opt(
        "train",
        "audit = only the legality audit; sample = print how the artifact continues PROMPT",
        choices=("train", "audit", "sample"),
    )
    audit: bool = run_opt(
        False, "prove the four legality conditions before scoring; on for EVAL_ONLY and the demo"
    )
    code_bytes: int = run_opt(
        0, "bytes of code to leave room for when packing, 0 = this file's (see slurm/package.py)", 0
    )
    prompt: str = run_opt("The", "MODE=sample: the text to continue")
    sample_tokens: int = run_opt(200, "MODE=sample: tokens to write at most", 1)
    temperature: float = run_opt(0.8, "MODE=sample: flattens the distribution; 0 = likeliest", 0)
    top_k: int = run_opt(50, "MODE=sample: tokens to choose from at each position", 1)
    device: str = run_opt("auto", "auto, cpu, cuda or cuda:N")
    compile: str = run_opt("auto", "torch.compile; auto = on CUDA only", choices=("auto", "0", "1"))
    micro_batch_tokens: int = run_opt(98304, "tokens per forward pass and rank", 1)
    warmup_steps: int = run_opt(
        20, "compile warm-up steps on synthetic tokens; weights are restored", 0
    )
    train_log_every: int = run_opt(100, "steps between training log lines", 1)
    val_loss_every: int = run_opt(
        1000, "steps between validations, 0 = only after the last step", 0
    )
    checkpoint_every: int = run_opt(1000, "steps between checkpoints, 0 = off", 0)
    checkpoint_seconds: float = run_opt(600.0, "seconds between checkpoints, 0 = off", 0)
    eval_checkpoint_seconds: float = run_opt(
        300.0, "seconds between states of an evaluation, 0 = off", 0
    )
    time_limit_seconds: float = run_opt(
        0.0, "save and stop within this time, 0 = SLURM's or none", 0
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
        check_fit(self)

    @property
    def head_dim(self):
        return self.model_dim // self.num_heads

    @property
    def mlp_hidden(self):
        return int(self.mlp_mult * self.model_dim) // 8 * 8

    @classmethod
    def from_env(cls, environ, brought=None):
        """The configuration of a run: explicit variable > `brought` > PRESET > default.

        `brought` holds what the artifact of EVAL_ONLY brings along: its architecture, its evaluation
        settings and a default RUN_ID. Raises ConfigError for a near miss of a name, a wrong value, or an
        explicit architecture variable that contradicts the artifact.
        """
        fields = {field.name.upper(): field for field in dataclasses.fields(cls)}
        check_names(environ, fields)
        explicit = {}
        for name, field in fields.items():
            if name in environ:
                explicit[field.name] = parse_value(field, environ[name])
        brought = brought or {}
        for field in dataclasses.fields(cls):
            name = field.name
            contradicts = name in explicit and name in brought and explicit[name] != brought[name]
            if contradicts and field.metadata["kind"] == "arch":
                raise ConfigError(
                    f"{name.upper()}={explicit[name]} contradicts the artifact, which has "
                    f"{brought[name]}: unset {name.upper()} (an artifact brings its own "
                    "architecture)"
                )
        # An unknown preset is reported by check_fit, with the list of those there are.
        preset = PRESETS.get(environ.get("PRESET"), {})
        values = {"preset": "nfm_7k", **preset, **brought, **explicit}
        if not values.get("run_id"):
            values["run_id"] = f"{values['preset']}_seed{values.get('seed', cls.seed)}"
        if "run_id" not in explicit:
            values["run_id"] += slurm_suffix(environ)
        if not values.get("run_dir"):
            values["run_dir"] = f"runs/{values['run_id']}"
        return cls(**values)

    def as_dict(self, *kinds):
        fields = [
            f.name for f in dataclasses.fields(self) if not kinds or f.metadata["kind"] in kinds
        ]
        return {name: getattr(self, name) for name in fields}

    def hash(self, *kinds):
        """16 hex digits over the fields of these kinds; by default all that can change a result."""
        text = json.dumps(self.as_dict(*(kinds or ("arch", "train", "eval"))), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self):
        """Fields that differ from the preset (settings of place and pace included)."""
        base = {f.name: f.default for f in dataclasses.fields(self)} | PRESETS[self.preset]
        base.update(preset=self.preset, run_id=self.run_id, run_dir=self.run_dir)
        return {name: value for name, value in self.as_dict().items() if value != base[name]}


def check_names(environ, fields):
    """Raise ConfigError for a variable that is no setting but looks like one, such as ITERATONS."""
    for name in sorted(environ.keys() - fields):
        near = difflib.get_close_matches(name.upper(), fields, 1, 0.86)
        if near and len(name) > 3:
            raise ConfigError(
                f"environment variable {name}={environ[name]!r} is not a setting, but "
                f"looks like {near[0]}: rename or unset it (see --help)"
            )


def slurm_suffix(environ):
    """_JOB or _JOB_TASK under SLURM, so that the tasks of an array do not share a RUN_DIR; else nothing."""
    job = environ.get("SLURM_ARRAY_JOB_ID") or environ.get("SLURM_JOB_ID")
    task = environ.get("SLURM_ARRAY_TASK_ID")
    return "".join(f"_{part}" for part in (job, task) if part)


def parse_value(field, text):
    try:
        if field.type is bool:
            return {"0": False, "1": True, "false": False, "true": True}[text.lower()]
        return field.type(text)
    except (ValueError, KeyError):
        expected = "0, 1, true or false" if field.type is bool else field.type.__name__
        raise ConfigError(f"{field.name.upper()}={text!r}: expected {expected}") from None


def check_value(field, value):
    meta, name, number = field.metadata, field.name.upper(), field.type in (int, float)
    right = isinstance(value, (int, float) if field.type is float else field.type)
    if not right or (isinstance(value, bool) and number):
        raise ConfigError(f"{name}={value!r}: expected {field.type.__name__}")
    if (
        number and not abs(value) <= sys.float_info.max
    ):  # NaN, infinity, an integer beyond every float
        raise ConfigError(f"{name}={value}: expected a finite number")
    if number and not meta["low"] <= value <= meta["high"]:
        most = f" and at most {meta['high']}" if meta["high"] < math.inf else ""
        raise ConfigError(f"{name}={value}: expected at least {meta['low']}{most}")
    if meta["choices"] and value not in meta["choices"]:
        raise ConfigError(
            f"{name}={value!r}: expected one of {', '.join(map(str, meta['choices']))}"
        )


def check_fit(c):
    """Settings that only make sense together; each row is (holds, their names, what is expected)."""
    heads = c.model_dim % c.num_heads == 0
    multiple = "the first is no multiple of the second: change one of them"
    rows = [
        (c.preset in PRESETS, "preset", f"expected one of {', '.join(PRESETS)}"),
        (
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", c.device),
            "device",
            "expected auto, cpu, cuda or cuda:N",
        ),
        (heads, "model_dim num_heads", multiple),
        (c.num_heads % c.num_kv_heads == 0, "num_heads num_kv_heads", multiple),
        (
            c.rope_dims % 2 == 0 and c.rope_dims <= c.head_dim,
            "rope_dims",
            f"use an even number up to MODEL_DIM/NUM_HEADS = {c.model_dim / c.num_heads:g}",
        ),
        (c.mlp_hidden >= 8, "mlp_mult", "no hidden unit is left: raise it"),
        (c.ttt_freeze_blocks <= c.num_layers, "ttt_freeze_blocks num_layers", "lower the first"),
        (not c.ve_dim or c.ve_last_n <= c.num_layers, "ve_last_n num_layers", "lower the first"),
        (c.train_batch_tokens % c.train_seq_len == 0, "train_batch_tokens train_seq_len", multiple),
        (
            c.micro_batch_tokens >= c.train_seq_len,
            "micro_batch_tokens train_seq_len",
            "not one sequence fits: raise the first",
        ),
        (
            c.eval_stride <= c.eval_seq_len,
            "eval_stride eval_seq_len",
            "targets between the windows would never be scored: lower the first",
        ),
        (c.ttt_chunk_tokens % c.eval_seq_len == 0, "ttt_chunk_tokens eval_seq_len", multiple),
        (
            c.slot == "off" or c.eval_stride < c.eval_seq_len,
            "slot eval_stride eval_seq_len",
            "no window has a position that an earlier one scored: lower EVAL_STRIDE",
        ),
    ]
    for holds, names, expected in rows:
        if not holds:
            values = " and ".join(f"{name.upper()}={getattr(c, name)!r}" for name in names.split())
            raise ConfigError(f"{values}: {expected}")


BASE = dict(nfm_enabled=False, eval_seq_len=2048)
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
TTT_LINEAR = dict(
    VE128,
    e2e_ttt_enabled=True,
    flow_enabled=True,
    iterations=7185,
    warmdown_iters=4311,
    ttt_enabled=False,
)
PRESETS = {
    "nfm_7k": {},
    "base_7k": BASE,
    "base_20k": LONG,
    "flow_20k": dict(LONG, flow_enabled=True),
    "ttt_linear_10l": dict(TTT_LINEAR, num_layers=10),
    "ttt_linear_11l": TTT_LINEAR,
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
    # The whole path of nfm_7k at a size that two CPU cores train in two minutes.
    # The wallclock cap keeps a slow machine inside five minutes; a fast one takes all steps.
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
        warmdown_iters=130,
        max_wallclock_seconds=150.0,
        train_batch_tokens=8192,
        train_seq_len=256,
        micro_batch_tokens=8192,
        embed_lr=0.01,
        scalar_lr=0.01,
        muon_momentum=0.95,
        muon_momentum_warmup_start=0.85,
        muon_momentum_warmup_steps=100,
        warmup_steps=0,
        train_log_every=25,
        val_loss_every=200,
        checkpoint_every=0,
        checkpoint_seconds=60.0,
        eval_checkpoint_seconds=30.0,
        eval_seq_len=256,
        ttt_epochs=1,
        ttt_chunk_tokens=16384,
        ttt_batch_seqs=16,
        ttt_freeze_blocks=1,
        data_path="./data/datasets/demo_sp1024",
        tokenizer_path="./data/tokenizers/demo_1024_bpe.model",
    ),
}


def help_text():
    """Every variable with its meaning, default and the presets that change it."""
    lines = [__doc__, "Variables (default; [preset=value] where a preset differs):"]
    for field in dataclasses.fields(Config):
        name, choices = field.name, PRESETS if field.name == "preset" else field.metadata["choices"]
        extra = f" ({'|'.join(map(str, choices))})" if choices else ""
        presets = "".join(f" [{p}={d[name]}]" for p, d in PRESETS.items() if name in d)
        lines.append(
            f"  {name.upper()}={field.default}\n      {field.metadata['text']}{extra}{presets}"
        )
    return "\n".join(lines)


# ==================================================================================================
# Files
# What must survive a kill, a full disk or a damaged copy is written whole or not at all, and carries a
# checksum that is compared before anything in it is used.
# ==================================================================================================
def sha256_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def write_atomic(path, parts):
    """Write byte strings to a temporary file, flush and rename it, so that `path` is never half-written.

    Raises ResourceError when the file system refuses; an older file at `path` is intact then.
    """
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
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
    write_atomic(path, [(json.dumps(value, indent=1) + "\n").encode()])


def save_tensors(path, state):
    """Write a tree of tensors and plain values with a trailing SHA-256, since PyTorch's reader does not
    check its archive's checksums; returns the number of bytes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, [buffer.getbuffer(), hashlib.sha256(buffer.getbuffer()).digest()])
    return Path(path).stat().st_size


def load_tensors(path):
    """What save_tensors wrote, on the CPU, without running its code. Raises ArtifactError if damaged."""
    try:
        blob = Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{path}: {error.strerror}: copy it again, or name another file"
        ) from None
    if len(blob) < 32 or hashlib.sha256(memoryview(blob)[:-32]).digest() != blob[-32:]:
        raise ArtifactError(
            f"{path}: checksum does not match: truncated, damaged or not ours: copy it again, or name another file"
        )
    try:
        return torch.load(io.BytesIO(blob[:-32]), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ArtifactError(
            f"{path}: not a checkpoint of tensors ({str(error).splitlines()[0]})"
        ) from None


def private_copy(tree):
    """A tree of tensors, in dicts and lists, copied to the host."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: private_copy(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [private_copy(value) for value in tree]
    return tree


class Checkpointer:
    """Numbered states of one training run or evaluation, the last two of which are kept.

    They are written on a background thread: the caller waits only for the copy of its state. A write that
    failed is a warning, since the state before it is intact; `wait()` says whether it did.
    """

    KEPT = 2

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
        pattern = re.compile(re.escape(self.name) + r"_(\d{8})\.pt")
        found = [pattern.fullmatch(path.name) for path in self.folder.glob("*.pt")]
        return sorted(int(match[1]) for match in found if match)

    def due(self):
        """Whether `every_seconds` have passed since the last save."""
        return 0 < self.every_seconds < time.monotonic() - self.saved_at

    def save(self, number, state, saved):
        """Copy `state` and begin to write it; `saved(seconds, bytes)` is called when it is on disk."""
        self.wait()
        self.saved_at = time.monotonic()
        executor = ThreadPoolExecutor(1)
        self.writing = executor.submit(self._write, number, private_copy(state), saved)
        executor.shutdown(wait=False)  # the thread ends with this write

    def _write(self, number, state, saved):
        begin = time.monotonic()
        size = save_tensors(self.path(number), state)
        seconds = time.monotonic() - begin
        self.runtime.stop.save_seconds = seconds
        saved(seconds, size)
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
        """For a state that is about to be needed: raises ResourceError if it could not be written."""
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
    broken = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    file = open(path, "ab", buffering=0)
    file.write(b"\n" * broken)
    return file


# ==================================================================================================
# Runtime
# Device, ranks, log, clock, signals and atomic files: everything that touches the machine sits in one object
# made in main and passed down, so that all that follows is the same code on a laptop and on eight GPUs.
# ==================================================================================================
# PyTorch 2.13 renamed two collectives.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Comm:
    """Rank, world size and the collectives in use. Counts the bytes a ring algorithm makes each rank send."""

    def __init__(self, rank=0, world=1):
        self.rank, self.world, self.bytes_sent = rank, world, 0

    def all_reduce(self, tensor):
        """Sum over ranks, in place; returns a handle to wait for."""
        return self._run(dist.all_reduce, 2 * tensor.nbytes, tensor)

    def reduce_scatter(self, out, stack):
        """out (N/world, ...) = this rank's slice of the sum over ranks of stack (N, ...)."""
        return self._run(reduce_scatter, stack.nbytes, out, stack)

    def all_gather(self, out, part):
        """out (N, ...) = every rank's part (N/world, ...)."""
        return self._run(all_gather, out.nbytes, out, part)

    def _run(self, collective, full_bytes, *tensors):
        self.bytes_sent += full_bytes * (self.world - 1) // self.world
        return collective(*tensors, async_op=True)

    def sum_gradients(self, grads):
        """Sum a list of tensors over ranks, in place, in one bucket."""
        if self.world > 1:
            flat = torch.cat([g.flatten() for g in grads])
            self.all_reduce(flat).wait()
            parts = flat.split([g.numel() for g in grads])
            torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads)])

    def all_reduce_scalars(self, *values):
        """Element-wise sum of numbers over ranks, as floats, through the host (no device synchronisation)."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def any_rank(self, condition):
        """Whether `condition` holds on any rank."""
        return self.all_reduce_scalars(bool(condition))[0] > 0

    def from_main(self, number):
        """Rank 0's number, as a float, on every rank."""
        return self.all_reduce_scalars(number if self.rank == 0 else 0)[0]

    def gather_rows(self, row):
        """(world, n) float64: one row of n numbers from every rank."""
        rows = np.zeros((self.world, len(row)))
        rows[self.rank] = row
        return np.array(self.all_reduce_scalars(*rows.flatten())).reshape(rows.shape)

    def barrier(self):
        self.all_reduce_scalars(0)


class StopRequest:
    """The wish to stop: a signal, or a time limit that comes near. `reason` is empty until there is one."""

    def __init__(self, time_limit_seconds):
        self.started = time.monotonic()
        self.time_limit = time_limit_seconds  # math.inf without one
        self.reason = ""
        self.first_signal = None  # when it came
        self.save_seconds = 0.0  # what the last save took, hence what the next will need

    def watch_signals(self):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
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


class Runtime:
    """The machine as one object: device, comm, attention backend, log, clock and the wish to stop.

    Reads the rank variables of torchrun and SLURM's end time from `environ`. Raises ConfigError for a RUN_DIR
    that cannot be written or that another process holds.
    """

    def __init__(self, config, environ):
        self.comm = Comm(int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1)))
        self.is_main = self.comm.rank == 0
        self.device = pick_device(config.device, int(environ.get("LOCAL_RANK", 0)))
        self.dtype, on_gpu = getattr(torch, config.dtype), self.device.type == "cuda"
        self.compiling = config.compile == "1" or (config.compile == "auto" and on_gpu)
        self.dir, self.log_file, self.events, self.lock = Path(config.run_dir), None, None, None
        limit = config.time_limit_seconds or math.inf
        if "SLURM_JOB_END_TIME" in environ:
            limit = min(limit, float(environ["SLURM_JOB_END_TIME"]) - time.time())
        self.stop = StopRequest(limit)
        self.on_line = False  # whether the terminal's last line is progress, to be overwritten
        if self.comm.world > 1:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=datetime.timedelta(minutes=10)
            )
        if on_gpu:
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = self.dtype == torch.bfloat16
        else:
            keep_large_blocks()
        self.open_dir(config.resume)

    def open_dir(self, resume):
        """Rank 0 locks RUN_DIR; with RESUME=never an earlier run moves into RUN_DIR/old_N."""
        if not self.is_main:
            return
        checkpoints, number = self.dir / "checkpoint", 1
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.dir / "lock", "a")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if resume == "never" and (self.dir / "config.json").exists():
                while (aside := self.dir / f"old_{number}").exists():
                    number += 1
                aside.mkdir()
                for item in self.dir.iterdir():
                    if item.name != "lock" and not item.name.startswith("old_"):
                        item.rename(aside / item.name)
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

    def stop_if_wanted(self, phase, seconds_needed):
        """Before a phase that cannot be interrupted: all ranks stop together if it would not end in time."""
        if self.comm.any_rank(self.stop.wanted(seconds_needed)):
            raise Stopped(f"before {phase}")

    def log(self, line):
        """One line on rank 0's terminal and in train.log."""
        if not self.is_main:
            return
        print("\r\x1b[K" * self.on_line + line, flush=True)
        self.on_line = False
        self.append(self.log_file, line)

    def append(self, file, line):
        """One line in one write, also from the saving thread; a full disk costs the line, not the run."""
        try:
            if file:
                file.write(f"{line}\n".encode())
        except OSError as error:
            print(
                f"warning: {file.name} cannot be written ({error.strerror})",
                file=sys.stderr,
                flush=True,
            )

    def progress(self, text):
        """Rewrite the terminal's current line; nothing where the output is a file."""
        if self.is_main and sys.stdout.isatty():
            print(f"\r\x1b[K{text}", end="", flush=True)
            self.on_line = True

    def event(self, event, **fields):
        self.append(
            self.events, json.dumps({"event": event, "time": round(time.time(), 3), **fields})
        )

    def user_key(self):
        """A secret of this user on this system, made at its first use; empty where it cannot be kept.

        It tells states that this user's runs saved from states that came with somebody's files.
        """
        path = Path("~/.local/state/parameter_golf/key").expanduser()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError), open(path, "x") as file:
                path.chmod(0o600)
                file.write(os.urandom(32).hex())
            return path.read_text()
        except OSError:
            return ""

    def autocast(self):
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def compiled(self, function):
        return (
            torch.compile(function, dynamic=False, fullgraph=True) if self.compiling else function
        )

    def to_device(self, array):
        array = np.ascontiguousarray(array, dtype=np.int64)
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def peak_mib(self):
        """(allocated, reserved) MiB: of the GPU, or the process's peak resident memory on a Linux CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20
        status = Path("/proc/self/status")
        peak = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
        return (int(peak[1]) >> 10 if peak else 0,) * 2

    def close(self):
        for file in filter(None, (self.log_file, self.events, self.lock)):
            file.close()
        if self.comm.world > 1:
            dist.destroy_process_group()


def pick_device(wish, local_rank):
    available = torch.cuda.is_available()
    if wish.startswith("cuda") and not available:
        raise ConfigError(f"DEVICE={wish}: no CUDA device here: unset DEVICE or use DEVICE=cpu")
    if wish == "cpu" or not available:
        return torch.device("cpu")
    return torch.device(wish if ":" in wish else f"cuda:{local_rank}")


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()}-core {platform.machine()} CPU"


def keep_large_blocks():
    """Let glibc keep freed blocks: training frees and takes the same hundreds of megabytes each step, and
    fresh pages from the kernel cost more than the arithmetic on them (no mmap, trim at 2 GB, one arena)."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):
            libc.mallopt(parameter, value)


# ==================================================================================================
# Data
# The challenge's own shard format, read through memory maps. The tokens of a step are one contiguous span
# whatever the number of ranks, so a position is one integer; bytes are counted once for the whole validation
# stream.
# ==================================================================================================
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 256
CANONICAL_TARGETS, CANONICAL_BYTES = 62_021_632, (151_020_000, 151_080_000)


def read_shard(path):
    """Memory-mapped uint16 tokens (n,) of one shard: 256 little-endian int32 of header, then the tokens.

    Raises DataError for an unreadable file, a wrong magic or version, or a size that differs from the
    header's.
    """
    try:
        header, size = np.fromfile(path, "<i4", SHARD_HEADER), os.path.getsize(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: restore the shard") from None
    if len(header) < SHARD_HEADER or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise DataError(
            f"{path}: not a token shard: header starts with {header[:2].tolist()}, expected "
            f"[{SHARD_MAGIC}, {SHARD_VERSION}]: download it again, or set DATA_PATH"
        )
    expected = 4 * SHARD_HEADER + 2 * int(header[2])
    if header[2] <= 0 or size != expected:
        raise DataError(
            f"{path}: {size} bytes, expected {expected} for the {header[2]} tokens of its header "
            "(at least one): truncated or over-long: restore the shard or download it again"
        )
    return np.memmap(path, "<u2", "r", 4 * SHARD_HEADER, (int(header[2]),))


def write_shard(path, tokens):
    header = np.zeros(SHARD_HEADER, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    write_atomic(path, [header.tobytes(), tokens.astype("<u2").tobytes()])


def find_shards(config, split):
    pattern = f"fineweb_{split}_*.bin"
    paths = sorted(Path(config.data_path).glob(pattern))
    if not paths:
        there = "no such file in it" if Path(config.data_path).is_dir() else "no such directory"
        raise DataError(
            f"no shard matches {config.data_path}/{pattern} ({there}): get the official shards "
            "(README, section Data) and set DATA_PATH and TOKENIZER_PATH, or try the whole path "
            "on data built here: PRESET=demo python train_gpt.py"
        )
    return paths


def check_ids(ids, vocab_size, where):
    if len(ids) and ids.max() >= vocab_size:
        raise DataError(
            f"{where}: token id {ids.max()} is outside VOCAB_SIZE={vocab_size}: set DATA_PATH "
            "and TOKENIZER_PATH that belong together"
        )
    return ids


class TrainStream:
    """The training shards as one ring of tokens; `position` is the index of the next step's first token."""

    def __init__(self, paths, vocab_size, position=0):
        self.paths, self.vocab_size, self.position = paths, vocab_size, position
        self.sizes = [len(read_shard(path)) for path in paths]
        self.ends = np.cumsum(self.sizes)

    def take(self, span, low, high):
        """Tokens [low, high] of the next span (high - low + 1 of them, uint16), then advance by `span`.

        The next span starts at this one's last token. Raises DataError when a shard vanished, shrank or
        holds a bad id.
        """
        at, wanted, parts = (self.position + low) % int(self.ends[-1]), high - low + 1, []
        while wanted:
            index = int(np.searchsorted(self.ends, at, side="right"))
            path, size, end = self.paths[index], self.sizes[index], int(self.ends[index])
            tokens = read_shard(
                path
            )  # anew: reading an older map of a file that shrank would be SIGBUS
            if len(tokens) != size:
                raise DataError(
                    f"{path}: {len(tokens)} tokens instead of {size} in mid-run: restore the shard"
                )
            start = at - (end - size)
            parts.append(check_ids(tokens[start : start + wanted], self.vocab_size, path))
            wanted -= len(parts[-1])
            at = (at + len(parts[-1])) % int(self.ends[-1])
        self.position += span
        return np.concatenate(parts)


class TokenBytes:
    """UTF-8 bytes that each target token stands for, by the challenge's rule (REFERENCE: official lookup
    tables).

    Control, unknown and unused pieces 0; byte pieces 1; others their text, with one byte for a leading
    space unless the previous token is a control, unknown or unused piece.
    """

    def __init__(self, tokenizer_path):
        try:
            model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
        except (OSError, RuntimeError, TypeError) as error:
            raise DataError(
                f"TOKENIZER_PATH={tokenizer_path}: cannot be read as a SentencePiece model "
                f"({str(error).splitlines()[0]}): see README, section Data"
            ) from None
        self.model, self.vocab_size = model, model.vocab_size()
        ids = range(self.vocab_size)
        self.is_boundary = np.array(
            [model.is_control(i) or model.is_unknown(i) or model.is_unused(i) for i in ids]
        )
        self.is_byte = np.array([model.is_byte(i) for i in ids])
        pieces = [
            "" if self.is_boundary[i] else "x" if self.is_byte[i] else model.id_to_piece(i)
            for i in ids
        ]
        self.spaced = np.array([piece.startswith("▁") for piece in pieces])
        text = [piece.removeprefix("▁").replace("▁", " ") for piece in pieces]
        self.base = np.array([len(t.encode()) for t in text], np.uint16)

    def count(self, prev_ids, target_ids):
        """Bytes (same shape, uint16) of targets given the tokens before them."""
        prev_ids, target_ids = np.asarray(prev_ids), np.asarray(target_ids)
        return self.base[target_ids] + (self.spaced[target_ids] & ~self.is_boundary[prev_ids])

    def check(self, ids):
        """Compare with the decoded text of `ids`, run by run between silent pieces. Raises DataError."""
        ids = np.asarray(ids, np.int64)
        start = int(np.argmin(self.is_byte[ids]))  # not inside a character
        edges = sorted({start, *np.flatnonzero(self.is_boundary[ids]).tolist(), len(ids)})
        plain = np.flatnonzero(~self.is_boundary & ~self.spaced & ~self.is_byte & (self.base > 0))
        # SentencePiece drops spaces at the start of a text: each run is decoded behind a piece without any.
        anchor = plain[:1].tolist() or [self.model.piece_to_id("<0x41>")]
        for left, right in zip(edges, edges[1:]):
            run = ids[left + 1 : right].tolist()
            while (
                right == len(ids) and run and self.is_byte[run[-1]]
            ):  # the slice may end inside a character
                run.pop()
            if not run:
                continue
            counted = int(self.count(ids[left : left + len(run)], run).sum())
            decoded = self.model.decode(anchor + run)[len(self.model.decode(anchor)) :].replace(
                "▁", " "
            )
            length = len(decoded.encode()) - (self.spaced[run[0]] and self.is_boundary[ids[left]])
            if length != counted:
                raise DataError(
                    f"bytes per token are wrong for {decoded[:60]!r}: counted {counted}, decoded "
                    f"{length}: use the tokenizer that made these shards, with a piece for a "
                    "space"
                )


class ValidationSet:
    """Validation tokens (n + 1,), bytes (n,) of the n targets, and the fingerprint of the split."""

    def __init__(self, tokens, token_bytes):
        self.tokens, self.num_targets, self.token_bytes = tokens, len(tokens) - 1, token_bytes
        parts = [slice(i, i + (1 << 20)) for i in range(0, self.num_targets, 1 << 20)]
        self.bytes = np.concatenate(
            [token_bytes.count(tokens[:-1][part], tokens[1:][part]) for part in parts]
        )
        total = int(self.bytes.sum(dtype=np.int64))
        canonical = (
            token_bytes.vocab_size == 1024
            and self.num_targets == CANONICAL_TARGETS
            and CANONICAL_BYTES[0] <= total <= CANONICAL_BYTES[1]
        )
        self.scope = "canonical" if canonical else "proxy"
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
        """The shards' tokens, trimmed to whole windows as the official script does. Raises DataError."""
        tokens = np.concatenate([read_shard(path) for path in find_shards(config, "val")])
        check_ids(tokens, config.vocab_size, f"{config.data_path}/fineweb_val_*.bin")
        targets = (len(tokens) - 1) // config.eval_seq_len * config.eval_seq_len
        if targets == 0:
            raise DataError(
                f"{config.data_path}: {len(tokens)} validation tokens are less than one window "
                f"of EVAL_SEQ_LEN={config.eval_seq_len}: lower it or get the whole split"
            )
        token_bytes.check(tokens[:100_000])
        return cls(tokens[: targets + 1], token_bytes)

    def replaced(self, tokens):
        """The same stream with other tokens (the audit's twin runs)."""
        return ValidationSet(tokens, self.token_bytes)


def load_token_bytes(config, expected_sha256=""):
    """TokenBytes of config's tokenizer after its checks. Raises DataError."""
    token_bytes, where = (
        TokenBytes(config.tokenizer_path),
        f"TOKENIZER_PATH={config.tokenizer_path}",
    )
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


def english_of(path):
    """Paragraphs (a list) of the docstrings and other long texts in one Python file, in source order."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source) if '"""' in source or "'''" in source else ast.Module([], [])
    except (OSError, ValueError, SyntaxError, RecursionError):
        return []
    texts = [
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]
    english = [text for text in texts if len(text) > 160 and text.count(" ") > len(text) / 12]
    return [
        paragraph for text in english for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text))
    ]


def demo_texts():
    """(train, val) lists of one text per module: the English of the installed Python libraries."""
    site, stdlib = Path(torch.__file__).parent.parent, Path(sysconfig.get_paths()["stdlib"])
    paths, seen, texts = [], set(), ([], [])
    for root in (
        stdlib,
        *(site / name for name in ("torch", "numpy", "sentencepiece", "zstandard")),
    ):
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(set(folders) - {"site-packages", "__pycache__", "test", "idlelib"})
            paths += [(root, Path(folder, name)) for name in sorted(files) if name.endswith(".py")]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        found = list(pool.map(english_of, [path for _, path in paths], chunksize=16))
    for (root, path), paragraphs in zip(paths, found):
        fresh = []
        for paragraph in paragraphs:
            key = " ".join(paragraph.split())
            if len(key) > 60 and key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        module = f"{root.name}/{path.relative_to(root)}"
        is_val = hashlib.sha256(module.encode()).digest()[0] < 9  # about 3.5 % of the modules
        texts[is_val].extend(["\n\n".join(fresh)] if fresh else [])
    return texts


def build_demo_data(config, log):
    """Build the demo's tokenizer and shards unless they exist; one process at a time, always the same."""
    data, tokenizer = Path(config.data_path), Path(config.tokenizer_path)
    try:
        for folder in (data, tokenizer.parent):
            folder.mkdir(parents=True, exist_ok=True)
        lock = open(data / "lock", "w")
    except OSError as error:
        raise DataError(
            f"the demo's data cannot be built in {data} and {tokenizer.parent}: "
            f"{error.strerror}: run in a writable directory"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        splits = ["val"] if config.eval_only else ["train", "val"]
        if tokenizer.exists() and all(any(data.glob(f"fineweb_{split}_*.bin")) for split in splits):
            return
        begin = time.monotonic()
        log(
            "demo_data: reading the English of the installed Python libraries (once, under a minute)"
        )
        texts = dict(zip(("train", "val"), demo_texts()))
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(
                line for text in texts["train"] for line in text.split("\n") if line.strip()
            ),
            model_writer=model,
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
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        write_atomic(tokenizer, [model.getvalue()])
        for split, documents in texts.items():
            ids = processor.encode(documents, num_threads=2)
            tokens = np.concatenate([np.array([BOS, *document]) for document in ids])
            write_shard(data / f"fineweb_{split}_000000.bin", tokens)
            log(
                f"demo_data: {split} {sum(len(t.encode()) for t in documents)} bytes, {len(documents)} "
                f"documents, {time.monotonic() - begin:.1f} s"
            )


# ==================================================================================================
# Quantisation grid
# How a matrix becomes small integers. It stands before the model because rounding in training (late QAT)
# and packing must agree on the grid to the last bit.
# ==================================================================================================
CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
CONTROL = ("scale", "scales", "resid_mix", "q_gain", "skip_weights", "gate", "vr_lambda")
HALF_LIMIT = 65_536  # tensors up to this many elements stay float16


class Scheme(typing.NamedTuple):
    """How the artifact stores a tensor's values."""

    name: str
    dtype: type  # of the stored values
    bits: int  # of symmetric integers, which have a scale per row; 0 for floats

    @property
    def top(self):
        """Largest stored integer."""
        return 2 ** (self.bits - 1) - 1 if self.bits else math.inf


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int5", np.int8, 5),
        Scheme("int6", np.int8, 6),
        Scheme("int8", np.int8, 8),
        Scheme("fp16", np.float16, 0),
        Scheme("fp32", np.float32, 0),
    )
}


def scheme_of(name, shape, config, int5_layers=()):
    """How the artifact stores a tensor: fp32 for control scalars, fp16 if small, else intN per row."""
    if len(shape) < 2 or name.split(".")[-1] in CONTROL:
        return "fp32"
    if len(shape) > 2 or math.prod(shape) <= HALF_LIMIT:
        return "fp16"
    layer = re.match(r"blocks\.(\d+)\.mlp\.", name)
    if layer and int(layer.group(1)) in int5_layers:
        return "int5"
    return f"int{config.block_bits if name.startswith('blocks.') else config.embed_bits}"


@torch.no_grad()
def quantize_rows(weight, bits):
    """GPTQ-lite: int8 codes (R, C) and float16 scales (R, 1) of weight (..., C), per row with the clip
    quantile of |w| that leaves the least squared error."""
    w = weight.detach().float().flatten(0, -2)
    columns, top = w.size(1), 2 ** (bits - 1) - 1
    largest = (
        w.abs().topk(min(columns, int((columns - 1) * (1 - CLIP_QUANTILES[0])) + 2), dim=1).values
    )
    best = None
    for quantile in CLIP_QUANTILES:
        # linear interpolation between order statistics, from the largest
        place = (columns - 1) * (1 - quantile)
        low = min(int(place), largest.size(1) - 1)
        high = min(low + 1, largest.size(1) - 1)
        clip = torch.lerp(largest[:, low], largest[:, high], place - int(place))[:, None]
        # The floor is float16's smallest number: an epsilon, so that rows of zeros stay zeros.
        scale = (clip / top).clamp(min=2.0**-24, max=65504.0).half()
        codes = round_to_grid(w, scale.float(), bits)
        error = (codes * scale.float() - w).square().sum(1, keepdim=True)
        if best is not None:
            better = error < best[0]
            error, codes, scale = (
                torch.where(better, new, old) for new, old in zip((error, codes, scale), best)
            )
        best = error, codes, scale
    return best[1].to(torch.int8), best[2]


def round_to_grid(weight, scale, bits):
    """Nearest point of the symmetric grid scale * [-(2^(bits-1) - 1), ...]; the grid the artifact stores."""
    top = 2 ** (bits - 1) - 1
    return (weight / scale).round().clamp(-top, top)


class Quantizable:
    """A weight that can be rounded in training, straight through, as the artifact will round it.

    `qat_blend` (0-d) and `qat_scale` (rows, 1) are buffers, so switching rounding on recompiles nothing.
    """

    bits = 0

    def enable_qat(self, bits):
        self.bits = bits
        device = self.weight.device
        self.register_buffer("qat_blend", torch.zeros((), device=device), persistent=False)
        self.register_buffer(
            "qat_scale", torch.ones(self.weight.size(0), 1, device=device), persistent=False
        )

    def effective_weight(self):
        if not self.bits or not self.training:
            return self.weight
        value = self.weight.detach()
        rounded = round_to_grid(value, self.qat_scale, self.bits) * self.qat_scale
        # w - w is exactly 0 and carries the straight-through gradient.
        return torch.lerp(value, rounded, self.qat_blend) + (self.weight - value)


# ==================================================================================================
# Model
# The trunk of #1170/#1232, then the refiners in a fixed order: TTT-Linear, FlowRefiner, NativeFlowMatcher.
# `forward` is the loss of `logits(hidden(ids))`; there is no second copy of the trunk. Whatever changes
# during a run is a 0-d tensor.
# ==================================================================================================
def sdpa_attention(q, k, v):
    """Causal attention by PyTorch. q (B, T, H, d), k and v (B, T, K, d) -> (B, T, H, d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1)
    ).transpose(1, 2)


class AttentionChoice(typing.NamedTuple):
    function: typing.Callable  # attend(q, k, v)
    reason: str


@functools.cache
def pick_attention(device, dtype):
    """AttentionChoice: the first backend that runs forward and backward here, tried once.

    Published runs failed after hours in the queue because a fixed backend did not exist on their GPU.
    """
    if device.type == "cpu":
        return AttentionChoice(
            cpu_attention, "cpu_blocked: PyTorch's CPU forward, blocked backward"
        )
    failures, sdpa = [], ("flash", "cudnn", "mem_efficient", "math")
    for chosen in ("flash_attention_3", *sdpa):
        try:
            if chosen in sdpa:
                for name in sdpa:
                    getattr(torch.backends.cuda, f"enable_{name}_sdp")(name == chosen)
            attend = sdpa_attention if chosen in sdpa else flash_attention_3(device)
            q, k = (
                torch.zeros(1, 64, heads, 64, device=device, dtype=dtype, requires_grad=True)
                for heads in (2, 1)
            )
            attend(q, k, k).float().sum().backward()
            kind = "sdpa " * (chosen in sdpa)
            reason = f"{kind}{chosen}: first that ran; not usable: {', '.join(failures) or 'none'}"
            return AttentionChoice(attend, reason)
        except Exception as error:
            failures.append(f"{chosen} ({type(error).__name__})")
    raise ConfigError(
        f"no attention backend runs forward and backward on {device}: tried {', '.join(failures)}"
    )


def flash_attention_3(device):
    """FlashAttention-3 where it is installed, on Hopper; raises elsewhere."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        raise NotImplementedError("needs Hopper")
    from flash_attn_interface import flash_attn_func

    def attend(q, k, v):
        out = flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return attend


class BlockedAttention(torch.autograd.Function):
    """Causal grouped-query attention for CPUs: PyTorch's fused forward, and a backward in blocks of queries
    and sequences that fit the cache and recompute the probabilities. Memory is linear in T. q (B, H, T, d), k
    and v (B, K, T, d)."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        groups = q.size(1) // k.size(1)
        wide = [x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v)]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, *wide, 0.0, True)[0]

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        scale, length, kv_heads = q.size(-1) ** -0.5, q.size(2), k.size(1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        # (B, K, H/K, T, d): the query heads of a group share their keys, so they are rows of one product.
        q, grad, dq_out = (x.unflatten(1, (kv_heads, -1)) for x in (q * scale, grad, dq))
        for high in range(length, 0, -ATTENTION_ROWS):
            low = max(0, high - ATTENTION_ROWS)
            mask = torch.ones(high - low, high - low, dtype=torch.bool, device=q.device).triu(1)
            for first in range(0, len(q), ATTENTION_SEQUENCES):
                at = slice(first, first + ATTENTION_SEQUENCES)
                qi, gi = (
                    x[at, :, :, low:high].flatten(2, 3) for x in (q, grad)
                )  # (b, K, H/K * rows, d)
                ki, vi = k[at, :, :high], v[at, :, :high]
                scores = qi @ ki.mT
                scores.unflatten(2, (-1, high - low))[..., low:].masked_fill_(mask, -torch.inf)
                p = scores.softmax(-1)
                ds = torch._softmax_backward_data(gi @ vi.mT, p, -1, p.dtype)
                dq_out[at, :, :, low:high] = (ds @ ki).unflatten(2, (-1, high - low)).mul_(scale)
                dk[at, :, :high] += ds.mT @ qi
                dv[at, :, :high] += p.mT @ gi
        return dq, dk, dv


ATTENTION_ROWS, ATTENTION_SEQUENCES = 256, 4


def cpu_attention(q, k, v):
    """Causal attention on the CPU. q (B, T, H, d), k and v (B, T, K, d) -> (B, T, H, d)."""
    return BlockedAttention.apply(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


class RMSNorm(torch.autograd.Function):
    """RMSNorm over the last dimension times an optional gain (that broadcasts) times an optional rotation:
    what q and k go through. Written out since the composed operations cost more than the matrix products on a
    CPU.

    x (..., d), gain (H, 1) or None, cos and sin (T, 1, r/2) or None for a plain RMSNorm.
    """

    @staticmethod
    def forward(ctx, x, gain=None, cos=None, sin=None):
        norm = torch.linalg.vector_norm(
            x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
        )
        inverse = torch.rsqrt(norm.square() / x.size(-1) + NORM_EPS).to(x.dtype)
        scale = inverse if gain is None else inverse * gain.to(x.dtype)
        ctx.save_for_backward(x, inverse, scale, gain, cos, sin)
        y = x * scale
        return y if cos is None else rotate_(y, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        x, inverse, scale, gain, cos, sin = ctx.saved_tensors
        if cos is not None:
            grad = rotate_(grad.clone(), cos, -sin)
        dot = (grad * x).sum(-1, keepdim=True)
        dx = torch.addcmul(grad * scale, x, dot * scale * inverse * inverse, value=-1 / x.size(-1))
        dgain = None if gain is None else (dot * inverse).sum((0, 1)).to(gain.dtype)
        return dx, dgain, None, None


NORM_EPS = 2.0**-23  # float32's epsilon, whatever the type in use


def rms_norm(x):
    return RMSNorm.apply(x)


def rotary(length, config, device):
    """cos, sin (T, 1, rope_dims/2), the same whatever length is in use."""
    inverse = config.rope_base ** (
        -torch.arange(0, config.rope_dims, 2, device=device) / config.rope_dims
    )
    angle = torch.arange(length, device=device)[:, None, None] * inverse
    return angle.cos(), angle.sin()


def rotate_(x, cos, sin):
    """Partial RoPE, in place, on the first dimensions of each head. x (B, T, H, d)."""
    half = cos.size(-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x[..., :half], x[..., half : 2 * half]
    a_new = a * cos - b * sin
    x[..., half : 2 * half] = a * sin + b * cos
    x[..., :half] = a_new
    return x


class ExclusiveAttention(torch.autograd.Function):
    """XSA: each head's output y (B, T, H, d) less its part along the own value v (B, T, K, d)."""

    @staticmethod
    def forward(ctx, y, v):
        norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp(min=1e-12)
        unit, groups = v / norm, y.unflatten(2, (v.size(2), -1))  # (B, T, K, d), (B, T, K, H/K, d)
        along = (groups * unit[:, :, :, None]).sum(-1, keepdim=True)
        ctx.save_for_backward(groups, unit, norm, along)
        return torch.addcmul(groups, along, unit[:, :, :, None], value=-1).flatten(2, 3)

    @staticmethod
    def backward(ctx, grad):
        groups, unit, norm, along = ctx.saved_tensors
        grad, wide = grad.unflatten(2, (unit.size(2), -1)), unit[:, :, :, None]
        dot = (grad * wide).sum(-1, keepdim=True)
        dunit = torch.addcmul(grad * along, groups, dot).sum(3)  # with a minus sign
        dv = torch.addcmul(dunit, (dunit * unit).sum(-1, keepdim=True), unit, value=-1) / -norm
        return torch.addcmul(grad, dot, wide, value=-1).flatten(2, 3), dv


class LeakySquare(torch.autograd.Function):
    """leaky_relu(x, 0.5)^2, which needs only x for its gradient 2 leaky_relu(x, 0.25)."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.leaky_relu(x, 0.5).square_()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return F.leaky_relu(x, 0.25).mul_(grad).mul_(2)


class ResidualMix(torch.autograd.Function):
    """mix[0] * x + mix[1] * x0 per channel. x and x0 (B, T, D), mix (2, D)."""

    @staticmethod
    def forward(ctx, x, x0, mix):
        m = mix.to(x.dtype)
        ctx.save_for_backward(x, x0, m, mix)
        return torch.addcmul(x * m[0], x0, m[1])

    @staticmethod
    def backward(ctx, grad):
        x, x0, m, mix = ctx.saved_tensors
        ones = grad.new_ones(
            1, grad.shape[:-1].numel()
        )  # a product sums over tokens faster than a reduction
        dmix = torch.cat([ones @ (grad * x).flatten(0, -2), ones @ (grad * x0).flatten(0, -2)]).to(
            mix.dtype
        )
        return grad * m[0], grad * m[1], dmix


class Linear(Quantizable, nn.Linear):
    def __init__(self, inputs, outputs, bias=False):
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x, scale=None):
        """`scale` (outputs, 1) or a number multiplies the weight: cheaper than scaling each output."""
        weight = self.effective_weight()
        return F.linear(x, weight if scale is None else weight * scale, self.bias)


class Embedding(Quantizable, nn.Embedding):
    def __init__(self, rows, width):
        super().__init__(
            rows, width, _weight=torch.zeros(rows, width)
        )  # GPT.init_weights draws them

    def forward(self, ids):
        return F.embedding(ids, self.effective_weight())


class Attention(nn.Module):
    """Grouped-query attention with q/k norm, partial RoPE, query gain, value residual, XSA, per-head gate."""

    def __init__(self, config, layer, attend):
        super().__init__()
        self.config, self.attend = config, attend
        self.xsa = layer >= config.num_layers - config.xsa_last_n
        dim, kv_dim = config.model_dim, config.num_kv_heads * config.head_dim
        self.c_q, self.c_k, self.c_v = Linear(dim, dim), Linear(dim, kv_dim), Linear(dim, kv_dim)
        self.proj = Linear(dim, dim)
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        self.attn_gate = (
            Linear(dim, config.num_heads, bias=True) if config.gated_attention else None
        )
        self.vr_lambda = nn.Parameter(torch.full((2,), 0.5)) if config.value_residual else None

    def forward(self, x, scale, out_scale, angles, v0, ve):
        """x (B, T, D) normalised, before the layer's scale; v0 layer 0's values or None; ve (B, T, K*d) value
        embedding or None; out_scale (D,) multiplies the output. Returns y, v."""
        c, (batch, length, _) = self.config, x.shape
        q = self.c_q(x, scale).view(batch, length, c.num_heads, c.head_dim)
        k = self.c_k(x, scale).view(batch, length, c.num_kv_heads, c.head_dim)
        v = self.c_v(x, scale)
        v = (v if ve is None else v + ve.to(v.dtype)).view(
            batch, length, c.num_kv_heads, c.head_dim
        )
        own = v
        if self.vr_lambda is not None:
            mix = self.vr_lambda.to(v.dtype)
            v = mix[0] * (own if v0 is None else v0) + mix[1] * own
        y = self.attend(
            RMSNorm.apply(q, self.q_gain[:, None], *angles), RMSNorm.apply(k, None, *angles), v
        )
        if self.xsa:
            y = ExclusiveAttention.apply(y, v)  # (B, T, H, d)
        if self.attn_gate is not None:
            y = y * torch.sigmoid(self.attn_gate(x, scale))[..., None]
        return self.proj(y.reshape(batch, length, c.model_dim), out_scale[:, None]), own


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc = Linear(config.model_dim, config.mlp_hidden)
        self.proj = Linear(config.mlp_hidden, config.model_dim)

    def forward(self, x, scale, out_scale):
        return self.proj(LeakySquare.apply(self.fc(x, scale)), out_scale[:, None])


class Block(nn.Module):
    def __init__(self, config, layer, attend):
        super().__init__()
        dim = config.model_dim
        self.attn, self.mlp = Attention(config, layer, attend), MLP(config)
        self.attn_scale, self.mlp_scale = (
            nn.Parameter(torch.ones(dim)),
            nn.Parameter(torch.ones(dim)),
        )
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(dim), torch.zeros(dim)]))
        self.norm_scale = (layer + 1) ** -0.5

    def forward(self, x, x0, angles, v0, ve):
        x = ResidualMix.apply(x, x0, self.resid_mix)
        y, v = self.attn(rms_norm(x), self.norm_scale, self.attn_scale, angles, v0, ve)
        x = x + y
        return x + self.mlp(rms_norm(x), self.norm_scale, self.mlp_scale), v


class BigramHash(nn.Module):
    """Embedding of the hashed pair (previous token, token)."""

    def __init__(self, config):
        super().__init__()
        self.embed = Embedding(config.bigram_vocab_size, config.bigram_dim)
        self.proj = Linear(config.bigram_dim, config.model_dim)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def rows(self, ids):
        """Table rows (B, T): ((36313 t_i) xor (27191 t_{i-1})) mod (rows - 1), int32; the last row first."""
        t, last = ids.int(), self.embed.num_embeddings - 1
        pair = torch.bitwise_xor(36313 * t[:, 1:], 27191 * t[:, :-1]) % last
        return F.pad(pair, (1, 0), value=last)

    def forward(self, ids):
        return self.proj(self.embed(self.rows(ids))) * self.scale


class SmearGate(nn.Module):
    """Mix each position with its predecessor; nothing comes before position 0 or before a document's BOS."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(config.model_dim))

    def forward(self, x, ids):
        before = F.pad(x[:, :-1], (0, 0, 1, 0)) * (ids != BOS)[..., None].to(x.dtype)
        return x + torch.sigmoid(self.gate).to(x.dtype) * (before - x)


class ValueEmbedding(nn.Module):
    """VE128: a narrow token embedding added to the values of the last layers."""

    def __init__(self, config):
        super().__init__()
        self.embed = Embedding(config.vocab_size, config.ve_dim)
        self.proj = Linear(config.ve_dim, config.num_kv_heads * config.head_dim)
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.layer_scales = nn.Parameter(torch.ones(min(config.ve_last_n, config.num_layers)))

    def forward(self, ids):
        """(layers, B, T, K*d)."""
        return self.proj(self.embed(ids)) * self.scale * self.layer_scales[:, None, None, None]


class FlowRefiner(nn.Module):
    """#1232/#1166: a small residual step in a latent space, behind a gate that starts almost closed."""

    def __init__(self, config):
        super().__init__()
        latent, hidden = config.flow_latent_dim, config.flow_hidden_dim
        self.down, self.up = Linear(config.model_dim, latent), Linear(latent, config.model_dim)
        self.fc, self.proj = Linear(latent, hidden, bias=True), Linear(hidden, latent, bias=True)
        self.gate = nn.Parameter(torch.tensor(-5.0))

    def forward(self, x):
        z = self.down(x)
        z = z + self.proj(F.gelu(self.fc(z)))
        return x + torch.sigmoid(self.gate).to(x.dtype) * self.up(z)


class NativeFlowMatcher(nn.Module):
    """#1170: a velocity field trained by flow matching, used as one gated Euler step at t = 1."""

    def __init__(self, config):
        super().__init__()
        dim, hidden = config.model_dim, config.nfm_hidden_dim
        self.inp, self.time = Linear(dim, hidden, bias=True), Linear(dim, hidden, bias=True)
        self.out = Linear(hidden, dim)
        self.gate = nn.Parameter(torch.tensor(-5.0))

    def tau(self, t):
        """Time embedding (..., hidden) of t (...) in [0, 1]."""
        half = self.inp.in_features // 2
        place = torch.arange(half, device=t.device, dtype=t.dtype)
        angle = t[..., None] * torch.exp(-math.log(10000.0) / half * place)
        return F.gelu(self.time(torch.cat([angle.cos(), angle.sin()], -1)))

    def velocity(self, x, t):
        return self.out(F.gelu(self.inp(x) + self.tau(t)))

    def forward(self, x):
        one = torch.ones(
            (), device=x.device, dtype=self.gate.dtype
        )  # tau(1) is one row for all tokens
        return x + torch.sigmoid(self.gate).to(x.dtype) * self.velocity(x, one)

    def flow_loss(self, x, noise):
        """Mean squared error of the velocity at random times; x (B, T, D) detached, noise (B, T, D + 1)."""
        z, t = (
            noise[..., :-1],
            torch.special.ndtr(noise[..., -1]),
        )  # the normal's own CDF makes t uniform
        x_t = (1 - t[..., None]) * z + t[..., None] * x
        return (self.velocity(x_t.to(x.dtype), t) - (x - z)).float().square().mean()


class TTTLinear(nn.Module):
    """TTT-Linear (Sun et al. 2024, arXiv 2407.04620), trained end to end, in its dual form.

    The hidden state is itself a linear model f(k) = k + LN(kW + b) that takes a gradient step on
    1/2 |LN(kW + b) - (v - k)|^2 for every token. Inside a mini-batch all gradients are taken at its start, so
    that what token i has learnt of tokens <= i is one masked product; only the loop over mini-batches is
    sequential.
    """

    def __init__(self, config):
        super().__init__()
        dim, heads, width = config.model_dim, config.num_heads, config.head_dim
        self.c_q, self.c_k, self.c_v, self.proj = (Linear(dim, dim) for _ in range(4))
        self.w = nn.Parameter(0.02 * torch.randn(heads, width, width))
        self.b = nn.Parameter(torch.zeros(heads, 1, width))
        self.ln_gain = nn.Parameter(torch.ones(heads, 1, width))
        self.ln_bias = nn.Parameter(torch.zeros(heads, 1, width))
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Parameter(torch.tensor(-5.0))
        self.heads, self.mini_batch = heads, config.e2e_ttt_mini_batch
        self.rate = config.e2e_ttt_base_lr / width

    def forward(self, x):
        batch, length, dim = x.shape
        q, k, v = (
            c(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for c in (self.c_q, self.c_k, self.c_v)
        )
        with torch.autocast(x.device.type, enabled=False):
            # the inner steps are kept out of bfloat16
            z = self.inner(*(t.to(self.w.dtype) for t in (q, k, v)))
        y = self.norm(z.transpose(1, 2).reshape(batch, length, dim)).to(x.dtype)
        return x + torch.sigmoid(self.gate).to(x.dtype) * self.proj(y)

    def inner(self, q, k, v):
        """Outputs (B, H, T, d) of the inner model while it learns along T."""
        w, b, outputs = self.w, self.b, []
        target = v - k - self.ln_bias
        for low in range(0, q.size(2), self.mini_batch):
            part = slice(low, low + self.mini_batch)
            qi, ki = q[:, :, part], k[:, :, part]
            unit, inverse = self.layer_norm_parts(ki @ w + b)
            g = (unit * self.ln_gain - target[:, :, part]) * self.ln_gain
            g = inverse * (g - g.mean(-1, keepdim=True) - unit * (g * unit).mean(-1, keepdim=True))
            seen = (qi @ ki.mT + 1).tril()  # the 1 is the bias's share
            zq, _ = self.layer_norm_parts(qi @ w + b - self.rate * (seen @ g))
            outputs.append(qi + zq * self.ln_gain + self.ln_bias)
            w = w - self.rate * (ki.mT @ g)
            b = b - self.rate * g.sum(-2, keepdim=True)
        return torch.cat(outputs, 2)

    @staticmethod
    def layer_norm_parts(z):
        centred = z - z.mean(-1, keepdim=True)
        inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
        return centred * inverse, inverse


class GPT(nn.Module):
    """The language model of `config`; `attend(q, k, v)` is the attention backend."""

    def __init__(self, config, attend=sdpa_attention):
        super().__init__()
        self.config = config
        self.tok_emb = Embedding(config.vocab_size, config.model_dim)
        self.bigram, self.smear = BigramHash(config), SmearGate(config)
        self.blocks = nn.ModuleList(Block(config, i, attend) for i in range(config.num_layers))
        self.num_encoder_layers = config.num_layers // 2
        self.skip_weights = nn.Parameter(torch.ones(self.num_encoder_layers, config.model_dim))
        self.ve = ValueEmbedding(config) if config.ve_dim else None
        self.ttt = TTTLinear(config) if config.e2e_ttt_enabled else None
        self.flow = FlowRefiner(config) if config.flow_enabled else None
        self.nfm = NativeFlowMatcher(config) if config.nfm_enabled else None
        if not self.tok_emb.weight.is_meta:
            self.init_weights()
        if config.late_qat_threshold > 0:
            for name, module in self.quantizable():
                bits = SCHEMES[scheme_of(f"{name}.weight", module.weight.shape, config)].bits
                if bits:
                    module.enable_qat(bits)

    @torch.no_grad()
    def init_weights(self):
        nn.init.normal_(self.tok_emb.weight, std=self.config.embed_init_std)
        nn.init.zeros_(self.bigram.embed.weight)
        nn.init.orthogonal_(self.bigram.proj.weight)
        for block in self.blocks:
            for layer in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.fc):
                nn.init.orthogonal_(layer.weight)
            for layer in (block.attn.proj, block.mlp.proj):
                nn.init.zeros_(layer.weight)
            if block.attn.attn_gate is not None:
                nn.init.zeros_(block.attn.attn_gate.weight)
                nn.init.constant_(block.attn.attn_gate.bias, 4.0)
        if self.ve is not None:
            nn.init.normal_(self.ve.embed.weight, std=0.01)
            nn.init.zeros_(self.ve.proj.weight)
        if self.flow is not None:
            self.flow.up.weight.mul_(self.config.flow_init_scale)
        if self.nfm is not None:
            nn.init.zeros_(self.nfm.out.weight)

    def quantizable(self):
        return [
            (name, module)
            for name, module in self.named_modules()
            if isinstance(module, Quantizable)
        ]

    @torch.no_grad()
    def set_qat(self, blend):
        """Blend of straight-through rounding (0 or 1) and the scales of the present weights."""
        for _, module in self.quantizable():
            if module.bits:
                module.qat_blend.fill_(blend)
                if blend:
                    module.qat_scale.copy_(quantize_rows(module.weight, module.bits)[1].float())

    def embed(self, ids):
        """(B, T, D) in the autocast type, after the smear gate."""
        x = self.tok_emb(ids) + self.bigram(ids)
        if torch.is_autocast_enabled(ids.device.type):
            x = x.to(torch.get_autocast_dtype(ids.device.type))
        return self.smear(rms_norm(x), ids)

    def trunk(self, ids):
        """Normalised states (B, T, D) before the refiners."""
        x0 = self.embed(ids)
        x = x0.view_as(x0)  # a compiled Function takes no tensor twice
        angles, v0, skips = rotary(ids.size(1), self.config, ids.device), None, []
        ve = self.ve(ids) if self.ve is not None else ()
        for i, block in enumerate(self.blocks):
            if 0 <= i - self.num_encoder_layers < len(self.skip_weights):
                x = x + self.skip_weights[i - self.num_encoder_layers].to(x.dtype) * skips.pop()
            late = i - (len(self.blocks) - len(ve))
            x, v = block(x, x0, angles, v0, ve[late] if late >= 0 else None)
            v0 = v if v0 is None else v0
            if i < self.num_encoder_layers:
                skips.append(x)
        return rms_norm(x)

    def hidden(self, ids):
        """Final states (B, T, D) of ids (B, T): what the head sees."""
        return self.refine(self.trunk(ids))[0]

    def refine(self, x):
        """(state after all refiners, NativeFlowMatcher's input)."""
        x = self.ttt(x) if self.ttt is not None else x
        x = self.flow(x) if self.flow is not None else x
        return (self.nfm(x) if self.nfm is not None else x), x

    def logits(self, hidden):
        """float32 logits (..., V) of states (..., D), softly capped."""
        cap = self.config.logit_softcap
        raw = F.linear(hidden, self.tok_emb.effective_weight() / cap)
        return cap * torch.tanh(raw.float() if raw.dtype == torch.bfloat16 else raw)

    def forward(self, ids, targets, noise=None):
        """Mean cross entropy in nats of targets (B, T), 0-d; in training mode plus NativeFlowMatcher's
        weighted loss.

        noise (B, T, D + 1): that loss's standard normal draws; drawn here when absent.
        """
        hidden, flow_input = self.refine(self.trunk(ids))
        loss = F.cross_entropy(self.logits(hidden).flatten(0, 1), targets.flatten())
        if self.nfm is not None and self.training and self.config.nfm_loss_weight:
            if noise is None:
                noise = torch.randn(*ids.shape, self.config.model_dim + 1, device=ids.device)
            loss = loss + self.config.nfm_loss_weight * self.nfm.flow_loss(
                flow_input.detach(), noise
            )
        return loss


def build_model(config, runtime):
    """GPT on the runtime's device, with the attention backend that runs there."""
    attend = pick_attention(runtime.device, runtime.dtype).function
    return GPT(config, attend).to(runtime.device)


def flow_noise(config, step, first, count, device):
    """Normal draws (count, T, D + 1) of the step's sequences [first, first + count): a function
    of seed, step and sequence alone, hence the same at any number of ranks and after a resume, or None."""
    if not config.nfm_enabled or config.nfm_loss_weight == 0:
        return None
    generator = torch.Generator(device)
    out = torch.empty(count, config.train_seq_len, config.model_dim + 1, device=device)
    for i in range(count):
        key = hashlib.sha256(f"{config.seed}/{step}/{first + i}".encode()).digest()
        generator.manual_seed(int.from_bytes(key[:7], "little"))
        out[i].normal_(generator=generator)
    return out


# ==================================================================================================
# Optimisers
# Muon for the blocks' matrices, AdamW for the rest, both on gradients that are reduced first and clipped
# then. Parallel Muon shards what is expensive (Newton-Schulz and momentum) and hides its traffic behind the
# arithmetic.
# ==================================================================================================
def newton_schulz(matrices, steps, dtype):
    """Nearly the nearest semi-orthogonal matrices of (N, r, c): quintic iteration of Jordan et al. 2024."""
    x = matrices.to(dtype)
    wide = x.size(-2) <= x.size(-1)
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return x if wide else x.mT


def as_wide(matrix, like=None):
    """`matrix` transposed if it (or `like`) has more rows than columns; twice is the identity."""
    rows, columns = (matrix if like is None else like).shape
    return matrix.mT if rows > columns else matrix


class Muon:
    """Momentum orthogonalised by Newton-Schulz, on stacks of same-shape matrices, sharded over ranks (#399).

    Tall matrices are stacked transposed: W1 and W2 of an MLP share a stack, which leaves less padding on many
    ranks. Phases of one step, as marked in the code:
      1. launch   biggest stack first: stack the gradients (N, r, c), reduce-scatter their sum asynchronously
      2. collect  wait: this rank holds the reduced gradients of N / world matrices
      3. update   momentum, Nesterov, batched Newton-Schulz on that slice; all-gather asynchronously
      4. apply    weight decay and step, while the next stack is computed
    """

    def __init__(
        self, params, lr, momentum, weight_decay, ns_steps=5, dtype=torch.bfloat16, comm=None
    ):
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.ns_steps, self.dtype, self.comm = ns_steps, dtype, comm or Comm()
        shapes = {}
        for param in params:
            shapes.setdefault(tuple(as_wide(param).shape), []).append(param)
        self.stacks = sorted(shapes.values(), key=lambda ps: -len(ps) * ps[0].numel())
        self.grads = [None] * len(self.stacks)
        self.buffers = [
            ps[0].new_zeros(self.share(ps), *as_wide(ps[0]).shape) for ps in self.stacks
        ]
        self.factors = []  # (N / world, 1, 1): sqrt(max(1, rows / columns)) of this rank's matrices
        for params, buffer in zip(self.stacks, self.buffers):
            factors = self.stacked(
                [p.new_full((1, 1), max(1, p.size(0) / p.size(1)) ** 0.5) for p in params]
            )
            self.factors.append(factors[self.comm.rank * len(buffer) :][: len(buffer)])

    def share(self, params):
        """Matrices per rank; the last ranks' shares are padded with zeros."""
        return -(-len(params) // self.comm.world)

    def stacked(self, tensors):
        missing = self.share(tensors) * self.comm.world - len(tensors)
        return torch.stack([*tensors, *[torch.zeros_like(tensors[0])] * missing])

    def launch(self):  # phase 1
        self.handles = []
        for i, params in enumerate(self.stacks):
            stack = self.stacked([as_wide(p.grad) for p in params])
            self.grads[i] = stack if self.comm.world == 1 else torch.empty_like(self.buffers[i])
            if self.comm.world > 1:
                self.handles.append((self.comm.reduce_scatter(self.grads[i], stack), stack))

    def collect(self):  # phase 2
        """This rank's share of the squared gradient norm (0-d)."""
        for handle, _ in self.handles:
            handle.wait()
        return sum(grad.float().square().sum() for grad in self.grads)

    def step(self, scale=1.0, meanwhile=lambda: None):
        """Phases 3 and 4 on gradients times `scale`; `meanwhile()` runs during the last all-gather."""
        waiting = None
        for i, params in enumerate(self.stacks):
            update = self.orthogonal_update(self.grads[i] * scale, self.buffers[i]).mul_(
                self.factors[i]
            )
            full, handle = update, None
            if self.comm.world > 1:
                full = update.new_empty(len(update) * self.comm.world, *update.shape[1:])
                handle = self.comm.all_gather(full, update)
            if waiting:
                self.apply(*waiting)
            waiting = params, full, handle
        meanwhile()
        if waiting:
            self.apply(*waiting)

    def orthogonal_update(self, grad, buffer):  # phase 3
        buffer.mul_(self.momentum).add_(grad)
        return newton_schulz(grad.add(buffer, alpha=self.momentum), self.ns_steps, self.dtype)

    @torch.no_grad()
    def apply(self, params, full, handle):  # phase 4
        if handle:
            handle.wait()
        torch._foreach_mul_(params, 1 - self.lr * self.weight_decay)
        torch._foreach_add_(
            params, [as_wide(u.to(p.dtype), p) for u, p in zip(full, params)], alpha=-self.lr
        )

    def state_dict(self):
        """Momentum of every matrix by shape, whatever the number of ranks; all ranks must call it."""
        state = {}
        for params, buffer in zip(self.stacks, self.buffers):
            full = buffer
            if self.comm.world > 1:
                full = buffer.new_empty(len(buffer) * self.comm.world, *buffer.shape[1:])
                self.comm.all_gather(full, buffer).wait()
            state["x".join(map(str, buffer.shape[1:]))] = full[: len(params)].clone()
        return state

    def load_state_dict(self, state):
        for buffer in self.buffers:
            full = state["x".join(map(str, buffer.shape[1:]))].to(buffer.device)
            low = self.comm.rank * len(buffer)
            part = full[low : low + len(buffer)]
            buffer.zero_()[: len(part)].copy_(part)


def parameter_groups(model):
    """{"muon" | "embed" | "scalar": {name: parameter}}, every parameter in exactly one."""
    groups = {"muon": {}, "embed": {}, "scalar": {}}
    embeddings = {
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)
    }
    for name, param in model.named_parameters():
        block_matrix = re.fullmatch(
            r"blocks\.\d+\.(attn\.(c_[qkv]|proj)|mlp\.(fc|proj))\.weight", name
        )
        groups["muon" if block_matrix else "embed" if name in embeddings else "scalar"][name] = (
            param
        )
    return groups


def build_optimizers(model, config, comm=None):
    """(Muon, AdamW) over all parameters of `model`; asserts by name that each is in exactly one group."""
    groups = parameter_groups(model)
    muon = Muon(
        groups["muon"].values(),
        config.matrix_lr,
        config.muon_momentum,
        config.weight_decay,
        config.muon_ns_steps,
        getattr(torch, config.dtype),
        comm,
    )
    adamw = torch.optim.AdamW(
        [
            dict(params=list(groups["embed"].values()), base_lr=config.embed_lr),
            dict(params=list(groups["scalar"].values()), base_lr=config.scalar_lr),
        ],
        lr=config.scalar_lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    held = [p for stack in muon.stacks for p in stack] + [
        p for g in adamw.param_groups for p in g["params"]
    ]
    ids = [id(p) for p in held]
    wrong = [name for name, p in model.named_parameters() if ids.count(id(p)) != 1]
    foreign = len(held) - len(list(model.parameters()))
    assert not wrong and not foreign, f"not in exactly one optimiser group: {wrong}"
    return muon, adamw


def reduce_clip_step(muon, adamw, comm, clip):
    """One optimiser step on the ranks' summed gradients, clipped by their global norm after the reduction."""
    muon.launch()
    params = [p for group in adamw.param_groups for p in group["params"]]
    for param in params:
        param.grad = torch.zeros_like(param) if param.grad is None else param.grad
    grads = [p.grad for p in params]
    comm.sum_gradients(grads)
    squared = muon.collect()
    if comm.world > 1:
        comm.all_reduce(squared).wait()
    scale = torch.ones_like(squared)
    if clip:
        norm = (squared + sum(g.square().sum() for g in grads)).sqrt()
        scale = (clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, scale)
    muon.step(scale, meanwhile=adamw.step)


def lr_scale(config, step, seconds=0.0):
    """Factor in [0, 1] of every learning rate at `step` after `seconds` of training.

    1 until the warmdown, which covers the last WARMDOWN_ITERS steps, or with a wallclock cap the last
    WARMDOWN_ITERS times the measured step time, whichever begins first.
    """
    left = (config.iterations - step) / max(config.warmdown_iters, 1e-9)
    if config.max_wallclock_seconds and step and seconds:
        warmdown = max(config.warmdown_iters, 1e-9) * seconds / step
        left = min(left, (config.max_wallclock_seconds - seconds) / warmdown)
    left = min(1.0, max(0.0, left))
    return left if config.warmdown_shape == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def momentum_at(config, step):
    done = (
        min(1.0, step / config.muon_momentum_warmup_steps)
        if config.muon_momentum_warmup_steps
        else 1.0
    )
    return (1 - done) * config.muon_momentum_warmup_start + done * config.muon_momentum


class WeightAverage:
    """EMA of the weights in float32 each step, and the mean of late snapshots of it (SWA), on the device."""

    def __init__(self, params, config):
        self.params, self.config, self.snapshots = list(params), config, 0
        self.ema = [p.detach().clone() for p in self.params] if config.ema_decay else []
        self.swa = [torch.zeros_like(p) for p in self.params] if config.swa_enabled else []

    @torch.no_grad()
    def update(self, step, scale):
        """After step `step` (from 0) at learning-rate scale `scale`. The decay grows with the step, since a
        constant one would leave the initial weights in the average of a short run."""
        if self.ema:
            decay = min(self.config.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1 - decay)
        if (
            self.swa
            and scale < self.config.swa_start_scale
            and (step + 1) % self.config.swa_every == 0
        ):
            torch._foreach_add_(self.swa, self.ema or [p.detach() for p in self.params])
            self.snapshots += 1

    def exported(self):
        """(what it is, tensors): snapshots' mean, else the EMA, else the raw weights."""
        kind = "EMA weights" if self.ema else "raw weights"
        if self.snapshots:
            kind = f"mean of {self.snapshots} snapshots of the {kind}"
            return kind, [total / self.snapshots for total in self.swa]
        if self.swa:
            kind += (
                f"; warning: SWA took no snapshot (SWA_EVERY={self.config.swa_every}, "
                f"SWA_START_SCALE={self.config.swa_start_scale})"
            )
        return kind, self.ema or [p.detach() for p in self.params]

    def state_dict(self):
        return dict(ema=self.ema, swa=self.swa, snapshots=self.snapshots)

    @torch.no_grad()
    def load_state_dict(self, state):
        for mine, saved in ((self.ema, state["ema"]), (self.swa, state["swa"])):
            for target, value in zip(mine, saved, strict=True):
                target.copy_(value)
        self.snapshots = state["snapshots"]


# ==================================================================================================
# Evaluation
# One window plan, one meter, one scoring loop. Roundtrip, sliding window, test-time training and SLOT are
# that loop with other arguments: a flat list of work items (score these windows, train on this chunk) and a
# cursor, so that a killed evaluation goes on where it was.
# ==================================================================================================
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


@dataclasses.dataclass(frozen=True)
class Score:
    """Result of one evaluation: val_loss in nats per token, val_bpb in bits per byte, seconds spent."""

    label: str
    val_loss: float
    val_bpb: float
    tokens: int
    bytes: int
    seconds: float
    legal: bool


def bits_per_byte(nats, num_bytes):
    return nats / math.log(2) / num_bytes


def plan_windows(num_targets, seq_len, stride):
    """[(start, first_scored, end)]: window [start, end) of targets, of which [first_scored, end) are scored
    in it.

    Every target is scored exactly once, in order, with as much context as a window of seq_len holds. A stride
    beyond seq_len would leave gaps and counts as seq_len.
    """
    windows, done = [], 0
    while done < num_targets:
        end = min(num_targets, done + (min(stride, seq_len) if done else seq_len))
        windows.append((max(0, end - seq_len), done, end))
        done = end
    return windows


def plan_work(windows, num_targets, config, per_round, ttt):
    """The evaluation as a flat list: ("score", low, high) scores windows[low:high] in one round of all
    ranks, ("train", first_target, first_row, last_row, rate) is one SGD step on rows of EVAL_SEQ_LEN
    targets from first_target.

    With test-time training a chunk's windows come first, then its training; the last chunk is never trained
    on.
    """
    chunk = config.ttt_chunk_tokens if ttt else num_targets
    chunks, work, high = -(-num_targets // chunk), [], 0
    rows, batch = chunk // config.eval_seq_len, config.ttt_batch_seqs
    for c in range(chunks):
        low = high
        while high < len(windows) and windows[high][1] < (c + 1) * chunk:
            high += 1
        work += [("score", at, min(at + per_round, high)) for at in range(low, high, per_round)]
        if c < chunks - 1:
            rate = 0.5 * config.ttt_lr * (1 + math.cos(math.pi * c / (chunks - 1)))
            work += [
                ("train", c * chunk, at, min(at + batch, rows), rate)
                for _ in range(config.ttt_epochs)
                for at in range(0, rows, batch)
            ]
    return work


def log_probs(logits):
    """The one normaliser: float32 log-probabilities (n, V) over the whole vocabulary."""
    return F.log_softmax(logits, -1)


class Meter:
    """float64 sums of nll and bytes on this rank. Raises LegalityError for a target twice or out of order."""

    def __init__(self, num_targets, device):
        self.nll = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = self.bytes = self.last = 0
        self.coverage = np.zeros(num_targets, np.uint8)

    def add(self, first, end, nll, num_bytes):
        """Targets [first, end) with summed nll (0-d float64)."""
        if first < self.last or self.coverage[first:end].any():
            raise LegalityError(
                f"targets {first}…{end} come after {self.last}: out of order or twice"
            )
        self.coverage[first:end] = 1
        self.nll += nll
        self.tokens, self.bytes, self.last = self.tokens + end - first, self.bytes + num_bytes, end

    def row(self):
        return [float(self.nll), self.tokens, self.bytes, self.last]

    def restore(self, rows, coverage, comm):
        """This rank's share of a saved state; with another number of ranks, rank 0 goes on with the sum."""
        mine = rows[comm.rank] if len(rows) == comm.world else rows.sum(0) * (comm.rank == 0)
        self.nll.fill_(mine[0])
        self.tokens, self.bytes, self.last = int(mine[1]), int(mine[2]), int(rows[:, 3].max())
        self.coverage = coverage * (comm.rank == 0)


@contextlib.contextmanager
def evaluation_mode(model, freeze_blocks):
    """Evaluation mode with the first blocks frozen; yields the parameters that may be trained, and restores
    weights, modes and what needs gradients."""
    before = [(p, p.detach().clone(), p.requires_grad) for p in model.parameters()]
    training = model.training
    try:
        model.eval()
        for block in model.blocks[:freeze_blocks]:
            block.requires_grad_(False)
        yield [p for p in model.parameters() if p.requires_grad]
    finally:
        with torch.no_grad():
            for param, value, requires_grad in before:
                param.copy_(value)
                param.requires_grad_(requires_grad)
                param.grad = None
        model.train(training)


class Observer:
    """What the audit sees of an evaluation; every method is called on the real path."""

    def scored(self, targets, logps, nll):
        """Target indices (n,), their log-probabilities (n, V) and the nll (n,) that is counted."""

    def before_item(self, evaluation, item):
        """Called before each work item, on every rank."""

    def after_item(self, evaluation, item):
        """Called after each work item, on every rank."""


class Evaluation:
    """One pass over a validation stream. `ttt` trains on scored chunks, `slot` shifts hidden states (see
    the README).

    checkpoints, if given, keep the state (cursor, sums, coverage, adapted weights, momentum) for the same
    `identity`.
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
    ):
        self.model, self.stream, self.config = model, stream, config
        self.runtime, self.comm, self.observer = runtime, runtime.comm, observer or Observer()
        self.slot, self.checkpoints, self.label = slot, checkpoints, label
        self.windows = plan_windows(stream.num_targets, config.eval_seq_len, stride)
        per_round = config.eval_batch_seqs * self.comm.world
        self.work = plan_work(self.windows, stream.num_targets, config, per_round, ttt)
        self.meter = Meter(stream.num_targets, runtime.device)
        text = stream.fingerprint["val_sha256"]
        self.identity = f"{identity}/{label}/{stride}/{ttt}/{slot}/{text}/{self.comm.world}"
        self.hidden, self.loss = runtime.compiled(model.hidden), runtime.compiled(model)
        self.cursor, self.seconds, self.ttt, self.sgd = 0, 0.0, ttt, None
        self.batch_limit = None  # windows per batch that fit, once more did not

    def run(self, last_target=None):
        """Score all targets (or until a window's first one passes last_target); returns a Score."""
        with evaluation_mode(self.model, self.config.ttt_freeze_blocks) as params:
            if self.ttt:
                self.sgd = torch.optim.SGD(params, self.config.ttt_lr, self.config.ttt_momentum)
            self.load()
            self.begun = self.logged = time.monotonic() - self.seconds
            first = self.cursor
            while self.cursor < len(self.work):
                kind, *item = self.work[self.cursor]
                if (
                    last_target is not None
                    and kind == "score"
                    and self.windows[item[0]][1] > last_target
                ):
                    break
                self.observer.before_item(self, (kind, *item))
                self.score(*item) if kind == "score" else self.train(*item)
                self.observer.after_item(self, (kind, *item))
                self.cursor += 1
                self.after_item(first)
            if self.checkpoints is not None:
                self.checkpoints.wait()
            return self.result(complete=last_target is None)

    def after_item(self, first):
        """Between items: show progress, save the state when due, stop when wanted (all ranks together)."""
        runtime, now = self.runtime, time.monotonic()
        self.seconds, more = now - self.begun, self.cursor < len(self.work)
        due = more and runtime.is_main and self.checkpoints is not None and self.checkpoints.due()
        stop, save = self.comm.all_reduce_scalars(more and runtime.stop.wanted(), due)
        quiet, shown = now - self.logged, self.label and runtime.is_main and self.meter.bytes
        if shown and quiet > (
            1 if sys.stdout.isatty() else 15
        ):  # reading the sum makes the device wait
            bpb = bits_per_byte(float(self.meter.nll), self.meter.bytes)
            left = (len(self.work) - self.cursor) * self.seconds / max(1, self.cursor - first)
            text = (
                f"{self.label}_progress {self.cursor}/{len(self.work)} tokens:{self.meter.tokens} "
                f"running_bpb:{bpb:.4f} eta:{left:.0f}s"
            )
            runtime.progress(text)
            if quiet > 15:
                self.logged = now
                runtime.log(text)
        if (stop or save) and self.checkpoints is not None:
            self.save(wait=bool(stop))
        if stop:
            raise Stopped(f"in {self.label or 'validation'} at item {self.cursor}/{len(self.work)}")

    def halving(self, run, size):
        """run(size) in parts of at most `size` rows; after an out-of-memory error again with half of it."""
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
            torch.cuda.empty_cache()

    def score(self, low, high):
        """Score this rank's share of windows[low:high]."""
        size = self.config.eval_batch_seqs
        mine = self.windows[low:high][self.comm.rank * size :][:size]
        nll = self.halving(
            lambda part: [
                x for i in range(0, len(mine), part) for x in self.nll(mine[i : i + part], part)
            ],
            size,
        )
        for (_, first, end), value in zip(mine, nll):
            self.meter.add(first, end, value, int(self.stream.bytes[first:end].sum(dtype=np.int64)))

    def batch(self, starts, length):
        """ids and targets (n, length) of windows at `starts`, on the device."""
        tokens = self.runtime.to_device(
            np.stack([self.stream.tokens[at : at + length + 1] for at in starts])
        )
        return tokens[:, :-1], tokens[:, 1:]

    @torch.no_grad()
    def nll(self, windows, size):
        """Summed nll (0-d float64) of each window's scored targets; only those get logits."""
        length = windows[0][2] - windows[0][0]
        starts = [start for start, _, _ in windows]
        missing = size - len(starts) if self.runtime.compiling else 0  # one compiled shape
        ids, targets = self.batch(starts + starts[-1:] * missing, length)
        with self.runtime.autocast():
            hidden = self.hidden(ids)
            if self.slot != "off":
                hidden = hidden + self.slot_shift(hidden, targets, windows)
        places = [
            np.arange(i * length + first - start, (i + 1) * length)
            for i, (start, first, _) in enumerate(windows)
        ]
        out, flat = [], np.concatenate(places)
        for at in np.split(flat, range(8192, len(flat), 8192)):
            part = self.runtime.to_device(at)
            with self.runtime.autocast():
                logps = log_probs(self.model.logits(hidden.flatten(0, 1)[part]))
            out.append(-logps.gather(1, targets.flatten()[part, None])[:, 0])
            self.observer.scored(np.array(starts)[at // length] + at % length, logps, out[-1])
        return [x.double().sum() for x in torch.cat(out).split([len(p) for p in places])]

    def slot_shift(self, hidden, targets, windows):
        """SLOT: shift of the final states fitted by AdamW with the weights frozen, states computed once.

        causal: one (1, D) per window, fitted on the window's positions that earlier windows scored; a
        window without any gets none. published (#1150): one for the batch, fitted on all positions, those
        about to be scored included.
        """
        known, causal = torch.zeros(targets.shape, device=targets.device), self.slot == "causal"
        for i, (start, first, end) in enumerate(windows):
            known[i, : first - start if causal else end - start] = 1
        rows = len(targets) if causal else 1
        shift = torch.zeros(rows, 1, hidden.size(-1), device=hidden.device, requires_grad=True)
        adamw = torch.optim.AdamW([shift], lr=self.config.slot_lr)
        count = known.sum(1).clamp(min=1) if causal else known.sum()
        for _ in range(self.config.slot_steps):
            with torch.enable_grad():
                logits = self.model.logits(hidden.detach() + shift)
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
                total = (
                    (loss.view_as(known) * known).sum(1) / count
                ).sum()  # windows share no gradient
            (shift.grad,) = torch.autograd.grad(total, shift)
            adamw.step()
        return shift.detach()

    def train(self, first, row_low, row_high, rate):
        """One SGD step on rows [row_low, row_high) of the chunk at target `first`; all of them are scored."""
        length, comm = self.config.eval_seq_len, self.comm
        starts = [first + row * length for row in range(row_low, row_high)][comm.rank :: comm.world]
        params = self.sgd.param_groups[0]["params"]

        def run(part):
            for param in params:
                param.grad = torch.zeros_like(param)
            for i in range(0, len(starts), part):
                ids, targets = self.batch(starts[i : i + part], length)
                with self.runtime.autocast():
                    loss = self.loss(ids, targets)
                (loss * (len(ids) / (row_high - row_low))).backward()

        self.halving(run, max(1, len(starts)))
        comm.sum_gradients([p.grad for p in params])  # ranks without a row add zeros
        if self.config.ttt_grad_clip:
            nn.utils.clip_grad_norm_(params, self.config.ttt_grad_clip)
        self.sgd.param_groups[0]["lr"] = rate
        self.sgd.step()

    def result(self, complete):
        """The Score over all ranks. Raises LegalityError unless every target was counted exactly once."""
        nats, tokens, num_bytes, _ = self.comm.gather_rows(self.meter.row()).sum(0)
        coverage = self.all_coverage()
        if complete and not (coverage == 1).all():
            raise LegalityError(
                f"targets were scored {coverage.min()}…{coverage.max()} times instead of once"
            )
        if not math.isfinite(nats):
            raise ArtifactError(
                f"{self.label or 'validation'}: the score is not finite: the weights are damaged"
            )
        return Score(
            self.label,
            nats / max(tokens, 1),
            bits_per_byte(nats, max(num_bytes, 1)),
            int(tokens),
            int(num_bytes),
            time.monotonic() - self.begun,
            self.slot != "published",
        )

    def all_coverage(self):
        total = torch.from_numpy(self.meter.coverage.copy())
        if self.comm.world > 1:
            dist.all_reduce(total)
        return total.numpy()

    def save(self, wait):
        """Write the state in the background; with `wait`, raise ResourceError if it cannot be written."""
        state = dict(
            identity=self.identity,
            cursor=self.cursor,
            seconds=self.seconds,
            rows=torch.from_numpy(self.comm.gather_rows(self.meter.row())),
            coverage=torch.from_numpy(np.packbits(self.all_coverage())),
        )
        if self.ttt:
            state.update(model=self.model.state_dict(), sgd=self.sgd.state_dict())
        text = f"evaluation_saved {self.label} item:{self.cursor}/{len(self.work)}"
        if self.runtime.is_main:
            self.checkpoints.save(self.cursor, state, lambda seconds, size: self.runtime.log(text))
        if wait:
            self.checkpoints.wait_or_raise()
            self.comm.barrier()  # a rank that left now would have the launcher end the one that writes

    def load(self):
        """Go on from a saved state of the same evaluation, if there is one."""
        if self.checkpoints is None:
            return
        cursor, state = self.checkpoints.load()
        if not cursor:
            return
        if state["identity"] != self.identity:
            self.comm.barrier()  # every rank has read it
            self.checkpoints.clear()
            return self.runtime.log(
                f"warning: {self.checkpoints.path(cursor)} belongs to another evaluation; this "
                "evaluation starts at its beginning"
            )
        coverage = np.unpackbits(state["coverage"].numpy(), count=self.stream.num_targets)
        self.meter.restore(state["rows"].numpy(), coverage, self.comm)
        self.cursor, self.seconds = state["cursor"], state["seconds"]
        if self.ttt:
            self.model.load_state_dict(state["model"])
            self.sgd.load_state_dict(state["sgd"])
        self.runtime.log(f"resumed_evaluation {self.label} item:{self.cursor}/{len(self.work)}")


def evaluate(model, stream, config, runtime, stride=None, **options):
    """Score a validation stream by Evaluation; EVAL_SEQ_LEN as stride means non-overlapping windows."""
    return Evaluation(model, stream, config, runtime, stride or config.eval_stride, **options).run()


class EvaluationJob(typing.NamedTuple):
    """One score that a run reports."""

    label: str  # of its log lines
    stride: int  # EVAL_SEQ_LEN: non-overlapping windows
    ttt: bool
    slot: str


def evaluation_jobs(config):
    """[EvaluationJob] of an artifact from the weakest to the strongest, which is the one to report."""
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
        # What adapts, after a word on whether it may: legal_ttt, legal_ttt_slot_causal, slot_causal.
        if config.slot == "published":
            adapting.insert(0, "illegal")
        elif config.ttt_enabled:
            adapting.insert(0, "legal")
        label = "_".join(adapting)
        jobs.append(EvaluationJob(label, config.eval_stride, config.ttt_enabled, config.slot))
    return jobs


# ==================================================================================================
# Training
# Steps, checkpoints, resume. Nothing random is drawn from hidden state: noise is a function of (seed, step,
# sequence) and tokens of the step, so a checkpoint holds no generator and a resumed run is the uninterrupted
# one bit for bit.
# ==================================================================================================
class Trainer:
    """Model, optimisers, averages, data position and clock of one training run."""

    PARTS = ("model", "muon", "adamw", "average")  # what changes weights, each with a state_dict

    def __init__(self, config, runtime, val):
        self.config, self.runtime, self.val, self.comm = config, runtime, val, runtime.comm
        torch.manual_seed(config.seed)
        self.model = build_model(config, runtime)
        self.muon, self.adamw = build_optimizers(self.model, config, self.comm)
        self.average = WeightAverage(self.model.parameters(), config)
        self.stream = TrainStream(find_shards(config, "train"), config.vocab_size)
        self.loss = runtime.compiled(self.model)
        self.checkpoints = Checkpointer(runtime, "step", config.checkpoint_seconds)
        self.step, self.seconds, self.stopped_early, self.saved_step = 0, 0.0, False, 0
        sequences, world = config.train_batch_tokens // config.train_seq_len, self.comm.world
        if sequences % world:
            raise ConfigError(
                f"TRAIN_BATCH_TOKENS={config.train_batch_tokens} is {sequences} sequences, "
                f"which {world} ranks cannot share evenly: change the batch or the number of "
                "ranks"
            )
        self.seqs_per_rank = sequences // world
        most = min(self.seqs_per_rank, config.micro_batch_tokens // config.train_seq_len)
        self.micro_batch_seqs = max(n for n in range(1, most + 1) if self.seqs_per_rank % n == 0)
        self.identity = dict(
            hash=config.hash(), data=[int(self.stream.ends[-1]), val.fingerprint["val_sha256"]]
        )

    def announce(self):
        log, c = self.runtime.log, self.config
        log(f"model_params:{sum(p.numel() for p in self.model.parameters())}")
        log(
            f"world_size:{self.comm.world} grad_accum_steps:{self.seqs_per_rank // self.micro_batch_seqs}"
        )
        log(f"train_loader:dataset:{Path(c.data_path).name} train_shards:{len(self.stream.paths)}")
        if c.late_qat_threshold and not any(module.bits for _, module in self.model.quantizable()):
            log(
                "warning: LATE_QAT_THRESHOLD has no effect: no matrix of this model is stored in integers"
            )

    def run(self):
        """Train to the last step, the wallclock cap or a wish to stop; log, validate and save on the way."""
        self.load()
        self.warm_up()
        every = self.config.val_loss_every
        self.step_started = self.checkpoints.saved_at = time.monotonic()
        try:
            while True:
                done = self.step >= self.config.iterations or self.out_of_time()
                if done or (every and self.step and self.step % every == 0):
                    self.validate()
                if done:
                    break
                self.one_step()
        except Stopped:
            if self.saved_step != self.step:  # stopped in a validation
                self.save(wait=True)
            raise
        except DataError as error:
            raise DataError(f"{error} (last checkpoint: {self.checkpoints.last()})") from None
        self.checkpoints.wait()

    def out_of_time(self):
        """Whether the next step is predicted to pass the wallclock cap."""
        cap = self.config.max_wallclock_seconds
        if cap and self.step and self.seconds * (1 + 1 / self.step) > cap:
            self.runtime.log(
                f"stopping_early: wallclock_cap train_time:{1000 * self.seconds:.0f}ms "
                f"step:{self.step}/{self.config.iterations}"
            )
            self.stopped_early = True
        return self.stopped_early

    def one_step(self):
        config, runtime, step = self.config, self.runtime, self.step
        scale = lr_scale(config, step, self.seconds)
        self.set_lrs(scale)
        loss = self.accumulate(step, self.stream)
        now = time.monotonic()
        due = self.checkpoints.due()
        loss, stop, due, elapsed = self.comm.all_reduce_scalars(
            loss,
            runtime.stop.wanted(2 * self.seconds / max(1, step)),
            runtime.is_main and bool(due),
            (now - self.step_started) * runtime.is_main,
        )
        self.step_started = now
        if not math.isfinite(loss):
            self.diverged(loss)
        reduce_clip_step(self.muon, self.adamw, self.comm, config.grad_clip_norm)
        self.average.update(step, scale)
        self.step, self.seconds = step + 1, self.seconds + elapsed
        self.report(loss, scale)
        if stop and self.step < config.iterations:
            self.save(wait=True)
            raise Stopped(f"in training after step {self.step}/{config.iterations}")
        if due or (config.checkpoint_every and self.step % config.checkpoint_every == 0):
            self.save()

    def set_lrs(self, scale):
        config = self.config
        self.muon.lr, self.muon.momentum = config.matrix_lr * scale, momentum_at(config, self.step)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * scale
        if config.late_qat_threshold:
            self.model.set_qat(float(scale < config.late_qat_threshold))

    def accumulate(self, step, stream):
        """Gradients of this rank's share of the step's span; returns its share of the mean loss."""
        config, runtime, length = self.config, self.runtime, self.config.train_seq_len
        first, rounds, total = (
            self.comm.rank * self.seqs_per_rank,
            self.seqs_per_rank // self.micro_batch_seqs,
            0.0,
        )
        span = stream.take(
            config.train_batch_tokens, first * length, (first + self.seqs_per_rank) * length
        )
        self.model.zero_grad()
        self.model.train()
        for low in range(0, self.seqs_per_rank, self.micro_batch_seqs):
            part = runtime.to_device(
                span[low * length : (low + self.micro_batch_seqs) * length + 1]
            )
            noise = flow_noise(config, step, first + low, self.micro_batch_seqs, runtime.device)
            try:
                with runtime.autocast():
                    loss = self.loss(part[:-1].view(-1, length), part[1:].view(-1, length), noise)
                    loss = loss / (rounds * self.comm.world)
                loss.backward()
            except OUT_OF_MEMORY:
                smaller = max(self.micro_batch_seqs * length // 2, length)
                raise ResourceError(
                    "out of memory in training with MICRO_BATCH_TOKENS="
                    f"{config.micro_batch_tokens}: run the same command with "
                    f"MICRO_BATCH_TOKENS={smaller}"
                ) from None
            total = total + loss.detach()
        return float(total)

    def clock(self):
        milliseconds = 1000 * self.seconds
        return f"train_time:{milliseconds:.0f}ms step_avg:{milliseconds / max(1, self.step):.2f}ms"

    def report(self, loss, scale):
        config, step = self.config, self.step
        text = f"step:{step}/{config.iterations} train_loss:{loss:.4f}"
        if step <= 5 or step % config.train_log_every == 0 or step == config.iterations:
            self.runtime.log(f"{text} {self.clock()}")
            self.runtime.event(
                "step",
                step=step,
                train_loss=loss,
                train_time_ms=1000 * self.seconds,
                lr_scale=scale,
            )
        self.runtime.progress(f"{text} eta:{(config.iterations - step) * self.seconds / step:.0f}s")

    def validate(self):
        """Validation of the raw weights by non-overlapping windows; not counted as training time."""
        c, begin = self.config, time.monotonic()
        try:
            score = evaluate(self.model, self.val, c, self.runtime, c.eval_seq_len)
        except ArtifactError:
            self.diverged(math.nan)
        self.runtime.log(
            f"step:{self.step}/{c.iterations} val_loss:{score.val_loss:.4f} "
            f"val_bpb:{score.val_bpb:.4f} {self.clock()}"
        )
        self.runtime.event(
            "val",
            step=self.step,
            val_loss=score.val_loss,
            val_bpb=score.val_bpb,
            train_time_ms=1000 * self.seconds,
        )
        self.step_started += time.monotonic() - begin

    def warm_up(self):
        """Compile on synthetic tokens, then restore weights and optimisers bit for bit."""
        steps, config = self.config.warmup_steps, self.config
        if not self.runtime.compiling or not steps or self.step >= config.iterations:
            return
        before = private_copy(self.training_state())
        tokens = np.random.default_rng(0).integers(
            0, config.vocab_size, config.train_batch_tokens + 1
        )
        synthetic = types.SimpleNamespace(take=lambda span, low, high: tokens[low : high + 1])
        for i in range(steps):
            self.accumulate(-1 - i, synthetic)
            reduce_clip_step(self.muon, self.adamw, self.comm, config.grad_clip_norm)
        self.restore(before)
        self.runtime.log(f"warmup_steps:{steps} done, weights and optimisers restored")

    def training_state(self):
        """Everything the next step depends on; every rank must call it."""
        return {name: getattr(self, name).state_dict() for name in self.PARTS}

    def restore(self, state):
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])

    def save(self, wait=False):
        """Copy the state and write it in the background; with `wait`, raises ResourceError if it cannot be
        written.

        Weights that are not finite are never saved: the checkpoints before them are the ones to keep.
        """
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            return self.runtime.log(
                f"warning: no checkpoint at step {self.step}: weights are not finite"
            )
        state = self.training_state()
        self.saved_step = self.step
        if self.runtime.is_main:
            state.update(
                self.identity, step=self.step, seconds=self.seconds, position=self.stream.position
            )
            self.checkpoints.save(self.step, state, functools.partial(self.report_saved, self.step))
        self.checkpoints.saved_at = time.monotonic()
        if wait:
            self.checkpoints.wait_or_raise()
            self.comm.barrier()  # a rank that left now would have the launcher end the one that writes

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
        self.step, self.seconds, self.stream.position = step, state["seconds"], state["position"]
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
        state = dict(self.model.state_dict())
        state.update(
            (name, t) for (name, _), t in zip(self.model.named_parameters(), tensors, strict=True)
        )
        info = dict(
            steps=self.step,
            train_time_s=self.seconds,
            step_avg_ms=1000 * self.seconds / max(1, self.step),
            stopped_early=self.stopped_early,
            peak_mib=self.runtime.peak_mib()[0],
        )
        self.runtime.log(f"export:{kind}")
        return dict(
            config=self.config.as_dict("arch", "eval"), state_dict=private_copy(state), info=info
        )


def train(config, runtime, val, path):
    """Train (or go on training), write the exported float weights to `path`."""
    trainer = Trainer(config, runtime, val)
    trainer.announce()
    trainer.run()
    exported = trainer.export()
    allocated, reserved = runtime.peak_mib()
    runtime.log(f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB")
    if runtime.is_main:
        save_tensors(path, exported)
    runtime.event("trained", **exported["info"])
    runtime.comm.barrier()


# ==================================================================================================
# Compression
# Integers row by row, then a general compressor. The container is plain data with a checksum: its
# reader believes nothing that it has not compared with what the architecture must contain, and
# allocates nothing of a size that the architecture does not have.
# ==================================================================================================
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
        scheme = scheme_of(name, tensor.shape, config, int5_layers)
        if (name, scheme) not in cache:
            cache[name, scheme] = encode_tensor(tensor, scheme)
        table.append(TensorEntry(name, tuple(tensor.shape), scheme))
    order = list(SCHEMES)
    table.sort(key=lambda entry: order.index(entry.scheme))
    header = json.dumps(
        dict(
            config=config.as_dict("arch", "eval"),
            tokenizer_sha256=tokenizer_sha256,
            tensors=table,
        )
    ).encode()
    encoded = [cache[entry.name, entry.scheme] for entry in table]
    values = [tensor.values for tensor in encoded]
    scales = [tensor.scales for tensor in encoded]
    raw = b"".join([struct.pack("<I", len(header)), header, *values, *scales])
    return seal_payload(config, raw)


def seal_payload(config, raw):
    """Head and compressed payload of the raw bytes."""
    if config.compressor == "zstd":
        body = zstandard.ZstdCompressor(level=config.zstd_level).compress(raw)
    else:
        body = lzma.compress(raw, preset=config.lzma_preset)
    compressor = COMPRESSORS.index(config.compressor)
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
        blob = pack_artifact(config, state_dict, tuple(layers), tokenizer_sha256, cache)
        over = len(blob) + code_bytes - config.budget_bytes
        if over <= 0:
            return blob, layers
        if rung < len(order):
            log(f"budget: {over} bytes over, MLP of layer {order[rung]} to int5")
    raise ArtifactError(
        f"the artifact is {over} bytes over BUDGET_BYTES={config.budget_bytes} with every MLP in "
        "int5: train a smaller model (MLP_MULT, NUM_LAYERS)"
    )


# ---- reading ----


def decompress(body, compressor, size):
    """Exactly `size` bytes, or ArtifactError; never allocates more than that."""
    raw = b""
    whole = True
    try:
        if compressor == "lzma":
            unpacker = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=128 << 20)
            raw = unpacker.decompress(body, max_length=size + 1)
            whole = unpacker.eof and not unpacker.unused_data
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
    raw: bytes
    values_at: int  # offset of the first tensor


def open_payload(blob):
    """The decompressed payload of an artifact's bytes, after every check of its head."""
    if len(blob) < ARTIFACT_HEAD.size:
        raise ArtifactError(
            f"artifact: {len(blob)} bytes are less than its head: truncated or not an artifact"
        )
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
        config = Config(**header["config"])
        if header["config"].keys() != config.as_dict("arch", "eval").keys():
            raise ConfigError("settings are missing or foreign")
        if header.keys() != {"config", "tokenizer_sha256", "tensors"}:
            raise ConfigError("entries are missing or foreign")
        tokenizer_sha256 = header["tokenizer_sha256"]
        if not re.fullmatch(r"([0-9a-f]{64})?", tokenizer_sha256):
            raise ConfigError("tokenizer_sha256 is neither 64 hexadecimal digits nor empty")
        table = [
            TensorEntry(name, tuple(shape), scheme) for name, shape, scheme in header["tensors"]
        ]
        check_table(config, table, len(raw) - end)
    except ArtifactError:
        raise
    except Exception as error:  # a stranger's JSON may hold anything, escape sequences included
        what = f"{type(error).__name__}: {ascii(str(error)[:200])}"
        raise ArtifactError(f"artifact: its header is not valid ({what})") from None
    return Payload(config, tokenizer_sha256, table, raw, end)


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


def check_table(config, table, data_bytes):
    """Names and shapes must be the architecture's, schemes known, sizes add up. Raises ArtifactError."""
    names = {entry.name for entry in table}
    if len(names) != len(table):
        raise ArtifactError("artifact: a tensor appears twice")
    try:
        check_shapes(config, {entry.name: entry.shape for entry in table})
    except ArtifactError as error:
        raise ArtifactError(f"artifact: {error}") from None
    for entry in table:
        scheme = SCHEMES.get(entry.scheme)
        if scheme is None or (scheme.bits and len(entry.shape) < 2):
            wrong = f"scheme {ascii(entry.scheme)} is unknown or does not fit"
            raise ArtifactError(f"artifact: {entry.name}: {wrong}")
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


def read_artifact(blob):
    """Artifact of its bytes. Runs no code of the file; raises ArtifactError for any damage."""
    payload = read_header(blob)
    values_at = payload.values_at
    scales_at = values_at + sum(entry.value_bytes() for entry in payload.table)
    state = {}
    for entry in payload.table:
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
        """Settings that the file brings into a run that only evaluates it; a given file is audited."""
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
    saved = load_tensors(path)
    try:
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
            f"{ascii(str(error)[:200])}): name {FLOAT_NAME} or {ARTIFACT_NAME}"
        ) from None


# ==================================================================================================
# Legality
# The four conditions of issue #1017, checked on the functions that produce the score: the checks only change
# tokens and look at what the scoring loop shows an Observer. Comparisons are bit for bit.
# ==================================================================================================
class Recorder(Observer):
    """Keeps what one evaluation showed: nll by target, log-probabilities of `keep` targets, state hashes."""

    def __init__(self, num_targets, keep=(), hash_state=False):
        self.nll, self.times, self.total = (
            torch.zeros(num_targets),
            np.zeros(num_targets, np.int64),
            0.0,
        )
        self.keep, self.hash_state = {int(t): None for t in keep}, hash_state
        self.order, self.sums, self.state_entering = [], [], {}
        self.score_changed_state = self.trained_ahead = False

    def scored(self, targets, logps, nll):
        self.nll[targets] = nll.float().cpu()
        self.total += float(nll.double().sum())
        np.add.at(self.times, targets, 1)
        for row in np.flatnonzero(np.isin(targets, list(self.keep))):
            self.keep[int(targets[row])] = logps[row].float().cpu(), float(nll[row])

    def before_item(self, evaluation, item):
        windows = evaluation.windows
        if item[0] == "score":
            self.order.append(windows[item[1]][1])
            if self.hash_state:
                self.state_entering[self.order[-1]] = state_hash(evaluation)
        else:
            end = item[1] + item[3] * evaluation.config.eval_seq_len
            scored = evaluation.all_coverage()[item[1] : end].all()
            upcoming = [i for i in evaluation.work[evaluation.cursor + 1 :] if i[0] == "score"][:1]
            self.trained_ahead |= not scored or any(end > windows[low][1] for _, low, _ in upcoming)

    def after_item(self, evaluation, item):
        self.sums.append(float(evaluation.meter.nll))
        if item[0] == "score" and self.hash_state:
            self.score_changed_state |= (
                state_hash(evaluation) != self.state_entering[self.order[-1]]
            )


def state_hash(evaluation):
    """SHA-256 over parameters, buffers and optimiser state of an evaluation."""
    digest = hashlib.sha256()
    momenta = (
        [t for s in evaluation.sgd.state.values() for t in s.values()] if evaluation.sgd else []
    )
    for tensor in (*evaluation.model.parameters(), *evaluation.model.buffers(), *momenta):
        if isinstance(tensor, torch.Tensor):
            digest.update(
                tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            )
    return digest.hexdigest()


class Audit:
    """Runs the checks; `checks` is the list of (name, passed, detail)."""

    def __init__(self, model, stream, config, runtime):
        self.model, self.config, self.runtime, self.checks = model, config, runtime, []
        length, stride, batch = config.eval_seq_len, config.eval_stride, config.eval_batch_seqs
        # Scoring alone is checked on a few batches, test-time training on two chunks.
        self.short, self.long = (
            stream.replaced(stream.tokens[: min(stream.num_targets, targets) + 1])
            for targets in (length + 3 * batch * stride, 2 * config.ttt_chunk_tokens)
        )
        self.random = np.random.default_rng(config.seed)

    def run(self, stream, ttt=False, last_target=None, **options):
        recorder = Recorder(stream.num_targets, **options)
        evaluation = Evaluation(
            self.model,
            stream,
            self.config,
            self.runtime,
            self.config.eval_stride,
            ttt,
            self.config.slot,
            recorder,
        )
        evaluation.run(last_target)
        return recorder, evaluation

    def check(self, name, passed, detail):
        """Record a check; it passes when it passes on every rank."""
        passed = not self.runtime.comm.any_rank(not passed)
        self.checks.append(dict(name=name, passed=passed, detail=detail))
        self.runtime.log(f"legality {name} {'pass' if passed else 'FAIL'} {detail}")

    def changed(self, stream, low, high=None):
        """`stream` with tokens [low, high) replaced by others, each different from what it was."""
        tokens = np.array(stream.tokens)
        span, vocab = tokens[low:high].astype(np.int64), self.config.vocab_size
        tokens[low:high] = (span + self.random.integers(1, vocab, len(span))) % vocab
        return stream.replaced(tokens)

    def edges(self):
        """Targets at and around the edges of windows and batches, and some inside."""
        n, length, stride = (
            self.short.num_targets,
            self.config.eval_seq_len,
            self.config.eval_stride,
        )
        batch_end = length + stride * (self.config.eval_batch_seqs - 1)
        wanted = {
            1,
            length - 1,
            length,
            length + 1,
            length + stride,
            batch_end,
            batch_end + 1,
            n - 1,
        }
        return sorted(
            {k for k in wanted if 0 < k < n} | set(self.random.integers(1, n, 4).tolist())
        )

    def causality(self):
        places, ahead, own = self.edges(), [], []
        base, _ = self.run(self.short, keep=places)
        for k in places:
            recorder, _ = self.run(self.changed(self.short, k + 1), last_target=k)
            ahead += [k] if not torch.equal(recorder.nll[:k], base.nll[:k]) else []
        self.check(
            "C1 future_flip",
            not ahead,
            f"{len(places)} places, tokens after each replaced; differ: {ahead[:5]}",
        )
        for t in places[:: max(1, len(places) // 6)]:
            recorder, _ = self.run(self.changed(self.short, t + 1, t + 2), last_target=t, keep=[t])
            found = recorder.keep[t]
            own += [t] if found and not torch.equal(found[0], base.keep[t][0]) else []
        self.check(
            "C1 own_token",
            not own,
            f"log-probabilities at t do not depend on token t; differ: {own[:5]}",
        )

    def boundary(self):
        """A document's first position takes nothing from its predecessor in the smear gate."""
        ids = self.runtime.to_device(self.random.integers(2, self.config.vocab_size, (2, 16)))
        ids[:, 8] = BOS
        noise = self.random.standard_normal((1, 16, self.config.model_dim), np.float32)
        states = torch.from_numpy(noise).repeat(2, 1, 1)
        states[1, 7] += 1.0
        with torch.no_grad():
            out = self.model.smear(states.to(self.runtime.device), ids)
        passed = torch.equal(out[0, 8], out[1, 8]) and torch.equal(out[0, :7], out[1, :7])
        self.check(
            "C1 bos_resets", passed, "the state at BOS does not depend on the token before it"
        )

    def normalisation(self):
        short, vocab = self.short, self.config.vocab_size
        recorder, evaluation = self.run(short, keep=self.random.integers(0, short.num_targets, 64))
        found = {t: row for t, row in recorder.keep.items() if row}
        worst = max(
            (abs(float(torch.logsumexp(lp.double(), 0))) for lp, _ in found.values()), default=0.0
        )
        whole = all(torch.isfinite(lp).all() and len(lp) == vocab for lp, _ in found.values())
        self.check(
            "C2 normalised",
            whole and worst < 1e-4,
            f"{len(found)} positions, worst |logsumexp| {worst:.2e}",
        )
        entries = all(-float(lp[int(short.tokens[t + 1])]) == nll for t, (lp, nll) in found.items())
        counted, _, num_bytes, _ = evaluation.meter.row()
        entries &= math.isclose(counted, recorder.total, rel_tol=1e-9)
        entries &= num_bytes == int(short.bytes[recorder.times > 0].sum(dtype=np.int64))
        self.check(
            "C2 nll_is_entry",
            entries,
            "the counted nll is minus the log-probabilities, the bytes the targets'",
        )

    def order(self):
        ttt, chunk = self.config.ttt_enabled, self.config.ttt_chunk_tokens
        stream = self.long if ttt else self.short
        edge = chunk if ttt and stream.num_targets > chunk else stream.num_targets // 2
        base, evaluation = self.run(stream, ttt, hash_state=True)
        self.check(
            "C3 state_unchanged",
            not base.score_changed_state,
            "weights, buffers, optimiser around scoring",
        )
        self.check(
            "C3 trained_is_scored",
            not base.trained_ahead,
            "each trained token precedes the next to be scored",
        )
        twin, _ = self.run(self.changed(stream, edge + 1), ttt, hash_state=True)
        same = torch.equal(twin.nll[:edge], base.nll[:edge])
        same &= all(
            state == twin.state_entering.get(first)
            for first, state in base.state_entering.items()
            if first <= edge
        )
        self.check(
            "C3 twin_run",
            same,
            f"targets from {edge} on replaced: earlier scores and state the same",
        )
        seen = self.runtime.comm.gather_rows(base.times).sum(0)
        once = (
            (evaluation.all_coverage() == 1) & (seen == 1)
        ).all()  # by the meter, and as seen here
        self.check("C4 coverage", once, f"{stream.num_targets} targets, each scored once")
        ordered = base.order == sorted(base.order) and base.sums == sorted(base.sums)
        self.check("C4 single_pass", ordered, f"{len(base.order)} rounds in order, sums only grow")


def audit(model, stream, config, runtime):
    """[{"name", "passed", "detail"}] for C1 to C4 on a slice of `stream`, by the configured evaluation."""
    checker = Audit(model, stream, config, runtime)
    for part in (checker.causality, checker.boundary, checker.normalisation, checker.order):
        try:
            part()
        except LegalityError as error:
            checker.check(f"C4 {part.__name__}", False, str(error))
    return checker.checks


# ==================================================================================================
# main
# A run is a list of phases, each of which leaves a file: a rerun does what is missing and says what
# it found. Only rank 0 reads and writes RUN_DIR's records; the others follow what it says.
# ==================================================================================================
def check_places(config):
    """Refuse, before anything is moved, to set aside the very file that is to be scored."""
    if not config.eval_only or config.resume != "never":
        return
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
        tokenizer_sha256 = ""
        if config.eval_only:
            tokenizer_sha256 = self.load(self.artifact_path).tokenizer_sha256
        else:
            find_shards(config, "train")
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
        """What two runs must agree on to share a RUN_DIR: settings, text, code and (EVAL_ONLY) file.

        An evaluation does not use the settings of training, so it does not compare them.
        """
        config = self.config
        kinds = ("arch", "eval") if config.eval_only else ("arch", "train", "eval")
        identity = config.as_dict(*kinds)
        identity["validation text"] = self.val.fingerprint["val_sha256"]
        identity["train_gpt.py"] = self.code_sha256
        identity["file that is scored"] = "the run's own"
        if config.eval_only:
            identity["file that is scored"] = self.load(self.artifact_path).sha256
        return identity

    def origin(self):
        """Shows that this user's runs on this system made something, without giving the key away."""
        key = self.runtime.user_key()
        return hashlib.sha256(f"{key}/{self.code_sha256}".encode()).hexdigest() if key else ""

    def take_over_record(self):
        """Write config.json; go on with the scores of the run that RUN_DIR holds, if it is this one."""
        path = self.path / "config.json"
        if path.exists():
            self.check_same_run(json.loads(path.read_text()))
            # An evaluation of a given file is a check of it: what it found before is not taken up.
            if not self.config.eval_only:
                with contextlib.suppress(FileNotFoundError):
                    self.results = json.loads((self.path / "scores.json").read_text())
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
        (self.path / "STOPPED").unlink(missing_ok=True)

    def check_same_run(self, old):
        """Raise ConfigError when RUN_DIR holds a run of other settings, data, code or another user."""
        before = old.get("identity", {})
        differences = []
        for name, value in self.identity().items():
            if before.get(name) != value:
                shown = name.upper() if name in old.get("config", {}) else name
                differences.append(f"{shown}: {before.get(name)!r} -> {value!r}")
        if differences:
            raise ConfigError(
                f"{self.path} holds a run of other settings, data or code: {'; '.join(differences)}: "
                "use the same to resume it, set another RUN_ID, or RESUME=never to keep it aside"
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
        if not config.eval_only:
            log(f"config_hash:{config.hash()}")
        log(f"evaluation_hash:{config.hash('arch', 'eval')}")
        log(f"attention:{pick_attention(self.runtime.device, self.runtime.dtype).reason}")
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
        log(f"seed:{config.seed}")
        steps = Checkpointer(self.runtime, "step", 0).numbers()
        self.runtime.event("start", resumed_step=max(steps, default=0))

    def write_manifest(self):
        """manifest.json: versions, machine and hashes, so that a score can be traced to its files."""
        if not self.runtime.is_main:
            return
        config = self.config
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
            train(self.config, self.runtime, self.val, self.float_path)

    def pack(self):
        """Quantise, fit the budget, write the artifact, log the sizes."""
        if self.already_done("pack", self.artifact_path.exists):
            return
        config = self.config
        weights = self.load(self.float_path).state_dict
        # Measured: a few microseconds a parameter on one core, most of them in the compressor.
        seconds = 3 + 2e-6 * sum(tensor.numel() for tensor in weights.values())
        self.runtime.stop_if_wanted("packing", seconds)
        if self.runtime.is_main:
            tokenizer_sha256 = sha256_file(config.tokenizer_path)
            blob, layers = fit_budget(
                config, weights, self.code_bytes(), tokenizer_sha256, self.log
            )
            write_atomic(self.artifact_path, [blob])
            self.log_sizes(len(blob), self.code_bytes())
            self.runtime.event(
                "packed",
                artifact_bytes=len(blob),
                code_bytes=self.code_bytes(),
                int5_layers=layers,
            )
        self.runtime.comm.barrier()
        self.write_manifest()

    def code_bytes(self):
        """Bytes of code that the artifact must share BUDGET_BYTES with."""
        return self.config.code_bytes or CODE_PATH.stat().st_size

    def log_sizes(self, artifact_bytes, code_bytes):
        """The three lines of the challenge's logs, and what is left of the budget."""
        log = self.log
        compressor = self.config.compressor
        total = artifact_bytes + code_bytes
        log(f"Code size: {code_bytes} bytes")
        log(f"Serialized model int6+{compressor}: {artifact_bytes} bytes")
        log(f"Total submission size int6+{compressor}: {total} bytes")
        log(f"headroom: {self.config.budget_bytes - total} bytes")

    def check_budget(self):
        """The file that is scored and this very script must fit. Raises ArtifactError."""
        if self.artifact_path.suffix == ".pt":
            return  # float weights are no submission
        artifact_bytes = self.artifact_path.stat().st_size
        code_bytes = CODE_PATH.stat().st_size
        self.log_sizes(artifact_bytes, code_bytes)
        over = artifact_bytes + code_bytes - self.config.budget_bytes
        if over > 0:
            raise ArtifactError(
                f"{self.artifact_path}: {artifact_bytes} bytes and {code_bytes} bytes of code are "
                f"{over} more than BUDGET_BYTES={self.config.budget_bytes}: score it with the script "
                "it was submitted with, or raise BUDGET_BYTES to look at it all the same"
            )

    def model_of(self, path):
        """The model with the weights of a file; one object for all scores, so that it is compiled once."""
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
            # A given file is audited anew each time; so is everything when the audit is what was asked.
            if config.eval_only or config.mode == "audit" or not path.exists():
                return False
            old = json.loads(path.read_text())
            return old.get("audit_key") == audit_key and old["passed"]

        self.audited = True  # below, a failure raises
        if self.already_done("audit", passed_before):
            return
        self.runtime.stop_if_wanted("the audit", 30)
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

    def score(self):
        """Every score that is configured and missing, from the files that were written."""
        config = self.config
        for job in self.jobs():
            if self.already_done(job.label, lambda job=job: job.label in self.results["scores"]):
                continue
            name = f"eval_{job.label}"
            checkpoints = Checkpointer(self.runtime, name, config.eval_checkpoint_seconds)
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
                checkpoints=checkpoints,
                identity=self.evaluation_key(path) + "/" + self.origin(),
            )
            self.record(score, job)
        if self.runtime.is_main:
            self.write_results(finished=True)
            self.summarise()
        self.runtime.event("done")
        self.log(f"run_finished {self.path}")

    def jobs(self):
        """The evaluations of this run, the float weights' first."""
        jobs = evaluation_jobs(self.config)
        if self.artifact_path.suffix == ".pt":
            return [job._replace(label=job.label.replace("final_int6", "float")) for job in jobs]
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
        if not self.config.eval_only:
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
        """Label of the score to report: the last legal one in the order of jobs, whatever its value.

        To choose the lowest of several scores after seeing them would be selection on validation text.
        """
        scores = self.results["scores"]
        legal = [
            job.label
            for job in self.jobs()
            if job.label in scores and scores[job.label]["legal"] and self.is_submission(job.label)
        ]
        return legal[-1] if legal else None

    def legality_of(self, label):
        """1 proved by this run's audit, 0 known to be illegal, or why there is nothing to say."""
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
                f"result {label} val_bpb:{score['val_bpb']:.8f} legal:{self.legality_of(label)} "
                f"score_scope:{self.val.scope}"
            )
        if self.config.preset == "demo":
            self.log_baselines()
        headline = self.headline()
        if headline is not None:
            bpb = results["scores"][headline]["val_bpb"]
            seconds = results["scores"][headline]["eval_time_s"]
            legal = self.legality_of(headline)
            log(f"summary: score  {bpb:.4f} bits per byte ({headline}, legal:{legal})")
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
    """MODE=sample: print PROMPT and how the artifact goes on; nothing is scored or written."""
    token_bytes = load_token_bytes(config, loaded.tokenizer_sha256)
    tokenizer = token_bytes.model
    model = build_model(config, runtime)
    model.load_state_dict(loaded.state_dict)
    model.eval()
    prompt = [BOS, *tokenizer.encode(config.prompt)]
    generator = torch.Generator().manual_seed(config.seed)
    shown = ""
    text_ids = prompt[1:]
    for token in continue_tokens(model, prompt, config, runtime, generator):
        text_ids = [*text_ids, token]
        text = tokenizer.decode(text_ids)
        # A character of several bytes is a replacement mark until its last byte is there.
        if runtime.is_main and not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
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
        report_error(runtime, error.code, str(error), f"error: {error}", rank)
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
    runtime.log(
        f"stopped signal:{runtime.stop.reason} phase:{stop}; run the same command again to go on"
    )
    runtime.event("stopped", signal=runtime.stop.reason, phase=str(stop))
    with contextlib.suppress(RuntimeError):
        runtime.comm.barrier()  # all ranks leave together


def report_error(runtime, code, message, shown, rank):
    """`message` to the log and the events, `shown` with its rank to the terminal."""
    runtime.event("error", code=code, message=message)
    runtime.append(runtime.log_file, f"error: {message}")
    lines = [f"{rank}{line}" for line in shown.splitlines()]
    print("\n".join(lines), file=sys.stderr, flush=True)


def leave(runtime, code):
    """Exit now: with several ranks, tearing down a process group whose peers may be gone can hang."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()  # a checkpoint that is being written
    sys.stdout.flush()
    if runtime.comm.world > 1:
        os._exit(code)
    sys.exit(code)


def load_given(environ):
    """LoadedWeights that this command only scores or samples from, or None when it is to train."""
    path = environ.get("EVAL_ONLY")
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
    loaded = load_given(os.environ)
    config = Config.from_env(os.environ, loaded.brought() if loaded else None)
    if arguments:
        print("\n".join(f"{name.upper()}={value}" for name, value in config.as_dict().items()))
        return
    check_places(config)
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
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
