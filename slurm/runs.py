"""One record of a run, whatever it was read from; collect.py and package.py share it.

    read_path("runs/nfm_7k_seed42")    a run folder of train_gpt.py: its JSON files, read strictly
    read_path("train_seed42.log")      a plain log, of train_gpt.py or another script of the field
    read_path("records/some_folder")   a folder of plain logs, one run per log

A plain log is read by the shape of its lines (a label, val_loss, val_bpb, a time), not by a list
of names. Units: val_loss in nats per token, val_bpb in bits per byte, sizes in bytes, times in
seconds except step_avg_ms. Nothing here prints or writes.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import claims
import logs


class UsageProblem(Exception):
    """Wrong use, or runs that must not be mixed."""

    exit_code = 2


class RunDataProblem(Exception):
    """The files of a run are damaged or contradictory, or hold no usable result."""

    exit_code = 3


def with_separators(number):
    """An integer with narrow no-break spaces between its thousands: 15 882 446."""
    return f"{number:,}".replace(",", "\u202f")


# --- Stages --------------------------------------------------------------------------------------
# What a score was measured on and how. The order is fixed, weakest first, so that nobody picks the
# headline after seeing the scores. Every script names its evaluations differently; the words of a
# name tell the stage all the same.

FLOAT = "float weights"
ROUNDTRIP = "roundtrip"
SLIDING = "sliding"
LAST = "last evaluation"
SLOT = "SLOT"
TTT = "TTT"
TTT_SLOT = "TTT + SLOT"
ADAPTED = (SLOT, TTT, TTT_SLOT)
STAGES = (FLOAT, ROUNDTRIP, SLIDING, LAST, SLOT, TTT, TTT_SLOT)
# Scores of the packed model, strongest first. Float weights are no submission.
HEADLINE_ORDER = tuple(reversed(STAGES[1:]))
WORSE_BPB = 6e-4  # bits per byte; less is rounding

UNPACKED_WORDS = re.compile(r"\b(pre|un|non|before) ?quant|\bno quant|^float ")
PACKED_WORDS = re.compile(r"quant|round ?trip|gptq|compressed|packed|\bint ?\d|\bq\d")
FLOAT_WORDS = re.compile(r"\b(ema|swa|float\d*|fp\d+|bf16|raw|master)\b")
TTT_WORDS = re.compile(r"(?<!pre )(?<!no )(?<!before )\bttt|test time train")
SLOT_WORDS = re.compile(r"(?<!pre )(?<!no )(?<!before )\bslot")
SLIDING_WORDS = re.compile(r"slid|\bstride|overlap")


def names_packed(label):
    """True if a label's words name the packed model, as "final_int8_roundtrip" does."""
    words = re.sub(r"[\W_]+", " ", label).strip().lower()
    # "pre-quantization" holds the word "quantization": the negation is looked for first
    return bool(PACKED_WORDS.search(words)) and not UNPACKED_WORDS.search(words)


def stage_of(label, packed=True):
    """The stage that a label's words name.

    `packed` decides where they name none: whether the model had been packed when the line was
    printed.
    """
    words = re.sub(r"[\W_]+", " ", label).strip().lower()
    if UNPACKED_WORDS.search(words):
        return FLOAT
    with_ttt, with_slot = bool(TTT_WORDS.search(words)), bool(SLOT_WORDS.search(words))
    if with_ttt and with_slot:
        return TTT_SLOT
    if with_ttt:
        return TTT
    if with_slot:
        return SLOT
    # Words beat the place in the log: some scripts score the float weights after packing
    named_packed = names_packed(label)
    if not named_packed and (FLOAT_WORDS.search(words) or not packed):
        return FLOAT
    if SLIDING_WORDS.search(words):
        return SLIDING
    return ROUNDTRIP if named_packed else LAST


# --- The record ----------------------------------------------------------------------------------


@dataclass
class Score:
    """One evaluation. `decimals` is how many the source printed (16: a whole float)."""

    label: str
    val_loss: float | None  # nats per token; None if only val_bpb was printed
    val_bpb: float  # bits per byte
    eval_time_s: float | None = None
    legal: bool = True
    decimals: int = 16

    @property
    def bytes_per_token(self):
        """Bytes of text behind a token: the loss in bits over the bits per byte."""
        return None if self.val_loss is None else self.val_loss / (math.log(2) * self.val_bpb)

    @property
    def rounding(self):
        """Largest relative error of bytes_per_token that the printed decimals explain."""
        # A little more than half a unit of the last digit, on loss and bpb at once
        half_a_digit = 0.51 * 10.0**-self.decimals
        return half_a_digit * (1 / self.val_loss + 1 / self.val_bpb) + 1e-9

    def agrees(self, other):
        """True if both are the same numbers, up to the decimals of the coarser one."""
        # Each may be off by half a unit of the coarser last digit
        slack = 1.02 * 10.0 ** -min(self.decimals, other.decimals)
        if abs(self.val_bpb - other.val_bpb) > slack:
            return False
        if self.val_loss is None or other.val_loss is None:
            return True
        return abs(self.val_loss - other.val_loss) <= slack

    def refine(self, copy):
        """Take over the digits of a copy of this score that says more."""
        if copy.is_finer_than(self):
            self.val_loss, self.val_bpb = copy.val_loss, copy.val_bpb
            self.decimals = copy.decimals

    def is_finer_than(self, other):
        """True if this line says more: a loss as well, or more decimals."""
        mine = (self.val_loss is not None, self.decimals)
        return mine > (other.val_loss is not None, other.decimals)


