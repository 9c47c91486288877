# SPDX-License-Identifier: MIT
"""Whether the benchmark's intervals and verdicts can be believed: experiments with known answers.

    python benchmarks/aa_experiment.py noise --runs 100      # the same code twice: how often the interval contains 1
    python benchmarks/aa_experiment.py planted --trials 10   # one row made 5 % slower: how often `compare` finds it

Both go through the code of `repvgg-cuda bench`, and are meant for machines that are not quiet. Each run of `planted` is
a process of its own, as a user's runs are; a trial is as many pairs of them as `compare` is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from repvgg_cuda import bench, environment, files, records, regression, runner, suites
from repvgg_cuda.comparison import AGAIN, Candidate
from repvgg_cuda.networks import OWN_PREFIX
from repvgg_cuda.suites import Built, Case, Setup

#: The row that is made slower, in a case whose time is arithmetic: where the system puts the memory hardly matters.
SUITE, GROUP, PLANTED = "chains", "192@14", f"{OWN_PREFIX}prepared"

#: Rows that stay as they are, beside F.conv2d: what a change is taken against. Those not installed are refused.
CONTROLS = ("channels_last", "onnxruntime", "ncnn")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["auto", "wall", "cpu"], default="auto")
    experiments = parser.add_subparsers(required=True, metavar="noise | planted")
    noise = experiments.add_parser("noise", help="the same code twice, in one process")
    noise.add_argument("--runs", type=int, default=100)
    noise.add_argument("--rounds", type=int, default=bench.ROUNDS)
    noise.add_argument("--case", choices=["layer", "notebook"], default="layer")
    noise.set_defaults(experiment=run_noise)
    planted = experiments.add_parser("planted", help="a slowdown between two processes, and none")
    planted.add_argument("--trials", type=int, default=10)
    planted.add_argument("--pairs", type=int, default=16, help=f"even, at least {2 * regression.FEWEST_PAIRS}")
    planted.add_argument("--rounds", type=int, default=bench.ROUNDS)
    planted.add_argument("--factor", type=float, default=1.05)
    planted.set_defaults(experiment=run_planted)
    one = experiments.add_parser("one", help="one run of `planted`")
    one.add_argument("--rounds", type=int, required=True)
    one.add_argument("--factor", type=float, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(experiment=run_one)
    args = parser.parse_args(argv)
    if args.json is not None:
        files.require_writable(args.json)
    result = args.experiment(args)
    if result:
        text = json.dumps(result | {"environment": environment.collect(torch.device("cpu"))}, indent=1)
        if args.json is not None:
            files.write_text_atomically(args.json, text + "\n")
        print(json.dumps(result, indent=1))
    return 0 if result.get("passed", True) else 1


# -------------------------------------------------------------------------------------------------------------- noise


def run_noise(args: argparse.Namespace) -> dict[str, Any]:
    """Times one layer's baseline twice, again and again; counts the intervals that contain 1."""
    setup = Setup(torch.device("cpu"), torch.float32, quick=True, against=())
    case = next(case for case in bench.SUITES["notebook" if args.case == "notebook" else "layers"](setup)
                if args.case == "notebook" or case.group == "A0-stage1")  # fmt: skip
    built = case.build()
    kept = Built([candidate for candidate in built.candidates if not candidate.own or candidate.name == PLANTED])
    contained, widths, points = 0, [], []
    with runner.torch_settings(args.threads, False):
        for run in range(args.runs):
            settings = runner.Settings(args.rounds, seed=run, clock=args.clock)
            plan = settings.plan(setup.target, foreign=False)
            rows = runner.run_case("noise", Case("noise", lambda: kept), setup, plan, None)
            again = next(row for row in rows if row.candidate.endswith(AGAIN))
            if again.interval is None:
                raise RuntimeError(f"too few rounds for an interval: {args.rounds}")
            contained += again.interval.contains_one
            widths.append(again.interval.high / again.interval.low)
            points.append(again.interval.value)
    widths.sort()
    return {
        "experiment": "noise",
        "case": case.name,
        "clock": plan.clock.name,
        "threads": args.threads,
        "runs": args.runs,
        "rounds": args.rounds,
        "contain_1": contained,
        "needed": 0.95 * args.runs,
        "passed": contained >= 0.95 * args.runs,
        "median_width": round(widths[len(widths) // 2], 4),
        "ratios_from_to": [round(min(points), 4), round(max(points), 4)],
    }


# ------------------------------------------------------------------------------------------------------------ planted


def run_planted(args: argparse.Namespace) -> dict[str, Any]:
    """Trials of several pairs of runs, the second of each with a slower row; and the first ones against each other."""
    if args.pairs % 2 or args.pairs < 2 * regression.FEWEST_PAIRS:
        raise SystemExit(f"--pairs must be even and at least {2 * regression.FEWEST_PAIRS}, got {args.pairs}")
    found, false_alarms, ratios = 0, 0, []
    with tempfile.TemporaryDirectory() as folder:
        for trial in range(args.trials):
            before, slower = [], []
            for pair in range(args.pairs):
                for runs, factor in ((before, 1.0), (slower, args.factor)):
                    path = Path(folder) / f"{trial}-{pair}-{factor}.jsonl"
                    one_process(args, factor, path)
                    runs.append(records.read(path))
            changes = regression.compare_pairs(list(zip(before, slower, strict=True))).changes
            change = next(each for each in changes if each.candidate == PLANTED)
            found += change.verdict == "slower"
            ratios.append([round(each, 4) for each in change.ratio or ()])
            alarms = regression.compare_pairs(list(zip(before[::2], before[1::2], strict=True))).regressions
            false_alarms += bool(alarms)
            names = [each.candidate for each in alarms]
            print(f"trial {trial}: {change.verdict} {ratios[-1]}, false alarms {names}", flush=True)
    return {
        "experiment": "planted",
        "factor": args.factor,
        "trials": args.trials,
        "pairs": args.pairs,
        "rounds": args.rounds,
        "threads": args.threads,
        "found": found,
        "needed": 0.9 * args.trials,
        "passed": found >= 0.9 * args.trials,
        "trials_with_an_alarm_between_the_same_code": false_alarms,
        "ratios": ratios,
    }


def one_process(args: argparse.Namespace, factor: float, out: Path) -> None:
    options = ["--threads", str(args.threads), "--clock", args.clock, "one", "--rounds", str(args.rounds)]
    command = [sys.executable, __file__, *options, "--factor", str(factor), "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def run_one(args: argparse.Namespace) -> dict[str, Any]:
    """``repvgg-cuda bench --suite chains`` with one case, and in it one row slower."""
    parser = argparse.ArgumentParser()
    bench.add_run_arguments(parser)
    options = ["--suite", SUITE, "--rounds", str(args.rounds), "--threads", str(args.threads), "--clock", args.clock]
    parsed = parser.parse_args([*options, "--against", *CONTROLS, "--json", str(args.out)])
    bench.SUITES[SUITE] = partial(with_slower_row, args.factor)
    bench.collect(parsed, Console(quiet=True))
    return {}


def with_slower_row(factor: float, setup: Setup) -> list[Case]:
    def build(case: Case) -> Built:
        candidates, work = case.build()
        return Built([slow(each, factor) if each.name == PLANTED else each for each in candidates], work)

    chosen = [case for case in suites.chains_suite(setup) if case.group == GROUP]
    return [dataclasses.replace(case, build=partial(build, case)) for case in chosen]


def slow(candidate: Candidate, factor: float) -> Candidate:
    """Keeps the processor busy after each call, for a share of the time that it took."""
    if factor <= 1:
        return candidate
    return dataclasses.replace(candidate, run=None, build=lambda: slowed(candidate.ready(), factor))


def slowed(run: Callable[[], object], factor: float) -> Callable[[], object]:
    clock = time.perf_counter_ns

    def slower() -> object:
        start = clock()
        output = run()
        end = start + (clock() - start) * factor
        while clock() < end:
            pass
        return output

    return slower


if __name__ == "__main__":
    sys.exit(main())
