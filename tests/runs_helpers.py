"""Fake runs for the tests of slurm/: folders as train_gpt.py leaves them, and its logs."""

import json
import math
import sys
from pathlib import Path

import pytest

for package in ("scipy", "matplotlib", "pandas", "tabulate"):
    pytest.importorskip(package, reason="pip install -r slurm/requirements.txt")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "slurm"))

import collect  # noqa: E402
import runs as run_records  # noqa: E402

TOKENS, BYTES = 100_000, 243_590  # 2.4359 bytes per token, as the canonical split
ROUNDTRIP, SLIDING = "final_int6_roundtrip", "final_int6_sliding_window"
DATA = dict(val_targets=TOKENS, val_bytes=BYTES, val_sha256="d" * 64, scope="proxy")
MANIFEST = dict(
    torch="2.13.0",
    device_name="cpu",
    world_size=1,
    code_bytes=90_000,
    code_sha256="c" * 64,
    data=DATA,
)
CONFIG = {
    "preset": "demo",
    "num_layers": 6,
    "nfm_enabled": True,
    "nfm_loss_weight": 0.1,
    "ttt_enabled": True,
    "iterations": 100,
    "max_wallclock_seconds": 0.0,
    "train_log_every": 20,
    "run_id": "",
    "data_path": "./data",
    "eval_only": "",
}
KINDS = {
    "arch": ["num_layers", "nfm_enabled"],
    "eval": ["ttt_enabled"],
    "train": ["seed", "nfm_loss_weight", "iterations", "max_wallclock_seconds"],
    "run": ["preset", "train_log_every", "run_id", "run_dir", "data_path", "eval_only"],
}


def loss_of(bpb):
    """The loss (nats per token) behind a bpb on the test's validation data."""
    return bpb * math.log(2) * BYTES / TOKENS


def bpbs_around(bpb):
    """Scores of one run by label, `bpb` being that of test-time training."""
    return {"pre_quant": bpb + 0.002, ROUNDTRIP: bpb + 0.03, SLIDING: bpb + 0.01, "legal_ttt": bpb}


def events_of(bpb, last=100):
    """Events of a run of 100 steps up to step `last`, whose rate starts to fall after step 60."""
    yield {"event": "start", "resumed_step": 0}
    for step in range(20, last + 1, 20):
        scale = 1.0 if step <= 60 else (100 - step) / 40
        yield {"event": "step", "step": step, "train_loss": 4 - step / 100, "lr_scale": scale}
    if last == 100:
        yield {"event": "val", "step": last, "val_loss": loss_of(bpb), "val_bpb": bpb}


def write_json(path, data):
    path.write_text(json.dumps(data))


def write_events(path, events):
    path.write_text("".join(json.dumps({**event, "time": 1.0}) + "\n" for event in events))


def edit_json(path, **values):
    """Change values of a JSON file."""
    write_json(path, {**json.loads(path.read_text()), **values})


def make_run(
    parent,
    seed=42,
    bpb=1.12,
    name=None,
    config=(),
    bpbs=None,
    finished=True,
    results=(),
    manifest=(),
    events=None,
    audit=None,
):
    """Write a run directory as train_gpt.py leaves it and return its path."""
    path = parent / (name or f"demo_seed{seed}")
    path.mkdir()
    values = {**CONFIG, "seed": seed, "run_dir": str(path), **dict(config)}
    kinds = {name: kind for kind, names in KINDS.items() for name in names}
    write_json(path / "config.json", {"preset": "demo", "config": values, "kinds": kinds})
    write_json(path / "manifest.json", {**MANIFEST, **dict(manifest)})
    write_events(path / "metrics.jsonl", events_of(bpb) if events is None else events)
    if finished:
        scores = {
            label: dict(
                val_loss=loss_of(value),
                val_bpb=value,
                tokens=TOKENS,
                bytes=BYTES,
                eval_time_s=30.25,
                legal=not label.startswith("illegal"),
            )
            for label, value in (bpbs or bpbs_around(bpb)).items()
        }
        facts = dict(
            finished=True,
            seed=seed,
            steps=100,
            step_avg_ms=10.125,
            train_time_s=101.25,
            code_bytes=90_000,
            artifact_bytes=3_000_000 + seed,
            total_bytes=3_090_000 + seed,
            scores=scores,
        )
        write_json(path / "scores.json", {**facts, **dict(results)})
    if audit is not None:
        write_json(path / "audit.json", {"passed": audit, "checks": []})
    return path


