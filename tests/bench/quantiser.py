"""Size against loss of the quantisers, on a small trunk that this script trains once.

    python tests/bench/quantiser.py                     # trains, measures, prints the tables
    python tests/bench/quantiser.py --held-out 131072   # scores fewer tokens of held-out text
    python tests/bench/quantiser.py --plot quantiser.svg

The trunk (6 layers of 256, 300 steps of 16,384 tokens) takes a quarter of an hour on one core.
Training goes on where it was stopped, and every point is kept in --folder: a second run only
prints. Text comes from DATA_PATH and TOKENIZER_PATH, or is the demo's. Documents of the training
shards are set aside first; what is scored was seen neither in training nor in calibration.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import time
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
    preset="base_7k",
    nfm_enabled=False,
    num_layers=6,
    model_dim=256,
    num_heads=4,
    num_kv_heads=2,
    xsa_last_n=6,
    train_seq_len=512,
    train_batch_tokens=16384,
    micro_batch_tokens=8192,
    iterations=300,
    warmdown_iters=120,
    warmup_steps=0,
    ema_decay=0.0,
    muon_momentum=0.95,
    muon_momentum_warmup_start=0.85,
    muon_momentum_warmup_steps=100,
    val_loss_every=0,
    checkpoint_every=25,
    train_log_every=10,
    eval_seq_len=512,
    ttt_enabled=False,
)
HELD_OUT = 524_288  # tokens to set aside and to score, where there are enough
RATIOS = (1.0, 0.85, 0.75, 0.6)  # of the bytes of lite with int5 blocks and int8 embeddings
GOALS = {1.0: 0.4, 0.85: 1.0, 0.75: 2.0}  # most of lite's gap that is allowed at these bytes
CURVES = ("rounding", "gptq", "gptq + allocation")


class Point(NamedTuple):
    """A quantised model: its file and what it costs on held-out text."""

    quantiser: str
    bytes: int
    gap: float  # bits per byte above the float weights
    gap_error: float  # standard error of the gap, over windows
    divergence: float  # KL(float || quantised) in bits per byte, which has far less noise


# ---- text and weights ----


def split_text(folder):
    """Training shard without the held-out documents, and a validation shard of nothing else."""
    data = folder / "data"
    if (data / "fineweb_val_000000.bin").exists():
        return data
    config = golf.Config.from_env(dict(os.environ, PRESET="demo"))
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
    return data


def trunk_config(folder):
    """Settings of the trunk on the text that was set apart."""
    given = golf.Config.from_env(dict(os.environ, PRESET="demo"))
    return golf.Config(
        **TRUNK,
        data_path=str(folder / "data"),
        tokenizer_path=given.tokenizer_path,
        vocab_size=given.vocab_size,
        run_dir=str(folder / "trunk"),
        quantizer="gptq",
    )


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

    def __init__(self, config, state, tokens, windows_at_once=16):
        text = np.array(golf.read_shard(Path(config.data_path) / "fineweb_val_000000.bin"))
        length = config.eval_seq_len
        count = min(tokens, len(text) - 1) // length
        # In random order: any part of the windows is a fair sample.
        order = np.random.default_rng(1).permutation(count)
        ids = text[: count * length].reshape(count, length)[order]
        targets = text[1 : count * length + 1].reshape(count, length)[order]
        token_bytes = golf.load_token_bytes(config)
        self.bytes = float(token_bytes.count(ids, targets).sum())
        self.ids = torch.from_numpy(ids.astype(np.int64)).split(windows_at_once)
        self.targets = torch.from_numpy(targets.astype(np.int64)).split(windows_at_once)
        self.tokens = count * length
        self.floats = golf.GPT(config, golf.sdpa_attention).eval()
        self.model = golf.GPT(config, golf.sdpa_attention).eval()
        self.floats.load_state_dict(state)

    @staticmethod
    def log_probs(model, ids):
        """(B, T, V) of ids (B, T), in the arithmetic of an evaluation."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.logits(model.hidden(ids))
        return logits.float().log_softmax(-1)

    @torch.no_grad()
    def compare(self, name, blob):
        """Point of an artifact's bytes."""
        self.model.load_state_dict(golf.unpack_artifact(blob)[1])
        gaps = []  # nats by window
        divergence = 0.0
        for ids, targets in zip(self.ids, self.targets):
            before = self.log_probs(self.floats, ids)
            after = self.log_probs(self.model, ids)
            lost = (before - after).gather(-1, targets[..., None])  # (B, T, 1)
            gaps.append(lost.double().sum((1, 2)))
            pointwise = F.kl_div(after, before, reduction="sum", log_target=True)
            divergence += float(pointwise)
        gaps = torch.cat(gaps)
        bits = self.bytes * math.log(2)
        error = float(gaps.std()) * math.sqrt(len(gaps))
        return Point(name, len(blob), float(gaps.sum()) / bits, error / bits, divergence / bits)


# ---- quantisers ----


def lite(config, state, block_bits):
    """Artifact of GPTQ-lite: every block matrix in `block_bits` bits, embeddings in 8."""
    settings = dataclasses.replace(
        config, quantizer="lite", block_bits=block_bits, embed_bits=8, zstd_level=16
    )
    return golf.pack_artifact(settings, state)


