"""curves.png: training loss and validation over the steps, one colour per run."""

from __future__ import annotations

import io
import math
import textwrap

import matplotlib
import pandas
from groups import settings_table

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend has to be chosen first)


def curve_names(runs, ablation):
    """One legend entry per run: its seed, in an ablation what tells its configuration apart."""
    if not ablation:
        return [seed_name(run) for run in runs]
    # A run that failed before it began has no settings, but it has its place in the legend
    with_settings = [run for run in runs if run.settings]
    entries = iter(settings_table(with_settings).to_dict("records")) if with_settings else iter(())
    names = []
    for run in runs:
        differing = next(entries, {}) if run.settings else {}
        text = ", ".join(f"{name}={value}" for name, value in differing.items())
        names.append(textwrap.shorten(text, 160, placeholder=" ...") or "all runs")
    return names


def seed_name(run):
    """The seed of a run, with its status where it is not finished."""
    name = f"seed {'-' if run.seed is None else run.seed}"
    return name if run.finished else f"{name} ({run.status})"


def running_mean(curve):
    """The curve as a pandas Series by step, smoothed over a twentieth of its points."""
    series = pandas.Series(dict(curve), dtype=float)
    # Only past steps: the mean at a step must not know what comes after it
    return series.rolling(max(1, len(series) // 20), min_periods=1).mean()


def colours_of(names):
    """A colour per name, the same for the same name."""
    distinct = list(dict.fromkeys(names))
    # Ten colours are told apart more easily than twenty
    palette = plt.get_cmap("tab10" if len(distinct) <= 10 else "tab20")
    return [palette(distinct.index(name) % palette.N) for name in names]


def draw_training(axis, runs, names):
    """The running mean of the training loss per run, its raw points behind it."""
    for run, name, colour in zip(runs, names, colours_of(names)):
        smooth = running_mean(run.train_curve)
        raw = pandas.Series(dict(run.train_curve), dtype=float)
        # Single steps are one batch each: pale, behind the mean
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
    """Fit the last 95 % of the steps: the first ones would flatten everything after them."""
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
    # Both panels share the steps, so that a jump can be followed across
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), dpi=120, layout="constrained", sharex=True)
    draw_training(axes[0], runs, names)
    draw_validation(axes[1], runs, names)
    # Runs end at different steps where the clock decides
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
    # As many columns as fit: a hundred characters or so to a line
    columns = max(1, min(len(entries), 190 // (10 + max(map(len, entries)))))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, fontsize=9)
    buffer = io.BytesIO()
    # No version in the file: the same runs give the same picture
    figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
