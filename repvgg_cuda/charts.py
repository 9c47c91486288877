# SPDX-License-Identifier: MIT
"""Pictures of benchmark rows: speed-ups and the machine's limit, a roofline, time against batch. Never times."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from repvgg_cuda.baselines import COMPILE, EAGER
from repvgg_cuda.ceilings import Ceilings
from repvgg_cuda.comparison import AGAIN, Row
from repvgg_cuda.networks import OWN_PREFIX
from repvgg_cuda.tables import NOISE, duration


@dataclass(frozen=True, eq=False)
class Theme:
    """Colours, and the width in inches. ``background`` None is transparent."""

    ink: str
    muted: str
    line: str
    background: str | None
    kinds: dict[str, str]
    narrow: bool = False

    @property
    def width(self) -> float:
        return 4.3 if self.narrow else 9.2


LIGHT_KINDS = {
    "unfused": "#a3abb8",
    "other": "#7c8796",
    "PyTorch": "#e0913f",
    "torch.compile": "#c9a70c",
    "ONNX Runtime": "#8f6fc4",
    "OpenVINO": "#b0588f",
    "ncnn": "#4c9a6a",
    "MNN": "#5fa8a3",
    "ours": "#2563eb",
    "ours, not prepared": "#8fb2f7",
}
DARK_KINDS = {**LIGHT_KINDS, "unfused": "#7b8494", "ours": "#5b8cff", "ours, not prepared": "#4a6db8"}

LIGHT = Theme("#111827", "#5b6472", "#d5d9e0", "#ffffff", LIGHT_KINDS)
DARK = Theme("#e6e9ef", "#9aa4b2", "#3a4250", "#14171c", DARK_KINDS)

#: How many times fewer multiplications F(4x4, 3x3) does than a direct convolution.
WINOGRAD4 = 4.0


# ------------------------------------------------------------------------------------------------------------ choice


def kind_of(row: Row, first: Row) -> str:
    """What a row is drawn as: a key of :data:`LIGHT_KINDS`."""
    name = row.candidate
    if row.own:
        return "ours" if name.startswith(f"{OWN_PREFIX}prepared") or not name.startswith(OWN_PREFIX) else \
            "ours, not prepared"  # fmt: skip
    if name == first.candidate:
        return "unfused"
    if name.startswith(COMPILE):
        return "torch.compile"
    if name.startswith((EAGER.removesuffix(" + relu"), "cudnn")):
        return "PyTorch"
    return name if name in LIGHT_KINDS else "other"


def representatives(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Of one case, what a picture has room for: the fastest row of each kind.

    Of this library those that a user gets without naming an algorithm, where there are such: else the picture would
    show the luckiest of many.
    """
    timed = [row for row in rows if row.median_us is not None and not row.candidate.endswith(AGAIN)]
    usual = [
        row for row in timed if row.own and row.candidate.startswith((f"{OWN_PREFIX}prepared", f"{OWN_PREFIX}auto"))
    ]
    if usual:
        timed = [row for row in timed if not row.own or row in usual]
    chosen: dict[str, Row] = {}
    for row in timed:
        kind = kind_of(row, rows[0])
        if kind == "other" and len(chosen) > len(LIGHT_KINDS):
            continue
        best = chosen.get(kind)
        if best is None or (row.median_us or 0.0) < (best.median_us or 0.0):
            chosen[kind] = row
    order = list(LIGHT_KINDS)
    return sorted(chosen.items(), key=lambda item: order.index(item[0]))


def drawable(cases: Sequence[Sequence[Row]]) -> bool:
    """Whether there is anything to compare in any case: a first row with a time, and another."""
    return any(rows[0].median_us is not None and len(representatives(rows)) > 1 for rows in cases)


def label_of(kind: str, row: Row) -> str:
    if row.own:
        name = row.candidate.removeprefix(OWN_PREFIX)
        return f"repvgg_cuda, {'not prepared' if name == 'auto' else name}"
    return row.candidate.removeprefix("fused ").replace("F.conv2d", "PyTorch, F.conv2d")


# ---------------------------------------------------------------------------------------------------------- pictures


