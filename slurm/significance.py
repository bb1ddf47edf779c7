"""Means over seeds, which score they are of, and Welch's test of them against a baseline."""

from __future__ import annotations

import contextlib
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from groups import check_same_data, group_runs, load_runs
from runs import HEADLINE_ORDER, LAST, WORSE_BPB, RunDataProblem, UsageProblem, read_json
from scipy import stats

SIGNIFICANT_P = 0.01


@dataclass
class Sample:
    """Mean and standard deviation (ddof 1, None for a single run) of n runs."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values):
        # ddof 1: the seeds are a sample of all seeds
        sd = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), sd, len(values))

    def __str__(self):
        # Nothing stands for the spread of one run
        if self.sd is None:
            return f"{self.mean:.5f}"
        return f"{self.mean:.5f} ± {self.sd:.5f}"


def sample_of(runs, stage, name="val_bpb"):
    """The Sample of one score over the seeds of runs; repetitions count by their mean."""
    # A log without a seed is a sample of its own
    seeds = {}
    for run in runs:
        key = run.name if run.seed is None else run.seed
        value = getattr(run.scores[stage], name)
        # nan, and not a smaller sample, where a run prints no loss
        seeds.setdefault(key, []).append(math.nan if value is None else value)
    return Sample.of([statistics.fmean(values) for values in seeds.values()])


def bytes_per_token(run, stage):
    """Bytes of validation text per token, None if nothing printed tells."""
    # Exact where the data were counted, else as exact as the printed digits
    if run.bytes and run.tokens:
        return run.bytes / run.tokens
    return run.scores[stage].bytes_per_token


def choose_headline(group, wanted=None):
    """The stage that a submission is judged by: of the packed model, legal, and in every run.

    `wanted` is a stage or the label of a score. UsageProblem if there is none.
    """
    # Illegal scores have stages of their own, which are not in the order
    shared = [stage for stage in HEADLINE_ORDER if all(stage in run.scores for run in group)]
    # The order is a promise of train_gpt.py; other scripts have made none
    if wanted is None and shared and not any(run.whole_config for run in group):
        return headline_of_strangers(group, shared)
    for stage in shared:
        labels = {run.scores[stage].label for run in group}
        if wanted is None or wanted == stage or wanted in labels:
            return stage
    available = shared if wanted else HEADLINE_ORDER
    labels = [group[0].scores[stage].label for stage in shared]
    expected = ", ".join([*available, *labels]) or "(none)"
    raise UsageProblem(
        f"--headline {wanted or '(default)'}: no legal score of the artifact that all runs share; "
        "expected one "
        f"of {expected}. Score every run the same way."
    )


def headline_of_strangers(group, shared):
    """The stage that another script's runs are judged by: the claimed one, else the best.

    Authors whose adaptation makes the score worse submit the other one. Of a weaker evaluation
    only those count whose names tell what they are.
    """
    # The author has chosen, and a log prints it
    claimed = judged_runs(group)[0].claimed_stage
    if claimed in shared:
        return claimed
    best = shared[0]
    # Both are legal as far as a log shows, so nothing speaks for the worse one
    for stage in shared[1:]:
        gain = sample_of(group, best).mean - sample_of(group, stage).mean
        if stage != LAST and gain > WORSE_BPB:
            best = stage
    return best


def score_label(group, stage):
    """The name that the runs print for a stage, the stage's own where they differ."""
    # Scripts of one folder may be of two versions, which name the same evaluation differently
    labels = {run.scores[stage].label for run in group}
    return labels.pop() if len(labels) == 1 else stage


def judged_runs(group):
    """The runs whose mean is the headline: all, or the one that its folder marks as submitted."""
    return [run for run in group if run.submitted] or group


def welch(ours, baseline, threshold):
    """(t, degrees of freedom, p) for H0: baseline.mean - ours.mean <= threshold (Welch 1947).

    UsageProblem if a sample has no standard deviation, or both are 0.
    """
    for name, sample in (("the runs", ours), ("the baseline's", baseline)):
        if sample.n < 2 or sample.sd is None:
            raise UsageProblem(
                f"Welch's test needs a standard deviation, {name} have {sample.n} run(s); "
                "expected at least 2 "
                "seeds. Pass more runs, or leave out --baseline."
            )
    if ours.sd == baseline.sd == 0:
        raise UsageProblem(
            "Welch's test needs some spread, and both standard deviations are 0; check that the "
            "runs are not "
            "copies"
        )
    # The improvement asked for is added to our mean: then 0 is the border
    t, p = stats.ttest_ind_from_stats(
        ours.mean + threshold,
        ours.sd,
        ours.n,
        baseline.mean,
        baseline.sd,
        baseline.n,
        equal_var=False,
        alternative="less",
    )
    # Welch-Satterthwaite: degrees of freedom of a sum of two variances of means.
    a, b = ours.sd**2 / ours.n, baseline.sd**2 / baseline.n
    df = (a + b) ** 2 / (a**2 / (ours.n - 1) + b**2 / (baseline.n - 1))
    return float(t), df, float(p)


