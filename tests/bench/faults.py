"""Faults of one line, put into train_gpt.py one at a time: which of them do the tests catch?

    python tests/bench/faults.py --out faults.json            # all rooms; hours on one core
    python tests/bench/faults.py --out faults.json --rooms Data Model
    python tests/bench/faults.py --check                      # each fault applies and compiles
    python tests/bench/faults.py --out faults.json --report   # the table, without running anything
    python tests/bench/faults.py --repo OTHER --out other.json --through "nice -n 19"

Works in a copy of the repository. A fault is put in, the tests of its room run until the first
failure, and the fault is taken out. --out keeps each outcome, so that the same command goes on
where it was stopped. Tests that fail without any fault, and slow ones, count for nothing.
"""

import argparse
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
QUICK = 0.5  # seconds; the quicker tests run first
SLOWER = 3  # times as long as without a fault, and a minute: then the tests hang, which is caught
# Tests of each room, cheapest first; files that a version lacks are left out.
TESTS = {
    "Data": ["data", "shuffle", "odd_data", "bad_input", "demo"],
    "Model": ["model", "refiners", "records", "frontier", "published"],
    "Optimisers": ["optimisers", "training", "distributed"],
    "Training": ["training", "optimisers", "frontier", "distributed", "resume", "log"],
    "Evaluation": ["evaluation", "legality", "distributed", "resume", "main", "log"],
    "Quantisation": ["quantisation", "compression", "quantiser", "main", "log"],
    "main": ["main", "log", "bad_input", "runtime", "resume", "faults", "evaluation", "legality"],
}


class Fault(NamedTuple):
    """One fault: of its pairs (old text, new text) exactly one applies to a version of the code."""

    name: str
    room: str
    pairs: tuple


def fault(room, name, *texts):
    """Fault of texts old, new, old, new …: the pairs for different versions."""
    return Fault(name, room, tuple(zip(texts[::2], texts[1::2])))


def injected(source, fault):
    """The source with the fault in it. Raises ValueError unless exactly one pair applies once."""
    counts = [source.count(old) for old, _ in fault.pairs]
    if sorted(counts)[-1] != 1 or sum(counts) != 1:
        raise ValueError(f"{fault.name}: its old texts stand at {counts} places, not at one")
    old, new = fault.pairs[counts.index(1)]
    return source.replace(old, new)


DATA = [
    fault("Data", "header of 255 words", "SHARD_HEADER = 256", "SHARD_HEADER = 255"),
    fault(
        "Data",
        "big-endian tokens",
        'np.memmap(path, "<u2", "r", HEADER_BYTES',
        'np.memmap(path, ">u2", "r", HEADER_BYTES',
    ),
    fault(
        "Data",
        "size of a shard unchecked",
        "if num_tokens <= 0 or size != expected_size:",
        "if num_tokens <= 0:",
    ),
    fault(
        "Data", "id equal to the vocabulary", "ids.max() >= vocab_size", "ids.max() > vocab_size"
    ),
    fault(
        "Data",
        "sequences step over their last target",
        "at = first * self.seq_len % self.num_tokens",
        "at = first * (self.seq_len + 1) % self.num_tokens",
        "at = (self.position + low) % int(self.ends[-1])",
        "at = (self.position + low + 1) % int(self.ends[-1])",
    ),
    fault(
        "Data",
        "ring jumps a shard's end",
        'np.searchsorted(self.ends, at, side="right")',
        'np.searchsorted(self.ends, at, side="left")',
    ),
    fault(
        "Data",
        "shuffle: the same order in each pass",
        "np.random.default_rng([self.seed, number])",
        "np.random.default_rng([self.seed, 0])",
    ),
    fault(
        "Data",
        "shuffle: seed ignored",
        "np.random.default_rng([self.seed, number])",
        "np.random.default_rng([0, number])",
    ),
    fault(
        "Data",
        "shuffle: no room for the last target",
        "(sizes - 1 - self.phases) // self.seq_len",
        "(sizes - self.phases) // self.seq_len",
    ),
    fault(
        "Data",
        "shuffle: sequences counted from the next shard",
        "(picks - self.before[shards]) * self.seq_len",
        "(picks - self.counted[shards]) * self.seq_len",
        "index -= int(self.counted[shard - 1])",
        "index -= int(self.counted[shard])",
    ),
    fault(
        "Data",
        "space counted after BOS",
        "self.spaced[target_ids] & ~self.is_boundary[prev_ids]",
        "self.spaced[target_ids]",
    ),
    fault("Data", "byte piece of two bytes", "self.base[i] = 1\n", "self.base[i] = 2\n"),
    fault(
        "Data",
        "characters instead of bytes",
        'len(piece.removeprefix("▁").replace("▁", " ").encode())',
        'len(piece.removeprefix("▁").replace("▁", " "))',
        "self.base[i] = len(text.encode())",
        "self.base[i] = len(text)",
    ),
    fault(
        "Data",
        "control pieces have bytes",
        "model.is_control(i) or model.is_unknown(i) or model.is_unused(i)",
        "model.is_unknown(i) or model.is_unused(i)",
    ),
    fault(
        "Data",
        "bytes summed in 16 bits",
        "total = int(self.bytes.sum(dtype=np.int64))",
        "total = int(self.bytes.sum(dtype=np.uint16))",
    ),
    fault(
        "Data",
        "bytes of the previous token",
        "token_bytes.count(tokens[low:high], tokens[low + 1 : high + 1])",
        "token_bytes.count(tokens[low + 1 : high + 1], tokens[low:high])",
    ),
    fault(
        "Data",
        "last target trimmed",
        "tokens[: windows * config.eval_seq_len + 1]",
        "tokens[: windows * config.eval_seq_len]",
    ),
    fault(
        "Data",
        "any tokenizer is the artifact's",
        "if expected_sha256 and sha256_file(config.tokenizer_path) != expected_sha256:",
        "if False:",
    ),
    fault(
        "Data",
        "a proxy called canonical",
        "has_the_targets and low <= total <= high else",
        "has_the_targets or low <= total <= high else",
        "if self.num_targets != targets or not low <= total_bytes <= high:",
        "if self.num_targets != targets and not low <= total_bytes <= high:",
    ),
]

