# SPDX-License-Identifier: MIT
"""Rows of a benchmark as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from repvgg_cuda.comparison import Row
from repvgg_cuda.intervals import LEVEL

#: Of output that no terminal limits.
WIDTH = 120

#: Before a speed-up that is within the noise.
NOISE = "~"


def console(quiet: bool = False) -> Console:
    """As wide as the terminal; in a file or a pipe as wide as the tables like to be."""
    found = Console(quiet=quiet)
    return found if found.is_terminal else Console(quiet=quiet, width=WIDTH)


def table(rows: Sequence[Row]) -> Table:
    """The rows of one case and one state of the caches, for :mod:`rich`; what was refused stands below them."""
    first = rows[0]
    cold = ", caches cold" if first.caches == "cold" else ""
    result = Table(title=escape(f"{first.suite}: {first.case}{cold}"), title_justify="left", box=SIMPLE_HEAD)
    result.add_column("candidate")
    with_error = any(row.error is not None for row in rows)
    with_share = any(row.share is not None for row in rows)
    headings = ["median", "p10-p90", "speed-up", f"{100 * LEVEL:.0f}% sure"]
    for heading in (*headings, *(["error"] if with_error else []), *(["limit"] if with_share else [])):
        result.add_column(heading, justify="right")
    for row in rows:
        if row.status == "refused":
            continue
        extra = [error_text(row)] if with_error else []
        extra += [share_text(row)] if with_share else []
        name = escape(row.candidate) + (f"\n[dim]{escape(row.note)}[/dim]" if row.note else "")
        if row.median_us is None or row.p10_us is None or row.p90_us is None:
            result.add_row(name, f"[red]{row.status}[/red]", "", "", "", *extra)
            continue
        result.add_row(name, duration(row.median_us), spread_text(row), speedup_text(row), interval_text(row), *extra)
    result.caption, result.caption_justify = escape("\n".join(remarks(rows))) or None, "left"
    return result


def remarks(rows: Sequence[Row]) -> list[str]:
    """What stands below the table: what its marks mean, and who refused why."""
    lines = [f"{NOISE} not told apart from the first row"] if any(row.within_noise for row in rows) else []
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.status == "refused":
            reasons.setdefault(row.note, []).append(row.candidate)
    return lines + [f"refused: {'; '.join(names)}: {reason}" for reason, names in reasons.items()]


def duration(microseconds: float) -> str:
    """With three digits that count: 12.3 us, 4.56 ms."""
    for unit, scale in (("us", 1.0), ("ms", 1e3), ("s", 1e6)):
        if microseconds < 999.5 * scale or unit == "s":
            value = microseconds / scale
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    raise AssertionError("unreachable: the last unit takes every value")


def spread_text(row: Row) -> str:
    """From the 10th to the 90th percentile, in the unit of the median."""
    if row.median_us is None or row.p10_us is None or row.p90_us is None:
        return ""
    scale = 1e6 if row.median_us >= 999.5e3 else 1e3 if row.median_us >= 999.5 else 1.0
    return "-".join(f"{value / scale:.{2 if value < 9.995 * scale else 0}f}" for value in (row.p10_us, row.p90_us))


def speedup_text(row: Row) -> str:
    """With a mark where it is within the noise."""
    return "" if row.speedup is None else f"{NOISE if row.within_noise else ''}{row.speedup:.2f}x"


def interval_text(row: Row) -> str:
    """The interval of the speed-up, or why there is none."""
    if row.interval is None:
        return "" if row.speedup in (None, 1.0) else "too few rounds"
    return f"{row.interval.low:.2f}-{row.interval.high:.2f}"


def error_text(row: Row) -> str:
    return "" if row.error is None else f"{row.error:.1e}"


def share_text(row: Row) -> str:
    return "" if row.share is None else f"{100 * row.share:.0f}%"
