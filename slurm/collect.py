"""Turn the runs of one configuration into a results table, a plot, a significance test and a
submission.json.

    python slurm/collect.py runs/nfm_7k_seed*                               # table and the three files
    python slurm/collect.py runs/nfm_7k_seed* --baseline 1.12135,0.0009,3   # Welch's test against a record
    python slurm/collect.py runs/nfm_7k_seed* --check submission.json       # does the file say what they say?
    python slurm/collect.py runs/ablation_* --ablation --out results        # matrix over differing settings
    python slurm/collect.py train_seed42.log train_seed1337.log             # plain logs do as well
    python slurm/collect.py records/some_folder                             # and so does a folder of logs

A run is a directory written by train_gpt.py (config.json, manifest.json, metrics.jsonl,
scores.json) or a plain log, of train_gpt.py or of another script of the field, with or without
that script's source in it. Runs with EVAL_ONLY add their scores to the training run whose artifact
they scored, if both are given. Only finished runs are averaged; unfinished and failed ones are
listed.

The headline is the strongest evaluation that all runs share and that is legal, in a fixed order:
TTT + SLOT, TTT, SLOT, a last evaluation of another name, sliding, roundtrip. It is never chosen by
its number. Float weights are no submission. A log cannot prove that its evaluation is legal: that
takes the code.

Units: val_loss in nats per token, val_bpb in bits per byte, eval_time_s and train_time_s in
seconds, step_avg_ms in milliseconds, standard deviations with ddof 1.

Exit codes: 0 done; 1 --check found differences; 2 wrong use, or runs that must not be mixed; 3 bad
run data.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import math
import os
import statistics
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import jinja2
import matplotlib
import pandas

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend has to be chosen first)
from groups import (  # noqa: E402
    check_same_data,
    group_runs,
    load_runs,
    settings_table,
)
from runs import (  # noqa: E402
    FLOAT,
    HEADLINE_ORDER,
    ROUNDTRIP,
    STAGES,
    RunDataProblem,
    UsageProblem,
    read_json,
    with_separators,
)
from scipy import stats  # noqa: E402

BUDGET_BYTES = 16_000_000
TIME_LIMIT_S = 600.0
SIGNIFICANT_P = 0.01
# --- Statistics ----------------------------------------------------------------------------------


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
        if self.sd is None:
            return f"{self.mean:.5f}"
        return f"{self.mean:.5f} ± {self.sd:.5f}"


def sample_of(runs, stage, name="val_bpb"):
    """The Sample of one score over runs that all have it; repetitions of a seed count once, by
    their mean.
    """
    seeds = {}
    for run in runs:
        key = run.name if run.seed is None else run.seed
        value = getattr(run.scores[stage], name)
        seeds.setdefault(key, []).append(math.nan if value is None else value)
    return Sample.of([statistics.fmean(values) for values in seeds.values()])


def bytes_per_token(run, stage):
    """Bytes of validation text per token, None if nothing printed tells."""
    if run.bytes and run.tokens:
        return run.bytes / run.tokens
    return run.scores[stage].bytes_per_token


def choose_headline(group, wanted=None):
    """The stage of the score a submission is judged by: of the packed model, present and legal in
    every run.

    `wanted` is a stage or the label of a score. UsageProblem if there is none.
    """
    shared = [stage for stage in HEADLINE_ORDER if all(stage in run.scores for run in group)]
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


def score_label(group, stage):
    """The name that the runs print for a stage, the stage's own where they differ."""
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
    if len(sources) == 1 and sources[0].endswith(".json"):
        return baseline_from_submission(Path(sources[0]))
    runs = load_runs([Path(source) for source in sources])
    for run in runs:
        if not run.finished:
            raise UsageProblem(
                f"--baseline {run.path}: {run.status} ({run.note}); finish or leave it out"
            )
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


# --- submission.json -----------------------------------------------------------------------------

ANY_TEXT = "some text"  # what --check expects of the author's fields
AUTHOR_FIELDS = ("author", "github_id", "name", "blurb", "date", "track")


def common_value(group, name):
    """The value all runs share, several joined by '; ', None if no run states one."""
    values = dict.fromkeys(
        str(getattr(run, name)) for run in group if getattr(run, name) is not None
    )
    return "; ".join(values) or None


def largest(values):
    """The largest value, None unless every run states one: all seeds must keep to a limit."""
    return None if None in values else max(values)


