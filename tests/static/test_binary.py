# SPDX-License-Identifier: MIT
"""Gates on the compiled CUDA code: every architecture is there, nothing spills, blocks per multiprocessor are as
declared, main loops consist of what they should. Needs no GPU.

Run by `make cuda-build` on the module it built, else on the installed one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import binary
import gates
import pytest
import sass

from repvgg_cuda import _ext

GATE = os.environ.get("REPVGG_CUDA_GATE")


def read(disassemble: bool) -> binary.Binary:
    try:
        if GATE:
            return binary.read(next(Path(GATE).glob("repvgg_cuda/_C*")), disassemble)
        if _ext.module is None or not _ext.has_cuda_kernels():
            pytest.skip("this build has no CUDA kernels")
        if _ext.build_info()["debug"]:
            pytest.skip("this is a debug build: its code is not what users run")
        assert _ext.module.__file__ is not None
        return binary.read(Path(_ext.module.__file__), disassemble)
    except sass.ToolMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def module() -> binary.Binary:
    """Without the kernels' code unless `make cuda-build` asks: to read it takes a minute."""
    return read(disassemble=bool(GATE))


@pytest.fixture(scope="module")
def disassembled(module: binary.Binary) -> binary.Binary:
    if not GATE:
        pytest.skip("`make cuda-build` reads the code")
    return module


def fail_with(findings: Iterable[object]) -> None:
    lines = [str(finding) for finding in findings]
    if lines:
        pytest.fail(f"{len(lines)} findings:\n" + "\n".join(lines), pytrace=False)


def check_each(module: binary.Binary, gate: Callable[[binary.Kernel], Iterable[gates.Finding]]) -> None:
    fail_with(finding for kernel in module.kernels for finding in gate(kernel))


def with_dynamic_shared(module: binary.Binary) -> binary.Binary:
    try:
        return gates.with_dynamic_shared(module)
    except sass.ToolMissing as missing:
        pytest.skip(str(missing))


def test_every_architecture_is_in_the_binary(module: binary.Binary) -> None:
    if GATE:
        expected, newest = {75, 80, 86, 89, 90, 100, 120}, {120}
    else:
        built = _ext.build_info()["cuda_archs"]
        numbers = {arch: int(arch.removesuffix("+PTX").rstrip("af").replace(".", "")) for arch in built}
        expected, newest = set(numbers.values()), {numbers[arch] for arch in built if arch.endswith("+PTX")}
    assert module.archs == expected
    assert module.ptx_archs == newest


def test_every_kernel_is_on_every_architecture(module: binary.Binary) -> None:
    places = {kernel.place for kernel in module.kernels}
    names = {name for name, _ in places}
    for name in ("conv3x3_direct_kernel", "fuse_weights_kernel"):
        assert any(kernel.startswith(name) for kernel in names), name
    fail_with(
        f"{name} sm_{arch}: not in the binary"
        for name in sorted(names)
        for arch in sorted(module.archs)
        if (name, arch) not in places
    )


def test_no_kernel_uses_local_memory(module: binary.Binary) -> None:
    check_each(module, gates.check_memory)


def test_blocks_per_multiprocessor_are_as_declared(module: binary.Binary) -> None:
    if not module.ptx_archs:
        pytest.skip("launch bounds stand in the PTX, of which this build has none (TORCH_CUDA_ARCH_LIST without +PTX)")
    check_each(with_dynamic_shared(module), gates.check_occupancy)


def test_main_loops_are_made_of_what_they_should_be(disassembled: binary.Binary) -> None:
    check_each(disassembled, gates.check_main_loop)


def test_nothing_is_worse_than_the_baseline(disassembled: binary.Binary) -> None:
    path = gates.baseline_folder(disassembled) / "kernels.csv"
    if not path.is_file():
        pytest.skip(f"no baseline for ptxas {disassembled.compiler}: make static-baseline")
    kernels = with_dynamic_shared(disassembled).kernels
    fail_with(sorted(gates.check_baseline(kernels, gates.read_csv(path, gates.Row))))


def test_objects_are_not_larger_nor_slower_to_compile(module: binary.Binary) -> None:
    if not GATE:
        pytest.skip("only `make cuda-build` builds every file anew")
    path = gates.baseline_folder(module) / "files.csv"
    if not path.is_file():
        pytest.skip(f"no baseline for ptxas {module.compiler}: make static-baseline")
    rows = gates.file_rows(Path(GATE) / "objects")
    print("\n".join(f"{row.file}: {row.bytes} bytes, {row.seconds} s" for row in rows))
    fail_with(gates.check_files(rows, gates.read_csv(path, gates.FileRow)))
