"""The shapes of the lines of a training log, of train_gpt.py or of any other script of the field.

Nothing here knows what a run is: runs.py puts together what these patterns find. A line is read by
its shape (a label, val_loss, val_bpb, a time; a key, a size in bytes), not by a list of the names
that scripts use.
"""

from __future__ import annotations

import ast
import re
from typing import NamedTuple

# A log may hold the source of the script that wrote it; that is cut out first, because a docstring
# may quote a real line. A log may also end anywhere: a number at its very end counts only if it is
# whole.

PYTHON_START = re.compile(
    r"(#!|import \w|from [\w.]+ import|def \w|class \w|@\w|\"\"\"|'''|if __name__)"
)


def without_source(lines):
    """The lines that do not belong to embedded Python source.

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
    """How many of the first lines are Python source (0: none)."""
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
        # "seed:42" and "config:x=1" right behind the source are valid annotations: they are log
        # lines.
        while body and isinstance(body[-1], ast.AnnAssign):
            body.pop()
        return body[-1].end_lineno if body else 0
    return 0


NUMBER = r"(-?\d+\.\d+(?:[eE][-+]?\d+)?|-?\d+|[-+]?nan|[-+]?inf)(?![\w.]*\d)"
# What loggers and launchers put before a line: colours, a rank, a date, a level.
DECORATION = re.compile(
    r"\s*(?:\[[^\]]*\]\s*|\d{4}-\d\d-\d\d[T ]\S+\s+|\d\d:\d\d:\d\d\S*\s+|\d+:\s+"
    r"|(?:INFO|WARNING|DEBUG)\b[\s:]*|[-=>*|#]+\s+)*"
)
COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
STEP = re.compile(
    r"(?:(?:step|iter|iteration)\W{0,3})?(?P<step>\d+)\s*/\s*(?P<iterations>\d+)\b"
    r"|(?:step|iter|iteration)\W{0,3}(?P<lone_step>\d+)\b",
    re.I,
)
LATER_STEP = re.compile(r"\bstep\W{0,2}(\d+)/(\d+)", re.I)
RESUMED = re.compile(r"resum\w*\b.*?\bstep\D{0,3}(\d+)|resum\w*\b.*?step_?(\d+)\.pt", re.I)
TRAIN_LOSS = re.compile(rf"(?<![\w-])train[_ ]?loss[\"']?\s*[:=]?\s*{NUMBER}", re.I)
VAL_LOSS = re.compile(rf"(?<![\w-])(?:val(?:idation)?[_ ])?loss[\"']?\s*[:=]?\s*{NUMBER}", re.I)
# "val_bpb (int4 roundtrip): 1.60" tells behind the key what the others tell before it
VAL_BPB = re.compile(
    rf"(?<![\w-])val(?:idation)?[_ ]?bpb[\"']?\s*(?:\((?P<what>[^()]*)\)\s*)?[:=]?\s*{NUMBER}", re.I
)
LEAST_BPB = 0.1
# A key of its own kind, alone on its line: "ppm_mix_bpb:0.82"
NAMED_BPB = re.compile(rf"(?P<name>(?!train)[A-Za-z][\w+-]*)[_-]bpb\s*[:=]\s*{NUMBER}", re.I)
BARE_BPB = re.compile(rf"(?<![\w-])bpb[\"']?\s*[:=]?\s*{NUMBER}", re.I)
TIME = r"\s*[:=]\s*([\d.]+)\s*(ms|seconds|secs|sec|s|minutes|min|m)\b"
EVAL_TIME = re.compile(rf"(?<![\w-])(?:eval_time|eval time|elapsed|time){TIME}", re.I)
TRAIN_TIME = re.compile(rf"(?<![\w-])train(?:ing)?[_ ]time{TIME}", re.I)
STEP_AVG = re.compile(rf"(?<![\w-])step_avg{TIME}", re.I)
SECONDS = {"ms": 0.001, "m": 60.0}  # by the unit's first letters; everything else is seconds

PAIR = re.compile(r"\w+[:=]\s*\S*\d\S*")  # a key with a number, like stride:64
COUNTER = re.compile(r"\b\d+\s*/\s*\d+\b|\b\d+(\.\d+)?\s?%")
# Words that mark a number as progress, or as one of another run that this one is compared with.
NO_RESULT = re.compile(
    r"\b(running|progress|chunk|batch|so far|partial|eta|baseline(?! with)|target|goal|best"
    r"|previous|reference|record|sota|delta|gain|improve\w*|mean|average|avg|std|expected"
    r"|published|threshold|est|estimated?|projected|gap|diff|difference|degradation|penalty)\b"
)
SIZE = re.compile(r"(?P<what>[^:=|]*?)\s*[:=]\s*(?P<size>\d[\d,_]*)\s*bytes\b", re.I)
# The unit first: "Size 5.64 MB (5,645,856 bytes)"
SIZE_BEHIND_MB = re.compile(
    r"(?P<what>[A-Za-z][\w ]*?)\s*[:=]?\s*\d+(?:\.\d+)?\s*Mi?B\s*\((?P<size>\d[\d,_]*)\s*bytes\b",
    re.I,
)
# Some tell no more than that: "TOTAL: 13.00 MB"
MB_TOTAL = re.compile(
    r"\b(?:total|submission|artifact)\b[^:=|]*[:=]\s*(\d+\.(\d+))\s*Mi?B\b(?!\s*\()", re.I
)
MEGABYTES = (1e6, 2.0**20)  # authors write MB for both
# Some scripts print no unit: "int8_zlib:3554683 code:42197 total:3596880"
BARE_TOTAL = re.compile(
    r"\bcode\s*[:=]\s*(\d{4,})\b.*?\btotal\s*[:=]\s*(\d{4,})\b(?! ?bytes)", re.I
)
SEED_LINE = re.compile(r"(?:random_|global_|train_)?seed\s*[:=]\s*(\d+)", re.I)
SEED_WORD = re.compile(r"(?<![\w.-])seed\s*[:=]\s*(\d+)\b", re.I)
SEED_HEADING = re.compile(r"[^\w\s]{2,}(?:.*\W)?seed\W{0,3}(\d+)\W*", re.I)  # === Seed 42 ===
SEED_NAME = re.compile(r"(?:seed|(?<![a-z0-9])s)[_-]?(\d+)", re.I)
VERSION = re.compile(r"[_-]v(\d+(?:\.\d+)*)(?![a-z0-9])", re.I)
COUNTER_NAME = re.compile(r"[_-]?(?:v|run|rep|repeat|try)?[_-]?\d{1,2}$", re.I)
PARAMS = re.compile(r"(?<!\w)model_params\s*[:=]\s*(\d+)", re.I)
VAL_TOKENS = re.compile(r"(?:val[_ ]tokens\s*[:=]|val_loader\b.*\btokens:)\s*(\d+)\b", re.I)
FINGERPRINT = re.compile(
    r"data_fingerprint tokens:\d+ targets:(\d+) bytes:(\d+) .*"
    r"sha256:(\w+) score_scope:(canonical-by-counts|canonical|proxy)"
)
SCOPE = re.compile(r"score_scope:(canonical-by-counts|canonical|proxy)")
CONFIG = re.compile(r"config:(?P<name>\w+)=(?P<value>.*?)( \*)?")
AUDIT = re.compile(r"audit (pass|FAIL) \d+ checks .*")
QUANTISED = re.compile(r"quantised packings:\d+ seconds:[\d.]+ with_training:([\d.]+)s")
ADAPTING = re.compile(r"\s*\w*?(ttt|slot)", re.I)
ERROR = re.compile(
    r"(error: |stopped signal:|Traceback|[\w.]*(Error|Exception|Interrupt)\b).*", re.S
)
KILLED = re.compile(r"TIME LIMIT|CANCELLED AT|Killed\b|out of memory", re.I)


def bare(raw):
    """A line without what the terminal and the launcher have added to it."""
    line = COLOUR.sub("", raw).strip()
    return line[DECORATION.match(line).end() :]


# A launcher may put the name of a run before its lines: "wide_lr2: step:100/7000 train_loss:..."
LAUNCHED = re.compile(
    r"(?P<name>[\w.+-]+):\s+(?=(?:step|iter)\w*\W{0,3}\d+\s*/\s*\d+\s+train_loss)"
)
# Such a name is of a process, and all of them print the same
PROCESS_NAME = re.compile(r"(rank|node|worker|gpu|host|proc|local|default)\w*", re.I)


def by_launched_run(lines):
    """{name: lines} of the runs whose names a launcher put before every line; {} without any."""
    names = [found["name"] for raw in lines if (found := LAUNCHED.match(raw))]
    runs = {name: [] for name in names if not PROCESS_NAME.fullmatch(name)}
    for raw in lines:
        name, colon, rest = raw.partition(":")
        if colon and name in runs:
            runs[name].append(rest.strip())
    return runs


def told_in_megabytes(size, told, decimals):
    """True if a size in bytes is what a log tells in MB, in one of the two meanings."""
    return any(abs(size / unit - told) <= 0.51 * 10.0**-decimals for unit in MEGABYTES)


def without_seed(name):
    """The name of a log without its seed: equal for the seeds of one configuration."""
    return SEED_NAME.sub("", name)


def without_counter(name):
    """The name of a log without the number that counts repetitions: "train_v2" is "train"."""
    return COUNTER_NAME.sub("", name)


def version_of(name):
    """The version in the name of a log as a tuple of numbers, () if it bears none."""
    found = VERSION.search(name)
    return tuple(map(int, found[1].split("."))) if found else ()


def runs_in(lines):
    """The lines run by run, where a log holds the runs of several seeds one behind the other.

    A run begins at a heading that names another seed. Without headings nothing tells whether runs
    were meant to share the file.
    """
    cuts, seed, trained = [0], None, False
    for number, raw in enumerate(lines):
        heading = SEED_HEADING.fullmatch(raw.strip())
        # The heading of a first run may be repeated before anything happens
        if heading and trained and heading[1] != seed:
            cuts.append(number)
            trained = False
        if heading:
            seed = heading[1]
        line = bare(raw)
        trained = trained or bool(TRAIN_LOSS.search(line) or find_pair(line))
    return [lines[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(lines)])]


def seconds_in(pattern, line):
    """The time that a pattern with a number and a unit finds in a line, in seconds, else None."""
    found = pattern.search(line)
    # A time without a unit is no time: it may be a count
    if not found:
        return None
    unit = found[2].lower()
    return float(found[1]) * SECONDS.get("m" if unit.startswith("min") else unit, 1.0)


class Pair(NamedTuple):
    """The val_loss and val_bpb of a line, and the text in front of them."""

    head: str
    loss: str | None
    bpb: str
    repeated: str  # the bare word that stands before both keys, "" if there is none


def find_pair(line):
    """The Pair of a line, None if it prints no val_bpb.

    A bare `bpb` counts only beside a loss, another key only where it is all of the line.
    """
    loss = VAL_LOSS.search(line)
    bpb = VAL_BPB.search(line)
    # A bare "bpb" is what progress lines print
    if loss and not bpb:
        bpb = BARE_BPB.search(line)
    if not bpb:
        named = NAMED_BPB.fullmatch(line)
        # Less than any model reaches: the difference of two scores
        if not named or not float(named[2]) > LEAST_BPB:
            return None
        return Pair(named["name"], None, named[2], "")
    number = bpb[bpb.lastindex]
    if not loss:
        told_behind = bpb.groupdict().get("what") or ""
        return Pair(f"{line[: bpb.start()]} {told_behind}", None, number, "")
    first, second = sorted((loss, bpb), key=re.Match.start)
    head, between = line[: first.start()], line[first.end() : second.start()]
    # The same word in front of both keys, and another one before it
    word = re.search(r"([A-Za-z]\w*)\s+$", between)
    repeated = word[1] if word and re.search(rf"\w\W+{word[1]}\s+$", head) else ""
    return Pair(head, loss[1], number, repeated)


def decimals_of(number):
    """How many decimals a number was printed with."""
    return len(number.partition(".")[2])


def label_of(head):
    """The name of an evaluation: the words in front of its first number, without key=number."""
    words = PAIR.sub(" ", head)
    label = " ".join(re.findall(r"[A-Za-z][\w:-]*", words)).rstrip(":-")
    return re.sub(r"_exact\b", "", label)


def is_progress(line, label):
    """True if a line tells how far something has come, or quotes a number to compare with."""
    words = re.sub(r"[\W_]+", " ", label).lower()
    # 1893/1893 is done, 1271/1893 is on its way
    counters = re.findall(r"\b(\d+)\s*/\s*(\d+)\b", line)
    return bool(NO_RESULT.search(words)) or any(done != total for done, total in counters)