def rounded(value, digits):
    """The value at so many decimals; JSON knows no nan."""
    if value is None or math.isnan(value):
        return None
    return round(value, digits)


def within(values, limit):
    """Whether all values keep to a limit, None unless all are known."""
    return None if None in values else max(values) <= limit


def compliance(group, stage, p):
    """{claim: bool} with the claims that these runs measured, and no others."""
    audits = [run.audit_passed for run in group]
    codes = [run.code_sha256 for run in group]
    passed = None if None in audits else True
    if False in audits:
        passed = False
    same_code = None
    if None not in codes and len(codes) > 1:
        same_code = len(set(codes)) == 1
    claims = {
        "artifact_under_16mb": within([run.total_bytes for run in group], BUDGET_BYTES),
        "train_under_600s": within([run.train_time_s for run in group], TIME_LIMIT_S),
        "eval_under_600s": within([run.scores[stage].eval_time_s for run in group], TIME_LIMIT_S),
        "audit_passed": passed,
        "same_code_all_seeds": same_code,
        "canonical_validation": group[0].scope and group[0].scope == "canonical",
        "three_seeds": sample_of(group, stage).n >= 3,
        "beats_baseline_p_below_0_01": None if p is None else p < SIGNIFICANT_P,
    }
    return {claim: value for claim, value in claims.items() if value is not None}


def seed_results(group, stage):
    """{seed: result} of submission.json; a log's name stands for a seed that is unknown or not
    alone.
    """
    seeds = [run.seed for run in group]
    results = {}
    for run in group:
        score = run.scores[stage]
        alone = run.seed is not None and seeds.count(run.seed) == 1
        results[str(run.seed) if alone else run.path.stem] = {
            "val_bpb": round(score.val_bpb, 8),
            "val_loss": rounded(score.val_loss, 8),
            "artifact_bytes": run.artifact_bytes,
            "steps": run.steps,
            "step_avg_ms": rounded(run.step_avg_ms, 2),
            "train_time_s": rounded(run.train_time_s, 1),
            "eval_time_s": rounded(score.eval_time_s, 1),
        }
    return results


def build_submission(args, group, stage, p):
    """The submission as a dict; val_loss and val_bpb are the headline, val_bpb_std is over the
    seeds.
    """
    bpbs, preset = sample_of(group, stage), common_value(group, "preset") or group[0].name
    judged = judged_runs(group)
    return {
        "author": args.author,
        "github_id": args.github_id or args.author,
        "name": args.name or preset,
        "blurb": args.blurb or f"{preset}, {stage} score, {bpbs.n} seed(s)",
        "date": args.date or str(datetime.datetime.now(datetime.timezone.utc).date()),
        "track": args.track,
        "score_label": score_label(group, stage),
        "score_scope": group[0].scope,
        "val_loss": rounded(sample_of(judged, stage, "val_loss").mean, 8),
        "val_bpb": round(sample_of(judged, stage).mean, 8),
        "val_bpb_std": rounded(bpbs.sd, 8),
        "bytes_total": largest([run.total_bytes for run in judged]),
        "bytes_code": largest([run.code_bytes for run in judged]),
        "seeds": list(dict.fromkeys(run.seed for run in group if run.seed is not None)),
        "seed_results": seed_results(group, stage),
        "hardware": common_value(group, "hardware"),
        "pytorch_version": common_value(group, "pytorch_version"),
        "compliance": compliance(group, stage, p),
    }


def differences(found, expected, where=""):
    """One line per place that differs. Claims and seeds that the runs do not know are differences,
    other additional fields are not.
    """
    if not isinstance(expected, dict) or not isinstance(found, dict):
        return [] if agree(found, expected, where) else [f"{where}: {found}, expected {expected}"]
    lines = []
    for name, value in expected.items():
        place = f"{where}.{name}" if where else name
        if name in found:
            lines += differences(found[name], value, place)
        # A claim need not be made; files of others name neither label nor scope, which then means
        # canonical.
        elif where != "compliance" and name != "score_label" and value != "canonical":
            lines.append(f"{place}: missing, expected {value}")
    if where in ("compliance", "seed_results"):
        lines += [
            f"{where}.{name}: not backed by these runs" for name in found if name not in expected
        ]
    return lines


def agree(found, expected, where):
    """True if a value of the file is what the runs say, a number at its decimals (of a score at
    least 4).
    """
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


# --- results.md ----------------------------------------------------------------------------------

