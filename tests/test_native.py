# SPDX-License-Identifier: MIT
"""The CPU kernels without torch: tests/native/driver.cpp in guarded memory, under sanitizers, on other machines."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
DRIVER = ROOT / "tests/native/driver.cpp"
FLAGS = ("-std=c++20", "-Wall", f"-I{ROOT / 'csrc'}", "-pthread")
X86 = platform.machine() == "x86_64"
AARCH64_TOOLS = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the driver guards its memory with Linux's mmap and signals"),
]


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """The output; a failure shows all of it."""
    result = subprocess.run(
        list(map(str, command)),
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, f"exit status {result.returncode} of {' '.join(map(str, command))}\n{result.stdout}"
    return result.stdout


def build(folder: Path, compiler: str, *flags: str, ready: Sequence[Path] = ()) -> Path:
    """Compiles driver and kernels in `folder`, two at a time; objects that are `ready` are taken as they are."""
    binary = folder / "driver"
    sources = [source for source in (*KERNELS, DRIVER) if source.stem not in {each.stem for each in ready}]
    objects = [*(folder / f"{source.stem}.o" for source in sources), *ready]
    lines = [f"rule cxx\n  command = {compiler} {' '.join((*FLAGS, *flags))} -c $in -o $out"]
    lines += [f"rule link\n  command = {compiler} {' '.join((*FLAGS, *flags))} $in -o $out"]
    lines += [f"build {folder / source.stem}.o: cxx {source}" for source in sources]
    lines += [f"build {binary}: link {' '.join(map(str, objects))}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))
    ninja = pytest.importorskip("ninja", reason="the driver is compiled by ninja")
    run(Path(ninja.BIN_DIR) / "ninja", "-j2", "-C", folder)
    return binary


@pytest.fixture(scope="session")
def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler (install g++ or set CXX)")
    return found


@pytest.fixture(scope="session")
def driver(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("plain"), compiler, "-O2")


@pytest.fixture(scope="session")
def split_avx512(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The AVX-512 source with its 16 lanes and 32 registers, compiled for AVX2."""
    target = tmp_path_factory.mktemp("split") / "target_avx512.o"
    flags = ("-O1", "-mavx2", "-mfma", "-Wno-psabi", "-DRVG_SPLIT_AVX512")  # -O2 takes twice as long to compile
    run(compiler, *FLAGS, *flags, "-c", ROOT / "csrc/cpu/target_avx512.cpp", "-o", target)
    return target


@pytest.fixture(scope="session")
def sanitized_driver(request: pytest.FixtureRequest, compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    # Instrumented AVX-512 code takes minutes to compile: only where it can run.
    needed = not X86 or "avx512f" in Path("/proc/cpuinfo").read_text()
    ready = () if needed else (request.getfixturevalue("split_avx512"),)
    return build(tmp_path_factory.mktemp("sanitized"), compiler, *flags, ready=ready)


def check_report(output: str, isa: str) -> None:
    assert output.startswith(f"{isa}: "), output
    assert output.rstrip().endswith("; 0 failures"), output


def isas() -> list[object]:
    if not X86:
        return ["baseline"]
    flags = set(Path("/proc/cpuinfo").read_text().split()) if sys.platform == "linux" else set()
    needs = {"baseline": set(), "avx2": {"avx2", "fma"}, "avx512": {"avx512f"}}
    return [
        pytest.param(isa, marks=pytest.mark.skipif(not need <= flags, reason=f"this CPU has no {isa}"))
        for isa, need in needs.items()
    ]


@pytest.mark.parametrize("isa", isas())
def test_guarded_memory(driver: Path, isa: str) -> None:
    check_report(run(driver, env={"REPVGG_CUDA_CPU_ISA": isa}), isa)


@pytest.mark.parametrize("isa", isas())
def test_sanitizers(sanitized_driver: Path, isa: str) -> None:
    check_report(run(sanitized_driver, "--quick", env={"REPVGG_CUDA_CPU_ISA": isa}), isa)


@pytest.mark.skipif(not X86 or "fma" not in Path("/proc/cpuinfo").read_text(), reason="this CPU has no fma")
def test_wide_vectors_anywhere(compiler: str, driver: Path, split_avx512: Path, tmp_path: Path) -> None:
    """What the AVX-512 source computes, if not its code."""
    binary = tmp_path / "driver"
    others = [path for path in driver.parent.glob("*.o") if path.name != split_avx512.name]
    run(compiler, *FLAGS, split_avx512, *others, "-o", binary)
    check_report(run(binary, "--quick", env={"REPVGG_CUDA_CPU_ISA": "avx512"}), "avx512")


@pytest.mark.skipif(
    os.environ.get("REPVGG_CUDA_TEST_AARCH64", "0") in ("", "0"),
    reason="emulation takes many minutes: set REPVGG_CUDA_TEST_AARCH64=1",
)
def test_aarch64(tmp_path: Path) -> None:
    missing = [package for tool, package in AARCH64_TOOLS.items() if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs the Debian packages {' '.join(missing)}")
    binary = build(tmp_path, "aarch64-linux-gnu-g++", "-O2", "-static")
    check_report(run("qemu-aarch64", binary, "--quick"), "baseline")


@pytest.mark.skipif(not X86, reason="AVX-512 is x86-64's")
def test_instructions_of_each_isa(driver: Path) -> None:
    """AVX-512 code, which not every machine can run, uses its registers; the baseline uses nothing it may not have."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("needs objdump (Debian package binutils)")
    code = {
        isa: run(objdump, "-d", "--no-show-raw-insn", driver.parent / f"target_{isa}.o")
        for isa in ("baseline", "avx2", "avx512")
    }
    assert re.search(r"vfmadd\w+ .*%zmm", code["avx512"])
    assert re.search(r"vfmadd\w+ .*%ymm", code["avx2"])
    assert not re.search(r"%zmm", code["avx2"])
    assert not re.search(r"%[yz]mm|vfmadd", code["baseline"])
