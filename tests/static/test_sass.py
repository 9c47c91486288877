# SPDX-License-Identifier: MIT
"""The reading of compiled code itself: loops, mixes and occupancy, on small known inputs. Needs no compiled module."""

from __future__ import annotations

import subprocess
from pathlib import Path

import aims
import pipeline
import pytest
import sass
import sync
from binary import Kernel
from occupancy import LIMITS, blocks_per_sm

# A tensor loop that a load loop precedes, with a tail behind its branch, as nvdisasm prints it.
LISTING = """
.text._Z6kernelv:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R2, [R4.64] ;
        /*0020*/              @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   LDSM.16.M88.4 R8, [R3] ;
        /*0040*/                   LDS.128 R12, [R3+0x100] ;
        /*0050*/                   LDS.U.64 R16, [R3+0x200] ;
        /*0060*/                   HMMA.16816.F32 R20, R8, R12, R20 ;
        /*0070*/                   HMMA.16816.F32.BF16 R24, R8, R14, R24 ;
        /*0080*/              @!PT LDS RZ, [RZ] ;
        /*0090*/                   NOP ;
        /*00a0*/              @!P1 BRA `(.L_x_4) ;
.L_x_3:
        /*00b0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00c0*/              @P4 CALL.REL.NOINC `(.L_x_5) ;
        /*00d0*/                   BRA `(.L_x_2) ;
.L_x_5:
        /*00e0*/                   STG.E.128 [R4.64], R20 ;
        /*00f0*/                   EXIT ;
.L_x_4:
        /*0100*/                   LDGSTS.E.BYPASS.128 [R3], [R4.64] ;
        /*0110*/                   BRA `(.L_x_3) ;
        /*0120*/                   FFMA R1, R1, R1, R1 ;
.L_x_6:
        /*0130*/                   BRA `(.L_x_6) ;
        /*0140*/                   NOP;

//--------------------- .nv.info
        /*0000*/        .byte   0x04, 0x37 ;
"""


@pytest.fixture
def code() -> sass.Code:
    return sass.parse(LISTING)["_Z6kernelv"]


def test_main_loop_is_the_one_that_computes(code: sass.Code) -> None:
    loop = code.main_loop
    assert len(code.loops) == 2  # the code behind the kernel's end is no part of it
    assert (loop.math_kind, loop.math) == ("HMMA", 2)
    # The block behind the kernel's EXIT belongs to the loop, the store before it does not; fillers are not counted.
    assert loop.kinds == {"LDSM": 1, "LDS": 2, "HMMA": 2, "BRA": 4, "BAR": 1, "LDGSTS": 1}
    assert loop.share == pytest.approx(2 / 11)


def test_narrow_accesses_are_named(code: sass.Code) -> None:
    assert code.main_loop.narrow(sass.SHARED, below=16) == "LDS.U.64 x1"
    assert code.mix.narrow(sass.GLOBAL, below=16) == "LDG.E x1"


@pytest.mark.parametrize(
    ("opcode", "width"),
    [
        ("LDS", 4),
        ("LDS.U.128", 16),
        ("LDS.U8", 1),
        ("LDG.E.U16.SYS", 2),
        ("STG.E.64", 8),
        ("LDG.E.ENL2.256", 32),
        ("LDSM.16.M88.4", 16),
        ("LDSM.16.MT88.2", 8),
        ("LDSM.16.M88", 4),
        ("LDGSTS.E.BYPASS.LTC128B.128", 16),
        ("LDGSTS.E.LTC128B", 4),
    ],
)
def test_width(opcode: str, width: int) -> None:
    assert sass.Instruction(f"{opcode} R0, [R1]").width == width


def test_inner_loop_is_preferred_to_the_one_around_it() -> None:
    text = """.text.k:
.L_x_1:
        /*0000*/ FFMA R1, R1, R1, R1 ;
.L_x_2:
        /*0010*/ FFMA R1, R1, R1, R1 ;
        /*0020*/ @P0 BRA `(.L_x_2) ;
        /*0030*/ BRA.U UP0, `(.L_x_1) ;
        /*0040*/ EXIT ;
"""
    assert sass.parse(text)["k"].main_loop.total == 2


def test_names_are_short() -> None:
    try:
        names = sass.demangle(["_ZN6repvgg4cuda1kINS0_1TILi3ELNS_6LayoutE1EEEEEvNS_1PEPKf", "plain"])
    except sass.ToolMissing as missing:
        pytest.skip(str(missing))
    assert list(names.values()) == ["k<T<3, (Layout)1>>", "plain"]


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "blocks"),
    [
        (80, 32, 256, 0, 8),  # by threads
        (80, 255, 128, 0, 2),  # by registers
        (80, 128, 128, 48 * 1024, 3),  # by shared memory
        (86, 224, 128, 48384, 2),  # two blocks of 47.25 KB and 1 KB each in 100 KB
        (86, 224, 128, 54144, 1),
        (75, 128, 128, 32 * 1024, 2),
        (75, 128, 128, 65 * 1024, 0),  # does not fit
        (90, 168, 128, 48 * 1024, 3),
        (120, 32, 32, 0, 24),  # by blocks
    ],
)
def test_occupancy_by_hand(arch: int, registers: int, threads: int, shared: int, blocks: int) -> None:
    assert blocks_per_sm(arch, registers, threads, shared) == blocks