MODEL = [
    fault(
        "Model",
        "attention sees all",
        "is_causal=True, enable_gqa=grouped)\n    return y.transpose(1, 2)\n\n\ndef flash_first",
        "is_causal=False, enable_gqa=grouped)\n    return y.transpose(1, 2)\n\n\ndef flash_first",
        "return fused(q, k, v, 0.0, True)[0]",
        "return fused(q, k, v, 0.0, False)[0]",
    ),
    fault(
        "Model",
        "rotary frequencies inverted",
        "config.rope_base ** (-even / config.rope_dims)",
        "config.rope_base ** (even / config.rope_dims)",
    ),
    fault("Model", "rotation is a reflection", "a * cos - b * sin", "a * cos + b * sin"),
    fault(
        "Model",
        "gradient rotated forward",
        "rotate_(dx, cos, -sin)",
        "rotate_(dx, cos, sin)",
        "rotate_(slope, cos, -sin)",
        "rotate_(slope, cos, sin)",
    ),
    fault(
        "Model",
        "deeper layers louder",
        "torch.tensor((layer + 1) ** -0.5)",
        "torch.tensor((layer + 1) ** 0.5)",
        "self.norm_scale = (layer + 1) ** -0.5",
        "self.norm_scale = (layer + 1) ** 0.5",
    ),
    fault(
        "Model",
        "own value added",
        "torch.addcmul(grouped, along, v, value=-1)",
        "torch.addcmul(grouped, along, v, value=1)",
    ),
    fault(
        "Model",
        "XSA in a layer less",
        "layer >= config.num_layers - config.xsa_last_n",
        "layer > config.num_layers - config.xsa_last_n",
    ),
    fault(
        "Model",
        "no gain of queries",
        "RMSNorm.apply(q, self.q_gain[:, None], cos, sin)",
        "RMSNorm.apply(q, None, cos, sin)",
        "gain = self.q_gain[:, None]",
        "gain = None",
    ),
    fault(
        "Model",
        "value residual swapped",
        "mix[0] * (v if v_first is None else v_first) + mix[1] * v",
        "mix[1] * (v if v_first is None else v_first) + mix[0] * v",
        "mix[0] * first + mix[1] * own",
        "mix[1] * first + mix[0] * own",
    ),
    fault(
        "Model",
        "gate without sigmoid",
        "y * torch.sigmoid(gate).unsqueeze(-1)",
        "y * gate.unsqueeze(-1)",
    ),
    fault(
        "Model",
        "MLP not leaky",
        "F.leaky_relu(self.fc(x, scale), 0.5).square()",
        "F.leaky_relu(self.fc(x, scale), 0.0).square()",
        "F.leaky_relu(x, 0.5).square()",
        "F.leaky_relu(x, 0.0).square()",
    ),
    fault(
        "Model",
        "residual mix swapped",
        "torch.addcmul(x * mix[0], x0, mix[1])",
        "torch.addcmul(x * mix[1], x0, mix[0])",
    ),
    fault(
        "Model",
        "parallel MLP sees attention",
        "normed if self.parallel else rms_norm(x)",
        "rms_norm(x)",
        "normed[:, -n:] if self.parallel else rms_norm(x)",
        "rms_norm(x)",
    ),
    fault(
        "Model",
        "bigram hash swapped",
        "torch.bitwise_xor(36313 * t[:, 1:], 27191 * t[:, :-1])",
        "torch.bitwise_xor(36313 * t[:, :-1], 27191 * t[:, 1:])",
        "own = 36313 * t[:, 1:]",
        "own = 27191 * t[:, 1:]",
    ),
    fault("Model", "first bigram row", "(1, 0), value=last)", "(1, 0), value=0)"),
    fault("Model", "smear crosses documents", "inside = (ids != BOS)", "inside = (ids != -1)"),
    fault(
        "Model",
        "smear adds instead of mixing",
        "torch.sigmoid(self.gate).to(x.dtype) * (predecessors(x, ids) - x)",
        "torch.sigmoid(self.gate).to(x.dtype) * predecessors(x, ids)",
        "opening(self.gate, x) * (before - x)",
        "opening(self.gate, x) * before",
    ),
    fault(
        "Model",
        "value embedding in the first layers",
        "range(config.num_layers - config.ve_last_n, config.num_layers)",
        "range(config.ve_last_n)",
    ),
    fault(
        "Model",
        "FlowRefiner without residual",
        "z = z + self.proj(F.gelu(self.fc(z)))",
        "z = self.proj(F.gelu(self.fc(z)))",
    ),
    fault(
        "Model",
        "flow line reversed",
        "x_t = (1 - along) * z + along * x",
        "x_t = (1 - along) * x + along * z",
    ),
    fault("Model", "flow velocity reversed", "velocity - (x - z)", "velocity - (z - x)"),
    fault(
        "Model",
        "flow loss teaches the trunk",
        "self.nfm.flow_loss(flow_input.detach(), noise_keys)",
        "self.nfm.flow_loss(flow_input, noise_keys)",
    ),
    fault("Model", "noise too narrow", "math.sqrt(2) * torch.erfinv(", "torch.erfinv("),
    fault(
        "Model",
        "TTT-Linear sees all",
        "(q_part @ k_part.mT + 1).tril()",
        "(q_part @ k_part.mT + 1)",
    ),
    fault(
        "Model",
        "TTT-Linear unlearns",
        "w = w - self.rate * (k_part.mT @ gradient)",
        "w = w + self.rate * (k_part.mT @ gradient)",
    ),
    fault(
        "Model",
        "LayerNorm's Jacobian cut",
        "inverse * (g - mean - unit * along)",
        "inverse * (g - mean)",
    ),
    fault("Model", "skips in encoder order", "skips.pop()", "skips.pop(0)"),
    fault(
        "Model",
        "skip gate reversed",
        "torch.lerp(weight * skip, x, gate)",
        "torch.lerp(x, weight * skip, gate)",
        "torch.lerp(weight * skip, x, opening(",
        "torch.lerp(x, weight * skip, opening(",
    ),
    fault(
        "Model",
        "no soft cap",
        "return cap * torch.tanh(raw)",
        "return cap * raw",
    ),
    fault(
        "Model",
        "a loop less",
        "layers[config.loop_start : after] * (config.num_loops + 1)",
        "layers[config.loop_start : after] * config.num_loops",
    ),
    fault(
        "Model",
        "weight of the flow loss ignored",
        "loss + weight * self.nfm.flow_loss(",
        "loss + self.nfm.flow_loss(",
    ),
    fault(
        "Model",
        "late QAT stops the gradient",
        "torch.lerp(value, rounded, self.qat_blend) + (self.weight - value)",
        "torch.lerp(value, rounded, self.qat_blend)",
    ),
    fault(
        "Model",
        "LayerNorm by the sum of squares",
        "centred.square().mean(-1, keepdim=True)",
        "centred.square().sum(-1, keepdim=True)",
    ),
]

