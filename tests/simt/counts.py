# SPDX-License-Identifier: MIT
"""What accesses of kernels cost, by line: ``python tests/simt/counts.py --algorithm mma CASE``, as of driver.cpp.

Wavefronts of shared memory and 32-byte sectors of global memory, beside the ideal: one wavefront for each phase of a
request, and no sector that is used in part.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from simt import harness


@dataclass(frozen=True)
class Cost:
    """Of all requests of a line of csrc/."""

    kernel: str
    place: str
    space: str
    operation: str
    bytes: int
    requests: int
    cost: int
    ideal: int

    def __str__(self) -> str:
        unit = "wavefronts" if self.space == "shared" else "sectors"
        return (
            f"{self.place:32} {self.space:6} {self.operation:5} {self.bytes:2} B {self.requests:8} requests "
            f"{self.cost:9} {unit:10} ideal {self.ideal:9}  x {self.cost / max(self.ideal, 1):.2f}"
        )


def source_lines(program: Path, addresses: Sequence[int]) -> dict[int, tuple[str, ...]]:
    """The lines of csrc/cuda behind each address, inlined callers included."""
    if not addresses:
        return {}
    output = subprocess.run(
        ["addr2line", "-a", "-i", "-e", str(program)],
        input="\n".join(f"{address - 1:#x}" for address in addresses),  # return addresses: the call is before
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = {}
    for block in re.split(r"^(?=0x)", output, flags=re.MULTILINE)[1:]:
        head, *lines = block.splitlines()
        places = (re.match(r".*/csrc/(?:cuda/)?([^:]+:\d+)", line) for line in lines)
        found[int(head, 16) + 1] = tuple(place[1] for place in places if place)
    return found


def parse(program: Path, output: str) -> list[Cost]:
    """The costs in a driver's last line, those of one line of source added up."""
    counts = json.loads(output.splitlines()[-1])["counts"]
    lines = source_lines(program, sorted({address for count in counts for address in count["calls"]}))
    sums: dict[tuple[str, str, str, str, int], list[int]] = {}
    for count in counts:
        place = next((line for address in count["calls"] for line in lines[address]), None)
        if place is None:
            continue  # the driver's own kernel
        key = (count["kernel"], place, count["space"], count["operation"], count["bytes"])
        total = sums.setdefault(key, [0, 0, 0])
        for i, what in enumerate(("requests", "cost", "ideal")):
            total[i] += count[what]
    return [Cost(*key, *total) for key, total in sorted(sums.items())]


def conflicts(costs: Sequence[Cost]) -> list[Cost]:
    """Vector accesses of shared memory that are not ideal: no kernel has any."""
    return [cost for cost in costs if cost.space == "shared" and cost.bytes == 16 and cost.cost != cost.ideal]


def measure(program: Path, *arguments: str) -> list[Cost]:
    """Runs a driver of a "count" build.

    Raises:
        RuntimeError: it fails.
    """
    result = harness.run("count", program, *arguments)
    if result.returncode != 0:
        raise RuntimeError(f"exit {result.returncode}\n{result.stdout[-2000:]}{result.stderr}")
    return parse(program, result.stdout)


def main() -> int:
    program = harness.build(harness.SIMT.parent.parent / "build/simt/count", "count")["driver"]
    for cost in measure(program, *sys.argv[1:]):
        print(cost)
    return 0


if __name__ == "__main__":
    sys.exit(main())