def require_matplotlib() -> None:
    """Raises RuntimeError, with the remedy, if matplotlib is not installed: to be called before the work, not after."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise RuntimeError("the picture needs matplotlib: install it with `pip install matplotlib`") from None


def render(figure: Any, kind: Literal["svg", "png"], theme: Theme) -> bytes:
    """With its background, unless the theme's is transparent. Text stays text in an SVG."""
    import matplotlib

    out = io.BytesIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "repvgg_cuda"}
    with matplotlib.rc_context(settings):
        options: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 150}
        face = "none" if theme.background is None else theme.background
        figure.savefig(out, format=kind, facecolor=face, **options)
    return out.getvalue()


#: Cases whose longest bars differ by more than this get scales of their own.
SHARED_SCALE = 2.5


def speedups(cases: Sequence[Sequence[Row]], theme: Theme) -> Any:
    """Per case a group of bars: how many times as fast as the first row. A dashed line stands where the machine's limit
    for a direct convolution is."""
    groups = [(rows, representatives(rows)) for rows in cases if drawable([rows])]
    pitch = 1.75 if theme.narrow else 1.0  # narrow pictures have the name above its bar
    edges = [_edge(rows, shown) for rows, shown in groups]
    shared = max(edges) <= SHARED_SCALE * min(edges)
    heights = [pitch * len(shown) + (1.7 if shared else 2.3) for _, shown in groups]
    figure = _figure(theme, 0.25 * sum(heights) + 0.5)
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (rows, shown), edge in zip(panels, groups, edges, strict=True):
        panel.set_xlim(0, max(edges) if shared else edge)
        _group(panel, rows, shown, pitch, theme)
        if shared and panel is not panels[-1]:
            panel.tick_params(axis="x", length=0, labelbottom=False)
    firsts = {rows[0].candidate for rows, _ in groups}
    first = firsts.pop() if len(firsts) == 1 else "the branches before fusion"
    panels[-1].set_xlabel(f"times as fast as {first}", fontsize=8.5, color=theme.muted)
    return figure


def _edge(rows: Sequence[Row], shown: Sequence[tuple[str, Row]]) -> float:
    """The end of the scale of one case. A limit far off it would press the bars together: it is then only named."""
    ends = [max(row.speedup or 0.0, row.interval.high if row.interval else 0.0) for _, row in shown]
    limit = limit_speedup(rows) or 0.0
    return 1.03 * (max(max(ends), limit) if limit <= 1.5 * max(ends) else max(ends))


def _group(panel: Any, rows: Sequence[Row], shown: Sequence[tuple[str, Row]], pitch: float, theme: Theme) -> None:
    """The bars of one case, under its name."""
    bars = [pitch * i for i in range(len(shown))]
    labels = [label_of(kind, row) for kind, row in shown]
    for place, (kind, row) in zip(bars, shown, strict=True):
        _bar(panel, place, kind, row, theme)
    panel.set_title(case_title(rows), loc="left", fontsize=9.5, fontweight="bold", color=theme.ink, pad=5)
    panel.set_yticks([] if theme.narrow else bars, [] if theme.narrow else labels)
    for place, label in zip(bars, labels, strict=True) if theme.narrow else ():
        panel.text(0, place - 0.82, label, fontsize=7.5, color=theme.muted, va="center", in_layout=False)
    _limit(panel, limit_speedup(rows), bars, theme)
    panel.set_ylim(bars[-1] + 1.15, -1.3 if theme.narrow else -0.6)
    _axis(panel, theme)
    panel.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=theme.ink)


def _bar(panel: Any, y: float, kind: str, row: Row, theme: Theme) -> None:
    panel.barh(y, row.speedup or 0.0, height=0.78, color=theme.kinds[kind], zorder=2)
    if row.interval is not None:
        panel.plot([row.interval.low, row.interval.high], [y, y], color=theme.ink, linewidth=1.1, zorder=4)
    beside = panel.get_yaxis_transform()  # x in the panel's width, y in rows
    speedup = f"{NOISE if row.within_noise else ''}{row.speedup or 0.0:.2f}x"
    weight = "bold" if row.own else "normal"
    panel.text(1.015, y, speedup, transform=beside, fontsize=8.5, color=theme.ink, va="center", fontweight=weight)
    if not theme.narrow:
        time = duration(row.median_us or 0.0)
        panel.text(1.11, y, time, transform=beside, fontsize=8.5, color=theme.muted, va="center")


