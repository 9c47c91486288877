# SPDX-License-Identifier: MIT
"""The CUDA kernels on a CPU: tests/simt/ runs them in several orders of threads and under sanitizers.

docs/testing-cuda.md says how to run one kernel, one case, one mutant by hand.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simt import counts, harness, mutant_table, mutants

from repvgg_cuda import testing
from repvgg_cuda.testing import Case

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.simt,
    pytest.mark.skipif(sys.platform != "linux", reason="the executor uses Linux's mmap and GCC's sanitizers"),
    pytest.mark.skipif(harness.compiler() is None, reason="no C++ compiler (install g++ or set CXX)"),
]

Programs = Callable[[str], dict[str, Path]]


@pytest.fixture(scope="session")
def programs() -> Programs:
    """The programs of a mode, compiled when a test first asks for it; build/ keeps what is up to date."""
    pytest.importorskip("ninja", reason="the programs are compiled by ninja")
    built: dict[str, dict[str, Path]] = {}

    def get(mode: str) -> dict[str, Path]:
        if mode not in built:
            try:
                built[mode] = harness.build(ROOT / "build" / "simt" / mode, mode, ("driver", "selftest", "probes"))
            except subprocess.CalledProcessError as error:
                pytest.fail(f"the {mode} build fails\n{error.output}", pytrace=False)
        return built[mode]

    return get


# ------------------------------------------------------------------------------- the tester's own tests

EXIT = {"clean": 0, "wrong": 1, "diagnosis": 4, "address": 65, "race": 66}
ORDERS = {
    "plain": (("forward", 1), ("backward", 1), ("random", 4)),
    "asan": (("forward", 1), ("random", 4)),
    "tsan": (("forward", 2),),
}


def expected_exit(mode: str, expectation: str) -> tuple[int, str] | None:
    """Exit status and pattern of the report, as the head of selftest.cu has it. None: nothing that this mode sees."""
    words, _, pattern = expectation.partition("/")
    first = {"plain": ("wrong",), "asan": ("address", "wrong"), "tsan": ("race",)}[mode]
    for word in ("clean", *first):
        if word in words.split():
            return EXIT[word], ""
    return (EXIT["diagnosis"], pattern) if pattern else None


@pytest.mark.parametrize("mode", ["plain", "asan", "tsan"])
def test_planted_bugs_are_reported(mode: str, programs: Programs) -> None:
    program = programs(mode)["selftest"]
    problems = []
    for line in harness.run(mode, program).stdout.splitlines():
        name, expectation = line.split("\t")
        expected = expected_exit(mode, expectation)
        if expected is None:
            continue
        for order, blocks in ORDERS[mode]:
            result = harness.run(mode, program, name, order, str(blocks))
            right = result.returncode == expected[0] and re.search(expected[1], result.stderr)
            if not right or (expected[0] != 0 and "selftest.cu" not in result.stderr):
                problems.append(f"{name}, {order}: {expectation} expected, exit {result.returncode}\n{result.stderr}")
    assert not problems, "\n".join(problems)


def bits_to_float(bits: np.ndarray, kind: str) -> np.ndarray:
    """Elements of 32-bit registers, [..., elements in a register]."""
    if kind == "float16":
        return bits.astype("<u4").view("<f2").reshape(*bits.shape, 2).astype(np.float64)
    if kind == "bfloat16":
        halves = bits.astype("<u4").view("<u2").reshape(*bits.shape, 2).astype("<u4") << 16
        return halves.astype("<u4").view("<f4").astype(np.float64)
    if kind == "int8":
        return bits.astype("<u4").view("<i1").reshape(*bits.shape, 4).astype(np.int64)
    return (bits.astype("<u4") & np.uint32(0xFFFFE000)).view("<f4")[..., None].astype(np.float64)


def mma_expected(words: np.ndarray, kind: str) -> np.ndarray:
    """D of all lanes by the PTX ISA's formulas for element a_i, b_i, c_i of a lane, written per element."""
    a = bits_to_float(words[:, :4], kind).reshape(32, -1)
    b = bits_to_float(words[:, 4:6], kind).reshape(32, -1)
    n = a.shape[1]
    depth = 2 * n
    A, B = np.zeros((16, depth), a.dtype), np.zeros((depth, 8), a.dtype)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(n):
            if kind == "tf32":  # m16n8k8
                row, col = group + 8 * (i in (1, 3)), thread + 4 * (i in (2, 3))
            elif kind == "int8":  # m16n8k32
                row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
                col = thread * 4 + (i & 3) + (0 if i < 8 else 16)
            else:  # m16n8k16
                row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
                col = thread * 2 + (i & 1) + (0 if i < 4 else 8)
            A[row, col] = a[lane, i]
        for i in range(n // 2):
            if kind == "tf32":
                k = thread + 4 * i
            elif kind == "int8":
                k = thread * 4 + (i & 3) + (0 if i < 4 else 16)
            else:
                k = thread * 2 + (i & 1) + (0 if i < 2 else 8)
            B[k, group] = b[lane, i]
    product = A @ B
    lanes, i = np.arange(32)[:, None], np.arange(4)[None, :]
    return product[(lanes >> 2) + 8 * (i >= 2), (lanes % 4) * 2 + (i & 1)]


def check_mma(words: np.ndarray, out: np.ndarray, kind: str) -> None:
    product = mma_expected(words, kind)
    if kind == "int8":
        want = words[:, 6:10].astype("<i4") + product
        np.testing.assert_array_equal(out[:, :4].astype("<u4").view("<i4"), want.astype("<i4"))
        return
    start = words[:, 6:10].astype("<u4").view("<f4")
    got = np.ascontiguousarray(out[:, :4]).astype("<u4").view("<f4")
    np.testing.assert_allclose(got, start + product, rtol=0, atol=17 * 2.0**-24 * 64)
    if np.array_equal(product, np.round(product)):
        np.testing.assert_array_equal(got, (start + product).astype("<f4"))


@pytest.fixture(scope="module", params=[75, 80])
def probes(request: pytest.FixtureRequest, programs: Programs) -> dict[str, Any]:
    result = harness.run("plain", programs("plain")["probes"], str(request.param))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)["probes"]
    return {
        name: {key: np.array(probe[key], dtype=np.uint32).reshape(32, 12) for key in ("in", "out")}
        for name, probe in found.items()
    }


