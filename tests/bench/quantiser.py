"""Loss of QUANTIZER=gptq at the bytes of the 04-09 record's quantiser and of QUANTIZER=lite.

    pip install brotli && git clone https://github.com/openai/parameter-golf
    CHALLENGE=parameter-golf python tests/bench/quantiser.py                  # the whole table
    CHALLENGE=parameter-golf python tests/bench/quantiser.py --plot size.svg  # and a figure
    python tests/bench/quantiser.py                                           # lite alone

The record's quantiser is its own: its script is read from the clone, changed for a CPU and for
small matrices, run, and not stored. The trunk is the demo's with blocks and embedding only (4
layers of 128, 2,500 steps of 2,048 tokens: a quarter of an hour on one core). Training goes on
where it was stopped, and every point is kept in --folder. Text comes from DATA_PATH and
TOKENIZER_PATH, or is the demo's. Documents of the training shards are set aside first: what is
scored was seen neither in training nor in calibration.
"""

import argparse
import base64
import dataclasses
import io
import json
import lzma
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_gpt as golf  # noqa: E402

TRUNK = dict(
    golf.PRESETS["demo"],
    audit=False,
    nfm_enabled=False,
    bigram_vocab_size=0,
    smear_enabled=False,
    gated_attention=False,
    value_residual=False,
    ttt_enabled=False,
    iterations=2500,
    warmdown_iters=1250,
    max_wallclock_seconds=0.0,
    val_loss_every=0,
    checkpoint_every=250,
    quantizer="gptq",
)
HELD_OUT = 262_144  # tokens to set aside and to score, where there are enough
# At this width half precision would keep most matrices that both quantisers round at full size.
SMALLEST = 4096  # elements of a matrix that is rounded, 65,536 at full size

RECORD = "2026-04-09_SP8192_3LayerRecur_ParResid_QK525_LegalTTT"
# Steps as published (12.85 and 20 standard deviations in 6 and 8 bits), and finer ones.
RECORD_STEPS = (1.0, 0.8, 0.6)


class Point(NamedTuple):
    """A quantised model: its file and the loss by it on held-out text."""

    bytes: int
    gap: float  # bits per byte above the float weights
    gap_error: float  # standard error of the gap, over windows
    divergence: float  # KL(float || quantised) in bits per byte, which has far less noise


# ---- text and weights ----


