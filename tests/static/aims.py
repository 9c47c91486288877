# SPDX-License-Identifier: MIT
"""What the CUDA kernels were meant to reach, beside what they are: `python tests/static/aims.py [MODULE]`, in Markdown.

The yardstick is CUTLASS's implicit GEMM for sm_80 with the same tile, compiled by the same compiler.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gates
import pipeline
import sass
from binary import Kernel
from report import module_named

K16_STEPS = 9  # of a chunk of 16 channels, one for each tap
ARCH = 80
WARPS = 2  # on each scheduler: two blocks of four warps


@dataclass(frozen=True)
class Tile:
    """The numbers in a tensor-core kernel's name."""

    type: int
    tiles_m: int
    warps_m: int
    rows: int
    warps_p: int
    warps_q: int
    stride: int
    joined: bool

    @property
    def channels(self) -> int:
        return 16 * self.tiles_m * self.warps_m

    @property
    def outputs(self) -> int:
        return self.channels * self.rows * self.warps_p * 8 * self.warps_q

    def __str__(self) -> str:
        name = f"{self.channels}x{self.rows * self.warps_p}x{8 * self.warps_q}"
        kind = ("float16", "bfloat16", "tf32")[self.type]
        return f"{kind} {name}{' joined' * self.joined}{' stride 2' * (self.stride == 2)}"


def tile_of(kernel: Kernel) -> Tile | None:
    found = re.search(r"conv3x3_mma_kernel<.*\(MmaType\)(\d), (\d), (\d), (\d), (\d), (\d), (\d), (\w+)>", kernel.name)
    return None if found is None else Tile(*(int(number) for number in found.groups()[:7]), found[8] == "true")


def copied_bytes(kernel: Kernel, tile: Tile) -> float:
    """From L2 to shared memory for 128 x 128 outputs and 16 of the sum: a halo and three columns of weights a chunk."""
    weights = 3 * tile.channels // 16 * 1536
    halo = (kernel.dynamic_shared - weights) / 2  # two of them lie in shared memory
    return (halo + weights) / K16_STEPS * (128 * 128 / tile.outputs)


Row = tuple[str, str, str, str]


def rows(kernels: Iterable[Kernel]) -> Iterator[Row]:
    """What, yardstick, aim, found."""
    kernels = list(kernels)
    tensor = [(kernel, tile) for kernel in kernels if (tile := tile_of(kernel)) is not None]
    fp16 = [(kernel, tile) for kernel, tile in tensor if (kernel.arch, tile.type) == (ARCH, 0)]
    wide = [each for each in fp16 if str(each[1]) in ("float16 128x8x16", "float16 64x16x16")]
    others = [each for each in fp16 if each[1].stride == 1 and (each[1].tiles_m == 3 or each[1].joined)]
    narrow = [each for each in fp16 if each not in wide and each not in others]

    def listed(of: Iterable[tuple[Kernel, Tile]], number: str) -> str:
        values = sorted((_number(kernel, number), str(tile).removeprefix("float16 ")) for kernel, tile in of)
        text = "{:.0%}" if number == "share" else "{:.2f}"
        return ", ".join(f"{name} {text.format(value)}" for value, name in values)

    for what, number, yardstick, aim, relaxed in (
        ("instructions per HMMA", "per math", "3.06, 2.62", "<= 1.55", "<= 1.85"),
        ("HMMA share", "share", "33 %, 38 %", ">= 65 %", ""),
        ("shared loads per HMMA", "shared loads", "0.25", "<= 0.19", ""),
        ("modelled utilisation of the tensor cores, A100", "utilisation", "0.89", ">= 0.96", ""),
    ):
        yield f"{what}, float16, stride 1", yardstick, aim, listed(wide, number)
        yield f"{what}, 48 and 96 channels, joined images", "", relaxed, listed(others, number)
        yield f"{what}, 32 channels and stride 2", "", "", listed(narrow, number)
    bytes_text = ", ".join(
        f"{copied_bytes(kernel, tile) / 1e3:.1f} KB ({str(tile).removeprefix('float16 ')})" for kernel, tile in wide
    )
    yield "L2 to shared memory, 128 x 128 outputs and 16 channels of a tap", "8.2 KB", "<= 4.8 KB", bytes_text
    later = [(kernel, tile) for kernel, tile in tensor if kernel.arch >= ARCH]
    most, which = max(((kernel.registers, f"{tile}, sm_{kernel.arch}") for kernel, tile in later), default=(0, ""))
    yield "registers of a thread, sm_80 and later", "242 to 254", "<= 232", f"at most {most} ({which})"
    spilled = [kernel for kernel in kernels if kernel.stack or kernel.local]
    yield "kernels that spill, any architecture", "0", "0", f"{len(spilled)} of {len(kernels)}"
    alone = [(kernel.arch, str(tile).partition(" ")[2]) for kernel, tile in later if gates.blocks(kernel) < 2]
    archs = ", ".join(f"sm_{arch}" for arch in sorted({arch for arch, _ in alone}))
    found = f"1 on {archs}: {', '.join(sorted({tile for _, tile in alone}))}; else 2 or more" if alone else "2 or more"
    yield "blocks on a multiprocessor, sm_80 and later", "1 to 2", "2", found
    direct = [kernel for kernel in kernels if kernel.name.startswith("conv3x3_direct_kernel")]
    for what, pattern in (("16", r", 16, \d+, [12], \d+>"), ("4", r", 4, \d+, [12], \d+>")):
        shares = [_number(kernel, "share") for kernel in direct if re.search(pattern, kernel.name)]
        if shares:
            yield (
                f"exact float32: FFMA share, {what} channels a thread, every architecture",
                "",
                ">= 94 %",
                f"{min(shares):.1%} to {max(shares):.1%}",
            )


def _number(kernel: Kernel, which: str) -> float:
    """Of the main loop."""
    row = gates.row(kernel)
    math = max(row.loop_math, 1)
    if which == "utilisation":
        return pipeline.utilisation(kernel.code.main_loop, WARPS)
    return {"per math": row.loop_total / math, "share": row.share, "shared loads": row.loop_shared_loads / math}[which]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("module", nargs="?", type=Path, help="default: the installed extension")
    try:
        module = module_named(parser, parser.parse_args().module)
    except sass.ToolMissing as missing:
        parser.error(str(missing))
    print("| figure | yardstick | aim | found |\n|---|---|---|---|")
    for row in rows(module.kernels):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
