"""Turn the runs of one configuration into a results table, a plot, a significance test and a
submission.json.

    python slurm/collect.py runs/nfm_7k_seed*                             # table and three files
    python slurm/collect.py runs/nfm_7k_seed* --baseline 1.1213,0.0009,3  # Welch's test
    python slurm/collect.py runs/nfm_7k_seed* --check submission.json     # is every number theirs?
    python slurm/collect.py runs/ablation_* --ablation --out results      # matrix of settings
    python slurm/collect.py train_seed42.log submission                   # logs, or their folder

A run is a directory written by train_gpt.py (config.json, manifest.json, metrics.jsonl,
scores.json) or its log. Runs with EVAL_ONLY add their scores to the training run whose artifact
they scored, if both are given. Only finished runs are averaged; unfinished and failed ones are
listed. Where a train_gpt.py lies beside a run, its size is the code's.

The headline is the strongest evaluation that all runs share and that is legal, in a fixed order:
TTT + SLOT, TTT, SLOT, sliding, roundtrip. It is never chosen by its number. Float weights are no
submission.

Units: val_loss in nats per token, val_bpb in bits per byte, eval_time_s and train_time_s in
seconds, step_avg_ms in milliseconds, standard deviations with ddof 1. train_time_s holds the time
that QUANTIZER=gptq took after the last step: it calibrates on training text, which counts as
training.

Exit codes: 0 done; 1 --check found differences; 2 wrong use, or runs that must not be mixed; 3 bad
run data.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import math
import statistics
import sys
import textwrap
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import pandas
from matplotlib.figure import Figure
from runs import (
    FLOAT,
    HEADLINE_ORDER,
    ROUNDTRIP,
    STAGES,
    RunDataProblem,
    UsageProblem,
    differing_settings,
    group_runs,
    load_runs,
    number_from_0,
    open_terminal,
    read_json,
    with_separators,
)
from scipy import stats

BUDGET_BYTES = 16_000_000
TIME_LIMIT_S = 600.0
SIGNIFICANT_P = 0.01

# --- Means and significance ----------------------------------------------------------------------


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
        return f"{self.mean:.5f}" if self.sd is None else f"{self.mean:.5f} ± {self.sd:.5f}"


def sample_of(runs, stage, name="val_bpb"):
    """The Sample of one score over runs."""
    return Sample.of([getattr(run.scores[stage], name) for run in runs])


def choose_headline(group, wanted=None):
    """The stage that a submission is judged by: of the packed model, legal, and in every run.

    `wanted` is a stage or the label of a score. UsageProblem if there is none.
    """
    # Illegal scores have stages of their own, which are not in the order
    shared = [stage for stage in HEADLINE_ORDER if all(stage in run.scores for run in group)]
    labels = [group[0].scores[stage].label for stage in shared]
    for stage, label in zip(shared, labels):
        if wanted in (None, stage, label):
            return stage
    expected = ", ".join([*(shared if wanted else HEADLINE_ORDER), *labels]) or "(none)"
    raise UsageProblem(
        f"--headline {wanted or '(default)'}: no legal score of the artifact that all runs share; "
        f"expected one of {expected}. Score every run the same way."
    )


def welch(ours, baseline, threshold):
    """(t, degrees of freedom, p) for H0: baseline.mean - ours.mean <= threshold (Welch 1947).

    UsageProblem if a sample has no standard deviation, or both are 0.
    """
    for name, sample in (("the runs", ours), ("the baseline's", baseline)):
        if sample.n < 2 or sample.sd is None:
            raise UsageProblem(
                f"Welch's test needs a standard deviation, {name} have {sample.n} run(s); expected "
                "at least 2 seeds. Pass more runs, or leave out --baseline."
            )
    if ours.sd == baseline.sd == 0:
        raise UsageProblem(
            "Welch's test needs some spread, and both standard deviations are 0; check that the "
            "runs are not copies"
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
    # Welch-Satterthwaite: degrees of freedom of a sum of two variances of means
    a, b = ours.sd**2 / ours.n, baseline.sd**2 / baseline.n
    df = (a + b) ** 2 / (a**2 / (ours.n - 1) + b**2 / (baseline.n - 1))
    return float(t), df, float(p)


def read_baseline(source):
    """The baseline's Sample of val_bpb: MEAN,SD,N, a submission.json or the folder of one.

    UsageProblem for neither file nor numbers; RunDataProblem for a file without scores.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "submission.json"
    if path.exists():
        data = read_json(path)
        try:
            # The seeds themselves say more than a rounded deviation
            entries = (data.get("seed_results") or {}).values()
            results = [float(entry["val_bpb"]) for entry in entries]
            if len(results) > 1:
                return Sample.of(results)
            sd, n = data.get("val_bpb_std"), len(data.get("seeds") or [None])
            return Sample(float(data["val_bpb"]), None if sd is None else float(sd), n)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunDataProblem(
                f"--baseline {path}: no usable scores ({error!r}); expected seed_results of at "
                "least two seeds, or val_bpb, val_bpb_std and seeds"
            ) from None
    try:
        mean, sd, n = source.split(",")
        sample = Sample(float(mean), float(sd), int(n))
        if not (0 < sample.mean < math.inf and 0 <= sample.sd < math.inf):
            raise ValueError
        return sample
    except ValueError:
        raise UsageProblem(
            f"--baseline {source}: neither a file nor MEAN,SD,N; expected a submission.json (write "
            "one of the baseline's runs first), or mean, sd (bpb) and number of runs: "
            "1.1213,0.0009,3"
        ) from None


