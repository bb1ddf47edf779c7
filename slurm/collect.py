"""Turn the runs of one configuration into a results table, a plot, a significance test and a submission.json.

    python slurm/collect.py runs/nfm_7k_seed*                               # table and the three files
    python slurm/collect.py runs/nfm_7k_seed* --baseline 1.12135,0.0009,3   # Welch's test against a record
    python slurm/collect.py runs/nfm_7k_seed* --check submission.json       # does the file say what they say?
    python slurm/collect.py runs/ablation_* --ablation --out results        # matrix over differing settings
    python slurm/collect.py train_seed42.log train_seed1337.log             # plain logs do as well

A run is a directory written by train_gpt.py (config.json, manifest.json, metrics.jsonl, scores.json) or a
plain log in the field's format, with or without the training script's source in it. Runs with EVAL_ONLY add
their scores to the training run whose artifact they scored, if both are given. Only finished runs are
averaged; unfinished and failed ones are listed. Units: val_loss in nats per token, val_bpb in bits per byte,
eval_time_s and train_time_s in seconds, step_avg_ms in milliseconds, standard deviations with ddof 1.

Exit codes: 0 done; 1 --check found differences; 2 wrong use, or runs that must not be mixed; 3 bad run data.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import io
import json
import math
import os
import re
import statistics
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend has to be chosen first)
from scipy import stats  # noqa: E402

BUDGET_BYTES = 16_000_000
TIME_LIMIT_S = 600.0
SIGNIFICANT_P = 0.01

# Settings of the evaluation, which an EVAL_ONLY run may choose anew for an artifact.
EVALUATION = re.compile(r"dtype|eval_\w+|ttt_\w+|slot\w*")

# Titles of the score columns, in table order. Labels that are not here keep their own name and come last.
TITLES = {
    "pre_quant": "pre-quant",
    "final_int6_roundtrip": "roundtrip",
    "final_int6_sliding_window": "sliding",
    "legal_ttt": "legal TTT",
    "slot_causal": "SLOT causal",
    "legal_ttt_slot_causal": "legal TTT + SLOT causal",
    "illegal_slot_published": "SLOT published (illegal)",
    "illegal_ttt_slot_published": "TTT + SLOT published (illegal)",
}
# The headline is the strongest evaluation that was configured, not the luckiest number: a fixed order, so
# that nobody picks it after seeing the scores. Float weights (pre_quant) are no artifact, illegal scores no
# result.
HEADLINE_ORDER = (
    "legal_ttt_slot_causal", "legal_ttt", "slot_causal", "final_int6_sliding_window", "final_int6_roundtrip",
)
# Runs of one configuration may differ in the seed and in the settings that say where and how a run was
# carried out, not what was computed (kind "run" in train_gpt.py).
OPERATIONAL = frozenset(
    "seed preset data_path tokenizer_path run_id run_dir resume eval_only mode audit device compile "
    "micro_batch_tokens warmup_steps train_log_every val_loss_every checkpoint_every checkpoint_seconds "
    "eval_checkpoint_seconds time_limit_seconds".split()
)


class UsageProblem(Exception):
    """Wrong use, or runs that must not be mixed."""

    exit_code = 2


class RunDataProblem(Exception):
    """A run's files are damaged, contradictory or hold no usable result."""

    exit_code = 3


# ----------------------------------------------------------------------------------------------------
# A run: the same record whether it was read from a directory or from a log.
# ----------------------------------------------------------------------------------------------------


@dataclass
class Score:
    """One evaluation. `decimals` is how many the source printed (16: a full float): its rounding."""

    val_loss: float
    val_bpb: float
    eval_time_s: float | None = None
    legal: bool = True
    tokens: int | None = None
    bytes: int | None = None
    decimals: int = 16

    @property
    def bytes_per_token(self):
        return self.val_loss / (math.log(2) * self.val_bpb)

    @property
    def rounding(self):
        """Largest relative error of bytes_per_token that the printed decimals explain."""
        return 0.51 * 10.0**-self.decimals * (1 / self.val_loss + 1 / self.val_bpb) + 1e-9


@dataclass
class Run:
    """What is known of one run; None where the source does not say."""

    path: Path
    status: str = "unfinished"  # finished | unfinished | failed
    note: str = ""  # why it is not finished
    seed: int | None = None
    preset: str | None = None
    settings: dict = field(default_factory=dict)  # {field: value as text}, without the operational ones
    whole_config: bool = False  # settings holds every field, so a missing one is a difference
    iterations: int | None = None
    steps: int | None = None
    step_avg_ms: float | None = None
    train_time_s: float | None = None
    artifact_bytes: int | None = None
    code_bytes: int | None = None
    total_bytes: int | None = None
    hardware: str | None = None
    pytorch_version: str | None = None
    code_sha256: str | None = None
    scope: str | None = None  # canonical | proxy
    tokens: int | None = None  # targets of the validation data
    bytes: int | None = None  # bytes of those targets
    val_sha256: str | None = None
    audit_passed: bool | None = None
    eval_only: bool = False  # scored an artifact, trained nothing
    artifact_sha256: str | None = None
    warmdown_start: int | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    train_curve: list[tuple[int, float]] = field(default_factory=list)  # (step, nats per token)
    val_curve: list[tuple[int, float, float]] = field(default_factory=list)  # (step, nats per token, bpb)

    @property
    def name(self):
        return self.path.name or str(self.path)

    def rewind(self, step):
        """Forget the points after `step`: a resumed run goes through those steps again."""
        for curve in (self.train_curve, self.val_curve):
            while curve and curve[-1][0] > step:
                curve.pop()

    def add_point(self, curve, step, *values):
        self.rewind(step)
        if curve and curve[-1][0] == step:
            curve.pop()
        curve.append((step, *values))

    def progress(self):
        """Where it got to, in words."""
        steps = [curve[-1][0] for curve in (self.train_curve, self.val_curve) if curve]
        if not steps:
            return "before the first logged step"
        total = f"/{self.iterations}" if self.iterations else ""
        scored = f", scored {', '.join(self.scores)}" if self.scores else ", nothing scored"
        return f"last logged step {max(steps)}{total}{scored}"


def as_text(value):
    """One spelling for a setting, whether it comes from JSON (true, [5, 6]) or from a log (True, (5, 6))."""
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(as_text(item) for item in value) + ")"
    text = re.sub(r"['\"]|,(?=\))", "", str(value).strip())
    return text[:-2] if re.fullmatch(r"-?\d+\.0", text) else text


def computing_settings(config):
    """The part of a configuration that decides the result, as {field: text}."""
    return {name: as_text(value) for name, value in config.items() if name not in OPERATIONAL}


# ----------------------------------------------------------------------------------------------------
# Run directories: JSON files, read strictly. Only the torn line of a killed run is forgiven.
# ----------------------------------------------------------------------------------------------------


