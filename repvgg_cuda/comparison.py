# SPDX-License-Identifier: MIT
"""Candidates for one case, checked and then timed side by side: one :class:`Row` each.

A wrong result gets a row that says so and no time.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch

from repvgg_cuda import intervals, timing
from repvgg_cuda.timing import Clock, Context, Run, Timing

#: What the name of a repeated candidate ends in: the same thing timed again, to show the noise.
AGAIN = " (again)"

Status = Literal["ok", "wrong", "refused", "error"]
Caches = Literal["warm", "cold"]


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case.

    Args:
        run: computes the output; or None, and ``build`` makes it when its turn has come.
        check: gets the output and says what is wrong with it ("" if nothing).
        refusal: why the candidate cannot run at all.
        context: entered around building, the check and every sample.
        own: it is this library's, and not one of those that it is compared with.
        error: of the output, relative to the largest value; None where nobody asks.
        remark: beside a right result, what a reader should know about it ("" if nothing).
    """

    name: str
    run: Run | None
    check: Callable[[Any], str]
    refusal: str | None = None
    context: Context = contextlib.nullcontext
    build: Callable[[], Run] | None = None
    own: bool = False
    error: Callable[[Any], float] | None = None
    remark: Callable[[Any], str] | None = None

    def ready(self) -> Run:
        if self.run is not None:
            return self.run
        assert self.build is not None
        return self.build()