OPTIMISERS = [
    fault(
        "Optimisers",
        "sign of a coefficient",
        "NEWTON_SCHULZ_B = -4.7750",
        "NEWTON_SCHULZ_B = 4.7750",
    ),
    fault(
        "Optimisers",
        "stack normalised as one",
        "x.norm(dim=(-2, -1), keepdim=True)",
        "x.norm()",
    ),
    fault(
        "Optimisers",
        "no Nesterov",
        "ahead = grad.add(buffer, alpha=self.momentum)",
        "ahead = buffer.clone()",
    ),
    fault(
        "Optimisers",
        "gradient damped in the momentum",
        "buffer.mul_(self.momentum).add_(grad)",
        "buffer.mul_(self.momentum).add_(grad, alpha=1 - self.momentum)",
    ),
    fault(
        "Optimisers",
        "factor of the other shape",
        "(rows / columns) ** 0.5",
        "(columns / rows) ** 0.5",
        "max(1, rows / columns) ** 0.5",
        "max(1, columns / rows) ** 0.5",
    ),
    fault(
        "Optimisers",
        "decay without the rate",
        "1 - self.lr * self.weight_decay",
        "1 - self.weight_decay",
    ),
    fault(
        "Optimisers",
        "columns of equal norm",
        "((ahead[:num_wide], -1), (ahead[num_wide:], -2))",
        "((ahead[:num_wide], -2), (ahead[num_wide:], -1))",
        "((wide, -1), (tall, -2))",
        "((wide, -2), (tall, -1))",
    ),
    fault("Optimisers", "tables in the scalar group", 'group = "embed"', 'group = "scalar"'),
    fault(
        "Optimisers",
        "EMBED_WD=0 ignored",
        "config.embed_wd >= 0",
        "config.embed_wd > 0",
        "return common if own < 0 else own",
        "return common if own <= 0 else own",
    ),
    fault(
        "Optimisers",
        "betas swapped",
        "betas=(config.beta1, config.beta2)",
        "betas=(config.beta2, config.beta1)",
    ),
    fault(
        "Optimisers",
        "small gradients blown up",
        "(clip / (norm + 1e-6)).clamp(max=1.0)",
        "(clip / (norm + 1e-6))",
    ),
    fault(
        "Optimisers",
        "clip by Muon's norm alone",
        "(squared + squared_norm(grads)).sqrt()",
        "squared.sqrt()",
    ),
    fault(
        "Optimisers",
        "clip by one rank's norm",
        "comm.all_reduce(squared).wait()",
        "pass",
    ),
    fault("Optimisers", "MIN_LR ignored", "return max(left, config.min_lr)", "return left"),
    fault(
        "Optimisers",
        "warmdown a step late",
        "steps_left = config.iterations - step\n",
        "steps_left = config.iterations - step + 1\n",
        "left = (config.iterations - step) / warmdown",
        "left = (config.iterations - step + 1) / warmdown",
    ),
    fault(
        "Optimisers",
        "cosine upside down",
        "left = 0.5 * (1 - math.cos(math.pi * left))",
        "left = 0.5 * (1 + math.cos(math.pi * left))",
    ),
    fault(
        "Optimisers",
        "momentum warmed backward",
        "(1 - done) * config.muon_momentum_warmup_start + done * config.muon_momentum",
        "done * config.muon_momentum_warmup_start + (1 - done) * config.muon_momentum",
    ),
    fault(
        "Optimisers",
        "average of the newest",
        "torch._foreach_lerp_(self.ema, self.params, 1 - decay)",
        "torch._foreach_lerp_(self.ema, self.params, decay)",
        "torch._foreach_lerp_(self.ema, self.raw(), 1 - decay)",
        "torch._foreach_lerp_(self.ema, self.raw(), decay)",
        "torch._foreach_lerp_(self.ema, self.raw(), 1 - self.decay)",
        "torch._foreach_lerp_(self.ema, self.raw(), self.decay)",
    ),
    fault(
        "Optimisers",
        "snapshots a step early",
        "(step + 1) % self.config.swa_every == 0",
        "step % self.config.swa_every == 0",
        "(step + 1) % config.swa_every == 0",
        "step % config.swa_every == 0",
    ),
    fault(
        "Optimisers",
        "sum of the snapshots",
        "[total / self.snapshots for total in self.swa]",
        "[total for total in self.swa]",
    ),
    fault(
        "Optimisers",
        "share of the run by the slower clock",
        "fraction = max(fraction, seconds /",
        "fraction = min(fraction, seconds /",
    ),
    fault(
        "Optimisers",
        "momentum not restored",
        "buffer[: len(part)].copy_(part)",
        "pass",
    ),
    fault(
        "Optimisers",
        "padding sent to the wrong rank",
        "first = self.comm.rank * len(buffer)",
        "first = 0",
    ),
]