@dataclass
class Run:
    """What is known of one run; None where the source does not say."""

    path: Path
    status: str = "unfinished"  # finished | unfinished | failed
    note: str = ""  # why it is not finished
    remarks: list[str] = field(default_factory=list)  # what a reader of its numbers should know
    folder: Path | None = None  # of logs, if it was read with it
    submitted: str = ""  # why it is the one run that its folder was judged by, if it is
    claimed_stage: str | None = None  # the score that its folder's author claims
    seed: int | None = None
    preset: str | None = None
    config: dict = field(default_factory=dict)  # as the source spells the values
    settings: dict = field(default_factory=dict)  # {field: value as text}
    kinds: dict = field(
        default_factory=dict
    )  # {"arch" | "train" | "eval" | "run": names of settings}
    whole_config: bool = False  # settings holds every field: the run is one of train_gpt.py
    iterations: int | None = None
    steps: int | None = None
    step_avg_ms: float | None = None
    train_time_s: float | None = None
    with_quantiser_s: float | None = None  # the same and what QUANTIZER=gptq took after it
    artifact_bytes: int | None = None
    code_bytes: int | None = None
    total_bytes: int | None = None
    hardware: str | None = None
    world_size: int = 1
    torch_threads: int = 1
    pytorch_version: str | None = None
    code_sha256: str | None = None
    artifact_sha256: str | None = None
    scope: str | None = None  # canonical | canonical-by-counts | proxy
    tokens: int | None = None  # targets of the validation data
    bytes: int | None = None  # bytes of those targets
    val_sha256: str | None = None
    audit_passed: bool | None = None
    eval_only: bool = False  # scored an artifact, trained nothing
    warmdown_start: int | None = None
    scores: dict[str, Score] = field(
        default_factory=dict
    )  # by stage, " (illegal)" appended where so
    raw_scores: dict = field(default_factory=dict)  # scores.json as it stands, by label
    validations: list[Score] = field(default_factory=list)  # of the training loop, from logs
    train_curve: list[tuple[int, float]] = field(default_factory=list)  # (step, nats per token)
    val_curve: list[tuple[int, float]] = field(default_factory=list)  # (step, bits per byte)

    @property
    def name(self):
        return self.path.name or str(self.path)

    @property
    def finished(self):
        return self.status == "finished"

    @property
    def training_s(self):
        """Seconds that count as training; a quantiser that calibrates on training text is part."""
        return self.train_time_s if self.with_quantiser_s is None else self.with_quantiser_s

    @property
    def packed_scores(self):
        """The legal scores of the packed model: those that may be submitted."""
        return {stage: self.scores[stage] for stage in HEADLINE_ORDER if stage in self.scores}

    @property
    def last_step(self):
        ends = self.train_curve[-1:] + self.val_curve[-1:]
        return max((step for step, _ in ends), default=None)

    def progress(self):
        """Where it got to, in words."""
        if self.last_step is None:
            return "before the first logged step"
        scored = ", ".join(self.scores) or "nothing"
        return f"last logged step {self.last_step}/{self.iterations}, scored {scored}"


def as_text(value):
    """One spelling for a setting, whether from JSON (true, [5, 6]) or from a log (True, (5, 6))."""
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(as_text(item) for item in value) + ")"
    # Quotes, and the comma of a tuple of one
    text = re.sub(r"['\"]|,(?=\))", "", str(value).strip())
    return text[:-2] if re.fullmatch(r"-?\d+\.0", text) else text


def whole_number(value):
    """A setting as an int, None if it is none."""
    return int(value) if str(value).isdecimal() else None


def apply_config(run, config):
    """Fill in what a configuration (all fields, JSON values or log texts) says."""
    run.config = config
    run.settings = {name: as_text(value) for name, value in config.items()}
    run.whole_config = True
    run.preset = config.get("preset")
    run.eval_only = bool(config.get("eval_only"))
    run.seed = whole_number(config.get("seed", run.seed))
    run.iterations = whole_number(config.get("iterations", run.iterations))


def apply_manifest(run, manifest):
    """Fill in what a manifest says about code, hardware and validation data."""
    run.pytorch_version = manifest.get("torch")
    run.artifact_sha256 = manifest.get("artifact_sha256")
    run.code_sha256 = manifest.get("code_sha256")
    run.code_bytes = manifest.get("code_bytes")
    run.world_size = manifest.get("world_size", 1)
    run.torch_threads = manifest.get("torch_threads", 1)
    # As records write it: "8x NVIDIA H100 80GB HBM3"
    if manifest.get("device_name"):
        run.hardware = f"{run.world_size}x {manifest['device_name']}"
    data = manifest.get("data") or {}
    run.tokens = data.get("val_targets")
    run.bytes = data.get("val_bytes")
    run.val_sha256 = data.get("val_sha256")
    run.scope = data.get("scope")