def read_json(path, required=True):
    """Returns the object in a JSON file, None for a missing optional one; RunDataProblem if it is damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not required:
            return None
        raise RunDataProblem(f"{path}: missing; expected the file that train_gpt.py writes at its start. "
                             "Pass a run directory, or the run's train.log by itself.") from None
    except (ValueError, OSError) as error:
        raise RunDataProblem(f"{path}: not readable as JSON ({error}); expected one complete object. "
                             "Run the same command again to let train_gpt.py rewrite it.") from None
    if not isinstance(data, dict):
        raise RunDataProblem(f"{path}: holds {type(data).__name__}; expected a JSON object {{...}}")
    return data


def read_events(path):
    """Returns the events of metrics.jsonl as a list of dicts.

    Every kill may leave one line torn, with or without the next event glued to it. Any other unreadable line
    is damage: RunDataProblem.
    """
    if not path.exists():
        return []
    events = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        event = parse_event(line) or parse_event(line[line.rfind('{"event"'):])
        if event:
            events.append(event)
        elif line.strip() and (not '{"event"'.startswith(line[:8]) or line.endswith("}")):
            raise RunDataProblem(f"{path}:{number}: damaged line {line[:60]!r}; expected a JSON object with "
                                 '"event", or one torn by a kill. Restore the file.')
    return events


def parse_event(line):
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def read_run_dir(path):
    """Returns the Run of a run directory; RunDataProblem if a file is missing, damaged or contradictory."""
    events = read_events(path / "metrics.jsonl")
    if not (path / "config.json").exists():
        if events and (path / "train.log").exists():  # it failed before it could begin, for want of data say
            run = read_log(path / "train.log")
            run.path, (run.status, run.note) = path, explain(run, events)
            return run
        raise RunDataProblem(f"{path}: {describe_wrong_directory(path)}")
    config = read_json(path / "config.json")
    run = Run(path=path, preset=config.get("preset"), whole_config=True)
    values = config.get("config")
    if not isinstance(values, dict):
        raise RunDataProblem(f"{path / 'config.json'}: no \"config\" in it; expected an object of all fields."
                             " Run the same command again to let train_gpt.py rewrite it.")
    apply_config(run, values)
    apply_manifest(run, read_json(path / "manifest.json", required=False) or {})
    try:
        replay(run, events)
    except (KeyError, TypeError) as error:
        raise RunDataProblem(f"{path / 'metrics.jsonl'}: an event lacks a number ({error!r}); expected the "
                             "events that train_gpt.py writes. Restore the file.") from None
    audit = read_json(path / "audit.json", required=False)
    run.audit_passed = None if audit is None else audit.get("passed") is True
    scores = read_json(path / "scores.json", required=False)
    if scores is not None:
        apply_scores(run, scores)
    if run.status != "finished":
        run.status, run.note = explain(run, events)
    elif (path / "train.log").exists():
        compare_with_log(run, read_log(path / "train.log"))
    return run


def describe_wrong_directory(path):
    inside = sorted(child.parent.name for child in path.glob("*/config.json"))
    logs = sorted(child.name for child in path.glob("*.log"))
    if inside:
        return f"no run itself, but holds {len(inside)} ({inside[0]}, ...); pass {path}/*"
    if logs:
        return f"no config.json, but {len(logs)} log(s); pass the log itself, e.g. {path / logs[0]}"
    return ("no config.json; expected a run directory of train_gpt.py or a log file. Pass the RUN_DIR of a "
            "run.")


def apply_config(run, values):
    """Fill in what a configuration (all fields, JSON values or log texts) says."""
    run.settings, run.whole_config = computing_settings(values), True
    run.preset = run.preset or values.get("preset")
    run.eval_only = bool(values.get("eval_only"))
    run.seed = whole_number(values.get("seed"), run.seed)
    run.iterations = whole_number(values.get("iterations"), run.iterations)


def whole_number(value, otherwise):
    """Returns a setting as an int, `otherwise` if it is none."""
    return int(value) if re.fullmatch(r"\d+", str(value)) else otherwise


def apply_manifest(run, manifest):
    """Fill in what a manifest (dict) says about code, hardware and validation data."""
    data = manifest.get("data") or {}
    run.pytorch_version = manifest.get("torch")
    run.code_sha256, run.code_bytes = manifest.get("code_sha256"), manifest.get("code_bytes")
    run.artifact_sha256 = manifest.get("artifact_sha256")
    if manifest.get("device_name"):
        run.hardware = f"{manifest.get('world_size', 1)}x {manifest['device_name']}"
    run.tokens, run.bytes = data.get("val_targets"), data.get("val_bytes")
    run.val_sha256, run.scope = data.get("val_sha256"), data.get("scope")


def replay(run, events):
    """Rebuild the curves from the events, the last visit of a step counting."""
    scales = {}
    for event in events:
        kind, step = event["event"], event.get("step")
        if kind == "start":
            run.rewind(event.get("resumed_step") or 0)
        elif kind == "step":
            run.add_point(run.train_curve, step, event["train_loss"])
            scales[step] = event.get("lr_scale")
        elif kind == "val":
            run.add_point(run.val_curve, step, event["val_loss"], event["val_bpb"])
    # The schedule may run by the clock, so the plot shades what the rate did, not what the settings planned.
    for step, _ in reversed(run.train_curve):
        if scales[step] is None or scales[step] >= 1:
            break
        run.warmdown_start = step


def apply_scores(run, scores):
    """Fill in scores.json; RunDataProblem if it contradicts the run's own config.json."""
    if scores.get("seed", run.seed) != run.seed:
        raise RunDataProblem(f"{run.path}: scores.json is of seed {scores['seed']}, config.json of "
                             f"{run.seed}; expected files of one run. Do not share a RUN_DIR between runs.")
    for name in ("steps", "iterations", "step_avg_ms", "train_time_s", "artifact_bytes", "code_bytes",
                 "total_bytes", "hardware", "pytorch_version", "tokens", "bytes", "scope"):
        value = scores.get(name)
        if value is not None:
            setattr(run, name, value)
    if run.eval_only:
        run.steps = run.train_time_s = run.step_avg_ms = None  # zeros there: nothing was trained
    for label, entry in (scores.get("scores") or {}).items():
        try:
            run.scores[label] = Score(
                val_loss=float(entry["val_loss"]), val_bpb=float(entry["val_bpb"]),
                tokens=entry.get("tokens"), bytes=entry.get("bytes"), eval_time_s=entry.get("eval_time_s"),
                legal=entry.get("legal") is not False and not label.startswith("illegal"))
        except (KeyError, TypeError, ValueError) as error:
            raise RunDataProblem(f"{run.path / 'scores.json'}: score {label!r} is {entry!r} ({error!r}); "
                                 "expected the numbers val_loss and val_bpb. Score the run again.") from None
    if scores.get("finished") is True:
        run.status = "finished"


def explain(run, events):
    """Returns (status, note) of a run without a finished scores.json."""
    last = events[-1] if events else {"event": "none"}
    if last["event"] == "error":
        message = textwrap.shorten(str(last.get("message")), 120, placeholder=" ...")
        return "failed", f"exit code {last.get('code')}: {message} ({run.progress()})"
    if last["event"] == "stopped":
        return "unfinished", (f"stopped by {last.get('signal')}, phase: {last.get('phase')}; resumes with "
                              f"the same command ({run.progress()})")
    if last["event"] == "audit":
        return "unfinished", f"audited (passed: {last.get('passed')}), not scored"
    return "unfinished", f"still running or killed ({run.progress()})"


