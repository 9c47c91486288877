# SPDX-License-Identifier: MIT
"""The gates can fail: faults are planted in a copy of the kernels, each must be found for what it is."""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import binary
import gates
import pytest
import sass
import sync

ARCH = 80


@dataclass(frozen=True)
class Fault:
    """A change of one file that matches `pattern`, and the gate that must see it."""

    name: str
    file: str
    pattern: str
    replacement: str
    found: str  # a regular expression for what is found

    def plant(self, csrc: Path) -> None:
        path = csrc / "cuda" / self.file
        text, count = re.subn(self.pattern, self.replacement, path.read_text())
        assert count, f"{self.name}: {self.file} holds nothing like {self.pattern}"
        path.write_text(text)


def faults(header: str, barrier: str) -> list[Fault]:
    """`barrier`: the comment of one in the main loop."""
    return [
        Fault(
            "spill",
            header,
            r"__launch_bounds__\(T::kThreads, T::kBlocksPerSM\)",
            r"__launch_bounds__(T::kThreads, 1024 / T::kThreads)",
            r"accesses to local memory|bytes of stack",
        ),
        Fault(
            "barrier",
            header,
            rf"__syncthreads\(\);  // {barrier}",
            rf"__syncthreads(); __syncthreads();  // {barrier}",
            r"barriers: expected \d+ \(baseline\)",
        ),
        Fault(
            "4-byte-load",
            "device.cuh",
            r'"ld\.shared\.v4\.b32 \{%0, %1, %2, %3\}, \[%4\];"',
            # volatile: else ptxas makes one load of four neighbours
            '"ld.volatile.shared.b32 %0, [%4]; ld.volatile.shared.b32 %1, [%4+4]; '
            'ld.volatile.shared.b32 %2, [%4+8]; ld.volatile.shared.b32 %3, [%4+12];"',
            r"accesses of less than 16 bytes in the main loop",
        ),
    ]


DIRECT = "conv3x3_direct_kernel<Conv3x3DirectTraits<8, 8, 4, 32, 1, 8>>"  # the smallest: compiled in seconds
MMA = "conv3x3_mma_kernel<Conv3x3MmaTraits<(MmaType)0, 4, 2, 8, 1, 2, 1, false>>"
FAULTS = {
    DIRECT: faults("conv3x3_direct.cuh", "the chunk is complete"),
    MMA: faults("conv3x3_mma.cuh", "the next column is complete"),
}
MARKS = {DIRECT: (), MMA: (pytest.mark.slow,)}
SOUND = [pytest.param(kernel, id=kernel.split("_kernel")[0], marks=MARKS[kernel]) for kernel in FAULTS]
PLANTED = [
    pytest.param(kernel, fault, id=f"{kernel.split('_kernel')[0]}-{fault.name}", marks=MARKS[kernel])
    for kernel in FAULTS
    for fault in FAULTS[kernel]
]
Compile = Callable[[str, "Fault | None"], binary.Binary]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles a kernel with a fault planted in it, for one architecture."""
    if not os.environ.get("REPVGG_CUDA_GATE"):
        pytest.skip("`make cuda-build` runs it (REPVGG_CUDA_GATE is not set)")
    try:
        nvcc = sync.nvcc()
        sass.tool("nvdisasm")
        sass.tool("cuobjdump")
    except sass.ToolMissing as missing:
        pytest.skip(str(missing))

    @functools.cache
    def compile_one(kernel: str, fault: Fault | None) -> binary.Binary:
        folder = tmp_path_factory.mktemp("fault")
        csrc = Path(shutil.copytree(sync.CSRC, folder / "csrc"))
        if fault:
            fault.plant(csrc)
        source = sync.write_kernel(kernel, csrc, folder)
        target = source.with_suffix(".o")
        code = f"-gencode=arch=compute_{ARCH},code=[sm_{ARCH},compute_{ARCH}]"
        sass.run([nvcc, "-std=c++17", "-O3", code, f"-I{csrc}", "-c", str(source), "-o", str(target)])
        return gates.with_dynamic_shared(binary.read(target))

    return compile_one


def findings(module: binary.Binary, sound: binary.Binary) -> list[str]:
    """Of all gates, with the sound kernels as baseline: they are what the compiler at hand makes of them."""
    checks = (gates.check_memory, gates.check_occupancy, gates.check_main_loop)
    found = [finding for kernel in module.kernels for check in checks for finding in check(kernel)]
    found += gates.check_baseline(module.kernels, [gates.row(kernel) for kernel in sound.kernels])
    return [str(finding) for finding in found]


@pytest.mark.parametrize("kernel", SOUND)
def test_sound_kernels_pass(compiled: Compile, kernel: str) -> None:
    sound = compiled(kernel, None)
    assert findings(sound, sound) == []


@pytest.mark.parametrize(("kernel", "fault"), PLANTED)
def test_planted_fault_is_found(compiled: Compile, kernel: str, fault: Fault) -> None:
    found = findings(compiled(kernel, fault), compiled(kernel, None))
    print("\n".join(found))
    assert any(re.search(fault.found, finding) for finding in found), found