ORACLE = r"""
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int arch, warps, shared_per_block, shared, blocks;
  while (std::scanf("%d %d %d %d %d", &arch, &warps, &shared_per_block, &shared, &blocks) == 5) {
    cudaOccDeviceProp device{};
    device.computeMajor = arch / 10;
    device.computeMinor = arch % 10;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = warps * 32;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 * 1024;
    device.sharedMemPerMultiprocessor = shared;
    device.numSms = 1;
    device.sharedMemPerBlockOptin = shared_per_block;
    device.reservedSharedMemPerBlock = arch >= 80 ? 1024 : 0;
    for (int registers = 16; registers <= 255; registers += 13) {
      for (int threads = 32; threads <= 1024; threads += 96) {
        for (int bytes = 0; bytes <= shared_per_block; bytes += 5000) {
          cudaOccFuncAttributes kernel{};
          kernel.maxThreadsPerBlock = 1024;
          kernel.numRegs = registers;
          kernel.maxDynamicSharedSizeBytes = bytes;
          kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
          cudaOccDeviceState state{};
          state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
          cudaOccResult result{};
          cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, bytes);
          std::printf("%d %d %d %d %d\n", arch, registers, threads, bytes, result.activeBlocksPerMultiprocessor);
        }
      }
    }
  }
}
"""


def test_occupancy_agrees_with_the_toolkit(tmp_path: Path) -> None:
    """cuda_occupancy.h is NVIDIA's formula for the host; it takes the sizes of a multiprocessor from us."""
    try:
        nvcc = sync.nvcc()
    except sass.ToolMissing as missing:
        pytest.skip(str(missing))
    (tmp_path / "oracle.cpp").write_text(ORACLE)
    program = str(tmp_path / "oracle")
    build = subprocess.run(
        [nvcc, "-cudart=none", str(tmp_path / "oracle.cpp"), "-o", program], capture_output=True, text=True
    )
    if build.returncode and "cuda_occupancy.h" in build.stderr:
        pytest.skip("this toolkit has no cuda_occupancy.h")
    assert build.returncode == 0, build.stderr
    devices = "\n".join(
        f"{arch} {limits.warps} {limits.shared_per_block} {limits.shared} {limits.blocks}"
        for arch, limits in LIMITS.items()
    )
    lines = sass.run([program], input=devices).splitlines()
    assert len(lines) > 10_000
    for line in lines:
        arch, registers, threads, shared, blocks = map(int, line.split())
        assert blocks_per_sm(arch, registers, threads, shared) == blocks, line


# ------------------------------------------------------------------------------------------------------ the scheduler


def step(text: str, stall: int = 1, writes: int = 7, reads: int = 7, waits: int = 0) -> sass.Instruction:
    """An instruction as ptxas encodes when it and what follows may issue; ``waits``: a mask of counters."""
    return sass.Instruction(text, (stall | writes << 5 | reads << 8 | waits << 11) << 41)


HMMA, LDS = "HMMA.16816.F32 R20, R8, R12, R20", "LDS.128 R8, [R3]"


def test_what_an_instruction_says_of_its_issue() -> None:
    text = LISTING.replace(
        "HMMA.16816.F32 R20, R8, R12, R20 ;",
        "HMMA.16816.F32 R20, R8, R12, R20 ; /* 0x0000000c0814723c */\n   /* 0x004fe20000001814 */",
    )
    (found,) = (i for i in sass.parse(text)["_Z6kernelv"].instructions if i.text == HMMA)
    assert pipeline.control(found) == pipeline.Control(stall=1, writes=7, reads=7, waits=(2,))


def test_a_loop_without_gaps_is_busy() -> None:
    assert pipeline.utilisation(sass.Mix((step(HMMA),) * 4), 1) == 1.0
    assert pipeline.utilisation(sass.Mix((step(HMMA, stall=15),) * 4), 1) == pytest.approx(8 / 15, abs=0.02)
    assert pipeline.utilisation(sass.Mix((step("MOV R1, R2"),)), 1) == 0.0


def test_a_second_warp_fills_what_waiting_leaves() -> None:
    """A load, and the product that waits for it: 33 clocks, then 8."""
    loop = sass.Mix((step(LDS, writes=0), step(HMMA, stall=8, waits=1)))
    alone = pipeline.utilisation(loop, 1)
    assert alone == pytest.approx(8 / (pipeline.SHARED_LATENCY + 8), rel=0.1)
    assert 1.5 * alone < pipeline.utilisation(loop, 2) <= 2.1 * alone


def test_the_aims_are_read_off_a_kernel() -> None:
    """10 x 18 pixels and 9 x 128 weights, 32 bytes each, for 128 x 128 outputs and 9 taps."""
    name = "conv3x3_mma_kernel<Conv3x3MmaTraits<(MmaType)0, 4, 2, 8, 1, 2, 1, false>>"
    kernel = Kernel(name, 80, 216, 0, 0, 0, 128, 2, sass.Code("kernel"), 48384)
    tile = aims.tile_of(kernel)
    assert tile is not None
    assert str(tile) == "float16 128x8x16"
    assert aims.copied_bytes(kernel, tile) == pytest.approx((10 * 18 + 9 * 128) * 32 / 9)
    found = {row[0]: row[3] for row in aims.rows([kernel])}
    assert found["registers of a thread, sm_80 and later"] == "at most 216 (float16 128x8x16, sm_80)"
    assert found["blocks on a multiprocessor, sm_80 and later"] == "2 or more"
    assert found["kernels that spill, any architecture"] == "0 of 1"
    assert aims.tile_of(Kernel("pack_stem_kernel", 80, 20, 0, 0, 0, 64, 1, sass.Code("pack"))) is None
