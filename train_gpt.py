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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import nn

BOS = 1  # every document of the official shards starts with this token
CODE_PATH = Path(__file__).resolve()
OTHER_FILE = "copy it again, or name another file"
READABLE = "name a readable artifact (*.ptz) or float checkpoint (*.pt)"


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


# ============================================================================================================
# Configuration
# One frozen dataclass whose defaults are the nfm_7k submission; presets are its differences. A field's kind
# says what it belongs to: "arch" and "eval" travel inside the artifact, "train" fixes the weights, "run"
# changes where and how a run happens but not its result. The hash covers all but "run".
# ============================================================================================================
def opt(kind, default, text, low=-math.inf, high=math.inf, choices=None):
    """A Config field with what --help and the range checks need to know."""
    return dataclasses.field(default=default,
                             metadata=dict(kind=kind, text=text, low=low, high=high, choices=choices))


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
    mlp_mult: float = arch_opt(3.0, "MLP width / model_dim, rounded down to a multiple of 8", 0.25, 16)
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
    scalar_lr: float = train_opt(0.025, "AdamW rate of what is neither embedding nor block matrix", 0)
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
    late_qat_threshold: float = train_opt(0.0, "learning-rate scale of rounding in training, 0 = off", 0, 1)
    # compression
    block_bits: int = train_opt(6, "bits of the blocks' matrices", choices=(5, 6, 8))
    embed_bits: int = train_opt(8, "bits of the other large matrices", choices=(5, 6, 8))
    compressor: str = train_opt("zstd", "compressor of the artifact", choices=("zstd", "lzma"))
    zstd_level: int = train_opt(16, "zstd level", 1, 22)
    lzma_preset: int = train_opt(6, "lzma preset", 0, 9)
    budget_bytes: int = train_opt(16_000_000, "code + model must fit this", 1)
    # evaluation
    dtype: str = eval_opt("bfloat16", "autocast type; float32 = none", choices=("bfloat16", "float32"))
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
    slot: str = eval_opt("off", "per-window shift of the hidden state; published is illegal",
                           choices=("off", "causal", "published"))
    slot_lr: float = eval_opt(0.003, "AdamW rate of SLOT", 0)
    slot_steps: int = eval_opt(5, "AdamW steps of SLOT", 1)
    # where and how
    data_path: str = run_opt("./data/datasets/fineweb10B_sp1024", "directory of the shards")
    tokenizer_path: str = run_opt("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model")
    run_id: str = run_opt("", "name of the run; default {preset}_seed{seed} and the SLURM job")
    run_dir: str = run_opt("", "directory of the run; default runs/$RUN_ID")
    resume: str = run_opt("auto", "continue RUN_DIR; never keeps the old run aside",
                        choices=("auto", "never", "must"))
    eval_only: str = run_opt("", "score this artifact or float checkpoint, do not train")
    mode: str = run_opt("train", "audit = only the legality audit", choices=("train", "audit"))
    audit: bool = run_opt(False, "prove the four legality conditions before scoring")
    scores_file: str = run_opt("", "write each score's nll by target here (little-endian float32, nats); "
                               "{label} becomes the score's name, without it the last score remains")
    device: str = run_opt("auto", "auto, cpu, cuda or cuda:N")
    compile: str = run_opt("auto", "torch.compile; auto = on CUDA only", choices=("auto", "0", "1"))
    micro_batch_tokens: int = run_opt(98304, "tokens per forward pass and rank", 1)
    warmup_steps: int = run_opt(20, "compile warm-up steps on synthetic tokens; weights are restored", 0)
    train_log_every: int = run_opt(100, "steps between training log lines", 1)
    val_loss_every: int = run_opt(1000, "steps between validations, 0 = only after the last step", 0)
    checkpoint_every: int = run_opt(1000, "steps between checkpoints, 0 = off", 0)
    checkpoint_seconds: float = run_opt(600.0, "seconds between checkpoints, 0 = off", 0)
    eval_checkpoint_seconds: float = run_opt(300.0, "seconds between states of an evaluation, 0 = off", 0)
    time_limit_seconds: float = run_opt(0.0, "save and stop within this time, 0 = SLURM's or none", 0)
    explicit: tuple = dataclasses.field(default=(), compare=False, repr=False, metadata=dict(kind="hidden"))

    def __post_init__(self):
        for field in config_fields():
            check_value(field, getattr(self, field.name))
        if not self.eval_only:  # then the artifact's settings are still to come: adopt() checks
            check_fit(self)

    @property
    def head_dim(self):
        return self.model_dim // self.num_heads

    @property
    def mlp_hidden(self):
        return int(self.mlp_mult * self.model_dim) // 8 * 8

    @classmethod
    def from_env(cls, environ):
        """Explicit variable > PRESET > default. Raises ConfigError, also for near misses of a name."""
        names = {field.name.upper(): field for field in config_fields()}
        for name in sorted(environ.keys() - names):
            near = difflib.get_close_matches(name.upper(), names, 1, 0.86)
            if near and len(name) > 3:
                raise ConfigError(f"environment variable {name}={environ[name]!r} is not a setting, but "
                                  f"looks like {near[0]}: rename or unset it (see --help)")
        explicit = {f.name: parse_value(f, environ[name]) for name, f in names.items() if name in environ}
        values = {"preset": "nfm_7k", **PRESETS.get(environ.get("PRESET"), {}), **explicit}
        job = environ.get("SLURM_ARRAY_JOB_ID") or environ.get("SLURM_JOB_ID")
        job = "".join(f"_{part}" for part in (job, environ.get("SLURM_ARRAY_TASK_ID")) if part)
        run_id = values.get("run_id") or default_run_id(values) + job
        values.update(run_id=run_id, run_dir=values.get("run_dir") or f"runs/{run_id}")
        return cls(**values, explicit=tuple(sorted(explicit)))

    def as_dict(self, *kinds):
        fields = [f.name for f in config_fields() if not kinds or f.metadata["kind"] in kinds]
        return {name: getattr(self, name) for name in fields}

    def hash(self):
        """16 hex digits over everything that can change a result."""
        text = json.dumps(self.as_dict("arch", "train", "eval"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self):
        """Fields that differ from the preset (settings of place and pace included)."""
        base = {f.name: f.default for f in config_fields()} | PRESETS[self.preset]
        base.update(preset=self.preset, run_id=self.run_id, run_dir=self.run_dir)
        return {name: value for name, value in self.as_dict().items() if value != base[name]}

    def adopt(self, other):
        """This configuration with another's architecture and evaluation settings, but for what was set
        explicitly.

        Raises ConfigError when an architecture variable was set explicitly to something else.
        """
        brought = other.as_dict("arch", "eval")
        for name in set(self.explicit) & brought.keys():
            mine, value = getattr(self, name), brought.pop(name)
            if mine != value and name in other.as_dict("arch"):
                raise ConfigError(f"{name.upper()}={mine} contradicts the artifact, which has {value}: unset "
                                  f"{name.upper()} (an artifact brings its own architecture)")
        adopted = dataclasses.replace(self, **brought)
        check_fit(adopted)
        return adopted


def config_fields():
    return [f for f in dataclasses.fields(Config) if f.metadata["kind"] != "hidden"]


def default_run_id(values):
    path = values.get("eval_only")
    if not path:
        return f"{values['preset']}_seed{values.get('seed', Config.seed)}"
    try:
        return f"eval_{sha256_file(path)[:8]}"
    except OSError as error:
        raise ArtifactError(f"EVAL_ONLY={path}: {error.strerror}: {READABLE}") from None


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
    if number and not abs(value) <= sys.float_info.max:  # NaN, infinity, an integer beyond every float
        raise ConfigError(f"{name}={value}: expected a finite number")
    if number and not meta["low"] <= value <= meta["high"]:
        most = f" and at most {meta['high']}" if meta["high"] < math.inf else ""
        raise ConfigError(f"{name}={value}: expected at least {meta['low']}{most}")
    if meta["choices"] and value not in meta["choices"]:
        raise ConfigError(f"{name}={value!r}: expected one of {', '.join(map(str, meta['choices']))}")


def check_fit(c):
    """Settings that only make sense together; each row is (holds, their names, what is expected)."""
    heads = c.model_dim % c.num_heads == 0
    multiple = "the first is no multiple of the second: change one of them"
    rows = [
        (c.preset in PRESETS, "preset", f"expected one of {', '.join(PRESETS)}"),
        (re.fullmatch(r"auto|cpu|cuda(:\d+)?", c.device), "device", "expected auto, cpu, cuda or cuda:N"),
        (heads, "model_dim num_heads", multiple),
        (c.num_heads % c.num_kv_heads == 0, "num_heads num_kv_heads", multiple),
        (c.rope_dims % 2 == 0 and c.rope_dims <= c.head_dim, "rope_dims",
         f"use an even number up to MODEL_DIM/NUM_HEADS = {c.model_dim / c.num_heads:g}"),
        (c.mlp_hidden >= 8, "mlp_mult", "no hidden unit is left: raise it"),
        (c.ttt_freeze_blocks <= c.num_layers, "ttt_freeze_blocks num_layers", "lower the first"),
        (not c.ve_dim or c.ve_last_n <= c.num_layers, "ve_last_n num_layers", "lower the first"),
        (c.train_batch_tokens % c.train_seq_len == 0, "train_batch_tokens train_seq_len", multiple),
        (c.micro_batch_tokens >= c.train_seq_len, "micro_batch_tokens train_seq_len",
         "not one sequence fits: raise the first"),
        (c.eval_stride <= c.eval_seq_len, "eval_stride eval_seq_len",
         "targets between the windows would never be scored: lower the first"),
        (c.ttt_chunk_tokens % c.eval_seq_len == 0, "ttt_chunk_tokens eval_seq_len", multiple),
        (c.slot == "off" or c.eval_stride < c.eval_seq_len, "slot eval_stride eval_seq_len",
         "no window has a position that an earlier one scored: lower EVAL_STRIDE"),
    ]
    for holds, names, expected in rows:
        if not holds:
            values = " and ".join(f"{name.upper()}={getattr(c, name)!r}" for name in names.split())
            raise ConfigError(f"{values}: {expected}")


BASE = dict(nfm_enabled=False, eval_seq_len=2048)
LONG = dict(BASE, iterations=20000, warmdown_iters=12000, warmdown_shape="cosine", embed_bits=6)
# What #1166 and #1150 share and #1170 does not have.
VE128 = dict(BASE, gated_attention=False, value_residual=False, xsa_last_n=4, bigram_vocab_size=1536,
             ve_dim=128, swa_enabled=True, late_qat_threshold=0.15, compressor="lzma")
TTT_LINEAR = dict(VE128, e2e_ttt_enabled=True, flow_enabled=True, iterations=7185, warmdown_iters=4311,
                  ttt_enabled=False)
PRESETS = {
    "nfm_7k": {},
    "base_7k": BASE,
    "base_20k": LONG,
    "flow_20k": dict(LONG, flow_enabled=True),
    "ttt_linear_10l": dict(TTT_LINEAR, num_layers=10),
    "ttt_linear_11l": TTT_LINEAR,
    "slot_11l": dict(VE128, mlp_mult=2.8, iterations=9000, warmdown_iters=3500, max_wallclock_seconds=600.0,
                     ttt_epochs=3, ttt_freeze_blocks=0, slot="causal"),
    # The whole path of nfm_7k at a size that two CPU cores train in two minutes.
    # The wallclock cap keeps a slow machine inside five minutes; a fast one takes all steps.
    "demo": dict(num_layers=5, model_dim=192, num_heads=3, num_kv_heads=1, bigram_vocab_size=2048,
                 xsa_last_n=5, nfm_hidden_dim=96, iterations=400, warmdown_iters=130,
                 max_wallclock_seconds=150.0, train_batch_tokens=8192, train_seq_len=256,
                 micro_batch_tokens=8192, embed_lr=0.01, scalar_lr=0.01, muon_momentum=0.95,
                 muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=100, warmup_steps=0,
                 train_log_every=25, val_loss_every=200, checkpoint_every=0, checkpoint_seconds=60.0,
                 eval_checkpoint_seconds=30.0, eval_seq_len=256, ttt_epochs=1, ttt_chunk_tokens=16384,
                 ttt_batch_seqs=16, ttt_freeze_blocks=1, data_path="./data/datasets/demo_sp1024",
                 tokenizer_path="./data/tokenizers/demo_1024_bpe.model"),
}


def help_text():
    """Every variable with its meaning, default and the presets that change it."""
    lines = [__doc__, "Variables (default; [preset=value] where a preset differs):"]
    for field in config_fields():
        name, choices = field.name, PRESETS if field.name == "preset" else field.metadata["choices"]
        extra = f" ({'|'.join(map(str, choices))})" if choices else ""
        presets = "".join(f" [{p}={d[name]}]" for p, d in PRESETS.items() if name in d)
        lines.append(f"  {name.upper()}={field.default}\n      {field.metadata['text']}{extra}{presets}")
    return "\n".join(lines)


# ============================================================================================================
# Runtime
# Device, ranks, log, clock, signals and atomic files: everything that touches the machine sits in one object
# made in main and passed down, so that all that follows is the same code on a laptop and on eight GPUs.
# ============================================================================================================
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
        raise ResourceError(f"cannot write {path}: {error.strerror}: free space or change RUN_DIR; what was "
                            "saved before is intact") from None


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
        raise ArtifactError(f"{path}: {error.strerror}: {OTHER_FILE}") from None
    if len(blob) < 32 or hashlib.sha256(memoryview(blob)[:-32]).digest() != blob[-32:]:
        raise ArtifactError(f"{path}: checksum does not match: truncated, damaged or not ours: {OTHER_FILE}")
    try:
        return torch.load(io.BytesIO(blob[:-32]), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ArtifactError(f"{path}: not a checkpoint of tensors ({str(error).splitlines()[0]})") from None


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

    def agree(self, *values):
        """Element-wise sum of numbers over ranks, as floats, through the host (no device synchronisation)."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather_rows(self, row):
        """(world, n) float64: one row of n numbers from every rank."""
        rows = np.zeros((self.world, len(row)))
        rows[self.rank] = row
        return np.array(self.agree(*rows.flatten())).reshape(rows.shape)

    def barrier(self):
        self.agree(0)


class Runtime:
    """The machine as one object: device, comm, attention backend, log, clock and the wish to stop.

    Reads the rank variables of torchrun and SLURM's end time from `environ`. Raises ConfigError for a RUN_DIR
    that cannot be written or that another process holds.
    """

    def __init__(self, config, environ):
        self.started = time.monotonic()
        self.comm = Comm(int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1)))
        self.is_main = self.comm.rank == 0
        self.device = pick_device(config.device, int(environ.get("LOCAL_RANK", 0)))
        self.dtype, on_gpu = getattr(torch, config.dtype), self.device.type == "cuda"
        self.compiling = config.compile == "1" or (config.compile == "auto" and on_gpu)
        self.dir, self.log_file, self.events, self.lock = Path(config.run_dir), None, None, None
        self.stop_signal, self.signalled = "", 0.0
        end = float(environ.get("SLURM_JOB_END_TIME", 0))
        self.time_limit = min(config.time_limit_seconds or math.inf, end - time.time() if end else math.inf)
        self.save_seconds, self.on_line, self.batch_seqs = 0.0, False, None
        if self.comm.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                                    timeout=datetime.timedelta(minutes=10))
        if on_gpu:
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = self.dtype == torch.bfloat16
        else:
            keep_large_blocks()
        self.attend, self.attention_choice = pick_attention(self.device, self.dtype)
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
            raise ConfigError(f"RUN_DIR={self.dir} is in use by another process: wait for it, or set another "
                              "RUN_ID") from None
        except OSError as error:
            raise ConfigError(f"RUN_DIR={self.dir} cannot be written ({error.strerror}): set RUN_DIR to a "
                              "writable directory") from None

    def watch_signals(self):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        # A cluster and torchrun may both deliver the same wish to stop, hence the half second.
        if self.signalled and time.monotonic() - self.signalled > 0.5:
            os._exit(128 + number)
        self.stop_signal = self.stop_signal or signal.Signals(number).name
        self.signalled = self.signalled or time.monotonic()

    def remaining(self):
        """Seconds until the time limit, less what saving needs."""
        margin = min(60.0, 0.1 * self.time_limit) if math.isfinite(self.time_limit) else 0.0
        return self.time_limit - margin - self.save_seconds - (time.monotonic() - self.started)

    def wants_stop(self, next_seconds=0.0):
        if not self.stop_signal and self.remaining() < next_seconds:
            self.stop_signal = "TIME_LIMIT"
        return bool(self.stop_signal)

    def stop_if_wanted(self, phase, seconds_needed):
        """Before a phase that cannot be interrupted: all ranks stop together if it would not end in time."""
        if self.comm.agree(self.wants_stop(seconds_needed))[0]:
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
            print(f"warning: {file.name} cannot be written ({error.strerror})", file=sys.stderr, flush=True)

    def progress(self, text):
        """Rewrite the terminal's current line; nothing where the output is a file."""
        if self.is_main and sys.stdout.isatty():
            print(f"\r\x1b[K{text}", end="", flush=True)
            self.on_line = True

    def event(self, event, **fields):
        self.append(self.events, json.dumps({"event": event, "time": round(time.time(), 3), **fields}))

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def compiled(self, function):
        return torch.compile(function, dynamic=False, fullgraph=True) if self.compiling else function

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


def open_lines(path):
    """Open for appending, unbuffered, after ending a line that a killed process left unfinished."""
    broken = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    file = open(path, "ab", buffering=0)
    file.write(b"\n" * broken)
    return file


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


def sdpa_attention(q, k, v):
    """Causal attention by PyTorch. q (B, T, H, d), k and v (B, T, K, d) -> (B, T, H, d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                          enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def pick_attention(device, dtype):
    """(function, 'name: reason'): the first backend that runs forward and backward here, tried once.

    Published runs failed after hours in the queue because a fixed backend did not exist on their GPU.
    """
    if device.type == "cpu":
        return cpu_attention, "cpu_blocked: PyTorch's CPU forward, blocked backward"
    failures, sdpa = [], ("flash", "cudnn", "mem_efficient", "math")
    for chosen in ("flash_attention_3", *sdpa):
        try:
            if chosen in sdpa:
                for name in sdpa:
                    getattr(torch.backends.cuda, f"enable_{name}_sdp")(name == chosen)
            attend = sdpa_attention if chosen in sdpa else flash_attention_3(device)
            q, k = (torch.zeros(1, 64, heads, 64, device=device, dtype=dtype, requires_grad=True)
                    for heads in (2, 1))
            attend(q, k, k).float().sum().backward()
            kind = "sdpa " * (chosen in sdpa)
            return attend, f"{kind}{chosen}: first that ran; not usable: {', '.join(failures) or 'none'}"
        except Exception as error:
            failures.append(f"{chosen} ({type(error).__name__})")
    raise ConfigError(f"no attention backend runs forward and backward on {device}: tried "
                      f"{', '.join(failures)}")


def flash_attention_3(device):
    """FlashAttention-3 where it is installed, on Hopper; raises elsewhere."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        raise NotImplementedError("needs Hopper")
    from flash_attn_interface import flash_attn_func

    def attend(q, k, v):
        out = flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out
    return attend


# ============================================================================================================
# Data
# The challenge's own shard format, read through memory maps. The tokens of a step are one contiguous span
# whatever the number of ranks, so a position is one integer; bytes are counted once for the whole validation
# stream.
# ============================================================================================================
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
        raise DataError(f"{path}: not a token shard: header starts with {header[:2].tolist()}, expected "
                        f"[{SHARD_MAGIC}, {SHARD_VERSION}]: download it again, or set DATA_PATH")
    expected = 4 * SHARD_HEADER + 2 * int(header[2])
    if header[2] <= 0 or size != expected:
        raise DataError(f"{path}: {size} bytes, expected {expected} for the {header[2]} tokens of its header "
                        "(at least one): truncated or over-long: restore the shard or download it again")
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
        raise DataError(f"no shard matches {config.data_path}/{pattern} ({there}): get the official shards "
                        "(README, section Data) and set DATA_PATH and TOKENIZER_PATH, or try the whole path "
                        "on data built here: PRESET=demo python train_gpt.py")
    return paths


def check_ids(ids, vocab_size, where):
    if len(ids) and ids.max() >= vocab_size:
        raise DataError(f"{where}: token id {ids.max()} is outside VOCAB_SIZE={vocab_size}: set DATA_PATH "
                        "and TOKENIZER_PATH that belong together")
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
            tokens = read_shard(path)  # anew: reading an older map of a file that shrank would be SIGBUS
            if len(tokens) != size:
                raise DataError(f"{path}: {len(tokens)} tokens instead of {size} in mid-run: restore the "
                                "shard")
            start = at - (end - size)
            parts.append(check_ids(tokens[start:start + wanted], self.vocab_size, path))
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
            raise DataError(f"TOKENIZER_PATH={tokenizer_path}: cannot be read as a SentencePiece model "
                            f"({str(error).splitlines()[0]}): see README, section Data") from None
        self.model, self.vocab_size = model, model.vocab_size()
        ids = range(self.vocab_size)
        self.silent = np.array([model.is_control(i) or model.is_unknown(i) or model.is_unused(i)
                                for i in ids])
        self.is_byte = np.array([model.is_byte(i) for i in ids])
        pieces = ["" if self.silent[i] else "x" if self.is_byte[i] else model.id_to_piece(i) for i in ids]
        self.spaced = np.array([piece.startswith("▁") for piece in pieces])
        text = [piece.removeprefix("▁").replace("▁", " ") for piece in pieces]
        self.base = np.array([len(t.encode()) for t in text], np.uint16)

    def count(self, prev_ids, target_ids):
        """Bytes (same shape, uint16) of targets given the tokens before them."""
        prev_ids, target_ids = np.asarray(prev_ids), np.asarray(target_ids)
        return self.base[target_ids] + (self.spaced[target_ids] & ~self.silent[prev_ids])

    def check(self, ids):
        """Compare with the decoded text of `ids`, run by run between silent pieces. Raises DataError."""
        ids = np.asarray(ids, np.int64)
        start = int(np.argmin(self.is_byte[ids]))  # not inside a character
        edges = sorted({start, *np.flatnonzero(self.silent[ids]).tolist(), len(ids)})
        plain = np.flatnonzero(~self.silent & ~self.spaced & ~self.is_byte & (self.base > 0))
        # SentencePiece drops spaces at the start of a text: each run is decoded behind a piece without any.
        anchor = plain[:1].tolist() or [self.model.piece_to_id("<0x41>")]
        for left, right in zip(edges, edges[1:]):
            run = ids[left + 1:right].tolist()
            while right == len(ids) and run and self.is_byte[run[-1]]:  # the slice may end inside a character
                run.pop()
            if not run:
                continue
            counted = int(self.count(ids[left:left + len(run)], run).sum())
            decoded = self.model.decode(anchor + run)[len(self.model.decode(anchor)):].replace("▁", " ")
            length = len(decoded.encode()) - (self.spaced[run[0]] and self.silent[ids[left]])
            if length != counted:
                raise DataError(f"bytes per token are wrong for {decoded[:60]!r}: counted {counted}, decoded "
                                f"{length}: use the tokenizer that made these shards, with a piece for a "
                                "space")


class ValStream:
    """Validation tokens (n + 1,), bytes (n,) of the n targets, and the fingerprint of the split."""

    def __init__(self, tokens, token_bytes):
        self.tokens, self.num_targets, self.token_bytes = tokens, len(tokens) - 1, token_bytes
        parts = [slice(i, i + (1 << 20)) for i in range(0, self.num_targets, 1 << 20)]
        self.bytes = np.concatenate([token_bytes.count(tokens[:-1][part], tokens[1:][part])
                                     for part in parts])
        total = int(self.bytes.sum(dtype=np.int64))
        canonical = (token_bytes.vocab_size == 1024 and self.num_targets == CANONICAL_TARGETS
                     and CANONICAL_BYTES[0] <= total <= CANONICAL_BYTES[1])
        self.scope = "canonical" if canonical else "proxy"
        self.fingerprint = dict(val_tokens=len(tokens), val_targets=self.num_targets, val_bytes=total,
                                val_documents=int((tokens == BOS).sum()),
                                bytes_per_token=total / self.num_targets,
                                val_sha256=hashlib.sha256(tokens.tobytes()).hexdigest(), scope=self.scope)

    @classmethod
    def load(cls, config, token_bytes):
        """The shards' tokens, trimmed to whole windows as the official script does. Raises DataError."""
        tokens = np.concatenate([read_shard(path) for path in find_shards(config, "val")])
        check_ids(tokens, config.vocab_size, f"{config.data_path}/fineweb_val_*.bin")
        targets = (len(tokens) - 1) // config.eval_seq_len * config.eval_seq_len
        if targets == 0:
            raise DataError(f"{config.data_path}: {len(tokens)} validation tokens are less than one window "
                            f"of EVAL_SEQ_LEN={config.eval_seq_len}: lower it or get the whole split")
        token_bytes.check(tokens[:100_000])
        return cls(tokens[:targets + 1], token_bytes)

    def replaced(self, tokens):
        """The same stream with other tokens (the audit's twin runs)."""
        return ValStream(tokens, self.token_bytes)


def load_token_bytes(config, expected_sha256=""):
    """TokenBytes of config's tokenizer after its checks. Raises DataError."""
    token_bytes, where = TokenBytes(config.tokenizer_path), f"TOKENIZER_PATH={config.tokenizer_path}"
    if token_bytes.vocab_size != config.vocab_size:
        raise DataError(f"{where} has {token_bytes.vocab_size} pieces, but the model's VOCAB_SIZE is "
                        f"{config.vocab_size}: set the one that matches")
    if expected_sha256 and sha256_file(config.tokenizer_path) != expected_sha256:
        raise DataError(f"{where} is not the tokenizer this artifact was trained with (sha256 "
                        f"{expected_sha256[:16]}… expected): set TOKENIZER_PATH to that one")
    return token_bytes


def english_of(path):
    """Paragraphs (a list) of the docstrings and other long texts in one Python file, in source order."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source) if '"""' in source or "'''" in source else ast.Module([], [])
    except (OSError, ValueError, SyntaxError, RecursionError):
        return []
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    english = [text for text in texts if len(text) > 160 and text.count(" ") > len(text) / 12]
    return [paragraph for text in english for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text))]


