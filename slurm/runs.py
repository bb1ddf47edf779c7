"""Read runs of train_gpt.py; collect.py and package.py share this.

    read_path("runs/nfm_7k_seed42")    a run folder: its JSON files, read strictly
    read_path("train_seed42.log")      a log: the lines that train_gpt.py prints
    read_path("submission")            a submission folder: its logs, one run each

Units: val_loss in nats per token, val_bpb in bits per byte, sizes in bytes, times in seconds except
step_avg_ms. Nothing here prints or writes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path


def open_terminal():
    """Escape characters that the terminal lacks; a stream that `>&-` closed becomes /dev/null."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")


class UsageProblem(Exception):
    """Wrong use, or runs that must not be mixed."""

    exit_code = 2


class RunDataProblem(Exception):
    """The files of a run are damaged or contradictory, or hold no usable result."""

    exit_code = 3


def with_separators(number):
    """An integer with narrow no-break spaces between its thousands: 15 882 446."""
    return f"{number:,}".replace(",", "\u202f")


def number_from_0(text):
    """An argument that has to be a finite number of at least 0; argparse words the ValueError."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


# --- The record ----------------------------------------------------------------------------------

# How a score was measured, weakest first. The order is fixed, so that nobody picks the headline
# after seeing the scores.
FLOAT = "float weights"
ROUNDTRIP = "roundtrip"
SLIDING = "sliding"
STAGES = (FLOAT, ROUNDTRIP, SLIDING, "SLOT", "TTT", "TTT + SLOT")
# Scores of the packed model, strongest first. Float weights are no submission.
HEADLINE_ORDER = tuple(reversed(STAGES[1:]))


def stage_of(label):
    """The stage of a label of train_gpt.py, such as final_int6_roundtrip or legal_ttt."""
    if label.startswith(("pre_quant", "float_")):
        return FLOAT
    adapted = [name for name in ("TTT", "SLOT") if name.lower() in label]
    if adapted:
        return " + ".join(adapted)
    return SLIDING if "sliding" in label else ROUNDTRIP


@dataclass
class Score:
    """One evaluation."""

    label: str
    val_loss: float  # nats per token
    val_bpb: float  # bits per byte
    eval_time_s: float | None = None
    tokens: int | None = None  # targets that were scored

    @property
    def bytes_per_token(self):
        """Bytes of text behind a token: the loss in bits over the bits per byte."""
        return self.val_loss / (math.log(2) * self.val_bpb)


@dataclass
class Run:
    """One run, whether a folder's files or a log's lines tell of it."""

    path: Path
    config: dict = field(default_factory=dict)  # JSON values, or the texts of a log
    kinds: dict = field(default_factory=dict)  # {setting: "arch" | ... | "run"}, {} for a log
    manifest: dict = field(default_factory=dict)  # code, hardware, validation data
    results: dict = field(default_factory=dict)  # scores.json: sizes, times, scores by label
    audit_passed: bool | None = None
    seed: int | None = None
    status: str = "unfinished"  # finished | unfinished | failed
    note: str = ""  # why it is not finished
    remark: str = ""  # for readers of its numbers
    scope: str | None = None  # of its scores: canonical-by-counts | proxy
    training_s: float | None = None  # with what QUANTIZER=gptq took: it calibrates on training text
    scores: dict[str, Score] = field(default_factory=dict)  # by stage, " (illegal)" where so
    train_curve: dict[int, float] = field(default_factory=dict)  # {step: nats per token}
    val_curve: dict[int, float] = field(default_factory=dict)  # {step: bits per byte}
    warmdown_start: int | None = None  # first logged step at a lowered rate

    @property
    def name(self):
        return self.path.name or str(self.path)

    @property
    def finished(self):
        return self.status == "finished"

    @property
    def preset(self):
        return self.config.get("preset")

    @property
    def eval_only(self):
        """True for a run that scored an artifact and trained nothing."""
        return bool(self.config.get("eval_only"))

    @property
    def data(self):
        """The manifest's facts on the validation text."""
        return self.manifest.get("data") or {}

    @property
    def artifact_sha256(self):
        return self.manifest.get("artifact_sha256")

    @property
    def last_step(self):
        return max([*self.train_curve, *self.val_curve], default=None)