def replay(run, events):
    """Rebuild the curves from the events "start", "step" and "val"; KeyError, ValueError if
    damaged.

    A resumed run goes through some steps again, and their last visit counts.
    """
    train = {}  # {step: loss}
    val = {}  # {step: bpb}
    scales = {}  # {step: share of the full learning rate}
    last = 0
    for event in events:
        kind = event["event"]
        if kind not in ("start", "step", "val"):
            continue
        step = int(event.get("resumed_step") or 0) if kind == "start" else int(event["step"])
        # Going back in steps is a resume: what came after it is computed again
        if step < last:
            train = {at: value for at, value in train.items() if at <= step}
            val = {at: value for at, value in val.items() if at <= step}
        last = step
        if kind == "step":
            train[step] = float(event["train_loss"])
            scales[step] = event.get("lr_scale")
        elif kind == "val":
            val[step] = float(event["val_bpb"])
    run.train_curve = list(train.items())
    run.val_curve = list(val.items())
    # The schedule may run by the clock: the plot shades what the rate did, not what was planned.
    for step in reversed(train):
        if scales[step] is None or scales[step] >= 1:
            break
        run.warmdown_start = step


# --- Run folders: JSON files, read strictly ------------------------------------------------------
# Only the torn line of a killed run is forgiven.


