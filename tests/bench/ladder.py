"""The ladder: base_7k, then one part of the frontier stack after another, trained and packed.

    python tests/bench/ladder.py --out ladder          # all rungs, two seeds, 300 and 900 steps
    python tests/bench/ladder.py --out ladder --steps 300 --seeds 42 --only 3
    python tests/bench/ladder.py --out ladder --report # the finished runs, without training

DATA_PATH and TOKENIZER_PATH choose another text than the demo's. Every cell is a run of
train_gpt.py in its own folder under --out: stop it at any time, the same command goes on. A rung
keeps all parts of the rungs before it but for those marked "alone", which are tried and taken out
again. All rungs are packed into the same bytes by the same quantiser. Prints Markdown tables.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402

# A trunk that two CPU cores train in minutes: six layers of width 256, sequences of 512 tokens.
SIZE = dict(
    PRESET="base_7k",
    NUM_LAYERS=6,
    MODEL_DIM=256,
    NUM_HEADS=4,
    NUM_KV_HEADS=2,
    TRAIN_SEQ_LEN=512,
    EVAL_SEQ_LEN=512,
    EVAL_STRIDE=512,
    TRAIN_BATCH_TOKENS=16384,
    MICRO_BATCH_TOKENS=16384,
    WARMDOWN_FRAC=0.4,  # as 2,800 of base_7k's 7,000 steps
    TTT_ENABLED=0,
    QUANTIZER="gptq",
    CODE_BYTES=1,  # the budget is the artifact's alone
    BUDGET_BYTES=2_700_000,
    TRAIN_LOG_EVERY=50,
    VAL_LOSS_EVERY=0,
    CHECKPOINT_SECONDS=120,
)


class Rung(NamedTuple):
    """One part of the stack."""

    name: str
    settings: dict
    published: str  # change in bits per byte at full size that its author reported
    kept: bool = True  # the rungs after it have it too


RUNGS = [
    Rung("base_7k", {}, ""),
    Rung(
        "depth recurrence, layers 2–3 three times",
        dict(NUM_LOOPS=2, LOOP_START=2, LOOP_END=3),
        "−0.0059 together with parallel residuals",
    ),
    Rung("parallel residuals in the last 2 layers", dict(PARALLEL_LAST_N=2), "see above"),
    Rung("skip gates", dict(SKIP_GATES=1), "not given apart"),
    Rung("QK gain 5", dict(QK_GAIN_INIT=5), "−0.0039 (1.5 → 4), −0.0008 (4 → 5)", kept=False),
    Rung("QK gain 3", dict(QK_GAIN_INIT=3), "not given at full size"),
    Rung("MuonEq-R", dict(MUON_ROW_NORM=1), "−0.001"),
    Rung("shuffled sequences", dict(SHUFFLE=1), "−0.002"),
    Rung("smear gate by input", dict(SMEAR_INPUTS=12), "−0.0018"),
    Rung("output gate by 12 inputs", dict(GATE_INPUTS=12), "not given apart"),
    Rung("MLP ×4", dict(MLP_MULT=4), "not given apart"),
    # For 300 steps: the records' decay, a momentum and an average that forget sooner.
    Rung(
        "all of the above; decay, momentum, warmdown, average for a short run",
        dict(
            MUON_WD=0.09,
            EMBED_WD=0.085,
            SCALAR_WD=0.02,
            WARMDOWN_FRAC=0.5,
            MUON_MOMENTUM=0.95,
            MUON_MOMENTUM_WARMUP_START=0.85,
            MUON_MOMENTUM_WARMUP_STEPS=100,
            EMA_DECAY=0.85,
        ),
        "",
    ),
]


def settings_of(index):
    """Settings of rung number `index`: its own and those that were kept on the way."""
    settings = dict(SIZE)
    for rung in RUNGS[:index]:
        if rung.kept:
            settings.update(rung.settings)
    settings.update(RUNGS[index].settings)
    return settings


def text_paths(out):
    """DATA_PATH and TOKENIZER_PATH of the environment, or the demo's, built under --out."""
    names = ("DATA_PATH", "TOKENIZER_PATH")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if len(given) == 1:
        sys.exit(f"{' and '.join(names)} belong together: set both, or none for the demo's text")
    if given:
        return given
    paths = dict(DATA_PATH=str(out / "demo_data"), TOKENIZER_PATH=str(out / "demo.model"))
    environ = dict(paths, PRESET="demo")
    train_gpt.build_demo_data(train_gpt.Config.from_env(environ), print)
    return paths


