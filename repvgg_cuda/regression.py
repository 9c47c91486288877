# SPDX-License-Identifier: MIT
"""Two runs of the benchmark, row by row: how many times as long each took, with an interval, and what got slower.

Two runs are two processes at two times: a clock that went up, or where the system put the memory, changes every row. So
a row of this library is compared through its case's *controls*, the rows that are not this library's and have not
changed: within each round its time is divided by theirs. How much the controls of a case drift from each other between
the runs is how much two runs of the same code differ, and every interval is widened by it.

On a machine that is not quiet that is more than a few per cent. Several pairs of runs, one after the other, then tell
smaller changes: how much the pairs differ from each other is the noise, of each row itself and not of its controls.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from repvgg_cuda import intervals
from repvgg_cuda.branches import require
from repvgg_cuda.comparison import AGAIN, Row
from repvgg_cuda.intervals import LEVEL, Floats, Ratio
from repvgg_cuda.records import Run

#: A change smaller than this is none, however sure.
TOLERANCE = 0.02

#: Of pairs of runs that show how much pairs differ.
FEWEST_PAIRS = 4

#: What must agree for the controls to be the same code on the same machine.
SAME = ("cpu", "gpu", "torch", "cudnn", "python", "threads")

Verdict = Literal["slower", "faster", "same", "unknown"]

Key = tuple[str, str, str, str, int, str]


@dataclass(frozen=True)
class Change:
    """One row in both runs. ``ratio`` is the second run's time over the first's: above 1 it got slower.

    ``verdict`` is "unknown" where there is no interval, and ``note`` says why. ``controls`` is how many rows the ratio
    is taken against; with none, times are compared as they are.
    """

    suite: str
    case: str
    candidate: str
    caches: str
    threads: int
    before_us: float | None
    after_us: float | None
    ratio: Ratio | None
    verdict: Verdict
    controls: int
    own: bool
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """All changes, and what a reader must know about the two runs."""

    changes: tuple[Change, ...]
    warnings: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        """What got slower among this library's rows, and its rows that were right before and are not any more."""
        return tuple(change for change in self.changes if change.own and change.verdict == "slower")


def compare_runs(before: Run, after: Run, *, tolerance: float = TOLERANCE, absolute: bool = False) -> Comparison:
    """Compares the rows that both have.

    Args:
        tolerance: the least relative change that counts.
        absolute: compare times as they are, not against the controls.
    Raises:
        RuntimeError: ``tolerance`` is negative, or the runs have no row in common.
    """
    require(tolerance >= 0, f"compare: tolerance must not be negative, got {tolerance}")
    warnings = differences(before, after)
    if not absolute and any(name in ("torch", "cudnn") for name in warnings):
        absolute = True
    changes: list[Change] = []
    second = _by_key(after)
    first_cases: dict[tuple[str, str, str, int], list[Row]] = before.by_case()
    for rows in first_cases.values():
        pairs = [(row, second[_key(row)]) for row in rows if _key(row) in second]
        changes += _case(pairs, tolerance, absolute)
    require(len(changes) > 0, "compare: the two records have no row in common; run the same suites with --json")
    return Comparison(tuple(changes), tuple(warnings.values()))


def compare_pairs(
    pairs: Sequence[tuple[Run, Run]], *, tolerance: float = TOLERANCE, absolute: bool = False
) -> Comparison:
    """:func:`compare_runs` of several pairs, each (before, after) and measured one run right after the other.

    A row's ratio is the geometric mean of those of the pairs, its interval Student's, from how they differ.

    Raises:
        RuntimeError: as :func:`compare_runs`; or there are two pairs, or three, which show no noise.
    """
    require(
        len(pairs) == 1 or len(pairs) >= FEWEST_PAIRS,
        f"compare: takes one pair of records or at least {FEWEST_PAIRS}, got {len(pairs)}",
    )
    found = [compare_runs(before, after, tolerance=tolerance, absolute=absolute) for before, after in pairs]
    if len(found) == 1:
        return found[0]
    by_row: dict[tuple[str, ...], list[Change]] = {}
    for comparison in found:
        for change in comparison.changes:
            key = (change.suite, change.case, change.candidate, change.caches, str(change.threads))
            by_row.setdefault(key, []).append(change)
    changes = [_of_pairs(each, tolerance) for each in by_row.values() if len(each) == len(pairs)]
    require(len(changes) > 0, "compare: the pairs have no row in common; run the same suites for all of them")
    warnings = dict.fromkeys(text for comparison in found for text in comparison.warnings)
    return Comparison(tuple(changes), tuple(warnings))


def _of_pairs(changes: Sequence[Change], tolerance: float) -> Change:
    """One row in every pair. What was lost in any of them, or is not known, stays so."""
    odd = next((change for change in changes if change.ratio is None), None)
    if odd is not None:
        return odd
    logs = [math.log(change.ratio.value) for change in changes if change.ratio is not None]
    low, high = intervals.mean_interval(logs)
    ratio = Ratio(math.exp(float(np.mean(logs))), math.exp(low), math.exp(high))
    before, after = _median([each.before_us for each in changes]), _median([each.after_us for each in changes])
    verdict = _verdict(ratio, tolerance)
    return dataclasses.replace(changes[0], before_us=before, after_us=after, ratio=ratio, verdict=verdict)


