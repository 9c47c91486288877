# SPDX-License-Identifier: MIT
"""How long a call takes: clocks, warm-up, interleaved rounds, and rows of results.

Candidates are timed side by side: every round runs each of them once, in random order, so that a clock change or a
noisy neighbour meets all of them alike, and a ratio is taken within a round. Every call gets the same tensors, so
caches are warm. That flatters a single layer, whose weights a whole network may have evicted, all candidates alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

#: A sample is at least this long, and at least RESOLUTIONS_PER_SAMPLE steps of the clock.
MIN_SAMPLE_NS = 500_000.0
RESOLUTIONS_PER_SAMPLE = 1000

#: Warm-up ends when this many samples in a row lie within STABLE_SPREAD of each other, or after WARM_UP_NS.
STABLE_SAMPLES = 3
STABLE_SPREAD = 1.05
WARM_UP_NS = 1e9

#: What the name of a repeated candidate ends in: the same thing timed again, to show the noise.
AGAIN = " (again)"

Run = Callable[[], object]
Context = Callable[[], contextlib.AbstractContextManager[object]]


class Clock(Protocol):
    """``resolution`` is the smallest difference it shows, ``time`` what ``calls`` calls took together; both in ns."""

    resolution: float

    def time(self, run: Run, calls: int) -> float: ...


def _smallest_step(now: Callable[[], int]) -> int:
    start = end = now()
    while end == start:
        end = now()
    return end - start


class WallClock:
    """``time.perf_counter_ns``, for work that is finished when the call returns."""

    def __init__(self) -> None:
        self.resolution = float(min(_smallest_step(time.perf_counter_ns) for _ in range(10)))

    def time(self, run: Run, calls: int) -> float:
        start = time.perf_counter_ns()
        for _ in range(calls):
            run()
        return float(time.perf_counter_ns() - start)


class CpuClock:
    """CPU time of the whole process, all threads: what other programs do on the machine counts only through caches."""

    def __init__(self) -> None:
        self.resolution = float(min(_smallest_step(time.process_time_ns) for _ in range(10)))

    def time(self, run: Run, calls: int) -> float:
        start = time.process_time_ns()
        for _ in range(calls):
            run()
        return float(time.process_time_ns() - start)


class CudaClock:
    """CUDA events on the current stream.

    The events enclose all calls of a sample, so where the host launches more slowly than the device computes, the
    launches are what is measured: that is the latency an eager network has.
    """

    resolution = 500.0  # cudaEventElapsedTime

    def time(self, run: Run, calls: int) -> float:
        event: Any = torch.cuda.Event
        start, stop = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e6


def clock_for(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else WallClock()


@dataclass(frozen=True)
class Timing:
    """Nanoseconds per call, one sample per round, each the mean of ``calls`` calls."""

    samples: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p10(self) -> float:
        return percentile(self.samples, 10)

    @property
    def p90(self) -> float:
        return percentile(self.samples, 90)

    def speedup_over(self, baseline: Timing) -> float:
        """The median, over the rounds, of how many times as long ``baseline`` took in the same round."""
        return statistics.median(b / s for b, s in zip(baseline.samples, self.samples, strict=True))


def percentile(values: tuple[float, ...], percent: float) -> float:
    """By linear interpolation between the two nearest ranks."""
    ranked = sorted(values)
    position = (len(ranked) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (position - low)


def measure(
    runs: Mapping[str, Run],
    clock: Clock,
    *,
    rounds: int,
    contexts: Mapping[str, Context] | None = None,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Times every callable of ``runs``, interleaved, under ``torch.inference_mode()``.

    Args:
        runs: name -> callable.
        rounds: samples per callable; at least 1.
        contexts: name -> context manager entered around each sample (and not within it), for global switches.
        seed: of the order within the rounds.
        tick: called after each warm-up and after each sample: ``len(runs) * (rounds + 1)`` times.
    """
    if rounds < 1:
        raise RuntimeError(f"measure: rounds must be at least 1, got {rounds}")
    around = {name: (contexts or {}).get(name, contextlib.nullcontext) for name in runs}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    calls: dict[str, int] = {}
    order, rng = list(runs), random.Random(seed)
    with torch.inference_mode(), _no_garbage_collection():
        for name in runs:
            with around[name]():
                calls[name] = warm_up(runs[name], clock)
            tick()
        for _ in range(rounds):
            rng.shuffle(order)
            for name in order:
                with around[name]():
                    samples[name].append(clock.time(runs[name], calls[name]) / calls[name])
                tick()
    return {name: Timing(tuple(samples[name]), calls[name]) for name in runs}


