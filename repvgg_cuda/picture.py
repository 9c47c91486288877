# SPDX-License-Identifier: MIT
"""The demo's picture: held-out digits, what the network made of them, and how long it took. Draws, never computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from repvgg_cuda.charts import require_matplotlib
from repvgg_cuda.comparison import Row
from repvgg_cuda.tables import duration

COLUMNS, ROWS = 8, 6

INK, MUTED, LINE = "#111827", "#6b7280", "#d1d5db"
WRONG = "#dc2626"
#: Of the bars: the trained network, the folded one in PyTorch, the folded one in this library's operator.
BARS = ("#b8bec9", "#93b4f5", "#2563eb")


def choose(wrong: Tensor, count: int) -> list[int]:
    """``count`` indices to show, in order: the wrong ones first of all, the rest spread evenly."""
    indices = wrong.nonzero().flatten().tolist()[:count]
    right = (~wrong).nonzero().flatten().tolist()
    rest = min(count - len(indices), len(right))
    indices += [right[i * len(right) // rest] for i in range(rest)]
    return sorted(indices)


def draw(
    path: Path,
    *,
    title: str,
    subtitle: str,
    scans: Tensor,
    labels: Tensor,
    predictions: Tensor,
    latencies: Sequence[tuple[str, Sequence[Row]]],
    footer: str,
) -> None:
    """Writes a PNG.

    Args:
        scans: ``[N, 1, 8, 8]`` in 0..1 (ink is 1). labels, predictions: ``[N]``.
        latencies: per network its name and its timed rows, the slowest form first; at most as many as BARS.
    Raises:
        RuntimeError: as :func:`repvgg_cuda.charts.require_matplotlib`.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(13.6, 7.4), dpi=130, facecolor="white")
    figure.text(0.03, 0.945, title, fontsize=19, fontweight="bold", color=INK, va="center")
    figure.text(0.03, 0.9, subtitle, fontsize=11.5, color=MUTED, va="center")
    figure.text(0.03, 0.025, footer, fontsize=8.5, color=MUTED, va="center")
    left, right = figure.add_gridspec(
        1, 2, left=0.03, right=0.965, top=0.845, bottom=0.085, width_ratios=[1.15, 1], wspace=0.1
    )
    _draw_digits(figure, left, scans, labels, predictions)
    panels = right.subgridspec(len(latencies), 1, hspace=0.3)
    for place, (name, rows) in zip(panels, latencies, strict=True):
        _draw_bars(figure.add_subplot(place), name, rows)
    figure.savefig(path, format="png")


def _draw_digits(figure: Any, place: Any, scans: Tensor, labels: Tensor, predictions: Tensor) -> None:
    grid = place.subgridspec(ROWS, COLUMNS, hspace=0.42, wspace=0.18)
    for cell, i in enumerate(choose(predictions != labels, ROWS * COLUMNS)):
        panel = figure.add_subplot(grid[cell // COLUMNS, cell % COLUMNS])
        panel.imshow(scans[i, 0].numpy(), cmap="Greys", vmin=0, vmax=1.05, interpolation="nearest")
        panel.set(xticks=[], yticks=[])
        predicted, label = int(predictions[i]), int(labels[i])
        right = predicted == label
        text = f"{predicted}" if right else f"{predicted}, is {label}"
        panel.set_xlabel(text, fontsize=11.5, fontweight="bold", color=INK if right else WRONG, labelpad=2.5)
        for spine in panel.spines.values():
            spine.set(color=LINE if right else WRONG, linewidth=1 if right else 2.2)


def _draw_bars(panel: Any, name: str, rows: Sequence[Row]) -> None:
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_visible(False)
    panel.set_title(name, loc="left", fontsize=12, fontweight="bold", color=INK, pad=0)
    if not rows:
        panel.text(0, 0.5, "not timed: no form gave the right result", fontsize=11, color=WRONG, va="center")
        return
    medians = [row.median_us or 0.0 for row in rows]
    # On a busy machine a whisker may be many times as long as every bar; it is then cut off.
    limit = min(max(row.p90_us or 0.0 for row in rows), 1.5 * max(medians))
    for i, (row, median) in enumerate(zip(rows, medians, strict=True)):
        low, high = row.p10_us or median, min(row.p90_us or median, limit)
        panel.barh(i, median, height=0.46, color=BARS[i])
        panel.plot([low, high], [i, i], color=INK, linewidth=1.1, solid_capstyle="butt")
        panel.text(0, i - 0.33, row.candidate, fontsize=10, color=INK, va="bottom")
        figures = duration(median) + (f"    {row.speedup:.2f}x" if i and row.speedup is not None else "")
        panel.text(
            max(median, high) + 0.015 * limit, i, figures, fontsize=11, fontweight="bold", color=INK, va="center"
        )
    panel.set_ylim(len(rows) - 0.6, -0.75)
    panel.set_xlim(0, limit * 1.25)
