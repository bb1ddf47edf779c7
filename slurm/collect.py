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
import contextlib
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

# Titles of the score columns, in table order. Labels that are not here keep their own name and come last.
TITLES = {
    "pre_quant": "pre-quant",
    "final_int6_roundtrip": "roundtrip",
    "final_int6_sliding_window": "sliding",
    "legal_ttt": "legal TTT",
    "slot_causal": "SLOT causal",
    "legal_ttt_slot_causal": "legal TTT + SLOT causal",
    "illegal_slot_published": "SLOT published",
    "illegal_ttt_slot_published": "TTT + SLOT published",
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
# Settings of the evaluation, which an EVAL_ONLY run may choose anew for an artifact.
EVALUATION = re.compile(r"dtype|eval_\w+|ttt_\w+|slot\w*")


class UsageProblem(Exception):
    """Wrong use, or runs that must not be mixed."""

    exit_code = 2


class RunDataProblem(Exception):
    """A run's files are damaged, contradictory or hold no usable result."""

    exit_code = 3


# --- A run ---------------------------------------------------------------------------------------------
# The same record whether it was read from a directory or from a log.
@dataclass
class Score:
    """One evaluation. `decimals` is how many the source printed (16: a full float): its rounding."""

    val_loss: float
    val_bpb: float
    eval_time_s: float | None = None
    legal: bool = True
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
    artifact_sha256: str | None = None
    scope: str | None = None  # canonical | proxy
    tokens: int | None = None  # targets of the validation data
    bytes: int | None = None  # bytes of those targets
    val_sha256: str | None = None
    audit_passed: bool | None = None
    eval_only: bool = False  # scored an artifact, trained nothing
    warmdown_start: int | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    train_curve: list[tuple[int, float]] = field(default_factory=list)  # (step, nats per token)
    val_curve: list[tuple[int, float]] = field(default_factory=list)  # (step, bits per byte)

    @property
    def name(self):
        return self.path.name or str(self.path)

    @property
    def finished(self):
        return self.status == "finished"

    @property
    def last_step(self):
        return max((step for step, _ in self.train_curve[-1:] + self.val_curve[-1:]), default=None)

    def add_score(self, label, val_loss, val_bpb, legal=True, **more):
        """TypeError or ValueError for what is no number."""
        legal = bool(legal) and not label.startswith("illegal")
        self.scores[label] = Score(float(val_loss), float(val_bpb), legal=legal, **more)

    def progress(self):
        """Where it got to, in words."""
        if self.last_step is None:
            return "before the first logged step"
        scored = ", ".join(self.scores) or "nothing"
        return f"last logged step {self.last_step}/{self.iterations}, scored {scored}"


def as_text(value):
    """One spelling for a setting, whether it comes from JSON (true, [5, 6]) or from a log (True, (5, 6))."""
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(as_text(item) for item in value) + ")"
    text = re.sub(r"['\"]|,(?=\))", "", str(value).strip())
    return text[:-2] if re.fullmatch(r"-?\d+\.0", text) else text


def whole_number(value):
    """Returns a setting as an int, None if it is none."""
    return int(value) if str(value).isdecimal() else None


def apply_config(run, config):
    """Fill in what a configuration (all fields, JSON values or log texts) says."""
    run.settings = {name: as_text(value) for name, value in config.items() if name not in OPERATIONAL}
    run.whole_config = True
    run.preset, run.eval_only = config.get("preset"), bool(config.get("eval_only"))
    run.seed = whole_number(config.get("seed", run.seed))
    run.iterations = whole_number(config.get("iterations", run.iterations))


def apply_manifest(run, manifest):
    """Fill in what a manifest says about code, hardware and validation data."""
    data = manifest.get("data") or {}
    run.pytorch_version, run.artifact_sha256 = manifest.get("torch"), manifest.get("artifact_sha256")
    run.code_sha256, run.code_bytes = manifest.get("code_sha256"), manifest.get("code_bytes")
    if manifest.get("device_name"):
        run.hardware = f"{manifest.get('world_size', 1)}x {manifest['device_name']}"
    run.tokens, run.bytes = data.get("val_targets"), data.get("val_bytes")
    run.val_sha256, run.scope = data.get("val_sha256"), data.get("scope")


def replay(run, events):
    """Rebuild the curves from the events "start", "step" and "val"; KeyError, ValueError if damaged."""
    train, val, scales, last = {}, {}, {}, 0
    for event in events:
        kind = event["event"]
        if kind not in ("start", "step", "val"):
            continue
        step = int(event.get("resumed_step") or 0) if kind == "start" else int(event["step"])
        if step < last:  # a resumed run goes through those steps again, and the last visit counts
            train, val = ({at: value for at, value in curve.items() if at <= step} for curve in (train, val))
        last = step
        if kind == "step":
            train[step], scales[step] = float(event["train_loss"]), event.get("lr_scale")
        elif kind == "val":
            val[step] = float(event["val_bpb"])
    run.train_curve, run.val_curve = list(train.items()), list(val.items())
    # The schedule may run by the clock, so the plot shades what the rate did, not what the settings planned.
    for step in reversed(train):
        if scales[step] is None or scales[step] >= 1:
            break
        run.warmdown_start = step


# --- Run directories: JSON files, read strictly --------------------------------------------------------
# Only the torn line of a killed run is forgiven.
@contextlib.contextmanager
def reading(path):
    """RunDataProblem that names the file for whatever its content makes fail."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunDataProblem(f"{path}: not readable as JSON of the expected fields, or not JSON: {error!r}; "
                             "restore it or repeat the run") from None


def read_json(path, **options):
    """Returns the object in a JSON file, {} where there is no file; RunDataProblem if it is damaged."""
    if not path.exists():
        return {}
    with reading(path):
        return {**json.loads(path.read_text(encoding="utf-8"), **options)}  # TypeError: not an object


def read_events(path):
    """Returns the events of metrics.jsonl as a list of dicts; RunDataProblem if a line is damaged.

    Every kill may leave one line torn, with or without the next event glued to it: that is no damage.
    """
    events = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        torn = '{"event"'.startswith(line[:8]) and not line.endswith("}")
        for text in (line, line[line.rfind('{"event"'):]):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                event = json.loads(text)
                events.append({"event": event["event"], **event})
                break
        else:
            if not torn and line.strip():
                raise RunDataProblem(f"{path}:{number}: damaged line {line[:60]!r}; expected a JSON object "
                                     'with "event", or one torn by a kill. Restore the file.')
    return events


def read_run_dir(path):
    """Returns the Run of a run directory; RunDataProblem if a file is missing, damaged or contradictory."""
    events, log = read_events(path / "metrics.jsonl"), path / "train.log"
    if not (path / "config.json").exists():
        if not events or not log.exists():
            inside = len(list(path.glob("*/config.json")))
            hint = f"it holds {inside} of them, pass {path}/*" if inside else "pass one, or a log file"
            raise RunDataProblem(f"{path}: no config.json; expected a run directory of train_gpt.py: {hint}")
        run = read_log(log)  # it failed before it could begin, for want of data say
        run.path = path
        run.status, run.note = explain(run, events)
        return run
    run = Run(path=path)
    with reading(path / "config.json"):
        apply_config(run, read_json(path / "config.json")["config"])
    with reading(path / "manifest.json"):
        apply_manifest(run, read_json(path / "manifest.json"))
    with reading(path / "metrics.jsonl"):
        replay(run, events)
    with reading(path / "scores.json"):
        apply_scores(run, read_json(path / "scores.json"))
    run.audit_passed = read_json(path / "audit.json").get("passed")
    if not run.finished:
        run.status, run.note = explain(run, events)
    elif log.exists():
        compare_with_log(run, read_log(log))
    return run


def apply_scores(run, data):
    """Fill in scores.json; RunDataProblem if it contradicts the rest of the run directory."""
    if data.get("seed", run.seed) != run.seed:
        raise RunDataProblem(f"{run.path}: scores.json is of seed {data['seed']}, config.json of {run.seed}; "
                             "expected files of one run. Do not share a RUN_DIR between runs.")
    trained = () if run.eval_only else ("steps", "step_avg_ms", "train_time_s")
    for name in ("artifact_bytes", "code_bytes", "total_bytes", *trained):
        setattr(run, name, data.get(name, getattr(run, name)))
    for label, entry in data.get("scores", {}).items():
        run.add_score(label, entry["val_loss"], entry["val_bpb"], entry.get("legal", True),
                      eval_time_s=entry.get("eval_time_s"))
        for name in ("tokens", "bytes"):
            theirs, ours = entry.get(name), getattr(run, name)
            if None not in (theirs, ours) and theirs != ours:
                raise RunDataProblem(f"{run.path}: {label} scored {theirs} {name}, the validation data has "
                                     f"{ours}; expected every target exactly once. Score the run again.")
    if data.get("finished"):
        run.status = "finished"


def explain(run, events):
    """Returns (status, note) of a run without a finished scores.json."""
    last = {"event": "none", **(events[-1] if events else {})}
    if last["event"] == "error":
        message = textwrap.shorten(str(last.get("message")), 120, placeholder=" ...")
        return "failed", f"exit code {last.get('code')}: {message} ({run.progress()})"
    if last["event"] == "audit":
        return "unfinished", f"audited (passed: {last.get('passed')}), not scored"
    why = "still running or killed"
    if last["event"] == "stopped":
        why = f"stopped by {last.get('signal')}, phase: {last.get('phase')}; resumes with the same command"
    return "unfinished", f"{why} ({run.progress()})"


def compare_with_log(run, log):
    """RunDataProblem if train.log, where it is complete, reports other scores than scores.json."""
    for label in (label for label in run.scores if label in log.scores):
        for name in ("val_loss", "val_bpb"):
            ours, logged = getattr(run.scores[label], name), getattr(log.scores[label], name)
            if abs(ours - logged) > 0.51 * 10.0**-log.scores[label].decimals:
                raise RunDataProblem(f"{run.path}: {label} {name} is {ours:.8f} in scores.json, {logged} in "
                                     "train.log; expected equal. One of the files is not of this run.")


# --- Plain logs ----------------------------------------------------------------------------------------
# Every pattern covers a whole line and prints' exact decimals, so neither a line cut short nor an f-string
# template of embedded source can pass for data; source is cut out beforehand all the same, because a
# docstring may quote a real line.

STEP = r"step:(?P<step>\d+)/(?P<iterations>\d+)"
CLOCK = r"train_time:(?P<train_time>\d+)ms step_avg:(?P<step_avg>\d+\.\d\d)ms"
F4, F8 = (rf"(?:-?\d+\.\d{{{decimals}}}|nan|-?inf)" for decimals in (4, 8))
LABEL, ILLEGAL = r"(?P<label>[a-z]\w*)", r"(?P<illegal> legality:illegal)?"
# (kind, pattern). A group named like an attribute of Run fills it; the last line of a kind counts.
LOG_LINES = [(kind, re.compile(pattern)) for kind, pattern in (
    ("step", rf"{STEP} train_loss:(?P<train_loss>{F4}) {CLOCK}"),
    ("val", rf"{STEP} val_loss:(?P<val_loss>{F4}) val_bpb:(?P<val_bpb>{F4}) {CLOCK}"),
    ("start", r"resumed_from:\S+ step:(?P<resumed_step>\d+)"),
    ("score", rf"{LABEL} val_loss:(?P<val_loss>{F4}) val_bpb:(?P<val_bpb>{F4})(?: stride:\d+)? "
              rf"eval_time:(?P<eval_time>\d+)ms{ILLEGAL}"),
    ("exact", rf"{LABEL}_exact val_loss:(?P<val_loss>{F8}) val_bpb:(?P<val_bpb>{F8}){ILLEGAL}"),
    ("seed", r"seed:(?P<seed>\d+)"),
    ("data", r"val_loader:shards pattern=\S+ tokens:(?P<tokens>\d+)"),
    ("data", r"data_fingerprint tokens:\d+ targets:(?P<tokens>\d+) bytes:(?P<bytes>\d+) bytes_per_token:\S+ "
             r"documents:\d+ sha256:(?P<val_sha256>\w+) score_scope:(?P<scope>canonical|proxy)"),
    ("data", r"score_scope:(?P<scope>canonical|proxy)"),
    ("size", r"Code size: (?P<code_bytes>\d+) bytes"),
    ("size", r"Serialized model int\S+: (?P<artifact_bytes>\d+) bytes"),
    ("size", r"Total submission size int\S+: (?P<total_bytes>\d+) bytes"),
    ("config", r"config:(?P<name>\w+)=(?P<value>.*?)( \*)?"),
    ("params", r"model_params:(?P<model_params>\d+)"),
    ("manifest", r"manifest:(?P<json>\{.*\})"),
    ("audit", r"audit (?P<result>pass|FAIL) \d+ checks .*"),
    ("finished", r"run_finished.*"),
    ("ttt", r"\s*(legal_)?ttt.*"),
    ("error", r"(?P<error>(error: |stopped signal:|[\w.]*(Error|Exception|Interrupt)\b).*|.*TIME LIMIT.*)"),
)]
PYTHON_START = re.compile(r'(#!|import \w|from [\w.]+ import|def \w|class \w|@\w|"""|\'\'\'|if __name__)')


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