def log_lines(seed=42, bpb=1.12, bpbs=None):
    """The lines of a log of train_gpt.py."""
    values = {**CONFIG, "seed": seed}
    lines = [
        f"manifest:{json.dumps(MANIFEST)}",
        *(f"config:{name}={value}{' *' * (name == 'seed')}" for name, value in values.items()),
        f"seed:{seed}",
    ]
    for step in range(20, 101, 20):
        clock = f"train_time:{step * 10}ms step_avg:10.00ms tokens_per_s:409600"
        lines.append(f"step:{step}/100 train_loss:{4 - step / 100:.4f} {clock}")
    lines += [
        f"step:100/100 val_loss:{loss_of(bpb):.4f} val_bpb:{bpb:.4f} train_time:1000ms "
        "step_avg:10.00ms",
        "Code size: 90000 bytes",
        "Serialized model int6+zstd: 3000042 bytes",
        "Total submission size int6+zstd: 3090042 bytes",
    ]
    for label, value in (bpbs or bpbs_around(bpb)).items():
        stride = " stride:64" if label == SLIDING else ""
        mark = " legality:illegal" if label.startswith("illegal") else ""
        short, exact = (f"val_loss:{loss_of(value):.{n}f} val_bpb:{value:.{n}f}" for n in (4, 8))
        lines += [
            f"{label} {short}{stride} eval_time:30250ms{mark}",
            f"{label}_exact {exact}{mark}",
        ]
    return [*lines, "run_finished runs/demo"]


def make_log(parent, seed=42, bpb=1.12, **options):
    path = parent / f"train_seed{seed}.log"
    path.write_text("\n".join(log_lines(seed, bpb, **options)) + "\n")
    return path


def three_runs(tmp_path, **options):
    """Runs of 1.10, 1.11, 1.15: mean 1.12, sd sqrt((0.02² + 0.01² + 0.03²) / 2) = sqrt(0.0007)."""
    seeds = ((42, 1.10), (1337, 1.11), (2025, 1.15))
    return [make_run(tmp_path, seed, bpb, **options) for seed, bpb in seeds]


def load_run(path):
    """The one Run at a path."""
    (run,) = run_records.load_runs([path])
    return run


def run_collect(capsys, *arguments):
    """Call main; returns (exit code, stdout, stderr)."""
    try:
        code = collect.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def submission_of(tmp_path, capsys, runs, *arguments):
    """The submission.json that collect.py writes of these runs."""
    code, _, err = run_collect(capsys, *runs, "--out", tmp_path / "out", *arguments)
    assert code == 0, err
    return json.loads((tmp_path / "out" / "submission.json").read_text())


def assert_refused(result, code, *words):
    """One message on stderr that names every word, the exit code, and no traceback."""
    found, out, err = result
    assert found == code, (out, err)
    assert out == "" and err.count("collect.py: error: ") == 1
    for word in words:
        assert str(word) in err, err


@pytest.fixture
def no_picture(monkeypatch, tmp_path):
    """Skips the drawing, which takes most of the time of a call."""

    class Blank:
        def savefig(self, file, **options):
            file.write(b"picture")

    monkeypatch.setattr(collect, "draw_curves", lambda runs, title, ablation: Blank())
    monkeypatch.chdir(tmp_path)  # where a call without --out would write
