# SPDX-License-Identifier: MIT
"""What each kernel's compiled code must be. The first row whose pattern matches a kernel's name holds for it; the last
row takes every kernel, so that a new one is gated without an edit, by the strict defaults and by the baseline."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Expectation:
    """Main loop: see sass.py. Kinds are opcodes without modifiers, such as "LDS"."""

    pattern: str  # a regular expression for the whole short name, as report.py prints it
    why: str = ""  # where a number comes from that is no default
    #: The arithmetic instruction of the main loop, from this architecture on: a regular expression for the opcode.
    math: dict[int, str] = field(default_factory=dict)
    min_share: float = 0.0  # of the arithmetic in the main loop
    max_per_math: float = float("inf")  # instructions of the main loop per arithmetic instruction
    max_shared_loads: float = float("inf")  # LDS and LDSM per arithmetic instruction
    max_registers: int = 255
    min_blocks: int = 1  # per multiprocessor; what __launch_bounds__ declares holds beside it
    #: Where a multiprocessor cannot hold as many blocks as __launch_bounds__ declares: how many it holds there.
    fewer_blocks: dict[int, int] = field(default_factory=dict)
    #: Kinds that the main loop must not contain; beside them never LDL or STL, anywhere in the kernel.
    absent: tuple[str, ...] = ("LD", "ST", "CALL", "DFMA", "DADD", "DMUL", "F2F")
    absent_from_sm_80: tuple[str, ...] = ()
    #: Kinds whose accesses are all 16 bytes wide: in the main loop, in the whole kernel.
    loop_16_bytes: tuple[str, ...] = ()
    all_16_bytes: tuple[str, ...] = ()
    dynamic_shared: bool = False  # launched with the kSharedBytes of its traits


EXPECTATIONS = (
    Expectation(
        r"conv3x3_direct_kernel<.*>",
        why="one LDS per pixel of a row: its rows start at any bank",
        math={75: "FFMA2?"},
        min_share=0.87,
        max_shared_loads=0.12,
        max_registers=170,
        fewer_blocks={75: 2},  # 64 KB of shared memory
    ),
    Expectation(r"fuse_weights_kernel", why="folds in double; bound by memory", absent=()),
    Expectation(r".*"),
)


def expectation(name: str) -> Expectation:
    return next(row for row in EXPECTATIONS if re.fullmatch(row.pattern, name))