def demo_texts():
    """(train, val) lists of one text per module: the English of the installed Python libraries."""
    site, stdlib = Path(torch.__file__).parent.parent, Path(sysconfig.get_paths()["stdlib"])
    paths, seen, texts = [], set(), ([], [])
    for root in (stdlib, *(site / name for name in ("torch", "numpy", "sentencepiece", "zstandard"))):
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
        raise DataError(f"the demo's data cannot be built in {data} and {tokenizer.parent}: "
                        f"{error.strerror}: run in a writable directory") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        splits = ["val"] if config.eval_only else ["train", "val"]
        if tokenizer.exists() and all(any(data.glob(f"fineweb_{split}_*.bin")) for split in splits):
            return
        begin = time.monotonic()
        log("demo_data: reading the English of the installed Python libraries (once, under a minute)")
        texts = dict(zip(("train", "val"), demo_texts()))
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts["train"] for line in text.split("\n") if line.strip()),
            model_writer=model, vocab_size=config.vocab_size, model_type="bpe", byte_fallback=True,
            split_digits=True, normalization_rule_name="nmt_nfkc", add_dummy_prefix=False,
            character_coverage=0.999, pad_id=0, bos_id=BOS, eos_id=2, unk_id=3, minloglevel=2)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        write_atomic(tokenizer, [model.getvalue()])
        for split, documents in texts.items():
            ids = processor.encode(documents, num_threads=2)
            tokens = np.concatenate([np.array([BOS, *document]) for document in ids])
            write_shard(data / f"fineweb_{split}_000000.bin", tokens)
            log(f"demo_data: {split} {sum(len(t.encode()) for t in documents)} bytes, {len(documents)} "
                f"documents, {time.monotonic() - begin:.1f} s")