@contextlib.contextmanager
def reading(path):
    """RunDataProblem that names the file for whatever its content makes fail."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunDataProblem(
            f"{path}: not readable as JSON of the expected fields, or not JSON: {error!r}; "
            "restore it or repeat the run"
        ) from None


def read_json(path, **options):
    """The object in a JSON file, {} where there is no file; RunDataProblem if it is damaged."""
    if not path.exists():
        return {}
    with reading(path):
        data = json.loads(path.read_text(encoding="utf-8"), **options)
        return {**data}  # TypeError: not an object


def read_events(path):
    """The events of metrics.jsonl as a list of dicts; RunDataProblem if a line is damaged."""
    if not path.exists():
        return []
    events = []
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        event = parse_event(line)
        if event:
            events.append(event)
            continue
        torn = '{"event"'.startswith(line[:8]) and not line.endswith("}")
        if line.strip() and not torn:
            raise RunDataProblem(
                f"{path}:{number}: damaged line {line[:60]!r}; expected a JSON object "
                'with "event", or one torn by a kill. Restore the file.'
            )
    return events


def parse_event(line):
    """The event of a line, {} if it holds none.

    Every kill may leave one line torn, with or without the next event glued to it.
    """
    # The whole line first: a message inside an event may quote another event
    for text in (line, line[line.rfind('{"event"') :]):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            event = json.loads(text)
            return {"event": event["event"], **event}
    return {}


def read_run_dir(path):
    """The Run of a run folder; RunDataProblem if a file is missing, damaged or contradictory."""
    # Without config.json the run never began; its events may say why
    events = read_events(path / "metrics.jsonl")
    if not (path / "config.json").exists():
        return read_begun_dir(path, events)
    run = Run(path=path)
    with reading(path / "config.json"):
        written = read_json(path / "config.json")
        apply_config(run, written["config"])
        if written and "kinds" not in written:
            raise RunDataProblem(
                f"{path / 'config.json'}: no 'kinds' of the settings; expected a folder of this "
                "train_gpt.py. "
                "Run its command again: a finished run rewrites the file and computes nothing."
            )
        run.kinds = names_by_kind(written["kinds"])
    with reading(path / "manifest.json"):
        apply_manifest(run, read_json(path / "manifest.json"))
    with reading(path / "metrics.jsonl"):
        replay(run, events)
        for event in events:
            run.with_quantiser_s = event.get("with_training_seconds", run.with_quantiser_s)
    with reading(path / "scores.json"):
        apply_scores(run, read_json(path / "scores.json"))
    # Written before scores.json: an audited run need not be scored
    run.audit_passed = read_json(path / "audit.json").get("passed")
    if not run.finished:
        run.status, run.note = explain(run, events)
    elif (path / "train.log").exists():
        compare_with_log(run, read_log(path / "train.log"))
    return run


def names_by_kind(kinds):
    """{kind: names} of what config.json says: a kind per name, or the names per kind."""
    if not all(isinstance(kind, str) for kind in kinds.values()):
        return {kind: list(names) for kind, names in kinds.items()}
    grouped = {}
    for name, kind in kinds.items():
        grouped.setdefault(kind, []).append(name)
    return grouped


def read_begun_dir(path, events):
    """The Run of a folder whose run failed before it could begin, for want of data say."""
    log = path / "train.log"
    if not events or not log.exists():
        inside = len(list(path.glob("*/config.json")))
        hint = f"it holds {inside} of them, pass {path}/*" if inside else "pass one, or a log file"
        raise RunDataProblem(
            f"{path}: no config.json and no log; expected a run directory of train_gpt.py: {hint}"
        )
    run = read_log(log)
    run.path = path
    run.status, run.note = explain(run, events)
    return run


def apply_scores(run, data):
    """Fill in scores.json; RunDataProblem if it contradicts the rest of the folder."""
    if data.get("seed", run.seed) != run.seed:
        raise RunDataProblem(
            f"{run.path}: scores.json is of seed {data['seed']}, config.json of {run.seed}; "
            "expected files of one run. Do not share a RUN_DIR between runs."
        )
    # An evaluation knows nothing of the training behind its artifact
    names = ["artifact_bytes", "code_bytes", "total_bytes"]
    if not run.eval_only:
        names += ["steps", "step_avg_ms", "train_time_s"]
    for name in names:
        setattr(run, name, data.get(name, getattr(run, name)))
    # package.py compares digits by label, so it wants them untouched
    run.raw_scores = data.get("scores", {})
    for label, entry in run.raw_scores.items():
        check_coverage(run, label, entry)
        add_score(run, score_of_entry(label, entry))
    if data.get("finished"):
        run.status = "finished"


def score_of_entry(label, entry):
    """The Score of an entry of scores.json; TypeError or ValueError for what is no number."""
    # The name alone is enough to make a score illegal
    legal = bool(entry.get("legal", True)) and not label.startswith("illegal")
    loss, bpb = float(entry["val_loss"]), float(entry["val_bpb"])
    return Score(label, loss, bpb, eval_time_s=entry.get("eval_time_s"), legal=legal)


def check_coverage(run, label, entry):
    """RunDataProblem if an evaluation counted other tokens or bytes than the data has."""
    for name in ("tokens", "bytes"):
        scored, expected = entry.get(name), getattr(run, name)
        if None not in (scored, expected) and scored != expected:
            raise RunDataProblem(
                f"{run.path}: {label} scored {scored} {name}, the validation data has "
                f"{expected}; expected every target exactly once. Score the run again."
            )


def add_score(run, score, stage=None):
    """File a score under its stage. Of two for one stage the later counts, and a remark says so."""
    stage = stage or stage_of(score.label)
    if not score.legal:
        stage += " (illegal)"
    earlier = run.scores.get(stage)
    if earlier and earlier.agrees(score):
        # The same evaluation, printed again with other decimals.
        finer, coarser = (score, earlier) if score.is_finer_than(earlier) else (earlier, score)
        times = [each.eval_time_s for each in (finer, coarser) if each.eval_time_s is not None]
        finer.eval_time_s = max(times, default=None)
        run.scores[stage] = finer
        return
    if earlier:
        run.remarks.append(
            f"{stage} was scored more than once: {earlier.label} {earlier.val_bpb}, then "
            f"{score.label} {score.val_bpb}; the last one counts"
        )
    run.scores[stage] = score


def explain(run, events):
    """(status, note) of a run without a finished scores.json."""
    # The last event tells what the run was doing
    last = {"event": "none"}
    if events:
        last = events[-1]
    if last["event"] == "error":
        message = textwrap.shorten(str(last.get("message")), 120, placeholder=" ...")
        return "failed", f"exit code {last.get('code')}: {message} ({run.progress()})"
    if last["event"] == "audit":
        return "unfinished", f"audited (passed: {last.get('passed')}), not scored"
    why = "still running or killed"
    if last["event"] == "stopped":
        why = f"stopped by {last.get('signal')}, phase: {last.get('phase')}; "
        why += "resumes with the same command"
    return "unfinished", f"{why} ({run.progress()})"


def compare_with_log(run, log):
    """RunDataProblem if train.log, where it is complete, reports other scores than scores.json."""
    for stage in [stage for stage in run.scores if stage in log.scores]:
        written, logged = run.scores[stage], log.scores[stage]
        for name in ("val_loss", "val_bpb"):
            value, printed = getattr(written, name), getattr(logged, name)
            if printed is not None and abs(value - printed) > 0.51 * 10.0**-logged.decimals:
                raise RunDataProblem(
                    f"{run.path}: {written.label} {name} is {value:.8f} in scores.json, {printed} "
                    "in train.log; expected equal. One of the files is not of this run."
                )


# --- Plain logs --------- ------------------------------------------------------------------------


class NotALog(RunDataProblem):
    """A file without a single line of a log."""


class LogReader:
    """Takes the lines of one log in order and makes a Run of them."""

    def __init__(self, path, alone=True):
        self.run = Run(path=path)
        self.alone = alone  # the file holds no other run: its name is of this one
        self.config = {}
        self.events = []  # start, step and val, as replay() wants them
        self.seeds = []  # of lines that say nothing else
        self.seed_hint = None  # of a line that says more
        self.told_mb = None  # (total size in MB, its decimals), where no line tells the bytes
        self.packed = False  # a size or a score of the packed model has been printed
        self.early = set()  # stages of adapted models that were scored before that
        self.adapting = False  # test-time training or SLOT began after the last score
        self.ended = False  # the run says that it is finished
        self.error = ""  # the last error, unless the run went on after it
        self.lines = 0  # that were understood

    def read(self, lines, torn):
        """The Run of all lines. `torn`: the last one does not end in a line break."""
        for number, raw in enumerate(lines, 1):
            line = logs.bare(raw)
            if torn and number == len(lines):
                self.read_torn(line)
            else:
                self.read_line(line)
        if not self.lines:
            raise NotALog(
                f"{self.run.path}: no line of the field's log format among {len(lines)}; expected "
                "lines such as 'seed:42' or 'step:100/7000 train_loss:...'. Pass a training log."
            )
        self.finish()
        return self.run

    def read_line(self, line):
        # Lines of one meaning first: they would look like others to the patterns below
        if self.own_line(line):
            self.lines += 1
            return
        # A fact may stand in the same line as a score, so neither excludes the other
        facts = self.fact_line(line)
        if self.step_line(line) or self.score_line(line) or facts:
            self.lines += 1
            return
        self.end_line(line)

    def read_torn(self, line):
        """A line that may be cut: a score counts if its loss and bpb have equally many decimals."""
        pair = logs.find_pair(line)
        if pair is None:
            self.end_line(line)
            return
        if pair.loss is None:
            whole = pair.bpb not in line.split()[-1]  # something follows it
        else:
            whole = logs.decimals_of(pair.bpb) == logs.decimals_of(pair.loss)
        if whole and not logs.STEP.match(line) and self.score_line(line, timed=False):
            self.lines += 1

    # Lines that only train_gpt.py prints.
    def own_line(self, line):
        """Configuration, manifest, audit and end; True if it was one of them."""
        run = self.run
        if found := logs.CONFIG.fullmatch(line):
            self.config[found["name"]] = found["value"]
        elif found := logs.FINGERPRINT.fullmatch(line):
            run.tokens, run.bytes = int(found[1]), int(found[2])
            run.val_sha256, run.scope = found[3], found[4]
        elif found := logs.SCOPE.fullmatch(line):
            run.scope = found[1]
        elif found := logs.AUDIT.fullmatch(line):
            run.audit_passed = found[1] == "pass"
        elif found := logs.QUANTISED.fullmatch(line):
            run.with_quantiser_s = float(found[1])
        elif line.startswith("manifest:"):
            with contextlib.suppress(ValueError, AttributeError):  # cut short
                apply_manifest(run, json.loads(line.partition(":")[2]))
        else:
            self.ended |= line.startswith("run_finished")
            return line.startswith("run_finished")
        return True

    # Facts that may stand beside others in one line.
    def fact_line(self, line):
        """Seed, model size, validation tokens and file sizes; True if there was one."""
        run, known = self.run, False
        # A line of its own is a statement; a word among others may be of something else
        if found := logs.SEED_LINE.fullmatch(line):
            self.seeds.append(int(found[1]))
            known = True
        elif found := logs.SEED_WORD.search(line):
            self.seed_hint = int(found[1])
        if found := logs.PARAMS.search(line):
            run.settings["model_params"] = found[1]
            known = True
        if found := logs.VAL_TOKENS.search(line):
            run.tokens = int(found[1])
            known = True
        sizes = [*logs.SIZE.finditer(line), *logs.SIZE_BEHIND_MB.finditer(line)]
        for found in sizes:
            known |= self.size(found["what"].lower(), int(re.sub(r"[,_]", "", found["size"])))
        if found := logs.MB_TOTAL.search(line):
            self.told_mb = float(found[1]), len(found[2])
        if found := logs.BARE_TOTAL.search(line):
            known |= self.size("code", int(found[1])) and self.size("total", int(found[2]))
        return known

    def size(self, what, size):
        """File a size by its words. The last of a kind counts: float weights are printed first."""
        run = self.run
        # "Total submission size" names the model's scheme too: the total goes first
        if "total" in what or "submission" in what or what.strip() == "size":
            run.total_bytes = size
        elif "code" in what:
            run.code_bytes = size
            return True
        elif "model" in what or "artifact" in what:
            run.artifact_bytes = size
        else:
            return False
        self.packed = True
        return True

    def step_line(self, line):
        """A step or a validation of the training loop, or where it stopped; True if it was one."""
        if found := logs.RESUMED.search(line):
            self.events.append({"event": "start", "resumed_step": found[1] or found[2]})
            self.error = ""
            return True
        self.clock(line)
        # At the start of the line: final evaluations may mention a step further on
        begin = logs.STEP.match(line)
        if not begin:
            return False
        step = begin["step"] or begin["lone_step"]
        # Progress of a warm-up counts steps as well, but has no loss
        loss = logs.TRAIN_LOSS.search(line)
        # A bare "loss" and "bpb" on a line of a step are those of the training batch
        pair = logs.find_pair(line) if logs.VAL_BPB.search(line) else None
        if not loss and not pair:
            return False
        if begin["iterations"]:
            self.run.iterations = int(begin["iterations"])
        if loss:
            self.events.append({"event": "step", "step": step, "train_loss": loss[1]})
        if pair:
            self.events.append({"event": "val", "step": step, "val_bpb": pair.bpb})
            self.validation(pair, step)
        self.run.steps = int(step)
        self.error = ""
        return True

    def clock(self, line):
        """The training time so far, from any line that tells it."""
        seconds, average = (
            logs.seconds_in(logs.TRAIN_TIME, line),
            logs.seconds_in(logs.STEP_AVG, line),
        )
        if seconds is not None:
            self.run.train_time_s = seconds
        if average is not None:
            self.run.step_avg_ms = 1000 * average
        # "stopping_early ... step: 4988/20000" has the last step and the exact time
        if seconds is not None and (found := logs.LATER_STEP.search(line)):
            self.run.steps = int(found[1])

    def validation(self, pair, step):
        """Keep a validation of the training loop, to check its bytes and for the table."""
        if pair.loss is None:
            return
        decimals = logs.decimals_of(pair.bpb)
        score = Score(
            f"validation at step {step}", float(pair.loss), float(pair.bpb), decimals=decimals
        )
        self.run.validations.append(score)

    def score_line(self, line, timed=True):
        """A final evaluation; True if the line is one."""
        pair = logs.find_pair(line)
        if pair is None:
            return False
        label = logs.label_of(pair.head)
        if logs.is_progress(line, label):
            self.pass_over(label, pair, line)
            return False
        if logs.NAMED_BPB.fullmatch(line):
            self.remark(f"{line}: read as an evaluation, though its key is not val_bpb")
        seconds = logs.seconds_in(logs.EVAL_TIME, line) if timed else None
        # Both marks are of train_gpt.py; other scripts say nothing of legality
        illegal = "illegal" in label or "legality:illegal" in line
        loss = None if pair.loss is None else float(pair.loss)
        score = Score(
            label, loss, float(pair.bpb), seconds, not illegal, logs.decimals_of(pair.bpb)
        )
        self.file(score, pair.repeated)
        self.error = ""
        return True

    def pass_over(self, label, pair, line):
        """Remark a whole result that is not taken because of its name, unless it is progress."""
        if pair.loss is None or not self.packed or logs.COUNTER.search(line):
            return
        self.remark(f"{label} val_bpb {pair.bpb} is passed over: its name tells of a comparison")

    def remark(self, text):
        """Keep what a reader of the numbers should know, once."""
        if text not in self.run.remarks:
            self.run.remarks.append(text)

    def place(self, score):
        """The stage of a score by its label and its place; notes what the place tells."""
        stage = stage_of(score.label, self.packed)
        # A summary without a name repeats the last validation of the loop: float weights
        validated = [event["val_bpb"] for event in self.events if event["event"] == "val"]
        if not score.label and validated:
            decimals = logs.decimals_of(validated[-1])
            if Score("", None, float(validated[-1]), decimals=decimals).agrees(score):
                return FLOAT
        if stage in ADAPTED and not self.packed and not names_packed(score.label):
            self.early.add(stage)
        else:
            self.early.discard(stage)
        self.packed |= names_packed(score.label)
        return stage

    def file(self, score, repeated):
        """Add a score to the run, unless it repeats a stronger one or stands beside one."""
        run = self.run
        # "<name> sliding val_loss:.. sliding val_bpb:.." behind "<name> val_loss:.. val_bpb:.."
        plain = score.label.removesuffix(f" {repeated}") if repeated else ""
        if plain and any(known.label == plain for known in run.scores.values()):
            self.remark(
                f"{plain} prints a '{repeated} val_bpb' beside its own val_bpb; the plain "
                "val_bpb is taken as its result"
            )
            return
        stage = self.place(score)
        stronger = STAGES[STAGES.index(stage) + 1 :]
        # A name that tells nothing may repeat a score of a name that does: "wrote summary.json"
        if stage == LAST:
            stronger += (ROUNDTRIP, SLIDING)
        # A copy of a stronger score under the name that the challenge's own parser looks for.
        for name in stronger:
            known = run.scores.get(name)
            if known and known.agrees(score):
                known.refine(score)
                return
        if (
            stage == SLIDING
        ):  # an evaluation without a telling name counts only after the sliding one
            run.scores.pop(LAST, None)
        add_score(run, score, stage)
        self.adapting = False

    def end_line(self, line):
        """How a log goes on after its last score: an error, or an evaluation that never ends."""
        # Kept until the run goes on: a resumed run has overcome its errors
        if logs.ERROR.match(line) or logs.KILLED.search(line):
            self.error = line
        if logs.ADAPTING.match(line) and not re.search(
            r"disabled|skip|false|off\b|[:=]\s*0\b", line, re.I
        ):
            self.adapting = True

    def finish(self):
        """Fill in what only all lines together tell: curves, settings, seed, and the status."""
        run = self.run
        with reading(run.path):
            replay(run, self.events)
        # A log of train_gpt.py holds every setting, another one next to none
        if self.config:
            apply_config(run, self.config)
            warmdown = whole_number(self.config.get("warmdown_iters"))
            if warmdown and run.steps:
                run.warmdown_start = max(run.steps - warmdown, 0)
        elif run.iterations is not None:
            run.settings["iterations"] = str(run.iterations)
        self.find_seed()
        self.find_total()
        self.judge_early()
        if not self.config:
            self.compare_stages()
        # Scripts of the field report float weights only as the last validation of the loop.
        if run.packed_scores and run.validations and FLOAT not in run.scores:
            run.scores = {FLOAT: run.validations[-1], **run.scores}
        self.find_status()

    def find_total(self):
        """The total of a log that tells it in MB only, from its parts in bytes."""
        run = self.run
        if run.total_bytes is not None or self.told_mb is None:
            return
        told, decimals = self.told_mb
        if None not in (run.artifact_bytes, run.code_bytes):
            parts = run.artifact_bytes + run.code_bytes
            if logs.told_in_megabytes(parts, told, decimals):
                run.total_bytes = parts
                return
        # Rounded, and MB may mean MiB: no number of bytes that could be compared with a limit
        self.remark(f"its total size is told in MB only, {told}: its bytes are not known")

    def judge_early(self):
        """An adapted model that is packed afterwards was adapted as float weights."""
        run = self.run
        # Where nothing is scored after packing, the order of the lines tells nothing
        if not self.packed or self.early.issuperset(run.packed_scores):
            return
        for stage in self.early:
            score = run.scores.pop(stage)
            run.scores = {FLOAT: score, **run.scores}
            self.remark(
                f"{score.label} {score.val_bpb} is of float weights: the model was packed after it"
            )

    def compare_stages(self):
        """Remark a strongest evaluation that is worse than a weaker one."""
        ranked = list(self.run.packed_scores.items())
        for stage, score in ranked[1:]:
            strongest, first = ranked[0]
            if score.val_bpb < first.val_bpb - WORSE_BPB:
                self.remark(
                    f"{strongest} {first.val_bpb} is worse than {stage} {score.val_bpb}; "
                    f"--headline {strongest!r} or {stage!r} takes either"
                )
                return

    def find_seed(self):
        """The seed by the file's name and the log, which may print a default that is not used."""
        run, seeds = self.run, sorted(set(self.seeds))
        if len(seeds) > 1:
            raise RunDataProblem(
                f"{run.path}: holds runs of the seeds {seeds}; expected one run. Split the log."
            )
        # Published logs of several seeds print the same default more often than not
        printed = seeds[0] if seeds else self.seed_hint
        if self.config:
            printed = run.seed
        named = logs.SEED_NAME.search(run.path.stem) if self.alone else None
        run.seed = printed
        if named and not self.config:
            run.seed = int(named[1])
        if named and printed is not None and printed != int(named[1]):
            run.remarks.append(
                f"the file's name says seed {named[1]}, its lines say {printed}; {run.seed} is used"
            )
        if run.seed is None:
            run.remarks.append("neither the log nor its name tells the seed")

    def find_status(self):
        """Whether the run came to its end: its own word, or a score that nothing was to follow."""
        run = self.run
        # The score of these stages comes minutes after their first line
        adapted = any(stage in run.scores for stage in ADAPTED)
        cut = self.adapting and not adapted
        if self.config:
            finished = self.ended
        else:
            finished = bool(run.packed_scores) and not cut and not self.error
        if finished:
            run.status = "finished"
            return
        stopped = self.error.startswith("stopped")
        run.status = "failed" if self.error and not stopped else "unfinished"
        reason = self.error or "the log ends early"
        if not run.packed_scores and run.validations:
            last = run.validations[-1]
            reason += (
                f": no evaluation of the packed model; {last.label}, float weights, was "
                f"val_bpb {last.val_bpb}"
            )
        if cut:
            reason = f"test-time training or SLOT began, but no line tells its score; {reason}"
        run.note = f"{reason} ({run.progress()})"