TRAINING = [
    fault(
        "Training",
        "ranks read the same sequences",
        "first = (self.step * self.comm.world + self.comm.rank) * self.seqs_per_rank",
        "first = self.step * self.comm.world * self.seqs_per_rank",
        "first = self.comm.rank * self.seqs_per_rank  # this rank's first sequence in the step",
        "first = 0",
    ),
    fault(
        "Training",
        "each token its own target",
        "self.loss(tokens[:, :-1], tokens[:, 1:], noise)",
        "self.loss(tokens[:, :-1], tokens[:, :-1], noise)",
        "targets = tokens[:, 1:]  # (B, T)",
        "targets = tokens[:, :-1]  # (B, T)",
    ),
    fault(
        "Training",
        "sum over micro-batches",
        "(self.accumulation_steps * self.comm.world)",
        "self.comm.world",
    ),
    fault(
        "Training",
        "sum over ranks",
        "(self.accumulation_steps * self.comm.world)",
        "self.accumulation_steps",
    ),
    fault(
        "Training",
        "gradients of the step before",
        "        self.model.zero_grad()\n        self.model.train()",
        "        self.model.train()",
        "        self.model.zero_grad()\n        total = 0.0",
        "        total = 0.0",
    ),
    fault(
        "Training",
        "the same noise in each micro-batch",
        "config, step, first + low, self.micro_batch_seqs",
        "config, step, first, self.micro_batch_seqs",
    ),
    fault(
        "Training",
        "the same noise in each step",
        "config, step, first + low, self.micro_batch_seqs",
        "config, 0, first + low, self.micro_batch_seqs",
    ),
    fault(
        "Training",
        "clock lost at a resume",
        'self.seconds = state["seconds"]\n        self.step_seconds =',
        "self.step_seconds =",
        'self.seconds = state["seconds"]\n        self.timer.load',
        "self.timer.load",
    ),
    fault(
        "Training",
        "average not saved",
        'PARTS = ("model", "muon", "adamw", "average")',
        'PARTS = ("model", "muon", "adamw")',
    ),
    fault(
        "Training",
        "infinite loss goes on",
        "if not math.isfinite(loss):",
        "if math.isnan(loss):",
        "if not math.isfinite(facts.loss):",
        "if math.isnan(facts.loss):",
    ),
    fault(
        "Training",
        "cap passed by a step",
        "if self.seconds + max(mean, median) > cap:",
        "if self.seconds > cap:",
        "if self.seconds + step_seconds > cap:",
        "if self.seconds > cap:",
    ),
    fault(
        "Training",
        "AdamW's rate constant",
        'group["lr"] = group["base_lr"] * scale',
        'group["lr"] = group["base_lr"]',
    ),
    fault(
        "Training",
        "Muon's rate constant",
        "self.muon.lr = config.matrix_lr * scale",
        "self.muon.lr = config.matrix_lr",
    ),
    fault(
        "Training",
        "Muon's momentum constant",
        "self.muon.momentum = momentum_at(config, self.step)",
        "self.muon.momentum = config.muon_momentum",
    ),
    fault(
        "Training",
        "QAT early instead of late",
        "float(scale < config.late_qat_threshold)",
        "float(scale > config.late_qat_threshold)",
    ),
    fault(
        "Training",
        "loops before LOOP_AT",
        "fraction >= self.config.loop_at",
        "fraction < self.config.loop_at",
    ),
    fault(
        "Training",
        "CHECKPOINT_EVERY ignored",
        "if save or (every and self.step % every == 0):",
        "if save:",
        "if facts.save or (every and self.step % every == 0):",
        "if facts.save:",
    ),
    fault(
        "Training",
        "raw weights exported",
        "state.update(zip(names, tensors, strict=True))",
        "pass",
    ),
    fault(
        "Training",
        "pace of one step",
        "tokens = config.train_batch_tokens * len(recent)",
        "tokens = config.train_batch_tokens",
        "return sum(last) / len(last)",
        "return sum(last)",
    ),
    fault(
        "Training",
        "VAL_LOSS_EVERY at other steps",
        "self.step % every == 0):\n                self.validate()",
        "self.step % every == 1):\n                self.validate()",
    ),
    fault(
        "Training",
        "average never updated",
        "        self.average.update(self.step, scale)\n        self.step += 1",
        "        self.step += 1",
        "            self.average.update(self.step, scale, self.seconds)\n",
        "",
    ),
]