# ============================================================================================================
# Model
# The trunk of #1170/#1232, then the refiners in a fixed order: TTT-Linear, FlowRefiner, NativeFlowMatcher.
# `forward` is the loss of `logits(hidden(ids))`; there is no second copy of the trunk. Whatever changes
# during a run is a 0-d tensor.
# ============================================================================================================
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
                qi, gi = (x[at, :, :, low:high].flatten(2, 3) for x in (q, grad))  # (b, K, H/K * rows, d)
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


class HeadNorm(torch.autograd.Function):
    """RMSNorm over the last dimension times an optional gain (that broadcasts) times an optional rotation:
    what q and k go through. Written out since the composed operations cost more than the matrix products on a
    CPU.

    x (..., d), gain (H, 1) or None, cos and sin (T, 1, r/2) or None for a plain RMSNorm.
    """

    @staticmethod
    def forward(ctx, x, gain=None, cos=None, sin=None):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True,
                                        dtype=torch.promote_types(x.dtype, torch.float32))
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


NORM_EPS = 2.0 ** -23  # float32's epsilon, whatever the type in use


def rms_norm(x):
    return HeadNorm.apply(x)


def rotary(length, config, device):
    """cos, sin (T, 1, rope_dims/2), the same whatever length is in use."""
    inverse = config.rope_base ** (-torch.arange(0, config.rope_dims, 2, device=device) / config.rope_dims)
    angle = torch.arange(length, device=device)[:, None, None] * inverse
    return angle.cos(), angle.sin()


def rotate_(x, cos, sin):
    """Partial RoPE, in place, on the first dimensions of each head. x (B, T, H, d)."""
    half = cos.size(-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x[..., :half], x[..., half:2 * half]
    a_new = a * cos - b * sin
    x[..., half:2 * half] = a * sin + b * cos
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
        x, = ctx.saved_tensors
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
        ones = grad.new_ones(1, grad.shape[:-1].numel())  # a product sums over tokens faster than a reduction
        dmix = torch.cat([ones @ (grad * x).flatten(0, -2), ones @ (grad * x0).flatten(0, -2)]).to(mix.dtype)
        return grad * m[0], grad * m[1], dmix


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
        self.register_buffer("qat_scale", torch.ones(self.weight.size(0), 1, device=device), persistent=False)

    def effective_weight(self):
        if not self.bits or not self.training:
            return self.weight
        value = self.weight.detach()
        rounded = round_to_grid(value, self.qat_scale, self.bits) * self.qat_scale
        # w - w is exactly 0 and carries the straight-through gradient.
        return torch.lerp(value, rounded, self.qat_blend) + (self.weight - value)


class Linear(Quantizable, nn.Linear):
    def __init__(self, inputs, outputs, bias=False):
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x, scale=None):
        """`scale` (outputs, 1) or a number multiplies the weight: cheaper than scaling each output."""
        weight = self.effective_weight()
        return F.linear(x, weight if scale is None else weight * scale, self.bias)


class Embedding(Quantizable, nn.Embedding):
    def __init__(self, rows, width):
        super().__init__(rows, width, _weight=torch.zeros(rows, width))  # GPT.init_weights draws them

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
        self.attn_gate = Linear(dim, config.num_heads, bias=True) if config.gated_attention else None
        self.vr_lambda = nn.Parameter(torch.full((2,), 0.5)) if config.value_residual else None

    def forward(self, x, scale, out_scale, angles, v0, ve):
        """x (B, T, D) normalised, before the layer's scale; v0 layer 0's values or None; ve (B, T, K*d) value
        embedding or None; out_scale (D,) multiplies the output. Returns y, v."""
        c, (batch, length, _) = self.config, x.shape
        q = self.c_q(x, scale).view(batch, length, c.num_heads, c.head_dim)
        k = self.c_k(x, scale).view(batch, length, c.num_kv_heads, c.head_dim)
        v = self.c_v(x, scale)
        v = (v if ve is None else v + ve.to(v.dtype)).view(batch, length, c.num_kv_heads, c.head_dim)
        own = v
        if self.vr_lambda is not None:
            mix = self.vr_lambda.to(v.dtype)
            v = mix[0] * (own if v0 is None else v0) + mix[1] * own
        y = self.attend(HeadNorm.apply(q, self.q_gain[:, None], *angles), HeadNorm.apply(k, None, *angles), v)
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
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
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
        one = torch.ones((), device=x.device, dtype=self.gate.dtype)  # tau(1) is one row for all tokens
        return x + torch.sigmoid(self.gate).to(x.dtype) * self.velocity(x, one)

    def flow_loss(self, x, noise):
        """Mean squared error of the velocity at random times; x (B, T, D) detached, noise (B, T, D + 1)."""
        z, t = noise[..., :-1], torch.special.ndtr(noise[..., -1])  # the normal's own CDF makes t uniform
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
        q, k, v = (c(x).view(batch, length, self.heads, -1).transpose(1, 2)
                   for c in (self.c_q, self.c_k, self.c_v))
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
            unit, inverse = self.standardise(ki @ w + b)
            g = (unit * self.ln_gain - target[:, :, part]) * self.ln_gain
            g = inverse * (g - g.mean(-1, keepdim=True) - unit * (g * unit).mean(-1, keepdim=True))
            seen = (qi @ ki.mT + 1).tril()  # the 1 is the bias's share
            zq, _ = self.standardise(qi @ w + b - self.rate * (seen @ g))
            outputs.append(qi + zq * self.ln_gain + self.ln_bias)
            w = w - self.rate * (ki.mT @ g)
            b = b - self.rate * g.sum(-2, keepdim=True)
        return torch.cat(outputs, 2)

    @staticmethod
    def standardise(z):
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
        self.encoders = config.num_layers // 2
        self.skip_weights = nn.Parameter(torch.ones(self.encoders, config.model_dim))
        self.ve = ValueEmbedding(config) if config.ve_dim else None
        self.ttt = TTTLinear(config) if config.e2e_ttt_enabled else None
        self.flow = FlowRefiner(config) if config.flow_enabled else None
        self.nfm = NativeFlowMatcher(config) if config.nfm_enabled else None
        if not self.tok_emb.weight.is_meta:
            self.init_weights()
        if config.late_qat_threshold > 0:
            for name, module in self.quantizable():
                scheme = scheme_of(f"{name}.weight", module.weight.shape, config)
                if scheme.startswith("int"):
                    module.enable_qat(int(scheme[3:]))

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
        return [(name, module) for name, module in self.named_modules() if isinstance(module, Quantizable)]

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
            if 0 <= i - self.encoders < len(self.skip_weights):
                x = x + self.skip_weights[i - self.encoders].to(x.dtype) * skips.pop()
            late = i - (len(self.blocks) - len(ve))
            x, v = block(x, x0, angles, v0, ve[late] if late >= 0 else None)
            v0 = v if v0 is None else v0
            if i < self.encoders:
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
            loss = loss + self.config.nfm_loss_weight * self.nfm.flow_loss(flow_input.detach(), noise)
        return loss


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