SUBMISSION_PAGE = """\
# {{ submission.name }}

**val_bpb {{ headline }}** ({{ stage }}{{ basis }}; scores in bits per byte)

{{ data }}

{{ seeds }}

{% if significance %}
{{ significance }}

{% endif %}
## Measured compliance

{% for claim, value in submission.compliance.items() %}
- {{ claim }}: {{ "yes" if value else "NO" }}
{% endfor %}

{% include "rest" %}
"""
ABLATION_PAGE = """\
# Ablation

{{ data }}

Scores in bits per byte, mean ± sd over seeds.

{{ matrix }}

{% include "rest" %}
"""
REST_OF_PAGE = """\
{% if remarks %}
## How the runs were read

{% for remark in remarks %}
- {{ remark }}
{% endfor %}

{% endif %}
## Unfinished and failed runs (not part of any number above)

{{ unfinished }}

![curves](curves.png)
"""
PAGES = jinja2.Environment(
    loader=jinja2.DictLoader(
        {"submission": SUBMISSION_PAGE, "ablation": ABLATION_PAGE, "rest": REST_OF_PAGE}
    ),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    autoescape=False,
)


def cell(value, form="{}"):
    """A value as the text of a table, "-" if it is unknown."""
    return "-" if value is None else form.format(value)


def markdown(rows):
    """A Markdown table of {column: text} rows."""
    frame = pandas.DataFrame(rows, dtype=str)
    frame = frame.replace({r"\|": r"\\|", "\n": " "}, regex=True)
    return frame.to_markdown(index=False, disable_numparse=True)


def score_columns(runs):
    """The stages that any of the runs has, weakest first, illegal ones behind their legal
    namesakes.
    """
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
            "steps": cell(run.steps),
            "ms/step": cell(run.step_avg_ms, "{:.2f}"),
        }
        for stage in columns:
            row[stage] = cell(run.scores[stage].val_bpb, "{:.5f}") if stage in run.scores else "-"
        row["artifact bytes"] = size_cell(run.artifact_bytes)
        row["total bytes"] = size_cell(run.total_bytes)
        row["train s"] = cell(run.train_time_s, "{:.1f}")
        row["eval s"] = cell(run.scores[headline].eval_time_s, "{:.1f}")
        rows.append(row)
    means = dict.fromkeys(rows[0], "")
    means["seed"] = "mean ± sd" if len(group) > 1 else "mean"
    means.update({stage: mean_cell(group, stage) for stage in columns})
    return markdown([*rows, means])


def size_cell(size):
    return "-" if size is None else with_separators(size)


def ablation_table(groups):
    """The matrix: one row per configuration, its differing settings, then val_bpb per evaluation.
    """
    finished = [run for group in groups for run in group]
    settings, columns = settings_table(finished), score_columns(finished)
    for stage in (FLOAT, ROUNDTRIP):  # the weakest scores only where there is no other
        if len(columns) > 1 and stage in columns:
            columns.remove(stage)
    rows, first = [], 0
    for group in groups:
        row = {"preset": cell(group[0].preset), **settings.iloc[first].to_dict()}
        row["seeds"] = ", ".join(str(run.seed) for run in group)
        row.update({stage: mean_cell(group, stage) for stage in columns})
        rows.append(row)
        first += len(group)  # `finished` is in the order of the groups
    return markdown(rows)


def rest_of_page(runs):
    """What the ends of both pages show: remarks, and the runs that are no part of any number."""
    rows = [
        {"run": run.name, "seed": cell(run.seed), "status": run.status, "what happened": run.note}
        for run in runs
        if not run.finished
    ]
    remarks = [f"{run.name}: {remark}" for run in runs for remark in dict.fromkeys(run.remarks)]
    return {"remarks": remarks, "unfinished": markdown(rows) if rows else "None."}


def data_text(run, stage):
    """The section on what was scored and how the bytes were checked."""
    scope = {
        "canonical": "the canonical validation split",
        "proxy": "**proxy** data, not the canonical split: not comparable with published scores",
        None: "data of unknown scope (the log does not say)",
    }[run.scope]
    parts = []
    if run.tokens and run.bytes:
        parts = [f"{with_separators(run.tokens)} targets", f"{with_separators(run.bytes)} bytes"]
    ratio = bytes_per_token(run, stage)
    if ratio is None:
        return f"Scored on {scope}. No line prints a loss beside val_bpb, so the bytes could not be checked."
    parts.append(f"{ratio:.4f} bytes per token")
    precision = "" if run.whole_config else " to 0.1 %"
    return (
        f"Scored on {scope} ({', '.join(parts)}). Every score implies these bytes{precision}: "
        "tokens · val_loss / (ln 2 · val_bpb) was checked line by line."
    )