EVALUATION = [
    fault(
        "Evaluation",
        "nats called bits",
        "return nats / math.log(2) / num_bytes",
        "return nats / num_bytes",
    ),
    fault(
        "Evaluation",
        "context shorter by the stride",
        "Window(max(0, end - seq_len), done, end)",
        "Window(max(0, end - seq_len + stride // 2), done, end)",
    ),
    fault(
        "Evaluation",
        "a window's first target left out",
        "Window(max(0, end - seq_len), done, end)",
        "Window(max(0, end - seq_len), done + 1, end)",
    ),
    fault(
        "Evaluation",
        "window of the next chunk scored before training",
        "windows[high].first < (c + 1) * chunk",
        "windows[high].first <= (c + 1) * chunk",
    ),
    fault(
        "Evaluation",
        "TTT's rate rises",
        "(1 + math.cos(math.pi * c / (chunks - 1)))",
        "(1 - math.cos(math.pi * c / (chunks - 1)))",
    ),
    fault(
        "Evaluation",
        "TTT_EPOCHS ignored",
        "for _ in range(config.ttt_epochs):",
        "for _ in range(1):",
    ),
    fault("Evaluation", "training ahead allowed", "if end > self.scored_until:", "if False:"),
    fault(
        "Evaluation",
        "bytes of the next target",
        "self.stream.bytes[first:end].sum(dtype=np.int64)",
        "self.stream.bytes[first + 1 : end + 1].sum(dtype=np.int64)",
    ),
    fault(
        "Evaluation",
        "targets may come twice",
        "if first < self.last or self.coverage[first:end].any():",
        "if False:",
    ),
    fault(
        "Evaluation",
        "gaps allowed",
        "if not (coverage == 1).all():",
        "if False:",
        "if complete and not (coverage == 1).all():",
        "if False:",
    ),
    fault(
        "Evaluation",
        "weights stay adapted",
        "param.copy_(value)\n                param.requires_grad_",
        "param.requires_grad_",
    ),
    fault(
        "Evaluation",
        "last blocks frozen",
        "model.blocks[:freeze_blocks]",
        "model.blocks[freeze_blocks:]",
    ),
    fault(
        "Evaluation",
        "SLOT fitted on what is scored",
        "known_until = first if causal else end",
        "known_until = end",
    ),
    fault(
        "Evaluation",
        "one shift for all windows",
        "rows = len(known) if causal else 1",
        "rows = 1",
    ),
    fault(
        "Evaluation",
        "TTT without momentum",
        "torch.optim.SGD(params, self.config.ttt_lr, self.config.ttt_momentum)",
        "torch.optim.SGD(params, self.config.ttt_lr)",
    ),
    fault(
        "Evaluation",
        "TTT's rate constant",
        'self.sgd.param_groups[0]["lr"] = rate',
        "pass",
    ),
    fault("Evaluation", "TTT not clipped", "if self.config.ttt_grad_clip:", "if False:"),
    fault(
        "Evaluation",
        "each rank trains on all rows",
        "mine = starts[self.comm.rank :: self.comm.world]",
        "mine = starts",
    ),
    fault(
        "Evaluation",
        "mean of parts summed",
        "share = len(ids) / len(rows)",
        "share = 1.0",
    ),
    fault(
        "Evaluation",
        "adapted weights not restored",
        'self.model.load_state_dict(state["model"])',
        "pass",
    ),
    fault(
        "Evaluation",
        "TTT's momentum not restored",
        'self.sgd.load_state_dict(state["sgd"])',
        "pass",
    ),
    fault(
        "Evaluation",
        "state of another evaluation taken up",
        'self.comm.from_main(state["identity"] == self.identity)',
        "True",
    ),
    fault("Evaluation", "spot checks see nothing", "if not counted.equals(again):", "if False:"),
    fault(
        "Evaluation",
        "published SLOT called legal",
        'adapting.insert(0, "illegal")',
        'adapting.insert(0, "legal")',
    ),
    fault(
        "Evaluation",
        "published SLOT marked legal",
        'legal=self.slot != "published"',
        "legal=True",
    ),
    fault(
        "Evaluation",
        "rank's share begins at the round",
        "low = item.low + self.comm.rank * size",
        "low = item.low",
    ),
    fault(
        "Evaluation",
        "sliding window by whole windows",
        'EvaluationJob("final_int6_sliding_window", config.eval_stride, False, "off")',
        'EvaluationJob("final_int6_sliding_window", config.eval_seq_len, False, "off")',
    ),
]