def read_baseline(sources, stage, finished):
    """The baseline's Sample of val_bpb: MEAN,SD,N, a submission.json, or run directories and logs.

    Errors: UsageProblem for a missing file or numbers out of range; RunDataProblem for unusable
    content.
    """
    if len(sources) == 1 and not Path(sources[0]).exists():
        return baseline_from_numbers(sources[0])
    # A directory may not end in .json, and a submission has to
    if len(sources) == 1 and sources[0].endswith(".json"):
        return baseline_from_submission(Path(sources[0]))
    runs = load_runs([Path(source) for source in sources])
    for run in runs:
        if not run.finished:
            raise UsageProblem(
                f"--baseline {run.path}: {run.status} ({run.note}); finish or leave it out"
            )
    # It raises for several configurations, so there is one
    (group,) = group_runs(runs, ablation=False)
    check_same_data(finished + runs)
    shared = all(stage in run.scores for run in group)
    return sample_of(group, stage if shared else choose_headline(group))


def baseline_from_numbers(text):
    """The Sample that "mean,sd,n" spells; UsageProblem if it is none."""
    with contextlib.suppress(ValueError):
        mean, sd, n = text.split(",")
        sample = Sample(float(mean), float(sd), int(n))
        if 0 < sample.mean < math.inf and 0 <= sample.sd < math.inf:
            return sample
    raise UsageProblem(
        f"--baseline {text}: neither a file nor MEAN,SD,N; expected a submission.json, a run, or "
        "mean, sd (bpb) "
        "and number of runs: 1.1213,0.0009,3"
    )


def baseline_from_submission(path):
    """The Sample of a submission.json, from its seeds where it lists at least two."""
    data = read_json(path)
    try:
        # The seeds themselves say more than a rounded deviation
        results = [float(entry["val_bpb"]) for entry in (data.get("seed_results") or {}).values()]
        if len(results) > 1:
            return Sample.of(results)
        sd, n = data.get("val_bpb_std"), len(data.get("seeds") or [None])
        return Sample(float(data["val_bpb"]), None if sd is None else float(sd), n)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunDataProblem(
            f"--baseline {path}: no usable scores ({error!r}); expected seed_results of at least "
            "two seeds, or "
            "val_bpb, val_bpb_std and seeds"
        ) from None


def significance_of(args, group, stage):
    """(p, the text of results.md) of the test against --baseline, (None, "") without one."""
    if not args.baseline:
        return None, ""
    ours, baseline = sample_of(group, stage), read_baseline(args.baseline, stage, group)
    # One nat per token is 1 / (ln 2 * bytes per token) bits per byte, by the bytes per token of
    # these runs.
    # The threshold of the challenge is in nats per token, scores are in bits per byte
    ratio = bytes_per_token(group[0], stage)
    if ratio is None and args.threshold_bpb is None:
        raise UsageProblem(
            "--threshold-nats needs bytes per token, and no line has val_loss and val_bpb; "
            "expected both, or --threshold-bpb"
        )
    bits_per_nat = 1 / (math.log(2) * ratio) if ratio else math.nan
    bpb = args.threshold_nats * bits_per_nat if args.threshold_bpb is None else args.threshold_bpb
    t, df, p = welch(ours, baseline, bpb)
    verdict = "significant" if p < SIGNIFICANT_P else "NOT significant"
    return p, (
        f"## Significance\n\nBaseline {baseline} bpb, n = {baseline.n} "
        f"({', '.join(args.baseline)}). "
        f"Improvement {baseline.mean - ours.mean:.5f} bpb; asked for: more than "
        f"{bpb / bits_per_nat:.5f} nats "
        f"per token = {bpb:.5f} bpb.\n\nWelch's one-sided t test: t = {t:.4f}, df = {df:.3f}, p = "
        f"{p:.3g}; "
        f"{verdict} at p < {SIGNIFICANT_P}."
    )