@contextlib.contextmanager
def reading(path):
    """RunDataProblem that names the path for anything in its content that fails."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunDataProblem(
            f"{path}: not readable as JSON of the expected fields, or not JSON: {error!r}; "
            "restore it or repeat the run"
        ) from None


def make_run(path, config, kinds, manifest, events, results, audit_passed):
    """The Run of facts in the shapes of a folder's files; RunDataProblem for contradictions."""
    run = Run(path, config, kinds, manifest, results, audit_passed)
    run.seed = int(config["seed"]) if "seed" in config else None
    run.scope = run.data.get("scope")
    run.training_s = results.get("train_time_s")
    read_curves(run, events)
    for event in events:
        if event["event"] == "packed":  # a run may be packed again: the last packing counts
            run.training_s = event.get("with_training_seconds", results.get("train_time_s"))
    for label, entry in results.get("scores", {}).items():
        legal = bool(entry.get("legal", True)) and not label.startswith("illegal")
        loss, bpb = float(entry["val_loss"]), float(entry["val_bpb"])
        tokens = entry.get("tokens", run.data.get("val_targets"))
        score = Score(label, loss, bpb, entry.get("eval_time_s"), tokens)
        run.scores[stage_of(label) if legal else f"{stage_of(label)} (illegal)"] = score
    if results.get("finished"):
        run.status = "finished"
        check_scores(run)
        check_text(run)
    else:
        run.status, run.note = explain(run, events)
    return run


def read_curves(run, events):
    """Fill in the curves; a resumed run goes through some steps again, the last visit counts."""
    scales = {}  # {step: share of the full learning rate}
    last = 0
    for event in events:
        kind = event["event"]
        if kind not in ("start", "step", "val"):
            continue
        step = int(event.get("resumed_step") or 0) if kind == "start" else int(event["step"])
        if step < last:
            for curve in (run.train_curve, run.val_curve):
                for later in [at for at in curve if at > step]:
                    del curve[later]
        last = step
        if kind == "step":
            run.train_curve[step] = float(event["train_loss"])
            scales[step] = event.get("lr_scale")
        elif kind == "val":
            run.val_curve[step] = float(event["val_bpb"])
    # The schedule may run by the clock: the plot shades where the rate fell, not the plan
    for step in reversed(run.train_curve):
        if scales[step] is None or scales[step] >= 1:
            break
        run.warmdown_start = step


def explain(run, events):
    """(status, note) of a run that has not finished: its last event tells the reason."""
    progress = "before the first logged step"
    if run.last_step is not None:
        step = f"{run.last_step}/{run.config.get('iterations')}"
        progress = f"last logged step {step}, scored {', '.join(run.scores) or 'nothing'}"
    last = events[-1] if events else {"event": "none"}
    if last["event"] == "error":
        message = textwrap.shorten(str(last.get("message")), 120, placeholder=" ...")
        code = f"exit code {last['code']}: " if "code" in last else ""
        return "failed", f"{code}{message} ({progress})"
    if last["event"] == "audit":
        return "unfinished", f"audited (passed: {last.get('passed')}), not scored"
    why = "still running or killed"
    if last["event"] == "stopped":
        why = f"stopped by {last.get('signal')}, phase: {last.get('phase')}; "
        why += "resumes with the same command"
    return "unfinished", f"{why} ({progress})"


# The challenge's validation text: targets with 1,024 and with 8,192 pieces, bytes with any.
CANONICAL_TARGETS = (62_021_632, 40_540_160)
CANONICAL_BYTES = (151_020_000, 151_080_000)
# Relative difference of implied bytes that eight printed decimals leave open.
IMPLIED_SLACK = 1e-7


def check_scores(run):
    """RunDataProblem unless a finished run has finite scores that imply the data's own bytes.

    tokens * val_loss / (ln 2 * val_bpb) is the number of bytes behind a score, whatever the model.
    """
    if not run.scores:
        raise RunDataProblem(f"{run.path}: finished without a score; score the run again")
    for stage, score in run.scores.items():
        if not (0 < score.val_loss < math.inf and 0 < score.val_bpb < math.inf):
            raise RunDataProblem(
                f"{run.path}: {stage} ({score.label}) has val_loss {score.val_loss}, val_bpb "
                f"{score.val_bpb}; expected positive numbers. Repeat the run."
            )
        implied, expected = (score.tokens or 0) * score.bytes_per_token, run.data.get("val_bytes")
        if expected and abs(implied / expected - 1) > IMPLIED_SLACK:
            raise RunDataProblem(
                f"{run.path}: {score.label} implies {implied:,.1f} bytes, the validation data has "
                f"{expected:,}; expected the same (tokens * val_loss / (ln 2 * val_bpb)). One of "
                "them is wrong or scored a part of the text: score the run again."
            )