QUANTISATION = [
    fault(
        "Quantisation",
        "a code too many",
        "return 2 ** (bits - 1) - 1",
        "return 2 ** (bits - 1)",
    ),
    fault(
        "Quantisation",
        "codes not clamped",
        "(weight / scale).round().clamp(-top, top)",
        "(weight / scale).round()",
    ),
    fault(
        "Quantisation",
        "small tensors in integers",
        "math.prod(shape) <= HALF_LIMIT and not",
        "math.prod(shape) > HALF_LIMIT and not",
    ),
    fault(
        "Quantisation",
        "worst clip taken",
        "errors.argmin(0, keepdim=True)",
        "errors.argmax(0, keepdim=True)",
    ),
    fault(
        "Quantisation",
        "clip between the wrong neighbours",
        "torch.lerp(largest[:, low], largest[:, high], part)",
        "torch.lerp(largest[:, high], largest[:, low], part)",
    ),
    fault(
        "Quantisation",
        "int5 from the ends inward",
        "(abs(layer - middle), -layer)",
        "(-abs(layer - middle), -layer)",
    ),
    fault(
        "Quantisation",
        "code not in the budget",
        "over = len(blob) + code_bytes - config.budget_bytes",
        "over = len(blob) - config.budget_bytes",
    ),
    fault("Quantisation", "exact fit refused", "if over <= 0:", "if over < 0:"),
    fault(
        "Quantisation",
        "error pushed the wrong way",
        "upper[j, j + 1 : high], alpha=-1)",
        "upper[j, j + 1 : high], alpha=1)",
    ),
    fault(
        "Quantisation",
        "later blocks not corrected",
        "left[:, high:] -= errors @ upper[low:high, high:]",
        "pass",
    ),
    fault(
        "Quantisation",
        "columns stay sorted",
        "torch.empty_like(codes).index_copy_(1, order, codes)",
        "codes",
    ),
    fault(
        "Quantisation",
        "predicted loss doubled",
        "return 0.5 * weight * ((error @ hessian) * error).sum(1)",
        "return weight * ((error @ hessian) * error).sum(1)",
        "return 0.5 * row_weight * ((error @ hessian) * error).sum(1)",
        "return row_weight * ((error @ hessian) * error).sum(1)",
    ),
    fault(
        "Quantisation",
        "steps of columns inverted",
        "to_exponents(reach / level)",
        "to_exponents(level / reach)",
    ),
    fault(
        "Quantisation",
        "steps of rows inverted",
        "to_exponents(level * weight.rsqrt())",
        "to_exponents(level * weight.sqrt())",
    ),
    fault(
        "Quantisation",
        "variance without its second factor",
        "(probs * (1 - probs)).sum(0)",
        "probs.sum(0)",
    ),
    fault(
        "Quantisation",
        "the gradient's sum of absolutes",
        ".grad.float().square().sum(1)",
        ".grad.float().abs().sum(1)",
    ),
    fault(
        "Quantisation",
        "high plane of negative codes",
        "high = ((codes - low) >> 8).astype(np.int8)",
        "high = (codes >> 8).astype(np.int8)",
    ),
    fault(
        "Quantisation",
        "checksum unchecked",
        "(hashlib.sha256(body).digest() == digest,",
        "(True,",
    ),
    fault(
        "Quantisation",
        "room to spare in the payload",
        "if needed != len(raw) - start:",
        "if needed > len(raw) - start:",
        "if needed != data_bytes:",
        "if needed > data_bytes:",
    ),
    fault(
        "Quantisation",
        "version of the format unchecked",
        "(version == ARTIFACT_VERSION,",
        "(True,",
    ),
    fault(
        "Quantisation",
        "bits of blocks and tables swapped",
        'config.block_bits if name.startswith("blocks.") else config.embed_bits',
        'config.embed_bits if name.startswith("blocks.") else config.block_bits',
    ),
    fault(
        "Quantisation",
        "control scalars in half precision",
        'name.split(".")[-1] in CONTROL:\n        return "fp32"',
        'name.split(".")[-1] in CONTROL:\n        return "fp16"',
    ),
    fault(
        "Quantisation",
        "gptq where rounding is better",
        "better = losses <= plain",
        "better = losses >= plain",
    ),
    fault(
        "Quantisation",
        "calibration on the first sequences alone",
        "stream.sequences(i * stream.num_sequences // wanted, 1)",
        "stream.sequences(i, 1)",
        "number * total // self.sequences",
        "number * self.length",
    ),
]