def case_title(rows: Sequence[Row]) -> str:
    """Of one case, its batch left out."""
    threads = f", {rows[0].threads} threads" if rows[0].threads > 1 else ""
    return (rows[0].group or rows[0].case) + threads


def limit_speedup(rows: Sequence[Row]) -> float | None:
    """How many times as fast as the first row a direct convolution at the machine's limit would be."""
    first = rows[0]
    if first.median_us is None or not first.floor_us:
        return None
    return first.median_us / first.floor_us


def _limit(panel: Any, limit: float | None, bars: Sequence[float], theme: Theme) -> None:
    """A dashed line through the bars (and not through names between them), and its name below the last."""
    if limit is None:
        return
    edge = panel.get_xlim()[1]
    inside = limit <= edge
    last = bars[-1]
    for top, bottom in ((y - 0.45, y + 0.45) for y in bars) if theme.narrow else ((-0.5, last + 0.55),):
        if inside:
            panel.plot([limit] * 2, [top, bottom], color=theme.ink, linewidth=1.2, linestyle=(0, (3, 2)), zorder=3)
    text = f"limit {limit:.1f}x" if inside else f"limit {limit:.0f}x \u2192"
    x = min(limit, edge)
    side = "right" if x > 0.85 * edge else "left" if x < 0.1 * edge else "center"
    panel.text(x, last + 0.87, text, fontsize=7.5, color=theme.muted, va="center", ha=side, in_layout=False)


def roofline(cases: Sequence[Sequence[Row]], ceilings: Ceilings, dtype: str, theme: Theme) -> Any:
    """Rate against arithmetic intensity, on log scales, with the measured roofs; points are numbered cases."""
    peak = ceilings.gflops.get(dtype) or max(ceilings.gflops.values())
    points = [
        (number, case_title(rows), kind, row)
        for number, rows in enumerate(cases, 1)
        for kind, row in representatives(rows)
        if row.flops and row.bytes and kind in ("unfused", "PyTorch", "ours")
    ]
    names = list(dict.fromkeys((number, name) for number, name, _, _ in points))
    figure = _figure(theme, 4.2 + (0.17 * math.ceil(len(names) / 2) if theme.narrow else 0.0))
    panel = figure.add_subplot()
    intensities = [(row.flops or 1.0) / (row.bytes or 1.0) for *_, row in points]
    left, right = min(min(intensities) / 2.5, peak / ceilings.bandwidth[-1][1] / 12), max(intensities) * 2.5
    faster = math.inf
    for size, rate in sorted(ceilings.bandwidth, key=lambda roof: -roof[1]):
        ridge = min(peak / rate, right)
        panel.plot([left, ridge], [left * rate, peak], color=theme.muted, linewidth=1.1)
        x, below = left * 1.1, faster < 1.5 * rate  # the space above is the neighbour's
        panel.text(
            x, x * rate, f"{_size(size)}: {rate:.0f} GB/s", fontsize=7, color=theme.muted,
            va="top" if below else "bottom",
            rotation=math.degrees(math.atan(rate)), rotation_mode="anchor", transform_rotates_text=True,
        )  # fmt: skip
        faster = rate
    for factor, text in ((1.0, f"multiply-add peak: {peak:.0f} GFLOP/s"), (WINOGRAD4, "the same with F(4x4) Winograd")):
        style = "-" if factor == 1.0 else (0, (4, 3))
        panel.axhline(peak * factor, color=theme.ink, linewidth=1.3, linestyle=style, zorder=1)
        panel.text(right * 0.98, peak * factor * 1.04, text, fontsize=7.5, color=theme.ink, ha="right", va="bottom")
    markers = {"unfused": "s", "PyTorch": "D", "ours": "o"}
    for number, _, kind, row in points:
        x, y = (row.flops or 1.0) / (row.bytes or 1.0), (row.flops or 0.0) / (row.median_us or 1.0) / 1e3
        panel.scatter(x, y, s=34, marker=markers[kind], color=theme.kinds[kind], zorder=3, linewidths=0)
        if kind == "ours":
            text_style: Any = {"fontsize": 7.5, "color": theme.ink, "zorder": 4}
            panel.annotate(str(number), (x, y), xytext=(4, 3), textcoords="offset points", **text_style)
    firsts = {label_of(kind, row) for *_, kind, row in points if kind == "unfused"}
    first = firsts.pop() if len(firsts) == 1 else "before fusion"
    labels = {"unfused": first, "PyTorch": "PyTorch, fused", "ours": "repvgg_cuda"}
    for kind in dict.fromkeys(kind for _, _, kind, _ in points):
        panel.scatter([], [], s=34, marker=markers[kind], color=theme.kinds[kind], label=labels[kind])
    panel.set(xscale="log", yscale="log", xlim=(left, right))
    panel.set_ylim(top=peak * WINOGRAD4 * 2)
    _axis(panel, theme, grid=True)
    panel.set_xlabel("operations per byte of input, weights and output", fontsize=8.5, color=theme.muted)
    panel.set_ylabel("GFLOP/s of a direct convolution", fontsize=8.5, color=theme.muted)
    panel.legend(fontsize=8, frameon=False, labelcolor=theme.ink, loc="lower right")
    columns = 2 if theme.narrow else 5
    lines = [names[i : i + columns] for i in range(0, len(names), columns)]
    key = "\n".join(" \u00b7 ".join(f"{number} {name}" for number, name in line) for line in lines)
    figure.supxlabel(key, fontsize=7.5, color=theme.ink, x=0.02, ha="left")
    return figure