def submission_text(submission, runs, group, stage, significance):
    """results.md for runs of one configuration."""
    sample, judged = sample_of(group, stage), judged_runs(group)
    headline, basis = sample, f", {sample.n} seed(s)"
    if judged is not group:
        headline = sample_of(judged, stage)
        basis = (
            f", seed {judged[0].seed}: the run that its folder keeps as train.log; mean of "
            f"{sample.n} seed(s) {sample}"
        )
    return (
        PAGES.get_template("submission")
        .render(
            submission=submission,
            headline=headline,
            stage=stage,
            basis=basis,
            data=data_text(group[0], stage),
            seeds=seed_table(group, stage),
            significance=significance,
            **rest_of_page(runs),
        )
        .rstrip()
        + "\n"
    )


# --- curves.png ----------------------------------------------------------------------------------


def curve_names(runs, ablation):
    """One legend entry per run: its seed, in an ablation what tells its configuration apart."""
    if not ablation:
        return [
            f"seed {cell(run.seed)}" + ("" if run.finished else f" ({run.status})") for run in runs
        ]
    with_settings = [run for run in runs if run.settings]
    entries = iter(settings_table(with_settings).to_dict("records")) if with_settings else iter(())
    names = []
    for run in runs:
        differing = next(entries, {}) if run.settings else {}
        text = ", ".join(f"{name}={value}" for name, value in differing.items())
        names.append(textwrap.shorten(text, 160, placeholder=" ...") or "all runs")
    return names