def parse_line(line):
    """Returns (kind, {group: text}) of a log line, (None, {}) for any other."""
    for kind, pattern in LOG_LINES:
        if match := pattern.fullmatch(line):
            return kind, match.groupdict()
    return None, {}


def read_log(path):
    """Returns the Run of a plain log; RunDataProblem if it has no line of the field's format, or two runs."""
    lines = without_source(path.read_text(encoding="utf-8", errors="replace").splitlines())
    parsed = [parse_line(line) for line in lines]
    if not {kind for kind, _ in parsed} - {None, "ttt", "error"}:
        raise RunDataProblem(f"{path}: no line of the field's log format among {len(lines)}; expected lines "
                             "such as 'seed:42' or 'step:100/7000 train_loss:...'. Pass a training log.")
    seeds = sorted({int(found["seed"]) for kind, found in parsed if kind == "seed"})
    if len(seeds) > 1:
        raise RunDataProblem(f"{path}: holds runs of the seeds {seeds}; expected one run. Split the log.")
    run = Run(path=path)
    for kind, found in parsed:
        for name in found.keys() & vars(run).keys():
            setattr(run, name, int(found[name]) if found[name].isdecimal() else found[name])
        if kind in ("score", "exact"):
            read_score(run, kind, found)
        elif kind == "manifest":
            with contextlib.suppress(ValueError, AttributeError):  # cut short
                apply_manifest(run, json.loads(found["json"]))
        elif kind == "audit":
            run.audit_passed = found["result"] == "pass"
        elif kind == "params":
            run.settings = dict(found)
    finish_log(run, parsed)
    return run