def compare_with_log(run, log):
    """RunDataProblem if train.log, where it is complete, reports other scores than scores.json."""
    for label, score in run.scores.items():
        logged = log.scores.get(label)
        if logged is None:
            continue
        for name in ("val_loss", "val_bpb"):
            ours, theirs = getattr(score, name), getattr(logged, name)
            if abs(ours - theirs) > 0.51 * 10.0**-logged.decimals:
                raise RunDataProblem(f"{run.path}: {label} {name} is {ours:.8f} in scores.json, {theirs} in "
                                     "train.log; expected equal. One of the files is not of this run.")


# ----------------------------------------------------------------------------------------------------
# Plain logs. Every pattern covers a whole line and prints' exact decimals, so neither a line cut short nor an
# f-string template of embedded source can pass for data; source is cut out beforehand all the same, because a
# docstring may quote a real line.
# ----------------------------------------------------------------------------------------------------

N2, N4, N8 = (rf"(-?\d+\.\d{{{digits}}}|nan|-?inf)" for digits in (2, 4, 8))
SCORE_LINE = re.compile(rf"([a-z]\w*) val_loss:{N4} val_bpb:{N4}(?: stride:\d+)? eval_time:(\d+)ms"
                        r"( legality:illegal)?")
EXACT_LINE = re.compile(rf"([a-z]\w*)_exact val_loss:{N8} val_bpb:{N8}( legality:illegal)?")
TRAIN_LINE = re.compile(rf"step:(\d+)/(\d+) train_loss:{N4} train_time:(\d+)ms step_avg:{N2}ms")
VAL_LINE = re.compile(rf"step:(\d+)/(\d+) val_loss:{N4} val_bpb:{N4} train_time:(\d+)ms step_avg:{N2}ms")
STOP_LINE = re.compile(r"stopping_early: wallclock_cap train_time:(\d+)ms step:(\d+)/(\d+)")
CONFIG_LINE = re.compile(r"config:(\w+)=(.*?)( \*)?")
FINGERPRINT_LINE = re.compile(r"data_fingerprint tokens:\d+ targets:(\d+) bytes:(\d+) bytes_per_token:\S+ "
                              r"documents:\d+ sha256:(\w+) score_scope:(canonical|proxy)")
RESUMED_LINE = re.compile(r"resumed_from:\S+ step:(\d+)")
AUDIT_LINE = re.compile(r"audit (pass|FAIL) \d+ checks .*")
MANIFEST_LINE = re.compile(r"manifest:(\{.*\})")
# Lines that fill one attribute of a Run with one whole number or word.
SIMPLE_LINES = (
    ("seed", re.compile(r"seed:(\d+)")),
    ("tokens", re.compile(r"val_loader:shards pattern=\S+ tokens:(\d+)")),
    ("code_bytes", re.compile(r"Code size: (\d+) bytes")),
    ("artifact_bytes", re.compile(r"Serialized model int\S+: (\d+) bytes")),
    ("total_bytes", re.compile(r"Total submission size int\S+: (\d+) bytes")),
    ("scope", re.compile(r"score_scope:(canonical|proxy)")),
)
FOREIGN_SETTINGS = re.compile(r"(model_params):(\d+)")
PYTHON_START = re.compile(r'(#!|import \w|from [\w.]+ import|def \w|class \w|@\w|"""|\'\'\'|if __name__)')
ERROR_LINE = re.compile(r"(?:error: .*|[\w.]*(?:Error|Exception|Interrupt)\b.*|.*DUE TO TIME LIMIT.*)")


def without_source(lines):
    """Returns the lines that do not belong to embedded Python source.

    A block starts at a line that looks like Python's and reaches as far as Python can parse it.
    """
    kept, index = [], 0
    while index < len(lines):
        length = source_length(lines[index:]) if PYTHON_START.match(lines[index]) else 0
        if not length:
            kept.append(lines[index])
        index += max(length, 1)
    return kept


def source_length(lines):
    """Returns how many of the first lines are Python source (0: none)."""
    count = len(lines)
    while count:
        try:
            body = ast.parse("\n".join(lines[:count])).body
        except SyntaxError as error:
            # The parser names the line it stumbled over, or the opening of what was never closed.
            count = min(count, error.lineno or count) - 1
            continue
        except (ValueError, RecursionError, MemoryError):
            return 0
        # "seed:42" and "config:x=1" right behind the source are valid annotations: they are log lines.
        while body and isinstance(body[-1], ast.AnnAssign):
            body.pop()
        return body[-1].end_lineno if body else 0
    return 0


def read_log(path):
    """Returns the Run of a plain log; RunDataProblem if it has no line of the field's format, or two runs."""
    lines = without_source(path.read_text(encoding="utf-8", errors="replace").splitlines())
    run = Run(path=path)
    facts = {"known": 0, "finished": False, "ttt": False, "config": {}, "error": "", "seeds": set()}
    for line in lines:
        facts["known"] += bool(read_points(run, line) or read_score(run, line) or read_fact(run, line, facts))
    if not facts["known"]:
        raise RunDataProblem(f"{path}: no line of the field's log format among {len(lines)}; expected lines "
                             "such as 'seed:42' or 'step:100/7000 train_loss:...'. Pass a training log.")
    if len(facts["seeds"]) > 1:
        raise RunDataProblem(f"{path}: holds runs of the seeds {sorted(facts['seeds'])}; expected one run. "
                             "Split the log, one file per run.")
    finish_log(run, facts)
    return run


def read_points(run, line):
    """True if the line is a point of a curve or the step at which training ended."""
    if match := TRAIN_LINE.fullmatch(line):
        run.add_point(run.train_curve, int(match[1]), float(match[3]))
    elif match := VAL_LINE.fullmatch(line):
        run.add_point(run.val_curve, int(match[1]), float(match[3]), float(match[4]))
    elif match := STOP_LINE.fullmatch(line):
        run.steps = int(match[2])
        return True
    else:
        return False
    run.iterations, run.steps = int(match[2]), max(int(match[1]), run.steps or 0)
    if int(match[1]) > 0:
        *_, milliseconds, average = match.groups()
        run.train_time_s, run.step_avg_ms = int(milliseconds) / 1000, float(average)
    return True


def read_score(run, line):
    """True if the line is a final score; the `_exact` line refines the one before it."""
    if match := EXACT_LINE.fullmatch(line):
        label, loss, bpb, illegal = match.groups()
        before = run.scores.get(label)
        score = Score(float(loss), float(bpb), before and before.eval_time_s, decimals=8)
    elif match := SCORE_LINE.fullmatch(line):
        label, loss, bpb, milliseconds, illegal = match.groups()
        before = None
        score = Score(float(loss), float(bpb), int(milliseconds) / 1000, decimals=4)
    else:
        return False
    marked = bool(illegal) or label.startswith("illegal") or bool(before and not before.legal)
    score.legal = not marked
    run.scores[label] = score
    return True


