# SPDX-License-Identifier: MIT
"""What each kernel's compiled code must be. The first row whose pattern matches a kernel's name holds for it; the last
row takes every kernel, so that a new one is gated without an edit, by the strict defaults and by the baseline."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Expectation:
    """Main loop: see sass.py. Kinds are opcodes without modifiers, such as "LDS"."""

    pattern: str  # a regular expression for the whole short name, as report.py prints it
    why: str = ""  # where a number comes from that is no default
    #: The arithmetic instruction of the main loop, from this architecture on: a regular expression for the opcode.
    math: dict[int, str] = field(default_factory=dict)
    #: These numbers hold from this architecture on, opcodes on all.
    numbers_from: int = 75
    min_share: float = 0.0  # of the arithmetic in the main loop
    max_per_math: float = float("inf")  # instructions of the main loop per arithmetic instruction
    max_shared_loads: float = float("inf")  # LDS and LDSM per arithmetic instruction
    max_registers: int = 255
    #: Architectures on which it takes more than that.
    more_registers: dict[int, int] = field(default_factory=dict)
    min_blocks: int = 1  # per multiprocessor; what __launch_bounds__ declares holds beside it
    #: Architectures whose shared memory holds fewer blocks than that, and how many.
    fewer_blocks: dict[int, int] = field(default_factory=dict)
    #: Kinds that the main loop must not contain; beside them never LDL or STL, anywhere in the kernel.
    absent: tuple[str, ...] = ("LD", "ST", "CALL", "DFMA", "DADD", "DMUL", "F2F")
    absent_from_sm_80: tuple[str, ...] = ()
    #: Kinds whose accesses are all 16 bytes wide: in the main loop, in the whole kernel.
    loop_16_bytes: tuple[str, ...] = ()
    all_16_bytes: tuple[str, ...] = ()
    dynamic_shared: bool = False  # launched with the kSharedBytes of its traits


#: conv3x3_mma_kernel<Conv3x3MmaTraits<type, tiles_m, warps_m, rows, warps_p, warps_q, stride, joined>>: the type says
#: the instruction, the tile how often what is loaded is used again. sm_75 has the smaller instruction for float16, and
#: none for the others, which it refuses.
MMA_TYPES = {
    0: {75: r"HMMA\.1688\.F32", 80: r"HMMA\.16816\.F32"},
    1: {80: r"HMMA\.16816\.F32\.BF16"},
    2: {80: r"HMMA\.1688\.F32\.TF32"},
}
#: Half of a multiprocessor's shared memory is 32 KB on sm_75.
HALF_IS_TOO_SMALL = {75: 1}
#: ptxas gives one tf32 tile, 64 x 16 x 16, a register more there; two blocks leave 255.
TF32_REGISTERS = {100: 233}
#: tiles_m, rows, stride -> min_share, max_per_math, max_shared_loads.
MMA_TILES = {
    ("4", "8", "1"): (0.65, 1.55, 0.19),
    ("4", "7", "1"): (0.60, 1.65, 0.21),
    ("3", "8", "1"): (0.60, 1.65, 0.20),
    ("3", "7", "1"): (0.56, 1.80, 0.23),
    ("2", "8", "1"): (0.53, 1.90, 0.24),
    ("4", "4", "2"): (0.47, 2.10, 0.36),
    ("3", "4", "2"): (0.42, 2.40, 0.40),
    ("1", "7", "1"): (0.36, 2.75, 0.39),  # for grids that do not fill the GPU, as is the next
    ("1", "4", "2"): (0.23, 4.25, 0.68),
}


def _mma_rows() -> Iterator[Expectation]:
    for kind, math in MMA_TYPES.items():
        for (tiles_m, rows, stride), (share, per_math, loads) in MMA_TILES.items():
            tile = rf"\(MmaType\){kind}, {tiles_m}, \d, {rows}, \d, \d, {stride}, .*"
            yield Expectation(
                rf"conv3x3_mma_kernel<Conv3x3MmaTraits<{tile}>>",
                math=math,
                min_share=share,
                max_per_math=per_math,
                max_shared_loads=loads,
                max_registers=232,
                more_registers=TF32_REGISTERS if kind == 2 else {},
                min_blocks=2,
                fewer_blocks=HALF_IS_TOO_SMALL,
                numbers_from=80,
                absent_from_sm_80=("LDG",),
                # Tiles with an odd number of pixel rows, those of 9, load the last one as half of a pair.
                loop_16_bytes=("LDS", "LDGSTS", "LDSM") if rows == "8" else ("LDS", "LDGSTS"),
                dynamic_shared=True,
            )


EXPECTATIONS = (
    Expectation(
        r"conv3x3_direct_kernel<Conv3x3DirectTraits<\d+, \d+, 16, .*>>",
        math={75: "FFMA2?"},
        min_share=0.94,
        max_shared_loads=0.05,
        dynamic_shared=True,
    ),
    Expectation(
        r"conv3x3_direct_kernel<Conv3x3DirectTraits<\d+, \d+, 4, .*>>",
        why="a quarter of the channels a thread: for grids that do not fill the GPU",
        math={75: "FFMA2?"},
        min_share=0.90,
        max_shared_loads=0.09,
        dynamic_shared=True,
    ),
    *_mma_rows(),
    Expectation(
        r"fuse_weights_kernel<.*>",
        why="folds in double; bound by memory",
        absent=(),
        min_blocks=6,
        fewer_blocks={75: 4},
    ),
    Expectation(r".*"),
)


def expectation(name: str) -> Expectation:
    return next(row for row in EXPECTATIONS if re.fullmatch(row.pattern, name))