def read_log(path):
    """The Run of a plain log; RunDataProblem if it has no line of a log, or holds two runs."""
    lines, torn = read_lines(path)
    return LogReader(path).read(lines, torn)


def read_logs(path):
    """The Runs of a plain log that may hold several, one behind the other."""
    lines, torn = read_lines(path)
    launched = logs.by_launched_run(lines)
    if launched:
        # The launcher's name of a run is what tells it from the others in the file
        runs = [LogReader(path / name).read(part, torn) for name, part in launched.items()]
        for run in runs:
            run.folder = path
        return runs
    parts = logs.runs_in(lines)
    if len(parts) == 1:
        return [LogReader(path).read(lines, torn)]
    runs = []
    for part in parts:
        # The file's name cannot be of all of them, and only the last may be torn
        reader = LogReader(path, alone=False)
        runs.append(reader.read(part, torn and part is parts[-1]))
    return runs


def read_lines(path):
    """(lines of a plain log without embedded source, whether the last one may be torn)."""
    # Shells of other systems write what they capture in UTF-16
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    text = data.decode(encoding, errors="replace")
    torn = not text.endswith(("\n", "\r"))
    return logs.without_source(text.splitlines()), torn


# --- What a path holds ---------------------------------------------------------------------------

LOG_SUFFIXES = {".log", ".txt", ".out"}
# Some records keep their logs in logs/, some in a folder per seed
LEVELS = ("*", "*/*", "*/*/**/*")


