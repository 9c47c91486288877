# SPDX-License-Identifier: MIT
"""Compares compiled kernels with expectations.py and with the committed baseline. A difference is a Finding.

The baseline is a folder per version of ptxas, because counts move between versions: baseline/<version>/kernels.csv has
a line per kernel and architecture, files.csv one per source. `make static-baseline` renews the folder of the installed
version.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

import sass
import shared_bytes
from binary import Binary, Kernel
from expectations import expectation
from occupancy import LIMITS, blocks_per_sm

BASELINE = Path(__file__).parent / "baseline"
REGISTER_SLACK = 4
SHARE_SLACK = 0.01


@dataclass(frozen=True, order=True)
class Finding:
    kernel: str
    arch: int
    what: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.kernel} sm_{self.arch}: {self.what}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True)
class Row:
    """What the baseline records of a kernel on an architecture."""

    kernel: str
    arch: int
    registers: int
    shared: int  # bytes of a block, static and dynamic
    blocks: int  # per multiprocessor; 0: unknown
    barriers: int  # in the whole kernel
    math: str  # the arithmetic of the main loop
    loop_math: int
    loop_total: int
    loop_shared_loads: int
    loop_barriers: int
    loop_narrow: int  # shared and global accesses of less than 16 bytes in the main loop
    global_narrow: int  # global ones in the whole kernel

    @property
    def share(self) -> float:
        return self.loop_math / self.loop_total if self.loop_total else 0.0


@dataclass(frozen=True)
class FileRow:
    """What the baseline records of an object file."""

    file: str
    bytes: int
    seconds: float  # of compile time, on a machine of that day: only ratios mean something


AnyRow = TypeVar("AnyRow", Row, FileRow)


def row(kernel: Kernel) -> Row:
    loop, whole = kernel.code.main_loop, kernel.code.mix
    return Row(
        kernel.name,
        kernel.arch,
        kernel.registers,
        kernel.shared + kernel.dynamic_shared,
        blocks(kernel) if kernel.threads and kernel.arch in LIMITS else 0,
        whole.kinds["BAR"],
        loop.math_kind,
        loop.math,
        loop.total,
        loop.count(sass.SHARED_LOADS),
        loop.kinds["BAR"],
        loop.count((*sass.SHARED, *sass.GLOBAL), below=16),
        whole.count(sass.GLOBAL, below=16),
    )


def read_csv(path: Path, kind: type[AnyRow]) -> list[AnyRow]:
    convert = {"int": int, "float": float, "str": str}
    with path.open(newline="") as file:
        return [
            kind(*(convert[str(column.type)](line[column.name]) for column in fields(kind)))
            for line in csv.DictReader(file)
        ]


def write_csv(path: Path, rows: list[AnyRow]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([column.name for column in fields(rows[0])])
        writer.writerows(astuple(row) for row in sorted(rows, key=astuple))
    temporary.replace(path)


# ------------------------------------------------------------------------------------- gates that need no baseline


def check_memory(kernel: Kernel) -> Iterable[Finding]:
    """Registers do not spill and no array is indexed at run time: nothing lives in local memory."""

    def finding(what: str, found: object) -> Finding:
        return Finding(*kernel.place, what, "0", str(found))

    if kernel.stack:
        yield finding("bytes of stack", kernel.stack)
    if kernel.local:
        yield finding("bytes of local memory", kernel.local)
    if spills := kernel.code.mix.count(("LDL", "STL")):
        yield finding("accesses to local memory (spilled registers)", spills)


def with_dynamic_shared(module: Binary) -> Binary:
    """Asks the sources for what the code does not say. Raises ToolMissing without nvcc."""
    names = frozenset(kernel.name for kernel in module.kernels if expectation(kernel.name).dynamic_shared)
    size = shared_bytes.dynamic_shared(names)
    kernels = tuple(replace(kernel, dynamic_shared=size.get(kernel.name, 0)) for kernel in module.kernels)
    return replace(module, kernels=kernels)


def blocks(kernel: Kernel) -> int:
    """Blocks per multiprocessor, by registers, shared memory and threads."""
    assert kernel.threads is not None
    return blocks_per_sm(kernel.arch, kernel.registers, kernel.threads, kernel.shared + kernel.dynamic_shared)


def check_occupancy(kernel: Kernel) -> Iterable[Finding]:
    expected = expectation(kernel.name)
    if kernel.threads is None:
        yield Finding(*kernel.place, "__launch_bounds__", "the number of threads", "none")
        return
    if kernel.arch not in LIMITS:
        yield Finding(*kernel.place, "architecture", "one that occupancy.py knows", f"sm_{kernel.arch}")
        return
    declared = expected.fewer_blocks.get(kernel.arch, max(kernel.blocks or 1, expected.min_blocks))
    if blocks(kernel) < declared:
        shared = f"{kernel.shared} + {kernel.dynamic_shared} bytes shared"
        used = f"{kernel.registers} registers, {kernel.threads} threads, {shared}"
        yield Finding(*kernel.place, "blocks per multiprocessor", f">= {declared}", f"{blocks(kernel)} ({used})")


def check_main_loop(kernel: Kernel) -> Iterable[Finding]:
    expected, loop = expectation(kernel.name), kernel.code.main_loop

    def finding(what: str, wanted: object, found: object) -> Finding:
        return Finding(*kernel.place, what, str(wanted), str(found))

    max_registers = expected.more_registers.get(kernel.arch, expected.max_registers)
    if kernel.registers > max_registers and kernel.arch >= expected.numbers_from:
        yield finding("registers", f"<= {max_registers}", kernel.registers)
    math = next((opcode for arch, opcode in sorted(expected.math.items(), reverse=True) if kernel.arch >= arch), None)
    if math is not None:
        wrong = {i.opcode for i in loop.instructions if i.kind in sass.MATH and not re.fullmatch(math, i.opcode)}
        if not loop.math or wrong:
            yield finding("arithmetic of the main loop", math, ", ".join(sorted(wrong)) or "none")
            return
    if math is not None and kernel.arch >= expected.numbers_from:
        if loop.share < expected.min_share:
            yield finding(f"share of {loop.math_kind} in the main loop", f">= {expected.min_share:.1%}", _share(loop))
        for what, count, most in (
            ("instructions", loop.total, expected.max_per_math),
            ("shared loads", loop.count(sass.SHARED_LOADS), expected.max_shared_loads),
        ):
            if count / loop.math > most:
                ratio = f"{count / loop.math:.3f} ({count} for {loop.math})"
                yield finding(f"{what} per {loop.math_kind} in the main loop", f"<= {most}", ratio)
    for kind in (*expected.absent, *(expected.absent_from_sm_80 if kernel.arch >= 80 else ())):
        if loop.kinds[kind]:
            yield finding(f"{kind} in the main loop", 0, loop.kinds[kind])
    for where, mix, kinds in (
        ("the main loop", loop, expected.loop_16_bytes),
        ("the kernel", kernel.code.mix, expected.all_16_bytes),
    ):
        if narrow := mix.narrow(kinds, below=16):
            yield finding(f"{'/'.join(kinds)} in {where}", "16 bytes each", narrow)


def _share(loop: sass.Mix) -> str:
    others = ", ".join(f"{kind} x{n}" for kind, n in loop.kinds.most_common(6) if kind != loop.math_kind)
    return f"{loop.share:.1%} ({loop.math} of {loop.total}; beside it {others})"


# ----------------------------------------------------------------------------------------------- against the baseline


def check_baseline(kernels: Iterable[Kernel], baseline: list[Row]) -> Iterable[Finding]:
    before = {(old.kernel, old.arch): old for old in baseline}
    now = {kernel.place: row(kernel) for kernel in kernels}
    for place, new in now.items():
        if place in before:
            yield from _compare(before[place], new)
        else:
            yield Finding(*place, "kernel", "a line in the baseline", "none (make static-baseline)")
    for place in before.keys() - now.keys():
        yield Finding(*place, "kernel", "it is in the binary, as in the baseline", "none (make static-baseline)")


def _compare(old: Row, new: Row) -> Iterable[Finding]:
    def finding(what: str, expected: object, found: object) -> Finding:
        return Finding(new.kernel, new.arch, what, f"{expected} (baseline)", str(found))

    if new.registers > old.registers + REGISTER_SLACK:
        yield finding("registers", f"<= {old.registers} + {REGISTER_SLACK}", new.registers)
    for what, before, after in (
        ("bytes of shared memory", old.shared, new.shared),
        ("barriers", old.barriers, new.barriers),
        ("barriers in the main loop", old.loop_barriers, new.loop_barriers),
        ("arithmetic of the main loop", old.math or "none", new.math or "none"),
    ):
        if before != after:
            yield finding(what, before, after)
    for what, before, after in (
        ("accesses of less than 16 bytes in the main loop", old.loop_narrow, new.loop_narrow),
        ("global accesses of less than 16 bytes", old.global_narrow, new.global_narrow),
    ):
        if after > before:
            yield finding(what, f"<= {before}", after)
    if new.blocks < old.blocks:
        yield finding("blocks per multiprocessor", f">= {old.blocks}", new.blocks)
    if new.math == old.math and new.share < old.share - SHARE_SLACK:
        yield finding(f"share of {new.math} in the main loop", f">= {old.share - SHARE_SLACK:.1%}", f"{new.share:.1%}")


def baseline_folder(binary: Binary) -> Path:
    return BASELINE / binary.compiler


# ------------------------------------------------------------------------------------------------- files and their time

SIZE_SLACK = 1.10
SIZE_FLOOR = 32 * 1024  # bytes that a file may grow by in any case
TIME_SLACK = 4.0
TIME_FLOOR = 10.0  # seconds below which a compilation is never slow


def file_rows(objects: Path) -> list[FileRow]:
    """Of every object of a build folder: its size, and the seconds that ninja recorded for it."""
    seconds = {}
    for line in (objects / ".ninja_log").read_text().splitlines()[1:]:
        start, end, _, output, *_ = line.split("\t")
        seconds[Path(output).name] = (int(end) - int(start)) / 1000
    return [
        FileRow(path.stem, path.stat().st_size, round(seconds[path.name], 1)) for path in sorted(objects.glob("*.o"))
    ]


def check_files(new: list[FileRow], old: list[FileRow]) -> list[str]:
    """Sizes of the CUDA objects hold; times are compared with those of the other files of the same build, so that a
    slow or busy machine slows both sides: a file fails that became slower than the rest by several times."""
    before = {line.file: line for line in old}
    ratios = sorted(
        line.seconds / max(before[line.file].seconds, 0.1)
        for line in new
        if line.file in before and before[line.file].seconds >= 1
    )
    pace = ratios[len(ratios) // 2] if ratios else 1.0
    findings = []
    for line in new:
        if not line.file.endswith(".cu"):
            continue
        if line.file not in before:
            findings.append(f"{line.file}: expected a line in the baseline, found none (make static-baseline)")
            continue
        was = before[line.file]
        limit = max(round(was.bytes * SIZE_SLACK), was.bytes + SIZE_FLOOR)
        if line.bytes > limit:
            findings.append(f"{line.file}: object size: expected <= {limit} bytes, found {line.bytes}")
        budget = max(was.seconds * pace * TIME_SLACK, TIME_FLOOR * max(pace, 1.0))
        if line.seconds > budget:
            findings.append(
                f"{line.file}: compile time: expected <= {budget:.0f} s ({TIME_SLACK:.0f} times the baseline's "
                f"{was.seconds} s at this build's pace of {pace:.2f}), found {line.seconds} s"
            )
    return findings
