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
VAL_BPB = re.compile(rf"(?<![\w-])val(?:idation)?[_ ]?bpb[\"']?\s*[:=]?\s*{NUMBER}", re.I)
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
    r"\b(running|progress|chunk|batch|so far|partial|eta|baseline|target|goal|best|previous"
    r"|reference|record|sota|delta|gain|improve\w*|mean|average|avg|std|expected"
    r"|published|threshold)\b"
)
SIZE = re.compile(r"(?P<what>[^:=|]*?)\s*[:=]\s*(?P<size>\d[\d,_]*)\s*bytes\b", re.I)
SEED_LINE = re.compile(r"(?:random_|global_|train_)?seed\s*[:=]\s*(\d+)", re.I)
SEED_WORD = re.compile(r"(?<![\w.-])seed\s*[:=]\s*(\d+)\b", re.I)
SEED_NAME = re.compile(r"(?:seed|(?<![a-z0-9])s)[_-]?(\d+)", re.I)
PARAMS = re.compile(r"(?<!\w)model_params\s*[:=]\s*(\d+)", re.I)
VAL_TOKENS = re.compile(r"(?:val[_ ]tokens\s*[:=]|val_loader\S*\s.*\btokens:)\s*(\d+)\b", re.I)
FINGERPRINT = re.compile(
    r"data_fingerprint tokens:\d+ targets:(\d+) bytes:(\d+) .*"
    r"sha256:(\w+) score_scope:(canonical-by-counts|canonical|proxy)"
)
SCOPE = re.compile(r"score_scope:(canonical-by-counts|canonical|proxy)")
CONFIG = re.compile(r"config:(?P<name>\w+)=(?P<value>.*?)( \*)?")
AUDIT = re.compile(r"audit (pass|FAIL) \d+ checks .*")
ADAPTING = re.compile(r"\s*\w*?(ttt|slot)", re.I)
ERROR = re.compile(
    r"(error: |stopped signal:|Traceback|[\w.]*(Error|Exception|Interrupt)\b).*", re.S
)
KILLED = re.compile(r"TIME LIMIT|CANCELLED AT|Killed\b|out of memory", re.I)


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
    """The Pair of a line, None if it prints no val_bpb. A bare `bpb` counts only beside a loss."""
    loss = VAL_LOSS.search(line)
    bpb = VAL_BPB.search(line)
    # A bare "bpb" is what progress lines print
    if loss and not bpb:
        bpb = BARE_BPB.search(line)
    if not bpb:
        return None
    if not loss:
        return Pair(line[: bpb.start()], None, bpb[1], "")
    first, second = sorted((loss, bpb), key=re.Match.start)
    head, between = line[: first.start()], line[first.end() : second.start()]
    # The same word in front of both keys, and another one before it
    word = re.search(r"([A-Za-z]\w*)\s+$", between)
    repeated = word[1] if word and re.search(rf"\w\W+{word[1]}\s+$", head) else ""
    return Pair(head, loss[1], bpb[1], repeated)


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
