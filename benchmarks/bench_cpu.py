# SPDX-License-Identifier: MIT
"""How far this library's CPU kernels are from the project's goals: ``repvgg-cuda bench``, and the ratios that count.

    pip install .[bench]                                     # the other engines
    python benchmarks/bench_cpu.py --threads 1 2 --batch 1 8 --json cpu.jsonl
    python benchmarks/bench_cpu.py --from cpu.jsonl          # the goals alone, from a record

Measures the suites chains, models and small, once for every number of threads, into one record, for `repvgg-cuda bench
plot`. What is measured, and how, is the business of `repvgg_cuda.suites` and `repvgg_cuda.timing`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from repvgg_cuda import bench, files, intervals, records, suites, tables
from repvgg_cuda.baselines import EAGER, THREE_BRANCHES
from repvgg_cuda.comparison import Row
from repvgg_cuda.networks import OWN_PREFIX
from repvgg_cuda.records import Run

OURS = f"{OWN_PREFIX}prepared"

GEOMEAN, SLOWEST = "geometric mean", "slowest"

MODELS = ("RepVGG-A0", "RepVGG-A2", "RepVGG-B1", "RepVGG-B1g4")


class Goal(NamedTuple):
    """What the time of ``peer`` over ours should reach. ``case`` names a group, or how all of a suite are combined."""

    suite: str
    case: str
    batch: int
    threads: int
    peer: str
    reach: float
    beyond: float | None = None


GOALS = (
    Goal("chains", GEOMEAN, 1, 1, "ncnn", 1.8, 2.1),
    Goal("chains", GEOMEAN, 1, 1, "MNN", 1.55, 1.8),
    Goal("chains", GEOMEAN, 1, 1, EAGER, 3.5, 4.0),
    Goal("chains", SLOWEST, 1, 1, "ncnn", 1.3),
    Goal("chains", GEOMEAN, 1, 2, "ncnn", 1.7, 2.0),
    Goal("chains", GEOMEAN, 8, 1, "ncnn", 1.7, 2.0),
    Goal("chains", GEOMEAN, 8, 1, EAGER, 3.0, 3.5),
    Goal("models", "RepVGG-A0", 1, 1, "ncnn", 1.8, 2.2),
    Goal("models", "RepVGG-A0", 1, 1, "MNN", 1.5, 1.8),
    Goal("models", "RepVGG-A0", 1, 1, "ONNX Runtime", 2.0, 2.5),
    Goal("models", "RepVGG-A0", 1, 1, "OpenVINO", 2.0, 2.5),
    Goal("models", "RepVGG-A0", 1, 1, EAGER, 2.6, 3.2),
    Goal("models", "RepVGG-A0", 1, 1, THREE_BRANCHES, 4.0, 5.0),
    *(Goal("models", "RepVGG-B1", 1, n, "ncnn", 1.7, 2.0) for n in (1, 2)),
    *(Goal("models", "RepVGG-B1", 1, n, "OpenVINO", 2.0) for n in (1, 2)),
    *(Goal("small", SLOWEST, 1, n, EAGER, 1.0) for n in (1, 2)),
)

#: How many cases the suites have that goals combine.
SUITE_CASES = {"chains": len(suites.CHAINS), "small": len(suites.SMALL) + 1}


def ratios(rows: Sequence[Row], goal: Goal) -> dict[str, float]:
    """By case: the time of the goal's peer over ours, the median over the rounds."""
    found = {}
    fitting = [
        row
        for row in rows
        if (row.suite, row.batch, row.threads, row.caches) == (goal.suite, goal.batch, goal.threads, "warm")
        and row.samples_ns
    ]
    own = {row.group: row for row in fitting if row.candidate == OURS}
    for row in fitting:
        if row.candidate == goal.peer and row.group in own and goal.case in (GEOMEAN, SLOWEST, row.group):
            found[row.group] = intervals.ratio(row.samples_ns, own[row.group].samples_ns)
    return found


def goal_ratio(rows: Sequence[Row], goal: Goal) -> float | None:
    """The ratio that ``goal`` is about; None unless every case it speaks of was measured."""
    found = ratios(rows, goal)
    if len(found) != (SUITE_CASES[goal.suite] if goal.case in (GEOMEAN, SLOWEST) else 1):
        return None
    return statistics.geometric_mean(found.values()) if goal.case == GEOMEAN else min(found.values())


def as_goal_table(rows: Sequence[Row]) -> Table:
    table = Table(title="goals: time / ours", title_justify="left")
    for column in ("suite", "case", "batch", "threads", "over", "measured", "reach", "beyond"):
        table.add_column(column, justify="left" if column in ("suite", "case", "over") else "right")
    for goal in GOALS:
        ratio = goal_ratio(rows, goal)
        measured = "not measured" if ratio is None else f"{ratio:.2f}x{'' if ratio >= goal.reach else ' (short)'}"
        limits = f"{goal.reach}x", "" if goal.beyond is None else f"{goal.beyond}x"
        table.add_row(goal.suite, goal.case, str(goal.batch), str(goal.threads), goal.peer, measured, *limits)
    return table


def measure(args: argparse.Namespace, console: Console) -> Run:
    """One record of all numbers of threads; written after every one of them."""
    parser = argparse.ArgumentParser()
    bench.add_run_arguments(parser)
    options = [
        "--suite",
        *args.suite,
        "--model",
        *(MODELS[:1] if args.quick else MODELS),
        "--batch",
        *map(str, args.batch),
    ]
    options += ["--rounds", str(args.rounds)] if args.rounds else []
    options += ["--against", *args.against] if args.against else []
    options += ["--quick"] if args.quick else []
    whole: Run | None = None
    for threads in args.threads:
        run = bench.collect(parser.parse_args([*options, "--threads", str(threads)]), console)
        whole = run if whole is None else records.joined([whole, run])
        if args.json is not None:
            whole.write(args.json)
    assert whole is not None
    return whole


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--suite", nargs="+", choices=["chains", "models", "small"], default=["chains", "models"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--against", nargs="+", metavar="KEY", help="baselines, as for repvgg-cuda bench")
    parser.add_argument("--quick", action="store_true", help="one tiny chain, one network, few rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    parser.add_argument("--from", dest="record", type=Path, metavar="FILE", help="measure nothing, read this record")
    args = parser.parse_args(argv)
    console = tables.console()
    try:
        if args.json is not None:
            files.require_writable(args.json)
        run = measure(args, console) if args.record is None else records.read(args.record)
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(as_goal_table(run.rows))
    return int(run.failed)


if __name__ == "__main__":
    sys.exit(main())
