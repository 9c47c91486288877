# SPDX-License-Identifier: MIT
"""Time and peak memory of converting checkpoint files: RepVGG-D2se in train form, and a synthetic one of 500 MB.

    python benchmarks/convert_memory.py [--json FILE] [--only NAME]

Each conversion runs in a process of its own. Its peak is the kernel's high-water mark of resident memory (VmHWM, reset
after the imports), minus what the process held before: pages of mapped files count, the libraries do not. Linux only.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from repvgg_cuda import checkpoint, environment, testing
from repvgg_cuda.models import create_model

CASES = {
    "d2se safetensors": ("d2se.safetensors", "out.safetensors"),
    "d2se pth to safetensors": ("d2se.pth", "out.safetensors"),
    "d2se pth": ("d2se.pth", "out.pth"),
    "synthetic safetensors": ("synthetic.safetensors", "out.safetensors"),
}


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the most so far) of this process."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def convert(source: Path, target: Path) -> dict[str, float]:
    """In a process of its own: converts, and says how long it took and how much memory."""
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before, start = resident("VmRSS"), time.perf_counter()
    report = checkpoint.convert_file(source, target)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": resident("VmHWM") - before, "blocks": len(report.blocks)}


def synthetic(size: int) -> dict[str, torch.Tensor]:
    """Blocks of 512 channels in train form, official names, until ``size`` bytes are reached."""
    state: dict[str, torch.Tensor] = {}
    total = index = 0
    while total < size:
        index += 1
        block = testing.random_branches(512, 512, seed=index)
        for slot, part in zip(("rbr_dense", "rbr_1x1", "rbr_identity"), block.parts, strict=True):
            assert part.bn is not None
            where = f"stage3.{index}.{slot}."
            if part.kernel is not None:
                state[f"{where}conv.weight"], where = part.kernel, f"{where}bn."
            assert part.bn.weight is not None
            assert part.bn.bias is not None
            state |= {f"{where}weight": part.bn.weight, f"{where}bias": part.bn.bias}
            state |= {f"{where}running_mean": part.bn.mean, f"{where}running_var": part.bn.var}
        total = sum(value.nbytes for value in state.values())
    return state


def write(path: Path) -> None:
    if path.exists():
        return
    state = create_model("RepVGG-D2se").state_dict() if path.stem == "d2se" else synthetic(500 * 10**6)
    checkpoint.save_state_dict_file(state, path)


def measure(folder: Path, name: str) -> dict[str, object]:
    source, target = (folder / each for each in CASES[name])
    # The file is made in a process of its own too, and read once, so that the disk is no part of the time.
    for action in ("--write", "--read"):
        subprocess.run([sys.executable, __file__, action, str(source)], check=True)
    command = [sys.executable, __file__, "--convert", str(source), str(target)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    size = source.stat().st_size
    row = {"case": name, "size": size, **result, "peak / size": result["peak"] / size}
    target.unlink()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--only", choices=CASES, help="one case")
    parser.add_argument("--convert", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert:
        print(json.dumps(convert(*args.convert)))
    elif args.write:
        write(args.write)
    elif args.read:
        args.read.read_bytes()
    else:
        print(environment.machine(environment.collect(torch.device("cpu"))))
        with tempfile.TemporaryDirectory() as folder:
            rows = [measure(Path(folder), name) for name in ([args.only] if args.only else CASES)]
        print(f"{'case':26}{'file':>10}{'blocks':>8}{'time':>9}{'peak':>10}{'peak / file':>13}")
        for row in rows:
            print(
                f"{row['case']:26}{row['size'] / 1e6:>7.0f} MB{row['blocks']:>8}{row['seconds']:>7.1f} s"
                f"{row['peak'] / 1e6:>7.0f} MB{row['peak / size']:>13.2f}"
            )
        if args.json:
            args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
