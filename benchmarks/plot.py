# SPDX-License-Identifier: MIT
"""Draws the JSON of ``repvgg-cuda bench --json`` (or of bench_conv3x3.py) as a picture: JSON in, PNG out, never times.

python benchmarks/plot.py bench.json                # writes bench.png
python benchmarks/plot.py bench.json --out bars.png
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from repvgg_cuda import bench, environment, picture, suites

#: Baselines grey, the library's own rows blue.
BASELINE_COLOR, OWN_COLOR, TEXT_COLOR = "#b8bec9", "#2563eb", "#111827"
OWN_NAMES = (suites.OWN_PREFIX, suites.FUSE_WEIGHTS)


def read_report(path: Path) -> dict[str, Any]:
    """Raises RuntimeError unless the file is a benchmark report of a schema this script knows."""
    try:
        report = json.loads(path.read_text())
    except ValueError:
        raise RuntimeError(f"{path} is not JSON; give the file that `repvgg-cuda bench --json FILE` wrote") from None
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != bench.SCHEMA:
        raise RuntimeError(f"{path} must be a benchmark report of schema {bench.SCHEMA}, got schema {schema}")
    if not any(row["status"] == "ok" for row in report["rows"]):
        raise RuntimeError(f"{path} holds no row with a time; nothing to draw")
    return report


def draw(report: dict[str, Any], out: Path) -> None:
    """One panel per case, one bar per candidate: the median, a whisker from p10 to p90, the speed-up."""
    picture.require_matplotlib()
    from matplotlib.figure import Figure

    timed = [row for row in report["rows"] if row["status"] == "ok"]
    cases = [(case, list(rows)) for case, rows in groupby(timed, key=lambda row: f"{row['suite']}: {row['case']}")]
    heights = [len(rows) + 1.6 for _, rows in cases]
    figure = Figure(figsize=(11, 0.32 * sum(heights) + 0.8), layout="constrained", dpi=130)
    panels = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (case, rows) in zip(panels, cases, strict=True):
        draw_case(panel, case, rows)
    record, options = report["environment"], report["options"]
    figure.suptitle(
        f"{environment.machine(record)}, {options['dtype']}, torch {record['torch']}, {record['time'][:10]}",
        fontsize=9,
        color="#6b7280",
    )
    figure.savefig(out)


def draw_case(panel: Any, case: str, rows: list[dict[str, Any]]) -> None:
    longest = max(row["p90_us"] for row in rows)
    unit, scale = ("us", 1.0) if longest < 1e3 else ("ms", 1e3)
    panel.set_xlabel(unit, fontsize=7, color="#6b7280", loc="right", labelpad=0)
    for i, row in enumerate(rows):
        own = row["candidate"].startswith(OWN_NAMES)
        median, low, high = (row[key] / scale for key in ("median_us", "p10_us", "p90_us"))
        panel.barh(i, median, color=OWN_COLOR if own else BASELINE_COLOR, height=0.7)
        panel.plot([low, high], [i, i], color=TEXT_COLOR, linewidth=1)
        speedup = "" if row["speedup"] is None else f"   {row['speedup']:.2f}x"
        panel.text(
            max(high, median) + longest / scale * 0.01,
            i,
            f"{bench.duration(row['median_us'])}{speedup}",
            va="center",
            fontsize=8,
        )
    panel.set_yticks(range(len(rows)), [row["candidate"] for row in rows], fontsize=8)
    panel.set_xlim(0, longest / scale * 1.18)
    panel.invert_yaxis()
    panel.tick_params(axis="x", labelsize=7, colors="#6b7280")
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color("#d1d5db")
    panel.set_title(case, loc="left", fontsize=9, fontweight="bold", color=TEXT_COLOR)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("report", type=Path, metavar="JSON")
    parser.add_argument("--out", type=Path, metavar="PNG", help="default: the name of the report with .png")
    args = parser.parse_args(argv)
    out = args.out or args.report.with_suffix(".png")
    try:
        bench.require_writable(out)
        draw(read_report(args.report), out)
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