MAIN = [
    fault(
        "main",
        "exit code of data errors",
        "    code = 3  #",
        "    code = 4  #",
        "    code = 3\n",
        "    code = 4\n",
    ),
    fault(
        "main",
        "exit code of artifact errors",
        "    code = 4  #",
        "    code = 2  #",
        "    code = 4\n",
        "    code = 2\n",
    ),
    fault(
        "main",
        "exit code of divergence",
        "    code = 5  #",
        "    code = 1  #",
        "    code = 5\n",
        "    code = 1\n",
    ),
    fault(
        "main",
        "exit code of illegal scores",
        "    code = 6  #",
        "    code = 1  #",
        "    code = 6\n",
        "    code = 1\n",
    ),
    fault(
        "main",
        "exit code of a full disk",
        "    code = 7  #",
        "    code = 1  #",
        "    code = 7\n",
        "    code = 1\n",
    ),
    fault(
        "main",
        "exit code of a stop",
        "    code = 75  #",
        "    code = 0  #",
        "    code = 75\n",
        "    code = 0\n",
    ),
    fault(
        "main",
        "weakest score as headline",
        "return legal[-1] if legal else None",
        "return legal[0] if legal else None",
    ),
    fault(
        "main",
        "illegal score not marked",
        'mark = "" if score.legal else " legality:illegal"',
        'mark = ""',
    ),
    fault(
        "main",
        "loss printed as bits per byte",
        "_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}{mark}",
        "_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_loss:.8f}{mark}",
    ),
    fault(
        "main",
        "code not in the total",
        "total_bytes=artifact_bytes + code_bytes",
        "total_bytes=artifact_bytes",
    ),
    fault(
        "main",
        "artifact scored as float weights",
        'self.float_path if job.label == "pre_quant" else self.artifact_path',
        "self.artifact_path",
    ),
    fault(
        "main",
        "illegal score called legal",
        'if not score["legal"]:\n            return "0"',
        'if not score["legal"]:\n            return "1"',
    ),
    fault(
        "main",
        "temperature inverted",
        "torch.softmax(best / config.temperature, 0)",
        "torch.softmax(best * config.temperature, 0)",
    ),
    fault(
        "main",
        "sample goes on after a document",
        "if token in (BOS, EOS):",
        "if token in ():",
    ),
    fault(
        "main",
        "audit of another file taken up",
        'passed_before = old.get("key") == key and old["passed"]',
        'passed_before = old["passed"]',
        'old.get("audit_key") == audit_key and old["passed"]',
        'old["passed"]',
    ),
    fault(
        "main",
        "failed audit passes",
        '[check["name"] for check in checks if not check["passed"]]',
        "[]",
    ),
    fault("main", "unfinished for ever", "finished=True)", "finished=False)"),
    fault(
        "main",
        "artifact with any tokenizer",
        "expected_sha256 = self.load(self.artifact_path).tokenizer_sha256",
        'expected_sha256 = ""',
        "tokenizer_sha256 = self.load(self.artifact_path).tokenizer_sha256",
        'tokenizer_sha256 = ""',
    ),
    fault(
        "main",
        "budget of a given file unchecked",
        "over = artifact_bytes + code_bytes - self.config.budget_bytes\n        if over > 0:",
        "over = artifact_bytes + code_bytes - self.config.budget_bytes\n        if False:",
    ),
    fault(
        "main",
        "roundtrip as a submission",
        'not label.startswith(("pre_quant", "float")) and not label.endswith("_roundtrip")',
        'not label.startswith(("pre_quant", "float"))',
    ),
    fault(
        "main",
        "other settings of a run ignored",
        "self.compare_with(old)",
        "pass",
        "self.check_same_run(old)",
        "pass",
    ),
]

FAULTS = [*DATA, *MODEL, *OPTIMISERS, *TRAINING, *EVALUATION, *QUANTISATION, *MAIN]


