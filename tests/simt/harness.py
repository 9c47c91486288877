# SPDX-License-Identifier: MIT
"""Compiles the CUDA kernels for the CPU: ``python tests/simt/harness.py --mode asan build/simt-asan``."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SIMT = Path(__file__).resolve().parent
CSRC = SIMT.parent.parent / "csrc"
EXECUTOR = ("fiber", "executor", "shared", "warp")


@dataclass(frozen=True)
class Mode:
    """How kernels and their driver are compiled, what the executor is told, what the program's environment needs."""

    flags: tuple[str, ...]
    define: str = ""
    link: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()


_ASAN = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_FORMAT = "stack_trace_format='    #%n %S'"  # names of instances of templates fill pages
MODES = {
    "plain": Mode(("-O1",)),
    "asan": Mode(
        ("-O1", *_ASAN),
        "SIMT_ASAN",
        _ASAN,
        (
            ("ASAN_OPTIONS", f"exitcode=65:detect_leaks=0:{_FORMAT}"),
            ("UBSAN_OPTIONS", f"exitcode=65:print_stacktrace=1:{_FORMAT}"),
        ),
    ),
    "tsan": Mode(
        ("-O1", "-fsanitize=thread"),
        "SIMT_TSAN",
        ("-fsanitize=thread",),
        (("TSAN_OPTIONS", f"exitcode=66:history_size=4:atexit_sleep_ms=0:{_FORMAT}"),),
    ),
    # The hooks of -fsanitize=thread without its library: counters.cpp has them. Code at fixed addresses, for addr2line.
    "count": Mode(("-O1", "-fsanitize=thread", "-fno-pie", "-DSIMT_COUNT"), "SIMT_COUNT", ("-no-pie",)),
}


def compiler() -> str | None:
    """The C++ compiler: GCC, because its sanitizers know fibers and its attributes are used."""
    return os.environ.get("CXX") or shutil.which("g++")


def _tune() -> str:
    return "-march=native" if platform.machine() == "x86_64" else "-mcpu=native"


def compile_command(mode: str, kind: str, csrc: Path = CSRC) -> str:
    """The compiler's call for a source of this kind: "kernel" (a kernel or a program that runs them) or "executor"."""
    how = MODES[mode]
    own = " ".join(how.flags) if kind == "kernel" else f"-O2 {'-D' * bool(how.define)}{how.define}"
    # -ffp-contract=off: a multiplication and an addition are one operation only where a kernel says fmaf.
    # -fno-strict-aliasing: shared memory is an array of one type and used as several.
    semantics = "-ffp-contract=off -fno-strict-aliasing"
    return (
        f"{compiler()} -std=c++20 -g1 -Wall -Wextra -Wno-unknown-pragmas {semantics} {_tune()} {own} "
        f"-I{SIMT} -I{csrc} -x c++ -c"
    )


def link_command(mode: str) -> str:
    return f"{compiler()} {' '.join(MODES[mode].link)}"


def object_name(source: Path) -> str:
    return f"{source.parent.name}.{source.name}.o"


def write_ninja(folder: Path, mode: str, programs: dict[str, Sequence[Path]], csrc: Path) -> None:
    """build.ninja: each program of its own sources and the executor's."""
    lines = [
        f"rule {kind}\n  command = {compile_command(mode, kind, csrc)} -MMD -MF $out.d $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc"
        for kind in ("kernel", "executor")
    ]
    lines.append(f"rule link\n  command = {link_command(mode)} $in -o $out")
    parts = [*EXECUTOR, "counters"] if mode == "count" else EXECUTOR
    objects = [f"{name}.executor.o" for name in parts]
    lines += [f"build {target}: executor {SIMT / name}.cpp" for target, name in zip(objects, parts, strict=True)]
    seen = set()
    for program, sources in programs.items():
        own = [object_name(source) for source in sources]
        for target, source in zip(own, sources, strict=True):
            if target not in seen:
                lines.append(f"build {target}: kernel {source}")
            seen.add(target)
        lines.append(f"build {program}: link {' '.join([*own, *objects])}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")


def programs_of(csrc: Path = CSRC) -> dict[str, Sequence[Path]]:
    """The sources of every program, without the executor's."""
    kernels = sorted((csrc / "cuda").glob("*.cu"))
    return {
        "driver": [*(SIMT / name for name in ("driver.cpp", "driver_conv.cpp", "driver_fold.cpp")), *kernels],
        "probes": [SIMT / "probes.cu"],
        "selftest": [SIMT / "selftest.cu"],
    }


def build(folder: Path, mode: str, programs: Sequence[str] = ("driver",), csrc: Path = CSRC) -> dict[str, Path]:
    """Builds programs in ``folder`` (what is up to date stays) and returns their paths.

    Raises:
        subprocess.CalledProcessError: a source does not compile; the compiler's messages are in ``output``.
    """
    import ninja

    folder.mkdir(parents=True, exist_ok=True)
    chosen = {name: sources for name, sources in programs_of(csrc).items() if name in programs}
    write_ninja(folder, mode, chosen, csrc)
    subprocess.run(
        [Path(ninja.BIN_DIR) / "ninja", "-j2", "-C", folder, *programs],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return {name: folder / name for name in programs}


def run(mode: str, *command: str | Path, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a program of a build of this mode. ThreadSanitizer needs a fixed memory layout."""
    prefix = ["setarch", "-R"] if mode == "tsan" and shutil.which("setarch") else []
    return subprocess.run(
        [*prefix, *map(str, command)],
        env={**os.environ, **dict(MODES[mode].env)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the objects and programs go")
    parser.add_argument("--mode", choices=MODES, default="plain")
    parser.add_argument("programs", nargs="*", default=["driver"], help="driver (default), probes, selftest")
    arguments = parser.parse_intermixed_args()
    try:
        built = build(arguments.folder.resolve(), arguments.mode, arguments.programs)
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.output) from None
    environment = " ".join(f"{name}={value}" for name, value in MODES[arguments.mode].env)
    for path in built.values():
        print(environment, path)


if __name__ == "__main__":
    main()