def running_mean(curve):
    """The curve as a pandas Series by step, smoothed over a fiftieth of its points."""
    series = pandas.Series(dict(curve), dtype=float)
    return series.rolling(max(1, len(series) // 50), min_periods=1).mean()


def colours_of(names):
    """A colour per name, the same for the same name."""
    distinct = list(dict.fromkeys(names))
    palette = plt.get_cmap("tab10" if len(distinct) <= 10 else "tab20")
    return [palette(distinct.index(name) % palette.N) for name in names]


def draw_training(axis, runs, names):
    """The running mean of the training loss per run, its raw points behind it."""
    for run, name, colour in zip(runs, names, colours_of(names)):
        smooth = running_mean(run.train_curve)
        raw = pandas.Series(dict(run.train_curve), dtype=float)
        axis.scatter(raw.index, raw, s=4, color=colour, alpha=0.25, linewidths=0, zorder=1)
        axis.plot(
            smooth.index,
            smooth,
            "-" if run.finished else "--",
            label=name,
            linewidth=1.3,
            color=colour,
        )
    axis.set(
        title="training loss (running mean, steps behind it)", ylabel="train_loss (nats per token)"
    )
    limit_height(axis, [run.train_curve for run in runs])


def draw_validation(axis, runs, names):
    """The validations during training, a marker each."""
    for run, name, colour in zip(runs, names, colours_of(names)):
        points = pandas.Series(dict(run.val_curve), dtype=float)
        axis.plot(
            points.index,
            points,
            "-" if run.finished else "--",
            label=name,
            linewidth=1.0,
            marker="o",
            markersize=5,
            color=colour,
        )
    axis.set(title="validation during training", ylabel="val_bpb (bits per byte)")
    limit_height(axis, [run.val_curve for run in runs])


def limit_height(axis, curves):
    """Show the last 95 % of the steps in full: the first 5 % would flatten everything after them.
    """
    points = [(step, value) for curve in curves for step, value in curve if math.isfinite(value)]
    if points:
        start = 0.05 * max(step for step, _ in points)
        shown = [value for step, value in points if step >= start]
        margin = 0.05 * (max(shown) - min(shown)) or 0.05
        axis.set_ylim(min(shown) - margin, max(shown) + margin)
    axis.set(xlabel="step")
    axis.grid(alpha=0.3)


def draw_curves(runs, title, ablation):
    """The PNG (bytes): training loss and validation bpb over the steps, one colour per run."""
    names = curve_names(runs, ablation)
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), dpi=120, layout="constrained", sharex=True)
    draw_training(axes[0], runs, names)
    draw_validation(axes[1], runs, names)
    starts = [run.warmdown_start for run in runs if run.warmdown_start is not None]
    ends = [run.last_step for run in runs if run.last_step is not None]
    if starts and ends:
        for axis in axes:
            axis.axvspan(
                min(starts), max(ends), color="0.5", alpha=0.15, label="warmdown", zorder=0
            )
    figure.suptitle(title)
    handles, labels = axes[0].get_legend_handles_labels()
    entries = dict(zip(labels, handles))  # one per name
    columns = max(1, min(len(entries), 190 // (10 + max(map(len, entries)))))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


# --- Command line --------------------------------------------------------------------------------


def write_files(directory, contents):
    """Write {name: bytes} into a directory, by a scratch folder and renames: no file is ever half
    there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".collect.", dir=directory) as scratch:
            for name, data in contents.items():
                Path(scratch, name).write_bytes(data)
            for name in contents:
                os.replace(Path(scratch, name), directory / name)
    except OSError as error:
        raise UsageProblem(
            f"--out {directory}: {error.strerror}; expected a directory to write to"
        ) from None


def number_from_0(text):
    """An argument that has to be a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def iso_date(text):
    """An argument that has to be a date, YYYY-MM-DD."""
    return str(datetime.date.fromisoformat(text))


def build_parser():
    """The parser of the command line; --help shows the module's docstring."""
    summary, details = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="collect.py",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run directory or log file, one per seed")
    add(
        "--out",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="where submission.json, results.md and curves.png go (default: here)",
    )
    add(
        "--ablation",
        action="store_true",
        help="allow several configurations: matrix of differing settings, no submission.json",
    )
    add(
        "--check",
        type=Path,
        metavar="FILE",
        help="compare a submission.json with the runs, number by number; writes nothing",
    )
    add(
        "--headline",
        metavar="SCORE",
        help=f"score to submit, by stage or label (default: first of {', '.join(HEADLINE_ORDER)})",
    )
    test = parser.add_argument_group("significance")
    test.add_argument(
        "--baseline",
        action="append",
        metavar="FILE|MEAN,SD,N",
        help="what to beat: a submission.json, or val_bpb as mean,sd,runs; run directories and "
        "logs one by one, repeating the option",
    )
    threshold = test.add_mutually_exclusive_group()
    threshold.add_argument(
        "--threshold-nats",
        type=number_from_0,
        default=0.005,
        metavar="X",
        help="improvement to prove, in nats per token (default 0.005)",
    )
    threshold.add_argument(
        "--threshold-bpb",
        type=number_from_0,
        metavar="X",
        help="the same in bits per byte (default: converted by the runs' bytes per token)",
    )
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
            raise UsageProblem(
                f"--{name} is for one configuration; leave out either it or --ablation"
            )
    groups = group_runs(runs, ablation=True)
    first = groups[0][0]
    text = (
        PAGES.get_template("ablation")
        .render(
            data=data_text(first, next(iter(first.scores))),
            matrix=ablation_table(groups),
            **rest_of_page(runs),
        )
        .rstrip()
        + "\n"
    )
    write_files(
        args.out, {"results.md": text.encode(), "curves.png": draw_curves(runs, "Ablation", True)}
    )
    sys.stdout.write(text)
    return 0


def check_submission(path, submission):
    """Print the differences between a submission.json and what the runs say; returns the exit
    code.
    """
    if not path.exists():
        raise UsageProblem(
            f"--check {path}: no such file; leave out --check to write a submission.json"
        )
    found = read_json(
        path, parse_float=Decimal, parse_constant=Decimal
    )  # Decimals keep what was written
    lines = differences(found, submission | dict.fromkeys(AUTHOR_FIELDS, ANY_TEXT))
    sys.stderr.writelines(f"{path}: {line}\n" for line in lines)
    if lines:
        return 1
    print(f"{path}: agrees with {len(submission['seeds'])} run(s), {submission['score_label']}")
    return 0


def collect_submission(args, runs):
    """Write and print the results of one configuration, or check a submission.json against them."""
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
    as_json = json.dumps(submission, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_files(
        args.out,
        {
            "submission.json": as_json.encode(),
            "results.md": text.encode(),
            "curves.png": draw_curves(runs, submission["name"], False),
        },
    )
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
        sys.stderr.write(
            f"collect.py: error: {error.filename}: {error.strerror}; expected a readable file\n"
        )
        return RunDataProblem.exit_code


if __name__ == "__main__":
    sys.exit(main())
