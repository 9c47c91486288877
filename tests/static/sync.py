# SPDX-License-Identifier: MIT
"""Proves race freedom of the PTX that nvcc emits, for small launches, with sentryward (PyPI, Apache-2.0).

Nothing about a launch is written twice: the kernels' own launch code runs against a runtime that launches nothing
(capture.cpp) and says kernel, grid, shared memory and the bytes of the parameters; what a kernel loads from them is
read from its PTX.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sass

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
#: What sentryward 0.1.1 knows of: asynchronous copies, ldmatrix and mma came with it.
ARCH = 80
POINTER_BYTE = 0x5A  # the highest byte of capture.cpp's pointers
SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


@dataclass(frozen=True)
class Entry:
    """A kernel in PTX."""

    name: str
    ptx: Path
    parameters: tuple[str, ...]
    sizes: tuple[int, ...]
    loads: frozenset[tuple[int, int, str]]  # parameter, offset, type: what the kernel reads at a fixed place


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    for path in [f"{home}/bin/nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]:
        if path and os.access(path, os.X_OK):
            return path
    raise sass.ToolMissing("there is no nvcc: install the CUDA toolkit and set CUDA_HOME")


def entries(ptx: Path) -> Iterator[Entry]:
    text = ptx.read_text()
    for match in re.finditer(r"\.entry (\S+?)\((.*?)\)(.*?)\n\}", text, re.DOTALL):
        name, head, body = match.groups()
        names, sizes = [], []
        for declared in re.finditer(
            r"\.param .*?(?:\.[busf](\d+)|\.b8) (?:\.ptr .*?)?(\w+_param_\d+)(?:\[(\d+)\])?", head
        ):
            names.append(declared[2])
            sizes.append(int(declared[3]) if declared[3] else int(declared[1]) // 8)
        index = {parameter: i for i, parameter in enumerate(names)}
        loads = set()
        for load in re.finditer(
            r"ld\.param(?:\.v([24]))?\.([busf])(\d+)\s+[^,;]*?(?:\{.*?\})?, *\[(\w+)(?:\+(\d+))?\]", body
        ):
            lanes, letter, bits, parameter, offset = load.groups()
            if parameter in index:
                for lane in range(int(lanes or 1)):
                    at = int(offset or 0) + lane * int(bits) // 8
                    loads.add((index[parameter], at, f"{letter if letter != 'b' else 'u'}{bits}"))
        yield Entry(name, ptx, tuple(names), tuple(sizes), frozenset(loads))


@dataclass
class Program:
    """The program that captures launches, and the PTX of the kernels that it was asked for."""

    capture: Path
    folder: Path  # for what is made on the way
    csrc: Path
    entries: dict[str, Entry] = field(default_factory=dict)

    def run(self, arguments: str) -> list[dict[str, Any]]:
        parameters = self.folder / "parameters"
        lines = [" ".join([entry.name, *map(str, entry.sizes)]) for entry in self.entries.values()]
        parameters.write_text("\n".join(lines))
        lines = sass.run([str(self.capture), str(parameters), *arguments.split()]).splitlines()
        return [json.loads(line) for line in lines]

    def launches(self, arguments: str) -> list[dict[str, Any]]:
        """What is launched for these arguments of capture.cpp, with the parameters' bytes."""
        for launch in self.run(arguments):
            if launch["kernel"] not in self.entries:
                entry = compile_kernel(launch["kernel"], self.csrc, self.folder)
                self.entries[entry.name] = entry
        return self.run(arguments)


def write_kernel(name: str, csrc: Path, folder: Path) -> Path:
    """A source that holds one kernel, which is named as sass.demangle does."""
    declared = re.compile(rf"\b{name.split('<')[0]}\(")
    header = next(path for path in sorted((csrc / "cuda").glob("*.cuh")) if declared.search(path.read_text()))
    source = folder / f"{header.stem}-{hashlib.sha256(name.encode()).hexdigest()[:16]}.cu"
    source.write_text(
        f'#include "cuda/{header.name}"\n'
        "using namespace repvgg;\nusing namespace repvgg::cuda;\n"
        f"const void* kernel() {{ return reinterpret_cast<const void*>(&{name}); }}\n"
    )
    return source


def compile_kernel(mangled: str, csrc: Path, folder: Path) -> Entry:
    """The PTX of one kernel, for ARCH."""
    source = write_kernel(sass.demangle([mangled])[mangled], csrc, folder)
    ptx = source.with_suffix(".ptx")
    flags = ["-std=c++17", f"-I{csrc}", f"-arch=compute_{ARCH}", "-O3", "-lineinfo"]
    sass.run([nvcc(), *flags, "-ptx", str(source), "-o", str(ptx)])
    return next(entry for entry in entries(ptx) if entry.name == mangled)


def build(folder: Path, objects: Sequence[Path]) -> Program:
    """Links capture.cpp with the launch code in the objects of csrc/cuda."""
    capture = folder / "capture"
    flags = ["-std=c++17", f"-I{CSRC}", "-cudart=none"]
    sass.run([nvcc(), *flags, str(HERE / "capture.cpp"), *map(str, objects), "-o", str(capture)])
    return Program(capture, folder, CSRC)


def problem(entry: Entry, launch: dict[str, Any]) -> dict[str, Any]:
    """sentryward's input: every parameter word that the kernel reads, pointers as such."""
    arguments, pointers = [], []
    for i, text in enumerate(launch["parameters"]):
        data = bytes.fromhex(text)
        is_pointer = {at for at in range(0, len(data) - 7, 8) if data[at + 7] == POINTER_BYTE}
        reads = {(at, kind) for parameter, at, kind in entry.loads if parameter == i}
        covered = {byte for at, kind in reads for byte in range(at, at + SIZES[kind[1:]])} | {
            byte for at in is_pointer for byte in range(at, at + 8)
        }
        # What is read at an index that is computed: by words.
        reads |= {(at, "u32") for at in range(0, len(data) - 3, 4) if not covered & set(range(at, at + 4))}
        for at, kind in sorted(reads):
            if at in is_pointer:
                continue
            value = int.from_bytes(data[at : at + SIZES[kind[1:]]], "little")
            kind = "u" + kind[1:]
            arguments.append({"parameter": entry.parameters[i], "offset": at, "type": kind, "value": value})
        pointers += [{"parameter": entry.parameters[i], "offset": at, "type": "pointer"} for at in sorted(is_pointer)]
    launched = {
        "grid_dim": [launch["grid"], 1, 1],
        "block_dim": [launch["block"], 1, 1],
        "dynamic_shared_bytes": launch["dynamic_shared"],
    }
    return {
        "schema": "spverify.kernel-input/v1",
        "entry": entry.name,
        "launch": launched,
        "arguments": arguments,
        "declarations": pointers,
    }


def verify(program: Program, launch: dict[str, Any], timeout: float) -> dict[str, Any]:
    """sentryward's report; its "result" is "race_free", a finding such as "potential_race", or "unsupported"."""
    import sentryward

    entry = program.entries[launch["kernel"]]
    path = program.folder / "input.json"
    path.write_text(json.dumps(problem(entry, launch)))
    return dict(sentryward.verify(str(entry.ptx), input=str(path), timeout_seconds=timeout))


def witness(report: dict[str, Any]) -> str:
    """What a report says against a kernel: where the accesses of a race are, else the diagnosis."""
    places = [race[side]["location"] for race in report.get("races", []) for side in ("first", "second")]
    return f"{report['result']}: {json.dumps(places or report.get('diagnostics', []))[:2000]}"