# ============================================================================================================
# Optimisers
# Muon for the blocks' matrices, AdamW for the rest, both on gradients that are reduced first and clipped
# then. Parallel Muon shards what is expensive (Newton-Schulz and momentum) and hides its traffic behind the
# arithmetic.
# ============================================================================================================
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


def wide(matrix, like=None):
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

    def __init__(self, params, lr, momentum, weight_decay, ns_steps=5, dtype=torch.bfloat16, comm=None):
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.ns_steps, self.dtype, self.comm = ns_steps, dtype, comm or Comm()
        shapes = {}
        for param in params:
            shapes.setdefault(tuple(wide(param).shape), []).append(param)
        self.stacks = sorted(shapes.values(), key=lambda ps: -len(ps) * ps[0].numel())
        self.grads = [None] * len(self.stacks)
        self.buffers = [ps[0].new_zeros(self.share(ps), *wide(ps[0]).shape) for ps in self.stacks]
        self.factors = []  # (N / world, 1, 1): sqrt(max(1, rows / columns)) of this rank's matrices
        for params, buffer in zip(self.stacks, self.buffers):
            factors = self.stacked([p.new_full((1, 1), max(1, p.size(0) / p.size(1)) ** 0.5) for p in params])
            self.factors.append(factors[self.comm.rank * len(buffer):][:len(buffer)])

    def share(self, params):
        """Matrices per rank; the last ranks' shares are padded with zeros."""
        return -(-len(params) // self.comm.world)

    def stacked(self, tensors):
        missing = self.share(tensors) * self.comm.world - len(tensors)
        return torch.stack([*tensors, *[torch.zeros_like(tensors[0])] * missing])

    def launch(self):  # phase 1
        self.handles = []
        for i, params in enumerate(self.stacks):
            stack = self.stacked([wide(p.grad) for p in params])
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
            update = self.orthogonal_update(self.grads[i] * scale, self.buffers[i]).mul_(self.factors[i])
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
        torch._foreach_add_(params, [wide(u.to(p.dtype), p) for u, p in zip(full, params)], alpha=-self.lr)

    def state_dict(self):
        """Momentum of every matrix by shape, whatever the number of ranks; all ranks must call it."""
        state = {}
        for params, buffer in zip(self.stacks, self.buffers):
            full = buffer
            if self.comm.world > 1:
                full = buffer.new_empty(len(buffer) * self.comm.world, *buffer.shape[1:])
                self.comm.all_gather(full, buffer).wait()
            state["x".join(map(str, buffer.shape[1:]))] = full[:len(params)].clone()
        return state

    def load_state_dict(self, state):
        for buffer in self.buffers:
            full = state["x".join(map(str, buffer.shape[1:]))].to(buffer.device)
            low = self.comm.rank * len(buffer)
            part = full[low:low + len(buffer)]
            buffer.zero_()[:len(part)].copy_(part)


def parameter_groups(model):
    """{"muon" | "embed" | "scalar": {name: parameter}}, every parameter in exactly one."""
    groups = {"muon": {}, "embed": {}, "scalar": {}}
    embeddings = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    for name, param in model.named_parameters():
        block_matrix = re.fullmatch(r"blocks\.\d+\.(attn\.(c_[qkv]|proj)|mlp\.(fc|proj))\.weight", name)
        groups["muon" if block_matrix else "embed" if name in embeddings else "scalar"][name] = param
    return groups


def build_optimizers(model, config, comm=None):
    """(Muon, AdamW) over all parameters of `model`; asserts by name that each is in exactly one group."""
    groups = parameter_groups(model)
    muon = Muon(groups["muon"].values(), config.matrix_lr, config.muon_momentum, config.weight_decay,
                config.muon_ns_steps, getattr(torch, config.dtype), comm)
    adamw = torch.optim.AdamW(
        [dict(params=list(groups["embed"].values()), base_lr=config.embed_lr),
         dict(params=list(groups["scalar"].values()), base_lr=config.scalar_lr)],
        lr=config.scalar_lr, betas=(config.beta1, config.beta2), eps=config.adam_eps,
        weight_decay=config.weight_decay, fused=True)
    held = [p for stack in muon.stacks for p in stack] + [p for g in adamw.param_groups for p in g["params"]]
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
    done = min(1.0, step / config.muon_momentum_warmup_steps) if config.muon_momentum_warmup_steps else 1.0
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
        if self.swa and scale < self.config.swa_start_scale and (step + 1) % self.config.swa_every == 0:
            torch._foreach_add_(self.swa, self.ema or [p.detach() for p in self.params])
            self.snapshots += 1

    def exported(self):
        """(what it is, tensors): snapshots' mean, else the EMA, else the raw weights."""
        kind = "EMA weights" if self.ema else "raw weights"
        if self.snapshots:
            kind = f"mean of {self.snapshots} snapshots of the {kind}"
            return kind, [total / self.snapshots for total in self.swa]
        if self.swa:
            kind += (f"; warning: SWA took no snapshot (SWA_EVERY={self.config.swa_every}, "
                     f"SWA_START_SCALE={self.config.swa_start_scale})")
        return kind, self.ema or [p.detach() for p in self.params]

    def state_dict(self):
        return dict(ema=self.ema, swa=self.swa, snapshots=self.snapshots)

    @torch.no_grad()
    def load_state_dict(self, state):
        for mine, saved in ((self.ema, state["ema"]), (self.swa, state["swa"])):
            for target, value in zip(mine, saved, strict=True):
                target.copy_(value)
        self.snapshots = state["snapshots"]


# ============================================================================================================
# Compression
# Per-row symmetric integers with GPTQ-lite clips, then a general compressor. The container is plain data with
# a checksum: its reader believes nothing it has not compared with what the architecture must contain, and
# allocates nothing before.
# ============================================================================================================
CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
CONTROL = ("scale", "scales", "resid_mix", "q_gain", "skip_weights", "gate", "vr_lambda")
HALF_LIMIT = 65_536  # tensors up to this many elements stay float16
ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGolf\r\n\x1a", 1
# magic, version, compressor, raw bytes, compressed bytes, sha256
ARTIFACT_HEAD = struct.Struct("<8sBB2xQQ32s")
COMPRESSORS = ("zstd", "lzma")
MAX_RAW_BYTES, MAX_HEADER_BYTES = 96 << 20, 1 << 20
ITEM_TYPES = {"int5": np.int8, "int6": np.int8, "int8": np.int8, "fp16": np.float16, "fp32": np.float32}


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
    largest = w.abs().topk(min(columns, int((columns - 1) * (1 - CLIP_QUANTILES[0])) + 2), dim=1).values
    best = None
    for quantile in CLIP_QUANTILES:
        # linear interpolation between order statistics, from the largest
        place = (columns - 1) * (1 - quantile)
        low = min(int(place), largest.size(1) - 1)
        high = min(low + 1, largest.size(1) - 1)
        clip = torch.lerp(largest[:, low], largest[:, high], place - int(place))[:, None]
        # The floor is float16's smallest number: an epsilon, so that rows of zeros stay zeros.
        scale = (clip / top).clamp(min=2.0 ** -24, max=65504.0).half()
        codes = round_to_grid(w, scale.float(), bits)
        error = (codes * scale.float() - w).square().sum(1, keepdim=True)
        if best is not None:
            better = error < best[0]
            error, codes, scale = (torch.where(better, new, old)
                                   for new, old in zip((error, codes, scale), best))
        best = error, codes, scale
    return best[1].to(torch.int8), best[2]


def encode_tensor(tensor, scheme):
    """[codes or values, scales or nothing] as bytes."""
    if scheme.startswith("int"):
        return [t.cpu().numpy().tobytes() for t in quantize_rows(tensor, int(scheme[3:]))]
    return tensor.detach().float().cpu().numpy().astype(ITEM_TYPES[scheme]).tobytes(), b""


def pack_artifact(config, state_dict, int5_layers=(), tokenizer_sha256="", cache=None):
    """The artifact's bytes: fixed head, then one compressed payload of a JSON header and the tensors
    grouped by kind.

    The MLPs of `int5_layers` are stored in 5 bits; `cache` (a dict) keeps encoded tensors between calls.
    """
    cache, table = {} if cache is None else cache, []
    for name, tensor in state_dict.items():
        scheme = scheme_of(name, tensor.shape, config, int5_layers)
        if (name, scheme) not in cache:
            cache[name, scheme] = encode_tensor(tensor, scheme)
        table.append([name, list(tensor.shape), scheme])
    table.sort(key=lambda row: list(ITEM_TYPES).index(row[2]))
    header = json.dumps(dict(config=config.as_dict("arch", "eval"), tokenizer_sha256=tokenizer_sha256,
                             tensors=table)).encode()
    codes, scales = zip(*(cache[name, scheme] for name, _, scheme in table))
    raw = b"".join([struct.pack("<I", len(header)), header, *codes, *scales])
    if config.compressor == "zstd":
        body = zstandard.ZstdCompressor(level=config.zstd_level).compress(raw)
    else:
        body = lzma.compress(raw, preset=config.lzma_preset)
    head = ARTIFACT_HEAD.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, COMPRESSORS.index(config.compressor),
                              len(raw), len(body), hashlib.sha256(body).digest())
    return head + body


def fit_budget(config, state_dict, code_bytes, tokenizer_sha256="", log=lambda line: None):
    """(artifact, int5 layers): MLP layers drop to int5 from the middle outward until code + model fit
    BUDGET_BYTES.

    Raises ArtifactError when even that does not fit.
    """
    middle, cache, layers = (config.num_layers - 1) / 2, {}, []
    order = sorted(range(config.num_layers), key=lambda i: (abs(i - middle), -i))
    while True:
        blob = pack_artifact(config, state_dict, tuple(layers), tokenizer_sha256, cache)
        over = len(blob) + code_bytes - config.budget_bytes
        if over <= 0:
            return blob, layers
        if len(layers) == len(order):
            raise ArtifactError(f"the artifact is {over} bytes over BUDGET_BYTES={config.budget_bytes} with "
                                "every MLP in int5: train a smaller model (MLP_MULT, NUM_LAYERS)")
        layers.append(order[len(layers)])
        log(f"budget: {over} bytes over, MLP of layer {layers[-1]} to int5")