def significance_of(args, group, stage):
    """(p, the text of results.md) of the test against --baseline, (None, "") without one."""
    if not args.baseline:
        return None, ""
    ours, baseline = sample_of(group, stage), read_baseline(args.baseline)
    # The threshold of the challenge is in nats per token, scores are in bits per byte: one nat per
    # token is 1 / (ln 2 * bytes per token) bits per byte
    bpb = args.threshold_nats / (math.log(2) * group[0].scores[stage].bytes_per_token)
    t, df, p = welch(ours, baseline, bpb)
    verdict = "significant" if p < SIGNIFICANT_P else "NOT significant"
    return p, (
        f"## Significance\n\nBaseline {baseline} bpb, n = {baseline.n} ({args.baseline}). "
        f"Improvement {baseline.mean - ours.mean:.5f} bpb; asked for: more than "
        f"{args.threshold_nats:.5f} nats per token = {bpb:.5f} bpb.\n\nWelch's one-sided t test: "
        f"t = {t:.4f}, df = {df:.3f}, p = {p:.3g}; {verdict} at p < {SIGNIFICANT_P}.\n\n"
    )


# --- submission.json -----------------------------------------------------------------------------

AUTHOR_FIELDS = ("author", "github_id", "name", "blurb", "date", "track")


def common_value(values):
    """The value all runs share, several joined by '; ', None if no run states one."""
    return "; ".join(dict.fromkeys(value for value in values if value is not None)) or None


def rounded(value, digits):
    return None if value is None else round(value, digits)


def largest(values):
    """The largest value, None unless all are known: every seed has to keep to a limit."""
    return None if None in values else max(values)


def compliance(group, stage, p):
    """{claim: bool} with the claims that these runs measured, and no others."""
    audits = [run.audit_passed for run in group]
    codes = [run.manifest.get("code_sha256") for run in group]
    limited = {
        "artifact_under_16mb": ([run.results.get("total_bytes") for run in group], BUDGET_BYTES),
        "train_under_600s": ([run.training_s for run in group], TIME_LIMIT_S),
        "eval_under_600s": ([run.scores[stage].eval_time_s for run in group], TIME_LIMIT_S),
    }
    claims = {
        name: largest(values) <= limit
        for name, (values, limit) in limited.items()
        if largest(values) is not None
    }
    # One failed audit is a failed audit, whatever is unknown of the others
    if False in audits or None not in audits:
        claims["audit_passed"] = False not in audits
    # One run is always of one code: that is nothing to claim
    if len(codes) > 1 and None not in codes:
        claims["same_code_all_seeds"] = len(set(codes)) == 1
    # All runs were scored on the same data, so the first speaks for all
    if group[0].scope:
        claims["canonical_validation"] = group[0].scope.startswith("canonical")
    claims["three_seeds"] = len(group) >= 3
    if p is not None:
        claims["beats_baseline_p_below_0_01"] = p < SIGNIFICANT_P
    return claims


def hardware(run):
    """The machine as records write it: 8x NVIDIA H100 80GB HBM3."""
    name = run.manifest.get("device_name")
    return name and f"{run.manifest.get('world_size', 1)}x {name}"