def read_path(path):
    """The Runs at a path: a run folder, a log, or a folder of logs; UsageProblem without one."""
    if not path.exists():
        raise UsageProblem(f"{path}: no such file or directory; expected a run directory or a log")
    # A file is a log; a folder says by its files what it is
    if not path.is_dir():
        return read_logs(path)
    if is_run_dir(path):
        return [read_run_dir(path)]
    return read_log_folder(path) or [read_run_dir(path)]


def is_run_dir(path):
    """True for a folder of train_gpt.py, False for others, with or without a config.json."""
    if (path / "metrics.jsonl").exists() or (path / "manifest.json").exists():
        return True
    if not (path / "config.json").exists():
        return False
    # Records of the field may keep a configuration of their own kind beside their logs
    if (path / "scores.json").exists():
        return True
    with contextlib.suppress(ValueError, TypeError):
        written = json.loads((path / "config.json").read_text("utf-8"))
        return "config" in written or not any(log_files(path, pattern) for pattern in LEVELS)
    return True


def read_log_folder(path):
    """The Runs of a folder's logs, copies left out; [] if it holds no log or holds run folders.

    Where the folder claims a score, its logs are those that the claim is about.
    """
    # Runs to be passed one by one: their logs are not all there is of them
    if any(is_run_dir(file.parent) for file in path.glob("*/config.json")):
        return []
    levels = filter(None, (runs_of_level(path, pattern) for pattern in LEVELS))
    runs = next(levels, [])
    claim = claims.read_claim(path)
    # A run of train_gpt.py tells its own headline
    if not runs or claim is None or any(run.whole_config for run in runs):
        return runs
    about = claims.logs_of_claim(claim, runs)
    # What is claimed may lie further down, in supplementary/ say; not all there need be readable
    with contextlib.suppress(RunDataProblem):
        while not about and (deeper := next(levels, [])):
            runs, about = with_deeper_logs(claim, runs, deeper)
    return claims.settle(claim, runs, about)