def plain_grid(weight):
    """Grid of one step per row, the same share of every row's standard deviation (SDClip)."""
    rows = golf.to_exponents(weight.double().std(1).clamp(min=1e-12))
    return golf.Grid(rows, np.zeros(weight.size(1), np.int8))


def variant(state, costs, curve):
    """Quantiser of one curve: with or without allocation, with or without feedback of errors."""
    quantiser = golf.Quantiser(state, *costs, print)
    if curve != "gptq + allocation":
        quantiser.grids = {name: plain_grid(w) for name, w in quantiser.weights.items()}
    if curve == "rounding":
        # Without correlations between inputs, GPTQ is rounding.
        for name, (order, _) in quantiser.factors.items():
            identity = torch.eye(len(order), dtype=torch.float64)
            quantiser.factors[name] = torch.arange(len(order)), identity
    return quantiser


def packed(config, state, costs, curve, budget):
    """Artifact of one curve within `budget` bytes."""
    quantiser = variant(state, costs, curve)

    def pack(step):
        quantised = quantiser.quantise(step)
        return golf.pack_grid(config, state, quantised, step), quantised

    first, finest = quantiser.first_step(budget), quantiser.finest_step()
    slope = -quantiser.parameters / 8
    return golf.search_step(pack, budget, first, finest, slope, print, lambda: None)[0]


# ---- measuring ----


class Results:
    """Points by name in a JSON file, each written as soon as it is known."""

    def __init__(self, path):
        self.path = path
        self.points = json.loads(path.read_text()) if path.exists() else {}

    def point(self, name, measure):
        """The Point of that name, measured unless it is known."""
        if name not in self.points:
            begin = time.monotonic()
            self.points[name] = measure()._asdict()
            self.path.write_text(json.dumps(self.points, indent=1))
            print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
        return Point(**self.points[name])


def known(folder, model, config, runtime):
    """(hessians, fisher) of the trunk; calibrates once."""
    path = folder / "costs.pt"
    if not path.exists():
        begin = time.monotonic()
        costs = golf.calibrate(model, config, runtime)
        print(f"calibrated {config.calibration_tokens} tokens: {time.monotonic() - begin:.0f} s")
        torch.save(costs, path)
    return torch.load(path, weights_only=True)


def measure(folder, tokens):
    """[Point] of all quantisers and sizes."""
    split_text(folder)
    config = trunk_config(folder)
    runtime = golf.Runtime(config, os.environ)
    runtime.stop.watch_signals()
    with golf.reported_errors(runtime):
        state = trained(config, runtime)
        held_out = HeldOut(config, state, tokens)
        print(f"held out: {held_out.tokens} tokens, {held_out.bytes:.0f} bytes")
        costs = known(folder, held_out.floats, config, runtime)
        results = Results(folder / f"points_{held_out.tokens}.json")
        points = []
        # 4,096: at this width GPTQ-lite would keep most matrices in half precision.
        with mock.patch.object(golf, "HALF_LIMIT", 4096):
            for bits in (6, 5):
                blob = lite(config, state, bits)
                name = f"lite int{bits}"
                compare = functools.partial(held_out.compare, name, blob)
                points.append(results.point(name, compare))
        reference = points[-1].bytes
        for curve in reversed(CURVES):
            for ratio in RATIOS:

                def compare(curve=curve, ratio=ratio):
                    budget = int(ratio * reference)
                    return held_out.compare(curve, packed(config, state, costs, curve, budget))

                points.append(results.point(f"{curve} {ratio:g}", compare))
        runtime.close()
    return points


# ---- reporting ----


def print_tables(points):
    """The curve and the ratios as Markdown."""
    reference = next(point for point in points if point.quantiser == "lite int5")
    print("\n| quantiser | bytes | of lite int5 | gap | ± | KL | gap / lite int5's |")
    print("|---|---|---|---|---|---|---|")
    for point in points:
        print(
            f"| {point.quantiser} | {point.bytes:,} | {point.bytes / reference.bytes:.3f} "
            f"| {point.gap:.6f} | {point.gap_error:.6f} | {point.divergence:.6f} "
            f"| {point.gap / reference.gap:.2f} |"
        )
    print("\n| bytes | gap of gptq + allocation / lite int5's | at most |")
    print("|---|---|---|")
    for ratio, most in GOALS.items():
        found = [p for p in points if p.quantiser == CURVES[-1]]
        point = min(found, key=lambda p: abs(p.bytes / reference.bytes - ratio))
        print(f"| {ratio:.2f} x | {point.gap / reference.gap:.2f} | {most} |")


def plot(points, path):
    """Size against loss, one line per quantiser."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for curve in ("lite", *CURVES):
        mine = [
            p for p in points if p.quantiser.removesuffix(" int5").removesuffix(" int6") == curve
        ]
        mine.sort(key=lambda point: point.bytes)
        if mine:
            sizes = [point.bytes / 1e6 for point in mine]
            axes.plot(sizes, [point.divergence for point in mine], "o-", label=curve)
    axes.set_yscale("log")
    axes.set_xlabel("file, MB")
    axes.set_ylabel("KL(float || quantised), bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_quantiser"))
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="tokens to score")
    parser.add_argument("--plot", type=Path, help="write the curve to this SVG file")
    arguments = parser.parse_args()
    points = measure(arguments.folder, arguments.held_out)
    print_tables(points)
    if arguments.plot:
        plot(points, arguments.plot)


if __name__ == "__main__":
    main()