def run_cell(index, seed, steps, out, paths):
    """Train, pack and score one rung, or go on with it."""
    folder = out / f"rung{index:02d}_seed{seed}_steps{steps}"
    settings = dict(settings_of(index), SEED=seed, ITERATIONS=steps, RUN_DIR=folder, **paths)
    environ = {name: str(value) for name, value in settings.items()}
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    threads = os.environ.get("OMP_NUM_THREADS", "2")  # digits depend on it: fixed for all cells
    print(f"{folder.name}: {RUNGS[index].name}", flush=True)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py")],
        env=dict(inherited, OMP_NUM_THREADS=threads, **environ),
        stdout=subprocess.DEVNULL,
    )
    if done.returncode:
        sys.exit(f"{folder} ended with code {done.returncode}: see {folder}/train.log")


def finished_cells(out):
    """One row per finished run: rung, seed, steps, scores, bytes and time of a step."""
    rows = []
    for path in sorted(out.glob("rung*/scores.json")):
        result = json.loads(path.read_text())
        if not result.get("finished"):
            continue
        number, seed, steps = path.parent.name.removeprefix("rung").split("_")
        rows.append(
            dict(
                rung=int(number),
                seed=int(seed.removeprefix("seed")),
                steps=int(steps.removeprefix("steps")),
                float_bpb=result["scores"]["pre_quant"]["val_bpb"],
                packed_bpb=result["scores"]["final_int6_roundtrip"]["val_bpb"],
                bytes=result["artifact_bytes"],
                step_ms=result["step_avg_ms"],
            )
        )
    return pd.DataFrame(rows)


def change(packed, rung, other):
    """Text of the mean change from rung `other` over the seeds that both have, "" without any.

    `packed` has a row per rung and a column per seed: seeds differ by more than many a rung.
    """
    if rung == other or not {rung, other} <= set(packed.index):
        return ""
    apart = (packed.loc[rung] - packed.loc[other]).dropna()
    return "" if apart.empty else f"{apart.mean():+.4f}"


def report(cells):
    """Markdown table of the rungs that were measured."""
    # The first seed's: runs on a busy and on a quiet machine have no mean worth knowing.
    step_ms = cells.sort_values("seed").groupby("rung").step_ms.first()
    packed = cells.pivot(index="rung", columns="seed", values="packed_bpb")
    spread = packed.max(axis=1) - packed.min(axis=1)
    rows = []
    for index, row in cells.groupby("rung").mean(numeric_only=True).iterrows():
        rung = RUNGS[index]
        # The rung that is built upon.
        below = max(i for i in range(index or 1) if RUNGS[i].kept)
        several = packed.loc[index].count() > 1
        rows.append(
            {
                "rung": rung.name if rung.kept else f"{rung.name} (alone)",
                "float": f"{row.float_bpb:.4f}",
                "packed": f"{row.packed_bpb:.4f}",
                "against base_7k": change(packed, index, 0),
                "against the rung below": change(packed, index, below),
                "seeds apart": f"{spread[index]:.4f}" if several else "one seed",
                "bytes": f"{row.bytes:,.0f}",
                "ms/step": f"{step_ms[index]:,.0f}",
                "published change": rung.published,
            }
        )
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("ladder"), help="folder of the runs")
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 900])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the rungs to train")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    if options.only and not set(options.only) <= set(range(len(RUNGS))):
        parser.error(f"--only {options.only}: rungs have the numbers 0 to {len(RUNGS) - 1}")
    if not options.report:
        options.out.mkdir(parents=True, exist_ok=True)
        paths = text_paths(options.out.resolve())
        rungs = options.only or range(len(RUNGS))
        # All rungs with the first seed and few steps first: an interrupted ladder is a whole one.
        for steps, seed, index in itertools.product(options.steps, options.seeds, rungs):
            run_cell(index, seed, steps, options.out.resolve(), paths)
    cells = finished_cells(options.out)
    if cells.empty:
        sys.exit(f"{options.out} holds no finished run: name another --out, or drop --report")
    for steps in sorted(cells.steps.unique()):
        print(f"\n{steps} steps\n\n{report(cells[cells.steps == steps])}")


if __name__ == "__main__":
    main()