def check_text(run):
    """Remark a text that calls itself canonical, or has its length, but implies other bytes."""
    score = next(iter(run.scores.values()))
    tokens, implied = score.tokens or 0, (score.tokens or 0) * score.bytes_per_token
    low, high = CANONICAL_BYTES
    named, counted = (run.scope or "").startswith("canonical"), tokens in CANONICAL_TARGETS
    if (named or counted) and not (counted and low <= implied <= high):
        run.scope = "proxy"
        run.remark = (
            f"its scores imply {implied:,.0f} bytes behind {tokens:,} targets, the canonical text "
            f"has {low:,} to {high:,} bytes: not comparable with published scores. Check the "
            "shards and their tokenizer."
        )


# --- Run folders ---------------------------------------------------------------------------------


def read_json(path, **options):
    """The object in a JSON file, {} where there is no file; RunDataProblem if it is damaged."""
    if not path.exists():
        return {}
    with reading(path):
        data = json.loads(path.read_text(encoding="utf-8"), **options)
        return {**data}  # TypeError: not an object


def read_events(path):
    """The events of metrics.jsonl as a list of dicts; RunDataProblem if a line is damaged."""
    events = []
    lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        # Every kill may leave one line torn, with or without the next event glued to it. The whole
        # line first: a message inside an event may quote another event
        for text in (line, line[line.rfind('{"event"') :]):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                event = json.loads(text)
                events.append({"event": event["event"], **event})
                break
        else:
            torn = '{"event"'.startswith(line[:8]) and not line.endswith("}")
            if line.strip() and not torn:
                raise RunDataProblem(
                    f"{path}:{number}: damaged line {line[:60]!r}; expected a JSON object "
                    'with "event", or one torn by a kill. Restore the file.'
                )
    return events


def read_run_dir(path):
    """The Run of a run folder; RunDataProblem if a file is missing, damaged or contradictory."""
    events = read_events(path / "metrics.jsonl")
    written = read_json(path / "config.json")
    # Missing data end a run before it has a config.json; its events say so
    if not written and not events:
        inside = len(list(path.glob("*/config.json")))
        hint = f"it holds {inside} of them, pass {path}/*" if inside else "pass one, or a log"
        raise RunDataProblem(
            f"{path}: no config.json and no log; expected a run directory of train_gpt.py or a "
            f"submission folder: {hint}"
        )
    with reading(path):
        return make_run(
            path,
            config=written["config"] if written else {},
            kinds=written["kinds"] if written else {},
            manifest=read_json(path / "manifest.json"),
            events=events,
            results=read_json(path / "scores.json"),
            # Written before scores.json: an audited run need not be scored
            audit_passed=read_json(path / "audit.json").get("passed"),
        )


# --- Logs ----------------------------------------------------------------------------------------

CONFIG_LINE = re.compile(r"config:(\w+)=(.*?)( \*)?")
STEP_LINE = re.compile(
    r"step:(\d+)/\d+ (?:train_loss:(\S+)|val_loss:\S+ val_bpb:(\S+)) "
    r"train_time:(\d+)ms step_avg:([\d.]+)ms.*"
)
RESUMED_LINE = re.compile(r"resumed_from:.* step:(\d+)")
TIME_LINE = re.compile(r"(\w+) val_loss:\S+ val_bpb:\S+ .*eval_time:(\d+)ms.*")
SCORE_LINE = re.compile(r"(\w+)_exact val_loss:(\S+) val_bpb:(\S+)( legality:illegal)?")
# The headline once more, under the name that the challenge's own parser looks for.
OFFICIAL_COPY = "final_int8_zlib_roundtrip"
SIZE_LINE = re.compile(r"(Code|Serialized|Total) .*: (\d+) bytes")
SIZES = {"Code": "code_bytes", "Serialized": "artifact_bytes", "Total": "total_bytes"}
QUANTISED_LINE = re.compile(r"quantised .*with_training:([\d.]+)s")
AUDIT_LINE = re.compile(r"audit (pass|FAIL) \d+ checks .*")
STOPPED_LINE = re.compile(r"stopped signal:(\S+) phase:(.*?);.*")