def build_submission(args, group, stage, p):
    """The submission as a dict; val_bpb is the headline, val_bpb_std is over the seeds."""
    bpbs = sample_of(group, stage)
    preset = common_value([run.preset for run in group]) or group[0].name
    labels = {run.scores[stage].label for run in group}
    results = {}
    for run in group:
        score = run.scores[stage]
        results[str(run.seed)] = {
            "val_bpb": round(score.val_bpb, 8),
            "val_loss": round(score.val_loss, 8),
            "artifact_bytes": run.results.get("artifact_bytes"),
            "steps": run.results.get("steps"),
            "step_avg_ms": rounded(run.results.get("step_avg_ms"), 2),
            "train_time_s": rounded(run.training_s, 1),
            "eval_time_s": rounded(score.eval_time_s, 1),
        }
    return {
        # The author's fields, which no run can tell
        "author": args.author,
        "github_id": args.github_id or args.author,
        "name": args.name or preset,
        "blurb": args.blurb or f"{preset}, {stage} score, {bpbs.n} seed(s)",
        "date": str(args.date or datetime.datetime.now(datetime.UTC).date()),
        "track": args.track,
        # The score and its text
        "score_label": labels.pop() if len(labels) == 1 else stage,
        "score_scope": group[0].scope,
        "val_loss": round(sample_of(group, stage, "val_loss").mean, 8),
        "val_bpb": round(bpbs.mean, 8),
        "val_bpb_std": rounded(bpbs.sd, 8),
        "bytes_total": largest([run.results.get("total_bytes") for run in group]),
        "bytes_code": largest([run.results.get("code_bytes") for run in group]),
        "seeds": [run.seed for run in group],
        "seed_results": results,
        "hardware": common_value([hardware(run) for run in group]),
        "pytorch_version": common_value([run.manifest.get("torch") for run in group]),
        "compliance": compliance(group, stage, p),
    }


def flat(data, place=""):
    """{dotted place: value} of nested objects."""
    if not isinstance(data, dict):
        return {place: data}
    inside = [flat(value, f"{place}.{name}".lstrip(".")) for name, value in data.items()]
    return {place: value for each in inside for place, value in each.items()}


def differences(found, expected):
    """One line per place where a submission.json is not what the runs say.

    Claims and seeds that the runs do not know are differences, other additional fields are not.
    """
    found, expected = flat(found), flat(expected)
    lines = []
    for place, value in expected.items():
        if place in found:
            if not agree(found[place], value, place):
                lines.append(f"{place}: {found[place]}, expected {value}")
        # A claim need not be made, and only collect.py's own files name the label
        elif not place.startswith("compliance.") and place != "score_label":
            lines.append(f"{place}: missing, expected {value}")
    for place in found.keys() - expected.keys():
        if place.startswith(("compliance.", "seed_results.")):
            lines.append(f"{place}: not backed by these runs")
    return lines


def agree(found, expected, place):
    """True if a value is what the runs say, a number at its decimals (a score at 4 or more)."""
    # The author may write anything but nothing
    if place in AUTHOR_FIELDS:
        return isinstance(found, str) and bool(found.strip())
    if place == "seeds" and isinstance(found, list):
        return sorted(map(str, found)) == sorted(map(str, expected))
    if not isinstance(expected, float):
        return found == expected
    if not isinstance(found, (int, Decimal)) or not Decimal(found).is_finite():
        return False
    # A file may round, and the eighth digit of a mean of printed digits may be off by one; but a
    # file that rounds to nothing would agree with everything
    decimals = max(-Decimal(found).as_tuple().exponent, 4 if "val_" in place else 1)
    return abs(float(Decimal(found)) - expected) <= 0.5 * 10.0**-decimals + 0.6e-8


# --- results.md ----------------------------------------------------------------------------------


def cell(value, form="{}"):
    """A value as the text of a table, "-" if it is unknown."""
    return "-" if value is None else form.format(value)


def markdown(rows):
    """A Markdown table of {column: text} rows."""
    # As text: pandas would print 1.1 for 1.10000
    frame = pandas.DataFrame(rows, dtype=str)
    frame = frame.replace({r"\|": r"\\|", "\n": " "}, regex=True)
    return frame.to_markdown(index=False, disable_numparse=True)


