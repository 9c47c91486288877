# SPDX-License-Identifier: MIT
"""``repvgg-cuda bench``: times RepVGG blocks and networks before and after fusion, side by side; compares and draws.

:mod:`repvgg_cuda.suites` says what is compared, :mod:`repvgg_cuda.timing` and :mod:`repvgg_cuda.intervals` how; here
are the options and the output.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from repvgg_cuda import baselines, devices, networks, records, regression, runner, suites, tables
from repvgg_cuda.branches import require
from repvgg_cuda.comparison import Candidate, Plan, Row
from repvgg_cuda.files import require_writable
from repvgg_cuda.records import Run
from repvgg_cuda.suites import Case, Setup

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

SUITES: dict[str, Callable[[Setup], Sequence[Case]]] = {
    "notebook": suites.notebook_suite,
    "layers": suites.layers_suite,
    "models": suites.models_suite,
    "fusion": suites.fusion_suite,
    "chains": suites.chains_suite,
    "small": suites.small_suite,
}

#: Samples per row; the least is what an interval needs.
QUICK_ROUNDS, ROUNDS, FULL_ROUNDS = 9, 40, 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``repvgg-cuda bench``, and its subcommands ``compare`` and ``plot``."""
    add_run_arguments(parser)
    subparsers = parser.add_subparsers(title="with records", metavar="compare | plot")
    compare = subparsers.add_parser(
        "compare",
        help="what changed from one record to the other; exit code 1 if a row of ours got slower or wrong",
        description="Compares two records of `repvgg-cuda bench --json FILE`. Exit code 1 if a row of this library got "
        "slower, by more than the tolerance and the noise, or wrong. On a machine that is not quiet, give four or more "
        "pairs, measured in turn: A B A B ...",
    )
    compare.add_argument("records", type=Path, nargs="+", metavar="A B", help="before, after; and so on")
    compare.add_argument(
        "--tolerance", type=float, metavar="X", default=regression.TOLERANCE, help="default: %(default)s, that is 2 %%"
    )
    compare.add_argument("--absolute", action="store_true", help="times as they are, not against the case's other rows")
    compare.add_argument("--all", action="store_true", help="show the unchanged rows too")
    compare.set_defaults(command=run_compare)
    plot = subparsers.add_parser(
        "plot",
        help="pictures and a page to look at",
        description="Draws records of `repvgg-cuda bench --json FILE` into a folder: SVG and PNG pictures, and "
        "report.html, one page with everything in it.",
    )
    plot.add_argument("records", type=Path, nargs="+", metavar="RECORD")
    plot.add_argument("--out", type=Path, metavar="DIR", help="default: a folder beside the first, of its name")
    plot.set_defaults(command=run_plot)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a run."""
    parser.add_argument(
        "--suite",
        nargs="+",
        choices=[*SUITES, "all"],
        default=["notebook", "layers"],
        help="what to time (default: notebook and layers). "
        + " ".join(f"{name}: {suite.__doc__}" for name, suite in SUITES.items()),
    )
    parser.add_argument(
        "--model",
        nargs="+",
        metavar="NAME",
        default=[],
        help="networks of the models suite: digits, of the family, such as RepVGG-B1g4, or of timm (default: "
        f"{' '.join(suites.DEFAULT_MODELS)}; with --full {' '.join(suites.FULL_MODELS)})",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="KEY",
        help="baselines: "
        + ", ".join(f"{key} ({device})" for device, keys in _keys().items() for key in keys)
        + "; default: what is there at once, with --full all",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--dry-run", action="store_true", help="with --device cuda: run everything on the CPU; the times mean nothing"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="default: %(default)s")
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", default=[1], help="default: 1")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as PyTorch chooses)")
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help=f"samples per row (default: {ROUNDS}, quick: {QUICK_ROUNDS}, full: {FULL_ROUNDS})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order within the rounds (default: %(default)s)")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--quick", action="store_true", help="under a minute: few rounds of few cases")
    amount.add_argument("--full", action="store_true", help="every case and baseline, more rounds, caches cold too")
    parser.add_argument(
        "--aa",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time every case's first row twice; the second shows the noise (default: yes)",
    )
    parser.add_argument("--cold", action="store_true", help="time with cold caches too")
    parser.add_argument(
        "--clock",
        choices=["auto", "wall", "cpu"],
        default="auto",
        help="auto: CUDA events on a GPU; on a CPU, CPU time for one thread and wall time for several",
    )
    parser.add_argument("--pause", type=float, metavar="S", help="seconds before each sample, for pools that spin")
    parser.add_argument("--strict", action="store_true", help="refuse to measure where there would be a warning")
    parser.add_argument(
        "--tf32",
        action="store_true",
        help="let cuDNN round float32 factors to TF32 (PyTorch's default; ours never does)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here, as JSON lines")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows here, as CSV")


def _keys() -> dict[str, list[str]]:
    """Keys of the baselines by device."""
    by_kind = {"cpu": devices.CpuDevice(), "cuda": devices.DryRunDevice()}
    return {
        kind: list(dict.fromkeys(baseline.key for baseline in baselines.baselines(device)))
        for kind, device in by_kind.items()
    }


# ---------------------------------------------------------------------------------------------------------------- run


def run(args: argparse.Namespace) -> int:
    """Times what ``args`` (of :func:`add_arguments`) asks for, prints tables. Returns the exit code."""
    for path in filter(None, (args.json, args.csv)):
        require_writable(path)
    console = tables.console()
    done = collect(args, console)
    for path in filter(None, (args.json, args.csv)):
        console.print(f"wrote {path}", highlight=False)
    return int(done.failed)


def collect(args: argparse.Namespace, console: Console) -> Run:
    """Runs the suites, printing each case's table and writing the record as each is done.

    Raises:
        RuntimeError: an option is out of range, or there is no such device; before any work.
    """
    setup = make_setup(args)
    settings = make_settings(args)
    chosen = list(SUITES) if "all" in args.suite else list(dict.fromkeys(args.suite))
    options = {
        "suites": chosen, "dtype": args.dtype, "rounds": settings.rounds, "quick": args.quick, "full": args.full,
        "seed": args.seed, "batch": list(setup.batches), "models": list(setup.models), "clock": args.clock,
        "cold": settings.cold,
    }  # fmt: skip

    def save(run: Run) -> None:
        for path in filter(None, (args.json, args.csv)):
            run.write(path)

    with runner.torch_settings(args.threads, args.tf32):
        run = runner.start(setup, settings, options, console)
        cases = [(name, case) for name in chosen for case in SUITES[name](setup)]
        runner.measure(run, cases, setup, settings, console, save=save)
    return run


def make_setup(args: argparse.Namespace) -> Setup:
    device = devices.device_for(args.device, dry_run=args.dry_run)
    require(args.threads is None or args.threads >= 1, f"bench: --threads must be at least 1, got {args.threads}")
    require(min(args.batch) >= 1, f"bench: --batch must be at least 1, got {min(args.batch)}")
    for name in args.model:
        networks.require_model(name)
    keys = _keys()[args.device]
    for key in args.against or ():
        require(key in keys, f"bench: --against must be among {', '.join(keys)} on {args.device}, got {key}")
    return Setup(
        device.torch_device,
        DTYPES[args.dtype],
        args.quick,
        tuple(args.model),
        args.full,
        tuple(dict.fromkeys(args.batch)),
        None if args.against is None else tuple(args.against),
        args.dry_run,
    )


def make_settings(args: argparse.Namespace) -> runner.Settings:
    require(args.rounds is None or args.rounds >= 1, f"bench: --rounds must be at least 1, got {args.rounds}")
    require(args.pause is None or args.pause >= 0, f"bench: --pause must not be negative, got {args.pause}")
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else FULL_ROUNDS if args.full else ROUNDS)
    return runner.Settings(rounds, args.seed, args.aa, args.clock, args.cold or args.full, args.strict, args.pause)


def run_candidates(
    suite: str,
    case: str,
    candidates: Sequence[Candidate],
    setup: Setup,
    rounds: int,
    console: Console,
    *,
    repeat_first: bool = False,
) -> list[Row]:
    """Times one case by itself, under a progress bar."""
    plan = Plan(setup.target.clock("wall"), rounds, repeat_first)
    with runner.progress_bar(console) as progress:
        progress.add_task("", total=1)
        one = Case(case, lambda: suites.Built(list(candidates)))
        return runner.run_case(suite, one, setup, plan, None, progress)


# ------------------------------------------------------------------------------------------------------------ compare


def run_compare(args: argparse.Namespace) -> int:
    """``repvgg-cuda bench compare A B [A B ...]``. Returns the exit code."""
    count = len(args.records)
    require(count % 2 == 0, f"compare: takes records in pairs, before and after, got {count} of them")
    runs = [records.read(path) for path in args.records]
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    found = regression.compare_pairs(pairs, tolerance=args.tolerance, absolute=args.absolute)
    console = tables.console()
    for text in found.warnings:
        console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    shown = [change for change in found.changes if args.all or change.verdict != "same"]
    if shown:
        console.print(changes_table(shown))
    counts: dict[str, int] = {}
    for change in found.changes:
        counts[change.verdict] = counts.get(change.verdict, 0) + 1
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    console.print(f"{len(found.changes)} rows: {summary}", highlight=False)
    if found.regressions:
        console.print(f"[red]{len(found.regressions)} of this library's rows got slower or wrong[/red]")
    return int(bool(found.regressions))


def changes_table(changes: Sequence[regression.Change]) -> Table:
    table = Table(title="time of the second run / time of the first", title_justify="left")
    for column in ("case", "candidate", "before", "after", "ratio", "interval", ""):
        table.add_column(column, justify="left" if column in ("case", "candidate", "") else "right")
    for change in changes:
        times = (tables.duration(each) if each is not None else "" for each in (change.before_us, change.after_us))
        ratio = ("", "")
        if change.ratio is not None:
            ratio = f"{change.ratio.value:.3f}", f"{change.ratio.low:.3f} - {change.ratio.high:.3f}"
        colour = {"slower": "red", "faster": "green"}.get(change.verdict, "dim")
        case = f"{change.suite}: {change.case}" + (", cold" if change.caches == "cold" else "")
        verdict = f"[{colour}]{change.verdict}[/{colour}]" + (f" {escape(change.note)}" if change.note else "")
        table.add_row(escape(case), escape(change.candidate), *times, *ratio, verdict)
    return table


# --------------------------------------------------------------------------------------------------------------- plot


def run_plot(args: argparse.Namespace) -> int:
    """``repvgg-cuda bench plot RECORD ...``. Returns the exit code."""
    from repvgg_cuda import page  # matplotlib is no dependency of the rest

    out: Path = args.out or args.records[0].with_suffix("")
    require(not out.exists() or out.is_dir(), f"--out must be a directory, and {out} is a file; name another")
    run = records.joined([records.read(path) for path in args.records])
    for path in page.write(run, out):
        print(f"wrote {path}")
    return 0