def read_score(run, kind, found):
    """Add the score of a line; the `_exact` line refines the one before it, which has the time."""
    if kind == "score":
        decimals, seconds = 4, int(found["eval_time"]) / 1000
    else:
        before = run.scores.get(found["label"])
        decimals, seconds = 8, before and before.eval_time_s
    run.add_score(found["label"], found["val_loss"], found["val_bpb"], legal=not found["illegal"],
                  eval_time_s=seconds, decimals=decimals)


def finish_log(run, parsed):
    """Fill in what only all lines together tell: curves, settings, and whether the run came to its end."""
    events = [{"event": kind, **found} for kind, found in parsed if kind in ("start", "step", "val")]
    replay(run, events)
    points = [event for event in events if event["event"] != "start"]
    if points:
        last = points[-1]
        run.steps, run.step_avg_ms = int(last["step"]), float(last["step_avg"])
        run.train_time_s = int(last["train_time"]) / 1000
        # Scripts of the field report float weights only as the last validation of the training loop.
        if run.scores and last["event"] == "val" and "pre_quant" not in run.scores:
            run.add_score("pre_quant", last["val_loss"], last["val_bpb"], decimals=4)
    config = {found["name"]: found["value"] for kind, found in parsed if kind == "config"}
    if config:
        apply_config(run, config)
        warmdown = whole_number(config.get("warmdown_iters"))
        if warmdown and run.steps:
            run.warmdown_start = max(run.steps - warmdown, 0)
    elif run.iterations is not None:
        run.settings["iterations"] = str(run.iterations)
    kinds = {kind for kind, _ in parsed}
    packed = any(label in run.scores for label in HEADLINE_ORDER)
    ttt_missing = "ttt" in kinds and not any("ttt" in label for label in run.scores)
    if "finished" in kinds or (packed and not ttt_missing and not config):
        run.status = "finished"
        return
    # A run that was resumed has overcome the errors before.
    ends = [found.get("error", "") for kind, found in parsed if kind in ("start", "error")]
    error = ends[-1].strip() if ends else ""
    run.status = "failed" if error and not error.startswith("stopped") else "unfinished"
    cut = "test-time training started, no legal_ttt line; " if ttt_missing else ""
    run.note = f"{cut}{error or 'the log ends early'} ({run.progress()})"