def with_deeper_logs(claim, runs, deeper):
    """(runs, those that the claim is about), with the logs further down that it is about."""
    about = claims.logs_of_claim(claim, deeper)
    if not about:
        return runs, []
    joined = join_evaluations([*runs, *about])
    # An evaluation gave its score to the run above that it evaluated
    if len(joined) == len(runs):
        return joined, claims.logs_of_claim(claim, joined)
    return joined, about


def runs_of_level(path, pattern):
    """The Runs of the logs that a pattern finds in a folder, copies left out."""
    runs, left_out = [], []
    for file in log_files(path, pattern):
        try:
            runs += read_logs(file)
        except NotALog:
            left_out.append(file.name)
    seeded = [run for run in runs if logs.SEED_NAME.search(run.path.stem)]
    if seeded:  # what bears no seed beside logs that do is an ablation, a smoke test, a summary
        others = [run for run in runs if run not in seeded and run.path.stem != "train"]
        left_out += [run.name for run in others if not run.eval_only]
        runs = [run for run in runs if run not in others or run.eval_only]
    if not runs:
        return []
    runs, older = newest_versions(runs)
    runs = join_evaluations(runs)
    left_out += older
    if left_out:
        runs[0].remarks.append(f"left out, no log of a seed: {', '.join(left_out)}")
    for run in runs:
        run.folder = path
        # The field's folders hold the log of the run that was submitted as train.log, and those of
        # all seeds beside it. A folder of train_gpt.py does too, but its result is the mean.
        if run.path.stem == "train" and len(runs) > 1 and not run.whole_config:
            run.submitted = "keeps as train.log"
    return without_copies(runs)