def decompress(body, compressor, size):
    """Exactly `size` bytes, or ArtifactError; never allocates more than that."""
    raw, whole = b"", True
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


def unpack_artifact(blob):
    """(Config, float32 state_dict) of an artifact's bytes. Runs no code of the file; any damage or
    hostility raises ArtifactError before anything of a size the architecture does not have is allocated."""
    config, table, raw, at, _ = read_artifact(blob)
    scales_at = at + sum(math.prod(shape) * ITEM_TYPES[scheme]().itemsize for _, shape, scheme in table)
    state, parts = {}, []
    for name, shape, scheme in table:  # look at everything before the first float32 tensor is made
        rows = math.prod(shape[:-1]) if scheme.startswith("int") else 0
        values = np.frombuffer(raw, ITEM_TYPES[scheme], math.prod(shape), at)
        scales = np.frombuffer(raw, np.float16, rows, scales_at)
        at, scales_at = at + values.nbytes, scales_at + scales.nbytes
        top = 2 ** (int(scheme[3:]) - 1) - 1 if rows else math.inf
        good = all(np.isfinite(x).all() for x in (values, scales)) and (scales > 0).all()
        if not good or values.max(initial=0) > top or values.min(initial=0) < -top:
            raise ArtifactError(f"artifact: {name}: codes, scales or values are outside {scheme}")
        parts.append((values, scales))
    for (name, shape, _), (values, scales) in zip(table, parts):
        values = values.astype(np.float32)
        if len(scales):
            values = values.reshape(len(scales), -1) * scales.astype(np.float32)[:, None]
        state[name] = torch.from_numpy(values.reshape(shape))
    return config, state


def read_artifact(blob):
    """(Config, [(name, shape, scheme)], raw payload, offset of tensors, tokenizer sha256), all checked."""
    if len(blob) < ARTIFACT_HEAD.size:
        raise ArtifactError(f"artifact: {len(blob)} bytes are less than its head: truncated or not an "
                            "artifact")
    magic, version, compressor, raw_size, size, digest = ARTIFACT_HEAD.unpack_from(blob)
    body = memoryview(blob)[ARTIFACT_HEAD.size:]
    for holds, wrong in [
            (magic == ARTIFACT_MAGIC, "magic bytes are not ours: not an artifact"),
            (version == ARTIFACT_VERSION, f"version {version} is not {ARTIFACT_VERSION}"),
            (compressor < len(COMPRESSORS), f"compressor {compressor} is unknown"),
            (blob[10:12] == b"\0\0", "reserved bytes are not zero"),
            (size == len(body), f"{len(body)} bytes of payload, its head promises {size}: truncated or "
                                "trailing bytes"),
            (4 <= raw_size <= MAX_RAW_BYTES, f"raw size {raw_size} is outside 4…{MAX_RAW_BYTES}"),
            (hashlib.sha256(body).digest() == digest, "checksum does not match: damaged")]:
        if not holds:
            raise ArtifactError(f"artifact: {wrong}")
    raw = decompress(body, COMPRESSORS[compressor], raw_size)
    end = 4 + struct.unpack_from("<I", raw)[0]
    if end > min(MAX_HEADER_BYTES, raw_size):
        raise ArtifactError(f"artifact: header of {end - 4} bytes does not fit")
    try:
        header = json.loads(raw[4:end])
        config = Config(**header["config"])
        whole = header["config"].keys() == config.as_dict("arch", "eval").keys()
        if not whole or header.keys() != {"config", "tokenizer_sha256", "tensors"}:
            raise ConfigError("settings are missing or foreign")
        if type(header["tokenizer_sha256"]) is not str:
            raise TypeError("tokenizer_sha256")
        table = [(name, tuple(shape), scheme) for name, shape, scheme in header["tensors"]]
        check_table(config, table, raw_size - end)
    except ArtifactError:
        raise
    except Exception as error:  # a stranger's JSON may hold anything
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise ArtifactError(f"artifact: its header is not valid ({what})") from None
    return config, table, raw, end, header["tokenizer_sha256"]


def check_table(config, table, data_bytes):
    """Names and shapes must be the architecture's, schemes known, sizes add up. Raises ArtifactError."""
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in GPT(config).state_dict().items()}
    found = {name: shape for name, shape, _ in table}
    if len(found) != len(table) or found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))[:3]
        raise ArtifactError(f"artifact: tensors differ from its architecture's, or appear twice: {wrong}")
    total = 0
    for name, shape, scheme in table:
        integers = isinstance(scheme, str) and scheme.startswith("int")
        known = scheme in ITEM_TYPES and all(type(n) is int for n in shape)
        if not known or (integers and len(shape) < 2):
            raise ArtifactError(f"artifact: {name}: scheme {scheme!r} is unknown or does not fit")
        total += math.prod(shape) * ITEM_TYPES[scheme]().itemsize + 2 * math.prod(shape[:-1]) * integers
    if total != data_bytes:
        raise ArtifactError(f"artifact: tensors need {total} bytes, {data_bytes} are there")


# ============================================================================================================
# Evaluation
# One window plan, one meter, one scoring loop. Roundtrip, sliding window, test-time training and SLOT are
# that loop with other arguments: a flat list of work items (score these windows, train on this chunk) and a
# cursor, so that a killed evaluation goes on where it was.
# ============================================================================================================
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
            work += [("train", c * chunk, at, min(at + batch, rows), rate)
                     for _ in range(config.ttt_epochs) for at in range(0, rows, batch)]
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
            raise LegalityError(f"targets {first}…{end} come after {self.last}: out of order or twice")
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
def adapted(model, freeze_blocks):
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


class ScoresFile(Observer):
    """What SCORES_FILE shows a reviewer: the nll of every target (n,), in nats, as it was counted."""

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


class Evaluation:
    """One pass over a validation stream. `ttt` trains on scored chunks, `slot` shifts hidden states (see
    the README).

    state_path, if given, keeps the state (cursor, sums, coverage, adapted weights, momentum) for the same
    `identity`.
    """

    def __init__(self, model, stream, config, runtime, stride, ttt=False, slot="off", observer=None,
                 state_path=None, identity="", label=""):
        self.model, self.stream, self.config = model, stream, config
        self.runtime, self.comm, self.observer = runtime, runtime.comm, observer or Observer()
        self.slot, self.state_path, self.label = slot, state_path, label
        self.windows = plan_windows(stream.num_targets, config.eval_seq_len, stride)
        per_round = config.eval_batch_seqs * self.comm.world
        self.work = plan_work(self.windows, stream.num_targets, config, per_round, ttt)
        self.meter = Meter(stream.num_targets, runtime.device)
        text = stream.fingerprint["val_sha256"]
        self.identity = f"{identity}/{label}/{stride}/{ttt}/{slot}/{text}/{self.comm.world}"
        self.hidden, self.loss = runtime.compiled(model.hidden), runtime.compiled(model)
        self.cursor, self.seconds, self.ttt, self.sgd = 0, 0.0, ttt, None

    def run(self, last_target=None):
        """Score all targets (or until a window's first one passes last_target); returns a Score."""
        with adapted(self.model, self.config.ttt_freeze_blocks) as params:
            if self.ttt:
                self.sgd = torch.optim.SGD(params, self.config.ttt_lr, self.config.ttt_momentum)
            self.load()
            self.begun = self.saved = self.logged = time.monotonic() - self.seconds
            first = self.cursor
            while self.cursor < len(self.work):
                kind, *item = self.work[self.cursor]
                if last_target is not None and kind == "score" and self.windows[item[0]][1] > last_target:
                    break
                self.observer.before_item(self, (kind, *item))
                self.score(*item) if kind == "score" else self.train(*item)
                self.observer.after_item(self, (kind, *item))
                self.cursor += 1
                self.pause(first)
            return self.result(complete=last_target is None)

    def pause(self, first):
        """Between items: show progress, save the state when due, stop when wanted (all ranks together)."""
        runtime, every, now = self.runtime, self.config.eval_checkpoint_seconds, time.monotonic()
        self.seconds, more = now - self.begun, self.cursor < len(self.work)
        due = more and runtime.is_main and bool(self.state_path) and 0 < every < now - self.saved
        stop, save = self.comm.agree(more and runtime.wants_stop(), due)
        quiet, shown = now - self.logged, self.label and runtime.is_main and self.meter.bytes
        if shown and quiet > (1 if sys.stdout.isatty() else 15):  # reading the sum makes the device wait
            bpb = bits_per_byte(float(self.meter.nll), self.meter.bytes)
            left = (len(self.work) - self.cursor) * self.seconds / max(1, self.cursor - first)
            text = (f"{self.label}_progress {self.cursor}/{len(self.work)} tokens:{self.meter.tokens} "
                    f"running_bpb:{bpb:.4f} eta:{left:.0f}s")
            runtime.progress(text)
            if quiet > 15:
                self.logged = now
                runtime.log(text)
        if (stop or save) and self.state_path:
            self.save()
        if stop:
            raise Stopped(f"in {self.label or 'validation'} at item {self.cursor}/{len(self.work)}")

    def halving(self, run, size):
        """run(size) in parts of at most `size` rows; after an out-of-memory error again with half of it."""
        while True:
            size = min(size, self.runtime.batch_seqs or size)
            try:
                return run(size)
            except OUT_OF_MEMORY:
                if size == 1:
                    raise ResourceError("out of memory with one window per batch: lower EVAL_SEQ_LEN or use "
                                        "a larger device") from None
                self.runtime.batch_seqs = size // 2
                self.runtime.log(f"out_of_memory: evaluation batch halved to {size // 2} windows")
            torch.cuda.empty_cache()

    def score(self, low, high):
        """Score this rank's share of windows[low:high]."""
        size = self.config.eval_batch_seqs
        mine = self.windows[low:high][self.comm.rank * size:][:size]
        nll = self.halving(lambda part: [x for i in range(0, len(mine), part)
                                         for x in self.nll(mine[i:i + part], part)], size)
        for (_, first, end), value in zip(mine, nll):
            self.meter.add(first, end, value, int(self.stream.bytes[first:end].sum(dtype=np.int64)))

    def batch(self, starts, length):
        """ids and targets (n, length) of windows at `starts`, on the device."""
        tokens = self.runtime.to_device(np.stack([self.stream.tokens[at:at + length + 1] for at in starts]))
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
        places = [np.arange(i * length + first - start, (i + 1) * length)
                  for i, (start, first, _) in enumerate(windows)]
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
            known[i, :first - start if causal else end - start] = 1
        rows = len(targets) if causal else 1
        shift = torch.zeros(rows, 1, hidden.size(-1), device=hidden.device, requires_grad=True)
        adamw = torch.optim.AdamW([shift], lr=self.config.slot_lr)
        count = known.sum(1).clamp(min=1) if causal else known.sum()
        for _ in range(self.config.slot_steps):
            with torch.enable_grad():
                logits = self.model.logits(hidden.detach() + shift)
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
                total = ((loss.view_as(known) * known).sum(1) / count).sum()  # windows share no gradient
            shift.grad, = torch.autograd.grad(total, shift)
            adamw.step()
        return shift.detach()

    def train(self, first, row_low, row_high, rate):
        """One SGD step on rows [row_low, row_high) of the chunk at target `first`; all of them are scored."""
        length, comm = self.config.eval_seq_len, self.comm
        starts = [first + row * length for row in range(row_low, row_high)][comm.rank::comm.world]
        params = self.sgd.param_groups[0]["params"]

        def run(part):
            for param in params:
                param.grad = torch.zeros_like(param)
            for i in range(0, len(starts), part):
                ids, targets = self.batch(starts[i:i + part], length)
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
            raise LegalityError(f"targets were scored {coverage.min()}…{coverage.max()} times instead of "
                                "once")
        if not math.isfinite(nats):
            raise ArtifactError(f"{self.label or 'validation'}: the score is not finite: the weights are "
                                "damaged")
        return Score(self.label, nats / max(tokens, 1), bits_per_byte(nats, max(num_bytes, 1)), int(tokens),
                     int(num_bytes), time.monotonic() - self.begun, self.slot != "published")

    def all_coverage(self):
        total = torch.from_numpy(self.meter.coverage.copy())
        if self.comm.world > 1:
            dist.all_reduce(total)
        return total.numpy()

    def save(self):
        state = dict(identity=self.identity, cursor=self.cursor, seconds=self.seconds,
                     rows=torch.from_numpy(self.comm.gather_rows(self.meter.row())),
                     coverage=torch.from_numpy(np.packbits(self.all_coverage())))
        if self.ttt:
            state.update(model=self.model.state_dict(), sgd=self.sgd.state_dict())
        begin = time.monotonic()
        if self.runtime.is_main:
            save_tensors(self.state_path, state)
        self.comm.barrier()
        self.saved = time.monotonic()
        self.runtime.save_seconds = self.saved - begin
        self.runtime.log(f"evaluation_saved {self.label} item:{self.cursor}/{len(self.work)}")

    def load(self):
        """Go on from a saved state of the same evaluation, if there is one."""
        if not self.state_path or not Path(self.state_path).exists():
            return
        try:
            state = load_tensors(self.state_path)
            if state["identity"] != self.identity:
                raise ArtifactError(f"{self.state_path} belongs to another evaluation")
        except ArtifactError as error:
            return self.runtime.log(f"warning: {error}; this evaluation starts at its beginning")
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