def split_text(config, data):
    """Write a training shard without the held-out documents, and a validation shard of those."""
    if (data / "fineweb_val_000000.bin").exists():
        return
    if "DATA_PATH" not in os.environ:
        golf.build_demo_data(config, print)
    shards = [golf.read_shard(path) for path in golf.find_shards(config, "train")]
    tokens = np.concatenate(shards)[:20_000_000]  # more is never trained on
    starts = np.flatnonzero(tokens == golf.BOS)
    documents = np.split(tokens, starts[1:])
    order = np.random.default_rng(0).permutation(len(documents))
    lengths = np.cumsum([len(documents[i]) for i in order])
    wanted = min(HELD_OUT + TRUNK["eval_seq_len"], len(tokens) // 4)
    count = int(np.searchsorted(lengths, wanted)) + 1
    held_out = [documents[i] for i in order[:count]]
    kept = [documents[i] for i in sorted(order[count:])]
    data.mkdir(parents=True, exist_ok=True)
    golf.write_shard(data / "fineweb_train_000000.bin", np.concatenate(kept))
    golf.write_shard(data / "fineweb_val_000000.bin", np.concatenate(held_out))


def trained(config, runtime):
    """Float weights of the trunk; trains them, or what is missing."""
    path = Path(config.run_dir) / golf.FLOAT_NAME
    if not path.exists():
        val = golf.ValidationSet.load(config, golf.load_token_bytes(config))
        golf.train(config, runtime, val, path)
    return golf.load_weights(path).state_dict


# ---- scoring ----


class HeldOut:
    """Held-out windows, the float model's log-probabilities on them, and a model to compare."""

    def __init__(self, config, state, tokens):
        text = np.array(golf.read_shard(Path(config.data_path) / "fineweb_val_000000.bin"))
        length = config.eval_seq_len
        count = min(tokens, len(text) - 1) // length
        # In random order: any part of the windows is a fair sample.
        order = np.random.default_rng(1).permutation(count)
        ids = text[: count * length].reshape(count, length)[order]
        targets = text[1 : count * length + 1].reshape(count, length)[order]
        token_bytes = golf.load_token_bytes(config)
        self.bytes = float(token_bytes.count(ids, targets).sum())
        self.ids = torch.from_numpy(ids.astype(np.int64)).split(16)
        self.targets = torch.from_numpy(targets.astype(np.int64)).split(16)
        self.tokens = count * length
        self.floats = golf.GPT(config, golf.sdpa_attention).eval()
        self.model = golf.GPT(config, golf.sdpa_attention).eval()
        self.floats.load_state_dict(state)

    @staticmethod
    def log_probs(model, ids):
        """(B, T, V) of ids (B, T), in float32."""
        return model.logits(model.hidden(ids)).log_softmax(-1)

    @torch.no_grad()
    def compare(self, quantise, *arguments):
        """Point of a quantiser, called with `arguments`."""
        size, state = quantise(*arguments)
        self.model.load_state_dict(state)
        gaps = []  # nats by window
        divergence = 0.0
        for ids, targets in zip(self.ids, self.targets):
            before = self.log_probs(self.floats, ids)
            after = self.log_probs(self.model, ids)
            lost = (before - after).gather(-1, targets[..., None])  # (B, T, 1)
            gaps.append(lost.double().sum((1, 2)))
            divergence += float(F.kl_div(after, before, reduction="sum", log_target=True))
        gaps = torch.cat(gaps)
        bits = self.bytes * math.log(2)
        error = float(gaps.std()) * math.sqrt(len(gaps))
        return Point(size, float(gaps.sum()) / bits, error / bits, divergence / bits)


# ---- quantisers: each gives (bytes of the file, float32 weights) ----


def by_lite(config, state, block_bits):
    """GPTQ-lite: every block matrix in `block_bits` bits, the embedding in 8."""
    settings = dataclasses.replace(config, quantizer="lite", block_bits=block_bits)
    with mock.patch.object(golf, "HALF_LIMIT", SMALLEST):
        blob = golf.pack_artifact(settings, state)
    return len(blob), golf.unpack_artifact(blob)[1]


def by_gptq(config, state, costs, budget):
    """QUANTIZER=gptq within `budget` bytes."""
    settings = dataclasses.replace(config, budget_bytes=budget)
    blob, _, _ = golf.fit_gptq(settings, state, *costs, code_bytes=0)
    return len(blob), golf.unpack_artifact(blob)[1]


class Record:
    """The quantiser of the 04-09 record, from its script in a clone of the challenge."""

    def __init__(self, clone, config, state):
        self.config = config
        self.script = self.load(clone)
        self.settings = self.script.Hyperparameters
        self.state = self.turned(state)
        self.model = self.script.GPT(self.settings).float()
        self.model.load_state_dict(self.state)
        # 65,536 tokens as for QUANTIZER=gptq, and the same ones.
        stream = golf.open_train_stream(config)
        count = config.calibration_tokens // config.train_seq_len
        rows = [stream.sequences(i * stream.num_sequences // count, 1) for i in range(count)]
        ids = torch.from_numpy(np.concatenate(rows)[:, :-1].astype(np.int64))  # (count, T)
        self.check_model(ids[:4], state)
        batches = iter(ids.split(16))
        loader = types.SimpleNamespace(next_batch=lambda *_: (next(batches), None))
        self.hessians = self.script.collect_hessians(
            self.model, loader, self.settings, torch.device("cpu"), len(ids) // 16
        )

    def load(self, clone):
        """The script as a module, changed so that it runs here."""
        path = f"HEAD:records/track_10min_16mb/{RECORD}/train_gpt.py"
        command = ["git", "-C", clone, "show", path]
        text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        packed = re.search(r'b85decode\("(.*?)"\)', text, re.DOTALL).group(1)
        filters = [{"id": lzma.FILTER_LZMA2}]
        text = lzma.decompress(base64.b85decode(packed), lzma.FORMAT_RAW, None, filters).decode()
        for old, new in [
            ("from flash_attn_interface import flash_attn_func as flash_attn_3_func", ""),
            ("@torch.compile\n", "\n"),
            ("numel()>65536", f"numel()>{SMALLEST}"),
            ("numel()<=65536", f"numel()<={SMALLEST}"),
            # Quotes inside f-strings, which Python reads from 3.12 on.
            ('{", ".join(sorted(categories[cat]))}', "{sorted(categories[cat])}"),
            ('.glob("fineweb_train_*.bin")', ".glob('fineweb_train_*.bin')"),
        ]:
            assert old in text, f"the record's script has no {old!r}"
            text = text.replace(old, new)
        config = self.config
        settings = dict(
            VOCAB_SIZE=config.vocab_size,
            NUM_LAYERS=config.num_layers,
            MODEL_DIM=config.model_dim,
            EMBEDDING_DIM=config.model_dim,
            NUM_HEADS=config.num_heads,
            NUM_KV_HEADS=config.num_kv_heads,
            MLP_MULT=config.mlp_mult,
            XSA_LAST_N=config.xsa_last_n,
            NUM_LOOPS=0,
            PARALLEL_RESIDUAL_START=-1,
            SKIP_GATES_ENABLED=0,
        )
        script = types.ModuleType("record")
        with mock.patch.dict(os.environ, {name: str(value) for name, value in settings.items()}):
            exec(compile(text, "record", "exec"), script.__dict__)  # noqa: S102
        script.log = lambda *_: None
        script.flash_attn_3_func = lambda q, k, v, causal: golf.sdpa_attention(q, k, v)
        return script

    def turned(self, state):
        """The weights in the record's sense of rotation, or back: it turns by the other sign."""
        half = self.config.rope_dims // 2
        state = {name: tensor.clone() for name, tensor in state.items()}
        for name, tensor in state.items():
            if re.search(r"c_[qk]\.weight$", name):
                heads = tensor.view(-1, self.config.head_dim, tensor.size(1))
                heads[:, half : 2 * half].neg_()
        return state

    @torch.no_grad()
    def check_model(self, ids, state):
        """Raise AssertionError unless the record's model computes what ours does."""
        ours = golf.GPT(self.config).eval()
        ours.load_state_dict(state)
        expected = ours.logits(ours.hidden(ids))
        torch.testing.assert_close(self.model.forward_logits(ids), expected, atol=1e-2, rtol=1e-3)

    def quantised(self, scale):
        """The record's file with its steps times `scale`."""
        self.settings.matrix_clip_sigmas = 12.85 * scale
        self.settings.embed_clip_sigmas = 20.0 * scale
        parts = self.script.gptq_mixed_quantize(self.state, self.hessians, self.settings)
        file = io.BytesIO()
        torch.save(dict(zip("wm", parts)), file)
        size = len(self.script._compress(file.getvalue(), "brotli"))
        return size, self.turned(self.script.dequantize_mixed(*parts, self.state))


# ---- measuring ----


def kept_point(path, name, measure, *arguments):
    """The Point of that name in the JSON file at `path`, measured unless it is there."""
    points = json.loads(path.read_text()) if path.exists() else {}
    if name not in points:
        points[name] = measure(*arguments)._asdict()
        path.write_text(json.dumps(points, indent=1))
        print(f"{name}: {points[name]}", flush=True)
    return Point(**points[name])


def measure(folder, tokens):
    """(parameters, [(name, Point, Point of gptq at as many bytes)])."""
    given = golf.Config.from_env(dict(os.environ, PRESET="demo"))
    split_text(given, folder / "data")
    settings = dict(
        data_path=str(folder / "data"),
        tokenizer_path=given.tokenizer_path,
        vocab_size=given.vocab_size,
        run_dir=str(folder / "trunk"),
    )
    config = golf.Config(**{**TRUNK, **settings})
    runtime = golf.Runtime(config, os.environ)
    runtime.stop.watch_signals()
    with golf.reported_errors(runtime):
        state = trained(config, runtime)
        held_out = HeldOut(config, state, tokens)
        print(f"held out: {held_out.tokens} tokens, {held_out.bytes:.0f} bytes")
        costs = golf.calibrate(held_out.floats, config, runtime)
        others = [(f"lite int{bits}", by_lite, (config, state, bits)) for bits in (6, 5)]
        if "CHALLENGE" in os.environ:
            record = Record(os.environ["CHALLENGE"], config, state)
            for scale in RECORD_STEPS:
                others.append((f"record 04-09, steps x {scale:g}", record.quantised, (scale,)))
        path = folder / f"points_{held_out.tokens}.json"
        pairs = []
        for name, quantise, arguments in others:
            theirs = kept_point(path, name, held_out.compare, quantise, *arguments)
            arguments = (config, state, costs, theirs.bytes)
            ours = kept_point(path, f"gptq beside {name}", held_out.compare, by_gptq, *arguments)
            pairs.append((name, theirs, ours))
        runtime.close()
    return sum(tensor.numel() for tensor in state.values()), pairs


# ---- reporting ----


def print_table(parameters, pairs):
    print("\n| quantiser | bytes | bits a weight | gap | KL | gptq: bytes | gap | KL | KL, ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, theirs, ours in pairs:
        print(
            f"| {name} | {theirs.bytes:,} | {8 * theirs.bytes / parameters:.2f} "
            f"| {theirs.gap:.5f} ± {theirs.gap_error:.5f} | {theirs.divergence:.5f} "
            f"| {ours.bytes:,} | {ours.gap:.5f} ± {ours.gap_error:.5f} | {ours.divergence:.5f} "
            f"| {ours.divergence / theirs.divergence:.2f} |"
        )


def plot(parameters, pairs, path):
    """Size against loss: gptq as a line, every other quantiser as points."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    def line(points, style, label):
        points = sorted(points)
        sizes = [8 * point.bytes / parameters for point in points]
        axes.plot(sizes, [point.divergence for point in points], style, label=label)

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    line([ours for _, _, ours in pairs], "o-", "QUANTIZER=gptq")
    for label in ("record 04-09", "lite"):
        line([theirs for name, theirs, _ in pairs if name.startswith(label)], "s--", label)
    axes.set_yscale("log")
    axes.set_xlabel("bits of the file for each weight")
    axes.set_ylabel("KL(float || quantised), bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_quantiser"))
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="tokens to score")
    parser.add_argument("--plot", type=Path, help="write the curve to this SVG file")
    arguments = parser.parse_args()
    found = measure(arguments.folder, arguments.held_out)
    print_table(*found)
    if arguments.plot:
        plot(*found, arguments.plot)


if __name__ == "__main__":
    main()