def read_fact(run, line, facts):
    """True if the line states a setting, the data, sizes, or how the run ended."""
    if match := CONFIG_LINE.fullmatch(line):
        facts["config"][match[1]] = match[2]
    elif match := FINGERPRINT_LINE.fullmatch(line):
        run.tokens, run.bytes = int(match[1]), int(match[2])
        run.val_sha256, run.scope = match[3], match[4]
    elif match := MANIFEST_LINE.fullmatch(line):
        try:
            apply_manifest(run, json.loads(match[1]))
        except ValueError:
            return False
    elif match := FOREIGN_SETTINGS.fullmatch(line):
        run.settings[match[1]] = match[2]
    elif match := RESUMED_LINE.fullmatch(line):
        run.rewind(int(match[1]))
        facts["error"] = ""
    elif match := AUDIT_LINE.fullmatch(line):
        run.audit_passed = match[1] == "pass"
    elif line.startswith("run_finished"):
        facts["finished"] = True
    else:
        return read_simple(run, line, facts)
    return True


def read_simple(run, line, facts):
    for name, pattern in SIMPLE_LINES:
        if match := pattern.fullmatch(line):
            value = match[1] if name == "scope" else int(match[1])
            # The fingerprint's count of targets is exact, the loader's may not be.
            if name != "tokens" or run.bytes is None:
                setattr(run, name, value)
            if name == "seed":
                facts["seeds"].add(value)
            return True
    if re.match(r"\s*(legal_)?ttt", line):
        facts["ttt"] = True
    elif ERROR_LINE.fullmatch(line) or line.startswith("stopped signal:"):
        facts["error"] = line.strip()
    return False


def finish_log(run, facts):
    """Decide from the log's lines what the run's settings are and whether it came to its end."""
    config = facts["config"]
    if config:
        apply_config(run, config)
        warmdown = whole_number(config.get("warmdown_iters"), None)
        if warmdown and run.steps:
            run.warmdown_start = max(run.steps - warmdown, 0)
    elif run.iterations is not None:
        run.settings["iterations"] = str(run.iterations)
    # Scripts of the field report float weights only as the last validation of the training loop.
    if "pre_quant" not in run.scores and run.val_curve and run.val_curve[-1][0] == run.steps and run.scores:
        run.scores = {"pre_quant": Score(*run.val_curve[-1][1:], decimals=4), **run.scores}
    packed = any(label in run.scores for label in HEADLINE_ORDER)
    ttt_missing = facts["ttt"] and not any("ttt" in label for label in run.scores)
    if facts["finished"] or (packed and not ttt_missing and not config):
        run.status = "finished"
        return
    run.status = "failed" if facts["error"] and not facts["error"].startswith("stopped") else "unfinished"
    cut = "test-time training started, no legal_ttt line; " if ttt_missing else ""
    run.note = f"{cut}{facts['error'] or 'the log ends early'} ({run.progress()})"


# ----------------------------------------------------------------------------------------------------
# What must hold before anything is averaged.
# ----------------------------------------------------------------------------------------------------


def load_run(path):
    """Returns the Run at a path (directory or log), its scores checked."""
    if not path.exists():
        raise UsageProblem(f"{path}: no such file or directory; expected a run directory or a log")
    run = read_run_dir(path) if path.is_dir() else read_log(path)
    if run.status == "finished":
        check_scores(run)
    return run


def load_runs(paths):
    """Returns the Runs at the paths, evaluations merged into the training runs they belong to."""
    runs = [load_run(path) for path in paths]
    return merge_evaluations(runs) if any(not run.eval_only for run in runs) else runs


def merge_evaluations(runs):
    """Give the scores of finished EVAL_ONLY runs to the training runs whose artifact they scored.

    Returns the training runs and the unfinished evaluations. UsageProblem for an evaluation whose training
    run is not there, or that scored an artifact differently.
    """
    owners = {run.artifact_sha256: run for run in runs if not run.eval_only and run.status == "finished"}
    for run in runs:
        if not run.eval_only or run.status != "finished":
            continue
        owner = owners.get(run.artifact_sha256)
        if owner is None:
            raise UsageProblem(f"{run.path}: scored an artifact that no finished run given here has trained; "
                               "expected its training run as well. Pass both, or only evaluations.")
        new = {label: score for label, score in run.scores.items() if label not in owner.scores}
        for label in run.scores.keys() - new.keys():
            theirs, ours = run.scores[label].val_bpb, owner.scores[label].val_bpb
            if abs(theirs - ours) > 1e-6:
                raise UsageProblem(f"{run.path}: {label} val_bpb is {theirs:.8f}, in {owner.path} {ours:.8f} "
                                   "for the same artifact; expected one score. Leave one out.")
        if new:
            owner.settings.update({name: value for name, value in run.settings.items()
                                   if EVALUATION.fullmatch(name)})
        owner.scores.update(new)
        audits = {owner.audit_passed, run.audit_passed} - {None}
        owner.audit_passed = all(audits) if audits else None
    return [run for run in runs if not run.eval_only or run.status != "finished"]


def check_scores(run):
    """RunDataProblem unless a finished run has a seed and finite scores that imply the same bytes.

    tokens * val_loss / (ln 2 * val_bpb) is the number of bytes behind a score, whatever the model is: every
    line has to imply the same number, and the data's own.
    """
    if run.seed is None:
        raise RunDataProblem(f"{run.path}: no line 'seed:N'; expected the run's seed. Add the line, or pass "
                             "the run directory.")
    if not run.scores:
        raise RunDataProblem(f"{run.path}: finished, but without a score; expected final_int6_roundtrip at "
                             "least. Score the run again.")
    for label, score in run.scores.items():
        if not (0 < score.val_loss < math.inf and 0 < score.val_bpb < math.inf):
            raise RunDataProblem(f"{run.path}: {label} has val_loss {score.val_loss}, val_bpb "
                                 f"{score.val_bpb}; expected positive numbers. Repeat the run.")
    if run.bytes and run.tokens:
        source, expected, slack = "the data fingerprint", run.bytes / run.tokens, 0.0
    else:  # then every line against the one printed with the most decimals
        source = min(run.scores, key=lambda label: run.scores[label].rounding)
        expected, slack = run.scores[source].bytes_per_token, run.scores[source].rounding
    for label, score in run.scores.items():
        if abs(score.bytes_per_token / expected - 1) > slack + score.rounding:
            tokens, unit = (run.tokens, "bytes") if run.tokens else (1, "bytes per token")
            implied = f"{tokens * score.bytes_per_token:,.4f} {unit} (tokens * val_loss / (ln 2 * val_bpb))"
            raise RunDataProblem(f"{run.path}: {label} implies {implied}, {source} {tokens * expected:,.4f}; "
                                 "expected the same. A score line or the byte count is wrong: score the run "
                                 "again.")
        for name in ("tokens", "bytes"):
            theirs, ours = getattr(score, name), getattr(run, name)
            if None not in (theirs, ours) and theirs != ours:
                raise RunDataProblem(f"{run.path}: {label} scored {theirs} {name}, the validation data has "
                                     f"{ours}; expected every target exactly once. Score the run again.")


def differing_settings(runs):
    """Returns the names of the settings that are not the same in all runs, in the configuration's order."""
    fields = {name for run in runs if run.whole_config for name in run.settings}
    differing = []
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        # A script of the field logs only a few settings: what is absent there is unknown, not different.
        values = {run.settings.get(name, "(absent)") for run in runs
                  if name in run.settings or (run.whole_config and name in fields)}
        if len(values) > 1:
            differing.append(name)
    return differing