# --- What must hold before anything is averaged --------------------------------------------------------
def load_run(path):
    """Returns the Run at a path (directory or log), its scores checked."""
    if not path.exists():
        raise UsageProblem(f"{path}: no such file or directory; expected a run directory or a log")
    run = read_run_dir(path) if path.is_dir() else read_log(path)
    if run.finished:
        check_scores(run)
    return run


def load_runs(paths):
    """Returns the Runs at the paths, finished EVAL_ONLY runs having given their scores to the training runs.

    Only evaluations stay as they are. UsageProblem for an evaluation among training runs that scored the
    artifact of none of them, or scored it differently.
    """
    runs = [load_run(path) for path in paths]
    if all(run.eval_only for run in runs):
        return runs
    owners = {run.artifact_sha256: run for run in runs if run.finished and not run.eval_only}
    for run in runs:
        if run.finished and run.eval_only:
            if run.artifact_sha256 not in owners:
                raise UsageProblem(f"{run.path}: scored an artifact of no finished run; expected its "
                                   "training run as well. Pass both, or only evaluations.")
            merge_evaluation(owners[run.artifact_sha256], run)
    return [run for run in runs if not (run.finished and run.eval_only)]


def merge_evaluation(owner, run):
    """Give the training run `owner` the scores and the audit of the evaluation `run` of its artifact."""
    for label in (label for label in run.scores if label in owner.scores):
        theirs, ours = run.scores[label].val_bpb, owner.scores[label].val_bpb
        if abs(theirs - ours) > 1e-6:
            raise UsageProblem(f"{run.path}: {label} val_bpb is {theirs:.8f}, in {owner.path} {ours:.8f} for "
                               "the same artifact; expected one score. Leave one out.")
    if run.scores.keys() - owner.scores.keys():
        owner.settings |= {name: run.settings[name] for name in run.settings if EVALUATION.fullmatch(name)}
    owner.scores = {**run.scores, **owner.scores}
    audits = {owner.audit_passed, run.audit_passed} - {None}
    owner.audit_passed = all(audits) if audits else None


def check_scores(run):
    """RunDataProblem unless a finished run has a seed and finite scores that imply the same bytes.

    tokens * val_loss / (ln 2 * val_bpb) is the number of bytes behind a score, whatever the model is: every
    line has to imply the same number, and the data's own.
    """
    if run.seed is None:
        raise RunDataProblem(f"{run.path}: no line 'seed:N'; add it, or pass the run directory")
    if not run.scores:
        raise RunDataProblem(f"{run.path}: finished without a score; score the run again")
    for label, score in run.scores.items():
        if not (0 < score.val_loss < math.inf and 0 < score.val_bpb < math.inf):
            raise RunDataProblem(f"{run.path}: {label} has val_loss {score.val_loss}, val_bpb "
                                 f"{score.val_bpb}; expected positive numbers. Repeat the run.")
    if run.bytes and run.tokens:
        source, expected, slack = "the data fingerprint", run.bytes / run.tokens, 0.0
    else:  # then every line against the one printed with the most decimals
        source, best = min(run.scores.items(), key=lambda item: item[1].rounding)
        expected, slack = best.bytes_per_token, best.rounding
    for label, score in run.scores.items():
        if abs(score.bytes_per_token / expected - 1) > slack + score.rounding:
            tokens, unit = (run.tokens, "bytes") if run.tokens else (1, "bytes per token")
            raise RunDataProblem(
                f"{run.path}: {label} implies {tokens * score.bytes_per_token:,.4f} {unit}, {source} "
                f"{tokens * expected:,.4f}; expected the same (tokens * val_loss / (ln 2 * val_bpb)). One of "
                "them is wrong: score the run again.")


def differing_settings(runs):
    """Returns the names of the settings that are not the same in all runs, in the configuration's order."""
    fields = {name for run in runs if run.whole_config for name in run.settings}

    def values(name):  # a script of the field logs few settings: what is absent is unknown, not different
        return {run.settings.get(name, "(absent)") for run in runs
                if name in run.settings or (run.whole_config and name in fields)}

    return [name for name in dict.fromkeys(name for run in runs for name in run.settings)
            if len(values(name)) > 1]


def check_one_configuration(runs):
    """UsageProblem if the runs differ in more than their seed and operational settings."""
    names = differing_settings(runs)
    if not names:
        return
    shown = {"preset": [run.preset for run in runs]}
    shown |= {name: [run.settings.get(name, "(absent)") for run in runs] for name in names[:8]}
    lines = [f"  {name}: " + ", ".join(f"{value} ({run.name})" for value, run in zip(values, runs))
             for name, values in shown.items()]
    lines += [f"  ... and {len(names) - 8} more"] * (len(names) > 8)
    raise UsageProblem("the runs have different configurations; expected the same in all but the seed:\n"
                       + "\n".join(lines) + "\nPass the runs of one configuration, or use --ablation.")