def log_files(path, pattern):
    """The files in a folder that a pattern finds and that may be logs."""
    found = sorted(path.glob(pattern))
    return [file for file in found if file.is_file() and file.suffix in LOG_SUFFIXES]


def newest_versions(runs):
    """(the runs of the newest version of each seed, names of the others).

    "log_seed42_v1.1" replaces "log_seed42_v1.0": names that differ in nothing but the version.
    """
    versions = {}  # {(name without its version, seed): versions}
    for run in runs:
        versions.setdefault(version_key(run), []).append(logs.version_of(run.path.stem))
    kept, older = [], []
    for run in runs:
        newest = max(versions[version_key(run)])
        # Without a seed in the name, a version may be another run altogether
        named = logs.SEED_NAME.search(run.path.stem)
        if named and logs.version_of(run.path.stem) < newest:
            older.append(f"{run.path.name} (an older version)")
        else:
            kept.append(run)
    return kept, older


def join_evaluations(runs):
    """The runs, with the scores of logs that trained nothing at the log that trained their seed.

    Some records train and adapt in two processes: train_seed42.log and ttt_seed42.log.
    """
    trained = [run for run in runs if run.train_curve or run.whole_config]
    kept = list(trained)
    for run in runs:
        if run in trained:
            continue
        owners = [other for other in trained if run.seed is not None and other.seed == run.seed]
        if len(owners) == 1 and run.finished and may_own(owners[0], run):
            owner = owners[0]
            owner.scores = {**run.scores, **owner.scores}
            owner.status, owner.note = "finished", ""
            owner.remarks.append(f"{run.path.name} trained nothing: its scores are of this seed")
        else:
            kept.append(run)
    return kept


def may_own(owner, run):
    """True if an evaluation may be of the model that another log trained: no score differs."""
    shared = [stage for stage in run.scores if stage in owner.scores]
    same = all(owner.scores[stage].agrees(run.scores[stage]) for stage in shared)
    return same and not owner.whole_config and owner.status != "failed"


def version_key(run):
    """What the logs of one run share, whatever their version."""
    return logs.VERSION.sub("", run.path.stem), run.seed


def without_copies(runs):
    """The runs without those that are a copy of another: same seed, same scores."""
    kept = []
    # train.log last: of two copies the one with the seed in its name stays
    for run in sorted(runs, key=lambda run: run.path.stem == "train"):
        twin = next(
            (
                other
                for other in kept
                if run.scores and run.seed == other.seed and run.scores == other.scores
            ),
            None,
        )
        if twin is None:
            kept.append(run)
        else:
            twin.submitted = twin.submitted or run.submitted
    return kept
