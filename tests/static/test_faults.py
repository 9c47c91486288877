# SPDX-License-Identifier: MIT
"""The gates can fail: faults are planted in a copy of the kernels, each must be found for what it is."""

from __future__ import annotations

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

pytestmark = pytest.mark.slow
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


#: Source -> the faults planted in it.
FAULTS = {
    "conv3x3_direct.cu": [
        # As many blocks as leave a thread 64 registers.
        Fault(
            "spill",
            "conv3x3_direct.cuh",
            r"__launch_bounds__\(([^;{]*?), T::kBlocksPerSM\)",
            r"__launch_bounds__(\1, 1024 / T::kThreads)",
            r"accesses to local memory|bytes of stack",
        ),
        Fault(
            "barrier",
            "conv3x3_direct.cuh",
            r"__syncthreads\(\);  // the chunk is complete",
            r"__syncthreads(); __syncthreads();  // the chunk is complete",
            r"barriers: expected \d+ \(baseline\)",
        ),
        Fault(
            "4-byte load",
            "conv3x3_direct.cuh",
            r"kWeightPitch = kBlockK \+ 4",
            r"kWeightPitch = kBlockK + 5",
            r"accesses of less than 16 bytes in the main loop",
        ),
    ],
}
PLANTED = [pytest.param(source, fault, id=f"{source}-{fault.name}") for source in FAULTS for fault in FAULTS[source]]
Compile = Callable[[str, "Fault | None"], binary.Binary]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles a source with a fault planted in it, for one architecture."""
    try:
        nvcc = sync.nvcc()
        sass.tool("nvdisasm")
        sass.tool("cuobjdump")
    except sass.ToolMissing as missing:
        pytest.skip(str(missing))
    done: dict[tuple[str, Fault | None], binary.Binary] = {}

    def compile_one(source: str, fault: Fault | None) -> binary.Binary:
        if (source, fault) not in done:
            folder = tmp_path_factory.mktemp("fault")
            csrc = Path(shutil.copytree(sync.CSRC, folder / "csrc"))
            if fault:
                fault.plant(csrc)
            target = folder / "kernels.o"
            code = f"-gencode=arch=compute_{ARCH},code=[sm_{ARCH},compute_{ARCH}]"
            sass.run(
                [nvcc, "-std=c++17", "-O3", code, f"-I{csrc}", "-c", str(csrc / "cuda" / source), "-o", str(target)]
            )
            done[source, fault] = gates.with_dynamic_shared(binary.read(target), csrc)
        return done[source, fault]

    return compile_one


def findings(module: binary.Binary, sound: binary.Binary) -> list[str]:
    """Of all gates, with the sound kernels as baseline: they are what the compiler at hand makes of them."""
    checks = (gates.check_memory, gates.check_occupancy, gates.check_main_loop)
    found = [finding for kernel in module.kernels for check in checks for finding in check(kernel)]
    found += gates.check_baseline(module.kernels, [gates.row(kernel) for kernel in sound.kernels])
    return [str(finding) for finding in found]


@pytest.mark.parametrize("source", FAULTS)
def test_sound_kernels_pass(compiled: Compile, source: str) -> None:
    sound = compiled(source, None)
    assert findings(sound, sound) == []


@pytest.mark.parametrize(("source", "fault"), PLANTED)
def test_planted_fault_is_found(compiled: Compile, source: str, fault: Fault) -> None:
    found = findings(compiled(source, fault), compiled(source, None))
    print("\n".join(found))
    assert any(re.search(fault.found, finding) for finding in found), found