def check_same_data(runs):
    """UsageProblem if the runs were scored on different validation data."""
    attributes = {"val_sha256": "sha256", "tokens": "targets", "bytes": "bytes", "scope": "scope"}
    for name, what in attributes.items():
        values = {getattr(run, name): run.name for run in runs if getattr(run, name) is not None}
        if len(values) > 1:
            shown = ", ".join(f"{value} ({run})" for value, run in values.items())
            raise UsageProblem(f"the runs differ in the {what} of the validation data: {shown}; expected one "
                               "data set")


def unfinish_cut_logs(runs):
    """Logs of the field do not say what was to be scored: one that lacks what others have was cut short."""
    labels = {label for run in runs for label in run.scores if run.finished}
    for run in runs:
        missing = sorted(labels - set(run.scores) - {"pre_quant"})
        if run.finished and not run.whole_config and missing:
            run.status, run.note = "unfinished", f"no {', '.join(missing)} line, which the other logs have"


def group_runs(runs, ablation):
    """Returns the finished runs as lists of one configuration each, in the order given.

    Errors: UsageProblem for mixed configurations (unless `ablation`), mixed data or two runs of one seed;
    RunDataProblem if no run is finished.
    """
    if not ablation:
        check_one_configuration([run for run in runs if run.settings and not run.eval_only] or runs)
        unfinish_cut_logs(runs)
    finished = [run for run in runs if run.finished]
    if not finished:
        listing = "\n".join(f"  {run.path}: {run.status}, {run.note}" for run in runs)
        raise RunDataProblem(f"none of {len(runs)} run(s) is finished, so there is nothing to report:\n"
                             f"{listing}\nRun the same commands again to resume them.")
    check_same_data(finished)
    names, groups = differing_settings(finished), {}
    for run in finished:
        group = groups.setdefault(tuple(run.settings.get(name, "(absent)") for name in names), {})
        if (other := group.setdefault(run.seed, run)) is not run:
            hint = ", or add the training runs that know the seeds" if run.eval_only else ""
            raise UsageProblem(f"two runs of seed {run.seed}: {other.path} and {run.path}; expected one, or "
                               f"the mean would count it twice. Leave one out{hint}.")
    return [list(group.values()) for group in groups.values()]


# --- Statistics ----------------------------------------------------------------------------------------
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


def sample_of(runs, label, name="val_bpb"):
    """Returns the Sample of one score over runs that all have it."""
    return Sample.of([getattr(run.scores[label], name) for run in runs])


def bytes_per_token(run, label):
    return run.bytes / run.tokens if run.bytes and run.tokens else run.scores[label].bytes_per_token


def choose_headline(group, wanted):
    """Returns the label of the score a submission is judged by: present and legal in every run.

    UsageProblem if there is none, or if the wanted one is missing, illegal or not of an artifact.
    """
    legal = [label for label in group[0].scores if label != "pre_quant"
             and all(label in run.scores and run.scores[label].legal for run in group)]
    for label in [wanted] if wanted else HEADLINE_ORDER:
        if label in legal:
            return label
    expected = ", ".join(legal if wanted else HEADLINE_ORDER) or "(none)"
    raise UsageProblem(f"--headline {wanted or '(default)'}: no legal score of the artifact that all runs "
                       f"share; expected one of {expected}. Score every run the same way.")


def welch(ours, baseline, threshold):
    """Returns (t, degrees of freedom, p) for H0: baseline.mean - ours.mean <= threshold (Welch 1947).

    UsageProblem if a sample has no standard deviation, or both are 0.
    """
    for name, sample in (("the runs", ours), ("the baseline's", baseline)):
        if sample.n < 2 or sample.sd is None:
            raise UsageProblem(f"Welch's test needs a standard deviation, {name} have {sample.n} run(s); "
                               "expected at least 2 seeds. Pass more runs, or leave out --baseline.")
    if ours.sd == baseline.sd == 0:
        raise UsageProblem("Welch's test needs some spread, and both standard deviations are 0; check that "
                           "the runs are not copies")
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
    if len(sources) == 1 and not Path(sources[0]).exists():
        with contextlib.suppress(ValueError):
            mean, sd, n = sources[0].split(",")
            sample = Sample(float(mean), float(sd), int(n))
            if 0 < sample.mean < math.inf and 0 <= sample.sd < math.inf:
                return sample
        raise UsageProblem(f"--baseline {sources[0]}: neither a file nor MEAN,SD,N; expected a "
                           "submission.json, a run, or mean, sd (bpb) and number of runs: 1.1213,0.0009,3")
    if len(sources) == 1 and sources[0].endswith(".json"):
        return baseline_from_submission(Path(sources[0]))
    runs = load_runs([Path(source) for source in sources])
    for run in runs:
        if not run.finished:
            raise UsageProblem(f"--baseline {run.path}: {run.status} ({run.note}); finish or leave it out")
    (group,) = group_runs(runs, ablation=False)
    check_same_data(finished + runs)
    shared = all(label in run.scores for run in group)
    return sample_of(group, label if shared else choose_headline(group, None))


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
        raise RunDataProblem(f"--baseline {path}: no usable scores ({error!r}); expected seed_results of at "
                             "least two seeds, or val_bpb, val_bpb_std and seeds") from None


