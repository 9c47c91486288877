# SPDX-License-Identifier: MIT
"""How much dynamic shared memory a kernel is launched with: no compiled code says it, the kernel's traits do.

A kernel's name holds its traits, `conv3x3_kernel<Conv3x3Traits<8, 32>>`, and these have kSharedBytes. One small program
prints it for all of them.
"""

from __future__ import annotations

import functools
import re
import tempfile
from pathlib import Path

import sass
import sync

MEMBER = "kSharedBytes"


def traits_of(name: str) -> str:
    """The first template argument of a kernel, as C++: enumerators are numbers with a cast in a demangled name."""
    match = re.fullmatch(r"\w+<(\w+<.*?>).*>", name)
    if match is None:
        raise ValueError(f"{name} has no traits as template argument")
    return match[1]


@functools.cache
def dynamic_shared(kernels: frozenset[str]) -> dict[str, int]:
    """Kernel -> bytes, of the sources at hand."""
    if not kernels:
        return {}
    names = sorted(kernels)
    templates = {traits_of(name).split("<")[0] for name in names}
    headers = sorted(
        path.relative_to(sync.CSRC)
        for path in sync.CSRC.glob("cuda/*.cuh")
        if any(f"struct {template} " in path.read_text() for template in templates)
    )
    lines = [f'#include "{header}"' for header in headers]
    lines += ["#include <cstdio>", "using namespace repvgg;", "using namespace repvgg::cuda;", "int main() {"]
    lines += [f'  std::printf("%d\\n", int({traits_of(name)}::{MEMBER}));' for name in names]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "bytes.cu"
        source.write_text("\n".join([*lines, "}"]) + "\n")
        program = str(source.with_suffix(""))
        sass.run([sync.nvcc(), "-std=c++17", f"-I{sync.CSRC}", f"-arch=sm_{sync.ARCH}", str(source), "-o", program])
        return dict(zip(names, map(int, sass.run([program]).split()), strict=True))