def _median(times: Sequence[float | None]) -> float | None:
    known = [time for time in times if time is not None]
    return float(np.median(known)) if known else None


def _verdict(ratio: Ratio, tolerance: float) -> Verdict:
    if ratio.contains_one or abs(math.log(ratio.value)) <= math.log1p(tolerance):
        return "same"
    return "slower" if ratio.value > 1 else "faster"


def differences(before: Run, after: Run) -> dict[str, str]:
    """What the two runs do not share, by name, in words."""
    found = {}
    for name in SAME:
        a, b = before.environment.get(name), after.environment.get(name)
        if a != b:
            found[name] = f"{name} differs: {a} before, {b} after"
    for name in ("torch", "cudnn"):
        if name in found:
            found[name] += "; the rows that are not ours changed with it, so times are compared as they are"
    for which, run in (("first", before), ("second", after)):
        for i, text in enumerate(run.warnings):
            found[f"{which} {i}"] = f"the {which} run warned: {text}"
    return found


def _key(row: Row) -> Key:
    return row.suite, row.case, row.candidate, row.caches, row.threads, row.clock


def _by_key(run: Run) -> Mapping[Key, Row]:
    return {_key(row): row for row in run.rows}


def _case(pairs: Sequence[tuple[Row, Row]], tolerance: float, absolute: bool) -> list[Change]:
    """The changes of one case."""
    timed = [(a, b) for a, b in pairs if a.samples_ns and b.samples_ns]
    controls = [] if absolute else [(a, b) for a, b in timed if not a.own and not a.candidate.endswith(AGAIN)]
    return [
        _change(a, b, controls, tolerance)
        for a, b in pairs
        if not a.candidate.endswith(AGAIN) and (a.status, b.status) != ("refused", "refused")
    ]


def _change(before: Row, after: Row, controls: Sequence[tuple[Row, Row]], tolerance: float) -> Change:
    common: dict[str, Any] = {
        "suite": before.suite,
        "case": before.case,
        "candidate": before.candidate,
        "caches": before.caches,
        "threads": before.threads,
        "before_us": before.median_us,
        "after_us": after.median_us,
        "own": before.own,
    }
    others = [pair for pair in controls if pair[0].candidate != before.candidate]
    if before.status != "ok" or after.status != "ok":
        lost = before.status == "ok" and after.status in ("wrong", "error")
        note = f"{before.status} before, {after.status} after" + (f": {after.note}" if after.note else "")
        return Change(**common, ratio=None, verdict="slower" if lost else "unknown", controls=0, note=note)
    if min(len(before.samples_ns), len(after.samples_ns)) < intervals.fewest_rounds():
        note = f"fewer than {intervals.fewest_rounds()} rounds"
        return Change(**common, ratio=None, verdict="unknown", controls=len(others), note=note)
    ratio = change_ratio(before, after, others)
    return Change(**common, ratio=ratio, verdict=_verdict(ratio, tolerance), controls=len(others))


def change_ratio(before: Row, after: Row, controls: Sequence[tuple[Row, Row]]) -> Ratio:
    """How many times as long ``after`` took, against the controls of its case (none: as it is)."""
    first = _relative(before, [a for a, _ in controls])
    second = _relative(after, [b for _, b in controls])
    value = float(np.median(second) - np.median(first))
    drawn = intervals.bootstrap_medians(second, seed=1) - intervals.bootstrap_medians(first, seed=0)
    tail = (1 - LEVEL) / 2
    low, high = (float(bound) - value for bound in np.quantile(drawn, [tail, 1 - tail]))
    between = NormalDist().inv_cdf(1 - tail) * drift(controls)
    low, high = -math.hypot(min(low, 0.0), between), math.hypot(max(high, 0.0), between)
    return Ratio(math.exp(value), math.exp(value + low), math.exp(value + high))


def _relative(row: Row, controls: Sequence[Row]) -> Floats:
    """Logarithms, per round, of the time over the geometric mean of the controls' times in that round."""
    times: Floats = np.log(np.asarray(row.samples_ns))
    if not controls:
        return times
    shared: Floats = np.mean([np.log(np.asarray(control.samples_ns)) for control in controls], axis=0)
    relative: Floats = times - shared
    return relative


def drift(controls: Sequence[tuple[Row, Row]]) -> float:
    """The standard deviation, between runs, of one row against the mean of the others: from how the controls differ.

    0 with fewer than two controls, where nothing shows it.
    """
    if len(controls) < 2:
        return 0.0
    changes = np.array([float(np.median(np.log(b.samples_ns)) - np.median(np.log(a.samples_ns))) for a, b in controls])
    return float(changes.std(ddof=1)) * math.sqrt(1 + 1 / len(controls))