def significance_of(args, group, label):
    """Returns (p, the text of results.md) of the test against --baseline, (None, "") without one."""
    if not args.baseline:
        return None, ""
    ours, baseline = sample_of(group, label), read_baseline(args.baseline, label, group)
    # One nat per token is 1 / (ln 2 * bytes per token) bits per byte, by the bytes per token of these runs.
    bits_per_nat = 1 / (math.log(2) * bytes_per_token(group[0], label))
    bpb = args.threshold_nats * bits_per_nat if args.threshold_bpb is None else args.threshold_bpb
    t, df, p = welch(ours, baseline, bpb)
    return p, (f"## Significance\n\nBaseline {baseline} bpb, n = {baseline.n} ({', '.join(args.baseline)}). "
               f"Improvement {baseline.mean - ours.mean:.5f} bpb; asked for: more than "
               f"{bpb / bits_per_nat:.5f} nats per token = {bpb:.5f} bpb.\n\nWelch's one-sided t test: "
               f"t = {t:.4f}, df = {df:.3f}, p = {p:.3g}; {'' if p < SIGNIFICANT_P else 'NOT '}significant "
               f"at p < {SIGNIFICANT_P}.")


# --- submission.json -----------------------------------------------------------------------------------

ANY_TEXT = "some text"  # what --check expects of the author's fields
AUTHOR_FIELDS = ("author", "github_id", "name", "blurb", "date", "track")


def common_value(group, name):
    """Returns the value all runs share, several joined by '; ', None if no run states one."""
    values = dict.fromkeys(str(getattr(run, name)) for run in group if getattr(run, name) is not None)
    return "; ".join(values) or None


def largest(values):
    """Returns the largest value, None unless every run states one: all seeds must keep to a limit."""
    return None if None in values else max(values)


def rounded(value, digits):
    return None if value is None else round(value, digits)


def compliance(group, label, p):
    """Returns {claim: bool} with the claims that these runs measured, and no others."""
    def within(values, limit):
        return None if None in values else max(values) <= limit

    audits, codes = [run.audit_passed for run in group], [run.code_sha256 for run in group]
    claims = {
        "artifact_under_16mb": within([run.total_bytes for run in group], BUDGET_BYTES),
        "train_under_600s": within([run.train_time_s for run in group], TIME_LIMIT_S),
        "eval_under_600s": within([run.scores[label].eval_time_s for run in group], TIME_LIMIT_S),
        "audit_passed": False if False in audits else None if None in audits else True,
        "same_code_all_seeds": None if None in codes or len(codes) < 2 else len(set(codes)) == 1,
        "canonical_validation": group[0].scope and group[0].scope == "canonical",
        "three_seeds": len(group) >= 3,
        "beats_baseline_p_below_0_01": None if p is None else p < SIGNIFICANT_P,
    }
    return {claim: value for claim, value in claims.items() if value is not None}


def build_submission(args, group, label, p):
    """Returns the submission as a dict, val_loss and val_bpb being means over the seeds."""
    bpbs, preset = sample_of(group, label), common_value(group, "preset") or group[0].name
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
        "blurb": args.blurb or f"{preset}, {TITLES.get(label, label)} score, {bpbs.n} seed(s)",
        "date": args.date or str(datetime.datetime.now(datetime.timezone.utc).date()),
        "track": args.track,
        "score_label": label,
        "score_scope": group[0].scope,
        "val_loss": round(sample_of(group, label, "val_loss").mean, 8),
        "val_bpb": round(bpbs.mean, 8),
        "val_bpb_std": rounded(bpbs.sd, 8),
        "bytes_total": largest([run.total_bytes for run in group]),
        "bytes_code": largest([run.code_bytes for run in group]),
        "seeds": [run.seed for run in group],
        "seed_results": results,
        "hardware": common_value(group, "hardware"),
        "pytorch_version": common_value(group, "pytorch_version"),
        "compliance": compliance(group, label, p),
    }


def differences(found, expected, where=""):
    """Returns one line per place that differs. Claims and seeds that the runs do not know are differences,
    other additional fields are not."""
    if not isinstance(expected, dict) or not isinstance(found, dict):
        return [] if agree(found, expected, where) else [f"{where}: {found}, expected {expected}"]
    lines = []
    for name, value in expected.items():
        place = f"{where}.{name}" if where else name
        if name in found:
            lines += differences(found[name], value, place)
        # A claim need not be made; files of others name neither label nor scope, which then means canonical.
        elif where != "compliance" and name != "score_label" and value != "canonical":
            lines.append(f"{place}: missing, expected {value}")
    if where in ("compliance", "seed_results"):
        lines += [f"{where}.{name}: not backed by these runs" for name in found if name not in expected]
    return lines


def agree(found, expected, where):
    """True if a value of the file is what the runs say, a number at its decimals (of a score at least 4)."""
    if expected is ANY_TEXT:
        return isinstance(found, str) and bool(found.strip())
    if where in ("hardware", "pytorch_version") and expected is None:
        return True  # nothing to compare with: scripts of the field do not log them
    if where == "seeds" and isinstance(found, list):
        return sorted(map(str, found)) == sorted(map(str, expected))
    if not isinstance(expected, float):
        return found == expected
    if not isinstance(found, (int, Decimal)) or not Decimal(found).is_finite():
        return False
    decimals = max(-Decimal(found).as_tuple().exponent, 4 if "val_" in where else 1)
    return abs(float(Decimal(found)) - expected) <= 0.5000001 * 10.0**-decimals


# --- results.md ----------------------------------------------------------------------------------------
def cell(value, form="{}"):
    return "-" if value is None else form.format(value)