def score_columns(runs):
    """The stages that any run has, weakest first, illegal ones behind their namesakes."""
    # An illegal score is shown, so that nobody wonders where it went
    order = [name for stage in STAGES for name in (stage, f"{stage} (illegal)")]
    return [stage for stage in order if any(stage in run.scores for run in runs)]


def mean_cell(runs, stage):
    """'mean ± sd' of val_bpb over the runs that have the score, saying so if that is not all."""
    scored = [run for run in runs if stage in run.scores]
    if not scored:
        return "-"
    part = f" ({len(scored)} of {len(runs)})" if len(scored) < len(runs) else ""
    return f"{sample_of(scored, stage)}{part}"


def seed_table(group, headline):
    """The table of seeds with its mean ± sd row; bpb in the score columns."""
    columns, rows = score_columns(group), []
    for run in group:
        row = {
            "seed": cell(run.seed),
            "steps": cell(run.results.get("steps")),
            "ms/step": cell(run.results.get("step_avg_ms"), "{:.2f}"),
        }
        row.update({stage: mean_cell([run], stage) for stage in columns})
        for part in ("artifact", "total"):
            size = run.results.get(f"{part}_bytes")
            row[f"{part} bytes"] = "-" if size is None else with_separators(size)
        row["train s"] = cell(run.training_s, "{:.1f}")
        row["eval s"] = cell(run.scores[headline].eval_time_s, "{:.1f}")
        rows.append(row)
    # Means of the scores only: nobody compares the mean of sizes
    means = dict.fromkeys(rows[0], "")
    means["seed"] = "mean ± sd" if len(group) > 1 else "mean"
    means.update({stage: mean_cell(group, stage) for stage in columns})
    return markdown([*rows, means])


def data_text(run, stage):
    """The section on the validation text and the check of its bytes."""
    scope = {
        "canonical-by-counts": "a split with the canonical numbers of targets and bytes",
        "proxy": "**proxy** data, not the canonical split: not comparable with published scores",
    }.get(run.scope, "data of unknown scope")
    parts = [f"{run.scores[stage].bytes_per_token:.4f} bytes per token"]
    if run.data:
        targets, size = run.data["val_targets"], run.data["val_bytes"]
        parts = [f"{with_separators(targets)} targets", f"{with_separators(size)} bytes", *parts]
    return (
        f"Scored on {scope} ({', '.join(parts)}). Every score implies these bytes: "
        "tokens · val_loss / (ln 2 · val_bpb) was checked line by line."
    )


def rest_of_page(runs):
    """The end of both pages: remarks, and the runs that are no part of any number."""
    remarks = "".join(f"- {run.name}: {run.remark}\n" for run in runs if run.remark)
    if remarks:
        remarks = f"## How the runs were read\n\n{remarks}\n"
    # Failures belong on the page: a seed must not vanish because it failed
    rows = [
        {"run": run.name, "seed": cell(run.seed), "status": run.status, "what happened": run.note}
        for run in runs
        if not run.finished
    ]
    return (
        f"{remarks}## Unfinished and failed runs (not part of any number above)\n\n"
        f"{markdown(rows) if rows else 'None.'}\n\n![curves](curves.png)\n"
    )


def submission_text(submission, runs, group, stage, significance):
    """results.md for runs of one configuration."""
    sample, claims = sample_of(group, stage), submission["compliance"]
    unaudited = "" if claims.get("audit_passed") else ", **unaudited**"
    listed = "".join(f"- {claim}: {'yes' if kept else 'NO'}\n" for claim, kept in claims.items())
    return (
        f"# {submission['name']}\n\n**val_bpb {sample}** ({stage}, {sample.n} seed(s){unaudited}; "
        f"scores in bits per byte)\n\n{data_text(group[0], stage)}\n\n{seed_table(group, stage)}"
        f"\n\n{significance}## Measured compliance\n\n{listed}\n{rest_of_page(runs)}"
    )


def ablation_text(runs, groups):
    """results.md for runs of several configurations: a row each, with its differing settings."""
    finished = [run for group in groups for run in group]
    settings, columns = differing_settings(finished), score_columns(finished)
    for stage in (FLOAT, ROUNDTRIP):  # the weakest scores only where there is no other
        if len(columns) > 1 and stage in columns:
            columns.remove(stage)
    rows, first = [], 0
    for group in groups:
        row = {"preset": cell(group[0].preset)}
        row.update({name: values[first] for name, values in settings.items()})
        row["seeds"] = ", ".join(str(run.seed) for run in group)
        row.update({stage: mean_cell(group, stage) for stage in columns})
        rows.append(row)
        first += len(group)  # `finished` is in the order of the groups
    return (
        f"# Ablation\n\n{data_text(finished[0], next(iter(finished[0].scores)))}\n\n"
        f"Scores in bits per byte, mean ± sd over seeds.\n\n{markdown(rows)}\n\n"
        f"{rest_of_page(runs)}"
    )