def check_one_configuration(runs):
    """UsageProblem if the runs differ in more than their seed and operational settings."""
    differing = differing_settings(runs)
    if not differing:
        return
    lines = []
    if len({run.preset for run in runs}) > 1:
        lines.append("  preset: " + ", ".join(f"{run.preset} ({run.name})" for run in runs))
    for name in differing[:8]:
        values = [f"{run.settings.get(name, '(absent)')} ({run.name})" for run in runs]
        lines.append(f"  {name}: " + ", ".join(values))
    more = [f"  ... and {len(differing) - 8} more"] if len(differing) > 8 else []
    raise UsageProblem("the runs have different configurations; expected the same in all but the seed:\n"
                       + "\n".join(lines + more) + "\nPass the runs of one configuration, or use --ablation.")


def check_same_data(runs):
    """UsageProblem if the runs were scored on different validation data."""
    for name, what in (("val_sha256", "sha256 of the validation data"), ("tokens", "validation targets"),
                       ("bytes", "validation bytes"), ("scope", "score_scope")):
        values = {getattr(run, name): run.name for run in runs if getattr(run, name) is not None}
        if len(values) > 1:
            shown = ", ".join(f"{value} ({run})" for value, run in values.items())
            raise UsageProblem(f"the runs differ in {what}: {shown}; expected one data set. Scores on "
                               "different data cannot be compared: pass runs of one data set.")


def check_seeds(runs):
    """UsageProblem if two finished runs of one configuration have the same seed."""
    by_seed = {}
    for run in runs:
        if run.seed in by_seed:
            raise UsageProblem(f"two runs of seed {run.seed}: {by_seed[run.seed].path} and {run.path}; "
                               "expected one run per seed, or the mean would count it twice. Leave one out"
                               + "; evaluations need their training runs to know the seed." * run.eval_only)
        by_seed[run.seed] = run


def unfinish_cut_logs(runs):
    """Logs of the field do not say what was to be scored: one that lacks what others have was cut short."""
    labels = {label for run in runs for label in run.scores if run.status == "finished"}
    for run in runs:
        missing = sorted(labels - set(run.scores) - {"pre_quant"})
        if run.status == "finished" and not run.whole_config and missing:
            run.status, run.note = "unfinished", f"no {', '.join(missing)} line, which the other logs have"


def group_runs(runs, ablation):
    """Returns the finished runs as lists of one configuration each, in the order given.

    Errors: UsageProblem for mixed configurations (unless `ablation`), mixed data or two runs of one seed;
    RunDataProblem if no run is finished.
    """
    if not ablation:
        trained = [run for run in runs if run.settings and not run.eval_only]
        check_one_configuration(trained or runs)
        unfinish_cut_logs(runs)
    finished = [run for run in runs if run.status == "finished"]
    if not finished:
        listing = "\n".join(f"  {run.path}: {run.status}, {run.note}" for run in runs)
        raise RunDataProblem(f"none of {len(runs)} run(s) is finished, so there is nothing to report:\n"
                             f"{listing}\nRun the same commands again to resume them.")
    check_same_data(finished)
    names = differing_settings(finished)
    groups = {}
    for run in finished:
        groups.setdefault(tuple(run.settings.get(name, "(absent)") for name in names), []).append(run)
    for group in groups.values():
        check_seeds(group)
    return list(groups.values())


# ----------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """Mean and standard deviation (ddof 1, None for a single run) of n runs."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values):
        sd = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), sd, len(values))

    def __str__(self):
        return f"{self.mean:.5f}" + (f" ± {self.sd:.5f}" if self.sd is not None else " (1 run, no sd)")


@dataclass
class Significance:
    """Welch's one-sided test that the mean lies more than `threshold_bpb` below the baseline's."""

    baseline: Sample
    source: str
    threshold_nats: float
    threshold_bpb: float
    improvement: float  # bpb
    t: float
    df: float
    p: float


def welch(ours, baseline, threshold):
    """Returns (t, degrees of freedom, p) for H0: baseline.mean - ours.mean <= threshold (Welch 1947).

    UsageProblem if a sample has no standard deviation, or both are 0.
    """
    for name, sample in (("the runs", ours), ("the baseline's", baseline)):
        if sample.n < 2 or sample.sd is None:
            raise UsageProblem(f"Welch's test needs a standard deviation, and {name} have {sample.n} run(s) "
                               f"with sd {sample.sd}; expected at least 2 seeds. Pass more runs, or leave "
                               "out --baseline.")
    if ours.sd == baseline.sd == 0:
        raise UsageProblem("Welch's test needs some spread, and both standard deviations are 0; expected "
                           "runs of different seeds. Check that the runs are not copies.")
    t, p = stats.ttest_ind_from_stats(
        ours.mean + threshold, ours.sd, ours.n, baseline.mean, baseline.sd, baseline.n,
        equal_var=False, alternative="less")
    a, b = ours.sd**2 / ours.n, baseline.sd**2 / baseline.n
    df = (a + b) ** 2 / (a**2 / (ours.n - 1) + b**2 / (baseline.n - 1))
    return float(t), df, float(p)


def read_baseline(sources, label, finished):
    """Returns the baseline's Sample of val_bpb: MEAN,SD,N, a submission.json, or run directories and logs.

    Errors: UsageProblem for a missing file or numbers out of range; RunDataProblem for unusable content.
    """
    first = sources[0]
    if len(sources) == 1 and not Path(first).exists():
        return baseline_from_numbers(first)
    if len(sources) == 1 and first.endswith(".json"):
        return baseline_from_submission(Path(first))
    runs = load_runs([Path(source) for source in sources])
    unfinished = [run for run in runs if run.status != "finished"]
    if unfinished:
        raise UsageProblem(f"--baseline {unfinished[0].path}: {unfinished[0].status} ({unfinished[0].note}); "
                           "expected finished runs. Finish it or leave it out.")
    (group,) = group_runs(runs, ablation=False)
    check_same_data(finished + runs)
    base_label = label if all(label in run.scores for run in runs) else choose_headline(group, None)
    return Sample.of([run.scores[base_label].val_bpb for run in runs])


def baseline_from_numbers(text):
    parts = text.split(",")
    try:
        mean, sd, n = float(parts[0]), float(parts[1]), int(parts[2])
        if len(parts) != 3 or not (mean > 0 and 0 <= sd < math.inf and mean < math.inf):
            raise ValueError
    except (ValueError, IndexError):
        raise UsageProblem(f"--baseline {text}: no such file, and not MEAN,SD,N; expected a submission.json, "
                           "a run directory, a log, or three numbers (bpb, bpb, runs): 1.12135,0.0009,3"
                           ) from None
    return Sample(mean, sd, n)


def baseline_from_submission(path):
    """Returns the Sample of a submission.json, from its seeds where it lists at least two."""
    data = read_json(path)
    try:
        results = [float(entry["val_bpb"]) for entry in (data.get("seed_results") or {}).values()]
        if len(results) > 1:
            return Sample.of(results)
        sd, n = data.get("val_bpb_std"), len(data.get("seeds") or [None])
        return Sample(float(data["val_bpb"]), None if sd is None else float(sd), n)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunDataProblem(f"--baseline {path}: no usable scores ({error!r}); expected a submission.json "
                             "with seed_results of at least two seeds, or val_bpb, val_bpb_std and seeds"
                             ) from None