def check(source):
    """Messages on faults that do not apply, do not compile or change nothing."""
    tree = ast.dump(ast.parse(source))
    messages = []
    for fault in FAULTS:
        try:
            if ast.dump(ast.parse(injected(source, fault))) == tree:
                messages.append(f"{fault.name}: changes nothing")
        except (ValueError, SyntaxError) as error:
            messages.append(f"{fault.room}: {error}")
    names = [fault.name for fault in FAULTS]
    messages += [f"{name}: twice" for name in set(names) if names.count(name) > 1]
    return messages


class Workplace:
    """A copy of the repository in which faults are put in and tests are run."""

    def __init__(self, repo, folder, through):
        self.folder = Path(folder) / "repo"
        skipped = shutil.ignore_patterns(".git", "__pycache__", "runs", "data", "*.ptz", "*.pt")
        shutil.copytree(repo, self.folder, ignore=skipped)
        self.script = self.folder / "train_gpt.py"
        self.source = self.script.read_text()
        self.through = through

    def pytest(self, *arguments, seconds=None):
        """(exit code, output) of pytest; 124 where the tests take more than `seconds`."""
        command = [*self.through, sys.executable, "-m", "pytest", "-q", "-n", "0", "--tb=no"]
        command += ["-p", "no:cacheprovider", *arguments]
        # A cached bytecode file is told from a new one by size and second alone.
        environ = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
        child = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = child.communicate(timeout=seconds)
            return child.returncode, output
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)
            child.wait()
            return 124, ""

    def clean_tests(self, room):
        """(quick tests, others, seconds of all): the tests of a room that pass without a fault."""
        begin = time.monotonic()
        paths = [f"tests/test_{name}.py" for name in TESTS[room]]
        paths = [path for path in paths if (self.folder / path).exists()]
        _, output = self.pytest("-rA", "--durations=0", f"--durations-min={QUICK}", *paths)
        slow = set(re.findall(r"^\S+s (?:setup|call|teardown) +(.+)$", output, re.M))
        passed = named_tests(output, "PASSED")
        quick = [test for test in passed if test not in slow]
        others = [test for test in passed if test in slow]
        return quick, others, time.monotonic() - begin

    def outcome(self, fault, quick, others, seconds):
        """The verdict of one fault: the room's clean tests run until the first failure."""
        begin = time.monotonic()
        self.script.write_text(injected(self.source, fault))
        code, output = 0, ""
        try:
            for tests in (quick, others):
                if tests and code == 0:
                    limit = SLOWER * seconds + 60
                    code, output = self.pytest("-x", "-rfE", *tests, seconds=limit)
        finally:
            self.script.write_text(self.source)
        verdict = {0: "survived", 1: "caught", 2: "caught", 124: "caught"}.get(code, "error")
        return dict(
            room=fault.room,
            verdict=verdict,
            by="time" if code == 124 else "; ".join(named_tests(output, "FAILED", "ERROR")),
            seconds=round(time.monotonic() - begin, 1),
        )


def named_tests(output, *words):
    """Tests that the short summary of pytest names after one of the words."""
    lines = [line.partition(" ") for line in output.splitlines()]
    return [rest.split(" - ")[0] for word, _, rest in lines if word in words and "::" in rest]


def report(found):
    """Print caught and all faults by room, then those that survived."""
    faults = found["faults"]
    for room in TESTS:
        verdicts = [fault["verdict"] for fault in faults.values() if fault["room"] == room]
        print(f"{room:14}{verdicts.count('caught'):4} of {len(verdicts)}")
    caught = sum(fault["verdict"] == "caught" for fault in faults.values())
    print(f"{'all':14}{caught:4} of {len(faults)}, {len(FAULTS)} in the list")
    for name, fault in faults.items():
        if fault["verdict"] != "caught":
            print(f"{fault['verdict']}: {fault['room']}: {name}")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--repo", type=Path, default=ROOT, help="repository to test")
    parser.add_argument("--out", type=Path, default=Path("faults.json"), help="JSON of outcomes")
    parser.add_argument("--rooms", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--through", default="", help="a command before each run of tests")
    parser.add_argument("--check", action="store_true", help="run no tests")
    parser.add_argument("--report", action="store_true", help="print what --out holds")
    options = parser.parse_args()
    messages = check((options.repo / "train_gpt.py").read_text())
    if options.check:
        print("\n".join([*messages, f"{len(FAULTS)} faults, {len(messages)} do not apply"]))
        sys.exit(bool(messages))
    found = dict(clean={}, faults={})
    if options.out.exists():
        found = json.loads(options.out.read_text())
    if options.report:
        report(found)
        return
    if messages:
        sys.exit("\n".join(messages))
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        place = Workplace(options.repo, folder, shlex.split(options.through))
        for fault in FAULTS:
            room = fault.room
            if room not in options.rooms or fault.name in found["faults"]:
                continue
            if room not in found["clean"]:
                found["clean"][room] = place.clean_tests(room)
            outcome = place.outcome(fault, *found["clean"][room])
            found["faults"][fault.name] = outcome
            options.out.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{outcome['verdict']:9}{room:14}{fault.name} ({outcome['by']})", flush=True)
    report(found)


if __name__ == "__main__":
    main()
