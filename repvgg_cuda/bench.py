# SPDX-License-Identifier: MIT
"""``repvgg-cuda bench``: times RepVGG blocks and networks before and after fusion, side by side.

:mod:`repvgg_cuda.suites` says what is compared, :mod:`repvgg_cuda.timing` how; here are the options and the output.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from repvgg_cuda import environment, suites, timing
from repvgg_cuda.branches import dtype_name, require
from repvgg_cuda.models import model_names
from repvgg_cuda.timing import Row

#: Bumped when a reader of the JSON would have to change.
SCHEMA = 1

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

SUITES: dict[str, Callable[[suites.Setup], suites.Cases]] = {
    "notebook": suites.notebook_suite,
    "layers": suites.layers_suite,
    "models": suites.models_suite,
    "fusion": suites.fusion_suite,
}

ROUNDS, QUICK_ROUNDS = 40, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``repvgg-cuda bench``."""
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
        default=list(suites.DEFAULT_MODELS),
        help=f"networks of the models suite: digits, or of the family, such as RepVGG-B1g4 (default: "
        f"{' '.join(suites.DEFAULT_MODELS)})",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="default: %(default)s")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as PyTorch chooses)")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help=f"samples per row (default: {ROUNDS}, quick: {QUICK_ROUNDS})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order within the rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few rounds of few cases: a look, not a measurement")
    parser.add_argument("--aa", action="store_true", help="time every baseline twice; the second row shows the noise")
    parser.add_argument(
        "--tf32",
        action="store_true",
        help="let cuDNN round float32 factors to TF32 (PyTorch's default; ours never does)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the environment here")


def run(args: argparse.Namespace) -> int:
    """Times what ``args`` (of :func:`add_arguments`) asks for, prints tables. Returns the exit code."""
    if args.json is not None:
        require_writable(args.json)
    console = Console()
    report = collect(args, console)
    if args.json is not None:
        write_text_atomically(args.json, json.dumps(report, indent=1) + "\n")
        console.print(f"wrote {args.json}", highlight=False)
    return exit_code(report)


def exit_code(report: dict[str, Any]) -> int:
    """1 if any row is wrong or raised, else 0. A refusal is an answer, not a failure."""
    return int(any(row["status"] in ("wrong", "error") for row in report["rows"]))


def collect(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Runs the suites, printing each case's table as it is done. Returns ``{schema, options, environment, rows}``."""
    require(
        args.device != "cuda" or torch.cuda.is_available(),
        "bench: --device cuda needs a CUDA GPU and a PyTorch built for it, and torch.cuda.is_available() is False; "
        "use --device cpu",
    )
    require(args.threads is None or args.threads >= 1, f"bench: --threads must be at least 1, got {args.threads}")
    require(args.rounds is None or args.rounds >= 1, f"bench: --rounds must be at least 1, got {args.rounds}")
    for name in args.model:
        known = ("digits", *model_names())
        require(name in known, f"bench: --model must be one of {', '.join(known)}, got {name}")
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    chosen = list(SUITES) if "all" in args.suite else list(dict.fromkeys(args.suite))
    setup = suites.Setup(torch.device(args.device), DTYPES[args.dtype], args.quick, tuple(args.model))
    rows: list[Row] = []
    with _settings(args.threads, args.tf32):
        machine = environment.collect(setup.device)
        _print_header(console, machine, setup)
        for name in chosen:
            for case, candidates in SUITES[name](setup):
                rows += run_case(
                    name, case, candidates, setup.device, rounds, console, repeat_first=args.aa, seed=args.seed
                )
                console.print(table(rows[-len(candidates) - args.aa :]))
    options = {"suites": chosen, "dtype": args.dtype, "rounds": rounds, "quick": args.quick, "seed": args.seed}
    return {
        "schema": SCHEMA,
        "options": options,
        "environment": machine,
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def run_case(
    suite: str,
    case: str,
    candidates: Sequence[timing.Candidate],
    device: torch.device,
    rounds: int,
    console: Console,
    *,
    repeat_first: bool = False,
    seed: int = 0,
) -> list[Row]:
    """:func:`repvgg_cuda.timing.compare` under a progress bar."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(
            escape(f"checking and timing {case}"), total=timing.steps(candidates, rounds, repeat_first)
        )
        return timing.compare(
            suite,
            case,
            candidates,
            timing.clock_for(device),
            rounds=rounds,
            repeat_first=repeat_first,
            seed=seed,
            tick=lambda steps: progress.advance(task, steps),
        )


@contextlib.contextmanager
def _settings(threads: int | None, tf32: bool) -> Iterator[None]:
    """Sets the global switches for the time of a run."""
    cudnn: Any = torch.backends.cudnn
    before = torch.get_num_threads(), cudnn.allow_tf32
    torch.set_num_threads(threads or before[0])
    cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cudnn.allow_tf32 = before[1]


# ----------------------------------------------------------------------------------------------------------- output


def _print_header(console: Console, record: dict[str, Any], setup: suites.Setup) -> None:
    tf32 = f", TF32 {'allowed' if record['tf32'] else 'off'}" if "tf32" in record else ""
    console.print(
        f"{environment.machine(record)}; torch {record['torch']}; repvgg_cuda {record['repvgg_cuda']} "
        f"({record['build']['build']} build); {dtype_name(setup.dtype)}{tf32}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if warning := environment.load_warning(record):
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def table(rows: Sequence[Row]) -> Table:
    """The rows of one case, for :mod:`rich`."""
    result = Table(title=escape(f"{rows[0].suite}: {rows[0].case}"), title_justify="left")
    result.add_column("candidate")
    for heading in ("median", "p10 - p90", "speed-up"):
        result.add_column(heading, justify="right")
    for row in rows:
        name = escape(row.candidate)
        if row.median_us is None or row.p10_us is None or row.p90_us is None:
            result.add_row(name, f"[red]{row.status}[/red]" if row.status != "refused" else "refused", escape(row.note))
            continue
        speedup = "" if row.speedup is None else f"{row.speedup:.2f}x"
        result.add_row(name, duration(row.median_us), f"{duration(row.p10_us)} - {duration(row.p90_us)}", speedup)
    return result


def duration(microseconds: float) -> str:
    """With three digits that count: 12.3 us, 4.56 ms."""
    for unit, scale in (("us", 1.0), ("ms", 1e3), ("s", 1e6)):
        if microseconds < 999.5 * scale or unit == "s":
            value = microseconds / scale
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    raise AssertionError("unreachable: the last unit takes every value")


def require_writable(path: Path) -> None:
    """Raises OSError now if :func:`write_text_atomically` could not write ``path`` later, after minutes of timing."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; name a file in it")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no directory {path.absolute().parent}; create it first")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; choose another directory") from None


def write_text_atomically(path: Path, text: str) -> None:
    """Writes under a temporary name and renames: ``path`` is never half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
