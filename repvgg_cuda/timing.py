# SPDX-License-Identifier: MIT
"""How long a call takes: clocks, warm-up, interleaved rounds, caches warm or cold.

What is timed is timed side by side: every round runs each callable once, in random order, so that a clock change or a
noisy neighbour meets all of them alike, and a ratio is taken within a round. Every call gets the same tensors, so
caches are warm. That flatters a single layer, whose weights a whole network may have evicted, all alike; with ``flush``
nothing is left in them before a sample, which is then a single call.
"""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from repvgg_cuda.intervals import percentile, ratio

#: A sample is at least this long, and at least RESOLUTIONS_PER_SAMPLE steps of the clock.
MIN_SAMPLE_NS = 500_000.0
RESOLUTIONS_PER_SAMPLE = 1000

#: Warm-up ends when this many samples in a row lie within STABLE_SPREAD of each other, or after WARM_UP_NS.
STABLE_SAMPLES = 3
STABLE_SPREAD = 1.05
WARM_UP_NS = 1e9

Run = Callable[[], object]
Context = Callable[[], contextlib.AbstractContextManager[object]]


class Clock(Protocol):
    """``resolution`` is the smallest difference it shows, ``time`` what ``calls`` calls took together; both in ns."""

    name: str
    resolution: float

    def time(self, run: Run, calls: int) -> float: ...


def _smallest_step(now: Callable[[], int]) -> int:
    start = end = now()
    while end == start:
        end = now()
    return end - start


class WallClock:
    """``time.perf_counter_ns``, for work that is finished when the call returns."""

    name = "wall"

    def __init__(self) -> None:
        self.resolution = float(min(_smallest_step(time.perf_counter_ns) for _ in range(10)))

    def time(self, run: Run, calls: int) -> float:
        start = time.perf_counter_ns()
        for _ in range(calls):
            run()
        return float(time.perf_counter_ns() - start)


class CpuClock:
    """CPU time of the whole process, all threads: what other programs do on the machine counts only through caches."""

    name = "cpu"

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

    name = "cuda events"
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
        return percentile(self.samples, 50)

    @property
    def p10(self) -> float:
        return percentile(self.samples, 10)

    @property
    def p90(self) -> float:
        return percentile(self.samples, 90)

    def speedup_over(self, baseline: Timing) -> float:
        """The median, over the rounds, of how many times as long ``baseline`` took in the same round."""
        return ratio(baseline.samples, self.samples)


def measure(
    runs: Mapping[str, Run],
    clock: Clock,
    *,
    rounds: int,
    contexts: Mapping[str, Context] | None = None,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
    flush: Callable[[], None] | None = None,
    pause: float = 0.0,
) -> dict[str, Timing]:
    """Times every callable of ``runs``, interleaved, under ``torch.inference_mode()``.

    Args:
        runs: name -> callable.
        rounds: samples per callable; at least 1.
        contexts: name -> context manager entered around each sample (and not within it), for global switches.
        seed: of the order within the rounds.
        tick: called after each warm-up and after each sample: ``len(runs) * (rounds + 1)`` times.
        flush: empties the caches; it then comes before every sample, of one call.
        pause: seconds before each sample, followed by an untimed call. Thread pools of one callable may go on spinning
            for a while after it, and would take the processor from the next one.
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
                if flush is not None:
                    calls[name] = 1
            tick()
        for _ in range(rounds):
            rng.shuffle(order)
            for name in order:
                with around[name]():
                    if pause:
                        time.sleep(pause)
                        runs[name]()
                    if flush is not None:
                        flush()
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
