# SPDX-License-Identifier: MIT
"""The kernels of a module, an object file or a fat binary: what they use, what their launch bounds declare, their
code."""

from __future__ import annotations

import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import sass


@dataclass(frozen=True)
class Kernel:
    name: str  # as sass.demangle says it
    arch: int  # 80 for sm_80
    registers: int
    shared: int  # bytes of static shared memory
    stack: int
    local: int
    threads: int | None  # __launch_bounds__; None: not declared, or there is no PTX to read it from
    blocks: int | None  # the blocks per multiprocessor that it declares
    code: sass.Code = field(repr=False)
    dynamic_shared: int = 0  # bytes of a block; gates.with_dynamic_shared fills it

    @property
    def place(self) -> tuple[str, int]:
        return self.name, self.arch


@dataclass(frozen=True)
class Binary:
    path: Path
    archs: frozenset[int]  # of the machine code
    ptx_archs: frozenset[int]
    compiler: str  # the version of ptxas, "13.0.88"; "" where there is no code
    kernels: tuple[Kernel, ...] = field(repr=False)  # by name, then by architecture


def _launch_bounds(path: Path) -> dict[str, tuple[int | None, int | None]]:
    """Mangled name -> threads, blocks per multiprocessor: ptxas obeys them and leaves no trace, the PTX says them."""
    text = sass.run([sass.tool("cuobjdump"), "-ptx", str(path)])
    found = {}
    for name, head in re.findall(r"\.entry (\S+?)\(.*?\)\s*([^{]*)\{", text, re.DOTALL):
        threads = re.search(r"\.(?:maxntid|reqntid) (\d+)(?:, *(\d+))?(?:, *(\d+))?", head)
        blocks = re.search(r"\.minnctapersm (\d+)", head)
        count = None
        if threads:
            x, y, z = (int(extent or 1) for extent in threads.groups())
            count = x * y * z
        found[name] = (count, int(blocks[1]) if blocks else None)
    return found


def _resources(cubin: Path) -> dict[str, dict[str, int]]:
    usage = sass.run([sass.tool("cuobjdump"), "-res-usage", str(cubin)])
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", values)}
        for name, values in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage)
    }


def _compiler(cubin: Path) -> str:
    version = re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", cubin.read_bytes())
    return version[1].decode() if version else ""


def _arch(name: str) -> int:
    return int(re.search(r"\.sm_(\d+)", name)[1])  # type: ignore[index]


def read(path: Path, disassemble: bool = True) -> Binary:
    """`disassemble`: a second per architecture and some ten kernels; else their code is left empty."""
    path = path.resolve()
    listed_ptx = sass.run([sass.tool("cuobjdump"), "--list-ptx", str(path)])
    bounds = _launch_bounds(path)
    with tempfile.TemporaryDirectory() as folder:
        sass.run([sass.tool("cuobjdump"), "-xelf", "all", str(path)], cwd=folder)
        cubins = sorted(Path(folder).glob("*.cubin"))
        used = {cubin: _resources(cubin) for cubin in cubins}
        codes = {cubin: {name: sass.Code(name) for name in used[cubin]} for cubin in cubins}
        if disassemble:
            busy = [cubin for cubin in cubins if used[cubin]]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                codes.update(zip(busy, pool.map(sass.disassemble, busy), strict=True))
        versions = {_compiler(cubin) for cubin in cubins if used[cubin]}
    if len(versions) > 1:
        raise RuntimeError(f"{path} holds code of several compilers: {', '.join(sorted(versions))}")
    names = sass.demangle(sorted({name for kernels in used.values() for name in kernels}))
    kernels = []
    for cubin in cubins:
        arch = _arch(cubin.name)
        for mangled, resources in used[cubin].items():
            # From sm_90 on the figure includes 1 KB that the system keeps for itself in every block.
            shared = resources["SHARED"] - (1024 if arch >= 90 else 0)
            threads, blocks = bounds.get(mangled, (None, None))
            kernels.append(
                Kernel(names[mangled], arch, resources["REG"], shared, resources["STACK"], resources["LOCAL"],
                       threads, blocks, codes[cubin][mangled])
            )  # fmt: skip
    kernels.sort(key=lambda kernel: kernel.place)
    archs = frozenset(kernel.arch for kernel in kernels)  # nvcc's linker adds an empty cubin of its own
    ptx_archs = frozenset(int(number) for number in re.findall(r"\.sm_(\d+)[a-z]?\.ptx", listed_ptx))
    return Binary(path, archs, ptx_archs, versions.pop() if versions else "", tuple(kernels))
