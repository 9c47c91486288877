# SPDX-License-Identifier: MIT
"""Prints what the compiled kernels are as a Markdown table: `python tests/static/report.py [MODULE]`.

MODULE is a compiled module, object or fat binary; by default the installed extension. With --write-baseline FOLDER, a
folder that `make cuda-build` filled, it renews the baseline of the installed compiler instead.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import binary
import gates
import sass


def markdown(module: binary.Binary, archs: list[int] | None) -> str:
    lines = [
        "| kernel | sm | registers | shared | blocks/SM | main loop | share | per op | shared loads | barriers |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kernel in module.kernels:
        if archs and kernel.arch not in archs:
            continue
        row = gates.row(kernel)
        loop = ["", "", "", ""]
        if row.loop_math:
            loop = [f"{row.loop_math} {row.math} of {row.loop_total}", f"{row.share:.1%}"]
            loop += [f"{row.loop_total / row.loop_math:.3f}", f"{row.loop_shared_loads / row.loop_math:.3f}"]
        cells = [f"`{row.kernel}`", row.arch, row.registers, row.shared, row.blocks or "", *loop, row.barriers]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write_baseline(folder: Path) -> None:
    module = gates.with_dynamic_shared(binary.read(next(folder.glob("repvgg_cuda/_C*"))))
    target = gates.baseline_folder(module)
    gates.write_csv(target / "kernels.csv", [gates.row(kernel) for kernel in module.kernels])
    gates.write_csv(target / "files.csv", gates.file_rows(folder / "objects"))
    print(f"wrote {target}: see `git diff`", file=sys.stderr)


def module_named(parser: argparse.ArgumentParser, path: Path | None) -> binary.Binary:
    """The compiled module at ``path``; None: the installed extension, an error of ``parser`` if it has no kernels."""
    if path is None:
        from repvgg_cuda import _ext

        if _ext.module is None or not _ext.has_cuda_kernels():
            parser.error("the installed extension has no CUDA kernels: name a module")
        path = Path(str(_ext.module.__file__))
    return gates.with_dynamic_shared(binary.read(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("module", nargs="?", type=Path, help="default: the installed extension")
    parser.add_argument("--arch", type=int, nargs="+", metavar="80", help="default: all in the module")
    parser.add_argument("--write-baseline", type=Path, metavar="FOLDER", help="renew the baseline from that build")
    args = parser.parse_args()
    try:
        if args.write_baseline:
            write_baseline(args.write_baseline)
            return
        print(markdown(module_named(parser, args.module), args.arch))
    except sass.ToolMissing as missing:
        parser.error(str(missing))


if __name__ == "__main__":
    main()
