# SPDX-License-Identifier: MIT
"""Runs cases on a device and keeps the record: warnings before and during, progress with the time left, tables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from repvgg_cuda import ceilings, comparison, environment, tables
from repvgg_cuda.branches import dtype_name, require
from repvgg_cuda.comparison import Plan, Row
from repvgg_cuda.devices import Device
from repvgg_cuda.records import Run
from repvgg_cuda.suites import Case, Setup

#: A processor whose pace changes by more than this between the first case and the last was not one machine.
PACE_CHANGE = 0.1

#: A clock whose smallest step is longer than this needs samples of seconds.
COARSE_NS = 100_000.0


@dataclass(frozen=True)
class Settings:
    """How to time.

    Args:
        clock: "auto", "wall" or "cpu".
        cold: with cold caches too.
        strict: what would be a warning is an error.
        pause: seconds before each sample; None: 0.05 where several threads run other engines too, else none.
    """

    rounds: int
    seed: int = 0
    repeat_first: bool = True
    clock: str = "auto"
    cold: bool = False
    strict: bool = False
    pause: float | None = None

    def plan(self, device: Device, *, foreign: bool) -> Plan:
        """``foreign``: other engines, with thread pools of their own, are among the candidates."""
        spinning = device.kind == "cpu" and torch.get_num_threads() > 1 and foreign
        return Plan(
            device.clock(self.clock),
            self.rounds,
            self.repeat_first,
            self.seed,
            device.flush() if self.cold else None,
            (0.05 if spinning else 0.0) if self.pause is None else self.pause,
        )


@contextlib.contextmanager
def torch_settings(threads: int | None, tf32: bool) -> Iterator[None]:
    """Sets torch's global switches for the time of a run."""
    cudnn: Any = torch.backends.cudnn
    before = torch.get_num_threads(), cudnn.allow_tf32
    torch.set_num_threads(threads or before[0])
    cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cudnn.allow_tf32 = before[1]


def start(setup: Setup, settings: Settings, options: dict[str, Any], console: Console) -> Run:
    """Looks at the machine, measures its ceilings, and says what would make times untrue.

    Raises:
        RuntimeError: ``settings.strict`` and there is such a thing.
    """
    device = setup.target
    with console.status("looking at the machine"):
        record = (
            environment.collect(setup.device) | device.facts() | {"state": device.state(), "dry_run": setup.dry_run}
        )
        limits = ceilings.measure(device)
    run = Run(options, record, limits)
    tf32 = f", TF32 {'allowed' if record['tf32'] else 'off'}" if "tf32" in record else ""
    console.print(
        f"{environment.machine(record)}; torch {record['torch']}; repvgg_cuda {record['repvgg_cuda']} "
        f"({record['build']['build']} build); {dtype_name(setup.dtype)}{tf32}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    found = environment.warnings(record) + clock_warnings(device.clock(settings.clock).resolution)
    require(not (settings.strict and found), f"refusing to measure (--strict): {'; '.join(found)}")
    for text in found:
        warn(run, text, console)
    return run


def clock_warnings(resolution_ns: float) -> list[str]:
    if resolution_ns <= COARSE_NS:
        return []
    return [f"the clock's smallest step is {resolution_ns / 1e3:.0f} us: every sample takes a thousand of them"]


def warn(run: Run, text: str, console: Console) -> None:
    run.warnings.append(text)
    console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def measure(
    run: Run,
    cases: Sequence[tuple[str, Case]],
    setup: Setup,
    settings: Settings,
    console: Console,
    *,
    save: Callable[[Run], None] = lambda run: None,
) -> None:
    """Builds, checks and times every ``(suite, case)``; appends to ``run`` and prints a table after each.

    Args:
        save: called after every case: what takes the process down loses its own case only.
    """
    device = setup.target
    foreign = any(not baseline.exact for baseline in setup.baselines())
    plan = settings.plan(device, foreign=foreign)
    pace = environment.pace()
    paces = [pace]
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(cases))
        for i, (suite, case) in enumerate(cases):
            progress.update(task, description=escape(f"building {suite}: {case.name}"), completed=i)
            rows = run_case(suite, case, setup, plan, run.ceilings, progress, i)
            run.rows += rows
            for regime in plan.regimes:
                console.print(tables.table([row for row in rows if row.caches == regime]))
            paces.append(environment.pace())
            run.environment["pace_us"] = [min(paces), max(paces)]
            save(run)
    after = device.state()
    run.environment["state_after"] = after
    for text in [*pace_warnings(paces), *environment.throttle_warnings(after)]:
        warn(run, text, console)
    save(run)


def progress_bar(console: Console) -> Progress:
    """Of one task that counts cases, with the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def pace_warnings(paces: Sequence[float]) -> list[str]:
    slowest, fastest = max(paces), min(paces)
    if slowest <= fastest * (1 + PACE_CHANGE):
        return []
    return [
        f"the processor's pace changed by {100 * (slowest / fastest - 1):.0f} % during the run (throttling, or other "
        "programs): ratios within a case hold, times of different cases may not be comparable"
    ]


def run_case(
    suite: str,
    case: Case,
    setup: Setup,
    plan: Plan,
    limits: ceilings.Ceilings | None,
    progress: Progress | None = None,
    done: int = 0,
) -> list[Row]:
    """Builds, checks and times one case, under a bar that counts it as one of many."""
    candidates, work = case.build()
    total, finished = plan.steps(candidates), 0

    def tick(steps: int) -> None:
        nonlocal finished
        finished += steps
        if progress is not None:
            text = escape(f"checking and timing {case.name}")
            progress.update(progress.task_ids[0], description=text, completed=done + finished / total)

    return comparison.compare(
        suite,
        case.name,
        candidates,
        plan,
        work=work,
        batch=case.batch,
        group=case.group,
        floors={} if limits is None else limits.floors(work, setup.dtype, setup.tf32),
        tick=tick,
    )