def choose_headline(group, wanted):
    """Returns the label of the score a submission is judged by: present and legal in every run.

    UsageProblem if there is none, or if the wanted one is missing, illegal or not of an artifact.
    """
    legal = [label for label in group[0].scores if label != "pre_quant"
             and all(label in run.scores and run.scores[label].legal for run in group)]
    if wanted:
        if wanted not in legal:
            raise UsageProblem(f"--headline {wanted}: not a legal score of the artifact in every run; "
                               f"expected one of {', '.join(legal) or '(none)'}")
        return wanted
    for label in HEADLINE_ORDER:
        if label in legal:
            return label
    raise UsageProblem(f"no legal score of the artifact is common to all runs (the first has "
                       f"{', '.join(group[0].scores)}); expected one of {', '.join(HEADLINE_ORDER)}. Score "
                       "every run the same way, or name another with --headline.")


def significance_of(args, group, label):
    """Returns the Significance against --baseline, None without one."""
    if not args.baseline:
        return None
    ours = Sample.of([run.scores[label].val_bpb for run in group])
    baseline = read_baseline(args.baseline, label, group)
    # One nat per token is 1 / (ln 2 * bytes per token) bits per byte, by the bytes per token of these runs.
    bits_per_nat = 1 / (math.log(2) * bytes_per_token(group, label))
    if args.threshold_bpb is not None:
        bpb, nats = args.threshold_bpb, args.threshold_bpb / bits_per_nat
    else:
        bpb, nats = args.threshold_nats * bits_per_nat, args.threshold_nats
    t, df, p = welch(ours, baseline, bpb)
    return Significance(baseline, ", ".join(args.baseline), nats, bpb, baseline.mean - ours.mean, t, df, p)


def bytes_per_token(group, label):
    run = group[0]
    return run.bytes / run.tokens if run.bytes and run.tokens else run.scores[label].bytes_per_token


# ----------------------------------------------------------------------------------------------------
# submission.json
# ----------------------------------------------------------------------------------------------------

AUTHOR_FIELDS = ("author", "github_id", "name", "blurb", "date", "track")


def common_value(group, name):
    """Returns the value all runs share, several joined by '; ', None if no run states one."""
    values = list(dict.fromkeys(str(getattr(run, name)) for run in group if getattr(run, name) is not None))
    return "; ".join(values) or None


def largest(group, name):
    """Returns the largest of a size over the runs, None unless every run states it: all seeds must fit."""
    values = [getattr(run, name) for run in group]
    return None if None in values else max(values)


def rounded(value, digits):
    return None if value is None else round(value, digits)


def compliance(group, label, significance):
    """Returns {claim: bool} with the claims that these runs measured, and no others."""
    total, train = largest(group, "total_bytes"), largest(group, "train_time_s")
    evals = [run.scores[label].eval_time_s for run in group]
    audits = [run.audit_passed for run in group]
    codes = [run.code_sha256 for run in group]
    claims = {}
    if total is not None:
        claims["artifact_under_16mb"] = total <= BUDGET_BYTES
    if train is not None:
        claims["train_under_600s"] = train <= TIME_LIMIT_S
    if None not in evals:
        claims["eval_under_600s"] = max(evals) <= TIME_LIMIT_S
    if False in audits or None not in audits:
        claims["audit_passed"] = False not in audits
    if None not in codes and len(codes) > 1:
        claims["same_code_all_seeds"] = len(set(codes)) == 1
    if group[0].scope is not None:
        claims["canonical_validation"] = group[0].scope == "canonical"
    claims["three_seeds"] = len(group) >= 3
    if significance:
        claims["beats_baseline_p_below_0_01"] = significance.p < SIGNIFICANT_P
    return claims


def build_submission(args, group, label, significance):
    """Returns the submission as a dict, val_loss and val_bpb being means over the seeds."""
    losses = Sample.of([run.scores[label].val_loss for run in group])
    bpbs = Sample.of([run.scores[label].val_bpb for run in group])
    title = TITLES.get(label, label)
    preset = common_value(group, "preset") or group[0].name
    results = {}
    for run in group:
        score = run.scores[label]
        results[str(run.seed)] = {
            "val_bpb": round(score.val_bpb, 8), "val_loss": round(score.val_loss, 8),
            "artifact_bytes": run.artifact_bytes, "steps": run.steps,
            "step_avg_ms": rounded(run.step_avg_ms, 2),
            "train_time_s": rounded(run.train_time_s, 1), "eval_time_s": rounded(score.eval_time_s, 1),
        }
    return {
        "author": args.author,
        "github_id": args.github_id or args.author,
        "name": args.name or preset,
        "blurb": args.blurb or f"{preset}, {title} score, {bpbs.n} seed(s)",
        "date": args.date or datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "track": args.track,
        "score_label": label,
        "score_scope": group[0].scope,
        "val_loss": round(losses.mean, 8),
        "val_bpb": round(bpbs.mean, 8),
        "val_bpb_std": rounded(bpbs.sd, 8),
        "bytes_total": largest(group, "total_bytes"),
        "bytes_code": largest(group, "code_bytes"),
        "seeds": [run.seed for run in group],
        "seed_results": results,
        "hardware": common_value(group, "hardware"),
        "pytorch_version": common_value(group, "pytorch_version"),
        "compliance": compliance(group, label, significance),
    }


def differences(found, expected, where=""):
    """Returns one line per place where a submission differs from what the runs say.

    Numbers agree if they are equal at the decimals given in the file (scores: at least 4). Claims and seeds
    that the runs do not know are differences; other additional fields are not.
    """
    if isinstance(expected, dict):
        return object_differences(found, expected, where)
    if where in AUTHOR_FIELDS:
        return [] if isinstance(found, str) and found.strip() else [f"{where}: {found!r}, expected some text"]
    if where in ("hardware", "pytorch_version") and expected is None:
        return []  # nothing to compare with: scripts of the field do not log them
    if where == "seeds" and isinstance(found, list):
        found, expected = sorted(map(str, found)), sorted(map(str, expected))
    number = isinstance(expected, (int, float)) and not isinstance(expected, bool)
    same = numbers_agree(found, expected, where) if number else found == expected
    return [] if same else [f"{where}: {found}, the runs say {expected}"]


def object_differences(found, expected, where):
    if not isinstance(found, dict):
        return [f"{where}: {found!r}, expected an object"]
    lines = []
    for name, value in expected.items():
        place = f"{where}.{name}" if where else name
        if name in found:
            lines += differences(found[name], value, place)
        # A claim need not be made; files of others name neither label nor scope, which then means canonical.
        elif where != "compliance" and not (name == "score_label" or value == "canonical"):
            lines.append(f"{place}: missing, the runs say {value!r}")
    if where in ("compliance", "seed_results"):
        lines += [f"{where}.{name}: not backed by these runs" for name in found if name not in expected]
    return lines


