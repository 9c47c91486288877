# SPDX-License-Identifier: MIT
"""How busy the arithmetic units would be in a main loop: one of the four schedulers of a multiprocessor, modelled.

ptxas writes into every instruction how long its warp must not issue after it, and which of six counters it raises or
waits for. The model issues in order, one instruction a clock, from any warp that may; the arithmetic unit and the path
to shared memory are busy for some clocks with each. Their latencies are estimates: differences between kernels mean
more than the figure itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sass import SHARED, Instruction, Mix

#: Clocks that the arithmetic unit of a scheduler is busy: of the A100, 1024 products a clock and multiprocessor.
MATH_CLOCKS = {"HMMA": 8, "FFMA": 2}
SHARED_LATENCY = 33
SHARED_CLOCKS = 4  # that the shared memory, a quarter of which each scheduler has on average, takes for 4 bytes a lane
SHARED_QUEUE = 128  # clocks of work that may wait for it
BARRIER_CLOCKS = 30
OTHER_LATENCY = 20
READ_LATENCY = 8  # until an instruction has read its registers
ITERATIONS, WARM_UP = 12, 2


@dataclass(frozen=True)
class Control:
    """``writes``, ``reads``: the counter that is raised until the result is there, the operands are read; 7: none."""

    stall: int
    writes: int
    reads: int
    waits: tuple[int, ...]


def control(instruction: Instruction) -> Control:
    bits = instruction.encoding >> 41
    waits = tuple(i for i in range(6) if bits >> 11 + i & 1)
    return Control(bits & 15, bits >> 5 & 7, bits >> 8 & 7, waits)


@dataclass
class _Warp:
    pc: int = 0
    iteration: int = 0
    ready: int = 0  # the clock from which it may issue again
    counters: list[list[int]] = field(default_factory=lambda: [[] for _ in range(6)])  # when each raise ends
    began: int = 0  # the clock at which it was warm
    ended: int = 0

    def blocked(self, step: Control, now: int) -> bool:
        return self.ready > now or any(end > now for i in step.waits for end in self.counters[i])

    def raised(self, counter: int, until: int, now: int) -> None:
        if counter < 6:
            self.counters[counter] = [end for end in self.counters[counter] if end > now] + [until]


def utilisation(loop: Mix, warps: int) -> float:
    """The share of clocks in which the arithmetic unit works, with one or two warps on each scheduler.

    A warp that can issue again goes first; of three the last would get no turn, which is no schedule of a GPU.
    """
    assert warps in (1, 2)
    code = [(instruction, control(instruction)) for instruction in loop.instructions]
    clocks = MATH_CLOCKS.get(loop.math_kind, 0)
    if not clocks:
        return 0.0
    crew = [_Warp() for _ in range(warps)]
    issued: list[int] = []  # when the arithmetic began
    math_free = shared_free = now = 0
    latest = crew[0]
    while any(warp.iteration < ITERATIONS for warp in crew):
        for warp in sorted(crew, key=lambda each: each is not latest):  # the same one again, if it can
            if warp.iteration == ITERATIONS:
                continue
            instruction, step = code[warp.pc]
            math, shared = instruction.kind == loop.math_kind, instruction.kind in (*SHARED, "LDGSTS")
            queue_full = shared and shared_free > now + SHARED_QUEUE
            if warp.blocked(step, now) or (math and math_free > now) or queue_full:
                continue
            latency = OTHER_LATENCY
            if math:
                issued.append(now)
                math_free = now + clocks
            elif shared:
                begin = max(now, shared_free)
                shared_free = begin + SHARED_CLOCKS * instruction.width // 4
                latency = max(OTHER_LATENCY, begin - now + SHARED_LATENCY)
            if instruction.kind != "LDGSTS":  # which writes no register
                warp.raised(step.writes, now + latency, now)
            warp.raised(step.reads, max(now + READ_LATENCY, shared_free if shared else 0), now)
            warp.ready = now + max(1, step.stall, BARRIER_CLOCKS if instruction.kind == "BAR" else 0)
            latest = warp
            warp.pc += 1
            if warp.pc == len(code):
                warp.pc, warp.iteration = 0, warp.iteration + 1
                if warp.iteration == WARM_UP:
                    warp.began = now
                warp.ended = now
            break
        now += 1
    begin, end = max(warp.began for warp in crew), min(warp.ended for warp in crew)
    return sum(clocks for each in issued if begin <= each < end) / (end - begin)