def test_probes_matrices(probes: dict[str, Any]) -> None:
    for name, matrices in (("x1", 1), ("x2", 2), ("x2_trans", 2), ("x4", 4), ("x4_trans", 4)):
        probe = probes[f"ldmatrix_{name}"]
        memory = np.ascontiguousarray(probe["in"]).reshape(-1).view("<u2").reshape(-1, 8)  # rows of 16 bytes
        rows = np.array([memory[(lane * 5 + 3) % 32] for lane in range(32)]).reshape(4, 8, 8)
        for lane in range(32):
            for i in range(matrices):
                matrix = rows[i].T if "trans" in name else rows[i]
                low, high = matrix[lane // 4, 2 * (lane % 4)], matrix[lane // 4, 2 * (lane % 4) + 1]
                assert probe["out"][lane, i] == int(low) | int(high) << 16, (name, lane, i)
    probe = probes["movmatrix"]
    matrix = np.ascontiguousarray(probe["in"][:, 0]).view("<u2").reshape(8, 8)
    np.testing.assert_array_equal(np.ascontiguousarray(probe["out"][:, 0]).view("<u2").reshape(8, 8), matrix.T)


def test_probes_mma(probes: dict[str, Any]) -> None:
    kinds = {name: name.split("_")[1] for name in probes if name.startswith("mma_")}
    assert "mma_float16" in kinds
    for name, kind in kinds.items():
        check_mma(probes[name]["in"], probes[name]["out"], kind)


def test_probes_rounding(probes: dict[str, Any]) -> None:
    probe = probes["pack_pair_float16"]
    floats = np.ascontiguousarray(probe["in"]).view("<f4")
    with np.errstate(over="ignore"):
        halves = floats.astype("<f2")
    np.testing.assert_array_equal(np.ascontiguousarray(probe["out"][:, :6]).view("<u2"), halves.view("<u2"))
    probe = probes["pack_pair_bfloat16"]
    bits = np.ascontiguousarray(probe["in"]).astype(np.uint64)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    np.testing.assert_array_equal(np.ascontiguousarray(probe["out"][:, :6]).view("<u2"), nearest.astype("<u2"))
    if "round_tf32" in probes:
        probe = probes["round_tf32"]
        wide = np.ascontiguousarray(probe["in"]).view("<f4").astype(np.float64)
        mantissa, exponent = np.frexp(wide)
        with np.errstate(invalid="ignore", over="ignore"):  # ties away from zero, 11 bits with the leading one
            ties_away = np.ldexp(np.copysign(np.floor(np.abs(mantissa) * 2048 + 0.5), mantissa) / 2048, exponent)
            normal = (np.abs(wide) >= 2.0**-126) & np.isfinite(wide)
            got = np.ascontiguousarray(probe["out"]).view("<f4").astype(np.float64)
            np.testing.assert_array_equal(got[normal], ties_away.astype("<f4").astype(np.float64)[normal])


def test_probes_memory(probes: dict[str, Any]) -> None:
    words, out = probes["shared_16"]["in"].reshape(-1)[:128].reshape(32, 4), probes["shared_16"]["out"]
    np.testing.assert_array_equal(out[:, :4], words[np.arange(32) ^ 7][:, ::-1])
    words, out = probes["global"]["in"][:, 4:8], probes["global"]["out"]
    np.testing.assert_array_equal(out[:, 4:8], words[:, [1, 2, 3, 0]])
    np.testing.assert_array_equal(out[:, 1:4], words[:, [2, 0, 1]])
    assert not out[:, 0].any()  # dynamic memory begins at a multiple of 1024
    words, out = probes["copy_async"]["in"], probes["copy_async"]["out"]
    for lane in range(32):
        sizes = np.repeat([lane // 2 % 9 * 2, 16, lane % 2 * 16], 16)
        kept = np.where(np.arange(48) % 16 < sizes, np.ascontiguousarray(words[lane]).view("u1"), 0)
        np.testing.assert_array_equal(np.ascontiguousarray(out[lane]).view("u1"), kept)


def test_probes_other_loads(probes: dict[str, Any]) -> None:
    words, out = probes["copy_async_4"]["in"], probes["copy_async_4"]["out"]
    copied = (np.arange(12)[None, :] + np.arange(32)[:, None]) % 3 != 0
    np.testing.assert_array_equal(out, np.where(copied, words, 7))
    words, out = probes["global_loads"]["in"], probes["global_loads"]["out"]
    np.testing.assert_array_equal(out[:, :7], words[:, [8, 9, 10, 11, 2, 3, 6]])
    words, out = probes["load_float"]["in"], probes["load_float"]["out"]
    halves = np.ascontiguousarray(words[:, :2])
    np.testing.assert_array_equal(out[:, :4], words[:, :4])
    np.testing.assert_array_equal(out[:, 4:8], halves.view("<f2").astype("<f4").view("<u4"))
    np.testing.assert_array_equal(out[:, 8:], halves.view("<u2").astype("<u4") << 16)


def test_probes_warp(probes: dict[str, Any]) -> None:
    words, out = probes["warp"]["in"], probes["warp"]["out"]
    value, lane = words[:, 0], np.arange(32)
    sources = [
        words[:, 1] % 32,
        lane // 8 * 8 + 5,
        np.where(lane < 3, lane, lane - 3),
        np.where(lane % 16 + 3 > 15, lane, lane + 3),
        lane ^ 9,
        np.where((lane ^ 9) >= lane // 8 * 8 + 8, lane, lane ^ 9),
    ]
    for i, source in enumerate(sources):
        np.testing.assert_array_equal(out[:, i], value[source])
    assert (out[:, 6] == sum(int(v & 1) << i for i, v in enumerate(value))).all()
    assert (out[:, 7] == 0).all()
    assert (out[:, 8] == 1).all()
    assert (out[:16, 9] == sum(int(v >> 1 & 1) << i for i, v in enumerate(value[:16]))).all()


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_120"])
def test_probes_compile_for_gpus(arch: str, tmp_path: Path) -> None:
    """`make gpu-check` compiles them on the machine with the GPU: it must not fail there for the first time."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    flags = ("-std=c++20", f"-arch={arch}", "-Werror", "all-warnings", f"-I{harness.CSRC}", "-c")
    result = subprocess.run(
        [nvcc, *flags, harness.SIMT / "probes.cu", "-o", tmp_path / "probes.o"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


# ------------------------------------------------------------------------------------------ the kernels

DTYPES = ("float32", "float16", "bfloat16")


def scaled(case: Case, most: int) -> Case:
    """A case of the common lists, with extents that run in seconds: those beyond `most` are cut, their tails kept."""

    def cut(extent: int, most: int) -> int:
        return extent if extent <= most else most - most % 8 + extent % 8

    image, channels = most, max(16, 4 * most)
    C, K = (cut(c // case.groups, channels // case.groups) * case.groups for c in (case.C, case.K))
    return Case(case.name, case.N, C, cut(case.H, image), cut(case.W, image), K, case.stride, case.groups)


def conv_cases(cases: tuple[Case, ...], most: int, layouts: tuple[str, ...] = ("nchw", "nhwc")) -> Iterator[str]:
    """The driver's arguments; bias and activation take turns. No empty batch: ops/ returns before a row sees it."""
    i = 0
    for case in cases:
        if case.N == 0:
            continue
        c = scaled(case, most)
        for dtype in DTYPES:
            for layout in layouts:
                i += 1
                epilogue = ("relu" if i % 3 else "identity", "bias" if i % 4 else "none")
                numbers = (c.N, c.C, c.H, c.W, c.K, c.stride, c.groups)
                yield ",".join(map(str, (*numbers, dtype, layout, *epilogue)))


FUSE_CASES = tuple(
    f"fuse,{K},{C},{dtype},{branches}"
    for dtype in ("float64", *DTYPES)
    for K, C, branches in (
        (12, 12, "1,1,1,bn,none"),
        (1, 1, "0,0,1,bn,none"),
        (5, 40, "2,1,0,bn,bn"),
        (8, 3, "1,0,0,none,none"),
        (6, 2, "4,1,1,bn,none"),
    )
) + ("fuse,12,12,float16,1,1,1,bn,none+fuse,5,40,float32,2,1,0,bn,bn+fuse,7,4,bfloat16,1,0,0,bn,none",)
#: Folded and packed at a time: padded chunks, an odd number of them, groups, fragments that are not full.
PACKED_FUSE_CASES = (
    "fuse,40,24,float16,1,1,0,bn,none,2,both",
    "fuse,24,8,bfloat16,1,1,1,bn,bn,1,packed",
    "fuse,24,20,float32,1,1,0,bn,none,2,both",
    "fuse,12,12,float32,1,0,0,bn,none,1,packed",
    "fuse,6,5,float64,1,1,0,bn,none+fuse,96,40,float16,1,1,0,bn,none,1,both+fuse,8,3,float16,1,1,0,bn,none",
)
#: Channels that fill tensor-core tiles and pipelines, with ragged edges around them.
DEEP_CASES = (
    Case("deep", 1, 64, 9, 11, 128),
    Case("deep", 2, 96, 8, 16, 72, stride=2),
    Case("deep-g2", 1, 128, 10, 9, 96, groups=2),
    Case("virtual-rows", 5, 32, 14, 14, 32),
    Case("stem", 1, 3, 17, 18, 24, stride=2),
)
ALL_CASES = (*testing.EDGE_CASES, *DEEP_CASES, *testing.REPVGG_LAYERS)


def drive(mode: str, program: Path, cases: list[str], *options: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Runs the cases and returns the line of every row and case; fails on any report."""
    result = harness.run(mode, program, *options, *cases)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    wrong = [line for line in lines if not line.get("ok", True)]
    shown = "\n".join([*map(str, wrong[:5]), result.stderr[:5000]])
    assert result.returncode == 0, f"exit {result.returncode} of {program} {' '.join(options)}\n{shown}"
    assert not result.stderr
    return {(line["row"], line["case"]): line for line in lines if "row" in line}


def ran(lines: dict[tuple[str, str], dict[str, Any]]) -> dict[str, int]:
    """Cases that each row accepted."""
    counts: dict[str, int] = {}
    for (row, _), line in lines.items():
        counts[row] = counts.get(row, 0) + ("refused" not in line)
    return counts


def test_every_order_of_threads(programs: Programs, record_property: Callable[[str, object], None]) -> None:
    """Every row and dtype, in three orders of threads and two of blocks, ends with the same, right bits."""
    cases = [*conv_cases(ALL_CASES, 14), *FUSE_CASES, *PACKED_FUSE_CASES]
    program = programs("plain")["driver"]
    forward = drive("plain", program, cases, "--schedule", "forward", "--guard", "before", "--reach", "yes")
    for options in (("backward", "--blocks-at-once", "3"), ("random:1", "--blocks-at-once", "4")):
        other = drive("plain", program, cases, "--schedule", *options)
        assert {key: line.get("bits") for key, line in other.items()} == {
            key: line.get("bits") for key, line in forward.items()
        }
    counts = ran(forward)
    record_property("cases", counts)
    assert all(counts.values()), f"a row that no case runs: {counts}"


def tiles() -> list[tuple[int, int, bool, bool]]:
    """Output channels, stride, joined, split of every tile of the tensor-core rows (csrc/cuda/mma_tiles.h)."""
    text = (harness.CSRC / "cuda" / "mma_tiles.h").read_text()
    rows = [[field.strip() for field in row.split(",")] for row in re.findall(r"^    \{([^}]*)\},", text, re.MULTILINE)]
    return [(16 * int(r[0]) * int(r[1]), int(r[5]), r[6] == "true", r[8] == "true") for r in rows]


@pytest.mark.parametrize("tile", range(len(tiles())))
def test_every_tensor_core_tile(tile: int, programs: Programs) -> None:
    """Whole tiles and ragged ones, full chunks and padded ones, groups; the same bits in every order of threads."""
    channels, stride, joined, split = tiles()[tile]
    ragged = channels + 24 if channels % 32 == 0 else channels - 8
    width = 15 if joined else 19
    shapes = [
        (3 if joined else 1, 48, 9, width, channels, stride, 1),
        (2, 8, 8, 32, ragged, stride, 1),
        (2, 80, 5, 14 if joined else 5, 2 * ragged, stride, 2),
    ]
    cases = [
        ",".join(map(str, (*shape, dtype, "nhwc", *epilogue)))
        for shape, epilogue in zip(shapes, (("relu", "bias"), ("identity", "none"), ("relu", "none")), strict=True)
        for dtype in ("float16", "bfloat16", "float32")
    ]
    program = programs("plain")["driver"]
    for parts in (1, 2, 3) if split else (1,):
        options = ("--tile", str(tile), "--split", str(parts))
        forward = drive("plain", program, cases, "--algorithm", "mma", *options, "--guard", "before")
        other = drive("plain", program, cases, "--algorithm", "mma", *options, "--schedule", "random:5")
        assert ran(forward) == {"mma": 6}
        assert {key: line.get("bits") for key, line in forward.items()} == {
            key: line.get("bits") for key, line in other.items()
        }
        tf32 = drive("plain", program, cases, "--algorithm", "mma_tf32", *options)
        assert ran(tf32)["mma_tf32"] in (0, 3)  # not every tile is compiled for it


#: For the tiles of `direct`, by what one multiprocessor makes of them: whole and ragged, in both layouts and strides.
DIRECT_CASES = (
    *("8,3,16,16,64,1,1,nchw,relu,bias", "8,3,15,14,60,1,1,nhwc,relu,bias", "8,12,16,16,128,1,2,nhwc,relu,bias"),
    *("8,3,16,16,32,1,1,nhwc,relu,bias", "12,3,15,15,31,1,1,nchw,identity,none", "16,3,8,8,64,1,1,nchw,relu,bias"),
    *("16,3,7,7,62,1,1,nhwc,relu,bias", "8,3,9,17,130,1,1,nhwc,identity,none", "8,3,31,32,64,2,1,nhwc,relu,bias"),
    *("8,3,30,29,63,2,1,nchw,relu,bias", "8,5,31,32,32,2,1,nchw,relu,bias", "10,3,29,31,30,2,1,nhwc,relu,none"),
    *("16,3,14,14,64,2,1,nhwc,relu,bias", "16,4,13,14,60,2,1,nchw,relu,bias", "2,5,9,9,9,2,1,nchw,relu,bias"),
)


def test_every_tile_of_direct(programs: Programs) -> None:
    """All tiles of the menu, for both strides, give the bits of one chain; with slices, the same in every order."""
    program = programs("plain")["driver"]
    cases = [case.replace(",n", ",float32,n", 1) for case in DIRECT_CASES]
    options = ("--multiprocessors", "1", "--blocks-at-once", "3")
    lines = drive("plain", program, cases, "--algorithm", "direct", *options)
    assert {line["check"] for line in lines.values()} == {"bits"}
    tiles = {(case.split(",")[5], *line["tile"]) for (_, case), line in lines.items()}
    assert tiles == {(s, *tile) for s in "12" for tile in ((64, 8, 16), (32, 8, 16), (64, 8, 8), (16, 8, 8))}
    split = [
        drive("plain", program, cases, "--algorithm", "direct_split", *options, "--schedule", schedule)
        for schedule in ("forward", "backward", "random:9")
    ]
    assert {line["split"] for line in split[0].values()} >= {2}
    bits = [{key: line["bits"] for key, line in each.items()} for each in split]
    assert bits[0] == bits[1] == bits[2]


@pytest.mark.parametrize(("capability", "multiprocessors"), [(75, 40), (86, 4), (90, 132), (120, 170)])
def test_other_gpus(capability: int, multiprocessors: int, programs: Programs) -> None:
    """What depends on the GPU: copies that are not asynchronous, less shared memory, overlapping launches, tiles."""
    cases = [*conv_cases((*DEEP_CASES, *testing.EDGE_CASES[3:7]), 14)]
    options = ("--capability", str(capability), "--multiprocessors", str(multiprocessors), "--blocks-at-once", "2")
    assert ran(drive("plain", programs("plain")["driver"], cases, *options))


def test_memory(programs: Programs) -> None:
    cases = [*conv_cases(ALL_CASES, 10), *FUSE_CASES, *PACKED_FUSE_CASES]
    assert all(ran(drive("asan", programs("asan")["driver"], cases, "--schedule", "random:2")).values())


def test_races(programs: Programs) -> None:
    cases = [*conv_cases((*testing.EDGE_CASES[:13], *DEEP_CASES), 8), *FUSE_CASES[:5], *PACKED_FUSE_CASES]
    options = ("--schedule", "random:3", "--blocks-at-once", "2", "--capability", "90")
    assert all(ran(drive("tsan", programs("tsan")["driver"], cases, *options)).values())


#: Cases whose interior is large beside their border.
COUNTED = {
    "mma": ("1,32,24,48,128,1,1,float16,nhwc,relu,bias", "2,32,14,14,64,1,1,bfloat16,nhwc,relu,bias"),
    "direct": ("1,8,32,32,64,1,1,float32,nchw,relu,bias", "1,8,32,32,64,2,1,float32,nhwc,relu,bias"),
}


@pytest.mark.parametrize("row", COUNTED)
def test_no_bank_conflicts(row: str, programs: Programs) -> None:
    """Vector accesses of shared memory take the ideal number of wavefronts; tensor cores' global ones, of sectors."""
    for options in ((), ("--multiprocessors", "1"), ("--capability", "90")):
        costs = counts.measure(programs("count")["driver"], "--algorithm", row, *options, *COUNTED[row])
        vectors = [cost for cost in costs if cost.space == "shared" and cost.bytes == 16]
        assert sum(cost.requests for cost in vectors) > 100
        found = counts.conflicts(costs)
        assert not found, "\n".join(map(str, found))
        if row == "mma":
            copies = [cost for cost in costs if cost.space == "global" and cost.bytes == 16 and "mma" in cost.kernel]
            scattered = [cost for cost in copies if cost.cost != cost.ideal]
            assert copies
            assert not scattered, "\n".join(map(str, scattered))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_weights_are_packed_without_bank_conflicts(dtype: str, programs: Programs) -> None:
    """What fuse_weights collects for a fragment, and what packing a weight does, in one run."""
    case = f"fuse,64,64,{dtype},1,1,1,bn,none,1,both"
    costs = counts.measure(programs("count")["driver"], "--algorithm", "fuse_weights", case)
    assert not counts.conflicts(costs)
    for kernel in ("fuse_weights", "pack weights"):
        reads = [cost for cost in costs if kernel in cost.kernel and cost.place.startswith("packed_layout.h")]
        assert sum(cost.requests for cost in reads) > 1000
        assert all(cost.cost == cost.ideal for cost in reads), "\n".join(map(str, reads))


# ------------------------------------------------------------------------------------------------------------ mutants


def test_mutants_are_found_in_the_kernels() -> None:
    """An entry of the table whose code is gone raises LookupError, which says so."""
    found = mutants.all_mutants()
    files = {mutant.file for mutant in found}
    barriers = sum(
        len(re.findall(r"__syncthreads\(\);", mutants.code_of(path.read_text())))
        for path in (harness.CSRC / "cuda").glob("*.cu*")
        if not path.name.startswith("device")
    )
    assert sum(mutant.plants == "no barrier" for mutant in found) == barriers > 0
    kernels = {path.name for path in (harness.CSRC / "cuda").glob("*.cuh") if not path.name.startswith("device")}
    assert kernels <= files


def test_a_sample_of_mutants_is_reported(programs: Programs) -> None:
    """All of them: python tests/simt/mutants.py. The sample is of kernels that compile in seconds."""
    quick = [
        mutant
        for mutant in mutants.all_mutants()
        if mutant.file not in mutant_table.UNITS and mutant.file != "conv3x3_mma.cuh"
    ]
    sample = random.Random(20).sample(quick, 6)
    for mode in harness.MODES:
        programs(mode)
    outcomes = mutants.trial(sample)
    assert all(outcome.as_expected for outcome in outcomes), mutants.table(outcomes)