def batches(cases: Sequence[Sequence[Row]], theme: Theme) -> Any:
    """One panel per group of cases that differ in the batch alone: time per image against the batch."""
    groups = by_group(cases)
    columns = 1 if theme.narrow else min(2, len(groups))
    lines = math.ceil(len(groups) / columns)
    figure = _figure(theme, 2.9 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, (name, of_group) in zip(panels, groups.items(), strict=False):
        series: dict[str, list[tuple[int, float]]] = {}
        for rows in of_group:
            for kind, row in representatives(rows):
                series.setdefault(kind, []).append((row.batch, (row.median_us or 0.0) / row.batch / 1e3))
        for kind, points in series.items():
            points.sort()
            label = "before fusion" if kind == "unfused" else kind.replace("ours", "repvgg_cuda")
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=theme.kinds[kind], label=label)
        ticks = sorted({row.batch for rows in of_group for row in rows})
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.set_title(name, loc="left", fontsize=9.5, fontweight="bold", color=theme.ink)
        _axis(panel, theme, grid=True)
        panel.set_ylabel("ms per image", fontsize=8.5, color=theme.muted)
        panel.set_xlabel("batch", fontsize=8.5, color=theme.muted)
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", fontsize=8, frameon=False, labelcolor=theme.ink,
                  ncols=2 if theme.narrow else 5)  # fmt: skip
    return figure


def by_group(cases: Iterable[Sequence[Row]]) -> dict[str, list[Sequence[Row]]]:
    """Cases that were timed with several batches, by their name without it."""
    groups: dict[str, list[Sequence[Row]]] = {}
    for rows in cases:
        groups.setdefault(case_title(rows), []).append(rows)
    return {name: each for name, each in groups.items() if len({rows[0].batch for rows in each}) > 1}


def _figure(theme: Theme, height: float) -> Any:
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(theme.width, height), layout="constrained")


def _axis(panel: Any, theme: Theme, *, grid: bool = False) -> None:
    panel.set_facecolor("none")
    panel.tick_params(labelsize=7.5, colors=theme.muted, which="both")
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(theme.line)
    if grid:
        panel.grid(color=theme.line, linewidth=0.6, zorder=0)


def _size(size: float) -> str:
    return f"{size / (1 << 20):.0f} MB" if size >= 1 << 20 else f"{size / (1 << 10):.0f} KB"
