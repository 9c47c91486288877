# SPDX-License-Identifier: MIT
"""Reads compiled CUDA code: the disassembler's text becomes instructions, basic blocks, loops and an instruction mix.

The main loop of a kernel is the innermost loop that does the arithmetic: of the loops with arithmetic instructions
(HMMA, IMMA, FFMA, ...) that contain no other such loop, the one with most of them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import networkx

#: What a kernel is there for; everything else in its main loop is overhead. In order of precedence.
MATH = ("HMMA", "IMMA", "FFMA", "FFMA2", "DFMA")
SHARED_LOADS = ("LDS", "LDSM")
SHARED = (*SHARED_LOADS, "STS")
GLOBAL = ("LDG", "LDGSTS", "STG")
#: Spilled registers and arrays that are indexed at run time; LD and ST go through generic addresses.
LOCAL = ("LDL", "STL", "LD", "ST")


class ToolMissing(RuntimeError):
    """A program that the gates need is not installed; the message says how to get it."""


def tool(name: str) -> str:
    """The path of a CUDA binary utility: of the PyPI package, else of the PATH, else of the toolkit."""
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob(f"nvidia/*/bin/{name}"))
    for path in (
        str(packaged[-1]) if packaged else None,
        shutil.which(name),
        shutil.which(f"/usr/local/cuda/bin/{name}"),
    ):
        if path:
            return path
    raise ToolMissing(f"{name} is not installed: pip install nvidia-cuda-{name}")


def run(command: list[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return str(done.stdout)


def demangle(names: list[str]) -> dict[str, str]:
    """Mangled name -> what a reader calls it: without namespaces, return type and parameters."""
    program = shutil.which("cu++filt") or shutil.which("c++filt")
    if program is None:
        raise ToolMissing("neither cu++filt nor c++filt is installed: install binutils")
    full = run([program], input="\n".join(names) + "\n").splitlines() if names else []
    return {name: _short(text) for name, text in zip(names, full, strict=True)}


def _short(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|\b(repvgg|cuda)::", "", name).replace("> >", ">>")
    depth, start = 0, 0
    for i, char in enumerate(name):
        depth += {"<": 1, ">": -1}.get(char, 0)
        if depth == 0 and char == " ":
            start = i + 1
        if depth == 0 and char == "(":
            return name[start:i]
    return name


@dataclass(frozen=True)
class Instruction:
    text: str  # "@!P0 LDG.E.128 R4, [R2.64]"
    encoding: int = 0  # the upper 64 of its 128 bits

    @cached_property
    def predicate(self) -> str:
        return self.text.split()[0] if self.text.startswith("@") else ""

    @cached_property
    def opcode(self) -> str:
        return self.text.removeprefix(self.predicate).split()[0]

    @cached_property
    def kind(self) -> str:
        """The opcode without its modifiers. ptxas also writes jumps out of loops as calls, to a plain label."""
        kind = self.opcode.split(".")[0]
        return "BRA" if kind == "CALL" and "`(.L" in self.text else kind

    @property
    def is_filler(self) -> bool:
        """Never executed, or without any effect: there for timing or alignment."""
        return self.predicate in ("@!PT", "@!UPT") or self.kind == "NOP" or " URZ, UPT, UPT, URZ, URZ, URZ" in self.text

    @property
    def width(self) -> int:
        """Bytes that one thread moves; a matrix of LDSM counts 4."""
        if self.kind == "LDSM":
            return 4 * int((re.search(r"\.([124])$", self.opcode) or [0, 1])[1])
        if size := re.search(r"\.(?:[US])?(8|16|32|64|128|256)(?=\.|$)", self.opcode):
            return int(size[1]) // 8
        return 4

    @property
    def target(self) -> str | None:
        """The label that control may go to from here."""
        if self.kind not in ("BRA", "BRX", "JMP"):
            return None
        label = re.search(r"`\((\.L\w+)\)", self.text)
        return label[1] if label else None

    @property
    def ends_flow(self) -> bool:
        """Control never reaches the next instruction."""
        if self.kind in ("RET", "KILL"):
            return True
        if self.kind == "BRA":  # conditional: a predicate in front, or before the label
            return not self.predicate and re.match(r"BRA(\.\w+)* `", self.text) is not None
        return self.kind in ("EXIT", "BRX", "JMP") and not self.predicate


@dataclass(frozen=True)
class Mix:
    """What a stretch of code is made of, without its fillers."""

    instructions: tuple[Instruction, ...]

    @cached_property
    def kinds(self) -> Counter[str]:
        return Counter(i.kind for i in self.instructions)

    @cached_property
    def opcodes(self) -> Counter[str]:
        return Counter(i.opcode for i in self.instructions)

    @property
    def total(self) -> int:
        return len(self.instructions)

    @cached_property
    def math_kind(self) -> str:
        """The first of MATH that occurs; "" where none does."""
        return next((kind for kind in MATH if self.kinds[kind]), "")

    @cached_property
    def math(self) -> int:
        if self.math_kind in ("FFMA", "FFMA2"):
            return self.kinds["FFMA"] + self.kinds["FFMA2"]
        return self.kinds[self.math_kind] if self.math_kind else 0

    @property
    def share(self) -> float:
        return self.math / self.total if self.total else 0.0

    def count(self, kinds: tuple[str, ...], below: int | None = None) -> int:
        """Instructions of these kinds; with `below`, those that move fewer bytes than that."""
        return sum(i.kind in kinds and (below is None or i.width < below) for i in self.instructions)

    def narrow(self, kinds: tuple[str, ...], below: int) -> str:
        """The opcodes that `count` counts, for messages: "LDS x3, STS.64 x1"."""
        found = Counter(i.opcode for i in self.instructions if i.kind in kinds and i.width < below)
        return ", ".join(f"{opcode} x{n}" for opcode, n in sorted(found.items()))


@dataclass
class Code:
    """The instructions of one kernel in order, and where its labels stand."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @cached_property
    def mix(self) -> Mix:
        return Mix(tuple(i for i in self.instructions if not i.is_filler))

    @cached_property
    def blocks(self) -> dict[int, int]:
        """First instruction -> one past the last, of each basic block."""
        ends = {i + 1 for i, instruction in enumerate(self.instructions) if instruction.target or instruction.ends_flow}
        starts = sorted({0} | ends | set(self.labels.values()))
        starts = [start for start in starts if start < len(self.instructions)]
        return dict(zip(starts, [*starts[1:], len(self.instructions)], strict=True))

    @cached_property
    def flow(self) -> networkx.DiGraph:
        """The blocks that control can reach from the kernel's entry (calls return), by their first instruction."""
        graph = networkx.DiGraph()
        graph.add_nodes_from(self.blocks)
        for start, end in self.blocks.items():
            last = self.instructions[end - 1]
            if last.target in self.labels and self.labels[last.target] in self.blocks:
                graph.add_edge(start, self.labels[last.target])
            if not last.ends_flow and end in self.blocks:
                graph.add_edge(start, end)
        return graph.subgraph(networkx.descendants(graph, 0) | {0})

    @cached_property
    def loops(self) -> list[frozenset[int]]:
        """Natural loops as sets of blocks; loops with the same head are one."""
        if not self.instructions:
            return []
        dominator = dict(networkx.immediate_dominators(self.flow, 0))
        bodies: dict[int, set[int]] = {}
        for tail, head in self.flow.edges:
            above = tail
            while above not in (head, 0):
                above = dominator[above]
            if above == head:
                body = bodies.setdefault(head, {head})
                if tail not in body:
                    body |= networkx.ancestors(self.flow.subgraph(set(self.flow) - {head}), tail) | {tail}
        return [frozenset(body) for body in bodies.values()]

    def mix_of(self, blocks: frozenset[int]) -> Mix:
        inside = (i for start in sorted(blocks) for i in self.instructions[start : self.blocks[start]])
        return Mix(tuple(i for i in inside if not i.is_filler))

    @cached_property
    def main_loop(self) -> Mix:
        """Empty where no loop computes."""
        kind = next((kind for kind in MATH if any(self.mix_of(loop).kinds[kind] for loop in self.loops)), None)
        loops = [loop for loop in self.loops if kind and self.mix_of(loop).math_kind == kind]
        inner = [loop for loop in loops if not any(other < loop for other in loops)]
        return max((self.mix_of(loop) for loop in inner), key=lambda mix: (mix.math, -mix.total), default=Mix(()))


def parse(text: str) -> dict[str, Code]:
    """Mangled name -> code, of what `nvdisasm -c` prints, with or without `-hex`."""
    found: dict[str, Code] = {}
    code: Code | None = None
    for line in text.splitlines():
        if section := re.match(r"\.text\.(\S+):", line):
            code = found[section[1]] = Code(section[1])
        elif line.startswith("//-"):
            code = None  # the next section
        elif code is not None:
            if label := re.match(r"\s*(\.L\w+):", line):
                code.labels[label[1]] = len(code.instructions)
            elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
                code.instructions.append(Instruction(instruction[1]))
            elif (upper := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", line)) and code.instructions:
                code.instructions[-1] = replace(code.instructions[-1], encoding=int(upper[1], 16))
    return found


def disassemble(cubin: Path) -> dict[str, Code]:
    return parse(run([tool("nvdisasm"), "-hex", "-c", str(cubin)]))