def read_log(path):
    """The Run of a log; RunDataProblem if train_gpt.py did not print it, or for two runs in it."""
    lines = path.read_text("utf-8", "replace").split("\n")
    # A number at the end of a log that is still written may be cut
    if not lines[-1].startswith("run_finished"):
        lines.pop()
    config, manifest, events, passed, seeds = {}, {}, [], None, set()
    packing = {}  # seconds of the packing whose sizes come next
    scores, times, results = {}, {}, {}
    for line in lines:
        if found := STEP_LINE.fullmatch(line):
            step, loss, bpb, ms, average = found.groups()
            results.update(steps=int(step), train_time_s=int(ms) / 1000, step_avg_ms=float(average))
            if loss:
                events.append(dict(event="step", step=step, train_loss=loss))
            else:
                events.append(dict(event="val", step=step, val_bpb=bpb))
        elif found := CONFIG_LINE.fullmatch(line):
            config[found[1]] = found[2]
        elif line.startswith("manifest:"):
            with reading(path):
                manifest = json.loads(line.partition(":")[2])
        elif found := re.fullmatch(r"seed:(\d+)", line):
            seeds.add(int(found[1]))
        elif found := RESUMED_LINE.fullmatch(line):
            events.append(dict(event="start", resumed_step=found[1]))
        elif found := QUANTISED_LINE.fullmatch(line):
            packing = dict(with_training_seconds=float(found[1]))
        elif found := SIZE_LINE.fullmatch(line):
            results[SIZES[found[1]]] = int(found[2])
            if found[1] == "Serialized":
                events.append(dict(event="packed", **packing))
                packing = {}
        elif found := AUDIT_LINE.fullmatch(line):
            passed = found[1] == "pass"
            events.append(dict(event="audit", passed=passed))
        elif found := SCORE_LINE.fullmatch(line):
            scores[found[1]] = dict(val_loss=found[2], val_bpb=found[3], legal=not found[4])
        elif found := TIME_LINE.fullmatch(line):
            times[found[1]] = int(found[2]) / 1000
        elif found := STOPPED_LINE.fullmatch(line):
            events.append(dict(event="stopped", signal=found[1], phase=found[2]))
        elif line.startswith("error: "):
            events.append(dict(event="error", message=line.partition(" ")[2]))
        elif line.startswith("run_finished"):
            results["finished"] = True
    if not config:
        raise RunDataProblem(
            f"{path}: no line 'config:...'; expected a log of train_gpt.py. Give the scores of "
            "other scripts as --baseline MEAN,SD,N."
        )
    if len(seeds) > 1:
        raise RunDataProblem(
            f"{path}: holds runs of the seeds {sorted(seeds)}; expected one run. Split the log."
        )
    scores.pop(OFFICIAL_COPY, None)
    for label, entry in scores.items():
        entry["eval_time_s"] = times.get(label)
    results["scores"] = scores
    with reading(path):
        return make_run(path, config, {}, manifest, events, results, passed)


def read_path(path):
    """The Runs at a path: a run folder, a log, or a submission folder with its logs."""
    if not path.exists():
        raise UsageProblem(f"{path}: no such file or directory; expected a run directory or a log")
    if not path.is_dir():
        return [read_log(path)]
    # No run was made in a submission folder, so its logs are what there is of runs
    if not any((path / name).exists() for name in ("config.json", "metrics.jsonl")):
        logs = sorted(path.glob("train_seed*.log")) or sorted(path.glob("train.log"))
        if logs:
            return [read_log(log) for log in logs]
    return [read_run_dir(path)]


# --- Which runs go together ----------------------------------------------------------------------

IDENTITY = {"seed", "run_id", "run_dir"}  # settings that tell runs of one configuration apart
ABSENT = "(absent)"  # a setting that a run does not have


def load_runs(paths):
    """The Runs at the paths; finished EVAL_ONLY runs gave their scores to the training runs.

    Only evaluations stay as they are. UsageProblem for an evaluation among training runs that
    scored the artifact of none of them, or scored it differently.
    """
    runs = [run for path in paths for run in read_path(path)]
    if all(run.eval_only for run in runs):
        return runs
    # An evaluation belongs to the run whose artifact it names by its checksum
    trained = [run for run in runs if run.finished and not run.eval_only]
    owners = {run.artifact_sha256: run for run in trained if run.artifact_sha256}
    for run in runs:
        if run.finished and run.eval_only:
            owner = owners.get(run.artifact_sha256)
            if owner is None:
                raise UsageProblem(
                    f"{run.path}: scored an artifact of no finished run; expected its training run "
                    "as well. Pass both, or only evaluations."
                )
            merge_evaluation(owner, run)
    return [run for run in runs if not (run.finished and run.eval_only)]