# --- curves.png ----------------------------------------------------------------------------------


def curve_names(runs, ablation):
    """One legend entry per run: its seed, in an ablation the settings that differ."""
    if not ablation:
        return [
            f"seed {cell(run.seed)}" + ("" if run.finished else f" ({run.status})") for run in runs
        ]
    table = differing_settings(runs)
    texts = [", ".join(f"{name}={table[name][at]}" for name in table) for at in range(len(runs))]
    return [textwrap.shorten(text, 160, placeholder=" ...") or "all runs" for text in texts]


def draw_curves(runs, title, ablation):
    """The Figure: training loss and validation bpb over the steps, one colour per run or row."""
    names = curve_names(runs, ablation)
    distinct = list(dict.fromkeys(names))
    figure = Figure(figsize=(13, 5.5), dpi=120, layout="constrained")
    figure.suptitle(title)
    loss, bpb = figure.subplots(1, 2, sharex=True)
    for run, name in zip(runs, names):
        colour = f"C{distinct.index(name)}"
        style = dict(color=colour, label=name, linestyle="-" if run.finished else "--")
        series = pandas.Series(run.train_curve, dtype=float)
        # Over a twentieth of the points, past ones only: no mean knows later steps
        smooth = series.rolling(max(1, len(series) // 20), min_periods=1).mean()
        loss.plot(smooth.index, smooth, linewidth=1.3, **style)
        # Single steps are one batch each: pale, behind the mean
        pale = dict(s=4, color=colour, alpha=0.25, linewidths=0, zorder=1)
        loss.scatter(list(run.train_curve), list(run.train_curve.values()), **pale)
        style.update(linewidth=1.0, marker="o", markersize=5)
        bpb.plot(list(run.val_curve), list(run.val_curve.values()), **style)
    loss.set(title="training loss (running mean, steps behind it)")
    loss.set(ylabel="train_loss (nats per token)")
    bpb.set(title="validation during training", ylabel="val_bpb (bits per byte)")
    # Runs end at different steps where the clock decides
    starts = [run.warmdown_start for run in runs if run.warmdown_start is not None]
    end = max((run.last_step for run in runs if run.last_step is not None), default=0)
    curves = ([run.train_curve for run in runs], [run.val_curve for run in runs])
    for axis, lines in zip((loss, bpb), curves):
        if starts:
            axis.axvspan(min(starts), end, color="0.5", alpha=0.15, label="warmdown", zorder=0)
        # Fit the last 95 % of the steps: the first ones would flatten everything after them
        points = [value for line in lines for at, value in line.items() if at >= 0.05 * end]
        points = [value for value in points if math.isfinite(value)]
        if points:
            margin = 0.05 * (max(points) - min(points)) or 0.05
            axis.set_ylim(min(points) - margin, max(points) + margin)
        axis.set(xlabel="step")
        axis.grid(alpha=0.3)
    handles, labels = loss.get_legend_handles_labels()
    entries = dict(zip(labels, handles))  # one per name
    # As many columns as fit: a hundred characters or so to a line
    columns = max(1, min(len(entries), 190 // (10 + max(map(len, entries)))))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, fontsize=9)
    return figure


# --- Command line --------------------------------------------------------------------------------


def build_parser():
    """The parser of the command line; --help shows the module's docstring."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run directory or log, one per seed")
    here = "where submission.json, results.md and curves.png go (default: here)"
    add("--out", type=Path, default=Path("."), metavar="DIR", help=here)
    matrix = "allow several configurations: matrix of differing settings, no submission.json"
    add("--ablation", action="store_true", help=matrix)
    check = "compare a submission.json with the runs, number by number; writes nothing"
    add("--check", type=Path, metavar="FILE", help=check)
    script = "its size is every run's code (default: a train_gpt.py beside the run, else the run's)"
    add("--script", type=Path, metavar="FILE", help=script)
    order = ", ".join(HEADLINE_ORDER)
    headline = f"score to submit, by stage or label (default: first of {order})"
    add("--headline", metavar="SCORE", help=headline)
    test = parser.add_argument_group("significance")
    beat = "what to beat: a submission.json, or val_bpb as mean,sd,runs"
    test.add_argument("--baseline", metavar="FILE|MEAN,SD,N", help=beat)
    nats = "improvement to prove, in nats per token (default 0.005)"
    test.add_argument("--threshold-nats", type=number_from_0, default=0.005, metavar="X", help=nats)
    add = parser.add_argument_group("author's fields of submission.json").add_argument
    add("--author", default="anonymous", help="default: anonymous")
    add("--github-id", help="default: the author")
    add("--name", help="default: the preset")
    add("--blurb", help="one sentence (default: preset, score and number of seeds)")
    add("--track", default="non-record-16mb", help="default: non-record-16mb")
    day = datetime.date.fromisoformat
    add("--date", type=day, metavar="YYYY-MM-DD", help="default: today in UTC")
    return parser


def check_submission(path, submission):
    """Print where a submission.json differs from the runs; returns the exit code."""
    if not path.exists():
        raise UsageProblem(
            f"--check {path}: no such file; leave out --check to write a submission.json"
        )
    # Decimals keep the digits as they were written
    lines = differences(read_json(path, parse_float=Decimal, parse_constant=Decimal), submission)
    sys.stderr.writelines(f"{path}: {line}\n" for line in lines)
    if lines:
        return 1
    print(f"{path}: agrees with {len(submission['seeds'])} run(s), {submission['score_label']}")
    return 0


def collect(args):
    """Write and print the results, or check a submission.json; returns the exit code."""
    runs = load_runs(args.runs)
    if args.script and not args.script.is_file():
        raise UsageProblem(f"--script {args.script}: no such file; expected a train_gpt.py")
    for run in runs:
        # In a submission folder the script that counts lies beside the run
        folder = run.path if run.path.is_dir() else run.path.parent
        script = args.script or folder / "train_gpt.py"
        if script.is_file() and "artifact_bytes" in run.results:
            run.results["code_bytes"] = script.stat().st_size
            run.results["total_bytes"] = run.results["artifact_bytes"] + script.stat().st_size
    if args.ablation:
        for name in ("check", "baseline", "headline"):
            if getattr(args, name):
                raise UsageProblem(
                    f"--{name} is for one configuration; leave out either it or --ablation"
                )
        text, title, files = ablation_text(runs, group_runs(runs, ablation=True)), "Ablation", {}
    else:
        # Without --ablation there is one group, or an error that names the differences
        (group,) = group_runs(runs, ablation=False)
        stage = choose_headline(group, args.headline)
        p, significance = significance_of(args, group, stage)
        submission = build_submission(args, group, stage, p)
        if args.check:
            return check_submission(args.check, submission)
        if len(group) == 1:
            sys.stderr.write(
                f"collect.py: note: one finished run ({group[0].path}): val_bpb_std is null; it "
                "takes at least 2 seeds\n"
            )
        text = submission_text(submission, runs, group, stage, significance)
        title = submission["name"]
        # allow_nan=False: NaN is no JSON, and no result either
        as_json = json.dumps(submission, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        files = {"submission.json": as_json.encode()}
    picture = io.BytesIO()
    # No version in the file: the same runs give the same picture
    draw_curves(runs, title, args.ablation).savefig(picture, metadata={"Software": None})
    files |= {"results.md": text.encode(), "curves.png": picture.getvalue()}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (args.out / name).write_bytes(data)
    except OSError as error:
        raise UsageProblem(
            f"--out {args.out}: {error.strerror}; expected a directory to write to"
        ) from None
    sys.stdout.write(text)
    return 0


def main(arguments=None):
    """Returns the exit code; see the module's docstring."""
    open_terminal()
    args = build_parser().parse_args(arguments)
    try:
        return collect(args)
    except (UsageProblem, RunDataProblem) as error:
        sys.stderr.write(f"collect.py: error: {error}\n")
        return error.exit_code
    # A folder in place of a file, say: its name tells more than a traceback
    except OSError as error:
        sys.stderr.write(
            f"collect.py: error: {error.filename}: {error.strerror}; expected a readable file\n"
        )
        return RunDataProblem.exit_code


if __name__ == "__main__":
    sys.exit(main())