def numbers_agree(found, expected, where):
    """True if a number of the file is the runs' number at the decimals it is given with."""
    if not isinstance(found, Decimal) or not found.is_finite():
        return False
    if isinstance(expected, int):
        return found == expected
    least = 4 if "val_" in where else 1
    decimals = max(-found.as_tuple().exponent, least)
    return abs(float(found) - expected) <= 0.5000001 * 10.0**-decimals


def check_submission(path, expected):
    """Returns the list of differences between a submission.json and the runs.

    UsageProblem for a missing file, RunDataProblem for one that is not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_float=Decimal, parse_int=Decimal,
                           parse_constant=Decimal)
    except OSError as error:
        raise UsageProblem(f"--check {path}: {error.strerror}; expected an existing submission.json. Name "
                           "the file, or leave out --check to write one.") from None
    except ValueError as error:
        raise RunDataProblem(f"--check {path}: not JSON ({error}); expected one complete object") from None
    if not isinstance(found, dict):
        raise RunDataProblem(f"--check {path}: not an object; expected the fields of a submission.json")
    return differences(found, expected)


# ----------------------------------------------------------------------------------------------------
# results.md
# ----------------------------------------------------------------------------------------------------


def cell(value, form="{}"):
    return "-" if value is None else form.format(value)


def table(header, rows):
    """Returns a Markdown table, columns padded so that it reads well as plain text too."""
    rows = [[str(item).replace("|", "\\|").replace("\n", " ") for item in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(header))]
    lines = ["| " + " | ".join(item.ljust(width) for item, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def score_labels(runs):
    """Returns every label scored by a run, known ones first and in table order."""
    present = list(dict.fromkeys(label for run in runs for label in run.scores))
    return sorted(present, key=lambda label: list(TITLES).index(label) if label in TITLES else len(TITLES))


def column_title(label, runs):
    illegal = any(label in run.scores and not run.scores[label].legal for run in runs)
    title = TITLES.get(label, label)
    return title + (" (illegal)" if illegal and "illegal" not in title else "")


def seed_table(group, label):
    """Returns the table of seeds with its mean ± sd row; bpb in the score columns."""
    labels = score_labels(group)
    header = ["seed", "steps", "ms/step", *(column_title(name, group) for name in labels), "artifact bytes",
              "total bytes", "train s", "eval s"]
    rows = []
    for run in group:
        bpbs = [cell(run.scores[name].val_bpb if name in run.scores else None, "{:.5f}") for name in labels]
        rows.append([run.seed, cell(run.steps), cell(run.step_avg_ms, "{:.2f}"), *bpbs,
                     cell(run.artifact_bytes, "{:,}"), cell(run.total_bytes, "{:,}"),
                     cell(run.train_time_s, "{:.1f}"), cell(run.scores[label].eval_time_s, "{:.1f}")])
    means = []
    for name in labels:
        values = [run.scores[name].val_bpb for run in group if name in run.scores]
        means.append(str(Sample.of(values)) if len(values) == len(group) else "-")
    rows.append(["mean ± sd", "", "", *means, "", "", "", ""])
    return table(header, rows)


def ablation_table(groups):
    """Returns the matrix: one row per configuration, its differing settings, then val_bpb per evaluation."""
    finished = [run for group in groups for run in group]
    names = differing_settings(finished)
    labels = [label for label in score_labels(finished) if label not in ("pre_quant", "final_int6_roundtrip")]
    labels = labels or score_labels(finished)
    rows = []
    for group in groups:
        scores = []
        for label in labels:
            values = [run.scores[label].val_bpb for run in group if label in run.scores]
            scores.append(str(Sample.of(values)) if values else "-")
        seeds = ", ".join(str(run.seed) for run in group)
        settings = [group[0].settings.get(name, "(absent)") for name in names]
        rows.append([cell(group[0].preset), *settings, seeds, *scores])
    return table(["preset", *names, "seeds", *(column_title(label, finished) for label in labels)], rows)


def unfinished_table(runs):
    rows = [[run.name, cell(run.seed), run.status, run.note] for run in runs if run.status != "finished"]
    if not rows:
        return "## Unfinished and failed runs\n\nNone."
    return "## Unfinished and failed runs\n\nNot part of any number above.\n\n" + table(
        ["run", "seed", "status", "what happened"], rows)


def significance_text(test):
    verdict = "significant" if test.p < SIGNIFICANT_P else "NOT significant"
    return (f"## Significance\n\nBaseline {test.baseline} bpb, n = {test.baseline.n} ({test.source}). "
            f"Improvement {test.improvement:.5f} bpb; asked for: more than {test.threshold_nats:.5f} nats "
            f"per token = {test.threshold_bpb:.5f} bpb.\n\nWelch's one-sided t test: t = {test.t:.4f}, "
            f"df = {test.df:.3f}, p = {test.p:.3g}; {verdict} at p < {SIGNIFICANT_P}.")


def data_text(run, label):
    """Returns the section on what was scored and how the bytes were checked."""
    known = run.tokens is not None and run.bytes is not None
    counts = f"{run.tokens:,} targets, {run.bytes:,} bytes, " if known else ""
    scope = {"canonical": "the canonical validation split",
             "proxy": "**proxy** data, not the canonical split: not comparable with published scores",
             None: "data of unknown scope (the log does not say)"}[run.scope]
    ratio = bytes_per_token([run], label)
    return (f"Scored on {scope} ({counts}{ratio:.4f} bytes per token). Every score implies these bytes: "
            "tokens · val_loss / (ln 2 · val_bpb) was checked line by line.")


def submission_text(submission, runs, group, significance):
    """Returns results.md for runs of one configuration."""
    label = submission["score_label"]
    sample = Sample.of([run.scores[label].val_bpb for run in group])
    claims = [f"- {name}: {'yes' if value else 'NO'}" for name, value in submission["compliance"].items()]
    parts = [
        f"# {submission['name']}",
        f"**val_bpb {sample}** ({TITLES.get(label, label)}, {sample.n} seed(s); scores in bits per byte)",
        data_text(group[0], label),
        seed_table(group, label),
    ]
    if significance:
        parts.append(significance_text(significance))
    parts += ["## Measured compliance\n\n" + "\n".join(claims), unfinished_table(runs),
              "![curves](curves.png)"]
    return "\n\n".join(parts) + "\n"


def ablation_text(groups, runs):
    """Returns results.md for runs of several configurations."""
    first = groups[0][0]
    parts = ["# Ablation", data_text(first, next(iter(first.scores))),
             "Scores in bits per byte, mean ± sd over seeds.",
             ablation_table(groups), unfinished_table(runs), "![curves](curves.png)"]
    return "\n\n".join(parts) + "\n"


# ----------------------------------------------------------------------------------------------------
# curves.png
# ----------------------------------------------------------------------------------------------------


def curve_names(runs, ablation):
    """Returns one legend entry per run: its seed, in an ablation what tells its configuration apart."""
    if not ablation:
        return [f"seed {cell(run.seed)}" + f" ({run.status})" * (run.status != "finished") for run in runs]
    names = differing_settings([run for run in runs if run.settings])
    entries = [", ".join(f"{name}={run.settings.get(name, '?')}" for name in names) for run in runs]
    return [textwrap.shorten(entry, 160, placeholder=" ...") or "all runs" for entry in entries]


def visible_range(curves, column):
    """Returns (low, high) for the axis: the first 5 % of the steps would flatten everything after them."""
    points = [(point[0], point[column]) for curve in curves for point in curve]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    if not points:
        return None
    last = max(step for step, _ in points)
    values = [value for step, value in points if step >= 0.05 * last] or [value for _, value in points]
    margin = 0.05 * (max(values) - min(values)) or 0.05
    return min(values) - margin, max(values) + margin


def draw_panel(axis, runs, curves, column, names, ylabel):
    """Draw one curve per run, a colour per name; `column` picks the value from the points (step, ...)."""
    distinct = list(dict.fromkeys(names))
    colours = plt.get_cmap("tab10" if len(distinct) <= 10 else "tab20").colors
    marker = "o" if max(map(len, curves)) <= 40 else None
    for index, (run, curve, name) in enumerate(zip(runs, curves, names)):
        axis.plot([point[0] for point in curve], [point[column] for point in curve],
                  label=name if names.index(name) == index else "_same configuration",
                  linestyle="-" if run.status == "finished" else "--", linewidth=1.3, marker=marker,
                  markersize=3, color=colours[distinct.index(name) % len(colours)])
    limits = visible_range(curves, column)
    if limits:
        axis.set_ylim(*limits)
    else:
        axis.text(0.5, 0.5, "no points in these runs", transform=axis.transAxes, ha="center")
    axis.set_xlabel("step")
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)


def draw_curves(runs, title, ablation):
    """Returns the PNG (bytes): training loss and validation bpb over the steps, one line per run."""
    names = curve_names(runs, ablation)
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), dpi=120, layout="constrained", sharex=True)
    draw_panel(axes[0], runs, [run.train_curve for run in runs], 1, names, "train_loss (nats per token)")
    draw_panel(axes[1], runs, [run.val_curve for run in runs], 2, names, "val_bpb (bits per byte)")
    starts = [run.warmdown_start for run in runs if run.warmdown_start is not None]
    ends = [curve[-1][0] for run in runs for curve in (run.train_curve, run.val_curve) if curve]
    if starts and ends:
        for axis in axes:
            axis.axvspan(min(starts), max(ends), color="0.5", alpha=0.15, label="warmdown", zorder=0)
    axes[0].set_title("training loss")
    axes[1].set_title("validation during training")
    figure.suptitle(title)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = max(1, min(len(labels), 190 // (10 + max(map(len, labels)))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------


def write_files(directory, contents):
    """Write {name: bytes} into a directory, by temporary files and renames: no file is ever half there."""
    temporary = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            handle, path = tempfile.mkstemp(prefix=f".{name}.", dir=directory)
            temporary.append((Path(path), directory / name))
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(path, 0o644)
        for path, target in temporary:
            os.replace(path, target)
    except OSError as error:
        raise UsageProblem(f"--out {directory}: cannot write ({error.strerror}); expected a writable "
                           "directory. Nothing is left half-written.") from None
    finally:
        for path, _ in temporary:
            path.unlink(missing_ok=True)


def positive_or_zero(text):
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number of at least 0")
    return value


def iso_date(text):
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected YYYY-MM-DD") from None


def build_parser():
    parser = argparse.ArgumentParser(
        prog="collect.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.split("\n\n")[0], epilog="\n\n".join(__doc__.split("\n\n")[1:]))
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="run directory or log file, one per seed")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR",
                        help="where submission.json, results.md and curves.png go (default: here)")
    parser.add_argument("--ablation", action="store_true",
                        help="allow several configurations: matrix of differing settings, no submission.json")
    parser.add_argument("--check", type=Path, metavar="FILE",
                        help="compare a submission.json with the runs, number by number; writes nothing")
    parser.add_argument("--headline", metavar="LABEL",
                        help=f"score to submit (default: the first present of {', '.join(HEADLINE_ORDER)})")
    test = parser.add_argument_group("significance")
    test.add_argument("--baseline", action="append", metavar="FILE|MEAN,SD,N",
                      help="what to beat: a submission.json, or val_bpb as mean,sd,runs; run directories and "
                           "logs one by one, repeating the option")
    threshold = test.add_mutually_exclusive_group()
    threshold.add_argument("--threshold-nats", type=positive_or_zero, default=0.005, metavar="X",
                           help="improvement to prove, in nats per token (default 0.005)")
    threshold.add_argument("--threshold-bpb", type=positive_or_zero, metavar="X",
                           help="the same in bits per byte (default: converted by the runs' bytes per token)")
    about = parser.add_argument_group("author's fields of submission.json")
    about.add_argument("--author", default="anonymous")
    about.add_argument("--github-id", help="default: the author")
    about.add_argument("--name", help="default: the preset")
    about.add_argument("--blurb", help="one sentence (default: preset, score and number of seeds)")
    about.add_argument("--track", default="non-record-16mb", help="default: non-record-16mb")
    about.add_argument("--date", type=iso_date, metavar="YYYY-MM-DD", help="default: today in UTC")
    return parser


def collect_ablation(args, runs):
    """Write and print the matrix over configurations."""
    for name in ("check", "baseline", "headline"):
        if getattr(args, name):
            raise UsageProblem(f"--{name} cannot go with --ablation; expected one configuration for it. "
                               "Run collect.py on one configuration's runs.")
    groups = group_runs(runs, ablation=True)
    text = ablation_text(groups, runs)
    write_files(args.out, {"results.md": text.encode(), "curves.png": draw_curves(runs, "Ablation", True)})
    sys.stdout.write(text)
    return 0


def collect_submission(args, runs):
    """Write and print the results of one configuration, or check a submission.json against them."""
    (group,) = group_runs(runs, ablation=False)
    label = choose_headline(group, args.headline)
    significance = significance_of(args, group, label)
    submission = build_submission(args, group, label, significance)
    if args.check:
        found = check_submission(args.check, submission)
        for line in found:
            sys.stderr.write(f"{args.check}: {line}\n")
        if not found:
            sys.stdout.write(f"{args.check}: agrees with {len(group)} run(s), {label}\n")
        return 1 if found else 0
    if len(group) == 1:
        sys.stderr.write(f"collect.py: note: one finished run ({group[0].path}), so val_bpb_std is null; "
                         "expected at least 2 seeds for a standard deviation. Pass more runs.\n")
    text = submission_text(submission, runs, group, significance)
    as_json = json.dumps(submission, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_files(args.out, {
        "submission.json": as_json.encode(),
        "results.md": text.encode(),
        "curves.png": draw_curves(runs, submission["name"], False),
    })
    sys.stdout.write(text)
    return 0


def main(arguments=None):
    """Returns the exit code; see the module's docstring."""
    args = build_parser().parse_args(arguments)
    try:
        runs = load_runs(args.runs)
        return collect_ablation(args, runs) if args.ablation else collect_submission(args, runs)
    except (UsageProblem, RunDataProblem) as error:
        sys.stderr.write(f"collect.py: error: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"collect.py: error: {error.filename}: {error.strerror}; expected a readable file. "
                         "Check its owner and permissions.\n")
        return RunDataProblem.exit_code


if __name__ == "__main__":
    sys.exit(main())