def merge_evaluation(owner, run):
    """Give `owner` the scores and the audit of `run`, an evaluation of its artifact."""
    for stage in [stage for stage in owner.scores if stage in run.scores]:
        theirs, ours = run.scores[stage], owner.scores[stage]
        if abs(theirs.val_bpb - ours.val_bpb) > 1e-6:
            raise UsageProblem(
                f"{run.path}: {theirs.label} val_bpb is {theirs.val_bpb:.8f}, in {owner.path} "
                f"{ours.val_bpb:.8f} for the same artifact; expected one score. Leave one out."
            )
    if run.scores.keys() - owner.scores.keys():
        # An evaluation may choose the settings of kind "eval" anew
        chosen = [name for name, kind in run.kinds.items() if kind == "eval"]
        owner.config = {**owner.config, **{name: run.config[name] for name in chosen}}
    owner.scores = {**run.scores, **owner.scores}
    # One failed audit of an artifact is a failed audit
    audits = {owner.audit_passed, run.audit_passed} - {None}
    owner.audit_passed = all(audits) if audits else None


def differing_settings(runs):
    """{setting: its value in each run, as text} of what tells configurations apart.

    Neither settings that tell runs of one configuration apart count, nor those that say where and
    how a run happens (kind "run" in config.json). Logs do not tell the kinds: a folder tells them
    for the logs beside it, and among logs alone everything counts.
    """
    kinds = {name: kind for run in runs for name, kind in run.kinds.items()}
    table = {}
    for name in dict.fromkeys(name for run in runs for name in run.config):
        values = [str(run.config.get(name, ABSENT)) for run in runs]
        # A run that failed before it began has no configuration, and so none that differs
        known = {value for run, value in zip(runs, values) if run.config}
        if len(known) > 1 and name not in IDENTITY and kinds.get(name) != "run":
            table[name] = values
    return table


def check_one_configuration(runs):
    """UsageProblem if the runs differ in more than their seed and operational settings."""
    table = differing_settings(runs)
    if not table:
        return
    # The preset first, though it is no difference of its own: it explains the others
    shown = {"preset": [run.preset for run in runs], **dict(list(table.items())[:8])}
    lines = []
    for name, values in shown.items():
        each = ", ".join(f"{value} ({run.name})" for value, run in zip(values, runs))
        lines.append(f"  {name}: {each}")
    if len(table) > 8:
        lines.append(f"  ... and {len(table) - 8} more")
    raise UsageProblem(
        "the runs have different configurations; expected the same in all but the seed:\n"
        + "\n".join(lines)
        + "\nPass the runs of one configuration, or use --ablation."
    )


def group_runs(runs, ablation):
    """The finished runs as lists of one configuration each, in the order given.

    Errors: UsageProblem for mixed configurations (unless `ablation`), mixed data or two runs of
    one seed; RunDataProblem if no run is finished.
    """
    if not ablation:
        check_one_configuration([run for run in runs if not run.eval_only] or runs)
    finished = [run for run in runs if run.finished]
    if not finished:
        listing = "\n".join(f"  {run.path}: {run.status}, {run.note}" for run in runs)
        raise RunDataProblem(
            f"none of {len(runs)} run(s) is finished, so there is nothing to report:\n{listing}\n"
            "Run the same commands again to resume them."
        )
    texts = {run.data.get("val_sha256"): run.name for run in finished if run.data}
    if len(texts) > 1:
        shown = ", ".join(f"{value} ({name})" for value, name in texts.items())
        raise UsageProblem(
            f"the runs differ in val_sha256 of the validation data: {shown}; expected one data set"
        )
    table, groups = differing_settings(finished), {}
    for at, run in enumerate(finished):
        groups.setdefault(tuple(values[at] for values in table.values()), []).append(run)
    for group in groups.values():
        seen = {}
        for run in group:
            other = seen.setdefault(run.seed, run)
            if other is not run:
                hint = ", or add the training runs that know the seeds" if run.eval_only else ""
                raise UsageProblem(
                    f"two runs of seed {run.seed}: {other.path} and {run.path}; expected one, or "
                    f"the mean would count it twice. Leave one out{hint}."
                )
    return list(groups.values())