def warm_up(run: Run, clock: Clock) -> int:
    """Runs until the time per call is stable. Returns how many calls make one sample long enough for the clock."""
    enough = max(MIN_SAMPLE_NS, RESOLUTIONS_PER_SAMPLE * clock.resolution)
    calls, spent = 1, 0.0
    recent: list[float] = []
    while spent < WARM_UP_NS or not recent:
        elapsed = clock.time(run, calls)
        spent += elapsed
        if elapsed < enough:
            # Aim a little past it: the next sample will be faster than this one, which was colder. At most tenfold,
            # because a time near the clock's resolution says little.
            calls = min(calls * 10, max(calls + 1, int(1.2 * calls * enough / max(elapsed, 1.0))))
            recent = []
            continue
        recent = [*recent, elapsed][-STABLE_SAMPLES:]
        if len(recent) == STABLE_SAMPLES and max(recent) <= STABLE_SPREAD * min(recent):
            break
    return calls


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """As ``timeit`` does: a collection in one candidate's sample would be another candidate's garbage."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# -------------------------------------------------------------------------------------------------- candidates, rows


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case.

    ``check`` gets the output of ``run`` and says what is wrong with it ("" if nothing). ``refusal`` says why the
    candidate cannot run at all. ``context`` is entered around the check and around every sample.
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], str]
    refusal: str | None = None
    context: Context = contextlib.nullcontext


@dataclass(frozen=True)
class Row:
    """One line of a benchmark. Times are microseconds per call, and None unless ``status`` is "ok".

    ``speedup`` is over the case's first candidate. ``note`` says what was wrong, refused or raised.
    """

    suite: str
    case: str
    candidate: str
    status: Literal["ok", "wrong", "refused", "error"]
    note: str = ""
    median_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    speedup: float | None = None
    rounds: int = 0
    calls_per_sample: int = 0


def compare(
    suite: str,
    case: str,
    candidates: Sequence[Candidate],
    clock: Clock,
    *,
    rounds: int,
    repeat_first: bool = False,
    seed: int = 0,
    tick: Callable[[int], None] = lambda steps: None,
) -> list[Row]:
    """Checks every candidate's output, then times the right ones side by side: one row each, in the given order.

    Args:
        candidates: with distinct names; the first is the baseline of the speed-ups.
        repeat_first: times the first candidate a second time under another name, so that the row shows the noise.
        tick: gets the steps done; they add up to ``steps(candidates, rounds, repeat_first)``.
    """
    if repeat_first:
        again = dataclasses.replace(candidates[0], name=f"{candidates[0].name}{AGAIN}")
        candidates = [candidates[0], again, *candidates[1:]]
    failures: dict[str, Row] = {}
    for candidate in candidates:
        status, note = _trial(candidate)
        if status != "ok":
            failures[candidate.name] = Row(suite, case, candidate.name, status, note)
            tick(rounds + 1)
    right = {candidate.name: candidate for candidate in candidates if candidate.name not in failures}
    timings = measure(
        {name: candidate.run for name, candidate in right.items()},
        clock,
        rounds=rounds,
        contexts={name: candidate.context for name, candidate in right.items()},
        seed=seed,
        tick=lambda: tick(1),
    )
    baseline = timings.get(candidates[0].name)
    rows = []
    for candidate in candidates:
        timing = timings.get(candidate.name)
        if timing is None:
            rows.append(failures[candidate.name])
            continue
        rows.append(
            Row(
                suite,
                case,
                candidate.name,
                "ok",
                median_us=timing.median / 1e3,
                p10_us=timing.p10 / 1e3,
                p90_us=timing.p90 / 1e3,
                speedup=timing.speedup_over(baseline) if baseline else None,
                rounds=rounds,
                calls_per_sample=timing.calls,
            )
        )
    return rows


def steps(candidates: Sequence[Candidate], rounds: int, repeat_first: bool = False) -> int:
    """How many steps :func:`compare` reports for this case."""
    return (len(candidates) + repeat_first) * (rounds + 1)


def _trial(candidate: Candidate) -> tuple[Literal["ok", "wrong", "refused", "error"], str]:
    """Runs and checks the candidate once."""
    if candidate.refusal is not None:
        return "refused", candidate.refusal
    try:
        with torch.inference_mode(), candidate.context():
            problem = candidate.check(candidate.run())
    except RuntimeError as error:
        return "error", str(error).strip().partition("\n")[0]
    return ("wrong", problem) if problem else ("ok", "")
