"""results.md: the page of one configuration, and the matrix of an ablation."""

from __future__ import annotations

import jinja2
import pandas
from groups import settings_table
from runs import FLOAT, ROUNDTRIP, STAGES, with_separators
from significance import bytes_per_token, judged_runs, sample_of

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
# StrictUndefined: a template that asks for what it is not given is a defect, not an empty line.
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
    # A configuration may leave an evaluation out
    scored = [run for run in runs if stage in run.scores]
    if not scored:
        return "-"
    # A mean over some of the runs must not look like one over all
    part = f" ({len(scored)} of {len(runs)})" if len(scored) < len(runs) else ""
    return f"{sample_of(scored, stage)}{part}"


def seed_table(group, headline):
    """The table of seeds with its mean ± sd row; bpb in the score columns."""
    # One row per run, even where two share a seed
    columns, rows = score_columns(group), []
    for run in group:
        row = {
            "seed": cell(run.seed),
            "steps": cell(run.steps),
            "ms/step": cell(run.step_avg_ms, "{:.2f}"),
        }
        for stage in columns:
            row[stage] = cell(run.scores[stage].val_bpb, "{:.5f}") if stage in run.scores else "-"
        # What has to fit, and how long it took
        row["artifact bytes"] = size_cell(run.artifact_bytes)
        row["total bytes"] = size_cell(run.total_bytes)
        row["train s"] = cell(run.training_s, "{:.1f}")
        row["eval s"] = cell(run.scores[headline].eval_time_s, "{:.1f}")
        rows.append(row)
    # Means of the scores only: nobody compares the mean of sizes
    means = dict.fromkeys(rows[0], "")
    means["seed"] = "mean ± sd" if len(group) > 1 else "mean"
    means.update({stage: mean_cell(group, stage) for stage in columns})
    return markdown([*rows, means])


def size_cell(size):
    return "-" if size is None else with_separators(size)


def ablation_table(groups):
    """The matrix: a row per configuration, its differing settings, then val_bpb per stage."""
    finished = [run for group in groups for run in group]
    settings, columns = settings_table(finished), score_columns(finished)
    # A matrix is read across
    for stage in (FLOAT, ROUNDTRIP):  # the weakest scores only where there is no other
        if len(columns) > 1 and stage in columns:
            columns.remove(stage)
    # The settings table has a row per run; the first of a group stands for it
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
    # What went wrong belongs on the page: a seed must not vanish because it failed
    rows = [
        {"run": run.name, "seed": cell(run.seed), "status": run.status, "what happened": run.note}
        for run in runs
        if not run.finished
    ]
    # A remark may be made for each of several lines
    remarks = [f"{run.name}: {remark}" for run in runs for remark in dict.fromkeys(run.remarks)]
    return {"remarks": remarks, "unfinished": markdown(rows) if rows else "None."}


def data_text(run, stage):
    """The section on what was scored and how the bytes were checked."""
    scope = {
        "canonical": "the canonical validation split",
        "canonical-by-counts": "a split with the canonical numbers of targets and bytes, its "
        "SHA-256 not compared",
        "proxy": "**proxy** data, not the canonical split: not comparable with published scores",
        None: "data of unknown scope (the log does not say)",
    }[run.scope]
    # Counts where train_gpt.py made them, else only what the scores imply
    parts = []
    if run.tokens and run.bytes:
        parts = [f"{with_separators(run.tokens)} targets", f"{with_separators(run.bytes)} bytes"]
    # A log that prints only val_bpb says nothing of its bytes
    ratio = bytes_per_token(run, stage)
    if ratio is None:
        return (
            f"Scored on {scope}. No line prints a loss beside val_bpb, so the bytes could not be "
            "checked."
        )
    parts.append(f"{ratio:.4f} bytes per token")
    # train_gpt.py counts every evaluation the same way, other scripts do not
    precision = "" if run.whole_config else " to 0.1 %"
    doubt = "" if run.whole_config else " A log does not show whether an evaluation is legal."
    return (
        f"Scored on {scope} ({', '.join(parts)}). Every score implies these bytes{precision}: "
        f"tokens · val_loss / (ln 2 · val_bpb) was checked line by line.{doubt}"
    )


def submission_text(submission, runs, group, stage, significance):
    """results.md for runs of one configuration."""
    sample, judged = sample_of(group, stage), judged_runs(group)
    # The mean, unless the folder says which run was submitted
    # A folder of the field may be judged by one run
    headline, basis = sample, f", {sample.n} seed(s)"
    if judged is not group:
        headline = sample_of(judged, stage)
        basis = (
            f", seed {judged[0].seed}: the run that its folder {judged[0].submitted}; mean of "
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


def ablation_text(runs, groups):
    """results.md for runs of several configurations."""
    first = groups[0][0]
    page = PAGES.get_template("ablation").render(
        data=data_text(first, next(iter(first.scores))),
        matrix=ablation_table(groups),
        **rest_of_page(runs),
    )
    return page.rstrip() + "\n"
