"""Measure speed side by side in one run and print ratios; never a pass/fail test.

    python tests/bench/speed.py                     # all measurements as a Markdown table
    python tests/bench/speed.py training parts      # only these

All that is compared is timed in turns, and medians are compared, so that a busy machine disturbs
both sides alike. A few minutes on two cores.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_gpt as golf  # noqa: E402

# The bench shape: a 6-layer, 256-wide trunk, sequence 512, 16,384 tokens per step.
SHAPE = dict(
    num_layers=6,
    model_dim=256,
    num_heads=4,
    num_kv_heads=2,
    xsa_last_n=6,
    nfm_enabled=False,
    train_seq_len=512,
    train_batch_tokens=16384,
    micro_batch_tokens=8192,
    warmup_steps=0,
    eval_seq_len=512,
    eval_stride=64,
    eval_batch_seqs=16,
    ttt_chunk_tokens=16384,
    device="cpu",
)


def in_turns(rounds, **functions):
    """Median seconds of each function, called in turns after one warm-up each."""
    seconds = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def attention():
    """The attention that a run on this CPU takes."""
    return golf.pick_attention(torch.device("cpu"), torch.bfloat16).function


class Step:
    """One optimiser step of the real code on random tokens."""

    def __init__(self, **changes):
        self.config = golf.Config(**{**SHAPE, **changes})
        torch.manual_seed(0)
        self.model = golf.GPT(self.config, attention())
        self.optimizers = golf.build_optimizers(self.model, self.config)
        tokens = torch.randint(2, self.config.vocab_size, (self.config.train_batch_tokens + 1,))
        length = self.config.train_seq_len
        shape = (-1, self.config.micro_batch_tokens // length, length)
        self.batches = list(zip(tokens[:-1].view(shape), tokens[1:].view(shape)))

    def __call__(self):
        for param in self.model.parameters():
            param.grad = None
        for i, (ids, targets) in enumerate(self.batches):
            noise = golf.flow_noise_keys(self.config, 0, i, len(ids), ids.device)
            with torch.autocast("cpu", torch.bfloat16):
                loss = self.model(ids, targets, noise) / len(self.batches)
            loss.backward()
        golf.reduce_clip_step(*self.optimizers, golf.Comm(), self.config.grad_clip_norm)


def training():
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    step = Step()
    flops = golf.flops_per_token(step.model) * step.config.train_batch_tokens
    seconds = in_turns(5, matmul=lambda: [a @ b for _ in range(8)], step=step)
    peak, rate = 8 * 2 * 2048**3 / seconds["matmul"], flops / seconds["step"]
    yield (
        "bf16 matrix products, 2048 x 2048",
        f"{peak / 1e12:.2f} TFLOP/s",
        "this machine's rate in this run",
    )
    yield (
        "training step, 6 layers x 256, 16,384 tokens",
        f"{16384 / seconds['step']:,.0f} tokens/s",
        f"{100 * rate / peak:.0f} % of that rate ({flops / 1e9:.0f} GFLOP)",
    )


def parts():
    """A step with one part more, against the trunk's."""
    changes = {
        "NativeFlowMatcher": dict(nfm_enabled=True),
        "FlowRefiner": dict(flow_enabled=True),
        "TTT-Linear": dict(e2e_ttt_enabled=True),
        "late QAT": dict(late_qat_threshold=0.15),
        # A layer that is visited again should cost what a further layer costs.
        "2 of 6 layers twice": dict(num_loops=1, loop_start=2, loop_end=3),
        "8 layers": dict(num_layers=8, xsa_last_n=8),
    }
    steps = {name: Step(**change) for name, change in changes.items()}
    steps["late QAT"].model.set_qat(1.0)
    seconds = in_turns(5, trunk=Step(), **steps)
    for name in changes:
        ratio = seconds[name] / seconds["trunk"]
        yield f"training step with {name}", f"{seconds[name]:.2f} s", f"{ratio:.2f} x the trunk's"


def evaluation():
    # Two bytes per token, so that no tokenizer is needed.
    count = lambda prev_ids, ids: np.full(np.shape(ids), 2, np.uint16)  # noqa: E731
    token_bytes = types.SimpleNamespace(vocab_size=1024, count=count)
    tokens = np.random.default_rng(0).integers(2, 1024, 2049).astype(np.uint16)
    stream = golf.ValidationSet(tokens, token_bytes)
    with tempfile.TemporaryDirectory() as folder:
        config = golf.Config(**SHAPE, run_dir=folder)
        model, machine = golf.GPT(config, attention()).eval(), golf.Runtime(config, {})
        machine.log = lambda line: None

        def sliding(slot="off", spot_checks=0.0):
            return golf.evaluate(model, stream, config, machine, slot=slot, spot_checks=spot_checks)

        @torch.no_grad()
        def all_positions():
            windows = golf.plan_windows(stream.num_targets, config.eval_seq_len, config.eval_stride)
            for i in range(0, len(windows), config.eval_batch_seqs):
                batch = windows[i : i + config.eval_batch_seqs]
                tokens = np.stack([stream.tokens[start : end + 1] for start, _, end in batch])
                ids, targets = machine.to_device(tokens[:, :-1]), machine.to_device(tokens[:, 1:])
                with machine.autocast():
                    logps = golf.log_probs(model.logits(model.hidden(ids)))
                nll = -logps.gather(2, targets[..., None])[..., 0]
                [row[first - start :].double().sum() for row, (start, first, _) in zip(nll, batch)]

        seconds = in_turns(
            4,
            sliding=sliding,
            everything=all_positions,
            slot=lambda: sliding("causal"),
            checked=lambda: sliding(spot_checks=1.0),
        )
        machine.close()
    yield (
        "sliding window, stride 64",
        f"{stream.num_targets / seconds['sliding']:,.0f} scored tokens/s",
        f"{seconds['everything'] / seconds['sliding']:.2f} x as fast as with logits everywhere",
    )
    check = seconds["checked"] / seconds["sliding"] - 1
    yield (
        "spot check of a round",
        f"{check:.2f} x the round",
        f"{100 * config.spot_checks * check:.2f} % of an evaluation at the default SPOT_CHECKS",
    )
    yield (
        "SLOT causal, per scored token",
        f"{1e3 * seconds['slot'] / stream.num_targets:.2f} ms",
        f"{seconds['slot'] / seconds['sliding']:.1f} x plain sliding",
    )


