"""Draw docs/model.svg and docs/run.svg: the model, and the life of a run.

    python docs/draw_figures.py        # needs matplotlib (slurm/requirements.txt)
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FOLDER = Path(__file__).resolve().parent
BLUE = "#d6e4f5"
GREEN = "#dcefdc"
ORANGE = "#fbe6cf"
GREY = "#eeeeee"


def box(axes, x, y, width, height, text, colour, size=9):
    """A rounded box centred at (x, y)."""
    patch = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0.02,rounding_size=0.08",
        facecolor=colour,
        edgecolor="#555555",
        linewidth=0.9,
    )
    axes.add_patch(patch)
    axes.text(x, y, text, ha="center", va="center", fontsize=size)


def arrow(axes, start, end, style="-", colour="#333333", bend=0.0):
    """An arrow from `start` to `end`, curved by `bend`."""
    patch = FancyArrowPatch(
        start,
        end,
        arrowstyle="-|>",
        mutation_scale=9,
        linestyle=style,
        color=colour,
        connectionstyle=f"arc3,rad={bend}",
        linewidth=1.0,
    )
    axes.add_patch(patch)


def new_axes(width, height, x_limit, y_limit):
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_xlim(0, x_limit)
    axes.set_ylim(0, y_limit)
    axes.axis("off")
    return figure, axes


def save(figure, name):
    # A fixed salt and no date: the same drawing is the same file.
    matplotlib.rcParams["svg.hashsalt"] = name
    figure.savefig(FOLDER / name, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def draw_model():
    """The trunk from bottom to top, its skips, one block opened up, and the refiners."""
    figure, axes = new_axes(9.5, 6.6, 19, 13.2)
    box(axes, 4, 0.7, 6.4, 0.8, "token embedding + bigram hash", BLUE)
    box(axes, 4, 1.9, 6.4, 0.8, "RMSNorm, smear gate  →  x, x0", BLUE)
    box(axes, 4, 3.1, 6.4, 0.8, "blocks 0 … 4: each keeps its output", GREEN)
    box(axes, 4, 5.7, 6.4, 0.8, "blocks 5 … 10: last kept, first added", GREEN)
    for position, bend in ((1.6, 0.0), (2.8, 0.0), (5.2, 0.0), (6.4, 0.0)):
        arrow(axes, (position, 3.55), (8 - position, 5.25), "--", "#3b7d3b", bend)
    axes.text(7.25, 4.4, "U-Net skips\n× weights", fontsize=7.5, va="center", color="#3b7d3b")
    box(axes, 4, 6.9, 6.4, 0.8, "RMSNorm", BLUE)
    box(axes, 4, 8.9, 6.4, 2.2, "refiners, each behind a gate:\nTTT-Linear\nFlowRefiner\nNFM", ORANGE)
    box(axes, 4, 11.0, 6.4, 0.8, "tied embedding, 30·tanh(x/30)", BLUE)
    axes.text(4, 12.1, "softmax: nats of the next token", ha="center", fontsize=9)
    for low, high in ((1.15, 1.45), (2.35, 2.65), (3.55, 5.25), (6.15, 6.45), (7.35, 7.75)):
        arrow(axes, (4, low), (4, high))
    for low, high in ((10.05, 10.55), (11.45, 11.9)):
        arrow(axes, (4, low), (4, high))

    axes.text(14.2, 12.6, "one block", ha="center", fontsize=11, weight="bold")
    steps = [
        (0.7, "x from below, x0 from the start", GREY),
        (1.9, "resid_mix: m0·x + m1·x0", GREEN),
        (3.1, "RMSNorm × 1/√(layer+1)", GREEN),
        (4.3, "q, k, v: 8 query heads, 4 key/value heads", ORANGE),
        (5.5, "RMSNorm of q, k; rotary on 16 of 64 dims; q gain", ORANGE),
        (6.7, "value residual, value embedding (VE128)", ORANGE),
        (7.9, "causal attention, XSA, gate per head, out", ORANGE),
        (9.1, "+ attn_scale ·", GREEN),
        (10.3, "RMSNorm × 1/√(layer+1), leaky_relu(W1 x)², W2", ORANGE),
        (11.5, "+ mlp_scale ·", GREEN),
    ]
    for height, text, colour in steps:
        box(axes, 14.2, height, 8.6, 0.8, text, colour)
    for (low, _, _), (high, _, _) in zip(steps, steps[1:]):
        arrow(axes, (14.2, low + 0.45), (14.2, high - 0.45))
    arrow(axes, (18.55, 1.9), (18.55, 9.1), "--", bend=0.12)
    arrow(axes, (18.55, 9.1), (18.55, 11.5), "--", bend=0.12)
    save(figure, "model.svg")


def draw_run():
    """Phases from left to right, the file that each leaves, and how a run may end."""
    figure, axes = new_axes(10.5, 3.4, 21, 6.8)
    phases = [
        (1.8, "prepare", "config.json\nmanifest.json", "exit 2, 3"),
        (5.3, "train", "checkpoint/\nmetrics.jsonl", "exit 5, 7, 75"),
        (8.8, "export", "final_model.pt\n(float weights)", "exit 7"),
        (12.3, "pack", "final_model.int6.ptz\n(the artifact)", "exit 4"),
        (15.8, "audit", "audit.json", "exit 6"),
        (19.2, "score", "scores.json", "exit 75, 0"),
    ]
    for x, name, files, codes in phases:
        box(axes, x, 5.2, 2.7, 0.9, name, GREEN, 11)
        box(axes, x, 2.9, 3.2, 1.3, files, BLUE, 8)
        axes.text(x, 1.4, codes, ha="center", fontsize=8.5, color="#9c3d00")
        arrow(axes, (x, 4.7), (x, 3.6))
    for (left, *_), (right, *_) in zip(phases, phases[1:]):
        arrow(axes, (left + 1.4, 5.2), (right - 1.4, 5.2))
    axes.text(
        0.3,
        0.4,
        "The same command again: a phase whose file is there is skipped, an unfinished one goes on.",
        fontsize=9,
    )
    save(figure, "run.svg")


if __name__ == "__main__":
    draw_model()
    draw_run()
