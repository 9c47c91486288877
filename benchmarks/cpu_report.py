# SPDX-License-Identifier: MIT
"""What bench_cpu.py measured: its rows, as a table, as CSV and JSON files, and as a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peers
from rich.table import Table

from repvgg_cuda import bench, picture


@dataclass(frozen=True)
class Row:
    """One candidate of one case. ``ratio`` is its time over ours, with the ends of its interval."""

    suite: str
    case: str
    batch: int
    threads: int
    candidate: str
    status: str
    note: str = ""
    error: float | None = None
    median_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    rounds: int = 0
    clock: str = ""


def as_table(rows: Sequence[Row]) -> Table:
    first = rows[0]
    table = Table(
        title=f"{first.suite}: {first.case}, batch {first.batch}, {first.threads} threads", title_justify="left"
    )
    for column in ("candidate", "median", "p10 .. p90", "time / ours", "interval", "error"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    for row in rows:
        error = "" if row.error is None else f"{row.error:.1e}"
        if row.median_us is None or row.p10_us is None or row.p90_us is None:
            table.add_row(row.candidate, row.status, row.note, "", "", error)
            continue
        spread = f"{bench.duration(row.p10_us)} .. {bench.duration(row.p90_us)}"
        ratio = ("", "") if row.ratio is None else (f"{row.ratio:.2f}x", f"{row.ratio_low:.2f} .. {row.ratio_high:.2f}")
        table.add_row(row.candidate, bench.duration(row.median_us), spread, *ratio, error)
    return table


def as_csv(rows: Sequence[Row], record: dict[str, Any]) -> str:
    """The environment in lines that begin with "#", then the rows."""
    text = io.StringIO()
    for key, value in record.items():
        text.write(f"# {key}: {json.dumps(value)}\n")
    writer = csv.DictWriter(text, fieldnames=list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def draw(rows: Sequence[Row], out: Path) -> None:
    """Per case a group of bars: how many times as long as ours each candidate takes."""
    picture.require_matplotlib()
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    compared = [(row, row.ratio) for row in rows if row.ratio is not None and row.candidate != peers.OURS]
    if not compared:
        return
    groups = list(dict.fromkeys((row.case, row.batch, row.threads) for row, _ in compared))
    order = [peer.name for peer in peers.PEERS]
    names = [*order, *dict.fromkeys(row.candidate for row, _ in compared if row.candidate not in order)]
    names = [name for name in names if any(row.candidate == name for row, _ in compared)]
    figure = Figure(figsize=(max(7.0, 1.5 * len(groups) + 2), 4.5), layout="constrained", dpi=130)
    panel = figure.subplots()
    panel.set_prop_cycle(
        color=[colormaps["tab20"](i) for i in range(20)]
    )  # more candidates than the default has colours
    for i, name in enumerate(names):
        chosen = [(row, ratio) for row, ratio in compared if row.candidate == name]
        places = [groups.index((row.case, row.batch, row.threads)) + 0.8 * i / len(names) for row, _ in chosen]
        panel.bar(places, [ratio for _, ratio in chosen], width=0.8 / len(names), align="edge", label=name)
    panel.axhline(1, color="#111827", linewidth=0.8)
    labels = [f"{case}\nbatch {batch}, {threads} thr." for case, batch, threads in groups]
    panel.set_xticks([i + 0.4 for i in range(len(groups))], labels, fontsize=7)
    panel.set_ylabel("time / ours")
    figure.legend(loc="outside lower center", fontsize=7, ncols=6)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(out)


def write(rows: Sequence[Row], record: dict[str, Any], out: Path) -> None:
    """All three files, anew after every case: an engine that takes the process down loses its own case only."""
    bench.write_text_atomically(out / "bench_cpu.csv", as_csv(rows, record))
    report = {"environment": record, "rows": [asdict(row) for row in rows]}
    bench.write_text_atomically(out / "bench_cpu.json", json.dumps(report, indent=1) + "\n")
    draw(rows, out / "bench_cpu.png")