def optimiser():
    stack = torch.randn(22, 512, 512)

    def batched():
        return golf.newton_schulz(stack, 5, torch.bfloat16)

    def one_by_one():
        return [golf.newton_schulz(matrix[None], 5, torch.bfloat16) for matrix in stack]

    seconds = in_turns(7, batched=batched, one_by_one=one_by_one)
    yield (
        "Newton-Schulz on 22 matrices of 512 x 512, batched",
        f"{1e3 * seconds['batched']:.0f} ms",
        f"{seconds['one_by_one'] / seconds['batched']:.2f} x as fast as one at a time",
    )


class CountingComm(golf.Comm):
    """Rank 0 of `world` that sends nothing, and adds up the bytes that a ring makes a rank send."""

    def __init__(self, world):
        super().__init__(0, world)
        self.bytes_sent = 0

    def count(self, full_bytes):
        # A ring passes every part on, but never to the rank that it came from.
        self.bytes_sent += full_bytes * (self.world - 1) // self.world
        return self

    def wait(self):
        """As the handle of a collective."""

    def all_reduce(self, tensor):
        return self.count(2 * tensor.nbytes)  # a reduce-scatter and an all-gather

    def reduce_scatter(self, out, stack):
        return self.count(stack.nbytes)

    def all_gather(self, out, part):
        return self.count(out.nbytes)


def model_with_gradients(config):
    model = golf.GPT(config)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    return model


def communication():
    """Bytes a rank sends in one step of nfm_7k."""
    world = 8
    comm, config = CountingComm(world), golf.Config(dtype="bfloat16")  # as on GPUs
    model = model_with_gradients(config)
    muon, adamw = golf.build_optimizers(model, config, comm)
    golf.reduce_clip_step(muon, adamw, comm, config.grad_clip_norm)
    numbers = sum(p.numel() for p in model.parameters())
    bound = 2 * 4 * numbers * (world - 1) / world
    yield (
        "bytes sent per step and rank, nfm_7k on 8 ranks",
        f"{comm.bytes_sent / 1e6:.1f} MB",
        f"{comm.bytes_sent / bound:.2f} x the bound for replicated float32 parameters, "
        "2 (n-1)/n x 4 bytes "
        f"({bound / 1e6:.1f} MB)",
    )


def checkpoints():
    """Seconds for which training stands still while a checkpoint of nfm_7k is written."""
    config = golf.Config(train_batch_tokens=2048, micro_batch_tokens=2048, device="cpu")
    model = model_with_gradients(config)
    muon, adamw = golf.build_optimizers(model, config)
    average = golf.WeightAverage(model.parameters(), config)
    adamw.step()
    parts = dict(model=model, muon=muon, adamw=adamw, average=average)
    state = {name: part.state_dict() for name, part in parts.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "step.pt")
        seconds = in_turns(3, write=lambda: golf.save_tensors(path, state))["write"]
        size = path.stat().st_size
    cadence = config.checkpoint_seconds
    yield (
        f"checkpoint of nfm_7k, {size / 1e6:.0f} MB",
        f"{seconds:.2f} s",
        f"{100 * seconds / cadence:.2f} % of the {cadence:.0f} s between checkpoints",
    )


SECTIONS = dict(
    training=training,
    parts=parts,
    evaluation=evaluation,
    optimiser=optimiser,
    communication=communication,
    checkpoints=checkpoints,
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sections", nargs="*", choices=[*SECTIONS, []], metavar="section", help="|".join(SECTIONS)
    )
    options = parser.parse_args()
    print("| what | measured | compared |\n|---|---|---|", flush=True)
    for name in options.sections or SECTIONS:
        for row in SECTIONS[name]():
            print("| " + " | ".join(row) + " |", flush=True)
    print(
        f"\nMeasured by `python tests/bench/speed.py` on {os.cpu_count()} cores "
        f"({platform.machine()}), torch {torch.__version__}, {torch.get_num_threads()} threads."
    )


if __name__ == "__main__":
    main()
