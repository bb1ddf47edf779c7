"""What the author of a published folder claims, and which of its logs the claim is about.

A published folder may hold ablations, baselines and failed adaptations beside the run that was
submitted. Its logs do not tell which is which; its submission.json or README.md does. A claim only
chooses among what the logs print: no number is ever taken from it.
"""

from __future__ import annotations

import json
import re
import statistics
from typing import NamedTuple

import logs

# Keys of submission.json that hold the score, the first one present counts
CLAIM_KEYS = ("val_bpb", "mean_val_bpb")
# Published files are not always valid JSON: a comma may be missing or one too many
JSON_BPB = re.compile(r'"(?:mean_)?val_bpb"\s*:\s*(\d+\.\d+)')
JSON_BYTES = re.compile(r'"bytes_total"\s*:\s*(\d+)\b(?!\.)')
README_BPB = re.compile(r"\bval[_ ]bpb\W{0,9}(\d\.\d+)", re.I)
LEAST_DECIMALS = 3  # a coarser claim would be met by too many scores


class Claim(NamedTuple):
    """A val_bpb that an author claims, in bits per byte."""

    val_bpb: float
    decimals: int
    source: str  # name of the file
    bytes_total: int | None = None

    def is_met_by(self, val_bpb, decimals):
        """True if a score printed with so many decimals may be the claimed one."""
        # Authors round, and some cut off: a whole unit of the coarser last digit
        slack = 1.02 * 10.0 ** -min(self.decimals, decimals)
        return abs(val_bpb - self.val_bpb) <= slack

    def __str__(self):
        return f"{self.source} claims val_bpb {self.val_bpb}"


def read_claim(folder):
    """The Claim of a folder, None if it makes none or its README.md tells several numbers."""
    path = folder / "submission.json"
    if path.is_file():
        text = path.read_text("utf-8", "replace")
        number = number_in_json(text)
        # A null is a statement as well: the author has no score
        if number is not None:
            size = JSON_BYTES.search(text)
            return claim_of(number, path.name, size and int(size[1]))
    path = folder / "README.md"
    if path.is_file():
        # Tables and baselines: with several numbers nothing tells which is claimed
        numbers = set(README_BPB.findall(path.read_text("utf-8", "replace")))
        if len(numbers) == 1:
            return claim_of(numbers.pop(), path.name)
    return None


def number_in_json(text):
    """The claimed number as written, "" for an explicit null, None if there is no such key."""
    try:
        data = json.loads(text, parse_float=str)
    except ValueError:
        found = JSON_BPB.search(text)
        return found and found[1]
    if not isinstance(data, dict):
        return None
    for key in CLAIM_KEYS:
        if key in data:
            return str(data[key] or "")
    return None


def claim_of(number, source, bytes_total=None):
    """The Claim that a number as written makes, None if it is none or too coarse."""
    if not re.fullmatch(r"\d+\.\d+", number):
        return None
    # The decimals as written: a float would have lost the zeros at their end
    decimals = logs.decimals_of(number)
    if decimals < LEAST_DECIMALS:
        return None
    return Claim(float(number), decimals, source, bytes_total)


# --- Which logs ----------------------------------------------------------------------------------


def mean_bpb(runs, stage):
    """(mean val_bpb over the seeds of runs, decimals of the coarsest score)."""
    # A seed with several logs counts once, a log without a seed is a sample of its own
    seeds = {}
    for run in runs:
        key = run.path if run.seed is None else run.seed
        seeds.setdefault(key, []).append(run.scores[stage].val_bpb)
    mean = statistics.fmean(statistics.fmean(bpbs) for bpbs in seeds.values())
    return mean, min(run.scores[stage].decimals for run in runs)


def claimed_stage(claim, runs):
    """The strongest stage of the packed model whose mean over runs meets the claim, or None."""
    for stage in runs[0].packed_scores:
        shared = all(stage in run.scores for run in runs)
        if shared and claim.is_met_by(*mean_bpb(runs, stage)):
            return stage
    return None


def family(run):
    """What the logs of one configuration share: their place and their name without the seed."""
    name = logs.without_seed(run.path.stem)
    # "train_log_bank_42": the number is known as the seed from the lines
    if run.seed is not None:
        name = re.sub(rf"(?<!\d){run.seed}(?!\d)", "", name)
    return run.path.parent, name


def logs_of_claim(claim, runs):
    """The finished runs that a claim is about; [] if none meets it, or several do.

    All runs go before the seeds of one name, and those before a single run.
    """
    finished = [run for run in runs if run.finished]
    if not finished:
        return []
    families = {}
    for run in finished:
        families.setdefault(family(run), []).append(run)
    singles = [[run] for run in finished]
    for candidates in ([finished], list(families.values()), singles):
        met = [each for each in candidates if claimed_stage(claim, each)]
        if len(met) == 1:
            return met[0]
        # Two that meet it alike: the claim does not tell them apart
        if met:
            return []
    return []


def settle(claim, runs, about):
    """The runs that a claim leaves of a folder's; it remarks what it chose, or that it is not met.

    `about` is what logs_of_claim() found.
    """
    if not about:
        runs[0].remarks.append(unmet(claim, runs))
        return runs
    for run in about:
        run.claimed_stage = claimed_stage(claim, about)
    remark_on_size(claim, about)
    others = [run for run in runs if run.finished and run not in about]
    same = [run for run in others if family(run) == family(about[0])]
    # Nothing is left of what the folder keeps as train.log: the claim says more
    for run in runs:
        run.submitted = ""
    if same:  # one of several seeds: the others belong to the table
        about[0].submitted = f"claims in {claim.source}"
    strangers = [run.name for run in others if run not in same]
    if not strangers:
        return runs
    about[0].remarks.append(f"{claim}, which is of this log; left out: {', '.join(strangers)}")
    return [run for run in runs if run in about or run in same]


def remark_on_size(claim, about):
    """Remark a claimed total that is of another artifact than the logs'."""
    totals = [run.total_bytes for run in about]
    if claim.bytes_total is None or None in totals:
        return
    # Of several seeds an author may tell the largest, one of them or the mean
    if not min(totals) <= claim.bytes_total <= max(totals):
        about[0].remarks.append(
            f"{claim.source} claims {claim.bytes_total} bytes in total, the log tells {totals[0]}"
        )


def unmet(claim, runs):
    """The remark on a claim that no score of the packed model meets, or that several do."""
    met = [run.name for run in runs if run.finished and claimed_stage(claim, [run])]
    if met:
        return f"{claim}, which of these logs is not known: {', '.join(met)}"
    floats = [run.scores["float weights"] for run in runs if "float weights" in run.scores]
    if any(claim.is_met_by(score.val_bpb, score.decimals) for score in floats):
        return f"{claim}: that is of float weights, not of the packed model"
    return f"{claim}: no log that was read comes to that, so its evaluation is not known"