def table(header, rows):
    """Returns a Markdown table, columns padded so that it reads well as plain text too."""
    rows = [[str(item).replace("|", "\\|").replace("\n", " ") for item in row] for row in [header, *rows]]
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(item.ljust(width) for item, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def score_columns(runs):
    """Returns {label: title} of every score of the runs, known ones first and in table order."""
    present = list(dict.fromkeys(label for run in runs for label in run.scores))
    columns = {}
    for label in [label for label in TITLES if label in present] + present:
        illegal = any(label in run.scores and not run.scores[label].legal for run in runs)
        columns[label] = TITLES.get(label, label) + " (illegal)" * illegal
    return columns


def mean_cell(runs, label):
    """Returns 'mean ± sd' of val_bpb over the runs that have the score, saying so if that is not all."""
    scored = [run for run in runs if label in run.scores]
    part = f" ({len(scored)} of {len(runs)})" if len(scored) < len(runs) else ""
    return f"{sample_of(scored, label)}{part}" if scored else "-"


def seed_table(group, headline):
    """Returns the table of seeds with its mean ± sd row; bpb in the score columns."""
    columns, rows = score_columns(group), []
    for run in group:
        bpbs = [run.scores[label].val_bpb if label in run.scores else None for label in columns]
        rows.append([run.seed, cell(run.steps), cell(run.step_avg_ms, "{:.2f}"),
                     *(cell(bpb, "{:.5f}") for bpb in bpbs),
                     cell(run.artifact_bytes, "{:,}"), cell(run.total_bytes, "{:,}"),
                     cell(run.train_time_s, "{:.1f}"), cell(run.scores[headline].eval_time_s, "{:.1f}")])
    rows.append(["mean ± sd", "", "", *(mean_cell(group, label) for label in columns), "", "", "", ""])
    sizes_and_times = ["artifact bytes", "total bytes", "train s", "eval s"]
    return table(["seed", "steps", "ms/step", *columns.values(), *sizes_and_times], rows)


def ablation_table(groups):
    """Returns the matrix: one row per configuration, its differing settings, then val_bpb per evaluation."""
    finished = [run for group in groups for run in group]
    names, columns = differing_settings(finished), score_columns(finished)
    for label in ("pre_quant", "final_int6_roundtrip"):  # the weakest scores only where there is no other
        if len(columns) > 1:
            columns.pop(label, None)
    rows = [[cell(group[0].preset), *(group[0].settings.get(name, "(absent)") for name in names),
             ", ".join(str(run.seed) for run in group), *(mean_cell(group, label) for label in columns)]
            for group in groups]
    return table(["preset", *names, "seeds", *columns.values()], rows)


def last_sections(runs):
    rows = [[run.name, cell(run.seed), run.status, run.note] for run in runs if not run.finished]
    listing = table(["run", "seed", "status", "what happened"], rows) if rows else "None."
    return (f"## Unfinished and failed runs (not part of any number above)\n\n{listing}\n\n"
            "![curves](curves.png)\n")


def data_text(run, label):
    """Returns the section on what was scored and how the bytes were checked."""
    scope = {"canonical": "the canonical validation split",
             "proxy": "**proxy** data, not the canonical split: not comparable with published scores",
             None: "data of unknown scope (the log does not say)"}[run.scope]
    counts = f"{run.tokens:,} targets, {run.bytes:,} bytes, " if run.tokens and run.bytes else ""
    return (f"Scored on {scope} ({counts}{bytes_per_token(run, label):.4f} bytes per token). Every score "
            "implies these bytes: tokens · val_loss / (ln 2 · val_bpb) was checked line by line.")


def submission_text(submission, runs, group, significance):
    """Returns results.md for runs of one configuration."""
    label, sample = submission["score_label"], sample_of(group, submission["score_label"])
    claims = [f"- {name}: {'yes' if value else 'NO'}" for name, value in submission["compliance"].items()]
    parts = [
        f"# {submission['name']}",
        f"**val_bpb {sample}** ({TITLES.get(label, label)}, {sample.n} seed(s); scores in bits per byte)",
        data_text(group[0], label),
        seed_table(group, label),
        significance,
        "## Measured compliance\n\n" + "\n".join(claims),
        last_sections(runs),
    ]
    return "\n\n".join(filter(None, parts))


# --- curves.png ----------------------------------------------------------------------------------------
def curve_names(runs, ablation):
    """Returns one legend entry per run: its seed, in an ablation what tells its configuration apart."""
    if not ablation:
        return [f"seed {cell(run.seed)}" + ("" if run.finished else f" ({run.status})") for run in runs]
    names = differing_settings([run for run in runs if run.settings])
    entries = [", ".join(f"{name}={run.settings.get(name, '?')}" for name in names) for run in runs]
    return [textwrap.shorten(entry, 160, placeholder=" ...") or "all runs" for entry in entries]


def draw_panel(axis, runs, curves, names, title, ylabel):
    """Draw one curve [(step, value), ...] per run, a colour per name."""
    distinct = list(dict.fromkeys(names))
    colour = plt.get_cmap("tab10" if len(distinct) <= 10 else "tab20")
    for run, curve, name in zip(runs, curves, names):
        steps, values = zip(*curve) if curve else ((), ())
        axis.plot(steps, values, "-" if run.finished else "--", label=name, linewidth=1.3, marker=".",
                  markersize=4, color=colour(distinct.index(name) % colour.N))
    points = [(step, value) for curve in curves for step, value in curve if math.isfinite(value)]
    if points:  # the first 5 % of the steps would flatten everything after them
        start = 0.05 * max(step for step, _ in points)
        shown = [value for step, value in points if step >= start]
        margin = 0.05 * (max(shown) - min(shown)) or 0.05
        axis.set_ylim(min(shown) - margin, max(shown) + margin)
    axis.set(title=title, xlabel="step", ylabel=ylabel)
    axis.grid(alpha=0.3)


def draw_curves(runs, title, ablation):
    """Returns the PNG (bytes): training loss and validation bpb over the steps, one line per run."""
    names = curve_names(runs, ablation)
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), dpi=120, layout="constrained", sharex=True)
    draw_panel(axes[0], runs, [run.train_curve for run in runs], names, "training loss",
               "train_loss (nats per token)")
    draw_panel(axes[1], runs, [run.val_curve for run in runs], names, "validation during training",
               "val_bpb (bits per byte)")
    starts = [run.warmdown_start for run in runs if run.warmdown_start is not None]
    ends = [run.last_step for run in runs if run.last_step is not None]
    if starts and ends:
        for axis in axes:
            axis.axvspan(min(starts), max(ends), color="0.5", alpha=0.15, label="warmdown", zorder=0)
    figure.suptitle(title)
    handles, labels = axes[0].get_legend_handles_labels()
    entries = dict(zip(labels, handles))  # one per name
    columns = max(1, min(len(entries), 190 // (10 + max(map(len, entries)))))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


# --- Command line --------------------------------------------------------------------------------------
def write_files(directory, contents):
    """Write {name: bytes} into a directory, by a scratch folder and renames: no file is ever half there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".collect.", dir=directory) as scratch:
            for name, data in contents.items():
                Path(scratch, name).write_bytes(data)
            for name in contents:
                os.replace(Path(scratch, name), directory / name)
    except OSError as error:
        raise UsageProblem(f"--out {directory}: {error.strerror}; expected a directory to write to") from None


def number_from_0(text):
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def iso_date(text):
    return str(datetime.date.fromisoformat(text))


def build_parser():
    summary, details = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(prog="collect.py", description=summary, epilog=details,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run directory or log file, one per seed")
    add("--out", type=Path, default=Path("."), metavar="DIR",
        help="where submission.json, results.md and curves.png go (default: here)")
    add("--ablation", action="store_true",
        help="allow several configurations: matrix of differing settings, no submission.json")
    add("--check", type=Path, metavar="FILE",
        help="compare a submission.json with the runs, number by number; writes nothing")
    add("--headline", metavar="LABEL",
        help=f"score to submit (default: the first present of {', '.join(HEADLINE_ORDER)})")
    test = parser.add_argument_group("significance")
    test.add_argument("--baseline", action="append", metavar="FILE|MEAN,SD,N",
                      help="what to beat: a submission.json, or val_bpb as mean,sd,runs; run directories and "
                           "logs one by one, repeating the option")
    threshold = test.add_mutually_exclusive_group()
    threshold.add_argument("--threshold-nats", type=number_from_0, default=0.005, metavar="X",
                           help="improvement to prove, in nats per token (default 0.005)")
    threshold.add_argument("--threshold-bpb", type=number_from_0, metavar="X",
                           help="the same in bits per byte (default: converted by the runs' bytes per token)")
    add = parser.add_argument_group("author's fields of submission.json").add_argument
    add("--author", default="anonymous", help="default: anonymous")
    add("--github-id", help="default: the author")
    add("--name", help="default: the preset")
    add("--blurb", help="one sentence (default: preset, score and number of seeds)")
    add("--track", default="non-record-16mb", help="default: non-record-16mb")
    add("--date", type=iso_date, metavar="YYYY-MM-DD", help="default: today in UTC")
    return parser


def collect_ablation(args, runs):
    """Write and print the matrix over configurations."""
    for name in ("check", "baseline", "headline"):
        if getattr(args, name):
            raise UsageProblem(f"--{name} is for one configuration; leave out either it or --ablation")
    groups = group_runs(runs, ablation=True)
    first = groups[0][0]
    text = "\n\n".join([
        "# Ablation", data_text(first, next(iter(first.scores))),
        "Scores in bits per byte, mean ± sd over seeds.", ablation_table(groups), last_sections(runs)])
    write_files(args.out, {"results.md": text.encode(), "curves.png": draw_curves(runs, "Ablation", True)})
    sys.stdout.write(text)
    return 0


def check_submission(path, submission):
    """Print the differences between a submission.json and what the runs say; returns the exit code."""
    if not path.exists():
        raise UsageProblem(f"--check {path}: no such file; leave out --check to write a submission.json")
    found = read_json(path, parse_float=Decimal, parse_constant=Decimal)  # Decimals keep what was written
    lines = differences(found, submission | dict.fromkeys(AUTHOR_FIELDS, ANY_TEXT))
    sys.stderr.writelines(f"{path}: {line}\n" for line in lines)
    if not lines:
        print(f"{path}: agrees with {len(submission['seeds'])} run(s), {submission['score_label']}")
    return 1 if lines else 0


def collect_submission(args, runs):
    """Write and print the results of one configuration, or check a submission.json against them."""
    (group,) = group_runs(runs, ablation=False)
    label = choose_headline(group, args.headline)
    p, significance = significance_of(args, group, label)
    submission = build_submission(args, group, label, p)
    if args.check:
        return check_submission(args.check, submission)
    if len(group) == 1:
        sys.stderr.write(f"collect.py: note: one finished run ({group[0].path}): val_bpb_std is null; it "
                         "takes at least 2 seeds\n")
    text = submission_text(submission, runs, group, significance)
    as_json = json.dumps(submission, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_files(args.out, {"submission.json": as_json.encode(), "results.md": text.encode(),
                           "curves.png": draw_curves(runs, submission["name"], False)})
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
        sys.stderr.write(f"collect.py: error: {error.filename}: {error.strerror}; expected a readable file\n")
        return RunDataProblem.exit_code


if __name__ == "__main__":
    sys.exit(main())