# ============================================================================================================
# Legality
# The four conditions of issue #1017, checked on the functions that produce the score: the checks only change
# tokens and look at what the scoring loop shows an Observer. Comparisons are bit for bit.
# ============================================================================================================
class Recorder(Observer):
    """Keeps what one evaluation showed: nll by target, log-probabilities of `keep` targets, state hashes."""

    def __init__(self, num_targets, keep=(), hash_state=False):
        self.nll, self.times, self.total = torch.zeros(num_targets), np.zeros(num_targets, np.int64), 0.0
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
            scored = evaluation.all_coverage()[item[1]:end].all()
            upcoming = [i for i in evaluation.work[evaluation.cursor + 1:] if i[0] == "score"][:1]
            self.trained_ahead |= not scored or any(end > windows[low][1] for _, low, _ in upcoming)

    def after_item(self, evaluation, item):
        self.sums.append(float(evaluation.meter.nll))
        if item[0] == "score" and self.hash_state:
            self.score_changed_state |= state_hash(evaluation) != self.state_entering[self.order[-1]]


def state_hash(evaluation):
    """SHA-256 over parameters, buffers and optimiser state of an evaluation."""
    digest = hashlib.sha256()
    momenta = [t for s in evaluation.sgd.state.values() for t in s.values()] if evaluation.sgd else []
    for tensor in (*evaluation.model.parameters(), *evaluation.model.buffers(), *momenta):
        if isinstance(tensor, torch.Tensor):
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Audit:
    """Runs the checks; `checks` is the list of (name, passed, detail)."""

    def __init__(self, model, stream, config, runtime):
        self.model, self.config, self.runtime, self.checks = model, config, runtime, []
        length, stride, batch = config.eval_seq_len, config.eval_stride, config.eval_batch_seqs
        # Scoring alone is checked on a few batches, test-time training on two chunks.
        self.short, self.long = (stream.replaced(stream.tokens[:min(stream.num_targets, targets) + 1])
                                 for targets in (length + 3 * batch * stride, 2 * config.ttt_chunk_tokens))
        self.random = np.random.default_rng(config.seed)

    def run(self, stream, ttt=False, last_target=None, **options):
        recorder = Recorder(stream.num_targets, **options)
        evaluation = Evaluation(self.model, stream, self.config, self.runtime, self.config.eval_stride, ttt,
                                self.config.slot, recorder)
        evaluation.run(last_target)
        return recorder, evaluation

    def check(self, name, passed, detail):
        """Record a check; it passes when it passes on every rank."""
        passed = self.runtime.comm.agree(not passed)[0] == 0
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
        n, length, stride = self.short.num_targets, self.config.eval_seq_len, self.config.eval_stride
        batch_end = length + stride * (self.config.eval_batch_seqs - 1)
        wanted = {1, length - 1, length, length + 1, length + stride, batch_end, batch_end + 1, n - 1}
        return sorted({k for k in wanted if 0 < k < n} | set(self.random.integers(1, n, 4).tolist()))

    def causality(self):
        places, ahead, own = self.edges(), [], []
        base, _ = self.run(self.short, keep=places)
        for k in places:
            recorder, _ = self.run(self.changed(self.short, k + 1), last_target=k)
            ahead += [k] if not torch.equal(recorder.nll[:k], base.nll[:k]) else []
        self.check("C1 future_flip", not ahead,
                   f"{len(places)} places, tokens after each replaced; differ: {ahead[:5]}")
        for t in places[:: max(1, len(places) // 6)]:
            recorder, _ = self.run(self.changed(self.short, t + 1, t + 2), last_target=t, keep=[t])
            found = recorder.keep[t]
            own += [t] if found and not torch.equal(found[0], base.keep[t][0]) else []
        self.check("C1 own_token", not own,
                   f"log-probabilities at t do not depend on token t; differ: {own[:5]}")

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
        self.check("C1 bos_resets", passed, "the state at BOS does not depend on the token before it")

    def normalisation(self):
        short, vocab = self.short, self.config.vocab_size
        recorder, evaluation = self.run(short, keep=self.random.integers(0, short.num_targets, 64))
        found = {t: row for t, row in recorder.keep.items() if row}
        worst = max((abs(float(torch.logsumexp(lp.double(), 0))) for lp, _ in found.values()), default=0.0)
        whole = all(torch.isfinite(lp).all() and len(lp) == vocab for lp, _ in found.values())
        self.check("C2 normalised", whole and worst < 1e-4,
                   f"{len(found)} positions, worst |logsumexp| {worst:.2e}")
        entries = all(-float(lp[int(short.tokens[t + 1])]) == nll for t, (lp, nll) in found.items())
        counted, _, num_bytes, _ = evaluation.meter.row()
        entries &= math.isclose(counted, recorder.total, rel_tol=1e-9)
        entries &= num_bytes == int(short.bytes[recorder.times > 0].sum(dtype=np.int64))
        self.check("C2 nll_is_entry", entries,
                   "the counted nll is minus the log-probabilities, the bytes the targets'")

    def order(self):
        ttt, chunk = self.config.ttt_enabled, self.config.ttt_chunk_tokens
        stream = self.long if ttt else self.short
        edge = chunk if ttt and stream.num_targets > chunk else stream.num_targets // 2
        base, evaluation = self.run(stream, ttt, hash_state=True)
        self.check("C3 state_unchanged", not base.score_changed_state,
                   "weights, buffers, optimiser around scoring")
        self.check("C3 trained_is_scored", not base.trained_ahead,
                   "each trained token precedes the next to be scored")
        twin, _ = self.run(self.changed(stream, edge + 1), ttt, hash_state=True)
        same = torch.equal(twin.nll[:edge], base.nll[:edge])
        same &= all(state == twin.state_entering.get(first)
                    for first, state in base.state_entering.items() if first <= edge)
        self.check("C3 twin_run", same, f"targets from {edge} on replaced: earlier scores and state the same")
        seen = self.runtime.comm.gather_rows(base.times).sum(0)
        once = ((evaluation.all_coverage() == 1) & (seen == 1)).all()  # by the meter, and as seen here
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


# ============================================================================================================
# Training
# Steps, checkpoints, resume. Nothing random is drawn from hidden state: noise is a function of (seed, step,
# sequence) and tokens of the step, so a checkpoint holds no generator and a resumed run is the uninterrupted
# one bit for bit.
# ============================================================================================================
class Saver:
    """Writes checkpoints on a thread: training waits only for the copy of its state. Keeps the last two."""

    def __init__(self, runtime):
        self.runtime, self.folder, self.thread, self.error = runtime, runtime.dir / "checkpoint", None, None

    def start(self, step, state):
        """`state` must be a private copy."""
        self.wait()
        self.error, self.thread = None, threading.Thread(target=self._write, args=(step, state))
        self.thread.start()

    def _write(self, step, state):
        begin = time.monotonic()
        try:
            size = save_tensors(self.folder / f"step_{step:08d}.pt", state)
            self.runtime.save_seconds = seconds = time.monotonic() - begin
            self.runtime.log(f"checkpoint_saved step:{step} seconds:{seconds:.2f} bytes:{size}")
            self.runtime.event("checkpoint", step=step, seconds=round(seconds, 3), bytes=size)
            for old in self.files()[:-2]:
                old.unlink()
        except Exception as error:
            self.error = error

    def wait(self):
        """Wait for the last write; a failed one is logged and kept in `error`."""
        if self.thread:
            self.thread.join()
            self.thread = None
            if self.error:
                self.runtime.log(f"warning: checkpoint not saved: {self.error}")

    def files(self):
        return sorted(self.folder.glob("step_*.pt"))

    def last(self):
        """Path of the last checkpoint that was written, or 'none'."""
        self.wait()
        return str(self.files()[-1]) if self.files() else "none"

    def newest(self):
        """(step, state) of the newest readable checkpoint, or (0, None)."""
        for path in reversed(self.files()):
            try:
                return int(path.stem[5:]), load_tensors(path)
            except ArtifactError as error:
                self.runtime.log(f"warning: {error}; using the checkpoint before it")
        return 0, None


def private_copy(tree):
    """A tree of tensors copied to the host."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: private_copy(value) for key, value in tree.items()}
    return [private_copy(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


class Trainer:
    """Model, optimisers, averages, data position and clock of one training run."""
    PARTS = ("model", "muon", "adamw", "average")  # what changes weights, each with a state_dict

    def __init__(self, config, runtime, val):
        self.config, self.runtime, self.val, self.comm = config, runtime, val, runtime.comm
        torch.manual_seed(config.seed)
        self.model = GPT(config, runtime.attend).to(runtime.device)
        self.muon, self.adamw = build_optimizers(self.model, config, self.comm)
        self.average = WeightAverage(self.model.parameters(), config)
        self.stream = TrainStream(find_shards(config, "train"), config.vocab_size)
        self.loss, self.saver = runtime.compiled(self.model), Saver(runtime)
        self.step, self.seconds, self.early, self.saved_step = 0, 0.0, False, 0
        sequences, world = config.train_batch_tokens // config.train_seq_len, self.comm.world
        if sequences % world:
            raise ConfigError(f"TRAIN_BATCH_TOKENS={config.train_batch_tokens} is {sequences} sequences, "
                              f"which {world} ranks cannot share evenly: change the batch or the number of "
                              "ranks")
        self.share = sequences // world
        most = min(self.share, config.micro_batch_tokens // config.train_seq_len)
        self.micro = max(n for n in range(1, most + 1) if self.share % n == 0)
        self.identity = dict(hash=config.hash(),
                             data=[int(self.stream.ends[-1]), val.fingerprint["val_sha256"]])

    def announce(self):
        log, c = self.runtime.log, self.config
        log(f"model_params:{sum(p.numel() for p in self.model.parameters())}")
        log(f"world_size:{self.comm.world} grad_accum_steps:{self.share // self.micro}")
        log(f"train_loader:dataset:{Path(c.data_path).name} train_shards:{len(self.stream.paths)}")
        if c.late_qat_threshold and not any(module.bits for _, module in self.model.quantizable()):
            log("warning: LATE_QAT_THRESHOLD has no effect: no matrix of this model is stored in integers")

    def run(self):
        """Train to the last step, the wallclock cap or a wish to stop; log, validate and save on the way."""
        self.load()
        self.warm_up()
        every = self.config.val_loss_every
        self.mark = self.checkpointed = time.monotonic()
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
            raise DataError(f"{error} (last checkpoint: {self.saver.last()})") from None
        self.saver.wait()

    def out_of_time(self):
        """Whether the next step is predicted to pass the wallclock cap."""
        cap = self.config.max_wallclock_seconds
        if cap and self.step and self.seconds * (1 + 1 / self.step) > cap:
            self.runtime.log(f"stopping_early: wallclock_cap train_time:{1000 * self.seconds:.0f}ms "
                             f"step:{self.step}/{self.config.iterations}")
            self.early = True
        return self.early

    def one_step(self):
        config, runtime, step = self.config, self.runtime, self.step
        scale = lr_scale(config, step, self.seconds)
        self.set_rates(scale)
        loss = self.accumulate(step, self.stream)
        now = time.monotonic()
        due = config.checkpoint_seconds and now - self.checkpointed > config.checkpoint_seconds
        loss, stop, due, elapsed = self.comm.agree(
            loss, runtime.wants_stop(2 * self.seconds / max(1, step)), runtime.is_main and bool(due),
            (now - self.mark) * runtime.is_main)
        self.mark = now
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

    def set_rates(self, scale):
        config = self.config
        self.muon.lr, self.muon.momentum = config.matrix_lr * scale, momentum_at(config, self.step)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * scale
        if config.late_qat_threshold:
            self.model.set_qat(float(scale < config.late_qat_threshold))

    def accumulate(self, step, stream):
        """Gradients of this rank's share of the step's span; returns its share of the mean loss."""
        config, runtime, length = self.config, self.runtime, self.config.train_seq_len
        first, rounds, total = self.comm.rank * self.share, self.share // self.micro, 0.0
        span = stream.take(config.train_batch_tokens, first * length, (first + self.share) * length)
        self.model.zero_grad()
        self.model.train()
        for low in range(0, self.share, self.micro):
            part = runtime.to_device(span[low * length:(low + self.micro) * length + 1])
            noise = flow_noise(config, step, first + low, self.micro, runtime.device)
            try:
                with runtime.autocast():
                    loss = self.loss(part[:-1].view(-1, length), part[1:].view(-1, length), noise)
                    loss = loss / (rounds * self.comm.world)
                loss.backward()
            except OUT_OF_MEMORY:
                smaller = max(self.micro * length // 2, length)
                raise ResourceError("out of memory in training with MICRO_BATCH_TOKENS="
                                    f"{config.micro_batch_tokens}: run the same command with "
                                    f"MICRO_BATCH_TOKENS={smaller}") from None
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
            self.runtime.event("step", step=step, train_loss=loss, train_time_ms=1000 * self.seconds,
                               lr_scale=scale)
        self.runtime.progress(f"{text} eta:{(config.iterations - step) * self.seconds / step:.0f}s")

    def validate(self):
        """Validation of the raw weights by non-overlapping windows; not counted as training time."""
        c, begin = self.config, time.monotonic()
        try:
            score = evaluate(self.model, self.val, c, self.runtime, c.eval_seq_len)
        except ArtifactError:
            self.diverged(math.nan)
        self.runtime.log(f"step:{self.step}/{c.iterations} val_loss:{score.val_loss:.4f} "
                         f"val_bpb:{score.val_bpb:.4f} {self.clock()}")
        self.runtime.event("val", step=self.step, val_loss=score.val_loss, val_bpb=score.val_bpb,
                           train_time_ms=1000 * self.seconds)
        self.mark += time.monotonic() - begin

    def warm_up(self):
        """Compile on synthetic tokens, then restore weights and optimisers bit for bit."""
        steps, config = self.config.warmup_steps, self.config
        if not self.runtime.compiling or not steps or self.step >= config.iterations:
            return
        before = private_copy(self.training_state())
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, config.train_batch_tokens + 1)
        synthetic = types.SimpleNamespace(take=lambda span, low, high: tokens[low:high + 1])
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
            return self.runtime.log(f"warning: no checkpoint at step {self.step}: weights are not finite")
        state, self.saved_step = self.training_state(), self.step
        if self.runtime.is_main:
            state.update(self.identity, step=self.step, seconds=self.seconds, position=self.stream.position)
            self.saver.start(self.step, private_copy(state))
        self.checkpointed = time.monotonic()
        if wait:
            self.saver.wait()
            if self.saver.error:
                raise ResourceError(str(self.saver.error))
            self.comm.barrier()  # a rank that left now would have the launcher end the one that writes

    def load(self):
        """Go on from the newest readable checkpoint; all ranks read the one that rank 0 found."""
        step, state = self.saver.newest() if self.runtime.is_main else (0, None)
        step = int(self.comm.agree(step)[0])
        if not step:
            return
        path = self.saver.folder / f"step_{step:08d}.pt"
        state = state or load_tensors(path)
        if any(state[name] != value for name, value in self.identity.items()):
            raise ConfigError(f"{path} belongs to other settings or data: set another RUN_ID or RESUME=never")
        self.restore(state)
        self.step, self.seconds, self.stream.position = step, state["seconds"], state["position"]
        self.runtime.log(f"resumed_from:{path} step:{step}")

    def diverged(self, loss):
        """Save the weights that met the bad loss if they are finite themselves, and stop."""
        self.save(wait=True)
        raise DivergedError(f"loss is {loss} at step {self.step + 1}: lower the learning rates; last good "
                            f"weights: {self.saver.last()}")

    def export(self):
        """{"config", "state_dict", "info"} of the weights to pack: the averages named by Config."""
        kind, tensors = self.average.exported()
        state = dict(self.model.state_dict())
        state.update((name, t) for (name, _), t in zip(self.model.named_parameters(), tensors, strict=True))
        info = dict(steps=self.step, train_time_s=self.seconds,
                    step_avg_ms=1000 * self.seconds / max(1, self.step),
                    stopped_early=self.early, peak_mib=self.runtime.peak_mib()[0])
        self.runtime.log(f"export:{kind}")
        return dict(config=self.config.as_dict("arch", "eval"), state_dict=private_copy(state), info=info)


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


# ============================================================================================================
# main
# A run is a list of phases, each of which leaves a file: a rerun does what is missing and says what it found.
# ============================================================================================================
ARTIFACT_NAME, FLOAT_NAME = "final_model.int6.ptz", "final_model.pt"


def load_weights(path):
    """(Config, state_dict, tokenizer sha256) of an artifact or a float checkpoint. Raises ArtifactError."""
    try:
        with open(path, "rb") as file:
            head = file.read(len(ARTIFACT_MAGIC))
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}: {READABLE}") from None
    if head == ARTIFACT_MAGIC:
        blob = Path(path).read_bytes()
        try:
            return *unpack_artifact(blob), read_artifact(blob)[4]
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}: {OTHER_FILE}") from None
    if not str(path).endswith(".pt"):
        raise ArtifactError(f"{path}: does not start like an artifact: damaged, or of another submission: "
                            f"{OTHER_FILE}")
    saved = load_tensors(path)
    try:
        return Config(**saved["config"]), saved["state_dict"], ""
    except (KeyError, TypeError, ConfigError) as error:
        raise ArtifactError(f"{path}: not the final weights of a run ({error}): name {FLOAT_NAME} or "
                            f"{ARTIFACT_NAME}") from None


def score_label(config):
    """Name of the last score: what adapts, and whether that is legal; empty if nothing adapts."""
    legal = "illegal" if config.slot == "published" else "legal" if config.ttt_enabled else ""
    slot = f"slot_{config.slot}" if config.slot != "off" else ""
    return "_".join(filter(None, (legal, "ttt" * config.ttt_enabled, slot)))


class Run:
    """The phases of one run in RUN_DIR."""

    def __init__(self, config, runtime):
        self.config, self.runtime, self.log, self.path = config, runtime, runtime.log, Path(config.run_dir)
        self.weights = self.path / FLOAT_NAME
        self.source = Path(config.eval_only or self.path / ARTIFACT_NAME)
        self.model, self.results = None, {"scores": {}}

    def holds(self, test):
        """What test() says on rank 0, the one that is sure to see what it wrote."""
        return self.runtime.comm.agree(self.runtime.is_main and test())[0] > 0

    def done(self, phase, test):
        """Whether a phase has left its result already, by test() on rank 0."""
        done = self.holds(test)
        if done:
            self.log(f"phase_done:{phase} found in {self.path}")
        return done

    def prepare(self):
        """Load the data, compare with the run in RUN_DIR, log and write what a rerun needs to agree on."""
        config, log, path = self.config, self.log, self.path / "config.json"
        if config.resume == "must" and not self.holds(path.exists):
            raise ConfigError(f"RESUME=must, but {self.path} holds no run: check RUN_ID, or use RESUME=auto")
        if config.preset == "demo" and config.data_path == PRESETS["demo"]["data_path"]:
            if self.runtime.is_main:
                build_demo_data(config, log)
            self.runtime.comm.barrier()
        if not config.eval_only:
            find_shards(config, "train")
        tokenizer_sha256 = load_weights(config.eval_only)[2] if config.eval_only else ""
        self.val = ValStream.load(config, load_token_bytes(config, tokenizer_sha256))
        f, differs = self.val.fingerprint, config.differences()
        if self.runtime.is_main:
            run = dict(preset=config.preset, hash=config.hash(), val_sha256=f["val_sha256"],
                       config=config.as_dict(), differs=differs)
            if path.exists():
                self.take_up(json.loads(path.read_text()), run)
            write_json(path, run)
            (self.path / "STOPPED").unlink(missing_ok=True)
        self.write_manifest()
        for name, value in config.as_dict().items():
            log(f"config:{name}={value}{' *' if name in differs else ''}")
        log(f"config_hash:{config.hash()}")
        log(f"attention:{self.runtime.attention_choice}")
        log(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={config.tokenizer_path}")
        log(f"val_loader:shards pattern={config.data_path}/fineweb_val_*.bin tokens:{f['val_targets']}")
        log(f"data_fingerprint tokens:{f['val_tokens']} targets:{f['val_targets']} bytes:{f['val_bytes']} "
            f"bytes_per_token:{f['bytes_per_token']:.4f} documents:{f['val_documents']} "
            f"sha256:{f['val_sha256']} score_scope:{f['scope']}")
        log(f"seed:{config.seed}")
        steps = [int(path.stem[5:]) for path in (self.path / "checkpoint").glob("step_*.pt")]
        self.runtime.event("start", resumed_step=max(steps, default=0))

    def take_up(self, old, new):
        """Go on with the scores of an earlier run. Raises ConfigError when it had other settings or data."""
        names = ["eval_only", *self.config.as_dict("arch", "train", "eval")]
        before, now = ({name: run["config"].get(name) for name in names} for run in (old, new))
        before["validation"], now["validation"] = old.get("val_sha256"), new["val_sha256"]
        differ = "; ".join(f"{name.upper()}: {before[name]!r} -> {value!r}"
                           for name, value in now.items() if before[name] != value)
        if differ:
            raise ConfigError(f"{self.path} holds a run of other settings or data: {differ}: use the same to "
                              "resume it, set another RUN_ID, or RESUME=never to keep it aside")
        with contextlib.suppress(FileNotFoundError):
            self.results = json.loads((self.path / "scores.json").read_text())

    def write_manifest(self):
        if not self.runtime.is_main:
            return
        config, device, artifact = self.config, self.runtime.device, self.source.exists()
        manifest = dict(
            python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
            sentencepiece=sentencepiece.__version__, zstandard=zstandard.__version__, device=str(device),
            device_name=device_name(device), world_size=self.runtime.comm.world,
            torch_threads=torch.get_num_threads(), config_hash=config.hash(),
            code_sha256=sha256_file(CODE_PATH), code_bytes=CODE_PATH.stat().st_size,
            artifact_sha256=sha256_file(self.source) if artifact else None,
            artifact_bytes=self.source.stat().st_size if artifact else None,
            tokenizer_sha256=sha256_file(config.tokenizer_path),
            data=dict(train_shards=len(list(Path(config.data_path).glob("fineweb_train_*.bin"))),
                      **self.val.fingerprint))
        self.log(f"manifest:{json.dumps(manifest)}")
        write_json(self.path / "manifest.json", manifest)

    def train(self):
        if not self.done("train", self.weights.exists):
            train(self.config, self.runtime, self.val, self.weights)

    def pack(self):
        """Quantise, fit the budget, write the artifact, log the sizes."""
        if self.done("pack", self.source.exists):
            return
        code, log, config = CODE_PATH.stat().st_size, self.log, self.config
        weights = load_tensors(self.weights)["state_dict"]
        self.runtime.stop_if_wanted("packing", 3 + 2e-6 * sum(t.numel() for t in weights.values()))
        if self.runtime.is_main:
            blob, layers = fit_budget(config, weights, code, sha256_file(config.tokenizer_path), log)
            write_atomic(self.source, [blob])
            total = len(blob) + code
            log(f"Code size: {code} bytes")
            log(f"Serialized model int6+{config.compressor}: {len(blob)} bytes")
            log(f"Total submission size int6+{config.compressor}: {total} bytes")
            log(f"headroom: {config.budget_bytes - total} bytes")
            self.runtime.event("packed", artifact_bytes=len(blob), code_bytes=code, total_bytes=total,
                               headroom_bytes=config.budget_bytes - total, int5_layers=layers)
        self.runtime.comm.barrier()
        self.write_manifest()

    def model_of(self, path):
        """The model with the weights of a file; one object for all scores, so that it is compiled once."""
        if self.model is None:  # rounding in training has no place here
            quiet = dataclasses.replace(self.config, late_qat_threshold=0.0)
            self.model = GPT(quiet, self.runtime.attend).to(self.runtime.device)
        self.model.load_state_dict(load_weights(path)[1])
        return self.model

    def audit(self):
        """Write audit.json; raises LegalityError when a check fails."""
        config, path, begin = self.config, self.path / "audit.json", time.monotonic()
        if not self.holds(self.source.exists):
            raise ConfigError(f"MODE=audit: {self.source} does not exist: set EVAL_ONLY=path")
        seal = f"{sha256_file(self.source)}/{config.hash()}"

        def passed_before():
            old = json.loads(path.read_text()) if path.exists() and config.mode == "train" else {}
            return old.get("seal") == seal and old["passed"]

        if self.done("audit", passed_before):
            return
        self.runtime.stop_if_wanted("the audit", 30)
        checks = audit(self.model_of(self.source), self.val, config, self.runtime)
        failed, seconds = [c["name"] for c in checks if not c["passed"]], time.monotonic() - begin
        if self.runtime.is_main:
            write_json(path, dict(passed=not failed, seal=seal, seconds=seconds, checks=checks))
        self.runtime.event("audit", passed=not failed)
        self.log(f"audit {'FAIL' if failed else 'pass'} {len(checks)} checks in {seconds:.1f} s")
        if failed:
            raise LegalityError(f"the audit failed: {', '.join(failed)}: the score is not legal")

    def score(self):
        """Every score that is configured and missing, from the files that were written."""
        c, source, scores = self.config, self.source, self.results["scores"]
        prefix = "float" if source.suffix == ".pt" else "final_int6"
        jobs = [] if c.eval_only else [("pre_quant", self.weights, c.eval_seq_len, False, "off")]
        jobs += [(f"{prefix}_roundtrip", source, c.eval_seq_len, False, "off"),
                 (f"{prefix}_sliding_window", source, c.eval_stride, False, "off")]
        if score_label(c):
            jobs.append((score_label(c), source, c.eval_stride, c.ttt_enabled, c.slot))
        for label, path, stride, ttt, slot in jobs:
            # A scores file needs every target of one pass: it takes up no earlier one, whole or in part.
            observer = ScoresFile(self.val.num_targets) if c.scores_file else None
            state_path = None if observer else self.path / "checkpoint" / f"eval_{label}.pt"
            if observer or not self.done(label, lambda: label in scores):
                score = evaluate(self.model_of(path), self.val, c, self.runtime, stride, ttt=ttt, slot=slot,
                                 observer=observer, label=label, state_path=state_path,
                                 identity=f"{sha256_file(path)}/{c.hash()}")
                self.record(score, stride)
                if observer:
                    observer.write(c.scores_file.replace("{label}", label), self.runtime)
        if self.runtime.is_main:
            self.write_results(finished=True)
            self.summarise()
        self.runtime.event("done")
        self.log(f"run_finished {self.path}")

    def record(self, score, stride):
        """Log a score and add it to scores.json."""
        log, name, mark = self.log, score.label, "" if score.legal else " legality:illegal"
        at = f" stride:{stride}" if name.endswith("sliding_window") else ""
        log(f"{name} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f}{at} "
            f"eval_time:{1000 * score.seconds:.0f}ms{mark}")
        log(f"{name}_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}{mark}")
        log(f"score_scope:{self.val.scope}")
        entry = dict(val_loss=score.val_loss, val_bpb=score.val_bpb, tokens=score.tokens, bytes=score.bytes,
                     eval_time_s=score.seconds, legal=score.legal)
        self.runtime.event("score", label=name, scope=self.val.scope, **entry)
        self.results["scores"][name] = entry
        if self.runtime.is_main:
            self.write_results(finished=False)

    def write_results(self, finished):
        """scores.json: what training and scoring measured; manifest.json has the rest."""
        code, size = CODE_PATH.stat().st_size, self.source.stat().st_size
        info = {} if self.config.eval_only else load_tensors(self.weights)["info"]
        self.results.update(info, finished=finished, seed=self.config.seed, preset=self.config.preset,
                            artifact_bytes=size, code_bytes=code, total_bytes=size + code)
        write_json(self.path / "scores.json", self.results)

    def summarise(self):
        """What happened and what to try next, in plain words."""
        c, r, log = self.config, self.results, self.log
        for label, s in r["scores"].items():
            log(f"result {label} val_bpb:{s['val_bpb']:.8f} legal:{int(s['legal'])} "
                f"score_scope:{self.val.scope}")
        if c.preset == "demo":
            text = self.val.token_bytes.model.decode(self.val.tokens.astype(int).tolist()).encode()
            for name, packed in (("gzip -9", gzip.compress(text, 9)), ("xz -6", lzma.compress(text))):
                log(f"baseline {name} bpb:{8 * len(packed) / len(text):.4f} on the same {len(text)} bytes of "
                    "text")
        if not c.eval_only:
            log(f"summary: trained {r['steps']} steps in {r['train_time_s']:.0f} s; artifact "
                f"{r['artifact_bytes']} bytes + code {r['code_bytes']} = {r['total_bytes']} of "
                f"{c.budget_bytes}.")
        best = min((s["val_bpb"], label) for label, s in r["scores"].items() if s["legal"])
        log(f"summary: best legal score {best[0]:.4f} bits per byte ({best[1]}); files are in {self.path}.")
        log("next: AUDIT=1 proves the score legal; EVAL_ONLY=artifact.ptz verifies it; more ITERATIONS or a "
            "larger MODEL_DIM lower the score; PRESET=nfm_7k is the submission.")


@contextlib.contextmanager
def reported_errors(runtime):
    """Log what stops a run, once and with the rank, and end the process with its exit code."""
    rank = f"[rank {runtime.comm.rank}] " * (runtime.comm.world > 1)
    try:
        yield
    except Stopped as stop:
        if runtime.is_main:
            with contextlib.suppress(OSError):
                (runtime.dir / "STOPPED").write_text(f"{stop}\n")
        runtime.log(f"stopped signal:{runtime.stop_signal} phase:{stop}; run the same command again to go on")
        runtime.event("stopped", signal=runtime.stop_signal, phase=str(stop))
        with contextlib.suppress(RuntimeError):
            runtime.comm.barrier()  # all ranks leave together
        leave(runtime, stop.code)
    except BaseException as error:
        code, message, shown = 1, f"{type(error).__name__}: {error}", traceback.format_exc()
        if isinstance(error, GolfError):
            code, message, shown = error.code, str(error), f"error: {error}"
        runtime.event("error", code=code, message=message)
        runtime.append(runtime.log_file, f"error: {message}")
        print("\n".join(f"{rank}{line}" for line in shown.splitlines()), file=sys.stderr, flush=True)
        leave(runtime, code)


def leave(runtime, code):
    """Exit now: with several ranks, tearing down a process group whose peers may be gone can hang."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    if runtime.comm.world > 1:
        os._exit(code)
    sys.exit(code)


def main():
    """Read the configuration, build the runtime, train or load, pack, audit, score."""
    if "--help" in sys.argv or "-h" in sys.argv:
        return print(help_text())
    if set(sys.argv[1:]) - {"--print-config"}:
        raise ConfigError(f"unknown arguments {sys.argv[1:]}: settings are environment variables, see --help")
    config = Config.from_env(os.environ)
    if config.eval_only:
        config = config.adopt(load_weights(config.eval_only)[0])
    if "--print-config" in sys.argv:
        return print("\n".join(f"{name.upper()}={value}" for name, value in config.as_dict().items()))
    runtime = Runtime(config, os.environ)
    runtime.watch_signals()
    with reported_errors(runtime):
        run = Run(config, runtime)
        run.prepare()
        if not config.eval_only and config.mode == "train":
            run.train()
            run.pack()
        if config.audit or config.mode == "audit":
            run.audit()
        if config.mode == "train":
            run.score()
        runtime.close()


if __name__ == "__main__":
    try:
        main()
    except GolfError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or error.code)