@dataclass(frozen=True)
class Work:
    """What a case takes at least: a direct convolution's operations (2 per multiply-add), and the bytes of its input,
    weights and output, each moved once."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Row:
    """One line of a benchmark. Times are microseconds per call, and None unless ``status`` is "ok".

    ``speedup`` is over the case's first candidate, its interval is None where there are too few rounds, and
    ``within_noise`` says that the data do not tell the two apart. ``note`` says what was wrong, refused or raised.
    ``group`` is the case without its batch, the same for all batches.
    ``error`` is relative to the largest output. ``floor_us`` is the least time that the measured ceilings of the
    machine leave a direct convolution, and ``share`` is that over the median. ``samples_ns`` has one value per round.
    """

    suite: str
    case: str
    candidate: str
    status: Status
    note: str = ""
    median_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    within_noise: bool | None = None
    error: float | None = None
    rounds: int = 0
    calls_per_sample: int = 0
    own: bool = False
    caches: Caches = "warm"
    batch: int = 1
    group: str = ""
    threads: int = 0
    clock: str = ""
    flops: float | None = None
    bytes: float | None = None
    floor_us: float | None = None
    share: float | None = None
    samples_ns: tuple[float, ...] = ()

    @property
    def interval(self) -> intervals.Ratio | None:
        """The speed-up with its interval, where there is one."""
        if self.speedup is None or self.speedup_low is None or self.speedup_high is None:
            return None
        return intervals.Ratio(self.speedup, self.speedup_low, self.speedup_high)


@dataclass(frozen=True)
class Plan:
    """How the candidates of a case are timed.

    Args:
        repeat_first: times the first candidate a second time under another name, so that the row shows the noise.
        seed: of the order within the rounds.
        flush: empties the caches; with it every candidate is timed twice, warm and cold.
        pause: as for :func:`repvgg_cuda.timing.measure`.
    """

    clock: Clock
    rounds: int
    repeat_first: bool = False
    seed: int = 0
    flush: Callable[[], None] | None = None
    pause: float = 0.0

    @property
    def regimes(self) -> tuple[Caches, ...]:
        return ("warm",) if self.flush is None else ("warm", "cold")

    @property
    def steps_each(self) -> int:
        return 1 + len(self.regimes) * (self.rounds + 1)  # the check; the warm-ups and the rounds

    def steps(self, candidates: Sequence[Candidate]) -> int:
        """How many steps :func:`compare` reports for these."""
        return (len(candidates) + self.repeat_first) * self.steps_each


def compare(
    suite: str,
    case: str,
    candidates: Sequence[Candidate],
    plan: Plan,
    *,
    work: Work | None = None,
    batch: int = 1,
    group: str = "",
    floors: Mapping[Caches, float] = MappingProxyType({}),
    tick: Callable[[int], None] = lambda steps: None,
) -> list[Row]:
    """Checks every candidate's output, then times the right ones side by side: one row each, in the given order.

    Args:
        candidates: with distinct names; the first is the baseline of the speed-ups.
        floors: the least time for ``work`` on this machine, in microseconds.
        tick: gets the steps done; they add up to ``plan.steps(candidates)``.
    """
    first = Row(
        suite, case, "", "ok", batch=batch, group=group or case, threads=torch.get_num_threads(), clock=plan.clock.name
    )
    if work is not None:
        first = dataclasses.replace(first, flops=work.flops, bytes=work.bytes)
    tried: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    for i, candidate in enumerate(candidates):
        row, run = _trial(candidate, dataclasses.replace(first, own=candidate.own))
        for name in (candidate.name, candidate.name + AGAIN) if i == 0 and plan.repeat_first else (candidate.name,):
            tried[name] = dataclasses.replace(row, candidate=name)
            if run is not None:
                runs[name] = run
            tick(1 if run is not None else plan.steps_each)
    contexts = {candidate.name: candidate.context for candidate in candidates}
    contexts[candidates[0].name + AGAIN] = candidates[0].context
    rows = []
    for regime in plan.regimes:
        timings = timing.measure(
            runs,
            plan.clock,
            rounds=plan.rounds,
            contexts=contexts,
            seed=plan.seed,
            tick=lambda: tick(1),
            flush=plan.flush if regime == "cold" else None,
            pause=plan.pause,
        )
        for row in tried.values():
            row = dataclasses.replace(row, caches=regime, floor_us=floors.get(regime))
            rows.append(_timed(row, timings, candidates[0].name))
    return rows


def _trial(candidate: Candidate, row: Row) -> tuple[Row, Run | None]:
    """Builds, runs and checks the candidate once: its row without a time, and what to time if it is right."""
    if candidate.refusal is not None:
        return dataclasses.replace(row, status="refused", note=candidate.refusal), None
    try:
        with torch.inference_mode(), candidate.context():
            run = candidate.ready()
            output = run()
            problem = candidate.check(output)
            error = None if candidate.error is None else candidate.error(output)
            remark = "" if candidate.remark is None else candidate.remark(output)
    except Exception as raised:  # whatever an engine raises is its row's note
        text = str(raised).strip().partition("\n")[0][:200] or type(raised).__name__
        return dataclasses.replace(row, status="error", note=text), None
    if problem:
        return dataclasses.replace(row, status="wrong", note=problem, error=error), None
    return dataclasses.replace(row, note=remark, error=error), run


def _timed(row: Row, timings: Mapping[str, Timing], baseline_name: str) -> Row:
    """The row with its times, if its candidate was timed."""
    taken, baseline = timings.get(row.candidate), timings.get(baseline_name)
    if taken is None:
        return row
    row = dataclasses.replace(
        row,
        median_us=taken.median / 1e3,
        p10_us=taken.p10 / 1e3,
        p90_us=taken.p90 / 1e3,
        rounds=len(taken.samples),
        calls_per_sample=taken.calls,
        samples_ns=taken.samples,
        share=None if row.floor_us is None else row.floor_us * 1e3 / taken.median,
    )
    if baseline is None:
        return row
    row = dataclasses.replace(row, speedup=taken.speedup_over(baseline))
    found = intervals.paired_ratio(baseline.samples, taken.samples)
    if found is None or row.candidate == baseline_name:
        return row
    again = timings.get(baseline_name + AGAIN)
    noise = None if again is None else intervals.paired_ratio(baseline.samples, again.samples)
    return dataclasses.replace(
        row,
        speedup_low=found.low,
        speedup_high=found.high,
        within_noise=found.contains_one or (noise is not None and noise.low <= found.value <= noise.high),
    )
